//! Losses: while something is planned, written or made room for, and those that come again and again.

use super::*;
use crate::planner::Problem;

/// A cluster of which every answer is given by the test.
struct Bare {
    cluster: Cluster,
    now: Tick,
}

impl Bare {
    /// Workers that each serve alone for a minute, pipelines 1 and up, at epoch 101.
    fn new(count: usize) -> Self {
        let script = Script::new(None, workers(count));
        assert_eq!(script.served().len(), count);
        let mut bare = Self { cluster: script.cluster, now: Tick::from_millis(60_000) };
        bare.tell(Event::Tick);
        bare
    }

    fn tell(&mut self, event: Event) -> Vec<Action> {
        self.cluster.handle(self.now, event)
    }

    fn pass(&mut self, millis: u64) -> Vec<Action> {
        let end = self.now + Duration::from_millis(millis);
        let mut actions = Vec::new();
        while self.now < end {
            self.now = (self.now + Duration::from_millis(250)).min(end);
            actions.extend(self.tell(Event::Tick));
        }
        actions
    }

    /// A stage's stream breaks and the probe that follows fails.
    fn kill(&mut self, worker: &str) -> Vec<Action> {
        let mut pipelines = self.cluster.pipelines.values();
        let (at, stage) = pipelines
            .find_map(|pipeline| {
                let (_, stage) = pipeline.placed.stage_of(worker)?;
                Some((pipeline.at(), stage.clone()))
            })
            .expect("it serves");
        let mut actions =
            self.tell(Event::StreamBroken { at, stage: 0, detail: "reset".to_owned() });
        let (worker, incarnation, detail) = (stage.worker, stage.incarnation, "refused".to_owned());
        actions.extend(self.tell(Event::ProbeFailed { worker, incarnation, detail }));
        actions
    }

    /// A plan in which the first pipeline has less KV is asked for, made and written at revision 500:
    /// its worker is to prepare it.
    fn shrink_the_first(&mut self) {
        let actions = self.tell(Event::PlanNow { any_gain: true });
        let (ticket, problem) = deploy(&actions).expect("asked for");
        let mut deployment = place(&problem).unwrap();
        deployment.pipelines[0].kv_blocks = 32;
        let actions = self.tell(Event::Deployed { ticket, result: Ok(deployment) });
        let (ticket, _) = write(&actions).expect("it is written");
        let actions = self.tell(Event::PlanWritten { ticket, revision: 500 });
        assert!(matches!(&actions[..], [Action::Prepare(_)]), "{actions:?}");
    }

    /// A plan that was made comes to serve at revision 101 and more.
    fn carry_out(&mut self, actions: Vec<Action>) {
        let mut pending = actions;
        while let Some(action) = pending.pop() {
            let answer = match action {
                Action::WritePlan { ticket, previous, .. } => {
                    Event::PlanWritten { ticket, revision: previous.unwrap_or(100) + 1 }
                }
                Action::Prepare(request) => Event::Prepared {
                    at: PipelineRef { id: request.pipeline, epoch: request.epoch },
                    stage: request.stage,
                    class: class(),
                },
                Action::Activate { at, stage, .. } => Event::Activated { at, stage },
                Action::Probe { worker, incarnation, .. } => {
                    Event::Described { worker, incarnation, held: Vec::new() }
                }
                _ => continue,
            };
            pending.extend(self.tell(answer));
        }
    }

    fn is_preparing(&mut self, actions: &[Action]) -> bool {
        actions.iter().any(|action| matches!(action, Action::Prepare(_)))
    }
}

fn deploy(actions: &[Action]) -> Option<(Ticket, Problem)> {
    actions.iter().find_map(|action| match action {
        Action::Deploy { ticket, problem } => Some((*ticket, (**problem).clone())),
        _ => None,
    })
}

fn write(actions: &[Action]) -> Option<(Ticket, Plan)> {
    actions.iter().find_map(|action| match action {
        Action::WritePlan { ticket, plan, .. } => Some((*ticket, plan.clone())),
        _ => None,
    })
}

fn read(actions: &[Action]) -> Option<Ticket> {
    actions.iter().find_map(|action| match action {
        Action::ReadPlan { ticket } => Some(*ticket),
        _ => None,
    })
}

#[test]
fn an_answer_that_was_made_with_a_lost_pipeline_says_nothing() {
    let mut bare = Bare::new(2);
    let (stale, problem) =
        deploy(&bare.tell(Event::PlanNow { any_gain: true })).expect("asked for");
    let (ticket, _) = deploy(&bare.kill("w0")).expect("asked again, with who is left");
    assert_ne!(ticket, stale);
    let answer = Event::Deployed { ticket: stale, result: place(&problem) };
    assert_eq!(bare.tell(answer), [], "of the question before");
}

#[test]
fn what_was_decided_beside_a_switch_is_decided_again_when_it_ends() {
    let mut bare = Bare::new(2);
    bare.shrink_the_first();
    let (ticket, problem) = deploy(&bare.kill("w1")).expect("a loss is planned for at once");
    assert!(problem.workers.is_empty(), "the other one is being given a stage");
    let actions = bare.tell(Event::Deployed { ticket, result: place(&problem) });
    assert_eq!(deploy(&actions), None);
    let new = at(1, 500);
    let mut actions = bare.tell(Event::Prepared { at: new, stage: 0, class: class() });
    actions.extend(bare.tell(Event::Paused { at: at(1, 101) }));
    assert!(actions.iter().any(|action| matches!(action, Action::Activate { .. })), "{actions:?}");
    bare.tell(Event::Activated { at: new, stage: 0 });
    assert_eq!(bare.cluster.pipelines[&PipelineId(1)].at(), new);
    let (_, problem) = deploy(&bare.pass(11_000)).expect("there is more to decide");
    assert_eq!(problem.workers.len(), 1, "with the worker that it had");
}

#[test]
fn a_pipeline_that_is_lost_while_its_plan_is_written_does_not_begin_at_its_old_epoch() {
    let mut bare = Bare::new(2);
    for id in [4, 5] {
        bare.tell(Event::WorkerPut(record(id, 1)));
    }
    let (ticket, problem) = deploy(&bare.pass(11_000)).expect("they are planned for");
    let actions = bare.tell(Event::Deployed { ticket, result: place(&problem) });
    let (ticket, plan) = write(&actions).expect("it is written");
    let kept: Vec<_> = plan.pipelines.iter().map(|plan| plan.epoch.0).collect();
    assert_eq!(kept, [101, 101, 0, 0], "two are kept");
    bare.kill("w0");
    let actions = bare.tell(Event::PlanWritten { ticket, revision: 500 });
    assert!(!bare.is_preparing(&actions), "{actions:?}");
    let (ticket, problem) = deploy(&bare.pass(1000)).expect("another plan is made");
    let actions = bare.tell(Event::Deployed { ticket, result: place(&problem) });
    let (_, plan) = write(&actions).expect("and written");
    let workers = plan.pipelines.iter().flat_map(|plan| &plan.stages).map(|stage| &*stage.worker);
    assert_eq!(workers.collect::<BTreeSet<_>>(), BTreeSet::from(["w1", "w4", "w5"]));
}

#[test]
fn a_plan_of_an_earlier_reign_is_carried_out_in_this_one() {
    let mut cluster = Cluster::new(options(Some(2)));
    let now = Tick::ZERO;
    cluster.handle(now, Event::Reset(workers(2)));
    let ticket = read(&cluster.handle(now, Event::TermGained(Term(7)))).unwrap();
    let actions = cluster.handle(now, Event::PlanRead { ticket, found: Found::Nothing });
    let (ticket, problem) = deploy(&actions).unwrap();
    let deployed = Event::Deployed { ticket, result: place(&problem) };
    let (_, plan) = write(&cluster.handle(now, deployed)).unwrap();
    // The term is lost and regained before anybody knows what came of the write.
    cluster.handle(now, Event::TermLost);
    let ticket = read(&cluster.handle(now, Event::TermGained(Term(20)))).unwrap();
    let found = Found::Plan { revision: 15, plan };
    let mut actions = cluster.handle(now, Event::PlanRead { ticket, found });
    for worker in ["w0", "w1"] {
        let (worker, incarnation) = (worker.to_owned(), Incarnation([1; 16]));
        let held = Vec::new();
        actions.extend(cluster.handle(now, Event::Described { worker, incarnation, held }));
    }
    let prepares: Vec<_> = actions
        .iter()
        .filter_map(|action| match action {
            Action::Prepare(request) => Some((request.term, request.epoch)),
            _ => None,
        })
        .collect();
    assert_eq!(prepares, [(Term(20), Epoch(15)); 2]);
}

#[test]
fn a_plan_that_is_missing_is_written_with_what_is_on_its_way() {
    let mut bare = Bare::new(2);
    bare.shrink_the_first();
    let new = at(1, 500);
    bare.tell(Event::Prepared { at: new, stage: 0, class: class() });
    bare.tell(Event::Paused { at: at(1, 101) });
    // What is being activated goes on through a change of the term, and somebody deletes the plan.
    bare.tell(Event::TermLost);
    let ticket = read(&bare.tell(Event::TermGained(Term(600)))).expect("it is read");
    bare.tell(Event::PlanRead { ticket, found: Found::Nothing });
    let (ticket, problem) = deploy(&bare.kill("w1")).expect("a loss is planned for at once");
    let actions = bare.tell(Event::Deployed { ticket, result: place(&problem) });
    let (ticket, plan) = write(&actions).expect("the registry has no plan");
    assert_eq!(plan.pipelines.iter().map(|plan| plan.at()).collect::<Vec<_>>(), [new]);
    bare.tell(Event::PlanWritten { ticket, revision: 700 });
    bare.tell(Event::Activated { at: new, stage: 0 });
    assert_eq!(bare.cluster.pipelines[&PipelineId(1)].at(), new);
    assert_eq!(write(&bare.pass(60_000)), None, "it is there now");
}

/// A pipeline whose worker has no memory for its next stage has paused for that, and the registry is
/// being read again. Who reads it, and what was done meanwhile.
fn while_room_cannot_be_made(bare: &mut Bare) -> (Ticket, Vec<Action>) {
    bare.shrink_the_first();
    let (old, new) = (at(1, 101), at(1, 500));
    let fenced = Event::Fenced { at: at(2, 101), detail: "by nobody knows whom".to_owned() };
    let ticket = read(&bare.tell(fenced)).expect("who was it?");
    let (failure, detail) = (Failure::Memory, "2 GiB are missing".to_owned());
    let actions = bare.tell(Event::PrepareFailed { at: new, stage: 0, failure, detail });
    assert!(actions.contains(&Action::Pause { at: old }), "{actions:?}");
    let actions = bare.tell(Event::Paused { at: old });
    (ticket, actions)
}

#[test]
fn room_that_cannot_be_made_at_once_is_waited_for() {
    let mut bare = Bare::new(2);
    let (ticket, mut actions) = while_room_cannot_be_made(&mut bare);
    actions.extend(bare.pass(20_000));
    assert!(!bare.is_preparing(&actions), "its worker has no memory before it leaves: {actions:?}");
    let plan = bare.cluster.ledger.plan().expect("it is ours").clone();
    let found = Found::Plan { revision: 500, plan };
    let actions = bare.tell(Event::PlanRead { ticket, found });
    let retires = |action: &Action| {
        matches!(action, Action::Retire { at: old, target, .. }
            if *old == at(1, 101) && target.worker == "w0")
    };
    assert!(actions.iter().any(retires), "{actions:?}");
    let (worker, incarnation) = ("w0".to_owned(), Incarnation([1; 16]));
    let retired = Event::Retired { worker: worker.clone(), incarnation, at: at(1, 101) };
    let mut actions = bare.tell(retired);
    let held = Vec::new();
    actions.extend(bare.tell(Event::Described { worker, incarnation, held }));
    assert!(bare.is_preparing(&actions), "{actions:?}");
}

#[test]
fn room_that_cannot_be_made_is_not_waited_for_for_ever() {
    let mut bare = Bare::new(2);
    let (_, mut actions) = while_room_cannot_be_made(&mut bare);
    actions.extend(bare.pass(46_000));
    assert!(!bare.is_preparing(&actions), "{actions:?}");
    assert!(actions.contains(&Action::Leave { at: at(1, 101) }), "{actions:?}");
    let Availability::No(why) = bare.cluster.availability() else { panic!() };
    assert_eq!(why.cause, WaitCause::Registry);
}

#[test]
fn what_breaks_holds_up_nobody_who_leaves_asks_or_comes() {
    let broken = |bare: &mut Bare| {
        // The second time it is waited for.
        for _ in 0..2 {
            let at = bare.cluster.pipelines[&PipelineId(1)].at();
            let (_, revision) = bare.cluster.ledger.ready().expect("it leads");
            let detail = "an old epoch".to_owned();
            let ticket = read(&bare.tell(Event::Fenced { at, detail })).expect("who was it?");
            let plan = bare.cluster.ledger.plan().expect("it is ours").clone();
            let found = Found::Plan { revision: revision.unwrap(), plan };
            let actions = bare.tell(Event::PlanRead { ticket, found });
            let Some((ticket, problem)) = deploy(&actions) else { return };
            let actions = bare.tell(Event::Deployed { ticket, result: place(&problem) });
            bare.carry_out(actions);
        }
        panic!("it is planned anew at once");
    };
    for event in [
        Event::PlanNow { any_gain: true },
        Event::DrainWorker { worker: "w1".to_owned(), drain: true, force: false },
        Event::WorkerPut(record(0, 2)),
    ] {
        let mut bare = Bare::new(2);
        broken(&mut bare);
        assert_eq!(deploy(&bare.tell(Event::Tick)), None);
        assert!(deploy(&bare.tell(event.clone())).is_some(), "{event:?} is held up");
    }
}

#[test]
fn a_worker_that_gives_what_the_model_cannot_give_is_replaced_and_the_reason_told() {
    let mut script = Script::new(Some(2), workers(2));
    script.tell(Event::WorkerPut(record(3, 1)));
    script.pass(20_000);
    script.take();
    let at = script.at(1);
    let detail = "token 70000 came back, the vocabulary has 50000".to_owned();
    script.tell(Event::Strange { at, stage: 1, detail: detail.clone() });
    let failed = script.take().into_iter().find_map(|action| match action {
        Action::Fail { at: failed, reason } if failed == at => Some(reason),
        _ => None,
    });
    let reason = failed.expect("its clients hear of it");
    assert!(reason.contains("worker w1 failed") && reason.contains(&detail), "{reason}");
    assert_eq!(script.served(), [(1, vec!["w0", "w3"])]);
    // Of another epoch it says nothing.
    script.tell(Event::Strange { at, stage: 1, detail });
    assert_eq!(script.served(), [(1, vec!["w0", "w3"])]);
}

/// How often is planned within 20 minutes in which workers answer every probe, and every pipeline gives
/// results for so many milliseconds and then breaks: `breaks` is asked what of it is seen, and whether
/// that was the first or streams were opened again since.
fn plans_of_what_breaks(
    well_millis: u64,
    breaks: impl Fn(PipelineRef, bool) -> Option<Event>,
) -> usize {
    let mut script = Script::new(Some(2), workers(2));
    let end = script.now + Duration::from_secs(1200);
    let mut is_open = true;
    while script.now < end {
        let serving = script.cluster.pipelines.values().next();
        if let Some((at, since)) = serving.map(|pipeline| (pipeline.at(), pipeline.since)) {
            let is_well = script.now.since(since) < Duration::from_millis(well_millis);
            let seen = match is_well {
                true => Some(Event::ResultsFlowing { at }),
                false => breaks(at, std::mem::take(&mut is_open)),
            };
            seen.into_iter().for_each(|event| script.tell(event));
        }
        for action in script.take() {
            match action {
                Action::Probe { worker, incarnation, .. } => {
                    let held = script.held.get(&worker).into_iter().flatten();
                    let held = held.map(|&at| Held { at }).collect();
                    script.tell(Event::Described { worker, incarnation, held });
                }
                Action::Reconnect { .. } | Action::Serve { .. } => is_open = true,
                _ => {}
            }
        }
        script.pass(250);
    }
    script.plans.len()
}

#[test]
fn what_breaks_again_and_again_while_its_workers_answer_is_planned_more_and_more_seldom() {
    // Each lasts for 15 s at least. The waits add up to 63 s for the first eight, and are 60 s then.
    let stalls = |at, _| Some(Event::StepOverdue { at });
    let plans = plans_of_what_breaks(0, stalls);
    assert!((10..=25).contains(&plans), "{plans} plans of pipelines that never gave a result");
    // Older than what counts as young, and well until then.
    let plans = plans_of_what_breaks(12_000, stalls);
    assert!((10..=22).contains(&plans), "{plans} plans of pipelines that gave some");
    // Refused at once, which each time looks like another coordinator.
    let fenced = |at, _| Some(Event::Fenced { at, detail: "an old epoch".to_owned() });
    let plans = plans_of_what_breaks(12_000, fenced);
    assert!((10..=25).contains(&plans), "{plans} plans of pipelines that are fenced");
    // A stage that is reached no more: its worker is kept out when that comes again.
    let broken = |at, is_open: bool| {
        let detail = "no route".to_owned();
        is_open.then_some(Event::StreamBroken { at, stage: 1, detail })
    };
    let plans = plans_of_what_breaks(12_000, broken);
    assert!((4..=15).contains(&plans), "{plans} plans with a worker that cannot be reached");
}
