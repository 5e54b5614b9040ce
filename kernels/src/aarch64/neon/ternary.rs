//! Ternary products: codes (trit + 1) by activations, 16 at a time, in exact integers; the sum of
//! the activations is subtracted once at the end. Codes are small enough to be taken as signed, as
//! the activations are.
//!
//! **Why nothing overflows.** Without dot products a lane of i16 gathers products of a code and an
//! activation, each within ±256 (±384 for the invalid code 3): one in every eight columns, so
//! 4 * 128 / 8 = 64 of them before it is widened after [`STRIP_BLOCKS`] blocks, which stays within
//! ±16,384 (±24,576 for code 3), below 32,768. Dot products gather in i32. An i32 holds any sum,
//! because a matrix has at most 2^22 columns (`ternary_matrix.rs`).

use std::arch::aarch64::*;
use std::ops::Range;

use super::{NeonDotprod, dot_product, load_i8, load_u8, store, store_i8};
use crate::ternary_matrix::{BLOCK_COLS, ROW_BLOCK_BYTES, TILE_ROWS, TernaryMatrix};
use crate::views::{Columns, Quantised};

/// Columns in a vector.
const WIDTH: usize = 16;
/// Vectors of a row of a block.
const BLOCK_VECTORS: usize = BLOCK_COLS / WIDTH;
/// Blocks gathered before they are widened.
const STRIP_BLOCKS: usize = 4;
/// Vectors of activations in a strip.
const STRIP_VECTORS: usize = STRIP_BLOCKS * BLOCK_VECTORS;
/// Activation rows that share one unpacking of a tile. At 6912 columns they take 221 kB, less than
/// half of a small L2 cache, and a second group reads 16 rows' worth of weights again.
const GROUP_ROWS: usize = 32;
/// Activation rows of a register tile: with four rows of weights 16 sums, or 12 loads and 4 of the
/// 32 registers for every 16 (with dot products) or 32 multiplications.
const BATCH: usize = 4;

/// The codes of 16 columns, one to a byte: `[row][column]`.
type Codes = [[i8; WIDTH]; TILE_ROWS];
/// A running sum in four parts for each row of a tile.
type Totals = [int32x4_t; TILE_ROWS];

/// How codes and activations are multiplied: sums that are zero, the addition of sixteen products to
/// them, and that of a strip's sums to four totals.
#[derive(Clone, Copy)]
struct Products<S, A, W> {
    zero: S,
    add: A,
    widen: W,
}

/// The blocks of a tile, wherever the arrangement has them.
struct Tile<'a> {
    /// Every row from its first block on, in pieces of a block.
    rows: [&'a [[u8; ROW_BLOCK_BYTES]]; TILE_ROWS],
    /// Pieces from one block of a row to the next.
    stride: usize,
}

impl<'a> Tile<'a> {
    fn new(w: TernaryMatrix<'a>, tile: usize) -> Self {
        let (_, stride) = w.row_at(tile * TILE_ROWS);
        let row = |r| w.row_at(tile * TILE_ROWS + r).0.as_chunks().0;
        Self { rows: std::array::from_fn(row), stride: stride / ROW_BLOCK_BYTES }
    }

    /// Blocks of a row.
    fn len(&self) -> usize {
        self.rows[0].len().div_ceil(self.stride)
    }

    /// Block `block` of each row.
    fn block(&self, block: usize) -> [&'a [u8; ROW_BLOCK_BYTES]; TILE_ROWS] {
        self.rows.map(|row| &row[block * self.stride])
    }
}

#[target_feature(enable = "neon")]
pub(super) fn ternary(w: TernaryMatrix<'_>, tiles: Range<usize>, x: Quantised<'_>, y: Columns<'_>) {
    let products = Products {
        zero: vdupq_n_s16(0),
        add: |sums, codes, x| {
            let sums = vmlal_s8(sums, vget_low_s8(codes), vget_low_s8(x));
            vmlal_high_s8(sums, codes, x)
        },
        widen: |totals, sums| vpadalq_s16(totals, sums),
    };
    all_rows(w, tiles, x, y, products);
}

#[target_feature(enable = "neon")]
pub(super) fn with_dot_products(
    token: NeonDotprod,
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    y: Columns<'_>,
) {
    let products = Products {
        zero: vdupq_n_s32(0),
        add: |sums, codes, x| dot_product(token, sums, codes, x),
        widen: |totals, sums| vaddq_s32(totals, sums),
    };
    all_rows(w, tiles, x, y, products);
}

#[target_feature(enable = "neon")]
#[inline]
fn all_rows<S: Copy>(
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    mut y: Columns<'_>,
    products: Products<
        S,
        impl Fn(S, int8x16_t, int8x16_t) -> S + Copy,
        impl Fn(int32x4_t, S) -> int32x4_t + Copy,
    >,
) {
    let n = x.rows();
    if n == 1 {
        let vectors = x.row(0).as_chunks::<WIDTH>().0;
        for (position, tile) in tiles.enumerate() {
            let totals = one_row(&Tile::new(w, tile), vectors, products);
            finish(w, x, 0, totals, &mut y, position);
        }
        return;
    }
    // Groups of nearly the same size: a small last one would read all weights for few rows.
    let groups = n.div_ceil(GROUP_ROWS);
    for group in 0..groups {
        let rows = group * n / groups..(group + 1) * n / groups;
        many_rows(w, tiles.clone(), x, rows, &mut y, products);
    }
}

/// One tile by one row of activations, unpacked in registers.
#[target_feature(enable = "neon")]
#[inline]
fn one_row<S: Copy>(
    tile: &Tile<'_>,
    x: &[[i8; WIDTH]],
    products: Products<
        S,
        impl Fn(S, int8x16_t, int8x16_t) -> S,
        impl Fn(int32x4_t, S) -> int32x4_t,
    >,
) -> Totals {
    let mut totals = [vdupq_n_s32(0); TILE_ROWS];
    let x = &x.as_chunks::<BLOCK_VECTORS>().0[..tile.len()];
    for (strip, x) in x.chunks(STRIP_BLOCKS).enumerate() {
        let mut sums = [products.zero; TILE_ROWS];
        for (block, x) in x.iter().enumerate() {
            let x = x.each_ref().map(|x| load_i8(x));
            for (sum, packed) in sums.iter_mut().zip(tile.block(strip * STRIP_BLOCKS + block)) {
                for (codes, x) in unpack(packed).into_iter().zip(x) {
                    *sum = (products.add)(*sum, codes, x);
                }
            }
        }
        for (total, sum) in totals.iter_mut().zip(sums) {
            *total = (products.widen)(*total, sum);
        }
    }
    totals
}

/// All tiles by the rows `rows` of activations, at most [`GROUP_ROWS`]: each strip of a tile is
/// unpacked once and applied to [`BATCH`] rows at a time.
#[target_feature(enable = "neon")]
#[inline]
fn many_rows<S: Copy>(
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    rows: Range<usize>,
    y: &mut Columns<'_>,
    products: Products<
        S,
        impl Fn(S, int8x16_t, int8x16_t) -> S + Copy,
        impl Fn(int32x4_t, S) -> int32x4_t + Copy,
    >,
) {
    let mut unpacked = [[[0; WIDTH]; TILE_ROWS]; STRIP_VECTORS];
    for (position, tile) in tiles.enumerate() {
        let mut totals = [[vdupq_n_s32(0); TILE_ROWS]; GROUP_ROWS];
        let totals = &mut totals[..rows.len()];
        let tile = Tile::new(w, tile);
        for first in (0..tile.len()).step_by(STRIP_BLOCKS) {
            let blocks = first..tile.len().min(first + STRIP_BLOCKS);
            let codes = unpack_strip(&tile, blocks, &mut unpacked);
            let vectors = |i: usize| {
                let x = x.row(rows.start + i).as_chunks::<WIDTH>().0;
                &x[first * BLOCK_VECTORS..][..codes.len()]
            };
            let (batches, last) = totals.as_chunks_mut::<BATCH>();
            for (batch, totals) in batches.iter_mut().enumerate() {
                let x = std::array::from_fn(|more| vectors(batch * BATCH + more));
                multiply(codes, x, totals, products);
            }
            let i = rows.len() - last.len();
            match last {
                [a] => multiply(codes, [vectors(i)], std::array::from_mut(a), products),
                [a, b] => {
                    let mut both = [*a, *b];
                    multiply(codes, [vectors(i), vectors(i + 1)], &mut both, products);
                    [*a, *b] = both;
                }
                [a, b, c] => {
                    let mut three = [*a, *b, *c];
                    let x = [vectors(i), vectors(i + 1), vectors(i + 2)];
                    multiply(codes, x, &mut three, products);
                    [*a, *b, *c] = three;
                }
                _ => {}
            }
        }
        for (i, totals) in rows.clone().zip(totals) {
            finish(w, x, i, *totals, y, position);
        }
    }
}

/// Unpacks some blocks, those of a strip, to one code a byte.
#[target_feature(enable = "neon")]
#[inline]
fn unpack_strip<'a>(
    tile: &Tile<'_>,
    blocks: Range<usize>,
    codes: &'a mut [Codes; STRIP_VECTORS],
) -> &'a [Codes] {
    let vectors = blocks.len() * BLOCK_VECTORS;
    for (block, codes) in blocks.zip(codes.as_chunks_mut::<BLOCK_VECTORS>().0) {
        for (row, packed) in tile.block(block).into_iter().enumerate() {
            for (codes, vector) in codes.iter_mut().zip(unpack(packed)) {
                store_i8(&mut codes[row], vector);
            }
        }
    }
    &codes[..vectors]
}

/// Multiplies the codes of a strip by `N` rows of activations: a register tile of four by `N`.
#[target_feature(enable = "neon")]
#[inline]
fn multiply<const N: usize, S: Copy>(
    codes: &[Codes],
    x: [&[[i8; WIDTH]]; N],
    totals: &mut [Totals; N],
    products: Products<
        S,
        impl Fn(S, int8x16_t, int8x16_t) -> S,
        impl Fn(int32x4_t, S) -> int32x4_t,
    >,
) {
    let mut sums = [[products.zero; TILE_ROWS]; N];
    let x = x.map(|x| &x[..codes.len()]);
    for (vector, codes) in codes.iter().enumerate() {
        let codes = codes.each_ref().map(|codes| load_i8(codes));
        for (x, sums) in x.iter().zip(&mut sums) {
            let x = load_i8(&x[vector]);
            for (sum, codes) in sums.iter_mut().zip(codes) {
                *sum = (products.add)(*sum, codes, x);
            }
        }
    }
    for (totals, sums) in totals.iter_mut().zip(sums) {
        for (total, sum) in totals.iter_mut().zip(sums) {
            *total = (products.widen)(*total, sum);
        }
    }
}

/// The codes of a row of a block in the order of its columns: of each plane those of the first 16
/// bytes and those of the last.
#[target_feature(enable = "neon")]
#[inline]
fn unpack(packed: &[u8; ROW_BLOCK_BYTES]) -> [int8x16_t; BLOCK_VECTORS] {
    let (halves, _) = packed.as_chunks::<WIDTH>();
    let (a, b) = (load_u8(&halves[0]), load_u8(&halves[1]));
    let low_two = vdupq_n_u8(0b11);
    [
        vandq_u8(a, low_two),
        vandq_u8(b, low_two),
        vandq_u8(vshrq_n_u8::<2>(a), low_two),
        vandq_u8(vshrq_n_u8::<2>(b), low_two),
        vandq_u8(vshrq_n_u8::<4>(a), low_two),
        vandq_u8(vshrq_n_u8::<4>(b), low_two),
        vshrq_n_u8::<6>(a),
        vshrq_n_u8::<6>(b),
    ]
    .map(|codes| vreinterpretq_s8_u8(codes))
}

/// Writes the outputs of one tile, the `position`th of the range, for row `i` of the activations.
#[target_feature(enable = "neon")]
#[inline]
fn finish(
    w: TernaryMatrix<'_>,
    x: Quantised<'_>,
    i: usize,
    [a, b, c, d]: Totals,
    y: &mut Columns<'_>,
    position: usize,
) {
    let of_codes = vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
    let sums = vcvtq_f32_s32(vsubq_s32(of_codes, vdupq_n_s32(x.sum(i))));
    let mut products = [0.0; TILE_ROWS];
    store(&mut products, vmulq_n_f32(sums, w.scale() / x.scale(i)));
    // The last tile may have fewer rows than sums.
    for (y, product) in y.row(i)[position * TILE_ROWS..].iter_mut().zip(products) {
        *y = product;
    }
}
