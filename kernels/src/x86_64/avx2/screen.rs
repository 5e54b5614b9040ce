//! The screen of a head: unsigned codes by signed activations, 32 at a time, in exact integers.
//!
//! **Why nothing overflows.** `maddubs` adds two products into an i16, and activations are within
//! ±128. Codes of four bits: a pair is within 3,840, and eight pairs (four blocks) within 30,720.
//! Codes of two bits: a pair is within 768, and 32 pairs (eight blocks) within 24,576. Codes of six
//! bits: a pair is within 16,128, and two within 32,256. All stay below 32,768 and are then widened
//! to i32, which `screen.rs` bounds by the number of columns.

use std::arch::x86_64::*;

use super::head::one_row;
use super::ternary::in_order;
use super::{load_i8, load_u8, prefetch, store_i32x4};
use crate::float_matrix::FloatMatrix;
use crate::screen::{
    GROUP_ROWS, Kept, ROW_BYTES, ScreenInput, ScreenMatrix, TILE_ROWS, Threshold, judge,
};

/// How far ahead of its reading a plane is asked for.
const PREFETCH_BYTES: usize = 4096;
/// Rows of the head that are asked for ahead of the one that is computed.
const ROWS_AHEAD: usize = 3;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Blocks of the high plane gathered in i16.
const HIGH_STRIP: usize = 4;
/// Blocks of the low plane gathered in i16.
const LOW_STRIP: usize = 8;
/// Vectors that a tile of six bits is multiplied by at once: as many sums in registers.
const TOGETHER: usize = 8;
/// Blocks of 128 columns in a strip of up to four vectors: memory likes tiles of 2560 columns whole.
const WHOLE_BLOCKS: usize = 20;
/// In a strip of more, so that activations and weights fit the first-level cache together.
const STRIP_BLOCKS: usize = 10;

/// Activations of a block of 128 columns.
type Columns = [[i8; ROW_BYTES]; 4];
/// Activations of a strip, `[block][vector]`: up to 10 kB, and no load of them crosses a cache line.
#[repr(align(64))]
struct Strip<const V: usize, const BLOCKS: usize>([[Columns; V]; BLOCKS]);

/// One block of a tile: `[row][byte]`.
type Block = [[u8; ROW_BYTES]; TILE_ROWS];
/// A sum for each row of a tile.
type Sums = [__m256i; TILE_ROWS];

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn screen(
    w: ScreenMatrix<'_>,
    group: usize,
    x: ScreenInput<'_>,
    thresholds: &[Threshold<'_>],
    kept: &mut [Kept],
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
    let both = |tiles: usize, x: &[&[i8]], sums: &mut [[i32; GROUP_ROWS]]| {
        for (x, sums) in x.chunks(TOGETHER).zip(sums.chunks_mut(TOGETHER)) {
            match x.len() {
                1 => both_planes::<1, WHOLE_BLOCKS>(w, group, tiles, x, sums),
                2 => both_planes::<2, WHOLE_BLOCKS>(w, group, tiles, x, sums),
                3 => both_planes::<3, WHOLE_BLOCKS>(w, group, tiles, x, sums),
                4 => both_planes::<4, WHOLE_BLOCKS>(w, group, tiles, x, sums),
                5 => both_planes::<5, STRIP_BLOCKS>(w, group, tiles, x, sums),
                6 => both_planes::<6, STRIP_BLOCKS>(w, group, tiles, x, sums),
                7 => both_planes::<7, STRIP_BLOCKS>(w, group, tiles, x, sums),
                _ => both_planes::<TOGETHER, STRIP_BLOCKS>(w, group, tiles, x, sums),
            }
        }
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
    let lower = Masks::new().lower;
    let x = x.map(|x| x.as_chunks::<ROW_BYTES>().0.as_chunks::<4>().0);
    let mut totals = [[_mm256_setzero_si256(); TILE_ROWS]; V];
    for (strip, blocks) in blocks(tile).chunks(LOW_STRIP).enumerate() {
        let x = x.map(|x| &x[strip * LOW_STRIP..][..blocks.len()]);
        let mut strip_sums = [[_mm256_setzero_si256(); TILE_ROWS]; V];
        for (at, block) in blocks.iter().enumerate() {
            prefetch(block, PREFETCH_BYTES);
            prefetch(block, PREFETCH_BYTES + LINE);
            for (row, packed) in block.iter().enumerate() {
                for (part, codes) in low_codes(load_u8(packed), lower).into_iter().enumerate() {
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

/// Where in a byte the two lower bits of a code are, and the four upper ones. The compiler does not know
/// these values: it would make others of them and load each anew in every round.
#[derive(Clone, Copy)]
struct Masks {
    lower: __m256i,
    upper: __m256i,
}

impl Masks {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn new() -> Self {
        let (lower, upper) = (_mm256_set1_epi8(0b11), _mm256_set1_epi8(0b11_1100));
        Self { lower: in_order(lower), upper: in_order(upper) }
    }
}

/// The four codes in each byte of the low plane. Shifts are of 16 bits: the mask takes away what
/// crosses from the upper byte.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn low_codes(packed: __m256i, lower: __m256i) -> [__m256i; 4] {
    [
        _mm256_and_si256(packed, lower),
        _mm256_and_si256(_mm256_srli_epi16::<2>(packed), lower),
        _mm256_and_si256(_mm256_srli_epi16::<4>(packed), lower),
        _mm256_and_si256(_mm256_srli_epi16::<6>(packed), lower),
    ]
}

/// Adds to `sums` the tiles of both planes by `V` vectors, which are copied side by side into the
/// first-level cache and are operands of the products; codes of six bits are put together in registers.
#[target_feature(enable = "avx2,fma,f16c")]
fn both_planes<const V: usize, const BLOCKS: usize>(
    w: ScreenMatrix<'_>,
    group: usize,
    tiles: usize,
    x: &[&[i8]],
    sums: &mut [[i32; GROUP_ROWS]],
) {
    let mut strip = Strip([[[[0; ROW_BYTES]; 4]; V]; BLOCKS]);
    let all_blocks = w.high_tile_bytes() / size_of::<[Block; 2]>();
    for first in (0..all_blocks).step_by(BLOCKS) {
        let count = BLOCKS.min(all_blocks - first);
        for (v, x) in x.iter().enumerate() {
            let x: &[Columns] = x.as_chunks().0.as_chunks().0;
            for (place, x) in strip.0.iter_mut().zip(&x[first..first + count]) {
                place[v] = *x;
            }
        }
        for tile in 0..tiles {
            let high = &blocks(w.high(group, tile)).as_chunks().0[first..][..count];
            let low = &blocks(w.low(group, tile))[first..][..count];
            // What comes next: of the next tile, the next strip, or the next group if there is any.
            let next = if tile + 1 < tiles {
                (group, tile + 1, first)
            } else if first + count < all_blocks {
                (group, 0, first + count)
            } else {
                (w.rows().div_ceil(GROUP_ROWS).min(group + 2) - 1, 0, 0)
            };
            let (high_ahead, low_ahead) = (w.high(next.0, next.1), w.low(next.0, next.1));
            let high_ahead = &high_ahead[next.2 * size_of::<[Block; 2]>()..];
            let low_ahead = &low_ahead[next.2 * size_of::<Block>()..];
            let ahead = [high_ahead.as_ptr(), low_ahead.as_ptr()];
            // Few vectors wait for memory, which likes to be read in order; many need registers.
            let totals = match V {
                1 | 2 => tile_by::<V, 4>(high, low, ahead, &strip.0[..count]),
                3 => tile_by::<V, 2>(high, low, ahead, &strip.0[..count]),
                _ => tile_by::<V, 1>(high, low, ahead, &strip.0[..count]),
            };
            for (sums, totals) in sums.iter_mut().zip(totals) {
                let sums = &mut sums.as_chunks_mut::<TILE_ROWS>().0[tile];
                sums.iter_mut().zip(across(totals)).for_each(|(sum, more)| *sum += more);
            }
        }
    }
}

/// The sums of a strip of a tile by `V` vectors, for `R` rows at a time. Asks for the bytes at `ahead`,
/// of the high plane and of the low one.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn tile_by<const V: usize, const R: usize>(
    high: &[[Block; 2]],
    low: &[Block],
    ahead: [*const u8; 2],
    x: &[[Columns; V]],
) -> [Sums; V] {
    let masks = Masks::new();
    let ones = in_order(_mm256_set1_epi16(1));
    let mut sums = [[_mm256_setzero_si256(); TILE_ROWS]; V];
    for first in (0..TILE_ROWS).step_by(R) {
        let mut totals = [[_mm256_setzero_si256(); R]; V];
        for (at, ((high, low), x)) in high.iter().zip(low).zip(x).enumerate() {
            for row in 0..R {
                let packed = |block: &Block| load_u8(&block[first + row]);
                // A row's part of what comes next: two blocks of two lines, and one of two.
                prefetch(ahead[0], (4 * at + first + row) * LINE);
                if first + row < 2 {
                    prefetch(ahead[1], (2 * at + first + row) * LINE);
                }
                let lower = low_codes(packed(low), masks.lower);
                for (pair, high) in high.iter().enumerate() {
                    let upper = high_codes(packed(high), masks.upper);
                    let one = _mm256_or_si256(upper[0], lower[2 * pair]);
                    let two = _mm256_or_si256(upper[1], lower[2 * pair + 1]);
                    for (totals, x) in totals.iter_mut().zip(x) {
                        let products = _mm256_add_epi16(
                            _mm256_maddubs_epi16(one, load_i8(&x[2 * pair])),
                            _mm256_maddubs_epi16(two, load_i8(&x[2 * pair + 1])),
                        );
                        let wide = _mm256_madd_epi16(products, ones);
                        totals[row] = in_order(_mm256_add_epi32(totals[row], wide));
                    }
                }
            }
        }
        for (sums, totals) in sums.iter_mut().zip(totals) {
            sums[first..first + R].copy_from_slice(&totals);
        }
    }
    sums
}

/// The upper bits of the two codes in each byte of the high plane, in their place.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn high_codes(packed: __m256i, upper: __m256i) -> [__m256i; 2] {
    [
        _mm256_and_si256(_mm256_slli_epi16::<2>(packed), upper),
        _mm256_and_si256(_mm256_srli_epi16::<2>(packed), upper),
    ]
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
