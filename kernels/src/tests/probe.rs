//! The probes do the work they say: what they return is right.

use super::{Random, scalar};
use crate::Backend;

#[test]
fn every_word_is_read() {
    let mut random = Random(11);
    for length in [0, 1, 31, 32, 33, 100, 1_000] {
        let words: Vec<u64> = (0..length).map(|_| random.bits()).collect();
        let want = words.iter().fold(0, |all, word| all ^ word);
        for backend in Backend::available() {
            assert_eq!(backend.probe_read(&words), want, "{}, {length}", backend.name());
        }
    }
}

#[test]
fn every_product_is_made() {
    let mut random = Random(12);
    let mut codes = [0; 128];
    codes.fill_with(|| random.below(4) as u8);
    let x: Vec<i8> = (0..4 * 1024).map(|_| random.bits() as i8).collect();
    // Integers this small: no sum is rounded.
    let mut w = [0.0; 32];
    w.fill_with(|| random.below(9) as f32 - 4.0);
    let floats: Vec<f32> = x.iter().map(|x| f32::from(*x)).collect();
    for rounds in [0, 1, 7, 70] {
        let products = scalar().probe_multiply(&codes, &x, rounds);
        let sum = scalar().probe_fma(&w, &floats, rounds);
        let exact: i64 = x
            .iter()
            .zip(codes.iter().cycle())
            .map(|(x, code)| i64::from(*x) * i64::from(*code))
            .sum();
        assert_eq!(products, (exact * rounds as i64) as u16);
        for backend in Backend::available() {
            let name = backend.name();
            assert_eq!(backend.probe_multiply(&codes, &x, rounds), products, "{name}");
            assert_eq!(backend.probe_fma(&w, &floats, rounds), sum, "{name}");
        }
    }
}

#[test]
#[should_panic(expected = "whole chunks")]
fn a_probe_refuses_what_it_would_not_work_through() {
    scalar().probe_multiply(&[0; 128], &[0; 1023], 1);
}
