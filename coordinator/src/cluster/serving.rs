//! Watching the pipeline that serves: broken streams, silent workers, overdue steps.

use std::time::Duration;

use proto::ids::Epoch;
use proto::plan::StagePlan;

use proto::status::WaitCause;

use super::{Action, Cluster, Health, Phase, backoff, waits};
use crate::tick::Tick;

/// Streams of one stage that may break in a row, with every probe answered, before its pipeline
/// is given up: something between the stages does not work.
const RECONNECT_TRIES: u32 = 6;
/// After so long a break is no longer "in a row" with the last.
const RECONNECT_MEMORY: Duration = Duration::from_secs(60);

/// How long steps may be overdue, with every probe answered, before the pipeline is given up: no
/// request may hang.
const STALL_LIMIT: Duration = Duration::from_secs(15);

impl Cluster {
    pub(super) fn stream_broken(&mut self, now: Tick, epoch: Epoch, stage: u32, detail: String) {
        let Some((placed, stages, _)) = self.active(epoch) else { return };
        let Some(health) = stages.get_mut(stage as usize) else { return };
        if now.since(health.last_break) > RECONNECT_MEMORY {
            health.reconnects = 0;
        }
        health.last_break = now;
        health.reconnect_at = None;
        health.broken = Some(detail);
        let worker = placed.plan.stages[stage as usize].worker.clone();
        self.members.probe_at_once(now, &worker);
    }

    /// The process lives: a stream that broke may be opened again.
    pub(super) fn stage_answered(&mut self, now: Tick, worker: &str) {
        let Some(stage) = self.stage_of(worker) else { return };
        let Phase::Active { stages, .. } = &mut self.phase else { return };
        let health = &mut stages[stage as usize];
        if health.broken.is_some() && health.reconnect_at.is_none() {
            let wait = match health.reconnects {
                0 => Duration::ZERO,
                tries => backoff(tries - 1),
            };
            health.reconnect_at = Some(now + wait);
        }
    }

    /// A probe failed. Alone that proves nothing: a second signal must agree.
    pub(super) fn probe_failed(
        &mut self,
        now: Tick,
        worker: &str,
        detail: String,
        actions: &mut Vec<Action>,
    ) {
        let Some(stage) = self.stage_of(worker) else { return };
        let Phase::Active { stages, .. } = &self.phase else { return };
        if let Some(broken) = &stages[stage as usize].broken {
            let why = format!("its stream broke ({broken}) and it does not answer ({detail})");
            self.stage_lost(now, worker, &why, actions);
        } else if self.members.lease_is_gone(worker) && !self.members.is_frozen() {
            let why = format!("its lease is gone and it does not answer ({detail})");
            self.stage_lost(now, worker, &why, actions);
        }
    }

    pub(super) fn stage_lost(
        &mut self,
        now: Tick,
        worker: &str,
        why: &str,
        actions: &mut Vec<Action>,
    ) {
        let Some(placed) = self.placed() else { return };
        let Some(stage) = placed.plan.stages.iter().find(|stage| stage.worker == worker).cloned()
        else {
            return;
        };
        let alarm = self.members.evicted(now, &stage, why);
        actions.extend(alarm.map(|text| Action::Alarm { text }));
        let reason = format!(
            "worker {worker} with layers {}..{} was lost: {why}",
            stage.layers.start, stage.layers.end
        );
        match self.phase {
            Phase::Starting { .. } => {
                self.abandon_start(now, waits(WaitCause::Lost, reason), actions);
            }
            _ => self.fail_pipeline(now, reason, actions),
        }
    }

    pub(super) fn fail_pipeline(&mut self, now: Tick, reason: String, actions: &mut Vec<Action>) {
        let Phase::Active { placed, draining, .. } =
            std::mem::replace(&mut self.phase, Phase::Nothing)
        else {
            return;
        };
        actions.push(Action::FailPipeline { epoch: placed.plan.epoch, reason: reason.clone() });
        if draining {
            actions.push(Action::HoldAdmission(false));
        }
        self.retire(&placed, actions);
        self.members.forget_gone();
        self.waiting = waits(WaitCause::Lost, reason);
        self.plan_after = now;
        self.hopeless = None;
    }

    pub(super) fn advance_active(&mut self, now: Tick, actions: &mut Vec<Action>) {
        let Phase::Active { placed, stages, stalled_since, .. } = &mut self.phase else { return };
        let epoch = placed.plan.epoch;
        let mut given_up = None;
        for (stage, health) in (0..).zip(stages.iter_mut()) {
            if health.reconnect_at.is_none_or(|at| now < at) {
                continue;
            }
            if health.reconnects == RECONNECT_TRIES {
                given_up = Some(format!(
                    "the stream of worker {} broke {RECONNECT_TRIES} times in a row: {}",
                    placed.plan.stages[stage as usize].worker,
                    health.broken.as_deref().unwrap_or_default(),
                ));
                break;
            }
            health.reconnects += 1;
            health.reconnect_at = None;
            health.broken = None;
            actions.push(Action::Reconnect { epoch, stage });
        }
        if stalled_since.is_some_and(|since| now.since(since) > STALL_LIMIT) {
            given_up = Some(format!("no step has come back for {} s", STALL_LIMIT.as_secs()));
            // Silence on the data path and no answer: two signals.
            for stage in &placed.plan.stages {
                if self.members.is_silent(stage) {
                    let why = "its steps were overdue and it did not answer";
                    let alarm = self.members.evicted(now, stage, why);
                    actions.extend(alarm.map(|text| Action::Alarm { text }));
                }
            }
        }
        if let Some(reason) = given_up {
            self.fail_pipeline(now, reason, actions);
        }
    }

    /// Stages that somebody must ask: a stream broke, steps are overdue, or a lease is gone.
    pub(super) fn watched(&self) -> Vec<String> {
        let Phase::Active { placed, stages, stalled_since, .. } = &self.phase else {
            return Vec::new();
        };
        let watched = |(stage, health): (&StagePlan, &Health)| {
            let silent = stalled_since.is_some() || health.broken.is_some();
            (silent && health.reconnect_at.is_none() || self.members.lease_is_gone(&stage.worker))
                .then(|| stage.worker.clone())
        };
        placed.plan.stages.iter().zip(stages).filter_map(watched).collect()
    }
}
