//! The one door between async code and an engine's thread: the engine never awaits, async code
//! never computes.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use proto::step::Step;
use tokio::sync::mpsc;
use tracing::Span;

use crate::engine::EngineError;
use crate::executor::{Executed, Executor};
use crate::reserve::Charge;

/// Steps that one epoch may have in flight at most: 1.5 a stage and one more, for any pipeline.
pub(crate) const IN_FLIGHT_MAX: u32 = 1024;

/// Steps that may wait for one engine. Ledgers let no epoch have more than [`IN_FLIGHT_MAX`], and
/// an engine serves at most an active epoch and the one prepared to follow it.
const JOBS_MAX: usize = 2 * IN_FLIGHT_MAX as usize;

/// What an engine's thread runs.
pub(crate) trait Compute: Send + 'static {
    /// One step, from its checks to its records.
    ///
    /// # Errors
    ///
    /// Why nothing that this machine computes may be used, now or ever.
    fn compute(&mut self, step: Step, expired: bool) -> Result<Executed, EngineError>;
}

impl Compute for Executor {
    fn compute(&mut self, step: Step, expired: bool) -> Result<Executed, EngineError> {
        self.execute(step, expired)
    }
}

/// A step to compute.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) step: Step,
    /// When it came in.
    pub(crate) arrived: Instant,
    /// From when on nobody wants it.
    pub(crate) deadline: Instant,
    /// One for every row that is traced; they end when the job's outcome is dropped.
    pub(crate) spans: Vec<Span>,
    /// Where the outcome goes. It has room for every step that the sender may have in flight.
    pub(crate) reply: mpsc::Sender<Outcome>,
}

/// A computed step.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) executed: Executed,
    pub(crate) deadline: Instant,
    pub(crate) spans: Vec<Span>,
    /// In the engine.
    pub(crate) compute: Duration,
    /// Between arriving and entering the engine.
    pub(crate) wait: Duration,
    /// The part of that in which the engine was at jobs that came before.
    pub(crate) behind: Duration,
}

/// Why an engine computes no more. The process stops: its state may be anything.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EngineFailure {
    /// Its thread panicked.
    #[error("the engine's thread panicked: {message}")]
    Panicked { message: String },
    /// What it computes with is wrong.
    #[error("the engine refuses to compute")]
    Refused(#[source] EngineError),
}

impl EngineFailure {
    /// Of a panic.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self::Panicked { message: message.into() }
    }
}

/// Why a job was not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum SubmitError {
    /// More jobs wait than the queue holds.
    #[error("{JOBS_MAX} steps wait for the engine already")]
    Full,
    /// The engine's thread is gone; the process is about to stop.
    #[error("the engine has stopped")]
    Stopped,
}

/// The way to one engine. The thread ends, and with it the engine, when the last handle is
/// dropped.
#[derive(Clone, Debug)]
pub(crate) struct EngineHandle {
    jobs: mpsc::Sender<Job>,
}

impl EngineHandle {
    /// Moves an engine to its own thread. A panic there goes to `failures`, and so does why it refuses
    /// to compute.
    ///
    /// # Errors
    ///
    /// If the system gives no thread.
    #[cfg(test)]
    pub(crate) fn start(
        engine: impl Compute,
        failures: mpsc::Sender<EngineFailure>,
    ) -> io::Result<Self> {
        Self::start_charged(engine, None, failures)
    }

    /// [`Self::start`] of an engine whose memory is counted: `charge` is dropped once it is free.
    ///
    /// # Errors
    ///
    /// If the system gives no thread.
    pub(crate) fn start_charged(
        engine: impl Compute,
        charge: Option<Arc<Charge>>,
        failures: mpsc::Sender<EngineFailure>,
    ) -> io::Result<Self> {
        let (jobs, mut queue) = mpsc::channel::<Job>(JOBS_MAX);
        let mut free_since = Instant::now();
        thread::Builder::new().name("engine".into()).spawn(move || {
            // Dropped in the opposite order: first the engine, then what counts its memory.
            let _charge = charge;
            let mut engine = engine;
            while let Some(job) = queue.blocking_recv() {
                // The stage may have been retired while the job waited: do not work for nobody.
                if job.reply.is_closed() {
                    continue;
                }
                // The engine is not used again after a panic, so what it left half done is
                // never seen.
                let failure =
                    match catch_unwind(AssertUnwindSafe(|| run(&mut engine, job, free_since))) {
                        Ok(Ok((reply, outcome))) => {
                            free_since = Instant::now();
                            drop(reply.blocking_send(outcome));
                            continue;
                        }
                        Ok(Err(refusal)) => EngineFailure::Refused(refusal),
                        Err(panic) => EngineFailure::new(message_of(&*panic)),
                    };
                // One failure stops the process; a second one adds nothing.
                drop(failures.try_send(failure));
                return;
            }
        })?;
        Ok(Self { jobs })
    }

    /// Queues a step behind those that came before it.
    ///
    /// # Errors
    ///
    /// [`SubmitError`]; the job is dropped.
    pub(crate) fn submit(&self, job: Job) -> Result<(), SubmitError> {
        self.jobs.try_send(job).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => SubmitError::Full,
            mpsc::error::TrySendError::Closed(_) => SubmitError::Stopped,
        })
    }
}

type Computed = Result<(mpsc::Sender<Outcome>, Outcome), EngineError>;

/// Computes a job on an engine that has had nothing to do since `free_since`.
fn run(engine: &mut impl Compute, job: Job, free_since: Instant) -> Computed {
    let Job { step, arrived, deadline, spans, reply } = job;
    let start = Instant::now();
    let executed = engine.compute(step, start >= deadline)?;
    let (compute, wait) = (start.elapsed(), start.saturating_duration_since(arrived));
    let behind = free_since.saturating_duration_since(arrived).min(wait);
    Ok((reply, Outcome { executed, deadline, spans, compute, wait, behind }))
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
        .to_owned()
}

#[cfg(test)]
mod tests;
