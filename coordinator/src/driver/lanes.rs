//! All lanes, from the control task's side: what is asked of pipelines goes to their tasks.

use std::collections::{BTreeMap, VecDeque};

use proto::ids::{PipelineId, PipelineRef, SequenceId, Term};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};

use super::clients::Client;
use super::lane::{
    FinishReply, LANE_COMMANDS, LaneCommand, LaneEnds, LaneEvent, LaneReport, Served,
};
use crate::scheduler::{Growth, Sequence};
use crate::tick::Tick;

/// What lanes have to say that may wait for the control task; then they keep it themselves.
pub(super) const LANE_EVENTS: usize = 1024;

/// Starts the task of a lane.
pub(super) type Start = Box<dyn Fn(Served, LaneEnds, &mut JoinSet<()>) + Send + Sync>;

/// All lanes.
pub(super) struct Lanes {
    start: Start,
    tasks: JoinSet<()>,
    lanes: BTreeMap<PipelineId, Handle>,
    /// As many as there ever were lanes at a time.
    slots: u32,
    events: mpsc::Sender<LaneEvent>,
    /// When one that left as planned last computed something: those that took its place are to
    /// prove themselves, and nobody is sent away meanwhile.
    handed_over: Option<Tick>,
}

struct Handle {
    at: PipelineRef,
    /// Its number among the lanes that are there, the least that was free.
    slot: u32,
    commands: mpsc::Sender<LaneCommand>,
    /// Not handed over yet: see [`Lanes::flush`].
    outbox: VecDeque<LaneCommand>,
    report: watch::Receiver<LaneReport>,
    /// It was told to give everyone back.
    leaving: bool,
    /// Serves once everyone was given back.
    next: Option<Next>,
}

/// A pipeline that waits for its lane.
struct Next {
    served: Box<Served>,
    /// What it is told as soon as it is there.
    commands: VecDeque<LaneCommand>,
}

impl Next {
    fn new(served: Served) -> Self {
        Self { served: Box::new(served), commands: VecDeque::new() }
    }
}

/// What became of a pipeline whose lane has left.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// It is gone.
    Gone,
    /// It serves again: its next plan had come already.
    Again,
}

impl Lanes {
    /// No lane yet. `start` runs the task of each; what they say comes out of the receiver.
    pub(super) fn new(start: Start) -> (Self, mpsc::Receiver<LaneEvent>) {
        let (events, said) = mpsc::channel(LANE_EVENTS);
        let (tasks, lanes, handed_over) = (JoinSet::new(), BTreeMap::new(), None);
        (Self { start, tasks, lanes, slots: 0, events, handed_over }, said)
    }

    /// A pipeline serves: a lane for it, or, if there is one, that goes on with the new epoch and
    /// replays its sequences.
    pub(super) fn serve(&mut self, served: Served) {
        let at = served.at();
        match self.lanes.get_mut(&at.id) {
            None => self.open(served, VecDeque::new()),
            // What ran has to come back first, so that nobody is lost between the two.
            Some(lane) if lane.leaving => lane.next = Some(Next::new(served)),
            Some(lane) => {
                lane.at = at;
                lane.outbox.push_back(LaneCommand::Switch(Box::new(served)));
            }
        }
    }

    fn open(&mut self, served: Served, outbox: VecDeque<LaneCommand>) {
        let at = served.at();
        let (commands, their_commands) = mpsc::channel(LANE_COMMANDS);
        let (their_report, report) = watch::channel(LaneReport::default());
        let is_free = |slot: &u32| self.lanes.values().all(|lane| lane.slot != *slot);
        let slot = (0..=self.slots).find(is_free).unwrap_or(self.slots);
        self.slots = self.slots.max(slot + 1);
        let ends = LaneEnds {
            commands: their_commands,
            events: self.events.clone(),
            report: their_report,
            slot,
        };
        (self.start)(served, ends, &mut self.tasks);
        let (leaving, next) = (false, None);
        self.lanes.insert(at.id, Handle { at, slot, commands, outbox, report, leaving, next });
    }

    /// A lane has given everyone back.
    pub(super) fn left(&mut self, pipeline: PipelineId) -> Left {
        match self.lanes.remove(&pipeline).and_then(|lane| lane.next) {
            None => Left::Gone,
            Some(Next { served, commands }) => {
                self.open(*served, commands);
                Left::Again
            }
        }
    }

    /// No more steps are sent; [`LaneSays::Paused`](super::lane::LaneSays::Paused) comes when none
    /// is on its way.
    pub(super) fn pause(&mut self, at: PipelineRef) {
        self.tell(at, LaneCommand::Pause);
    }

    /// Steps are sent, or sent again, in this reign.
    pub(super) fn resume(&mut self, at: PipelineRef, term: Term) {
        self.tell(at, LaneCommand::Term(term));
        self.tell(at, LaneCommand::Resume);
    }

    /// How those who run on each pipeline have grown.
    pub(super) fn growth(&self) -> impl Iterator<Item = (PipelineId, Growth)> {
        self.lanes.iter().map(|(&id, lane)| {
            let report = lane.report.borrow();
            // Of the epoch before it says nothing of this one, whose KV is empty.
            let growth = if report.at == lane.at { report.stats.growth } else { Growth::default() };
            (id, growth)
        })
    }

    /// A pipeline goes as planned: its sequences come back. Whether it was there.
    pub(super) fn leave(&mut self, at: PipelineRef) -> bool {
        if self.is_current(at) {
            self.handed_over = self.proven();
        }
        self.end(at, LaneCommand::Leave)
    }

    /// A pipeline is lost: its sequences come back, or fail if it is not the first time. Whether it
    /// was there.
    pub(super) fn fail(&mut self, at: PipelineRef, reason: &str) -> bool {
        if self.is_current(at) {
            self.handed_over = None;
        }
        self.end(at, LaneCommand::Fail { reason: reason.to_owned() })
    }

    /// Opens the links that touch a stage again.
    pub(super) fn reconnect(&mut self, at: PipelineRef, stage: u32) {
        self.tell(at, LaneCommand::Reconnect { stage });
    }

    /// Everyone fails with the reason.
    pub(super) fn stop(&mut self, reason: &str) {
        for lane in self.lanes.values_mut() {
            lane.outbox.push_back(LaneCommand::Stop { reason: reason.to_owned() });
            (lane.leaving, lane.next) = (true, None);
        }
    }

    /// A sequence runs on a pipeline from now on. Given back if there is no such pipeline.
    pub(super) fn assign(
        &mut self,
        pipeline: PipelineId,
        sequence: Box<Sequence>,
        client: Client,
    ) -> Result<(), (Box<Sequence>, Client)> {
        let Some(lane) = self.lanes.get_mut(&pipeline) else { return Err((sequence, client)) };
        lane.outbox.push_back(LaneCommand::Assign { sequence, client });
        Ok(())
    }

    /// An answer that runs on a pipeline is complete for its client.
    pub(super) fn finish(
        &mut self,
        pipeline: PipelineId,
        sequence: SequenceId,
        reply: FinishReply,
    ) {
        // Without a lane the reply is dropped, and whoever asked waits for the answer's own end.
        if let Some(lane) = self.lanes.get_mut(&pipeline) {
            lane.outbox.push_back(LaneCommand::Finish { sequence, reply });
        }
    }

    /// Hands over what lanes are told. They take it at once: they wait for nobody.
    pub(super) async fn flush(&mut self) {
        for lane in self.lanes.values_mut() {
            while let Some(command) = lane.outbox.pop_front() {
                if lane.commands.send(command).await.is_err() {
                    // Its task has ended, which is noticed where tasks are joined.
                    lane.outbox.clear();
                }
            }
        }
    }

    /// Whether this pipeline serves at this epoch.
    pub(super) fn is_current(&self, at: PipelineRef) -> bool {
        self.lanes.get(&at.id).is_some_and(|lane| lane.at == at && !lane.leaving)
    }

    /// The pipelines that serve.
    pub(super) fn serving(&self) -> Vec<PipelineRef> {
        self.lanes.values().filter(|lane| !lane.leaving).map(|lane| lane.at).collect()
    }

    /// A task of a lane has ended; never if there is none.
    pub(super) async fn joined(&mut self) -> Result<(), JoinError> {
        match self.tasks.join_next().await {
            Some(end) => end,
            None => std::future::pending().await,
        }
    }

    /// Whether there is no lane at all.
    pub(super) fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    /// How the pipelines are that serve, as of their last tick.
    pub(super) fn reports(&self) -> Vec<LaneReport> {
        let current = |lane: &&Handle| !lane.leaving;
        let reports = self.lanes.values().filter(current).map(|lane| {
            let report = lane.report.borrow().clone();
            match report.at == lane.at {
                true => report,
                // Of the epoch before, which proves nothing of this one.
                false => LaneReport { at: lane.at, ..LaneReport::default() },
            }
        });
        reports.collect()
    }

    /// What is in every slot that there ever was: how a pipeline is, or nothing.
    pub(super) fn slots(&self) -> impl Iterator<Item = (u32, Option<LaneReport>)> {
        let report = |slot| {
            let lane = self.lanes.values().find(|lane| lane.slot == slot && !lane.leaving)?;
            Some(lane.report.borrow().clone()).filter(|report| report.at.id == lane.at.id)
        };
        (0..self.slots).map(move |slot| (slot, report(slot)))
    }

    /// When one of the pipelines that serve last computed something, or one that left its place to
    /// them. `None` if none serves.
    pub(super) fn proven(&self) -> Option<Tick> {
        let serving = self.lanes.values().filter(|lane| !lane.leaving);
        let proven = serving.map(|lane| {
            let report = lane.report.borrow();
            report.proven.filter(|_| report.at.id == lane.at.id)
        });
        proven.max().and_then(|own| own.max(self.handed_over))
    }

    fn end(&mut self, at: PipelineRef, command: LaneCommand) -> bool {
        let is_current = self.is_current(at);
        // What was to serve once the epoch before it had left does not come to that.
        if let Some(lane) = self.lanes.get_mut(&at.id)
            && lane.next.take_if(|next| next.served.at() == at).is_some()
        {
            return true;
        }
        if is_current && let Some(lane) = self.lanes.get_mut(&at.id) {
            lane.outbox.push_back(command);
            lane.leaving = true;
        }
        is_current
    }

    fn tell(&mut self, at: PipelineRef, command: LaneCommand) {
        let Some(lane) = self.lanes.get_mut(&at.id) else { return };
        match &mut lane.next {
            Some(next) if next.served.at() == at => next.commands.push_back(command),
            _ if lane.at == at && !lane.leaving => lane.outbox.push_back(command),
            _ => {}
        }
    }
}
