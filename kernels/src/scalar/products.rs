//! Products of a matrix and rows of activations: ternary ones in exact integers, the head by the
//! 16-lane rule.

use std::ops::Range;

use super::half::{widen_bf16, widen_f16};
use super::reduce::sum_of_products;
use crate::float_matrix::{FloatKind, FloatMatrix};
use crate::ternary_matrix::TernaryMatrix;
use crate::views::{Columns, Quantised};

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
            let products = trits.iter().zip(x.row(i)).map(|(t, q)| i32::from(*t) * i32::from(*q));
            let sum: i32 = products.sum();
            y.row(i)[r] = sum as f32 * (w.scale() / x.scale(i));
        }
    }
}

pub(crate) fn head(w: FloatMatrix<'_>, rows: Range<usize>, x: &[f32], mut y: Columns<'_>) {
    let widen = match w.kind() {
        FloatKind::F16 => widen_f16,
        FloatKind::Bf16 => widen_bf16,
    };
    for (i, x) in x.chunks(w.cols()).enumerate() {
        for (y, row) in y.row(i).iter_mut().zip(rows.clone()) {
            let weights = w.row(row).iter().map(|bits| widen(*bits));
            *y = sum_of_products(weights.zip(x.iter().copied()));
        }
    }
}
