//! One stage of one epoch: takes steps in, has them computed in the order they came, keeps what
//! they gave, and hands it to whoever carries it on: the link to the next stage or the reader of
//! results.
//!
//! ```text
//! Steps streams ─▶ arrive ─▶ ledger ─▶ engine's thread ─▶ finish ─▶ ledger ─▶ link, or results
//!      ▲                                                                        │
//!      └──────────── refusals of this and later stages, lost links ◀────────────┘
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proto::ids::{KeyDigest, PipelineRef, StepId};
use proto::key::CoordinatorKey;
use proto::plan::StagePlan;
use proto::step::{
    Output as RowOutput, Prepare, Row, RowResult, RowValue, StageTime, Step, StepHeader, StepReply,
    StepResult, StepVerdict,
};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::{Span, field};

use crate::bridge::{EngineHandle, Job, Outcome, SubmitError};
use crate::pace::{Pace, Share};
use crate::session::draws::Draws;
use crate::session::ledger::{Arrival, Ledger, OutOfOrder};
use crate::telemetry::StageMetrics;

/// What a step gave.
#[derive(Clone, Debug)]
pub(crate) enum Output {
    /// For the stage after this one.
    Step {
        /// Its header is made anew whenever it is sent.
        step: Arc<Step>,
        /// From when on nobody wants it.
        deadline: Instant,
    },
    /// For the coordinator.
    Result(Arc<StepResult>),
}

/// Why a reader of results gets no more.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ReaderEnd {
    /// Only one reads at a time.
    #[error("a newer reader took over")]
    Replaced,
    /// The epoch is over, or the worker stops.
    #[error("this stage was retired")]
    Retired,
}

/// Who has read so far, and what is kept.
#[derive(Debug)]
struct Outlet {
    ledger: Ledger<Output>,
    /// Counts readers; only the newest may take.
    reader: u64,
}

/// Who sends steps, and what it must be told.
#[derive(Debug, Default)]
struct Upstream {
    replies: Option<mpsc::Sender<StepReply>>,
    /// Why the link to the next stage is down, once that is more than a hiccup.
    downstream_lost: Option<String>,
    /// Steps came since that was told.
    takes_more: bool,
}

/// See the head of this file.
#[derive(Debug)]
pub(crate) struct Stage {
    prepare: Prepare,
    /// Of the coordinator that prepared it, and its digest: who shows another sends no steps and
    /// reads no results. `None` where the coordinator has none.
    key: Mutex<Option<(CoordinatorKey, KeyDigest)>>,
    /// Width of the residual stream.
    hidden: usize,
    /// `None` once the epoch is over here: an engine's memory must not wait for who still has a stage.
    engine: Mutex<Option<EngineHandle>>,
    outcomes: mpsc::Sender<Outcome>,
    outlet: Mutex<Outlet>,
    /// Something was queued to be sent.
    queued: Notify,
    upstream: Mutex<Upstream>,
    /// What an earlier stage may draw.
    draws: Mutex<Draws>,
    retired: CancellationToken,
    last_arrival: Mutex<Instant>,
    pace: Arc<Pace>,
    metrics: StageMetrics,
}

impl Stage {
    /// A stage and the task that finishes its steps; the stage ends when `retired` fires.
    /// `pace` is of the whole worker.
    pub(crate) fn new(
        prepare: Prepare,
        key: Option<CoordinatorKey>,
        hidden: usize,
        engine: EngineHandle,
        pace: Arc<Pace>,
        retired: CancellationToken,
    ) -> (Arc<Self>, impl Future<Output = ()> + Send) {
        let in_flight = prepare.max_in_flight as usize;
        let (outcomes, finished) = mpsc::channel(in_flight);
        let stage = Arc::new(Self {
            metrics: StageMetrics::new(&prepare),
            // Those that compute hold a block; those that just ended or were preempted may linger, and are
            // the first to be forgotten: nothing of theirs is due.
            draws: Mutex::new(Draws::new(2 * prepare.kv_blocks.max(1) as usize)),
            prepare,
            key: Mutex::new(with_digest(key)),
            hidden,
            engine: Mutex::new(Some(engine)),
            outcomes,
            outlet: Mutex::new(Outlet { ledger: Ledger::new(in_flight), reader: 0 }),
            queued: Notify::new(),
            upstream: Mutex::default(),
            retired,
            last_arrival: Mutex::new(Instant::now()),
            pace,
        });
        let finisher = finish_all(stage.clone(), finished);
        (stage, finisher)
    }

    pub(crate) fn prepare(&self) -> &Prepare {
        &self.prepare
    }

    /// What of a step is computed here.
    fn share(&self) -> Share {
        let Prepare { model, stage, ref stages, .. } = self.prepare;
        let layers = &stages[stage as usize].layers;
        let layers = layers.end.saturating_sub(layers.start);
        Share { model, layers, is_last: self.is_last() }
    }

    pub(crate) fn metrics(&self) -> &StageMetrics {
        &self.metrics
    }

    pub(crate) fn is_last(&self) -> bool {
        self.prepare.stage as usize + 1 == self.prepare.stages.len()
    }

    /// The stage after this one.
    pub(crate) fn next(&self) -> Option<&StagePlan> {
        self.prepare.stages.get(self.prepare.stage as usize + 1)
    }

    fn own(&self) -> &StagePlan {
        &self.prepare.stages[self.prepare.stage as usize]
    }

    /// Fires when the epoch is over here.
    pub(crate) fn retired(&self) -> &CancellationToken {
        &self.retired
    }

    /// From now on it serves who shows `key`.
    pub(crate) fn belongs_to(&self, key: Option<CoordinatorKey>) {
        *lock(&self.key) = with_digest(key);
    }

    /// Of the coordinator that it serves, for the next stage.
    pub(crate) fn key(&self) -> Option<CoordinatorKey> {
        lock(&self.key).map(|(key, _)| key)
    }

    /// Whether its coordinator has a key.
    pub(crate) fn has_key(&self) -> bool {
        lock(&self.key).is_some()
    }

    /// Whether who shows a key of this digest may send steps and read results.
    pub(crate) fn admits(&self, shown: Option<KeyDigest>) -> bool {
        lock(&self.key).is_none_or(|(_, digest)| Some(digest) == shown)
    }

    /// Ends the epoch here, and lets go of the engine.
    pub(crate) fn retire(&self) {
        lock(&self.engine).take();
        self.retired.cancel();
    }

    /// Takes in a step whose header and checksum were judged, and says what became of it.
    /// `replies` is the stream it came by: refusals of later stages go there from now on.
    ///
    /// # Errors
    ///
    /// [`SubmitError::Stopped`] if there is no engine any more.
    pub(crate) fn arrive(
        &self,
        step: Step,
        replies: &mpsc::Sender<StepReply>,
    ) -> Result<StepReply, SubmitError> {
        let now = Instant::now();
        *lock(&self.last_arrival) = now;
        self.attach(replies);
        let number = step.header.step;
        let (verdict, detail) = match self.check_sizes(&step) {
            Err(refusal) => refusal,
            Ok(()) => self.enter(step, now)?,
        };
        self.metrics.verdict(verdict);
        Ok(self.reply(number, verdict, detail))
    }

    fn enter(&self, step: Step, now: Instant) -> Result<(StepVerdict, String), SubmitError> {
        let StepHeader { step: number, acked_step, term, deadline_remaining, .. } = step.header;
        let accepted = Ok((StepVerdict::Accepted, String::new()));
        let busy = |detail: String| Ok((StepVerdict::Busy, detail));
        // Held until the step is queued, so that steps are computed in the ledger's order.
        let mut outlet = lock(&self.outlet);
        match outlet.ledger.check(number, acked_step) {
            Ok(()) => {}
            // The checksum is not over what is acknowledged: it may have been damaged.
            Err(error @ OutOfOrder::Unsent { .. }) => {
                return Ok((StepVerdict::Corrupt, error.to_string()));
            }
            Err(error @ OutOfOrder::Ahead { .. }) => {
                return Ok((StepVerdict::Invalid, error.to_string()));
            }
        }
        // One that came before was judged when its rows were due.
        if !outlet.ledger.knows(number)
            && let Err(detail) = self.check_draws(&step)
        {
            return Ok((StepVerdict::Invalid, detail));
        }
        let arrival = outlet.ledger.arrive(number, acked_step);
        // A coordinator that leads again sends again what a later stage refused as of its earlier
        // reign: it goes on in the new one.
        outlet.ledger.came_in(number, term);
        match arrival {
            Arrival::Pending | Arrival::Acknowledged => accepted,
            Arrival::Again => {
                self.queued.notify_one();
                accepted
            }
            Arrival::Busy => busy(format!(
                "{} steps are in flight, as many as agreed",
                self.prepare.max_in_flight
            )),
            Arrival::New if self.is_over(&step) => {
                let output = self.output(step, None, now + deadline_remaining);
                outlet.ledger.keep(number, output);
                self.queued.notify_one();
                accepted
            }
            Arrival::New => {
                let spans = self.spans(&step);
                let job = Job {
                    step,
                    arrived: now,
                    deadline: now + deadline_remaining,
                    spans,
                    reply: self.outcomes.clone(),
                };
                let submitted = lock(&self.engine).as_ref().map(|engine| engine.submit(job));
                match submitted {
                    Some(Ok(())) => accepted,
                    None => {
                        outlet.ledger.withdraw(number);
                        Ok((StepVerdict::Fenced, "the epoch is over".into()))
                    }
                    Some(Err(error)) => {
                        outlet.ledger.withdraw(number);
                        match error {
                            SubmitError::Full => busy(error.to_string()),
                            SubmitError::Stopped => Err(error),
                        }
                    }
                }
            }
        }
    }

    /// What must hold of a step whose rows were drawn from, or are to be, behind the stage that
    /// draws: the engine has no part in it, so its chain and position are judged here.
    fn check_draws(&self, step: &Step) -> Result<(), String> {
        if self.prepare.stage == 0 {
            return Ok(());
        }
        if self.is_over(step) {
            return lock(&self.draws).check(step);
        }
        match step.is_draw() {
            true => Err("rows are drawn from at the first stage".into()),
            false => Ok(()),
        }
    }

    /// What must hold of a step's sizes at this stage; else what is said of it.
    fn check_sizes(&self, step: &Step) -> Result<(), (StepVerdict, String)> {
        let StepHeader { step: number, acked_step, .. } = step.header;
        if acked_step >= number {
            // The checksum is not over this: it may have been damaged.
            let detail = format!("step {number} acknowledges step {acked_step}");
            return Err((StepVerdict::Corrupt, detail));
        }
        let tokens: usize = step.rows.iter().map(|row| row.tokens.len()).sum();
        if tokens > self.prepare.max_step_tokens as usize {
            let most = self.prepare.max_step_tokens;
            let detail = format!("{tokens} tokens, prepared for {most} in a step");
            return Err((StepVerdict::Invalid, detail));
        }
        let brings_none = if self.prepare.stage == 0 { !step.is_draw() } else { step.is_drawn() };
        let width = if brings_none { 0 } else { self.hidden };
        let expected_bytes = tokens * width * size_of::<f32>();
        if step.activations.len() != expected_bytes {
            let detail = format!(
                "{} bytes of activations, {tokens} tokens of width {width} need {expected_bytes}",
                step.activations.len()
            );
            return Err((StepVerdict::Invalid, detail));
        }
        Ok(())
    }

    /// Whether an earlier stage did all there is to do: the step passes by the engine, which may be
    /// in the middle of another.
    fn is_over(&self, step: &Step) -> bool {
        self.prepare.stage > 0 && step.is_drawn()
    }

    /// One span for every traced row, from its arrival until its outcome is handed on.
    fn spans(&self, step: &Step) -> Vec<Span> {
        let traced = step.rows.iter().filter(|row| !row.traceparent.is_empty());
        let layers = &self.own().layers;
        traced
            .map(|row| {
                let span = tracing::info_span!(
                    "stage",
                    worker = self.own().worker,
                    stage = self.prepare.stage,
                    layers = format!("{}..{}", layers.start, layers.end),
                    tokens = row.tokens.len(),
                    step = step.header.step.0,
                    sequence = row.sequence.0,
                    compute_us = field::Empty,
                    wait_us = field::Empty,
                );
                node::telemetry::propagation::set_parent(&span, &row.traceparent);
                span
            })
            .collect()
    }

    fn reply(&self, step: StepId, verdict: StepVerdict, detail: String) -> StepReply {
        let Prepare { pipeline: id, epoch, stage, .. } = self.prepare;
        StepReply { at: PipelineRef { id, epoch }, step, stage, verdict, detail }
    }

    /// The stream that sent last is the one that is told.
    fn attach(&self, replies: &mpsc::Sender<StepReply>) {
        let mut upstream = lock(&self.upstream);
        upstream.takes_more = true;
        if upstream.replies.as_ref().is_some_and(|current| current.same_channel(replies)) {
            return;
        }
        upstream.replies = Some(replies.clone());
        if let Some(detail) = upstream.downstream_lost.clone() {
            upstream.takes_more = false;
            tell(&upstream, self.reply(StepId(0), StepVerdict::DownstreamLost, detail));
        }
    }

    /// Passes what a later stage said to whoever sends steps.
    pub(crate) fn relay(&self, reply: StepReply) {
        tell(&lock(&self.upstream), reply);
    }

    /// The link to the next stage broke and did not come back.
    pub(crate) fn downstream_lost(&self, detail: String) {
        let mut upstream = lock(&self.upstream);
        upstream.downstream_lost = Some(detail.clone());
        upstream.takes_more = false;
        tell(&upstream, self.reply(StepId(0), StepVerdict::DownstreamLost, detail));
    }

    /// Whether steps came, or came again, after it was told that the link is down: whoever sends them
    /// thinks that it is up.
    pub(crate) fn takes_more_while_lost(&self) -> bool {
        let upstream = lock(&self.upstream);
        upstream.takes_more && upstream.downstream_lost.is_some()
    }

    /// The link to the next stage is up: it gets everything that is kept.
    pub(crate) fn downstream_up(&self) {
        lock(&self.upstream).downstream_lost = None;
        lock(&self.outlet).ledger.resend_all();
        self.queued.notify_one();
    }

    /// Sends one kept step again that arrived damaged, once; returns whether it does.
    pub(crate) fn repair(&self, step: StepId) -> bool {
        let is_sent = lock(&self.outlet).ledger.repair(step);
        self.queued.notify_one();
        is_sent
    }

    /// The next step for the stage after this one, addressed to it as of now.
    pub(crate) fn next_step(&self) -> Option<Step> {
        let mut outlet = lock(&self.outlet);
        let acked_step = outlet.ledger.acked();
        let Some(Output::Step { step, deadline }) = outlet.ledger.next_to_send() else {
            return None;
        };
        let (step, deadline) = (step.clone(), *deadline);
        let latest = outlet.ledger.term(step.header.step);
        drop(outlet);
        let mut step = Arc::unwrap_or_clone(step);
        step.header.term = step.header.term.max(latest);
        step.header.acked_step = acked_step;
        step.header.deadline_remaining = deadline.saturating_duration_since(Instant::now());
        if let Some(next) = self.next() {
            step.header.dst_incarnation = next.incarnation;
        }
        Some(step)
    }

    /// Waits until something was queued. May return for nothing.
    pub(crate) async fn queued(&self) {
        self.queued.notified().await;
    }

    /// Makes the caller the reader of results: everything kept after `after` comes first.
    pub(crate) fn read(self: &Arc<Self>, after: StepId) -> ResultReader {
        let mut outlet = lock(&self.outlet);
        outlet.reader += 1;
        outlet.ledger.resend_after(after);
        // The reader before this one wakes up and finds that it was replaced.
        self.queued.notify_waiters();
        ResultReader { stage: self.clone(), number: outlet.reader }
    }

    /// Whether there is anything left to do for steps that came, or more may come soon: somebody
    /// who sends steps is connected and did so less than `quiet` ago.
    pub(crate) fn is_busy(&self, quiet: Duration) -> bool {
        let sender_is_there =
            lock(&self.upstream).replies.as_ref().is_some_and(|replies| !replies.is_closed());
        let recently = lock(&self.last_arrival).elapsed() < quiet;
        sender_is_there && (recently || lock(&self.outlet).ledger.is_busy())
    }

    /// What a step gives to whoever comes next. `values` are those of this stage's engine; without
    /// them its rows were drawn before.
    fn output(&self, step: Step, values: Option<Vec<RowValue>>, deadline: Instant) -> Output {
        if !self.is_last() {
            return Output::Step { step: Arc::new(step), deadline };
        }
        let drawn = |row: &Row| match &row.output {
            RowOutput::Drawn(sampled) => RowValue::Sampled((**sampled).clone()),
            _ => RowValue::None,
        };
        let values = values.unwrap_or_else(|| step.rows.iter().map(drawn).collect());
        Output::Result(Arc::new(result_of(step, values)))
    }

    /// Keeps what a step gave and queues it.
    fn finish(&self, outcome: Outcome) {
        let Outcome { executed, deadline, spans, compute, wait, behind } = outcome;
        let mut step = executed.step;
        for span in spans {
            span.record("compute_us", compute.as_micros() as u64);
            span.record("wait_us", wait.as_micros() as u64);
        }
        self.pace.note(self.share(), &step.rows, compute);
        self.metrics.step(compute, wait, &step.rows, executed.filled_blocks);
        step.stage_times.push(StageTime { stage: self.prepare.stage, compute, wait, behind });
        let number = step.header.step;
        // Before anyone hears of it who could draw from it.
        lock(&self.draws).note(&step);
        let output = self.output(step, Some(executed.values), deadline);
        lock(&self.outlet).ledger.keep(number, output);
        self.queued.notify_one();
    }
}

/// Takes the outcomes of a stage's steps as they come.
async fn finish_all(stage: Arc<Stage>, mut outcomes: mpsc::Receiver<Outcome>) {
    while let Some(Some(outcome)) = stage.retired.run_until_cancelled(outcomes.recv()).await {
        stage.finish(outcome);
    }
}

fn with_digest(key: Option<CoordinatorKey>) -> Option<(CoordinatorKey, KeyDigest)> {
    key.map(|key| (key, key.digest()))
}

/// Exactly one for every step, with a status for every row.
fn result_of(step: Step, values: Vec<RowValue>) -> StepResult {
    let rows = step.rows.into_iter().zip(values).map(|(row, value)| RowResult {
        sequence: row.sequence,
        generation: row.generation,
        position: row.position,
        token_count: row.tokens.len() as u32,
        status: row.status,
        detail: row.detail,
        value,
    });
    StepResult {
        epoch: step.header.epoch,
        step: step.header.step,
        rows: rows.collect(),
        stage_times: step.stage_times,
    }
}

/// The one reader of a last stage's results.
#[derive(Debug)]
pub(crate) struct ResultReader {
    stage: Arc<Stage>,
    number: u64,
}

impl ResultReader {
    /// The next result.
    ///
    /// # Errors
    ///
    /// [`ReaderEnd`] when there will be none for this reader.
    pub(crate) async fn next(&mut self) -> Result<Arc<StepResult>, ReaderEnd> {
        loop {
            let queued = self.stage.queued.notified();
            tokio::pin!(queued);
            // Listens from here on: what is queued after the look below wakes it.
            queued.as_mut().enable();
            if let Some(result) = self.take()? {
                return Ok(result);
            }
            tokio::select! {
                () = self.stage.retired.cancelled() => return Err(ReaderEnd::Retired),
                () = queued => {}
            }
        }
    }

    fn take(&self) -> Result<Option<Arc<StepResult>>, ReaderEnd> {
        let mut outlet = lock(&self.stage.outlet);
        if outlet.reader != self.number {
            // What woke this reader was meant for the newer one.
            self.stage.queued.notify_one();
            return Err(ReaderEnd::Replaced);
        }
        match outlet.ledger.next_to_send() {
            Some(Output::Result(result)) => Ok(Some(result.clone())),
            _ => Ok(None),
        }
    }
}

/// Says something to whoever sends steps, if anybody is there. If it does not read, the reply is
/// lost: it finds out by its own deadline.
fn tell(upstream: &Upstream, reply: StepReply) {
    if let Some(replies) = &upstream.replies
        && replies.try_send(reply).is_err()
    {
        tracing::info!("the sender of steps takes no replies");
    }
}

/// None of the locks of a stage is held while something may panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
