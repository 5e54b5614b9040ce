//! Single rules of the cluster, by cases.

use std::time::Duration;

use proto::ids::{Epoch, Incarnation, KnownAnswer, Term};
use proto::plan::{Plan, WorkerRecord};

use super::simulation::{class, options, record};
use super::starting::START_TRIES;
use super::*;

/// A cluster with the answers that a faultless world would give.
struct Script {
    cluster: Cluster,
    now: Tick,
    revision: u64,
    /// What was asked for since the last look, but for what [`Script::answer`] answers.
    heard: Vec<Action>,
    plans: Vec<Plan>,
}

impl Script {
    fn new(stages: Option<u32>, workers: Vec<WorkerRecord>) -> Self {
        let cluster = Cluster::new(options(stages));
        let mut script =
            Self { cluster, now: Tick::ZERO, revision: 100, heard: Vec::new(), plans: Vec::new() };
        script.tell(Event::TermGained(Term(7)));
        script.tell(Event::Reset(workers));
        script
    }

    fn tell(&mut self, event: Event) {
        let actions = self.cluster.handle(self.now, event);
        for action in actions {
            let answer = match &action {
                Action::ReadPlan => Some(Event::PlanRead(None)),
                Action::WritePlan { plan, .. } => {
                    self.revision += 1;
                    self.plans.push(plan.clone());
                    Some(Event::PlanWritten { revision: self.revision })
                }
                Action::Prepare(request) => {
                    let (epoch, stage) = (request.epoch, request.stage);
                    Some(Event::Prepared { epoch, stage, class: class() })
                }
                Action::Activate { epoch, stage, .. } => {
                    Some(Event::Activated { epoch: *epoch, stage: *stage })
                }
                _ => None,
            };
            match answer {
                Some(answer) => self.tell(answer),
                None => self.heard.push(action),
            }
        }
    }

    fn pass(&mut self, millis: u64) {
        self.now = self.now + Duration::from_millis(millis);
        self.tell(Event::Tick);
    }

    fn take(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.heard)
    }

    fn epoch(&self) -> Epoch {
        Epoch(self.revision)
    }

    fn states(&self) -> Vec<String> {
        self.cluster.view().workers.into_iter().map(|w| format!("{} {}", w.id, w.state)).collect()
    }

    /// A stage's stream breaks and the probe that follows fails.
    fn kill(&mut self, stage: u32) {
        let epoch = self.epoch();
        self.tell(Event::StreamBroken { epoch, stage, detail: "reset".to_owned() });
        let Some(Action::Probe { worker, incarnation, .. }) = self.heard.pop() else {
            panic!("{:?}", self.heard)
        };
        self.tell(Event::ProbeFailed { worker, incarnation, detail: "refused".to_owned() });
    }
}

fn workers(count: usize) -> Vec<WorkerRecord> {
    (0..count).map(|i| record(i, 1)).collect()
}

fn is_serve(action: &Action) -> bool {
    matches!(action, Action::Serve { .. })
}

#[test]
fn workers_become_a_pipeline_and_a_late_one_stands_by() {
    let mut script = Script::new(Some(3), workers(3));
    let actions = script.take();
    let [Action::Serve { shape, plan, class: of }] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!((shape.epoch, shape.term, shape.stages), (Epoch(101), Term(7), 3));
    assert_eq!((shape.kv_blocks, plan.epoch, *of), (64, Epoch(101), class()));
    script.tell(Event::WorkerPut(record(3, 1)));
    script.pass(100_000);
    assert_eq!(script.take(), []);
    assert_eq!(script.states(), ["w0 active", "w1 active", "w2 active", "w3 standby"]);
    assert_eq!(script.cluster.unavailable(), None);
}

#[test]
fn a_broken_stream_alone_is_opened_again_and_with_a_failed_probe_the_worker_is_replaced() {
    let mut script = Script::new(Some(2), workers(3));
    script.take();
    let epoch = script.epoch();
    script.tell(Event::StreamBroken { epoch, stage: 1, detail: "reset".to_owned() });
    let [Action::Probe { worker, incarnation, .. }] = &script.take()[..] else { panic!() };
    script.tell(Event::ProbeOk { worker: worker.clone(), incarnation: *incarnation });
    assert_eq!(script.take(), [Action::Reconnect { epoch, stage: 1 }]);

    script.now = script.now + Duration::from_secs(2);
    let first = script.plans[0].pipelines[0].stages.clone();
    script.kill(1);
    let actions = script.take();
    let [
        Action::FailPipeline { epoch: failed, reason },
        Action::Retire { target, .. },
        Action::Serve { plan, .. },
    ] = &actions[..]
    else {
        panic!("{actions:?}")
    };
    assert_eq!(*failed, epoch);
    assert_eq!(
        reason,
        &format!(
            "worker {} with layers {}..12 was lost: its stream broke (reset) and it does not \
             answer (refused)",
            first[1].worker, first[1].layers.start
        )
    );
    assert_eq!(*target, first[0], "who is dead is not told");
    assert_eq!(plan.stages[0], first[0], "the other stage stays as it was");
    assert_eq!(plan.stages[1].layers, first[1].layers);
    assert_ne!(plan.stages[1].worker, first[1].worker);
}

#[test]
fn a_lost_lease_needs_a_silent_data_path() {
    let mut script = Script::new(Some(2), workers(4));
    script.take();
    script.tell(Event::WorkerGone { worker: "w0".to_owned() });
    let [Action::Probe { worker, incarnation, .. }] = &script.take()[..] else { panic!() };
    let (worker, incarnation) = (worker.clone(), *incarnation);
    script.tell(Event::ProbeOk { worker: worker.clone(), incarnation });
    script.pass(1000);
    assert!(matches!(script.take()[..], [Action::Probe { .. }]), "it is watched");
    script.tell(Event::ProbeFailed { worker, incarnation, detail: "timeout".to_owned() });
    assert!(matches!(script.take()[0], Action::FailPipeline { .. }));
}

#[test]
fn mass_loss_of_leases_freezes_evictions_and_raises_an_alarm() {
    let mut script = Script::new(Some(2), workers(3));
    script.take();
    script.tell(Event::Reset(vec![record(2, 1)]));
    let alarms = script.take();
    assert!(
        alarms.iter().any(|a| matches!(a, Action::Alarm { text } if text.starts_with("2 of 3")))
    );
    let incarnation = Incarnation([1; 16]);
    let failed =
        Event::ProbeFailed { worker: "w0".to_owned(), incarnation, detail: "timeout".to_owned() };
    script.tell(failed.clone());
    assert_eq!(script.take(), [], "frozen");
    script.tell(Event::WorkerPut(record(1, 1)));
    script.tell(failed);
    assert!(matches!(script.take()[0], Action::FailPipeline { .. }), "thawed: most are back");
}

#[test]
fn workers_that_announced_it_leave_without_an_alarm() {
    let mut script = Script::new(Some(2), workers(4));
    for index in 0..4 {
        script.tell(Event::WorkerPut(WorkerRecord { draining: true, ..record(index, 1) }));
    }
    script.take();
    for index in 0..4 {
        script.tell(Event::WorkerGone { worker: format!("w{index}") });
    }
    let actions = script.take();
    assert!(!actions.iter().any(|a| matches!(a, Action::Alarm { .. })), "{actions:?}");
    assert!(!script.cluster.members.is_frozen());
}

#[test]
fn the_leases_of_the_dead_do_not_count_as_lost_at_once() {
    let mut script = Script::new(Some(2), workers(3));
    script.take();
    let dead: Vec<_> =
        script.plans[0].pipelines[0].stages.iter().map(|stage| stage.worker.clone()).collect();
    // Both were found dead before their leases ran out; one more lease is one lease.
    script.kill(0);
    let second = script.cluster.stage_of(&dead[1]).expect("it has a stage of the new plan");
    script.kill(second);
    for worker in dead.iter().cloned().chain(["w2".to_owned()]) {
        script.tell(Event::WorkerGone { worker });
    }
    let actions = script.take();
    assert!(!actions.iter().any(|a| matches!(a, Action::Alarm { .. })), "{actions:?}");
    assert!(!script.cluster.members.is_frozen());
}

#[test]
fn a_restarted_worker_is_another_and_serves_again() {
    let mut script = Script::new(Some(3), workers(3));
    script.take();
    script.kill(1);
    let actions = script.take();
    assert!(matches!(&actions[..], [
        Action::FailPipeline { .. },
        Action::Retire { .. },
        Action::Retire { .. },
        Action::NoPlan { reason },
    ] if reason.starts_with("3 stages were asked for, only 2 workers")));
    assert!(script.cluster.unavailable().unwrap().contains("w1: its stream broke"));
    script.tell(Event::WorkerPut(record(1, 2)));
    assert!(script.take().iter().any(is_serve));
    // A new process start under a stage that seemed healthy is a death too.
    script.tell(Event::WorkerPut(record(0, 2)));
    let actions = script.take();
    assert!(
        matches!(&actions[0], Action::FailPipeline { reason, .. } if reason.contains("started again"))
    );
    assert!(actions.iter().any(is_serve));
}

#[test]
fn a_worker_that_flaps_is_kept_out() {
    let mut script = Script::new(Some(3), workers(3));
    for incarnation in 2..4 {
        script.kill(1);
        script.tell(Event::WorkerPut(record(1, incarnation)));
        assert!(script.take().iter().any(is_serve));
    }
    script.kill(1);
    script.tell(Event::WorkerPut(record(1, 4)));
    let actions = script.take();
    assert!(
        actions.iter().any(|a| matches!(a, Action::Alarm { text } if text.contains("3 times")))
    );
    assert!(!actions.iter().any(is_serve));
    assert_eq!(script.states()[1], "w1 suspect");
    script.pass(59_000);
    assert!(!script.take().iter().any(is_serve));
    script.pass(1000);
    assert!(script.take().iter().any(is_serve));
}

#[test]
fn a_draining_worker_is_replaced_when_nothing_runs() {
    let mut script = Script::new(Some(2), workers(3));
    script.take();
    let (epoch, leaving) = (script.epoch(), script.plans[0].pipelines[0].stages[0].clone());
    let index = leaving.worker[1..].parse().unwrap();
    script.tell(Event::WorkerPut(WorkerRecord { draining: true, ..record(index, 1) }));
    assert_eq!(script.take(), [Action::HoldAdmission(true)]);
    script.tell(Event::Drained { epoch });
    let actions = script.take();
    assert!(matches!(actions[0], Action::FailPipeline { .. }));
    assert_eq!(actions[1], Action::HoldAdmission(false));
    let Some(Action::Serve { plan, .. }) = actions.last() else { panic!("{actions:?}") };
    assert!(plan.stages.iter().all(|stage| stage.worker != leaving.worker));
}

#[test]
fn the_minority_of_a_class_and_who_lacks_the_model_are_unfit() {
    let mut all = workers(4);
    all[1].known_answer = KnownAnswer([9; 32]);
    all[2].models.clear();
    let mut script = Script::new(Some(2), all);
    assert!(script.take().iter().any(is_serve));
    assert_eq!(script.states(), ["w0 active", "w1 unfit", "w2 unfit", "w3 active"]);
    let view = script.cluster.view();
    assert_eq!(view.workers[2].detail, "it does not have the model");
    assert!(view.workers[1].detail.contains("known answer 09090909"), "{}", view.workers[1].detail);
}

#[test]
fn an_unknown_outcome_is_read_back_and_never_written_blindly() {
    let mut cluster = Cluster::new(options(Some(2)));
    let now = Tick::ZERO;
    assert_eq!(cluster.handle(now, Event::Reset(workers(2))).len(), 1, "it does not lead");
    assert_eq!(cluster.handle(now, Event::TermGained(Term(7))), [Action::ReadPlan]);
    let mut actions = cluster.handle(now, Event::PlanRead(None));
    let Some(Action::WritePlan { previous: None, plan, .. }) = actions.pop() else { panic!() };
    let unknown = Event::PlanUnknown { detail: "timeout".to_owned() };
    assert_eq!(cluster.handle(now, unknown), [Action::ReadPlan]);
    let mut read = plan.clone();
    read.pipelines[0].predicted_tokens_per_s += 1e-9;
    let actions = cluster.handle(now, Event::PlanRead(Some((33, Some(read)))));
    assert!(matches!(&actions[..], [Action::Prepare(a), Action::Prepare(b)]
        if a.epoch == Epoch(33) && b.stage == 1));
}

#[test]
fn a_plan_that_cannot_be_read_is_replaced_where_it_is() {
    let mut cluster = Cluster::new(options(Some(2)));
    let now = Tick::ZERO;
    cluster.handle(now, Event::Reset(workers(2)));
    cluster.handle(now, Event::TermGained(Term(7)));
    let actions = cluster.handle(now, Event::PlanRead(Some((33, None))));
    let [Action::WritePlan { previous: Some(33), .. }] = &actions[..] else {
        panic!("{actions:?}")
    };
    // One that comes while ours is on its way is somebody else's.
    cluster.handle(now, Event::PlanConflict);
    cluster.handle(now, Event::PlanRead(Some((34, None))));
    let actions = cluster.handle(Tick::from_millis(1000), Event::Tick);
    assert!(matches!(&actions[..], [Action::WritePlan { previous: Some(34), .. }]), "{actions:?}");
}

#[test]
fn who_did_not_say_how_fast_it_is_has_no_place_in_a_plan() {
    let mut all = workers(3);
    all[1].models[0].steps.clear();
    let mut script = Script::new(Some(2), all);
    assert!(script.take().iter().any(is_serve));
    assert_eq!(script.states(), ["w0 active", "w1 unfit", "w2 active"]);
    let detail = &script.cluster.view().workers[1].detail;
    assert_eq!(detail, "it has not said how fast it computes the model");
}

#[test]
fn without_etcd_it_goes_on_serving_and_a_usurped_plan_ends_it() {
    let mut script = Script::new(Some(2), workers(3));
    script.take();
    script.tell(Event::TermLost);
    script.pass(600_000);
    assert_eq!(script.take(), []);
    assert!(script.cluster.view().serving);
    let epoch = script.epoch();
    let actions = script.cluster.handle(script.now, Event::TermGained(Term(8)));
    assert_eq!(actions, [Action::ReadPlan]);
    let ours = script.plans[0].clone();
    let same = Event::PlanRead(Some((epoch.0, Some(ours.clone()))));
    assert_eq!(script.cluster.handle(script.now, same), []);

    script.cluster.handle(script.now, Event::TermLost);
    script.cluster.handle(script.now, Event::TermGained(Term(9)));
    let other = Event::PlanRead(Some((epoch.0 + 1, Some(ours))));
    let actions = script.cluster.handle(script.now, other);
    assert!(matches!(&actions[0], Action::FailPipeline { .. }));
    assert!(
        matches!(actions.last(), Some(Action::WritePlan { previous: Some(at), .. }) if *at == epoch.0 + 1)
    );
}

#[test]
fn steps_that_never_come_back_end_the_pipeline() {
    let mut script = Script::new(Some(2), workers(2));
    script.take();
    let epoch = script.epoch();
    let mut failed = Vec::new();
    for _ in 0..40 {
        script.tell(Event::StepOverdue { epoch });
        for action in script.take() {
            match action {
                Action::Probe { worker, incarnation, .. } => {
                    script.tell(Event::ProbeOk { worker, incarnation });
                }
                Action::FailPipeline { reason, .. } => failed.push(reason),
                _ => {}
            }
        }
        script.pass(400);
    }
    assert_eq!(failed, ["no step has come back for 15 s"]);
    assert!(script.cluster.view().serving, "the same workers at a new epoch");
}

#[test]
fn who_refuses_for_good_is_left_out_and_planned_around() {
    let mut cluster = Cluster::new(options(Some(1)));
    let now = Tick::ZERO;
    cluster.handle(now, Event::TermGained(Term(7)));
    cluster.handle(now, Event::PlanRead(None));
    let actions = cluster.handle(now, Event::Reset(workers(2)));
    assert!(matches!(actions.last(), Some(Action::WritePlan { .. })));
    let actions = cluster.handle(now, Event::PlanWritten { revision: 5 });
    let [Action::Prepare(request)] = &actions[..] else { panic!("{actions:?}") };
    let refused = request.stages[0].worker.clone();
    let detail = "no memory".to_owned();
    let failed = Event::PrepareFailed { epoch: Epoch(5), stage: 0, transient: false, detail };
    let actions = cluster.handle(now, failed);
    assert!(matches!(actions[0], Action::Retire { .. }));
    let actions = cluster.handle(Tick::from_millis(250), Event::Tick);
    let Some(Action::WritePlan { plan, .. }) = actions.last() else { panic!("{actions:?}") };
    assert_ne!(plan.pipelines[0].stages[0].worker, refused);
}

#[test]
fn transient_refusals_are_tried_again_a_bounded_number_of_times() {
    let mut cluster = Cluster::new(options(Some(1)));
    let mut now = Tick::ZERO;
    cluster.handle(now, Event::TermGained(Term(7)));
    cluster.handle(now, Event::PlanRead(None));
    cluster.handle(now, Event::Reset(workers(1)));
    cluster.handle(now, Event::PlanWritten { revision: 5 });
    let mut tries = 1;
    for _ in 0..20 {
        let detail = "not reached".to_owned();
        let failed = Event::PrepareFailed { epoch: Epoch(5), stage: 0, transient: true, detail };
        cluster.handle(now, failed);
        now = now + Duration::from_millis(1100);
        let actions = cluster.handle(now, Event::Tick);
        tries += actions.iter().filter(|a| matches!(a, Action::Prepare(_))).count();
    }
    assert_eq!(tries, START_TRIES as usize);
}
