//! Ternary products: unsigned codes (trit + 1) by signed activations, 32 at a time, in exact
//! integers; the sum of the activations is subtracted once at the end.
//!
//! **Why nothing overflows.** `maddubs` adds two products of a code and an activation into an i16:
//! with codes 0 to 2 and activations -128 to 127 a pair is within ±512 (±768 for the invalid code
//! 3), so its saturation is never met. An i16 lane gathers one pair per 32 columns, and is widened
//! to i32 after at most [`STRIP_BLOCKS`] blocks of 128 columns: 8 * 4 pairs, within ±16,384 (±24,576
//! for code 3), below 32,768. An i32 holds any sum, because a matrix has at most 2^22 columns
//! (`ternary_matrix.rs`).

use std::arch::x86_64::*;
use std::ops::Range;

use super::{load_i8, load_u8, prefetch, store_i32x4, store_u8};
use crate::ternary_matrix::{BLOCK_COLS, ROW_BLOCK_BYTES, TILE_ROWS, TernaryMatrix};
use crate::views::{Columns, Quantised};

/// Blocks gathered in i16 before they are widened.
const STRIP_BLOCKS: usize = 8;
/// Vectors of activations in a strip.
const STRIP_VECTORS: usize = STRIP_BLOCKS * PLANES;
/// Bit planes: the columns of a block in vectors of 32.
const PLANES: usize = BLOCK_COLS / ROW_BLOCK_BYTES;
/// Activation rows that share one unpacking of a tile. At 6912 columns they take 221 kB, less than
/// half of a small L2 cache, and a second group reads 16 rows' worth of weights again.
const GROUP_ROWS: usize = 32;
/// How far ahead of its reading a tile is asked for; without it one thread waits for memory.
const PREFETCH_BYTES: usize = 4096;

/// The codes of 32 columns, one to a byte: `[row][column]`.
type Codes = [[u8; ROW_BLOCK_BYTES]; TILE_ROWS];
/// The codes of a strip, aligned so that no load of them crosses a cache line.
#[repr(align(64))]
struct Strip([Codes; STRIP_VECTORS]);
/// A running sum for each row of a tile.
type Sums = [__m256i; TILE_ROWS];

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

    /// Block `block` of each row; asks for what is read after it.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn block(&self, block: usize) -> [&'a [u8; ROW_BLOCK_BYTES]; TILE_ROWS] {
        // The bytes of a tile begin with its first row and are as many in either arrangement.
        let ahead = PREFETCH_BYTES + block * TILE_ROWS * ROW_BLOCK_BYTES;
        prefetch(self.rows[0].as_ptr(), ahead);
        prefetch(self.rows[0].as_ptr(), ahead + 64);
        self.rows.map(|row| &row[block * self.stride])
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn ternary(
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    mut y: Columns<'_>,
) {
    let n = x.rows();
    if n == 1 {
        let vectors = x.row(0).as_chunks::<ROW_BLOCK_BYTES>().0;
        for (position, tile) in tiles.enumerate() {
            let sums = one_row(&Tile::new(w, tile), vectors);
            finish(w, x, 0, sums, &mut y, position);
        }
        return;
    }
    // Groups of nearly the same size: a small last one would read all weights for few rows.
    let groups = n.div_ceil(GROUP_ROWS);
    for group in 0..groups {
        let rows = group * n / groups..(group + 1) * n / groups;
        many_rows(w, tiles.clone(), x, rows, &mut y);
    }
}

/// One tile by one row of activations, unpacked in registers.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn one_row(tile: &Tile<'_>, x: &[[i8; ROW_BLOCK_BYTES]]) -> Sums {
    let mut totals = [_mm256_setzero_si256(); TILE_ROWS];
    let x = &x.as_chunks::<PLANES>().0[..tile.len()];
    for (strip, x) in x.chunks(STRIP_BLOCKS).enumerate() {
        let mut sums = [_mm256_setzero_si256(); TILE_ROWS];
        for (block, x) in x.iter().enumerate() {
            let block = tile.block(strip * STRIP_BLOCKS + block);
            let x = x.each_ref().map(|x| load_i8(x));
            for (sum, packed) in sums.iter_mut().zip(block) {
                for (codes, x) in unpack(load_u8(packed)).into_iter().zip(x) {
                    *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, x));
                }
            }
        }
        widen(&mut totals, sums);
    }
    totals
}

/// All tiles by the rows `rows` of activations, at most [`GROUP_ROWS`]: each strip of a tile is
/// unpacked once and applied to pairs of rows.
#[target_feature(enable = "avx2,fma,f16c")]
fn many_rows(
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    rows: Range<usize>,
    y: &mut Columns<'_>,
) {
    let mut unpacked = Strip([[[0; ROW_BLOCK_BYTES]; TILE_ROWS]; STRIP_VECTORS]);
    for (position, tile) in tiles.enumerate() {
        let mut totals = [[_mm256_setzero_si256(); TILE_ROWS]; GROUP_ROWS];
        let totals = &mut totals[..rows.len()];
        let tile = Tile::new(w, tile);
        for strip in 0..tile.len().div_ceil(STRIP_BLOCKS) {
            let blocks = strip * STRIP_BLOCKS..tile.len().min((strip + 1) * STRIP_BLOCKS);
            let codes = &mut unpacked.0[..blocks.len() * PLANES];
            unpack_strip(&tile, blocks, codes);
            let vectors = |i: usize| {
                let x = x.row(rows.start + i).as_chunks::<ROW_BLOCK_BYTES>().0;
                &x[strip * STRIP_VECTORS..][..codes.len()]
            };
            let (pairs, last) = totals.as_chunks_mut::<2>();
            for (pair, totals) in pairs.iter_mut().enumerate() {
                multiply(codes, [vectors(2 * pair), vectors(2 * pair + 1)], totals);
            }
            if let [totals] = last {
                multiply(codes, [vectors(rows.len() - 1)], std::array::from_mut(totals));
            }
        }
        for (i, totals) in rows.clone().zip(totals) {
            finish(w, x, i, *totals, y, position);
        }
    }
}

/// Unpacks the blocks of a strip to one code a byte.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn unpack_strip(tile: &Tile<'_>, blocks: Range<usize>, codes: &mut [Codes]) {
    for (block, codes) in blocks.zip(codes.as_chunks_mut::<PLANES>().0) {
        for (row, packed) in tile.block(block).into_iter().enumerate() {
            for (codes, plane) in codes.iter_mut().zip(unpack(load_u8(packed))) {
                store_u8(&mut codes[row], plane);
            }
        }
    }
}

/// Multiplies the codes of a strip by `N` rows of activations: a register tile of four by `N`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn multiply<const N: usize>(
    codes: &[Codes],
    x: [&[[i8; ROW_BLOCK_BYTES]]; N],
    totals: &mut [Sums; N],
) {
    let mut sums = [[_mm256_setzero_si256(); TILE_ROWS]; N];
    let x = x.map(|x| &x[..codes.len()]);
    for (vector, codes) in codes.iter().enumerate() {
        let codes = codes.each_ref().map(|codes| load_u8(codes));
        for (x, sums) in x.iter().zip(&mut sums) {
            let x = load_i8(&x[vector]);
            for (sum, codes) in sums.iter_mut().zip(codes) {
                *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, x));
            }
        }
    }
    for (totals, sums) in totals.iter_mut().zip(sums) {
        widen(totals, sums);
    }
}

/// The four planes of 32 packed bytes. Shifts are of 16 bits: the mask takes away what crosses from
/// the upper byte.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn unpack(packed: __m256i) -> [__m256i; PLANES] {
    let low_two = _mm256_set1_epi8(0b11);
    [
        _mm256_and_si256(packed, low_two),
        _mm256_and_si256(_mm256_srli_epi16::<2>(packed), low_two),
        _mm256_and_si256(_mm256_srli_epi16::<4>(packed), low_two),
        _mm256_and_si256(_mm256_srli_epi16::<6>(packed), low_two),
    ]
}

/// Adds i16 sums to i32 totals.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn widen(totals: &mut Sums, sums: Sums) {
    for (total, sum) in totals.iter_mut().zip(sums) {
        *total = _mm256_add_epi32(*total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
    }
}

/// Writes the outputs of one tile, the `position`th of the range, for row `i` of the activations.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn finish(
    w: TernaryMatrix<'_>,
    x: Quantised<'_>,
    i: usize,
    [a, b, c, d]: Sums,
    y: &mut Columns<'_>,
    position: usize,
) {
    let halves = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    let of_codes =
        _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
    let scale = w.scale() / x.scale(i);
    let sums = store_i32x4(_mm_sub_epi32(of_codes, _mm_set1_epi32(x.sum(i))));
    // The last tile may have fewer rows than sums.
    for (y, sum) in y.row(i)[position * TILE_ROWS..].iter_mut().zip(sums) {
        *y = sum as f32 * scale;
    }
}
