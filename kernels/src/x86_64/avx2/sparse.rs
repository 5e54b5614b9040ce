//! Ternary products of one row of activations that read only the weights they need, and the lists
//! that say which those are. Codes are unsigned (trit + 1); the sum of the activations is subtracted
//! at the end.
//!
//! **Columns.** A register holds 128 rows of one column. The bytes of two columns are interleaved,
//! so that `maddubs` by their two activations gives an i16 per row: the unpacking is that of a dense
//! product plus two instructions for two columns. Whole columns, [`TOGETHER`] at a time, are added to
//! i16 sums of all rows, which stay in the first-level cache.
//!
//! **Rows.** Four wanted rows share each load of activations, wherever they are.
//!
//! **Memory.** What is skipped lies between what is read, so the hardware cannot guess what comes
//! next: every line is asked for, some work ahead. Of columns no faster than they are used: the CPU
//! forgets what it is asked for when too much is under way.
//!
//! **Why nothing overflows.** A pair of products is within ±512 (±768 for the invalid code 3), and
//! an i16 gathers at most 32 pairs before it is widened: within ±24,576.

use std::arch::x86_64::*;

use super::{
    WIDTH, load, load_i8, load_i32x8, load_u8, prefetch, store_i32x4, store_i32x8, store_u32x8,
};
use crate::scalar;
use crate::ternary_columns::{BLOCK_BYTES, BLOCK_ROWS, CHUNK_BLOCKS, TernaryColumns};
use crate::ternary_matrix::{BLOCK_COLS, ROW_BLOCK_BYTES, TernaryMatrix};
use crate::views::Quantised;

/// Columns that are added to the i16 sums at once, in pairs: so that those are loaded and stored
/// rarely.
const TOGETHER: usize = 8;
const PAIRS: usize = TOGETHER / 2;
/// Columns gathered in i16 before they are widened: 32 pairs.
const BATCH: usize = 64;
/// How many columns ahead their lines are asked for: 10 kB of 2560 rows.
const AHEAD_COLUMNS: usize = 16;
/// Blocks of a column whose i16 sums are kept at a time: 2560 rows, 5 kB.
const PASS_BLOCKS: usize = 10 * CHUNK_BLOCKS;
/// Bit planes of a block.
const PLANES: usize = 4;
/// Rows of weights that share a load of activations.
const GROUP_ROWS: usize = 4;
/// How many wanted rows ahead the bytes of rows are asked for: two groups, some 250 ns of work.
const AHEAD_ROWS: usize = 2 * GROUP_ROWS;
/// Blocks of a row gathered in i16 before they are widened: 8 * 4 pairs.
const STRIP_BLOCKS: usize = 8;

/// The blocks of a column.
type Column<'a> = &'a [[u8; BLOCK_BYTES]];
/// The i16 sums of the 128 rows of a block: of each plane the lower and the upper halves of its 32
/// rows, interleaved by eights, see [`widen`].
type Gathered = [[__m256i; PLANES]; 2];

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn ternary_columns(
    w: TernaryColumns<'_>,
    columns: &[u32],
    x: Quantised<'_>,
    sums: &mut [i32],
) {
    let (blocks, blocks_per_column) = w.blocks();
    let sums = sums.as_chunks_mut::<BLOCK_ROWS>().0;
    for (sums, first) in sums.chunks_mut(PASS_BLOCKS).zip((0..).step_by(PASS_BLOCKS)) {
        let start = |place: usize| columns[place] as usize * blocks_per_column + first;
        let last = columns.len().saturating_sub(1);
        let mut gathered = [[[_mm256_setzero_si256(); PLANES]; 2]; PASS_BLOCKS];
        let gathered = &mut gathered[..sums.len()];
        for at in (0..columns.len()).step_by(TOGETHER) {
            let mut some: [Column<'_>; TOGETHER] = [&[]; TOGETHER];
            let mut ahead = [blocks.as_ptr(); TOGETHER];
            for (i, (column, ahead)) in some.iter_mut().zip(&mut ahead).enumerate() {
                *column = &blocks[start(last.min(at + i))..][..gathered.len()];
                *ahead = blocks.as_ptr().wrapping_add(start(last.min(at + i + AHEAD_COLUMNS)));
            }
            // Past the last column it is repeated times 0.
            let q = |place: usize| columns.get(place).map_or(0, |j| x.row(0)[*j as usize] as u8);
            let mut pairs = [_mm256_setzero_si256(); PAIRS];
            for (pair, place) in pairs.iter_mut().zip((at..).step_by(2)) {
                *pair = _mm256_set1_epi16(i16::from_le_bytes([q(place), q(place + 1)]));
            }
            add_columns(some, ahead, pairs, gathered);
            let next = at + TOGETHER;
            if next.is_multiple_of(BATCH) || next >= columns.len() {
                for (gathered, sums) in gathered.iter_mut().zip(sums.iter_mut()) {
                    let [low, high] = *gathered;
                    for ((low, high), sums) in low.into_iter().zip(high).zip(sums.as_chunks_mut().0)
                    {
                        widen(low, high, sums);
                    }
                    *gathered = [[_mm256_setzero_si256(); PLANES]; 2];
                }
            }
        }
    }
}

/// Adds the products of `columns` by their activations `pairs` to the sums of every block; asks for
/// the columns at `ahead`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_columns(
    columns: [Column<'_>; TOGETHER],
    ahead: [*const [u8; BLOCK_BYTES]; TOGETHER],
    pairs: [__m256i; PAIRS],
    gathered: &mut [Gathered],
) {
    for column in columns {
        assert_eq!(column.len(), gathered.len(), "so that nothing is checked in the loop");
    }
    for (block, [low, high]) in gathered.iter_mut().enumerate() {
        // A line is two blocks: with each, half of the columns.
        let (line, side) = (block / CHUNK_BLOCKS, block % CHUNK_BLOCKS);
        for ahead in ahead.as_chunks::<2>().0 {
            prefetch(ahead[side], line * CHUNK_BLOCKS * BLOCK_BYTES);
        }
        let columns = columns.as_chunks::<2>().0;
        let mut sums = *low;
        for ([a, b], q) in columns.iter().zip(pairs) {
            let codes = _mm256_unpacklo_epi8(load_u8(&a[block]), load_u8(&b[block]));
            multiply(&mut sums, codes, q);
        }
        *low = sums;
        let mut sums = *high;
        for ([a, b], q) in columns.iter().zip(pairs) {
            let codes = _mm256_unpackhi_epi8(load_u8(&a[block]), load_u8(&b[block]));
            multiply(&mut sums, codes, q);
        }
        *high = sums;
    }
}

/// Adds the products of each plane of `codes`, of two columns in turn, by their activations `q`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn multiply(sums: &mut [__m256i; PLANES], codes: __m256i, q: __m256i) {
    for (sum, codes) in sums.iter_mut().zip(unpack(codes)) {
        *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, q));
    }
}

/// The four planes of 32 packed bytes. Shifts are of 16 bits: the mask takes away what crosses from
/// the upper byte.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn unpack(packed: __m256i) -> [__m256i; PLANES] {
    let low_two = _mm256_set1_epi8(0b11);
    [
        _mm256_and_si256(packed, low_two),
        _mm256_and_si256(_mm256_srli_epi16::<2>(packed), low_two),
        _mm256_and_si256(_mm256_srli_epi16::<4>(packed), low_two),
        _mm256_and_si256(_mm256_srli_epi16::<6>(packed), low_two),
    ]
}

/// Adds the i16 sums of 32 rows to their totals. Interleaving works in halves of a register, so
/// `low` has rows 0 to 7 and 16 to 23, `high` the others.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn widen(low: __m256i, high: __m256i, totals: &mut [i32; 4 * WIDTH]) {
    let rows = [
        _mm256_castsi256_si128(low),
        _mm256_castsi256_si128(high),
        _mm256_extracti128_si256::<1>(low),
        _mm256_extracti128_si256::<1>(high),
    ];
    for (totals, rows) in totals.as_chunks_mut().0.iter_mut().zip(rows) {
        let sum = _mm256_add_epi32(load_i32x8(totals), _mm256_cvtepi16_epi32(rows));
        store_i32x8(totals, sum);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::x86_64) fn ternary_rows(
    w: TernaryMatrix<'_>,
    rows: &[u32],
    x: Quantised<'_>,
    y: &mut [f32],
) {
    let scale = w.scale() / x.scale(0);
    let q = &x.row(0).as_chunks::<ROW_BLOCK_BYTES>().0.as_chunks::<PLANES>().0
        [..w.cols().div_ceil(BLOCK_COLS)];
    for (group, y) in y.chunks_mut(GROUP_ROWS).enumerate() {
        // Past the end the last row is repeated: it costs little and is not stored.
        let row = |i: usize| rows[(group * GROUP_ROWS + i).min(rows.len() - 1)] as usize;
        let of_codes = four_rows(
            std::array::from_fn(|i| w.row_at(row(i)).0),
            std::array::from_fn(|i| w.row_at(row(AHEAD_ROWS + i)).0.as_ptr()),
            w.row_at(0).1,
            q,
        );
        let sums = store_i32x4(_mm_sub_epi32(of_codes, _mm_set1_epi32(x.sum(0))));
        for (y, sum) in y.iter_mut().zip(sums) {
            *y = sum as f32 * scale;
        }
    }
}

/// Σ code q of four rows, `q` being whole blocks; asks for the bytes at `ahead`, which are of rows to
/// come. `stride` is from one block of a row to the next.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn four_rows(
    rows: [&[u8]; GROUP_ROWS],
    ahead: [*const u8; GROUP_ROWS],
    stride: usize,
    q: &[[[i8; ROW_BLOCK_BYTES]; PLANES]],
) -> __m128i {
    let rows = rows.map(|row| row.as_chunks::<ROW_BLOCK_BYTES>().0);
    let step = stride / ROW_BLOCK_BYTES;
    let mut totals = [_mm256_setzero_si256(); GROUP_ROWS];
    for (strip, q) in q.chunks(STRIP_BLOCKS).enumerate() {
        let mut sums = [_mm256_setzero_si256(); GROUP_ROWS];
        for (block, q) in q.iter().enumerate() {
            let block = strip * STRIP_BLOCKS + block;
            if block.is_multiple_of(2) {
                for ahead in ahead {
                    prefetch(ahead, block * stride);
                }
            }
            let q = q.each_ref().map(|q| load_i8(q));
            for (sum, row) in sums.iter_mut().zip(rows) {
                for (codes, q) in unpack(load_u8(&row[block * step])).into_iter().zip(q) {
                    *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, q));
                }
            }
        }
        for (total, sum) in totals.iter_mut().zip(sums) {
            *total = _mm256_add_epi32(*total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
        }
    }
    let [a, b, c, d] = totals;
    let halves = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn positive(x: &[f32], first: u32, out: &mut [u32]) -> usize {
    let (vectors, rest) = x.as_chunks::<WIDTH>();
    let mut count = 0;
    for (vector, place) in vectors.iter().zip((first..).step_by(WIDTH)) {
        let wanted = _mm256_cmp_ps::<_CMP_GT_OQ>(load(vector), _mm256_setzero_ps());
        count += list(_mm256_movemask_ps(wanted) as u8, place, &mut out[count..]);
    }
    let place = first + (x.len() - rest.len()) as u32;
    count + scalar::sparse::positive(rest, place, &mut out[count..])
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn nonzero(q: &[i8], out: &mut [u32]) -> usize {
    let (vectors, rest) = q.as_chunks::<ROW_BLOCK_BYTES>();
    let mut count = 0;
    for (vector, place) in vectors.iter().zip((0..).step_by(ROW_BLOCK_BYTES)) {
        let zero = _mm256_cmpeq_epi8(load_i8(vector), _mm256_setzero_si256());
        let wanted = !_mm256_movemask_epi8(zero) as u32;
        for (eight, place) in wanted.to_le_bytes().into_iter().zip((place..).step_by(WIDTH)) {
            count += list(eight, place, &mut out[count..]);
        }
    }
    let place = (q.len() - rest.len()) as u32;
    let last = scalar::sparse::nonzero(rest, &mut out[count..]);
    out[count..][..last].iter_mut().for_each(|out| *out += place);
    count + last
}

/// Writes `first` plus the number of every bit set in `wanted` to the front of `out`, which has
/// room for eight; returns how many there are.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn list(wanted: u8, first: u32, out: &mut [u32]) -> usize {
    let (places, count) = BITS_SET[usize::from(wanted)];
    let places = _mm256_cvtepu8_epi32(_mm_set_epi64x(0, i64::from_le_bytes(places)));
    let places = _mm256_add_epi32(places, _mm256_set1_epi32(first as i32));
    store_u32x8(out.first_chunk_mut().expect("room for eight"), places);
    usize::from(count)
}

/// The numbers of the bits set in each byte, ascending, and how many there are.
static BITS_SET: [([u8; WIDTH], u8); 256] = {
    let mut table = [([0; WIDTH], 0); 256];
    let mut byte = 0;
    while byte < 256 {
        let mut bit = 0;
        while bit < 8 {
            if byte >> bit & 1 == 1 {
                table[byte].0[table[byte].1 as usize] = bit;
                table[byte].1 += 1;
            }
            bit += 1;
        }
        byte += 1;
    }
    table
};
