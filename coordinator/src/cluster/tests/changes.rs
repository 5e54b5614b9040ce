//! Planned changes: drains, short memory, workers that move, and a takeover.

use proto::operator::DrainState;

use super::*;

#[test]
fn a_drained_worker_is_replaced_beside_what_serves() {
    let mut script = Script::new(Some(2), workers(2));
    script.tell(Event::WorkerPut(record(3, 1)));
    script.pass(20_000);
    script.take();
    let before = script.at(1);
    script.tell(Event::WorkerPut(draining(1)));
    let actions = script.take();
    let pause = actions.iter().position(|a| *a == Action::Pause { at: before }).expect("a pause");
    let serve = actions.iter().position(|a| matches!(a, Action::Serve { .. })).expect("it serves");
    let retire = actions.iter().position(|a| {
        matches!(a, Action::Retire { at, target, .. } if *at == before && target.worker == "w1")
    });
    assert!(pause < serve && serve < retire.expect("it may go"), "{actions:?}");
    assert!(!actions.iter().any(|a| matches!(a, Action::Fail { .. } | Action::Leave { .. })));
    assert_eq!(script.served(), [(1, vec!["w0", "w3"])]);
    script.tell(Event::WorkerGone { worker: "w1".to_owned() });
    script.pass(30_000);
    assert_eq!(script.served(), [(1, vec!["w0", "w3"])]);
    assert!(!script.take().iter().any(is_alarm));
}

#[test]
fn a_drained_replica_leaves_its_sequences_to_the_others() {
    let mut script = Script::new(None, workers(2));
    script.take();
    let (leaving, staying) = (script.at(1), script.at(2));
    script.tell(Event::DrainWorker { worker: "w0".to_owned(), drain: true, force: false });
    let actions = script.take();
    assert!(actions.contains(&Action::Leave { at: leaving }), "{actions:?}");
    assert!(!actions.contains(&Action::Pause { at: staying }));
    assert_eq!(script.served(), [(2, vec!["w1"])]);
    assert_eq!(script.states(), ["w0 draining", "w1 active"]);
    assert_eq!(script.held["w0"], [], "it was retired");
    // It is told to end, which cannot be taken back; the process that comes after it is used.
    let is_dismissed =
        |action: &Action| matches!(action, Action::Dismiss { target, .. } if target.worker == "w0");
    assert_eq!(actions.iter().filter(|action| is_dismissed(action)).count(), 1, "{actions:?}");
    let (leave, dismiss) = (
        actions.iter().position(|action| matches!(action, Action::Leave { .. })),
        actions.iter().position(is_dismissed),
    );
    assert!(leave < dismiss, "{actions:?}");
    script.tell(Event::DrainWorker { worker: "w0".to_owned(), drain: false, force: false });
    script.pass(11_000);
    assert_eq!(script.states(), ["w0 draining", "w1 active"]);
    let again = script.take();
    assert_eq!(again.iter().filter(|action| is_dismissed(action)).count(), 2, "every 5 s");
    let incarnation = Incarnation([1; 16]);
    let fault = Some("unreachable".to_owned());
    let worker = "w0".to_owned();
    script.tell(Event::Dismissed { worker, incarnation, fault });
    let drained = script.cluster.drained("w0").unwrap();
    assert_eq!(drained.state, DrainState::Ending);
    assert_eq!(drained.detail, "it is told to end and does not hear: unreachable");
    script.tell(Event::WorkerPut(record(0, 2)));
    script.pass(11_000);
    assert_eq!(script.served().len(), 2, "and used again");
}

#[test]
fn a_drain_that_has_not_moved_anything_can_be_taken_back() {
    let mut script = Script::new(Some(2), workers(2));
    script.pass(20_000);
    let order = |script: &mut Script, drain| {
        script.tell(Event::DrainWorker { worker: "w0".to_owned(), drain, force: false });
    };
    let state = |script: &Script| script.cluster.drained("w0").unwrap().state;
    script.take();
    order(&mut script, true);
    script.pass(20_000);
    assert_eq!(
        script.take(),
        [],
        "nobody is there in its place, so it serves, and is not told to end"
    );
    assert_eq!(state(&script), DrainState::Moving);
    assert!(script.cluster.drained("w0").unwrap().detail.contains("2 stages were asked for"));
    order(&mut script, false);
    assert_eq!(state(&script), DrainState::InUse);
    order(&mut script, true);
    assert_eq!(state(&script), DrainState::Moving);
    // Who leads next was told nothing, and this one may hear of another order.
    script.tell(Event::TermLost);
    assert_eq!(state(&script), DrainState::InUse);
    assert_eq!(script.cluster.drained("w7"), None);
}

/// The plan in the registry says what was ordered.
#[test]
fn an_order_to_drain_outlives_the_reign_and_the_process_that_took_it() {
    let mut script = Script::new(Some(2), workers(2));
    script.pass(20_000);
    let order = |script: &mut Script, drain| {
        let worker = "w0".to_owned();
        script.tell(Event::DrainWorker { worker, drain, force: false });
    };
    let (serving, plans) = (script.at(1), script.plans.len());
    script.take();
    order(&mut script, true);
    assert!(script.cluster.drained("w0").unwrap().kept);
    script.pass(20_000);
    assert_eq!(
        (script.at(1), script.plans.len()),
        (serving, plans + 1),
        "only the order is written"
    );
    let ordered = script.plans.last().unwrap().drains.clone();
    assert_eq!((ordered.len(), ordered[0].worker.as_str()), (1, "w0"));
    // The same coordinator leads again: its lanes serve on, and it goes when somebody takes its place.
    script.tell(Event::TermLost);
    script.tell(Event::TermGained(Term(200)));
    script.revision = 200;
    assert_eq!(script.cluster.drained("w0").unwrap().state, DrainState::Moving);
    assert_eq!(script.at(1), serving);

    // Another one, that serves nothing yet: there is nobody else, so it is used once more, and not told
    // to end.
    let mut other = Script::with(options(Some(2)), Vec::new(), script.found.clone());
    other.revision = 300;
    other.tell(Event::Reset(workers(2)));
    assert_eq!(other.served(), [(1, vec!["w0", "w1"])]);
    assert!(other.reason().contains("no plan is possible without"), "{}", other.reason());
    other.pass(20_000);
    let dismissed = |action: &Action| matches!(action, Action::Dismiss { .. });
    assert!(!other.take().iter().any(dismissed));
    assert_eq!(other.states(), ["w0 draining", "w1 active"]);
    other.tell(Event::WorkerPut(record(3, 1)));
    assert_eq!(other.served(), [(1, vec!["w1", "w3"])]);
    assert!(other.take().iter().any(dismissed), "and then it is");

    // Taken back it is forgotten, and it never was about another process.
    order(&mut script, false);
    assert_eq!(script.plans.last().unwrap().drains, []);
    order(&mut script, true);
    let restarted = vec![record(0, 2), record(1, 1)];
    let Found::Plan { plan, .. } = script.found.clone() else { panic!() };
    let found = Found::Plan { revision: 90, plan: Plan { term: Term(3), ..plan } };
    let other = Script::with(options(Some(2)), restarted, found);
    assert_eq!(other.states()[0], "w0 active");
}

/// As SIGTERM lets it go, and at once: whoever forces it waits for nobody.
#[test]
fn a_worker_that_cannot_be_spared_is_let_go_if_that_is_forced_and_waited_for() {
    let mut script = Script::new(Some(2), workers(2));
    script.pass(20_000);
    script.take();
    let serving = script.at(1);
    let order = |script: &mut Script, force| {
        script.tell(Event::DrainWorker { worker: "w1".to_owned(), drain: true, force });
    };
    order(&mut script, false);
    script.pass(60_000);
    assert_eq!((script.take(), script.at(1)), (vec![], serving), "it is not spared");
    order(&mut script, true);
    let actions = script.take();
    let position = |wanted: &dyn Fn(&Action) -> bool| actions.iter().position(wanted);
    let leave = position(&|action| *action == Action::Leave { at: serving }).expect("it stops");
    let told =
        |action: &Action| matches!(action, Action::Dismiss { target, .. } if target.worker == "w1");
    assert!(leave < position(&told).expect("and it is told to end"), "{actions:?}");
    order(&mut script, false);
    let waits = |script: &Script| matches!(script.cluster.availability(), Availability::Soon(_));
    assert!(waits(&script), "{:?}", script.cluster.availability());
    script.tell(Event::WorkerPut(draining(1)));
    script.tell(Event::WorkerGone { worker: "w1".to_owned() });
    script.pass(30_000);
    assert!(waits(&script), "it is expected back: {:?}", script.cluster.availability());
    script.tell(Event::WorkerPut(record(1, 2)));
    script.pass(2_000);
    assert_eq!(script.served(), [(1, vec!["w0", "w1"])]);
    let actions = script.take();
    let bad = |action: &&Action| matches!(action, Action::Fail { .. } | Action::Alarm { .. });
    assert_eq!(actions.iter().find(bad), None, "nobody was lost");
}

#[test]
fn a_plan_that_was_asked_for_is_told_with_what_it_changes() {
    let mut script = Script::new(Some(1), workers(1));
    let plans = script.plans.len();
    script.tell(Event::PlanNow { any_gain: true });
    let same = script.cluster.planned().expect("it is decided").clone();
    assert_eq!((same.changes, same.possible, script.plans.len()), (false, true, plans));
    assert_eq!(same.reason, "1 of 1 workers");
    // A worker comes; nobody waits for the hold-down.
    script.tell(Event::WorkerPut(record(1, 1)));
    assert_eq!(script.plans.len(), plans);
    script.tell(Event::PlanNow { any_gain: false });
    let better = script.cluster.planned().unwrap();
    assert!(better.changes && better.tokens_per_s > better.before_tokens_per_s, "{better:?}");
    assert_eq!((script.plans.len(), script.served().len()), (plans + 1, 2));
    // Nobody is left: why is told, and what serves goes on.
    script.tell(Event::DrainWorker { worker: "w1".to_owned(), drain: true, force: false });
    script.tell(Event::DrainWorker { worker: "w0".to_owned(), drain: true, force: false });
    script.tell(Event::PlanNow { any_gain: true });
    let none = script.cluster.planned().unwrap();
    assert!(!none.possible && none.reason.contains("no worker can serve"), "{none:?}");
    assert_eq!(script.served().len(), 1);
}

#[test]
fn a_plan_that_was_asked_for_changes_nothing_for_too_little_unless_told_to() {
    let dear = Options { min_gain_percent: 100, ..options(Some(2)) };
    let four = [0, 2, 4, 5].map(|id| record(id, 1)).to_vec();
    let mut script = Script::with(dear, four, Found::Nothing);
    script.pass(1000);
    // Six are laid out anew, for half as much again; one of the two changes for it.
    for id in [1, 3] {
        script.tell(Event::WorkerPut(record(id, 1)));
    }
    script.tell(Event::PlanNow { any_gain: false });
    let planned = script.cluster.planned().unwrap();
    assert!(!planned.changes && planned.possible, "{planned:?}");
    assert!(planned.reason.contains("gain less than 100 % of what changes"), "{planned:?}");
    assert_eq!(script.served().len(), 2);
    script.tell(Event::PlanNow { any_gain: true });
    assert!(script.cluster.planned().unwrap().changes);
    assert_eq!(script.served().len(), 3);
}

#[test]
fn a_drain_that_leaves_too_few_changes_nothing_and_says_so() {
    let mut script = Script::new(Some(2), workers(2));
    script.pass(20_000);
    script.take();
    let serving = script.at(1);
    script.tell(Event::DrainWorker { worker: "w1".to_owned(), drain: true, force: false });
    script.pass(30_000);
    assert_eq!(script.take(), []);
    assert_eq!(script.at(1), serving);
    assert_eq!(script.cluster.availability(), Availability::Serving);
    assert!(script.reason().contains("it stays as it is: 2 stages were asked for, only 1 worker"));
    assert!(script.cluster.view().workers[1].detail.contains("it still has a stage: 2 stages"));
    // A spare comes: at once, not after the hold-down.
    script.tell(Event::WorkerPut(record(3, 1)));
    assert_eq!(script.served(), [(1, vec!["w0", "w3"])]);
}

/// A worker that ends by itself is not held up until it kills what runs on it.
#[test]
fn a_worker_that_ends_and_cannot_be_spared_is_let_go_in_order_and_waited_for() {
    let mut script = Script::new(Some(2), workers(2));
    script.pass(20_000);
    script.take();
    let serving = script.at(1);
    script.tell(Event::WorkerPut(draining(1)));
    script.pass(9_000);
    assert_eq!(script.take(), [], "somebody may come");
    assert_eq!(script.cluster.availability(), Availability::Serving);
    script.pass(2_000);
    let actions = script.take();
    let position = |wanted: &dyn Fn(&Action) -> bool| actions.iter().position(wanted);
    let leave = position(&|action| *action == Action::Leave { at: serving }).expect("it stops");
    let told = |action: &Action| matches!(action, Action::Retire { at, target, .. } if *at == serving && target.worker == "w1");
    assert!(leave < position(&told).expect("it may go"), "{actions:?}");
    assert!(script.held["w1"].is_empty());
    let waits = |script: &Script| matches!(script.cluster.availability(), Availability::Soon(_));
    assert!(waits(&script), "{:?}", script.cluster.availability());
    script.tell(Event::WorkerGone { worker: "w1".to_owned() });
    script.pass(30_000);
    assert!(waits(&script), "it is expected back: {:?}", script.cluster.availability());
    script.tell(Event::WorkerPut(record(1, 2)));
    script.pass(2_000);
    assert_eq!(script.served(), [(1, vec!["w0", "w1"])]);
    let actions = script.take();
    let bad = |action: &&Action| matches!(action, Action::Fail { .. } | Action::Alarm { .. });
    assert_eq!(actions.iter().find(bad), None, "nobody was lost");

    // One that does not come back is not waited for for ever.
    script.tell(Event::WorkerPut(WorkerRecord { draining: true, ..record(1, 2) }));
    script.pass(11_000);
    script.tell(Event::WorkerGone { worker: "w1".to_owned() });
    script.pass(60_000);
    assert!(matches!(script.cluster.availability(), Availability::No(_)));
}

#[test]
fn short_memory_stops_only_the_pipeline_in_the_way() {
    let mut script = Script::new(Some(2), workers(4));
    script.pass(20_000);
    script.take();
    script.small.insert("w0".to_owned());
    let (first, second) = (script.at(1), script.at(2));
    // w1 goes, w4 takes its place, and w0 has no memory for the new epoch beside the old one.
    script.tell(Event::WorkerPut(record(4, 1)));
    script.tell(Event::WorkerPut(draining(1)));
    let actions = script.take();
    let find = |wanted: &dyn Fn(&Action) -> bool| actions.iter().position(wanted).expect("missing");
    let pause = find(&|a| *a == Action::Pause { at: first });
    let retire = find(
        &|a| matches!(a, Action::Retire { at, target, .. } if *at == first && target.worker == "w0"),
    );
    let serve = find(&|a| matches!(a, Action::Serve { .. }));
    assert!(pause < retire && retire < serve, "{actions:?}");
    assert_eq!(script.served()[0], (1, vec!["w0", "w4"]));
    assert_eq!(script.at(2), second);
    assert!(!actions.contains(&Action::Pause { at: second }));
}

#[test]
fn the_status_says_what_each_worker_is_predicted_to_do() {
    let mut script = Script::new(Some(2), workers(2));
    let predicted = |script: &Script| -> Vec<_> {
        let pipelines = script.cluster.view().plan.pipelines;
        let stages = pipelines.iter().flat_map(|pipeline| &pipeline.stages);
        stages.map(|stage| (stage.predicted_busy, stage.predicted_tokens_per_s)).collect()
    };
    assert_eq!(predicted(&script), [(0.5, 10.0); 2]);
    // Planned again, and nothing worth a change: what serves is still predicted.
    script.tell(Event::PlanNow { any_gain: false });
    script.pass(1000);
    assert_eq!(script.served().len(), 1);
    assert_eq!(predicted(&script), [(0.5, 10.0); 2]);
}

/// Whoever was told to leave a pipeline that has stopped may end: that is no death.
#[test]
fn a_drained_worker_that_leaves_as_it_was_told_is_not_lost() {
    let mut script = Script::new(Some(2), workers(2));
    script.pass(20_000);
    script.take();
    script.small.insert("w0".to_owned());
    script.slow.insert("w0".to_owned());
    let first = script.at(1);
    script.tell(Event::WorkerPut(record(4, 1)));
    script.tell(Event::WorkerPut(draining(1)));
    let told = |action: &Action| matches!(action, Action::Retire { at, target, .. } if *at == first && target.worker == "w1");
    assert!(script.take().iter().any(told), "it is told to leave what has stopped");
    assert!(script.served().is_empty() || script.cluster.availability() != Availability::Serving);
    script.tell(Event::WorkerGone { worker: "w1".to_owned() });
    let (incarnation, detail) = (Incarnation([1; 16]), "connection refused".to_owned());
    script.tell(Event::ProbeFailed { worker: "w1".to_owned(), incarnation, detail });
    let member = script.cluster.fleet.get("w1").expect("the stopped pipeline names it still");
    assert_eq!(member.suspect, None, "nor is it counted among its losses");
    // It starts again at once, as in a rolling restart.
    script.tell(Event::WorkerPut(record(1, 2)));
    script.pass(1000);
    let (at, class) = (at(1, script.revision), script.plans.last().unwrap().pipelines[0].class);
    script.tell(Event::Prepared { at, stage: 0, class });
    script.pass(1000);
    let actions = script.take();
    let failed = |action: &&Action| matches!(action, Action::Fail { .. } | Action::Alarm { .. });
    assert_eq!(actions.iter().find(failed), None, "{actions:?}");
    assert!(actions.iter().any(|a| matches!(a, Action::Serve { .. })), "{actions:?}");
    assert_eq!(script.served(), [(1, vec!["w0", "w4"])]);
}

#[test]
fn while_memory_is_made_the_reason_says_so() {
    let mut cluster = Script::new(Some(1), workers(1)).cluster;
    let now = Tick::from_millis(60_000);
    let serving = cluster.pipelines[&PipelineId(1)].at();
    let mut actions = cluster.handle(now, Event::PlanNow { any_gain: true });
    let Some(Action::Deploy { ticket, problem }) = actions.pop() else { panic!("{actions:?}") };
    let mut deployment = place(&problem).unwrap();
    deployment.pipelines[0].kv_blocks = 32;
    let mut actions = cluster.handle(now, Event::Deployed { ticket, result: Ok(deployment) });
    let Some(Action::WritePlan { ticket, .. }) = actions.pop() else { panic!("{actions:?}") };
    let actions = cluster.handle(now, Event::PlanWritten { ticket, revision: 500 });
    assert!(matches!(&actions[..], [Action::Prepare(_)]), "{actions:?}");
    let (new, detail) = (at(1, 500), "2 GiB are missing".to_owned());
    let failed = Event::PrepareFailed { at: new, stage: 0, failure: Failure::Memory, detail };
    assert_eq!(cluster.handle(now, failed), [Action::Pause { at: serving }]);
    assert_eq!(cluster.availability(), Availability::Serving, "for a moment still");
    let why = cluster.why_held().expect("it takes nobody").detail;
    assert!(why.contains("is being prepared") && why.contains("so pipeline 1 stops"), "{why}");
    let actions = cluster.handle(now, Event::Paused { at: serving });
    assert!(matches!(&actions[..], [Action::Retire { at, .. }] if *at == serving), "{actions:?}");
    let Availability::Soon(Waiting { detail, .. }) = cluster.availability() else { panic!() };
    let note = "worker w0 has no memory for its old and its new stage, so pipeline 1 stops";
    assert!(detail.contains(note) && detail.contains("2 GiB are missing"), "{detail}");
    let (worker, incarnation) = ("w0".to_owned(), Incarnation([1; 16]));
    let retired = Event::Retired { worker, incarnation, at: serving };
    let actions = cluster.handle(now, retired);
    let described = actions.iter().any(|a| matches!(a, Action::Probe { .. }));
    let mut again: Vec<_> = actions.iter().filter(|a| matches!(a, Action::Prepare(_))).collect();
    let described = described.then(|| Event::Described {
        worker: "w0".to_owned(),
        incarnation,
        held: Vec::new(),
    });
    let more = described.map(|event| cluster.handle(now, event)).unwrap_or_default();
    again.extend(more.iter().filter(|a| matches!(a, Action::Prepare(_))));
    assert_eq!(again.len(), 1, "prepared again");
}

#[test]
fn a_worker_moves_from_one_pipeline_to_another() {
    let mut script = Script::new(Some(2), workers(4));
    script.pass(20_000);
    script.take();
    assert_eq!(script.served(), [(1, vec!["w0", "w1"]), (2, vec!["w2", "w3"])]);
    let (first, second) = (script.at(1), script.at(2));
    // One goes, and who was with it takes the first place of a pipeline with one of the other.
    script.tell(Event::DrainWorker { worker: "w1".to_owned(), drain: true, force: false });
    let actions = script.take();
    assert_eq!(script.served(), [(1, vec!["w0", "w2"])], "{actions:?}");
    let position = |wanted: &Action| actions.iter().position(|a| a == wanted).expect("missing");
    let serve = actions.iter().position(|a| matches!(a, Action::Serve { .. })).unwrap();
    assert!(position(&Action::Pause { at: first }) < serve);
    assert!(position(&Action::Pause { at: second }) < serve, "it loses a worker");
    assert!(position(&Action::Leave { at: second }) < serve);
    assert_eq!((&script.held["w1"], &script.held["w3"]), (&vec![], &vec![]), "they may go");
}

#[test]
fn a_speed_that_changes_fourfold_counts_in_a_quarter_of_the_time() {
    let pinned = Options { pipelines: Some(1), ..options(Some(1)) };
    let slower = |times: u64| {
        let mut record = record(0, 1);
        for step in &mut record.models[0].steps {
            step.layer_ns *= times;
        }
        record
    };
    for (times, seconds) in [(2, 60), (3, 60), (4, 15), (10, 15)] {
        let mut script = Script::with(pinned.clone(), workers(1), Found::Nothing);
        script.pass(20_000);
        // Each question to the planner has a ticket, and so has each look at them.
        let mut last = script.cluster.ledger.ticket().0;
        let mut asked = |script: &mut Script| {
            let now = script.cluster.ledger.ticket().0;
            now - std::mem::replace(&mut last, now) - 1
        };
        script.tell(Event::WorkerPut(slower(times)));
        script.pass(seconds * 1000 - 500);
        assert_eq!(asked(&mut script), 0, "{times} times slower, and not for {seconds} s");
        script.pass(1000);
        assert_eq!(asked(&mut script), 1, "{times} times slower for {seconds} s");
        script.pass(100_000);
        assert_eq!(asked(&mut script), 0, "it is what was planned with");
    }
}

#[test]
fn a_takeover_shares_equal_stages_and_retires_orphans_of_another_shape() {
    // An earlier coordinator's plan: a pipeline of two, one of whose workers is gone, and a third
    // worker that holds what no plan names.
    let mut earlier = Script::new(Some(2), workers(2));
    earlier.pass(1000);
    let Found::Plan { revision, mut plan } = earlier.found.clone() else { panic!() };
    plan.term = Term(3);
    let found = Found::Plan { revision: 50, plan };
    let takes_over = |stages: u32, workers: Vec<WorkerRecord>| {
        let mut script = Script {
            cluster: Cluster::new(options(Some(stages))),
            now: Tick::ZERO,
            revision: 100,
            heard: Vec::new(),
            plans: Vec::new(),
            found: found.clone(),
            small: BTreeSet::new(),
            slow: BTreeSet::new(),
            held: BTreeMap::new(),
            prepares: 0,
        };
        script.held.insert("w0".to_owned(), vec![at(1, 50)]);
        script.held.insert("w1".to_owned(), vec![at(1, 50)]);
        script.held.insert("w7".to_owned(), vec![at(9, 40)]);
        script.tell(Event::Reset(workers));
        script.tell(Event::TermGained(Term(70)));
        script
    };
    assert_eq!(revision, 101);
    // The same shape: prepared beside, under a new epoch, and nothing is retired before.
    let mut script = takes_over(2, workers(2));
    let actions = script.take();
    assert!(!actions.iter().any(|a| matches!(a, Action::Retire { .. })), "{actions:?}");
    assert_eq!(script.served(), [(1, vec!["w0", "w1"])]);
    assert_eq!(script.at(1).epoch, Epoch(101));
    // Another shape: what is held is left before anything is prepared there.
    let mut script = takes_over(1, vec![record(0, 1), record(7, 1)]);
    let actions = script.take();
    let retire = |worker: &str| {
        actions
            .iter()
            .position(|a| matches!(a, Action::Retire { target, .. } if target.worker == worker))
    };
    let serve = actions.iter().position(|a| matches!(a, Action::Serve { .. })).unwrap();
    assert!(retire("w0").expect("of another shape") < serve, "{actions:?}");
    assert!(retire("w7").expect("of no plan") < serve, "{actions:?}");
    assert_eq!(script.served().len(), 2);
    assert!(script.held.values().all(|held| held.len() == 1), "{:?}", script.held);
}

/// Whoever goes only when it can be spared is not told to end because another was lost meanwhile.
#[test]
fn a_worker_under_orders_is_used_once_more_when_another_comes_back() {
    let mut script = Script::new(Some(2), workers(2));
    script.pass(20_000);
    script.tell(Event::DrainWorker { worker: "w0".to_owned(), drain: true, force: false });
    script.pass(5_000);
    script.take();
    let lose = |script: &mut Script| {
        let (&id, _) = script.cluster.pipelines.first_key_value().expect("it serves");
        script.kill(script.at(id.0), 1);
        script.tell(Event::WorkerGone { worker: "w1".to_owned() });
    };
    let is_told = |script: &mut Script| {
        let told = |action: &Action| matches!(action, Action::Dismiss { target, .. } if target.worker == "w0");
        script.take().iter().any(told)
    };
    lose(&mut script);
    script.pass(30_000);
    assert_eq!(script.served(), []);
    assert!(!is_told(&mut script), "the other is back in a moment");
    script.tell(Event::WorkerPut(record(1, 2)));
    script.pass(5_000);
    assert_eq!(script.served().len(), 1);
    // Where nobody comes back it is waited for in vain.
    lose(&mut script);
    script.pass(59_000);
    assert!(!is_told(&mut script));
    script.pass(10_000);
    assert!(is_told(&mut script));
}
