//! Weights unpacked for many rows of activations. Where one or a few rows leave each row of weights in
//! a register of its own, whose lanes must be added up at the end, here a lane *is* a row of weights:
//! a register holds the codes of four columns for sixteen rows, every lane is multiplied by the same
//! four activations, and its sum is that of its row. Nothing is added across lanes, and outputs leave
//! as vectors.
//!
//! ```text
//! packed     rows of a tile, 32 bytes a block          16 rows: 4 tiles, pieces of 16 bytes
//!   │ gather     lane l of vector i = row l of tile i           (16 bytes a lane)
//!   │ transpose  four bytes of a row against those of the next  (within lanes)
//!   │ unpack     four planes: shift, mask
//!   ▼
//! chunk      [group][four columns][row][column]        64 columns of some groups of 16 rows
//! ```
//!
//! The codes of a group in a chunk, 1 kB, are what `vpdpbusd` reads register by register (`many.rs`) and
//! what an AMX tile takes whole (`amx.rs`). The lanes of a register are rows in the order of
//! [`LANE_OF_ROW`].

use std::arch::x86_64::*;
use std::array;
use std::ops::Range;

use super::store_codes;
use crate::ternary_matrix::{Arrangement, BLOCK_COLS, TILE_ROWS, TernaryMatrix};
use crate::views::{Columns, Quantised};
use crate::workspace::Workspace;
use crate::x86_64::avx2::prefetch;
use crate::x86_64::avx2::ternary::{Plain, Tile, Woven};

/// Lanes of 32 bits in a register: rows of weights in a group.
pub(in crate::x86_64) const LANES: usize = 16;
/// Columns of a chunk: a cache line of activations, and a row of an AMX tile of them.
pub(in crate::x86_64) const CHUNK_COLS: usize = 64;
/// Chunks of a block.
const CHUNKS: usize = BLOCK_COLS / CHUNK_COLS;
/// Groups of four columns in a chunk.
pub(in crate::x86_64) const FOURS: usize = CHUNK_COLS / 4;
/// Tiles whose rows fill a register.
pub(in crate::x86_64) const GROUP_TILES: usize = LANES / TILE_ROWS;
/// How many blocks before its use one is asked for: a strip of 32 rows. Nearer or farther is slower, and
/// so is the order of memory in place of that of use.
const BLOCKS_AHEAD: usize = 4;
/// Bytes of a row that are transposed within a lane.
const PIECE: usize = 16;

/// The codes of [`CHUNK_COLS`] columns of a band of `G` groups of 16 rows,
/// `[group][four columns][row][column]`.
pub(in crate::x86_64) type Chunk<const G: usize> = [[[u8; 64]; FOURS]; G];
/// The sums of a band for one row of activations, `[group][lane]`.
pub(in crate::x86_64) type Sums<const G: usize> = [[i32; LANES]; G];

/// The lane of each row of a group: rows of a tile lie in four different quarters.
pub(in crate::x86_64) const LANE_OF_ROW: [i32; LANES] =
    [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];

/// A strip of a band: all its rows, some columns.
#[derive(Clone, Copy)]
pub(in crate::x86_64) struct Strip<'a, const G: usize> {
    /// The codes.
    pub(in crate::x86_64) chunks: &'a [Chunk<G>],
    /// The column it begins with.
    pub(in crate::x86_64) first_col: usize,
    /// No strip of the band came before: sums are to be set, not added to.
    pub(in crate::x86_64) is_first: bool,
    /// No strip of the band comes after: sums must be there.
    pub(in crate::x86_64) is_last: bool,
}

/// The product of the rows of `tiles` with all rows of `x`, band by band. `multiply` is given the strips
/// of a band from left to right, to multiply with as many columns of all activations that it is given, and
/// leaves the sums of each row of them when it is given the last.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::x86_64) fn by_bands<const G: usize>(
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    y: &mut Columns<'_>,
    workspace: &mut Workspace,
    multiply: &mut impl FnMut(Strip<'_, G>, Quantised<'_>, &mut [Sums<G>]),
) {
    match w.arrangement() {
        Arrangement::Tiles => bands::<Woven<'_>, G>(w, tiles, x, y, workspace, multiply),
        Arrangement::Rows => bands::<Plain<'_>, G>(w, tiles, x, y, workspace, multiply),
    }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn bands<'a, T: Tile<'a>, const G: usize>(
    w: TernaryMatrix<'a>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    y: &mut Columns<'_>,
    workspace: &mut Workspace,
    multiply: &mut impl FnMut(Strip<'_, G>, Quantised<'_>, &mut [Sums<G>]),
) {
    let chunks: &mut [Chunk<G>] =
        workspace.codes.get().as_chunks_mut().0.as_chunks_mut().0.as_chunks_mut().0;
    let sums: &mut [Sums<G>] = workspace.totals.get().as_chunks_mut().0.as_chunks_mut().0;
    let blocks_a_strip = chunks.len() / CHUNKS;
    let band_tokens = sums.len();
    let band_tiles = G * GROUP_TILES;
    for first_token in (0..x.rows()).step_by(band_tokens) {
        let tokens = first_token..x.rows().min(first_token + band_tokens);
        let (x, mut y) = (x.part(tokens.clone()), y.part(tokens.clone()));
        let sums = &mut sums[..tokens.len()];
        for band in tiles.clone().step_by(band_tiles) {
            let last = tiles.end - 1;
            // What lies past the last tile is multiplied like it and not written.
            let tile = |i: usize| T::new(w, (band + i).min(last));
            let groups: [[T; GROUP_TILES]; G] =
                array::from_fn(|group| array::from_fn(|i| tile(group * GROUP_TILES + i)));
            for first in (0..w.blocks()).step_by(blocks_a_strip) {
                let blocks = first..w.blocks().min(first + blocks_a_strip);
                let strip = &mut chunks[..blocks.len() * CHUNKS];
                for (place, block) in strip.as_chunks_mut::<CHUNKS>().0.iter_mut().zip(blocks) {
                    for (group, tiles) in groups.iter().enumerate() {
                        unpack(tiles, block, band_tiles, group, place);
                    }
                }
                let strip = Strip {
                    chunks: strip,
                    first_col: first * BLOCK_COLS,
                    is_first: first == 0,
                    is_last: first + blocks_a_strip >= w.blocks(),
                };
                multiply(strip, x, sums);
            }
            let column = (band - tiles.start) * TILE_ROWS;
            for (token, sums) in sums.iter().enumerate() {
                finish(w.scale(), x, token, sums, &mut y.row(token)[column..]);
            }
        }
    }
}

/// Asks for the block [`BLOCKS_AHEAD`] after block `block` of a tile, or for one of the tile in its place in
/// the next band, `band_tiles` further on.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn prefetch_ahead<'a, T: Tile<'a>>(tile: T, block: usize, band_tiles: usize) {
    let band = band_tiles * tile.len() * TILE_ROWS * 2 * PIECE;
    let (next, bytes) = match block + BLOCKS_AHEAD {
        next if next < tile.len() => (next, 0),
        next => (next % tile.len(), band),
    };
    if let Some([first, second]) = tile.lines(next) {
        prefetch(first, bytes);
        prefetch(second, bytes);
    } else {
        // Rows by themselves: as many bytes of the next band, which are other rows'.
        let place = band + block * TILE_ROWS * 2 * PIECE;
        prefetch(tile.start(), place);
        prefetch(tile.start(), place + 64);
    }
}

/// Unpacks a block of a group into its two chunks, and asks for what comes later.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn unpack<'a, T: Tile<'a>, const G: usize>(
    tiles: &[T; GROUP_TILES],
    block: usize,
    band_tiles: usize,
    group: usize,
    chunks: &mut [Chunk<G>; CHUNKS],
) {
    let [a, b, c, d] = tiles;
    for tile in tiles {
        prefetch_ahead(*tile, block, band_tiles);
    }
    let rows = [a.block(block), b.block(block), c.block(block), d.block(block)];
    let low_two = _mm512_set1_epi8(0b11);
    for piece in 0..2 {
        let fours = transpose(&rows, piece);
        for (i, packed) in fours.into_iter().enumerate() {
            // Four columns of the piece in each plane of 32 columns.
            let place = 4 * piece + i;
            let [first, second] = &mut *chunks;
            let planes = [
                packed,
                _mm512_srli_epi16::<2>(packed),
                _mm512_srli_epi16::<4>(packed),
                _mm512_srli_epi16::<6>(packed),
            ];
            store_codes(&mut first[group][place], _mm512_and_si512(planes[0], low_two));
            store_codes(&mut first[group][8 + place], _mm512_and_si512(planes[1], low_two));
            store_codes(&mut second[group][place], _mm512_and_si512(planes[2], low_two));
            store_codes(&mut second[group][8 + place], _mm512_and_si512(planes[3], low_two));
        }
    }
}

/// Piece `piece`, of 16 bytes, of each of 16 rows, as four registers: each holds the next four bytes of
/// every row, a row to a lane, in the order of [`LANE_OF_ROW`].
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
pub(in crate::x86_64) fn transpose(
    rows: &[[&[u8; 2 * PIECE]; TILE_ROWS]; GROUP_TILES],
    piece: usize,
) -> [__m512i; 4] {
    let mut lanes = [_mm512_setzero_si512(); GROUP_TILES];
    for (lanes, rows) in lanes.iter_mut().zip(rows) {
        *lanes = four_rows(rows, piece);
    }
    let [a, b, c, d] = lanes;
    let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    [
        _mm512_unpacklo_epi64(ab_low, cd_low),
        _mm512_unpackhi_epi64(ab_low, cd_low),
        _mm512_unpacklo_epi64(ab_high, cd_high),
        _mm512_unpackhi_epi64(ab_high, cd_high),
    ]
}

/// 16 bytes of each row of a tile, one row in each lane of 128 bits.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn four_rows(rows: &[&[u8; 2 * PIECE]; TILE_ROWS], piece: usize) -> __m512i {
    let [a, b, c, d] = rows;
    let lanes = _mm512_castsi128_si512(load_piece(a, piece));
    let lanes = _mm512_inserti32x4::<1>(lanes, load_piece(b, piece));
    let lanes = _mm512_inserti32x4::<2>(lanes, load_piece(c, piece));
    _mm512_inserti32x4::<3>(lanes, load_piece(d, piece))
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn load_piece(row: &[u8; 2 * PIECE], piece: usize) -> __m128i {
    let piece: &[u8; PIECE] = &row.as_chunks().0[piece];
    // SAFETY: the reference covers exactly the 16 bytes read; `loadu` needs no alignment.
    unsafe { _mm_loadu_si128(piece.as_ptr().cast()) }
}

/// Scales the sums of a band for row `token` of the activations and writes as many of them to `y` as
/// it has room for: the last band may have fewer rows.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn finish<const G: usize>(
    scale: f32,
    x: Quantised<'_>,
    token: usize,
    sums: &Sums<G>,
    y: &mut [f32],
) {
    let order = load_i32(&LANE_OF_ROW);
    let (sum, scale) = (_mm512_set1_epi32(x.sum(token)), _mm512_set1_ps(scale / x.scale(token)));
    for (sums, y) in sums.iter().zip(y.chunks_mut(LANES)) {
        let totals = _mm512_permutexvar_epi32(order, load_i32(sums));
        let products = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(totals, sum)), scale);
        match y.first_chunk_mut() {
            Some(whole) => super::store(whole, products),
            None => {
                let mut all = [0.0; LANES];
                super::store(&mut all, products);
                y.copy_from_slice(&all[..y.len()]);
            }
        }
    }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
pub(in crate::x86_64) fn load_i32(x: &[i32; LANES]) -> __m512i {
    // SAFETY: the reference covers exactly the 64 bytes read; `loadu` needs no alignment.
    unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
}
