//! The deployment that was found, or why there is none.

use std::ops::Range;

use super::super::costs::ONLY;
use super::super::grouping::{Grouping, Members, Wanted};
use super::super::pipeline::{Cut, Pace, pace, stages_ns};
use super::super::{Assignment, Deployment, PlanError, Prediction, Stage};
use super::moves::stays;
use super::{Origin, Planned, Search, total};

impl Search<'_> {
    pub(super) fn deployment(&self, mut planned: Vec<Planned>) -> Deployment {
        planned.sort_by_key(|planned| {
            let old = match planned.origin {
                Origin::Kept(index) | Origin::Moved(index) => index,
                Origin::Fresh => usize::MAX,
            };
            (old, planned.cut.stages[0].0)
        });
        let continues = self.continues(&planned);
        let pipelines = planned.iter().zip(&continues).map(|(planned, &continues)| {
            let Planned { cut, pace, .. } = planned;
            let stage = |(w, layers): &(usize, Range<u32>)| Stage {
                worker: self.costs.workers[*w].spec.id.clone(),
                layers: layers.clone(),
            };
            Assignment {
                stages: cut.stages.iter().map(stage).collect(),
                kv_blocks: cut.kv_blocks,
                step_rows: pace.steps.rows,
                bottleneck_ns: pace.bottleneck_ns,
                token_ns: pace.token_ns,
                predicted_tokens_per_s: pace.tokens_per_s(),
                continues,
                reason: self.pipeline_reason(planned),
            }
        });
        let whole = self.incumbents().iter().filter_map(|incumbent| self.whole(incumbent));
        let whole = whole.filter_map(|cut| Some((pace(self.costs, &cut)?, cut)));
        let (mut incumbent_tokens_per_s, mut incumbent_workers) = (0.0, Vec::new());
        for (pace, cut) in whole {
            incumbent_tokens_per_s += pace.tokens_per_s();
            incumbent_workers.extend(self.predictions(&cut, &pace));
        }
        Deployment {
            pipelines: pipelines.collect(),
            left_out: self.left_out(&planned),
            tokens_per_s: total(&planned),
            incumbent_tokens_per_s,
            incumbent_workers,
            layers_moved: planned.iter().map(|planned| self.layers_moved(&planned.cut)).sum(),
            reason: self.reason(&planned),
            workers: planned.iter().flat_map(|p| self.predictions(&p.cut, &p.pace)).collect(),
        }
    }

    fn predictions(&self, cut: &Cut, pace: &Pace) -> Vec<Prediction> {
        let times = stages_ns(self.costs, cut, pace.steps);
        let of = |((w, layers), ns): (&(usize, Range<u32>), u64)| {
            let busy = ns as f64 * f64::from(pace.steps.in_flight) / pace.token_ns as f64;
            let share = f64::from(layers.end - layers.start) / f64::from(self.costs.model.layers);
            Prediction {
                worker: self.costs.workers[*w].spec.id.clone(),
                layers: layers.clone(),
                busy,
                tokens_per_s: pace.tokens_per_s() * share,
            }
        };
        cut.stages.iter().zip(times).map(of).collect()
    }

    /// For each pipeline the incumbent that most of its layers are left from. No two pipelines go on
    /// from the same.
    fn continues(&self, planned: &[Planned]) -> Vec<Option<usize>> {
        let mut overlaps = Vec::new();
        for (pipeline, planned) in planned.iter().enumerate() {
            for (index, incumbent) in self.incumbents().iter().enumerate() {
                let same = |(w, layers): &(usize, Range<u32>)| -> usize {
                    let id = &self.costs.workers[*w].spec.id;
                    let old = incumbent.stages.iter().filter(|stage| stage.worker == *id);
                    old.map(|stage| stays(&stage.layers, layers.clone())).sum()
                };
                let layers: usize = planned.cut.stages.iter().map(same).sum();
                if layers > 0 {
                    overlaps.push((std::cmp::Reverse(layers), index, pipeline));
                }
            }
        }
        overlaps.sort_unstable();
        let mut continues = vec![None; planned.len()];
        for (_, index, pipeline) in overlaps {
            if continues[pipeline].is_none() && !continues.contains(&Some(index)) {
                continues[pipeline] = Some(index);
            }
        }
        continues
    }

    /// Why there is no plan at all.
    pub(super) fn why_none(&self) -> PlanError {
        let costs = self.costs;
        let model = costs.model;
        let all: Members = (0..costs.workers.len()).collect();
        let any = Wanted { stages: self.wanted.stages, pipelines: None };
        if let Some(pipelines) = self.wanted.pipelines
            && let Some(possible) = Grouping::new(costs, any, self.single_limit_ns).best(&all)
        {
            return PlanError::TooManyPipelines { pipelines, possible: possible.len() as u32 };
        }
        if costs.token_limit_ns < u64::MAX {
            let free = costs.without_limit(self.problem);
            if let Some((least, _)) = Grouping::new(&free, any, u64::MAX).quickest(&all) {
                return PlanError::TooSlow {
                    limit_ms: costs.token_limit_ns / 1_000_000,
                    least_ms: least.div_ceil(1_000_000),
                };
            }
        }
        let kv_blocks = costs.min_kv_blocks;
        let layer_bytes = model
            .kv_block_layer_bytes
            .saturating_mul(u64::from(kv_blocks))
            .saturating_add(model.layer_bytes);
        let memory = costs.workers.iter().map(|worker| worker.spec.memory_bytes);
        PlanError::DoesNotFit {
            memory_bytes: memory.fold(0, u64::saturating_add),
            needed_bytes: layer_bytes
                .saturating_mul(costs.layers())
                .saturating_add(costs.fixed_bytes(ONLY)),
            kv_blocks,
        }
    }
}
