//! What is written to the registry: a worker's record and the plan. The leader's record is in
//! [`key`](crate::key).
//!
//! Values outlive the program that wrote them, and are read by programs of other versions. So a
//! reader takes fields that are missing for their defaults and ignores those it does not know; and
//! a field never changes its meaning: what means something else gets another name. `format` counts
//! the changes, for people and for whoever must know what the writer knew. What every format looks
//! like is in `proto/samples`.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::{
    Epoch, Incarnation, KnownAnswer, ModelId, NumericsClass, PipelineId, PipelineRef, Term,
};
use crate::limits;
use crate::names::WorkerId;

mod round_trips;
mod step_time;
#[cfg(test)]
mod tests;

pub use step_time::StepTime;

/// Format of the [`LeaderRecord`](crate::key::LeaderRecord)s that this version writes.
pub const LEADER_FORMAT: u32 = 2;

/// Format of the [`WorkerRecord`]s that this version writes.
pub const WORKER_FORMAT: u32 = 4;

/// Format of the [`Plan`]s that this version writes.
pub const PLAN_FORMAT: u32 = 2;

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
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerRecord {
    /// [`WORKER_FORMAT`] of who wrote it.
    pub format: u32,
    /// Stable name of the worker, unique in its cluster.
    pub id: String,
    /// Of this process start.
    pub incarnation: Incarnation,
    /// Where others reach it: `host:port`.
    pub address: String,
    /// Name of the machine that it runs on; empty: unknown.
    pub machine: String,
    /// Which rack that machine is in; empty: unknown.
    pub rack: String,
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
    /// It computes nothing: its answers are hashes, for tests of many workers.
    pub stub: bool,
    /// Names the socket that it listens on, see [`is_successor`]; empty: unknown.
    pub socket: String,
    /// The network's least round trips to other workers on other machines, in microseconds, by id: at
    /// most [`limits::ROUND_TRIPS`], each from 1 to [`limits::ROUND_TRIP_US`]. Who is missing was not
    /// reached, or not tried.
    #[serde(deserialize_with = "round_trips::read")]
    pub round_trips_us: BTreeMap<String, u32>,
}

/// Whether a process of incarnation `own` that listens on the socket `own_socket` proves by that that
/// another one has ended, or has let go of everything: it said that it listens there.
pub fn is_successor(
    (own, own_socket): (Incarnation, &str),
    (other, other_socket): (Incarnation, &str),
) -> bool {
    !own_socket.is_empty() && own_socket == other_socket && own != other
}

impl WorkerRecord {
    /// What makes this no worker's record; `None` if it is one.
    pub fn fault(&self) -> Option<&'static str> {
        if self.id.parse::<WorkerId>().is_err() {
            return Some("it has no id that can name a worker");
        }
        if self.incarnation == Incarnation::NONE {
            return Some("it has no incarnation");
        }
        is_address(&self.address).err()
    }
}

/// Whether others could be told to connect there.
fn is_address(text: &str) -> Result<(), &'static str> {
    let authority = text.parse::<tonic::codegen::http::uri::Authority>();
    let Some((port, host)) = authority
        .as_ref()
        .ok()
        .and_then(|authority| Some((authority.port_u16()?, authority.host())))
        .filter(|(_, host)| !host.is_empty())
    else {
        return Err("it has no address of the form host:port");
    };
    // Who connects there reaches itself, or nobody.
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let is_anywhere = host.parse().is_ok_and(|ip: IpAddr| ip.to_canonical().is_unspecified());
    match is_anywhere || port == 0 {
        true => Err("its address is one that it listens on, and none that others can connect to"),
        false => Ok(()),
    }
}

/// One model that a worker can serve layers of, with its measured speed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerModel {
    /// Which model.
    pub id: ModelId,
    /// Measured at start, for several numbers of rows.
    pub steps: Vec<StepTime>,
}

impl WorkerModel {
    /// Time of one layer in a step of so many rows, in nanoseconds; `None` if nothing was measured.
    pub fn layer_ns(&self, rows: u32) -> Option<u64> {
        step_time::at(&self.steps, rows, |step| step.layer_ns)
    }

    /// Time of final norm and head in a step of so many rows, in nanoseconds; `None` if nothing was
    /// measured.
    pub fn head_ns(&self, rows: u32) -> Option<u64> {
        step_time::at(&self.steps, rows, |step| step.head_ns)
    }
}

/// The immutable assignment of stages to workers. Its number is its mod-revision.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Plan {
    /// [`PLAN_FORMAT`] of who wrote it.
    pub format: u32,
    /// Whose reign wrote it.
    pub term: Term,
    /// All pipelines.
    pub pipelines: Vec<PipelinePlan>,
    /// Why it is so, for people.
    pub reason: String,
    /// Workers that a person ordered to be used no more: an order outlives the reign that it was given in.
    pub drains: Vec<DrainOrder>,
}

/// An order to use a worker no more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DrainOrder {
    /// The worker's id.
    pub worker: String,
    /// The process start that is meant: another one of its name may be used.
    pub incarnation: Incarnation,
    /// Also where nobody can take its place.
    pub force: bool,
}

impl Plan {
    /// What makes this nobody's plan, though it reads as one; `None` if it could be carried out.
    pub fn fault(&self) -> Option<&'static str> {
        let mut ids: Vec<u64> = self.pipelines.iter().map(|pipeline| pipeline.id.0).collect();
        ids.sort_unstable();
        if ids.windows(2).any(|pair| pair[0] == pair[1]) {
            return Some("two pipelines have the same id");
        }
        // The next one gets the number after it.
        if ids.last().is_some_and(|&id| id > limits::PIPELINE_ID) {
            return Some("the id of a pipeline is higher than any that is given");
        }
        let mut workers: Vec<&str> = Vec::new();
        for pipeline in &self.pipelines {
            if pipeline.stages.is_empty() || pipeline.stages.len() > limits::STAGES {
                return Some("a pipeline has no stages, or too many");
            }
            let mut begin = 0;
            for stage in &pipeline.stages {
                if stage.layers.start != begin || stage.layers.end <= begin {
                    return Some("the layers of a pipeline do not follow on one another");
                }
                begin = stage.layers.end;
                workers.push(&stage.worker);
            }
        }
        workers.sort_unstable();
        let twice = workers.windows(2).any(|pair| pair[0] == pair[1]);
        twice.then_some("a worker has two stages")
    }
}

/// The stages that together hold the whole model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PipelinePlan {
    /// Which pipeline.
    pub id: PipelineId,
    /// The revision at which these stages last changed. A plan that changes the stages is written
    /// with 0 here, and whoever reads it puts the plan's own mod-revision.
    pub epoch: Epoch,
    /// The model that is served.
    pub model: ModelId,
    /// Part of the class.
    pub kv_type: KvType,
    /// The class of every stage.
    pub class: NumericsClass,
    /// In the order of layers.
    pub stages: Vec<StagePlan>,
    /// Blocks of the KV cache, the least that every stage can hold.
    pub kv_blocks: u32,
    /// As the cost model sees it, for steps of 16 rows.
    pub predicted_tokens_per_s: f64,
}

impl PipelinePlan {
    /// The pipeline at its epoch.
    pub fn at(&self) -> PipelineRef {
        PipelineRef { id: self.id, epoch: self.epoch }
    }
}

/// The layers of one worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StagePlan {
    /// The worker's id.
    pub worker: String,
    /// The process start that was planned for.
    pub incarnation: Incarnation,
    /// Where it is reached.
    pub address: String,
    /// Half-open.
    #[serde(with = "half_open")]
    pub layers: Range<u32>,
}

/// Ranges as objects that tolerate what they do not know; serde's own do not.
mod half_open {
    use std::ops::Range;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Default, Serialize, Deserialize)]
    #[serde(default)]
    struct Written {
        start: u32,
        end: u32,
    }

    pub(super) fn serialize<S: Serializer>(r: &Range<u32>, to: S) -> Result<S::Ok, S::Error> {
        Written { start: r.start, end: r.end }.serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Range<u32>, D::Error> {
        Written::deserialize(from).map(|Written { start, end }| start..end)
    }
}
