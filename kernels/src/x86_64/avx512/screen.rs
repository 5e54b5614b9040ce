//! The screen of a head by `vpdpbusd`: codes of four or six bits by signed activations, two rows to a
//! register, 32 columns of each, added up in i32 at once. Nothing overflows: `screen.rs` bounds the number
//! of columns.

use std::arch::x86_64::*;

use super::{across, load_codes, load_i8_twice};
use crate::screen::{
    GROUP_ROWS, Kept, ROW_BYTES, ScreenInput, ScreenMatrix, TILE_ROWS, Threshold, judge,
};
use crate::x86_64::avx2::{prefetch, store_i32x4};

/// How far ahead of its reading a plane is asked for.
const PREFETCH_BYTES: usize = 4096;
/// Vectors that a tile is multiplied by at once: two registers of sums for each, half of all there are.
const TOGETHER: usize = 8;
/// Registers for 32 columns of a tile, two rows in each.
const PAIRS: usize = TILE_ROWS / 2;

/// One block of a tile: two rows in each of two cache lines.
type Block = [[u8; 64]; PAIRS];
/// Activations of 32 columns.
type Columns = [i8; ROW_BYTES];

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::x86_64) fn screen(
    w: ScreenMatrix<'_>,
    group: usize,
    x: ScreenInput<'_>,
    thresholds: &[Threshold<'_>],
    kept: &mut [Kept],
) -> usize {
    let both = |tiles: usize, x: &[&[i8]], sums: &mut [[i32; GROUP_ROWS]]| {
        for (x, sums) in x.chunks(TOGETHER).zip(sums.chunks_mut(TOGETHER)) {
            match x.len() {
                1 => both_planes::<1>(w, group, tiles, x, sums),
                2 => both_planes::<2>(w, group, tiles, x, sums),
                3 => both_planes::<3>(w, group, tiles, x, sums),
                4 => both_planes::<4>(w, group, tiles, x, sums),
                5 => both_planes::<5>(w, group, tiles, x, sums),
                6 => both_planes::<6>(w, group, tiles, x, sums),
                7 => both_planes::<7>(w, group, tiles, x, sums),
                _ => both_planes::<TOGETHER>(w, group, tiles, x, sums),
            }
        }
    };
    judge_with(w, group, x, thresholds, kept, both)
}

/// [`judge`] with the planes by themselves multiplied here, and `both` for both.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
pub(in crate::x86_64) fn judge_with(
    w: ScreenMatrix<'_>,
    group: usize,
    x: ScreenInput<'_>,
    thresholds: &[Threshold<'_>],
    kept: &mut [Kept],
    both: impl Fn(usize, &[&[i8]], &mut [[i32; GROUP_ROWS]]),
) -> usize {
    let high = |tile: &[u8], x: &[&[i8]], sums: &mut [[i32; TILE_ROWS]]| match *x {
        [one] => one_plane::<1, 2>(tile, [one], sums),
        [one, two, ..] => one_plane::<2, 2>(tile, [one, two], sums),
        [] => {}
    };
    let low = |tile: &[u8], x: &[&[i8]], sums: &mut [[i32; TILE_ROWS]]| match *x {
        [one] => one_plane::<1, 4>(tile, [one], sums),
        [one, two, ..] => one_plane::<2, 4>(tile, [one, two], sums),
        [] => {}
    };
    judge(w, group, x, thresholds, kept, high, low, both)
}

/// The blocks of a tile of either plane.
fn blocks(tile: &[u8]) -> &[Block] {
    tile.as_chunks::<64>().0.as_chunks::<PAIRS>().0
}

/// A tile of one plane, with `PARTS` codes to a byte, by `V` vectors.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn one_plane<const V: usize, const PARTS: usize>(
    tile: &[u8],
    x: [&[i8]; V],
    sums: &mut [[i32; TILE_ROWS]],
) {
    let blocks = blocks(tile);
    let mask = _mm512_set1_epi8(if PARTS == 2 { 0b1111 } else { 0b11 });
    let x = x.map(|x| &x.as_chunks::<ROW_BYTES>().0.as_chunks::<PARTS>().0[..blocks.len()]);
    let mut totals = [[[_mm512_setzero_si512(); PAIRS]; 2]; V];
    for (at, block) in blocks.iter().enumerate() {
        prefetch(block, PREFETCH_BYTES);
        prefetch(block, PREFETCH_BYTES + 64);
        let packed = [load_codes(&block[0]), load_codes(&block[1])];
        for part in 0..PARTS {
            let mut codes = packed;
            for codes in &mut codes {
                *codes = match (PARTS, part) {
                    (_, 0) => *codes,
                    (2, _) => _mm512_srli_epi16::<4>(*codes),
                    (_, 1) => _mm512_srli_epi16::<2>(*codes),
                    (_, 2) => _mm512_srli_epi16::<4>(*codes),
                    _ => _mm512_srli_epi16::<6>(*codes),
                };
                *codes = _mm512_and_si512(*codes, mask);
            }
            for v in 0..V {
                let x = load_i8_twice(&x[v][at][part]);
                let totals = &mut totals[v][part % 2];
                totals[0] = _mm512_dpbusd_epi32(totals[0], codes[0], x);
                totals[1] = _mm512_dpbusd_epi32(totals[1], codes[1], x);
            }
        }
    }
    for (sums, [a, b]) in sums.iter_mut().zip(totals) {
        *sums = store_i32x4(across([_mm512_add_epi32(a[0], b[0]), _mm512_add_epi32(a[1], b[1])]));
    }
}

/// Adds to `sums` the tiles of both planes by `V` vectors; codes of six bits are put together in
/// registers.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn both_planes<const V: usize>(
    w: ScreenMatrix<'_>,
    group: usize,
    tiles: usize,
    x: &[&[i8]],
    sums: &mut [[i32; GROUP_ROWS]],
) {
    let count = w.high_tile_bytes() / size_of::<[Block; 2]>();
    let mut vectors: [&[[Columns; 4]]; V] = [&[]; V];
    for (vector, x) in vectors.iter_mut().zip(x) {
        *vector = &x.as_chunks::<ROW_BYTES>().0.as_chunks::<4>().0[..count];
    }
    // Upper bits in bits 2 to 5 of a byte, lower ones in bits 0 and 1.
    let (upper, all) = (_mm512_set1_epi8(0b11_1100), _mm512_set1_epi8(0b11_1111));
    for tile in 0..tiles {
        let high = blocks(w.high(group, tile)).as_chunks::<2>().0;
        let low = blocks(w.low(group, tile));
        let mut totals = [[_mm512_setzero_si512(); PAIRS]; V];
        for (at, (high, low)) in high.iter().zip(low).enumerate() {
            for line in 0..4 {
                prefetch(high, PREFETCH_BYTES + 64 * line);
            }
            for line in 0..2 {
                prefetch(low, PREFETCH_BYTES / 2 + 64 * line);
            }
            for part in 0..4 {
                let mut codes = [_mm512_setzero_si512(); PAIRS];
                for (pair, codes) in codes.iter_mut().enumerate() {
                    let (high, low) = (load_codes(&high[part / 2][pair]), load_codes(&low[pair]));
                    let (high, low) = match part {
                        0 => (_mm512_slli_epi16::<2>(high), low),
                        1 => (_mm512_srli_epi16::<2>(high), _mm512_srli_epi16::<2>(low)),
                        2 => (_mm512_slli_epi16::<2>(high), _mm512_srli_epi16::<4>(low)),
                        _ => (_mm512_srli_epi16::<2>(high), _mm512_srli_epi16::<6>(low)),
                    };
                    // Bits of `high` where `upper` has ones, else bits of `low`.
                    let both = _mm512_ternarylogic_epi32::<0xca>(upper, high, low);
                    *codes = _mm512_and_si512(both, all);
                }
                for v in 0..V {
                    let x = load_i8_twice(&vectors[v][at][part]);
                    totals[v][0] = _mm512_dpbusd_epi32(totals[v][0], codes[0], x);
                    totals[v][1] = _mm512_dpbusd_epi32(totals[v][1], codes[1], x);
                }
            }
        }
        for (sums, totals) in sums.iter_mut().zip(totals) {
            let sums = &mut sums.as_chunks_mut::<TILE_ROWS>().0[tile];
            let more = store_i32x4(across(totals));
            sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        }
    }
}
