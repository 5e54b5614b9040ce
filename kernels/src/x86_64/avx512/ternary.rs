//! Ternary products of one to eight rows of activations by `vpdpbusd`. A register holds two rows of
//! weights, 32 columns of each; the activations of these columns are in both halves of another. Weights
//! are unpacked in registers, and every row of activations shares what was unpacked: memory is the limit,
//! or near it. More rows are done by `many.rs`.
//!
//! Up to [`IN_PLACE`] rows use planes 1 and 3 where they lie in the bytes, as four times their codes, with
//! sums of their own: an exact quarter of those joins the others in the end. That saves two of three shifts
//! and costs a sum for each row, for which there are registers.

use std::arch::x86_64::*;
use std::array;
use std::ops::Range;

use super::{across, load_codes, load_i8_twice};
use crate::ternary_matrix::{Arrangement, BLOCK_COLS, ROW_BLOCK_BYTES, TILE_ROWS, TernaryMatrix};
use crate::views::{Columns, Quantised};
use crate::x86_64::avx2::ternary::{Output, Plain, Tile, Woven};
use crate::x86_64::avx2::{load_u8, prefetch};
use crate::x86_64::vnni::{Activations, PLANES, PREFETCH_BYTES, blocks_of, groups};

/// Rows of activations in a register tile: with two pairs of weights, 16 sums of the 32 registers.
const FEW_ROWS: usize = 8;
/// Rows of activations, at most, that have two sums for each pair of rows of weights.
const IN_PLACE: usize = 6;
/// Tiles that pass for one group of rows of activations before the next, when there are several: 80 kB of
/// 2560 columns, a part of a second-level cache.
const BATCH_TILES: usize = 128;
/// Registers for one plane of a block of a tile, two rows in each.
const PAIRS: usize = TILE_ROWS / 2;
/// A register for each pair of rows of a tile, one in each half.
type Sums = [__m512i; PAIRS];

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn ternary(
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    mut y: Columns<'_>,
) {
    match w.arrangement() {
        Arrangement::Tiles => all_tiles::<Woven<'_>>(w, tiles, x, &mut y),
        Arrangement::Rows => all_tiles::<Plain<'_>>(w, tiles, x, &mut y),
    }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn all_tiles<'a, T: Tile<'a>>(
    w: TernaryMatrix<'a>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    y: &mut Columns<'_>,
) {
    if x.rows() == 1 {
        return few_rows::<T, 1>(w, tiles, 0, x, y);
    }
    let first = tiles.start;
    let step = if x.rows() > FEW_ROWS { BATCH_TILES } else { tiles.len().max(1) };
    for start in tiles.clone().step_by(step) {
        let batch = start..tiles.end.min(start + step);
        for rows in groups(x.rows(), FEW_ROWS) {
            let (x, y) = (x.part(rows.clone()), &mut y.part(rows.clone()));
            let part = batch.clone();
            match rows.len() {
                1 => few_rows::<T, 1>(w, part, start - first, x, y),
                2 => few_rows::<T, 2>(w, part, start - first, x, y),
                3 => few_rows::<T, 3>(w, part, start - first, x, y),
                4 => few_rows::<T, 4>(w, part, start - first, x, y),
                5 => few_rows::<T, 5>(w, part, start - first, x, y),
                6 => few_rows::<T, 6>(w, part, start - first, x, y),
                // Seven have the form of eight, for which the compiler finds registers.
                _ => few_rows::<T, FEW_ROWS>(w, part, start - first, x, y),
            }
        }
    }
}

/// The tiles by up to `N` rows of activations, the first of them being the `first_tile`th of the output.
/// With one row two places in memory are read in turn, as AVX2's `single_row` does and for its reason.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn few_rows<'a, T: Tile<'a>, const N: usize>(
    w: TernaryMatrix<'a>,
    tiles: Range<usize>,
    first_tile: usize,
    x: Quantised<'_>,
    y: &mut Columns<'_>,
) {
    let last = x.rows() - 1;
    let row = |i: usize| blocks_of(x, i.min(last), w.cols().div_ceil(BLOCK_COLS));
    let blocks: [&[Activations]; N] = array::from_fn(row);
    let outputs: [_; N] = array::from_fn(|i| Output::new(w, x, i.min(last)));
    let places = if N == 1 { 2 } else { 1 };
    let part = tiles.len().div_ceil(places);
    for first in 0..part {
        for position in (first..tiles.len()).step_by(part).take(places) {
            let at = tiles.start + position;
            // The bytes of a tile are contiguous in either arrangement.
            let ahead = match places {
                1 => w.tile(at).as_ptr().wrapping_byte_add(PREFETCH_BYTES),
                _ => w.tile(at).as_ptr_range().end,
            };
            let totals = tile_by::<T, N>(T::new(w, at), ahead, &blocks);
            for (i, (totals, output)) in totals.into_iter().zip(outputs).enumerate().take(last + 1)
            {
                let y = &mut y.row(i)[(first_tile + position) * TILE_ROWS..];
                match y.first_chunk_mut() {
                    Some(whole) => output.put(totals, Some(whole), &mut []),
                    None => output.put(totals, None, y),
                }
            }
        }
    }
}

/// One tile by `N` rows of activations.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn tile_by<'a, T: Tile<'a>, const N: usize>(
    tile: T,
    ahead: *const u8,
    x: &[&[Activations]; N],
) -> [__m128i; N] {
    let (low, scaled) = (_mm512_set1_epi8(0b11), _mm512_set1_epi8(0b1100));
    // Of planes 0 and 2, and of planes 1 and 3.
    let mut sums = [[[_mm512_setzero_si512(); PAIRS]; 2]; N];
    for block in 0..tile.len() {
        prefetch(ahead, block * 128);
        prefetch(ahead, block * 128 + 64);
        let packed = pairs(tile, block);
        for plane in 0..PLANES {
            let mut codes = [_mm512_setzero_si512(); PAIRS];
            for (codes, packed) in codes.iter_mut().zip(packed) {
                *codes = match (plane, N <= IN_PLACE) {
                    (0, _) => _mm512_and_si512(packed, low),
                    (1, true) => _mm512_and_si512(packed, scaled),
                    (1, false) => _mm512_and_si512(_mm512_srli_epi16::<2>(packed), low),
                    (2, _) => _mm512_and_si512(_mm512_srli_epi16::<4>(packed), low),
                    (_, true) => _mm512_and_si512(_mm512_srli_epi16::<4>(packed), scaled),
                    (_, false) => _mm512_and_si512(_mm512_srli_epi16::<6>(packed), low),
                };
            }
            let kind = if N <= IN_PLACE { plane % 2 } else { 0 };
            for (x, sums) in x.iter().zip(&mut sums) {
                let x = load_i8_twice(&x[block][plane]);
                for (sum, codes) in sums[kind].iter_mut().zip(codes) {
                    *sum = _mm512_dpbusd_epi32(*sum, codes, x);
                }
            }
        }
    }
    let mut totals = [_mm_setzero_si128(); N];
    for (total, [plain, scaled]) in totals.iter_mut().zip(sums) {
        let mut all = plain;
        for (all, scaled) in all.iter_mut().zip(scaled) {
            *all = _mm512_add_epi32(*all, _mm512_srai_epi32::<2>(scaled));
        }
        *total = across(all);
    }
    totals
}

/// Block `block` of a tile, two rows in each register.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn pairs<'a, T: Tile<'a>>(tile: T, block: usize) -> Sums {
    if let Some([first, second]) = tile.lines(block) {
        return [load_codes(first), load_codes(second)];
    }
    let [a, b, c, d] = tile.block(block);
    [two(a, b), two(c, d)]
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn two(a: &[u8; ROW_BLOCK_BYTES], b: &[u8; ROW_BLOCK_BYTES]) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(load_u8(a)), load_u8(b))
}
