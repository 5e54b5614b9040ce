//! What people see of the cluster.

use proto::plan::PipelinePlan;
use proto::status::{PipelineStatus, PlanStatus, StageStatus, Waiting, WorkerStatus};

use super::members::Member;
use super::{Cluster, ClusterView, Phase};
use crate::tick::Tick;

impl Cluster {
    /// What people see.
    pub fn view(&self) -> ClusterView {
        let now = self.now;
        let class = match &self.phase {
            Phase::Active { placed, .. } => Some(placed.class),
            _ => None,
        };
        ClusterView {
            term: self.term,
            class,
            serving: class.is_some(),
            workers: self.members.iter().map(|member| self.worker(now, member)).collect(),
            plan: self.plan(),
        }
    }

    /// Why nothing is serving, for a 503; `None` while a pipeline is active.
    pub fn unavailable(&self) -> Option<&str> {
        match self.phase {
            Phase::Active { .. } => None,
            _ => Some(&self.waiting.detail),
        }
    }

    /// The same with its cause.
    pub fn waiting(&self) -> Option<&Waiting> {
        match self.phase {
            Phase::Active { .. } => None,
            _ => Some(&self.waiting),
        }
    }

    fn plan(&self) -> PlanStatus {
        let (placed, state) = match &self.phase {
            Phase::Nothing | Phase::Writing { .. } => {
                return PlanStatus { pipelines: Vec::new(), reason: self.waiting.detail.clone() };
            }
            Phase::Starting { placed, .. } => (placed, "preparing"),
            Phase::Active { placed, .. } => (placed, "active"),
        };
        let pipelines = vec![pipeline(&placed.plan, state)];
        PlanStatus { pipelines, reason: self.plan_reason.clone() }
    }

    fn worker(&self, now: Tick, member: &Member) -> WorkerStatus {
        let record = &member.record;
        let is_stage = self.stage_of(&record.id).is_some();
        let (state, detail) = if record.draining {
            ("draining", String::new())
        } else if let Some(why) = &member.suspect {
            ("suspect", why.clone())
        } else if is_stage && !member.has_lease {
            ("active", "its lease is gone, its data path is watched".to_owned())
        } else if is_stage {
            ("active", String::new())
        } else if let Some(why) = self.members.kept_out(now, &record.id) {
            ("suspect", why.to_owned())
        } else if let Some(why) = self.members.unfit(record, self.options.model) {
            ("unfit", why)
        } else {
            ("standby", String::new())
        };
        WorkerStatus {
            id: record.id.clone(),
            address: record.address.clone(),
            incarnation: record.incarnation.to_string(),
            state: state.to_owned(),
            isa: record.isa.clone(),
            threads: record.threads,
            memory_bytes: record.memory_bytes,
            detail,
        }
    }
}

fn pipeline(plan: &PipelinePlan, state: &str) -> PipelineStatus {
    let stage = |stage: &proto::plan::StagePlan| StageStatus {
        worker: stage.worker.clone(),
        address: stage.address.clone(),
        layers: [stage.layers.start, stage.layers.end],
        ..StageStatus::default()
    };
    PipelineStatus {
        id: plan.id.0,
        epoch: plan.epoch.0,
        state: state.to_owned(),
        stages: plan.stages.iter().map(stage).collect(),
        predicted_tokens_per_s: plan.predicted_tokens_per_s,
    }
}
