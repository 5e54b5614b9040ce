//! One pipeline as it serves: a task that owns its scheduler, its two links and the clients of what
//! runs on it. Tokens go from here to the clients, past everyone else; the control task hears how
//! sequences ended, and what is wrong with the pipeline.
//!
//! ```text
//! control ──LaneCommand──▶ ┌──────┐ ──Step──▶ first stage
//!         ◀──LaneEvent──── │ lane │ ◀─StepResult── last stage
//! clients ◀────tokens───── └──────┘
//! ```

mod path;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use proto::generate::Timings;
use proto::ids::{NumericsClass, PipelineRef, SequenceId, Term};
use proto::plan::StagePlan;
use proto::status::StepBudget;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};

use super::clients::{Client, Clients, GONE_AT_ONCE, HELD_MOST, Reader, Then, Totals};
use super::timed::{timed, wall_clock};
use crate::scheduler::{
    Charge, Emission, EmissionEvent, Limits, PipelineScheduler, PipelineShape, PipelineStats,
    Sequence,
};
use crate::tick::Tick;
use crate::workers::{LINK_EVENTS, LinkEvent};

use path::Path;
pub(super) use path::{StageMeans, ToWorkers, Trips, Wire};

/// How often time passes in a lane: bounds how late a gone client, a deadline or an overdue step is
/// seen.
const TICK: Duration = Duration::from_millis(50);

/// Commands that may lie before a lane: it takes them as they come, and whoever sends more waits.
pub(super) const LANE_COMMANDS: usize = 256;

/// How often it is said that results flow: the control task waits for seconds before it does anything
/// about those that do not, and has as many lanes to listen to as there are pipelines.
const FLOWING_INTERVAL: Duration = Duration::from_millis(500);

/// A pipeline from which nothing has come for so long is asked for a token: well before anybody
/// would take it for unready.
const PROBE_AFTER: Duration = Duration::from_secs(3);

/// How long a pause waits for the steps that are on their way.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What a lane has to say of its pipeline before it says no more: what is said again anyway is left
/// out while so much of it was not heard.
const UNHEARD: usize = 64;

/// A pipeline that is to serve.
#[derive(Clone, Debug)]
pub(super) struct Served {
    pub(super) shape: PipelineShape,
    pub(super) stages: Vec<StagePlan>,
    /// Of every stage.
    pub(super) class: NumericsClass,
}

impl Served {
    pub(super) fn at(&self) -> PipelineRef {
        PipelineRef { id: self.shape.pipeline, epoch: self.shape.epoch }
    }
}

/// Whoever ended an answer waits for this.
pub(super) type FinishReply = oneshot::Sender<Option<Timings>>;

/// What a lane is told.
pub(super) enum LaneCommand {
    /// A sequence runs here from now on.
    Assign { sequence: Box<Sequence>, client: Client },
    /// An answer is complete for its client.
    Finish { sequence: SequenceId, reply: FinishReply },
    /// Open the links that touch a stage again, and send what was not acknowledged.
    Reconnect { stage: u32 },
    /// Send no more steps; say [`LaneSays::Paused`] once none is on its way.
    Pause,
    /// Send again.
    Resume,
    /// Go on with another epoch.
    Switch(Box<Served>),
    /// Steps are sent in this reign from now on.
    Term(Term),
    /// Give everyone back: the pipeline goes as planned.
    Leave,
    /// The same: the pipeline is lost. Who dies too often fails with the reason.
    Fail { reason: String },
    /// Fail everyone with the reason.
    Stop { reason: String },
}

/// What a lane says, and of which pipeline.
pub(super) struct LaneEvent {
    pub(super) at: PipelineRef,
    pub(super) says: LaneSays,
}

pub(super) enum LaneSays {
    /// What callers were served since that was last said.
    Charged(Vec<Charge>),
    /// A sequence has ended; its client knows.
    Ended(SequenceId),
    /// These are to go on elsewhere.
    Returned(Vec<(Box<Sequence>, Client)>),
    /// Who is to be finished is not here: it has ended, or was given back before this.
    NotHere {
        sequence: SequenceId,
        reply: FinishReply,
    },
    /// No step is on its way, or they took too long.
    Paused,
    StreamBroken {
        stage: u32,
        detail: String,
    },
    Fenced {
        detail: String,
    },
    /// What a stage computed cannot be of the model.
    Strange {
        stage: u32,
        detail: String,
    },
    StepOverdue,
    /// Results came since that was last said.
    Flowing,
    /// The first token of this epoch came through.
    Ready,
    /// Everyone was given back, and nothing more will run here.
    Left,
}

/// How a lane is, told at every tick.
#[derive(Clone, Debug, Default)]
pub(super) struct LaneReport {
    pub(super) at: PipelineRef,
    pub(super) stats: PipelineStats,
    pub(super) stages: Vec<StageMeans>,
    pub(super) trips: Trips,
    pub(super) budget: StepBudget,
    /// When it last computed something, if it has sampled a token in this epoch; else when the epochs
    /// before it did, which it went on from.
    pub(super) proven: Option<Tick>,
}

/// What all lanes are made with.
#[derive(Clone)]
pub(super) struct LaneConfig {
    pub(super) limits: Limits,
    /// What ticks count from.
    pub(super) started: Instant,
    /// What a probe goes on from.
    pub(super) first_token: u32,
    /// Token ids are below.
    pub(super) vocab: u32,
    pub(super) totals: Arc<Totals>,
}

/// The ends that are the lane's.
pub(super) struct LaneEnds {
    pub(super) commands: mpsc::Receiver<LaneCommand>,
    pub(super) events: mpsc::Sender<LaneEvent>,
    pub(super) report: watch::Sender<LaneReport>,
    /// Its number among the lanes that are there, for metrics.
    pub(super) slot: u32,
}

/// One pipeline as it serves.
pub(super) struct Lane {
    config: LaneConfig,
    at: PipelineRef,
    class: NumericsClass,
    scheduler: PipelineScheduler,
    path: Path,
    clients: Clients,
    ends: LaneEnds,
    link_events: mpsc::Receiver<LinkEvent>,
    /// Not heard by the control task yet. At most two for each sequence, and [`UNHEARD`] more.
    unheard: VecDeque<LaneEvent>,
    /// Since when it is to pause, until it was said that it does.
    pausing: Option<Tick>,
    /// Results came that were not told of.
    flowing: bool,
    /// When they were last told of in this epoch.
    told_flowing: Option<Tick>,
    /// It was said that this epoch is proven.
    told_ready: bool,
    /// When an earlier epoch last computed something.
    proven_before: Option<Tick>,
    last_probe: Tick,
    /// There are more clients who went away than were looked for at once.
    more_gone: bool,
    left: bool,
    /// Their clients read nothing at present: since when, and how many tokens they are behind.
    held: BTreeMap<SequenceId, (Tick, usize)>,
    /// As of the last report.
    counted: PipelineStats,
}

impl Lane {
    pub(super) fn new(
        config: LaneConfig,
        served: Served,
        wire: Box<dyn Wire>,
        ends: LaneEnds,
    ) -> Self {
        let (link_sender, link_events) = mpsc::channel(LINK_EVENTS);
        let at = served.at();
        Self {
            at,
            class: served.class,
            scheduler: PipelineScheduler::new(config.limits, served.shape),
            path: Path::new(served.shape, served.stages, ends.slot, wire, link_sender)
                .with_vocab(config.vocab),
            clients: Clients::new(Arc::clone(&config.totals)),
            config,
            ends,
            link_events,
            unheard: VecDeque::new(),
            pausing: None,
            flowing: false,
            told_flowing: None,
            told_ready: false,
            proven_before: None,
            last_probe: Tick::ZERO,
            more_gone: false,
            left: false,
            held: BTreeMap::new(),
            counted: PipelineStats::default(),
        }
    }

    /// Serves until the control task lets go of it.
    pub(super) async fn run(self) {
        let poll_seconds = crate::metrics::task_poll("lane");
        timed(self.work(), wall_clock(), move |took| poll_seconds.record(took)).await;
    }

    async fn work(mut self) {
        let events = self.ends.events.clone();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.path.open();
        self.probe();
        self.send_steps();
        let mut is_over = false;
        loop {
            tokio::select! {
                permit = events.reserve(), if !self.unheard.is_empty() => {
                    let Ok(permit) = permit else { break };
                    if let Some(event) = self.unheard.pop_front() {
                        permit.send(event);
                    }
                }
                command = self.ends.commands.recv(), if !is_over => match command {
                    Some(command) => self.obey(command),
                    None => is_over = true,
                },
                Some(event) = self.link_events.recv() => self.on_link(event),
                () = std::future::ready(()), if self.more_gone => self.cancel_gone(),
                _ = ticks.tick() => self.on_tick(),
            }
            // Whoever waits for an answer of this lane gets it.
            if is_over && self.unheard.is_empty() {
                break;
            }
            self.send_steps();
            // One thing at a time: a burst of results must not keep the thread from other lanes.
            tokio::task::yield_now().await;
        }
    }

    fn now(&self) -> Tick {
        Tick(self.config.started.elapsed())
    }

    fn say(&mut self, says: LaneSays) {
        if matches!(says, LaneSays::Ended(_) | LaneSays::Returned(_)) {
            // Its blocks are free before the router hears that it is, and what it got is charged to a
            // caller who is still known.
            let growth = self.scheduler.growth();
            self.ends.report.send_modify(|report| report.stats.growth = growth);
            self.say_charges();
        }
        self.unheard.push_back(LaneEvent { at: self.at, says });
    }

    /// Says what callers were served, if anything.
    fn say_charges(&mut self) {
        let charges = self.scheduler.take_charges();
        if !charges.is_empty() {
            self.unheard.push_back(LaneEvent { at: self.at, says: LaneSays::Charged(charges) });
        }
    }

    /// Says what will be said again, or follows from the last: not if nobody listens.
    fn mention(&mut self, says: LaneSays) {
        if self.unheard.len() < UNHEARD {
            self.say(says);
        }
    }

    fn obey(&mut self, command: LaneCommand) {
        let now = self.now();
        match command {
            LaneCommand::Assign { sequence, client } if self.left => {
                self.say(LaneSays::Returned(vec![(sequence, client)]));
            }
            LaneCommand::Assign { sequence, client } => {
                self.clients.put(sequence.id(), client);
                self.scheduler.admit(sequence);
            }
            LaneCommand::Finish { sequence, reply } => self.finish(sequence, reply, now),
            LaneCommand::Reconnect { stage } => self.path.reconnect(stage),
            LaneCommand::Pause => {
                self.scheduler.pause(true);
                self.pausing = Some(now);
                self.say_if_paused(now);
            }
            LaneCommand::Resume => {
                self.scheduler.pause(false);
                self.pausing = None;
            }
            LaneCommand::Switch(served) => self.switch(*served, now),
            LaneCommand::Term(term) => {
                self.scheduler.set_term(term);
                self.path.set_term(term);
            }
            LaneCommand::Leave => {
                let returned = self.scheduler.take_all(now);
                self.leave(returned);
            }
            LaneCommand::Fail { reason } => {
                let lost = self.scheduler.lose(&reason, now);
                self.emit(lost.emissions, now);
                self.leave(lost.returned);
            }
            LaneCommand::Stop { reason } => {
                let emissions = self.scheduler.fail_all(&reason);
                self.emit(emissions, now);
                self.leave([]);
            }
        }
    }

    fn finish(&mut self, sequence: SequenceId, reply: FinishReply, now: Tick) {
        let Some(timings) = self.scheduler.finish(sequence, now) else {
            return self.say(LaneSays::NotHere { sequence, reply });
        };
        self.clients.finish(sequence, timings, now);
        self.say(LaneSays::Ended(sequence));
        // Who asked may have gone.
        let _ = reply.send(Some(timings));
    }

    fn switch(&mut self, served: Served, now: Tick) {
        self.proven_before = self.last_proven();
        // They go on where they began, or not at all: another class gives other tokens.
        let returned = if served.class == self.class {
            self.scheduler.switch(served.shape, now)
        } else {
            let all = self.scheduler.take_all(now);
            self.scheduler.switch(served.shape, now);
            all
        };
        self.give_back(returned);
        (self.at, self.class) = (served.at(), served.class);
        self.scheduler.pause(false);
        self.pausing = None;
        self.told_ready = false;
        (self.flowing, self.told_flowing) = (false, None);
        self.path.switch(served.shape, served.stages);
        self.probe();
        self.report();
    }

    fn leave(&mut self, returned: impl IntoIterator<Item = Box<Sequence>>) {
        self.give_back(returned);
        self.path.close();
        self.left = true;
        self.report();
        self.say(LaneSays::Left);
    }

    fn give_back(&mut self, sequences: impl IntoIterator<Item = Box<Sequence>>) {
        let mut returned = Vec::new();
        for sequence in sequences {
            match self.clients.take(sequence.id()) {
                Some(client) => returned.push((sequence, client)),
                None => self.say(LaneSays::Ended(sequence.id())),
            }
        }
        if !returned.is_empty() {
            self.say(LaneSays::Returned(returned));
        }
    }

    fn on_link(&mut self, event: LinkEvent) {
        match self.path.take(event) {
            path::Heard::Nothing => {}
            path::Heard::Result(result) => {
                let now = self.now();
                self.flowing = true;
                let emissions = self.scheduler.complete(result, now);
                self.emit(emissions, now);
                if self.scheduler.proven().is_some() && !self.told_ready {
                    self.told_ready = true;
                    self.report();
                    self.say(LaneSays::Ready);
                }
                self.say_if_paused(now);
            }
            // Said once, and nothing goes on before somebody has heard it.
            path::Heard::Broken { stage, detail } => {
                self.say(LaneSays::StreamBroken { stage, detail });
            }
            path::Heard::Strange { stage, detail } => {
                self.mention(LaneSays::Strange { stage, detail });
            }
            path::Heard::Fenced { detail } => self.mention(LaneSays::Fenced { detail }),
        }
    }

    fn on_tick(&mut self) {
        let now = self.now();
        self.cancel_gone();
        self.release_readers(now);
        let expired = self.scheduler.expire(now);
        self.emit(expired, now);
        if self.left {
            return;
        }
        if let Some(step) = self.scheduler.overdue(now) {
            tracing::debug!(%step, pipeline = %self.at, "step is overdue");
            self.mention(LaneSays::StepOverdue);
        }
        let is_due = self.told_flowing.is_none_or(|told| now.since(told) >= FLOWING_INTERVAL);
        if self.flowing && is_due {
            (self.flowing, self.told_flowing) = (false, Some(now));
            if self.unheard.len() < UNHEARD {
                self.say_charges();
            }
            self.mention(LaneSays::Flowing);
        }
        self.path.retry();
        self.say_if_paused(now);
        let silent_since = self.scheduler.proven().unwrap_or(Tick::ZERO).max(self.last_probe);
        if self.scheduler.proven().is_none() || now.since(silent_since) >= PROBE_AFTER {
            self.probe();
        }
        self.report();
    }

    /// Frees what nobody wants any more, some of it at a time.
    fn cancel_gone(&mut self) {
        let gone = self.clients.take_gone();
        self.more_gone = gone.len() == GONE_AT_ONCE;
        for sequence in gone {
            self.scheduler.cancel(sequence);
            self.say(LaneSays::Ended(sequence));
        }
    }

    /// Lets the answers go on that are read again, and ends those that are not for too long. Whoever has
    /// ended or left is forgotten here.
    fn release_readers(&mut self, now: Tick) {
        let mut given_up = Vec::new();
        let (clients, scheduler) = (&self.clients, &mut self.scheduler);
        self.held.retain(|&sequence, (since, least)| match clients.look_at(sequence) {
            Reader::Reads => {
                scheduler.release(sequence);
                false
            }
            Reader::IsBehind(behind) => {
                if behind < *least {
                    (*since, *least) = (now, behind);
                }
                let is_over = now.since(*since) >= HELD_MOST;
                given_up.extend(is_over.then_some(sequence));
                !is_over
            }
        });
        for sequence in given_up {
            self.clients.give_up(sequence);
            if self.scheduler.cancel(sequence) {
                self.say(LaneSays::Ended(sequence));
            }
        }
    }

    fn probe(&mut self) {
        self.last_probe = self.now();
        self.scheduler.probe(self.config.first_token);
    }

    fn send_steps(&mut self) {
        while let Some(scheduled) = self.scheduler.next_step(self.now()) {
            let deadline = self.config.started + scheduled.deadline.0;
            self.path.send(scheduled.step, deadline);
        }
        let pushed_out = self.scheduler.take_pushed_out();
        self.give_back(pushed_out);
    }

    fn say_if_paused(&mut self, now: Tick) {
        let Some(since) = self.pausing else { return };
        if self.scheduler.stats().steps_in_flight == 0 || now.since(since) >= PAUSE_TIMEOUT {
            self.pausing = None;
            self.say(LaneSays::Paused);
        }
    }

    /// Tells clients what happened to their sequences.
    fn emit(&mut self, emissions: Vec<Emission>, now: Tick) {
        for emission in emissions {
            let sequence = emission.sequence;
            let ended =
                matches!(emission.event, EmissionEvent::Finished { .. } | EmissionEvent::Failed(_));
            let then = self.clients.tell(emission, now);
            if then == Then::Hold {
                self.scheduler.hold(sequence);
                self.held.entry(sequence).or_insert((now, usize::MAX));
            }
            let cancelled = then == Then::Cancel && self.scheduler.cancel(sequence);
            if ended || cancelled {
                self.say(LaneSays::Ended(sequence));
            }
        }
    }

    fn report(&mut self) {
        let stats = self.scheduler.stats();
        let grown = |now: u64, before: u64| now.saturating_sub(before);
        self.config.totals.count_tokens(
            grown(stats.prompt_tokens, self.counted.prompt_tokens),
            grown(stats.generated_tokens, self.counted.generated_tokens),
        );
        let preemptions = grown(stats.preempted, self.counted.preempted);
        self.config.totals.count_preemptions(preemptions);
        self.config.totals.count_prefixes(
            grown(stats.prefix_queries, self.counted.prefix_queries),
            grown(stats.prefix_hits, self.counted.prefix_hits),
        );
        self.counted = stats;
        self.ends.report.send_replace(LaneReport {
            at: self.at,
            stats,
            stages: self.path.stage_times().to_vec(),
            trips: self.path.trips(),
            budget: self.scheduler.budget(),
            proven: self.last_proven(),
        });
    }

    /// When this pipeline last computed something, at whatever epoch.
    fn last_proven(&self) -> Option<Tick> {
        self.scheduler.proven().or(self.proven_before)
    }
}
