//! What the first stage draws from a residual stream that came back to it is what the last stage, or
//! a stage that is all of them, would have drawn.

use kernels::Backend;
use model::synth::SynthFamily;
use model::{Store, SynthShape, synth};
use proto::step::{Output, Row, RowStatus, RowValue};
use worker::engine::{Engine, EngineConfig, StageModel};

use crate::pipeline::{Sequence, engine, open, plain};
use crate::screened::{VOCAB, asked};

fn store_of_two_layers(family: SynthFamily) -> (tempfile::TempDir, Store) {
    let shape =
        SynthShape { layers: 2, hidden: 72, ffn: 150, heads: 4, kv_heads: 2, vocab: VOCAB, family };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    synth(&shape, 5, &path, &mut |_| {}).unwrap();
    let store = open(&path);
    (dir, store)
}

fn first_that_draws(store: &Store, config: EngineConfig) -> Engine {
    Engine::new(StageModel::open_to_draw(store, 0..1).unwrap(), config).unwrap()
}

/// Rows that sample, as they are drawn from.
fn draw_rows(rows: &[Row]) -> Vec<Row> {
    let draw = |row: &Row| {
        let Output::Sample(parameters) = &row.output else { panic!("{row:?}") };
        let at = row.tokens.len() - 1;
        let (tokens, position) = (row.tokens[at..].to_vec(), row.position + at as u32);
        Row { tokens, position, output: Output::Draw(parameters.clone()), ..row.clone() }
    };
    rows.iter().map(draw).collect()
}

#[test]
fn a_draw_gives_the_token_of_a_sample() {
    for family in [SynthFamily::BitNet, SynthFamily::Llama] {
        let (_dir, store) = store_of_two_layers(family);
        let mut whole = engine(&store, 0..2, plain());
        for (backend, threads) in [
            (Backend::by_name("scalar").unwrap(), 1),
            (Backend::detect(), 1),
            (Backend::detect(), 3),
        ] {
            let config = EngineConfig { backend, threads, ..plain() };
            let mut first = first_that_draws(&store, config);
            let mut last = engine(&store, 1..2, config);
            assert!(first.has_head() && !first.is_last());
            let asked = asked();
            for (start, count) in [(0, 1), (1, 2), (3, 8), (11, 8), (19, 8)] {
                let rows: Vec<Row> = (0..count)
                    .map(|i| {
                        let parameters = asked[(start + i) % asked.len()].clone();
                        Sequence::new(i as u64, 5).row(0..5, Output::Sample(Box::new(parameters)))
                    })
                    .collect();
                let want = whole.forward(&rows, &[]).rows;
                let states: Vec<Row> =
                    rows.iter().map(|row| Row { output: Output::State, ..row.clone() }).collect();
                let between = first.forward(&states, &[]);
                let ended = last.forward(&states, &between.activations);
                assert!(ended.activations.is_empty());
                let mut input = Vec::new();
                for row in &ended.rows {
                    let RowValue::State(bytes) = &row.value else { panic!("{row:?}") };
                    input.extend(bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)));
                }
                let drawn = first.draw(&draw_rows(&rows), &input);
                assert!(drawn.activations.is_empty());
                assert_eq!(drawn.rows, want, "{count} rows, {threads} threads of {backend:?}");
            }
        }
    }
}

#[test]
fn a_state_that_is_not_finite_fails_its_row_alone() {
    let (_dir, store) = store_of_two_layers(SynthFamily::BitNet);
    let hidden = store.config().hidden as usize;
    let mut first = first_that_draws(&store, plain());
    let rows: Vec<Row> =
        (0..3).map(|id| Sequence::new(id, 1).row(0..1, Output::Draw(Box::default()))).collect();
    let mut input: Vec<f32> = (0..3 * hidden).map(|i| (i % 5) as f32 - 2.0).collect();
    input[hidden + 3] = f32::NAN;
    let statuses: Vec<_> = first.draw(&rows, &input).rows.iter().map(|row| row.status).collect();
    assert_eq!(statuses, [RowStatus::Ok, RowStatus::NotFinite, RowStatus::Ok]);

    let long = [Sequence::new(0, 2).row(0..2, Output::Draw(Box::default()))];
    let refused = first.draw(&long, &vec![0.0; 2 * hidden]);
    assert_eq!(refused.rows[0].status, RowStatus::Invalid, "{}", refused.rows[0].detail);
}
