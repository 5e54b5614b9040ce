//! The screen of a head: sums of small codes by int8 activations, and the rows that they leave.

use crate::float_matrix::FloatMatrix;
use crate::scalar::fused::head;
use crate::screen::{
    GROUP_ROWS, Kept, ROW_BYTES, ScreenInput, ScreenMatrix, TILE_ROWS, Threshold, judge,
};
use crate::views::Columns;

pub(crate) fn screen(
    w: ScreenMatrix<'_>,
    group: usize,
    x: ScreenInput<'_>,
    thresholds: &[Threshold<'_>],
    kept: &mut [Kept],
) -> usize {
    let both = |tiles: usize, x: &[&[i8]], sums: &mut [[i32; GROUP_ROWS]]| {
        let (mut high, mut low) = ([[0; TILE_ROWS]], [[0; TILE_ROWS]]);
        for (x, sums) in x.chunks(1).zip(sums) {
            for (tile, sums) in (0..tiles).zip(sums.as_chunks_mut::<TILE_ROWS>().0) {
                products::<4>(w.high(group, tile), x, &mut high);
                products::<2>(w.low(group, tile), x, &mut low);
                for (sum, (high, low)) in sums.iter_mut().zip(high[0].iter().zip(low[0])) {
                    *sum += 4 * high + low;
                }
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
