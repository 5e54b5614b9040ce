//! The world: workers with memory and epochs, a registry with one leader, and lanes that send
//! steps. What goes against the rules panics.

mod given;
mod node;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::ids::{Epoch, Incarnation, PipelineId, PipelineRef, Term};
use proto::plan::{PipelinePlan, Plan, StagePlan};

use super::super::*;
use crate::planner::{Deployment, PlanError, Problem};
pub(in super::super) use given::{class, options, place, record};
use node::Node;

/// What the driver runs for a pipeline.
#[derive(Clone, Debug)]
struct Running {
    at: PipelineRef,
    term: Term,
    plan: PipelinePlan,
    paused: bool,
    /// Why it may rightly be lost.
    excuse: bool,
}

struct Coordinator {
    cluster: Cluster,
    lanes: BTreeMap<PipelineId, Running>,
    /// Asked for and not carried out.
    pending: Vec<Action>,
    /// Whose `Prepare` was answered well.
    prepared: BTreeSet<(PipelineRef, u32)>,
    writes: usize,
}

pub(super) struct World {
    now: Tick,
    nodes: Vec<Node>,
    coordinators: Vec<Coordinator>,
    revision: u64,
    leader: Option<(usize, Term)>,
    /// Others have led since, and they do not know it.
    deposed: BTreeSet<usize>,
    plan: Option<(u64, Plan)>,
    /// Who ended in order is started again.
    supervised: bool,
    planner: fn(&Problem) -> Result<Deployment, PlanError>,
}

impl World {
    pub(super) fn new(engines: &[usize], stages: Option<u32>, coordinators: usize) -> Self {
        let node = |(i, &engines): (usize, &usize)| Node {
            record: record(i, 1),
            alive: true,
            has_lease: true,
            engines,
            term: Term(0),
            over: Epoch(0),
            prepared: None,
            active: None,
        };
        let coordinator = |_| Coordinator {
            cluster: Cluster::new(options(stages)),
            lanes: BTreeMap::new(),
            pending: Vec::new(),
            prepared: BTreeSet::new(),
            writes: 0,
        };
        Self {
            now: Tick::ZERO,
            nodes: engines.iter().enumerate().map(node).collect(),
            coordinators: (0..coordinators).map(coordinator).collect(),
            revision: 10,
            leader: None,
            deposed: BTreeSet::new(),
            plan: None,
            supervised: false,
            planner: place,
        }
    }

    /// With the planner of coordinators in place of one that is easily foreseen.
    pub(super) fn with_real_planner(mut self) -> Self {
        self.planner = crate::planner::deploy;
        self
    }

    /// A worker that has not come yet: it does with [`Fault::Restart`].
    pub(super) fn keep_away(&mut self, i: usize) {
        (self.nodes[i].alive, self.nodes[i].has_lease) = (false, false);
    }

    fn tell(&mut self, who: usize, event: Event) {
        let actions = self.coordinators[who].cluster.handle(self.now, event);
        for action in actions {
            self.check(who, &action);
            if !self.at_once(who, &action) {
                self.coordinators[who].pending.push(action);
            }
        }
        let coordinator = &self.coordinators[who];
        if coordinator.cluster.availability() == Availability::Serving {
            assert!(!coordinator.lanes.is_empty());
            assert!(coordinator.cluster.view().serving);
        } else {
            assert!(!coordinator.cluster.view().plan.reason.is_empty());
        }
        // Nobody's steps are taken where another coordinator's are.
        for node in &self.nodes {
            let takes = |coordinator: &&Coordinator| {
                let mut lanes = coordinator.lanes.values();
                lanes.any(|lane| {
                    lane.plan.stages.iter().any(|stage| is_at(node, stage))
                        && node.takes_steps(lane.at, lane.term)
                })
            };
            let count = self.coordinators.iter().filter(takes).count();
            assert!(count <= 1, "{} works for {count} coordinators", node.record.id);
        }
    }

    fn tell_all(&mut self, event: &Event) {
        for who in 0..self.coordinators.len() {
            self.tell(who, event.clone());
        }
    }

    fn check(&mut self, who: usize, action: &Action) {
        let coordinator = &mut self.coordinators[who];
        let lane = |at: &PipelineRef| coordinator.lanes.get(&at.id).filter(|l| l.at == *at);
        match action {
            Action::WritePlan { plan, .. } => {
                assert_eq!(plan.fault(), None, "{plan:?}");
                assert!(plan.pipelines.iter().all(|p| p.stages.last().unwrap().layers.end == 12));
                coordinator.writes += 1;
            }
            Action::Prepare(request) => {
                let target = &request.stages[request.stage as usize];
                let here = coordinator.lanes.values().filter(|lane| uses(&lane.plan, target));
                for lane in here {
                    assert!(lane.at.epoch < request.epoch, "nothing for an epoch that is over");
                    assert!(lane.term >= request.term, "its steps would be fenced");
                }
            }
            Action::Activate { at, target, .. } => {
                let stages = 0..12;
                let prepared = stages.filter(|&i| coordinator.prepared.contains(&(*at, i))).count();
                let here = coordinator.lanes.values().filter(|lane| uses(&lane.plan, target));
                for lane in here {
                    assert!(lane.paused, "steps are on their way through {}", target.worker);
                }
                assert!(prepared > 0);
            }
            Action::Retire { at, target, .. } => {
                let lanes = coordinator.lanes.values().filter(|lane| {
                    lane.plan.stages.iter().any(|stage| {
                        stage.worker == target.worker && stage.incarnation == target.incarnation
                    })
                });
                for lane in lanes {
                    assert!(lane.paused || lane.at.epoch > at.epoch, "{lane:?} is retired by {at}");
                }
            }
            Action::Serve { shape, plan, .. } => {
                let at = plan.at();
                assert_eq!(shape.epoch, at.epoch);
                for stage in 0..plan.stages.len() as u32 {
                    assert!(coordinator.prepared.contains(&(at, stage)), "{at} stage {stage}");
                }
                // One that is paused gives way in a moment, by an action of the same answer.
                let others = coordinator.lanes.values();
                let mut others = others.filter(|lane| lane.at.id != at.id && !lane.paused);
                let shares = |lane: &Running| plan.stages.iter().any(|s| uses(&lane.plan, s));
                assert!(!others.any(shares), "a worker has one stage");
            }
            Action::Pause { at } => assert!(!lane(at).expect("a lane").paused),
            Action::Resume { at, .. } => _ = lane(at).expect("a lane"),
            Action::Leave { at } => _ = lane(at).expect("a lane"),
            Action::Reconnect { at, stage } => {
                assert!((*stage as usize) < lane(at).expect("a lane").plan.stages.len());
            }
            Action::Fail { at, reason } => {
                let lane = lane(at).expect("only what serves can fail");
                let stages = &lane.plan.stages;
                let sound = |stage: &StagePlan| {
                    self.nodes.iter().any(|node| is_at(node, stage) && node.has_lease)
                };
                let excused = lane.excuse || !stages.iter().all(sound);
                assert!(excused, "{at} was given up without a cause: {reason}");
            }
            Action::Dismiss { target, .. } => {
                let stands = |stage: &StagePlan| {
                    stage.worker == target.worker && stage.incarnation == target.incarnation
                };
                let serves = |lane: &Running| lane.plan.stages.iter().any(stands);
                assert!(!coordinator.lanes.values().any(serves), "{} serves", target.worker);
            }
            Action::ReadPlan { .. }
            | Action::Deploy { .. }
            | Action::Probe { .. }
            | Action::Resign { .. }
            | Action::Alarm { .. } => {}
        }
    }

    /// What a driver does without waiting for anybody.
    fn at_once(&mut self, who: usize, action: &Action) -> bool {
        let coordinator = &mut self.coordinators[who];
        match action {
            Action::Serve { shape, plan, .. } => {
                let lane = Running {
                    at: plan.at(),
                    term: shape.term,
                    plan: plan.clone(),
                    paused: false,
                    excuse: false,
                };
                coordinator.lanes.insert(plan.id, lane);
            }
            Action::Leave { at } | Action::Fail { at, .. } => {
                coordinator.lanes.remove(&at.id);
            }
            Action::Resume { at, term } => {
                let lane = coordinator.lanes.get_mut(&at.id).unwrap();
                (lane.paused, lane.term) = (false, *term);
            }
            Action::Pause { at } => {
                coordinator.lanes.get_mut(&at.id).unwrap().paused = true;
                return false;
            }
            Action::Reconnect { .. } | Action::Alarm { .. } | Action::Resign { .. } => {}
            _ => return false,
        }
        true
    }

    fn excuse(&mut self, node: usize) {
        let id = self.nodes[node].record.id.clone();
        for lane in self.coordinators.iter_mut().flat_map(|c| c.lanes.values_mut()) {
            lane.excuse |= lane.plan.stages.iter().any(|stage| stage.worker == id);
        }
    }

    fn excuse_all(&mut self) {
        for lane in self.coordinators.iter_mut().flat_map(|c| c.lanes.values_mut()) {
            lane.excuse = true;
        }
    }

    fn reach(&mut self, worker: &str, incarnation: Incarnation, term: Term) -> Option<&mut Node> {
        let leads = self.leader.is_some_and(|(_, leader)| leader == term);
        let node = self.nodes.iter_mut().find(|node| node.record.id == worker)?;
        let hears = leads && node.alive && node.record.incarnation == incarnation;
        (hears && node.term <= term).then_some(node)
    }

    /// Carries one action out; `fault` makes what may go wrong go wrong.
    fn carry_out(&mut self, who: usize, which: usize, fault: bool) {
        let pending = &mut self.coordinators[who].pending;
        if pending.is_empty() {
            return;
        }
        let action = pending.remove(which % pending.len());
        let detail = || "refused".to_owned();
        let event = match action {
            Action::ReadPlan { ticket } if fault => {
                Event::PlanReadFailed { ticket, detail: "the registry is away".to_owned() }
            }
            Action::ReadPlan { ticket } => {
                let found = match self.plan.clone() {
                    None => Found::Nothing,
                    Some((revision, plan)) => Found::Plan { revision, plan },
                };
                Event::PlanRead { ticket, found }
            }
            Action::WritePlan { ticket, term, previous, plan } => {
                let at = self.plan.as_ref().map(|&(at, _)| at);
                let may = self.leader == Some((who, term)) && at == previous;
                // An unknown outcome may have been written or not.
                if may && !(fault && which.is_multiple_of(2)) {
                    self.revision += 1;
                    self.plan = Some((self.revision, plan));
                }
                match (fault, may) {
                    (true, _) => Event::PlanUnknown { ticket, detail: "timeout".to_owned() },
                    (false, true) => Event::PlanWritten { ticket, revision: self.revision },
                    (false, false) => Event::PlanConflict { ticket },
                }
            }
            Action::Deploy { ticket, problem } => {
                Event::Deployed { ticket, result: (self.planner)(&problem) }
            }
            Action::Prepare(request) => {
                let (at, stage) =
                    (PipelineRef { id: request.pipeline, epoch: request.epoch }, request.stage);
                let target = &request.stages[stage as usize];
                let node = self.reach(&target.worker, target.incarnation, request.term);
                let outcome =
                    node.ok_or(Failure::Transient).and_then(|node| node.prepare(&request));
                let lost =
                    if which.is_multiple_of(3) { Failure::Refused } else { Failure::Transient };
                match if fault { Err(lost) } else { outcome } {
                    Ok(()) => {
                        self.coordinators[who].prepared.insert((at, stage));
                        Event::Prepared { at, stage, class: class() }
                    }
                    Err(failure) => Event::PrepareFailed { at, stage, failure, detail: detail() },
                }
            }
            Action::Activate { at, term, stage, target } => {
                let node = self.reach(&target.worker, target.incarnation, term);
                let outcome = node.ok_or(Failure::Transient).and_then(|n| n.activate(at, term));
                match if fault { Err(Failure::Transient) } else { outcome } {
                    Ok(()) => Event::Activated { at, stage },
                    Err(failure) => Event::ActivateFailed { at, stage, failure, detail: detail() },
                }
            }
            Action::Retire { at, term, target } => {
                let (worker, incarnation) = (target.worker, target.incarnation);
                let node = self.reach(&worker, incarnation, term).map(|node| node.retire(at, term));
                match node.filter(|()| !fault) {
                    Some(()) => Event::Retired { worker, incarnation, at },
                    None => Event::RetireFailed { worker, incarnation, at, detail: detail() },
                }
            }
            Action::Dismiss { term, target } => {
                let Target { worker, incarnation, .. } = target;
                let node = self.reach(&worker, incarnation, term).filter(|_| !fault);
                let fault = match node {
                    None => Some(detail()),
                    Some(node) => {
                        node.record.draining = true;
                        let mut nodes = self.nodes.iter();
                        let i = nodes.position(|node| node.record.id == worker).unwrap();
                        if self.nodes[i].has_lease {
                            self.register(i);
                        }
                        None
                    }
                };
                Event::Dismissed { worker, incarnation, fault }
            }
            Action::Pause { at } => Event::Paused { at },
            Action::Probe { worker, incarnation, .. } => {
                let node = self.nodes.iter().find(|node| node.record.id == worker).unwrap();
                if node.alive && !fault {
                    let incarnation = node.record.incarnation;
                    let held = node.held().map(|stored| Held { at: stored.at }).collect();
                    Event::Described { worker, incarnation, held }
                } else {
                    let detail = "no answer".to_owned();
                    Event::ProbeFailed { worker, incarnation, detail }
                }
            }
            _ => return,
        };
        self.tell(who, event);
    }

    /// What lanes see of their streams and steps.
    fn see_streams(&mut self, who: usize) {
        for lane in self.coordinators[who].lanes.clone().into_values() {
            if lane.paused {
                continue;
            }
            let at = lane.at;
            for (index, stage) in (0..).zip(&lane.plan.stages) {
                let node = self.nodes.iter().find(|node| is_at(node, stage));
                let event = match node {
                    None => Event::StreamBroken { at, stage: index, detail: "reset".to_owned() },
                    Some(node) if !node.takes_steps(at, lane.term) => {
                        Event::Fenced { at, detail: "an old epoch or term".to_owned() }
                    }
                    Some(_) => continue,
                };
                if matches!(event, Event::Fenced { .. }) {
                    // By another coordinator, or by ourselves, which may never be.
                    let node = node.unwrap();
                    let by_another = node.term > lane.term
                        || node.held().any(|h| h.at.epoch > at.epoch)
                        || node.over >= at.epoch;
                    assert!(by_another);
                    assert!(lane.excuse || self.leader.is_none_or(|l| l.0 != who), "fenced itself");
                }
                self.tell(who, event);
            }
            self.tell(who, Event::ResultsFlowing { at });
        }
    }

    fn lose_lease(&mut self, i: usize) {
        let node = &mut self.nodes[i];
        if std::mem::take(&mut node.has_lease) {
            let worker = node.record.id.clone();
            self.tell_all(&Event::WorkerGone { worker });
        }
    }

    fn register(&mut self, i: usize) {
        if self.nodes[i].alive {
            self.nodes[i].has_lease = true;
            let record = self.nodes[i].record.clone();
            self.tell_all(&Event::WorkerPut(record));
        }
    }

    fn restart(&mut self, i: usize) {
        self.excuse(i);
        let node = &mut self.nodes[i];
        node.alive = true;
        node.record.draining = false;
        node.record.incarnation.0[0] += 1;
        (node.term, node.over, node.prepared, node.active) = (Term(0), Epoch(0), None, None);
        self.register(i);
    }

    /// A coordinator wins the leadership.
    pub(super) fn lead(&mut self, who: usize) {
        self.excuse_all();
        self.deposed.extend(self.leader.take().map(|(before, _)| before));
        for deposed in std::mem::take(&mut self.deposed) {
            self.tell(deposed, Event::TermLost);
        }
        self.usurp(who);
    }

    /// The same, and who led before does not hear of it.
    fn usurp(&mut self, who: usize) {
        self.excuse_all();
        self.deposed.extend(self.leader.take().map(|(before, _)| before));
        if self.deposed.remove(&who) {
            self.tell(who, Event::TermLost);
        }
        self.revision += 1;
        let term = Term(self.revision);
        self.leader = Some((who, term));
        self.tell(who, Event::TermGained(term));
    }

    pub(super) fn list_all(&mut self) {
        let listed = self.nodes.iter().filter(|node| node.has_lease);
        let records = listed.map(|node| node.record.clone()).collect();
        self.tell_all(&Event::Reset(records));
    }

    pub(super) fn apply(&mut self, fault: Fault) {
        let (count, coordinators) = (self.nodes.len(), self.coordinators.len());
        match fault {
            Fault::Pass(ms) => {
                self.now = self.now + Duration::from_millis(ms);
                self.tell_all(&Event::Tick);
            }
            Fault::Run(ms) => {
                self.run(Duration::from_millis(ms), Duration::from_millis(ms / 8));
            }
            Fault::CarryOut(which, fault) => {
                // A failed probe proves something only beside another signal.
                self.carry_out(which % coordinators, which / coordinators, fault);
            }
            Fault::Kill(i) => {
                self.excuse(i % count);
                self.nodes[i % count].alive = false;
                for who in 0..coordinators {
                    self.see_streams(who);
                }
            }
            Fault::Restart(i) => self.restart(i % count),
            Fault::LoseLease(i) => {
                // With a probe that fails by chance this is a cause; alone it is none, which
                // `leases_alone_evict_nobody` shows.
                self.excuse(i % count);
                self.lose_lease(i % count);
            }
            Fault::Register(i) => self.register(i % count),
            Fault::Drain(i) => {
                self.excuse(i % count);
                self.nodes[i % count].record.draining = true;
                if self.nodes[i % count].has_lease {
                    self.register(i % count);
                }
            }
            Fault::BreakStream(i) => {
                self.excuse_all();
                let who = i % coordinators;
                let lane = self.coordinators[who].lanes.values().next().cloned();
                if let Some(lane) = lane {
                    let stage = (i % lane.plan.stages.len()) as u32;
                    let detail = "cut".to_owned();
                    self.tell(who, Event::StreamBroken { at: lane.at, stage, detail });
                }
            }
            Fault::Overdue(i) => {
                self.excuse_all();
                let who = i % coordinators;
                let lane = self.coordinators[who].lanes.values().next().map(|lane| lane.at);
                if let Some(at) = lane {
                    self.tell(who, Event::StepOverdue { at });
                }
            }
            Fault::LoseTerm(i) => {
                self.excuse_all();
                let who = i % coordinators;
                if self.leader.take_if(|leader| leader.0 == who).is_some() {
                    self.tell(who, Event::TermLost);
                }
            }
            Fault::Lead(i) => self.lead(i % coordinators),
            Fault::Usurp(i) => self.usurp(i % coordinators),
            Fault::Relist(i) => {
                let listed = self.nodes.iter().filter(|node| node.has_lease);
                let records = listed.map(|node| node.record.clone()).collect();
                self.tell(i % coordinators, Event::Reset(records));
            }
            Fault::PlanNow(i) => {
                let any_gain = (i / coordinators).is_multiple_of(2);
                self.tell(i % coordinators, Event::PlanNow { any_gain });
            }
            Fault::Order(i, drain, force) => {
                self.excuse((i / coordinators) % count);
                let worker = self.nodes[(i / coordinators) % count].record.id.clone();
                self.tell(i % coordinators, Event::DrainWorker { worker, drain, force });
            }
            Fault::DeletePlan => self.plan = None,
        }
    }

    /// From now on whoever ends in order is started again.
    pub(super) fn supervise(&mut self) {
        self.supervised = true;
    }

    /// How often a worker was started, counted from 1.
    pub(super) fn starts(&self, i: usize) -> u8 {
        self.nodes[i].record.incarnation.0[0]
    }

    /// Everything heals and nothing else goes wrong.
    pub(super) fn heal(&mut self) {
        self.excuse_all();
        self.supervise();
        for i in 0..self.nodes.len() {
            if !self.nodes[i].alive || self.nodes[i].record.draining {
                self.restart(i);
            } else {
                self.register(i);
            }
        }
        self.lead(0);
        self.list_all();
    }

    pub(super) fn run(&mut self, span: Duration, step: Duration) {
        let end = self.now + span;
        while self.now < end {
            self.now = self.now + step;
            self.tell_all(&Event::Tick);
            for who in 0..self.coordinators.len() {
                while !self.coordinators[who].pending.is_empty() {
                    self.carry_out(who, 0, false);
                }
                self.see_streams(who);
            }
            // A lease ends with its process.
            for i in 0..self.nodes.len() {
                if !self.nodes[i].alive {
                    self.lose_lease(i);
                } else if self.supervised && self.nodes[i].has_gone() {
                    self.restart(i);
                }
            }
        }
    }

    pub(super) fn leader_serves(&self) -> bool {
        let Some((who, _)) = self.leader else { return false };
        self.coordinators[who].cluster.availability() == Availability::Serving
    }

    /// Whether a plan is possible with those who live.
    pub(super) fn possible(&self) -> bool {
        let alive = self.nodes.iter().filter(|node| node.alive).count() as u32;
        alive >= self.coordinators[0].cluster.options.stages.unwrap_or(1)
    }

    pub(super) fn served(&self) -> Vec<PipelineRef> {
        let lanes = self.coordinators.iter().flat_map(|coordinator| coordinator.lanes.values());
        lanes.map(|lane| lane.at).collect()
    }

    pub(super) fn writes(&self) -> usize {
        self.coordinators.iter().map(|coordinator| coordinator.writes).sum()
    }

    /// What serves is predicted to give.
    pub(super) fn rate(&self) -> f64 {
        let lanes = self.coordinators.iter().flat_map(|coordinator| coordinator.lanes.values());
        lanes.map(|lane| lane.plan.predicted_tokens_per_s).sum()
    }

    /// Nobody works for a coordinator that does not lead.
    pub(super) fn check_one_acts(&self) {
        let leads = |who: usize| self.leader.is_some_and(|(leader, _)| leader == who);
        let others = self.coordinators.iter().enumerate().filter(|(who, _)| !leads(*who));
        for lane in others.flat_map(|(_, coordinator)| coordinator.lanes.values()) {
            let serves = |stage: &StagePlan| {
                let mut nodes = self.nodes.iter().filter(|node| is_at(node, stage));
                nodes.any(|node| node.takes_steps(lane.at, lane.term))
            };
            assert!(!lane.plan.stages.iter().all(serves), "{lane:?} serves on");
        }
    }

    pub(super) fn reasons(&self) -> Vec<String> {
        self.coordinators.iter().map(|c| c.cluster.view().plan.reason).collect()
    }

    /// Nobody holds anything that the leader does not serve.
    pub(super) fn check_memory(&self) {
        let Some((who, _)) = self.leader else { return };
        for node in self.nodes.iter().filter(|node| node.alive) {
            let serves = |at: &PipelineRef| {
                self.coordinators[who].lanes.get(&at.id).is_some_and(|lane| lane.at == *at)
            };
            let orphans: Vec<_> = node.active.iter().filter(|held| !serves(&held.at)).collect();
            assert!(orphans.is_empty(), "{} holds {orphans:?}", node.record.id);
        }
    }

    pub(super) fn snapshot(&self) -> Vec<(Vec<Action>, ClusterView)> {
        self.coordinators.iter().map(|c| (c.pending.clone(), c.cluster.view())).collect()
    }
}

fn is_at(node: &Node, stage: &StagePlan) -> bool {
    node.alive && node.record.id == stage.worker && node.record.incarnation == stage.incarnation
}

fn uses(plan: &PipelinePlan, target: &StagePlan) -> bool {
    let same = |stage: &StagePlan| {
        stage.worker == target.worker && stage.incarnation == target.incarnation
    };
    plan.stages.iter().any(same)
}

#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// So many milliseconds in which nobody answers.
    Pass(u64),
    /// So many milliseconds in which all goes well.
    Run(u64),
    CarryOut(usize, bool),
    Kill(usize),
    Restart(usize),
    LoseLease(usize),
    Register(usize),
    Drain(usize),
    BreakStream(usize),
    Overdue(usize),
    LoseTerm(usize),
    Lead(usize),
    Usurp(usize),
    Relist(usize),
    PlanNow(usize),
    /// A coordinator is told to drain a worker, or to use it again; or to drain it in any case.
    Order(usize, bool, bool),
    DeletePlan,
}
