//! The limits measured beside an engine, and the tokens per second that they allow its model.

use serde::Serialize;

use crate::bench::limits::{Limits, TokenWork};

/// What the machine could do before and after the engine ran; what counts is the better of both,
/// for whatever disturbs a measurement takes away.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Limited {
    /// The better of both.
    #[serde(flatten)]
    pub best: Limits,
    /// One sequence: linears at 2 bits a weight and a head at 6.56, over the bandwidth.
    pub dense_decode_tokens_per_s: f64,
    /// A prompt: multiply-adds of the linears.
    pub prefill_tokens_per_s: f64,
    /// Many sequences: multiply-adds of the linears, and the head's in f32.
    pub batched_tokens_per_s: f64,
    /// Measured before.
    pub before: Limits,
    /// Measured after.
    pub after: Limits,
}

impl Limited {
    pub(super) fn new(before: Limits, after: Limits, work: &TokenWork) -> Self {
        let best = before.best(after);
        Self {
            best,
            dense_decode_tokens_per_s: work.dense_decode_tokens_per_s(&best),
            prefill_tokens_per_s: work.prefill_tokens_per_s(&best),
            batched_tokens_per_s: work.batched_tokens_per_s(&best),
            before,
            after,
        }
    }

    /// Tokens per second of `batch` sequences together: what multiply-adds allow, or memory if that
    /// is less when every weight is read once for all of them.
    pub(super) fn batch_tokens_per_s(&self, batch: usize) -> f64 {
        self.batched_tokens_per_s.min(batch as f64 * self.dense_decode_tokens_per_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_better_of_both_counts() {
        let limits = |read, mac| Limits {
            threads: 2,
            read_gb_per_s: read,
            mac_g_per_s: mac,
            fma_g_per_s: 50.0,
        };
        let work =
            TokenWork { linear_macs: 900_000_000, head_macs: 50_000_000, dense_bytes: 4 << 28 };
        let limited = Limited::new(limits(30.0, 300.0), limits(20.0, 310.0), &work);
        assert_eq!((limited.best.read_gb_per_s, limited.best.mac_g_per_s), (30.0, 310.0));
        assert_eq!(limited.before.mac_g_per_s, 300.0);
        assert!((limited.dense_decode_tokens_per_s - 27.9).abs() < 0.1);
        assert!((limited.batch_tokens_per_s(2) - 55.9).abs() < 0.1, "memory holds it back");
        assert_eq!(limited.batch_tokens_per_s(64), limited.batched_tokens_per_s);
    }
}
