//! A screened head gives the tokens of the whole one, whatever is asked of it and in whatever company.

use kernels::Backend;
use model::synth::SynthFamily;
use model::{Store, SynthShape, import_bundled, synth};
use proto::step::{Output, RowStatus, RowValue, SamplingParameters};
use worker::engine::{Clock, Engine, EngineConfig, Shortcuts};

use crate::pipeline::{Sequence, engine, open, plain};

/// Many groups of 64, the last one not whole.
pub(crate) const VOCAB: u32 = 5_003;

fn wide_vocabulary(family: SynthFamily) -> (tempfile::TempDir, Store) {
    let shape =
        SynthShape { layers: 1, hidden: 72, ffn: 150, heads: 4, kv_heads: 2, vocab: VOCAB, family };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    synth(&shape, 3, &path, &mut |_| {}).unwrap();
    let store = open(&path);
    store.verify(|_| {}).unwrap();
    (dir, store)
}

/// An engine that screens, or one that does not.
fn engine_that(store: &Store, screens: bool, backend: Backend, threads: usize) -> Engine {
    let shortcuts = Shortcuts { screen: screens, ..Shortcuts::default() };
    engine(store, 0..1, EngineConfig { backend, threads, shortcuts, ..plain() })
}

/// Every way to ask for a token, with and without a need for all logits, of 4096 tokens or more.
pub(crate) fn asked() -> Vec<SamplingParameters> {
    let greedy = SamplingParameters::default();
    let warm = SamplingParameters { temperature: 0.8, ..greedy.clone() };
    let counts = |count| (0..4_096).step_by(7).map(|token| (token, count)).collect::<Vec<_>>();
    let seen = SamplingParameters {
        prompt_counts: counts(1),
        output_counts: counts(3),
        repetition_penalty: 1.3,
        frequency_penalty: 0.4,
        presence_penalty: -0.7,
        ..warm.clone()
    };
    let mut all = vec![
        greedy.clone(),
        SamplingParameters { temperature: 0.0, ..seen.clone() },
        SamplingParameters { logit_bias: vec![(4_090, 100.0), (3, -2.0)], ..greedy.clone() },
        SamplingParameters {
            logit_bias: (0..300).map(|i| (i * 13, -100.0)).collect(),
            ..greedy.clone()
        },
        // Infinite: the row fails, screened or not.
        SamplingParameters { logit_bias: vec![(9, 3e38), (9, 3e38)], ..greedy },
        SamplingParameters { temperature: 1e-30, top_k: 3, ..warm.clone() },
        warm.clone(),
        SamplingParameters { top_p: 0.9, ..warm.clone() },
        SamplingParameters { top_k: 5, top_logprobs: Some(3), ..warm.clone() },
        SamplingParameters { temperature: 1e-30, ..warm.clone() },
        SamplingParameters { temperature: 1e30, ..warm.clone() },
        SamplingParameters { top_p: f32::MIN_POSITIVE, ..warm.clone() },
        SamplingParameters { min_p: 1e-38, ..warm.clone() },
        SamplingParameters { temperature: 1e-3, top_p: 0.99, ..warm.clone() },
        SamplingParameters { logit_bias: vec![(9, 3e38), (9, 3e38)], ..warm.clone() },
        SamplingParameters { logit_bias: vec![(9, 3e38), (9, 3e38)], top_p: 0.9, ..warm.clone() },
        // Two that are alike in everything, far above all others.
        SamplingParameters { logit_bias: vec![(17, 1e30), (4_001, 1e30)], ..warm.clone() },
        SamplingParameters {
            logit_bias: vec![(17, 1e30), (4_001, 1e30)],
            top_p: 0.6,
            ..warm.clone()
        },
    ];
    for seed in 0..4 {
        let warm = SamplingParameters { seed, temperature: 0.8, ..warm.clone() };
        for temperature in [0.05, 0.2, 0.6, 1.0, 2.0] {
            let warm = SamplingParameters { temperature, ..warm.clone() };
            all.extend([
                warm.clone(),
                SamplingParameters { top_p: 0.9, ..warm.clone() },
                SamplingParameters { top_p: 0.3, min_p: 0.02, ..warm.clone() },
                SamplingParameters { top_k: 200, ..warm.clone() },
                SamplingParameters { top_k: 1_000, top_p: 0.95, min_p: 0.001, ..warm.clone() },
                SamplingParameters { temperature, seed, ..seen.clone() },
                SamplingParameters { temperature, seed, top_p: 0.8, ..seen.clone() },
            ]);
        }
        all.extend([
            SamplingParameters { top_k: 1, ..warm.clone() },
            SamplingParameters { top_k: 40, ..warm.clone() },
            SamplingParameters { top_k: 128, top_p: 0.95, ..warm.clone() },
            SamplingParameters { top_k: 20, min_p: 0.2, top_p: 0.7, ..warm.clone() },
            SamplingParameters { min_p: 0.05, ..warm.clone() },
            SamplingParameters { min_p: 0.5, temperature: 3.0, ..warm.clone() },
            SamplingParameters { min_p: 1.0, ..warm },
            SamplingParameters { top_k: 30, seed, ..seen.clone() },
            SamplingParameters { min_p: 0.1, seed, ..seen.clone() },
        ]);
    }
    all
}

struct NoTime;

impl Clock for NoTime {
    fn now_ns(&self) -> u64 {
        0
    }
}

#[test]
fn a_screened_head_gives_the_tokens_of_the_whole_one() {
    for family in [SynthFamily::BitNet, SynthFamily::Llama] {
        let (_dir, store) = wide_vocabulary(family);
        let mut whole = engine_that(&store, false, Backend::detect(), 1);
        for (backend, threads) in [
            (Backend::by_name("scalar").unwrap(), 2),
            (Backend::detect(), 1),
            (Backend::detect(), 2),
            (Backend::detect(), 3),
        ] {
            let mut screened = engine_that(&store, true, backend, threads);
            let mut left_out = 0;
            for (at, parameters) in asked().into_iter().enumerate() {
                let sequence = Sequence::new(at as u64 % 8, 5);
                let rows = [sequence.row(0..5, Output::Sample(Box::new(parameters.clone())))];
                let (found, profile) = screened.forward_profiled(&rows, &[], &NoTime);
                let want = whole.forward(&rows, &[]);
                assert_eq!(found, want, "{threads} threads: {parameters:?}");
                // Some rows are computed after they were left out, or all of them.
                let rows = profile.screened_rows + profile.exact_rows;
                assert!(
                    (u64::from(VOCAB)..=2 * u64::from(VOCAB) + 2_048).contains(&rows),
                    "{rows}"
                );
                left_out += profile.screened_rows;
            }
            let some = if backend.screening_pays() { 5 * u64::from(VOCAB) } else { 0 };
            assert!(left_out >= some, "only {left_out} rows were left out");
        }
    }
}

#[test]
fn company_changes_no_token() {
    let (_dir, store) = wide_vocabulary(SynthFamily::BitNet);
    let asked = asked();
    for threads in [1, 2, 3] {
        let mut whole = engine_that(&store, false, Backend::detect(), threads);
        let mut screened = engine_that(&store, true, Backend::detect(), threads);
        for n in [2, 3, 7, 16, 23] {
            // Some rows want all logits, or scores of several positions, or nothing.
            for others in 0..3 {
                let rows: Vec<_> = (0..n)
                    .map(|i| {
                        let sequence = Sequence::new((i % 8) as u64, 4);
                        let sequence = Sequence { id: i as u64, ..sequence };
                        let output = match (i + others) % 6 {
                            0 if others > 0 => Output::Logits,
                            1 if others > 1 => Output::Score(vec![1, 2, 3, 4]),
                            2 if others > 0 => Output::None,
                            _ => {
                                let parameters = &asked[(i * 5 + n) % asked.len()];
                                Output::Sample(Box::new(parameters.clone()))
                            }
                        };
                        sequence.row(0..4, output)
                    })
                    .collect();
                let found = screened.forward(&rows, &[]);
                assert_eq!(found, whole.forward(&rows, &[]), "{n} rows on {threads} threads");
                assert!(found.rows.iter().any(|row| row.status == RowStatus::Ok));
            }
        }
    }
}

#[test]
fn a_trained_model_draws_the_same_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&import_bundled(dir.path()).unwrap());
    let all = 0..store.config().layers;
    let asked = asked();
    for threads in [1, 3] {
        let config = EngineConfig { backend: Backend::detect(), threads, ..plain() };
        let without = Shortcuts { screen: false, ..Shortcuts::default() };
        let mut screened = engine(&store, all.clone(), config);
        let mut whole = engine(&store, all.clone(), EngineConfig { shortcuts: without, ..config });
        for n in [1, 2, 5, 16] {
            for asked in asked.chunks(n) {
                let rows: Vec<_> = asked
                    .iter()
                    .enumerate()
                    .map(|(i, parameters)| {
                        let sequence = Sequence::new(i as u64 % 8, 6);
                        let sequence = Sequence { id: i as u64, ..sequence };
                        sequence.row(0..6, Output::Sample(Box::new(parameters.clone())))
                    })
                    .collect();
                let found = screened.forward(&rows, &[]);
                assert_eq!(found, whole.forward(&rows, &[]), "{n} rows on {threads} threads");
            }
        }
    }
}

#[test]
fn activations_that_are_not_finite_fail_their_row_alone() {
    let (_dir, store) = wide_vocabulary(SynthFamily::BitNet);
    let hidden = store.config().hidden as usize;
    let greedy = || Output::Sample(Box::default());
    for screens in [false, true] {
        // A stage that takes over activations: the second of two.
        let shape = SynthShape {
            layers: 2,
            hidden: 72,
            ffn: 150,
            heads: 4,
            kv_heads: 2,
            vocab: VOCAB,
            family: SynthFamily::BitNet,
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("two");
        synth(&shape, 5, &path, &mut |_| {}).unwrap();
        let shortcuts = Shortcuts { screen: screens, ..Shortcuts::default() };
        let config = EngineConfig { backend: Backend::detect(), threads: 2, shortcuts, ..plain() };
        let mut last = engine(&open(&path), 1..2, config);
        let mut input = vec![0.5; 2 * hidden];
        input[3] = f32::NAN;
        let rows =
            [Sequence::new(0, 1).row(0..1, greedy()), Sequence::new(1, 1).row(0..1, greedy())];
        let found = last.forward(&rows, &input);
        assert_eq!(found.rows[0].status, RowStatus::NotFinite, "screens: {screens}");
        assert_eq!(found.rows[1].status, RowStatus::Ok, "screens: {screens}");
    }
}

/// What drawing an answer took.
#[derive(Debug, Default)]
struct Taken {
    draws: u64,
    exact_rows: u64,
    /// Draws that computed every row.
    whole: u64,
}

/// Answers of 60 tokens for some seeds, from the token 0 on. Each token is the whole head's.
fn answers(store: &Store, threads: usize, parameters: &SamplingParameters) -> Taken {
    const TOKENS: usize = 60;
    let vocab = u64::from(store.config().vocab);
    let all = 0..store.config().layers;
    let config = EngineConfig { backend: Backend::detect(), threads, ..plain() };
    let mut screened = engine(store, all.clone(), config);
    let without = Shortcuts { screen: false, ..Shortcuts::default() };
    let mut whole = engine(store, all, EngineConfig { shortcuts: without, ..config });
    let mut taken = Taken::default();
    for seed in 0..5 {
        let mut sequence = Sequence::new(seed, TOKENS);
        sequence.tokens[0] = 0;
        for end in 1..TOKENS {
            let parameters = Box::new(SamplingParameters { seed, ..parameters.clone() });
            let rows = [sequence.row(end - 1..end, Output::Sample(parameters))];
            let (found, profile) = screened.forward_profiled(&rows, &[], &NoTime);
            assert_eq!(found, whole.forward(&rows, &[]));
            let RowValue::Sampled(sampled) = &found.rows[0].value else { panic!("{found:?}") };
            sequence.tokens[end] = sampled.token;
            taken.draws += 1;
            taken.exact_rows += profile.exact_rows;
            taken.whole += u64::from(profile.exact_rows >= vocab);
        }
    }
    taken
}

/// A model that was trained, and one of random weights, whose distributions are flat.
fn trained_and_random() -> [(tempfile::TempDir, Store); 2] {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&import_bundled(dir.path()).unwrap());
    [(dir, store), wide_vocabulary(SynthFamily::BitNet)]
}

#[test]
fn a_temperature_alone_is_screened() {
    for (_dir, store) in &trained_and_random() {
        for (temperature, threads) in [(0.6, 1), (1.0, 1), (1.0, 3), (1.5, 2)] {
            let parameters = SamplingParameters { temperature, ..SamplingParameters::default() };
            let taken = answers(store, threads, &parameters);
            println!("temperature {temperature} on {threads} threads: {taken:?}");
            // Every thread computes the first group of rows that it sees.
            // Of 4096 and 5003.
            assert!(taken.whole == 0 && taken.exact_rows < 100 * taken.draws, "{taken:?}");
        }
    }
}

#[test]
fn cuts_are_mostly_settled() {
    let [(_trained_dir, trained), (_random_dir, random)] = trained_and_random();
    let base = SamplingParameters { temperature: 1.0, ..SamplingParameters::default() };
    let top_p = SamplingParameters { top_p: 0.9, ..base.clone() };
    let cool = SamplingParameters { temperature: 0.6, ..top_p.clone() };
    let top_k = SamplingParameters { top_k: 200, ..base.clone() };
    let top_1000 = SamplingParameters { top_k: 1_000, ..base.clone() };
    let min_p = SamplingParameters { min_p: 0.05, ..base };
    for (name, store, parameters, most_whole) in [
        ("trained", &trained, &top_p, 15),
        ("trained", &trained, &cool, 15),
        ("trained", &trained, &top_k, 0),
        ("trained", &trained, &top_1000, 0),
        ("trained", &trained, &min_p, 3),
        // Most of a flat distribution lies in rows that were left out.
        ("random", &random, &top_p, u64::MAX),
        ("random", &random, &top_k, 0),
        ("random", &random, &min_p, 0),
    ] {
        let taken = answers(store, 1, parameters);
        let SamplingParameters { temperature, top_k, top_p, min_p, .. } = parameters;
        println!("{name}: {temperature}, top {top_k}, top {top_p}, min {min_p}: {taken:?}");
        assert!(taken.whole <= most_whole, "{name}: {taken:?} for {parameters:?}");
    }
}
