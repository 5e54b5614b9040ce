//! What the cluster is told and what it asks for.

use std::time::Duration;

use proto::ids::{Epoch, Incarnation, ModelId, NumericsClass, PipelineId, Term};
use proto::plan::{KvType, PipelinePlan, Plan, StagePlan, WorkerRecord};
use proto::status::{PlanStatus, WorkerStatus};
use proto::step::Prepare;

use crate::planner::ModelCosts;
use crate::scheduler::PipelineShape;

/// What the cluster serves and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Scopes every epoch.
    pub cluster_id: String,
    /// What is served.
    pub model: ModelId,
    /// What its parts cost.
    pub costs: ModelCosts,
    /// How KV is stored.
    pub kv_type: KvType,
    /// Exactly so many stages; `None`: as many as give the highest predicted rate.
    pub stages: Option<u32>,
    /// The least KV a plan must hold, in blocks.
    pub min_kv_blocks: u32,
    /// The most KV a plan may hold, in blocks.
    pub max_kv_blocks: u32,
    /// Tokens in one step, as workers are told in `Prepare`.
    pub max_step_tokens: u32,
    /// How long the first plan waits for more workers after the last one came, when `stages` is
    /// `None`: workers of one cluster start within moments of each other.
    pub settle: Duration,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Time passed. Send it several times a second: retries and patience live on it.
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
    /// Answer to [`Action::ReadPlan`]: what is written, with its mod-revision; no plan if it is
    /// not to be understood.
    PlanRead(Option<(u64, Option<Plan>)>),
    /// Answer to [`Action::ReadPlan`]: it could not be read.
    PlanReadFailed {
        /// The error's words.
        detail: String,
    },
    /// Answer to [`Action::WritePlan`]: written at this mod-revision.
    PlanWritten {
        /// The plan's mod-revision: its epoch.
        revision: u64,
    },
    /// Answer to [`Action::WritePlan`]: another term or another plan was there.
    PlanConflict,
    /// Answer to [`Action::WritePlan`]: nobody knows whether it was written.
    PlanUnknown {
        /// The error's words.
        detail: String,
    },
    /// Answer to [`Action::Prepare`].
    Prepared {
        /// Of the request.
        epoch: Epoch,
        /// Index of the stage.
        stage: u32,
        /// What the worker computes with.
        class: NumericsClass,
    },
    /// Answer to [`Action::Prepare`].
    PrepareFailed {
        /// Of the request.
        epoch: Epoch,
        /// Index of the stage.
        stage: u32,
        /// Whether the same may succeed later (not reached, busy) or not (no memory, no model).
        transient: bool,
        /// The error's words.
        detail: String,
    },
    /// Answer to [`Action::Activate`].
    Activated {
        /// Of the request.
        epoch: Epoch,
        /// Index of the stage.
        stage: u32,
    },
    /// Answer to [`Action::Activate`].
    ActivateFailed {
        /// Of the request.
        epoch: Epoch,
        /// Index of the stage.
        stage: u32,
        /// As in [`Event::PrepareFailed`].
        transient: bool,
        /// The error's words.
        detail: String,
    },
    /// A stream to or from a stage ended: the steps of the first, the results of the last, or,
    /// as told by the stage before (`DownstreamLost`), the steps of one between.
    StreamBroken {
        /// Of the pipeline.
        epoch: Epoch,
        /// Index of the stage that is not reached.
        stage: u32,
        /// The error's words.
        detail: String,
    },
    /// A stage fenced this coordinator's steps: somebody newer rules it.
    Fenced {
        /// Of the pipeline.
        epoch: Epoch,
        /// The stage's words.
        detail: String,
    },
    /// A step has been on its way for too long.
    StepOverdue {
        /// Of the pipeline.
        epoch: Epoch,
    },
    /// A result came.
    ResultsFlowing {
        /// Of the pipeline.
        epoch: Epoch,
    },
    /// Answer to [`Action::Probe`]: this process start answered.
    ProbeOk {
        /// The worker's id.
        worker: String,
        /// Who answered.
        incarnation: Incarnation,
    },
    /// Answer to [`Action::Probe`]: refused, or no answer within [`PROBE_PATIENCE`].
    ProbeFailed {
        /// The worker's id.
        worker: String,
        /// Who was asked.
        incarnation: Incarnation,
        /// The error's words.
        detail: String,
    },
    /// Nothing runs while admission is held: see [`Action::HoldAdmission`].
    Drained {
        /// Of the pipeline.
        epoch: Epoch,
    },
}

/// What must be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Read the plan's key; answer `PlanRead` or `PlanReadFailed`.
    ReadPlan,
    /// Write the plan if the leader's key is of `term` and the plan's mod-revision is `previous`
    /// (`None`: there is no plan); answer `PlanWritten`, `PlanConflict` or `PlanUnknown`.
    WritePlan {
        /// Whose reign.
        term: Term,
        /// The plan's mod-revision.
        previous: Option<u64>,
        /// What to write.
        plan: Plan,
    },
    /// Prepare one stage (`request.stages[request.stage]` says where); answer `Prepared` or
    /// `PrepareFailed`.
    Prepare(Prepare),
    /// Activate one stage; answer `Activated` or `ActivateFailed`.
    Activate {
        /// Which pipeline.
        pipeline: PipelineId,
        /// At which epoch.
        epoch: Epoch,
        /// Under whose reign.
        term: Term,
        /// Index of the stage.
        stage: u32,
        /// Where it is.
        target: StagePlan,
    },
    /// Tell a worker to leave this epoch and older ones. Once, no answer: a newer `Prepare` and
    /// the epoch do the rest if it is not heard.
    Retire {
        /// Which pipeline.
        pipeline: PipelineId,
        /// This epoch and older ones.
        epoch: Epoch,
        /// Under whose reign.
        term: Term,
        /// Where it is.
        target: StagePlan,
    },
    /// The pipeline is active: open its streams, give the shape to the scheduler, serve.
    Serve {
        /// For the scheduler.
        shape: PipelineShape,
        /// Its stages.
        plan: PipelinePlan,
        /// Of every stage.
        class: NumericsClass,
    },
    /// The pipeline serves no more: close its streams and fail what runs with the reason.
    FailPipeline {
        /// Of the pipeline.
        epoch: Epoch,
        /// For the clients.
        reason: String,
    },
    /// Open the streams to and from this stage again and send what was not acknowledged.
    Reconnect {
        /// Of the pipeline.
        epoch: Epoch,
        /// Index of the stage.
        stage: u32,
    },
    /// While true nobody is admitted; send `Drained` when (or if already) nothing runs.
    HoldAdmission(bool),
    /// Nothing serves and nothing can be planned now: fail what waits with the reason.
    NoPlan {
        /// For clients and `tercet status`.
        reason: String,
    },
    /// Ask a worker who it is (`Describe`), within [`PROBE_PATIENCE`]; answer `ProbeOk` or
    /// `ProbeFailed`.
    Probe {
        /// The worker's id.
        worker: String,
        /// Who should answer.
        incarnation: Incarnation,
        /// Where.
        address: String,
    },
    /// A person should look.
    Alarm {
        /// What is wrong.
        text: String,
    },
}

/// How long a probe may take.
pub const PROBE_PATIENCE: Duration = Duration::from_secs(1);

/// The cluster's part of `proto::status::ClusterStatus`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClusterView {
    /// The coordinator's reign; `None` when it does not lead.
    pub term: Option<Term>,
    /// Of the active pipeline.
    pub class: Option<NumericsClass>,
    /// A pipeline is active.
    pub serving: bool,
    /// Everyone in the registry, by id.
    pub workers: Vec<WorkerStatus>,
    /// What is placed. The times of stages are left at 0.
    pub plan: PlanStatus,
}
