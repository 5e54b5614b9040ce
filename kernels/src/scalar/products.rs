//! Products of a matrix and rows of activations: ternary ones in exact integers, the head by the
//! 16-lane rule.

use std::ops::Range;

use super::reduce::{LANES, add_products, fold_lanes};
use crate::float_matrix::FloatMatrix;
use crate::ternary_matrix::{BLOCK_COLS, TernaryMatrix};
use crate::views::{Columns, Quantised};

/// Rows of activations for which a piece of a weight row is unpacked or widened once.
const GROUP_ROWS: usize = 32;

#[inline(always)]
pub(crate) fn ternary(
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    mut y: Columns<'_>,
) {
    for (r, row) in w.tile_rows(tiles).enumerate() {
        for first in (0..x.rows()).step_by(GROUP_ROWS) {
            let group = first..x.rows().min(first + GROUP_ROWS);
            let mut sums = [0i32; GROUP_ROWS];
            for block in 0..w.blocks() {
                let trits = w.unpack_block(row, block);
                for (sum, i) in sums.iter_mut().zip(group.clone()) {
                    let q = &x.row(i).as_chunks::<BLOCK_COLS>().0[block];
                    *sum = sum.wrapping_add(exact_sum(&trits, q));
                }
            }
            for (sum, i) in sums.into_iter().zip(group) {
                y.row(i)[r] = sum as f32 * (w.scale() / x.scale(i));
            }
        }
    }
}

/// Σ t q. No such sum leaves an i32, for a matrix has no more columns than that: nothing wraps,
/// and without checks for it compilers find vectors here.
#[inline(always)]
fn exact_sum(trits: &[i8; BLOCK_COLS], q: &[i8; BLOCK_COLS]) -> i32 {
    let products = trits.iter().zip(q).map(|(t, q)| i32::from(*t).wrapping_mul(i32::from(*q)));
    products.fold(0, i32::wrapping_add)
}

#[inline(always)]
pub(crate) fn head(w: FloatMatrix<'_>, rows: Range<usize>, x: &[f32], mut y: Columns<'_>) {
    for (r, row) in rows.enumerate() {
        for (group, x) in x.chunks(GROUP_ROWS * w.cols()).enumerate() {
            let mut lanes = [[0.0; LANES]; GROUP_ROWS];
            let mut weights = [0.0; PIECE];
            for start in (0..w.cols()).step_by(PIECE) {
                let cols = start..w.cols().min(start + PIECE);
                let weights = &mut weights[..cols.len()];
                w.widen_cols(row, cols.clone(), weights);
                for (lanes, x) in lanes.iter_mut().zip(x.chunks(w.cols())) {
                    add_products(lanes, weights, &x[cols.clone()]);
                }
            }
            for (i, (lanes, _)) in lanes.into_iter().zip(x.chunks(w.cols())).enumerate() {
                y.row(group * GROUP_ROWS + i)[r] = fold_lanes(lanes);
            }
        }
    }
}

/// Columns that are widened at once: whole rounds through the lanes.
const PIECE: usize = 8 * LANES;
