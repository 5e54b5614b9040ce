//! Ternary products in AMX tiles. One instruction multiplies 64 columns of 16 rows of weights by up to
//! 16 rows of activations and adds them to 32-bit sums, exactly, as `vpdpbusd` does; so what it takes to
//! unpack the codes is what matters, and they are unpacked as for `vpdpbusd` (`avx512/band.rs`).

use std::ops::Range;

use super::tiles::{GROUPS, TOKENS, Tiles};
use crate::ternary_matrix::TernaryMatrix;
use crate::views::{Columns, Quantised};
use crate::workspace::Workspace;
use crate::x86_64::avx512::band::{LANES, by_bands};
use crate::x86_64::vnni::groups;

/// Rows of activations from which on tiles pay.
pub(super) const LEAST_TOKENS: usize = 6;
/// Rows of weights that are unpacked together.
pub(super) const BAND_ROWS: usize = GROUPS * LANES;

/// The product in tiles.
///
/// # Safety
///
/// The CPU has AMX, and the process may use it.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn ternary_many(
    w: TernaryMatrix<'_>,
    tiles: Range<usize>,
    x: Quantised<'_>,
    mut y: Columns<'_>,
    workspace: &mut Workspace,
) {
    // Up to 32 rows of activations keep their sums in the tiles until a band is done.
    let keeps = x.rows() <= TOKENS;
    let mut kept = None;
    by_bands(w, tiles, x, &mut y, workspace, &mut |strip, x, sums| {
        let (codes, stride) = x.codes();
        if keeps {
            // SAFETY: the caller has AMX; these are the only tiles of the call.
            let tiles = kept.get_or_insert_with(|| unsafe { Tiles::new(sums.len()) });
            if strip.is_first {
                tiles.clear();
            }
            tiles.multiply(strip.chunks, &codes[strip.first_col..], stride);
            if strip.is_last {
                tiles.store(sums);
            }
            return;
        }
        for tokens in groups(x.rows(), TOKENS) {
            let sums = &mut sums[tokens.clone()];
            // SAFETY: the caller has AMX; those of the last round are gone, and none are kept.
            let mut tiles = unsafe { Tiles::new(sums.len()) };
            if !strip.is_first {
                tiles.load(sums);
            }
            tiles.multiply(strip.chunks, &codes[tokens.start * stride + strip.first_col..], stride);
            tiles.store(sums);
        }
    });
}
