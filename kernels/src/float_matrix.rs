//! A row-major matrix of 16-bit floats: the embedding and the head. Only the view and the widening
//! of a row; products are elsewhere.

use std::ops::Range;

use crate::scalar::half::{widen_bf16, widen_f16};
use crate::ternary_matrix::LayoutError;

/// The type of a [`FloatMatrix`]'s elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloatKind {
    /// IEEE 754 binary16.
    F16,
    /// The upper half of an IEEE 754 binary32.
    Bf16,
}

/// A matrix of 16-bit floats, `[rows][cols]`: a view that is cheap to copy.
#[derive(Clone, Copy, Debug)]
pub struct FloatMatrix<'a> {
    kind: FloatKind,
    bits: &'a [u16],
    rows: usize,
    cols: usize,
}

impl<'a> FloatMatrix<'a> {
    /// Looks at `bits` as a matrix of `rows` x `cols` elements.
    ///
    /// # Errors
    ///
    /// [`LayoutError::Shape`] and [`LayoutError::Size`].
    pub fn new(
        kind: FloatKind,
        bits: &'a [u16],
        rows: usize,
        cols: usize,
    ) -> Result<Self, LayoutError> {
        let expected = rows
            .checked_mul(cols)
            .filter(|elements| *elements > 0)
            .ok_or(LayoutError::Shape { rows, cols })?;
        if bits.len() != expected {
            return Err(LayoutError::Size { rows, cols, expected, found: bits.len() });
        }
        Ok(Self { kind, bits, rows, cols })
    }

    /// Rows: tokens of the vocabulary.
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Columns: width of the residual stream.
    pub fn cols(self) -> usize {
        self.cols
    }

    /// Type of the elements.
    pub fn kind(self) -> FloatKind {
        self.kind
    }

    /// The bits of a row.
    pub(crate) fn row(self, row: usize) -> &'a [u16] {
        &self.bits[row * self.cols..][..self.cols]
    }

    /// Writes a row as f32, which holds every value of either kind exactly.
    ///
    /// # Panics
    ///
    /// If `row` is not below the row count or `out` is not `cols` long.
    pub fn widen_row(self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.cols, "a row has one element per column");
        self.widen_cols(row, 0..self.cols, out);
    }

    /// Writes some columns of a row as f32.
    #[inline]
    pub(crate) fn widen_cols(self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        let widen = match self.kind {
            FloatKind::F16 => widen_f16,
            FloatKind::Bf16 => widen_bf16,
        };
        for (wide, bits) in out.iter_mut().zip(&self.row(row)[cols]) {
            *wide = widen(*bits);
        }
    }
}
