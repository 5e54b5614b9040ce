//! AVX-512 with AMX: the token that proves them, and products of many rows in tiles. What has no kernel
//! here is done by those of AVX-512, which the token implies.
#![expect(unsafe_code, reason = "calls behind the detected token, instructions without intrinsics")]

mod probe;
mod screen;
mod ternary;
mod tiles;

use std::ops::{Deref, Range};

use super::avx512::Avx512;
use crate::screen::{Kept, ScreenInput, ScreenMatrix, Threshold};
use crate::ternary_matrix::TernaryMatrix;
use crate::views::{Columns, Quantised};
use crate::workspace::Workspace;

/// Proof that this CPU has AMX with int8 products, that the operating system lets this process use its
/// tiles, and what [`Avx512`] proves: only [`Amx::detect`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Amx(Avx512);

impl Amx {
    /// # Errors
    ///
    /// What this CPU or its operating system lacks.
    pub(crate) fn detect() -> Result<Self, &'static str> {
        let avx512 = Avx512::detect()?;
        // The standard library does not look for them; CPUs with AVX-512 have leaf 7.
        let features = std::arch::x86_64::__cpuid_count(7, 0).edx;
        for (bit, name) in [(24, "amx-tile"), (25, "amx-int8")] {
            if features >> bit & 1 == 0 {
                return Err(name);
            }
        }
        // The operating system saves tiles only of processes that asked for it.
        if !tiles::permitted() {
            return Err("the permission of its operating system to use AMX");
        }
        Ok(Self(avx512))
    }

    /// Rows of weights that are unpacked together for `n` rows of activations.
    pub(crate) fn band_rows(self, n: usize) -> Option<usize> {
        (n >= ternary::LEAST_TOKENS).then_some(ternary::BAND_ROWS)
    }

    pub(crate) fn ternary_many(
        self,
        w: TernaryMatrix<'_>,
        tiles: Range<usize>,
        x: Quantised<'_>,
        y: Columns<'_>,
        workspace: &mut Workspace,
    ) {
        if self.band_rows(x.rows()).is_none() {
            return self.0.ternary_many(w, tiles, x, y, workspace);
        }
        // SAFETY: `self` exists, so AMX and AVX-512 F, BW, DQ, VL and VNNI were detected, and this
        // process may use tiles.
        unsafe { ternary::ternary_many(w, tiles, x, y, workspace) }
    }

    pub(crate) fn screen(
        self,
        w: ScreenMatrix<'_>,
        group: usize,
        x: ScreenInput<'_>,
        thresholds: &[Threshold<'_>],
        kept: &mut [Kept],
    ) -> usize {
        if x.positions() < screen::LEAST_POSITIONS {
            return self.0.screen(w, group, x, thresholds, kept);
        }
        // SAFETY: `self` exists, so AMX and AVX-512 F, BW, DQ, VL and VNNI were detected, and this
        // process may use tiles.
        unsafe { screen::screen(w, group, x, thresholds, kept) }
    }

    pub(crate) fn probe_multiply(self, codes: &[u8; 128], x: &[i8], rounds: usize) -> u16 {
        // SAFETY: `self` exists, so AMX was detected, and this process may use tiles.
        let (sum, rest) = unsafe { probe::probe_multiply(codes, x, rounds) };
        sum.wrapping_add(self.0.probe_multiply(codes, x, rest))
    }
}

impl Deref for Amx {
    type Target = Avx512;

    fn deref(&self) -> &Avx512 {
        &self.0
    }
}
