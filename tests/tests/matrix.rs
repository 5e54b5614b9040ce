//! The matrix of exactness: however the work is cut, the bundled model's logits have the same bits.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

use kernels::Backend;
use model::Store;
use proto::plan::KvType;
use tercet::logits::{LogitsOptions, logits};
use tercet::pipeline::PipelineOptions;
use tests::model::{bundled_store, golden, ids};
use worker::engine::{Placement, Shortcuts, WeightMemory};

/// More than two blocks of KV, so that chunks of 32 end inside and at their borders.
const TOKENS: usize = 70;

/// Every cut of one KV type against the plainest: one stage, one thread, scalar, whole, alone, nothing
/// skipped, weights where they are mapped.
fn check(kv_type: KvType) {
    let store = Store::open(&bundled_store()).unwrap();
    let tokens = ids(&golden()["heldout_fixed"]["token_ids"])[..TOKENS].to_vec();
    let run = |stages: u32, chunk, backend: Backend, threads, among, zeros, weights| {
        let pipeline = PipelineOptions {
            stages,
            backend,
            threads,
            kv_type,
            shortcuts: Shortcuts { zeros, ..Shortcuts::default() },
            placement: Placement { weights, ..Placement::default() },
        };
        let options = LogitsOptions { pipeline, chunk, among, seed: 11 };
        let found = logits(&store, &options, &tokens).unwrap();
        found.concat().into_iter().map(f32::to_bits).collect::<Vec<u32>>()
    };
    let scalar = Backend::by_name("scalar").unwrap();
    let wanted = run(1, None, scalar, 1, 0, false, WeightMemory::Map);
    assert!(wanted.iter().any(|&bits| bits != wanted[0]), "logits differ from one another");

    let mut compared = 0;
    for backend in Backend::available() {
        for stages in 1..=4 {
            for chunk in [Some(1), Some(7), Some(32), None] {
                for threads in [1, 2] {
                    for among in [0, 15] {
                        // Only a step of one token skips zeros; one cell reads a copy.
                        let switches = match (chunk, among) {
                            (Some(1), 0) => &[
                                (true, WeightMemory::Map),
                                (false, WeightMemory::Map),
                                (true, WeightMemory::Copy),
                            ][..],
                            _ => &[(true, WeightMemory::Map)][..],
                        };
                        for &(zeros, weights) in switches {
                            let found = run(stages, chunk, backend, threads, among, zeros, weights);
                            let name = backend.name();
                            assert!(
                                found == wanted,
                                "{kv_type}: {stages} stages, chunk {chunk:?}, {name}, {threads} \
                                 threads, among {among}, zeros {zeros}, {weights:?}"
                            );
                            compared += 1;
                        }
                    }
                }
            }
        }
    }
    assert_eq!(compared, 80 * Backend::available().count());
}

#[test]
fn every_cut_gives_the_same_bits_with_kv_in_f16() {
    check(KvType::F16);
}

#[test]
fn every_cut_gives_the_same_bits_with_kv_in_f32() {
    check(KvType::F32);
}

/// The matrix bites: another KV type is another number.
#[test]
fn the_kv_type_changes_bits() {
    let store = Store::open(&bundled_store()).unwrap();
    let tokens = ids(&golden()["heldout_fixed"]["token_ids"])[..TOKENS].to_vec();
    let run = |kv_type| {
        let pipeline = PipelineOptions { kv_type, ..PipelineOptions::default() };
        logits(&store, &LogitsOptions { pipeline, ..LogitsOptions::default() }, &tokens).unwrap()
    };
    assert_ne!(run(KvType::F16), run(KvType::F32));
}
