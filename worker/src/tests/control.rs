//! Prepare, Activate, Retire and Describe.

use kernels::KERNEL_REVISION;
use proto::convert::decode_description;
use proto::held::{HeldStage, HeldState};
use proto::ids::{Epoch, Incarnation, KnownAnswer, ModelId, NumericsClass, PipelineRef, Term};
use proto::plan::KvType;
use proto::step::{Output, Prepare, StepVerdict};
use tonic::Code;

use super::harness::{Worker, model_id, prepare, row, step};

#[tokio::test]
async fn a_worker_goes_from_standby_to_active_and_back() {
    let mut worker = Worker::start("w").await;
    let standby = worker.describe().await;
    assert_eq!((standby.worker.as_str(), standby.state.as_str()), ("w", "standby"));
    assert_eq!(standby.incarnation, worker.incarnation.0.to_vec());
    let prepare = prepare(&[worker.plan(0..4)], 0, 5);
    let prepared = worker.prepare(&prepare).await.unwrap();
    let class = NumericsClass::form(model_id(), KvType::F16, KERNEL_REVISION, KnownAnswer([7; 32]));
    assert_eq!(prepared.numerics_class, class.0.to_vec());
    assert!(prepared.weight_bytes > 0 && prepared.kv_bytes > 0);
    let held = worker.describe().await;
    assert_eq!(held.state, "prepared");
    // Hashed and read: that is how far it was while it prepared.
    assert!(standby.prepared_bytes == 0 && held.prepared_bytes >= prepared.weight_bytes);
    worker.activate(&prepare).await.unwrap();
    worker.activate(&prepare).await.expect("saying so twice changes nothing");
    let active = worker.describe().await;
    assert_eq!((active.state.as_str(), active.epoch, active.term), ("active", 5, 1));
    assert_eq!((active.layers_begin, active.layers_end), (0, 4));
    worker.retire(&prepare).await.unwrap();
    worker.retire(&prepare).await.expect("saying so twice changes nothing");
    assert_eq!(worker.describe().await.state, "standby");
    let reply = worker.steps().await.ask(&step(&prepare, 1, vec![])).await;
    assert_eq!(reply.verdict, StepVerdict::Fenced, "a retired epoch is over");
}

#[tokio::test]
async fn it_says_everything_that_it_holds() {
    let mut worker = Worker::start("w").await;
    let held = async |worker: &mut Worker| {
        decode_description(worker.describe().await).expect("it speaks our language").held
    };
    assert_eq!(held(&mut worker).await, []);
    let old = prepare(&[worker.plan(0..4)], 0, 5);
    worker.prepare(&old).await.unwrap();
    worker.activate(&old).await.unwrap();
    let new = Prepare { kv_blocks: 8, ..prepare(&[worker.plan(0..4)], 0, 6) };
    worker.prepare(&new).await.unwrap();
    let both = held(&mut worker).await;
    let said: Vec<_> = both.iter().map(|h| (h.at.to_string(), h.state, h.kv_blocks)).collect();
    let expected = [
        ("1@5".to_owned(), HeldState::Active, old.kv_blocks),
        ("1@6".to_owned(), HeldState::Prepared, 8),
    ];
    assert_eq!(said, expected);
    let first = HeldStage {
        at: PipelineRef { id: old.pipeline, epoch: old.epoch },
        term: old.term,
        state: HeldState::Active,
        stage: 0,
        layers: 0..4,
        model: model_id(),
        kv_type: old.kv_type,
        kv_blocks: old.kv_blocks,
        bytes: both[0].bytes,
    };
    assert_eq!(both[0], first);
    assert!(both[1].bytes > 0 && both[1].bytes < both[0].bytes, "less KV: {both:?}");
    worker.activate(&new).await.unwrap();
    assert_eq!(held(&mut worker).await.len(), 1, "what is over is not held");
}

/// The code and words with which a changed `Prepare` is refused; the worker stands by after it.
async fn check(change: impl FnOnce(&mut Prepare), code: Code, words: &str) {
    let mut worker = Worker::start_with("w", "127.0.0.1:0", 4 << 20).await;
    let mut request = prepare(&[worker.plan(0..4)], 0, 5);
    change(&mut request);
    let status = worker.prepare(&request).await.unwrap_err();
    assert_eq!(status.code(), code, "{status:?}");
    assert!(status.message().contains(words), "{status:?}");
    assert_eq!(worker.describe().await.state, "standby");
}

#[tokio::test]
async fn what_cannot_be_prepared_is_refused() {
    let other = Incarnation([1; 16]);
    check(|p| p.dst_incarnation = other, Code::FailedPrecondition, "incarnation").await;
    check(|p| p.stages[0].incarnation = other, Code::FailedPrecondition, "this is w").await;
    check(|p| p.stages[0].worker = "v".into(), Code::FailedPrecondition, "this is w").await;
    check(|p| p.model = ModelId([1; 32]), Code::NotFound, "no store of model 0101").await;
    check(|p| p.kv_blocks = 1 << 20, Code::ResourceExhausted, "memory").await;
    check(|p| p.stages[0].layers = 0..3, Code::InvalidArgument, "the model has 4").await;
    check(|p| p.stages[0].layers = 0..5, Code::InvalidArgument, "the model has 4").await;
    check(|p| p.stages[0].layers = 1..4, Code::InvalidArgument, "malformed").await;
    check(|p| p.max_in_flight = 5000, Code::InvalidArgument, "5000").await;
    check(|p| p.max_step_tokens = 0, Code::InvalidArgument, "malformed").await;
}

#[tokio::test]
async fn an_older_term_is_refused_everywhere() {
    let mut worker = Worker::start("w").await;
    let mut newer = prepare(&[worker.plan(0..4)], 0, 5);
    newer.term = Term(8);
    worker.prepare(&newer).await.unwrap();
    let older = Prepare { term: Term(7), epoch: Epoch(6), ..newer.clone() };
    let refused = [
        worker.prepare(&older).await.map(drop).unwrap_err(),
        worker.activate(&Prepare { term: Term(7), ..newer.clone() }).await.unwrap_err(),
        worker.retire(&older).await.unwrap_err(),
        worker.try_results(&older, 0).await.map(drop).unwrap_err(),
    ];
    for status in refused {
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains("term 7 is over"), "{status:?}");
    }
    worker.activate(&newer).await.unwrap();
}

#[tokio::test]
async fn epochs_only_go_forward() {
    let mut worker = Worker::start("w").await;
    let current = worker.serve_alone(5).await;
    let again = worker.prepare(&current).await;
    assert!(again.is_ok(), "the same request is answered again");
    let differs = Prepare { kv_blocks: 8, ..current.clone() };
    let older = Prepare { epoch: Epoch(4), ..current.clone() };
    let elsewhere = Prepare { cluster_id: "other".into(), epoch: Epoch(9), ..current.clone() };
    for (request, words) in
        [(differs, "differently"), (older, "epoch 4 is over"), (elsewhere, "cluster")]
    {
        let status = worker.prepare(&request).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains(words), "{status:?}");
    }
    let unknown = Prepare { epoch: Epoch(7), ..current };
    let status = worker.activate(&unknown).await.unwrap_err();
    assert!(status.message().contains("not prepared"), "{status:?}");
    assert_eq!(worker.describe().await.epoch, 5);
}

#[tokio::test]
async fn an_unchanged_stage_keeps_its_kv_and_serves_until_the_next_is_active() {
    let mut worker = Worker::start("w").await;
    let old = worker.serve_alone(5).await;
    let mut steps = worker.steps().await;
    let mut results = worker.results(&old, 0).await;
    steps.give(&step(&old, 1, vec![row(0, 0, 20, Output::None)])).await;
    results.next().await;

    let new = Prepare { epoch: Epoch(6), ..old.clone() };
    worker.prepare(&new).await.unwrap();
    steps.give(&step(&old, 2, vec![row(0, 20, 1, Output::None)])).await;
    assert!(results.next().await.rows[0].detail.is_empty(), "the old epoch goes on");
    let mut new_results = worker.results(&new, 0).await;
    steps.give(&step(&new, 1, vec![row(0, 21, 1, Output::None)])).await;
    let result = new_results.next().await;
    assert_eq!(result.rows[0].status, proto::step::RowStatus::Ok, "{result:?}");

    worker.activate(&new).await.unwrap();
    assert_eq!(results.end().await.code(), Code::Aborted, "the old epoch's reader is told");
    let reply = steps.ask(&step(&old, 3, vec![])).await;
    assert_eq!(reply.verdict, StepVerdict::Fenced);
}
