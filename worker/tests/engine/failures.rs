//! What an engine refuses, and that a row fails alone.

use model::synth::SynthFamily;
use model::{ModelConfig, Store};
use proto::ids::{BlockId, Generation};
use proto::plan::KvType;
use proto::step::{Output, Row, RowStatus, RowValue, SamplingParameters};
use worker::engine::{Engine, EngineConfig, EngineError, RowOutcome, StageModel, kv_bytes};

use crate::pipeline::{LAYERS, Pipeline, Sequence, VOCAB, engine, plain, tiny};

fn sample(change: impl FnOnce(&mut SamplingParameters)) -> Output {
    let mut parameters = SamplingParameters::default();
    change(&mut parameters);
    Output::Sample(Box::new(parameters))
}

#[test]
fn a_row_that_breaks_the_contract_is_invalid_and_alone() {
    type Change = fn(&mut Row);
    let table: [(&str, Change); 13] = [
        ("no tokens", |row| row.tokens.clear()),
        ("at most 64", |row| row.tokens = vec![0; 65]),
        ("token 97", |row| row.tokens[3] = VOCAB),
        ("token 4294967295", |row| row.tokens[0] = u32::MAX),
        ("context", |row| row.position = 4096 - 9),
        ("context", |row| row.position = u32::MAX),
        ("names 0", |row| row.blocks.clear()),
        ("need 2 blocks", |row| row.position = 30),
        ("block 256", |row| row.blocks[0] = BlockId(256)),
        ("9 targets", |row| row.output = Output::Score(vec![0; 9])),
        ("target 97", |row| row.output = Output::Score([&[0; 9][..], &[VOCAB]].concat())),
        ("temperature", |row| row.output = sample(|p| p.temperature = f32::NAN)),
        ("logit_bias", |row| row.output = sample(|p| p.logit_bias = vec![(VOCAB, 1.0)])),
    ];
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let config = EngineConfig { max_step_tokens: 64, ..plain() };
    let (victim, other) = (Sequence::new(0, 10), Sequence::new(1, 10));
    let good = [victim.row(0..10, sample(|_| {})), other.row(0..10, Output::Logits)];
    let mut pipeline = Pipeline::open(&store, 2, config);
    let want = pipeline.step(&good);
    for (words, change) in table {
        let mut rows = good.clone();
        change(&mut rows[0]);
        let outcomes = pipeline.step(&rows);
        assert_eq!(outcomes[0].status, RowStatus::Invalid, "{words}");
        assert!(outcomes[0].detail.contains(words), "{words}: {}", outcomes[0].detail);
        assert_eq!(outcomes[0].value, RowValue::None);
        assert_eq!(outcomes[1], want[1], "{words}");
    }
    assert_eq!(pipeline.step(&good), want, "refused rows leave the cache as it was");
}

#[test]
fn a_step_has_room_for_so_many_tokens() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let config = EngineConfig { max_step_tokens: 16, ..plain() };
    let rows: Vec<Row> = (0..3).map(|id| Sequence::new(id, 7).row(0..7, Output::Logits)).collect();
    let outcomes = Pipeline::open(&store, 1, config).step(&rows);
    let statuses = outcomes.iter().map(|outcome| outcome.status).collect::<Vec<_>>();
    assert_eq!(statuses, [RowStatus::Ok, RowStatus::Ok, RowStatus::Invalid]);
}

#[test]
fn what_was_refused_before_stays_refused_and_keeps_its_place() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let mut first = engine(&store, 0..2, plain());
    let sequences = [Sequence::new(0, 5), Sequence::new(1, 9), Sequence::new(2, 4)];
    let mut rows: Vec<Row> =
        sequences.iter().map(|s| s.row(0..s.tokens.len(), Output::None)).collect();
    let whole = first.forward(&rows, &[]);
    rows[1].status = RowStatus::NeedState;
    rows[1].detail = "said before".into();
    let output = first.forward(&rows, &[]);
    assert_eq!(output.rows[1].status, RowStatus::NeedState);
    assert_eq!(output.rows[1].detail, "said before");
    let hidden = first.hidden();
    let places = [0..5 * hidden, 5 * hidden..14 * hidden, 14 * hidden..18 * hidden];
    assert_eq!(output.activations.len(), whole.activations.len());
    assert_eq!(output.activations[places[0].clone()], whole.activations[places[0].clone()]);
    assert!(output.activations[places[1].clone()].iter().all(|x| *x == 0.0));
    assert_eq!(output.activations[places[2].clone()], whole.activations[places[2].clone()]);
}

#[test]
fn rows_of_a_sequence_come_in_order_and_build_on_one_another() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let sequence = Sequence::new(0, 30);
    let row = |range| sequence.row(range, Output::Logits);
    let mut pipeline = Pipeline::open(&store, 1, plain());
    let statuses = |outcomes: Vec<RowOutcome>| {
        outcomes.iter().map(|outcome| outcome.status).collect::<Vec<_>>()
    };
    let (ok, invalid, need_state) = (RowStatus::Ok, RowStatus::Invalid, RowStatus::NeedState);
    assert_eq!(statuses(pipeline.step(&[row(0..10), row(10..30)])), [ok, ok]);
    assert_eq!(statuses(pipeline.step(&[row(0..10), row(9..30)])), [ok, invalid]);
    assert_eq!(statuses(pipeline.step(&[row(10..20), row(0..10)])), [ok, invalid]);
    let mut broken = row(0..10);
    broken.tokens[0] = VOCAB;
    let after = [broken.clone(), row(10..20), row(20..30)];
    assert_eq!(statuses(pipeline.step(&after)), [invalid, need_state, need_state]);
    // Another life of the sequence does not build on it.
    let mut next_life = row(10..20);
    next_life.generation = Generation(2);
    assert_eq!(statuses(pipeline.step(&[broken, next_life])), [invalid, ok]);
}

/// NaN and infinities come in as activations of a later stage.
#[test]
fn a_row_that_is_not_finite_fails_alone() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let sequences: Vec<Sequence> = (0..3).map(|id| Sequence::new(id, 12)).collect();
    let rows = [
        sequences[0].row(0..12, Output::Logits),
        sequences[1].row(0..8, Output::Logits),
        sequences[1].row(8..12, Output::Logits),
        sequences[2].row(0..12, sample(|p| p.temperature = 1.0)),
    ];
    for threads in [1, 2] {
        let config = EngineConfig { threads, ..plain() };
        let activations = engine(&store, 0..1, config).forward(&rows, &[]).activations;
        let mut later = engine(&store, 1..LAYERS, config);
        let want = later.forward(&rows, &activations);
        let hidden = later.hidden();
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut activations = activations.clone();
            activations[14 * hidden + 5] = poison;
            let found = later.forward(&rows, &activations);
            assert_eq!(found.rows[0], want.rows[0], "{poison}");
            assert_eq!(found.rows[1].status, RowStatus::NotFinite, "{poison}");
            assert_eq!(found.rows[1].value, RowValue::None, "{poison}");
            assert_eq!(found.rows[2].status, RowStatus::NeedState, "{poison}");
            assert_eq!(found.rows[3], want.rows[3], "{poison}");
        }
        // Only the last row of the sequence, whose first went well.
        let mut poisoned = activations.clone();
        poisoned[21 * hidden] = f32::NAN;
        let found = later.forward(&rows, &poisoned);
        assert_eq!(found.rows[1], want.rows[1]);
        assert_eq!(found.rows[2].status, RowStatus::NotFinite);
        assert_eq!(later.forward(&rows, &activations), want, "it leaves no trace");

        // On a stage in the middle the row's place is zero.
        let output = engine(&store, 1..2, config).forward(&rows, &poisoned);
        assert_eq!(output.rows[2].status, RowStatus::NotFinite);
        assert!(output.activations[20 * hidden..24 * hidden].iter().all(|x| *x == 0.0));
        assert!(output.activations.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn a_penalty_that_overflows_fails_its_row() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let output = sample(|p| p.logit_bias = vec![(0, f32::MAX), (0, f32::MAX)]);
    let rows =
        [Sequence::new(0, 3).row(0..3, output), Sequence::new(1, 3).row(0..3, sample(|_| {}))];
    let outcomes = Pipeline::open(&store, 1, plain()).step(&rows);
    assert_eq!(outcomes[0].status, RowStatus::NotFinite);
    assert_eq!(outcomes[1].status, RowStatus::Ok);
}

#[test]
#[should_panic(expected = "activations must match the tokens of the step")]
fn activations_of_another_length_are_a_callers_bug() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    engine(&store, 1..2, plain()).forward(&[Sequence::new(0, 2).row(0..2, Output::None)], &[0.0]);
}

#[test]
fn an_engine_that_cannot_be_is_refused() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let open = |layers| StageModel::open(&store, layers).err();
    assert!(matches!(open(0..5), Some(EngineError::Layers { model_layers: LAYERS, .. })));
    assert!(matches!(open(2..2), Some(EngineError::Layers { .. })));
    let refusal = |config| {
        let model = StageModel::open(&store, 0..LAYERS).unwrap();
        Engine::new(model, config).err().unwrap().to_string()
    };
    assert!(refusal(EngineConfig { threads: 0, ..plain() }).contains("threads"));
    assert!(refusal(EngineConfig { kv_blocks: 0, ..plain() }).contains("KV blocks"));
    assert!(refusal(EngineConfig { max_step_tokens: 0, ..plain() }).contains("tokens"));
    let much = refusal(EngineConfig { kv_blocks: u32::MAX, ..plain() });
    assert!(much.starts_with("failed to get"), "{much}");
    let much = refusal(EngineConfig { max_step_tokens: u32::MAX, ..plain() });
    assert!(much.starts_with("failed to get"), "{much}");
}

#[test]
fn memory_is_counted() {
    let (_dir, store) = tiny(SynthFamily::BitNet);
    let config: &ModelConfig = store.config();
    // Layers, blocks, tokens, K and V, KV heads, dimension, bytes.
    assert_eq!(kv_bytes(config, 3, KvType::F16, 5), 3 * 5 * 32 * 2 * 2 * 18 * 2);
    assert_eq!(kv_bytes(config, 3, KvType::F32, 5), 3 * 5 * 32 * 2 * 2 * 18 * 4);
    assert_eq!(kv_bytes(config, u32::MAX, KvType::F32, u32::MAX), u64::MAX);
    let weights = |store: &Store, layers| engine(store, layers, plain()).weight_bytes();
    let layer = store.layer_bytes();
    assert_eq!(weights(&store, 1..3), 2 * layer);
    assert_eq!(weights(&store, 0..2), 2 * layer + store.embedding_bytes());
    let ends = store.embedding_bytes() + store.screen_bytes();
    assert_eq!(weights(&store, 0..LAYERS), 4 * layer + ends, "tied");
    let (_dir, llama) = tiny(SynthFamily::Llama);
    let ends = llama.embedding_bytes() + llama.head_bytes() + llama.screen_bytes();
    assert_eq!(weights(&llama, 0..LAYERS), 4 * llama.layer_bytes() + ends);
}
