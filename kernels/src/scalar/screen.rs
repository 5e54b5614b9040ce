//! The screen of a head: sums of small codes by int8 activations, and the rows that they leave.

use crate::float_matrix::FloatMatrix;
use crate::scalar::fused::head;
use crate::screen::{ROW_BYTES, ScreenInput, ScreenMatrix, TILE_ROWS, judge};
use crate::views::Columns;

pub(crate) fn screen(
    w: ScreenMatrix<'_>,
    group: usize,
    x: ScreenInput<'_>,
    thresholds: &[f32],
    kept: &mut [u64],
) -> usize {
    let both = |high_tile: &[u8], low_tile: &[u8], x: &[&[i8]], sums: &mut [[i32; TILE_ROWS]]| {
        let mut low_sums = [[0; TILE_ROWS]];
        for (x, sums) in x.chunks(1).zip(sums.chunks_mut(1)) {
            products::<4>(high_tile, x, sums);
            products::<2>(low_tile, x, &mut low_sums);
            for (sum, low) in sums[0].iter_mut().zip(low_sums[0]) {
                *sum = 4 * *sum + low;
            }
        }
    };
    judge(w, group, x, thresholds, kept, products::<4>, products::<2>, both)
}

/// Σ code q for the four rows of a tile whose codes have `BITS` bits, and every vector of `x`.
fn products<const BITS: usize>(tile: &[u8], x: &[&[i8]], sums: &mut [[i32; TILE_ROWS]]) {
    let per_byte = 8 / BITS;
    for (x, sums) in x.iter().zip(sums) {
        *sums = [0; TILE_ROWS];
        for (place, packed) in tile.as_chunks::<ROW_BYTES>().0.iter().enumerate() {
            let (block, row) = (place / TILE_ROWS, place % TILE_ROWS);
            let x = &x[block * per_byte * ROW_BYTES..][..per_byte * ROW_BYTES];
            for (part, x) in x.as_chunks::<ROW_BYTES>().0.iter().enumerate() {
                let codes = packed.iter().map(|byte| byte >> (BITS * part) & ((1 << BITS) - 1));
                sums[row] += codes.zip(x).map(|(c, q)| i32::from(c) * i32::from(*q)).sum::<i32>();
            }
        }
    }
}

pub(crate) fn head_rows(w: FloatMatrix<'_>, rows: &[u32], x: &[f32], y: &mut [f32]) {
    for (y, row) in y.iter_mut().zip(rows) {
        let row = *row as usize;
        head(w, row..row + 1, x, Columns::new(std::slice::from_mut(y), 1, 0..1));
    }
}
