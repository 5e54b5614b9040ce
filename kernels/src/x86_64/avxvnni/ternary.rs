//! Ternary products by `vpdpbusd` in registers of 32 columns.
//!
//! Up to [`FEW_ROWS`] rows of activations share what is unpacked in registers, and what is more than
//! that goes over the tile again while it is in the first-level cache: memory is the limit. From
//! [`MANY_ROWS`] on arithmetic is: strips of a tile are unpacked once to one code a byte.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::ternary_matrix::{ROW_BLOCK_BYTES, TILE_ROWS, TernaryMatrix};
use crate::views::{Columns, Quantised};
use crate::x86_64::avx2::{load_i8, load_u8, prefetch, store_i32x4, store_u8};
use crate::x86_64::vnni::{
    Activations, GROUP_ROWS, PLANES, STRIP_BLOCKS, Tile, Totals, finish, groups, rows_of,
};

/// Rows of activations that share what is unpacked in registers: with two rows of weights, eight
/// sums of the sixteen registers.
const FEW_ROWS: usize = 4;
/// From so many rows of activations on, unpacking to memory pays.
const MANY_ROWS: usize = 9;
/// Rows of activations in the register tile of many rows: with four rows of weights, twelve sums.
const TILE_ACTIVATIONS: usize = 3;

/// The codes of a block, one to a byte: `[plane][row][column]`.
type Codes = [[[u8; ROW_BLOCK_BYTES]; TILE_ROWS]; PLANES];
/// A running sum for each row of a tile.
type Sums = [__m256i; TILE_ROWS];
/// The codes of a strip, aligned so that no load crosses a cache line.
#[repr(align(64))]
struct Strip([Codes; STRIP_BLOCKS]);

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(super) fn ternary(
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    mut y: Columns<'_>,
) {
    let n = x.rows();
    if n >= MANY_ROWS {
        for rows in groups(n, GROUP_ROWS) {
            many_rows(w, tiles.clone(), x, rows, &mut y);
        }
        return;
    }
    for (position, tile) in tiles.enumerate() {
        let tile = Tile::new(w, tile);
        for some in groups(n, FEW_ROWS) {
            let mut sums = [[_mm256_setzero_si256(); TILE_ROWS]; FEW_ROWS];
            let sums = &mut sums[..some.len()];
            match some.len() {
                1 => sums[0] = one_row(&tile, rows_of::<1>(x, some.start)[0]),
                2 => few_rows::<2>(&tile, x, some.start, sums),
                3 => few_rows::<3>(&tile, x, some.start, sums),
                _ => few_rows::<FEW_ROWS>(&tile, x, some.start, sums),
            }
            for (i, sums) in some.zip(sums) {
                finish(w, x, i, across(*sums), &mut y, position);
            }
        }
    }
}

/// One tile by one row of activations. Planes 1 and 3 are used where they lie, as four times their
/// codes, and have sums of their own, within 3 * 4 * 128 * 2^22 / 16 (columns that meet in a lane):
/// that saves two of three shifts, and there are enough sums to be added to while others wait.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
#[inline]
fn one_row(tile: &Tile<'_>, x: &[Activations]) -> Sums {
    let (low, scaled) = (_mm256_set1_epi8(0b11), _mm256_set1_epi8(0b1100));
    let mut sums = [_mm256_setzero_si256(); TILE_ROWS];
    let mut scaled_sums = [_mm256_setzero_si256(); TILE_ROWS];
    for (block, x) in x[..tile.blocks()].iter().enumerate() {
        prefetch(tile.ahead(block), 0);
        prefetch(tile.ahead(block), 64);
        let x = x.each_ref().map(|x| load_i8(x));
        for row in 0..TILE_ROWS {
            let packed = load_u8(tile.block(row, block));
            let shifted = _mm256_srli_epi16::<4>(packed);
            let add =
                |sum, bits, mask, x| _mm256_dpbusd_avx_epi32(sum, _mm256_and_si256(bits, mask), x);
            sums[row] = add(add(sums[row], packed, low, x[0]), shifted, low, x[2]);
            scaled_sums[row] =
                add(add(scaled_sums[row], packed, scaled, x[1]), shifted, scaled, x[3]);
        }
    }
    // Every lane of the scaled sums is a multiple of four.
    for (sum, scaled) in sums.iter_mut().zip(scaled_sums) {
        *sum = _mm256_add_epi32(*sum, _mm256_srai_epi32::<2>(scaled));
    }
    sums
}

/// One tile by `N` rows of activations from `first` on, two rows of weights at a time.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
#[inline]
fn few_rows<const N: usize>(tile: &Tile<'_>, x: Quantised<'_>, first: usize, sums: &mut [Sums]) {
    let low_two = _mm256_set1_epi8(0b11);
    let x: [&[Activations]; N] = rows_of(x, first).map(|row| &row[..tile.blocks()]);
    for row in [0, 2] {
        let mut parts = [[_mm256_setzero_si256(); 2]; N];
        for block in 0..tile.blocks() {
            prefetch(tile.ahead(block), if row == 0 { 0 } else { 64 });
            let mut packed = [row, row + 1].map(|row| load_u8(tile.block(row, block)));
            for plane in 0..PLANES {
                // Shifts are of 16 bits: the mask takes away what crosses from the upper byte.
                let codes = packed.map(|packed| _mm256_and_si256(packed, low_two));
                packed = packed.map(|packed| _mm256_srli_epi16::<2>(packed));
                for (x, parts) in x.iter().zip(&mut parts) {
                    let x = load_i8(&x[block][plane]);
                    for (sum, codes) in parts.iter_mut().zip(codes) {
                        *sum = _mm256_dpbusd_avx_epi32(*sum, codes, x);
                    }
                }
            }
        }
        for (sums, parts) in sums.iter_mut().zip(parts) {
            sums[row..row + 2].copy_from_slice(&parts);
        }
    }
}

/// All tiles by the rows `rows` of activations, at most [`GROUP_ROWS`].
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn many_rows(
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    rows: Range<usize>,
    y: &mut Columns<'_>,
) {
    let mut strip = Strip([[[[0; ROW_BLOCK_BYTES]; TILE_ROWS]; PLANES]; STRIP_BLOCKS]);
    for (position, tile) in tiles.enumerate() {
        let tile = Tile::new(w, tile);
        let mut sums = [[_mm256_setzero_si256(); TILE_ROWS]; GROUP_ROWS];
        let sums = &mut sums[..rows.len()];
        for blocks in groups(tile.blocks(), STRIP_BLOCKS) {
            let codes = &mut strip.0[..blocks.len()];
            unpack_strip(&tile, blocks.start, codes);
            for some in groups(rows.len(), TILE_ACTIVATIONS) {
                let first = rows.start + some.start;
                let sums = &mut sums[some];
                match sums.len() {
                    1 => multiply::<1>(blocks.clone(), codes, x, first, sums),
                    2 => multiply::<2>(blocks.clone(), codes, x, first, sums),
                    _ => multiply::<TILE_ACTIVATIONS>(blocks.clone(), codes, x, first, sums),
                }
            }
        }
        for (i, sums) in rows.clone().zip(sums) {
            finish(w, x, i, across(*sums), y, position);
        }
    }
}

/// Unpacks as many blocks of a tile from `first` on as `codes` has room for, and asks for what is
/// read after them.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
#[inline]
fn unpack_strip(tile: &Tile<'_>, first: usize, codes: &mut [Codes]) {
    let low_two = _mm256_set1_epi8(0b11);
    for (at, codes) in codes.iter_mut().enumerate() {
        prefetch(tile.ahead(first + at), 0);
        prefetch(tile.ahead(first + at), 64);
        for row in 0..TILE_ROWS {
            let mut packed = load_u8(tile.block(row, first + at));
            for plane in codes.iter_mut() {
                store_u8(&mut plane[row], _mm256_and_si256(packed, low_two));
                packed = _mm256_srli_epi16::<2>(packed);
            }
        }
    }
}

/// Multiplies the codes of `blocks` by `N` rows of activations from `first` on: a register tile of
/// four by `N`.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
#[inline]
fn multiply<const N: usize>(
    blocks: Range<usize>,
    codes: &[Codes],
    x: Quantised<'_>,
    first: usize,
    sums: &mut [Sums],
) {
    let x: [&[Activations]; N] = rows_of(x, first).map(|row| &row[blocks.clone()][..codes.len()]);
    let mut parts = [[_mm256_setzero_si256(); TILE_ROWS]; N];
    for (block, codes) in codes.iter().enumerate() {
        for (plane, codes) in codes.iter().enumerate() {
            let x = x.map(|x| load_i8(&x[block][plane]));
            for (row, codes) in codes.iter().enumerate() {
                let codes = load_u8(codes);
                for (x, parts) in x.iter().zip(&mut parts) {
                    parts[row] = _mm256_dpbusd_avx_epi32(parts[row], codes, *x);
                }
            }
        }
    }
    for (sums, parts) in sums.iter_mut().zip(parts) {
        for (sum, part) in sums.iter_mut().zip(parts) {
            *sum = _mm256_add_epi32(*sum, part);
        }
    }
}

/// The sum of the lanes of each.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
#[inline]
fn across([a, b, c, d]: Sums) -> Totals {
    let halves = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    let upper = _mm256_extracti128_si256::<1>(halves);
    store_i32x4(_mm_add_epi32(_mm256_castsi256_si128(halves), upper))
}
