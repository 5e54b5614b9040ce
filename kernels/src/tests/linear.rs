//! Quantising, ternary products and the head.

use super::layout::{ARRANGEMENTS, pack};
use super::{LENGTHS, Random, check, scalar};
use crate::{
    Backend, Columns, FloatKind, FloatMatrix, NotFinite, Quantised, TernaryMatrix, Workspace,
    padded_cols,
};

/// A row's codes, s and sum; looks at the padding.
fn codes(backend: Backend, x: &[f32]) -> (Vec<i8>, f32, i32) {
    let mut q = vec![99; padded_cols(x.len())];
    let (s, sum) = backend.quantise(x, &mut q).unwrap();
    assert!(q[x.len()..].iter().all(|q| *q == 0), "{}: padding", backend.name());
    q.truncate(x.len());
    (q, s, sum)
}

#[test]
fn the_unit_rows_of_the_format_description() {
    for backend in Backend::available() {
        let row = |x: &[f32]| codes(backend, x).0;
        assert_eq!(row(&[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]), [127, 0, 2, 2, 0, -2]);
        assert_eq!(row(&[0.0, -0.0, 0.0]), [0, 0, 0]);
        assert_eq!(row(&[1e-7, -1e-7]), [1, -1]);
        assert_eq!(row(&[1_000.0, 1.0, -1.0]), [127, 0, 0]);
        assert_eq!(row(&[-3.7, 3.7]), [-127, 127]);
        // The same inside a vector, not only in what is left over.
        let mut long = vec![0.5; 40];
        (long[0], long[1], long[2]) = (127.0, 2.5, -1.5);
        assert_eq!(row(&long)[..4], [127, 2, -2, 0]);
    }
}

#[test]
fn quantising_equals_the_definition() {
    let mut random = Random(2);
    for length in LENGTHS {
        for _ in 0..20 {
            for x in [random.floats(length), random.extreme(length)] {
                let want = codes(scalar(), &x);
                assert_eq!(want.2, want.0.iter().map(|q| i32::from(*q)).sum::<i32>());
                for backend in Backend::available() {
                    let got = codes(backend, &x);
                    assert_eq!(got.1.to_bits(), want.1.to_bits(), "{}: s", backend.name());
                    assert_eq!(got, want, "{}: {length}", backend.name());
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_is_refused() {
    for backend in Backend::available() {
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN] {
            for index in [0, 7, 8, 39, 40] {
                let mut x = vec![1.0; 41];
                x[index] = bad;
                let result = backend.quantise(&x, &mut [0; 128]);
                assert_eq!(result, Err(NotFinite { index }), "{}", backend.name());
            }
        }
    }
}

/// A ternary product in both arrangements, checked against a sum in i64 from the trits themselves.
fn check_ternary(trits: &[i8], cols: usize, q_rows: &[Vec<i8>], random: &mut Random) {
    let (m, n, stride) = (trits.len() / cols, q_rows.len(), padded_cols(cols) + 128);
    let mut q = vec![0i8; n * stride];
    for (place, row) in q.chunks_mut(stride).zip(q_rows) {
        place[..cols].copy_from_slice(row);
    }
    let sum: Vec<i32> = q_rows.iter().map(|q| q.iter().map(|q| i32::from(*q)).sum()).collect();
    let scale: Vec<f32> = (0..n).map(|_| 20.0 + random.float()).collect();
    let x = Quantised::new(&q, stride, &scale, &sum);

    let mut want = vec![0.0; n * m];
    for i in 0..n {
        for (row, trits) in trits.chunks(cols).enumerate() {
            let products = trits.iter().zip(&q_rows[i]).map(|(t, q)| i64::from(*t) * i64::from(*q));
            want[i * m + row] = products.sum::<i64>() as f32 * (0.37 / scale[i]);
        }
    }
    let mut workspace = Workspace::new();
    for arrangement in ARRANGEMENTS {
        let bytes = pack(arrangement, trits, cols);
        let w = TernaryMatrix::new(&bytes, arrangement, m, cols, 0.37).unwrap();
        for backend in Backend::available() {
            let what = format!("{arrangement:?} of {m}x{cols} by {n}");
            let mut got = vec![f32::NAN; n * m];
            backend.ternary(w, 0..w.tiles(), x, Columns::new(&mut got, m, 0..m));
            check(backend, &what, &got, &want);
            let mut got = vec![f32::NAN; n * m];
            let y = Columns::new(&mut got, m, 0..m);
            backend.ternary_many(w, 0..w.tiles(), x, y, &mut workspace);
            check(backend, &format!("{what}, many"), &got, &want);
            // In two parts, as two threads do it.
            let middle = random.below(w.tiles() + 1);
            let mut got = vec![f32::NAN; n * m];
            for tiles in [0..middle, middle..w.tiles()] {
                let columns = w.tile_rows(tiles.clone());
                let y = Columns::new(&mut got, m, columns);
                backend.ternary_many(w, tiles, x, y, &mut workspace);
            }
            check(backend, &format!("{what}, cut at {middle}"), &got, &want);
        }
    }
}

pub(super) fn random_trits(random: &mut Random, count: usize) -> Vec<i8> {
    (0..count).map(|_| random.below(3) as i8 - 1).collect()
}

pub(super) fn random_codes(random: &mut Random, count: usize) -> Vec<i8> {
    (0..count).map(|_| random.bits() as i8).collect()
}

#[test]
fn ternary_products_are_exact_for_every_number_of_rows() {
    let mut random = Random(3);
    for n in (1..=33).chain([48, 65, 97]) {
        let cols = 1 + random.below(400);
        let trits = random_trits(&mut random, (1 + n % 9) * cols);
        let q: Vec<_> = (0..n).map(|_| random_codes(&mut random, cols)).collect();
        check_ternary(&trits, cols, &q, &mut random);
    }
}

#[test]
fn ternary_products_are_exact_for_every_shape() {
    let mut random = Random(4);
    for m in 1..=33 {
        for cols in [1, 31, 32, 127, 128, 129, 1_023, 1_024, 1_025, 2_560] {
            let trits = random_trits(&mut random, m * cols);
            let q: Vec<_> = (0..1 + m % 3).map(|_| random_codes(&mut random, cols)).collect();
            check_ternary(&trits, cols, &q, &mut random);
        }
    }
}

#[test]
fn ternary_products_do_not_overflow() {
    let mut random = Random(5);
    for cols in [6_912, 8_192, 8_200, 16_384, 100_000] {
        for trit in [1, -1] {
            let trits = vec![trit; 4 * cols];
            let q = [127, -128, -127].map(|q| vec![q; cols]);
            check_ternary(&trits, cols, &q[..1], &mut random);
            check_ternary(&trits, cols, &q[1..2], &mut random);
            check_ternary(&trits, cols, &q, &mut random);
        }
    }
}

/// Every number of tokens of a panel, its remainders and those after it; rows that are not whole
/// vectors, more than a workspace holds, and short of what pays; sums at their greatest.
#[test]
fn ternary_products_of_many_rows_are_exact() {
    let mut random = Random(31);
    for (m, cols, tokens) in [
        (97, 129, 8..=41),
        (95, 300, 40..=40),
        (131, 640, 63..=65),
        (2_053, 260, 16..=17),
        (4_100, 128, 33..=33),
    ] {
        let trits = random_trits(&mut random, m * cols);
        for n in tokens {
            let q: Vec<_> = (0..n).map(|_| random_codes(&mut random, cols)).collect();
            check_ternary(&trits, cols, &q, &mut random);
        }
    }
    for trit in [-1, 1] {
        let trits = vec![trit; 100 * 1_030];
        let q: Vec<_> = (0..20).map(|i| vec![[127, -128, -127][i % 3]; 1_030]).collect();
        check_ternary(&trits, 1_030, &q, &mut random);
    }
}

#[test]
fn corrupt_codes_give_the_same_sums_everywhere() {
    let mut random = Random(6);
    let (m, cols) = (100, 8_192);
    let bytes = vec![0xff; TernaryMatrix::packed_bytes(m, cols).unwrap()];
    let mut workspace = Workspace::new();
    for (arrangement, value) in ARRANGEMENTS.into_iter().flat_map(|a| [(a, 127i8), (a, -128)]) {
        let w = TernaryMatrix::new(&bytes, arrangement, m, cols, 1.0).unwrap();
        let q = vec![value; 20 * cols];
        let sum = [i32::from(value) * cols as i32; 20];
        for n in [1, 2, 20] {
            let x = Quantised::new(&q[..n * cols], cols, &[1.0; 20][..n], &sum[..n]);
            let want = vec![(2 * i32::from(value) * cols as i32) as f32; n * m];
            for backend in Backend::available() {
                let mut got = random.floats(n * m);
                backend.ternary(w, 0..w.tiles(), x, Columns::new(&mut got, m, 0..m));
                check(backend, "code 3", &got, &want);
                let mut got = random.floats(n * m);
                let y = Columns::new(&mut got, m, 0..m);
                backend.ternary_many(w, 0..w.tiles(), x, y, &mut workspace);
                check(backend, "code 3, many", &got, &want);
            }
        }
    }
}

#[test]
fn the_head_equals_the_definition() {
    let mut random = Random(7);
    for n in [1, 2, 3, 4, 5, 6, 7, 16] {
        for cols in [1, 5, 15, 16, 17, 48, 100, 259, 571] {
            let m = 1 + random.below(14);
            for kind in [FloatKind::F16, FloatKind::Bf16] {
                // Any bits: NaNs, infinities and subnormals too, in some rows.
                let bits: Vec<u16> = (0..m * cols)
                    .map(|at| random.bits() as u16 & if at / cols % 3 == 0 { !0 } else { 0xbfff })
                    .collect();
                let w = FloatMatrix::new(kind, &bits, m, cols).unwrap();
                for x in random.kinds(n * cols) {
                    let from = random.below(m);
                    let rows = from..from + 1 + random.below(m - from);
                    let run = |backend: Backend| {
                        let mut y = vec![f32::NAN; n * m];
                        backend.head(w, rows.clone(), &x, Columns::new(&mut y, m, rows.clone()));
                        y
                    };
                    let want = run(scalar());
                    for backend in Backend::available() {
                        check(backend, &format!("{kind:?}, {cols} by {n}"), &run(backend), &want);
                    }
                }
            }
        }
    }
}

#[test]
fn the_head_is_a_matrix_product() {
    let mut random = Random(8);
    let (m, cols) = (6, 300);
    let bits: Vec<u16> = (0..m * cols).map(|_| random.bits() as u16 & 0xbfff).collect();
    let w = FloatMatrix::new(FloatKind::F16, &bits, m, cols).unwrap();
    let x = random.floats(cols);
    let mut row = vec![0.0; cols];
    for backend in Backend::available() {
        let mut y = vec![0.0; m];
        backend.head(w, 0..m, &x, Columns::new(&mut y, m, 0..m));
        for (i, y) in y.iter().enumerate() {
            w.widen_row(i, &mut row);
            let products = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            let want: f64 = products.sum();
            assert!((f64::from(*y) - want).abs() < 1e-4, "{}: {y}, {want}", backend.name());
            assert_eq!(*y, backend.dot(&row, &x), "one head row is a dot product");
        }
    }
}
