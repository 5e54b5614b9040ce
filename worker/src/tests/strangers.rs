//! What a stranger tries who reaches a worker's port and knows all that `Describe` and a plan say,
//! but not the coordinator's key: nothing of it changes what the coordinator's own calls do.

use std::time::Duration;

use proto::convert::{encode_prepare, encode_step};
use proto::ids::{Epoch, Incarnation, PrefixHash, StepId, Term};
use proto::key::CoordinatorKey;
use proto::pb;
use proto::pb::stage_client::StageClient;
use proto::plan::StagePlan;
use proto::step::{Output, Prepare, Row, RowValue, Sampled, StepVerdict};
use tokio::task::JoinSet;
use tonic::transport::Endpoint;
use tonic::{Code, Request, Status};

use super::harness::{KEY, Steps, Worker, connect, prepare, row, soon, step};
use crate::bridge::IN_FLIGHT_MAX;
use crate::witness::Leader;

const GUESS: CoordinatorKey = CoordinatorKey::new([7; 16]);

/// A worker that serves epoch 5 alone, and a step of it that is answered before and after.
async fn serving() -> (Worker, Prepare) {
    let mut worker = Worker::start("w").await;
    let prepare = worker.serve_alone(5).await;
    serves(&mut worker, &prepare, 1).await;
    (worker, prepare)
}

/// The coordinator sends step `number` and gets its result.
async fn serves(worker: &mut Worker, prepare: &Prepare, number: u64) {
    let mut results = worker.results(prepare, number - 1).await;
    let mut sent = step(prepare, number, vec![row(0, number as u32 - 1, 1, Output::None)]);
    sent.header.acked_step.0 = number - 1;
    worker.steps().await.give(&sent).await;
    assert_eq!(results.next().await.step.0, number);
}

/// `message` as each stranger sends it: without a key, and with a guessed one.
fn forgeries<T: Clone>(message: &T) -> [Request<T>; 2] {
    [Request::new(message.clone()), GUESS.attach(message.clone())]
}

fn retire(prepare: &Prepare, epoch: u64, term: u64) -> pb::RetireRequest {
    pb::RetireRequest {
        pipeline: prepare.pipeline.0,
        epoch,
        term,
        dst_incarnation: prepare.dst_incarnation.0.to_vec().into(),
    }
}

fn is_refused<T>(outcome: Result<T, Status>, code: Code) {
    let status = outcome.err().expect("a stranger's call is refused");
    assert_eq!(status.code(), code, "{status:?}");
}

#[tokio::test]
async fn a_term_that_nobody_was_elected_for_locks_no_coordinator_out() {
    let (mut worker, prepare) = serving().await;
    for term in [2, u64::MAX] {
        for request in forgeries(&retire(&prepare, 0, term)) {
            is_refused(soon(worker.client.retire(request)).await, Code::FailedPrecondition);
        }
        let claimed =
            encode_prepare(&Prepare { term: Term(term), epoch: Epoch(6), ..prepare.clone() });
        for request in forgeries(&claimed) {
            is_refused(soon(worker.client.prepare(request)).await, Code::FailedPrecondition);
        }
    }
    assert_eq!(worker.describe().await.term, 1);
    serves(&mut worker, &prepare, 2).await;
    worker.serve_alone(6).await;
}

#[tokio::test]
async fn an_epoch_beyond_the_registry_is_not_prepared() {
    let (mut worker, prepare) = serving().await;
    let last = encode_prepare(&Prepare { epoch: Epoch(u64::MAX), ..prepare.clone() });
    for request in forgeries(&last) {
        is_refused(soon(worker.client.prepare(request)).await, Code::PermissionDenied);
    }
    // Not even for one that knows the key: the number cannot be true.
    is_refused(soon(worker.client.prepare(KEY.attach(last))).await, Code::FailedPrecondition);
    let all = retire(&prepare, u64::MAX, 1);
    is_refused(soon(worker.client.retire(KEY.attach(all))).await, Code::FailedPrecondition);
    serves(&mut worker, &prepare, 2).await;
    worker.serve_alone(6).await;
}

#[tokio::test]
async fn a_stranger_neither_retires_nor_replaces_nor_activates_an_epoch() {
    let (mut worker, prepare) = serving().await;
    for request in forgeries(&retire(&prepare, 5, 1)) {
        is_refused(soon(worker.client.retire(request)).await, Code::PermissionDenied);
    }
    let next = Prepare { epoch: Epoch(6), ..prepare.clone() };
    for request in forgeries(&encode_prepare(&next)) {
        is_refused(soon(worker.client.prepare(request)).await, Code::PermissionDenied);
    }
    worker.prepare(&next).await.unwrap();
    let activate = pb::ActivateRequest {
        pipeline: 1,
        epoch: 6,
        term: 1,
        dst_incarnation: prepare.dst_incarnation.0.to_vec().into(),
    };
    for request in forgeries(&activate) {
        is_refused(soon(worker.client.activate(request)).await, Code::PermissionDenied);
    }
    // A stranger of another cluster does not make the worker forget what it has seen.
    let elsewhere = Prepare { cluster_id: "other".into(), ..next.clone() };
    for request in forgeries(&encode_prepare(&elsewhere)) {
        is_refused(soon(worker.client.prepare(request)).await, Code::PermissionDenied);
    }
    serves(&mut worker, &prepare, 2).await;
}

#[tokio::test]
async fn a_stranger_reads_no_results_and_does_not_turn_the_reader_away() {
    let (mut worker, prepare) = serving().await;
    let mut results = worker.results(&prepare, 0).await;
    assert_eq!(results.next().await.step.0, 1);
    let request = pb::ResultsRequest {
        pipeline: 1,
        epoch: 5,
        term: 1,
        dst_incarnation: prepare.dst_incarnation.0.to_vec().into(),
        after_step: 0,
    };
    for request in forgeries(&request) {
        is_refused(soon(worker.client.results(request)).await, Code::PermissionDenied);
    }
    worker.steps().await.give(&step(&prepare, 2, vec![row(0, 1, 1, Output::None)])).await;
    assert_eq!(results.next().await.step.0, 2, "the reader is still there");
}

#[tokio::test]
async fn a_stranger_sends_no_steps() {
    let (mut worker, prepare) = serving().await;
    // It acknowledges all that can ever come, or takes the place of the step that is next.
    let mut all = step(&prepare, u64::MAX, vec![]);
    all.header.acked_step.0 = u64::MAX - 1;
    for sent in [all, step(&prepare, 2, vec![row(1, 0, 1, Output::None)])] {
        let mut keyless = Steps::open_as(&mut worker.client, Request::new).await;
        keyless.send(&sent).await;
        assert_eq!(keyless.end().await.code(), Code::PermissionDenied);
        let mut guess = Steps::open_as(&mut worker.client, |steps| GUESS.attach(steps)).await;
        guess.send(&sent).await;
        assert_eq!(guess.end().await.code(), Code::PermissionDenied);
    }
    serves(&mut worker, &prepare, 2).await;
}

/// Another coordinator leads from term 2 on, with the key [`GUESS`], and asks again for what is held.
async fn taken_over(worker: &mut Worker, prepare: &Prepare) {
    let term = Term(2);
    let leader = Leader { term, key_digest: Some(GUESS.digest()) };
    worker.registry.set(|reading| reading.leader = Some(leader));
    let again = encode_prepare(&Prepare { term, ..prepare.clone() });
    soon(worker.client.prepare(GUESS.attach(again))).await.unwrap();
}

#[tokio::test]
async fn a_coordinator_whose_stage_another_took_over_is_fenced() {
    let (mut worker, prepare) = serving().await;
    let mut open = worker.steps().await;
    open.give(&step(&prepare, 2, vec![row(0, 1, 1, Output::None)])).await;
    taken_over(&mut worker, &prepare).await;
    // On the stream that it has, and on another; whatever it has in flight.
    let mut anew = worker.steps().await;
    for steps in [&mut open, &mut anew] {
        for number in 3..=6 {
            let reply = steps.ask(&step(&prepare, number, vec![])).await;
            assert_eq!((reply.verdict, reply.step.0), (StepVerdict::Fenced, number), "{reply:?}");
            assert_eq!(reply.at.epoch, prepare.epoch, "what it knows already");
        }
    }
    // What it says of the new term is no coordinator's word, and nobody is told for ever.
    let mut claims = step(&prepare, 3, vec![]);
    claims.header.term = Term(2);
    open.send(&claims).await;
    assert_eq!(open.end().await.code(), Code::PermissionDenied);
    let mut told = 4;
    let refused = loop {
        anew.send(&step(&prepare, 3, vec![])).await;
        match soon(anew.next()).await {
            Ok(_) => told += 1,
            Err(status) => break status,
        }
    };
    assert_eq!((refused.code(), told), (Code::PermissionDenied, 2 * IN_FLIGHT_MAX));
    // Its reader and its calls hear the same in their words.
    let code = |outcome: Result<_, Status>| outcome.err().map(|status: Status| status.code());
    let failed = Some(Code::FailedPrecondition);
    assert_eq!(code(worker.try_results(&prepare, 2).await.map(drop)), failed);
    let old = KEY.attach(retire(&prepare, 5, 1));
    assert_eq!(code(soon(worker.client.retire(old)).await.map(drop)), failed);
    // The new one is served.
    let mut steps = Steps::open_as(&mut worker.client, |steps| GUESS.attach(steps)).await;
    claims.rows = vec![row(0, 2, 1, Output::None)];
    steps.give(&claims).await;
}

/// A last stage, fed as its neighbour feeds it.
async fn last_of_two() -> (Worker, Prepare) {
    let mut worker = Worker::start("b").await;
    let first = StagePlan {
        worker: "a".into(),
        incarnation: Incarnation([1; 16]),
        address: "127.0.0.1:1".into(),
        layers: 0..1,
    };
    let prepare = prepare(&[first, worker.plan(1..4)], 1, 5);
    worker.prepare(&prepare).await.unwrap();
    worker.activate(&prepare).await.unwrap();
    (worker, prepare)
}

#[tokio::test]
async fn tokens_that_were_not_due_are_not_taken_for_drawn_ones() {
    let (mut worker, prepare) = last_of_two().await;
    let mut results = worker.results(&prepare, 0).await;
    let mut steps = worker.steps().await;
    let numbered = |number: u64, row: Row| {
        let hidden_bytes = 64 * size_of::<f32>();
        let tokens = row.tokens.len();
        let drawn = matches!(row.output, Output::Drawn(_));
        let mut sent = step(&prepare, number, vec![row]);
        sent.header.dst_incarnation = prepare.dst_incarnation;
        sent.activations = vec![0; if drawn { 0 } else { tokens * hidden_bytes }].into();
        sent
    };
    let drawn = |sequence, position, token| {
        let sampled = Sampled { token, logprob: None, top: Vec::new() };
        row(sequence, position, 1, Output::Drawn(Box::new(sampled)))
    };
    steps.give(&numbered(1, row(0, 0, 3, Output::State))).await;
    assert!(matches!(results.next().await.rows[0].value, RowValue::State(_)));
    // Rows for the step that comes next: of another sequence, position or history.
    let mut history = drawn(0, 2, 66);
    history.prefix_hash_before = PrefixHash::EMPTY;
    history.prefix_hash_after = PrefixHash::EMPTY.then_all(&history.tokens);
    for forged in [drawn(1, 2, 66), drawn(0, 3, 66), history] {
        let reply = steps.ask(&numbered(2, forged)).await;
        assert_eq!(reply.verdict, StepVerdict::Invalid, "{reply:?}");
    }
    steps.give(&numbered(2, drawn(0, 2, 9))).await;
    let result = results.next().await;
    let RowValue::Sampled(sampled) = &result.rows[0].value else { panic!("{result:?}") };
    assert_eq!((result.step, sampled.token), (StepId(2), 9), "the honest token");
}

#[tokio::test]
async fn calls_of_strangers_without_a_step_take_nobodys_place() {
    let (mut worker, prepare) = serving().await;
    let mut steps = worker.steps().await;
    // More than there are places, on a connection each; whoever is cut is cut.
    let mut strangers = JoinSet::new();
    for number in 0..300 {
        let address = worker.address.clone();
        strangers.spawn(async move {
            let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
            let channel = endpoint.connect().await.ok()?;
            let mut client = StageClient::new(channel);
            let nothing = tokio_stream::pending::<pb::StepMessage>();
            let call = match number % 2 {
                0 => client.steps(nothing).await,
                _ => client.steps(GUESS.attach(nothing)).await,
            };
            Some((client, call.ok()?))
        });
    }
    let mut open = Vec::new();
    while let Some(stranger) = soon(strangers.join_next()).await {
        open.extend(stranger.unwrap());
    }
    assert!(open.len() >= 200, "{}", open.len());
    for _ in 0..5 {
        let mut newcomer = connect(&worker.address).await;
        soon(newcomer.describe(pb::DescribeRequest {})).await.expect("there is room");
    }
    // The coordinator's quiet call is none of theirs.
    steps.give(&step(&prepare, 2, vec![row(0, 1, 1, Output::None)])).await;
}

/// How often calls of `method` to `worker` were refused for `cause`.
fn refused(worker: &str, method: &str, cause: &str) -> u64 {
    let text = node::metrics::render();
    let labels = [("worker", worker), ("method", method), ("cause", cause)];
    let labels = labels.map(|(name, value)| format!("{name}=\"{value}\""));
    let line = text.lines().find(|line| {
        line.starts_with("tercet_calls_refused_total{")
            && labels.iter().all(|label| line.contains(label))
    });
    line.map_or(0, |line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
}

#[tokio::test]
async fn quiet_calls_that_made_room_are_counted() {
    node::metrics::install().unwrap();
    let worker = Worker::start("crowd").await;
    // More than there is room for, on few connections: nobody is cut with his connection.
    let mut open = Vec::new();
    for _ in 0..5 {
        let mut client = connect(&worker.address).await;
        for _ in 0..60 {
            let call = client.steps(tokio_stream::pending::<pb::StepMessage>());
            open.push(soon(call).await.unwrap());
        }
    }
    let counted = async {
        while refused("crowd", "Steps", "crowded") < 300 - 256 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon(counted).await;
    assert_eq!(refused("crowd", "Steps", "malformed"), 0);
}

#[tokio::test]
async fn streams_of_steps_that_a_closing_worker_ends_are_counted() {
    node::metrics::install().unwrap();
    let mut worker = Worker::start("closes").await;
    worker.serve_alone(5).await;
    let mut steps = worker.steps().await;
    assert_eq!(refused("closes", "Steps", "closing"), 0);
    worker.service.closing().cancel();
    assert_eq!(steps.end().await.code(), Code::Unavailable);
    assert_eq!(refused("closes", "Steps", "closing"), 1);
}

#[tokio::test]
async fn the_key_is_judged_first_and_every_refusal_is_counted() {
    node::metrics::install().unwrap();
    let mut worker = Worker::start("counts").await;
    let prepare = worker.serve_alone(5).await;
    // For another epoch, process and term than any that is held, and without an incarnation.
    let mut elsewhere = step(&prepare, 1, vec![]);
    elsewhere.header.epoch = Epoch(99);
    let mut other = step(&prepare, 1, vec![]);
    other.header.dst_incarnation = Incarnation([9; 16]);
    let mut none = encode_step(&other);
    none.dst_incarnation = Vec::new().into();
    for message in [encode_step(&elsewhere), encode_step(&other), none] {
        let mut keyless = Steps::open_as(&mut worker.client, Request::new).await;
        keyless.send_message(message.clone()).await;
        assert_eq!(keyless.end().await.code(), Code::PermissionDenied, "{message:?}");
    }
    assert_eq!(refused("counts", "Steps", "key"), 3);
    for request in forgeries(&retire(&prepare, 5, 1)) {
        is_refused(soon(worker.client.retire(request)).await, Code::PermissionDenied);
    }
    assert_eq!(refused("counts", "Retire", "key"), 2);
    let claimed = encode_prepare(&Prepare { term: Term(7), epoch: Epoch(6), ..prepare.clone() });
    is_refused(soon(worker.client.prepare(KEY.attach(claimed))).await, Code::FailedPrecondition);
    assert_eq!(refused("counts", "Prepare", "term"), 1);
    let request = pb::ResultsRequest { pipeline: 1, epoch: 5, term: 1, ..Default::default() };
    is_refused(soon(worker.client.results(request)).await, Code::InvalidArgument);
    assert_eq!(refused("counts", "Results", "malformed"), 1);
    let activate = pb::ActivateRequest {
        pipeline: 1,
        epoch: 4,
        term: 1,
        dst_incarnation: prepare.dst_incarnation.0.to_vec().into(),
    };
    is_refused(soon(worker.client.activate(KEY.attach(activate))).await, Code::FailedPrecondition);
    assert_eq!(refused("counts", "Activate", "epoch"), 1);
}
