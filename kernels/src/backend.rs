//! The door to every kernel: which implementation runs, and what callers must hand it. Each method
//! checks its shapes once; behind it nothing is checked again.

use std::fmt;
use std::ops::Range;

#[cfg(target_arch = "aarch64")]
use crate::aarch64::neon::{Neon, NeonDotprod, neon};
use crate::float_matrix::FloatMatrix;
use crate::scalar;
use crate::screen::{Kept, ScreenInput, ScreenMatrix, Threshold};
use crate::speed::{Mix, Operation};
use crate::ternary_columns::TernaryColumns;
use crate::ternary_matrix::{TILE_ROWS, TernaryMatrix};
use crate::views::{
    ATTENTION_STATE_HEADER, AttentionState, Columns, KV_BLOCK_TOKENS, KvBlock, KvBlockMut,
    Quantised,
};
#[cfg(target_arch = "x86_64")]
use crate::workspace::PANEL_ROWS;
use crate::workspace::Workspace;
#[cfg(target_arch = "x86_64")]
use crate::x86_64::{amx::Amx, avx2::Avx2, avx512::Avx512, avxvnni::AvxVnni};

/// An implementation of the kernels that this machine can run; its existence is the proof. Cheap to
/// copy: choose one at start-up and hand it down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend(pub(crate) Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    AvxVnni(AvxVnni),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Amx(Amx),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    #[cfg(target_arch = "aarch64")]
    NeonDotprod(NeonDotprod),
    /// The fastest for each operation: what to use if nobody says otherwise.
    Mixed(&'static Mix),
    /// The definition without one operation, which leaves its outputs as they are.
    #[cfg(test)]
    Without(&'static str),
}

/// An activation is infinite or not a number, so its row cannot be quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotFinite {
    /// The first such element of the row.
    pub index: usize,
}

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "activation {} of the row is not finite", self.index)
    }
}

impl std::error::Error for NotFinite {}

/// How a product is best cut into parts: see [`Backend::cut`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Rows of activations at a time, at most.
    pub tokens: usize,
    /// Rows of weights of every part but the last: a multiple of it, and of
    /// [`TernaryMatrix::TILE_ROWS`].
    pub rows: usize,
    /// So many rows of weights at a time, if what they share is dear: about as many, and as even as
    /// threads.
    pub sized: Option<usize>,
}

/// Calls the function of the chosen implementation: of the fastest for this operation and number of rows,
/// if they are said.
macro_rules! dispatch {
    ($backend:expr, $($module:ident)::+, $function:ident ( $($argument:expr),* ), $operation:expr, $n:expr) => {
        dispatch!(@ $backend.fastest($operation, $n), $($module)::+, $function($($argument),*))
    };
    ($backend:expr, $($module:ident)::+, $function:ident ( $($argument:expr),* )) => {
        dispatch!(@ $backend.base(), $($module)::+, $function($($argument),*))
    };
    (@ $backend:expr, $($module:ident)::+, $function:ident ( $($argument:expr),* )) => {
        match $backend.0 {
            Kind::Mixed(_) => unreachable!("a mix is of backends that are none"),
            Kind::Scalar => scalar::$($module)::+::$function($($argument),*),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(token) => token.$function($($argument),*),
            #[cfg(target_arch = "x86_64")]
            Kind::AvxVnni(token) => token.$function($($argument),*),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(token) => token.$function($($argument),*),
            #[cfg(target_arch = "x86_64")]
            Kind::Amx(token) => token.$function($($argument),*),
            #[cfg(target_arch = "aarch64")]
            Kind::Neon(token) => neon!(token, $($module)::+, $function($($argument),*)),
            #[cfg(target_arch = "aarch64")]
            Kind::NeonDotprod(token) => neon!(token, $($module)::+, $function($($argument),*)),
            #[cfg(test)]
            Kind::Without(stringify!($function)) => crate::choice::tests::Nothing::nothing(),
            #[cfg(test)]
            Kind::Without(_) => scalar::$($module)::+::$function($($argument),*),
        }
    };
}

/// Panics if the shapes of a ternary product disagree.
fn check_ternary(w: TernaryMatrix<'_>, tiles: &Range<usize>, x: Quantised<'_>, y: &Columns<'_>) {
    assert!(x.fits(w.cols()), "activations are narrower than {} columns", w.cols());
    assert_eq!(y.rows(), x.rows(), "one row of output per row of activations");
    assert_eq!(y.cols().len(), w.tile_rows(tiles.clone()).len(), "one column per weight row");
    debug_assert!(x.is_consistent(w.cols()), "padding is zero and sums are those of the rows");
}

impl Backend {
    /// Its name in flags and records: `auto` for the fastest of each operation, else one of `scalar`,
    /// `avx2`, `avxvnni`, `avx512`, `amx`, `neon`, `neon-dotprod`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Mixed(_) => "auto",
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::AvxVnni(_) => "avxvnni",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Amx(_) => "amx",
            #[cfg(target_arch = "aarch64")]
            Kind::Neon(_) => "neon",
            #[cfg(target_arch = "aarch64")]
            Kind::NeonDotprod(_) => "neon-dotprod",
            #[cfg(test)]
            Kind::Without(_) => "flawed",
        }
    }

    /// The widest instruction set that it uses, by name.
    pub fn isa(self) -> &'static str {
        self.base().name()
    }

    /// Who does what has no time of its own.
    pub(crate) fn base(self) -> Self {
        match self.0 {
            Kind::Mixed(mix) => mix.base,
            _ => self,
        }
    }

    /// Who does `operation` with `n` rows: itself, or the fastest.
    pub fn fastest(self, operation: Operation, n: usize) -> Self {
        match self.0 {
            Kind::Mixed(mix) => mix.of(operation, n),
            _ => self,
        }
    }
}

/// Linear layers.
impl Backend {
    /// Quantises a row: s = 127 / max(absmax, 1e-5), q = clamp(round-half-even(x s), -128, 127).
    /// `q` may be longer than `x` (see [`padded_cols`](crate::padded_cols)); the rest becomes zero.
    /// Returns s and the sum of `q`.
    ///
    /// # Errors
    ///
    /// [`NotFinite`] if an element is infinite or NaN; `q` is then as it was or half written.
    ///
    /// # Panics
    ///
    /// If `q` is shorter than `x`.
    pub fn quantise(self, x: &[f32], q: &mut [i8]) -> Result<(f32, i32), NotFinite> {
        assert!(q.len() >= x.len(), "no room for {} activations", x.len());
        dispatch!(self, quantise, quantise(x, q))
    }

    /// `y[i][r] = (Σ_j trit[r][j] q[i][j]) as f32 * (scale / s[i])` for the rows r of `tiles` and
    /// every row i of `x`. `y` are the columns of [`TernaryMatrix::tile_rows`].
    ///
    /// # Panics
    ///
    /// If the shapes disagree.
    pub fn ternary(
        self,
        w: TernaryMatrix<'_>,
        tiles: Range<usize>,
        x: Quantised<'_>,
        y: Columns<'_>,
    ) {
        check_ternary(w, &tiles, x, &y);
        dispatch!(self, fused, ternary(w, tiles, x, y), Operation::Ternary, x.rows());
    }

    /// How a product with `n` rows of activations is best cut into calls of [`Self::ternary_many`].
    pub fn cut(self, n: usize) -> Cut {
        let all = Cut { tokens: n, rows: TILE_ROWS, sized: None };
        match self.fastest(Operation::Ternary, n).0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(token) if token.looks_up(n) => {
                Cut { tokens: Workspace::PANEL, sized: Some(PANEL_ROWS), ..all }
            }
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(token) => Cut { rows: token.band_rows(n).unwrap_or(TILE_ROWS), ..all },
            #[cfg(target_arch = "x86_64")]
            Kind::Amx(token) => Cut { rows: token.band_rows(n).unwrap_or(TILE_ROWS), ..all },
            _ => all,
        }
    }

    /// What [`Self::ternary`] gives, with memory to be faster with many rows.
    ///
    /// # Panics
    ///
    /// If the shapes disagree.
    pub fn ternary_many(
        self,
        w: TernaryMatrix<'_>,
        tiles: Range<usize>,
        x: Quantised<'_>,
        y: Columns<'_>,
        workspace: &mut Workspace,
    ) {
        let backend = self.fastest(Operation::Ternary, x.rows());
        match (backend.0, workspace) {
            #[cfg(target_arch = "x86_64")]
            (Kind::Avx2(token), workspace) => {
                check_ternary(w, &tiles, x, &y);
                token.ternary_many(w, tiles, x, y, workspace);
            }
            #[cfg(target_arch = "x86_64")]
            (Kind::Avx512(token), workspace) => {
                check_ternary(w, &tiles, x, &y);
                token.ternary_many(w, tiles, x, y, workspace);
            }
            #[cfg(target_arch = "x86_64")]
            (Kind::Amx(token), workspace) => {
                check_ternary(w, &tiles, x, &y);
                token.ternary_many(w, tiles, x, y, workspace);
            }
            _ => backend.ternary(w, tiles, x, y),
        }
    }

    /// `y[i][r]` = row r of `w` · `x[i]` by the 16-lane rule, for the rows r of `rows`. `x` is
    /// `[n][cols]`.
    ///
    /// # Panics
    ///
    /// If the shapes disagree.
    pub fn head(self, w: FloatMatrix<'_>, rows: Range<usize>, x: &[f32], y: Columns<'_>) {
        assert!(rows.start <= rows.end && rows.end <= w.rows(), "rows {rows:?} of {}", w.rows());
        assert_eq!(x.len(), y.rows() * w.cols(), "one row of activations per row of output");
        assert_eq!(y.cols().len(), rows.len(), "one column of output per row of weights");
        let n = y.rows();
        dispatch!(self, fused, head(w, rows, x, y), Operation::Head, n);
    }

    /// `y[i]` = row `rows[i]` of `w` · `x` by the 16-lane rule: what [`Backend::head`] gives for
    /// rows that lie anywhere.
    ///
    /// # Panics
    ///
    /// If the shapes disagree or a row is not below the row count.
    pub fn head_rows(self, w: FloatMatrix<'_>, rows: &[u32], x: &[f32], y: &mut [f32]) {
        assert!(rows.iter().all(|row| (*row as usize) < w.rows()), "a row of {}", w.rows());
        assert_eq!(x.len(), w.cols(), "one activation per column");
        assert_eq!(rows.len(), y.len(), "one output per row");
        dispatch!(self, screen, head_rows(w, rows, x, y));
    }

    /// Whether [`Backend::screen`] takes less time than the rows that it saves: not where only the
    /// definition of it runs beside quick products.
    pub fn screening_pays(self) -> bool {
        match self.base().0 {
            #[cfg(target_arch = "aarch64")]
            Kind::Neon(_) | Kind::NeonDotprod(_) => false,
            _ => true,
        }
    }

    /// Which rows of group `group` of a head may matter: bit r of `kept[i].rows` is clear only if row
    /// `64 group + r` of the head has, with the activations of position i of `x`, a finite logit that
    /// is below `thresholds[i]`, whose score is if it has noise. Returns the bytes that were read.
    ///
    /// # Panics
    ///
    /// If the shapes disagree.
    pub fn screen(
        self,
        w: ScreenMatrix<'_>,
        group: usize,
        x: ScreenInput<'_>,
        thresholds: &[Threshold<'_>],
        kept: &mut [Kept],
    ) -> usize {
        assert!(group < w.rows().div_ceil(ScreenMatrix::GROUP_ROWS), "group {group}");
        assert_eq!(x.cols(), w.cols(), "activations of another width");
        assert_eq!(thresholds.len(), x.positions(), "one threshold per position");
        assert_eq!(kept.len(), x.positions(), "one verdict per position");
        dispatch!(
            self,
            screen,
            screen(w, group, x, thresholds, kept),
            Operation::Screen,
            x.positions()
        )
    }
}

/// Linear layers of one row of activations with many zeros: exactly the products of
/// [`Backend::ternary`], and weights that are multiplied by zero, or not wanted, are not read.
impl Backend {
    /// `y[i]` = what [`Backend::ternary`] gives for weight row `rows[i]` and the one row of `x`. Fast
    /// for ascending rows of a matrix in [`Arrangement::Rows`](crate::Arrangement::Rows).
    ///
    /// # Panics
    ///
    /// If the shapes disagree or a row is not the matrix's.
    pub fn ternary_rows(self, w: TernaryMatrix<'_>, rows: &[u32], x: Quantised<'_>, y: &mut [f32]) {
        assert_eq!(x.rows(), 1, "rows are skipped for one row of activations");
        assert!(x.fits(w.cols()), "activations are narrower than {} columns", w.cols());
        assert_eq!(y.len(), rows.len(), "one output per weight row");
        assert!(rows.iter().all(|row| (*row as usize) < w.rows()), "rows of {}", w.rows());
        debug_assert!(x.is_consistent(w.cols()), "padding is zero and the sum is that of the row");
        dispatch!(self, sparse, ternary_rows(w, rows, x, y), Operation::Rows, 1);
    }

    /// Adds `Σ_j (trit[r][j] + 1) q[j]` over the columns j of `columns`, with the one row of `x`, to
    /// `sums[r]` for every row r of `w`, padding included: exact, so columns may be added in any order
    /// and to several rows of sums, see [`Self::end_columns`]. Fast for ascending columns and many at
    /// a time.
    ///
    /// # Panics
    ///
    /// If the shapes disagree or a column is not the matrix's.
    pub fn ternary_columns(
        self,
        w: TernaryColumns<'_>,
        columns: &[u32],
        x: Quantised<'_>,
        sums: &mut [i32],
    ) {
        assert_eq!(x.rows(), 1, "columns are skipped for one row of activations");
        assert!(x.fits(w.cols()), "activations are narrower than {} columns", w.cols());
        assert_eq!(sums.len(), w.padded_rows(), "one sum per row");
        let known = |column: &u32| (*column as usize) < w.cols();
        assert!(columns.iter().all(known), "columns of {}", w.cols());
        dispatch!(self, sparse, ternary_columns(w, columns, x, sums), Operation::Columns, 1);
    }

    /// `y[r]` = what [`Backend::ternary`] gives for the rows r of `rows` and the one row of `x`, if
    /// every column whose activation is not zero was added once to one of the rows of sums
    /// `[n][TernaryColumns::padded_rows]`, which were zero before. No sum leaves i32: in all within
    /// 2^22 columns (`ternary_matrix.rs`) times 3 · 128 even for the invalid code 3.
    ///
    /// # Panics
    ///
    /// If the shapes disagree.
    pub fn end_columns(
        self,
        w: TernaryColumns<'_>,
        sums: &[i32],
        rows: Range<usize>,
        x: Quantised<'_>,
        y: &mut [f32],
    ) {
        assert_eq!(x.rows(), 1, "columns are skipped for one row of activations");
        assert!(rows.start <= rows.end && rows.end <= w.rows(), "rows {rows:?} of {}", w.rows());
        let is_whole = !sums.is_empty() && sums.len().is_multiple_of(w.padded_rows());
        assert!(is_whole, "rows of one sum per row");
        assert_eq!(y.len(), rows.len(), "one output per row");
        scalar::sparse::end_columns(w, sums, rows, x, y);
    }

    /// Writes the places of the elements above 0, counted from `first`, to the front of `out`,
    /// ascending; returns how many there are. NaN is not above 0. The rest of `out` may change.
    ///
    /// # Panics
    ///
    /// If `out` is shorter than `x`.
    pub fn positive(self, x: &[f32], first: u32, out: &mut [u32]) -> usize {
        assert!(out.len() >= x.len(), "no room for {} places", x.len());
        dispatch!(self, sparse, positive(x, first, out))
    }

    /// Writes the places of the elements that are not 0 to the front of `out`, ascending; returns how
    /// many there are. The rest of `out` may change.
    ///
    /// # Panics
    ///
    /// If `out` is shorter than `q`.
    pub fn nonzero(self, q: &[i8], out: &mut [u32]) -> usize {
        assert!(out.len() >= q.len(), "no room for {} places", q.len());
        dispatch!(self, sparse, nonzero(q, out))
    }
}

/// Norms, gates and positions.
impl Backend {
    /// `y = (x r) weight` with `r = 1 / sqrt(Σ x² / n + eps)`, the sum in blocks of 256 columns.
    ///
    /// # Panics
    ///
    /// If the lengths disagree or are zero.
    pub fn rms_norm(self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        assert!(!x.is_empty(), "the norm of nothing");
        assert_eq!(x.len(), weight.len(), "one weight per element");
        assert_eq!(x.len(), y.len(), "one output per element");
        dispatch!(self, reduce, rms_norm(x, weight, eps, y));
    }

    /// `y = (r r) up` with `r = gate > 0 ? gate : +0`: a NaN gate counts as closed.
    ///
    /// # Panics
    ///
    /// If the lengths disagree.
    pub fn squared_relu_mul(self, gate: &[f32], up: &[f32], y: &mut [f32]) {
        assert_eq!(gate.len(), up.len(), "one gate per element");
        assert_eq!(gate.len(), y.len(), "one output per element");
        dispatch!(self, elementwise, squared_relu_mul(gate, up, y));
    }

    /// `y = (gate / (1 + exp(-gate))) up`.
    ///
    /// # Panics
    ///
    /// If the lengths disagree.
    pub fn silu_mul(self, gate: &[f32], up: &[f32], y: &mut [f32]) {
        assert_eq!(gate.len(), up.len(), "one gate per element");
        assert_eq!(gate.len(), y.len(), "one output per element");
        dispatch!(self, elementwise, silu_mul(gate, up, y));
    }

    /// `x += y`.
    ///
    /// # Panics
    ///
    /// If the lengths disagree.
    pub fn add(self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "one addend per element");
        dispatch!(self, elementwise, add(x, y));
    }

    /// Cosine and sine of `position as f32 * frequency` for every frequency.
    ///
    /// # Panics
    ///
    /// If the lengths disagree.
    pub fn rope_table(
        self,
        inverse_frequencies: &[f32],
        position: u32,
        cos: &mut [f32],
        sin: &mut [f32],
    ) {
        assert_eq!(inverse_frequencies.len(), cos.len(), "one cosine per frequency");
        assert_eq!(inverse_frequencies.len(), sin.len(), "one sine per frequency");
        dispatch!(self, elementwise, rope_table(inverse_frequencies, position, cos, sin));
    }

    /// Rotates one head in place: element j of the first half with element j of the second.
    ///
    /// # Panics
    ///
    /// If `x` is not twice as long as `cos` and `sin`.
    pub fn rope(self, x: &mut [f32], cos: &[f32], sin: &[f32]) {
        assert_eq!(x.len(), 2 * cos.len(), "one cosine per pair");
        assert_eq!(cos.len(), sin.len(), "one sine per cosine");
        dispatch!(self, elementwise, rope(x, cos, sin));
    }
}

/// Functions and sums that other operations and the sampler are made of.
impl Backend {
    /// `y = e^x`; exp(0) = 1, results below 2^-126 are +0.
    ///
    /// # Panics
    ///
    /// If the lengths disagree.
    pub fn exp(self, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), y.len(), "one output per element");
        dispatch!(self, elementwise, map_exp(x, y));
    }

    /// `y = ln x`; ln(0) = -inf, NaN below.
    ///
    /// # Panics
    ///
    /// If the lengths disagree.
    pub fn ln(self, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), y.len(), "one output per element");
        dispatch!(self, elementwise, map_ln(x, y));
    }

    /// `y = sin x`.
    ///
    /// # Panics
    ///
    /// If the lengths disagree.
    pub fn sin(self, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), y.len(), "one output per element");
        dispatch!(self, elementwise, map_sin(x, y));
    }

    /// `y = cos x`.
    ///
    /// # Panics
    ///
    /// If the lengths disagree.
    pub fn cos(self, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), y.len(), "one output per element");
        dispatch!(self, elementwise, map_cos(x, y));
    }

    /// `Σ a b` by the 16-lane rule; +0 for nothing.
    ///
    /// # Panics
    ///
    /// If the lengths disagree.
    pub fn dot(self, a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len(), "one factor per element");
        dispatch!(self, reduce, dot(a, b))
    }

    /// Writes an upper bound of [`gumbel`](crate::gumbel)`(key, token)` for each of the tokens from
    /// `first` on; the same bits on every backend.
    pub fn noise(self, key: u64, first: u32, out: &mut [f32]) {
        dispatch!(self, noise, noise(key, first, out));
    }

    /// `Σ x` by the 16-lane rule; +0 for nothing.
    pub fn sum(self, x: &[f32]) -> f32 {
        dispatch!(self, reduce, sum(x))
    }
}

/// Attention. The caller walks the blocks: for each segment of 256 tokens a state that is reset,
/// then [`Backend::attend_block`] in ascending order; the state of segment 0 takes in those of
/// segments 1, 2, … by [`Backend::attend_merge`]; [`Backend::attend_finish`] ends it.
impl Backend {
    /// Rounds a key and a value of one head to the KV type and writes them to slot `slot`.
    ///
    /// # Panics
    ///
    /// If the shapes disagree or `slot` is not below 32.
    pub fn store_kv(self, k: &[f32], v: &[f32], slot: usize, block: KvBlockMut<'_>) {
        assert!(slot < KV_BLOCK_TOKENS, "slot {slot} of {KV_BLOCK_TOKENS}");
        assert_eq!(k.len(), v.len(), "a key and a value have one dimension");
        assert!(block.as_block().fits(k.len()), "the block is not of dimension {}", k.len());
        dispatch!(self, attention, store_kv(k, v, slot, block));
    }

    /// Attends with `q` (one head, after RoPE) to the first `filled` tokens of a block; the other
    /// slots have no influence, whatever they hold.
    ///
    /// # Panics
    ///
    /// If the shapes disagree or `filled` is not 1 to 32.
    pub fn attend_block(
        self,
        q: &[f32],
        block: KvBlock<'_>,
        filled: usize,
        state: &mut AttentionState<'_>,
    ) {
        assert!((1..=KV_BLOCK_TOKENS).contains(&filled), "{filled} of {KV_BLOCK_TOKENS} tokens");
        assert!(block.fits(q.len()), "the block is not of dimension {}", q.len());
        assert_eq!(state.dimension(), q.len(), "the state is of another dimension");
        dispatch!(self, fused, attend_block(q, block, filled, state));
    }

    /// [`Self::attend_block`] for several rows at once: query heads of one KV head, and tokens. `q`
    /// is `[n][d]`, `filled` `[n]`, and `states` `[n][ATTENTION_STATE_HEADER + d]`, each laid out as
    /// [`AttentionState::over`] takes it. The block `next`, if there is one, will be attended to
    /// next: it is asked for early, and has no other influence.
    ///
    /// # Panics
    ///
    /// If the shapes disagree, there are no rows, or one of `filled` is not 1 to 32.
    pub fn attend_group(
        self,
        q: &[f32],
        block: KvBlock<'_>,
        next: Option<KvBlock<'_>>,
        filled: &[u8],
        states: &mut [f32],
    ) {
        let n = filled.len();
        assert!(n > 0 && q.len().is_multiple_of(n), "{} floats for {n} rows", q.len());
        let most = filled.iter().fold(0, |most, filled| most.max(usize::from(*filled)));
        assert!(most <= KV_BLOCK_TOKENS && !filled.contains(&0), "{filled:?} of the tokens");
        let d = q.len() / n;
        assert!(block.fits(d), "the block is not of dimension {d}");
        assert!(d > 0 && states.len() == n * (ATTENTION_STATE_HEADER + d), "one state per row");
        dispatch!(
            self,
            fused,
            attend_group(q, block, next, filled, states),
            Operation::Attention,
            n
        );
    }

    /// Takes the state of the next segment into that of the segments before it.
    ///
    /// # Panics
    ///
    /// If the dimensions disagree.
    pub fn attend_merge(self, into: &mut AttentionState<'_>, other: &AttentionState<'_>) {
        assert_eq!(into.dimension(), other.dimension(), "states of different dimensions");
        dispatch!(self, attention, attend_merge(into, other));
    }

    /// `out = acc / sum`: the head's output.
    ///
    /// # Panics
    ///
    /// If the dimensions disagree.
    pub fn attend_finish(self, state: &AttentionState<'_>, out: &mut [f32]) {
        assert_eq!(state.dimension(), out.len(), "the output is of another dimension");
        dispatch!(self, attention, attend_finish(state, out));
    }
}
