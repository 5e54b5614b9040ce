//! Single rules of the cluster, by cases.

use std::collections::BTreeSet;
use std::time::Duration;

use proto::ids::{Epoch, Incarnation, KnownAnswer, PipelineId, PipelineRef, Term};
use proto::plan::{Plan, WorkerRecord};
use proto::status::{WaitCause, Waiting};

use super::simulation::{class, options, place, record};
use super::transition::START_TRIES;
use super::*;

mod changes;
mod losses;
mod racks;
mod registry;

/// A cluster with the answers that a faultless world would give.
struct Script {
    cluster: Cluster,
    now: Tick,
    revision: u64,
    /// What was asked for since the last look, but for what [`Script::tell`] answers.
    heard: Vec<Action>,
    plans: Vec<Plan>,
    /// What the registry has when it is read.
    found: Found,
    /// Workers that have no memory for two engines, and what they hold.
    small: BTreeSet<String>,
    /// Workers that do not answer yet when they are to prepare something anew.
    slow: BTreeSet<String>,
    /// What workers hold, and say when asked.
    held: BTreeMap<String, Vec<PipelineRef>>,
    prepares: usize,
}

impl Script {
    fn with(options: Options, workers: Vec<WorkerRecord>, found: Found) -> Self {
        let mut script = Self {
            cluster: Cluster::new(options),
            now: Tick::ZERO,
            revision: 100,
            heard: Vec::new(),
            plans: Vec::new(),
            found,
            small: BTreeSet::new(),
            slow: BTreeSet::new(),
            held: BTreeMap::new(),
            prepares: 0,
        };
        script.tell(Event::TermGained(Term(7)));
        script.tell(Event::Reset(workers));
        script
    }

    fn new(stages: Option<u32>, workers: Vec<WorkerRecord>) -> Self {
        let mut script = Self::with(options(stages), workers, Found::Nothing);
        script.pass(1000);
        script
    }

    fn tell(&mut self, event: Event) {
        let actions = self.cluster.handle(self.now, event);
        for action in actions {
            match self.answer(&action) {
                Some(answer) => self.tell(answer),
                None => self.heard.push(action),
            }
        }
    }

    fn answer(&mut self, action: &Action) -> Option<Event> {
        match action {
            Action::ReadPlan { ticket } => {
                Some(Event::PlanRead { ticket: *ticket, found: self.found.clone() })
            }
            Action::WritePlan { ticket, plan, .. } => {
                self.revision += 1;
                self.plans.push(plan.clone());
                self.found = Found::Plan { revision: self.revision, plan: plan.clone() };
                Some(Event::PlanWritten { ticket: *ticket, revision: self.revision })
            }
            Action::Deploy { ticket, problem } => {
                Some(Event::Deployed { ticket: *ticket, result: place(problem) })
            }
            Action::Prepare(request) => {
                self.prepares += 1;
                let at = PipelineRef { id: request.pipeline, epoch: request.epoch };
                let (stage, worker) =
                    (request.stage, &request.stages[request.stage as usize].worker);
                let held = self.held.entry(worker.clone()).or_default();
                if self.small.contains(worker) && !held.is_empty() {
                    let (failure, detail) = (Failure::Memory, "no memory".to_owned());
                    return Some(Event::PrepareFailed { at, stage, failure, detail });
                }
                if self.slow.contains(worker) && !held.contains(&at) {
                    return None;
                }
                held.push(at);
                let planned = self.plans.last()?.pipelines.iter();
                let class = planned.rev().find(|plan| plan.id == request.pipeline)?.class;
                Some(Event::Prepared { at, stage, class })
            }
            Action::Activate { at, stage, target, .. } => {
                self.held.insert(target.worker.clone(), vec![*at]);
                Some(Event::Activated { at: *at, stage: *stage })
            }
            Action::Retire { at, target, .. } => {
                let held = self.held.entry(target.worker.clone()).or_default();
                held.retain(|held| held.epoch > at.epoch);
                self.heard.push(action.clone());
                let (worker, incarnation) = (target.worker.clone(), target.incarnation);
                Some(Event::Retired { worker, incarnation, at: *at })
            }
            Action::Pause { at } => {
                self.heard.push(action.clone());
                Some(Event::Paused { at: *at })
            }
            // One that is asked what it holds; whether it lives is a matter of the test.
            Action::Probe { worker, incarnation, .. }
                if !self
                    .cluster
                    .pipelines
                    .values()
                    .any(|p| p.watched(&self.cluster.fleet).any(|w| w == worker)) =>
            {
                let held = self.held.get(worker).into_iter().flatten();
                let held = held.map(|&at| Held { at }).collect();
                Some(Event::Described { worker: worker.clone(), incarnation: *incarnation, held })
            }
            _ => None,
        }
    }

    fn pass(&mut self, millis: u64) {
        let end = self.now + Duration::from_millis(millis);
        while self.now < end {
            self.now = (self.now + Duration::from_millis(250)).min(end);
            self.tell(Event::Tick);
        }
    }

    fn take(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.heard)
    }

    fn serves(&mut self) -> Vec<(PipelineRef, Vec<String>)> {
        let serving = self.take().into_iter().filter_map(|action| match action {
            Action::Serve { plan, .. } => {
                Some((plan.at(), plan.stages.iter().map(|stage| stage.worker.clone()).collect()))
            }
            _ => None,
        });
        serving.collect()
    }

    fn states(&self) -> Vec<String> {
        self.cluster.view().workers.into_iter().map(|w| format!("{} {}", w.id, w.state)).collect()
    }

    fn reason(&self) -> String {
        self.cluster.view().plan.reason
    }

    /// The pipelines that serve, and who is in them.
    fn served(&self) -> Vec<(u64, Vec<&str>)> {
        let pipelines = self.cluster.pipelines.values();
        pipelines
            .map(|pipeline| {
                let stages = pipeline.placed.plan.stages.iter();
                (pipeline.at().id.0, stages.map(|stage| stage.worker.as_str()).collect())
            })
            .collect()
    }

    fn at(&self, id: u64) -> PipelineRef {
        self.cluster.pipelines[&PipelineId(id)].at()
    }

    /// A stage's stream breaks and the probe that follows fails.
    fn kill(&mut self, at: PipelineRef, stage: u32) {
        let worker = self.cluster.pipelines[&at.id].placed.plan.stages[stage as usize].clone();
        self.held.remove(&worker.worker);
        self.tell(Event::StreamBroken { at, stage, detail: "reset".to_owned() });
        let detail = "refused".to_owned();
        let (worker, incarnation) = (worker.worker, worker.incarnation);
        self.tell(Event::ProbeFailed { worker, incarnation, detail });
    }
}

fn workers(count: usize) -> Vec<WorkerRecord> {
    (0..count).map(|i| record(i, 1)).collect()
}

fn draining(i: usize) -> WorkerRecord {
    WorkerRecord { draining: true, ..record(i, 1) }
}

fn at(id: u64, epoch: u64) -> PipelineRef {
    PipelineRef { id: PipelineId(id), epoch: Epoch(epoch) }
}

fn is_alarm(action: &Action) -> bool {
    matches!(action, Action::Alarm { .. })
}

fn cause(availability: &Availability) -> Option<WaitCause> {
    availability.waiting().map(|waiting| waiting.cause)
}

#[test]
fn workers_become_replicas_and_a_late_one_joins_while_nothing_else_is_touched() {
    let mut script = Script::new(None, workers(2));
    assert_eq!(script.served(), [(1, vec!["w0"]), (2, vec!["w1"])]);
    let before = (script.at(1), script.at(2));
    script.take();
    script.tell(Event::WorkerPut(record(4, 1)));
    script.pass(9000);
    assert_eq!(script.take(), [], "it may not be alone");
    script.tell(Event::WorkerPut(record(5, 1)));
    script.pass(9750);
    assert_eq!(script.take(), [], "the hold-down begins again");
    script.pass(250);
    let served: Vec<_> = script.serves();
    assert_eq!(served, [(at(3, 102), vec!["w4".to_owned()]), (at(4, 102), vec!["w5".to_owned()])]);
    assert_eq!((script.at(1), script.at(2)), before, "kept with their epochs");
    script.pass(100_000);
    assert_eq!(script.take(), []);
    assert_eq!(script.plans.len(), 2);
}

#[test]
fn a_lost_replica_leaves_the_others_as_they_are_and_the_reason_up_to_date() {
    let mut script = Script::new(None, workers(2));
    script.pass(20_000);
    script.take();
    assert_eq!(script.reason(), "2 of 2 workers");
    let staying = script.at(2);
    script.kill(script.at(1), 0);
    let ended = script.take();
    assert!(ended.iter().any(|action| matches!(action, Action::Fail { .. })), "{ended:?}");
    assert_eq!((script.served(), script.at(2)), (vec![(2, vec!["w1"])], staying));
    assert_eq!((script.reason().as_str(), script.plans.len()), ("1 of 1 workers", 1));
}

#[test]
fn with_pinned_stages_and_one_pipeline_a_late_worker_stands_by() {
    let pinned = Options { pipelines: Some(1), ..options(Some(3)) };
    let mut script = Script::with(pinned, workers(3), Found::Nothing);
    let actions = script.take();
    let [Action::Serve { shape, plan, class: of }] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!((shape.epoch, shape.term, shape.stages), (Epoch(101), Term(7), 3));
    assert_eq!((shape.kv_blocks, plan.epoch, *of), (64, Epoch(101), class()));
    script.tell(Event::WorkerPut(record(3, 1)));
    script.pass(100_000);
    assert_eq!(script.take(), []);
    assert_eq!(script.states(), ["w0 active", "w1 active", "w2 active", "w3 standby"]);
    assert_eq!(script.cluster.view().workers[3].detail, "spare");
    assert_eq!(script.cluster.availability(), Availability::Serving);
}

#[test]
fn a_gain_below_the_least_is_not_worth_a_move() {
    let dear = Options { min_gain_percent: 100, ..options(Some(2)) };
    let four = [0, 2, 4, 5].map(|id| record(id, 1)).to_vec();
    let mut script = Script::with(dear, four, Found::Nothing);
    script.pass(1000);
    script.take();
    assert_eq!(script.served(), [(1, vec!["w0", "w2"]), (2, vec!["w4", "w5"])]);
    // Six are laid out anew, for half as much again; one of the two changes for it.
    for id in [1, 3] {
        script.tell(Event::WorkerPut(record(id, 1)));
    }
    script.pass(100_000);
    assert_eq!((script.take(), script.plans.len()), (vec![], 1));
    script.tell(Event::PlanNow { any_gain: true });
    let served = script.served();
    assert_eq!(served.len(), 3, "asked for: {served:?}");
    assert_eq!(served[1], (2, vec!["w4", "w5"]), "kept");
}

#[test]
fn a_worker_for_which_nobody_moves_joins_however_many_serve() {
    let mut script = Script::new(None, workers(40));
    script.pass(20_000);
    let before: Vec<_> = (1..=40).map(|id| script.at(id)).collect();
    script.take();
    // A fortieth of what serves is less than the least gain.
    script.tell(Event::WorkerPut(record(40, 1)));
    script.pass(10_000);
    assert_eq!(script.serves(), [(at(41, 102), vec!["w40".to_owned()])]);
    assert_eq!((1..=40).map(|id| script.at(id)).collect::<Vec<_>>(), before, "untouched");
}

#[test]
fn a_fleet_that_never_rests_is_planned_for_all_the_same() {
    let mut script = Script::new(None, workers(2));
    script.take();
    for incarnation in 1..=30 {
        script.tell(Event::WorkerPut(record(4, incarnation)));
        script.pass(5000);
    }
    assert!(script.plans.len() > 1, "the one that flaps keeps no other from its place");
    assert!(script.plans.len() < 8, "{} plans", script.plans.len());
}

#[test]
fn a_speed_that_changes_for_a_minute_is_planned_for() {
    let mut script = Script::new(None, workers(2));
    let slow = |factor: u64| {
        let mut slow = record(1, 1);
        slow.models[0].steps.iter_mut().for_each(|step| step.layer_ns *= factor);
        slow
    };
    let deploys = |script: &mut Script, factor: u64, millis: u64| {
        let put = script.cluster.handle(script.now, Event::WorkerPut(slow(factor)));
        assert_eq!(put, []);
        let mut asked = 0;
        for _ in 0..millis / 250 {
            script.now = script.now + Duration::from_millis(250);
            let actions = script.cluster.handle(script.now, Event::Tick);
            asked += actions.iter().filter(|a| matches!(a, Action::Deploy { .. })).count();
        }
        asked
    };
    script.pass(20_000);
    // A larger change counts sooner: see `a_speed_that_changes_fourfold_counts_in_a_quarter_of_the_time`.
    assert_eq!(deploys(&mut script, 3, 59_000), 0);
    assert_eq!(deploys(&mut script, 1, 100_000), 0, "it passed");
    assert_eq!(deploys(&mut script, 3, 61_000), 1);
}

#[test]
fn a_broken_stream_alone_is_opened_again_and_with_a_failed_probe_the_worker_is_replaced() {
    let mut script = Script::new(Some(2), workers(4));
    script.take();
    let (first, second) = (script.at(1), script.at(2));
    script.tell(Event::StreamBroken { at: first, stage: 1, detail: "reset".to_owned() });
    let [Action::Probe { worker, incarnation, .. }] = &script.take()[..] else { panic!() };
    let (worker, incarnation) = (worker.clone(), *incarnation);
    script.tell(Event::Described { worker, incarnation, held: vec![Held { at: first }] });
    assert_eq!(script.take(), [Action::Reconnect { at: first, stage: 1 }]);
    script.tell(Event::WorkerPut(record(4, 1)));
    script.pass(20_000);

    script.kill(first, 1);
    let actions = script.take();
    let Action::Fail { at: failed, reason } = &actions[1] else { panic!("{actions:?}") };
    assert_eq!(*failed, first);
    assert_eq!(
        reason,
        "worker w1 with layers 6..12 was lost: its stream broke (reset) and it does not answer \
         (refused)"
    );
    let Some(Action::Serve { plan, .. }) = actions.last() else { panic!("{actions:?}") };
    let workers: Vec<_> = plan.stages.iter().map(|stage| stage.worker.as_str()).collect();
    assert_eq!((plan.at(), workers), (at(1, 102), vec!["w0", "w4"]));
    assert_eq!(script.at(2), second, "the other pipeline serves on");
    assert!(!actions.iter().any(|a| matches!(a, Action::Pause { .. } | Action::Leave { .. })));
}

#[test]
fn a_lost_lease_needs_a_silent_data_path() {
    let mut script = Script::new(Some(2), workers(4));
    script.take();
    let first = script.at(1);
    script.tell(Event::WorkerGone { worker: "w0".to_owned() });
    let [Action::Probe { worker, incarnation, .. }] = &script.take()[..] else { panic!() };
    let (worker, incarnation) = (worker.clone(), *incarnation);
    let held = vec![Held { at: first }];
    script.tell(Event::Described { worker: worker.clone(), incarnation, held });
    script.pass(1000);
    assert!(matches!(script.take()[..], [Action::Probe { .. }]), "it is watched");
    script.tell(Event::ProbeFailed { worker, incarnation, detail: "timeout".to_owned() });
    assert!(matches!(script.take()[0], Action::Fail { at, .. } if at == first));
}

#[test]
fn mass_loss_of_leases_freezes_evictions_and_raises_an_alarm() {
    let mut script = Script::new(Some(2), workers(3));
    script.take();
    let served = script.served().len();
    script.tell(Event::Reset(vec![record(2, 1)]));
    let alarms = script.take();
    assert!(
        alarms.iter().any(|a| matches!(a, Action::Alarm { text } if text.starts_with("2 of 3")))
    );
    let incarnation = Incarnation([1; 16]);
    let failed =
        Event::ProbeFailed { worker: "w0".to_owned(), incarnation, detail: "timeout".to_owned() };
    script.tell(failed.clone());
    assert_eq!(script.served().len(), served, "frozen");
    script.tell(Event::WorkerPut(record(1, 1)));
    script.take();
    script.tell(failed);
    assert!(matches!(script.take()[0], Action::Fail { .. }), "thawed: most are back");
}

#[test]
fn workers_that_announced_it_leave_without_an_alarm() {
    let mut script = Script::new(Some(2), workers(4));
    for index in 0..4 {
        script.tell(Event::WorkerPut(draining(index)));
    }
    for index in 0..4 {
        script.tell(Event::WorkerGone { worker: format!("w{index}") });
    }
    let actions = script.take();
    assert!(!actions.iter().any(is_alarm), "{actions:?}");
    assert!(!script.cluster.fleet.is_frozen());
}

#[test]
fn a_restarted_worker_is_another_and_serves_again() {
    let mut script = Script::new(Some(3), workers(3));
    script.pass(20_000);
    script.take();
    script.kill(script.at(1), 1);
    let actions = script.take();
    assert!(matches!(&actions[1], Action::Fail { .. }), "{actions:?}");
    let Availability::No(Waiting { cause, detail }) = script.cluster.availability() else {
        panic!("{:?}", script.cluster.availability())
    };
    assert_eq!(cause, WaitCause::Workers);
    assert!(detail.starts_with("3 stages were asked for, only 2 workers"), "{detail}");
    assert!(detail.contains("w1: its stream broke"), "{detail}");
    script.tell(Event::WorkerPut(record(1, 2)));
    assert_eq!(script.serves().len(), 1);
    // A new process start under a stage that seemed healthy is a death too.
    script.pass(20_000);
    script.take();
    script.held.remove("w0");
    script.tell(Event::WorkerPut(record(0, 2)));
    let actions = script.take();
    assert!(matches!(&actions[0], Action::Fail { reason, .. } if reason.contains("started again")));
    assert!(matches!(actions.last(), Some(Action::Serve { .. })), "{actions:?}");
}

/// A worker is lost three times and comes back each time; what was done about the last.
fn flaps(script: &mut Script) -> Vec<Action> {
    for incarnation in 2..5 {
        script.pass(20_000);
        script.take();
        let at = script.cluster.pipelines.values().find(|pipeline| pipeline.uses("w1"));
        let (at, stage) = at
            .and_then(|pipeline| Some((pipeline.at(), pipeline.placed.stage_of("w1")?.0)))
            .expect("it serves again");
        script.kill(at, stage);
        script.tell(Event::WorkerPut(record(1, incarnation)));
    }
    let actions = script.take();
    assert!(
        actions.iter().any(|a| matches!(a, Action::Alarm { text } if text.contains("3 times")))
    );
    actions
}

#[test]
fn a_worker_that_flaps_is_kept_out_while_others_serve() {
    let mut script = Script::new(None, workers(2));
    flaps(&mut script);
    assert_eq!(script.states(), ["w0 active", "w1 suspect"]);
    script.pass(59_000);
    assert_eq!(script.serves(), []);
    script.pass(1000);
    assert_eq!(script.serves().len(), 1);
}

#[test]
fn a_worker_that_flaps_and_cannot_be_spared_serves() {
    let mut script = Script::new(Some(3), workers(3));
    let actions = flaps(&mut script);
    assert!(actions.iter().any(|a| matches!(a, Action::Serve { .. })), "{actions:?}");
    assert_eq!(script.states(), ["w0 active", "w1 active", "w2 active"]);
    assert!(script.reason().contains("no plan is possible without"), "{}", script.reason());
    // When it is free of that nothing changes, and who could take its place is planned for as ever.
    let plans = script.plans.len();
    script.pass(100_000);
    assert_eq!((script.serves(), script.plans.len()), (vec![], plans));

    // One that could not take its stage is not given it because of that.
    let mut script = Script::new(Some(3), workers(3));
    flaps(&mut script);
    script.slow.insert("w1".to_owned());
    script.kill(script.at(1), 1);
    script.tell(Event::WorkerPut(record(1, 9)));
    script.pass(11_000);
    script.take();
    let new = at(1, script.revision);
    let (failure, detail) = (Failure::Refused, "no such model".to_owned());
    script.tell(Event::PrepareFailed { at: new, stage: 1, failure, detail });
    script.pass(4_000);
    assert_eq!((script.serves(), script.states()[1].as_str()), (vec![], "w1 suspect"));
}

/// What is measured for steps of more rows than before says nothing of those that were measured before.
#[test]
fn times_of_other_numbers_of_rows_are_no_other_speed() {
    let pinned = Options { pipelines: Some(1), ..options(Some(1)) };
    let asked_after = |change: &dyn Fn(&mut Vec<proto::plan::StepTime>)| {
        let mut script = Script::with(pinned.clone(), workers(1), Found::Nothing);
        script.pass(20_000);
        let mut other = record(0, 1);
        change(&mut other.models[0].steps);
        let before = script.cluster.ledger.ticket().0;
        script.tell(Event::WorkerPut(other));
        script.pass(100_000);
        script.cluster.ledger.ticket().0 - before - 1
    };
    let more = proto::plan::StepTime { rows: 64, layer_ns: 400, head_ns: 400 };
    assert_eq!(asked_after(&|steps| steps.push(more)), 0, "more rows take more time");
    assert_eq!(asked_after(&|steps| steps.truncate(1)), 0);
    assert_eq!(asked_after(&|steps| steps[0].layer_ns *= 2), 1, "single rows take twice as long");
}

#[test]
fn steps_that_never_come_back_end_the_pipeline() {
    let mut script = Script::new(Some(2), workers(2));
    script.pass(20_000);
    script.take();
    let (epoch, mut failed) = (script.at(1).epoch, Vec::new());
    for _ in 0..40 {
        let at = script.at(1);
        script.tell(Event::StepOverdue { at });
        for action in script.take() {
            match action {
                Action::Probe { worker, incarnation, .. } => {
                    script.tell(Event::Described { worker, incarnation, held: Vec::new() });
                }
                Action::Fail { reason, .. } => failed.push(reason),
                _ => {}
            }
        }
        script.pass(400);
    }
    assert_eq!(failed, ["no step has come back for 15 s"]);
    assert!(script.at(1).epoch > epoch, "the same workers at a new epoch");
}

#[test]
fn those_who_leave_have_no_vote_on_the_class() {
    let newer = |i: usize| WorkerRecord { known_answer: KnownAnswer([9; 32]), ..record(i, 1) };
    let mut script = Script::new(Some(1), vec![record(0, 1), record(1, 1), newer(2)]);
    script.pass(20_000);
    assert_eq!(script.states(), ["w0 active", "w1 active", "w2 unfit"]);
    let detail = &script.cluster.view().workers[2].detail;
    assert!(detail.contains("known answer 09090909"), "{detail}");
    script.tell(Event::WorkerPut(draining(0)));
    script.tell(Event::WorkerPut(draining(1)));
    assert_eq!(script.states()[2], "w2 active", "two that leave do not keep it out");
}

#[test]
fn who_computes_nothing_is_planned_with_only_where_that_is_allowed() {
    let all = || {
        let mut all = workers(2);
        all.iter_mut().for_each(|record| record.stub = true);
        all
    };
    let script = Script::new(None, all());
    assert_eq!(script.states(), ["w0 unfit", "w1 unfit"]);
    let detail = &script.cluster.view().workers[0].detail;
    assert!(detail.contains("it computes nothing"), "{detail}");
    let allowed = Options { allow_stub_compute: true, ..options(Some(2)) };
    let mut script = Script::with(allowed, all(), Found::Nothing);
    script.pass(1000);
    assert_eq!(script.states(), ["w0 active", "w1 active"]);
}

#[test]
fn who_did_not_say_how_fast_it_is_has_no_place_in_a_plan() {
    let mut all = workers(3);
    all[1].models[0].steps.clear();
    all[2].models.clear();
    let script = Script::new(None, all);
    assert_eq!(script.states(), ["w0 active", "w1 unfit", "w2 unfit"]);
    let view = script.cluster.view();
    assert_eq!(view.workers[1].detail, "it has not said how fast it computes the model");
    assert_eq!(view.workers[2].detail, "it does not have the model");
}

#[test]
fn workers_of_a_rack_that_comes_back_are_planned_together() {
    let mut script = Script::new(None, workers(4));
    script.pass(20_000);
    for id in 1..=4 {
        script.kill(script.at(id), 0);
    }
    script.tell(Event::Reset(Vec::new()));
    script.pass(5000);
    assert_eq!(script.served(), []);
    let plans = script.plans.len();
    script.take();
    for i in 0..4 {
        script.tell(Event::WorkerPut(record(i, 2)));
        script.pass(400);
    }
    script.pass(1000);
    assert_eq!((script.served().len(), script.plans.len()), (4, plans + 1));
}
