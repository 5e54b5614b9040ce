//! The cluster against a world of workers and a registry that lose, delay and reorder: random
//! faults, invariants on every action, and in the end, when all is healed, it must serve.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use proto::ids::{Epoch, Incarnation, KnownAnswer, ModelId, NumericsClass, Term};
use proto::plan::{KvType, Plan, StepTime, WorkerModel, WorkerRecord};

use super::*;
use crate::planner::ModelCosts;

pub(super) const MODEL: ModelId = ModelId([4; 32]);
pub(super) const ANSWER: KnownAnswer = KnownAnswer([5; 32]);

pub(super) fn options(stages: Option<u32>) -> Options {
    Options {
        cluster_id: "c".to_owned(),
        model: MODEL,
        costs: ModelCosts {
            layers: 12,
            layer_bytes: 100,
            embedding_bytes: 50,
            head_bytes: 50,
            tied_head: true,
            kv_block_layer_bytes: 1,
        },
        kv_type: KvType::F16,
        stages,
        min_kv_blocks: 4,
        max_kv_blocks: 64,
        max_step_tokens: 64,
        settle: Duration::from_secs(1),
    }
}

pub(super) fn class() -> NumericsClass {
    NumericsClass::form(MODEL, KvType::F16, 1, ANSWER)
}

pub(super) fn record(id: usize, incarnation: u8) -> WorkerRecord {
    WorkerRecord {
        id: format!("w{id}"),
        incarnation: Incarnation([incarnation; 16]),
        address: format!("host-{id}:1"),
        version: "0".to_owned(),
        isa: "scalar".to_owned(),
        threads: 1,
        memory_bytes: 10_000,
        kernel_revision: 1,
        known_answer: ANSWER,
        models: vec![WorkerModel {
            id: MODEL,
            steps: vec![
                StepTime { rows: 1, layer_ns: 10, head_ns: 10 },
                StepTime { rows: 16, layer_ns: 100, head_ns: 100 },
            ],
        }],
        ..WorkerRecord::default()
    }
}

/// A worker as it really is.
struct Node {
    record: WorkerRecord,
    alive: bool,
    has_lease: bool,
}

struct World {
    cluster: Cluster,
    now: Tick,
    nodes: Vec<Node>,
    revision: u64,
    term: Option<u64>,
    plan: Option<(u64, Plan)>,
    /// Asked for and not carried out.
    pending: Vec<Action>,
    serving: Option<Serving>,
    newest_epoch: Epoch,
    newest_term: Term,
    holding: bool,
}

struct Serving {
    epoch: Epoch,
    stages: Vec<StagePlan>,
    /// Why it may rightly be given up.
    excuse: bool,
}

impl World {
    fn new(nodes: usize, stages: Option<u32>) -> Self {
        let node = |i| Node { record: record(i, 1), alive: true, has_lease: true };
        Self {
            cluster: Cluster::new(options(stages)),
            now: Tick::ZERO,
            nodes: (0..nodes).map(node).collect(),
            revision: 10,
            term: None,
            plan: None,
            pending: Vec::new(),
            serving: None,
            newest_epoch: Epoch(0),
            newest_term: Term(0),
            holding: false,
        }
    }

    fn tell(&mut self, event: Event) {
        for action in self.cluster.handle(self.now, event) {
            self.check(&action);
            self.pending.push(action);
        }
        let view = self.cluster.view();
        assert_eq!(view.serving, self.serving.is_some());
        assert_eq!(view.serving, self.cluster.unavailable().is_none());
        assert!(view.serving || !view.plan.reason.is_empty() || !view.plan.pipelines.is_empty());
    }

    fn check(&mut self, action: &Action) {
        match action {
            Action::WritePlan { term, plan, .. } => {
                assert_eq!(Some(term.0), self.term, "only who leads writes");
                assert!(*term >= self.newest_term, "terms never go back");
                assert!(self.serving.is_none(), "nothing is planned beside what serves");
                self.newest_term = *term;
                let mut next = 0;
                for stage in &plan.pipelines[0].stages {
                    assert_eq!(stage.layers.start, next);
                    next = stage.layers.end;
                }
                assert_eq!(next, 12, "each layer once");
            }
            Action::Prepare(request) => {
                assert!(request.epoch >= self.newest_epoch, "nothing for a fenced epoch");
                self.newest_epoch = request.epoch;
            }
            Action::Activate { epoch, .. } => assert_eq!(*epoch, self.newest_epoch),
            Action::Serve { shape, plan, .. } => {
                assert_eq!(shape.epoch, self.newest_epoch);
                assert!(self.serving.is_none());
                self.serving = Some(Serving {
                    epoch: shape.epoch,
                    stages: plan.stages.clone(),
                    excuse: false,
                });
            }
            Action::FailPipeline { epoch, reason } => {
                let serving = self.serving.take().expect("only what serves can fail");
                assert_eq!(*epoch, serving.epoch);
                assert!(!reason.is_empty());
                let sound = |stage: &StagePlan| {
                    self.node(stage).is_some_and(|node| node.has_lease && !node.record.draining)
                };
                let excuse = serving.excuse || !serving.stages.iter().all(sound);
                assert!(excuse, "given up without a cause: {reason}");
            }
            Action::Reconnect { epoch, stage } => {
                let serving = self.serving.as_ref().unwrap();
                assert_eq!(*epoch, serving.epoch);
                assert!((*stage as usize) < serving.stages.len());
            }
            Action::HoldAdmission(hold) => {
                assert_ne!(*hold, self.holding);
                self.holding = *hold;
            }
            Action::NoPlan { reason } => assert!(self.serving.is_none() && !reason.is_empty()),
            Action::ReadPlan
            | Action::Retire { .. }
            | Action::Probe { .. }
            | Action::Alarm { .. } => {}
        }
    }

    fn excuse(&mut self) {
        if let Some(serving) = &mut self.serving {
            serving.excuse = true;
        }
    }

    fn node(&self, stage: &StagePlan) -> Option<&Node> {
        let node = self.nodes.iter().find(|node| node.record.id == stage.worker)?;
        (node.alive && node.record.incarnation == stage.incarnation).then_some(node)
    }

    /// Carries one action out; `fault` makes what may go wrong go wrong.
    fn carry_out(&mut self, which: usize, fault: bool) {
        if self.pending.is_empty() {
            return;
        }
        let action = self.pending.remove(which % self.pending.len());
        let event = match action {
            Action::ReadPlan if fault => {
                Event::PlanReadFailed { detail: "the registry is away".to_owned() }
            }
            Action::ReadPlan => {
                Event::PlanRead(self.plan.clone().map(|(at, plan)| (at, Some(plan))))
            }
            Action::WritePlan { term, previous, plan } => {
                let at = self.plan.as_ref().map(|&(at, _)| at);
                let may = Some(term.0) == self.term && at == previous;
                // An unknown outcome may have been written or not.
                if may && !(fault && which.is_multiple_of(2)) {
                    self.revision += 1;
                    self.plan = Some((self.revision, plan));
                }
                match (fault, may) {
                    (true, _) => Event::PlanUnknown { detail: "timeout".to_owned() },
                    (false, true) => Event::PlanWritten { revision: self.revision },
                    (false, false) => Event::PlanConflict,
                }
            }
            Action::Prepare(request) => {
                let (epoch, stage) = (request.epoch, request.stage);
                match self.node(&request.stages[stage as usize]) {
                    Some(_) if !fault => Event::Prepared { epoch, stage, class: class() },
                    _ => {
                        let detail = "refused".to_owned();
                        Event::PrepareFailed {
                            epoch,
                            stage,
                            transient: !which.is_multiple_of(3),
                            detail,
                        }
                    }
                }
            }
            Action::Activate { epoch, stage, target, .. } => match self.node(&target) {
                Some(_) if !fault => Event::Activated { epoch, stage },
                _ => {
                    let detail = "refused".to_owned();
                    Event::ActivateFailed { epoch, stage, transient: true, detail }
                }
            },
            Action::Probe { worker, incarnation, .. } => {
                let node = self.nodes.iter().find(|node| node.record.id == worker).unwrap();
                match node.alive && !fault {
                    true => Event::ProbeOk { worker, incarnation: node.record.incarnation },
                    false => {
                        let detail = "no answer".to_owned();
                        Event::ProbeFailed { worker, incarnation, detail }
                    }
                }
            }
            _ => return,
        };
        self.tell(event);
    }

    /// What the driver sees of the streams of dead stages.
    fn see_streams(&mut self) {
        let Some(serving) = &self.serving else { return };
        let epoch = serving.epoch;
        let dead: Vec<_> = (0..)
            .zip(&serving.stages)
            .filter(|(_, stage)| self.node(stage).is_none())
            .map(|(i, _)| i)
            .collect();
        for stage in dead {
            self.tell(Event::StreamBroken { epoch, stage, detail: "reset".to_owned() });
        }
        if self.holding && self.serving.is_some() {
            self.tell(Event::Drained { epoch });
        }
    }

    fn lose_lease(&mut self, i: usize) {
        let node = &mut self.nodes[i];
        if std::mem::take(&mut node.has_lease) {
            let worker = node.record.id.clone();
            self.tell(Event::WorkerGone { worker });
        }
    }

    fn register(&mut self, i: usize) {
        if self.nodes[i].alive {
            self.nodes[i].has_lease = true;
            let record = self.nodes[i].record.clone();
            self.tell(Event::WorkerPut(record));
        }
    }

    fn restart(&mut self, i: usize) {
        self.excuse();
        let node = &mut self.nodes[i];
        node.alive = true;
        node.record.draining = false;
        node.record.incarnation.0[0] += 1;
        self.register(i);
    }

    fn lead(&mut self) {
        self.revision += 1;
        self.term = Some(self.revision);
        self.tell(Event::TermGained(Term(self.revision)));
    }

    fn list(&mut self) {
        let listed = self.nodes.iter().filter(|node| node.has_lease);
        let records = listed.map(|node| node.record.clone()).collect();
        self.tell(Event::Reset(records));
    }

    fn apply(&mut self, fault: Fault) {
        let count = self.nodes.len();
        match fault {
            Fault::Pass(ms) => {
                self.now = self.now + Duration::from_millis(ms);
                self.tell(Event::Tick);
            }
            Fault::CarryOut(which, fault) => {
                // A failed probe proves something only beside another signal.
                self.carry_out(which, fault);
            }
            Fault::Kill(i) => {
                self.excuse();
                self.nodes[i % count].alive = false;
                self.see_streams();
            }
            Fault::Restart(i) => self.restart(i % count),
            Fault::LoseLease(i) => {
                // With a probe that fails by chance this is a cause; alone it is none, which
                // `leases_alone_evict_nobody` shows.
                self.excuse();
                self.lose_lease(i % count);
            }
            Fault::Register(i) => self.register(i % count),
            Fault::Drain(i) => {
                self.excuse();
                self.nodes[i % count].record.draining = true;
                if self.nodes[i % count].has_lease {
                    self.register(i % count);
                }
            }
            Fault::BreakStream(stage) => {
                self.excuse();
                if let Some(serving) = &self.serving {
                    let stage = stage % serving.stages.len() as u32;
                    let event = Event::StreamBroken {
                        epoch: serving.epoch,
                        stage,
                        detail: "cut".to_owned(),
                    };
                    self.tell(event);
                }
            }
            Fault::Overdue => {
                if let Some(serving) = &mut self.serving {
                    serving.excuse = true;
                    let epoch = serving.epoch;
                    self.tell(Event::StepOverdue { epoch });
                }
            }
            Fault::LoseTerm => {
                self.excuse();
                self.term = None;
                self.tell(Event::TermLost);
            }
            Fault::Lead => self.lead(),
            Fault::Relist => self.list(),
        }
    }

    /// Everything heals and nothing else goes wrong.
    fn heal(&mut self) {
        self.excuse();
        for i in 0..self.nodes.len() {
            self.nodes[i].record.draining = false;
            if !self.nodes[i].alive {
                self.restart(i);
            } else {
                self.register(i);
            }
        }
        self.lead();
        self.list();
    }

    fn run(&mut self, span: Duration, step: Duration) {
        let end = self.now + span;
        while self.now < end {
            self.now = self.now + step;
            self.tell(Event::Tick);
            while !self.pending.is_empty() {
                self.carry_out(0, false);
            }
            self.see_streams();
            if let Some(serving) = &self.serving {
                let epoch = serving.epoch;
                self.tell(Event::ResultsFlowing { epoch });
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Fault {
    Pass(u64),
    CarryOut(usize, bool),
    Kill(usize),
    Restart(usize),
    LoseLease(usize),
    Register(usize),
    Drain(usize),
    BreakStream(u32),
    Overdue,
    LoseTerm,
    Lead,
    Relist,
}

fn arb_fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        6 => (1u64..3000).prop_map(Fault::Pass),
        20 => any::<usize>().prop_map(|which| Fault::CarryOut(which, false)),
        2 => any::<usize>().prop_map(|which| Fault::CarryOut(which, true)),
        1 => any::<usize>().prop_map(Fault::Kill),
        2 => any::<usize>().prop_map(Fault::Restart),
        1 => any::<usize>().prop_map(Fault::LoseLease),
        2 => any::<usize>().prop_map(Fault::Register),
        1 => any::<usize>().prop_map(Fault::Drain),
        1 => any::<u32>().prop_map(Fault::BreakStream),
        1 => Just(Fault::Overdue),
        1 => Just(Fault::LoseTerm),
        2 => Just(Fault::Lead),
        1 => Just(Fault::Relist),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(250))]

    #[test]
    fn whatever_happens_it_keeps_the_rules_and_serves_again_when_healed(
        nodes in 2usize..6, stages in proptest::option::of(1u32..3),
        faults in proptest::collection::vec(arb_fault(), 0..150),
    ) {
        let mut world = World::new(nodes, stages);
        world.lead();
        world.list();
        for fault in faults {
            world.apply(fault);
        }
        world.heal();
        // Longer than the longest quarantine that three evictions in a row can bring.
        world.run(Duration::from_secs(4000), Duration::from_secs(20));
        prop_assert!(world.serving.is_some(), "{}", world.cluster.view().plan.reason);
        let epoch = world.serving.as_ref().unwrap().epoch;
        world.run(Duration::from_secs(60), Duration::from_millis(250));
        prop_assert_eq!(world.serving.unwrap().epoch, epoch, "what is healthy is left alone");
    }

    #[test]
    fn leases_alone_evict_nobody(
        nodes in 2usize..6, lost in proptest::collection::vec((any::<usize>(), any::<bool>()), 1..40),
    ) {
        let mut world = World::new(nodes, Some(2));
        world.lead();
        world.list();
        world.run(Duration::from_secs(5), Duration::from_millis(250));
        let epoch = world.serving.as_ref().unwrap().epoch;
        for (i, back) in lost {
            world.lose_lease(i % nodes);
            world.run(Duration::from_millis(700), Duration::from_millis(100));
            if back {
                world.register(i % nodes);
            }
        }
        world.run(Duration::from_secs(100), Duration::from_millis(500));
        prop_assert_eq!(world.serving.unwrap().epoch, epoch);
    }
}

#[test]
fn equal_events_give_equal_actions() {
    let trace = || {
        let mut world = World::new(4, None);
        let mut seen = BTreeMap::new();
        world.lead();
        world.list();
        for i in 0..200usize {
            world.apply(match i % 9 {
                0 => Fault::Kill(i),
                4 => Fault::Restart(i),
                8 => Fault::Pass(400),
                _ => Fault::CarryOut(i, i % 31 == 0),
            });
            seen.insert(i, (world.pending.clone(), world.cluster.view()));
        }
        seen
    };
    assert_eq!(trace(), trace());
}
