//! What the machine can do at best: reading in order, and the inner loops that products come down to.
//! The work is done and its result returned, so that no compiler takes it away; whoever looks at the
//! clock divides. No operation of the numerics, so no part of the known answer or of the proof.

use crate::backend::Backend;
#[cfg(target_arch = "x86_64")]
use crate::backend::Kind;
use crate::scalar;

/// What an operand is a multiple of: every backend's unrolled loop divides it.
const PROBE_LEN: usize = 1024;

/// Calls the backend's own form; there is none for AArch64, which has the scalar one compiled for it.
macro_rules! probe {
    ($backend:expr, $function:ident ( $($argument:expr),* )) => {
        match $backend.base().0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(token) => token.$function($($argument),*),
            #[cfg(target_arch = "x86_64")]
            Kind::AvxVnni(token) => token.$function($($argument),*),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(token) => token.$function($($argument),*),
            #[cfg(target_arch = "x86_64")]
            Kind::Amx(token) => token.$function($($argument),*),
            _ => scalar::probe::$function($($argument),*),
        }
    };
}

impl Backend {
    /// Reads `words` once, in order; returns their exclusive or.
    pub fn probe_read(self, words: &[u64]) -> u64 {
        probe!(self, probe_read(words))
    }

    /// `rounds` times `Σ codes[j mod 128] x[j]` modulo 2^16, in the instructions that ternary
    /// products of many rows come down to when nothing is unpacked: `x.len() * rounds`
    /// multiply-adds. Codes are 0 to 3.
    ///
    /// # Panics
    ///
    /// If the length of `x` is not a multiple of 1024.
    pub fn probe_multiply(self, codes: &[u8; 128], x: &[i8], rounds: usize) -> u16 {
        assert!(x.len().is_multiple_of(PROBE_LEN), "{} is not whole chunks", x.len());
        debug_assert!(codes.iter().all(|code| *code < 4), "a code has two bits");
        probe!(self, probe_multiply(codes, x, rounds))
    }

    /// `rounds` times `Σ w[j mod 32] x[j]` by fused multiply-adds of f32, in an order of the
    /// backend's own, so that only a sum without rounding is the same everywhere:
    /// `x.len() * rounds` multiply-adds.
    ///
    /// # Panics
    ///
    /// If the length of `x` is not a multiple of 1024.
    pub fn probe_fma(self, w: &[f32; 32], x: &[f32], rounds: usize) -> f32 {
        assert!(x.len().is_multiple_of(PROBE_LEN), "{} is not whole chunks", x.len());
        probe!(self, probe_fma(w, x, rounds))
    }
}
