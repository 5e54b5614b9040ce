//! The head: rows of 16-bit floats by rows of activations, by the 16-lane rule. A register tile of
//! several rows by several activations shares loads and keeps enough chains of additions going.

use std::arch::aarch64::*;
use std::ops::Range;

use super::reduce::{Lanes, finish, load_lanes, multiply_add, zeros};
use super::{load_u16, widen_bf16, widen_f16};
use crate::float_matrix::{FloatKind, FloatMatrix};
use crate::scalar::half;
use crate::scalar::reduce::LANES;
use crate::views::Columns;

/// Rows of weights that pass before the next three rows of activations: 164 kB at 2560 columns.
const BATCH_ROWS: usize = 32;

#[target_feature(enable = "neon")]
pub(super) fn head(w: FloatMatrix<'_>, rows: Range<usize>, x: &[f32], y: Columns<'_>) {
    match w.kind() {
        FloatKind::F16 => {
            let eight = |bits: uint16x8_t| {
                [vget_low_u16(bits), vget_high_u16(bits)].map(|bits| widen_f16(bits))
            };
            all_rows(w, rows, x, y, eight, half::widen_f16);
        }
        FloatKind::Bf16 => all_rows(w, rows, x, y, |bits| widen_bf16(bits), half::widen_bf16),
    }
}

/// Reads the weights from memory once. One row of activations: four rows of weights at a time, since
/// memory is the limit. More: two rows of weights by three of activations, 24 sums and 8 weights,
/// which fill the registers; those three stay in the first-level cache while a batch of weights
/// passes from the second.
#[target_feature(enable = "neon")]
#[inline]
fn all_rows(
    w: FloatMatrix<'_>,
    rows: Range<usize>,
    x: &[f32],
    mut y: Columns<'_>,
    eight: impl Fn(uint16x8_t) -> [float32x4_t; 2],
    one: fn(u16) -> f32,
) {
    let n = y.rows();
    let x = |i: usize| &x[i * w.cols()..][..w.cols()];
    for batch in rows.clone().step_by(BATCH_ROWS) {
        let batch = batch..rows.end.min(batch + BATCH_ROWS);
        for i in (0..n).step_by(3) {
            let mut row = batch.start;
            while row < batch.end {
                let at = row - rows.start;
                let w2 = || [w.row(row), w.row(row + 1)];
                row += match (batch.end - row, n - i) {
                    (4.., 1) => {
                        let w4 = [0, 1, 2, 3].map(|more| w.row(row + more));
                        put(&mut y, i, at, tile(w4, [x(i)], &eight, one))
                    }
                    (2.., 1) => put(&mut y, i, at, tile(w2(), [x(i)], &eight, one)),
                    (2.., 2) => put(&mut y, i, at, tile(w2(), [x(i), x(i + 1)], &eight, one)),
                    (2.., _) => {
                        let x = [x(i), x(i + 1), x(i + 2)];
                        put(&mut y, i, at, tile(w2(), x, &eight, one))
                    }
                    (_, left) => {
                        for i in i..i + left.min(3) {
                            put(&mut y, i, at, tile([w.row(row)], [x(i)], &eight, one));
                        }
                        1
                    }
                };
            }
        }
    }
}

/// Writes the results of a tile from row `i` and column `at` of these columns on; returns `M`.
fn put<const M: usize, const N: usize>(
    y: &mut Columns<'_>,
    i: usize,
    at: usize,
    results: [[f32; M]; N],
) -> usize {
    for (j, results) in results.iter().enumerate() {
        y.row(i + j)[at..at + M].copy_from_slice(results);
    }
    M
}

/// `M` rows of weights by `N` rows of activations.
#[target_feature(enable = "neon")]
#[inline]
fn tile<const M: usize, const N: usize>(
    w: [&[u16]; M],
    x: [&[f32]; N],
    eight: impl Fn(uint16x8_t) -> [float32x4_t; 2],
    one: fn(u16) -> f32,
) -> [[f32; M]; N] {
    let w_chunks = w.map(|w| w.as_chunks::<LANES>().0);
    let x_chunks = x.map(|x| x.as_chunks::<LANES>().0);
    let chunks = x_chunks[0].len();
    let (w_chunks, x_chunks) = (w_chunks.map(|w| &w[..chunks]), x_chunks.map(|x| &x[..chunks]));
    let mut sums: [[Lanes; M]; N] = [[zeros(); M]; N];
    for chunk in 0..chunks {
        for m in 0..M {
            let (halves, _) = w_chunks[m][chunk].as_chunks::<8>();
            let [a, b] = eight(load_u16(&halves[0]));
            let [c, d] = eight(load_u16(&halves[1]));
            for i in 0..N {
                multiply_add(&mut sums[i][m], [a, b, c, d], load_lanes(&x_chunks[i][chunk]));
            }
        }
    }
    let mut results = [[0.0; M]; N];
    for i in 0..N {
        for m in 0..M {
            let w_tail = w[m][chunks * LANES..].iter().map(|bits| one(*bits));
            let x_tail = x[i][chunks * LANES..].iter().copied();
            results[i][m] = finish(sums[i][m], w_tail.zip(x_tail));
        }
    }
    results
}
