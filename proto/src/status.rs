//! The cluster as the coordinator sees it. Serialises to what `tercet status --json` prints.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The whole.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Name.
    pub cluster: String,
    /// Random id, made once.
    pub cluster_id: String,
    /// The coordinator's reign.
    pub term: u64,
    /// Numerics class, hex; empty when no plan is active.
    pub class: String,
    /// Has generated a token through every pipeline it counts.
    pub ready: bool,
    /// Version of the coordinator.
    pub version: String,
    /// What is served.
    pub model: ModelStatus,
    /// Everyone in the registry.
    pub workers: Vec<WorkerStatus>,
    /// What is placed.
    pub plan: PlanStatus,
    /// Requests.
    pub queue: QueueStatus,
    /// Tokens.
    pub rates: RateStatus,
    /// Why nothing is served; absent while it is ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting: Option<Waiting>,
    /// Where the coordinator that says this takes an operator's orders (`host:port`); absent:
    /// nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin: Option<String>,
}

/// Why nothing is served: the one reason that status, `/ready`, logs and commands show.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// What kind of reason.
    pub cause: WaitCause,
    /// For people.
    pub detail: String,
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WaitCause {
    /// It is on its way and comes by itself.
    Starting,
    /// Another coordinator leads.
    Leadership,
    /// What is in the registry cannot be used.
    Registry,
    /// Too few workers that fit.
    Workers,
    /// They have too little memory together.
    Memory,
    /// A worker said that it cannot take its stage.
    Refused,
    /// A stage was lost, and nothing took its place yet.
    Lost,
}

impl WaitCause {
    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Leadership => "leadership",
            Self::Registry => "registry",
            Self::Workers => "workers",
            Self::Memory => "memory",
            Self::Refused => "refused",
            Self::Lost => "lost",
        }
    }

    /// Whether it passes without anybody doing anything.
    pub fn passes(self) -> bool {
        matches!(self, Self::Starting | Self::Leadership | Self::Lost)
    }
}

/// What is served.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelStatus {
    /// For people.
    pub name: String,
    /// Hex.
    pub id: String,
    /// How many.
    pub layers: u32,
    /// Longest sequence in tokens.
    pub context: u32,
    /// Without one only token ids work.
    pub has_tokenizer: bool,
    /// What is in force for requests that do not say how tokens are drawn.
    #[serde(default)]
    pub sampling: SamplingStatus,
}

/// Defaults of sampling in force: the model's, unless the coordinator was told otherwise. What is absent
/// is not there: temperature 1, nothing cut or penalised, no length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SamplingStatus {
    /// Of the softmax.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Only so many of the most probable tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Only tokens that make up this much probability.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Only tokens that are this probable, compared with the most probable one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// Divides what was there before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    /// Tokens of an answer, at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<u32>,
}

impl fmt::Display for SamplingStatus {
    /// Name and value of each that is there; nothing if none is.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: Option<f32>| value.map(|value| value.to_string());
        let all = [
            ("temperature", shown(self.temperature)),
            ("top_k", self.top_k.map(|value| value.to_string())),
            ("top_p", shown(self.top_p)),
            ("min_p", shown(self.min_p)),
            ("repetition_penalty", shown(self.repetition_penalty)),
            ("max_new_tokens", self.max_new_tokens.map(|value| value.to_string())),
        ];
        let there = all.into_iter().filter_map(|(name, value)| Some((name, value?)));
        for (index, (name, value)) in there.enumerate() {
            write!(f, "{}{name} {value}", if index > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

/// One worker.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Name.
    pub id: String,
    /// Where it is reached.
    pub address: String,
    /// Hex.
    pub incarnation: String,
    /// active | standby | draining | suspect | unfit
    pub state: String,
    /// Which kernels.
    pub isa: String,
    /// Compute threads.
    pub threads: u32,
    /// For weights and KV.
    pub memory_bytes: u64,
    /// Why it is not active, when that needs a reason.
    pub detail: String,
    /// As its label says, or `~` and a worker of those that measured round trips put together; empty:
    /// unknown.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub rack: String,
}

/// What is placed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PlanStatus {
    /// Every pipeline.
    pub pipelines: Vec<PipelineStatus>,
    /// Why it is so, or why there is none.
    pub reason: String,
}

/// One pipeline.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PipelineStatus {
    /// Id.
    pub id: u64,
    /// Revision at which its stages last changed.
    pub epoch: u64,
    /// preparing | active | failed
    pub state: String,
    /// In order.
    pub stages: Vec<StageStatus>,
    /// By the cost model, for steps of 16 rows.
    pub predicted_tokens_per_s: f64,
    /// Steps that came back since the epoch began.
    pub steps: u64,
    /// From the sending of each to its result, in all.
    pub on_way_ms: f64,
    /// How its steps are sized.
    #[serde(default)]
    pub budget: StepBudget,
}

/// How much of prompts one step of a pipeline reads, and what that was derived from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StepBudget {
    /// How long a step that reads prompts should take on the slowest stage.
    pub target_ms: f64,
    /// Tokens of the beginning of a prompt that fit into that.
    pub chunk_tokens: u32,
    /// Tokens that fit at the end of the model's context.
    pub chunk_tokens_last: u32,
    /// Of a step, by what the workers measured: whatever is in it, and for each token of a prompt; 0:
    /// unknown.
    pub step_ms: f64,
    /// As above.
    pub token_ms: f64,
    /// How many times as long steps take as that, by those that came back.
    pub scale: f64,
    /// What a token takes more for each thousand tokens before it, by those that came back.
    pub context_ms: f64,
}

/// One stage.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StageStatus {
    /// Who.
    pub worker: String,
    /// Where.
    pub address: String,
    /// `[begin, end)`.
    pub layers: [u32; 2],
    /// Moving mean over steps.
    pub compute_ms: f64,
    /// Moving mean over steps.
    pub wait_ms: f64,
    /// Computed since the epoch began.
    pub steps: u64,
    /// What computing them took, in all.
    pub busy_ms: f64,
    /// How long they waited for its engine, in all.
    pub waited_ms: f64,
    /// Share of the time that the planner expects it to compute when its pipeline is full; 0 if it has
    /// not said.
    pub predicted_busy: f64,
    /// Its part, by layers, of the tokens per second that are expected of its pipeline; 0 if unknown.
    pub predicted_tokens_per_s: f64,
}

/// Requests.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct QueueStatus {
    /// Admitted.
    pub running: u32,
    /// Not admitted.
    pub waiting: u32,
    /// The most that may wait.
    pub waiting_limit: u32,
    /// Tokens that are expected of those who wait, prompts and answers.
    #[serde(default)]
    pub waiting_tokens: u64,
    /// The most of them that may be.
    #[serde(default)]
    pub waiting_tokens_limit: u64,
    /// Of the KV cache.
    pub kv_blocks_total: u32,
    /// Reserved.
    pub kv_blocks_used: u32,
}

/// Tokens: rates over the last 10 s, and all of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RateStatus {
    /// Prefilled.
    pub prompt_tokens_per_s: f64,
    /// Generated.
    pub generated_tokens_per_s: f64,
    /// Since start.
    pub requests_finished: u64,
    /// Since start.
    pub requests_failed: u64,
    /// Prefilled since start.
    pub prompt_tokens: u64,
    /// Generated since start.
    pub generated_tokens: u64,
}
