//! Products of a matrix and rows of activations: ternary ones in exact integers, the head by the
//! 16-lane rule.

use std::ops::Range;

use super::reduce::dot;
use crate::float_matrix::FloatMatrix;
use crate::ternary_matrix::TernaryMatrix;
use crate::views::{Columns, Quantised};

#[inline(always)]
pub(crate) fn ternary(
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    mut y: Columns<'_>,
) {
    let mut trits = vec![0; w.cols()];
    for (r, row) in w.tile_rows(tiles).enumerate() {
        // Once for all rows of activations: CPUs without vectors of ours run this, too.
        w.unpack_row(row, &mut trits);
        for i in 0..x.rows() {
            y.row(i)[r] = exact_sum(&trits, x.row(i)) as f32 * (w.scale() / x.scale(i));
        }
    }
}

/// Σ t q. No such sum leaves an i32, for a matrix has no more columns than that: nothing wraps,
/// and without checks for it compilers find vectors here.
#[inline(always)]
fn exact_sum(trits: &[i8], q: &[i8]) -> i32 {
    let products = trits.iter().zip(q).map(|(t, q)| i32::from(*t).wrapping_mul(i32::from(*q)));
    products.fold(0, i32::wrapping_add)
}

#[inline(always)]
pub(crate) fn head(w: FloatMatrix<'_>, rows: Range<usize>, x: &[f32], mut y: Columns<'_>) {
    let mut weights = vec![0.0; w.cols()];
    for (r, row) in rows.enumerate() {
        // Once for all rows of activations, as above.
        w.widen_row(row, &mut weights);
        for (i, x) in x.chunks(w.cols()).enumerate() {
            y.row(i)[r] = dot(&weights, x);
        }
    }
}
