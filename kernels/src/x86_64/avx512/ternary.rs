//! Ternary products by `vpdpbusd`. A register holds two rows of weights, 32 columns of each; the
//! activations of these columns are in both halves of another.
//!
//! Up to [`FEW_ROWS`] rows of activations share what is unpacked in registers, and a tile is read
//! once, ahead of its use: memory is the limit. For more rows arithmetic is: strips of a tile are
//! unpacked once to one code a byte.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{load_codes, load_i8_twice, store_codes};
use crate::ternary_matrix::{TILE_ROWS, TernaryMatrix};
use crate::views::{Columns, Quantised};
use crate::x86_64::avx2::{load_u8, prefetch, store_i32x4};
use crate::x86_64::vnni::{
    Activations, GROUP_ROWS, PLANES, STRIP_BLOCKS, Tile, Totals, finish, groups, rows_of,
};

/// Rows of activations in a register tile: with two pairs of weights, 16 sums of the 32 registers.
pub(super) const FEW_ROWS: usize = 8;
/// Registers for one plane of a block of a tile, two rows in each.
const PAIRS: usize = TILE_ROWS / 2;

/// The codes of a block in registers, one to a byte.
type Codes = [[__m512i; PAIRS]; PLANES];
/// Running sums for the rows of a tile, those of a pair in the halves of a register.
type Sums = [__m512i; PAIRS];
/// The codes of a strip in memory, aligned so that no load crosses a cache line.
#[repr(align(64))]
struct Strip([[[u8; 64]; PLANES * PAIRS]; STRIP_BLOCKS]);

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn ternary(
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    mut y: Columns<'_>,
) {
    let n = x.rows();
    if n > FEW_ROWS {
        for rows in groups(n, GROUP_ROWS) {
            many_rows(w, tiles.clone(), x, rows, &mut y);
        }
        return;
    }
    for (position, tile) in tiles.enumerate() {
        let tile = Tile::new(w, tile);
        let codes = |block: usize| unpack(&tile, block);
        let mut sums = [[_mm512_setzero_si512(); PAIRS]; FEW_ROWS];
        let sums = &mut sums[..n];
        by_rows(0..tile.blocks(), &codes, x, 0, sums);
        for (i, sums) in sums.iter().enumerate() {
            finish(w, x, i, across(*sums), &mut y, position);
        }
    }
}

/// All tiles by the rows `rows` of activations, at most [`GROUP_ROWS`].
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn many_rows(
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    rows: Range<usize>,
    y: &mut Columns<'_>,
) {
    let mut strip = Strip([[[0; 64]; PLANES * PAIRS]; STRIP_BLOCKS]);
    for (position, tile) in tiles.enumerate() {
        let tile = Tile::new(w, tile);
        let mut sums = [[_mm512_setzero_si512(); PAIRS]; GROUP_ROWS];
        let sums = &mut sums[..rows.len()];
        for blocks in groups(tile.blocks(), STRIP_BLOCKS) {
            for (block, place) in blocks.clone().zip(&mut strip.0) {
                let codes = unpack(&tile, block);
                for (place, codes) in place.iter_mut().zip(codes.as_flattened()) {
                    store_codes(place, *codes);
                }
            }
            let unpacked = &strip.0[..blocks.len()];
            let codes = |block: usize| -> Codes {
                let (planes, _) = unpacked[block - blocks.start].as_chunks::<PAIRS>();
                [0, 1, 2, 3].map(|plane| planes[plane].each_ref().map(|codes| load_codes(codes)))
            };
            for some in groups(rows.len(), FEW_ROWS) {
                by_rows(blocks.clone(), &codes, x, rows.start + some.start, &mut sums[some]);
            }
        }
        for (i, sums) in rows.clone().zip(sums) {
            finish(w, x, i, across(*sums), y, position);
        }
    }
}

/// Adds the products of blocks `blocks` of a tile with as many rows of activations from `first` on
/// as there are sums, 1 to [`FEW_ROWS`]. The fewer the rows, the more sums has each, so that there
/// are enough to be added to while others wait for their result.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn by_rows(
    blocks: Range<usize>,
    codes: &impl Fn(usize) -> Codes,
    x: Quantised<'_>,
    first: usize,
    sums: &mut [Sums],
) {
    match sums.len() {
        1 => multiply::<1, 4>(blocks, codes, x, first, sums),
        2 => multiply::<2, 4>(blocks, codes, x, first, sums),
        3 => multiply::<3, 2>(blocks, codes, x, first, sums),
        4 => multiply::<4, 2>(blocks, codes, x, first, sums),
        5 => multiply::<5, 1>(blocks, codes, x, first, sums),
        6 => multiply::<6, 1>(blocks, codes, x, first, sums),
        7 => multiply::<7, 1>(blocks, codes, x, first, sums),
        _ => multiply::<FEW_ROWS, 1>(blocks, codes, x, first, sums),
    }
}

/// The register tile of four rows of weights by `N` of activations, with `C` sums for each product.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn multiply<const N: usize, const C: usize>(
    blocks: Range<usize>,
    codes: &impl Fn(usize) -> Codes,
    x: Quantised<'_>,
    first: usize,
    sums: &mut [Sums],
) {
    let x: [&[Activations]; N] = rows_of(x, first).map(|row| &row[blocks.clone()]);
    let mut chains = [[[_mm512_setzero_si512(); PAIRS]; C]; N];
    for (at, block) in blocks.enumerate() {
        for (plane, codes) in codes(block).into_iter().enumerate() {
            for (x, chains) in x.iter().zip(&mut chains) {
                let x = load_i8_twice(&x[at][plane]);
                for (sum, codes) in chains[plane % C].iter_mut().zip(codes) {
                    *sum = _mm512_dpbusd_epi32(*sum, codes, x);
                }
            }
        }
    }
    for (sums, chains) in sums.iter_mut().zip(chains) {
        for chain in chains {
            for (sum, part) in sums.iter_mut().zip(chain) {
                *sum = _mm512_add_epi32(*sum, part);
            }
        }
    }
}

/// Unpacks a block of a tile, and asks for what is read after it. Shifts are of 16 bits: the mask
/// takes away what crosses from the upper byte.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn unpack(tile: &Tile<'_>, block: usize) -> Codes {
    prefetch(tile.ahead(block), 0);
    prefetch(tile.ahead(block), 64);
    let pair = |row: usize| {
        let first = _mm512_castsi256_si512(load_u8(tile.block(row, block)));
        _mm512_inserti64x4::<1>(first, load_u8(tile.block(row + 1, block)))
    };
    let packed = [pair(0), pair(2)];
    let low_two = _mm512_set1_epi8(0b11);
    [
        packed.map(|packed| _mm512_and_si512(packed, low_two)),
        packed.map(|packed| _mm512_and_si512(_mm512_srli_epi16::<2>(packed), low_two)),
        packed.map(|packed| _mm512_and_si512(_mm512_srli_epi16::<4>(packed), low_two)),
        packed.map(|packed| _mm512_and_si512(_mm512_srli_epi16::<6>(packed), low_two)),
    ]
}

/// The sum of the lanes of each half, one half for each row of the tile.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn across(sums: Sums) -> Totals {
    let [[a, b], [c, d]] =
        sums.map(|pair| [_mm512_castsi512_si256(pair), _mm512_extracti64x4_epi64::<1>(pair)]);
    let halves = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    let upper = _mm256_extracti128_si256::<1>(halves);
    store_i32x4(_mm_add_epi32(_mm256_castsi256_si128(halves), upper))
}
