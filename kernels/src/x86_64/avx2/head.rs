//! The head: rows of 16-bit floats by rows of activations, by the 16-lane rule. A register tile of
//! several rows by several activations shares loads and keeps enough chains of additions going.

use std::arch::x86_64::*;
use std::ops::Range;

use super::reduce::{finish, halves};
use super::{WIDTH, load, load_u16, prefetch};
use crate::float_matrix::{FloatKind, FloatMatrix};
use crate::scalar::half::{widen_bf16, widen_f16};
use crate::scalar::reduce::LANES;
use crate::views::Columns;

/// How far ahead of its reading a row is asked for.
const PREFETCH_BYTES: usize = 1024;
/// Rows of weights that pass before the next three rows of activations: 164 kB at 2560 columns.
const BATCH_ROWS: usize = 32;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn head(w: FloatMatrix<'_>, rows: Range<usize>, x: &[f32], y: Columns<'_>) {
    match w.kind() {
        FloatKind::F16 => {
            let eight = |bits: &[u16; WIDTH]| _mm256_cvtph_ps(load_u16(bits));
            all_rows(w, rows, x, y, eight, widen_f16);
        }
        FloatKind::Bf16 => {
            let eight = |bits: &[u16; WIDTH]| {
                let wide = _mm256_cvtepu16_epi32(load_u16(bits));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            };
            all_rows(w, rows, x, y, eight, widen_bf16);
        }
    }
}

/// Reads the weights from memory once. One row of activations: four rows of weights at a time, since
/// memory is the limit. More: two rows of weights by three of activations, which fill the registers;
/// those three stay in the first-level cache while a batch of weights passes from the second.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn all_rows(
    w: FloatMatrix<'_>,
    rows: Range<usize>,
    x: &[f32],
    mut y: Columns<'_>,
    eight: impl Fn(&[u16; WIDTH]) -> __m256,
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
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn tile<const M: usize, const N: usize>(
    w: [&[u16]; M],
    x: [&[f32]; N],
    eight: impl Fn(&[u16; WIDTH]) -> __m256,
    one: fn(u16) -> f32,
) -> [[f32; M]; N] {
    let w_chunks = w.map(|w| w.as_chunks::<LANES>().0);
    let x_chunks = x.map(|x| x.as_chunks::<LANES>().0);
    let chunks = x_chunks[0].len();
    let (w_chunks, x_chunks) = (w_chunks.map(|w| &w[..chunks]), x_chunks.map(|x| &x[..chunks]));
    let mut low = [[_mm256_setzero_ps(); M]; N];
    let mut high = [[_mm256_setzero_ps(); M]; N];
    for chunk in 0..chunks {
        for m in 0..M {
            let bits = &w_chunks[m][chunk];
            prefetch(bits, PREFETCH_BYTES);
            let (bits, _) = bits.as_chunks::<WIDTH>();
            let (w_low, w_high) = (eight(&bits[0]), eight(&bits[1]));
            for i in 0..N {
                let [x_low, x_high] = halves(&x_chunks[i][chunk]);
                low[i][m] = _mm256_fmadd_ps(w_low, load(x_low), low[i][m]);
                high[i][m] = _mm256_fmadd_ps(w_high, load(x_high), high[i][m]);
            }
        }
    }
    let mut results = [[0.0; M]; N];
    for i in 0..N {
        for m in 0..M {
            let w_tail = w[m][chunks * LANES..].iter().map(|bits| one(*bits));
            let x_tail = x[i][chunks * LANES..].iter().copied();
            results[i][m] = finish(low[i][m], high[i][m], w_tail.zip(x_tail));
        }
    }
    results
}
