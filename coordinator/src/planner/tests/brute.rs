//! The best deployment of a few workers by looking at everything: every partition, every order of the
//! stages, every cut of the layers, every kind of steps. Shares no code with the planner.

use super::*;

/// What a pipeline of these stages does best.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Judged {
    pub(super) tokens_per_s: f64,
    /// Of a single sequence.
    pub(super) single_ns: u64,
}

fn at(spec: &WorkerSpec, rows: u32) -> (u64, u64) {
    // Tests measure every number of rows.
    let step = spec.steps.iter().find(|step| step.rows == rows).unwrap();
    (step.layer_ns, step.head_ns)
}

fn hops_ns(cut: &[(&WorkerSpec, u32)]) -> u64 {
    let hop = |pair: &[(&WorkerSpec, u32)]| match (pair[0].0, pair[1].0) {
        (a, b) if a.rack != b.rack => 400_000,
        (a, b) if a.machine != b.machine || a.machine.is_empty() => 200_000,
        _ => 100_000,
    };
    cut.windows(2).map(hop).sum::<u64>() + 400_000
}

fn stages_ns(
    model: &ModelCosts,
    cut: &[(&WorkerSpec, u32)],
    rows: u32,
    in_flight: u32,
) -> Vec<u64> {
    let stage = |(i, &(spec, layers)): (usize, &(&WorkerSpec, u32))| {
        let (layer_ns, head_ns) = at(spec, rows);
        let (first, last) = (i == 0, i + 1 == cut.len());
        let head_ns = match (first, last) {
            (true, true) => head_ns,
            (true, false) if model.tied_head && in_flight > 1 => head_ns / 2,
            (false, true) if model.tied_head && in_flight > 1 => head_ns - head_ns / 2,
            (_, last) => head_ns * u64::from(last),
        };
        layer_ns * u64::from(layers) + head_ns
    };
    cut.iter().enumerate().map(stage).collect()
}

/// KV blocks of a cut; `None` if a stage does not fit.
pub(super) fn blocks(problem: &Problem, cut: &[(&WorkerSpec, u32)]) -> Option<u32> {
    let Problem { model, options, .. } = problem;
    let mut blocks = options.max_kv_blocks;
    for (i, &(spec, layers)) in cut.iter().enumerate() {
        let (first, last) = (i == 0, i + 1 == cut.len());
        let embedding = model.embedding_bytes * u64::from(first);
        let head = model.head_bytes * u64::from(last || (first && model.tied_head));
        let ends = if model.tied_head { embedding.max(head) } else { embedding + head };
        let weights = u64::from(layers) * model.layer_bytes + ends;
        let room = spec.memory_bytes.checked_sub(weights)?;
        blocks = blocks
            .min((room / (u64::from(layers) * model.kv_block_layer_bytes)).try_into().unwrap());
    }
    (blocks >= options.min_kv_blocks.max(1)).then_some(blocks)
}

/// The best pace of a cut that holds `blocks`.
pub(super) fn judge(problem: &Problem, cut: &[(&WorkerSpec, u32)], blocks: u32) -> Option<Judged> {
    let Problem { model, options, .. } = problem;
    let limit_ns = match options.objective {
        Objective::Throughput { token_time: Some(limit) } => limit.as_nanos() as u64,
        _ => u64::MAX,
    };
    let stages = cut.len() as u32;
    let sequences = (blocks / options.context_tokens.div_ceil(32).max(1)).max(1);
    let most_rows = cut.iter().map(|(spec, _)| spec.steps.len() as u32).min().unwrap();
    let loop_of = |times: &[u64]| times.iter().sum::<u64>() + hops_ns(cut);
    let mut best: Option<f64> = None;
    for rows in 1..=most_rows.min(sequences) {
        let one = stages_ns(model, cut, rows, 1);
        let more = stages_ns(model, cut, rows, 2);
        for in_flight in 1..=(3 * stages).div_ceil(2) + 1 {
            let times = if in_flight == 1 { &one } else { &more };
            let token_ns = loop_of(times).max(u64::from(in_flight) * times.iter().max().unwrap());
            if rows * in_flight <= sequences && token_ns <= limit_ns {
                let rate = f64::from(rows * in_flight) * 1e9 / token_ns as f64;
                best = Some(best.map_or(rate, |best| best.max(rate)));
            }
        }
    }
    let single_ns = loop_of(&stages_ns(model, cut, 1, 1));
    Some(Judged { tokens_per_s: best?, single_ns })
}

/// What every cut of these workers, all taking part, does.
fn cuts(problem: &Problem, members: &[&WorkerSpec]) -> Vec<Judged> {
    fn walk<'a>(
        problem: &Problem,
        members: &[&'a WorkerSpec],
        cut: &mut Vec<(&'a WorkerSpec, u32)>,
        left: u32,
        found: &mut Vec<Judged>,
    ) {
        if cut.len() == members.len() {
            if left == 0
                && let Some(blocks) = blocks(problem, cut)
            {
                found.extend(judge(problem, cut, blocks));
            }
            return;
        }
        for &w in members {
            if cut.iter().any(|(other, _)| other.id == w.id) {
                continue;
            }
            let after = (members.len() - cut.len() - 1) as u32;
            for layers in 1..=left.saturating_sub(after) {
                cut.push((w, layers));
                walk(problem, members, cut, left - layers, found);
                cut.pop();
            }
        }
    }
    let mut found = Vec::new();
    walk(problem, members, &mut Vec::new(), problem.model.layers, &mut found);
    found
}

/// The most tokens per second and, for latency, the least time of a single sequence; `None` if there
/// is no deployment.
pub(super) fn best(problem: &Problem) -> Option<(f64, u64)> {
    let count = problem.workers.len();
    let options = &problem.options;
    let sets: Vec<Vec<Judged>> = (0..1_usize << count)
        .map(|set| {
            let members: Vec<_> =
                (0..count).filter(|i| set >> i & 1 == 1).map(|i| &problem.workers[i]).collect();
            let stages = members.len() as u32;
            let is_wanted = (1..=problem.model.layers).contains(&stages)
                && options.stages.is_none_or(|wanted| wanted == stages);
            if is_wanted { cuts(problem, &members) } else { Vec::new() }
        })
        .collect();
    let least = sets.iter().flatten().map(|judged| judged.single_ns).min()?;
    let limit = match options.objective {
        Objective::Latency => least + least / 100,
        Objective::Throughput { .. } => u64::MAX,
    };
    let worth: Vec<Option<f64>> = sets
        .iter()
        .map(|all| {
            let quick = all.iter().filter(|judged| judged.single_ns <= limit);
            quick.map(|judged| judged.tokens_per_s).max_by(f64::total_cmp)
        })
        .collect();
    fn walk(worth: &[Option<f64>], set: usize, left: Option<u32>) -> Option<f64> {
        if set == 0 {
            return left.is_none_or(|left| left == 0).then_some(0.0);
        }
        let first = set & set.wrapping_neg();
        let mut best = walk(worth, set ^ first, left);
        let mut part = set;
        while part > 0 {
            if part & first > 0
                && left != Some(0)
                && let Some(one) = worth[part]
                && let Some(rest) = walk(worth, set ^ part, left.map(|left| left - 1))
            {
                best = Some(best.map_or(one + rest, |best| best.max(one + rest)));
            }
            part = (part - 1) & set;
        }
        best
    }
    let most = walk(&worth, (1 << count) - 1, options.pipelines)?;
    (most > 0.0).then_some((most, least))
}
