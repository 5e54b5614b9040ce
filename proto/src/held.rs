//! What a worker says that it holds: what is observed, beside what is planned.

use std::ops::Range;

use crate::ids::{Incarnation, ModelId, PipelineRef, Term};
use crate::plan::KvType;

/// What a worker says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Its id.
    pub worker: String,
    /// Of this process start.
    pub incarnation: Incarnation,
    /// Every stage that it is prepared for or serves.
    pub held: Vec<HeldStage>,
    /// Bytes of weights that were hashed and read into memory since the process started, by whoever
    /// prepares: while they become more a `Prepare` gets further.
    pub prepared_bytes: u64,
}

/// One stage that a worker holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldStage {
    /// Of which pipeline, at which epoch.
    pub at: PipelineRef,
    /// Under whom it was prepared.
    pub term: Term,
    /// How far it is.
    pub state: HeldState,
    /// Index of the stage.
    pub stage: u32,
    /// Half-open.
    pub layers: Range<u32>,
    /// Which model.
    pub model: ModelId,
    /// How KV is stored.
    pub kv_type: KvType,
    /// Blocks of its KV cache.
    pub kv_blocks: u32,
    /// Memory of its engine. Stages of the same layers, model and sizes have one engine together,
    /// and each says all of it.
    pub bytes: u64,
}

/// How far a stage is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldState {
    /// Ready to take over; no step is computed.
    Prepared,
    /// Serves.
    Active,
}
