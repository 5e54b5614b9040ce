//! Ternary products of one row of activations that skip what is not wanted or known to be zero, and
//! the lists that say what that is.

use std::ops::Range;

use crate::ternary_columns::{BLOCK_BYTES, TernaryColumns};
use crate::ternary_matrix::{ROW_BLOCK_BYTES, TernaryMatrix};
use crate::views::Quantised;

/// Rows whose sums are added up at a time.
const PART: usize = 64;

pub(crate) fn ternary_rows(w: TernaryMatrix<'_>, rows: &[u32], x: Quantised<'_>, y: &mut [f32]) {
    let scale = w.scale() / x.scale(0);
    for (row, y) in rows.iter().zip(y) {
        *y = row_sum(w, *row as usize, x.row(0)) as f32 * scale;
    }
}

/// Σ t q over a row. Wraps nowhere, as in `products.rs`; the padding of `q` is zero.
fn row_sum(w: TernaryMatrix<'_>, row: usize, q: &[i8]) -> i32 {
    let (bytes, stride) = w.row_at(row);
    let planes = bytes.chunks(stride).flat_map(|block| {
        [0, 2, 4, 6].map(|shift| block[..ROW_BLOCK_BYTES].iter().map(move |b| b >> shift & 0b11))
    });
    let products = planes.flatten().zip(q).map(|(code, q)| (i32::from(code) - 1) * i32::from(*q));
    products.fold(0, i32::wrapping_add)
}

pub(crate) fn ternary_columns(
    w: TernaryColumns<'_>,
    columns: &[u32],
    x: Quantised<'_>,
    sums: &mut [i32],
) {
    let (blocks, blocks_per_column) = w.blocks();
    for &column in columns {
        let q = i32::from(x.row(0)[column as usize]);
        let bytes = blocks[column as usize * blocks_per_column..][..blocks_per_column].iter();
        let planes = bytes.flat_map(|block| [0, 2, 4, 6].map(|shift| (block, shift)));
        for (sums, (block, shift)) in sums.chunks_mut(BLOCK_BYTES).zip(planes) {
            for (sum, byte) in sums.iter_mut().zip(block) {
                *sum = sum.wrapping_add(i32::from(byte >> shift & 0b11) * q);
            }
        }
    }
}

/// See [`Backend::end_columns`](crate::Backend::end_columns). Every backend's: integers, one
/// conversion and one product, which a compiler makes vectors of.
pub(crate) fn end_columns(
    w: TernaryColumns<'_>,
    sums: &[i32],
    rows: Range<usize>,
    x: Quantised<'_>,
    y: &mut [f32],
) {
    let scale = w.scale() / x.scale(0);
    let (first, others) = sums.split_at(w.padded_rows());
    for (part, y) in rows.step_by(PART).zip(y.chunks_mut(PART)) {
        let mut totals = [0i32; PART];
        let totals = &mut totals[..y.len()];
        totals.copy_from_slice(&first[part..][..y.len()]);
        for sums in others.chunks_exact(w.padded_rows()) {
            let sums = &sums[part..][..y.len()];
            totals.iter_mut().zip(sums).for_each(|(total, sum)| *total = total.wrapping_add(*sum));
        }
        for (y, total) in y.iter_mut().zip(totals) {
            *y = total.wrapping_sub(x.sum(0)) as f32 * scale;
        }
    }
}

pub(crate) fn positive(x: &[f32], first: u32, out: &mut [u32]) -> usize {
    list(x.iter().map(|x| *x > 0.0), first, out)
}

pub(crate) fn nonzero(q: &[i8], out: &mut [u32]) -> usize {
    list(q.iter().map(|q| *q != 0), 0, out)
}

/// Writes the number of every wanted place, counted from `first`; returns how many there are.
fn list(wanted: impl Iterator<Item = bool>, first: u32, out: &mut [u32]) -> usize {
    let mut count = 0;
    for (place, _) in (first..).zip(wanted).filter(|(_, wanted)| *wanted) {
        out[count] = place;
        count += 1;
    }
    count
}
