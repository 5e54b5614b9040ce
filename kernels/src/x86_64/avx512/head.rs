//! The head: rows of 16-bit floats by rows of activations, by the 16-lane rule, which is one
//! register here. A register tile of several rows by several activations shares loads and keeps
//! enough chains of additions going.

use std::arch::x86_64::*;
use std::array;
use std::ops::Range;

use super::reduce::{add_tail, fold_lanes};
use super::{load, load_tail, load_u16, load_u16_tail};
use crate::float_matrix::{FloatKind, FloatMatrix};
use crate::scalar::reduce::LANES;
use crate::views::Columns;
use crate::x86_64::avx2::prefetch;
use crate::x86_64::vnni::groups;

/// How far ahead of its reading a row is asked for.
const PREFETCH_BYTES: usize = 1024;
/// Rows of weights that pass before the next rows of activations: 164 kB at 2560 columns.
const BATCH_ROWS: usize = 32;
/// Rows of weights and of activations in a register tile: 24 sums of the 32 registers.
const TILE_WEIGHTS: usize = 4;
const TILE_ACTIVATIONS: usize = 6;

/// Rows that are picked and computed together: so many chains of additions hide one another's latency.
const PICKED: usize = 8;

/// Rows that lie anywhere, eight at a time; the next eight are asked for meanwhile, line by line.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn head_rows(w: FloatMatrix<'_>, rows: &[u32], x: &[f32], y: &mut [f32]) {
    match w.kind() {
        FloatKind::F16 => picked(w, rows, x, y, |bits| _mm512_cvtph_ps(bits)),
        FloatKind::Bf16 => picked(w, rows, x, y, |bits| {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
        }),
    }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn picked(
    w: FloatMatrix<'_>,
    rows: &[u32],
    x: &[f32],
    y: &mut [f32],
    widen: impl Fn(__m256i) -> __m512,
) {
    for line in rows.iter().take(PICKED).flat_map(|row| w.row(*row as usize).chunks(32)) {
        prefetch(line.as_ptr(), 0);
    }
    let row = |at: usize| w.row(rows[at.min(rows.len() - 1)] as usize);
    let whole = rows.len() / PICKED * PICKED;
    for at in (0..whole).step_by(PICKED) {
        let weights: [&[u16]; PICKED] = array::from_fn(|i| row(at + i));
        let ahead = array::from_fn(|i| row(at + PICKED + i).as_ptr());
        let [results] = tile::<PICKED, 1>(weights, [x], ahead, &widen);
        y[at..at + PICKED].copy_from_slice(&results);
    }
    for (at, y) in y.iter_mut().enumerate().skip(whole) {
        let [[result]] = tile([row(at)], [x], [row(at + 1).as_ptr()], &widen);
        *y = result;
    }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn head(w: FloatMatrix<'_>, rows: Range<usize>, x: &[f32], y: Columns<'_>) {
    match w.kind() {
        FloatKind::F16 => all_rows(w, rows, x, y, |bits| _mm512_cvtph_ps(bits)),
        FloatKind::Bf16 => all_rows(w, rows, x, y, |bits| {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
        }),
    }
}

/// Reads the weights from memory once: every batch of them stays in the second-level cache while the
/// rows of activations pass, some at a time.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn all_rows(
    w: FloatMatrix<'_>,
    rows: Range<usize>,
    x: &[f32],
    mut y: Columns<'_>,
    widen: impl Fn(__m256i) -> __m512,
) {
    for batch in rows.clone().step_by(BATCH_ROWS) {
        let batch = batch..rows.end.min(batch + BATCH_ROWS);
        let at = batch.start - rows.start;
        for some in groups(y.rows(), TILE_ACTIVATIONS) {
            let (i, batch) = (some.start, batch.clone());
            match some.len() {
                1 => some_rows::<1>(w, batch, x, i, at, &mut y, &widen),
                2 => some_rows::<2>(w, batch, x, i, at, &mut y, &widen),
                3 => some_rows::<3>(w, batch, x, i, at, &mut y, &widen),
                4 => some_rows::<4>(w, batch, x, i, at, &mut y, &widen),
                5 => some_rows::<5>(w, batch, x, i, at, &mut y, &widen),
                _ => some_rows::<TILE_ACTIVATIONS>(w, batch, x, i, at, &mut y, &widen),
            }
        }
    }
}

/// The rows `batch` of weights by `N` rows of activations from `i` on. Writes from column `at` of
/// these columns on.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn some_rows<const N: usize>(
    w: FloatMatrix<'_>,
    batch: Range<usize>,
    x: &[f32],
    i: usize,
    at: usize,
    y: &mut Columns<'_>,
    widen: &impl Fn(__m256i) -> __m512,
) {
    let x: [&[f32]; N] = array::from_fn(|j| &x[(i + j) * w.cols()..][..w.cols()]);
    let whole = batch.len() / TILE_WEIGHTS * TILE_WEIGHTS;
    for row in (0..whole).step_by(TILE_WEIGHTS) {
        let weights: [&[u16]; _] = array::from_fn(|more| w.row(batch.start + row + more));
        let ahead = array::from_fn(|more| further(weights[more]));
        put(y, i, at + row, tile::<TILE_WEIGHTS, N>(weights, x, ahead, widen));
    }
    for row in whole..batch.len() {
        let weights = w.row(batch.start + row);
        put(y, i, at + row, tile([weights], x, [further(weights)], widen));
    }
}

/// [`PREFETCH_BYTES`] on, which may be in another row.
fn further(row: &[u16]) -> *const u16 {
    row.as_ptr().wrapping_byte_add(PREFETCH_BYTES)
}

/// Writes the results of a tile from row `i` and column `at` of these columns on.
fn put<const M: usize, const N: usize>(
    y: &mut Columns<'_>,
    i: usize,
    at: usize,
    results: [[f32; M]; N],
) {
    for (j, results) in results.iter().enumerate() {
        y.row(i + j)[at..at + M].copy_from_slice(results);
    }
}

/// `M` rows of weights by `N` rows of activations. Asks for as many bytes from each place of `ahead` on.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn tile<const M: usize, const N: usize>(
    w: [&[u16]; M],
    x: [&[f32]; N],
    ahead: [*const u16; M],
    widen: &impl Fn(__m256i) -> __m512,
) -> [[f32; M]; N] {
    let chunks = x[0].len() / LANES;
    let w_chunks = w.map(|w| &w.as_chunks::<LANES>().0[..chunks]);
    let x_chunks = x.map(|x| &x.as_chunks::<LANES>().0[..chunks]);
    let mut lanes = [[_mm512_setzero_ps(); M]; N];
    for chunk in 0..chunks {
        for m in 0..M {
            let bits = &w_chunks[m][chunk];
            prefetch(ahead[m], size_of_val(bits) * chunk);
            let w = widen(load_u16(bits));
            for i in 0..N {
                lanes[i][m] = _mm512_fmadd_ps(w, load(&x_chunks[i][chunk]), lanes[i][m]);
            }
        }
    }
    let mut results = [[0.0; M]; N];
    for i in 0..N {
        let x_tail = &x[i][chunks * LANES..];
        for m in 0..M {
            let w = widen(load_u16_tail(&w[m][chunks * LANES..]));
            let lanes = add_tail(w, load_tail(x_tail), lanes[i][m], x_tail.len());
            results[i][m] = fold_lanes(lanes);
        }
    }
    results
}
