//! Tables of parameters and draws, ties, hostile values, and the statistics of many draws.

use std::collections::HashMap;

use super::*;

const BACKEND: fn() -> Backend = Backend::detect;

fn parameters(temperature: f32) -> SamplingParameters {
    SamplingParameters { temperature, ..SamplingParameters::default() }
}

fn token(logits: &[f32], parameters: &SamplingParameters, position: u32) -> u32 {
    check(parameters, logits.len() as u32).unwrap();
    sample(BACKEND(), logits, parameters, position, &mut Scratch::new(logits.len()).unwrap())
        .unwrap()
        .token
}

/// How often each token is drawn at the positions `0..draws`.
fn counts(logits: &[f32], parameters: &SamplingParameters, draws: u32) -> HashMap<u32, u32> {
    let mut counts = HashMap::new();
    for position in 0..draws {
        *counts.entry(token(logits, parameters, position)).or_default() += 1;
    }
    counts
}

#[test]
fn greedy_takes_the_lowest_of_equals() {
    for (logits, want) in [
        (vec![1.0, 3.0, 2.0], 1),
        (vec![2.0, 1.0, 2.0, 2.0], 0),
        (vec![-0.0, 0.0, -0.0], 0),
        (vec![-5.0, -4.0, -4.0], 1),
        (vec![7.0], 0),
    ] {
        assert_eq!(token(&logits, &parameters(0.0), 3), want, "{logits:?}");
    }
}

#[test]
fn penalties_and_bias_move_the_logits_they_name() {
    let base = SamplingParameters::default();
    let prompt = vec![(0, 9), (2, 1)];
    let output = vec![(0, 1), (3, 2)];
    let table = [
        (base.clone(), vec![2.0, 1.0, -1.0, 1.5]),
        // Once for each token seen, whether in the prompt, the output or both.
        (
            SamplingParameters { repetition_penalty: 2.0, ..base.clone() },
            vec![1.0, 1.0, -2.0, 0.75],
        ),
        (SamplingParameters { presence_penalty: 0.5, ..base.clone() }, vec![1.5, 1.0, -1.0, 1.0]),
        (SamplingParameters { frequency_penalty: 0.5, ..base.clone() }, vec![1.5, 1.0, -1.0, 0.5]),
        (
            SamplingParameters { logit_bias: vec![(1, 4.0), (1, -0.5), (3, 1.0)], ..base.clone() },
            vec![2.0, 4.5, -1.0, 2.5],
        ),
        // Penalties first: the sign that the repetition penalty asks for is the model's.
        (
            SamplingParameters {
                repetition_penalty: 2.0,
                frequency_penalty: 0.25,
                presence_penalty: 1.0,
                logit_bias: vec![(2, 10.0), (0, -1.0)],
                ..base
            },
            vec![-1.25, 1.0, 8.0, -0.75],
        ),
    ];
    for (parameters, want) in table {
        let parameters = SamplingParameters {
            prompt_counts: prompt.clone(),
            output_counts: output.clone(),
            ..parameters
        };
        let mut logits = [2.0, 1.0, -1.0, 1.5];
        adjust(&mut logits, &parameters);
        assert_eq!(logits.to_vec(), want, "{parameters:?}");
    }
}

/// A dozen tokens of probabilities from a third to a few in ten thousand, in no order.
const DOZEN: [f32; 12] = [0.4, -1.0, 2.5, 1.1, -4.0, 0.0, 3.0, -2.2, 1.9, -0.3, -3.1, 0.8];

/// The 99.99th percentile of the chi-squared distribution of 1 to 11 degrees of freedom.
const CHI_SQUARED: [f64; 11] =
    [15.14, 18.42, 21.11, 23.51, 25.74, 27.86, 29.88, 31.83, 33.72, 35.56, 37.37];

/// Draws a million times and compares how often each token came with its share of `weights`. The draws
/// are fixed, so this never changes.
#[track_caller]
fn check_shares(logits: &[f32], parameters: &SamplingParameters, weights: &[f64]) {
    const DRAWS: u32 = 1_000_000;
    let mut scratch = Scratch::new(logits.len()).unwrap();
    let mut counts = vec![0u32; logits.len()];
    for position in 0..DRAWS {
        let sampled = sample(BACKEND(), logits, parameters, position, &mut scratch).unwrap();
        counts[sampled.token as usize] += 1;
    }
    let total: f64 = weights.iter().sum();
    // Tokens that are too rare for the statistic count as one.
    let (mut cells, mut rare) = (Vec::new(), (0.0, 0.0));
    for (count, weight) in counts.iter().zip(weights) {
        let (count, expected) = (f64::from(*count), f64::from(DRAWS) * weight / total);
        match expected {
            0.0 => assert_eq!(count, 0.0, "{counts:?}"),
            ..10.0 => rare = (rare.0 + count, rare.1 + expected),
            _ => cells.push((count, expected)),
        }
    }
    cells.extend((rare.1 > 0.0).then_some(rare));
    let sum: f64 =
        cells.iter().map(|(count, expected)| (count - expected).powi(2) / expected).sum();
    let kept = cells.len();
    assert!(sum < CHI_SQUARED[kept - 2], "{parameters:?}: {sum} of {counts:?}");
}

fn softmax_weights(temperature: f64) -> Vec<f64> {
    DOZEN.iter().map(|logit| (f64::from(*logit) / temperature).exp()).collect()
}

#[test]
fn draws_follow_the_softmax() {
    for (seed, temperature) in [(1, 0.5), (2, 1.0), (3, 2.0)] {
        let parameters = SamplingParameters { seed, ..parameters(temperature) };
        check_shares(&DOZEN, &parameters, &softmax_weights(f64::from(temperature)));
    }
}

#[test]
fn draws_after_cuts_follow_what_they_leave() {
    // By rank: tokens 6, 2, 8, 3, 11, …; top-p 0.8 keeps four of the first five at temperature 1.
    let base = SamplingParameters { seed: 4, ..parameters(1.0) };
    let leave = |tokens: &[usize]| {
        let mut weights = softmax_weights(1.0);
        let is_kept = |token: &usize| tokens.contains(token);
        (0..weights.len()).filter(|token| !is_kept(token)).for_each(|token| weights[token] = 0.0);
        weights
    };
    let top_k = SamplingParameters { top_k: 5, ..base.clone() };
    check_shares(&DOZEN, &top_k, &leave(&[6, 2, 8, 3, 11]));
    let top_p = SamplingParameters { top_k: 5, top_p: 0.8, ..base.clone() };
    check_shares(&DOZEN, &top_p, &leave(&[6, 2, 8]));
    let min_p = SamplingParameters { min_p: 0.1, ..base };
    check_shares(&DOZEN, &min_p, &leave(&[6, 2, 8, 3, 11]));
}

/// The definition, line by line: every score, and the greatest.
fn definition(logits: &[f32], parameters: &SamplingParameters, position: u32) -> u32 {
    let key = draw_key(parameters.seed, parameters.choice, position);
    let score = |token: usize| {
        let noise = gumbel(key, token as u32);
        f64::from(logits[token]) / f64::from(parameters.temperature) + noise
    };
    let best = (0..logits.len()).map(score).fold(f64::NEG_INFINITY, f64::max);
    (0..logits.len()).position(|token| score(token) == best).unwrap() as u32
}

#[test]
fn what_bounds_spare_changes_no_draw() {
    // Wide and narrow, tied and not, more tokens than a block and not whole blocks.
    let table: [fn(u32) -> f32; 4] = [
        |i| ((i * 7919) % 1009) as f32 / 30.0,
        |i| ((i * 7919) % 1009) as f32 / 3000.0,
        |i| (i % 3) as f32,
        |i| if i % 500 == 7 { 12.0 } else { -3.0 },
    ];
    for (at, logit) in table.into_iter().enumerate() {
        for vocab in [1, 63, 64, 65, 2_003] {
            let logits: Vec<f32> = (0..vocab).map(logit).collect();
            for temperature in [1e-30, 0.3, 1.0, 1e3] {
                let parameters = SamplingParameters { seed: at as u64, ..parameters(temperature) };
                for position in 0..40 {
                    let want = definition(&logits, &parameters, position);
                    assert_eq!(token(&logits, &parameters, position), want, "{parameters:?}");
                }
            }
        }
    }
}

#[test]
fn temperature_sharpens_and_flattens() {
    let logits = [0.0, 2.0];
    let share = |temperature: f32| {
        let counts = counts(&logits, &parameters(temperature), 20_000);
        f64::from(counts.get(&1).copied().unwrap_or(0)) / 20_000.0
    };
    for (temperature, want) in [(0.5, 0.9820), (1.0, 0.8808), (2.0, 0.7311), (1e30, 0.5)] {
        assert!((share(temperature) - want).abs() < 0.02, "{temperature}: {}", share(temperature));
    }
    // So cold that every difference overflows: the best alone remains.
    assert_eq!(share(1e-44), 1.0);
}

#[test]
fn cuts_keep_the_candidates_they_say() {
    // Probabilities 0.4, 0.3, 0.2, 0.1 for tokens 3, 1, 0, 2.
    let logits: Vec<f32> = [0.2f32, 0.3, 0.1, 0.4].iter().map(|p| p.ln()).collect();
    let base = parameters(1.0);
    let table: [(SamplingParameters, &[u32]); 11] = [
        (base.clone(), &[0, 1, 2, 3]),
        (SamplingParameters { top_k: 1, ..base.clone() }, &[3]),
        (SamplingParameters { top_k: 3, ..base.clone() }, &[0, 1, 3]),
        (SamplingParameters { top_k: 99, ..base.clone() }, &[0, 1, 2, 3]),
        (SamplingParameters { top_p: 0.39, ..base.clone() }, &[3]),
        (SamplingParameters { top_p: 0.5, ..base.clone() }, &[1, 3]),
        (SamplingParameters { top_p: 0.75, ..base.clone() }, &[0, 1, 3]),
        (SamplingParameters { top_p: f32::MIN_POSITIVE, ..base.clone() }, &[3]),
        (SamplingParameters { min_p: 0.6, ..base.clone() }, &[1, 3]),
        // Top-p looks at what top-k left: 0.5 of 0.7 is within the first candidate.
        (SamplingParameters { top_k: 2, top_p: 0.5, ..base.clone() }, &[3]),
        (SamplingParameters { top_k: 3, top_p: 0.99, min_p: 0.7, ..base }, &[1, 3]),
    ];
    for (parameters, want) in table {
        let mut found: Vec<u32> = counts(&logits, &parameters, 2_000).into_keys().collect();
        found.sort_unstable();
        assert_eq!(found, want, "{parameters:?}");
    }
}

#[test]
fn top_k_breaks_ties_by_the_lowest_id() {
    let logits = [1.0, 5.0, 5.0, 5.0, 0.0];
    let found = counts(&logits, &SamplingParameters { top_k: 2, ..parameters(1.0) }, 1_000);
    assert_eq!(found.len(), 2);
    assert!(found.contains_key(&1) && found.contains_key(&2));
}

#[test]
fn ranking_piece_by_piece_gives_the_whole_order() {
    let vocab = 3_000;
    let logits: Vec<f32> = (0..vocab).map(|i| ((i * 7919) % 1009) as f32 / 200.0).collect();
    let mut ranked: Vec<u32> = (0..vocab).collect();
    ranked.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    let mut tokens = vec![0; vocab as usize];
    let mut ranking = Ranking::new(&logits, &mut tokens);
    let found: Vec<u32> = (0..vocab as usize).map(|rank| ranking.token(rank)).collect();
    assert_eq!(found, ranked);
}

#[test]
fn a_draw_depends_on_seed_choice_and_position_alone() {
    let logits = [0.0; 64];
    let key = |seed, choice, position| {
        let parameters = SamplingParameters { seed, choice, ..parameters(1.0) };
        token(&logits, &parameters, position)
    };
    assert_eq!(key(1, 2, 3), key(1, 2, 3));
    let series = |seed, choice| (0..32).map(|position| key(seed, choice, position)).collect();
    let all: Vec<Vec<u32>> = vec![series(1, 0), series(2, 0), series(1, 1), series(u64::MAX, 0)];
    for (index, one) in all.iter().enumerate() {
        assert!(all[..index].iter().all(|other| other != one), "series {index} came before");
    }
}

#[test]
fn logprobs_are_of_the_raw_logits() {
    let logits: Vec<f32> = [0.5f32, 0.125, 0.125, 0.25].iter().map(|p| p.ln() - 40.0).collect();
    let parameters = SamplingParameters {
        logit_bias: vec![(1, 100.0)],
        top_k: 1,
        top_logprobs: Some(3),
        ..parameters(0.7)
    };
    let mut scratch = Scratch::new(4).unwrap();
    let sampled = sample(BACKEND(), &logits, &parameters, 0, &mut scratch).unwrap();
    assert_eq!(sampled.token, 1);
    let is_near = |found: f32, p: f32| (found - p.ln()).abs() < 1e-5;
    assert!(is_near(sampled.logprob.unwrap(), 0.125));
    let tops: Vec<u32> = sampled.top.iter().map(|top| top.token).collect();
    assert_eq!(tops, [0, 3, 1], "by logit, then by id");
    assert!(is_near(sampled.top[0].logprob, 0.5) && is_near(sampled.top[1].logprob, 0.25));
    assert_eq!(sampled.top[2].logprob, sampled.logprob.unwrap());
    assert_eq!(score(BACKEND(), &logits, 0, &mut scratch), sampled.top[0].logprob);

    let silent = SamplingParameters { top_logprobs: None, ..parameters.clone() };
    let sampled = sample(BACKEND(), &logits, &silent, 0, &mut scratch).unwrap();
    assert_eq!((sampled.logprob, sampled.top.len()), (None, 0));
    let own_only = SamplingParameters { top_logprobs: Some(0), ..parameters };
    let sampled = sample(BACKEND(), &logits, &own_only, 0, &mut scratch).unwrap();
    assert!(sampled.logprob.is_some() && sampled.top.is_empty());
}

#[test]
fn every_backend_draws_the_same() {
    let vocab = 1_000;
    let logits: Vec<f32> = (0..vocab).map(|i| ((i * 7919) % 1009) as f32 / 100.0).collect();
    let parameters =
        SamplingParameters { top_p: 0.9, top_k: 200, top_logprobs: Some(5), ..parameters(0.8) };
    for position in 0..50 {
        let draw = |backend| {
            sample(backend, &logits, &parameters, position, &mut Scratch::new(vocab).unwrap())
                .unwrap()
        };
        let want = draw(Backend::by_name("scalar").unwrap());
        for backend in Backend::available() {
            assert_eq!(draw(backend), want, "{}, position {position}", backend.name());
        }
    }
}

#[test]
fn an_overflow_is_not_a_token() {
    let parameters = SamplingParameters { logit_bias: vec![(0, f32::MAX)], ..parameters(1.0) };
    let mut scratch = Scratch::new(2).unwrap();
    let outcome = sample(BACKEND(), &[f32::MAX, 0.0], &parameters, 0, &mut scratch);
    assert_eq!(outcome, Err(NotFinite));
}

#[test]
fn hostile_parameters_are_refused_by_name() {
    type Change = fn(&mut SamplingParameters);
    let table: [(&str, Change); 23] = [
        ("temperature", |p| p.temperature = f32::NAN),
        ("temperature", |p| p.temperature = f32::INFINITY),
        ("temperature", |p| p.temperature = -0.1),
        ("top_p", |p| p.top_p = 0.0),
        ("top_p", |p| p.top_p = -1.0),
        ("top_p", |p| p.top_p = 1.0001),
        ("top_p", |p| p.top_p = f32::NAN),
        ("min_p", |p| p.min_p = -0.5),
        ("min_p", |p| p.min_p = 1.5),
        ("min_p", |p| p.min_p = f32::NAN),
        ("repetition_penalty", |p| p.repetition_penalty = 0.0),
        ("repetition_penalty", |p| p.repetition_penalty = -1.0),
        ("repetition_penalty", |p| p.repetition_penalty = f32::NAN),
        ("repetition_penalty", |p| p.repetition_penalty = f32::INFINITY),
        ("presence_penalty", |p| p.presence_penalty = f32::NEG_INFINITY),
        ("frequency_penalty", |p| p.frequency_penalty = f32::NAN),
        ("logit_bias", |p| p.logit_bias = vec![(0, f32::INFINITY)]),
        ("logit_bias", |p| p.logit_bias = vec![(10, 1.0)]),
        ("prompt counts", |p| p.prompt_counts = vec![(3, 1), (3, 1)]),
        ("output counts", |p| p.output_counts = vec![(4, 1), (2, 1)]),
        ("output counts", |p| p.output_counts = vec![(10, 1)]),
        ("output counts", |p| p.output_counts = vec![(1, 0)]),
        ("top_logprobs", |p| p.top_logprobs = Some(TOP_LOGPROBS + 1)),
    ];
    for (name, change) in table {
        let mut parameters = SamplingParameters::default();
        assert_eq!(check(&parameters, 10), Ok(()));
        change(&mut parameters);
        let refusal = check(&parameters, 10).unwrap_err();
        assert!(refusal.contains(name), "{parameters:?}: {refusal}");
    }
}
