//! Who is in, what is planned, and what must happen next. Pure: events in, actions out.
//!
//! ```text
//!          plan possible        written            all prepared       all activated
//! nothing ──────────────▶ writing ─────▶ preparing ────────────▶ activating ─────▶ active
//!    ▲                       │ conflict,     │ refused, worker lost    │             │ stage dead,
//!    └───────────────────────┴ unknown: read └─────────────────────────┘◀────────────┘ drained
//! ```
//!
//! The driver carries actions out in order and answers with events. A lease is a hint, the epoch
//! is the law: nobody is replaced for a lost lease alone.

use std::time::Duration;

use proto::ids::{Epoch, NumericsClass, PipelineId, Term};
use proto::plan::{PLAN_FORMAT, PipelinePlan, Plan, StagePlan, WorkerRecord};
use proto::status::{WaitCause, Waiting};

use crate::planner::single::{self as planner, PlanError, Stage, WorkerSpec};
use crate::tick::Tick;

mod members;
mod serving;
#[cfg(test)]
mod simulation;
mod starting;
#[cfg(test)]
mod tests;
mod types;
mod view;

use members::Members;
pub use types::{Action, ClusterView, Event, Options, PROBE_PATIENCE};

/// There is one pipeline for now.
pub(crate) const PIPELINE: PipelineId = PipelineId(1);

/// Wait before the second try of anything; doubles up to [`BACKOFF_LIMIT`].
const BACKOFF_FIRST: Duration = Duration::from_millis(250);
/// The longest wait between two tries.
const BACKOFF_LIMIT: Duration = Duration::from_secs(10);

/// The state of one cluster.
#[derive(Debug)]
pub struct Cluster {
    options: Options,
    /// When the last event came.
    now: Tick,
    /// While this coordinator leads.
    term: Option<Term>,
    highest_term: Term,
    members: Members,
    /// The first list of workers has come.
    listed: bool,
    written: Written,
    phase: Phase,
    /// The stages that served last; a new plan keeps them where it can.
    incumbent: Vec<Stage>,
    /// A first plan was made: workers are not waited for any more.
    planned_once: bool,
    /// Starts that failed in a row, and when the next may begin.
    failed_starts: u32,
    plan_after: Tick,
    /// Why nothing serves.
    waiting: Waiting,
    /// Why the plan is as it is.
    plan_reason: String,
    /// The last reason that was told as [`Action::NoPlan`].
    told: Option<String>,
    /// Eligible workers that no plan was found for.
    hopeless: Option<Vec<WorkerSpec>>,
}

/// What is known of the plan's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Written {
    /// Must be read, not before this.
    Unknown(Tick),
    Reading,
    /// Its mod-revision.
    At(Option<u64>),
}

#[derive(Debug)]
enum Phase {
    Nothing,
    /// `WritePlan` is on its way, or its outcome is unknown and the plan is being read back.
    Writing {
        plan: Plan,
        previous: Option<u64>,
    },
    Starting {
        placed: Placed,
        stages: Vec<Start>,
        activating: bool,
    },
    Active {
        placed: Placed,
        stages: Vec<Health>,
        stalled_since: Option<Tick>,
        draining: bool,
    },
}

/// A pipeline at its epoch.
#[derive(Clone, Debug)]
struct Placed {
    plan: PipelinePlan,
    term: Term,
    class: NumericsClass,
}

/// How far one stage's `Prepare` or `Activate` is.
#[derive(Clone, Copy, Debug)]
struct Start {
    tries: u32,
    state: StartState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StartState {
    Asked(Tick),
    RetryAt(Tick),
    Done,
}

/// What is known of one active stage's data path.
#[derive(Clone, Debug, Default)]
struct Health {
    /// A stream to or from it broke and was not opened again.
    broken: Option<String>,
    /// A probe answered since: open it again then.
    reconnect_at: Option<Tick>,
    reconnects: u32,
    last_break: Tick,
}

fn backoff(tries: u32) -> Duration {
    (BACKOFF_FIRST * 2u32.saturating_pow(tries.min(16))).min(BACKOFF_LIMIT)
}

impl Cluster {
    /// A cluster of which nothing is known yet.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            now: Tick::ZERO,
            term: None,
            highest_term: Term(0),
            members: Members::default(),
            listed: false,
            written: Written::Unknown(Tick::ZERO),
            phase: Phase::Nothing,
            incumbent: Vec::new(),
            planned_once: false,
            failed_starts: 0,
            plan_after: Tick::ZERO,
            waiting: waits(WaitCause::Starting, "the coordinator is starting"),
            plan_reason: String::new(),
            told: None,
            hopeless: None,
        }
    }

    /// Takes an event and says what must be done about it, in order.
    pub fn handle(&mut self, now: Tick, event: Event) -> Vec<Action> {
        self.now = now;
        let mut actions = Vec::new();
        match event {
            Event::Tick => self.members.thaw(now),
            Event::TermGained(term) => self.term_gained(now, term),
            Event::TermLost => self.term_lost(),
            Event::Reset(records) => self.reset(now, records, &mut actions),
            Event::WorkerPut(record) => self.worker_put(now, record, &mut actions),
            Event::WorkerGone { worker } => self.worker_gone(now, &worker, &mut actions),
            Event::PlanRead(found) => self.plan_read(now, found, &mut actions),
            Event::PlanReadFailed { detail } => {
                self.waiting =
                    waits(WaitCause::Registry, format!("the plan cannot be read: {detail}"));
                self.written = Written::Unknown(now + backoff(2));
            }
            Event::PlanWritten { revision } => self.plan_written(now, revision, &mut actions),
            Event::PlanConflict | Event::PlanUnknown { .. } => {
                // Reading back tells who wrote what: never write again blindly.
                self.written = Written::Unknown(now);
            }
            Event::Prepared { epoch, stage, class } => {
                self.prepared(now, epoch, stage, class, &mut actions);
            }
            Event::Activated { epoch, stage } => self.activated(now, epoch, stage, &mut actions),
            Event::PrepareFailed { epoch, stage, transient, detail }
            | Event::ActivateFailed { epoch, stage, transient, detail } => {
                self.start_failed(now, epoch, stage, transient, &detail, &mut actions);
            }
            Event::StreamBroken { epoch, stage, detail } => {
                self.stream_broken(now, epoch, stage, detail);
            }
            Event::Fenced { epoch, detail } => {
                if self.active_epoch() == Some(epoch) {
                    let reason = format!("a newer coordinator took the workers over: {detail}");
                    self.fail_pipeline(now, reason, &mut actions);
                    self.written = Written::Unknown(now);
                }
            }
            Event::StepOverdue { epoch } => {
                if let Some((_, _, stalled_since)) = self.active(epoch) {
                    stalled_since.get_or_insert(now);
                }
            }
            Event::ResultsFlowing { epoch } => {
                if let Some((_, stages, stalled_since)) = self.active(epoch) {
                    *stalled_since = None;
                    stages.iter_mut().for_each(|health| health.reconnects = 0);
                }
            }
            Event::ProbeOk { worker, incarnation } => {
                if self.members.probe_ok(&worker, incarnation) {
                    self.stage_answered(now, &worker);
                } else {
                    let why = "another process answers at its address".to_owned();
                    self.probe_failed(now, &worker, why, &mut actions);
                }
            }
            Event::ProbeFailed { worker, incarnation, detail } => {
                if self.members.probe_failed(now, &worker, incarnation) {
                    self.probe_failed(now, &worker, detail, &mut actions);
                }
            }
            Event::Drained { epoch } => self.drained(now, epoch, &mut actions),
        }
        self.advance(now, &mut actions);
        actions
    }

    // ---- leadership and the plan's key

    fn term_gained(&mut self, now: Tick, term: Term) {
        if term < self.highest_term {
            return;
        }
        self.highest_term = term;
        self.term = Some(term);
        self.written = Written::Unknown(now);
        self.waiting = waits(WaitCause::Starting, "the plan is being read");
    }

    /// What serves goes on serving: workers refuse it as soon as somebody else takes them over.
    fn term_lost(&mut self) {
        self.term = None;
        if !matches!(self.phase, Phase::Active { .. }) {
            self.phase = Phase::Nothing;
        }
    }

    fn plan_read(
        &mut self,
        now: Tick,
        found: Option<(u64, Option<Plan>)>,
        actions: &mut Vec<Action>,
    ) {
        // An answer to an earlier question says nothing about the last write.
        let (Some(term), Written::Reading) = (self.term, self.written) else { return };
        let revision = found.as_ref().map(|&(revision, _)| revision);
        self.written = Written::At(revision);
        // A plan that cannot be read has a revision all the same, and is replaced like any other.
        let found = found.and_then(|(revision, plan)| Some((revision, plan?)));
        if let Some((_, plan)) = &found
            && plan.term > term
        {
            // The loss of the term is on its way to us.
            self.term = None;
            let detail = format!("another coordinator leads (term {})", plan.term);
            self.waiting = waits(WaitCause::Leadership, detail);
        }
        match &self.phase {
            Phase::Writing { plan, previous } => {
                let ours = |found: &Plan| same_plan(found, plan);
                match found {
                    Some((revision, found)) if ours(&found) && Some(revision) != *previous => {
                        self.plan_written(now, revision, actions);
                    }
                    _ => {
                        self.phase = Phase::Nothing;
                        let detail = "the plan was not written";
                        self.failed_start(now, waits(WaitCause::Starting, detail));
                    }
                }
            }
            Phase::Active { placed, .. } if revision != Some(placed.plan.epoch.0) => {
                let reason = "another coordinator has changed the plan".to_owned();
                self.fail_pipeline(now, reason, actions);
            }
            Phase::Starting { placed, .. } if revision != Some(placed.plan.epoch.0) => {
                let why = waits(WaitCause::Lost, "another plan was written");
                self.abandon_start(now, why, actions);
            }
            Phase::Nothing if self.incumbent.is_empty() => {
                let model = self.options.model;
                let pipeline = found.and_then(|(_, plan)| {
                    plan.pipelines.into_iter().find(|pipeline| pipeline.model == model)
                });
                self.incumbent = pipeline.map(|pipeline| stages_of(&pipeline)).unwrap_or_default();
            }
            _ => {}
        }
    }

    fn plan_written(&mut self, now: Tick, revision: u64, actions: &mut Vec<Action>) {
        let Phase::Writing { plan, .. } = &self.phase else { return };
        let term = plan.term;
        let Some(mut pipeline) = plan.pipelines.first().cloned() else { return };
        let class = pipeline.class;
        self.written = Written::At(Some(revision));
        pipeline.epoch = Epoch(revision);
        if let Some(stage) =
            pipeline.stages.iter().find(|stage| !self.members.is_usable(now, stage))
        {
            let reason = format!("worker {} went while the plan was written", stage.worker);
            self.phase = Phase::Nothing;
            self.waiting = waits(WaitCause::Lost, reason);
            return;
        }
        let asked = Start { tries: 1, state: StartState::Asked(now) };
        let stages = vec![asked; pipeline.stages.len()];
        let placed = Placed { plan: pipeline, term, class };
        for stage in 0..stages.len() {
            actions.push(self.ask(&placed, stage as u32, false));
        }
        let detail = format!("the pipeline of epoch {revision} is being prepared");
        self.waiting = waits(WaitCause::Starting, detail);
        self.phase = Phase::Starting { placed, stages, activating: false };
    }

    // ---- workers

    fn reset(&mut self, now: Tick, records: Vec<WorkerRecord>, actions: &mut Vec<Action>) {
        self.listed = true;
        let here: Vec<_> = records.iter().map(|record| record.id.clone()).collect();
        for gone in self.members.listed_except(&here) {
            self.worker_gone(now, &gone, actions);
        }
        for record in records {
            self.worker_put(now, record, actions);
        }
    }

    fn worker_put(&mut self, now: Tick, record: WorkerRecord, actions: &mut Vec<Action>) {
        let id = record.id.clone();
        let (incarnation, draining) = (record.incarnation, record.draining);
        self.members.put(now, record);
        let Some(stage) = self.stage_of(&id) else { return };
        let planned = self.placed().map(|placed| placed.plan.stages[stage as usize].incarnation);
        if planned != Some(incarnation) {
            // The process that held the stage is no more, whatever its streams say.
            return self.stage_lost(now, &id, "it was started again", actions);
        }
        match &mut self.phase {
            Phase::Starting { .. } if draining => {
                let why = waits(WaitCause::Lost, format!("worker {id} is draining"));
                self.abandon_start(now, why, actions);
            }
            Phase::Active { draining: held, .. } if draining && !*held => {
                *held = true;
                actions.push(Action::HoldAdmission(true));
            }
            _ => {}
        }
    }

    fn worker_gone(&mut self, now: Tick, id: &str, actions: &mut Vec<Action>) {
        let is_stage = self.stage_of(id).is_some();
        if let Some(text) = self.members.gone(now, id, is_stage) {
            actions.push(Action::Alarm { text });
        }
    }

    fn drained(&mut self, now: Tick, epoch: Epoch, actions: &mut Vec<Action>) {
        let Phase::Active { placed, draining: true, .. } = &self.phase else { return };
        if placed.plan.epoch == epoch {
            self.fail_pipeline(now, "a worker of the pipeline is leaving".to_owned(), actions);
        }
    }

    // ---- what time and everything above make due

    fn advance(&mut self, now: Tick, actions: &mut Vec<Action>) {
        self.advance_start(now, actions);
        self.advance_active(now, actions);
        let watched = self.watched();
        actions.extend(self.members.probes(now, &watched));
        if let (Some(_), Written::Unknown(due)) = (self.term, self.written)
            && now >= due
        {
            self.written = Written::Reading;
            actions.push(Action::ReadPlan);
        }
        if matches!(self.phase, Phase::Nothing) {
            self.try_plan(now, actions);
        }
    }

    fn try_plan(&mut self, now: Tick, actions: &mut Vec<Action>) {
        let Some(term) = self.term else {
            let why = waits(WaitCause::Leadership, "this coordinator does not lead");
            return self.tell(why, actions);
        };
        let Written::At(previous) = self.written else { return };
        if !self.listed || now < self.plan_after {
            return;
        }
        let settled = self.members.last_arrival() + self.options.settle;
        if self.options.stages.is_none() && !self.planned_once && now < settled {
            self.waiting = waits(WaitCause::Starting, "waiting for workers to come");
            return;
        }
        let (class, eligible) =
            self.members.eligible(now, self.options.model, self.options.kv_type);
        if self.hopeless.as_ref() == Some(&eligible) {
            return;
        }
        let options = planner::Options {
            stages: self.options.stages,
            min_kv_blocks: self.options.min_kv_blocks,
            max_kv_blocks: self.options.max_kv_blocks,
            incumbent: self.incumbent.clone(),
        };
        match planner::plan(&self.options.costs, &eligible, &options) {
            Ok(assignment) => {
                let plan = self.compose(term, class, assignment);
                self.hopeless = None;
                self.planned_once = true;
                self.waiting = waits(WaitCause::Starting, "the plan is being written");
                self.plan_reason.clone_from(&plan.reason);
                actions.push(Action::WritePlan { term, previous, plan: plan.clone() });
                self.phase = Phase::Writing { plan, previous };
            }
            Err(error) => {
                self.hopeless = Some(eligible);
                // Whoever was refused is left out, and that is why the rest do not suffice.
                let cause = match error {
                    _ if self.members.somebody_refused(now) => WaitCause::Refused,
                    PlanError::DoesNotFit { .. } => WaitCause::Memory,
                    _ => WaitCause::Workers,
                };
                let detail = self.members.explain(now, &self.options, error.to_string());
                self.tell(Waiting { cause, detail }, actions);
            }
        }
    }

    fn tell(&mut self, why: Waiting, actions: &mut Vec<Action>) {
        let reason = why.detail.clone();
        self.waiting = why;
        if self.told.as_ref() != Some(&reason) {
            self.told = Some(reason.clone());
            actions.push(Action::NoPlan { reason });
        }
    }

    fn compose(&self, term: Term, class: NumericsClass, found: planner::Assignment) -> Plan {
        let stages = found.stages.into_iter().map(|stage| self.members.place(stage)).collect();
        Plan {
            format: PLAN_FORMAT,
            term,
            pipelines: vec![PipelinePlan {
                id: PIPELINE,
                epoch: Epoch(0),
                model: self.options.model,
                kv_type: self.options.kv_type,
                class,
                stages,
                kv_blocks: found.kv_blocks,
                predicted_tokens_per_s: found.predicted_tokens_per_s,
            }],
            reason: found.reason,
        }
    }

    // ---- lookups

    fn placed(&self) -> Option<&Placed> {
        match &self.phase {
            Phase::Starting { placed, .. } | Phase::Active { placed, .. } => Some(placed),
            Phase::Nothing | Phase::Writing { .. } => None,
        }
    }

    fn stage_of(&self, worker: &str) -> Option<u32> {
        let stages = &self.placed()?.plan.stages;
        stages.iter().position(|stage| stage.worker == worker).map(|index| index as u32)
    }

    fn active_epoch(&self) -> Option<Epoch> {
        match &self.phase {
            Phase::Active { placed, .. } => Some(placed.plan.epoch),
            _ => None,
        }
    }

    /// The parts of the active pipeline, if it is of this epoch.
    fn active(&mut self, epoch: Epoch) -> Option<(&Placed, &mut Vec<Health>, &mut Option<Tick>)> {
        match &mut self.phase {
            Phase::Active { placed, stages, stalled_since, .. } if placed.plan.epoch == epoch => {
                Some((placed, stages, stalled_since))
            }
            _ => None,
        }
    }
}

/// Why nothing serves.
fn waits(cause: WaitCause, detail: impl Into<String>) -> Waiting {
    Waiting { cause, detail: detail.into() }
}

fn stages_of(pipeline: &PipelinePlan) -> Vec<Stage> {
    let stage =
        |stage: &StagePlan| Stage { worker: stage.worker.clone(), layers: stage.layers.clone() };
    pipeline.stages.iter().map(stage).collect()
}

/// Whether two plans say the same. Predicted rates are left out: a float that went through JSON
/// may differ in its last bit.
fn same_plan(a: &Plan, b: &Plan) -> bool {
    let said = |plan: &Plan| {
        let pipelines = plan.pipelines.iter();
        (
            plan.term,
            pipelines.map(|p| (p.id, p.class, p.stages.clone(), p.kv_blocks)).collect::<Vec<_>>(),
        )
    };
    said(a) == said(b)
}
