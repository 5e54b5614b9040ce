//! Ternary products for some rows of activations, where arithmetic is the limit and not yet so many
//! that sums are looked up: a row of weights is unpacked in registers, a plane at a time, and
//! multiplied by up to eight rows of activations, which lie side by side in the first-level cache and
//! are operands of the products.
//!
//! Strips of blocks outside, a batch of tiles inside: the activations of a strip are copied into their
//! order once for the whole batch.
//!
//! **Why nothing overflows.** As in `ternary.rs`: a pair is within ±512 (±768 for the invalid code 3),
//! and of each plane of a strip, of which there are 40, a lane gathers one: within ±20,480 (±30,720).

use std::arch::x86_64::*;
use std::array;
use std::mem::{self, MaybeUninit};
use std::ops::Range;
use std::ptr;

use super::ternary::{
    FEW_BLOCKS_MAX, FEW_ROWS_MAX, Output, Side, Tile, UNROLLED, across, in_order,
};
use super::{load_i8, load_i32x4, load_u8, prefetch, store_i32x4};
use crate::ternary_matrix::{BLOCK_COLS, ROW_BLOCK_BYTES, TILE_ROWS, TernaryMatrix};
use crate::views::{Columns, Quantised};

/// Bit planes: the columns of a block in vectors of 32.
const PLANES: usize = BLOCK_COLS / ROW_BLOCK_BYTES;
/// Blocks of a strip, gathered in i16.
const STRIP_BLOCKS: usize = 10;
/// Rows of activations with a sum in a register each.
const GROUP_ROWS: usize = 8;
/// Rows of activations that go over the weights together. A strip of them takes 30 kB.
const ROWS_MAX: usize = 3 * GROUP_ROWS;
/// Room for a strip of these, or for whole rows if they are few.
const SIDE_BY_SIDE_VECTORS: usize = {
    let (strip, few) = (STRIP_BLOCKS * ROWS_MAX, FEW_BLOCKS_MAX * FEW_ROWS_MAX);
    (if strip > few { strip } else { few }) * PLANES
};
/// Tiles that pass before the next strip: 256 rows of weights, 24 kB of sums.
const BATCH_TILES: usize = 64;

/// The activations of a plane.
type Vector = [i8; ROW_BLOCK_BYTES];
/// Room for activations side by side, 40 kB: of each group of rows `[block][plane][row]`. No load of them
/// crosses a cache line, and two that follow one another are in different halves of one.
#[repr(align(64))]
pub(super) struct SideBySide([MaybeUninit<Vector>; SIDE_BY_SIDE_VECTORS]);

impl SideBySide {
    pub(super) const fn new() -> Self {
        Self([MaybeUninit::uninit(); SIDE_BY_SIDE_VECTORS])
    }

    /// All of the room.
    pub(super) fn places(&mut self) -> Places<'_> {
        Places(&mut self.0)
    }
}

/// What is left of the room.
pub(super) struct Places<'p>(&'p mut [MaybeUninit<Vector>]);

impl<'p> Places<'p> {
    /// Copies blocks `blocks` of rows `rows` of the activations to the front of the room.
    ///
    /// # Panics
    ///
    /// If there is too little room.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    pub(super) fn copy(
        &mut self,
        x: Quantised<'_>,
        rows: Range<usize>,
        blocks: Range<usize>,
    ) -> &'p [Vector] {
        let n = rows.len();
        let (own, rest) = mem::take(&mut self.0).split_at_mut(blocks.len() * PLANES * n);
        self.0 = rest;
        for (i, row) in rows.enumerate() {
            let vectors = x.row(row).as_chunks().0;
            let vectors = &vectors[blocks.start * PLANES..blocks.end * PLANES];
            for (place, vector) in own[i..].iter_mut().step_by(n).zip(vectors) {
                place.write(*vector);
            }
        }
        // SAFETY: there are `n` times as many places as vectors of a row, and row `i` filled those at `i`
        // and every `n` after it.
        unsafe { &*(ptr::from_ref::<[MaybeUninit<Vector>]>(own) as *const [Vector]) }
    }
}

/// The sums of one row of weights: of codes, so with the sum of the activations in them.
type Totals = [[i32; 4]; ROWS_MAX / 4];

/// All tiles by any number of rows.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn some_rows<'a, T: Tile<'a>>(
    w: TernaryMatrix<'a>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    y: &mut Columns<'_>,
) {
    let n = x.rows();
    // Rounds of nearly the same size: a small last one would read all weights for few rows.
    let rounds = n.div_ceil(ROWS_MAX);
    for round in 0..rounds {
        let rows = round * n / rounds..(round + 1) * n / rounds;
        round_of::<T>(w, tiles.clone(), x, rows, y);
    }
}

/// All tiles by the rows `rows` of activations, at most [`ROWS_MAX`].
#[target_feature(enable = "avx2,fma,f16c")]
fn round_of<'a, T: Tile<'a>>(
    w: TernaryMatrix<'a>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    rows: Range<usize>,
    y: &mut Columns<'_>,
) {
    let mut activations = SideBySide::new();
    let mut totals = [[[0; 4]; ROWS_MAX / 4]; BATCH_TILES * TILE_ROWS];
    let all_blocks = w.cols().div_ceil(BLOCK_COLS);
    let strips = all_blocks.div_ceil(STRIP_BLOCKS);
    let count = rows.len().div_ceil(GROUP_ROWS);
    let bound = |at: usize| at * rows.len() / count;
    let groups: [_; ROWS_MAX / GROUP_ROWS] = array::from_fn(|at| bound(at)..bound(at + 1));
    let groups = &groups[..count];
    for batch in tiles.clone().step_by(BATCH_TILES) {
        let batch = batch..tiles.end.min(batch + BATCH_TILES);
        let totals = &mut totals[..batch.len() * TILE_ROWS];
        totals.as_flattened_mut().fill([0; 4]);
        for strip in 0..strips {
            // All but the last are whole: their blocks pass without a loop.
            let end = |strip| all_blocks.min((strip + 1) * STRIP_BLOCKS);
            let blocks = |strip: usize| strip * STRIP_BLOCKS..end(strip);
            let (strip, next) = (blocks(strip), blocks((strip + 1) % strips));
            let (mut places, mut copied) = (activations.places(), [&[][..]; ROWS_MAX / GROUP_ROWS]);
            for (copied, group) in copied.iter_mut().zip(groups) {
                let rows = rows.start + group.start..rows.start + group.end;
                *copied = places.copy(x, rows, strip.clone());
            }
            for (tile, totals) in batch.clone().zip(totals.as_chunks_mut::<TILE_ROWS>().0) {
                let weights = T::new(w, tile).part(strip.clone());
                // What comes next in this order: the same strip of the next tile, or the next strip.
                let ahead = match tile + 1 < batch.end {
                    true => T::new(w, tile + 1).part(strip.clone()),
                    false => T::new(w, batch.start).part(next.clone()),
                };
                for at in 0..ahead.len() {
                    ahead.block(at).into_iter().for_each(|row| prefetch(row, 0));
                }
                for (own, group) in copied.iter().zip(groups) {
                    match group.len() {
                        1 => tile_by::<T, 1>(weights, own, group.start, totals),
                        2 => tile_by::<T, 2>(weights, own, group.start, totals),
                        3 => tile_by::<T, 3>(weights, own, group.start, totals),
                        4 => tile_by::<T, 4>(weights, own, group.start, totals),
                        5 => tile_by::<T, 5>(weights, own, group.start, totals),
                        6 => tile_by::<T, 6>(weights, own, group.start, totals),
                        7 => tile_by::<T, 7>(weights, own, group.start, totals),
                        _ => tile_by::<T, GROUP_ROWS>(weights, own, group.start, totals),
                    }
                }
            }
        }
        let totals = totals.as_chunks().0;
        let position = batch.start - tiles.start;
        for (four, first) in rows.clone().step_by(4).enumerate() {
            match rows.end - first {
                1 => finish::<1>(w, x, first, totals, four, y, position),
                2 => finish::<2>(w, x, first, totals, four, y, position),
                3 => finish::<3>(w, x, first, totals, four, y, position),
                _ => finish::<4>(w, x, first, totals, four, y, position),
            }
        }
    }
}

/// Adds a strip of a tile by `N` rows of activations to totals `first` and on of each of its rows.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn tile_by<'a, T: Tile<'a>, const N: usize>(
    tile: T,
    x: &[Vector],
    first: usize,
    totals: &mut [Totals; TILE_ROWS],
) {
    let x: &[Side<N>] = x.as_chunks().0.as_chunks().0;
    assert_eq!(x.len(), tile.len(), "so that nothing is checked in the loop");
    let low = in_order(_mm256_set1_epi8(0b11));
    let (fives, rest) = x.as_chunks::<UNROLLED>();
    for (row, totals) in totals.iter_mut().enumerate() {
        let mut sums = [_mm256_setzero_si256(); N];
        let mut at = 0;
        // Five calls and no loop: it would not be unrolled.
        for [a, b, c, d, e] in fives {
            let weights = tile.row_blocks(row, at);
            add_block(low, weights[0], a, &mut sums);
            add_block(low, weights[1], b, &mut sums);
            add_block(low, weights[2], c, &mut sums);
            add_block(low, weights[3], d, &mut sums);
            add_block(low, weights[4], e, &mut sums);
            at += UNROLLED;
        }
        for x in rest {
            add_block(low, tile.row_block(row, at), x, &mut sums);
            at += 1;
        }
        let totals = &mut totals.as_flattened_mut()[first..first + N];
        let zero = _mm256_setzero_si256();
        for (totals, sums) in totals.chunks_mut(4).zip(sums.chunks(4)) {
            let wide = |i: usize| {
                let sum = sums.get(i).copied().unwrap_or(zero);
                _mm256_madd_epi16(sum, _mm256_set1_epi16(1))
            };
            let more = store_i32x4(across([wide(0), wide(1), wide(2), wide(3)]));
            for (total, more) in totals.iter_mut().zip(more) {
                *total += more;
            }
        }
    }
}

/// Adds the products of a block of a row of weights. `low` is the mask of a plane, in a register.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_block<const N: usize>(
    low: __m256i,
    packed: &[u8; ROW_BLOCK_BYTES],
    x: &Side<N>,
    sums: &mut [__m256i; N],
) {
    let mut packed = load_u8(packed);
    for (plane, x) in x.iter().enumerate() {
        if plane > 0 {
            packed = _mm256_srli_epi16::<2>(packed);
        }
        let codes = _mm256_and_si256(packed, low);
        for (sum, x) in sums.iter_mut().zip(x) {
            let products = _mm256_maddubs_epi16(codes, load_i8(x));
            *sum = in_order(_mm256_add_epi16(*sum, products));
        }
    }
}

/// Writes the outputs of some tiles, from the `position`th of the range on, for rows `first` to
/// `first + N` of the activations, the `four`th of the totals.
#[target_feature(enable = "avx2,fma,f16c")]
fn finish<const N: usize>(
    w: TernaryMatrix<'_>,
    x: Quantised<'_>,
    first: usize,
    totals: &[[Totals; TILE_ROWS]],
    four: usize,
    y: &mut Columns<'_>,
    position: usize,
) {
    let outputs: [_; N] = array::from_fn(|i| Output::new(w, x, first + i));
    let mut places = y.rows_mut::<N>(first).map(|row| row[position * TILE_ROWS..].as_chunks_mut());
    for (tile, totals) in totals.iter().enumerate() {
        let of_token = transpose(totals.each_ref().map(|totals| load_i32x4(&totals[four])));
        for ((totals, output), (whole, last)) in of_token.into_iter().zip(outputs).zip(&mut places)
        {
            output.put(totals, whole.get_mut(tile), last);
        }
    }
}

/// Exchanges rows and columns of 4 by 4.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn transpose([a, b, c, d]: [__m128i; 4]) -> [__m128i; 4] {
    let (low, high) = (_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b));
    let (low_two, high_two) = (_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d));
    [
        _mm_unpacklo_epi64(low, low_two),
        _mm_unpackhi_epi64(low, low_two),
        _mm_unpacklo_epi64(high, high_two),
        _mm_unpackhi_epi64(high, high_two),
    ]
}
