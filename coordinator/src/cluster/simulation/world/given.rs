//! What worlds are made of: options, records of workers, and a planner that is easily foreseen.

use std::collections::BTreeSet;
use std::time::Duration;

use proto::ids::{Incarnation, KnownAnswer, ModelId, NumericsClass, PipelineId};
use proto::plan::{KvType, StepTime, WorkerModel, WorkerRecord};

use super::super::super::Options;
use crate::planner::{
    Assignment, Deployment, Incumbent, LeftOut, ModelCosts, Objective, PlanError, Prediction,
    Problem, Stage,
};

pub(in crate::cluster) const MODEL: ModelId = ModelId([4; 32]);
pub(in crate::cluster) const ANSWER: KnownAnswer = KnownAnswer([5; 32]);

pub(in crate::cluster) fn options(stages: Option<u32>) -> Options {
    Options {
        cluster_id: "c".to_owned(),
        last_pipeline: PipelineId(0),
        model: MODEL,
        costs: ModelCosts {
            layers: 12,
            layer_bytes: 100,
            embedding_bytes: 50,
            head_bytes: 50,
            tied_head: true,
            kv_block_layer_bytes: 1,
        },
        kv_type: KvType::F16,
        stages,
        pipelines: None,
        min_kv_blocks: 4,
        max_kv_blocks: 64,
        context_tokens: 64,
        objective: Objective::default(),
        max_step_tokens: 64,
        settle: Duration::from_secs(1),
        hold_down: Duration::from_secs(10),
        min_gain_percent: 5,
        drift_time: Duration::from_secs(60),
        allow_stub_compute: false,
    }
}

pub(in crate::cluster) fn class() -> NumericsClass {
    NumericsClass::form(MODEL, KvType::F16, 1, ANSWER)
}

pub(in crate::cluster) fn record(id: usize, incarnation: u8) -> WorkerRecord {
    WorkerRecord {
        id: format!("w{id}"),
        incarnation: Incarnation([incarnation; 16]),
        address: format!("host-{id}:1"),
        memory_bytes: 10_000,
        kernel_revision: 1,
        known_answer: ANSWER,
        models: vec![WorkerModel {
            id: MODEL,
            steps: vec![
                StepTime { rows: 1, layer_ns: 10, head_ns: 10 },
                StepTime { rows: 16, layer_ns: 100, head_ns: 100 },
            ],
        }],
        ..WorkerRecord::default()
    }
}

/// A planner of few ideas: incumbents stay, the others are cut into equal pipelines in the order of
/// their ids. A fleet of three, or six, is laid out anew.
pub(in crate::cluster) fn place(problem: &Problem) -> Result<Deployment, PlanError> {
    let options = &problem.options;
    let mut workers: Vec<&String> = problem.workers.iter().map(|worker| &worker.id).collect();
    workers.sort();
    let stages = options.stages.unwrap_or(1) as usize;
    if workers.is_empty() {
        return Err(PlanError::NoWorkers);
    }
    if stages > workers.len() {
        let (stages, workers) = (stages as u32, workers.len() as u32);
        return Err(PlanError::MoreStagesThanWorkers { stages, workers });
    }
    let all = workers.len();
    let is_here = |incumbent: &Incumbent| {
        incumbent.stages.iter().all(|stage| workers.contains(&&stage.worker))
    };
    let here: Vec<_> =
        (0..).zip(&options.incumbent).filter(|(_, incumbent)| is_here(incumbent)).collect();
    let rate = |workers: usize| 100.0 * workers as f64;
    let incumbent_tokens_per_s =
        rate(here.iter().map(|(_, incumbent)| incumbent.stages.len()).sum::<usize>());
    let mut groups: Vec<(Vec<Stage>, Option<usize>)> = Vec::new();
    if !all.is_multiple_of(3) {
        for (index, incumbent) in here {
            let mine: BTreeSet<_> = incumbent.stages.iter().map(|stage| &stage.worker).collect();
            if mine.iter().all(|worker| workers.contains(worker)) {
                workers.retain(|worker| !mine.contains(worker));
                groups.push((incumbent.stages.clone(), Some(index)));
            }
        }
    }
    // With six machines and no wish two of them share the layers.
    let stages = if options.stages.is_none() && all == 6 { 2 } else { stages };
    let layers = problem.model.layers as usize;
    for chunk in workers.chunks(stages).filter(|chunk| chunk.len() == stages) {
        let cut = |i: usize| (layers * i / stages) as u32;
        let cut_stages: Vec<_> = (0..stages)
            .map(|i| Stage { worker: chunk[i].clone(), layers: cut(i)..cut(i + 1) })
            .collect();
        let continues = options.incumbent.iter().enumerate().find_map(|(index, incumbent)| {
            let shares = incumbent.stages.iter().any(|stage| *chunk[0] == stage.worker);
            let is_free = groups.iter().all(|group| group.1 != Some(index));
            (shares && is_free).then_some(index)
        });
        groups.push((cut_stages, continues));
    }
    if let Some(count) = options.pipelines {
        if groups.len() < count as usize {
            let (pipelines, stages, workers) = (count, stages as u32, all as u32);
            return Err(PlanError::MorePipelinesThanWorkers { pipelines, stages, workers });
        }
        groups.truncate(count as usize);
    }
    let used: BTreeSet<_> =
        groups.iter().flat_map(|group| &group.0).map(|stage| stage.worker.clone()).collect();
    let pipelines: Vec<_> = groups
        .into_iter()
        .map(|(stages, continues)| Assignment {
            predicted_tokens_per_s: rate(stages.len()),
            stages,
            kv_blocks: 64,
            step_rows: 16,
            bottleneck_ns: 1,
            token_ns: 1,
            continues,
            reason: String::new(),
        })
        .collect();
    let predictions = pipelines.iter().flat_map(|pipeline: &Assignment| {
        pipeline.stages.iter().map(|stage| Prediction {
            worker: stage.worker.clone(),
            layers: stage.layers.clone(),
            busy: 0.5,
            tokens_per_s: 10.0,
        })
    });
    let predictions = predictions.collect();
    Ok(Deployment {
        pipelines,
        left_out: problem
            .workers
            .iter()
            .filter(|worker| !used.contains(&worker.id))
            .map(|worker| LeftOut { worker: worker.id.clone(), reason: "spare".to_owned() })
            .collect(),
        tokens_per_s: rate(used.len()),
        incumbent_tokens_per_s,
        layers_moved: 0,
        reason: format!("{} of {all} workers", used.len()),
        workers: predictions,
        incumbent_workers: Vec::new(),
    })
}
