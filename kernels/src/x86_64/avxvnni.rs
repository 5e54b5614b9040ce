//! AVX2 with AVX-VNNI: the token that proves them and the one way into its kernel. What
//! has no kernel here is done by those of AVX2, which the token implies.
#![expect(unsafe_code, reason = "calls behind the detected token")]

mod probe;
mod ternary;

use std::ops::{Deref, Range};

use super::avx2::Avx2;
use crate::ternary_matrix::TernaryMatrix;
use crate::views::{Columns, Quantised};

/// Proof that this CPU has AVX-VNNI, and what [`Avx2`] proves: only [`AvxVnni::detect`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AvxVnni(Avx2);

impl AvxVnni {
    /// # Errors
    ///
    /// The instruction set that this CPU or its operating system lacks.
    pub(crate) fn detect() -> Result<Self, &'static str> {
        let avx2 = Avx2::detect()?;
        require!("avxvnni");
        Ok(Self(avx2))
    }

    pub(crate) fn ternary(
        self,
        w: TernaryMatrix<'_>,
        tiles: Range<usize>,
        x: Quantised<'_>,
        y: Columns<'_>,
    ) {
        // SAFETY: `self` exists, so AVX2, FMA, F16C and AVX-VNNI were detected on this CPU.
        unsafe { ternary::ternary(w, tiles, x, y) }
    }

    pub(crate) fn probe_multiply(self, codes: &[u8; 128], x: &[i8], rounds: usize) -> u16 {
        // SAFETY: `self` exists, so AVX2, FMA, F16C and AVX-VNNI were detected on this CPU.
        unsafe { probe::probe_multiply(codes, x, rounds) }
    }
}

impl Deref for AvxVnni {
    type Target = Avx2;

    fn deref(&self) -> &Avx2 {
        &self.0
    }
}
