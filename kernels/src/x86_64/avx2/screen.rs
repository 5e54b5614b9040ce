//! The screen of a head: unsigned codes by signed activations, 32 at a time, in exact integers.
//!
//! **Why nothing overflows.** `maddubs` adds two products into an i16, and activations are within
//! ±128. Codes of four bits: a pair is within 3,840, and eight pairs (four blocks) within 30,720.
//! Codes of two bits: a pair is within 768, and 32 pairs (eight blocks) within 24,576. Codes of six
//! bits: a pair is within 16,128, and two within 32,256. All stay below 32,768 and are then widened
//! to i32, which `screen.rs` bounds by the number of columns.

use std::arch::x86_64::*;

use super::head::one_row;
use super::{load_i8, load_u8, prefetch, store_i32x4, store_u8};
use crate::float_matrix::FloatMatrix;
use crate::screen::{ROW_BYTES, ScreenInput, ScreenMatrix, TILE_ROWS, judge};

/// How far ahead of its reading a plane is asked for.
const PREFETCH_BYTES: usize = 4096;
/// Rows of the head that are asked for ahead of the one that is computed.
const ROWS_AHEAD: usize = 3;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Blocks of the high plane gathered in i16.
const HIGH_STRIP: usize = 4;
/// Blocks of the low plane gathered in i16, or unpacked together.
const LOW_STRIP: usize = 8;
/// Vectors of 32 columns in a strip that is unpacked.
const STRIP_VECTORS: usize = 4 * LOW_STRIP;

/// One block of a tile: `[row][byte]`.
type Block = [[u8; ROW_BYTES]; TILE_ROWS];
/// A sum for each row of a tile.
type Sums = [__m256i; TILE_ROWS];
/// The codes of a strip, one to a byte, aligned so that no load of them crosses a cache line.
#[repr(align(64))]
struct Strip([Block; STRIP_VECTORS]);

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn screen(
    w: ScreenMatrix<'_>,
    group: usize,
    x: ScreenInput<'_>,
    thresholds: &[f32],
    kept: &mut [u64],
) -> usize {
    let high = |tile: &[u8], x: &[&[i8]], sums: &mut [[i32; TILE_ROWS]]| match *x {
        [one] => high_tile(tile, [one], sums),
        [one, two, ..] => high_tile(tile, [one, two], sums),
        [] => {}
    };
    let low = |tile: &[u8], x: &[&[i8]], sums: &mut [[i32; TILE_ROWS]]| match *x {
        [one] => low_tile(tile, [one], sums),
        [one, two, ..] => low_tile(tile, [one, two], sums),
        [] => {}
    };
    let both = |high: &[u8], low: &[u8], x: &[&[i8]], sums: &mut [[i32; TILE_ROWS]]| {
        both_planes(high, low, x, sums);
    };
    judge(w, group, x, thresholds, kept, high, low, both)
}

/// [`crate::screen::pack`] in this CPU's vectors.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn pack(rows: &[&[f32]], cols: usize, out: &mut [u8]) {
    crate::screen::pack(rows, cols, out);
}

/// The blocks of a tile.
fn blocks(tile: &[u8]) -> &[Block] {
    tile.as_chunks::<ROW_BYTES>().0.as_chunks::<TILE_ROWS>().0
}

/// A tile of the high plane by `V` vectors.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn high_tile<const V: usize>(tile: &[u8], x: [&[i8]; V], sums: &mut [[i32; TILE_ROWS]]) {
    let low_four = _mm256_set1_epi8(0x0f);
    let x = x.map(|x| x.as_chunks::<ROW_BYTES>().0.as_chunks::<2>().0);
    let mut totals = [[_mm256_setzero_si256(); TILE_ROWS]; V];
    for (strip, blocks) in blocks(tile).chunks(HIGH_STRIP).enumerate() {
        let x = x.map(|x| &x[strip * HIGH_STRIP..][..blocks.len()]);
        let mut strip_sums = [[_mm256_setzero_si256(); TILE_ROWS]; V];
        for (at, block) in blocks.iter().enumerate() {
            prefetch(block, PREFETCH_BYTES);
            prefetch(block, PREFETCH_BYTES + LINE);
            for (row, packed) in block.iter().enumerate() {
                let packed = load_u8(packed);
                let first = _mm256_and_si256(packed, low_four);
                let second = _mm256_and_si256(_mm256_srli_epi16::<4>(packed), low_four);
                for v in 0..V {
                    let [x_first, x_second] = &x[v][at];
                    let products = _mm256_add_epi16(
                        _mm256_maddubs_epi16(first, load_i8(x_first)),
                        _mm256_maddubs_epi16(second, load_i8(x_second)),
                    );
                    strip_sums[v][row] = _mm256_add_epi16(strip_sums[v][row], products);
                }
            }
        }
        for (totals, sums) in totals.iter_mut().zip(strip_sums) {
            widen(totals, sums);
        }
    }
    put(totals, sums);
}

/// A tile of the low plane by `V` vectors.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn low_tile<const V: usize>(tile: &[u8], x: [&[i8]; V], sums: &mut [[i32; TILE_ROWS]]) {
    let x = x.map(|x| x.as_chunks::<ROW_BYTES>().0.as_chunks::<4>().0);
    let mut totals = [[_mm256_setzero_si256(); TILE_ROWS]; V];
    for (strip, blocks) in blocks(tile).chunks(LOW_STRIP).enumerate() {
        let x = x.map(|x| &x[strip * LOW_STRIP..][..blocks.len()]);
        let mut strip_sums = [[_mm256_setzero_si256(); TILE_ROWS]; V];
        for (at, block) in blocks.iter().enumerate() {
            prefetch(block, PREFETCH_BYTES);
            prefetch(block, PREFETCH_BYTES + LINE);
            for (row, packed) in block.iter().enumerate() {
                for (part, codes) in low_codes(load_u8(packed)).into_iter().enumerate() {
                    for v in 0..V {
                        let products = _mm256_maddubs_epi16(codes, load_i8(&x[v][at][part]));
                        strip_sums[v][row] = _mm256_add_epi16(strip_sums[v][row], products);
                    }
                }
            }
        }
        for (totals, sums) in totals.iter_mut().zip(strip_sums) {
            widen(totals, sums);
        }
    }
    put(totals, sums);
}

/// The four codes in each byte of the low plane. Shifts are of 16 bits: the mask takes away what
/// crosses from the upper byte.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn low_codes(packed: __m256i) -> [__m256i; 4] {
    let low_two = _mm256_set1_epi8(0b11);
    [
        _mm256_and_si256(packed, low_two),
        _mm256_and_si256(_mm256_srli_epi16::<2>(packed), low_two),
        _mm256_and_si256(_mm256_srli_epi16::<4>(packed), low_two),
        _mm256_and_si256(_mm256_srli_epi16::<6>(packed), low_two),
    ]
}

/// A tile of both planes by any number of vectors: codes of six bits are put together once for all.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn both_planes(high: &[u8], low: &[u8], x: &[&[i8]], sums: &mut [[i32; TILE_ROWS]]) {
    let mut unpacked = Strip([[[0; ROW_BYTES]; TILE_ROWS]; STRIP_VECTORS]);
    let (high, low) = (blocks(high).as_chunks::<2>().0, blocks(low));
    sums[..x.len()].fill([0; TILE_ROWS]);
    for (strip, low) in low.chunks(LOW_STRIP).enumerate() {
        let high = &high[strip * LOW_STRIP..][..low.len()];
        let codes = &mut unpacked.0[..4 * low.len()];
        for ((codes, high), low) in codes.as_chunks_mut::<4>().0.iter_mut().zip(high).zip(low) {
            put_together(high, low, codes);
        }
        let vectors =
            |at: usize| &x[at].as_chunks::<ROW_BYTES>().0[strip * STRIP_VECTORS..][..codes.len()];
        let mut at = 0;
        while at < x.len() {
            at += match x.len() - at {
                1 => multiply(codes, [vectors(at)], &mut sums[at..]),
                _ => multiply(codes, [vectors(at), vectors(at + 1)], &mut sums[at..]),
            };
        }
    }
}

/// The six bits of 128 columns of a tile.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn put_together(high: &[Block; 2], low: &Block, codes: &mut [Block; 4]) {
    let upper = _mm256_set1_epi8(0x3c);
    for row in 0..TILE_ROWS {
        prefetch(&high[0][row], PREFETCH_BYTES);
        prefetch(&low[row], PREFETCH_BYTES / 2);
        let [one, two] = [load_u8(&high[0][row]), load_u8(&high[1][row])];
        let upper_bits = [
            _mm256_and_si256(_mm256_slli_epi16::<2>(one), upper),
            _mm256_and_si256(_mm256_srli_epi16::<2>(one), upper),
            _mm256_and_si256(_mm256_slli_epi16::<2>(two), upper),
            _mm256_and_si256(_mm256_srli_epi16::<2>(two), upper),
        ];
        let lower_bits = low_codes(load_u8(&low[row]));
        for ((codes, upper), lower) in codes.iter_mut().zip(upper_bits).zip(lower_bits) {
            store_u8(&mut codes[row], _mm256_or_si256(upper, lower));
        }
    }
}

/// Adds the products of a strip by `N` vectors; returns `N`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn multiply<const N: usize>(
    codes: &[Block],
    x: [&[[i8; ROW_BYTES]]; N],
    sums: &mut [[i32; TILE_ROWS]],
) -> usize {
    let ones = _mm256_set1_epi16(1);
    let mut totals = [[_mm256_setzero_si256(); TILE_ROWS]; N];
    let (codes, _) = codes.as_chunks::<2>();
    let x = x.map(|x| &x.as_chunks::<2>().0[..codes.len()]);
    for (at, [first, second]) in codes.iter().enumerate() {
        let x = x.map(|x| [load_i8(&x[at][0]), load_i8(&x[at][1])]);
        for row in 0..TILE_ROWS {
            let (first, second) = (load_u8(&first[row]), load_u8(&second[row]));
            for i in 0..N {
                let products = _mm256_add_epi16(
                    _mm256_maddubs_epi16(first, x[i][0]),
                    _mm256_maddubs_epi16(second, x[i][1]),
                );
                let wide = _mm256_madd_epi16(products, ones);
                totals[i][row] = _mm256_add_epi32(totals[i][row], wide);
            }
        }
    }
    for (sums, totals) in sums.iter_mut().zip(totals) {
        for (sum, more) in sums.iter_mut().zip(across(totals)) {
            *sum += more;
        }
    }
    N
}

/// Adds i16 sums to i32 totals.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn widen(totals: &mut Sums, sums: Sums) {
    for (total, sum) in totals.iter_mut().zip(sums) {
        *total = _mm256_add_epi32(*total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
    }
}

/// Writes the sums of a tile for each of `V` vectors.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn put<const V: usize>(totals: [Sums; V], sums: &mut [[i32; TILE_ROWS]]) {
    for (sums, totals) in sums.iter_mut().zip(totals) {
        *sums = across(totals);
    }
}

/// The sum of the eight lanes of each of four registers.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn across(totals: Sums) -> [i32; TILE_ROWS] {
    let [a, b, c, d] = totals;
    let pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    let (low, high) = (_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
    store_i32x4(_mm_add_epi32(low, high))
}

/// Rows that lie anywhere in memory: those to come are asked for whole.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn head_rows(w: FloatMatrix<'_>, rows: &[u32], x: &[f32], y: &mut [f32]) {
    let ask = |row: &u32| {
        for line in w.row(*row as usize).chunks(LINE / size_of::<u16>()) {
            prefetch(line.as_ptr(), 0);
        }
    };
    rows.iter().take(ROWS_AHEAD).for_each(ask);
    for (at, (y, row)) in y.iter_mut().zip(rows).enumerate() {
        rows.iter().skip(at + ROWS_AHEAD).take(1).for_each(ask);
        *y = one_row(w, *row as usize, x);
    }
}
