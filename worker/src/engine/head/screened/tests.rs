//! Needs, thresholds and the order of floats.

use proto::step::SamplingParameters;

use super::*;

fn need(parameters: SamplingParameters) -> Option<Need> {
    Need::of(&Output::Sample(Box::new(parameters)), 1_000)
}

#[test]
fn what_is_asked_tells_what_is_needed() {
    let drawn = SamplingParameters { temperature: 0.75, ..SamplingParameters::default() };
    let top_40 = SamplingParameters { top_k: 40, top_p: 0.9, min_p: 0.1, ..drawn.clone() };
    let greatest = |count| Some(Need::Greatest { count });
    assert_eq!(need(SamplingParameters::default()), greatest(1));
    assert_eq!(need(top_40.clone()), greatest(40));
    let score = Some(Need::Score { temperature: 0.75 });
    assert_eq!(need(drawn.clone()), score);
    assert_eq!(need(SamplingParameters { top_k: 1_000, ..drawn.clone() }), score, "keeps all");
    for cut in [
        SamplingParameters { top_p: 0.9, ..drawn.clone() },
        SamplingParameters { top_p: 0.9, min_p: 0.1, ..drawn.clone() },
        SamplingParameters { min_p: 0.1, ..drawn.clone() },
        SamplingParameters { top_k: 129, ..drawn },
    ] {
        assert_eq!(need(cut.clone()), Some(Need::Cut { temperature: 0.75 }), "{cut:?}");
    }
    for whole in [
        SamplingParameters { top_logprobs: Some(0), ..top_40 },
        SamplingParameters { top_logprobs: Some(0), ..SamplingParameters::default() },
    ] {
        assert_eq!(need(whole.clone()), None, "{whole:?}");
    }
    for output in [Output::None, Output::Logits, Output::Score(vec![1])] {
        assert_eq!(Need::of(&output, 1_000), None);
    }
}

#[test]
fn a_threshold_is_the_last_logit_that_is_needed() {
    let mut tracker = Tracker::new();
    tracker.begin(Need::Greatest { count: 3 }, 0);
    for (logit, want) in [
        (1.0, f64::NEG_INFINITY),
        (5.0, f64::NEG_INFINITY),
        (3.0, 1.0),
        (0.5, 1.0),
        (4.0, 3.0),
        (4.0, 4.0),
        (4.0, 4.0),
        (9.0, 4.0),
    ] {
        tracker.offer(7, logit);
        assert_eq!(tracker.least(), want, "{logit}");
    }
    tracker.begin(Need::Greatest { count: 1 }, 0);
    assert_eq!(tracker.least(), f64::NEG_INFINITY);
}

#[test]
fn the_threshold_of_a_draw_is_the_best_score() {
    let mut tracker = Tracker::new();
    for need in [Need::Score { temperature: 0.5 }, Need::Cut { temperature: 0.5 }] {
        tracker.begin(need, 11);
        let scores = [(3, 1.0), (70, -2.0), (5, 2.5)].map(|(token, logit)| {
            tracker.offer(token, logit);
            f64::from(logit) / 0.5 + gumbel(11, token)
        });
        assert_eq!(tracker.least(), scores.into_iter().fold(f64::NEG_INFINITY, f64::max));
    }
}

#[test]
fn keys_have_the_order_of_floats() {
    let floats = [
        f64::NEG_INFINITY,
        f64::MIN,
        -1.0,
        -5e-324,
        -0.0,
        0.0,
        5e-324,
        1.0,
        f64::MAX,
        f64::INFINITY,
    ];
    assert!(floats.map(in_order).is_sorted());
    for float in floats {
        assert_eq!(out_of_order(in_order(float)).to_bits(), float.to_bits());
    }
    let progress = Progress::default();
    progress.reset(3);
    assert_eq!(progress.raise(3, f64::NEG_INFINITY), f64::NEG_INFINITY);
    assert_eq!(progress.raise(3, -2.0), -2.0);
    assert_eq!(progress.raise(3, -3.0), -2.0);
}
