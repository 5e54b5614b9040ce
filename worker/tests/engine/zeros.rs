//! Work on zeros is left out, and no bit tells.

use kernels::Backend;
use model::synth::SynthFamily;
use model::{Store, SynthShape, synth};
use proto::step::{Output, Row, RowStatus};
use worker::engine::{Clock, Engine, EngineConfig, Shortcuts};

use crate::pipeline::{Sequence, engine, floats, open, plain};

const LAYERS: u32 = 3;
const HIDDEN: usize = 640;

/// Three chunks of columns in down, and enough inner values that a thread takes several pieces.
fn wide(family: SynthFamily) -> (tempfile::TempDir, Store) {
    let shape = SynthShape {
        layers: LAYERS,
        hidden: HIDDEN as u32,
        ffn: 1500,
        heads: 5,
        kv_heads: 1,
        vocab: 97,
        family,
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    synth(&shape, 3, &path, &mut |_| {}).unwrap();
    let store = open(&path);
    (dir, store)
}

fn config(backend: Backend, threads: usize, zeros: bool) -> EngineConfig {
    let shortcuts = Shortcuts { zeros, ..Shortcuts::default() };
    EngineConfig { backend, threads, shortcuts, ..plain() }
}

/// Not needed to know how much was read.
struct Stopped;

impl Clock for Stopped {
    fn now_ns(&self) -> u64 {
        0
    }
}

/// The logits after each of `sequence`, token by token, and bytes of weights read.
fn decode(engine: &mut Engine, sequence: &Sequence) -> (Vec<u32>, u64) {
    let (mut bits, mut bytes) = (Vec::new(), 0);
    for index in 0..sequence.tokens.len() {
        let row = sequence.row(index..index + 1, Output::Logits);
        let (output, profile) = engine.forward_profiled(&[row], &[], &Stopped);
        bits.extend(floats(&output.rows[0]).into_iter().map(f32::to_bits));
        bytes += profile.weight_bytes;
    }
    (bits, bytes)
}

#[test]
fn skipping_changes_no_bit_and_reads_less() {
    for family in [SynthFamily::BitNet, SynthFamily::Llama] {
        let (_dir, store) = wide(family);
        let sequence = Sequence::new(0, 6);
        let scalar = Backend::by_name("scalar").unwrap();
        let run = |config| decode(&mut engine(&store, 0..LAYERS, config), &sequence);
        let (want, all_bytes) = run(config(scalar, 1, false));
        for backend in Backend::available() {
            for threads in [1, 2, 3, 5] {
                let (found, bytes) = run(config(backend, threads, true));
                assert!(found == want, "{family:?}, {}, {threads} threads", backend.name());
                if family == SynthFamily::BitNet {
                    assert!(bytes < all_bytes, "{bytes} of {all_bytes} bytes");
                }
            }
        }
    }
}

/// Rows of one token whose numbers are extreme in one way or another.
fn extremes() -> Vec<Vec<f32>> {
    let mut inputs = vec![
        vec![0.0; HIDDEN],
        vec![-0.0; HIDDEN],
        vec![1.0; HIDDEN],
        vec![f32::MAX; HIDDEN],
        vec![f32::MIN_POSITIVE; HIDDEN],
        vec![1e-45; HIDDEN],
    ];
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e30, -1e-30, 1e19] {
        let mut input: Vec<f32> = (0..HIDDEN).map(|index| (index % 13) as f32 - 6.0).collect();
        input[HIDDEN / 3] = value;
        inputs.push(input);
    }
    inputs
}

#[test]
fn extreme_rows_end_the_same_way() {
    let (_dir, store) = wide(SynthFamily::BitNet);
    let sequence = Sequence::new(1, 1);
    let row: [Row; 1] = [sequence.row(0..1, Output::Logits)];
    let backend = Backend::detect();
    for (layers, is_last) in [(1..2, false), (1..LAYERS, true)] {
        let mut engines =
            [false, true].map(|zeros| engine(&store, layers.clone(), config(backend, 2, zeros)));
        let mut failed = 0;
        for (index, input) in extremes().iter().enumerate() {
            let [want, found] = engines.each_mut().map(|engine| engine.forward(&row, input));
            assert_eq!(found.rows, want.rows, "input {index}");
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&found.activations), bits(&want.activations), "input {index}");
            failed += usize::from(want.rows[0].status == RowStatus::NotFinite);
        }
        assert!((1..extremes().len()).contains(&failed), "{failed} rows failed, {is_last}");
    }
}
