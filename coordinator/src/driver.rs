//! The one task that owns the cluster and the scheduler. It turns what happens into their events
//! and carries out their actions, in this order: decide, persist, send. It decides nothing itself.
//!
//! ```text
//! servers ──Command──▶ ┌────────┐ ──Event──▶ Cluster ──Action──▶ registry, control calls, links
//! registry, links ───▶ │ driver │
//! ticks ─────────────▶ └────────┘ ──Request, StepResult──▶ Scheduler ──Step──▶ steps link
//!                           └──── Emission ──▶ clients (bounded channels)
//! ```

mod admission;
mod clients;
mod pipeline;
mod registry;
mod status;
mod waiting;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use node::membership::{Leadership, Membership, MembershipError};
use proto::ids::{Incarnation, NumericsClass, SequenceId, Term};
use proto::key::CoordinatorKey;
use proto::keys::Keys;
use proto::status::ClusterStatus;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::cluster::{self, Action, Cluster, PROBE_PATIENCE};
use crate::metrics;
use crate::request::RequestError;
#[cfg(test)]
use crate::scheduler::EmissionEvent;
use crate::scheduler::{Emission, Limits, Running, Scheduler};
use crate::tick::Tick;
use crate::workers::{self, LINK_EVENTS, LinkEvent};

use admission::Parked;
#[cfg(test)]
pub(crate) use clients::MAX_TOKENS_BEHIND;
pub(crate) use clients::{Admitted, End, Tokens};
use clients::{Clients, Then};
use pipeline::Pipeline;
use status::Rates;
use waiting::Teller;

/// Requests and questions that may wait for the driver; then their senders wait.
const COMMANDS: usize = 1024;

/// How often time passes: bounds how late a gone client, a deadline or an overdue step is seen.
const TICK: Duration = Duration::from_millis(50);

/// What is asked of the driver.
pub(crate) enum Command {
    /// Take a request.
    Submit { submission: Box<Submission>, reply: oneshot::Sender<Result<Admitted, RequestError>> },
    /// An answer is complete for its client.
    Finish { sequence: SequenceId, reply: oneshot::Sender<Option<proto::generate::Timings>> },
    /// Tell how things are.
    Status { reply: oneshot::Sender<ClusterStatus> },
}

/// A request on its way to the scheduler.
pub(crate) struct Submission {
    pub(crate) request: crate::scheduler::Request,
    /// When its head arrived.
    pub(crate) arrived: Instant,
    /// `request.max_tokens` is to be filled in: as many as context and KV hold.
    pub(crate) as_many_as_fit: bool,
    /// From now to the last token.
    pub(crate) time_limit: Duration,
    /// The class it must have.
    pub(crate) class: Option<NumericsClass>,
}

/// The way to the driver. Cheap to clone.
#[derive(Clone)]
pub(crate) struct DriverHandle {
    commands: mpsc::Sender<Command>,
    ready: watch::Receiver<bool>,
}

impl DriverHandle {
    /// Hands in a request; returns when it is in the queue, or refused.
    ///
    /// # Errors
    ///
    /// Why it was refused.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future withdraws the request.
    pub(crate) async fn submit(&self, submission: Submission) -> Result<Admitted, RequestError> {
        let (reply, admitted) = oneshot::channel();
        self.tell(Command::Submit { submission: Box::new(submission), reply }).await;
        admitted.await.unwrap_or_else(|_| Err(stopping()))
    }

    /// How things are.
    ///
    /// # Errors
    ///
    /// [`RequestError::Unavailable`] if the driver has ended.
    pub(crate) async fn status(&self) -> Result<ClusterStatus, RequestError> {
        let (reply, status) = oneshot::channel();
        self.tell(Command::Status { reply }).await;
        status.await.map_err(|_| stopping())
    }

    /// Whether a token has come through the active pipeline.
    pub(crate) fn readiness(&self) -> watch::Receiver<bool> {
        self.ready.clone()
    }

    /// A driver that has ended drops the command, and whoever waits for a reply sees that.
    pub(crate) async fn tell(&self, command: Command) {
        let _ = self.commands.send(command).await;
    }
}

fn stopping() -> RequestError {
    RequestError::Unavailable { reason: "the coordinator is stopping".into() }
}

/// What the driver is told at its start.
pub(crate) struct DriverConfig {
    pub(crate) cluster_name: String,
    pub(crate) cluster: cluster::Options,
    pub(crate) limits: Limits,
    /// What candidates for the leadership call this process.
    pub(crate) advertise: String,
    /// Where others reach its HTTP server.
    pub(crate) http: String,
    /// The token that the self-test goes on from.
    pub(crate) first_token: u32,
    /// How long open answers may go on after the stop.
    pub(crate) grace: Duration,
}

/// How something that the driver had started ended.
enum Outcome {
    /// The cluster is told this.
    Event(cluster::Event),
    /// The campaign ended.
    Campaigned(Result<Leadership, MembershipError>),
    /// Who leads was looked up.
    Leader(Option<String>),
    /// Nobody is told.
    Nothing,
}

/// The owner of all state.
pub(crate) struct Driver {
    config: DriverConfig,
    keys: Keys,
    /// Shown to workers with every call.
    key: CoordinatorKey,
    /// Of this process start.
    incarnation: Incarnation,
    membership: Arc<dyn Membership>,
    started: Instant,
    cluster: Cluster,
    scheduler: Scheduler,
    clients: Clients,
    parked: VecDeque<Parked>,
    pipeline: Option<Pipeline>,
    /// Why nothing is served and nothing can be planned.
    no_plan: Option<String>,
    leadership: Option<Leadership>,
    /// Admission is held; `true` once the cluster was told that nothing runs.
    held: Option<bool>,
    next_link: u64,
    /// Who leads in place of this coordinator, as far as it knows.
    leader: Option<String>,
    looks_for_leader: bool,
    teller: Teller,
    rates: Rates,
    commands: mpsc::Receiver<Command>,
    link_events: mpsc::Receiver<LinkEvent>,
    link_events_sender: mpsc::Sender<LinkEvent>,
    /// Calls to workers and to the registry that have not ended.
    calls: JoinSet<Outcome>,
    ready: watch::Sender<bool>,
    stop: CancellationToken,
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
        let (link_events_sender, link_events) = mpsc::channel(LINK_EVENTS);
        let (ready, their_ready) = watch::channel(false);
        let driver = Self {
            cluster: Cluster::new(config.cluster.clone()),
            scheduler: Scheduler::new(config.limits),
            config,
            keys,
            // `rand`'s default source is the system's, through a cipher: it cannot be guessed.
            key: CoordinatorKey::new(rand::random()),
            incarnation: Incarnation(rand::random()),
            membership,
            started: Instant::now(),
            clients: Clients::default(),
            parked: VecDeque::new(),
            pipeline: None,
            no_plan: None,
            leadership: None,
            held: None,
            next_link: 0,
            leader: None,
            looks_for_leader: false,
            teller: Teller::default(),
            rates: Rates::default(),
            commands,
            link_events,
            link_events_sender,
            calls: JoinSet::new(),
            ready,
            stop,
        };
        (driver, DriverHandle { commands: command_sender, ready: their_ready })
    }

    /// Leads, places and serves until the stop, then lets open answers end within the grace.
    pub(crate) async fn run(mut self) {
        let mut workers = self.membership.watch(&self.keys.workers());
        let mut ticks = tokio::time::interval(TICK);
        // A late tick is a tick: nothing is owed for those that were missed.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.campaign();
        let stop = self.stop.clone();
        let mut stopped_at = None;
        loop {
            let lost = self.leadership.as_ref().map(|leadership| leadership.lost.clone());
            tokio::select! {
                () = stop.cancelled(), if stopped_at.is_none() => {
                    stopped_at = Some(Instant::now());
                    self.scheduler.close();
                    self.refuse_parked(stopping);
                }
                Some(command) = self.commands.recv() => self.obey(command),
                event = workers.next() => self.on_registry(event),
                Some(event) = self.link_events.recv() => self.on_link(event),
                Some(outcome) = self.calls.join_next() => self.on_outcome(outcome),
                () = fired(lost) => self.on_leadership_lost(),
                _ = ticks.tick() => self.on_tick(),
            }
            self.send_steps();
            self.tell_if_drained();
            if let Some(since) = stopped_at
                && (self.clients.is_empty() || since.elapsed() >= self.config.grace)
            {
                break;
            }
        }
        self.end().await;
    }

    /// The end of everything that is still open.
    async fn end(mut self) {
        self.ready.send_replace(false);
        let emissions = self.scheduler.fail_all("the coordinator is stopping");
        self.emit(emissions);
        self.pipeline = None;
        if let Some(leadership) = self.leadership.take()
            && let Err(error) = leadership.resign().await
        {
            tracing::info!(error = %node::Chain(&error), "leadership ends with its lease");
        }
    }

    fn now(&self) -> Tick {
        Tick(self.started.elapsed())
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit { submission, reply } => self.submit(*submission, reply),
            Command::Finish { sequence, reply } => {
                let now = self.now();
                let timings = self.scheduler.finish(sequence, now);
                self.clients.finish(sequence, timings.unwrap_or_default(), now);
                let _ = reply.send(timings);
            }
            Command::Status { reply } => {
                let _ = reply.send(self.status());
            }
        }
    }

    fn on_tick(&mut self) {
        let now = self.now();
        for sequence in self.clients.take_gone() {
            self.scheduler.cancel(sequence);
        }
        let expired = self.scheduler.expire(now);
        self.emit(expired);
        self.expire_parked(now);
        if let (Some(step), Some(epoch)) = (self.scheduler.overdue(now), self.scheduler.epoch()) {
            tracing::debug!(%step, %epoch, "step is overdue");
            self.tell_cluster(cluster::Event::StepOverdue { epoch });
        }
        self.tell_cluster(cluster::Event::Tick);
        self.retry_steps();
        self.test_pipeline();
        self.tell_waiting();
        self.measure();
    }

    fn measure(&mut self) {
        let stats = self.scheduler.stats();
        self.rates.sample(self.now(), stats);
        metrics::queue(stats, self.parked.len());
        let term = self.leadership.as_ref().map_or(0, |leadership| leadership.term);
        let epoch = self.scheduler.epoch().map_or(0, |epoch| epoch.0);
        metrics::membership(term, epoch, *self.ready.borrow());
    }

    fn on_outcome(&mut self, outcome: Result<Outcome, tokio::task::JoinError>) {
        match outcome {
            Ok(Outcome::Event(event)) => self.tell_cluster(event),
            Ok(Outcome::Campaigned(Ok(leadership))) => {
                let term = Term(leadership.term);
                tracing::info!(%term, "leads");
                self.leadership = Some(leadership);
                self.tell_cluster(cluster::Event::TermGained(term));
            }
            Ok(Outcome::Campaigned(Err(error))) if self.stop.is_cancelled() => {
                tracing::debug!(error = %node::Chain(&error), "campaign ended with the process");
            }
            Ok(Outcome::Campaigned(Err(error))) => {
                tracing::error!(error = %node::Chain(&error), "failed to campaign, trying again");
                self.campaign_later();
            }
            Ok(Outcome::Leader(leader)) => self.on_leader(leader),
            Ok(Outcome::Nothing) => {}
            // A call is ours: its panic is a bug here, and nothing is known of what it did.
            Err(error) => tracing::error!(%error, "a call of the coordinator panicked"),
        }
    }

    fn on_leadership_lost(&mut self) {
        tracing::warn!("leadership is lost; what is placed goes on serving");
        self.leadership = None;
        self.tell_cluster(cluster::Event::TermLost);
        self.campaign();
    }

    /// Tells the cluster what happened and carries out what it wants done.
    fn tell_cluster(&mut self, event: cluster::Event) {
        let now = self.now();
        for action in self.cluster.handle(now, event) {
            self.carry_out(action);
        }
    }

    fn carry_out(&mut self, action: Action) {
        tracing::debug!(?action, "carries out");
        let key = self.key;
        match action {
            Action::ReadPlan => self.read_plan(),
            Action::WritePlan { term, previous, plan } => self.write_plan(term, previous, &plan),
            Action::Prepare(request) => {
                self.no_plan = None;
                self.calls.spawn(async move {
                    let (epoch, stage) = (request.epoch, request.stage);
                    Outcome::Event(match workers::prepare(key, &request).await {
                        Ok(class) => cluster::Event::Prepared { epoch, stage, class },
                        Err(error) => {
                            let workers::CallError { transient, detail } = error;
                            cluster::Event::PrepareFailed { epoch, stage, transient, detail }
                        }
                    })
                });
            }
            Action::Activate { pipeline, epoch, term, stage, target } => {
                self.calls.spawn(async move {
                    Outcome::Event(
                        match workers::activate(key, pipeline, epoch, term, &target).await {
                            Ok(()) => cluster::Event::Activated { epoch, stage },
                            Err(error) => {
                                let workers::CallError { transient, detail } = error;
                                cluster::Event::ActivateFailed { epoch, stage, transient, detail }
                            }
                        },
                    )
                });
            }
            Action::Retire { pipeline, epoch, term, target } => {
                self.calls.spawn(async move {
                    if let Err(error) = workers::retire(key, pipeline, epoch, term, &target).await {
                        let worker = &target.worker;
                        tracing::debug!(worker, %epoch, error.detail, "worker was not told to retire");
                    }
                    Outcome::Nothing
                });
            }
            Action::Probe { worker, incarnation, address } => {
                self.calls.spawn(async move {
                    Outcome::Event(match workers::describe(&address, PROBE_PATIENCE).await {
                        Ok(found) => {
                            cluster::Event::ProbeOk { worker, incarnation: found.incarnation }
                        }
                        Err(error) => {
                            let detail = error.detail;
                            cluster::Event::ProbeFailed { worker, incarnation, detail }
                        }
                    })
                });
            }
            Action::Serve { shape, plan, class } => self.serve(shape, plan, class),
            Action::Reconnect { epoch, stage } => self.reconnect(epoch, stage),
            Action::FailPipeline { epoch, reason } => self.fail_pipeline(epoch, reason),
            Action::HoldAdmission(hold) => {
                self.scheduler.hold_admission(hold);
                self.held = hold.then_some(false);
            }
            Action::NoPlan { reason } => {
                let emissions = self.scheduler.fail_all(&reason);
                self.emit(emissions);
                self.refuse_parked(|| RequestError::Unavailable { reason: reason.clone() });
                self.no_plan = Some(reason);
            }
            Action::Alarm { text } => tracing::error!(text, "alarm"),
        }
    }

    /// Says once that nothing runs any more while admission is held.
    fn tell_if_drained(&mut self) {
        if self.held == Some(false)
            && self.scheduler.is_idle()
            && let Some(epoch) = self.scheduler.epoch()
        {
            self.held = Some(true);
            self.tell_cluster(cluster::Event::Drained { epoch });
        }
    }

    /// Tells clients what happened to their sequences.
    fn emit(&mut self, emissions: Vec<Emission>) {
        let now = self.now();
        for emission in emissions {
            if self.is_self_test(emission.sequence) {
                self.on_self_test(emission.event);
                continue;
            }
            let sequence = emission.sequence;
            if self.clients.tell(emission, now) == Then::Cancel {
                self.scheduler.cancel(sequence);
            }
        }
    }

    fn fail_pipeline(&mut self, epoch: proto::ids::Epoch, reason: String) {
        if self.pipeline.as_ref().is_none_or(|pipeline| pipeline.epoch() != epoch) {
            return;
        }
        tracing::warn!(%epoch, reason, "pipeline failed");
        self.pipeline = None;
        self.ready.send_replace(false);
        let now = self.now();
        let emissions = self.scheduler.clear_pipeline(Running::Fail(reason), now);
        self.emit(emissions);
    }
}

/// Waits for a token that may not be there.
async fn fired(token: Option<CancellationToken>) {
    match token {
        Some(token) => token.cancelled().await,
        None => std::future::pending().await,
    }
}

/// For tests of what stands on the driver.
#[cfg(test)]
pub(crate) mod testing {
    use super::{
        Clients, Command, DriverHandle, Emission, EmissionEvent, SequenceId, Then, Tick, Tokens,
        mpsc, watch,
    };

    /// A way to a driver that is not there, and what is sent on it.
    pub(crate) fn handle() -> (DriverHandle, mpsc::Receiver<Command>) {
        let (sender, commands) = mpsc::channel(8);
        let (_, ready) = watch::channel(true);
        (DriverHandle { commands: sender, ready }, commands)
    }

    /// The driver's side of one answer.
    pub(crate) struct Feed(Clients);

    /// One answer and its driver's side.
    pub(crate) fn tokens() -> (Feed, Tokens) {
        let mut clients = Clients::default();
        let tokens = clients.add(SequenceId(1), Tick::ZERO, 1);
        (Feed(clients), tokens)
    }

    impl Feed {
        /// Whether the answer is still wanted after this.
        pub(crate) fn tell(&mut self, event: EmissionEvent) -> bool {
            let emission = Emission { sequence: SequenceId(1), event };
            self.0.tell(emission, Tick::ZERO) == Then::GoOn
        }
    }
}
