//! What is written to the registry: a worker's record and the plan.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, Incarnation, KnownAnswer, ModelId, NumericsClass, PipelineId, Term};

/// The number format of cached keys and values. Part of the numerics class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvType {
    /// IEEE half precision.
    #[default]
    F16,
    /// IEEE single precision.
    F32,
}

impl KvType {
    /// As it is written on the command line and on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    /// Bytes of one cached value.
    pub fn value_bytes(self) -> u32 {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

impl fmt::Display for KvType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KvType {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "f16" => Ok(Self::F16),
            "f32" => Ok(Self::F32),
            _ => Err(format!("KV type must be f16 or f32, found {text:?}")),
        }
    }
}

/// What a worker says of itself under its lease.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerRecord {
    /// Stable name of the worker, unique in its cluster.
    pub id: String,
    /// Of this process start.
    pub incarnation: Incarnation,
    /// Where others reach it: `host:port`.
    pub address: String,
    /// Version of the program.
    pub version: String,
    /// Which kernels it chose.
    pub isa: String,
    /// Compute threads.
    pub threads: u32,
    /// Bytes it may use for weights and KV.
    pub memory_bytes: u64,
    /// Revision of the kernels' numerics.
    pub kernel_revision: u32,
    /// Digest of its known-answer test.
    pub known_answer: KnownAnswer,
    /// Models whose shards it can read.
    pub models: Vec<WorkerModel>,
    /// It finishes what it has and takes nothing new.
    pub draining: bool,
}

/// One model that a worker can serve layers of, with its measured speed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerModel {
    /// Which model.
    pub id: ModelId,
    /// Time of one layer for one row, in nanoseconds, measured at start.
    pub layer_ns: u64,
    /// Time of one layer for a step of 16 rows.
    pub layer_16_ns: u64,
    /// Time of final norm and head for one row.
    pub head_ns: u64,
    /// The same for a step of 16 rows.
    pub head_16_ns: u64,
}

/// The numbered, immutable assignment of stages to workers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Whose reign wrote it.
    pub term: Term,
    /// The model that is served.
    pub model: ModelId,
    /// Part of the class.
    pub kv_type: KvType,
    /// The class of every stage.
    pub class: NumericsClass,
    /// All pipelines.
    pub pipelines: Vec<PipelinePlan>,
    /// Why it is so, for people.
    pub reason: String,
}

/// The stages that together hold the whole model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PipelinePlan {
    /// Which pipeline.
    pub id: PipelineId,
    /// Set on reading: the revision at which these stages last changed. A plan that changes the
    /// stages is written with 0 here and the reader puts the plan's own mod-revision.
    pub epoch: Epoch,
    /// In the order of layers.
    pub stages: Vec<StagePlan>,
    /// Blocks of the KV cache, the least that every stage can hold.
    pub kv_blocks: u32,
    /// As the cost model sees it, for steps of 16 rows.
    pub predicted_tokens_per_s: f64,
}

/// The layers of one worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StagePlan {
    /// The worker's id.
    pub worker: String,
    /// The process start that was planned for.
    pub incarnation: Incarnation,
    /// Where it is reached.
    pub address: String,
    /// Half-open.
    pub layers: Range<u32>,
}
