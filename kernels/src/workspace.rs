//! The memory of an operation that cannot keep what it makes in registers or on a stack.
#![cfg_attr(
    not(target_arch = "x86_64"),
    expect(dead_code, reason = "no backend of other CPUs looks sums up")
)]

use std::collections::TryReserveError;
use std::fmt;

/// Rows of weights that an operation takes at a time: enough that what they share costs little, few
/// enough that what each needs stays in a second-level cache of half a MiB.
pub(crate) const WORKSPACE_ROWS: usize = 2048;
/// Rows of weights that are taken at a time for a panel of tokens: so many that what is prepared for a
/// panel costs a tenth of the time.
pub(crate) const PANEL_ROWS: usize = 1024;
/// Tokens of a panel: two registers of 16-bit lanes.
pub(crate) const PANEL_TOKENS: usize = 32;
/// Activations, 16 bits each, of a block of columns and every token of a panel.
pub(crate) const PANEL_LEN: usize = 128 * PANEL_TOKENS;
/// Sums of 16 bits in the tables of eight groups of four columns, and as many bytes more as an offset
/// of 16 bits can lead on.
pub(crate) const TABLES_LEN: usize = 8 * 81 * PANEL_TOKENS + (1 << 15);
/// Where in their tables the entries of eight groups begin, 16 bits each.
pub(crate) type Offsets = [u64; 2];
/// Offsets of a block's 32 groups for every row.
pub(crate) const OFFSETS_LEN: usize = 4 * WORKSPACE_ROWS;
/// Bytes of codes that are unpacked before they are multiplied: a strip of some rows, so that it and the
/// activations of some tokens stay in the first-level cache.
pub(crate) const CODES_LEN: usize = 16 << 10;
/// Sums for every row and token.
pub(crate) const SUMS_LEN: usize = WORKSPACE_ROWS * PANEL_TOKENS;

/// Working memory for [`Backend::ternary_many`](crate::Backend::ternary_many): one for each thread,
/// made once. Nothing in it outlives a call.
pub struct Workspace {
    /// `[column of a block][token]`
    pub(crate) activations: Lines<i16>,
    /// `[group][value][token]`
    pub(crate) tables: Lines<i16>,
    /// `[pass][row]`
    pub(crate) offsets: Lines<Offsets>,
    /// `[row][token]`, of a block
    pub(crate) sums: Lines<i16>,
    /// `[row][token]`, of all blocks; of a band `[token][row]`
    pub(crate) totals: Lines<i32>,
    /// `[64 columns][row][column]` of a band, unpacked
    pub(crate) codes: Lines<u8>,
}

impl Workspace {
    /// Rows of activations that are done together where that pays: a panel.
    pub const PANEL: usize = PANEL_TOKENS;

    /// Bytes that a workspace takes.
    pub const BYTES: usize =
        2 * (PANEL_LEN + TABLES_LEN + SUMS_LEN) + 16 * OFFSETS_LEN + 4 * SUMS_LEN + CODES_LEN;

    /// Allocates [`Self::BYTES`] and up to six cache lines more.
    ///
    /// # Errors
    ///
    /// If there is not so much memory.
    pub fn try_new() -> Result<Self, TryReserveError> {
        Ok(Self {
            activations: Lines::new(PANEL_LEN)?,
            tables: Lines::new(TABLES_LEN)?,
            offsets: Lines::new(OFFSETS_LEN)?,
            sums: Lines::new(SUMS_LEN)?,
            totals: Lines::new(SUMS_LEN)?,
            codes: Lines::new(CODES_LEN)?,
        })
    }

    /// The same, for proofs and benches: a MiB, without which there is nothing to try.
    ///
    /// # Panics
    ///
    /// If there is not so much memory.
    pub fn new() -> Self {
        Self::try_new().expect("memory for one workspace")
    }
}

impl Default for Workspace {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workspace").finish_non_exhaustive()
    }
}

/// Numbers from the beginning of a cache line on: no vector of them crosses one.
pub(crate) struct Lines<T> {
    values: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy + Default> Lines<T> {
    fn new(len: usize) -> Result<Self, TryReserveError> {
        let spare = 64 / size_of::<T>();
        let mut values = Vec::new();
        values.try_reserve_exact(len + spare)?;
        values.resize(len + spare, T::default());
        let start = values.as_ptr().align_offset(64).min(spare);
        Ok(Self { values, start, len })
    }

    /// All of them.
    pub(crate) fn get(&mut self) -> &mut [T] {
        &mut self.values[self.start..][..self.len]
    }
}
