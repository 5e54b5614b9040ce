//! A row's result depends on the row alone: not on stages, chunks, threads, backends, neighbours,
//! blocks, or what the cache held before.

use kernels::Backend;
use model::Store;
use model::synth::SynthFamily;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use proto::plan::KvType;
use proto::step::Output;
use worker::engine::EngineConfig;

use crate::pipeline::{LAYERS, Pipeline, Sequence, assert_same_bits, floats, plain, tiny};

/// Some blocks, and not whole ones.
const SHORT: usize = 75;

/// Two segments of attention and a part of a third.
const LONG: usize = 530;

fn config(backend: Backend, threads: usize, kv_type: KvType) -> EngineConfig {
    EngineConfig { backend, threads, kv_type, ..plain() }
}

/// What the scalar definition gives for the sequence alone, on one thread, in one chunk.
fn want(store: &Store, sequence: &Sequence, kv_type: KvType) -> Vec<f32> {
    let config = EngineConfig { kv_type, ..plain() };
    Pipeline::open(store, 1, config).logits(sequence, sequence.tokens.len())
}

fn check_matrix(store: &Store, kv_type: KvType) {
    let sequence = Sequence::new(0, SHORT);
    let want = want(store, &sequence, kv_type);
    assert!(want.iter().all(|logit| logit.is_finite()));
    // The one that will be used is a mix of the others.
    for backend in Backend::available().chain([Backend::detect()]) {
        // All of it with the backend that will be used; the slow ones need not show again that
        // the engine's ways agree.
        let is_used = backend == Backend::detect();
        let (threads, stages) =
            if is_used { (vec![1, 2], vec![1, 2, 3, LAYERS]) } else { (vec![2], vec![1, LAYERS]) };
        for &threads in &threads {
            for &stages in &stages {
                for chunk in [1, 7, 32, SHORT] {
                    let config = config(backend, threads, kv_type);
                    let found = Pipeline::open(store, stages, config).logits(&sequence, chunk);
                    let name = backend.name();
                    let what = format!("{name}, {threads} threads, {stages} stages, chunk {chunk}");
                    assert_same_bits(&found, &want, &what);
                }
            }
        }
    }
}

#[test]
fn stages_chunks_threads_and_backends_change_no_bit_of_a_bitnet() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    check_matrix(&store, KvType::F32);
    check_matrix(&store, KvType::F16);
}

#[test]
fn stages_chunks_threads_and_backends_change_no_bit_of_a_llama() {
    let (_dir, store) = tiny(SynthFamily::Llama);
    check_matrix(&store, KvType::F16);
}

/// One row at a time takes the way of shared segments, many rows at once the way of whole pairs.
#[test]
fn long_contexts_are_exact_too() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let sequence = Sequence::new(0, LONG);
    for kv_type in [KvType::F16, KvType::F32] {
        let want = want(&store, &sequence, kv_type);
        for (threads, stages, chunk) in [(1, 1, 1), (2, 2, 1), (3, 1, 100), (2, 3, 257)] {
            let config = config(Backend::detect(), threads, kv_type);
            let found = Pipeline::open(&store, stages, config).logits(&sequence, chunk);
            let what = format!("{kv_type}, {threads} threads, {stages} stages, chunk {chunk}");
            assert_same_bits(&found, &want, &what);
        }
    }
}

/// The KV type is part of the class because it does change bits.
#[test]
fn the_kv_type_is_heeded() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let sequence = Sequence::new(0, SHORT);
    let [f16, f32] = [KvType::F16, KvType::F32].map(|kv_type| want(&store, &sequence, kv_type));
    assert_ne!(f16, f32);
}

/// Up to eight sequences, cut and mixed at random: each gives what it gives alone.
fn check_mix(store: &Store, sequences: &[Sequence], chunks: &[usize], config: EngineConfig) {
    let mut pipeline = Pipeline::open(store, 2, config);
    let mut done = vec![0; sequences.len()];
    let mut logits = vec![Vec::new(); sequences.len()];
    let mut chunks = chunks.iter().copied().cycle();
    while done.iter().zip(sequences).any(|(done, sequence)| *done < sequence.tokens.len()) {
        let mut rows = Vec::new();
        let mut owners = Vec::new();
        for (index, sequence) in sequences.iter().enumerate() {
            // Now and then a sequence has two rows in one step.
            for _ in 0..=chunks.next().unwrap() % 2 {
                let len = sequence.tokens.len();
                let end = (done[index] + chunks.next().unwrap()).min(len);
                if end > done[index] {
                    rows.push(sequence.row(done[index]..end, Output::Logits));
                    owners.push(index);
                    done[index] = end;
                }
            }
        }
        if rows.is_empty() {
            // The last sequence would get the same chunk of nothing again and again.
            chunks.next();
        }
        for (outcome, owner) in pipeline.step(&rows).iter().zip(owners) {
            logits[owner].extend(floats(outcome));
        }
    }
    for (found, sequence) in logits.iter().zip(sequences) {
        let want = want(store, sequence, config.kv_type);
        assert_same_bits(found, &want, &format!("sequence {}", sequence.id));
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::with_cases(12)
    })]

    #[test]
    fn neighbours_change_no_bit(
        lens in prop::collection::vec(1usize..90, 1..8),
        chunks in prop::collection::vec(0usize..40, 11),
        threads in 1usize..4,
        half in any::<bool>(),
    ) {
        prop_assume!(chunks.iter().any(|chunk| *chunk > 0));
        let (_dir, store) = tiny(SynthFamily::BitNet);
        let kv_type = if half { KvType::F16 } else { KvType::F32 };
        let sequences: Vec<_> =
            lens.iter().enumerate().map(|(id, len)| Sequence::new(id as u64, *len)).collect();
        let mut chunks = chunks;
        chunks.push(1);
        check_mix(&store, &sequences, &chunks, config(Backend::detect(), threads, kv_type));
    }
}

#[test]
fn going_back_writes_the_same_keys_again() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let sequence = Sequence::new(0, SHORT);
    let want = want(&store, &sequence, KvType::F16);
    let mut pipeline = Pipeline::open(&store, 2, config(Backend::detect(), 2, KvType::F16));
    let vocab = store.config().vocab as usize;
    for range in [0..50, 10..20, 33..34, 5..60, 60..SHORT, 70..SHORT] {
        let outcomes = pipeline.step(&[sequence.row(range.clone(), Output::Logits)]);
        let want = &want[range.start * vocab..range.end * vocab];
        assert_same_bits(&floats(&outcomes[0]), want, &format!("{range:?}"));
    }
}

#[test]
fn what_a_block_held_before_has_no_influence() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let (sequence, mut other) = (Sequence::new(0, SHORT), Sequence::new(1, SHORT));
    let want = want(&store, &sequence, KvType::F16);
    other.blocks.clone_from(&sequence.blocks);
    for chunk in [1, 20] {
        let config = config(Backend::detect(), 1, KvType::F16);
        let mut pipeline = Pipeline::open(&store, 1, config);
        pipeline.logits(&other, SHORT);
        let found = pipeline.logits(&sequence, chunk);
        assert_same_bits(&found, &want, &format!("chunk {chunk}"));
    }
}

#[test]
fn two_sequences_may_share_the_blocks_of_a_prefix() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let first = Sequence::new(0, SHORT);
    let mut second = Sequence::new(1, SHORT);
    second.tokens[..64].copy_from_slice(&first.tokens[..64]);
    second.blocks[..2].copy_from_slice(&first.blocks[..2]);
    let want = want(&store, &second, KvType::F16);
    let mut pipeline = Pipeline::open(&store, 1, config(Backend::detect(), 2, KvType::F16));
    pipeline.logits(&first, SHORT);
    let outcomes = pipeline.step(&[second.row(64..SHORT, Output::Logits)]);
    let vocab = store.config().vocab as usize;
    assert_same_bits(&floats(&outcomes[0]), &want[64 * vocab..], "after the prefix");
}
