//! Racks of 64 workers, for minutes, and what their coordinator may take for a step. Not part of
//! `cargo test`, for the figures mean something on a release build only: `./test --soak` runs them.

#![expect(clippy::print_stdout, reason = "what was measured is a result")]

use std::path::PathBuf;
use std::time::Duration;

use tests::model::synthetic_store;
use tests::rack::{Figures, Rack};

/// Steps per second, of all pipelines together.
const STEPS_PER_S: f64 = 1000.0;

/// CPU time of the coordinator for one of them, in ms.
const CPU_MS: f64 = 0.3;

/// What 99 in a hundred of them may be held up beside computing.
const ADDED: Duration = Duration::from_millis(2);

/// Where all CPUs together are busier than this, what is added is mostly waiting for one of them, and says
/// nothing of the coordinator.
const BUSY: f64 = 0.7;

/// Eight layers, and a head of its own, so that every step goes through all stages.
fn store() -> PathBuf {
    let family = model::synth::SynthFamily::Llama;
    let (layers, hidden, ffn, heads, kv_heads, vocab) = (8, 128, 256, 4, 4, 4096);
    let shape = model::SynthShape { layers, hidden, ffn, heads, kv_heads, vocab, family };
    synthetic_store(&shape, "rack")
}

/// 64 workers; what differs is filled in.
fn rack(name: &'static str, stages: usize, profile: &'static str, streams: usize) -> Rack {
    Rack {
        name,
        store: store(),
        workers: 64,
        stages,
        profile,
        streams,
        tokens: 200,
        prompt: 60,
        quiet: Duration::from_secs(30),
        turmoil: Duration::from_secs(60),
        pause: Duration::from_secs(3),
    }
}

fn check(rack: &Rack) {
    let done = rack.run();
    let is_well = |figures: &Figures| {
        let Figures { steps_per_s, cpu_ms, added: [_, most], busy, .. } = *figures;
        if busy > BUSY {
            println!("{}: the machine is too busy to judge what is added to a step", rack.name);
        }
        steps_per_s >= STEPS_PER_S && cpu_ms < CPU_MS && (most < ADDED || busy > BUSY)
    };
    assert!(is_well(&done.quiet) && is_well(&done.turmoil), "{done:#?}");
}

#[test]
fn sixteen_pipelines_of_four_workers() {
    // Two layers a stage: 10.4 ms. Three steps are on their way in each pipeline.
    check(&rack("16 pipelines of 4", 4, "layer_us=5200", 48));
}

#[test]
fn sixty_four_replicas() {
    // All eight layers: 58.4 ms.
    check(&rack("64 replicas", 1, "layer_us=7300", 64));
}
