//! The screen of a head in AMX tiles: codes of six bits are put together as `avx512/screen.rs` does it, but
//! four columns of sixteen rows to a register, as ternary products have them (`avx512/band.rs`).

use std::arch::x86_64::*;
use std::array;

use super::tiles::{GROUPS, TOKENS, Tiles};
use crate::screen::{GROUP_ROWS, Kept, ROW_BYTES, ScreenInput, ScreenMatrix, TILE_ROWS, Threshold};
use crate::x86_64::avx2::prefetch;
use crate::x86_64::avx512::band::{Chunk, FOURS, GROUP_TILES, LANE_OF_ROW, LANES, Sums, transpose};
use crate::x86_64::avx512::{screen, store_codes};

/// Positions from which on tiles pay.
pub(super) const LEAST_POSITIONS: usize = 12;
/// Blocks of 128 columns that are put together before they are multiplied: 16 kB of codes, a part of the
/// first-level cache.
const STRIP_BLOCKS: usize = 4;
/// Chunks of a block.
const CHUNKS: usize = 2;
/// Tiles of 32 rows, whose sums the AMX tiles hold at once.
const BAND_TILES: usize = GROUPS * GROUP_TILES;

/// A block of a tile of either plane.
type Block = [[u8; ROW_BYTES]; TILE_ROWS];
/// The codes of a strip of 32 rows.
#[repr(align(64))]
struct Strip([[Chunk<GROUPS>; CHUNKS]; STRIP_BLOCKS]);

/// # Safety
///
/// The CPU has AMX, and the process may use it.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn screen(
    w: ScreenMatrix<'_>,
    group: usize,
    x: ScreenInput<'_>,
    thresholds: &[Threshold<'_>],
    kept: &mut [Kept],
) -> usize {
    let Some((codes, stride)) = x.evenly_spaced() else {
        return screen::screen(w, group, x, thresholds, kept);
    };
    let both = |tiles: usize, x: &[&[i8]], sums: &mut [[i32; GROUP_ROWS]]| {
        for (place, sums) in sums.chunks_mut(TOKENS).enumerate() {
            let codes = &codes[place * TOKENS * stride..];
            debug_assert_eq!(codes.as_ptr(), x[place * TOKENS].as_ptr(), "vectors in a row");
            // SAFETY: the caller has AMX.
            unsafe { both_planes(w, group, tiles, codes, stride, sums) }
        }
    };
    screen::judge_with(w, group, x, thresholds, kept, both)
}

/// Adds to `sums` the tiles of both planes by as many vectors, which begin at `x`, `stride` apart.
///
/// # Safety
///
/// The CPU has AMX, and the process may use it.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn both_planes(
    w: ScreenMatrix<'_>,
    group: usize,
    tiles: usize,
    x: &[i8],
    stride: usize,
    sums: &mut [[i32; GROUP_ROWS]],
) {
    let blocks = w.high_tile_bytes() / size_of::<[Block; 2]>();
    let mut strip = Strip([[[[[0; 64]; FOURS]; GROUPS]; CHUNKS]; STRIP_BLOCKS]);
    let mut of_band: [Sums<GROUPS>; TOKENS] = [[[0; LANES]; GROUPS]; TOKENS];
    let of_band = &mut of_band[..sums.len()];
    // SAFETY: the caller has AMX; these are the only tiles of the call.
    let mut products = unsafe { Tiles::new(sums.len()) };
    for band in (0..tiles).step_by(BAND_TILES) {
        products.clear();
        let planes: [Planes<'_>; GROUPS] = array::from_fn(|part| {
            // Tiles past the last of the group are taken for it: nobody looks at their sums.
            let tile = |i: usize| (band + part * GROUP_TILES + i).min(tiles - 1);
            Planes {
                high: array::from_fn(|i| {
                    &blocks_of(w.high(group, tile(i))).as_chunks().0[..blocks]
                }),
                low: array::from_fn(|i| &blocks_of(w.low(group, tile(i)))[..blocks]),
            }
        });
        for first in (0..blocks).step_by(STRIP_BLOCKS) {
            let count = STRIP_BLOCKS.min(blocks - first);
            for (block, chunks) in (first..).zip(&mut strip.0[..count]) {
                for (part, planes) in planes.iter().enumerate() {
                    put_together(planes, block, part, chunks);
                }
            }
            let chunks = strip.0[..count].as_flattened();
            products.multiply(chunks, &x[first * CHUNKS * 64..], stride);
        }
        products.store(of_band);
        for (sums, of_band) in sums.iter_mut().zip(&*of_band) {
            let rows = &mut sums[band * TILE_ROWS..];
            for (rows, lanes) in rows.chunks_mut(LANES).zip(of_band) {
                for (sum, lane) in rows.iter_mut().zip(LANE_OF_ROW) {
                    *sum += lanes[lane as usize];
                }
            }
        }
    }
}

/// The tiles of 16 rows, in blocks of 128 columns.
struct Planes<'a> {
    high: [&'a [[Block; 2]]; GROUP_TILES],
    low: [&'a [Block]; GROUP_TILES],
}

/// The codes of block `block` of 16 rows, in both of its chunks.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn put_together(
    planes: &Planes<'_>,
    block: usize,
    part: usize,
    chunks: &mut [Chunk<GROUPS>; CHUNKS],
) {
    const PREFETCH_BYTES: usize = 4096;
    let (upper, all) = (_mm512_set1_epi8(0b11_1100), _mm512_set1_epi8(0b11_1111));
    // Loops, not `map`: its closures would not be compiled for these instructions.
    let mut high_rows = [[[&[0; ROW_BYTES]; TILE_ROWS]; GROUP_TILES]; 2];
    let mut low_rows = [[&[0; ROW_BYTES]; TILE_ROWS]; GROUP_TILES];
    for tile in 0..GROUP_TILES {
        let (high, low) = (&planes.high[tile][block], &planes.low[tile][block]);
        for line in 0..4 {
            prefetch(high, PREFETCH_BYTES + 64 * line);
        }
        prefetch(low, PREFETCH_BYTES / 2);
        prefetch(low, PREFETCH_BYTES / 2 + 64);
        for row in 0..TILE_ROWS {
            high_rows[0][tile][row] = &high[0][row];
            high_rows[1][tile][row] = &high[1][row];
            low_rows[tile][row] = &low[row];
        }
    }
    for piece in 0..2 {
        let low = transpose(&low_rows, piece);
        for (half, chunk) in chunks.iter_mut().enumerate() {
            let high = transpose(&high_rows[half], piece);
            for i in 0..4 {
                let (high, low) = (high[i], low[i]);
                let (of_first, of_second) = match half {
                    0 => (low, _mm512_srli_epi16::<2>(low)),
                    _ => (_mm512_srli_epi16::<4>(low), _mm512_srli_epi16::<6>(low)),
                };
                // Bits of the high plane where `upper` has ones, else bits of the low one.
                let first = _mm512_slli_epi16::<2>(high);
                let first = _mm512_ternarylogic_epi32::<0xca>(upper, first, of_first);
                let second = _mm512_srli_epi16::<2>(high);
                let second = _mm512_ternarylogic_epi32::<0xca>(upper, second, of_second);
                let place = 4 * piece + i;
                store_codes(&mut chunk[part][place], _mm512_and_si512(first, all));
                store_codes(&mut chunk[part][FOURS / 2 + place], _mm512_and_si512(second, all));
            }
        }
    }
}

fn blocks_of(tile: &[u8]) -> &[Block] {
    tile.as_chunks::<ROW_BYTES>().0.as_chunks::<TILE_ROWS>().0
}
