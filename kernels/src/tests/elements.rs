//! Sums, norms, gates, addition and RoPE.

use super::{LENGTHS, Random, check, scalar};
use crate::Backend;

/// Runs `operation` on every backend, length and kind of value and compares with the definition.
/// It gets three rows of the length and returns what it computed.
fn check_operation(
    what: &str,
    seed: u64,
    operation: impl Fn(Backend, &[f32], &[f32], &[f32]) -> Vec<f32>,
) {
    let mut random = Random(seed);
    for length in LENGTHS.into_iter().filter(|length| *length > 0) {
        for _ in 0..8 {
            let (a, b, c) = (random.kinds(length), random.kinds(length), random.kinds(length));
            for kind in 0..a.len() {
                let want = operation(scalar(), &a[kind], &b[kind], &c[kind]);
                for backend in Backend::available() {
                    let got = operation(backend, &a[kind], &b[kind], &c[kind]);
                    check(backend, &format!("{what} of {length}, kind {kind}"), &got, &want);
                }
            }
        }
    }
}

#[test]
fn every_backend_equals_the_definition() {
    check_operation("dot", 11, |backend, a, b, _| vec![backend.dot(a, b)]);
    check_operation("sum", 12, |backend, a, _, _| vec![backend.sum(a)]);
    check_operation("norm", 13, |backend, a, b, c| {
        let mut y = c.to_vec();
        backend.rms_norm(a, b, 1e-5, &mut y);
        y
    });
    check_operation("squared relu", 14, |backend, a, b, c| {
        let mut y = c.to_vec();
        backend.squared_relu_mul(a, b, &mut y);
        y
    });
    check_operation("silu", 15, |backend, a, b, c| {
        let mut y = c.to_vec();
        backend.silu_mul(a, b, &mut y);
        y
    });
    check_operation("add", 16, |backend, a, b, _| {
        let mut x = a.to_vec();
        backend.add(&mut x, b);
        x
    });
    check_operation("rope", 17, |backend, a, b, c| {
        let mut x = [a, b].concat();
        backend.rope(&mut x, b, c);
        x
    });
}

#[test]
fn negative_zero_survives_lanes_without_a_product() {
    // 2^-100 * -2^-100 rounds to -0 in lane 0, and every lane of the second row of sixteen is
    // missing: were +0 added there, the sum would become +0.
    let tiny = 2f32.powi(-100);
    for backend in Backend::available() {
        for length in 1..40 {
            let (a, b) = (vec![tiny; length], vec![-tiny; length]);
            check(backend, "dot", &[backend.dot(&a, &b)], &[scalar().dot(&a, &b)]);
        }
        assert!(backend.dot(&[tiny; 16], &[-tiny; 16]).is_sign_negative());
        assert!(backend.dot(&[tiny; 17], &[-tiny; 17]).is_sign_negative());
    }
}

#[test]
fn the_sixteen_lane_rule_on_paper() {
    // Lane 0 takes 2^24, then 1 which is lost, then -2^24: 0. Lane 1 takes 1.
    let mut a = [0.0; 33];
    (a[0], a[16], a[32], a[1]) = (16_777_216.0, 1.0, -16_777_216.0, 1.0);
    for backend in Backend::available() {
        assert_eq!(backend.sum(&a), 1.0);
        assert_eq!(backend.dot(&a, &[1.0; 33]), 1.0);
        assert_eq!(backend.sum(&[]).to_bits(), 0, "of nothing, +0");
        // Fused: the product 1 + 2^-11 + 2^-24 is not rounded before 1 is taken away.
        let x = 1.0 + 2f32.powi(-12);
        let mut a = [0.0; 17];
        let mut b = [0.0; 17];
        (a[0], b[0], a[16], b[16]) = (-1.0, 1.0, x, x);
        assert_eq!(f64::from(backend.dot(&a, &b)), f64::from(x) * f64::from(x) - 1.0);
    }
}

#[test]
fn known_values() {
    for backend in Backend::available() {
        let mut y = [0.0; 9];
        backend.rms_norm(&[2.0; 9], &[3.0; 9], 0.0, &mut y);
        assert_eq!(y, [3.0; 9]);
        let gate = [2.0, -2.0, 0.0, -0.0, f32::NAN, 3.0, f32::NEG_INFINITY, 1.0, 0.5];
        backend.squared_relu_mul(&gate, &[-1.0; 9], &mut y);
        assert_eq!(y, [-4.0, 0.0, 0.0, 0.0, 0.0, -9.0, 0.0, -1.0, -0.25]);
        backend.silu_mul(&[0.0; 9], &[5.0; 9], &mut y);
        assert_eq!(y, [0.0; 9]);
        backend.silu_mul(&[1.0; 9], &[1.0; 9], &mut y);
        let want = 1.0 / (1.0 + (-1f64).exp());
        assert!(y.iter().all(|y| (f64::from(*y) - want).abs() < 1e-7), "{y:?}");
        // A quarter turn: (a, b) becomes (-b, a).
        let mut x = [1.0, 2.0, 3.0, 4.0];
        backend.rope(&mut x, &[0.0, 0.0], &[1.0, 1.0]);
        assert_eq!(x, [-3.0, -4.0, 1.0, 2.0]);
    }
}

#[test]
fn rope_tables_are_sines_of_f32_angles() {
    let frequencies: Vec<f32> =
        (0..67).map(|j| 500_000f64.powf(-f64::from(j) / 64.0) as f32).collect();
    for position in [0, 1, 31, 4_095, 131_071, u32::MAX] {
        let table = |backend: Backend| {
            let (mut cos, mut sin) = (vec![0.0; 67], vec![0.0; 67]);
            backend.rope_table(&frequencies, position, &mut cos, &mut sin);
            (cos, sin)
        };
        let want = table(scalar());
        for (j, f) in frequencies.iter().enumerate() {
            let angle = f64::from(position as f32 * f);
            assert!((f64::from(want.0[j]) - angle.cos()).abs() < 6e-8, "{position} {j}");
            assert!((f64::from(want.1[j]) - angle.sin()).abs() < 6e-8, "{position} {j}");
        }
        for backend in Backend::available() {
            let got = table(backend);
            check(backend, "cosine", &got.0, &want.0);
            check(backend, "sine", &got.1, &want.1);
        }
    }
}
