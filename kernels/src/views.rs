//! What kernels read and write beside weights: int8 activations, columns of an output, KV blocks
//! and the running state of attention. Shapes are checked here, once, so that no kernel checks
//! again.
#![expect(unsafe_code, reason = "threads write disjoint columns of one output")]

use std::marker::PhantomData;
use std::ops::Range;

use crate::ternary_matrix::{BLOCK_COLS, padded_cols};

/// Tokens in a KV block.
pub const KV_BLOCK_TOKENS: usize = 32;

/// Floats that precede the accumulator in the memory of an [`AttentionState`]: maximum and sum.
pub const ATTENTION_STATE_HEADER: usize = 2;

/// The int8 activations of `n` rows with their scales and sums, as
/// [`Backend::quantise`](crate::Backend::quantise) gives them.
#[derive(Clone, Copy, Debug)]
pub struct Quantised<'a> {
    q: &'a [i8],
    stride: usize,
    scale: &'a [f32],
    sum: &'a [i32],
}

impl<'a> Quantised<'a> {
    /// `q` is `[n][stride]`, each row padded with zeros; `scale` (s = 127 / absmax) and `sum` are
    /// `[n]`. Rows padded with anything but zeros, or a sum that is not the row's, give wrong
    /// products.
    ///
    /// # Panics
    ///
    /// If the lengths disagree or `stride` is not a multiple of [`padded_cols`]`(1)`.
    pub fn new(q: &'a [i8], stride: usize, scale: &'a [f32], sum: &'a [i32]) -> Self {
        assert!(stride.is_multiple_of(BLOCK_COLS), "stride {stride} is not whole blocks");
        assert_eq!(scale.len(), sum.len(), "every row has a scale and a sum");
        assert_eq!(q.len(), scale.len() * stride, "every row has {stride} activations");
        Self { q, stride, scale, sum }
    }

    /// Rows: tokens.
    pub fn rows(self) -> usize {
        self.scale.len()
    }

    /// Rows `rows` of them.
    ///
    /// # Panics
    ///
    /// If there are no such rows.
    pub fn part(self, rows: Range<usize>) -> Self {
        let q = &self.q[rows.start * self.stride..rows.end * self.stride];
        Self { q, stride: self.stride, scale: &self.scale[rows.clone()], sum: &self.sum[rows] }
    }

    /// All codes, `[rows][stride]`, and the stride.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn codes(self) -> (&'a [i8], usize) {
        (self.q, self.stride)
    }

    /// Whether a matrix of `cols` columns can be applied to these rows.
    pub(crate) fn fits(self, cols: usize) -> bool {
        self.stride >= padded_cols(cols)
    }

    /// Whether padding is zero and every sum is its row's, for a matrix of `cols` columns.
    pub(crate) fn is_consistent(self, cols: usize) -> bool {
        (0..self.rows()).all(|i| {
            let (q, padding) = self.row(i)[..padded_cols(cols)].split_at(cols);
            let sum: i32 = q.iter().map(|q| i32::from(*q)).sum();
            sum == self.sum(i) && padding.iter().all(|q| *q == 0)
        })
    }

    /// Row `i`, padding included.
    pub(crate) fn row(self, i: usize) -> &'a [i8] {
        &self.q[i * self.stride..][..self.stride]
    }

    /// The scale s of row `i`.
    pub(crate) fn scale(self, i: usize) -> f32 {
        self.scale[i]
    }

    /// The sum of row `i`.
    pub(crate) fn sum(self, i: usize) -> i32 {
        self.sum[i]
    }
}

/// Some columns of a row-major matrix `[n][m]`, writable. Several threads may own different columns
/// of one matrix.
#[derive(Debug)]
pub struct Columns<'a> {
    /// Row 0, column 0 of the whole matrix.
    start: *mut f32,
    n: usize,
    m: usize,
    cols: Range<usize>,
    whole: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `Columns` is an exclusive borrow of its elements, like `&mut [f32]`.
unsafe impl Send for Columns<'_> {}

impl<'a> Columns<'a> {
    /// Columns `cols` of `whole`, which is `[n][m]`.
    ///
    /// # Panics
    ///
    /// If `whole` is not whole rows of `m`, or `cols` does not lie within a row.
    pub fn new(whole: &'a mut [f32], m: usize, cols: Range<usize>) -> Self {
        assert!(m > 0 && whole.len().is_multiple_of(m), "{} is not rows of {m}", whole.len());
        let n = whole.len() / m;
        // SAFETY: `whole` is borrowed exclusively for 'a and holds n * m floats.
        unsafe { Self::from_raw(whole.as_mut_ptr(), n, m, cols) }
    }

    /// Columns `cols` of the matrix `[n][m]` that starts at `start`.
    ///
    /// # Safety
    ///
    /// * `start` points to `n * m` initialised floats that live for `'a`.
    /// * For `'a`, nothing else reads or writes columns `cols` of these rows, and nothing holds a
    ///   reference that covers them.
    ///
    /// # Panics
    ///
    /// If `cols` does not lie within a row.
    pub unsafe fn from_raw(start: *mut f32, n: usize, m: usize, cols: Range<usize>) -> Self {
        assert!(cols.start <= cols.end && cols.end <= m, "columns {cols:?} of {m}");
        Self { start, n, m, cols, whole: PhantomData }
    }

    /// Rows: tokens.
    pub fn rows(&self) -> usize {
        self.n
    }

    /// Which columns of the whole matrix these are.
    pub fn cols(&self) -> Range<usize> {
        self.cols.clone()
    }

    /// The same columns of rows `rows`.
    ///
    /// # Panics
    ///
    /// If there are no such rows.
    pub fn part(&mut self, rows: Range<usize>) -> Columns<'_> {
        assert!(rows.start <= rows.end && rows.end <= self.n, "rows {rows:?} of {}", self.n);
        // SAFETY: the rows are within the matrix.
        let start = unsafe { self.start.add(rows.start * self.m) };
        // SAFETY: `start` points to the rows' floats, of which these columns are ours alone; the
        // borrow of `self` keeps it from handing them out meanwhile.
        unsafe { Columns::from_raw(start, rows.len(), self.m, self.cols.clone()) }
    }

    /// These columns of row `i`.
    ///
    /// # Panics
    ///
    /// If `i` is not below the row count.
    pub fn row(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.n, "row {i} of {}", self.n);
        // SAFETY: row i is below n and its columns within m, so the place is within the matrix.
        let row = unsafe { self.start.add(i * self.m + self.cols.start) };
        // SAFETY: the elements lie within the matrix, and `from_raw`'s caller gave them to us alone;
        // the borrow of `self` keeps two rows from being out at once.
        unsafe { std::slice::from_raw_parts_mut(row, self.cols.len()) }
    }

    /// These columns of rows `first` to `first + N`.
    ///
    /// # Panics
    ///
    /// If there are no such rows.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn rows_mut<const N: usize>(&mut self, first: usize) -> [&mut [f32]; N] {
        assert!(first + N <= self.n, "{N} rows from {first} of {}", self.n);
        std::array::from_fn(|i| {
            // SAFETY: the row is below n and its columns within m, so the place is in the matrix.
            let row = unsafe { self.start.add((first + i) * self.m + self.cols.start) };
            // SAFETY: as in `row`; rows are m apart and the columns at most m, so no two overlap.
            unsafe { std::slice::from_raw_parts_mut(row, self.cols.len()) }
        })
    }
}

/// The keys and values of one KV head for the 32 tokens of a block, in the KV type.
///
/// `k` is `[dimension][32]`, so that a vector holds one element of several tokens; `v` is
/// `[32][dimension]`. f16 is given by its bits.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "k and v are described above")]
pub enum KvBlock<'a> {
    /// IEEE 754 binary16.
    F16 { k: &'a [u16], v: &'a [u16] },
    /// IEEE 754 binary32.
    F32 { k: &'a [f32], v: &'a [f32] },
}

/// A [`KvBlock`] to be written.
#[derive(Debug)]
#[expect(missing_docs, reason = "k and v are described at KvBlock")]
pub enum KvBlockMut<'a> {
    /// IEEE 754 binary16.
    F16 { k: &'a mut [u16], v: &'a mut [u16] },
    /// IEEE 754 binary32.
    F32 { k: &'a mut [f32], v: &'a mut [f32] },
}

impl KvBlock<'_> {
    /// Whether keys and values have the length of `dimension`.
    pub(crate) fn fits(self, dimension: usize) -> bool {
        let (k, v) = match self {
            Self::F16 { k, v } => (k.len(), v.len()),
            Self::F32 { k, v } => (k.len(), v.len()),
        };
        k == dimension * KV_BLOCK_TOKENS && v == dimension * KV_BLOCK_TOKENS
    }
}

impl KvBlockMut<'_> {
    /// The same block for a shorter time, so that it can be written again.
    pub fn reborrow(&mut self) -> KvBlockMut<'_> {
        match self {
            Self::F16 { k, v } => KvBlockMut::F16 { k, v },
            Self::F32 { k, v } => KvBlockMut::F32 { k, v },
        }
    }

    /// The same block, to be read.
    pub fn as_block(&self) -> KvBlock<'_> {
        match self {
            Self::F16 { k, v } => KvBlock::F16 { k, v },
            Self::F32 { k, v } => KvBlock::F32 { k, v },
        }
    }
}

/// What attention knows after some blocks of a segment: maximum of the scores, sum of the weights
/// relative to it, and the weighted sum of the values, `[dimension]`.
#[derive(Debug)]
pub struct AttentionState<'a> {
    pub(crate) max: &'a mut f32,
    pub(crate) sum: &'a mut f32,
    pub(crate) acc: &'a mut [f32],
}

impl<'a> AttentionState<'a> {
    /// The state kept in `memory`: [`ATTENTION_STATE_HEADER`] floats, then `dimension` ones. It is
    /// as it was left; [`Self::reset`] begins a segment.
    ///
    /// # Panics
    ///
    /// If `memory` has no room for a dimension of at least one.
    pub fn over(memory: &'a mut [f32]) -> Self {
        assert!(memory.len() > ATTENTION_STATE_HEADER, "no room for an attention state");
        let (header, acc) = memory.split_at_mut(ATTENTION_STATE_HEADER);
        let (max, sum) = header.split_at_mut(1);
        Self { max: &mut max[0], sum: &mut sum[0], acc }
    }

    /// Begins a segment: (-inf, 0, 0).
    pub fn reset(&mut self) {
        *self.max = f32::NEG_INFINITY;
        *self.sum = 0.0;
        self.acc.fill(0.0);
    }

    /// Dimension of the head.
    pub fn dimension(&self) -> usize {
        self.acc.len()
    }
}
