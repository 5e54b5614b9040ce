//! Carries switches out: asks stages, and says what becomes of old and new pipelines.

use std::collections::BTreeSet;

use proto::ids::{NumericsClass, PipelineRef};
use proto::status::{WaitCause, Waiting};
use proto::step::Prepare;

use super::pipelines::{Lane, Pipeline, Placed};
use super::transition::{self, Next, Phase, Switch};
use super::types::{Action, Failure};
use super::{Cluster, waits};
use crate::scheduler::{PipelineShape, in_flight_limit};
use crate::tick::Tick;

impl Cluster {
    /// Stops old pipelines that are in the way, once a worker said that it has no memory for both.
    pub(super) fn make_room(&mut self, now: Tick, actions: &mut Vec<Action>) {
        for switch in &mut self.switches {
            let in_the_way: Vec<_> = switch.in_the_way(&self.pipelines).collect();
            for id in in_the_way {
                if let Some(pipeline) = self.pipelines.get_mut(&id) {
                    pipeline.pause(now, actions);
                }
            }
            switch.make_room(now, &mut self.pipelines);
        }
    }

    /// Does what is due in all switches. Whether one of them ended.
    pub(super) fn advance_switches(
        &mut self,
        now: Tick,
        untold: &BTreeSet<String>,
        actions: &mut Vec<Action>,
    ) -> bool {
        let mut has_ended = false;
        let mut index = 0;
        while index < self.switches.len() {
            match self.switches[index].next(now, &self.pipelines, &self.observed, untold) {
                Next::Nothing => index += 1,
                Next::Ask(new, stage) => self.ask(now, index, new, stage, actions),
                Next::Silent(at, stage) => {
                    let detail = "no answer came";
                    let phase = self.switches[index].phase;
                    let failure = Failure::Transient;
                    let count = self.switches.len();
                    self.start_failed(now, phase, at, stage, (failure, detail), actions);
                    has_ended |= self.switches.len() < count;
                }
                Next::Untold(worker) => {
                    let why = format!(
                        "worker {worker} has no memory for its new stage beside its old one, and the \
                         registry did not say in time whether it may leave that"
                    );
                    self.abandon(now, index, waits(WaitCause::Registry, why), actions);
                    has_ended = true;
                }
                Next::Pause => {
                    self.switches[index].phase = Phase::Pausing;
                    for id in &self.switches[index].old {
                        if let Some(pipeline) = self.pipelines.get_mut(id) {
                            pipeline.pause(now, actions);
                        }
                    }
                }
                Next::Activate => {
                    for id in &self.switches[index].old {
                        if let Some(pipeline) = self.pipelines.get_mut(id) {
                            pipeline.lane = Lane::Stopped;
                        }
                    }
                    self.switches[index].activate(now);
                }
                Next::Finish => {
                    self.finish(now, index, actions);
                    has_ended = true;
                }
            }
        }
        has_ended
    }

    fn ask(&mut self, now: Tick, index: usize, new: usize, stage: u32, actions: &mut Vec<Action>) {
        let activates = self.switches[index].asked(now, new, stage);
        let Placed { plan, term } = &self.switches[index].new[new].placed;
        let (at, term) = (plan.at(), *term);
        let target = plan.stages[stage as usize].clone();
        if activates {
            return actions.push(Action::Activate { at, term, stage, target });
        }
        let first_draws = self.options.costs.first_draws(plan.stages.len());
        if let Some(shape) = transition::shape(plan, stage, first_draws) {
            self.observed.expect(&target.worker, target.incarnation, at, shape);
        }
        actions.push(Action::Prepare(Prepare {
            cluster_id: self.options.cluster_id.clone(),
            pipeline: plan.id,
            epoch: plan.epoch,
            term,
            dst_incarnation: target.incarnation,
            model: plan.model,
            kv_type: plan.kv_type,
            stage,
            stages: plan.stages.clone(),
            kv_blocks: plan.kv_blocks,
            max_step_tokens: self.options.max_step_tokens,
            max_in_flight: in_flight_limit(plan.stages.len() as u32),
            draws: stage == 0 && first_draws,
        }));
    }

    fn switch_of(&mut self, at: PipelineRef) -> Option<(usize, &mut Switch)> {
        self.switches.iter_mut().enumerate().find(|(_, switch)| switch.find(at).is_some())
    }

    pub(super) fn prepared(
        &mut self,
        now: Tick,
        at: PipelineRef,
        stage: u32,
        class: NumericsClass,
        actions: &mut Vec<Action>,
    ) {
        let Some((_, switch)) = self.switch_of(at) else { return };
        let Some(planned) = switch.find(at).map(|starting| starting.placed.class()) else { return };
        match transition::check_class(planned, class) {
            Ok(()) => _ = switch.answered(at, stage, Phase::Preparing),
            Err(detail) => {
                let refused = Failure::Refused;
                self.start_failed(now, Phase::Preparing, at, stage, (refused, &detail), actions);
            }
        }
    }

    pub(super) fn activated(&mut self, at: PipelineRef, stage: u32) {
        let Some((_, switch)) = self.switch_of(at) else { return };
        if !switch.answered(at, stage, Phase::Activating) {
            return;
        }
        let starting = switch.find(at);
        let target = starting.and_then(|new| new.placed.plan.stages.get(stage as usize)).cloned();
        if let Some(target) = target {
            self.observed.activated(&target.worker, target.incarnation, at);
        }
    }

    /// A stage was not prepared or activated.
    pub(super) fn start_failed(
        &mut self,
        now: Tick,
        phase: Phase,
        at: PipelineRef,
        stage: u32,
        (failure, detail): (Failure, &str),
        actions: &mut Vec<Action>,
    ) {
        let Some((index, _)) = self.switch_of(at) else { return };
        let Self { switches, pipelines, observed, fleet, .. } = self;
        let switch = &mut switches[index];
        let Some(starting) = switch.find(at).filter(|_| switch.phase == phase) else { return };
        let Some(target) = starting.placed.plan.stages.get(stage as usize).cloned() else { return };
        let worker = &target.worker;
        if failure != Failure::Transient && phase == Phase::Preparing {
            observed.refused(worker, target.incarnation, at);
        }
        if failure == Failure::Memory {
            let mut old = switch.old.iter().filter_map(|id| pipelines.get(id));
            let in_the_way = old.find(|old| old.uses(worker) && !old.released.contains(worker));
            if let Some(old) = in_the_way {
                let note = format!(
                    "worker {worker} has no memory for its old and its new stage, so pipeline {} \
                     stops before the new one is prepared: {detail}",
                    old.placed.plan.id
                );
                switch.needs_room(at, stage, note);
                observed.shares_nothing(worker, target.incarnation);
                return;
            }
            // Something else may be in the way.
            observed.shares_nothing(worker, target.incarnation);
            observed.ask(now, worker);
        }
        if !switch.failed(now, at, stage, failure) {
            return;
        }
        fleet.refused(now, worker, detail);
        // Without an answer nobody knows whether it could.
        let cause = match failure {
            Failure::Transient => WaitCause::Lost,
            Failure::Memory | Failure::Refused => WaitCause::Refused,
        };
        let why = format!("worker {worker} could not take its stage: {detail}");
        self.abandon(now, index, waits(cause, why), actions);
    }

    /// The new pipelines will not serve. The old ones go on, if they still can.
    pub(super) fn abandon(
        &mut self,
        now: Tick,
        index: usize,
        why: Waiting,
        actions: &mut Vec<Action>,
    ) {
        let switch = self.switches.remove(index);
        self.ask_concerned(now, &switch);
        let mut is_loss = switch.is_urgent;
        for id in &switch.old {
            let Some(pipeline) = self.pipelines.get_mut(id) else { continue };
            if pipeline.serves() {
                pipeline.resume(actions);
                continue;
            }
            actions.push(Action::Leave { at: pipeline.at() });
            self.pipelines.remove(id);
            is_loss = true;
        }
        self.planning.lost |= is_loss;
        self.planning.failed(now);
        self.last_failure = Some(why);
    }

    /// Workers whose stages changed, or were to, are asked what they hold now.
    fn ask_concerned(&mut self, now: Tick, switch: &Switch) {
        let Self { pipelines, observed, .. } = self;
        let old = switch.old.iter().filter_map(|id| pipelines.get(id));
        let old = old.flat_map(|pipeline| &pipeline.placed.plan.stages).map(|stage| &stage.worker);
        for worker in old.chain(switch.workers()) {
            observed.ask(now, worker);
        }
    }

    /// All new stages are active: the new pipelines serve and the old ones are gone.
    fn finish(&mut self, now: Tick, index: usize, actions: &mut Vec<Action>) {
        let switch = self.switches.remove(index);
        self.planning.reconsider();
        self.ask_concerned(now, &switch);
        for id in &switch.old {
            let Some(pipeline) = self.pipelines.remove(id) else { continue };
            let goes_on = switch.new.iter().any(|starting| starting.placed.plan.id == *id);
            if !goes_on {
                actions.push(Action::Leave { at: pipeline.at() });
            }
        }
        for starting in switch.new {
            let placed = starting.placed;
            let plan = &placed.plan;
            let first_draws = self.options.costs.first_draws(plan.stages.len());
            actions.push(Action::Serve {
                shape: PipelineShape {
                    pipeline: plan.id,
                    epoch: plan.epoch,
                    term: placed.term,
                    first_incarnation: plan.stages[0].incarnation,
                    stages: plan.stages.len() as u32,
                    kv_blocks: plan.kv_blocks,
                    first_draws,
                    cost: self.fleet.step_cost(&plan.stages, plan.model, first_draws),
                },
                plan: plan.clone(),
                class: plan.class,
            });
            self.pipelines.insert(placed.plan.id, Pipeline::new(now, placed));
        }
    }
}
