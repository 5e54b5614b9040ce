//! Who is in, what is planned, and what must happen next. Pure: events in, actions out.
//!
//! ```text
//! fleet       who is there, with or without a lease, and who may be planned with
//! ledger      what is written, under which term; numbered questions to the registry
//! planning    when a plan is made, and what the planner is asked
//! transition  from what serves to what was planned, in switches
//! pipelines   what serves, and whether its stages are well
//! observed    what workers hold, and what of it they shall leave
//! ```
//!
//! The driver carries actions out in order and answers with events. What is intended (the plan
//! that was written, the pipelines that serve) is compared with what is observed, and the
//! difference is acted on; so a worker that comes back, an answer that was lost and a coordinator
//! that takes over need no rules of their own. A lease is a hint, the epoch is the law: nobody is
//! replaced for a lost lease alone.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::ids::{PipelineId, PipelineRef, Term};
use proto::plan::Plan;
use proto::status::{WaitCause, Waiting};

use crate::tick::Tick;

mod fleet;
mod ledger;
mod observed;
mod pipelines;
mod planning;
#[cfg(test)]
mod simulation;
mod switching;
#[cfg(test)]
mod tests;
mod transition;
mod types;
mod view;
mod workers;

use fleet::Fleet;
use ledger::{Answer, Ledger};
use observed::{Intended, Observed};
use pipelines::{GivenUp, Pipeline, Placed};
use planning::Planning;
use transition::{Phase, Switch};
pub use types::{
    Action, Availability, ClusterView, Event, Failure, Found, Held, Options, PREPARE_LIMIT,
    PROBE_TIMEOUT, Target, Ticket,
};
use workers::planned_shape;

/// Wait before the second try of anything; doubles up to [`BACKOFF_LIMIT`].
const BACKOFF_FIRST: Duration = Duration::from_millis(250);
/// The longest wait between two tries.
const BACKOFF_LIMIT: Duration = Duration::from_secs(10);

/// A pipeline that served for so long was worth its plan: the next failure is the first again.
const STABLE: Duration = Duration::from_secs(10);

/// After its start a coordinator may lead soon; later another one does.
const STARTUP: Duration = Duration::from_secs(3);

/// The state of one cluster.
#[derive(Debug)]
pub struct Cluster {
    options: Options,
    /// When the last event came.
    now: Tick,
    fleet: Fleet,
    /// The first list of workers has come.
    listed: bool,
    ledger: Ledger,
    observed: Observed,
    planning: Planning,
    pipelines: BTreeMap<PipelineId, Pipeline>,
    /// No worker is in two of them, or in one and in a pipeline that it does not change.
    switches: Vec<Switch>,
    /// Why the last pipeline was lost or did not come to serve.
    last_failure: Option<Waiting>,
    /// When something last served in this reign, or when the reign began.
    served_at: Tick,
}

/// Why a pipeline is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// Another plan mends it: a worker of it is dead, or another coordinator has replaced it.
    Gone,
    /// Its workers answer and it does not work: the same plan may be lost in the same way.
    Broken,
}

fn backoff(tries: u32) -> Duration {
    (BACKOFF_FIRST * 2u32.saturating_pow(tries.min(16))).min(BACKOFF_LIMIT)
}

/// Why nothing serves.
fn waits(cause: WaitCause, detail: impl Into<String>) -> Waiting {
    Waiting { cause, detail: detail.into() }
}

impl Cluster {
    /// A cluster of which nothing is known yet.
    pub fn new(options: Options) -> Self {
        Self {
            fleet: Fleet::new(options.allow_stub_compute),
            options,
            now: Tick::ZERO,
            listed: false,
            ledger: Ledger::new(),
            observed: Observed::default(),
            planning: Planning::default(),
            pipelines: BTreeMap::new(),
            switches: Vec::new(),
            last_failure: None,
            served_at: Tick::ZERO,
        }
    }

    /// Takes an event and says what must be done about it, in order.
    pub fn handle(&mut self, now: Tick, event: Event) -> Vec<Action> {
        self.now = now;
        let mut actions = Vec::new();
        if let Event::ResultsFlowing { at } = event {
            // Many times a second for every pipeline, and nothing follows from it.
            if let Some(pipeline) = self.pipeline(at) {
                pipeline.results_flow();
            }
            return actions;
        }
        self.take(now, event, &mut actions);
        self.fleet.infer_racks(now);
        self.advance(now, &mut actions);
        actions
    }

    fn take(&mut self, now: Tick, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Tick => self.fleet.tick(now),
            Event::TermGained(term) => self.term_gained(now, term, actions),
            Event::TermLost => {
                self.ledger.term_lost();
                self.end_reign(now, actions);
            }
            Event::Reset(records) => self.reset(now, records, actions),
            Event::WorkerPut(record) => self.worker_put(now, record, actions),
            Event::WorkerGone { worker } => self.worker_gone(now, &worker, actions),
            Event::PlanRead { ticket, found } => {
                let answer = self.ledger.read(now, ticket, found);
                self.ledger_answered(now, answer, actions);
            }
            Event::PlanReadFailed { ticket, detail } => {
                let answer = self.ledger.read_failed(now, ticket, &detail);
                self.ledger_answered(now, answer, actions);
            }
            Event::PlanWritten { ticket, revision } => {
                let answer = self.ledger.written(ticket, revision);
                self.ledger_answered(now, answer, actions);
            }
            Event::PlanConflict { ticket } | Event::PlanUnknown { ticket, .. } => {
                let answer = self.ledger.not_known(now, ticket);
                self.ledger_answered(now, answer, actions);
            }
            Event::Deployed { ticket, result } => self.deployed(now, ticket, result, actions),
            Event::Prepared { at, stage, class } => self.prepared(now, at, stage, class, actions),
            Event::PrepareFailed { at, stage, failure, detail } => {
                self.start_failed(now, Phase::Preparing, at, stage, (failure, &detail), actions);
            }
            Event::Activated { at, stage } => self.activated(at, stage),
            Event::ActivateFailed { at, stage, failure, detail } => {
                self.start_failed(now, Phase::Activating, at, stage, (failure, &detail), actions);
            }
            Event::Retired { worker, incarnation, at } => {
                self.observed.retired(now, &worker, incarnation, at);
            }
            Event::RetireFailed { worker, incarnation, at, .. } => {
                self.observed.retire_failed(now, &worker, incarnation, at);
            }
            Event::StreamBroken { at, stage, detail } => {
                if let Some(pipeline) = self.pipeline(at)
                    && let Some(worker) = pipeline.stream_broken(now, stage, detail)
                {
                    let worker = worker.to_owned();
                    self.fleet.probe_at_once(now, &worker);
                }
            }
            Event::Fenced { at, detail } => {
                // While it is being replaced it shall be fenced.
                if self.pipeline(at).is_some_and(|pipeline| pipeline.serves()) {
                    let reason = format!("a worker takes no more steps of it: {detail}");
                    self.fail_pipeline(now, at.id, Loss::Broken, reason, actions);
                    self.ledger.read_again(now);
                }
            }
            Event::Strange { at, stage, detail } => {
                self.computes_wrongly(now, at, stage, &detail, actions);
            }
            Event::StepOverdue { at } => {
                if let Some(pipeline) = self.pipeline(at) {
                    pipeline.overdue(now);
                }
            }
            Event::ResultsFlowing { .. } => {}
            Event::Paused { at } => {
                if let Some(pipeline) = self.pipeline(at) {
                    pipeline.paused();
                }
            }
            Event::Described { worker, incarnation, held } => {
                self.described(now, &worker, incarnation, &held, actions);
            }
            Event::ProbeFailed { worker, incarnation, detail } => {
                if self.fleet.probe_failed(now, &worker, incarnation) {
                    self.probe_failed(now, &worker, &detail, actions);
                }
            }
            Event::DrainWorker { worker, drain, force } => {
                if self.fleet.order_drain(now, &worker, drain, force) && drain {
                    self.drain_starting(now, &worker, actions);
                }
            }
            Event::Dismissed { worker, incarnation, fault } => {
                self.fleet.dismissed(&worker, incarnation, fault);
            }
            Event::PlanNow { any_gain } => self.planning.request(any_gain),
        }
    }

    /// What time and events make due.
    fn advance(&mut self, now: Tick, actions: &mut Vec<Action>) {
        self.observed.follow(now, &self.fleet);
        if !self.pipelines.is_empty() || self.ledger.ready().is_none() {
            self.served_at = now;
        }
        self.advance_pipelines(now, actions);
        self.take_over_lanes(actions);
        self.make_room(now, actions);
        self.retire(now, actions);
        let untold = self.untold();
        if self.advance_switches(now, &untold, actions) {
            self.retire(now, actions);
        }
        self.ledger.advance(now, actions);
        self.give_way(now, actions);
        self.plan(now, actions);
        self.keep_orders(now, actions);
        self.dismiss(now, actions);
        let mut wanted: BTreeSet<String> = self
            .pipelines
            .values()
            .flat_map(|pipeline| pipeline.watched(&self.fleet))
            .chain(self.observed.to_ask(now))
            .cloned()
            .collect();
        let starting = self.switches.iter().flat_map(|switch| &switch.new);
        let starting = starting.flat_map(|starting| &starting.placed.plan.stages);
        let without_lease = starting.filter(|stage| self.fleet.lease_is_gone(&stage.worker));
        wanted.extend(without_lease.map(|stage| stage.worker.clone()));
        for worker in self.observed.take_new_asks() {
            self.fleet.probe_at_once(now, &worker);
        }
        actions.extend(self.fleet.probes(now, &wanted));
        let Self { fleet, pipelines, switches, .. } = self;
        fleet.forget_gone(|id| {
            pipelines.values().any(|pipeline| pipeline.uses(id))
                || switches.iter().any(|switch| switch.starts_at(id))
        });
    }

    // ---- leadership and the plan's key

    fn term_gained(&mut self, now: Tick, term: Term, actions: &mut Vec<Action>) {
        self.end_reign(now, actions);
        match self.ledger.term_gained(now, term) {
            Ok(()) => {
                self.observed.ask_all(now);
                for starting in self.switches.iter_mut().flat_map(|switch| &mut switch.new) {
                    starting.placed.term = term;
                }
            }
            Err(detail) => actions.push(Action::Resign { detail }),
        }
    }

    /// What serves goes on serving, and what is being activated goes on too: workers refuse it as
    /// soon as somebody else takes them over.
    fn end_reign(&mut self, now: Tick, actions: &mut Vec<Action>) {
        self.planning.end_reign();
        self.fleet.forget_orders();
        let mut index = 0;
        while index < self.switches.len() {
            match self.switches[index].phase {
                Phase::Activating => index += 1,
                Phase::Preparing | Phase::Pausing => {
                    let why = waits(WaitCause::Leadership, "this coordinator does not lead");
                    self.abandon(now, index, why, actions);
                }
            }
        }
    }

    fn ledger_answered(&mut self, now: Tick, answer: Answer, actions: &mut Vec<Action>) {
        match answer {
            Answer::Ignored | Answer::Failed => {}
            Answer::Read { is_own, write_failed } => {
                self.plan_read(now, is_own, actions);
                if write_failed && self.planning.writes_orders {
                    self.planning.wrote_orders(now, false);
                } else if write_failed {
                    self.planning.failed(now);
                    let detail = "the plan was not written";
                    self.last_failure = Some(waits(WaitCause::Starting, detail));
                }
            }
            Answer::Written(plan) => {
                self.fleet.recall_orders(now, &plan.drains);
                self.plan_written(now, &plan);
            }
            Answer::Unusable(detail) => {
                self.end_reign(now, actions);
                actions.push(Action::Resign { detail });
            }
        }
    }

    fn plan_read(&mut self, now: Tick, is_own: bool, actions: &mut Vec<Action>) {
        let Self { ledger, options, observed, .. } = self;
        observed.learn(|at, worker| planned_shape(ledger, options, at, worker));
        let drains = self.ledger.plan().map_or(&[][..], |plan| &plan.drains);
        self.fleet.recall_orders(now, drains);
        let Some(plan) = self.ledger.plan() else {
            self.planning.is_missing = !self.pipelines.is_empty() || !self.switches.is_empty();
            return;
        };
        if is_own {
            return;
        }
        // Another coordinator has led meanwhile; what it left in place is served by nobody else.
        let is_planned = |pipeline: &Pipeline| {
            plan.pipelines.iter().any(|planned| planned.at() == pipeline.at())
        };
        let lost: Vec<_> = self
            .pipelines
            .values()
            .filter(|pipeline| !is_planned(pipeline))
            .map(|pipeline| pipeline.placed.plan.id)
            .collect();
        for id in lost {
            let reason = "another coordinator has changed the plan".to_owned();
            self.fail_pipeline(now, id, Loss::Gone, reason, actions);
        }
        while !self.switches.is_empty() {
            let why = waits(WaitCause::Lost, "another coordinator has changed the plan");
            self.abandon(now, 0, why, actions);
        }
    }

    /// Our plan is in the registry: what it changes begins to change.
    fn plan_written(&mut self, now: Tick, plan: &Plan) {
        if self.planning.writes_orders {
            return self.planning.wrote_orders(now, true);
        }
        let is_loss = self.planning.cause.take().is_some_and(planning::Cause::is_loss);
        // The reign may be another one than the plan was made in.
        let Some((reign, revision)) = self.ledger.ready() else {
            return self.planning.failed(now);
        };
        let known = |at: PipelineRef| {
            self.pipelines.get(&at.id).is_some_and(|pipeline| pipeline.at() == at)
                || self.switches.iter().any(|switch| switch.find(at).is_some())
        };
        let new: Vec<_> = plan
            .pipelines
            .iter()
            .filter(|planned| !known(planned.at()))
            .map(|planned| Placed { plan: planned.clone(), term: reign })
            .collect();
        // It served when this was planned and was lost meanwhile. Its epoch is over.
        if let Some(lost) = new.iter().find(|placed| Some(placed.plan.epoch.0) != revision) {
            let detail = format!("pipeline {} was lost while the plan was written", lost.at());
            self.last_failure = Some(waits(WaitCause::Lost, detail));
            self.planning.lost = true;
            self.planning.failed(now);
            return;
        }
        let unusable = new.iter().flat_map(|placed| &placed.plan.stages);
        let mut unusable =
            unusable.filter(|stage| !self.fleet.is_usable(now, stage, self.planning.reserve()));
        if let Some(stage) = unusable.next() {
            let detail = format!("worker {} went while the plan was written", stage.worker);
            self.last_failure = Some(waits(WaitCause::Lost, detail));
            self.planning.failed(now);
            return;
        }
        let changing = |id: &PipelineId| self.switches.iter().any(|s| s.old.contains(id));
        let is_planned = |at: PipelineRef| plan.pipelines.iter().any(|planned| planned.at() == at);
        let old: Vec<_> = self
            .pipelines
            .iter()
            .filter(|(id, pipeline)| !changing(id) && !is_planned(pipeline.at()))
            .map(|(_, pipeline)| pipeline)
            .collect();
        let mut switches = transition::switches(now, &old, new);
        for switch in &mut switches {
            switch.is_urgent = is_loss;
        }
        match switches.is_empty() {
            true => self.planning.written_as_it_is(),
            false => self.planning.carried_out(),
        }
        self.switches.append(&mut switches);
    }

    // ---- what serves

    fn advance_pipelines(&mut self, now: Tick, actions: &mut Vec<Action>) {
        let ids: Vec<_> = self.pipelines.keys().copied().collect();
        for id in ids {
            let Some(pipeline) = self.pipelines.get_mut(&id) else { continue };
            if let Err(GivenUp { reason, stage: broken }) = pipeline.advance(now, actions) {
                let stalled = pipeline.is_stalled(now);
                let stages = pipeline.placed.plan.stages.clone();
                for (index, stage) in (0..).zip(&stages) {
                    let (loss, why) = if broken == Some(index) {
                        // It answers, and nothing comes through to it: others may do better.
                        (Loss::Broken, reason.as_str())
                    } else if stalled && self.fleet.is_silent(stage) {
                        // Silence on the data path and no answer: two signals.
                        (Loss::Gone, "its steps were overdue and it did not answer")
                    } else {
                        continue;
                    };
                    let alarm = self.fleet.evicted(now, stage, loss, why);
                    actions.extend(alarm.map(|text| Action::Alarm { text }));
                }
                self.fail_pipeline(now, id, Loss::Broken, reason, actions);
            }
        }
        let serving = self.pipelines.values().filter(|pipeline| pipeline.serves());
        let well = serving.map(|p| p.is_well().then(|| now.since(p.since)));
        if let Some(span) = well.min().flatten() {
            self.planning.serves_well(span);
        }
    }

    /// Ends a pipeline that was lost.
    fn fail_pipeline(
        &mut self,
        now: Tick,
        id: PipelineId,
        loss: Loss,
        reason: String,
        actions: &mut Vec<Action>,
    ) {
        let Some(pipeline) = self.pipelines.remove(&id) else { return };
        actions.push(Action::Fail { at: pipeline.at(), reason: reason.clone() });
        self.last_failure = Some(waits(WaitCause::Lost, reason));
        let is_young = now.since(pipeline.since) < STABLE;
        // An answer that was made with it says nothing of what is left.
        self.planning.forget_question();
        match self.switches.iter_mut().find_map(|switch| switch.old.remove(&id).then_some(switch)) {
            // What takes its place is on its way.
            Some(switch) => switch.is_urgent = true,
            None => {
                self.planning.lost = true;
                self.planning.pipeline_lost(now, loss, is_young);
            }
        }
    }

    /// Lanes stamp their steps with the term of this reign before any worker hears of it: workers
    /// refuse steps of an older term. Those that are on their way then are sent again.
    fn take_over_lanes(&mut self, actions: &mut Vec<Action>) {
        let Some((term, _)) = self.ledger.ready() else { return };
        let changing: BTreeSet<_> =
            self.switches.iter().flat_map(|switch| switch.old.iter().copied()).collect();
        for (id, pipeline) in &mut self.pipelines {
            if pipeline.placed.term == term || changing.contains(id) || !pipeline.serves() {
                continue;
            }
            pipeline.take_over(term, actions);
        }
    }

    /// Whether all lanes that go on stamp their steps with the term of this reign.
    fn terms_agree(&self) -> bool {
        let mut serving = self.pipelines.values().filter(|pipeline| pipeline.serves());
        serving.all(|pipeline| Some(pipeline.placed.term) == self.ledger.term())
    }

    // ---- what workers hold

    /// Tells workers to leave what they shall not hold.
    fn retire(&mut self, now: Tick, actions: &mut Vec<Action>) {
        let Some(term) = self.ledger.term() else { return };
        if !self.may_retire() {
            return;
        }
        let intended = self.intended();
        let is_open = intended.is_empty() || self.planning.is_open();
        actions.extend(self.observed.reconcile(now, term, &intended, is_open, &self.fleet));
    }

    /// Workers that are to leave something and cannot be told at this moment: what is planned is not
    /// known, or being written.
    fn untold(&self) -> BTreeSet<String> {
        match self.may_retire() {
            true => BTreeSet::new(),
            false => self.observed.to_leave(&self.intended()),
        }
    }

    /// Whether workers may be told to leave what they shall not hold.
    fn may_retire(&self) -> bool {
        self.terms_agree() && self.ledger.ready().is_some()
    }

    /// Tells those to end who were drained by order and have no stage any more.
    fn dismiss(&mut self, now: Tick, actions: &mut Vec<Action>) {
        let Some((term, _)) = self.ledger.ready() else { return };
        // Nothing serves, and a plan may count on those that only go once they can be spared: so will one
        // when somebody is back who is restarted now. Later nobody waits for them.
        let may_be_back = now.since(self.served_at) < planning::EXPECTED_BACK;
        let is_missed = self.pipelines.is_empty() && (may_be_back || self.infeasible().is_none());
        let Self { fleet, pipelines, switches, .. } = self;
        let targets = fleet.dismissals(now, is_missed, |id| {
            pipelines.values().any(|pipeline| pipeline.uses(id))
                || switches.iter().any(|switch| switch.starts_at(id))
        });
        actions.extend(targets.into_iter().map(|target| Action::Dismiss { term, target }));
    }

    /// Which stages each worker shall hold.
    fn intended(&self) -> Intended {
        let mut intended = Intended::new();
        let none = BTreeSet::new();
        let serving = self.pipelines.values().map(|p| (&p.placed, &p.released));
        let starting = self.switches.iter().flat_map(|switch| &switch.new);
        for (placed, released) in serving.chain(starting.map(|s| (&s.placed, &none))) {
            let first_draws = self.options.costs.first_draws(placed.plan.stages.len());
            for (index, stage) in (0..).zip(&placed.plan.stages) {
                if let Some(shape) = transition::shape(&placed.plan, index, first_draws)
                    && !released.contains(&stage.worker)
                {
                    let stages = intended.entry(stage.worker.clone()).or_default();
                    stages.insert(placed.at(), shape);
                }
            }
        }
        intended
    }

    // ---- lookups

    /// The pipeline, if it is at this epoch.
    fn pipeline(&mut self, at: PipelineRef) -> Option<&mut Pipeline> {
        self.pipelines.get_mut(&at.id).filter(|pipeline| pipeline.at() == at)
    }

    /// The stages that a worker has, if they are still needed there, or is to have.
    fn stages_of(&self, worker: &str) -> impl Iterator<Item = &proto::plan::StagePlan> {
        #[cfg(test)]
        self.pipelines.values().for_each(|_| view::looked());
        let needing = self.pipelines.values().filter(move |pipeline| pipeline.needs(worker));
        let serving = needing.map(|pipeline| &pipeline.placed);
        let starting = self.switches.iter().flat_map(|switch| &switch.new).map(|new| &new.placed);
        serving.chain(starting).filter_map(move |placed| Some(placed.stage_of(worker)?.1))
    }
}
