//! The packed form of a ternary matrix, on disk and in memory alike: what its bytes mean, how they
//! are checked, packed and unpacked. Products are elsewhere.
//!
//! The unit is a row's *block*, 32 bytes for 128 columns:
//!
//! ```text
//! byte b  = bits 1..0  column b               of the block, as trit + 1
//!           bits 3..2  column b + 32
//!           bits 5..4  column b + 64
//!           bits 7..6  column b + 96
//! ```
//!
//! Four rows make a *tile*, whose bytes are contiguous. An [`Arrangement`] says in which order they
//! hold the blocks, (row, block):
//!
//! ```text
//! Tiles   (0, 0) (1, 0) (2, 0) (3, 0)  (0, 1) (1, 1) (2, 1) (3, 1)  …
//! Rows    (0, 0) (0, 1) (0, 2) …       (1, 0) (1, 1) (1, 2) …       …
//! ```
//!
//! Columns past the last and rows past the last hold zero trits (code 1, byte 0x55).

use std::fmt;
use std::ops::Range;

/// Columns in a block: four bit planes of [`ROW_BLOCK_BYTES`].
pub(crate) const BLOCK_COLS: usize = 128;
/// Bytes of one row in a block: one AVX2 register.
pub(crate) const ROW_BLOCK_BYTES: usize = BLOCK_COLS / 4;
/// Rows in a tile. One load of activations then serves four rows, and four accumulators stay in
/// registers with room to spare on a machine of sixteen.
pub(crate) const TILE_ROWS: usize = 4;
/// Most columns that a matrix may have. `2 * 128 * cols` stays below `i32::MAX`, so that no sum of
/// products, even of corrupt codes, leaves an `i32` (3 * 128 * 2^22 = 1.6e9).
pub(crate) const MAX_COLS: usize = 1 << 22;

/// The order of the blocks of a tile. The size is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrangement {
    /// Block by block, four rows each: products with every row read one stream.
    Tiles,
    /// Row by row: a row that is not needed is not read.
    Rows,
}

impl Arrangement {
    /// Its name in a shard's metadata.
    pub fn layout(self) -> &'static str {
        match self {
            Self::Tiles => "ternary-2bit-tile4x128",
            Self::Rows => "ternary-2bit-row128",
        }
    }

    /// Bytes from one block of a row to the next.
    fn stride(self) -> usize {
        match self {
            Self::Tiles => TILE_ROWS * ROW_BLOCK_BYTES,
            Self::Rows => ROW_BLOCK_BYTES,
        }
    }

    /// Where a row of a tile begins in the bytes of the tile, for a matrix of `cols` columns.
    fn row_start(self, tile_row: usize, cols: usize) -> usize {
        match self {
            Self::Tiles => tile_row * ROW_BLOCK_BYTES,
            Self::Rows => tile_row * cols.div_ceil(BLOCK_COLS) * ROW_BLOCK_BYTES,
        }
    }
}

/// A packed ternary matrix and its scale: a view that is cheap to copy and whose sizes are right.
///
/// The element at (row, column) stands for `trit * scale`, `trit` being -1, 0 or 1.
#[derive(Clone, Copy, Debug)]
pub struct TernaryMatrix<'a> {
    bytes: &'a [u8],
    arrangement: Arrangement,
    rows: usize,
    cols: usize,
    scale: f32,
}

/// Why bytes are not the packed matrix they were said to be.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutError {
    /// A matrix without rows or columns, or too large to address.
    Shape {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
    },
    /// The number of bytes (of elements, for a float matrix) does not agree with the shape.
    Size {
        /// Rows of the shape.
        rows: usize,
        /// Columns of the shape.
        cols: usize,
        /// What the shape needs.
        expected: usize,
        /// What was given.
        found: usize,
    },
    /// The two bits 11 stand for no trit.
    Code {
        /// Row of the first such code; a row of the padding if it is not below the row count.
        row: usize,
        /// Its column.
        col: usize,
    },
    /// A place outside the shape holds something other than a zero trit.
    Padding {
        /// Row of the first such place.
        row: usize,
        /// Its column.
        col: usize,
    },
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape { rows, cols } => write!(f, "a matrix of {rows}x{cols} cannot be used"),
            Self::Size { rows, cols, expected, found } => {
                write!(f, "a matrix of {rows}x{cols} needs a length of {expected}, found {found}")
            }
            Self::Code { row, col } => write!(f, "invalid trit code 3 at row {row}, column {col}"),
            Self::Padding { row, col } => {
                write!(f, "padding at row {row}, column {col} is not a zero trit")
            }
        }
    }
}

impl std::error::Error for LayoutError {}

impl<'a> TernaryMatrix<'a> {
    /// Rows in a tile.
    pub const TILE_ROWS: usize = TILE_ROWS;

    /// Looks at `bytes` as a matrix of `rows` x `cols`. Takes constant time: codes are not looked
    /// at (see [`Self::check_codes`]); invalid ones give defined sums, never undefined behaviour.
    ///
    /// # Errors
    ///
    /// [`LayoutError::Shape`] and [`LayoutError::Size`].
    pub fn new(
        bytes: &'a [u8],
        arrangement: Arrangement,
        rows: usize,
        cols: usize,
        scale: f32,
    ) -> Result<Self, LayoutError> {
        let expected = Self::packed_bytes(rows, cols).ok_or(LayoutError::Shape { rows, cols })?;
        if bytes.len() != expected {
            return Err(LayoutError::Size { rows, cols, expected, found: bytes.len() });
        }
        Ok(Self { bytes, arrangement, rows, cols, scale })
    }

    /// Bytes of a packed matrix in either arrangement, a multiple of 64; `None` for a shape that no matrix may have.
    pub fn packed_bytes(rows: usize, cols: usize) -> Option<usize> {
        if rows == 0 || cols == 0 || cols > MAX_COLS {
            return None;
        }
        rows.div_ceil(TILE_ROWS).checked_mul(Self::tile_bytes(cols))
    }

    /// Bytes of one tile of a matrix of `cols` columns, a multiple of 64.
    ///
    /// # Panics
    ///
    /// If `cols` is more than a matrix may have.
    pub fn tile_bytes(cols: usize) -> usize {
        assert!(cols <= MAX_COLS, "a matrix of {cols} columns has no tiles");
        cols.div_ceil(BLOCK_COLS) * TILE_ROWS * ROW_BLOCK_BYTES
    }

    /// The order of its blocks.
    pub fn arrangement(self) -> Arrangement {
        self.arrangement
    }

    /// Rows: outputs.
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Columns: inputs.
    pub fn cols(self) -> usize {
        self.cols
    }

    /// What a trit of 1 stands for.
    pub fn scale(self) -> f32 {
        self.scale
    }

    /// Blocks of a row, the last of which may have fewer columns.
    pub(crate) fn blocks(self) -> usize {
        self.cols.div_ceil(BLOCK_COLS)
    }

    /// Tiles, the last of which may have fewer rows.
    pub fn tiles(self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// The rows that a range of tiles holds.
    ///
    /// # Panics
    ///
    /// If `tiles` is reversed or ends past the last tile.
    pub fn tile_rows(self, tiles: Range<usize>) -> Range<usize> {
        assert!(tiles.start <= tiles.end && tiles.end <= self.tiles(), "tiles {tiles:?}");
        (tiles.start * TILE_ROWS).min(self.rows)..(tiles.end * TILE_ROWS).min(self.rows)
    }

    /// The bytes of four rows, in the order of the arrangement.
    pub(crate) fn tile(self, tile: usize) -> &'a [u8] {
        let tile_bytes = Self::tile_bytes(self.cols);
        &self.bytes[tile * tile_bytes..][..tile_bytes]
    }

    /// The bytes of a row, which may be one of the padding, from its first block to its last, and
    /// how many bytes after a block of [`ROW_BLOCK_BYTES`] begins the next one begins.
    #[inline]
    pub(crate) fn row_at(self, row: usize) -> (&'a [u8], usize) {
        let stride = self.arrangement.stride();
        let start = self.arrangement.row_start(row % TILE_ROWS, self.cols);
        let len = (self.cols.div_ceil(BLOCK_COLS) - 1) * stride + ROW_BLOCK_BYTES;
        (&self.tile(row / TILE_ROWS)[start..][..len], stride)
    }

    /// The two bits at a row and a column, which may lie in the padding: trit + 1.
    pub(crate) fn code(self, row: usize, col: usize) -> u8 {
        let (bytes, stride) = self.row_at(row);
        let (block, col) = (col / BLOCK_COLS, col % BLOCK_COLS);
        let (plane, byte) = (col / ROW_BLOCK_BYTES, col % ROW_BLOCK_BYTES);
        bytes[block * stride + byte] >> (2 * plane) & 0b11
    }

    /// Looks at every code.
    ///
    /// # Errors
    ///
    /// [`LayoutError::Code`] and [`LayoutError::Padding`], with the first place found.
    pub fn check_codes(self) -> Result<(), LayoutError> {
        for tile in 0..self.tiles() {
            // Both bits of a code set: bit 0 of `b & b >> 1`.
            let both = self.tile(tile).iter().fold(0, |both, b| both | (b & (b >> 1)));
            let whole = self.cols.is_multiple_of(BLOCK_COLS) && (tile + 1) * TILE_ROWS <= self.rows;
            if both & 0x55 != 0 || !whole {
                self.check_tile(tile)?;
            }
        }
        Ok(())
    }

    /// Looks at the codes of one tile, one by one, padding included.
    fn check_tile(self, tile: usize) -> Result<(), LayoutError> {
        for row in tile * TILE_ROWS..(tile + 1) * TILE_ROWS {
            for col in 0..padded_cols(self.cols) {
                let code = self.code(row, col);
                if code == 3 {
                    return Err(LayoutError::Code { row, col });
                }
                if code != 1 && (row >= self.rows || col >= self.cols) {
                    return Err(LayoutError::Padding { row, col });
                }
            }
        }
        Ok(())
    }

    /// Writes the trits of a row.
    ///
    /// # Panics
    ///
    /// If `row` is not below the row count or `out` is not `cols` long.
    pub fn unpack_row(self, row: usize, out: &mut [i8]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.cols, "a row has one trit per column");
        for (block, out) in out.chunks_mut(BLOCK_COLS).enumerate() {
            out.copy_from_slice(&self.unpack_block(row, block)[..out.len()]);
        }
    }

    /// The trits of a block of a row, padding included.
    #[inline]
    pub(crate) fn unpack_block(self, row: usize, block: usize) -> [i8; BLOCK_COLS] {
        let (bytes, stride) = self.row_at(row);
        let bytes = &bytes[block * stride..][..ROW_BLOCK_BYTES];
        let mut trits = [0; BLOCK_COLS];
        for (trits, shift) in trits.chunks_mut(ROW_BLOCK_BYTES).zip([0, 2, 4, 6]) {
            for (trit, byte) in trits.iter_mut().zip(bytes) {
                *trit = (byte >> shift & 0b11) as i8 - 1;
            }
        }
        trits
    }
}

/// Columns that a row of int8 activations must have room for: whole blocks.
pub const fn padded_cols(cols: usize) -> usize {
    cols.next_multiple_of(BLOCK_COLS)
}

/// Packs one tile of up to [`TernaryMatrix::TILE_ROWS`] rows of trits, each of `cols`. Missing rows
/// and the columns up to a whole block become zero trits. The tiles of a matrix follow one another.
///
/// # Panics
///
/// If there are too many rows, a row is not `cols` long, a value is not -1, 0 or 1, or `out` is not
/// [`TernaryMatrix::tile_bytes`] long.
pub fn pack_tile(arrangement: Arrangement, rows: &[&[i8]], cols: usize, out: &mut [u8]) {
    assert!(rows.len() <= TILE_ROWS, "a tile has at most {TILE_ROWS} rows");
    assert!(rows.iter().all(|row| row.len() == cols), "every row must have {cols} columns");
    assert_eq!(out.len(), TernaryMatrix::tile_bytes(cols), "a tile of {cols} columns");
    out.fill(0b01_01_01_01);
    for (tile_row, row) in rows.iter().enumerate() {
        let mut all_valid = true;
        let row_bytes = &mut out[arrangement.row_start(tile_row, cols)..];
        for (bytes, trits) in row_bytes.chunks_mut(arrangement.stride()).zip(row.chunks(BLOCK_COLS))
        {
            let bytes = &mut bytes[..ROW_BLOCK_BYTES];
            for (plane, trits) in trits.chunks(ROW_BLOCK_BYTES).enumerate() {
                for (byte, trit) in bytes.iter_mut().zip(trits) {
                    let code = trit.wrapping_add(1) as u8;
                    all_valid &= code <= 2;
                    // The place holds code 1, so this exchanges 1 for `code`.
                    *byte ^= ((code & 0b11) ^ 1) << (2 * plane);
                }
            }
        }
        assert!(all_valid, "row {tile_row} holds something other than -1, 0 and 1");
    }
}
