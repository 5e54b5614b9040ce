//! The screen of a head: a copy of its rows in six bits, with what a bound on every logit needs.
//! What the bytes mean and how they are packed; `bound` says which rows can be left out, and
//! `docs/screening.md` proves it.
//!
//! A weight is coded as `c` in 0..=63 and stands for `step (c - 31.5)`, with a step for each row. The
//! upper four bits `h = c >> 2` alone stand for `step (4 h - 30)`. Rows come in *groups* of 64, whose
//! bytes are contiguous:
//!
//! ```text
//! group   = numbers | high plane | low plane
//! numbers = 64 steps | 64 errors of the upper four bits | 64 errors of all six | 64 norms   f32
//! plane   = tile 0 | … | tile 15                         one per 4 rows
//! tile    = block 0 | block 1 | …
//! block   = row 0 | row 1 | row 2 | row 3                32 bytes each
//!
//! byte b of a row of a block
//!   high plane, 64 columns:    bits 3..0 column b,  7..4 column b + 32
//!   low plane, 128 columns:    bits 1..0 column b,  3..2 b + 32,  5..4 b + 64,  7..6 b + 96
//! ```
//!
//! Errors are upper bounds of ‖w - what the codes stand for‖, norms of ‖w‖. Columns past the last
//! have the code 0 and are multiplied by zeros only; rows past the last are all zeros.

mod bound;

use crate::ternary_matrix::LayoutError;
pub(crate) use bound::judge;
pub use bound::{Kept, SCREEN_POSITIONS_MAX, ScreenInput, ScreenQuery, Threshold};

/// Rows of a group: one bit each of a 64-bit mask.
pub(crate) const GROUP_ROWS: usize = 64;
/// Rows of a tile: one load of activations serves four rows.
pub(crate) const TILE_ROWS: usize = 4;
/// Tiles of a group.
pub(crate) const TILES: usize = GROUP_ROWS / TILE_ROWS;
/// Bytes of a row in a block.
pub(crate) const ROW_BYTES: usize = 32;
/// Columns are padded to whole blocks of the low plane.
const COLS_UNIT: usize = 4 * ROW_BYTES;
/// Bytes of the numbers of a group.
const NUMBER_BYTES: usize = 4 * GROUP_ROWS * size_of::<f32>();
/// Most columns: the sum of so many codes by int8 activations, at most 63 * 128 each, is below 2^31.
const COLS_MAX: usize = 1 << 18;
/// Half of the greatest code: what stands for zero.
const CENTRE: f32 = 31.5;
/// Greatest code.
const CODE_MAX: f32 = 63.0;

/// One number of every row of a group, little endian.
pub(crate) type Numbers<'a> = &'a [[u8; 4]; GROUP_ROWS];

/// A packed screen of `rows` x `cols` weights: a view that is cheap to copy.
#[derive(Clone, Copy, Debug)]
pub struct ScreenMatrix<'a> {
    bytes: &'a [u8],
    rows: usize,
    cols: usize,
}

impl<'a> ScreenMatrix<'a> {
    /// Name of the layout.
    pub const LAYOUT: &'static str = "screen-4bit-2bit-group64";
    /// Rows of a group.
    pub const GROUP_ROWS: usize = GROUP_ROWS;

    /// Bytes of a group of rows of `cols` columns; a multiple of 64.
    pub fn group_bytes(cols: usize) -> usize {
        NUMBER_BYTES + GROUP_ROWS * (screen_cols(cols) / 2 + screen_cols(cols) / 4)
    }

    /// Bytes of the screen of a matrix; `None` if it has no elements or too many columns.
    pub fn packed_bytes(rows: usize, cols: usize) -> Option<usize> {
        if rows == 0 || cols == 0 || cols > COLS_MAX {
            return None;
        }
        rows.div_ceil(GROUP_ROWS).checked_mul(Self::group_bytes(cols))
    }

    /// Looks at `bytes` as the screen of a matrix of `rows` x `cols`.
    ///
    /// # Errors
    ///
    /// [`LayoutError::Shape`] and [`LayoutError::Size`].
    pub fn new(bytes: &'a [u8], rows: usize, cols: usize) -> Result<Self, LayoutError> {
        let expected = Self::packed_bytes(rows, cols).ok_or(LayoutError::Shape { rows, cols })?;
        if bytes.len() != expected {
            return Err(LayoutError::Size { rows, cols, expected, found: bytes.len() });
        }
        Ok(Self { bytes, rows, cols })
    }

    /// Rows: tokens of the vocabulary.
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Columns: width of the residual stream.
    pub fn cols(self) -> usize {
        self.cols
    }

    /// Bytes of a tile of the high plane; the low plane's has half of them.
    pub(crate) fn high_tile_bytes(self) -> usize {
        TILE_ROWS * screen_cols(self.cols) / 2
    }

    /// The rows of a group that there are, as a mask.
    pub(crate) fn valid(self, group: usize) -> u64 {
        let rows = GROUP_ROWS.min(self.rows - group * GROUP_ROWS);
        u64::MAX >> (GROUP_ROWS - rows)
    }

    /// Steps, errors of four bits, errors of six bits, norms of a group.
    pub(crate) fn numbers(self, group: usize) -> [Numbers<'a>; 4] {
        let (floats, _) = self.group(group)[..NUMBER_BYTES].as_chunks::<4>();
        let (numbers, _) = floats.as_chunks::<GROUP_ROWS>();
        [&numbers[0], &numbers[1], &numbers[2], &numbers[3]]
    }

    /// A tile of the high plane.
    pub(crate) fn high(self, group: usize, tile: usize) -> &'a [u8] {
        let bytes = self.high_tile_bytes();
        &self.group(group)[NUMBER_BYTES + tile * bytes..][..bytes]
    }

    /// A tile of the low plane.
    pub(crate) fn low(self, group: usize, tile: usize) -> &'a [u8] {
        let bytes = self.high_tile_bytes() / 2;
        let start = NUMBER_BYTES + TILES * self.high_tile_bytes();
        &self.group(group)[start + tile * bytes..][..bytes]
    }

    fn group(self, group: usize) -> &'a [u8] {
        let bytes = Self::group_bytes(self.cols);
        &self.bytes[group * bytes..][..bytes]
    }
}

/// Columns of a row of screened activations: `cols` rounded up to whole blocks.
pub fn screen_cols(cols: usize) -> usize {
    cols.next_multiple_of(COLS_UNIT)
}

/// Packs up to 64 rows of weights, each of `cols`, as the group `out`. The same rows give the same
/// bytes on every machine.
///
/// # Panics
///
/// If there are more rows, one has another length, or `out` is not [`ScreenMatrix::group_bytes`].
pub fn pack_screen_group(rows: &[&[f32]], cols: usize, out: &mut [u8]) {
    assert!(rows.len() <= GROUP_ROWS, "{} rows in a group", rows.len());
    assert!(rows.iter().all(|row| row.len() == cols), "a row has {cols} weights");
    assert_eq!(out.len(), ScreenMatrix::group_bytes(cols), "the bytes of a group");
    #[cfg(target_arch = "x86_64")]
    if let Ok(token) = crate::x86_64::avx2::Avx2::detect() {
        return token.pack(rows, cols, out);
    }
    pack(rows, cols, out);
}

/// The definition of [`pack_screen_group`], compiled once more for wider vectors.
#[inline(always)]
pub(crate) fn pack(rows: &[&[f32]], cols: usize, out: &mut [u8]) {
    out.fill(0);
    let (numbers, planes) = out.split_at_mut(NUMBER_BYTES);
    let (high, low) = planes.split_at_mut(GROUP_ROWS * screen_cols(cols) / 2);
    let (numbers, _) = numbers.as_chunks_mut::<4>();
    for (row, weights) in rows.iter().enumerate() {
        let step = best_step(weights);
        let (tile, row_in_tile) = (row / TILE_ROWS, row % TILE_ROWS);
        let tile_high = &mut high[tile * TILE_ROWS * screen_cols(cols) / 2..];
        let tile_low = &mut low[tile * TILE_ROWS * screen_cols(cols) / 4..];
        let mut squares = [[0.0; 8]; 3];
        for (vector, weights) in weights.chunks(ROW_BYTES).enumerate() {
            let mut codes = [0; ROW_BYTES];
            encode(weights, step, &mut codes, &mut squares);
            let high_block = TILE_ROWS * (vector / 2) + row_in_tile;
            let low_block = TILE_ROWS * (vector / 4) + row_in_tile;
            let (high_shift, low_shift) = (4 * (vector % 2), 2 * (vector % 4));
            let high = &mut tile_high[high_block * ROW_BYTES..][..ROW_BYTES];
            let low = &mut tile_low[low_block * ROW_BYTES..][..ROW_BYTES];
            for ((code, high), low) in codes.iter().zip(high).zip(low) {
                *high |= (code >> 2) << high_shift;
                *low |= (code & 3) << low_shift;
            }
        }
        for (number, lanes) in squares.iter().enumerate() {
            let bound = round_up(lanes.iter().sum::<f64>().sqrt() * bound::INFLATION);
            numbers[(number + 1) * GROUP_ROWS + row] = bound.to_le_bytes();
        }
        numbers[row] = step.to_le_bytes();
    }
}

/// The codes of up to 32 weights; adds the squares of what four bits leave, of what six bits leave
/// and of the weights.
#[inline(always)]
fn encode(weights: &[f32], step: f32, codes: &mut [u8; ROW_BYTES], squares: &mut [[f64; 8]; 3]) {
    let inverse = 1.0 / step;
    for (codes, weights) in codes.chunks_mut(8).zip(weights.chunks(8)) {
        for (lane, (place, weight)) in codes.iter_mut().zip(weights).enumerate() {
            let code = code(*weight, inverse);
            *place = code as u8;
            // Exact products; each difference and each square rounds once.
            let (w, step, upper) = (f64::from(*weight), f64::from(step), *place & !3);
            let four = w - step * (f64::from(upper) - 30.0);
            let six = w - step * f64::from(code - CENTRE);
            squares[0][lane] += four * four;
            squares[1][lane] += six * six;
            squares[2][lane] += w * w;
        }
    }
}

/// The code of a weight, as a float.
#[inline(always)]
fn code(weight: f32, inverse: f32) -> f32 {
    // Adding 2^23 rounds to an integer. A NaN becomes some code, and the row's errors are NaN.
    const ROUND: f32 = 8_388_608.0;
    let place = (weight * inverse + CENTRE).clamp(0.0, CODE_MAX);
    (place + ROUND) - ROUND
}

/// The step of a row, out of a few, that leaves the smallest error: cutting off the ends of a bell
/// makes the middle finer, and a row with a few large weights needs its whole range.
#[inline(always)]
fn best_step(weights: &[f32]) -> f32 {
    /// Half ranges in standard deviations; the first is the best for normal weights.
    const DEVIATIONS: [f32; 3] = [3.35, 4.2, 6.0];
    let greatest = weights.iter().fold(0.0f32, |greatest, w| greatest.max(w.abs()));
    if greatest == 0.0 || !greatest.is_finite() {
        return f32::MIN_POSITIVE;
    }
    let square = |w: f32| (w / greatest) * (w / greatest);
    let deviation = greatest * (lane_sum(weights, square) / weights.len() as f32).sqrt();
    let whole = greatest / CENTRE;
    let steps = DEVIATIONS.map(|range| range * deviation / CENTRE);
    let error = |step: f32| {
        let inverse = 1.0 / step;
        lane_sum(weights, |w| {
            let error = w * inverse - (code(w, inverse) - CENTRE);
            error * error
        }) * (step / greatest)
            * (step / greatest)
    };
    let mut best = (error(whole), whole);
    for step in steps.into_iter().filter(|step| *step < whole && *step >= f32::MIN_POSITIVE) {
        let error = error(step);
        if error < best.0 {
            best = (error, step);
        }
    }
    best.1.max(f32::MIN_POSITIVE)
}

/// A sum in sixteen lanes, for vectors: only a choice hangs on it.
#[inline(always)]
fn lane_sum(weights: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (chunks, rest) = weights.as_chunks::<16>();
    for chunk in chunks {
        for (lane, w) in lanes.iter_mut().zip(chunk) {
            *lane += term(*w);
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|w| term(*w)).sum::<f32>()
}

/// The least f32 that is not below `x`.
fn round_up(x: f64) -> f32 {
    let nearest = x as f32;
    if f64::from(nearest) < x { nearest.next_up() } else { nearest }
}
