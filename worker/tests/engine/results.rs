//! What a row asks for is what it gets: tokens, scores, logits.

use kernels::Backend;
use model::synth::SynthFamily;
use proto::plan::KvType;
use proto::step::{Output, RowStatus, RowValue, Sampled, SamplingParameters};
use worker::engine::{EngineConfig, Placement, WeightMemory, weight_copies};
use worker::measure::{ROWS, measure_steps};

use crate::pipeline::{Pipeline, Sequence, plain, tiny};

fn fast() -> EngineConfig {
    EngineConfig { backend: Backend::detect(), kv_type: KvType::F16, ..plain() }
}

fn sampled(value: &RowValue) -> &Sampled {
    let RowValue::Sampled(sampled) = value else { panic!("{value:?}") };
    sampled
}

#[test]
fn each_row_gets_what_it_asks_for() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let mut pipeline = Pipeline::open(&store, 2, fast());
    let sequence = Sequence::new(0, 40);
    let logits = pipeline.logits(&sequence, 40);
    let vocab = store.config().vocab as usize;
    let targets: Vec<u32> = sequence.tokens.iter().rev().copied().collect();
    let parameters = SamplingParameters { top_logprobs: Some(2), ..SamplingParameters::default() };
    let copy = |id| Sequence { id, blocks: Sequence::new(id, 40).blocks, ..sequence.clone() };
    let rows = [
        copy(1).row(0..40, Output::None),
        copy(2).row(0..40, Output::Score(targets.clone())),
        copy(3).row(0..40, Output::Sample(Box::new(parameters))),
        copy(4).row(0..40, Output::Logits),
    ];
    let outcomes = pipeline.step(&rows);
    assert!(outcomes.iter().all(|outcome| outcome.status == RowStatus::Ok));
    assert_eq!(outcomes[0].value, RowValue::None);

    let RowValue::Scores(scores) = &outcomes[1].value else { panic!("{:?}", outcomes[1]) };
    assert_eq!(scores.len(), 40);
    for ((score, target), logits) in scores.iter().zip(&targets).zip(logits.chunks(vocab)) {
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        let want = f64::from(logits[*target as usize]) - sum.ln();
        assert!((f64::from(*score) - want).abs() < 1e-5, "{score} is not {want}");
    }

    let last = &logits[39 * vocab..];
    let best = last.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let want = last.iter().position(|logit| *logit == best).unwrap() as u32;
    let found = sampled(&outcomes[2].value);
    assert_eq!(found.token, want);
    assert_eq!(found.top.len(), 2);
    assert_eq!(found.top[0].token, want);
    assert_eq!(Some(found.top[0].logprob), found.logprob);
    assert!(found.top[1].logprob <= found.top[0].logprob);

    assert_eq!(crate::pipeline::floats(&outcomes[3]), logits);
}

/// Drawn tokens are the same whoever generates them: alone or in company, one stage or three.
#[test]
fn generation_is_reproducible() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let generate = |stages: u32, threads: usize, company: u64| {
        let config = EngineConfig { threads, ..fast() };
        let mut pipeline = Pipeline::open(&store, stages, config);
        let mut sequence = Sequence::new(0, 60);
        let prompt = 20;
        let parameters = SamplingParameters {
            temperature: 0.9,
            top_p: 0.95,
            seed: 5,
            ..SamplingParameters::default()
        };
        for end in prompt..60 {
            let start = if end == prompt { 0 } else { end - 1 };
            let mut rows =
                vec![sequence.row(start..end, Output::Sample(Box::new(parameters.clone())))];
            for id in 1..=company {
                let other = Sequence::new(id, 60);
                rows.insert(0, other.row(start..end, Output::Sample(Box::new(parameters.clone()))));
            }
            let outcomes = pipeline.step(&rows);
            sequence.tokens[end] = sampled(&outcomes[company as usize].value).token;
        }
        sequence.tokens
    };
    let want = generate(1, 1, 0);
    assert_eq!(generate(3, 1, 0), want);
    assert_eq!(generate(1, 2, 5), want);
    assert_eq!(generate(2, 3, 2), want);
}

/// The service runs it on a thread of its own.
#[test]
fn an_engine_can_be_moved_to_another_thread() {
    fn check<T: Send>(_: &T) {}
    let (_dir, store) = tiny(SynthFamily::BitNet);
    check(&crate::pipeline::engine(&store, 0..1, plain()));
}

#[test]
fn measured_times_are_positive() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let steps = measure_steps(&store, &fast()).unwrap();
    let rows: Vec<u32> = steps.iter().map(|step| step.rows).collect();
    assert_eq!(rows, ROWS[..rows.len()], "a slow machine leaves the last ones out");
    assert!(rows.len() >= 2);
    assert!(steps.iter().all(|step| step.layer_ns > 0 && step.head_ns > 0));
}

#[test]
fn placement_changes_no_bit_and_copies_are_counted() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let sequence = Sequence::new(0, 9);
    let run = |placement| {
        let config = EngineConfig { threads: 2, placement, ..fast() };
        let mut pipeline = Pipeline::open(&store, 1, config);
        (pipeline.logits(&sequence, 4), pipeline.0[0].weight_bytes(), weight_copies(&config))
    };
    let (want, bytes, copies) = run(Placement::default());
    assert_eq!(copies, 1);
    for (weights, lock, pin) in [
        (WeightMemory::Copy, false, false),
        (WeightMemory::Copy, true, true),
        (WeightMemory::Map, true, false),
        (WeightMemory::Map, false, true),
    ] {
        let (found, found_bytes, copies) = run(Placement { weights, lock, pin });
        assert_eq!(found, want, "{weights:?}");
        assert!(copies >= 1 && found_bytes <= bytes * copies, "{weights:?}");
    }
}
