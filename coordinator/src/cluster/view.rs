//! What people see of the cluster.

use proto::operator::{DrainState, Drained};
use proto::plan::{PipelinePlan, StagePlan};
use proto::status::{PipelineStatus, PlanStatus, StageStatus, WaitCause, Waiting, WorkerStatus};

use super::fleet::Member;
use super::pipelines::Pipeline;
use super::transition::Phase;
use super::types::{Availability, ClusterView};
use super::{Cluster, STARTUP, waits};
use crate::tick::Tick;

impl Cluster {
    /// What people see.
    pub fn view(&self) -> ClusterView {
        let now = self.now;
        let class = self.serving().next().map(|pipeline| pipeline.placed.class());
        ClusterView {
            term: self.ledger.term(),
            class,
            serving: class.is_some(),
            workers: self.fleet.iter().map(|member| self.worker(now, member)).collect(),
            plan: self.plan_status(),
        }
    }

    /// Whether this coordinator decides.
    pub fn leads(&self) -> bool {
        self.ledger.term().is_some()
    }

    /// Whether it does, and knows what there is to decide about.
    pub fn takes_orders(&self) -> bool {
        let knows_plan = self.ledger.ready().is_some() || self.ledger.is_writing();
        self.leads() && self.listed && knows_plan
    }

    /// How far the drain of a worker is; `None` if nobody of this name is known.
    pub fn drained(&self, worker: &str) -> Option<Drained> {
        let member = self.fleet.get(worker)?;
        let state = match (member.is_draining(), self.stages_of(worker).next()) {
            (false, _) => DrainState::InUse,
            (true, Some(_)) => DrainState::Moving,
            (true, None) => DrainState::Ending,
        };
        let detail = self.worker(self.now, member).detail;
        Some(Drained { incarnation: member.record.incarnation, state, detail })
    }

    fn serving(&self) -> impl Iterator<Item = &Pipeline> {
        self.pipelines.values().filter(|pipeline| pipeline.serves())
    }

    /// Whether requests are served, and if not, whether they may wait and what for.
    pub fn availability(&self) -> Availability {
        if self.serving().next().is_some() {
            return Availability::Serving;
        }
        let starting = |detail: String| Availability::Soon(waits(WaitCause::Starting, detail));
        if let Some(detail) = self.ledger.unusable() {
            return Availability::No(waits(WaitCause::Registry, detail));
        }
        if let Some(detail) = self.what_starts() {
            return starting(detail);
        }
        if self.ledger.term().is_none() {
            let waiting = waits(WaitCause::Leadership, "this coordinator does not lead");
            return match self.ledger.has_led() || self.now >= Tick(STARTUP) {
                true => Availability::No(waiting),
                false => starting("the coordinator is starting".to_owned()),
            };
        }
        if self.ledger.ready().is_none() {
            return match self.ledger.read_error() {
                Some(detail) => Availability::No(waits(WaitCause::Registry, detail)),
                None if self.ledger.is_writing() => {
                    starting("the plan is being written".to_owned())
                }
                None => starting("the plan is being read".to_owned()),
            };
        }
        if !self.listed {
            return starting("the workers are being listed".to_owned());
        }
        match self.infeasible() {
            Some(waiting) if !self.planning.is_asking() && !self.expects_somebody() => {
                Availability::No(waiting.clone())
            }
            Some(waiting) if self.expects_somebody() => Availability::Soon(waiting.clone()),
            _ => Availability::Soon(self.why_not_planned()),
        }
    }

    /// Why a request waits that no pipeline takes: nothing serves, or what could take it stands still for
    /// a change. `None` if nothing is known of that.
    pub fn why_held(&self) -> Option<Waiting> {
        if let Some(waiting) = self.availability().waiting() {
            return Some(waiting.clone());
        }
        self.what_starts().map(|detail| waits(WaitCause::Starting, detail))
    }

    /// Which pipelines are on their way to serve.
    fn what_starts(&self) -> Option<String> {
        let starting = self.switches.iter().flat_map(|switch| &switch.new);
        let names: Vec<_> = starting.map(|new| new.placed.at().to_string()).collect();
        if names.is_empty() {
            return None;
        }
        let mut detail = match &names[..] {
            [one] => format!("pipeline {one} is being prepared"),
            several => format!("pipelines {} are being prepared", several.join(", ")),
        };
        for note in self.switches.iter().flat_map(|switch| &switch.notes) {
            detail.push_str("; ");
            detail.push_str(note);
        }
        Some(detail)
    }

    fn plan_status(&self) -> PlanStatus {
        let serving = self.pipelines.values().map(|p| self.status(&p.placed.plan, p.state()));
        let starting = self.switches.iter().flat_map(|switch| {
            let state = match switch.phase {
                Phase::Preparing | Phase::Pausing => "preparing",
                Phase::Activating => "activating",
            };
            switch.new.iter().map(move |new| self.status(&new.placed.plan, state))
        });
        let pipelines: Vec<_> = serving.chain(starting).collect();
        let mut reason = match self.availability() {
            Availability::Serving => self.planning.reason.clone(),
            Availability::Soon(waiting) | Availability::No(waiting) => waiting.detail,
        };
        if self.serving().next().is_some() {
            // Why it is not as it should be.
            let note = self.what_starts();
            let stays = self.infeasible().filter(|_| self.switches.is_empty());
            let stays =
                stays.map(|waiting: &Waiting| format!("it stays as it is: {}", waiting.detail));
            for more in note.into_iter().chain(stays) {
                if !reason.is_empty() {
                    reason.push_str("; ");
                }
                reason.push_str(&more);
            }
        }
        PlanStatus { pipelines, reason }
    }

    fn worker(&self, now: Tick, member: &Member) -> WorkerStatus {
        let record = &member.record;
        let is_stage = self.stages_of(&record.id).next().is_some();
        let (state, detail) = if member.is_draining() {
            let detail = match (is_stage, self.infeasible()) {
                (true, Some(waiting)) => format!("it still has a stage: {}", waiting.detail),
                (true, None) => "it still has a stage".to_owned(),
                (false, _) => member.end().unwrap_or_default(),
            };
            ("draining", detail)
        } else if let Some(why) = &member.suspect {
            ("suspect", why.clone())
        } else if is_stage && !member.has_lease {
            ("active", "its lease is gone, its data path is watched".to_owned())
        } else if is_stage {
            ("active", String::new())
        } else if let Some(why) = self.fleet.kept_out(now, &record.id) {
            ("suspect", why.to_owned())
        } else if let Some(why) = self.fleet.unfit(record, self.options.model) {
            ("unfit", why)
        } else {
            let why = self.planning.left_out.get(&record.id);
            ("standby", why.cloned().unwrap_or_default())
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
            rack: self.fleet.rack(member),
        }
    }

    fn status(&self, plan: &PipelinePlan, state: &str) -> PipelineStatus {
        let stage = |stage: &StagePlan| {
            let predicted = self.predicted(stage);
            StageStatus {
                worker: stage.worker.clone(),
                address: stage.address.clone(),
                layers: [stage.layers.start, stage.layers.end],
                predicted_busy: predicted.map_or(0.0, |predicted| predicted.busy),
                predicted_tokens_per_s: predicted.map_or(0.0, |predicted| predicted.tokens_per_s),
                ..StageStatus::default()
            }
        };
        PipelineStatus {
            id: plan.id.0,
            epoch: plan.epoch.0,
            state: state.to_owned(),
            stages: plan.stages.iter().map(stage).collect(),
            predicted_tokens_per_s: plan.predicted_tokens_per_s,
            ..PipelineStatus::default()
        }
    }
}
