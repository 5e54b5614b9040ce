//! Needs, thresholds and the order of floats.

use super::*;

fn need(parameters: SamplingParameters) -> Option<Need> {
    Need::of(Backend::detect(), &Output::Sample(Box::new(parameters)), 1_000)
}

#[test]
fn only_what_a_few_logits_decide_is_screened() {
    let drawn = SamplingParameters { temperature: 0.7, ..SamplingParameters::default() };
    let top_40 = SamplingParameters { top_k: 40, top_p: 0.9, min_p: 0.1, ..drawn.clone() };
    assert_eq!(need(SamplingParameters::default()), Some(Need { count: 1, reach: 0.0 }));
    assert_eq!(need(top_40.clone()), Some(Need { count: 40, reach: 0.0 }));
    let near = need(SamplingParameters { min_p: 0.1, ..drawn.clone() }).unwrap();
    assert!(near.count == 1 && (near.reach + 0.7 * (10f64.ln() + 1e-3)).abs() < 1e-6, "{near:?}");
    for whole in [
        drawn.clone(),
        SamplingParameters { top_p: 0.9, ..drawn.clone() },
        SamplingParameters { top_p: 0.9, min_p: 0.1, ..drawn.clone() },
        SamplingParameters { min_p: 1e-35, ..drawn.clone() },
        SamplingParameters { top_k: 129, ..drawn.clone() },
        SamplingParameters { top_k: 1_000, ..drawn },
        SamplingParameters { top_logprobs: Some(0), ..top_40 },
        SamplingParameters { top_logprobs: Some(0), ..SamplingParameters::default() },
    ] {
        assert_eq!(need(whole.clone()), None, "{whole:?}");
    }
    for output in [Output::None, Output::Logits, Output::Score(vec![1])] {
        assert_eq!(Need::of(Backend::detect(), &output, 1_000), None);
    }
}

#[test]
fn a_threshold_is_the_last_logit_that_is_needed() {
    let mut tracker = Tracker::new();
    tracker.begin(Need { count: 3, reach: 0.0 });
    for (logit, want) in [
        (1.0, f32::NEG_INFINITY),
        (5.0, f32::NEG_INFINITY),
        (3.0, 1.0),
        (0.5, 1.0),
        (4.0, 3.0),
        (4.0, 4.0),
        (4.0, 4.0),
        (9.0, 4.0),
    ] {
        tracker.offer(logit);
        assert_eq!(tracker.threshold(), want, "{logit}");
    }
    tracker.begin(Need { count: 1, reach: -2.5 });
    assert_eq!(tracker.threshold(), f32::NEG_INFINITY);
    tracker.offer(-1.0);
    assert_eq!(tracker.threshold(), -3.5);
}

#[test]
fn keys_have_the_order_of_floats() {
    let floats =
        [f32::NEG_INFINITY, f32::MIN, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, f32::MAX, f32::INFINITY];
    assert!(floats.map(in_order).is_sorted());
    for float in floats {
        assert_eq!(out_of_order(in_order(float)).to_bits(), float.to_bits());
    }
    let thresholds = Thresholds::default();
    thresholds.reset(3);
    assert_eq!(thresholds.raise(3, f32::NEG_INFINITY), f32::NEG_INFINITY);
    assert_eq!(thresholds.raise(3, -2.0), -2.0);
    assert_eq!(thresholds.raise(3, -3.0), -2.0);
}
