//! Ternary products: unsigned codes (trit + 1) by signed activations, 32 at a time, in exact
//! integers; the sum of the activations is subtracted once at the end.
//!
//! Three ways, by the number of rows of activations:
//!
//! * one: memory is the limit. A tile is unpacked in registers and read ahead of its use.
//! * few: likewise, and each unpacked register serves up to five rows.
//! * some: arithmetic is the limit, see `group.rs`. (For panels of many, see `lookup.rs`.)
//!
//! **Why nothing overflows.** `maddubs` adds two products of a code and an activation into an i16:
//! with codes 0 to 2 and activations -128 to 127 a pair is within ±512 (±768 for the invalid code
//! 3), so its saturation is never met. `one_row` says what an i16 lane gathers of them before it is
//! widened to i32. An i32 holds any sum, because a matrix has at most 2^22 columns
//! (`ternary_matrix.rs`).

use std::arch::asm;
use std::arch::x86_64::*;
use std::array;
use std::ops::Range;

use super::group::some_rows;
use super::{load_i8, load_u8, prefetch, store_x4};
use crate::ternary_matrix::{Arrangement, BLOCK_COLS, ROW_BLOCK_BYTES, TILE_ROWS, TernaryMatrix};
use crate::views::{Columns, Quantised};

/// Bit planes: the columns of a block in vectors of 32.
const PLANES: usize = BLOCK_COLS / ROW_BLOCK_BYTES;
/// Blocks of four times the codes that are gathered in i16.
const SCALED_BLOCKS: usize = 5;
/// How far ahead of its reading a tile is asked for; without it one thread waits for memory.
const PREFETCH_BYTES: usize = 4096;

/// The activations of a block of columns, by planes.
type Activations = [[i8; ROW_BLOCK_BYTES]; PLANES];
/// A running sum for each row of a tile.
type Sums = [__m256i; TILE_ROWS];

/// One block of a tile: `[row][byte]`.
type TileBlock = [[u8; ROW_BLOCK_BYTES]; TILE_ROWS];

/// The blocks of four rows, wherever the arrangement has them.
pub(super) trait Tile<'a>: Copy {
    /// Of tile `tile`.
    fn new(w: TernaryMatrix<'a>, tile: usize) -> Self;
    /// Blocks `blocks` of them.
    fn part(self, blocks: Range<usize>) -> Self;
    /// How many there are.
    fn len(self) -> usize;
    /// Block `at` of each row.
    fn block(self, at: usize) -> [&'a [u8; ROW_BLOCK_BYTES]; TILE_ROWS];
    /// Block `at` of row `row`.
    fn row_block(self, row: usize, at: usize) -> &'a [u8; ROW_BLOCK_BYTES];
}

/// A tile of [`Arrangement::Tiles`].
#[derive(Clone, Copy)]
pub(super) struct Woven<'a>(&'a [TileBlock]);

impl<'a> Tile<'a> for Woven<'a> {
    #[inline]
    fn new(w: TernaryMatrix<'a>, tile: usize) -> Self {
        Self(w.tile(tile).as_chunks::<ROW_BLOCK_BYTES>().0.as_chunks::<TILE_ROWS>().0)
    }

    #[inline]
    fn part(self, blocks: Range<usize>) -> Self {
        Self(&self.0[blocks])
    }

    #[inline]
    fn len(self) -> usize {
        self.0.len()
    }

    #[inline]
    fn block(self, at: usize) -> [&'a [u8; ROW_BLOCK_BYTES]; TILE_ROWS] {
        self.0[at].each_ref()
    }

    #[inline]
    fn row_block(self, row: usize, at: usize) -> &'a [u8; ROW_BLOCK_BYTES] {
        &self.0[at][row]
    }
}

/// Four rows of [`Arrangement::Rows`], equally long.
#[derive(Clone, Copy)]
pub(super) struct Plain<'a>([&'a [[u8; ROW_BLOCK_BYTES]]; TILE_ROWS]);

impl<'a> Tile<'a> for Plain<'a> {
    #[inline]
    fn new(w: TernaryMatrix<'a>, tile: usize) -> Self {
        let pieces = w.tile(tile).as_chunks().0;
        let len = pieces.len() / TILE_ROWS;
        Self(array::from_fn(|row| &pieces[row * len..][..len]))
    }

    #[inline]
    fn part(self, blocks: Range<usize>) -> Self {
        let rows = self.0;
        Self(array::from_fn(|row| &rows[row][blocks.clone()]))
    }

    #[inline]
    fn len(self) -> usize {
        self.0[0].len()
    }

    #[inline]
    fn block(self, at: usize) -> [&'a [u8; ROW_BLOCK_BYTES]; TILE_ROWS] {
        let [a, b, c, d] = self.0;
        [&a[at], &b[at], &c[at], &d[at]]
    }

    #[inline]
    fn row_block(self, row: usize, at: usize) -> &'a [u8; ROW_BLOCK_BYTES] {
        &self.0[row][at]
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn ternary(w: TernaryMatrix<'_>, tiles: Range<usize>, x: Quantised<'_>, y: Columns<'_>) {
    match w.arrangement() {
        Arrangement::Tiles => all_tiles::<Woven<'_>>(w, tiles, x, y),
        Arrangement::Rows => all_tiles::<Plain<'_>>(w, tiles, x, y),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn all_tiles<'a, T: Tile<'a>>(
    w: TernaryMatrix<'a>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    mut y: Columns<'_>,
) {
    match x.rows() {
        0 => {}
        1 => single_row::<T>(w, tiles, x, y.row(0)),
        2 => few_rows::<T, 2>(w, tiles, x, &mut y),
        3 => few_rows::<T, 3>(w, tiles, x, &mut y),
        4 => few_rows::<T, 4>(w, tiles, x, &mut y),
        5 => few_rows::<T, 5>(w, tiles, x, &mut y),
        _ => some_rows::<T>(w, tiles, x, &mut y),
    }
}

/// Asks for block `block` after the place `ahead`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn prefetch_block(ahead: *const u8, block: usize) {
    prefetch(ahead, block * size_of::<TileBlock>());
    prefetch(ahead, block * size_of::<TileBlock>() + 64);
}

/// Row `i` of the activations in blocks, as many as a row of weights has.
fn activations<'a>(w: TernaryMatrix<'_>, x: Quantised<'a>, i: usize) -> &'a [Activations] {
    let blocks = x.row(i).as_chunks::<ROW_BLOCK_BYTES>().0.as_chunks::<PLANES>().0;
    &blocks[..w.cols().div_ceil(BLOCK_COLS)]
}

/// All tiles by one row of activations: in turn one of the first half and one of the second. Two
/// places in memory are read at once so that the end of a page of one, where the CPU's own prefetchers
/// stop, passes while those of the other run.
#[target_feature(enable = "avx2,fma,f16c")]
fn single_row<'a, T: Tile<'a>>(
    w: TernaryMatrix<'a>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    y: &mut [f32],
) {
    let blocks = activations(w, x, 0);
    let output = Output::new(w, x, 0);
    let half = tiles.len().div_ceil(2);
    let (first, second) = y.split_at_mut(y.len().min(half * TILE_ROWS));
    let mut halves = [first, second].map(|y| y.chunks_mut(TILE_ROWS));
    for at in 0..half {
        for (side, y) in halves.iter_mut().enumerate() {
            let Some(y) = y.next() else { continue };
            let at = tiles.start + side * half + at;
            // The bytes of a tile are contiguous in either arrangement.
            let ahead = w.tile(at).as_ptr_range().end;
            let totals = one_row(T::new(w, at), ahead, blocks);
            output.put(totals, y);
        }
    }
}

/// What makes outputs of the sums of a row of activations.
#[derive(Clone, Copy)]
struct Output {
    /// Of the activations.
    sum: i32,
    scale: f32,
}

impl Output {
    fn new(w: TernaryMatrix<'_>, x: Quantised<'_>, i: usize) -> Self {
        Self { sum: x.sum(i), scale: w.scale() / x.scale(i) }
    }

    /// Writes the outputs of a tile, of which the last may have fewer rows than totals.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn put(self, totals: __m128i, y: &mut [f32]) {
        let exact = _mm_sub_epi32(totals, _mm_set1_epi32(self.sum));
        let values = store_x4(_mm_mul_ps(_mm_cvtepi32_ps(exact), _mm_set1_ps(self.scale)));
        match y.first_chunk_mut::<TILE_ROWS>() {
            Some(y) => *y = values,
            None => y.copy_from_slice(&values[..y.len()]),
        }
    }
}

/// One tile by one row of activations. Planes 1 and 3 are used where they lie, as four times their
/// codes, and have sums of their own: that saves two of three shifts.
///
/// A block adds two pairs to either sum: within ±1024 (±1536 for code 3), and four times that for
/// the scaled ones. Those are divided, exactly, and join the others every [`SCALED_BLOCKS`] blocks,
/// within ±20,480 (±30,720); after twice as many blocks the sums, which are within the same bounds,
/// are widened.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn one_row<'a, T: Tile<'a>>(tile: T, ahead: *const u8, x: &[Activations]) -> __m128i {
    let mut totals = [_mm256_setzero_si256(); TILE_ROWS];
    assert_eq!(x.len(), tile.len(), "a row of activations has as many blocks as one of weights");
    let mut first = 0;
    for strip in x.chunks(2 * SCALED_BLOCKS) {
        let mut sums = [_mm256_setzero_si256(); TILE_ROWS];
        let (halves, rest) = strip.as_chunks::<SCALED_BLOCKS>();
        for x in halves {
            add_blocks(tile.part(first..first + SCALED_BLOCKS), ahead, first, x, &mut sums);
            first += SCALED_BLOCKS;
        }
        for x in rest.as_chunks::<1>().0 {
            add_blocks(tile.part(first..first + 1), ahead, first, x, &mut sums);
            first += 1;
        }
        for (total, sum) in totals.iter_mut().zip(sums) {
            *total = _mm256_add_epi32(*total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
        }
    }
    across(totals)
}

/// Adds the products of `N` blocks, at most [`SCALED_BLOCKS`], from the `first` of the tile on.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_blocks<'a, T: Tile<'a>, const N: usize>(
    tile: T,
    ahead: *const u8,
    first: usize,
    x: &[Activations; N],
    sums: &mut Sums,
) {
    let (low, scaled) = (_mm256_set1_epi8(0b11), _mm256_set1_epi8(0b1100));
    let mut scaled_sums = [_mm256_setzero_si256(); TILE_ROWS];
    for (at, x) in x.iter().enumerate() {
        prefetch_block(ahead, first + at);
        let block = tile.block(at);
        let mut x = x;
        for row in 0..TILE_ROWS {
            // Each row loads the activations as operands of its products: to keep them would take
            // four registers more than there are.
            x = anew(x);
            let packed = load_u8(block[row]);
            let shifted = _mm256_srli_epi16::<4>(packed);
            let a = _mm256_maddubs_epi16(_mm256_and_si256(packed, low), load_i8(&x[0]));
            let b = _mm256_maddubs_epi16(_mm256_and_si256(packed, scaled), load_i8(&x[1]));
            let c = _mm256_maddubs_epi16(_mm256_and_si256(shifted, low), load_i8(&x[2]));
            let d = _mm256_maddubs_epi16(_mm256_and_si256(shifted, scaled), load_i8(&x[3]));
            sums[row] = _mm256_add_epi16(sums[row], _mm256_add_epi16(a, c));
            scaled_sums[row] = _mm256_add_epi16(scaled_sums[row], _mm256_add_epi16(b, d));
        }
    }
    for (sum, scaled) in sums.iter_mut().zip(scaled_sums) {
        *sum = _mm256_add_epi16(*sum, _mm256_srai_epi16::<2>(scaled));
    }
}

/// The same place, of which the compiler does not know what was loaded from there.
#[expect(clippy::pointers_in_nomem_asm_block, reason = "nothing is read: there is no instruction")]
#[inline]
fn anew<T>(place: &T) -> &T {
    let mut place: *const T = place;
    // SAFETY: no instruction at all. Not `pure`: then two of them could become one.
    unsafe { asm!("/* {0} */", inout(reg) place, options(nomem, nostack, preserves_flags)) }
    // SAFETY: still the pointer of a reference that lives as long as the one returned.
    unsafe { &*place }
}

/// All tiles by a few rows of activations.
#[target_feature(enable = "avx2,fma,f16c")]
fn few_rows<'a, T: Tile<'a>, const N: usize>(
    w: TernaryMatrix<'a>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    y: &mut Columns<'_>,
) {
    let blocks: [_; N] = array::from_fn(|i| activations(w, x, i));
    let outputs: [_; N] = array::from_fn(|i| Output::new(w, x, i));
    for (position, at) in tiles.enumerate() {
        // The bytes of a tile are contiguous in either arrangement.
        let ahead = w.tile(at).as_ptr().wrapping_byte_add(PREFETCH_BYTES);
        let totals = tile_by(T::new(w, at), ahead, blocks);
        for (i, (totals, output)) in totals.into_iter().zip(outputs).enumerate() {
            output.put(totals, &mut y.row(i)[position * TILE_ROWS..]);
        }
    }
}

/// One tile by `N` rows of activations, one row of weights after the other: each register of masked
/// weights serves all of them, and the activations are operands of the products. Otherwise as
/// [`one_row`], whose bounds hold here.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn tile_by<'a, T: Tile<'a>, const N: usize>(
    tile: T,
    ahead: *const u8,
    x: [&[Activations]; N],
) -> [__m128i; N] {
    let mut totals = [[_mm256_setzero_si256(); TILE_ROWS]; N];
    for first in (0..tile.len()).step_by(2 * SCALED_BLOCKS) {
        let strip = first..tile.len().min(first + 2 * SCALED_BLOCKS);
        for at in strip.clone() {
            prefetch_block(ahead, at);
        }
        let part = tile.part(strip.clone());
        let mut x = x;
        for x in &mut x {
            *x = &x[strip.clone()];
        }
        for row in 0..TILE_ROWS {
            let mut sums = [_mm256_setzero_si256(); N];
            for half in [0..strip.len().min(SCALED_BLOCKS), SCALED_BLOCKS..strip.len()] {
                if half.start < half.end {
                    let mut x = x;
                    for x in &mut x {
                        *x = &x[half.clone()];
                    }
                    add_row::<T, N>(part.part(half), row, x, &mut sums);
                }
            }
            for (totals, sum) in totals.iter_mut().zip(sums) {
                let wide = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
                totals[row] = _mm256_add_epi32(totals[row], wide);
            }
        }
    }
    let mut sums = [_mm_setzero_si128(); N];
    for (sum, totals) in sums.iter_mut().zip(totals) {
        *sum = across(totals);
    }
    sums
}

/// Adds the products of row `row` of at most [`SCALED_BLOCKS`] blocks.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_row<'a, T: Tile<'a>, const N: usize>(
    tile: T,
    row: usize,
    x: [&[Activations]; N],
    sums: &mut [__m256i; N],
) {
    let (low, scaled) = (_mm256_set1_epi8(0b11), _mm256_set1_epi8(0b1100));
    let len = tile.len();
    for x in x {
        assert_eq!(x.len(), len, "so that nothing is checked in the loop");
    }
    let mut own = *sums;
    let mut scaled_sums = [_mm256_setzero_si256(); N];
    for at in 0..len {
        let packed = load_u8(tile.row_block(row, at));
        let shifted = _mm256_srli_epi16::<4>(packed);
        let masked = [
            _mm256_and_si256(packed, low),
            _mm256_and_si256(packed, scaled),
            _mm256_and_si256(shifted, low),
            _mm256_and_si256(shifted, scaled),
        ];
        for (plane, masked) in masked.into_iter().enumerate() {
            let sums = if plane % 2 == 0 { &mut own } else { &mut scaled_sums };
            for (sum, x) in sums.iter_mut().zip(x) {
                let products = _mm256_maddubs_epi16(masked, load_i8(&x[at][plane]));
                *sum = in_order(_mm256_add_epi16(*sum, products));
            }
        }
    }
    for ((sum, own), scaled) in sums.iter_mut().zip(own).zip(scaled_sums) {
        *sum = _mm256_add_epi16(own, _mm256_srai_epi16::<2>(scaled));
    }
}

/// The same value, which the compiler knows nothing about: otherwise it unrolls the loop around the
/// sums, reorders the additions of several rounds, and needs more registers than there are.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn in_order(mut sum: __m256i) -> __m256i {
    // SAFETY: no instruction at all.
    unsafe { asm!("/* {0} */", inout(ymm_reg) sum, options(pure, nomem, nostack, preserves_flags)) }
    sum
}

/// The sum of the lanes of each.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn across([a, b, c, d]: Sums) -> __m128i {
    let halves = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves))
}
