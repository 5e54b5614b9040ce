//! The form of a ternary matrix whose columns can be skipped: what its bytes mean, how they are
//! checked, packed and unpacked. Products are elsewhere.
//!
//! Columns follow one another, each contiguous, in *chunks* of 256 rows: a cache line. Threads share
//! a product by columns.
//!
//! ```text
//! matrix  = column 0 | column 1 | …
//! column  = chunk 0 | chunk 1 | …              one per 256 rows
//! chunk   = block 0 | block 1                  32 bytes each, 128 rows
//! byte b  = bits 1..0  row b                   of the block, as trit + 1
//!           bits 3..2  row b + 32
//!           bits 5..4  row b + 64
//!           bits 7..6  row b + 96
//! ```
//!
//! Rows past the last hold zero trits (code 1, byte 0x55).

use crate::ternary_matrix::{LayoutError, MAX_COLS};

/// Rows in a block: four bit planes of [`BLOCK_BYTES`].
pub(crate) const BLOCK_ROWS: usize = 4 * BLOCK_BYTES;
/// Bytes of a block: one AVX2 register.
pub(crate) const BLOCK_BYTES: usize = 32;
/// Blocks in a chunk.
pub(crate) const CHUNK_BLOCKS: usize = 2;
/// Rows in a chunk, which is a cache line.
pub(crate) const CHUNK_ROWS: usize = CHUNK_BLOCKS * BLOCK_ROWS;

/// A ternary matrix by columns and its scale: a view that is cheap to copy and whose sizes are
/// right.
///
/// The element at (row, column) stands for `trit * scale`, `trit` being -1, 0 or 1.
#[derive(Clone, Copy, Debug)]
pub struct TernaryColumns<'a> {
    bytes: &'a [u8],
    rows: usize,
    cols: usize,
    scale: f32,
}

impl<'a> TernaryColumns<'a> {
    /// Name of this layout in a shard's metadata.
    pub const LAYOUT: &'static str = "ternary-2bit-column256";

    /// Looks at `bytes` as a matrix of `rows` x `cols`. Takes constant time: codes are not looked
    /// at (see [`Self::check_codes`]); invalid ones give defined sums, never undefined behaviour.
    ///
    /// # Errors
    ///
    /// [`LayoutError::Shape`] and [`LayoutError::Size`].
    pub fn new(bytes: &'a [u8], rows: usize, cols: usize, scale: f32) -> Result<Self, LayoutError> {
        let expected = Self::packed_bytes(rows, cols).ok_or(LayoutError::Shape { rows, cols })?;
        if bytes.len() != expected {
            return Err(LayoutError::Size { rows, cols, expected, found: bytes.len() });
        }
        Ok(Self { bytes, rows, cols, scale })
    }

    /// Bytes of a packed matrix, a multiple of 64; `None` for a shape that no matrix may have.
    pub fn packed_bytes(rows: usize, cols: usize) -> Option<usize> {
        if rows == 0 || cols == 0 || cols > MAX_COLS {
            return None;
        }
        column_bytes(rows).checked_mul(cols)
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

    /// Rows with those that fill the last chunk: how many sums a product has.
    pub fn padded_rows(self) -> usize {
        padded_rows(self.rows)
    }

    /// Every block, `[columns][blocks of a column]`, and how many blocks a column has.
    pub(crate) fn blocks(self) -> (&'a [[u8; BLOCK_BYTES]], usize) {
        (self.bytes.as_chunks().0, self.padded_rows() / BLOCK_ROWS)
    }

    /// Looks at every code.
    ///
    /// # Errors
    ///
    /// [`LayoutError::Code`] and [`LayoutError::Padding`], with the first place found.
    pub fn check_codes(self) -> Result<(), LayoutError> {
        let whole = self.rows.is_multiple_of(CHUNK_ROWS);
        for (col, bytes) in self.bytes.chunks_exact(column_bytes(self.rows)).enumerate() {
            // Both bits of a code set: bit 0 of `b & b >> 1`.
            let both = bytes.iter().fold(0, |both, b| both | (b & (b >> 1)));
            if both & 0x55 == 0 && whole {
                continue;
            }
            for row in 0..self.padded_rows() {
                let (byte, shift) = place(row);
                match bytes[byte] >> shift & 0b11 {
                    3 => return Err(LayoutError::Code { row, col }),
                    code if code != 1 && row >= self.rows => {
                        return Err(LayoutError::Padding { row, col });
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Writes the trits of a column.
    ///
    /// # Panics
    ///
    /// If `col` is not below the column count or `out` is not `rows` long.
    pub fn unpack_column(self, col: usize, out: &mut [i8]) {
        assert!(col < self.cols, "column {col} of {}", self.cols);
        assert_eq!(out.len(), self.rows, "a column has one trit per row");
        let bytes = &self.bytes[col * column_bytes(self.rows)..][..column_bytes(self.rows)];
        for (row, trit) in out.iter_mut().enumerate() {
            let (byte, shift) = place(row);
            *trit = (bytes[byte] >> shift & 0b11) as i8 - 1;
        }
    }

    /// The packed bytes.
    pub fn bytes(self) -> &'a [u8] {
        self.bytes
    }
}

/// Packs a matrix by columns from its rows, in any order and number at a time.
#[derive(Debug)]
pub struct ColumnPacker {
    bytes: Vec<u8>,
    rows: usize,
    cols: usize,
}

impl ColumnPacker {
    /// A matrix of `rows` x `cols` of zero trits; `None` for a shape that no matrix may have. Holds
    /// [`TernaryColumns::packed_bytes`].
    pub fn new(rows: usize, cols: usize) -> Option<Self> {
        let bytes = vec![0b01_01_01_01; TernaryColumns::packed_bytes(rows, cols)?];
        Some(Self { bytes, rows, cols })
    }

    /// Puts the trits of a row in place of zeros.
    ///
    /// # Panics
    ///
    /// If `row` is not below the row count, `trits` is not one per column, or one of them is not -1,
    /// 0 or 1.
    pub fn row(&mut self, row: usize, trits: &[i8]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(trits.len(), self.cols, "a row has one trit per column");
        let (byte, shift) = place(row);
        let mut all_valid = true;
        for (column, trit) in self.bytes.chunks_exact_mut(column_bytes(self.rows)).zip(trits) {
            let code = trit.wrapping_add(1) as u8;
            all_valid &= code <= 2;
            // The place holds code 1, so this exchanges 1 for `code`.
            column[byte] ^= ((code & 0b11) ^ 1) << shift;
        }
        assert!(all_valid, "row {row} holds something other than -1, 0 and 1");
    }

    /// The packed bytes.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// [`TernaryColumns::padded_rows`] of a matrix of `rows` rows.
pub const fn padded_rows(rows: usize) -> usize {
    rows.div_ceil(CHUNK_ROWS) * CHUNK_ROWS
}

/// Bytes of a column of `rows` rows.
fn column_bytes(rows: usize) -> usize {
    rows.div_ceil(CHUNK_ROWS) * CHUNK_BLOCKS * BLOCK_BYTES
}

/// The byte of a column that holds a row, and the lowest of its bits.
fn place(row: usize) -> (usize, usize) {
    let (block, row) = (row / BLOCK_ROWS, row % BLOCK_ROWS);
    (block * BLOCK_BYTES + row % BLOCK_BYTES, row / BLOCK_BYTES * 2)
}
