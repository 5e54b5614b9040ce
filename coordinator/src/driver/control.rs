//! The control task: cluster, router, registry, calls to workers. Nothing that is done for every
//! token passes through here.

use std::sync::Arc;
use std::time::Duration;

use node::membership::{Leadership, Membership, MembershipError, Watch};
use proto::ids::{Incarnation, PipelineId, SequenceId, Term};
use proto::key::CoordinatorKey;
use proto::keys::Keys;
use proto::plan::WorkerRecord;
use proto::status::Waiting;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::admission::Parking;
use super::clients::{Clients, GONE_AT_ONCE, Then, Totals};
use super::history::History;
use super::lane::{FinishReply, Lane, LaneConfig, LaneEvent, LaneReport, LaneSays, ToWorkers};
use super::lanes::{Lanes, Left};
use super::orders::PlanReply;
use super::registry;
use super::status::Rates;
use super::timed::{timed, wall_clock};
use super::waiting::Teller;
use super::{COMMANDS, Command, DriverConfig, DriverHandle, STOPPING};
use crate::cluster::{self, Cluster};
use crate::metrics;
use crate::router::Router;
use crate::scheduler::{Emission, EmissionEvent, SequenceError};
use crate::tick::Tick;

#[cfg(test)]
pub(super) mod tests;

/// How often time passes: bounds how late a gone client or a deadline is seen.
const TICK: Duration = Duration::from_millis(50);

/// Requests about which something is done at once, if it is to be done about many: the queue may be
/// as long as `limits.waiting_requests`, and others wait for this task meanwhile.
pub(super) const CHORES_AT_ONCE: usize = 32;

/// A pipeline that computed something within this is ready. Lanes ask one that is silent for a token
/// well before.
pub(super) const READY_WITHIN: Duration = Duration::from_secs(10);

/// How often the gauges of every pipeline are set: there may be a thousand of them.
const MEASURE_PIPELINES: Duration = Duration::from_secs(1);

/// What lanes are given to tell clients that everything stops: nothing waits there.
const LANES_TIMEOUT: Duration = Duration::from_millis(500);

/// How something that the driver had started ended.
#[expect(clippy::large_enum_variant, reason = "nearly all are events, and each is moved once")]
pub(super) enum Outcome {
    /// The cluster is told this.
    Event(cluster::Event),
    /// The campaign ended.
    Campaigned(Result<Leadership, MembershipError>),
    /// The cluster's id was read or written, by the leader of this term.
    ClusterId { term: Term, id: Result<String, String> },
    /// Who leads was looked up, as far as the registry answered.
    Leader { found: Result<Option<String>, String>, again: bool },
}

/// The control task.
pub(crate) struct Driver {
    pub(super) config: DriverConfig,
    pub(super) keys: Keys,
    /// Shown to workers with every call.
    pub(super) key: CoordinatorKey,
    /// Of this process start.
    pub(super) incarnation: Incarnation,
    pub(super) membership: Arc<dyn Membership>,
    pub(super) started: Instant,
    pub(super) cluster: Cluster,
    pub(super) router: Router,
    /// Of those who are in the router's queue; the others are with their lanes.
    pub(super) clients: Clients,
    pub(super) totals: Arc<Totals>,
    pub(super) parking: Parking,
    pub(super) lanes: Lanes,
    lane_events: mpsc::Receiver<LaneEvent>,
    pub(super) workers: Watch,
    /// The list of workers that is being read; what the registry says after it waits.
    pub(super) listing: Option<JoinHandle<Vec<WorkerRecord>>>,
    pub(super) cluster_ids: Watch,
    pub(super) history: History,
    pub(super) leadership: Option<Leadership>,
    /// Who leads in place of this coordinator, as far as it knows.
    pub(super) leader: Option<String>,
    pub(super) looks_for_leader: bool,
    /// Of campaigns, and of the cluster's id.
    pub(super) refused_campaigns: registry::Refusals,
    pub(super) refused_ids: registry::Refusals,
    /// When the registry was last asked something, and what was wrong with its answer.
    pub(super) registry: Option<(Tick, Option<String>)>,
    /// Operators who wait for a plan.
    pub(super) planners: Vec<PlanReply>,
    pub(super) teller: Teller,
    pub(super) rates: Rates,
    measured_pipelines: Tick,
    commands: mpsc::Receiver<Command>,
    /// Calls to workers and to the registry that have not ended.
    pub(super) calls: JoinSet<Outcome>,
    /// The plan that is being made is given up when this goes.
    pub(super) deploying: Option<DropGuard>,
    pub(super) ready: watch::Sender<bool>,
    pub(super) stop: CancellationToken,
    /// There are more clients who went away than were looked for at once.
    more_gone: bool,
    /// There are more who waited for too long than were told at once.
    more_late: bool,
    /// Why those who wait are being failed.
    pub(super) failing: Option<String>,
    /// Why those who wait for a pipeline are being refused.
    pub(super) refusing: Option<String>,
    /// When it was told to stop.
    stopped_at: Option<Instant>,
    /// Requests are refused from now on.
    closed: bool,
}

impl Driver {
    /// A driver and the way to it. It does nothing until it is run; `stop` ends it.
    pub(crate) fn new(
        config: DriverConfig,
        keys: Keys,
        membership: Arc<dyn Membership>,
        stop: CancellationToken,
    ) -> (Self, DriverHandle) {
        let (command_sender, commands) = mpsc::channel(COMMANDS);
        let (ready, their_ready) = watch::channel(false);
        let (started, totals) = (Instant::now(), Arc::new(Totals::default()));
        // `rand`'s default source is the system's, through a cipher: it cannot be guessed.
        let key = CoordinatorKey::new(rand::random());
        let lane_config = LaneConfig {
            limits: config.limits,
            started,
            first_token: config.first_token,
            vocab: config.vocab,
            totals: Arc::clone(&totals),
        };
        let runtime = config.lanes.clone();
        let (lanes, lane_events) = Lanes::new(Box::new(move |served, ends, tasks| {
            let lane = Lane::new(lane_config.clone(), served, Box::new(ToWorkers(key)), ends);
            tasks.spawn_on(lane.run(), &runtime);
        }));
        let workers = membership.watch(&keys.workers());
        let cluster_ids = membership.watch(&keys.cluster_id());
        let driver = Self {
            cluster: Cluster::new(config.cluster.clone()),
            router: Router::new(config.limits),
            config,
            keys,
            key,
            incarnation: Incarnation(rand::random()),
            membership,
            started,
            clients: Clients::new(Arc::clone(&totals)),
            totals,
            parking: Parking::default(),
            lanes,
            lane_events,
            workers,
            listing: None,
            cluster_ids,
            history: History::default(),
            leadership: None,
            leader: None,
            looks_for_leader: false,
            refused_campaigns: registry::Refusals::default(),
            refused_ids: registry::Refusals::default(),
            registry: None,
            planners: Vec::new(),
            teller: Teller::default(),
            rates: Rates::default(),
            measured_pipelines: Tick::ZERO,
            commands,
            calls: JoinSet::new(),
            deploying: None,
            ready,
            stop,
            more_gone: false,
            more_late: false,
            failing: None,
            refusing: None,
            stopped_at: None,
            closed: false,
        };
        (driver, DriverHandle { commands: command_sender, ready: their_ready })
    }

    /// Leads, places and serves until the stop, then lets open answers end within the grace.
    /// `answered` is dropped when none is open any more.
    pub(crate) async fn run(self, answered: DropGuard) {
        let poll_seconds = metrics::task_poll("control");
        // It is large: all that the driver owns.
        let work = Box::pin(self.work(answered));
        timed(work, wall_clock(), move |took| poll_seconds.record(took)).await;
    }

    async fn work(mut self, answered: DropGuard) {
        let mut ticks = tokio::time::interval(TICK);
        // A late tick is a tick: nothing is owed for those that were missed.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.campaign();
        let stop = self.stop.clone();
        loop {
            let lost = self.leadership.as_ref().map(|leadership| leadership.lost.clone());
            tokio::select! {
                () = stop.cancelled(), if self.stopped_at.is_none() => self.begin_to_stop(),
                Some(command) = self.commands.recv() => self.obey(command),
                event = self.workers.next(), if self.listing.is_none() => self.on_registry(event),
                records = read(&mut self.listing) => self.on_listed(records),
                event = self.cluster_ids.next() => self.on_cluster_id(&event),
                Some(event) = self.lane_events.recv() => self.on_lane(event),
                end = self.lanes.joined() => on_end(end),
                Some(outcome) = self.calls.join_next() => self.on_outcome(outcome),
                () = fired(lost) => self.on_leadership_lost(),
                () = std::future::ready(()), if self.has_chores() => self.do_chores(),
                _ = ticks.tick() => self.on_tick(),
            }
            self.place();
            self.lanes.flush().await;
            if self.is_over() {
                break;
            }
            // One thing at a time: what else this thread is to do has its turn in between.
            tokio::task::yield_now().await;
        }
        self.end(answered).await;
    }

    /// Not ready from this moment, so that nobody new is sent here; requests that come in spite of
    /// that are taken for a while.
    fn begin_to_stop(&mut self) {
        self.stopped_at = Some(Instant::now());
        self.ready.send_replace(false);
        self.close_if_due();
    }

    /// Refuses requests once those who send them had the time to see that it stops.
    fn close_if_due(&mut self) {
        let lame_duck = self.config.lame_duck.min(self.config.grace);
        if !self.closed && self.stopped_at.is_some_and(|since| since.elapsed() >= lame_duck) {
            self.closed = true;
            self.router.close();
            self.refusing = Some(STOPPING.to_owned());
        }
    }

    /// Whether requests are refused because everything stops.
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether it was told to stop.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopped_at.is_some()
    }

    fn is_over(&self) -> bool {
        let Some(since) = self.stopped_at else { return false };
        self.closed && self.router.is_empty() || since.elapsed() >= self.config.grace
    }

    /// The end of everything that is still open.
    async fn end(mut self, answered: DropGuard) {
        self.ready.send_replace(false);
        self.refusing = Some(STOPPING.to_owned());
        self.failing = Some(STOPPING.to_owned());
        while self.has_chores() {
            self.do_chores();
        }
        self.lanes.stop(STOPPING);
        let told = async {
            self.lanes.flush().await;
            while !self.lanes.is_empty()
                && let Some(event) = self.lane_events.recv().await
            {
                if matches!(event.says, LaneSays::Left) {
                    self.lanes.left(event.at.id);
                }
            }
        };
        if tokio::time::timeout(LANES_TIMEOUT, told).await.is_err() {
            tracing::warn!(
                "lanes did not end in time, their clients hear it when they are dropped"
            );
        }
        // Whoever waits for the last answer waits for nothing that the registry may do.
        drop(answered);
        if let Some(leadership) = self.leadership.take() {
            registry::resign(leadership.resign()).await;
        }
    }

    pub(super) fn now(&self) -> Tick {
        Tick(self.started.elapsed())
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit { submission, reply } => self.submit(submission, reply),
            Command::Finish { sequence, reply } => self.finish(sequence, reply),
            Command::Status { reply } => {
                let _ = reply.send(self.status());
            }
            Command::Checks { reply } => {
                let _ = reply.send(self.checks());
            }
            Command::Drain { order, reply } => {
                let _ = reply.send(self.drain(&order));
            }
            Command::Plan { cluster_id, least_gain, reply } => {
                self.plan_now(&cluster_id, least_gain, reply);
            }
            Command::Question { cluster_id, reply } => {
                let _ = reply.send(self.question(&cluster_id));
            }
        }
    }

    /// An answer is complete for its client: whoever has its sequence ends it.
    fn finish(&mut self, sequence: SequenceId, reply: FinishReply) {
        if let Some(pipeline) = self.router.pipeline_of(sequence) {
            return self.lanes.finish(pipeline, sequence, reply);
        }
        let now = self.now();
        let withdrawn = self.router.withdraw(sequence);
        let timings = withdrawn.map(|sequence| sequence.timings(now));
        if let Some(timings) = timings {
            self.clients.finish(sequence, timings, now);
        }
        let _ = reply.send(timings);
    }

    /// Sends those who may run to their pipelines.
    fn place(&mut self) {
        for (pipeline, growth) in self.lanes.growth() {
            self.router.set_growth(pipeline, growth);
        }
        for assigned in self.router.assign() {
            let id = assigned.sequence.id();
            let Some(client) = self.clients.take(id) else {
                self.router.ended(id);
                continue;
            };
            let placed = self.lanes.assign(assigned.pipeline, assigned.sequence, client);
            if let Err((sequence, client)) = placed {
                // No lane, no account: cannot be. Nobody is lost over it.
                tracing::warn!(pipeline = %assigned.pipeline, "no lane for an assigned sequence");
                self.router.remove_pipeline(assigned.pipeline);
                self.clients.put(id, client);
                self.router.returned(sequence);
            }
        }
    }

    fn on_lane(&mut self, LaneEvent { at, says }: LaneEvent) {
        let is_current = self.lanes.is_current(at);
        let event = match says {
            LaneSays::Ended(sequence) => return self.router.ended(sequence),
            LaneSays::Charged(charges) => return self.router.charge(&charges),
            LaneSays::Returned(sequences) => {
                for (sequence, client) in sequences {
                    self.clients.put(sequence.id(), client);
                    self.router.returned(sequence);
                }
                return;
            }
            // It was given back before this, and may run elsewhere by now; or it has ended.
            LaneSays::NotHere { sequence, reply } => return self.finish(sequence, reply),
            LaneSays::Left => return self.on_left(at.id),
            LaneSays::Ready => return self.measure_readiness(),
            LaneSays::Paused => cluster::Event::Paused { at },
            LaneSays::StreamBroken { stage, detail } => {
                cluster::Event::StreamBroken { at, stage, detail }
            }
            LaneSays::Fenced { detail } => cluster::Event::Fenced { at, detail },
            LaneSays::Strange { stage, detail } => cluster::Event::Strange { at, stage, detail },
            LaneSays::StepOverdue => cluster::Event::StepOverdue { at },
            LaneSays::Flowing => cluster::Event::ResultsFlowing { at },
        };
        if is_current {
            self.tell_cluster(event);
        }
    }

    /// Whether something is left of what is done for many at once, some of them at a time.
    fn has_chores(&self) -> bool {
        let refuses = self.refusing.is_some() || self.failing.is_some();
        let sorts = self.router.is_sorting();
        refuses || sorts || self.more_gone || self.more_late || self.may_unpark()
    }

    /// Does some of it.
    fn do_chores(&mut self) {
        if let Some(reason) = self.failing.take() {
            let emissions = self.router.fail_waiting(&reason, CHORES_AT_ONCE);
            self.failing = Some(reason).filter(|_| emissions.len() == CHORES_AT_ONCE);
            self.emit(emissions);
        } else if self.refusing.is_some() {
            self.refuse_parked();
        } else if self.router.is_sorting() {
            self.router.sort_some();
        } else if self.more_gone {
            self.forget_gone();
        } else if self.more_late {
            self.expire();
        } else {
            self.unpark();
        }
    }

    fn forget_gone(&mut self) {
        let gone = self.clients.take_gone();
        self.more_gone = gone.len() == GONE_AT_ONCE;
        for sequence in gone {
            self.router.withdraw(sequence);
        }
    }

    fn expire(&mut self) {
        let now = self.now();
        let late = self.router.expire(now, CHORES_AT_ONCE);
        let late: Vec<_> = late.into_iter().map(|late| self.with_reason(late)).collect();
        let parked = self.expire_parked(now);
        self.more_late = late.len() == CHORES_AT_ONCE || parked == CHORES_AT_ONCE;
        self.emit(late);
    }

    /// What is said of a sequence that waited for a pipeline in vain: why there is none, or none that
    /// takes anybody.
    fn with_reason(&self, late: Emission) -> Emission {
        let EmissionEvent::Failed(SequenceError::NoPipeline { waited, .. }) = late.event else {
            return late;
        };
        let Some(Waiting { detail: why, .. }) = self.cluster.why_held() else { return late };
        let reason = format!("waited {} s for a pipeline: {why}", waited.as_secs());
        let event = EmissionEvent::Failed(SequenceError::PipelineLost { reason });
        Emission { sequence: late.sequence, event }
    }

    /// A pipeline has given everyone back.
    fn on_left(&mut self, pipeline: PipelineId) {
        match self.lanes.left(pipeline) {
            Left::Gone => self.router.remove_pipeline(pipeline),
            Left::Again => self.router.hold(pipeline, false),
        }
    }

    fn on_tick(&mut self) {
        self.close_if_due();
        self.forget_gone();
        self.expire();
        self.tell_cluster(cluster::Event::Tick);
        self.measure_readiness();
        self.tell_waiting();
        self.measure();
    }

    /// Ready is what has computed something within the last seconds, and is not to stop.
    pub(super) fn measure_readiness(&mut self) {
        let (now, proven) = (self.now(), self.lanes.proven());
        let is_proven = proven.is_some_and(|proven| now.since(proven) < READY_WITHIN);
        let ready = is_proven && !self.is_stopping();
        if self.ready.send_replace(ready) != ready {
            tracing::info!(ready, "readiness changed");
        }
    }

    fn measure(&mut self) {
        let counted = self.totals.counted();
        self.rates.sample(self.now(), counted);
        let reports = self.lanes.reports();
        let steps: u32 = reports.iter().map(|report| report.stats.steps_in_flight).sum();
        metrics::queue(&self.queue(), steps);
        metrics::tokens(counted);
        if self.now().since(self.measured_pipelines) >= MEASURE_PIPELINES {
            self.measured_pipelines = self.now();
            for (slot, report) in self.lanes.slots() {
                let LaneReport { at, stats, budget, .. } = report.unwrap_or_default();
                metrics::pipeline(slot, at, &stats);
                metrics::step_budget(slot, &budget);
            }
        }
        let term = self.leadership.as_ref().map_or(0, |leadership| leadership.term);
        let epoch = self.lanes.serving().iter().map(|at| at.epoch.0).max().unwrap_or(0);
        metrics::membership(term, epoch, *self.ready.borrow());
    }

    fn on_outcome(&mut self, outcome: Result<Outcome, JoinError>) {
        match outcome {
            Ok(Outcome::Event(event)) => self.tell_cluster(event),
            Ok(Outcome::Campaigned(Ok(leadership))) => {
                let term = Term(leadership.term);
                tracing::info!(%term, "leads");
                self.refused_campaigns.end();
                self.leadership = Some(leadership);
                self.on_leadership(term);
            }
            Ok(Outcome::Campaigned(Err(error))) if self.stop.is_cancelled() => {
                tracing::debug!(error = %node::Chain(&error), "campaign ended with the process");
            }
            Ok(Outcome::Campaigned(Err(error))) => {
                let error = node::Chain(&error).to_string();
                if let Some(times) = self.refused_campaigns.count(self.now(), &error) {
                    tracing::error!(error, times, "failed to campaign, trying again");
                }
                self.campaign_later();
            }
            Ok(Outcome::ClusterId { term, id }) => self.on_settled(term, id),
            Ok(Outcome::Leader { found, again }) => self.on_leader(found, again),
            // Nothing is known of what it did, and the cluster would wait for its answer for ever.
            Err(error) => on_end(Err(error)),
        }
    }

    fn on_leadership_lost(&mut self) {
        tracing::warn!("leadership is lost; what is placed goes on serving");
        self.leadership = None;
        self.tell_cluster(cluster::Event::TermLost);
        self.campaign();
    }

    /// Tells the clients of those who waited what happened to their sequences.
    pub(super) fn emit(&mut self, emissions: Vec<Emission>) {
        let now = self.now();
        for emission in emissions {
            let sequence = emission.sequence;
            if self.clients.tell(emission, now) == Then::Cancel {
                self.router.withdraw(sequence);
            }
        }
    }
}

/// A task of ours ended. Its panic is a bug here: the process ends, and another leads.
pub(super) fn on_end(end: Result<(), JoinError>) {
    if let Err(error) = end {
        match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => tracing::debug!(%error, "a task was aborted"),
        }
    }
}

/// Waits for a list that may not be there.
async fn read(
    listing: &mut Option<JoinHandle<Vec<WorkerRecord>>>,
) -> Result<Vec<WorkerRecord>, JoinError> {
    match listing {
        Some(listing) => listing.await,
        None => std::future::pending().await,
    }
}

/// Waits for a token that may not be there.
async fn fired(token: Option<CancellationToken>) {
    match token {
        Some(token) => token.cancelled().await,
        None => std::future::pending().await,
    }
}
