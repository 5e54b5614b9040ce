//! Ternary products: unsigned codes (trit + 1) by signed activations, 32 at a time, in exact
//! integers; the sum of the activations is subtracted once at the end.
//!
//! Three ways, by the number of rows of activations:
//!
//! * one: memory is the limit. A tile is unpacked in registers and read ahead of its use.
//! * few: likewise, and each unpacked register serves up to five rows.
//! * some: arithmetic is the limit, see `group.rs`. (For panels of many, see `lookup.rs`.)
//!
//! **Why nothing overflows.** `maddubs` adds two products of a code and an activation into an i16:
//! with codes 0 to 2 and activations -128 to 127 a pair is within ±512 (±768 for the invalid code
//! 3), so its saturation is never met. `one_row` says what an i16 lane gathers of them before it is
//! widened to i32. An i32 holds any sum, because a matrix has at most 2^22 columns
//! (`ternary_matrix.rs`).

use std::arch::asm;
use std::arch::x86_64::*;
use std::array;
use std::ops::Range;

use super::group::{SideBySide, some_rows};
use super::{load_i8, load_u8, prefetch, store_x4};
use crate::ternary_matrix::{Arrangement, BLOCK_COLS, ROW_BLOCK_BYTES, TILE_ROWS, TernaryMatrix};
use crate::views::{Columns, Quantised};

/// Bit planes: the columns of a block in vectors of 32.
const PLANES: usize = BLOCK_COLS / ROW_BLOCK_BYTES;
/// Blocks of four times the codes that are gathered in i16.
const SCALED_BLOCKS: usize = 5;
/// Blocks that pass without a loop where arithmetic is the limit: its counter would be a tenth of the work.
pub(super) const UNROLLED: usize = SCALED_BLOCKS;
/// Rows of activations at most for [`few_rows`].
pub(super) const FEW_ROWS_MAX: usize = 5;
/// Blocks of a row at most for [`few_rows`], which has all of them side by side.
pub(super) const FEW_BLOCKS_MAX: usize = 64;
/// How far ahead of its reading a tile is asked for; without it one thread waits for memory.
const PREFETCH_BYTES: usize = 4096;

/// The activations of a block of columns, by planes.
type Activations = [[i8; ROW_BLOCK_BYTES]; PLANES];
/// A block of `N` rows of activations, side by side: `[plane][row]`.
pub(super) type Side<const N: usize> = [[[i8; ROW_BLOCK_BYTES]; N]; PLANES];
/// A running sum for each row of a tile.
type Sums = [__m256i; TILE_ROWS];

/// One block of a tile: `[row][byte]`.
type TileBlock = [[u8; ROW_BLOCK_BYTES]; TILE_ROWS];

/// The blocks of four rows, wherever the arrangement has them.
pub(in crate::x86_64) trait Tile<'a>: Copy {
    /// Of tile `tile`.
    fn new(w: TernaryMatrix<'a>, tile: usize) -> Self;
    /// Blocks `blocks` of them.
    fn part(self, blocks: Range<usize>) -> Self;
    /// How many there are.
    fn len(self) -> usize;
    /// Block `at` of each row.
    fn block(self, at: usize) -> [&'a [u8; ROW_BLOCK_BYTES]; TILE_ROWS];
    /// Block `at` of row `row`.
    fn row_block(self, row: usize, at: usize) -> &'a [u8; ROW_BLOCK_BYTES];
    /// Blocks of row `row`, from block `first` on.
    fn row_blocks(self, row: usize, first: usize) -> [&'a [u8; ROW_BLOCK_BYTES]; UNROLLED];
    /// All rows of block `at`, if they lie together: rows 0 and 1, rows 2 and 3.
    fn lines(self, at: usize) -> Option<&'a [[u8; 64]; 2]>;
    /// Where the bytes of the tile begin: they are as many and lie together in either arrangement.
    fn start(self) -> *const u8;
}

/// A tile of [`Arrangement::Tiles`].
#[derive(Clone, Copy)]
pub(in crate::x86_64) struct Woven<'a>(&'a [TileBlock]);

impl<'a> Tile<'a> for Woven<'a> {
    #[inline]
    fn new(w: TernaryMatrix<'a>, tile: usize) -> Self {
        Self(w.tile(tile).as_chunks::<ROW_BLOCK_BYTES>().0.as_chunks::<TILE_ROWS>().0)
    }

    #[inline]
    fn part(self, blocks: Range<usize>) -> Self {
        Self(&self.0[blocks])
    }

    #[inline]
    fn len(self) -> usize {
        self.0.len()
    }

    #[inline]
    fn block(self, at: usize) -> [&'a [u8; ROW_BLOCK_BYTES]; TILE_ROWS] {
        self.0[at].each_ref()
    }

    #[inline]
    fn row_block(self, row: usize, at: usize) -> &'a [u8; ROW_BLOCK_BYTES] {
        &self.0[at][row]
    }

    #[inline]
    fn row_blocks(self, row: usize, first: usize) -> [&'a [u8; ROW_BLOCK_BYTES]; UNROLLED] {
        let blocks: &[TileBlock; UNROLLED] = self.0[first..].first_chunk().expect("of the tile");
        blocks.each_ref().map(|block| &block[row])
    }

    #[inline]
    fn lines(self, at: usize) -> Option<&'a [[u8; 64]; 2]> {
        self.0[at].as_flattened().as_chunks().0.first_chunk()
    }

    #[inline]
    fn start(self) -> *const u8 {
        self.0.as_ptr().cast()
    }
}

/// Four rows of [`Arrangement::Rows`], equally long.
#[derive(Clone, Copy)]
pub(in crate::x86_64) struct Plain<'a>([&'a [[u8; ROW_BLOCK_BYTES]]; TILE_ROWS]);

impl<'a> Tile<'a> for Plain<'a> {
    #[inline]
    fn new(w: TernaryMatrix<'a>, tile: usize) -> Self {
        let pieces = w.tile(tile).as_chunks().0;
        let len = pieces.len() / TILE_ROWS;
        Self(array::from_fn(|row| &pieces[row * len..][..len]))
    }

    #[inline]
    fn part(self, blocks: Range<usize>) -> Self {
        let rows = self.0;
        Self(array::from_fn(|row| &rows[row][blocks.clone()]))
    }

    #[inline]
    fn len(self) -> usize {
        self.0[0].len()
    }

    #[inline]
    fn block(self, at: usize) -> [&'a [u8; ROW_BLOCK_BYTES]; TILE_ROWS] {
        let [a, b, c, d] = self.0;
        [&a[at], &b[at], &c[at], &d[at]]
    }

    #[inline]
    fn row_block(self, row: usize, at: usize) -> &'a [u8; ROW_BLOCK_BYTES] {
        &self.0[row][at]
    }

    #[inline]
    fn row_blocks(self, row: usize, first: usize) -> [&'a [u8; ROW_BLOCK_BYTES]; UNROLLED] {
        let blocks: &[_; UNROLLED] = self.0[row][first..].first_chunk().expect("of the tile");
        blocks.each_ref()
    }

    #[inline]
    fn lines(self, _: usize) -> Option<&'a [[u8; 64]; 2]> {
        None
    }

    #[inline]
    fn start(self) -> *const u8 {
        self.0[0].as_ptr().cast()
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn ternary(w: TernaryMatrix<'_>, tiles: Range<usize>, x: Quantised<'_>, y: Columns<'_>) {
    match w.arrangement() {
        Arrangement::Tiles => all_tiles::<Woven<'_>>(w, tiles, x, y),
        Arrangement::Rows => all_tiles::<Plain<'_>>(w, tiles, x, y),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn all_tiles<'a, T: Tile<'a>>(
    w: TernaryMatrix<'a>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    mut y: Columns<'_>,
) {
    let few = w.cols() <= FEW_BLOCKS_MAX * BLOCK_COLS;
    match x.rows() {
        0 => {}
        1 => single_row::<T>(w, tiles, x, y.row(0)),
        2 if few => few_rows::<T, 2>(w, tiles, x, &mut y),
        3 if few => few_rows::<T, 3>(w, tiles, x, &mut y),
        4 if few => few_rows::<T, 4>(w, tiles, x, &mut y),
        5 if few => few_rows::<T, 5>(w, tiles, x, &mut y),
        _ => some_rows::<T>(w, tiles, x, &mut y),
    }
}

/// Asks for block `block` after the place `ahead`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn prefetch_block(ahead: *const u8, block: usize) {
    prefetch(ahead, block * size_of::<TileBlock>());
    prefetch(ahead, block * size_of::<TileBlock>() + 64);
}

/// All tiles by one row of activations: in turn one of the first half and one of the second. Two
/// places in memory are read at once so that the end of a page of one, where the CPU's own prefetchers
/// stop, passes while those of the other run.
#[target_feature(enable = "avx2,fma,f16c")]
fn single_row<'a, T: Tile<'a>>(
    w: TernaryMatrix<'a>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    y: &mut [f32],
) {
    let blocks: &[Activations] = x.row(0).as_chunks().0.as_chunks().0;
    let blocks = &blocks[..w.cols().div_ceil(BLOCK_COLS)];
    let output = Output::new(w, x, 0);
    let half = tiles.len().div_ceil(2);
    let (whole, last) = y.as_chunks_mut();
    for first in 0..half {
        for place in [first, first + half] {
            if place < tiles.len() {
                let at = tiles.start + place;
                // The bytes of a tile are contiguous in either arrangement.
                let ahead = w.tile(at).as_ptr_range().end;
                let totals = one_row(T::new(w, at), ahead, blocks);
                output.put(totals, whole.get_mut(place), last);
            }
        }
    }
}

/// What makes outputs of the sums of a row of activations.
#[derive(Clone, Copy)]
pub(in crate::x86_64) struct Output {
    /// Of the activations.
    sum: i32,
    scale: f32,
}

impl Output {
    pub(in crate::x86_64) fn new(w: TernaryMatrix<'_>, x: Quantised<'_>, i: usize) -> Self {
        Self { sum: x.sum(i), scale: w.scale() / x.scale(i) }
    }

    /// Writes the outputs of a tile: to `whole`, or those there are to `last`, for the last tile of a
    /// matrix may have fewer rows than totals.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    pub(in crate::x86_64) fn put(
        self,
        totals: __m128i,
        whole: Option<&mut [f32; TILE_ROWS]>,
        last: &mut [f32],
    ) {
        let exact = _mm_sub_epi32(totals, _mm_set1_epi32(self.sum));
        let values = store_x4(_mm_mul_ps(_mm_cvtepi32_ps(exact), _mm_set1_ps(self.scale)));
        match whole {
            Some(y) => *y = values,
            None => last.copy_from_slice(&values[..last.len()]),
        }
    }
}

/// One tile by one row of activations. Planes 1 and 3 are used where they lie, as four times their
/// codes, and have sums of their own: that saves two of three shifts.
///
/// A block adds two pairs to either sum: within ±1024 (±1536 for code 3), and four times that for
/// the scaled ones. Those are divided, exactly, and join the others every [`SCALED_BLOCKS`] blocks,
/// within ±20,480 (±30,720); after twice as many blocks the sums, which are within the same bounds,
/// are widened.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn one_row<'a, T: Tile<'a>>(tile: T, ahead: *const u8, x: &[Activations]) -> __m128i {
    let mut totals = [_mm256_setzero_si256(); TILE_ROWS];
    assert_eq!(x.len(), tile.len(), "a row of activations has as many blocks as one of weights");
    let mut first = 0;
    for strip in x.chunks(2 * SCALED_BLOCKS) {
        let mut sums = [_mm256_setzero_si256(); TILE_ROWS];
        let (halves, rest) = strip.as_chunks::<SCALED_BLOCKS>();
        for x in halves {
            add_blocks(tile.part(first..first + SCALED_BLOCKS), ahead, first, x, &mut sums);
            first += SCALED_BLOCKS;
        }
        for x in rest.as_chunks::<1>().0 {
            add_blocks(tile.part(first..first + 1), ahead, first, x, &mut sums);
            first += 1;
        }
        for (total, sum) in totals.iter_mut().zip(sums) {
            *total = _mm256_add_epi32(*total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
        }
    }
    across(totals)
}

/// Adds the products of `N` blocks, at most [`SCALED_BLOCKS`], from the `first` of the tile on.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_blocks<'a, T: Tile<'a>, const N: usize>(
    tile: T,
    ahead: *const u8,
    first: usize,
    x: &[Activations; N],
    sums: &mut Sums,
) {
    let (low, scaled) = (_mm256_set1_epi8(0b11), _mm256_set1_epi8(0b1100));
    let mut scaled_sums = [_mm256_setzero_si256(); TILE_ROWS];
    for (at, x) in x.iter().enumerate() {
        prefetch_block(ahead, first + at);
        let block = tile.block(at);
        let mut x = x;
        for row in 0..TILE_ROWS {
            // Each row loads the activations as operands of its products: to keep them would take
            // four registers more than there are.
            x = anew(x);
            let packed = load_u8(block[row]);
            let shifted = _mm256_srli_epi16::<4>(packed);
            let a = _mm256_maddubs_epi16(_mm256_and_si256(packed, low), load_i8(&x[0]));
            let b = _mm256_maddubs_epi16(_mm256_and_si256(packed, scaled), load_i8(&x[1]));
            let c = _mm256_maddubs_epi16(_mm256_and_si256(shifted, low), load_i8(&x[2]));
            let d = _mm256_maddubs_epi16(_mm256_and_si256(shifted, scaled), load_i8(&x[3]));
            sums[row] = _mm256_add_epi16(sums[row], _mm256_add_epi16(a, c));
            scaled_sums[row] = _mm256_add_epi16(scaled_sums[row], _mm256_add_epi16(b, d));
        }
    }
    for (sum, scaled) in sums.iter_mut().zip(scaled_sums) {
        *sum = _mm256_add_epi16(*sum, _mm256_srai_epi16::<2>(scaled));
    }
}

/// The same place, of which the compiler does not know what was loaded from there.
#[expect(clippy::pointers_in_nomem_asm_block, reason = "nothing is read: there is no instruction")]
#[inline]
fn anew<T>(place: &T) -> &T {
    let mut place: *const T = place;
    // SAFETY: no instruction at all. Not `pure`: then two of them could become one.
    unsafe { asm!("/* {0} */", inout(reg) place, options(nomem, nostack, preserves_flags)) }
    // SAFETY: still the pointer of a reference that lives as long as the one returned.
    unsafe { &*place }
}

/// All tiles by a few rows of activations.
#[target_feature(enable = "avx2,fma,f16c")]
fn few_rows<'a, T: Tile<'a>, const N: usize>(
    w: TernaryMatrix<'a>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    y: &mut Columns<'_>,
) {
    let mut side_by_side = SideBySide::new();
    let copied = side_by_side.places().copy(x, 0..N, 0..w.cols().div_ceil(BLOCK_COLS));
    let blocks: &[Side<N>] = copied.as_chunks().0.as_chunks().0;
    let outputs: [_; N] = array::from_fn(|i| Output::new(w, x, i));
    let mut y = y.rows_mut::<N>(0).map(<[f32]>::as_chunks_mut::<TILE_ROWS>);
    for (position, at) in tiles.enumerate() {
        // The bytes of a tile are contiguous in either arrangement.
        let ahead = w.tile(at).as_ptr().wrapping_byte_add(PREFETCH_BYTES);
        let totals = tile_by(T::new(w, at), ahead, blocks);
        for ((totals, output), (whole, last)) in totals.into_iter().zip(outputs).zip(&mut y) {
            output.put(totals, whole.get_mut(position), last);
        }
    }
}

/// One tile by `N` rows of activations, one row of weights after the other: each register of masked
/// weights serves all of them, and the activations are operands of the products. Planes as in
/// [`one_row`]; sums are widened after [`SCALED_BLOCKS`] blocks, where its bounds hold.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn tile_by<'a, T: Tile<'a>, const N: usize>(
    tile: T,
    ahead: *const u8,
    x: &[Side<N>],
) -> [__m128i; N] {
    assert_eq!(x.len(), tile.len(), "a row of activations has as many blocks as one of weights");
    let masks = Masks::new();
    let mut totals = [[_mm256_setzero_si256(); N]; TILE_ROWS];
    let (fives, rest) = x.as_chunks::<SCALED_BLOCKS>();
    let mut first = 0;
    for five in fives {
        for at in first..first + SCALED_BLOCKS {
            prefetch_block(ahead, at);
        }
        for (row, totals) in totals.iter_mut().enumerate() {
            // Loaded for each row, as in `add_blocks`. Five calls and no loop: it would not be unrolled.
            let (weights, [a, b, c, d, e]) = (tile.row_blocks(row, first), anew(five));
            let mut sums = RowSums::zero();
            sums.add(masks, weights[0], a);
            sums.add(masks, weights[1], b);
            sums.add(masks, weights[2], c);
            sums.add(masks, weights[3], d);
            sums.add(masks, weights[4], e);
            sums.widen(totals);
        }
        first += SCALED_BLOCKS;
    }
    if !rest.is_empty() {
        let part = tile.part(first..tile.len());
        for at in first..tile.len() {
            prefetch_block(ahead, at);
        }
        for (row, totals) in totals.iter_mut().enumerate() {
            let mut sums = RowSums::zero();
            for (at, x) in anew(&rest).iter().enumerate() {
                sums.add(masks, part.row_block(row, at), x);
            }
            sums.widen(totals);
        }
    }
    let mut sums = [_mm_setzero_si128(); N];
    for (i, sum) in sums.iter_mut().enumerate() {
        *sum = across(totals.each_ref().map(|totals| totals[i]));
    }
    sums
}

/// The masks of planes 0 and 2, and of 1 and 3, which are used where they lie, as four times their codes.
/// The compiler does not know their values: it would load them anew for each use, and loads are what
/// the products need.
#[derive(Clone, Copy)]
struct Masks {
    low: __m256i,
    scaled: __m256i,
}

impl Masks {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn new() -> Self {
        let (low, scaled) = (_mm256_set1_epi8(0b11), _mm256_set1_epi8(0b1100));
        Self { low: in_order(low), scaled: in_order(scaled) }
    }
}

/// What some blocks of a row of weights by `N` rows of activations come to, in i16: planes 0 and 2, and
/// four times planes 1 and 3.
#[derive(Clone, Copy)]
struct RowSums<const N: usize> {
    sums: [__m256i; N],
    scaled: [__m256i; N],
}

impl<const N: usize> RowSums<N> {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn zero() -> Self {
        Self { sums: [_mm256_setzero_si256(); N], scaled: [_mm256_setzero_si256(); N] }
    }

    /// Adds one block.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn add(&mut self, masks: Masks, packed: &[u8; ROW_BLOCK_BYTES], x: &Side<N>) {
        let packed = load_u8(packed);
        let shifted = _mm256_srli_epi16::<4>(packed);
        let masked = [
            _mm256_and_si256(packed, masks.low),
            _mm256_and_si256(packed, masks.scaled),
            _mm256_and_si256(shifted, masks.low),
            _mm256_and_si256(shifted, masks.scaled),
        ];
        for (plane, (masked, x)) in masked.into_iter().zip(x).enumerate() {
            let sums = if plane % 2 == 0 { &mut self.sums } else { &mut self.scaled };
            for (sum, x) in sums.iter_mut().zip(x) {
                let products = _mm256_maddubs_epi16(masked, load_i8(x));
                *sum = in_order(_mm256_add_epi16(*sum, products));
            }
        }
    }

    /// Adds them to totals in i32.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn widen(self, totals: &mut [__m256i; N]) {
        for ((total, sum), scaled) in totals.iter_mut().zip(self.sums).zip(self.scaled) {
            let sum = _mm256_add_epi16(sum, _mm256_srai_epi16::<2>(scaled));
            *total = _mm256_add_epi32(*total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
        }
    }
}

/// The same value, which the compiler knows nothing about: otherwise it unrolls the loop around the
/// sums, reorders the additions of several rounds, and needs more registers than there are.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn in_order(mut sum: __m256i) -> __m256i {
    // SAFETY: no instruction at all.
    unsafe { asm!("/* {0} */", inout(ymm_reg) sum, options(pure, nomem, nostack, preserves_flags)) }
    sum
}

/// The sum of the lanes of each.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn across([a, b, c, d]: Sums) -> __m128i {
    let halves = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves))
}
