//! Which workers make pipelines together, and which layers each of them runs. Pure: no clock, no
//! network, no randomness; equal problems give equal deployments, in any order of the workers.

use std::ops::Range;
use std::time::Duration;

use serde::{Deserialize, Serialize};

mod costs;
mod group;
mod grouping;
mod pipeline;
mod search;
#[cfg(test)]
mod tests;
mod words;

use costs::Costs;
pub(crate) use costs::{HOP_OTHER_RACK_NS, HOP_SAME_RACK_NS};
pub use proto::plan::StepTime;
use search::Search;

/// What the layers of a model cost, whoever computes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelCosts {
    /// Layers, all of the same cost.
    pub layers: u32,
    /// Weights of one layer.
    pub layer_bytes: u64,
    /// Embedding: held by the first stage; its time is not worth counting.
    pub embedding_bytes: u64,
    /// Final norm and head: held by the last stage.
    pub head_bytes: u64,
    /// Embedding and head are the same bytes: one stage that holds both holds them once, and the
    /// first of several stages draws for half of the steps: see [`Self::first_draws`].
    pub tied_head: bool,
    /// K and V of one block of 32 tokens in one layer.
    pub kv_block_layer_bytes: u64,
}

impl ModelCosts {
    /// Whether in a pipeline of `stages` stages the first draws for half of the steps. It holds the
    /// embedding, which is the head's matrix, in any case.
    pub fn first_draws(&self, stages: usize) -> bool {
        self.tied_head && stages > 1
    }
}

/// A worker as the planner sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerSpec {
    /// Its id: unique, and the order of equal workers in a plan follows it.
    pub id: String,
    /// The machine that it runs on; empty: one that nobody else does.
    pub machine: String,
    /// Where the machine stands; workers of no rack stand together.
    pub rack: String,
    /// Bytes for weights and KV.
    pub memory_bytes: u64,
    /// Times of steps, by rows. Between them times lie on straight lines; steps of more rows than
    /// the largest are not planned. A worker without any is left out.
    pub steps: Vec<StepTime>,
}

/// What a plan is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Objective {
    /// The most tokens per second of all pipelines together.
    Throughput {
        /// No pipeline may take longer for a token of one answer.
        token_time: Option<Duration>,
    },
    /// The least time per token for a single sequence, whichever pipeline it is in, and among the
    /// pipelines that are that quick, within a hundredth, the most tokens per second.
    Latency,
}

impl Default for Objective {
    fn default() -> Self {
        Self::Throughput { token_time: None }
    }
}

/// A pipeline that serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incumbent {
    /// In the order of layers.
    pub stages: Vec<Stage>,
    /// Blocks that every stage holds.
    pub kv_blocks: u32,
}

/// What is asked of a deployment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Exactly so many stages in every pipeline; `None`: as many as are best.
    pub stages: Option<u32>,
    /// Exactly so many pipelines; `None`: as many as are best.
    pub pipelines: Option<u32>,
    /// KV blocks that every pipeline must have room for: at least one.
    pub min_kv_blocks: u32,
    /// More are never planned.
    pub max_kv_blocks: u32,
    /// Tokens of prompt and answer that people use: a pipeline is counted on for as many sequences
    /// of that length as its KV holds.
    pub context_tokens: u32,
    /// What for.
    pub objective: Objective,
    /// The pipelines that serve now: kept where that costs little.
    pub incumbent: Vec<Incumbent>,
}

/// Who could serve which model, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The model.
    pub model: ModelCosts,
    /// Everybody who can compute it.
    pub workers: Vec<WorkerSpec>,
    /// How.
    pub options: Options,
}

/// The layers of one worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// The worker's id.
    pub worker: String,
    /// Half-open, never empty.
    pub layers: Range<u32>,
}

/// One pipeline, and how fast it should be.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// In the order of layers; together every layer once.
    pub stages: Vec<Stage>,
    /// Blocks that every stage can hold.
    pub kv_blocks: u32,
    /// Rows of the steps that it is predicted for.
    pub step_rows: u32,
    /// Time of the slowest stage for such a step.
    pub bottleneck_ns: u64,
    /// Time per token of one answer, when the pipeline is full.
    pub token_ns: u64,
    /// Of all sequences together.
    pub predicted_tokens_per_s: f64,
    /// The incumbent that it goes on from, by index: that with the most layers left in place.
    pub continues: Option<usize>,
    /// For people.
    pub reason: String,
}

/// A worker without a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// Its id.
    pub worker: String,
    /// For people.
    pub reason: String,
}

/// What a worker in a pipeline is predicted to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// Its id.
    pub worker: String,
    /// What it holds.
    pub layers: Range<u32>,
    /// Share of the time that it computes when its pipeline is full.
    pub busy: f64,
    /// Its part of its pipeline's tokens per second, by layers.
    pub tokens_per_s: f64,
}

/// Who serves, and how fast that should be.
#[derive(Clone, Debug, PartialEq)]
pub struct Deployment {
    /// No worker is in two of them.
    pub pipelines: Vec<Assignment>,
    /// Who is in none, by id.
    pub left_out: Vec<LeftOut>,
    /// Of all pipelines together.
    pub tokens_per_s: f64,
    /// By the same prediction, of those incumbents whose workers are all there.
    pub incumbent_tokens_per_s: f64,
    /// Layers that a worker has to load because no incumbent had them there.
    pub layers_moved: u32,
    /// For people.
    pub reason: String,
    /// Everybody in a pipeline, in the order of pipelines and stages.
    pub workers: Vec<Prediction>,
    /// The same of those incumbents whose workers are all there.
    pub incumbent_workers: Vec<Prediction>,
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// Nobody to plan with.
    #[error("no worker can serve this model")]
    NoWorkers,
    /// Every stage needs at least one layer.
    #[error("{stages} stages were asked for, the model has only {layers} layers")]
    MoreStagesThanLayers {
        /// Asked for.
        stages: u32,
        /// Of the model.
        layers: u32,
    },
    /// A worker holds at most one stage.
    #[error("{stages} stages were asked for, only {workers} workers can serve this model")]
    MoreStagesThanWorkers {
        /// Asked for.
        stages: u32,
        /// Who could take one.
        workers: u32,
    },
    /// A worker is in at most one pipeline.
    #[error(
        "{pipelines} pipelines of at least {stages} stages were asked for, only {workers} workers \
         can serve this model"
    )]
    MorePipelinesThanWorkers {
        /// Asked for.
        pipelines: u32,
        /// Asked for in each, or one.
        stages: u32,
        /// Who could take one.
        workers: u32,
    },
    /// Memory is short, whatever the speeds.
    #[error(
        "the model does not fit: the workers have {memory_bytes} bytes in all, weights and \
         {kv_blocks} KV blocks need {needed_bytes} bytes{}",
        if memory_bytes >= needed_bytes { ", and no cut into whole layers makes every stage fit" } else { "" }
    )]
    DoesNotFit {
        /// Of all workers together.
        memory_bytes: u64,
        /// Of weights and the least KV.
        needed_bytes: u64,
        /// The least KV.
        kv_blocks: u32,
    },
    /// There is memory for some pipelines, not for as many as were asked for.
    #[error(
        "{pipelines} pipelines were asked for, the model fits the workers' memory only {possible} \
         times"
    )]
    TooManyPipelines {
        /// Asked for.
        pipelines: u32,
        /// The most that were found.
        possible: u32,
    },
    /// Nobody is quick enough.
    #[error(
        "no pipeline takes at most {limit_ms} ms for a token of one answer: the quickest takes \
         {least_ms} ms"
    )]
    TooSlow {
        /// Asked for, in whole milliseconds.
        limit_ms: u64,
        /// Of a single sequence, in whole milliseconds, rounded up.
        least_ms: u64,
    },
    /// Whoever asked does not want it any more.
    #[error("the plan was given up while it was made")]
    NotWanted,
}

/// The pipelines that serve best what is asked for.
///
/// # Errors
///
/// Why there are none.
///
/// # Panics
///
/// If the model has no layers, or empty ones; the reader of stores admits neither.
pub fn deploy(problem: &Problem) -> Result<Deployment, PlanError> {
    deploy_while(problem, &|| true)
}

/// [`deploy`], given up soon after the first time that `is_wanted`, which is asked all the while,
/// says no: the plan is the same for as long as it says yes.
///
/// # Errors
///
/// Why there are none.
///
/// # Panics
///
/// As [`deploy`].
pub fn deploy_while(
    problem: &Problem,
    is_wanted: &dyn Fn() -> bool,
) -> Result<Deployment, PlanError> {
    run(&Costs::new(problem, is_wanted), problem)
}

fn run(costs: &Costs<'_>, problem: &Problem) -> Result<Deployment, PlanError> {
    check_wishes(costs, &problem.options)?;
    let found = Search::new(costs, problem).run();
    // What was found by then may be anything.
    if costs.is_wanted() { found } else { Err(PlanError::NotWanted) }
}

/// Whether there are layers and workers for the stages and pipelines that are asked for.
fn check_wishes(costs: &Costs<'_>, options: &Options) -> Result<(), PlanError> {
    let workers = costs.workers.len() as u32;
    if workers == 0 {
        return Err(PlanError::NoWorkers);
    }
    let (layers, stages) = (costs.model.layers, options.stages.unwrap_or(1).max(1));
    if stages > layers {
        return Err(PlanError::MoreStagesThanLayers { stages, layers });
    }
    if stages > workers {
        return Err(PlanError::MoreStagesThanWorkers { stages, workers });
    }
    match options.pipelines {
        Some(pipelines) if u64::from(pipelines.max(1)) * u64::from(stages) > u64::from(workers) => {
            Err(PlanError::MorePipelinesThanWorkers { pipelines, stages, workers })
        }
        _ => Ok(()),
    }
}
