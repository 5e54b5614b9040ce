//! The pipelines that serve: broken streams, silent workers, overdue steps, and how far each is
//! on its way to be stopped.

use std::collections::BTreeSet;
use std::time::Duration;

use proto::ids::{NumericsClass, PipelineRef, Term};
use proto::plan::{PipelinePlan, StagePlan};

use super::backoff;
use super::fleet::Fleet;
use super::types::Action;
use crate::tick::Tick;

/// Streams of one stage that may break in a row, with every probe answered, before its pipeline
/// is given up: something between the stages does not work.
const RECONNECT_TRIES: u32 = 6;
/// After so long a break is no longer "in a row" with the last.
const RECONNECT_MEMORY: Duration = Duration::from_secs(60);

/// How long steps may be overdue, with every probe answered, before the pipeline is given up: no
/// request may hang.
const STALL_LIMIT: Duration = Duration::from_secs(15);

/// Why a pipeline is given up while its workers answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct GivenUp {
    /// For the clients.
    pub(super) reason: String,
    /// The stage whose streams break, if one is known to be the cause.
    pub(super) stage: Option<u32>,
}

/// How long a lane may take to say that it has stopped. It waits at most a second for its steps.
pub(super) const PAUSE_TIMEOUT: Duration = Duration::from_secs(2);

/// A pipeline at its epoch.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    pub(super) plan: PipelinePlan,
    /// Under which its stages were told, and its steps are stamped.
    pub(super) term: Term,
}

impl Placed {
    pub(super) fn at(&self) -> PipelineRef {
        self.plan.at()
    }

    pub(super) fn class(&self) -> NumericsClass {
        self.plan.class
    }

    pub(super) fn stage_of(&self, worker: &str) -> Option<(u32, &StagePlan)> {
        (0..).zip(&self.plan.stages).find(|(_, stage)| stage.worker == worker)
    }
}

/// A pipeline that has a lane.
#[derive(Debug)]
pub(super) struct Pipeline {
    pub(super) placed: Placed,
    stages: Vec<Health>,
    stalled_since: Option<Tick>,
    /// Since when it serves at this epoch.
    pub(super) since: Tick,
    /// A result has come of it.
    proven: bool,
    pub(super) lane: Lane,
    /// Workers that are to leave it already, to make room.
    pub(super) released: BTreeSet<String>,
}

/// What the lane does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    Runs,
    /// It was told to pause, at this moment.
    Pausing(Tick),
    Paused,
    /// Its stages are being left or replaced: it cannot go on at this epoch.
    Stopped,
}

/// What is known of one stage's data path.
#[derive(Clone, Debug, Default)]
struct Health {
    /// A stream to or from it broke and was not opened again.
    broken: Option<String>,
    /// A probe answered since: open it again then.
    reconnect_at: Option<Tick>,
    reconnects: u32,
    last_break: Tick,
}

impl Pipeline {
    pub(super) fn new(now: Tick, placed: Placed) -> Self {
        let health = Health { last_break: now, ..Health::default() };
        Self {
            stages: vec![health; placed.plan.stages.len()],
            placed,
            stalled_since: None,
            since: now,
            proven: false,
            lane: Lane::Runs,
            released: BTreeSet::new(),
        }
    }

    pub(super) fn at(&self) -> PipelineRef {
        self.placed.at()
    }

    /// Whether requests get tokens from it, or will as soon as it goes on.
    pub(super) fn serves(&self) -> bool {
        self.lane != Lane::Stopped
    }

    /// As people are told.
    pub(super) fn state(&self) -> &'static str {
        match self.lane {
            Lane::Runs => "active",
            Lane::Pausing(_) | Lane::Paused => "switching",
            Lane::Stopped => "stopped",
        }
    }

    pub(super) fn uses(&self, worker: &str) -> bool {
        self.placed.stage_of(worker).is_some()
    }

    /// Whether it counts on what a worker holds: one that was told to leave it may end.
    pub(super) fn needs(&self, worker: &str) -> bool {
        self.uses(worker) && !self.released.contains(worker)
    }

    /// Tells the lane to pause, unless it was told before.
    pub(super) fn pause(&mut self, now: Tick, actions: &mut Vec<Action>) {
        if self.lane == Lane::Runs {
            self.lane = Lane::Pausing(now);
            actions.push(Action::Pause { at: self.at() });
        }
    }

    /// The lane has paused.
    pub(super) fn paused(&mut self) {
        if matches!(self.lane, Lane::Pausing(_)) {
            self.lane = Lane::Paused;
        }
    }

    /// Whether no step of it is on its way, or it had the time for that.
    pub(super) fn has_paused(&self, now: Tick) -> bool {
        match self.lane {
            Lane::Runs => false,
            Lane::Pausing(since) => now.since(since) >= PAUSE_TIMEOUT,
            Lane::Paused | Lane::Stopped => true,
        }
    }

    /// Tells a lane that was paused to go on.
    pub(super) fn resume(&mut self, actions: &mut Vec<Action>) {
        if matches!(self.lane, Lane::Pausing(_) | Lane::Paused) {
            self.lane = Lane::Runs;
            self.stalled_since = None;
            actions.push(Action::Resume { at: self.at(), term: self.placed.term });
        }
    }

    /// Its steps are stamped with another term from now on.
    pub(super) fn take_over(&mut self, term: Term, actions: &mut Vec<Action>) {
        self.placed.term = term;
        if self.lane == Lane::Runs {
            actions.push(Action::Resume { at: self.at(), term });
        }
    }

    /// A stream broke; the worker that is to be probed for it.
    pub(super) fn stream_broken(&mut self, now: Tick, stage: u32, detail: String) -> Option<&str> {
        // At an epoch that ends streams end too.
        if self.lane == Lane::Stopped {
            return None;
        }
        let health = self.stages.get_mut(stage as usize)?;
        if now.since(health.last_break) > RECONNECT_MEMORY {
            health.reconnects = 0;
        }
        health.last_break = now;
        health.reconnect_at = None;
        health.broken = Some(detail);
        Some(&self.placed.plan.stages[stage as usize].worker)
    }

    pub(super) fn overdue(&mut self, now: Tick) {
        if self.lane == Lane::Runs {
            self.stalled_since.get_or_insert(now);
        }
    }

    /// Whether a result has come of it at this epoch, and nothing is wrong with it now.
    pub(super) fn is_well(&self) -> bool {
        let is_whole = self.stages.iter().all(|health| health.broken.is_none());
        self.proven && self.stalled_since.is_none() && is_whole
    }

    pub(super) fn results_flow(&mut self) {
        self.proven = true;
        self.stalled_since = None;
        self.stages.iter_mut().for_each(|health| health.reconnects = 0);
    }

    /// The process lives: a stream that broke may be opened again.
    pub(super) fn answered(&mut self, now: Tick, worker: &str) {
        let Some((stage, _)) = self.placed.stage_of(worker) else { return };
        let health = &mut self.stages[stage as usize];
        if health.broken.is_some() && health.reconnect_at.is_none() {
            let wait = match health.reconnects {
                0 => Duration::ZERO,
                tries => backoff(tries - 1),
            };
            health.reconnect_at = Some(now + wait);
        }
    }

    /// A probe of a worker failed. Alone that proves nothing: why it is lost, if a second signal
    /// agrees.
    pub(super) fn judge_silence(
        &self,
        worker: &str,
        detail: &str,
        lease_is_gone: bool,
    ) -> Option<String> {
        let (stage, _) = self.placed.stage_of(worker).filter(|_| self.needs(worker))?;
        match &self.stages[stage as usize].broken {
            Some(broken) => {
                Some(format!("its stream broke ({broken}) and it does not answer ({detail})"))
            }
            None if lease_is_gone => {
                Some(format!("its lease is gone and it does not answer ({detail})"))
            }
            None => None,
        }
    }

    /// Opens streams again that may be opened.
    ///
    /// # Errors
    ///
    /// Why the pipeline is given up.
    pub(super) fn advance(&mut self, now: Tick, actions: &mut Vec<Action>) -> Result<(), GivenUp> {
        if self.lane == Lane::Stopped {
            return Ok(());
        }
        let at = self.at();
        for (stage, health) in (0..).zip(self.stages.iter_mut()) {
            if health.reconnect_at.is_none_or(|at| now < at) {
                continue;
            }
            if health.reconnects == RECONNECT_TRIES {
                let reason = format!(
                    "the stream of worker {} broke {RECONNECT_TRIES} times in a row: {}",
                    self.placed.plan.stages[stage as usize].worker,
                    health.broken.as_deref().unwrap_or_default(),
                );
                return Err(GivenUp { reason, stage: Some(stage) });
            }
            health.reconnects += 1;
            health.reconnect_at = None;
            health.broken = None;
            actions.push(Action::Reconnect { at, stage });
        }
        if self.is_stalled(now) {
            let reason = format!("no step has come back for {} s", STALL_LIMIT.as_secs());
            return Err(GivenUp { reason, stage: None });
        }
        Ok(())
    }

    /// Whether its steps are overdue for too long.
    pub(super) fn is_stalled(&self, now: Tick) -> bool {
        self.stalled_since.is_some_and(|since| now.since(since) > STALL_LIMIT)
    }

    /// Workers that somebody must probe: a stream broke, steps are overdue, or a lease is gone.
    pub(super) fn watched<'a>(&'a self, fleet: &'a Fleet) -> impl Iterator<Item = &'a String> {
        let is_watched = |(stage, health): &(&StagePlan, &Health)| {
            let is_silent = self.stalled_since.is_some() || health.broken.is_some();
            (is_silent && health.reconnect_at.is_none()) || fleet.lease_is_gone(&stage.worker)
        };
        let stages = self.placed.plan.stages.iter().zip(&self.stages);
        let watched = stages.filter(is_watched).map(|(stage, _)| &stage.worker);
        watched.filter(|worker| self.needs(worker))
    }
}
