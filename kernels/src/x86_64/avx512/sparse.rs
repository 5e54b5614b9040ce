//! Ternary products of one row of activations that read only the weights they need, and the lists
//! that say which those are. Codes are unsigned (trit + 1); the sum of the activations is subtracted
//! at the end.
//!
//! **In place.** `vpdpbusd` adds four products of a byte and an activation to 32 bits. There is room
//! for the codes of every plane as they lie in a byte, times 1, 4, 16 or 64: a mask is all that
//! unpacks a plane, which has sums of its own, divided at the end.
//!
//! **Columns.** The bytes of four columns are interleaved, so that the four products of a lane are
//! those of one row. Whole columns, [`TOGETHER`] at a time, are added to the sums of all rows, which
//! stay in the first-level cache.
//!
//! **Rows.** Four wanted rows share each load of activations, wherever they are.
//!
//! **Memory.** As in `avx2/sparse.rs`: every line is asked for, some work ahead.
//!
//! **Why nothing overflows.** A byte in place is at most 192 (the invalid code 3 of plane 3), its
//! product within ±24,576: 87,381 of them fit.

use std::arch::x86_64::*;

use super::{Lines, load, load_codes, load_i8, store_i32, store_u32};
use crate::scalar;
use crate::scalar::reduce::LANES;
use crate::ternary_columns::{BLOCK_ROWS, CHUNK_ROWS, TernaryColumns};
use crate::ternary_matrix::{Arrangement, BLOCK_COLS, ROW_BLOCK_BYTES, TernaryMatrix};
use crate::views::Quantised;
use crate::x86_64::avx2::{self, load_u8, prefetch, store_i32x4};

/// Bytes of a register.
const BYTES: usize = 64;
/// Bit planes of a byte.
const PLANES: usize = 4;
/// Columns whose bytes are interleaved.
const QUAD: usize = 4;
/// Columns that are added to the sums at once, so that those are loaded and stored rarely.
const TOGETHER: usize = 2 * QUAD;
const QUADS: usize = TOGETHER / QUAD;
/// Columns gathered before the sums are divided and added to the totals.
const BATCH: usize = 1 << 16;
/// How many columns ahead their lines are asked for: those that are added next, 5 kB of 2560 rows.
const AHEAD_COLUMNS: usize = TOGETHER;
/// Chunks of a column whose sums are kept at a time: 2560 rows, 10 kB.
const PASS_CHUNKS: usize = 10;
/// Rows of weights that share a load of activations.
const GROUP_ROWS: usize = 4;
/// How many wanted rows ahead the bytes of rows are asked for: two groups.
const AHEAD_ROWS: usize = 2 * GROUP_ROWS;
/// Columns of the widest rows whose activations are laid out anew: 8 kB.
const ROW_COLS_MAX: usize = 8192;

/// The chunks of a column.
type Column<'a> = &'a [[u8; BYTES]];
/// The sums of half of the rows of each plane of a chunk: a register has 16 of 64.
type Sums = [[__m512i; 2]; PLANES];
/// The sums of the rows of a chunk, see [`end_chunk`].
type Gathered = [Sums; 2];
/// The activations of two blocks of columns that follow one another, by planes.
type Activations = [[i8; BYTES]; PLANES];

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn ternary_columns(
    w: TernaryColumns<'_>,
    columns: &[u32],
    x: Quantised<'_>,
    sums: &mut [i32],
) {
    let chunks = w.blocks().0.as_flattened().as_chunks::<BYTES>().0;
    let chunks_per_column = w.padded_rows() / CHUNK_ROWS;
    let sums = sums.as_chunks_mut::<CHUNK_ROWS>().0;
    for (sums, first) in sums.chunks_mut(PASS_CHUNKS).zip((0..).step_by(PASS_CHUNKS)) {
        let start = |place: usize| columns[place] as usize * chunks_per_column + first;
        let last = columns.len().saturating_sub(1);
        let mut gathered = [[[[_mm512_setzero_si512(); 2]; PLANES]; 2]; PASS_CHUNKS];
        let gathered = &mut gathered[..sums.len()];
        for at in (0..columns.len()).step_by(TOGETHER) {
            let mut some: [Column<'_>; TOGETHER] = [&[]; TOGETHER];
            let mut ahead = [chunks.as_ptr(); TOGETHER];
            for (i, (column, ahead)) in some.iter_mut().zip(&mut ahead).enumerate() {
                *column = &chunks[start(last.min(at + i))..][..gathered.len()];
                *ahead = chunks.as_ptr().wrapping_add(start(last.min(at + i + AHEAD_COLUMNS)));
            }
            // Past the last column it is repeated times 0.
            let q = |place: usize| columns.get(place).map_or(0, |j| x.row(0)[*j as usize] as u8);
            let mut quads = [_mm512_setzero_si512(); QUADS];
            for (quad, place) in quads.iter_mut().zip((at..).step_by(QUAD)) {
                let q = [q(place), q(place + 1), q(place + 2), q(place + 3)];
                *quad = _mm512_set1_epi32(i32::from_le_bytes(q));
            }
            add_columns(some, ahead, quads, gathered);
            let next = at + TOGETHER;
            if next.is_multiple_of(BATCH) || next >= columns.len() {
                for (gathered, sums) in gathered.iter_mut().zip(sums.iter_mut()) {
                    end_chunk(gathered, sums);
                    *gathered = [[[_mm512_setzero_si512(); 2]; PLANES]; 2];
                }
            }
        }
    }
}

/// Adds the products of `columns` by their activations `quads` to the sums of every chunk; asks for
/// the columns at `ahead`.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn add_columns(
    columns: [Column<'_>; TOGETHER],
    ahead: [*const [u8; BYTES]; TOGETHER],
    quads: [__m512i; QUADS],
    gathered: &mut [Gathered],
) {
    for column in columns {
        assert_eq!(column.len(), gathered.len(), "so that nothing is checked in the loop");
    }
    let masks = masks();
    for (chunk, [low, high]) in gathered.iter_mut().enumerate() {
        for ahead in ahead {
            prefetch(ahead, chunk * BYTES);
        }
        let columns = columns.as_chunks::<QUAD>().0;
        let mut sums = *low;
        for ([a, b, c, d], q) in columns.iter().zip(quads) {
            let ab = _mm512_unpacklo_epi8(load_codes(&a[chunk]), load_codes(&b[chunk]));
            let cd = _mm512_unpacklo_epi8(load_codes(&c[chunk]), load_codes(&d[chunk]));
            multiply(&mut sums, ab, cd, q, masks);
        }
        *low = sums;
        let mut sums = *high;
        for ([a, b, c, d], q) in columns.iter().zip(quads) {
            let ab = _mm512_unpackhi_epi8(load_codes(&a[chunk]), load_codes(&b[chunk]));
            let cd = _mm512_unpackhi_epi8(load_codes(&c[chunk]), load_codes(&d[chunk]));
            multiply(&mut sums, ab, cd, q, masks);
        }
        *high = sums;
    }
}

/// Adds the products of each plane of four columns, of which the bytes of the first two and of the
/// last two are interleaved, by their activations `q`.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn multiply(sums: &mut Sums, ab: __m512i, cd: __m512i, q: __m512i, masks: [__m512i; PLANES]) {
    let first = _mm512_unpacklo_epi16(ab, cd);
    let second = _mm512_unpackhi_epi16(ab, cd);
    for (sums, mask) in sums.iter_mut().zip(masks) {
        sums[0] = _mm512_dpbusd_epi32(sums[0], _mm512_and_si512(first, mask), q);
        sums[1] = _mm512_dpbusd_epi32(sums[1], _mm512_and_si512(second, mask), q);
    }
}

/// The masks of the planes of a byte.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn masks() -> [__m512i; PLANES] {
    [
        _mm512_set1_epi8(0b11),
        _mm512_set1_epi8(0b11 << 2),
        _mm512_set1_epi8(0b11 << 4),
        _mm512_set1_epi8((0b11u8 << 6) as i8),
    ]
}

/// Adds the sums of a chunk to its totals. Interleaving works in quarters of a register, each of
/// which holds sixteen rows of every plane: four in each of four registers.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn end_chunk(gathered: &Gathered, totals: &mut [i32; CHUNK_ROWS]) {
    for (half, planes) in gathered.iter().enumerate() {
        for (plane, registers) in planes.iter().enumerate() {
            for (register, sums) in registers.iter().enumerate() {
                let shift = _mm512_set1_epi32(2 * plane as i32);
                let mut values = [0; LANES];
                store_i32(&mut values, _mm512_srav_epi32(*sums, shift));
                for (quarter, values) in values.as_chunks::<QUAD>().0.iter().enumerate() {
                    let row = quarter / 2 * BLOCK_ROWS
                        + plane * ROW_BLOCK_BYTES
                        + quarter % 2 * LANES
                        + (2 * half + register) * QUAD;
                    let totals = &mut totals[row..row + QUAD];
                    totals.iter_mut().zip(values).for_each(|(total, sum)| *total += sum);
                }
            }
        }
    }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn ternary_rows(w: TernaryMatrix<'_>, rows: &[u32], x: Quantised<'_>, y: &mut [f32]) {
    if w.arrangement() != Arrangement::Rows || w.cols() > ROW_COLS_MAX {
        return avx2::sparse::ternary_rows(w, rows, x, y);
    }
    // Two blocks follow one another in a register, so their activations do.
    let mut activations = Lines([[[0; BYTES]; PLANES]; ROW_COLS_MAX / (2 * BLOCK_COLS)]);
    let blocks = x.row(0).as_chunks::<ROW_BLOCK_BYTES>().0.as_chunks::<PLANES>().0;
    for (block, planes) in blocks.iter().take(w.blocks()).enumerate() {
        for (place, plane) in activations.0[block / 2].iter_mut().zip(planes) {
            place.as_chunks_mut::<ROW_BLOCK_BYTES>().0[block % 2] = *plane;
        }
    }
    let activations = &activations.0[..w.blocks().div_ceil(2)];

    let scale = w.scale() / x.scale(0);
    for (group, y) in y.chunks_mut(GROUP_ROWS).enumerate() {
        // Past the end the last row is repeated: it costs little and is not stored.
        let row = |i: usize| rows[(group * GROUP_ROWS + i).min(rows.len() - 1)] as usize;
        let of_codes = four_rows(
            std::array::from_fn(|i| w.row_at(row(i)).0),
            std::array::from_fn(|i| w.row_at(row(AHEAD_ROWS + i)).0.as_ptr()),
            activations,
        );
        let sums = store_i32x4(_mm_sub_epi32(of_codes, _mm_set1_epi32(x.sum(0))));
        for (y, sum) in y.iter_mut().zip(sums) {
            *y = sum as f32 * scale;
        }
    }
}

/// Σ code q of four rows; asks for the bytes at `ahead`, which are of rows to come.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn four_rows(
    rows: [&[u8]; GROUP_ROWS],
    ahead: [*const u8; GROUP_ROWS],
    x: &[Activations],
) -> __m128i {
    let masks = masks();
    let mut sums = [[_mm512_setzero_si512(); PLANES]; GROUP_ROWS];
    let pairs = rows[0].len() / BYTES;
    let mut whole: [&[[u8; BYTES]]; GROUP_ROWS] = [&[]; GROUP_ROWS];
    for (whole, row) in whole.iter_mut().zip(rows) {
        *whole = &row.as_chunks().0[..pairs];
    }
    let (whole_x, last_x) = x.split_at(pairs);
    for (pair, x) in whole_x.iter().enumerate() {
        for ahead in ahead {
            prefetch(ahead, pair * BYTES);
        }
        for (sums, row) in sums.iter_mut().zip(whole) {
            multiply_planes(sums, load_codes(&row[pair]), x, masks);
        }
    }
    if let [x] = last_x {
        // Half a register: the other half meets activations of zero.
        for (sums, row) in sums.iter_mut().zip(rows) {
            let half = row.last_chunk().expect("a row has a block");
            multiply_planes(sums, _mm512_zextsi256_si512(load_u8(half)), x, masks);
        }
    }
    let mut totals = [_mm256_setzero_si256(); GROUP_ROWS];
    for (total, [a, b, c, d]) in totals.iter_mut().zip(sums) {
        let low = _mm512_add_epi32(a, _mm512_srai_epi32::<2>(b));
        let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(c), _mm512_srai_epi32::<6>(d));
        let sum = _mm512_add_epi32(low, high);
        let upper = _mm512_extracti64x4_epi64::<1>(sum);
        *total = _mm256_add_epi32(_mm512_castsi512_si256(sum), upper);
    }
    let [a, b, c, d] = totals;
    let halves = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves))
}

/// Adds the products of the planes of two blocks of a row.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn multiply_planes(
    sums: &mut [__m512i; PLANES],
    packed: __m512i,
    x: &Activations,
    masks: [__m512i; PLANES],
) {
    for ((sum, x), mask) in sums.iter_mut().zip(x).zip(masks) {
        *sum = _mm512_dpbusd_epi32(*sum, _mm512_and_si512(packed, mask), load_i8(x));
    }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,popcnt")]
pub(super) fn positive(x: &[f32], first: u32, out: &mut [u32]) -> usize {
    let (vectors, rest) = x.as_chunks::<LANES>();
    let mut count = 0;
    for (vector, place) in vectors.iter().zip((first..).step_by(LANES)) {
        let wanted = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(load(vector), _mm512_setzero_ps());
        count += list(wanted, place, &mut out[count..]);
    }
    let place = first + (x.len() - rest.len()) as u32;
    count + scalar::sparse::positive(rest, place, &mut out[count..])
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,popcnt")]
pub(super) fn nonzero(q: &[i8], out: &mut [u32]) -> usize {
    let (vectors, rest) = q.as_chunks::<BYTES>();
    let mut count = 0;
    for (vector, place) in vectors.iter().zip((0..).step_by(BYTES)) {
        let q = load_i8(vector);
        let wanted = _mm512_test_epi8_mask(q, q);
        for (part, place) in (0..BYTES).step_by(LANES).zip((place..).step_by(LANES)) {
            count += list((wanted >> part) as __mmask16, place, &mut out[count..]);
        }
    }
    let place = (q.len() - rest.len()) as u32;
    let last = scalar::sparse::nonzero(rest, &mut out[count..]);
    out[count..][..last].iter_mut().for_each(|out| *out += place);
    count + last
}

/// Writes `first` plus the number of every bit set in `wanted` to the front of `out`, which has
/// room for sixteen; returns how many there are.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,popcnt")]
#[inline]
fn list(wanted: __mmask16, first: u32, out: &mut [u32]) -> usize {
    let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let places = _mm512_add_epi32(_mm512_set1_epi32(first as i32), lanes);
    let out = out.first_chunk_mut().expect("room for sixteen");
    store_u32(out, _mm512_maskz_compress_epi32(wanted, places));
    wanted.count_ones() as usize
}
