//! The head: rows of 16-bit floats by rows of activations, by the 16-lane rule. Few rows of
//! activations are bound by reading the weights, which a register tile widens as it goes. From
//! [`MANY`] rows on the multiply-adds are the limit: a strip of several weight rows is widened once
//! into the first-level cache and applied to all rows of activations.

use std::arch::x86_64::*;
use std::ops::Range;

use super::reduce::{finish, halves};
use super::{WIDTH, load, load_u16, prefetch, store};
use crate::float_matrix::{FloatKind, FloatMatrix};
use crate::scalar::half::{widen_bf16, widen_f16};
use crate::scalar::reduce::LANES;
use crate::views::Columns;

/// From so many rows of activations on, weights are widened in strips.
const MANY: usize = 4;
/// Rows of weights in a strip.
const STRIP_ROWS: usize = 6;
/// Sixteens of columns in a strip: 6 KB of weights, and of each row of activations 1 KB.
const STRIP_CHUNKS: usize = 16;
/// Rows of activations that share the widening of a strip: their 16 KB, the strip and its sums fit
/// a first-level cache of 32 KB.
const GROUP_ROWS: usize = 16;

/// Chunks of sixteen that are read together where weights are widened in registers.
const STEP: usize = 2;

/// The widened weights of a strip: `[row][chunk][lane]`.
#[repr(align(64))]
struct Strip([[[f32; LANES]; STRIP_CHUNKS]; STRIP_ROWS]);
/// The lanes of unfinished sums: `[row of activations][row of the strip][lane]`.
#[repr(align(64))]
struct Sums([[[f32; LANES]; STRIP_ROWS]; GROUP_ROWS]);

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn head(w: FloatMatrix<'_>, rows: Range<usize>, x: &[f32], y: Columns<'_>) {
    match w.kind() {
        FloatKind::F16 => {
            let eight = |bits: &[u16; WIDTH]| _mm256_cvtph_ps(load_u16(bits));
            all_rows(w, rows, x, y, eight, widen_f16);
        }
        FloatKind::Bf16 => all_rows(w, rows, x, y, |bits| widen_eight(bits), widen_bf16),
    }
}

/// One row of weights by one row of activations.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn one_row(w: FloatMatrix<'_>, row: usize, x: &[f32]) -> f32 {
    let [[result]] = match w.kind() {
        FloatKind::F16 => {
            let eight = |bits: &[u16; WIDTH]| _mm256_cvtph_ps(load_u16(bits));
            direct([w.row(row)], [x], eight, widen_f16)
        }
        FloatKind::Bf16 => direct([w.row(row)], [x], |bits| widen_eight(bits), widen_bf16),
    };
    result
}

/// Eight bf16 as f32.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn widen_eight(bits: &[u16; WIDTH]) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(load_u16(bits))))
}

/// Reads the weights from memory once for every [`GROUP_ROWS`] rows of activations.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn all_rows(
    w: FloatMatrix<'_>,
    rows: Range<usize>,
    x: &[f32],
    mut y: Columns<'_>,
    eight: impl Fn(&[u16; WIDTH]) -> __m256 + Copy,
    one: fn(u16) -> f32,
) {
    let n = y.rows();
    if n < MANY {
        return few(w, rows, x, &mut y, eight, one);
    }
    // Groups of nearly the same size: a small last one would widen all weights for few rows.
    let groups = n.div_ceil(GROUP_ROWS);
    for group in 0..groups {
        let part = group * n / groups..(group + 1) * n / groups;
        for first in rows.clone().step_by(STRIP_ROWS) {
            let strip = first..rows.end.min(first + STRIP_ROWS);
            let ahead = strip.end..rows.end.min(strip.end + STRIP_ROWS);
            let mut sums = Sums([[[0.0; LANES]; STRIP_ROWS]; GROUP_ROWS]);
            strips(w, strip.clone(), ahead, x, part.clone(), &mut sums, eight);
            let done = w.cols() / LANES * LANES;
            for (i, sums) in part.clone().zip(&sums.0) {
                let y = &mut y.row(i)[first - rows.start..];
                let x_tail = &x[i * w.cols()..][done..w.cols()];
                for ((y, row), lanes) in y.iter_mut().zip(strip.clone()).zip(sums) {
                    let [low, high] = halves(lanes);
                    let w_tail = w.row(row)[done..].iter().map(|bits| one(*bits));
                    let tail = w_tail.zip(x_tail.iter().copied());
                    *y = finish(load(low), load(high), tail);
                }
            }
        }
    }
}

/// Fewer than [`MANY`] rows of activations: two rows of weights at a time.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn few(
    w: FloatMatrix<'_>,
    rows: Range<usize>,
    x: &[f32],
    y: &mut Columns<'_>,
    eight: impl Fn(&[u16; WIDTH]) -> __m256 + Copy,
    one: fn(u16) -> f32,
) {
    let n = y.rows();
    let x = |i: usize| &x[i * w.cols()..][..w.cols()];
    let mut row = rows.start;
    while row < rows.end {
        let at = row - rows.start;
        let w2 = || [w.row(row), w.row(row + 1)];
        row += match (rows.end - row, n) {
            (2.., 1) => put(y, at, direct(w2(), [x(0)], eight, one)),
            (2.., 2) => put(y, at, direct(w2(), [x(0), x(1)], eight, one)),
            (2.., 3) => put(y, at, direct(w2(), [x(0), x(1), x(2)], eight, one)),
            _ => {
                for i in 0..n {
                    let [[result]] = direct([w.row(row)], [x(i)], eight, one);
                    y.row(i)[at] = result;
                }
                1
            }
        };
    }
}

/// Writes the results of a tile from column `at` of these columns on; returns `M`.
fn put<const M: usize, const N: usize>(
    y: &mut Columns<'_>,
    at: usize,
    results: [[f32; M]; N],
) -> usize {
    for (i, results) in results.iter().enumerate() {
        y.row(i)[at..at + M].copy_from_slice(results);
    }
    M
}

/// `M` rows of weights, widened in registers, by `N` rows of activations. Asks for the rows after
/// these meanwhile.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn direct<const M: usize, const N: usize>(
    w: [&[u16]; M],
    x: [&[f32]; N],
    eight: impl Fn(&[u16; WIDTH]) -> __m256,
    one: fn(u16) -> f32,
) -> [[f32; M]; N] {
    let w_chunks = w.map(|w| w.as_chunks::<LANES>().0.as_chunks::<STEP>());
    let x_chunks = x.map(|x| x.as_chunks::<LANES>().0.as_chunks::<STEP>());
    let ahead = M * size_of_val(w[0]);
    let mut low = [[_mm256_setzero_ps(); M]; N];
    let mut high = [[_mm256_setzero_ps(); M]; N];
    let mut step = |w: [&[u16; LANES]; M], x: [&[f32; LANES]; N]| {
        for m in 0..M {
            let (bits, _) = w[m].as_chunks::<WIDTH>();
            let (w_low, w_high) = (eight(&bits[0]), eight(&bits[1]));
            for i in 0..N {
                let [x_low, x_high] = halves(x[i]);
                low[i][m] = _mm256_fmadd_ps(w_low, load(x_low), low[i][m]);
                high[i][m] = _mm256_fmadd_ps(w_high, load(x_high), high[i][m]);
            }
        }
    };
    // Two chunks are a cache line of weights, and share what checks of bounds there are.
    for at in 0..x_chunks[0].0.len() {
        let (w, x) = (w_chunks.map(|(w, _)| &w[at]), x_chunks.map(|(x, _)| &x[at]));
        for w in w {
            prefetch(w, ahead);
        }
        for chunk in 0..STEP {
            step(w.map(|w| &w[chunk]), x.map(|x| &x[chunk]));
        }
    }
    for at in 0..x_chunks[0].1.len() {
        step(w_chunks.map(|(_, w)| &w[at]), x_chunks.map(|(_, x)| &x[at]));
    }
    let chunks = x[0].len() / LANES;
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

/// The whole sixteens of the columns of the weight rows `strip` by the rows `part` of activations,
/// strip after strip, into `sums`. Asks for the weights of the next strip, at last for those of the
/// rows `ahead`, while one is computed.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn strips(
    w: FloatMatrix<'_>,
    strip: Range<usize>,
    ahead: Range<usize>,
    x: &[f32],
    part: Range<usize>,
    sums: &mut Sums,
    eight: impl Fn(&[u16; WIDTH]) -> __m256,
) {
    let cols = w.cols();
    let mut wide = Strip([[[0.0; LANES]; STRIP_CHUNKS]; STRIP_ROWS]);
    let chunks = cols / LANES;
    for start in (0..chunks).step_by(STRIP_CHUNKS) {
        let count = STRIP_CHUNKS.min(chunks - start);
        let next = (start + STRIP_CHUNKS) * LANES;
        for (row, wide) in strip.clone().zip(&mut wide.0) {
            let bits = &w.row(row).as_chunks::<LANES>().0[start..start + count];
            let coming = match next < cols {
                true => &w.row(row)[next..],
                false => ahead.clone().nth(row - strip.start).map_or(&[][..], |row| w.row(row)),
            };
            // 32 elements are a cache line.
            for line in coming.chunks(32).take(STRIP_CHUNKS / 2) {
                prefetch(line.as_ptr(), 0);
            }
            for (bits, wide) in bits.iter().zip(wide) {
                let (bits, wide) = (bits.as_chunks::<WIDTH>().0, wide.as_chunks_mut::<WIDTH>().0);
                store(&mut wide[0], eight(&bits[0]));
                store(&mut wide[1], eight(&bits[1]));
            }
        }
        if count == STRIP_CHUNKS {
            apply::<STRIP_CHUNKS>(&wide, 0, strip.len(), x, (cols, start), part.clone(), sums);
        } else {
            for at in 0..count {
                apply::<1>(&wide, at, strip.len(), x, (cols, start + at), part.clone(), sums);
            }
        }
    }
}

/// Chunks `at..at + C` of the first `rows` rows of a strip by the rows `part` of activations, which
/// have `cols` columns and begin at chunk `start`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn apply<const C: usize>(
    wide: &Strip,
    at: usize,
    rows: usize,
    x: &[f32],
    (cols, start): (usize, usize),
    part: Range<usize>,
    sums: &mut Sums,
) {
    let x = |i: usize| {
        let (chunks, _) = x[i * cols + start * LANES..(i + 1) * cols].as_chunks::<LANES>();
        &chunks.as_chunks::<C>().0[0]
    };
    let w = |row: usize| &wide.0[row].as_chunks::<C>().0[at / C];
    let mut i = 0;
    while i < part.len() {
        let sums = &mut sums.0[i..];
        let at = part.start + i;
        // At common widths the rows fall into few sets of the cache and throw one another out.
        for coming in (at + 2..part.end).take(2) {
            for chunk in x(coming) {
                prefetch(chunk, 0);
            }
        }
        i += match part.len() - i {
            1 => rows_of_strip(w, rows, [x(at)], sums),
            _ => rows_of_strip(w, rows, [x(at), x(at + 1)], sums),
        };
    }
}

/// `C` chunks of `rows` weight rows by `N` rows of activations, three weight rows at a time: with
/// two rows of activations twelve sums, two activations and a weight fill the registers. Returns
/// `N`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn rows_of_strip<'w, const N: usize, const C: usize>(
    w: impl Fn(usize) -> &'w [[f32; LANES]; C],
    rows: usize,
    x: [&[[f32; LANES]; C]; N],
    sums: &mut [[[f32; LANES]; STRIP_ROWS]],
) -> usize {
    let mut row = 0;
    while row < rows {
        row += match rows - row {
            3.. => on_sums([w(row), w(row + 1), w(row + 2)], x, sums, row),
            _ => on_sums([w(row)], x, sums, row),
        };
    }
    N
}

/// Continues the sums of `M` widened rows from `row` on by `N` rows of activations; returns `M`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn on_sums<const M: usize, const N: usize, const C: usize>(
    w: [&[[f32; LANES]; C]; M],
    x: [&[[f32; LANES]; C]; N],
    sums: &mut [[[f32; LANES]; STRIP_ROWS]],
    row: usize,
) -> usize {
    let mut acc = [[[_mm256_setzero_ps(); 2]; M]; N];
    for i in 0..N {
        for m in 0..M {
            acc[i][m] = halves(&sums[i][row + m]).map(|half| load(half));
        }
    }
    for chunk in 0..C {
        // Half by half, so that few registers hold activations.
        let mut step = |half: usize| {
            let x = x.map(|x| load(halves(&x[chunk])[half]));
            for m in 0..M {
                let w = load(halves(&w[m][chunk])[half]);
                for i in 0..N {
                    acc[i][m][half] = _mm256_fmadd_ps(w, x[i], acc[i][m][half]);
                }
            }
        };
        step(0);
        step(1);
    }
    for i in 0..N {
        for m in 0..M {
            let (sums, _) = sums[i][row + m].as_chunks_mut::<WIDTH>();
            store(&mut sums[0], acc[i][m][0]);
            store(&mut sums[1], acc[i][m][1]);
        }
    }
    M
}
