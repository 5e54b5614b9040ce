//! The screen of a head in AMX tiles: codes of six bits are put together as `avx512/screen.rs` does it, but
//! four columns of sixteen rows to a register, as ternary products have them (`avx512/band.rs`).

use std::arch::x86_64::*;

use super::tiles::{GROUPS, TOKENS, Tiles};
use crate::screen::{GROUP_ROWS, ROW_BYTES, ScreenInput, ScreenMatrix, TILE_ROWS};
use crate::x86_64::avx2::prefetch;
use crate::x86_64::avx512::band::{Chunk, FOURS, GROUP_TILES, LANE_OF_ROW, LANES, Sums, transpose};
use crate::x86_64::avx512::{screen, store_codes};

/// Positions from which on tiles pay.
pub(super) const LEAST_POSITIONS: usize = 6;
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
    thresholds: &[f32],
    kept: &mut [u64],
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
    // SAFETY: the caller has AMX.
    let mut products = unsafe { Tiles::new(sums.len()) };
    for band in (0..tiles).step_by(BAND_TILES) {
        products.clear();
        for first in (0..blocks).step_by(STRIP_BLOCKS) {
            let count = STRIP_BLOCKS.min(blocks - first);
            for (block, chunks) in (first..).zip(&mut strip.0[..count]) {
                for part in 0..GROUPS {
                    put_together(w, group, band + part * GROUP_TILES, tiles, block, part, chunks);
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

/// The codes of block `block` of the tiles from `first` on, in both of its chunks. Tiles past the last of
/// the group, of which there are `tiles`, are taken for it: nobody looks at their sums.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn put_together(
    w: ScreenMatrix<'_>,
    group: usize,
    first: usize,
    tiles: usize,
    block: usize,
    part: usize,
    chunks: &mut [Chunk<GROUPS>; CHUNKS],
) {
    const PREFETCH_BYTES: usize = 4096;
    let (upper, all) = (_mm512_set1_epi8(0b11_1100), _mm512_set1_epi8(0b11_1111));
    let mut high = [[&[0; ROW_BYTES]; TILE_ROWS]; 2 * GROUP_TILES];
    let mut low = [[&[0; ROW_BYTES]; TILE_ROWS]; GROUP_TILES];
    for i in 0..GROUP_TILES {
        let tile = (first + i).min(tiles - 1);
        let blocks: &[Block] = blocks_of(w.high(group, tile));
        for half in 0..2 {
            let block = &blocks[2 * block + half];
            prefetch(block, PREFETCH_BYTES);
            prefetch(block, PREFETCH_BYTES + 64);
            high[half * GROUP_TILES + i] = block.each_ref();
        }
        let block = &blocks_of(w.low(group, tile))[block];
        prefetch(block, PREFETCH_BYTES / 2);
        prefetch(block, PREFETCH_BYTES / 2 + 64);
        low[i] = block.each_ref();
    }
    let (halves, _) = high.as_chunks::<GROUP_TILES>();
    for piece in 0..2 {
        let low = transpose(&low, piece);
        for (half, chunk) in chunks.iter_mut().enumerate() {
            let high = transpose(&halves[half], piece);
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
