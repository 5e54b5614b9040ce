//! How long the planner takes for random fleets, and what its plans give of what the workers could.

use std::time::Duration;

use coordinator::planner::{
    self, ModelCosts, Objective, Options, PlanError, Problem, StepTime, WorkerSpec,
};
use serde::Serialize;
use tokio::time::Instant;

use super::{Report, Spread};
use crate::random::Random;

/// BitNet b1.58 2B4T with f16 KV.
pub(crate) const MODEL: ModelCosts = ModelCosts {
    layers: 30,
    layer_bytes: 17_400_000,
    embedding_bytes: 656_700_000,
    head_bytes: 656_700_000,
    tied_head: true,
    kv_block_layer_bytes: 81_920,
};

/// Fleets by what their memory holds, in MB from and to.
const FLEETS: [(&str, &[(u32, u32)]); 4] = [
    ("model and KV", &[(8_000, 64_000)]),
    ("model, short KV", &[(2_500, 8_000)]),
    ("half holds it", &[(800, 1_500), (2_000, 32_000)]),
    ("nobody holds it", &[(680, 1_100)]),
];

/// The bounds on the time per token that are planned for: what most fleets keep, and few do.
const TOKEN_TIMES: [Duration; 2] = [Duration::from_millis(900), Duration::from_millis(250)];

/// Workers stand in so many racks.
const RACKS: u32 = 4;

/// Fleets of one kind with one objective.
#[derive(Clone, Debug, Serialize)]
pub struct Planned {
    /// What the workers' memory holds.
    pub memory: &'static str,
    /// What was planned for.
    pub objective: String,
    /// Fleets that there is a plan for.
    pub plans: usize,
    /// Fleets.
    pub fleets: usize,
    /// What planning took, in milliseconds.
    pub ms: Spread,
    /// The plans' tokens per second by those of all workers if nothing held them back: neither
    /// memory nor hops, neither norm nor head, neither whole layers nor a bound on the time. Absent if
    /// there is no plan.
    pub share: Option<Spread>,
}

/// Plans for so many fleets of so many workers of every kind, for every objective.
pub fn measure_all(workers: usize, fleets: usize, report: Report<'_>) -> Vec<Planned> {
    let [loose, tight] = TOKEN_TIMES;
    let objectives = [
        ("throughput".to_owned(), Objective::default()),
        (format!("{loose:?} a token"), Objective::Throughput { token_time: Some(loose) }),
        (format!("{tight:?} a token"), Objective::Throughput { token_time: Some(tight) }),
        ("latency".to_owned(), Objective::Latency),
    ];
    let total = FLEETS.len() * objectives.len();
    let mut all = Vec::new();
    for (memory, ranges) in FLEETS {
        for (name, objective) in &objectives {
            report(memory, all.len() as u64, total as u64);
            let (mut ms, mut shares) = (Vec::new(), Vec::new());
            for seed in 0..fleets {
                let problem = problem(seed as u64, workers, ranges, *objective);
                let begin = Instant::now();
                let found: Result<_, PlanError> = planner::deploy(&problem);
                ms.push(begin.elapsed().as_secs_f64() * 1e3);
                shares.extend(found.ok().map(|found| found.tokens_per_s / most(&problem)));
            }
            all.push(Planned {
                memory,
                objective: name.clone(),
                plans: shares.len(),
                fleets,
                ms: Spread::of(&ms),
                share: (!shares.is_empty()).then(|| Spread::of(&shares)),
            });
        }
    }
    all
}

/// Unequal workers: speeds from one to thirteen, steps of 64 rows that take four to thirty times as
/// long as those of one, memory from `ranges` in MB.
fn problem(seed: u64, workers: usize, ranges: &[(u32, u32)], objective: Objective) -> Problem {
    let mut random = Random(seed);
    let mut between = |from: u32, to: u32| from + random.below(to - from);
    let mut worker = |number: usize| {
        let (layer_us, head_percent, row_percent) =
            (between(600, 8_000), between(400, 900), between(5, 50));
        let step = |rows: u32| {
            let percent = 100 + u64::from(row_percent * (rows - 1));
            let layer_ns = u64::from(layer_us) * 10 * percent;
            let head_percent = u64::from(head_percent);
            let half = 100 + u64::from(row_percent * (rows - 1)) / 2;
            let head_ns = u64::from(layer_us) * half * head_percent / 10;
            StepTime { rows, layer_ns, head_ns }
        };
        let (from, to) = ranges[between(0, ranges.len() as u32) as usize];
        WorkerSpec {
            id: format!("w{number:04}"),
            machine: String::new(),
            rack: format!("r{}", between(0, RACKS)),
            memory_bytes: u64::from(between(from, to)) * 1_000_000,
            steps: [1, 4, 16, 64].map(step).to_vec(),
        }
    };
    Problem {
        model: MODEL,
        workers: (0..workers).map(&mut worker).collect(),
        options: Options {
            min_kv_blocks: 64,
            max_kv_blocks: 4096,
            context_tokens: 2048,
            objective,
            ..Options::default()
        },
    }
}

/// The most tokens per second of all workers, if nothing held them back.
fn most(problem: &Problem) -> f64 {
    let layers = f64::from(problem.model.layers);
    let rate = |step: &StepTime| f64::from(step.rows) * 1e9 / (step.layer_ns as f64 * layers);
    let of = |worker: &WorkerSpec| worker.steps.iter().map(rate).fold(0.0, f64::max);
    problem.workers.iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_plan_gives_more_than_the_workers_could() {
        let all = measure_all(9, 2, &mut |_, _, _| {});
        assert_eq!(all.len(), 16);
        for planned in all {
            let free = planned.objective == "throughput";
            assert!(!free || planned.plans == 2, "{planned:?}");
            let Some(share) = planned.share else { continue };
            assert!(share.min > 0.0 && share.max <= 1.0, "{planned:?}");
        }
    }
}
