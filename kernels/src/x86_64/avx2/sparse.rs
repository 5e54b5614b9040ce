//! Ternary products of one row of activations that read only the weights they need, and the lists
//! that say which those are. Codes are unsigned (trit + 1); the sum of the activations is subtracted
//! at the end.
//!
//! **Columns.** A register holds 128 rows of one column. The bytes of two columns are interleaved,
//! so that `maddubs` by their two activations gives an i16 per row: the unpacking is that of a dense
//! product plus two instructions for two columns. [`BATCH`] columns are gathered in registers before
//! the next 128 rows of the same columns are turned to.
//!
//! **Rows.** Four wanted rows share each load of activations, wherever they are.
//!
//! **Memory.** What is skipped lies between what is read, so the hardware cannot guess what comes
//! next: every line is asked for, some work ahead.
//!
//! **Why nothing overflows.** A pair of products is within ±512 (±768 for the invalid code 3), and
//! an i16 gathers at most 32 pairs before it is widened: within ±24,576.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{
    WIDTH, load, load_i8, load_i32x8, load_u8, prefetch, store_i32x4, store_i32x8, store_u32x8,
};
use crate::scalar;
use crate::ternary_columns::{BLOCK_BYTES, BLOCK_ROWS, CHUNK_BLOCKS, TernaryColumns};
use crate::ternary_matrix::{BLOCK_COLS, ROW_BLOCK_BYTES, TernaryMatrix};
use crate::views::Quantised;

/// Columns gathered in i16 before they are widened: 32 pairs. The lines of the next batch are asked
/// for meanwhile.
const BATCH: usize = 64;
/// Blocks of a column whose sums are kept on the stack at a time: 2560 rows.
const PASS_BLOCKS: usize = 10 * CHUNK_BLOCKS;
/// Bit planes of a block.
const PLANES: usize = 4;
/// Rows of weights that share a load of activations.
const GROUP_ROWS: usize = 4;
/// How many wanted rows ahead the bytes of rows are asked for: two groups, some 250 ns of work.
const AHEAD_ROWS: usize = 2 * GROUP_ROWS;
/// Blocks of a row gathered in i16 before they are widened: 8 * 4 pairs.
const STRIP_BLOCKS: usize = 8;

/// Some columns and their activations, ready for the loop over rows.
#[derive(Clone, Copy)]
struct Batch {
    /// The first block of each column, in pairs.
    starts: [[usize; 2]; BATCH / 2],
    /// The activations of each pair, the first in the lower byte.
    pairs: [i16; BATCH / 2],
    /// How many pairs there are.
    len: usize,
}

impl Batch {
    /// The batch of `columns`, at most [`BATCH`]. An odd last one is paired with itself times 0.
    fn new(columns: &[u32], q: &[i8], blocks_per_column: usize) -> Self {
        let mut batch = Self { starts: [[0; 2]; BATCH / 2], pairs: [0; BATCH / 2], len: 0 };
        for pair in columns.chunks(2) {
            let column = [pair[0] as usize, pair[pair.len() - 1] as usize];
            let second = if pair.len() == 2 { q[column[1]] } else { 0 };
            batch.starts[batch.len] = column.map(|column| column * blocks_per_column);
            batch.pairs[batch.len] = i16::from_le_bytes([q[column[0]] as u8, second as u8]);
            batch.len += 1;
        }
        batch
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn ternary_columns(
    w: TernaryColumns<'_>,
    chunks: Range<usize>,
    columns: &[u32],
    x: Quantised<'_>,
    y: &mut [f32],
) {
    let (blocks, blocks_per_column) = w.blocks();
    let scale = w.scale() / x.scale(0);
    let all = chunks.start * CHUNK_BLOCKS..chunks.end * CHUNK_BLOCKS;
    let passes = all.clone().step_by(PASS_BLOCKS);
    for (first, y) in passes.zip(y.chunks_mut(PASS_BLOCKS * BLOCK_ROWS)) {
        let pass = first..all.end.min(first + PASS_BLOCKS);
        let mut sums = [[0; BLOCK_ROWS]; PASS_BLOCKS];
        let mut of_activations = 0i32;
        let mut batches =
            columns.chunks(BATCH).map(|batch| Batch::new(batch, x.row(0), blocks_per_column));
        let mut next = batches.next();
        while let Some(batch) = next {
            next = batches.next();
            for q in batch.pairs.iter().flat_map(|pair| pair.to_le_bytes()) {
                of_activations = of_activations.wrapping_add(i32::from(q as i8));
            }
            for (block, sums) in pass.clone().zip(&mut sums) {
                add_batch(blocks, block, &batch, next.as_ref().unwrap_or(&batch), sums);
            }
        }
        for (y, sum) in y.iter_mut().zip(sums.as_flattened()) {
            *y = sum.wrapping_sub(of_activations) as f32 * scale;
        }
    }
}

/// Adds the products of a batch to the sums of the 128 rows of block `block`; asks for the lines of
/// the next batch.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_batch(
    blocks: &[[u8; BLOCK_BYTES]],
    block: usize,
    batch: &Batch,
    next: &Batch,
    sums: &mut [i32; BLOCK_ROWS],
) {
    // The lower and upper halves of each plane's 32 rows, interleaved by eights: see `widen`.
    let mut low = [_mm256_setzero_si256(); PLANES];
    let mut high = [_mm256_setzero_si256(); PLANES];
    let pairs = batch.starts.iter().zip(&batch.pairs).zip(&next.starts).take(batch.len);
    for (([a, b], q), ahead) in pairs {
        if block.is_multiple_of(CHUNK_BLOCKS) {
            for start in ahead {
                prefetch(blocks.as_ptr(), (start + block) * BLOCK_BYTES);
            }
        }
        let (a, b) = (load_u8(&blocks[a + block]), load_u8(&blocks[b + block]));
        let q = _mm256_set1_epi16(*q);
        multiply(&mut low, _mm256_unpacklo_epi8(a, b), q);
        multiply(&mut high, _mm256_unpackhi_epi8(a, b), q);
    }
    for ((low, high), sums) in low.into_iter().zip(high).zip(sums.as_chunks_mut().0) {
        widen(low, high, sums);
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
pub(super) fn ternary_rows(w: TernaryMatrix<'_>, rows: &[u32], x: Quantised<'_>, y: &mut [f32]) {
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
