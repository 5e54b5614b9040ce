//! What a profiled step says of itself, by a clock that counts how often it was asked.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use kernels::Backend;
use model::synth::SynthFamily;
use proto::step::Output;
use worker::engine::{Clock, EngineConfig, StepProfile};

use crate::pipeline::{LAYERS, Sequence, VOCAB, engine, floats, plain, tiny};

/// Every look at it takes a nanosecond.
#[derive(Default)]
struct Looks(AtomicU64);

impl Clock for Looks {
    fn now_ns(&self) -> u64 {
        self.0.fetch_add(1, SeqCst)
    }
}

const TOKENS: usize = 5;

#[test]
fn a_profile_accounts_for_all_threads_and_changes_nothing() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    for threads in [1, 3] {
        let config = EngineConfig { backend: Backend::detect(), threads, ..plain() };
        let mut engine = engine(&store, 0..LAYERS, config);
        let rows = [Sequence::new(0, TOKENS).row(0..TOKENS, Output::Logits)];
        let want = floats(&engine.forward(&rows, &[]).rows[0]);
        let clock = Looks::default();
        let (output, profile) = engine.forward_profiled(&rows, &[], &clock);
        assert_eq!(floats(&output.rows[0]), want);

        let StepProfile { projections_ns, attention_ns, head_ns, norms_ns, .. } = profile;
        for time in [projections_ns, attention_ns, head_ns, norms_ns, profile.waiting_ns] {
            assert!(time > 0, "{profile:?}");
        }
        let looks = clock.0.load(SeqCst);
        assert!(profile.total_ns() <= threads as u64 * looks, "{profile:?} in {looks}");
        assert!(profile.total_ns() >= looks - 1, "{profile:?} in {looks}");

        let inner = TOKENS as u64 * u64::from(store.config().ffn) * u64::from(LAYERS);
        assert_eq!((profile.gate_values, profile.down_values), (inner, inner));
        assert!((1..inner).contains(&profile.gate_zeros), "{profile:?}");
        assert!(profile.down_zeros >= profile.gate_zeros, "{profile:?}");
        let head_rows = u64::from(VOCAB) * TOKENS as u64;
        assert_eq!(profile.screened_rows + profile.exact_rows, head_rows);
        let file_bytes = engine.weight_bytes();
        assert!((file_bytes / 2..=file_bytes).contains(&profile.weight_bytes), "{profile:?}");

        let (_, again) = engine.forward_profiled(&rows, &[], &Looks::default());
        assert_eq!(again.gate_zeros, profile.gate_zeros, "a profile is that of one step");
    }
}
