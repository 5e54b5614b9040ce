//! The one pipeline whose slowest stage is as fast as it can be. A cluster of many pipelines is
//! planned by [`deploy`](super::deploy) in place of this.

mod search;
#[cfg(test)]
mod tests;

pub use super::{ModelCosts, PlanError, Stage};
use search::Search;

/// A worker as the planner sees it. Times are those of a step of [`STEP_ROWS`] rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerSpec {
    /// Its id: unique, and the order of workers in a plan follows it.
    pub id: String,
    /// Bytes for weights and KV.
    pub memory_bytes: u64,
    /// One layer, in nanoseconds.
    pub layer_ns: u64,
    /// Final norm and head, in nanoseconds.
    pub head_ns: u64,
}

/// Rows of the steps that plans are judged by: the middle of what a busy pipeline runs.
pub const STEP_ROWS: u32 = 16;

/// What is asked of a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Exactly so many stages; `None`: the number with the highest predicted rate.
    pub stages: Option<u32>,
    /// KV blocks that every plan must have room for: at least one.
    pub min_kv_blocks: u32,
    /// More are never planned.
    pub max_kv_blocks: u32,
    /// The stages that served before, in order: kept where that costs little.
    pub incumbent: Vec<Stage>,
}

/// Who runs what, and how fast that should be.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// In the order of layers; together every layer once.
    pub stages: Vec<Stage>,
    /// Blocks that every stage can hold.
    pub kv_blocks: u32,
    /// Time of the slowest stage for a step of [`STEP_ROWS`] rows.
    pub bottleneck_ns: u64,
    /// `STEP_ROWS` in that time.
    pub predicted_tokens_per_s: f64,
    /// For people.
    pub reason: String,
}

/// Numbers of stages whose bottlenecks differ by less than this many per mille count as equal, and
/// the fewer stages win: measured speeds are no better, and every stage is one more that can die.
const TIE_PER_MILLE: u64 = 10;

/// A plan that keeps what served before may be slower than the best one by so many per cent:
/// layers that stay are in the page cache of their worker.
const KEEP_PERCENT: u64 = 20;

/// The pipeline whose slowest stage is as fast as it can be.
///
/// Layers are uniform, so only the number of layers of each worker matters, and who holds the
/// embedding (memory) and the head (memory and time). For a bound on the slowest stage every
/// worker can take `min(layers that fit, (bound - head) / layer time)` layers; the bound is
/// feasible if the shares of some choice of workers add up to all layers. Shares only grow with
/// the bound, so the least bound is found by bisection, for every pair of first and last stage at
/// once: exact, in O(workers² × log(time)) for each number of stages. Among the plans of the least
/// bound the one with the most KV is taken. Equal inputs give equal plans, in any order of
/// `workers`.
///
/// # Errors
///
/// Why there is none.
///
/// # Panics
///
/// If the model has no layers, or empty ones; the reader of stores admits neither.
pub fn plan(
    model: &ModelCosts,
    workers: &[WorkerSpec],
    options: &Options,
) -> Result<Assignment, PlanError> {
    assert!(model.layers > 0 && model.layer_bytes > 0, "a model has layers with weights");
    let search = Search::new(model, workers, options);
    let available = search.workers.len() as u32;
    if available == 0 {
        return Err(PlanError::NoWorkers);
    }
    let counts = match options.stages {
        Some(stages) if stages > model.layers => {
            return Err(PlanError::MoreStagesThanLayers { stages, layers: model.layers });
        }
        Some(stages) if stages > available => {
            return Err(PlanError::MoreStagesThanWorkers { stages, workers: available });
        }
        Some(stages) => stages.max(1)..=stages.max(1),
        None => 1..=available.min(model.layers),
    };

    let bounds: Vec<_> = counts.filter_map(|n| Some((n, search.least_bound(n)?))).collect();
    let Some(least) = bounds.iter().map(|&(_, bound)| bound).min() else {
        return Err(search.does_not_fit());
    };
    let tie = least.saturating_add(least / 1000 * TIE_PER_MILLE);
    let (stages, bound) = bounds
        .iter()
        .copied()
        .find(|&(_, bound)| bound <= tie)
        .expect("the least is a tie of itself");

    let slack = bound.saturating_add(bound / 100 * KEEP_PERCENT);
    if let Some(kept) = search.keep(slack) {
        let unchanged = kept.iter().filter(|stage| options.incumbent.contains(stage)).count();
        let why = format!(
            "{unchanged} stages stay as they were, at most {KEEP_PERCENT} % slower than the best plan"
        );
        return Ok(search.assignment(kept, &why));
    }
    let why = match options.stages {
        Some(_) => "as many stages as were asked for".to_owned(),
        None if stages == available.min(model.layers) => "more stages are faster".to_owned(),
        None => format!("more than {stages} stages would not be faster"),
    };
    Ok(search.assignment(search.best(stages, bound), &why))
}
