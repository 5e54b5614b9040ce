//! From what serves to what was planned. The new pipelines are prepared beside the old ones, then
//! the old lanes pause, the new epochs are activated, and the lanes go on.
//!
//! ```text
//! preparing ──all prepared──▶ pausing ──old lanes paused──▶ activating ──all active──▶ serves
//!     │ no memory beside                                        │ refused, worker lost
//!     ▼                                                         ▼
//!  old lane pauses, its stages are left, prepared again      abandoned
//! ```
//!
//! What a plan changes falls into *switches*: pipelines, old and new, that have a worker or their
//! name in common. Each goes by itself, so that a slow or failing worker holds up nobody else.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::ids::{NumericsClass, PipelineId, PipelineRef};
use proto::plan::PipelinePlan;

use super::backoff;
use super::observed::{Observed, Shape};
use super::pipelines::{Lane, Pipeline, Placed};
use super::types::{Failure, PREPARE_LIMIT};
use crate::tick::Tick;

/// Tries of one `Prepare` or `Activate` before its worker counts as unable ...
pub(super) const START_TRIES: u32 = 4;
/// ... and how much longer than it may take one may go without an answer: whoever carried it is gone.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a worker without memory for its new stage waits until it can be told to leave its old
/// one: longer than the registry has for an answer.
const UNTOLD_LIMIT: Duration = Duration::from_secs(45);

/// Pipelines that change together.
#[derive(Debug)]
pub(super) struct Switch {
    /// Those that serve until the new ones do.
    pub(super) old: BTreeSet<PipelineId>,
    pub(super) new: Vec<Starting>,
    pub(super) phase: Phase,
    /// Why it is not made beside what serves.
    pub(super) notes: Vec<String>,
    /// It takes the place of something that was lost: if it fails another plan is needed.
    pub(super) is_urgent: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Preparing,
    /// The old lanes were told to pause.
    Pausing,
    Activating,
}

impl Phase {
    /// A stage that is asked has answered by then, or nobody carries its answer.
    fn answered_within(self) -> Duration {
        match self {
            Self::Preparing => PREPARE_LIMIT + ANSWER_TIMEOUT,
            Self::Pausing | Self::Activating => ANSWER_TIMEOUT,
        }
    }
}

/// A pipeline that is to serve.
#[derive(Debug)]
pub(super) struct Starting {
    pub(super) placed: Placed,
    starts: Vec<Start>,
}

/// How far one stage's `Prepare` or `Activate` is.
#[derive(Clone, Copy, Debug)]
struct Start {
    tries: u32,
    state: StartState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StartState {
    /// To be asked from this moment on, once its worker has left what is in the way.
    Due(Tick),
    /// The old pipeline at its worker must stop before.
    NeedsRoom,
    Asked(Tick),
    Done,
}

/// What a switch wants done now.
#[derive(Debug)]
pub(super) enum Next {
    Nothing,
    /// Ask this stage of this new pipeline, by index.
    Ask(usize, u32),
    /// A worker gave no answer.
    Silent(PipelineRef, u32),
    /// A worker cannot be told what to leave.
    Untold(String),
    /// Pause the old lanes.
    Pause,
    /// Stop the old pipelines and activate the new ones.
    Activate,
    /// The new pipelines serve.
    Finish,
}

impl Switch {
    fn new(old: BTreeSet<PipelineId>, new: Vec<Placed>, now: Tick) -> Self {
        let starting = |placed: Placed| Starting {
            starts: vec![Start::due(now); placed.plan.stages.len()],
            placed,
        };
        Self {
            old,
            new: new.into_iter().map(starting).collect(),
            phase: Phase::Preparing,
            notes: Vec::new(),
            is_urgent: false,
        }
    }

    pub(super) fn find(&self, at: PipelineRef) -> Option<&Starting> {
        self.new.iter().find(|starting| starting.placed.at() == at)
    }

    fn start(&mut self, at: PipelineRef, stage: u32) -> Option<&mut Start> {
        let starting = self.new.iter_mut().find(|starting| starting.placed.at() == at)?;
        starting.starts.get_mut(stage as usize)
    }

    /// Everyone with a stage of a new pipeline.
    pub(super) fn workers(&self) -> impl Iterator<Item = &String> {
        let stages = self.new.iter().flat_map(|starting| &starting.placed.plan.stages);
        stages.map(|stage| &stage.worker)
    }

    /// Whether a worker is to have a stage of a new pipeline.
    pub(super) fn starts_at(&self, worker: &str) -> bool {
        self.new.iter().any(|starting| starting.placed.stage_of(worker).is_some())
    }

    /// Whether the new pipeline's stage at this worker is prepared.
    fn is_prepared_at(&self, worker: &str) -> bool {
        self.new.iter().any(|starting| {
            starting
                .placed
                .stage_of(worker)
                .is_some_and(|(stage, _)| starting.starts[stage as usize].state == StartState::Done)
        })
    }

    /// What is due, one thing at a time. Those in `untold` cannot be told to leave what they shall.
    pub(super) fn next(
        &self,
        now: Tick,
        pipelines: &BTreeMap<PipelineId, Pipeline>,
        observed: &Observed,
        untold: &BTreeSet<String>,
    ) -> Next {
        for (index, starting) in self.new.iter().enumerate() {
            let at = starting.placed.at();
            for (stage, start) in (0..).zip(&starting.starts) {
                let worker = &starting.placed.plan.stages[stage as usize].worker;
                match start.state {
                    StartState::Asked(since) if now.since(since) > self.phase.answered_within() => {
                        return Next::Silent(at, stage);
                    }
                    StartState::Due(from) if now >= from => {
                        let prepares = self.phase == Phase::Preparing;
                        // It has no memory before it leaves what it holds.
                        let is_untold = prepares && start.tries > 0 && untold.contains(worker);
                        if is_untold && now.since(from) > UNTOLD_LIMIT {
                            return Next::Untold(worker.clone());
                        }
                        let is_clearing = prepares && observed.is_clearing(now, worker);
                        if !is_untold && !is_clearing {
                            return Next::Ask(index, stage);
                        }
                    }
                    _ => {}
                }
            }
        }
        let is_done =
            self.new.iter().flat_map(|s| &s.starts).all(|start| start.state == StartState::Done);
        let mut old = self.old.iter().filter_map(|id| pipelines.get(id));
        match self.phase {
            Phase::Preparing if is_done => Next::Pause,
            Phase::Pausing if old.all(|pipeline| pipeline.has_paused(now)) => Next::Activate,
            Phase::Activating if is_done => Next::Finish,
            _ => Next::Nothing,
        }
    }

    /// A stage is asked. Whether that is an `Activate`.
    pub(super) fn asked(&mut self, now: Tick, index: usize, stage: u32) -> bool {
        let start = &mut self.new[index].starts[stage as usize];
        *start = Start { tries: start.tries + 1, state: StartState::Asked(now) };
        self.phase == Phase::Activating
    }

    /// All are prepared and nothing serves on the old epochs: activate.
    pub(super) fn activate(&mut self, now: Tick) {
        self.phase = Phase::Activating;
        for start in self.new.iter_mut().flat_map(|starting| &mut starting.starts) {
            *start = Start::due(now);
        }
    }

    /// A stage is prepared, or active. Whether that was asked for.
    pub(super) fn answered(&mut self, at: PipelineRef, stage: u32, phase: Phase) -> bool {
        if self.phase != phase {
            return false;
        }
        let Some(start) = self.start(at, stage) else { return false };
        let was_asked = matches!(start.state, StartState::Asked(_));
        if was_asked {
            start.state = StartState::Done;
        }
        was_asked
    }

    /// A stage could not be prepared or activated. Whether that is final.
    pub(super) fn failed(
        &mut self,
        now: Tick,
        at: PipelineRef,
        stage: u32,
        failure: Failure,
    ) -> bool {
        let Some(start) = self.start(at, stage) else { return false };
        if !matches!(start.state, StartState::Asked(_)) {
            return false;
        }
        if failure == Failure::Refused || start.tries >= START_TRIES {
            return true;
        }
        start.state = StartState::Due(now + backoff(start.tries - 1));
        false
    }

    /// A stage has no memory beside what an old pipeline holds there: that one is to stop.
    pub(super) fn needs_room(&mut self, at: PipelineRef, stage: u32, note: String) {
        if let Some(start) = self.start(at, stage) {
            start.state = StartState::NeedsRoom;
            self.notes.push(note);
        }
    }

    /// Old pipelines that must stop to make room.
    pub(super) fn in_the_way<'a>(
        &'a self,
        pipelines: &'a BTreeMap<PipelineId, Pipeline>,
    ) -> impl Iterator<Item = PipelineId> + 'a {
        let crowded = self.new.iter().flat_map(|starting| {
            let stages = starting.placed.plan.stages.iter().zip(&starting.starts);
            stages.filter(|(_, start)| start.state == StartState::NeedsRoom).map(|(stage, _)| stage)
        });
        let crowded: Vec<_> = crowded.map(|stage| &stage.worker).collect();
        self.old.iter().copied().filter(move |id| {
            pipelines.get(id).is_some_and(|old| crowded.iter().any(|worker| old.uses(worker)))
        })
    }

    /// The old pipelines in the way have stopped, or are none: what waited for that is due. Stages
    /// that are prepared already share what they hold, so that stays.
    pub(super) fn make_room(&mut self, now: Tick, pipelines: &mut BTreeMap<PipelineId, Pipeline>) {
        let mut in_the_way: Vec<_> = self.in_the_way(pipelines).collect();
        in_the_way.retain(|id| pipelines.get(id).is_some_and(|old| !old.has_paused(now)));
        for index in 0..self.new.len() {
            for stage in 0..self.new[index].starts.len() {
                let Starting { placed, starts } = &self.new[index];
                let worker = placed.plan.stages[stage].worker.clone();
                let waits =
                    in_the_way.iter().any(|id| pipelines.get(id).is_some_and(|p| p.uses(&worker)));
                if starts[stage].state != StartState::NeedsRoom || waits {
                    continue;
                }
                self.new[index].starts[stage].state = StartState::Due(now);
                let old = pipelines.iter_mut().filter(|(id, _)| self.old.contains(id));
                for (_, old) in old.filter(|(_, old)| old.uses(&worker)) {
                    old.lane = Lane::Stopped;
                    let workers = old.placed.plan.stages.iter().map(|stage| &stage.worker);
                    let left = workers.filter(|worker| !self.is_prepared_at(worker));
                    old.released = left.cloned().collect();
                }
            }
        }
    }
}

impl Start {
    fn due(now: Tick) -> Self {
        Self { tries: 0, state: StartState::Due(now) }
    }
}

/// Pipelines that have a worker or an id in common.
#[derive(Default)]
struct Group {
    ids: BTreeSet<PipelineId>,
    workers: BTreeSet<String>,
    old: BTreeSet<PipelineId>,
    new: Vec<Placed>,
}

impl Group {
    fn of(plan: &PipelinePlan) -> Self {
        Self {
            ids: BTreeSet::from([plan.id]),
            workers: plan.stages.iter().map(|stage| stage.worker.clone()).collect(),
            ..Self::default()
        }
    }

    fn touches(&self, other: &Self) -> bool {
        !self.ids.is_disjoint(&other.ids) || !self.workers.is_disjoint(&other.workers)
    }

    fn join(mut self, mut other: Self) -> Self {
        self.ids.append(&mut other.ids);
        self.workers.append(&mut other.workers);
        self.old.append(&mut other.old);
        self.new.append(&mut other.new);
        self
    }
}

/// What becomes of a plan: the pipelines in it that are not served as they are, and those that are
/// served and not in it, in groups.
pub(super) fn switches(now: Tick, old: &[&Pipeline], new: Vec<Placed>) -> Vec<Switch> {
    let old = old.iter().map(|pipeline| {
        let group = Group::of(&pipeline.placed.plan);
        Group { old: group.ids.clone(), ..group }
    });
    let new = new.into_iter().map(|placed| {
        let group = Group::of(&placed.plan);
        Group { new: vec![placed], ..group }
    });
    let mut groups: Vec<Group> = Vec::new();
    for group in old.chain(new) {
        let (touching, others): (Vec<_>, Vec<_>) =
            groups.into_iter().partition(|other| other.touches(&group));
        groups = others;
        groups.push(touching.into_iter().fold(group, Group::join));
    }
    let switch = |mut group: Group| {
        group.new.sort_by_key(|placed| placed.plan.id);
        Switch::new(group.old, group.new, now)
    };
    groups.into_iter().map(switch).collect()
}

/// What a stage makes its worker hold.
pub(super) fn shape(plan: &PipelinePlan, stage: u32, first_draws: bool) -> Option<Shape> {
    Some(Shape {
        model: plan.model,
        kv_type: plan.kv_type,
        layers: plan.stages.get(stage as usize)?.layers.clone(),
        kv_blocks: plan.kv_blocks,
        draws: stage == 0 && first_draws,
    })
}

/// Whether a worker computes what the plan counts on.
pub(super) fn check_class(planned: NumericsClass, found: NumericsClass) -> Result<(), String> {
    match planned == found {
        true => Ok(()),
        false => Err(format!(
            "it computes in numerics class {:.8}, the plan is of {:.8}",
            found.to_string(),
            planned.to_string()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_says_how_long_a_prepare_may_take() {
        let documentation = include_str!("../../../docs/scheduling.md");
        let minutes = PREPARE_LIMIT.as_secs() / 60;
        let said = format!("One `Prepare` may take {minutes} minutes");
        assert!(documentation.contains(&said), "{said}");
        assert!(documentation.contains(&format!("and is tried {START_TRIES} times")));
        assert!(
            Phase::Preparing.answered_within() > PREPARE_LIMIT,
            "whoever carries it says so first"
        );
    }
}
