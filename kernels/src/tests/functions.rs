//! exp, ln, sine and cosine: equal on every backend, and close to the truth, over a dense walk of
//! all floats.

use super::{Backend, LENGTHS, Random, SPECIAL, check, scalar};
use crate::scalar::transcendental::{exp, ln};
use crate::scalar::trigonometry::{cos, sin};

/// How many times fewer floats are looked at where an emulator may run the tests.
const SPARSER: usize = if cfg!(target_arch = "x86_64") { 1 } else { 101 };

/// Between neighbours of the walk: a prime, so that all low bits are met; 4.2 million floats.
const STEP: usize = 1_021;

/// Every 1021st float of all there are, then the special ones.
fn walk() -> impl Iterator<Item = f32> {
    (0..=u32::MAX).step_by(STEP * SPARSER).map(f32::from_bits).chain(SPECIAL)
}

type Kernel = fn(Backend, &[f32], &mut [f32]);
const KERNELS: [(&str, Kernel); 4] =
    [("exp", Backend::exp), ("ln", Backend::ln), ("sin", Backend::sin), ("cos", Backend::cos)];

#[test]
fn every_backend_equals_the_definition() {
    let x: Vec<f32> = walk().collect();
    let (mut want, mut got) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    for (name, kernel) in KERNELS {
        kernel(scalar(), &x, &mut want);
        for backend in Backend::available() {
            kernel(backend, &x, &mut got);
            check(backend, name, &got, &want);
        }
    }
}

#[test]
fn every_length_is_computed_whole() {
    let mut random = Random(21);
    for length in LENGTHS {
        for x in random.kinds(length) {
            for (name, kernel) in KERNELS {
                let (mut want, mut got) = (vec![0.0; length], vec![f32::NAN; length]);
                kernel(scalar(), &x, &mut want);
                for backend in Backend::available() {
                    kernel(backend, &x, &mut got);
                    check(backend, name, &got, &want);
                }
            }
        }
    }
}

/// The error of `got` in units in the last place of the truth.
fn ulps(got: f32, want: f64) -> f64 {
    let exponent = (want.abs().to_bits() >> 52) as i32 - 1023;
    let unit = 2f64.powi(exponent.max(-126) - 23);
    (f64::from(got) - want).abs() / unit
}

/// The greatest error of `ours` over the walk and round where `truth` is a normal float.
fn greatest_error(ours: fn(f32) -> f32, truth: fn(f64) -> f64) -> f64 {
    let ordinary = (0..2_000_000).step_by(SPARSER).map(|i| (i - 1_000_000) as f32 * 1e-4);
    let mut greatest = 0.0f64;
    for x in walk().chain(ordinary) {
        let want = truth(f64::from(x));
        if want.is_finite() && want.abs() < f64::from(f32::MAX) && want.abs() >= 2f64.powi(-126) {
            greatest = greatest.max(ulps(ours(x), want));
        }
    }
    greatest
}

#[test]
fn the_functions_are_accurate() {
    for (name, error, bound) in [
        ("exp", greatest_error(exp, f64::exp), 1.0),
        ("ln", greatest_error(ln, f64::ln), 1.0),
        ("sin", greatest_error(sin, f64::sin), 0.501),
        ("cos", greatest_error(cos, f64::cos), 0.501),
    ] {
        println!("{name}: {error} units in the last place");
        assert!(error <= bound, "{name}: {error} units in the last place");
    }
}

#[test]
fn exact_and_special_results() {
    assert_eq!(exp(0.0).to_bits(), 1f32.to_bits());
    assert_eq!(exp(-0.0).to_bits(), 1f32.to_bits());
    assert_eq!(exp(f32::INFINITY), f32::INFINITY);
    assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0);
    assert_eq!(exp(88.72284), f32::INFINITY);
    assert!(exp(88.7228).is_finite());
    assert!(exp(-87.3365) >= f32::MIN_POSITIVE);
    assert_eq!(exp(-87.34).to_bits(), 0, "below 2^-126 is +0");
    assert!(exp(f32::NAN).is_nan());

    assert_eq!(ln(1.0).to_bits(), 0);
    assert_eq!(ln(0.0), f32::NEG_INFINITY);
    assert_eq!(ln(-0.0), f32::NEG_INFINITY);
    assert_eq!(ln(f32::INFINITY), f32::INFINITY);
    assert!(ln(-1.0).is_nan() && ln(f32::NEG_INFINITY).is_nan() && ln(f32::NAN).is_nan());
    assert_eq!(ln(f32::from_bits(1)), (f64::from(f32::from_bits(1)).ln()) as f32);

    assert_eq!(sin(0.0).to_bits(), 0);
    assert_eq!(sin(-0.0).to_bits(), (-0.0f32).to_bits());
    assert_eq!(cos(0.0), 1.0);
    for x in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        assert!(sin(x).is_nan() && cos(x).is_nan());
    }
}

#[test]
fn results_below_the_normal_range_are_zero_and_none_is_subnormal() {
    // Every float from -88 to -87.
    let (first, last) = ((-87f32).to_bits(), (-88f32).to_bits());
    for bits in first..=last {
        let y = exp(f32::from_bits(bits));
        assert!(y.to_bits() == 0 || y.is_normal(), "exp({})", f32::from_bits(bits));
    }
}
