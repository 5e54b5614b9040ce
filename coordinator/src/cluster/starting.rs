//! Getting a written plan to serve: prepare every stage, then activate every stage.

use std::time::Duration;

use proto::ids::{Epoch, NumericsClass};
use proto::status::{WaitCause, Waiting};
use proto::step::Prepare;

use super::{Action, Cluster, Health, Phase, Placed, Start, StartState, backoff, stages_of, waits};
use crate::scheduler::{PipelineShape, in_flight_limit};
use crate::tick::Tick;

/// Tries of one `Prepare` or `Activate` before its worker counts as unable ...
pub(super) const START_TRIES: u32 = 4;
/// ... and how long one may go without an answer: mapping and first touch of a large KV cache.
const START_PATIENCE: Duration = Duration::from_secs(120);

impl Cluster {
    pub(super) fn ask(&self, placed: &Placed, stage: u32, activating: bool) -> Action {
        let target = placed.plan.stages[stage as usize].clone();
        let (pipeline, epoch, term) = (placed.plan.id, placed.plan.epoch, placed.term);
        if activating {
            return Action::Activate { pipeline, epoch, term, stage, target };
        }
        Action::Prepare(Prepare {
            cluster_id: self.options.cluster_id.clone(),
            pipeline,
            epoch,
            term,
            dst_incarnation: target.incarnation,
            model: self.options.model,
            kv_type: self.options.kv_type,
            stage,
            stages: placed.plan.stages.clone(),
            kv_blocks: placed.plan.kv_blocks,
            max_step_tokens: self.options.max_step_tokens,
            max_in_flight: in_flight_limit(placed.plan.stages.len() as u32),
            draws: stage == 0 && self.options.costs.first_draws(placed.plan.stages.len()),
        })
    }

    pub(super) fn prepared(
        &mut self,
        now: Tick,
        epoch: Epoch,
        stage: u32,
        class: NumericsClass,
        actions: &mut Vec<Action>,
    ) {
        match &self.phase {
            Phase::Starting { placed, activating: false, .. }
                if placed.plan.epoch == epoch && placed.class != class =>
            {
                let detail = "it computes in another numerics class than the plan's";
                self.start_failed(now, epoch, stage, false, detail, actions);
            }
            _ => {
                if self.start_done(epoch, stage, false) {
                    let Phase::Starting { placed, stages, activating } = &mut self.phase else {
                        return;
                    };
                    *activating = true;
                    stages.fill(Start { tries: 1, state: StartState::Asked(now) });
                    let placed = placed.clone();
                    for stage in 0..placed.plan.stages.len() {
                        actions.push(self.ask(&placed, stage as u32, true));
                    }
                }
            }
        }
    }

    pub(super) fn activated(
        &mut self,
        now: Tick,
        epoch: Epoch,
        stage: u32,
        actions: &mut Vec<Action>,
    ) {
        if !self.start_done(epoch, stage, true) {
            return;
        }
        let Phase::Starting { placed, .. } = std::mem::replace(&mut self.phase, Phase::Nothing)
        else {
            return;
        };
        let plan = &placed.plan;
        let first_draws = self.options.costs.first_draws(plan.stages.len());
        actions.push(Action::Serve {
            shape: PipelineShape {
                pipeline: plan.id,
                epoch,
                term: placed.term,
                first_incarnation: plan.stages[0].incarnation,
                stages: plan.stages.len() as u32,
                kv_blocks: plan.kv_blocks,
                first_draws,
                cost: self.members.step_cost(&plan.stages, self.options.model, first_draws),
            },
            plan: plan.clone(),
            class: placed.class,
        });
        self.incumbent = stages_of(plan);
        self.failed_starts = 0;
        self.told = None;
        let stages = vec![Health { last_break: now, ..Health::default() }; plan.stages.len()];
        self.phase = Phase::Active { placed, stages, stalled_since: None, draining: false };
    }

    /// Notes an answer; whether it was the last one missing.
    pub(super) fn start_done(&mut self, of: Epoch, stage: u32, what: bool) -> bool {
        let Phase::Starting { placed, stages, activating } = &mut self.phase else { return false };
        if placed.plan.epoch != of || *activating != what {
            return false;
        }
        let Some(start) = stages.get_mut(stage as usize) else { return false };
        let was_done = std::mem::replace(&mut start.state, StartState::Done) == StartState::Done;
        !was_done && stages.iter().all(|start| start.state == StartState::Done)
    }

    pub(super) fn start_failed(
        &mut self,
        now: Tick,
        epoch: Epoch,
        stage: u32,
        transient: bool,
        detail: &str,
        actions: &mut Vec<Action>,
    ) {
        let Phase::Starting { placed, stages, .. } = &mut self.phase else { return };
        let Some(start) = stages.get_mut(stage as usize) else { return };
        if placed.plan.epoch != epoch || !matches!(start.state, StartState::Asked(_)) {
            return;
        }
        if transient && start.tries < START_TRIES {
            start.state = StartState::RetryAt(now + backoff(start.tries - 1));
            return;
        }
        let worker = placed.plan.stages[stage as usize].worker.clone();
        self.members.refused(now, &worker, detail);
        // Without an answer nobody knows whether it could.
        let cause = if transient { WaitCause::Lost } else { WaitCause::Refused };
        let why = format!("worker {worker} could not take its stage: {detail}");
        self.abandon_start(now, waits(cause, why), actions);
    }

    pub(super) fn abandon_start(&mut self, now: Tick, why: Waiting, actions: &mut Vec<Action>) {
        if let Phase::Starting { placed, .. } = std::mem::replace(&mut self.phase, Phase::Nothing) {
            self.retire(&placed, actions);
            self.members.forget_gone();
            self.failed_start(now, why);
        }
    }

    pub(super) fn failed_start(&mut self, now: Tick, why: Waiting) {
        self.plan_after = now + backoff(self.failed_starts);
        self.failed_starts += 1;
        self.waiting = why;
    }

    /// Stages that may still live stand by again. Whoever does not hear it learns from the epoch.
    pub(super) fn retire(&self, placed: &Placed, actions: &mut Vec<Action>) {
        for target in placed.plan.stages.iter().filter(|stage| !self.members.is_lost(stage)) {
            actions.push(Action::Retire {
                pipeline: placed.plan.id,
                epoch: placed.plan.epoch,
                term: placed.term,
                target: target.clone(),
            });
        }
    }

    pub(super) fn advance_start(&mut self, now: Tick, actions: &mut Vec<Action>) {
        let Phase::Starting { placed, stages, activating } = &mut self.phase else { return };
        let mut due = Vec::new();
        let mut silent = Vec::new();
        for (stage, start) in (0..).zip(stages.iter_mut()) {
            match start.state {
                StartState::RetryAt(at) if now >= at => {
                    *start = Start { tries: start.tries + 1, state: StartState::Asked(now) };
                    due.push(stage);
                }
                StartState::Asked(at) if now.since(at) > START_PATIENCE => silent.push(stage),
                _ => {}
            }
        }
        let (placed, activating) = (placed.clone(), *activating);
        for stage in due {
            actions.push(self.ask(&placed, stage, activating));
        }
        for stage in silent {
            self.start_failed(now, placed.plan.epoch, stage, true, "no answer came", actions);
        }
    }
}
