//! What people see of the cluster. In one go over all workers: a status of many is asked for often.

use std::collections::BTreeSet;

use proto::operator::{DrainState, Drained};
use proto::plan::{PipelinePlan, StagePlan};
use proto::status::{PipelineStatus, PlanStatus, StageStatus, WaitCause, Waiting, WorkerStatus};

use super::fleet::{Majority, Member};
use super::pipelines::Pipeline;
use super::transition::{Phase, Switch};
use super::types::{Availability, ClusterView};
use super::{Cluster, STARTUP, waits};
use crate::tick::Tick;

#[cfg(test)]
std::thread_local! {
    /// Members and stages that were looked at by this thread, to tell what a status costs.
    static LOOKED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// A member or a stage is looked at.
#[cfg(test)]
pub(super) fn looked() {
    LOOKED.with(|looked| looked.set(looked.get() + 1));
}

/// What is said of every worker, looked up once for all.
struct Looks<'a> {
    /// Who has a stage that is needed there, or is to get one.
    placed: BTreeSet<&'a str>,
    standard: Majority,
}

impl Cluster {
    /// What people see.
    pub fn view(&self) -> ClusterView {
        let looks = self.looks();
        let class = self.serving().next().map(|pipeline| pipeline.placed.class());
        ClusterView {
            term: self.ledger.term(),
            class,
            serving: class.is_some(),
            workers: self.fleet.iter().map(|member| self.worker(member, &looks)).collect(),
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
        let detail = self.worker(member, &self.looks()).detail;
        let written = self.ledger.plan().map_or(&[][..], |plan| &plan.drains);
        let kept = self.fleet.is_order_kept(worker, written);
        Some(Drained { kept, incarnation: member.record.incarnation, state, detail })
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

    fn looks(&self) -> Looks<'_> {
        let serving = self.pipelines.values().flat_map(|pipeline| {
            let workers = pipeline.placed.plan.stages.iter().map(|stage| &*stage.worker);
            workers.filter(|worker| !pipeline.released.contains(*worker))
        });
        let starting = self.switches.iter().flat_map(Switch::workers).map(String::as_str);
        let looks = |worker| {
            #[cfg(test)]
            looked();
            worker
        };
        Looks {
            placed: serving.chain(starting).map(looks).collect(),
            standard: self.fleet.standard(self.options.model),
        }
    }

    fn worker(&self, member: &Member, looks: &Looks<'_>) -> WorkerStatus {
        let (now, record) = (self.now, &member.record);
        let is_stage = looks.placed.contains(&*record.id);
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
        } else if let Some(why) = self.fleet.unfit(record, self.options.model, looks.standard) {
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

#[cfg(test)]
mod tests {
    use super::super::simulation::{options, place, record};
    use super::super::{Action, Event, Found};
    use super::*;
    use crate::cluster::Options;

    /// A cluster of so many workers that serve alone, as far as it is planned.
    fn planned(workers: usize) -> Cluster {
        let mut cluster = Cluster::new(Options { stages: Some(1), ..options(None) });
        let now = Tick::ZERO;
        let records = (0..workers).map(|i| record(i, 1)).collect();
        let mut actions = cluster.handle(now, Event::Reset(records));
        actions.extend(cluster.handle(now, Event::TermGained(proto::ids::Term(1))));
        while let Some(action) = actions.pop() {
            let event = match action {
                Action::ReadPlan { ticket } => Event::PlanRead { ticket, found: Found::Nothing },
                Action::Deploy { ticket, problem } => {
                    Event::Deployed { ticket, result: place(&problem) }
                }
                Action::WritePlan { ticket, .. } => Event::PlanWritten { ticket, revision: 2 },
                _ => continue,
            };
            actions.extend(cluster.handle(now, event));
        }
        cluster
    }

    #[test]
    fn a_status_looks_at_each_worker_a_few_times_however_many_there_are() {
        for workers in [10, 100, 1000] {
            let cluster = planned(workers);
            LOOKED.with(|looked| looked.set(0));
            let view = cluster.view();
            assert_eq!((view.workers.len(), view.plan.pipelines.len()), (workers, workers));
            let looked = LOOKED.with(std::cell::Cell::get);
            // Its vote for the class, and its stage.
            assert!((workers..=2 * workers).contains(&looked), "{looked} looks at {workers}");
        }
    }
}
