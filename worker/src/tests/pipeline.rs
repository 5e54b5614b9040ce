//! Steps through one and two workers: results, duplicates, lost links.

use std::ops::Range;
use std::time::{Duration, Instant};

use kernels::Backend;
use proto::ids::{Epoch, StepId, Term};
use proto::plan::KvType;
use proto::step::{
    Output, Prepare, Row, RowStatus, RowValue, SamplingParameters, StepResult, StepVerdict,
};
use tonic::Code;

use super::harness::{Results, Steps, Worker, prepare, row, step, store};
use crate::engine::{Engine, EngineConfig, Placement, Shortcuts, StageModel};

fn sample() -> Output {
    Output::Sample(Box::new(SamplingParameters { top_logprobs: Some(3), ..Default::default() }))
}

/// Two prompts in chunks of several steps, mixed, then tokens one by one.
fn script() -> Vec<Vec<Row>> {
    vec![
        vec![row(0, 0, 20, Output::None)],
        vec![row(0, 20, 15, sample()), row(1, 0, 5, Output::Logits)],
        vec![row(1, 5, 1, Output::Score(vec![17])), row(0, 35, 1, sample())],
        vec![row(0, 36, 1, Output::Logits), row(0, 37, 1, sample()), row(1, 6, 2, sample())],
    ]
}

fn engine(layers: Range<u32>) -> Engine {
    let model = StageModel::open(&store(), layers).unwrap();
    let config = EngineConfig {
        backend: Backend::by_name("scalar").unwrap(),
        threads: 1,
        kv_type: KvType::F16,
        kv_blocks: 16,
        max_step_tokens: 64,
        shortcuts: Shortcuts::default(),
        placement: Placement::default(),
    };
    Engine::new(model, config).unwrap()
}

/// What the engine itself gives, whole or cut: one list of values for every step.
fn expected(stages: &[Range<u32>]) -> Vec<Vec<RowValue>> {
    let mut engines: Vec<Engine> = stages.iter().cloned().map(engine).collect();
    let run = |rows: Vec<Row>| {
        let mut activations = Vec::new();
        let mut values = Vec::new();
        for engine in &mut engines {
            let output = engine.forward(&rows, &activations);
            assert!(output.rows.iter().all(|row| row.status == RowStatus::Ok));
            activations = output.activations;
            values = output.rows.into_iter().map(|row| row.value).collect();
        }
        values
    };
    script().into_iter().map(run).collect()
}

fn values(result: &StepResult) -> Vec<RowValue> {
    result.rows.iter().map(|row| row.value.clone()).collect()
}

/// Two active workers, and the streams of a coordinator.
struct Pair {
    first: Worker,
    second: Worker,
    prepares: [Prepare; 2],
    steps: Steps,
    results: Results,
}

impl Pair {
    async fn start() -> Self {
        Self::start_with(false).await
    }

    /// The first stage draws too, if it is to.
    async fn start_with(draws: bool) -> Self {
        let mut first = Worker::start("a").await;
        let mut second = Worker::start("b").await;
        let stages = [first.plan(0..1), second.plan(1..4)];
        let first_prepare = Prepare { draws, ..prepare(&stages, 0, 5) };
        let prepares = [first_prepare, prepare(&stages, 1, 5)];
        first.prepare(&prepares[0]).await.unwrap();
        second.prepare(&prepares[1]).await.unwrap();
        first.activate(&prepares[0]).await.unwrap();
        second.activate(&prepares[1]).await.unwrap();
        let steps = first.steps().await;
        let results = second.results(&prepares[1], 0).await;
        Self { first, second, prepares, steps, results }
    }
}

#[tokio::test]
async fn two_workers_give_what_one_engine_gives() {
    let all_layers = 0..4;
    let whole = expected(std::slice::from_ref(&all_layers));
    assert_eq!(whole, expected(&[0..1, 1..4]), "the engine itself may be cut");

    let mut worker = Worker::start("w").await;
    let prepare = worker.serve_alone(5).await;
    let mut steps = worker.steps().await;
    let mut results = worker.results(&prepare, 0).await;
    let mut pair = Pair::start().await;
    for (number, (rows, expected)) in (1..).zip(script().into_iter().zip(&whole)) {
        steps.give(&step(&prepare, number, rows.clone())).await;
        let alone = results.next().await;
        assert_eq!(&values(&alone), expected, "one worker, step {number}");
        pair.steps.give(&step(&pair.prepares[0], number, rows)).await;
        let result = pair.results.next().await;
        assert_eq!(&values(&result), expected, "two workers, step {number}");
        let stages: Vec<u32> = result.stage_times.iter().map(|time| time.stage).collect();
        assert_eq!(stages, [0, 1]);
    }
    assert_eq!(pair.first.describe().await.steps, 4);
}

#[tokio::test]
async fn the_first_stage_draws_what_the_last_one_would() {
    let all_layers = 0..4;
    let whole = expected(std::slice::from_ref(&all_layers));
    let mut pair = Pair::start_with(true).await;
    let mut number = 0;
    for (rows, expected) in script().into_iter().zip(&whole) {
        let mut states = rows.clone();
        let samples = |row: &Row| matches!(row.output, Output::Sample(_));
        for row in states.iter_mut().filter(|row| samples(row)) {
            row.output = Output::State;
        }
        number += 1;
        let mut first = step(&pair.prepares[0], number, states);
        first.header.acked_step = StepId(number - 1);
        pair.steps.give(&first).await;
        let found = values(&pair.results.next().await);
        let mut draws = Vec::new();
        let mut wanted = Vec::new();
        let mut activations = Vec::new();
        for ((row, value), expected) in rows.into_iter().zip(found).zip(expected) {
            let (Output::Sample(parameters), RowValue::State(state)) = (&row.output, &value) else {
                assert_eq!(&value, expected);
                continue;
            };
            activations.extend_from_slice(state);
            wanted.push(expected.clone());
            let (at, output) = (row.tokens.len() - 1, Output::Draw(parameters.clone()));
            let position = row.position + at as u32;
            let prefix_hash_before = row.prefix_hash_before.then_all(&row.tokens[..at]);
            let tokens = row.tokens[at..].to_vec();
            draws.push(Row { position, prefix_hash_before, tokens, output, ..row });
        }
        if draws.is_empty() {
            continue;
        }
        // What a draw takes to be the sequence's blocks is not looked at.
        number += 1;
        let mut draw = step(&pair.prepares[0], number, draws);
        draw.header.acked_step = StepId(number - 1);
        draw.activations = activations.into();
        pair.steps.give(&draw).await;
        let result = pair.results.next().await;
        assert_eq!(values(&result), wanted, "step {number}");
        let stages: Vec<u32> = result.stage_times.iter().map(|time| time.stage).collect();
        assert_eq!(stages, [0], "it passes by the second stage's engine");
    }
    assert!(number > 6, "some were drawn");

    // Rows to draw from have no place among others, and a state too short no place at all.
    let mixed = vec![row(2, 0, 1, Output::None), row(3, 0, 1, Output::Draw(Box::default()))];
    let mut mixed = step(&pair.prepares[0], number + 1, mixed);
    mixed.header.acked_step = StepId(number);
    pair.steps.give(&mixed).await;
    let result = pair.results.next().await;
    assert_eq!((result.rows[0].status, result.rows[1].status), (RowStatus::Ok, RowStatus::Invalid));
    let mut short =
        step(&pair.prepares[0], number + 2, vec![row(3, 0, 1, Output::Draw(Box::default()))]);
    short.activations = vec![0; 4].into();
    assert_eq!(pair.steps.ask(&short).await.verdict, StepVerdict::Invalid);
}

#[tokio::test]
async fn a_stage_without_a_head_draws_nothing() {
    let mut pair = Pair::start().await;
    pair.steps.give(&step(&pair.prepares[0], 1, vec![row(3, 0, 1, Output::State)])).await;
    assert!(matches!(values(&pair.results.next().await)[..], [RowValue::State(_)]));
    let mut draw = step(&pair.prepares[0], 2, vec![row(3, 0, 1, Output::Draw(Box::default()))]);
    draw.activations = vec![0; 4 * engine(0..1).hidden()].into();
    pair.steps.give(&draw).await;
    let result = pair.results.next().await;
    assert_eq!(
        (result.rows[0].status, &result.rows[0].value),
        (RowStatus::Invalid, &RowValue::None)
    );
}

#[tokio::test]
async fn a_duplicate_is_answered_with_the_same_bytes_and_computed_once() {
    let mut pair = Pair::start().await;
    let first = step(&pair.prepares[0], 1, vec![row(0, 0, 20, sample())]);
    pair.steps.give(&first).await;
    let result = pair.results.next().await;
    pair.steps.give(&first).await;
    assert_eq!(pair.results.next().await, result, "times included: nothing was computed");
    assert_eq!(pair.first.describe().await.steps, 1);
    assert_eq!(pair.second.describe().await.steps, 1);
    // Acknowledged by a later step, it is nobody's concern any more.
    let mut second = step(&pair.prepares[0], 2, vec![row(0, 20, 1, sample())]);
    second.header.acked_step = StepId(1);
    pair.steps.give(&second).await;
    let next = pair.results.next().await;
    assert_eq!(next.step, StepId(2));
    pair.steps.give(&first).await;
    pair.steps.give(&second).await;
    assert_eq!(pair.results.next().await, next);
    assert_eq!(pair.first.describe().await.steps, 2);
}

#[tokio::test]
async fn a_reader_that_comes_back_gets_what_was_not_acknowledged() {
    let mut worker = Worker::start("w").await;
    let prepare = worker.serve_alone(5).await;
    let mut steps = worker.steps().await;
    let mut results = worker.results(&prepare, 0).await;
    let mut seen = Vec::new();
    for number in 1..=3 {
        let row = row(0, number as u32 - 1, 1, sample());
        steps.give(&step(&prepare, number, vec![row])).await;
        seen.push(results.next().await);
    }
    let mut again = worker.results(&prepare, 1).await;
    assert_eq!(results.end().await.code(), Code::Aborted, "one reader at a time");
    assert_eq!([again.next().await, again.next().await], seen[1..]);
    drop(again);
    let mut whole = worker.results(&prepare, 0).await;
    assert_eq!([whole.next().await, whole.next().await, whole.next().await], seen[..]);
}

#[tokio::test]
async fn only_the_last_stage_gives_results() {
    let mut pair = Pair::start().await;
    let status = pair.first.try_results(&pair.prepares[0], 0).await.map(drop).unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("the last one does"), "{status:?}");
}

#[tokio::test]
async fn a_refusal_of_a_later_stage_reaches_the_sender() {
    let mut pair = Pair::start().await;
    pair.second.retire(&pair.prepares[1]).await.unwrap();
    pair.steps.give(&step(&pair.prepares[0], 1, vec![row(0, 0, 5, Output::None)])).await;
    let reply = pair.steps.reply().await;
    assert_eq!((reply.verdict, reply.stage), (StepVerdict::Fenced, 1));
    assert_eq!(reply.step, StepId(1));
}

#[tokio::test]
async fn a_step_that_is_kept_goes_on_in_the_reign_in_which_it_comes_again() {
    let mut pair = Pair::start().await;
    // The last stage hears of a new reign, by a call that changes nothing for this epoch.
    let earlier = Prepare { epoch: Epoch(4), term: Term(8), ..pair.prepares[1].clone() };
    pair.second.retire(&earlier).await.unwrap();
    let mut sent = step(&pair.prepares[0], 1, vec![row(0, 0, 5, sample())]);
    pair.steps.give(&sent).await;
    let reply = pair.steps.reply().await;
    assert_eq!((reply.verdict, reply.stage), (StepVerdict::Fenced, 1));
    sent.header.term = Term(8);
    pair.steps.give(&sent).await;
    assert_eq!(pair.results.next().await.step, StepId(1));
    assert_eq!(pair.first.describe().await.steps, 1, "computed once");
}

#[tokio::test]
async fn a_lost_neighbour_is_reported_and_gets_what_is_kept_when_it_is_back() {
    let mut pair = Pair::start().await;
    let sent = step(&pair.prepares[0], 1, vec![row(0, 0, 5, Output::None)]);
    pair.steps.give(&sent).await;
    pair.results.next().await;
    let address = pair.second.address.clone();
    pair.second.kill().await;
    let killed = Instant::now();
    let reply = pair.steps.reply().await;
    assert!(killed.elapsed() < Duration::from_millis(900), "nobody is there: no need to wait");
    assert_eq!((reply.verdict, reply.stage), (StepVerdict::DownstreamLost, 0));
    assert_eq!(reply.step, StepId(0), "it is about the link");
    assert!(reply.detail.contains(&address), "{}", reply.detail);
    // Who sends again thinks that it is up again.
    pair.steps.give(&sent).await;
    assert_eq!(pair.steps.reply().await.verdict, StepVerdict::DownstreamLost);
    // Whoever comes later is told as well.
    let mut later = pair.first.steps().await;
    later.send(&sent).await;
    let mut said = [later.reply().await.verdict, later.reply().await.verdict];
    said.sort_by_key(|verdict| *verdict == StepVerdict::DownstreamLost);
    assert_eq!(said, [StepVerdict::Accepted, StepVerdict::DownstreamLost]);

    // Another process start at the same address: the link is up again, and what is kept comes to
    // it; it is fenced there, because it was meant for the one before.
    let mut third = Worker::start_with("b", &address, 1 << 30).await;
    let reply = later.reply().await;
    assert_eq!((reply.verdict, reply.stage), (StepVerdict::Fenced, 1));
    assert!(reply.detail.contains("incarnation"), "{}", reply.detail);
    assert_eq!(third.describe().await.steps, 0);
}
