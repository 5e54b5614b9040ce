//! What the ternary products with dot-product instructions share: where blocks and activations lie,
//! and how a product ends. The instruction, `vpdpbusd`, adds four products of a code (trit + 1, a
//! u8) and an activation (an i8) to every i32 lane, exactly; an i32 holds any sum, because a matrix
//! has at most 2^22 columns (`ternary_matrix.rs`).

use std::array;
use std::ops::Range;

use crate::ternary_matrix::{BLOCK_COLS, ROW_BLOCK_BYTES, TILE_ROWS, TernaryMatrix};
use crate::views::{Columns, Quantised};

/// Bit planes: the columns of a block in vectors of 32.
pub(super) const PLANES: usize = BLOCK_COLS / ROW_BLOCK_BYTES;
/// Blocks that are unpacked to memory at a time: 8 kB of codes, which stay in the first-level cache
/// while the activations of the same columns pass.
pub(super) const STRIP_BLOCKS: usize = 16;
/// Activation rows that share what is unpacked to memory. At 6912 columns they take 221 kB, less
/// than half of a small L2 cache.
pub(super) const GROUP_ROWS: usize = 32;
/// How far ahead of its reading a tile is asked for.
pub(super) const PREFETCH_BYTES: usize = 4096;

/// The activations of a block of columns, by planes.
pub(super) type Activations = [[i8; ROW_BLOCK_BYTES]; PLANES];
/// The sums of codes times activations, one for each row of a tile.
pub(super) type Totals = [i32; TILE_ROWS];

/// The first `blocks` blocks of row `i` of the activations.
#[inline]
pub(super) fn blocks_of(x: Quantised<'_>, i: usize, blocks: usize) -> &[Activations] {
    &x.row(i).as_chunks::<ROW_BLOCK_BYTES>().0.as_chunks::<PLANES>().0[..blocks]
}

/// Rows `first..first + N` of the activations, in blocks.
#[inline]
pub(super) fn rows_of<const N: usize>(x: Quantised<'_>, first: usize) -> [&[Activations]; N] {
    let mut rows: [&[Activations]; N] = [&[]; N];
    for (i, row) in rows.iter_mut().enumerate() {
        *row = x.row(first + i).as_chunks::<ROW_BLOCK_BYTES>().0.as_chunks::<PLANES>().0;
    }
    rows
}

/// The blocks of a tile, wherever the arrangement has them.
pub(super) struct Tile<'a> {
    /// Every row from its first block on, in pieces of a block.
    rows: [&'a [[u8; ROW_BLOCK_BYTES]]; TILE_ROWS],
    /// Pieces from one block of a row to the next.
    stride: usize,
    /// Blocks of a row.
    blocks: usize,
}

impl<'a> Tile<'a> {
    pub(super) fn new(w: TernaryMatrix<'a>, tile: usize) -> Self {
        let (_, stride_bytes) = w.row_at(tile * TILE_ROWS);
        let row = |r| w.row_at(tile * TILE_ROWS + r).0.as_chunks().0;
        Self {
            rows: array::from_fn(row),
            stride: stride_bytes / ROW_BLOCK_BYTES,
            blocks: w.cols().div_ceil(BLOCK_COLS),
        }
    }

    /// Blocks of a row.
    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    /// Block `block` of row `row` of the tile.
    #[inline]
    pub(super) fn block(&self, row: usize, block: usize) -> &'a [u8; ROW_BLOCK_BYTES] {
        &self.rows[row][block * self.stride]
    }

    /// What to ask for when block `block` is read: two cache lines from here on. The bytes of a tile
    /// are contiguous and as many in either arrangement; the place may lie outside of them.
    #[inline]
    pub(super) fn ahead(&self, block: usize) -> *const u8 {
        let bytes = PREFETCH_BYTES + block * TILE_ROWS * ROW_BLOCK_BYTES;
        self.rows[0].as_ptr().cast::<u8>().wrapping_add(bytes)
    }
}

/// `count` things in as few groups of at most `most` as it takes, of nearly the same size: a small
/// last one would take nearly as long as a full one.
pub(super) fn groups(count: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let groups = count.div_ceil(most);
    (0..groups).map(move |group| group * count / groups..(group + 1) * count / groups)
}

/// Writes the outputs of one tile, the `position`th of the range, for row `i` of the activations.
#[inline]
pub(super) fn finish(
    w: TernaryMatrix<'_>,
    x: Quantised<'_>,
    i: usize,
    totals: Totals,
    y: &mut Columns<'_>,
    position: usize,
) {
    let scale = w.scale() / x.scale(i);
    // The last tile may have fewer rows than totals.
    for (y, total) in y.row(i)[position * TILE_ROWS..].iter_mut().zip(totals) {
        *y = (total - x.sum(i)) as f32 * scale;
    }
}
