//! What the cluster is told and what it asks for.

use std::time::Duration;

use proto::ids::{Incarnation, ModelId, NumericsClass, PipelineId, PipelineRef, Term};
use proto::plan::{KvType, PipelinePlan, Plan, StagePlan, WorkerRecord};
use proto::status::{PlanStatus, Waiting, WorkerStatus};
use proto::step::Prepare;

use crate::planner::{Deployment, ModelCosts, Objective, PlanError, Problem};
use crate::scheduler::PipelineShape;

/// What the cluster serves and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Scopes every epoch.
    pub cluster_id: String,
    /// Pipelines have higher ids than this: those were given before the registry began anew, and an
    /// epoch of before may come again.
    pub last_pipeline: PipelineId,
    /// What is served.
    pub model: ModelId,
    /// What its parts cost.
    pub costs: ModelCosts,
    /// How KV is stored.
    pub kv_type: KvType,
    /// Exactly so many stages in every pipeline; `None`: as many as the planner finds best.
    pub stages: Option<u32>,
    /// Exactly so many pipelines; `None`: as many as the planner finds best.
    pub pipelines: Option<u32>,
    /// The least KV that a pipeline must hold, in blocks.
    pub min_kv_blocks: u32,
    /// The most KV that a pipeline may hold, in blocks.
    pub max_kv_blocks: u32,
    /// Tokens of prompt and answer that people use.
    pub context_tokens: u32,
    /// What plans are made for.
    pub objective: Objective,
    /// Tokens in one step, as workers are told in `Prepare`.
    pub max_step_tokens: u32,
    /// While nothing serves and `stages` is `None`, a plan waits so long after the last worker
    /// came: workers of one cluster start within moments of each other.
    pub settle: Duration,
    /// What serves is improved only when no worker came, went or failed for so long.
    pub hold_down: Duration,
    /// What serves is improved only if the new plan is predicted to be faster by so many per cent.
    pub min_gain_percent: u32,
    /// A speed counts as another one when it has changed by a quarter for so long, and in a quarter of
    /// that when it has changed fourfold.
    pub drift_time: Duration,
    /// Workers that compute nothing are planned with, for tests of many workers.
    pub allow_stub_compute: bool,
}

/// The number of a question to the registry or the planner; its answer names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// What is in the registry under the plan's key.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// No plan.
    Nothing,
    /// Something that is no plan of this version: it is replaced.
    Unreadable {
        /// Its mod-revision.
        revision: u64,
        /// What is wrong with it.
        detail: String,
    },
    /// A plan.
    Plan {
        /// Its mod-revision.
        revision: u64,
        /// As it is written: an epoch of 0 stands for `revision`.
        plan: Plan,
    },
}

/// Why a worker did not do what it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Not reached, or busy: the same may succeed later.
    Transient,
    /// No memory beside what it holds: the same may succeed when it holds less.
    Memory,
    /// The same will never succeed.
    Refused,
}

/// A stage that a worker says it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Of which pipeline.
    pub at: PipelineRef,
}

/// Where a call goes that names no stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The worker's id.
    pub worker: String,
    /// The process start that is meant.
    pub incarnation: Incarnation,
    /// Where it is reached.
    pub address: String,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Time passed. Send it several times a second: retries and timeouts live on it.
    Tick,
    /// This coordinator leads.
    TermGained(Term),
    /// It leads no more.
    TermLost,
    /// Everyone in the registry, after a start or a gap.
    Reset(Vec<WorkerRecord>),
    /// A worker came or changed its record.
    WorkerPut(WorkerRecord),
    /// A worker's key is gone: its lease ran out or it left.
    WorkerGone {
        /// The worker's id.
        worker: String,
    },
    /// Answer to [`Action::ReadPlan`].
    PlanRead {
        /// Of the question.
        ticket: Ticket,
        /// What is there.
        found: Found,
    },
    /// Answer to [`Action::ReadPlan`]: the registry could not be asked.
    PlanReadFailed {
        /// Of the question.
        ticket: Ticket,
        /// The error's message.
        detail: String,
    },
    /// Answer to [`Action::WritePlan`]: written.
    PlanWritten {
        /// Of the question.
        ticket: Ticket,
        /// The plan's mod-revision: the epoch of all pipelines that it changes.
        revision: u64,
    },
    /// Answer to [`Action::WritePlan`]: another term or another plan was there.
    PlanConflict {
        /// Of the question.
        ticket: Ticket,
    },
    /// Answer to [`Action::WritePlan`]: nobody knows whether it was written.
    PlanUnknown {
        /// Of the question.
        ticket: Ticket,
        /// The error's message.
        detail: String,
    },
    /// Answer to [`Action::Deploy`].
    Deployed {
        /// Of the question.
        ticket: Ticket,
        /// Who should serve, or why nobody can.
        result: Result<Deployment, PlanError>,
    },
    /// Answer to [`Action::Prepare`].
    Prepared {
        /// Of the request.
        at: PipelineRef,
        /// Index of the stage.
        stage: u32,
        /// What the worker computes with.
        class: NumericsClass,
    },
    /// Answer to [`Action::Prepare`].
    PrepareFailed {
        /// Of the request.
        at: PipelineRef,
        /// Index of the stage.
        stage: u32,
        /// What may be done about it.
        failure: Failure,
        /// The error's message.
        detail: String,
    },
    /// Answer to [`Action::Activate`].
    Activated {
        /// Of the request.
        at: PipelineRef,
        /// Index of the stage.
        stage: u32,
    },
    /// Answer to [`Action::Activate`].
    ActivateFailed {
        /// Of the request.
        at: PipelineRef,
        /// Index of the stage.
        stage: u32,
        /// What may be done about it.
        failure: Failure,
        /// The error's message.
        detail: String,
    },
    /// Answer to [`Action::Retire`]: this epoch and older ones are gone there.
    Retired {
        /// The worker's id.
        worker: String,
        /// Who was told.
        incarnation: Incarnation,
        /// What it was told to leave.
        at: PipelineRef,
    },
    /// Answer to [`Action::Retire`].
    RetireFailed {
        /// The worker's id.
        worker: String,
        /// Who was told.
        incarnation: Incarnation,
        /// What it was told to leave.
        at: PipelineRef,
        /// The error's message.
        detail: String,
    },
    /// A stream to or from a stage ended: the steps of the first, the results of the last, or,
    /// as told by the stage before (`DownstreamLost`), the steps of one between.
    StreamBroken {
        /// Of the pipeline.
        at: PipelineRef,
        /// Index of the stage that is not reached.
        stage: u32,
        /// The error's message.
        detail: String,
    },
    /// A stage refuses this coordinator's steps.
    Fenced {
        /// Of the pipeline.
        at: PipelineRef,
        /// The stage's message.
        detail: String,
    },
    /// What a stage computed cannot be of the model.
    Strange {
        /// Of the pipeline.
        at: PipelineRef,
        /// Index of the stage that drew it.
        stage: u32,
        /// What came.
        detail: String,
    },
    /// A step has been on its way for too long.
    StepOverdue {
        /// Of the pipeline.
        at: PipelineRef,
    },
    /// A result came.
    ResultsFlowing {
        /// Of the pipeline.
        at: PipelineRef,
    },
    /// Answer to [`Action::Pause`]: no step of it is on its way, or those that are count as lost.
    Paused {
        /// Of the pipeline.
        at: PipelineRef,
    },
    /// Answer to [`Action::Probe`]: this process start answered, and holds this.
    Described {
        /// The worker's id.
        worker: String,
        /// Who answered.
        incarnation: Incarnation,
        /// Its stages, active and prepared.
        held: Vec<Held>,
    },
    /// Answer to [`Action::Probe`]: refused, or no answer within [`PROBE_TIMEOUT`].
    ProbeFailed {
        /// The worker's id.
        worker: String,
        /// Who was asked.
        incarnation: Incarnation,
        /// The error's message.
        detail: String,
    },
    /// A person wants a worker used no more, or used again. One that is used no more is told to end
    /// once it has no stage; from then on it is not used again.
    DrainWorker {
        /// The worker's id.
        worker: String,
        /// Used no more.
        drain: bool,
        /// Also where nobody can take its place: what runs on it waits until it is back.
        force: bool,
    },
    /// Answer to [`Action::Dismiss`].
    Dismissed {
        /// The worker's id.
        worker: String,
        /// Who was told.
        incarnation: Incarnation,
        /// The error's message, if it does not know yet that it is to end.
        fault: Option<String>,
    },
    /// A person wants the best plan now, without a hold-down.
    PlanNow {
        /// However little it gains.
        any_gain: bool,
    },
}

/// What must be done. The driver carries actions out in their order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Read the plan's key; answer `PlanRead` or `PlanReadFailed`.
    ReadPlan {
        /// To be named by the answer.
        ticket: Ticket,
    },
    /// Write the plan if the leader's key is of `term` and the plan's mod-revision is `previous`
    /// (`None`: there is no plan); answer `PlanWritten`, `PlanConflict` or `PlanUnknown`.
    WritePlan {
        /// To be named by the answer.
        ticket: Ticket,
        /// Whose reign.
        term: Term,
        /// The plan's mod-revision.
        previous: Option<u64>,
        /// What to write.
        plan: Plan,
    },
    /// Plan, on another thread; answer `Deployed`.
    Deploy {
        /// To be named by the answer.
        ticket: Ticket,
        /// What to plan.
        problem: Box<Problem>,
    },
    /// Prepare one stage (`request.stages[request.stage]` says where); answer `Prepared` or
    /// `PrepareFailed`.
    Prepare(Prepare),
    /// Activate one stage; answer `Activated` or `ActivateFailed`.
    Activate {
        /// Which pipeline.
        at: PipelineRef,
        /// Under whose reign.
        term: Term,
        /// Index of the stage.
        stage: u32,
        /// Where it is.
        target: StagePlan,
    },
    /// Tell a worker to leave this epoch and older ones; answer `Retired` or `RetireFailed`.
    Retire {
        /// Which pipeline.
        at: PipelineRef,
        /// Under whose reign.
        term: Term,
        /// Where it is.
        target: Target,
    },
    /// The pipeline is active. If there is a lane with its id that lane goes on with the new epoch
    /// and replays its sequences; else it gets one.
    Serve {
        /// For the scheduler.
        shape: PipelineShape,
        /// Its stages.
        plan: PipelinePlan,
        /// Of every stage.
        class: NumericsClass,
    },
    /// Tell a worker that nothing more is wanted of it: it ends; answer `Dismissed`.
    Dismiss {
        /// Under whose reign.
        term: Term,
        /// Where it is.
        target: Target,
    },
    /// Send no more steps, wait for those on their way, answer `Paused`.
    Pause {
        /// Of the pipeline.
        at: PipelineRef,
    },
    /// Send steps, or send them again after a pause, stamped with this term. Those on their way
    /// that are refused for an older one are sent again too.
    Resume {
        /// Of the pipeline.
        at: PipelineRef,
        /// Whose reign it is now.
        term: Term,
    },
    /// End the lane; its sequences go back to the front of the queue.
    Leave {
        /// Of the pipeline.
        at: PipelineRef,
    },
    /// The pipeline was lost. End the lane; its sequences go back to the front of the queue, those
    /// that this happens to too often fail with the reason.
    Fail {
        /// Of the pipeline.
        at: PipelineRef,
        /// For the clients.
        reason: String,
    },
    /// Open the streams to and from this stage again and send what was not acknowledged.
    Reconnect {
        /// Of the pipeline.
        at: PipelineRef,
        /// Index of the stage.
        stage: u32,
    },
    /// Ask a worker who it is and what it holds (`Describe`), within [`PROBE_TIMEOUT`]; answer
    /// `Described` or `ProbeFailed`.
    Probe {
        /// The worker's id.
        worker: String,
        /// Who should answer.
        incarnation: Incarnation,
        /// Where.
        address: String,
    },
    /// Give the leadership up and campaign again: with this registry the term is of no use. It is
    /// another one, or an older state of the same. `TermLost` is not awaited.
    Resign {
        /// For people: both numbers.
        detail: String,
    },
    /// A person should look.
    Alarm {
        /// What is wrong.
        text: String,
    },
}

/// How long a probe may take.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long one [`Action::Prepare`] may take as long as its worker gets further: 180 GB from a disk that
/// gives 100 MB/s.
pub const PREPARE_LIMIT: Duration = Duration::from_secs(30 * 60);

/// Whether requests are served. The one answer that clients, status and log are given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Availability {
    /// A pipeline is active.
    Serving,
    /// Not now; something is under way that may end in serving: requests may wait for it.
    Soon(Waiting),
    /// Not before the world has changed: requests are refused with the reason.
    No(Waiting),
}

impl Availability {
    /// Why nothing is served; `None` if a pipeline is active.
    pub fn waiting(&self) -> Option<&Waiting> {
        match self {
            Self::Serving => None,
            Self::Soon(waiting) | Self::No(waiting) => Some(waiting),
        }
    }
}

/// The cluster's part of `proto::status::ClusterStatus`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClusterView {
    /// The coordinator's reign; `None` when it does not lead.
    pub term: Option<Term>,
    /// Of the active pipeline with the lowest id.
    pub class: Option<NumericsClass>,
    /// A pipeline is active.
    pub serving: bool,
    /// Everyone in the registry, by id.
    pub workers: Vec<WorkerStatus>,
    /// What is placed. The times of stages are left at 0.
    pub plan: PlanStatus,
}
