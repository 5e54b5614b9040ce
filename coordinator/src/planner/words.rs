//! Why a deployment is as it is, for people.

use super::costs::Place;
use super::group::Care;
use super::grouping::{Grouping, Members};
use super::pipeline::stages_ns;
use super::search::{KEEP_PERCENT, Origin, Planned, Search};
use super::{LeftOut, Objective};

impl Search<'_> {
    /// How a pipeline came about, and what holds it up.
    pub(super) fn pipeline_reason(&self, planned: &Planned) -> String {
        let Planned { cut, pace, origin } = planned;
        let costs = self.costs;
        let origin = match origin {
            Origin::Kept(_) => "stays as it was",
            Origin::Moved(_) => "few layers move",
            Origin::Fresh if cut.stages.len() == 1 => "holds the whole model",
            Origin::Fresh => "as fast as these workers can be",
        };
        let times = stages_ns(costs, cut, pace.steps);
        let slowest = (0..times.len()).rev().max_by_key(|&i| times[i]).unwrap_or(0);
        let (w, layers) = &cut.stages[slowest];
        let place = Place::of(slowest, times.len());
        let head = match (place.first && place.last, costs.model.tied_head) {
            (true, _) => " and the head",
            (false, true) if place.first || place.last => " and half of the head",
            (false, false) if place.last => " and the head",
            _ => "",
        };
        format!(
            "{origin}; the slowest stage is {} with layers {}..{}{head}, {:.3} ms for {} rows; KV for {} \
             tokens",
            costs.workers[*w].spec.id,
            layers.start,
            layers.end,
            pace.bottleneck_ns as f64 / 1e6,
            pace.steps.rows,
            u64::from(cut.kv_blocks) * u64::from(proto::BLOCK_TOKENS),
        )
    }

    /// The whole deployment in a sentence.
    pub(super) fn reason(&self, planned: &[Planned]) -> String {
        let stages: usize = planned.iter().map(|planned| planned.cut.stages.len()).sum();
        let replicas = planned.iter().filter(|planned| planned.cut.stages.len() == 1).count();
        let kept =
            planned.iter().filter(|planned| matches!(planned.origin, Origin::Kept(_))).count();
        let total: f64 = planned.iter().map(|planned| planned.pace.tokens_per_s()).sum();
        let mut parts = Vec::new();
        if replicas > 0 {
            parts.push(count(replicas, "replica", "replicas"));
        }
        if planned.len() > replicas {
            let long = planned.len() - replicas;
            let most = planned.iter().map(|planned| planned.cut.stages.len()).max().unwrap_or(0);
            let pipelines = count(long, "pipeline", "pipelines");
            let least = planned
                .iter()
                .map(|planned| planned.cut.stages.len())
                .filter(|&stages| stages > 1)
                .min();
            parts.push(match least {
                Some(least) if least < most => format!("{pipelines} of {least} to {most} stages"),
                _ => format!("{pipelines} of {most} stages"),
            });
        }
        let what = match self.problem.options.objective {
            Objective::Throughput { token_time: None } => "the most tokens per second".to_owned(),
            Objective::Throughput { token_time: Some(limit) } => format!(
                "the most tokens per second with at most {} ms for a token of one answer",
                limit.as_millis()
            ),
            Objective::Latency => "the least time per token for a single sequence".to_owned(),
        };
        let mut text = format!(
            "{} on {stages} of {}, {total:.1} tokens/s, for {what}",
            parts.join(" and "),
            count(self.problem.workers.len(), "worker", "workers"),
        );
        if kept > 0 {
            text += &format!(
                "; {} as before: at most {KEEP_PERCENT} % slower than the best",
                count(kept, "stays", "stay")
            );
        }
        text
    }

    /// Who is in no pipeline, and why.
    pub(super) fn left_out(&self, planned: &[Planned]) -> Vec<LeftOut> {
        let mut ids: Vec<_> = self.problem.workers.iter().map(|worker| &worker.id).collect();
        ids.sort_unstable();
        let is_in = |w: usize| planned.iter().any(|planned| planned.cut.workers().any(|x| x == w));
        let mut left_out = Vec::new();
        for id in ids {
            let reason = match self.costs.find(id) {
                Some(w) if is_in(w) => continue,
                Some(w) => self.why_left_out(w, planned),
                None => "its speed is not known".to_owned(),
            };
            left_out.push(LeftOut { worker: id.clone(), reason });
        }
        left_out
    }

    fn why_left_out(&self, w: usize, planned: &[Planned]) -> String {
        let costs = self.costs;
        let spec = costs.workers[w].spec;
        if costs.room(w, super::costs::MIDDLE, costs.min_kv_blocks) == 0 {
            return format!(
                "its memory of {} bytes does not hold a layer and its part of {} KV blocks",
                spec.memory_bytes, costs.min_kv_blocks
            );
        }
        if let Some(pipelines) = self.problem.options.pipelines
            && let Some(stages) = self.problem.options.stages
        {
            return format!("{pipelines} pipelines of {stages} stages were asked for");
        }
        // What the pipelines would give with it, at best.
        let any = super::grouping::Wanted { stages: None, pipelines: None };
        let grouping = Grouping::new(costs, any, u64::MAX);
        let with: Option<(f64, f64)> = planned
            .iter()
            .filter_map(|planned| {
                let mut members: Members = planned.cut.workers().collect();
                members.push(w);
                members.sort_unstable();
                let offer = grouping.offer(&members, Care::Coarse)?;
                Some((offer.tokens_per_s(), planned.pace.tokens_per_s()))
            })
            .max_by(|a, b| (a.0 - a.1).total_cmp(&(b.0 - b.1)));
        match (with, self.problem.options.stages) {
            (_, Some(stages)) => format!("{stages} stages in every pipeline were asked for"),
            (Some((with, without)), None) if with <= without => format!(
                "it would hold the rest back: {with:.1} tokens/s with it, {without:.1} without"
            ),
            (Some((with, without)), None) => format!(
                "it would bring too little: {with:.1} tokens/s with it, {without:.1} without"
            ),
            (None, None) => {
                "alone it does not hold the model, and no pipeline has a place for it".to_owned()
            }
        }
    }
}

fn count(number: usize, one: &str, more: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { more })
}
