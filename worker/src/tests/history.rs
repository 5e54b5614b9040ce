//! A registry that is lost, or restored from a backup: workers believe what it says now, and nobody
//! else who says that it was.

use proto::convert::encode_prepare;
use proto::ids::{Epoch, PipelineId, Term};
use proto::step::{Output, Prepare, StepVerdict};
use tonic::{Code, Request};

use super::harness::{KEY, Worker, prepare, row, step};

/// A worker that serves epoch 50 alone at term 40.
async fn serving() -> (Worker, Prepare) {
    let mut worker = Worker::start("w").await;
    let before = Prepare { term: Term(40), ..prepare(&[worker.plan(0..4)], 0, 50) };
    worker.prepare(&before).await.unwrap();
    worker.activate(&before).await.unwrap();
    (worker, before)
}

/// It serves `now`, and nothing of `before`.
async fn has_moved(worker: &mut Worker, before: &Prepare, now: &Prepare) {
    worker.prepare(now).await.expect("the registry says so");
    let said = worker.describe().await;
    assert_eq!((said.term, said.epoch, said.state.as_str()), (now.term.0, now.epoch.0, "prepared"));
    worker.activate(now).await.unwrap();
    let late = worker.steps().await.ask(&step(before, 1, vec![])).await;
    assert_ne!(late.verdict, StepVerdict::Accepted, "a step of before: {late:?}");
    let mut results = worker.results(now, 0).await;
    worker.steps().await.give(&step(now, 1, vec![row(0, 0, 1, Output::None)])).await;
    assert_eq!(results.next().await.step.0, 1);
}

#[tokio::test]
async fn a_worker_joins_the_cluster_of_a_registry_that_was_lost() {
    let (mut worker, before) = serving().await;
    let now = Prepare {
        cluster_id: "new".into(),
        term: Term(2),
        epoch: Epoch(4),
        pipeline: PipelineId(2),
        ..before.clone()
    };
    let early = worker.prepare(&now).await.unwrap_err();
    assert_eq!(early.code(), Code::FailedPrecondition, "{early:?}");
    assert_eq!(worker.describe().await.epoch, 50, "an invented cluster moves nobody");

    worker.registry.begin_anew("new", Term(2), 4);
    has_moved(&mut worker, &before, &now).await;
    let back = worker.prepare(&before).await.unwrap_err();
    assert_eq!(back.code(), Code::FailedPrecondition, "{back:?}");
}

#[tokio::test]
async fn a_worker_follows_a_registry_that_went_back() {
    // A later leader of a lower term; the same leader at a lower revision, be it that of its backup.
    for (term, revision, epoch) in [(30, 45, 45), (40, 45, 45), (30, 60, 60), (40, 49, 42)] {
        let (mut worker, before) = serving().await;
        let now = Prepare { term: Term(term), epoch: Epoch(epoch), ..before.clone() };
        worker.registry.begin_anew("test", Term(term), revision);
        has_moved(&mut worker, &before, &now).await;
    }
}

#[tokio::test]
async fn the_new_leader_retires_what_is_beyond_its_registry() {
    let (mut worker, before) = serving().await;
    worker.registry.begin_anew("new", Term(2), 4);
    worker.retire(&Prepare { term: Term(2), ..before.clone() }).await.unwrap();
    assert_eq!(worker.describe().await.state, "standby");
    let now =
        Prepare { cluster_id: "new".into(), term: Term(2), epoch: Epoch(4), ..before.clone() };
    has_moved(&mut worker, &before, &now).await;
}

#[tokio::test]
async fn only_the_registry_and_its_leader_say_that_it_began_anew() {
    let (mut worker, before) = serving().await;
    let forged = [
        Prepare { cluster_id: "invented".into(), ..before.clone() },
        Prepare { term: Term(2), epoch: Epoch(4), ..before.clone() },
        Prepare { epoch: Epoch(4), ..before.clone() },
    ];
    for request in &forged {
        // By the leader itself, while the registry is what it was, and by a stranger.
        worker.prepare(request).await.unwrap_err();
        let stranger = Request::new(encode_prepare(request));
        worker.client.prepare(stranger).await.unwrap_err();
    }
    worker.registry.begin_anew("new", Term(2), 4);
    let true_but_not_from_the_leader =
        Prepare { cluster_id: "new".into(), term: Term(2), epoch: Epoch(4), ..before.clone() };
    let stranger = Request::new(encode_prepare(&true_but_not_from_the_leader));
    let refused = worker.client.prepare(stranger).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
    let said = worker.describe().await;
    assert_eq!((said.term, said.epoch, said.state.as_str()), (40, 50, "active"));
    let mut results = worker.results(&before, 0).await;
    worker.steps().await.give(&step(&before, 1, vec![row(0, 0, 1, Output::None)])).await;
    assert_eq!(results.next().await.step.0, 1, "it serves on");
    // The leader says it, too.
    worker.client.prepare(KEY.attach(encode_prepare(&true_but_not_from_the_leader))).await.unwrap();
}
