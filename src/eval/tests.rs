//! Windowing, and scores against the logits themselves.

use super::*;
use crate::logits::{LogitsOptions, logits};

#[test]
fn windows_cover_every_input_once() {
    let cut = |tokens, window| windows(tokens, window).collect::<Vec<_>>();
    assert_eq!(cut(2049, 256).len(), 8, "2049 tokens give 2048 scores in whole windows");
    assert_eq!(cut(6, 2), [0..2, 2..4, 4..5]);
    assert_eq!(cut(2, 256).last(), Some(&(0..1)));
    assert!(cut(1, 256).is_empty() && cut(0, 256).is_empty());
}

fn synthetic(dir: &tempfile::TempDir) -> Store {
    let path = dir.path().join("store");
    model::synth(&"2x64x128x2x1x96".parse().unwrap(), 5, &path, &mut |_| {}).unwrap();
    Store::open(&path).unwrap()
}

fn one_thread() -> PipelineOptions {
    PipelineOptions { threads: 1, ..PipelineOptions::default() }
}

/// -ln p of `target` by the definition, in f64.
fn surprise(logits: &[f32], target: u32) -> f64 {
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
    sum.ln() - f64::from(logits[target as usize])
}

#[test]
fn a_score_sees_its_own_window_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = synthetic(&dir);
    let tokens: Vec<u32> = (0..11).map(|i| i * 37 % 96).collect();
    let window = 4;
    let mut sum = 0.0;
    for range in windows(tokens.len(), window) {
        let options = LogitsOptions { pipeline: one_thread(), ..LogitsOptions::default() };
        let rows = logits(&store, &options, &tokens[range.clone()]).unwrap();
        for (row, target) in rows.iter().zip(&tokens[range.start + 1..]) {
            sum += surprise(row, *target);
        }
    }
    let mut seen = vec![];
    let found = evaluate(&store, &one_thread(), &tokens, window, &mut |done, total| {
        seen.push((done, total));
    });
    let found = found.unwrap();
    assert_eq!(found.tokens, 10);
    assert!((found.nll - sum / 10.0).abs() < 1e-5, "{} and {}", found.nll, sum / 10.0);
    assert_eq!(found.perplexity, found.nll.exp());
    assert_eq!(seen, [(4, 10), (8, 10), (10, 10)]);
}

#[test]
fn what_cannot_be_scored_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = synthetic(&dir);
    let evaluate = |tokens: &[u32], window| {
        evaluate(&store, &one_thread(), tokens, window, &mut |_, _| {}).unwrap_err()
    };
    assert!(matches!(evaluate(&[1], 4), EvalError::TooFew { found: 1 }));
    assert!(matches!(evaluate(&[1, 2], 0), EvalError::Window { .. }));
    assert!(matches!(evaluate(&[1, 2], 1 << 20), EvalError::Window { .. }));
    assert!(matches!(evaluate(&[1, 96], 4), EvalError::Pipeline(PipelineError::Row { .. })));
}
