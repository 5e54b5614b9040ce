//! What an operator orders, and what a coordinator says of it.

use serde::{Deserialize, Serialize};

use crate::ids::Incarnation;

/// An order to drain a worker, or that it may be used again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drain {
    /// The cluster that is meant; empty: whichever is there.
    pub cluster_id: String,
    /// The worker's id.
    pub worker: String,
    /// The process start that is meant; `None`: whichever is there.
    pub incarnation: Option<Incarnation>,
    /// It may be used again.
    pub cancel: bool,
    /// It goes also where nobody can take its place: what runs on it waits until it is back.
    pub force: bool,
}

/// How far a drain is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drained {
    /// The process start that it is about.
    pub incarnation: Incarnation,
    /// How far.
    pub state: DrainState,
    /// For people; empty: there is nothing to add.
    pub detail: String,
    /// The order is in the registry: it stands whoever leads next.
    pub kept: bool,
}

/// What is left of a worker that is drained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainState {
    /// It has a stage still.
    Moving,
    /// It has none, and is to end.
    Ending,
    /// This process start is not there any more.
    Gone,
    /// It is not drained.
    InUse,
}

/// What came of planning because somebody asked.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Planned {
    /// What serves is changed.
    pub changes: bool,
    /// There is a plan with the workers that are here.
    pub possible: bool,
    /// For people.
    pub reason: String,
    /// Predicted, of the best plan.
    pub tokens_per_s: f64,
    /// By the same prediction, of what served.
    pub before_tokens_per_s: f64,
    /// That a worker has to load for it.
    pub layers_moved: u32,
}
