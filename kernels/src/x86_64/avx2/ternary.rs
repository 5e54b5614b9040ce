//! Ternary products: unsigned codes (trit + 1) by signed activations, 32 at a time, in exact
//! integers; the sum of the activations is subtracted once at the end.
//!
//! Three ways, by the number of rows of activations:
//!
//! * one: memory is the limit. A tile is unpacked in registers and read ahead of its use.
//! * few: likewise, and each unpacked register serves up to [`FEW_ROWS`] rows. What is more than
//!   that goes over the tile again while it is in the first-level cache.
//! * many: arithmetic is the limit. A strip of a tile is unpacked once to one code a byte and
//!   multiplied by pairs of rows, a register tile of four by two; the strip's activations stay in
//!   the first-level cache while a batch of tiles passes.
//!
//! **Why nothing overflows.** `maddubs` adds two products of a code and an activation into an i16:
//! with codes 0 to 2 and activations -128 to 127 a pair is within ±512 (±768 for the invalid code
//! 3), so its saturation is never met. An i16 lane gathers one pair per 32 columns, and is widened
//! to i32 after at most [`STRIP_BLOCKS`] blocks of 128 columns: 8 * 4 pairs, within ±16,384
//! (±24,576 for code 3), below 32,768. An i32 holds any sum, because a matrix has at most 2^22
//! columns (`ternary_matrix.rs`).

use std::arch::asm;
use std::arch::x86_64::*;
use std::array;
use std::ops::Range;

use super::{load_i8, load_u8, prefetch, store_i32x4, store_u8};
use crate::ternary_matrix::{BLOCK_COLS, ROW_BLOCK_BYTES, TILE_ROWS, TernaryMatrix};
use crate::views::{Columns, Quantised};

/// Bit planes: the columns of a block in vectors of 32.
const PLANES: usize = BLOCK_COLS / ROW_BLOCK_BYTES;
/// Blocks gathered in i16 before they are widened.
const STRIP_BLOCKS: usize = 8;
/// Rows of activations that share what is unpacked in registers.
const FEW_ROWS: usize = 4;
/// From so many rows of activations on, unpacking to memory pays.
const MANY_ROWS: usize = 9;
/// Rows of activations that share what is unpacked to memory. A strip of them takes 20 kB, which
/// leaves room for the codes and the sums in a first-level cache of 32 kB.
const GROUP_ROWS: usize = 16;
/// Tiles that pass before the next strip: 64 rows of weights. Their sums take 4 kB.
const BATCH_TILES: usize = 16;
/// How far ahead of its reading a tile is asked for; without it one thread waits for memory.
const PREFETCH_BYTES: usize = 4096;

/// The activations of a block of columns, by planes.
type Activations = [[i8; ROW_BLOCK_BYTES]; PLANES];
/// The codes of a block, one to a byte: `[plane][row][column]`.
type Codes = [[[u8; ROW_BLOCK_BYTES]; TILE_ROWS]; PLANES];
/// The activations of a block of columns for two rows: `[plane][row][column]`.
type PairBlock = [[[i8; ROW_BLOCK_BYTES]; 2]; PLANES];
/// A strip of the activations of a group, in pairs of rows; aligned as [`Strip`] is.
#[repr(align(64))]
struct Pairs([[PairBlock; STRIP_BLOCKS]; GROUP_ROWS / 2]);
/// The codes of a strip, aligned so that no load of them crosses a cache line.
#[repr(align(64))]
struct Strip([Codes; STRIP_BLOCKS]);
/// A running sum for each row of a tile.
type Sums = [__m256i; TILE_ROWS];
/// The sums of one row of activations: of codes, so with the sum of the activations in them.
type Totals = [i32; TILE_ROWS];

/// The blocks of a tile, wherever the arrangement has them.
struct Tile<'a> {
    /// Every row from its first block on, in pieces of a block.
    rows: [&'a [[u8; ROW_BLOCK_BYTES]]; TILE_ROWS],
    /// Pieces from one block of a row to the next.
    stride: usize,
}

impl<'a> Tile<'a> {
    #[inline]
    fn new(w: TernaryMatrix<'a>, tile: usize) -> Self {
        let (_, stride) = w.row_at(tile * TILE_ROWS);
        let row = |r| w.row_at(tile * TILE_ROWS + r).0.as_chunks().0;
        Self { rows: array::from_fn(row), stride: stride / ROW_BLOCK_BYTES }
    }

    /// Block `block` of each row.
    #[inline]
    fn block(&self, block: usize) -> [&'a [u8; ROW_BLOCK_BYTES]; TILE_ROWS] {
        self.rows.map(|row| &row[block * self.stride])
    }

    /// Asks for what is read after block `block` in a walk over all tiles. The bytes of a tile begin
    /// with its first row and are as many in either arrangement.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn prefetch_ahead(&self, block: usize) {
        let ahead = PREFETCH_BYTES + block * TILE_ROWS * ROW_BLOCK_BYTES;
        prefetch(self.rows[0].as_ptr(), ahead);
        prefetch(self.rows[0].as_ptr(), ahead + 64);
    }

    /// Asks for block `block` of the next tile, `tile_bytes` further on.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn prefetch_next(&self, block: usize, tile_bytes: usize) {
        for row in self.rows {
            prefetch(row.as_ptr(), tile_bytes + block * self.stride * ROW_BLOCK_BYTES);
        }
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
    if n >= MANY_ROWS {
        // Groups of nearly the same size: a small last one would read all weights for few rows.
        let groups = n.div_ceil(GROUP_ROWS);
        for group in 0..groups {
            let rows = group * n / groups..(group + 1) * n / groups;
            many_rows(w, tiles.clone(), x, rows, &mut y);
        }
        return;
    }
    for (position, tile) in tiles.enumerate() {
        let tile = &Tile::new(w, tile);
        let mut first = 0;
        while first < n {
            let row = |i| activations(w, x, first + i);
            let mut put = |i, totals| finish(w, x, first + i, totals, &mut y, position);
            first += match n - first {
                1 => {
                    put(0, one_row(tile, row(0)));
                    1
                }
                2 => put_all(few_rows(tile, [row(0), row(1)]), put),
                // Five are three and two: one alone would unpack for itself.
                3 | 5 => put_all(few_rows(tile, [row(0), row(1), row(2)]), put),
                _ => put_all(few_rows::<FEW_ROWS>(tile, array::from_fn(row)), put),
            };
        }
    }
}

/// Hands out the totals of `N` rows; returns how many.
fn put_all<const N: usize>(all: [Totals; N], put: impl FnMut(usize, Totals)) -> usize {
    let mut put = put;
    all.into_iter().enumerate().for_each(|(i, totals)| put(i, totals));
    N
}

/// Row `i` of the activations in blocks, as many as a row of weights has.
fn activations<'a>(w: TernaryMatrix<'_>, x: Quantised<'a>, i: usize) -> &'a [Activations] {
    let blocks = x.row(i).as_chunks::<ROW_BLOCK_BYTES>().0.as_chunks::<PLANES>().0;
    &blocks[..w.cols().div_ceil(BLOCK_COLS)]
}

/// One tile by one row of activations. Planes 1 and 3 are used where they lie, as four times their
/// codes, and have sums of their own: that saves two of three shifts. A pair of them is within
/// ±2048 (±3072 for code 3), so they are widened after [`SCALED_BLOCKS`] blocks: 5 * 2 pairs.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn one_row(tile: &Tile<'_>, x: &[Activations]) -> Totals {
    const SCALED_BLOCKS: usize = 5;
    let (low, scaled) = (_mm256_set1_epi8(0b11), _mm256_set1_epi8(0b1100));
    let ones = _mm256_set1_epi16(1);
    let mut totals = [_mm256_setzero_si256(); TILE_ROWS];
    let mut scaled_totals = [_mm256_setzero_si256(); TILE_ROWS];
    for (strip, x) in x.chunks(SCALED_BLOCKS).enumerate() {
        let mut sums = [_mm256_setzero_si256(); TILE_ROWS];
        let mut scaled_sums = [_mm256_setzero_si256(); TILE_ROWS];
        for (block, x) in (strip * SCALED_BLOCKS..).zip(x) {
            tile.prefetch_ahead(block);
            let block = tile.block(block);
            let x = x.each_ref().map(|x| load_i8(x));
            for row in 0..TILE_ROWS {
                let packed = load_u8(block[row]);
                let shifted = _mm256_srli_epi16::<4>(packed);
                let a = _mm256_maddubs_epi16(_mm256_and_si256(packed, low), x[0]);
                let b = _mm256_maddubs_epi16(_mm256_and_si256(packed, scaled), x[1]);
                let c = _mm256_maddubs_epi16(_mm256_and_si256(shifted, low), x[2]);
                let d = _mm256_maddubs_epi16(_mm256_and_si256(shifted, scaled), x[3]);
                sums[row] = _mm256_add_epi16(sums[row], _mm256_add_epi16(a, c));
                scaled_sums[row] = _mm256_add_epi16(scaled_sums[row], _mm256_add_epi16(b, d));
            }
        }
        for row in 0..TILE_ROWS {
            let wide = _mm256_madd_epi16(sums[row], ones);
            totals[row] = _mm256_add_epi32(totals[row], wide);
            let wide = _mm256_madd_epi16(scaled_sums[row], ones);
            scaled_totals[row] = _mm256_add_epi32(scaled_totals[row], wide);
        }
    }
    // Every lane of the scaled totals is a multiple of four.
    for (total, scaled) in totals.iter_mut().zip(scaled_totals) {
        *total = _mm256_add_epi32(*total, _mm256_srai_epi32::<2>(scaled));
    }
    store_i32x4(across(totals))
}

/// One tile by a few rows of activations, two rows of weights at a time.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn few_rows<const N: usize>(tile: &Tile<'_>, x: [&[Activations]; N]) -> [Totals; N] {
    let low = _mm256_set1_epi8(0b11);
    let blocks = x[0].len();
    let mut totals = [[_mm256_setzero_si256(); TILE_ROWS]; N];
    for start in (0..blocks).step_by(STRIP_BLOCKS) {
        let strip = start..blocks.min(start + STRIP_BLOCKS);
        for rows in [[0, 1], [2, 3]] {
            let mut sums = [[_mm256_setzero_si256(); 2]; N];
            for at in strip.clone() {
                if rows[0] == 0 {
                    tile.prefetch_ahead(at);
                }
                let block = tile.block(at);
                let mut packed = rows.map(|row| load_u8(block[row]));
                for plane in 0..PLANES {
                    let codes = packed.map(|packed| _mm256_and_si256(packed, low));
                    packed = packed.map(|packed| _mm256_srli_epi16::<2>(packed));
                    for i in 0..N {
                        let x = load_i8(&x[i][at][plane]);
                        for row in 0..2 {
                            let products = _mm256_maddubs_epi16(codes[row], x);
                            sums[i][row] = in_order(_mm256_add_epi16(sums[i][row], products));
                        }
                    }
                }
            }
            for i in 0..N {
                for (row, sum) in rows.into_iter().zip(sums[i]) {
                    let wide = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
                    totals[i][row] = _mm256_add_epi32(totals[i][row], wide);
                }
            }
        }
    }
    totals.map(|totals| store_i32x4(across(totals)))
}

/// All tiles by the rows `rows` of activations, at most [`GROUP_ROWS`].
#[target_feature(enable = "avx2,fma,f16c")]
fn many_rows(
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    rows: Range<usize>,
    y: &mut Columns<'_>,
) {
    let mut codes = Strip([[[[0; ROW_BLOCK_BYTES]; TILE_ROWS]; PLANES]; STRIP_BLOCKS]);
    let mut pairs = Pairs([[[[[0; ROW_BLOCK_BYTES]; 2]; PLANES]; STRIP_BLOCKS]; GROUP_ROWS / 2]);
    let mut totals = [[[0; TILE_ROWS]; GROUP_ROWS]; BATCH_TILES];
    let pair_count = rows.len().div_ceil(2);
    let all_blocks = w.cols().div_ceil(BLOCK_COLS);
    let tile_bytes = TernaryMatrix::tile_bytes(w.cols());
    let strips = all_blocks.div_ceil(STRIP_BLOCKS);
    for batch in tiles.clone().step_by(BATCH_TILES) {
        let batch = batch..tiles.end.min(batch + BATCH_TILES);
        totals.as_flattened_mut().fill([0; TILE_ROWS]);
        for strip in 0..strips {
            // Strips of nearly the same length.
            let strip = strip * all_blocks / strips..(strip + 1) * all_blocks / strips;
            for (i, row) in rows.clone().enumerate() {
                let x = &activations(w, x, row)[strip.clone()];
                interleave(x, &mut pairs.0[i / 2], i % 2);
            }
            let codes = &mut codes.0[..strip.len()];
            for (tile, totals) in batch.clone().zip(&mut totals) {
                unpack_strip(&Tile::new(w, tile), strip.start, codes, tile_bytes);
                let totals = totals.as_chunks_mut::<2>().0;
                for (pair, totals) in pairs.0.iter().zip(totals).take(pair_count) {
                    multiply(codes, pair, totals);
                }
            }
        }
        for (tile, totals) in batch.zip(&totals) {
            for (i, totals) in rows.clone().zip(totals) {
                finish(w, x, i, *totals, y, tile - tiles.start);
            }
        }
    }
}

/// Copies a row's part of a strip beside that of the other row of its pair: one stream to read, and
/// no two rows that fall on the same lines of the cache.
fn interleave(x: &[Activations], pair: &mut [PairBlock], side: usize) {
    for (x, pair) in x.iter().zip(pair) {
        for (x, pair) in x.iter().zip(pair) {
            pair[side] = *x;
        }
    }
}

/// Unpacks blocks `start` and on of a tile to one code a byte. Shifts are of 16 bits: the mask takes
/// away what crosses from the upper byte. Asks for the same blocks of the next tile.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn unpack_strip(tile: &Tile<'_>, start: usize, codes: &mut [Codes], tile_bytes: usize) {
    let low = _mm256_set1_epi8(0b11);
    for (block, codes) in (start..).zip(codes) {
        tile.prefetch_next(block, tile_bytes);
        for (row, packed) in tile.block(block).into_iter().enumerate() {
            let packed = load_u8(packed);
            store_u8(&mut codes[0][row], _mm256_and_si256(packed, low));
            store_u8(&mut codes[1][row], _mm256_and_si256(_mm256_srli_epi16::<2>(packed), low));
            store_u8(&mut codes[2][row], _mm256_and_si256(_mm256_srli_epi16::<4>(packed), low));
            store_u8(&mut codes[3][row], _mm256_and_si256(_mm256_srli_epi16::<6>(packed), low));
        }
    }
}

/// Multiplies the codes of a strip by two rows of activations: a register tile of four by two.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn multiply(codes: &[Codes], pair: &[PairBlock], totals: &mut [Totals; 2]) {
    let mut sums = [[_mm256_setzero_si256(); TILE_ROWS]; 2];
    for (codes, pair) in codes.as_flattened().iter().zip(pair.as_flattened()) {
        let codes = codes.each_ref().map(|codes| load_u8(codes));
        for (x, sums) in pair.iter().zip(&mut sums) {
            let x = load_i8(x);
            for (sum, codes) in sums.iter_mut().zip(codes) {
                *sum = in_order(_mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, x)));
            }
        }
    }
    for (totals, sums) in totals.iter_mut().zip(sums) {
        let wide = sums.map(|sum| _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
        for (total, sum) in totals.iter_mut().zip(store_i32x4(across(wide))) {
            *total += sum;
        }
    }
}

/// The same value, which the compiler knows nothing about: otherwise it unrolls the loop around the
/// sums, reorders the additions of several rounds, and needs more registers than there are.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn in_order(mut sum: __m256i) -> __m256i {
    // SAFETY: no instruction at all.
    unsafe { asm!("/* {0} */", inout(ymm_reg) sum, options(pure, nomem, nostack, preserves_flags)) }
    sum
}

/// The sum of the lanes of each.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn across([a, b, c, d]: Sums) -> __m128i {
    let halves = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves))
}

/// Writes the outputs of one tile, the `position`th of the range, for row `i` of the activations.
#[inline]
fn finish(
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
