//! Ternary products for many rows of activations, by looking sums up instead of multiplying. Four
//! trits of a row of weights take one of 81 values: for four columns the 81 sums that they can make of
//! the activations are computed once, for a panel of tokens side by side, and every row of weights
//! adds the one that its trits name. One addition of 16 lanes does the work of 64 products, where
//! `maddubs` and an addition do that of 32. It pays as soon as a hundred rows share the tables. (The
//! method of the Four Russians, for matrices of three values instead of two.)
//!
//! A panel is up to 32 tokens, two registers of sums. Blocks of 128 columns are done one after another:
//!
//! ```text
//! gather       the block's activations                 [column][token]
//! spread       each row's packed bytes to offsets      [pass][row][group]
//! 4 x  build   the tables of 8 groups of 4 columns     [group][value][token]
//!      add     8 entries for every row                 [row][token]
//! ```
//!
//! The tables of a pass are a little more than the first-level cache holds: smaller ones cost more
//! rounds over the sums, which come from the second level.
//!
//! **Why nothing overflows.** Trits are looked up and not codes: an entry is within ±512, and the 32 of
//! a block within ±16,384. The last pass of a block adds the lanes to totals of 32 bits, which hold any
//! sum, because a matrix has at most 2^22 columns (`ternary_matrix.rs`). Code 3 has no entry: where
//! there is one, [`ternary`] does all, so that corrupt codes give the same sums as everywhere.

#![expect(unsafe_code, reason = "loads from tables at any offset of 16 bits")]

use std::arch::x86_64::*;
use std::array;
use std::ops::Range;

use super::ternary::{Plain, Tile, Woven, ternary};
use super::{
    WIDTH, load_i8x16, load_i16, load_i32x8, load_u8, prefetch, store, store_i16, store_i32x8,
    store_u64x2,
};
use crate::ternary_matrix::{Arrangement, BLOCK_COLS, ROW_BLOCK_BYTES, TILE_ROWS, TernaryMatrix};
use crate::views::{Columns, Quantised};
use crate::workspace::{Offsets, PANEL_TOKENS, TABLES_LEN, WORKSPACE_ROWS, Workspace};

/// Rows of activations from which on a panel pays.
pub(super) const LEAST_TOKENS: usize = 29;
/// Rows of weights that pay for the tables, by count: to build one takes as many stores as some 90
/// rows take additions.
const LEAST_ROWS: usize = 96;
/// 16-bit lanes of a register.
const LANES: usize = 16;
/// Registers of lanes for the tokens of a panel.
const REGISTERS: usize = PANEL_TOKENS / LANES;
/// Groups of four columns whose tables are there at a time. A group's columns are those that share a
/// byte.
const GROUPS: usize = 8;
/// Rounds that do the groups of a block.
const PASSES: usize = ROW_BLOCK_BYTES / GROUPS;
const LAST_PASS: usize = PASSES - 1;
/// Rows that pass for each tile that is asked for, so that in all passes every tile is.
const ROWS_PER_PREFETCH: usize = PASSES * TILE_ROWS;
/// Values of four trits.
const VALUES: usize = 81;

/// One element of 16 tokens.
type Lanes = [i16; LANES];
/// What a group's value adds for every token of a panel.
type Entry = [Lanes; REGISTERS];
/// [`GROUPS`] tables, `[group][value][token]`, and so much more that no offset of 16 bits leads outside.
type Tables = [i16; TABLES_LEN];
/// The sums of one row of weights for every token of a panel.
type Total = [[i32; LANES]; REGISTERS];

#[target_feature(enable = "avx2,fma,f16c,bmi1")]
pub(super) fn ternary_many(
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    mut y: Columns<'_>,
    workspace: &mut Workspace,
) {
    let (rows, n) = (w.tile_rows(tiles.clone()), x.rows());
    if n < LEAST_TOKENS || rows.len() < LEAST_ROWS {
        return ternary(w, tiles, x, y);
    }
    // Parts of nearly the same size, for every one pays for the tables.
    let parts = rows.len().div_ceil(WORKSPACE_ROWS);
    for first in (0..n).step_by(PANEL_TOKENS) {
        let tokens = first..n.min(first + PANEL_TOKENS);
        let x = x.part(tokens.clone());
        let mut y = y.part(tokens);
        if x.rows() < LEAST_TOKENS {
            ternary(w, tiles.clone(), x, y);
            continue;
        }
        for part in 0..parts {
            let part = Part { w, tiles: share(&tiles, part, parts), first: tiles.start };
            let valid = match w.arrangement() {
                Arrangement::Tiles => panel::<Woven<'_>>(&part, x, &mut y, workspace),
                Arrangement::Rows => panel::<Plain<'_>>(&part, x, &mut y, workspace),
            };
            if !valid {
                ternary(w, tiles.clone(), x, y);
                break;
            }
        }
    }
}

/// Some tiles of a matrix, of at most [`WORKSPACE_ROWS`] rows.
struct Part<'a> {
    w: TernaryMatrix<'a>,
    tiles: Range<usize>,
    /// The tile whose first row is column 0 of the output.
    first: usize,
}

impl<'a> Part<'a> {
    /// Tile `at` of the part.
    #[inline]
    fn tile<T: Tile<'a>>(&self, at: usize) -> T {
        T::new(self.w, self.tiles.start + at)
    }

    /// Asks for block `block` of tile `at`, if there is one.
    #[target_feature(enable = "avx2,fma,f16c,bmi1")]
    #[inline]
    fn prefetch<T: Tile<'a>>(&self, at: usize, block: usize) {
        if at < self.tiles.len() && block < self.w.blocks() {
            for row in self.tile::<T>(at).block(block) {
                prefetch(row, 0);
            }
        }
    }
}

/// The part's rows by a panel, into the columns of `y` that are theirs; false if there is a code 3
/// among the weights, and then nothing is written.
#[target_feature(enable = "avx2,fma,f16c,bmi1")]
fn panel<'a, T: Tile<'a>>(
    part: &Part<'a>,
    x: Quantised<'_>,
    y: &mut Columns<'_>,
    workspace: &mut Workspace,
) -> bool {
    let rows = part.w.tile_rows(part.tiles.clone()).len();
    let activations: &mut [Entry] = &mut vectors(workspace.activations.get())[..BLOCK_COLS];
    let tables = workspace.tables.get().first_chunk_mut().expect("a workspace has this length");
    let sums: &mut [Entry] = &mut vectors(workspace.sums.get())[..rows];
    let totals: &mut [Total] = &mut vectors(workspace.totals.get())[..rows];
    totals.fill([[0; LANES]; REGISTERS]);
    let offsets = workspace.offsets.get();
    let mut invalid = false;
    for block in 0..part.w.blocks() {
        gather(x, block, activations);
        invalid |= spread::<T>(part, block, offsets);
        for (pass, offsets) in offsets.chunks_exact(WORKSPACE_ROWS).enumerate() {
            build(activations, pass * GROUPS, tables);
            let offsets = &offsets[..rows];
            let first = share(&(0..part.tiles.len()), pass, PASSES).start;
            let ahead = |at| part.prefetch::<T>(first + at, block + 1);
            match pass {
                0 => add::<true, false>(offsets, tables, sums, totals, ahead),
                LAST_PASS => add::<false, true>(offsets, tables, sums, totals, ahead),
                _ => add::<false, false>(offsets, tables, sums, totals, ahead),
            }
        }
    }
    if !invalid {
        finish(part.w.scale(), x, totals, y, (part.tiles.start - part.first) * TILE_ROWS);
    }
    !invalid
}

/// A buffer as one vector of lanes for every row or entry.
fn vectors<T>(buffer: &mut [T]) -> &mut [[[T; LANES]; REGISTERS]] {
    buffer.as_chunks_mut().0.as_chunks_mut().0
}

/// Writes the activations of a block column by column, widened; tokens that are not there are zero.
#[target_feature(enable = "avx2,fma,f16c,bmi1")]
#[inline]
fn gather(x: Quantised<'_>, block: usize, activations: &mut [Entry]) {
    let columns = block * BLOCK_COLS..(block + 1) * BLOCK_COLS;
    for v in 0..REGISTERS {
        let row = |i| match v * LANES + i < x.rows() {
            true => x.row(v * LANES + i)[columns.clone()].as_chunks::<LANES>().0,
            false => &[[0; LANES]; BLOCK_COLS / LANES],
        };
        let rows: [_; LANES] = array::from_fn(row);
        for (piece, activations) in activations.chunks_exact_mut(LANES).enumerate() {
            let tokens = transpose(rows.map(|row| load_i8x16(&row[piece])));
            for (activations, tokens) in activations.iter_mut().zip(tokens) {
                store_i16(&mut activations[v], _mm256_cvtepi8_epi16(tokens));
            }
        }
    }
}

/// Exchanges rows and columns of 16 by 16 bytes: each round turns the eight bits of a place by one.
#[target_feature(enable = "avx2,fma,f16c,bmi1")]
#[inline]
fn transpose(mut rows: [__m128i; LANES]) -> [__m128i; LANES] {
    for _ in 0..4 {
        rows = array::from_fn(|i| {
            let (a, b) = (rows[i / 2], rows[i / 2 + LANES / 2]);
            if i % 2 == 0 { _mm_unpacklo_epi8(a, b) } else { _mm_unpackhi_epi8(a, b) }
        });
    }
    rows
}

/// Turns the packed bytes of a block of each row, four codes of two bits, into where in a table the
/// entry for their value in base three begins; tells whether there is a code 3.
#[target_feature(enable = "avx2,fma,f16c,bmi1")]
#[inline]
fn spread<'a, T: Tile<'a>>(part: &Part<'a>, block: usize, offsets: &mut [Offsets]) -> bool {
    // The value of two codes, by their four bits: code 3 counts as something that has an entry.
    let value = |unit: i8| {
        let table = array::from_fn(|bits| {
            let (a, b) = (bits % 4, bits / 4);
            unit * (a.min(2) + 3 * b.min(2)) as i8
        });
        _mm256_broadcastsi128_si256(load_i8x16(&table))
    };
    let (low_values, high_values) = (value(1), value(9));
    let low = _mm256_set1_epi8(0b1111);
    let entry_bytes = _mm256_set1_epi16(size_of::<Entry>() as i16);
    let mut both = _mm256_setzero_si256();
    let (a, rest) = offsets.split_at_mut(WORKSPACE_ROWS);
    let (b, rest) = rest.split_at_mut(WORKSPACE_ROWS);
    let (c, d) = rest.split_at_mut(WORKSPACE_ROWS);
    let [a, b, c, d] = [a, b, c, d].map(|pass| pass.as_chunks_mut::<TILE_ROWS>().0.iter_mut());
    for ((((tile, a), b), c), d) in part.tiles.clone().zip(a).zip(b).zip(c).zip(d) {
        for (row, packed) in T::new(part.w, tile).block(block).into_iter().enumerate() {
            let packed = load_u8(packed);
            both = _mm256_or_si256(both, _mm256_and_si256(packed, _mm256_srli_epi16::<1>(packed)));
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(packed), low);
            let values = _mm256_add_epi8(
                _mm256_shuffle_epi8(low_values, _mm256_and_si256(packed, low)),
                _mm256_shuffle_epi8(high_values, high),
            );
            for (half, [x, y]) in [
                (_mm256_castsi256_si128(values), [&mut a[row], &mut b[row]]),
                (_mm256_extracti128_si256::<1>(values), [&mut c[row], &mut d[row]]),
            ] {
                let bytes = _mm256_mullo_epi16(_mm256_cvtepu8_epi16(half), entry_bytes);
                *x = store_u64x2(_mm256_castsi256_si128(bytes));
                *y = store_u64x2(_mm256_extracti128_si256::<1>(bytes));
            }
        }
    }
    let both = _mm256_and_si256(both, _mm256_set1_epi8(0b0101_0101));
    _mm256_testz_si256(both, both) == 0
}

/// Part `at` of `count` parts of `tiles` that are nearly the same size.
fn share(tiles: &Range<usize>, at: usize, count: usize) -> Range<usize> {
    let bound = |at| tiles.start + at * tiles.len() / count;
    bound(at)..bound(at + 1)
}

/// Makes the tables of the groups from `first` on: the sums of all values of four trits.
#[target_feature(enable = "avx2,fma,f16c,bmi1")]
#[inline]
fn build(activations: &[Entry], first: usize, tables: &mut Tables) {
    let tables: &mut [Entry] = vectors(tables);
    for (group, table) in tables.chunks_exact_mut(VALUES).take(GROUPS).enumerate() {
        for v in 0..REGISTERS {
            let column =
                |plane: usize| load_i16(&activations[first + group + plane * ROW_BLOCK_BYTES][v]);
            let low = nine(column(0), column(1));
            let high = nine(column(2), column(3));
            for (table, high) in table.chunks_exact_mut(9).zip(high) {
                for (entry, low) in table.iter_mut().zip(low) {
                    store_i16(&mut entry[v], _mm256_add_epi16(low, high));
                }
            }
        }
    }
}

/// The sums of all values of two trits, that of `a` counting faster.
#[target_feature(enable = "avx2,fma,f16c,bmi1")]
#[inline]
fn nine(a: __m256i, b: __m256i) -> [__m256i; 9] {
    let zero = _mm256_setzero_si256();
    let (a, b) = ([_mm256_sub_epi16(zero, a), zero, a], [_mm256_sub_epi16(zero, b), zero, b]);
    array::from_fn(|i| _mm256_add_epi16(a[i % 3], b[i / 3]))
}

/// Adds the entries of eight groups for every row: to nothing if they are the first of a block, else to
/// its sums; into its totals if they are the last. Calls `ahead` for every [`ROWS_PER_PREFETCH`] rows.
#[target_feature(enable = "avx2,fma,f16c,bmi1")]
#[inline]
fn add<const FIRST: bool, const LAST: bool>(
    offsets: &[Offsets],
    tables: &Tables,
    sums: &mut [Entry],
    totals: &mut [Total],
    ahead: impl Fn(usize),
) {
    let chunks = offsets.chunks(ROWS_PER_PREFETCH).zip(sums.chunks_mut(ROWS_PER_PREFETCH));
    let chunks = chunks.zip(totals.chunks_mut(ROWS_PER_PREFETCH));
    for (at, ((offsets, sums), totals)) in chunks.enumerate() {
        ahead(at);
        for ((offsets, sums), totals) in offsets.iter().zip(sums).zip(totals) {
            add_row::<FIRST, LAST>(*offsets, tables, sums, totals);
        }
    }
}

/// The entry at `offset` bytes from where the table of group `group` begins.
#[inline]
fn entry(tables: &Tables, group: usize, offset: u16) -> &[[u8; 32]; REGISTERS] {
    const { assert!(size_of::<Tables>() >= GROUPS * VALUES * size_of::<Entry>() + (1 << 16)) };
    debug_assert!(group < GROUPS, "table {group}");
    let place = group * VALUES * size_of::<Entry>() + usize::from(offset);
    // SAFETY: `group` is below GROUPS, and the tables go on for 65,536 bytes after the last one, so any
    // offset in any table leads to bytes of `tables`.
    let entry = unsafe { tables.as_ptr().byte_add(place) };
    // SAFETY: by the same reason a whole entry is there; any bytes can be read as bytes, wherever they
    // begin.
    unsafe { &*entry.cast() }
}

/// [`add`] for one row.
#[target_feature(enable = "avx2,fma,f16c,bmi1")]
#[inline]
fn add_row<const FIRST: bool, const LAST: bool>(
    offsets: Offsets,
    tables: &Tables,
    sums: &mut Entry,
    totals: &mut Total,
) {
    let mut lanes = match FIRST {
        true => [_mm256_setzero_si256(); REGISTERS],
        false => sums.each_ref().map(|sums| load_i16(sums)),
    };
    for (half, word) in offsets.into_iter().enumerate() {
        // An instruction for each, where a shift and a mask would be three.
        let of_word = [
            word & 0xffff,
            _bextr2_u64(word, 16 << 8 | 16),
            _bextr2_u64(word, 16 << 8 | 32),
            word >> 48,
        ];
        for (group, offset) in of_word.into_iter().enumerate() {
            let entry: &[_; REGISTERS] = entry(tables, half * GROUPS / 2 + group, offset as u16);
            for (lanes, entry) in lanes.iter_mut().zip(entry) {
                *lanes = _mm256_add_epi16(*lanes, load_u8(entry));
            }
        }
    }
    if LAST {
        for (totals, lanes) in totals.iter_mut().zip(lanes) {
            let halves = [_mm256_castsi256_si128(lanes), _mm256_extracti128_si256::<1>(lanes)];
            for (totals, half) in totals.as_chunks_mut().0.iter_mut().zip(halves) {
                let wide = _mm256_cvtepi16_epi32(half);
                store_i32x8(totals, _mm256_add_epi32(load_i32x8(totals), wide));
            }
        }
    } else {
        for (sums, lanes) in sums.iter_mut().zip(lanes) {
            store_i16(sums, lanes);
        }
    }
}

/// Scales the totals and writes them token by token, into the columns of `y` from `first` on.
#[target_feature(enable = "avx2,fma,f16c,bmi1")]
fn finish(scale: f32, x: Quantised<'_>, totals: &[Total], y: &mut Columns<'_>, first: usize) {
    let (whole, rest) = totals.as_chunks::<WIDTH>();
    for token in (0..x.rows()).step_by(WIDTH) {
        let (v, lane) = (token / LANES, token % LANES);
        let count = WIDTH.min(x.rows() - token);
        for (place, rows) in whole.iter().enumerate() {
            let of_row = |i: usize| rows[i][v][lane..].first_chunk().expect("half of the lanes");
            let tokens = transpose_i32(array::from_fn(|i| load_i32x8(of_row(i))));
            for (i, totals) in tokens.into_iter().enumerate().take(count) {
                let scale = _mm256_set1_ps(scale / x.scale(token + i));
                let y = y.row(token + i)[first + place * WIDTH..].first_chunk_mut();
                let y = y.expect("one column for every row of weights");
                store(y, _mm256_mul_ps(_mm256_cvtepi32_ps(totals), scale));
            }
        }
        for i in token..token + count {
            let y = &mut y.row(i)[first + whole.len() * WIDTH..];
            for (y, totals) in y.iter_mut().zip(rest) {
                *y = totals[i / LANES][i % LANES] as f32 * (scale / x.scale(i));
            }
        }
    }
}

/// Exchanges rows and columns of 8 by 8.
#[target_feature(enable = "avx2,fma,f16c,bmi1")]
#[inline]
fn transpose_i32(rows: [__m256i; WIDTH]) -> [__m256i; WIDTH] {
    let pairs: [_; WIDTH] = array::from_fn(|i| {
        let (a, b) = (rows[i / 2 * 2], rows[i / 2 * 2 + 1]);
        if i % 2 == 0 { _mm256_unpacklo_epi32(a, b) } else { _mm256_unpackhi_epi32(a, b) }
    });
    // Four rows of columns 0 and 4, 1 and 5, 2 and 6, 3 and 7.
    let fours: [_; WIDTH] = array::from_fn(|i| {
        let (half, column) = (i / 4 * 4, i % 4);
        let (a, b) = (pairs[half + column / 2], pairs[half + 2 + column / 2]);
        if column % 2 == 0 { _mm256_unpacklo_epi64(a, b) } else { _mm256_unpackhi_epi64(a, b) }
    });
    array::from_fn(|i| {
        let (a, b) = (fours[i % 4], fours[i % 4 + 4]);
        match i / 4 {
            0 => _mm256_permute2x128_si256::<0x20>(a, b),
            _ => _mm256_permute2x128_si256::<0x31>(a, b),
        }
    })
}
