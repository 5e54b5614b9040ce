//! What the cluster hears of workers: their records, their leases, what they answer, and that one
//! is lost.

use std::collections::BTreeSet;

use proto::ids::{Incarnation, PipelineRef};
use proto::plan::WorkerRecord;
use proto::status::WaitCause;

use super::ledger::Ledger;
use super::observed::Shape;
use super::transition::{self, Phase, Switch};
use super::types::{Action, Held, Options};
use super::{Cluster, Loss, waits};
use crate::tick::Tick;

impl Cluster {
    pub(super) fn reset(
        &mut self,
        now: Tick,
        records: Vec<WorkerRecord>,
        actions: &mut Vec<Action>,
    ) {
        self.listed = true;
        let here: BTreeSet<_> = records.iter().map(|record| record.id.clone()).collect();
        for gone in self.fleet.listed_except(&here) {
            self.worker_gone(now, &gone, actions);
        }
        for record in records {
            self.worker_put(now, record, actions);
        }
    }

    pub(super) fn worker_put(
        &mut self,
        now: Tick,
        record: WorkerRecord,
        actions: &mut Vec<Action>,
    ) {
        let (id, incarnation) = (record.id.clone(), record.incarnation);
        if self.fleet.put(now, record) {
            self.planning.worker_came();
            // The process that held a stage is no more, whatever its streams say.
            if self.stages_of(&id).any(|stage| stage.incarnation != incarnation) {
                self.worker_lost(now, &id, "it was started again", actions);
            }
        }
        if self.fleet.ends(&id) {
            self.drain_starting(now, &id, actions);
        }
    }

    pub(super) fn worker_gone(&mut self, now: Tick, id: &str, actions: &mut Vec<Action>) {
        let alarm = self.fleet.gone(now, id);
        actions.extend(alarm.map(|text| Action::Alarm { text }));
    }

    /// A worker that is to get a stage takes nothing new any more.
    pub(super) fn drain_starting(&mut self, now: Tick, id: &str, actions: &mut Vec<Action>) {
        let prepares = |switch: &Switch| switch.phase == Phase::Preparing && switch.starts_at(id);
        if let Some(index) = self.switches.iter().position(prepares) {
            let why = waits(WaitCause::Lost, format!("worker {id} is draining"));
            self.abandon(now, index, why, actions);
        }
    }

    pub(super) fn described(
        &mut self,
        now: Tick,
        worker: &str,
        incarnation: Incarnation,
        held: &[Held],
        actions: &mut Vec<Action>,
    ) {
        if !self.fleet.answered(now, worker, incarnation) {
            return self.probe_failed(
                now,
                worker,
                "another process answers at its address",
                actions,
            );
        }
        for pipeline in self.pipelines.values_mut() {
            pipeline.answered(now, worker);
        }
        let intended = self.intended();
        let Self { ledger, options, observed, .. } = self;
        let shape_of = |at: PipelineRef, worker: &str| planned_shape(ledger, options, at, worker);
        observed.described(worker, incarnation, held, &intended, shape_of);
    }

    /// A probe failed. Alone that proves nothing: a second signal must agree.
    pub(super) fn probe_failed(
        &mut self,
        now: Tick,
        worker: &str,
        detail: &str,
        actions: &mut Vec<Action>,
    ) {
        let lease_is_gone = self.fleet.lease_is_gone(worker) && !self.fleet.is_frozen();
        let pipelines = self.pipelines.values();
        let mut judged =
            pipelines.filter_map(|pipeline| pipeline.judge_silence(worker, detail, lease_is_gone));
        let starts = || self.switches.iter().any(|switch| switch.starts_at(worker));
        let why = judged.next().or_else(|| {
            (lease_is_gone && starts())
                .then(|| format!("its lease is gone and it does not answer ({detail})"))
        });
        if let Some(why) = why {
            self.worker_lost(now, worker, &why, actions);
        }
    }

    /// A stage gave what the model cannot give. Its pipeline ends, and others are planned with first.
    pub(super) fn computes_wrongly(
        &mut self,
        now: Tick,
        at: PipelineRef,
        stage: u32,
        detail: &str,
        actions: &mut Vec<Action>,
    ) {
        let Some(pipeline) = self.pipeline(at).filter(|pipeline| pipeline.serves()) else { return };
        let Some(stage) = pipeline.placed.plan.stages.get(stage as usize).cloned() else { return };
        let why = format!("it gave what the model cannot give: {detail}");
        let reason = format!("worker {} failed: {why}", stage.worker);
        let alarm = self.fleet.evicted(now, &stage, Loss::Broken, &why);
        actions.extend(alarm.map(|text| Action::Alarm { text }));
        self.fail_pipeline(now, at.id, Loss::Broken, reason, actions);
    }

    /// A worker's process is dead: so are the pipelines that it had a stage of.
    pub(super) fn worker_lost(
        &mut self,
        now: Tick,
        worker: &str,
        why: &str,
        actions: &mut Vec<Action>,
    ) {
        let Some(stage) = self.stages_of(worker).next().cloned() else { return };
        let alarm = self.fleet.evicted(now, &stage, Loss::Gone, why);
        actions.extend(alarm.map(|text| Action::Alarm { text }));
        let needing = self.pipelines.values().filter(|pipeline| pipeline.needs(worker));
        let using = needing.filter_map(|pipeline| {
            let (_, stage) = pipeline.placed.stage_of(worker)?;
            let layers = stage.layers.clone();
            let reason = format!(
                "worker {worker} with layers {}..{} was lost: {why}",
                layers.start, layers.end
            );
            Some((pipeline.placed.plan.id, reason))
        });
        for (id, reason) in using.collect::<Vec<_>>() {
            self.fail_pipeline(now, id, Loss::Gone, reason, actions);
        }
        while let Some(index) = self.switches.iter().position(|switch| switch.starts_at(worker)) {
            let reason = format!("worker {worker} was lost: {why}");
            self.abandon(now, index, waits(WaitCause::Lost, reason), actions);
        }
    }
}

/// What the plan in the registry says that a worker holds.
pub(super) fn planned_shape(
    ledger: &Ledger,
    options: &Options,
    at: PipelineRef,
    worker: &str,
) -> Option<Shape> {
    let plan = ledger.pipeline(at)?;
    let stage = plan.stages.iter().position(|stage| stage.worker == worker)?;
    transition::shape(plan, stage as u32, options.costs.first_draws(plan.stages.len()))
}
