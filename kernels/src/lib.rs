//! Arithmetic on slices: ternary products, norms, RoPE, attention, quantisers, own elementary
//! functions. No threads and no files; every operation is defined to the bit in
//! `docs/numerics.md`, and every backend returns those bits.
//!
//! # Letters
//!
//! | letter | meaning |
//! |---|---|
//! | `m` | rows of a weight matrix: outputs |
//! | `k` | columns of a weight matrix: inputs |
//! | `n` | rows of activations: tokens |
//! | `w` | weights |
//! | `x` | activations going in |
//! | `y` | activations coming out |
//! | `q` | int8 activations; in attention, one query head |
//! | `s` | activation scale, 127 / absmax |
//! | `d` | dimension of an attention head |
//! | `t` | token slot within a KV block |
//!
//! # Use
//!
//! ```
//! use kernels::Backend;
//!
//! let backend = Backend::detect();
//! let mut y = [0.0; 2];
//! backend.rms_norm(&[3.0, 4.0], &[1.0, 1.0], 0.0, &mut y);
//! assert_eq!(y[1] / y[0], 4.0 / 3.0);
//! ```

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod backend;
mod choice;
mod float_matrix;
mod known_answer;
mod probe;
mod proof;
mod scalar;
mod screen;
mod speed;
mod ternary_columns;
mod ternary_matrix;
mod views;
mod workspace;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(test)]
mod tests;

pub use backend::{Backend, Cut, NotFinite};
pub use choice::{Choice, Refusal};
pub use float_matrix::{FloatKind, FloatMatrix};
pub use known_answer::known_answer;
pub use scalar::noise::{draw_key, gumbel};
pub use screen::{
    Kept, SCREEN_POSITIONS_MAX, ScreenInput, ScreenMatrix, ScreenQuery, Threshold,
    pack_screen_group, screen_cols,
};
pub use speed::Operation;
pub use ternary_columns::{ColumnPacker, TernaryColumns, padded_rows};
pub use ternary_matrix::{Arrangement, LayoutError, TernaryMatrix, pack_tile, padded_cols};
pub use views::{
    ATTENTION_STATE_HEADER, AttentionState, Columns, KV_BLOCK_TOKENS, KvBlock, KvBlockMut,
    Quantised,
};
pub use workspace::Workspace;

/// Revision of the numerics of `docs/numerics.md`. It changes when any result may change by a
/// bit, and is part of the numerics class: stages of different revisions never share a pipeline.
pub const KERNEL_REVISION: u32 = 2;
