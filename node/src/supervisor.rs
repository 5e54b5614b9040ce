//! Owns every task of a process: starts them, notices when one ends, and stops the rest.

use std::any::Any;
use std::collections::HashMap;
use std::error::Error;
use std::time::Duration;

use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info_span};

use crate::Chain;

#[cfg(test)]
mod tests;

/// What a task may fail with.
pub type TaskError = Box<dyn Error + Send + Sync>;

/// Why a supervised process did not stop well.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SupervisorError {
    /// A task returned an error.
    #[error("task {name} failed")]
    Failed {
        /// The task.
        name: &'static str,
        /// Its error.
        source: TaskError,
    },
    /// A task ended well, but nobody had asked it to end.
    #[error("task {name} ended before it was told to")]
    EndedEarly {
        /// The task.
        name: &'static str,
    },
    /// A task panicked.
    #[error("task {name} panicked: {message}")]
    Panicked {
        /// The task.
        name: &'static str,
        /// What the panic said.
        message: String,
    },
    /// Some tasks did not heed the stop in time and were aborted.
    #[error("{} still ran {grace:?} after the stop: {}", tasks(names.len()), names.join(", "))]
    GraceExpired {
        /// The tasks.
        names: Vec<&'static str>,
        /// The time they had.
        grace: Duration,
    },
}

fn tasks(count: usize) -> String {
    if count == 1 { "one task".to_owned() } else { format!("{count} tasks") }
}

/// The tasks of one process. Each is critical: when one ends, the process stops.
#[derive(Debug)]
pub struct Supervisor {
    stop: CancellationToken,
    tasks: JoinSet<Result<(), TaskError>>,
    /// What the tasks that still run are called.
    names: HashMap<Id, &'static str>,
}

impl Supervisor {
    /// A supervisor whose tasks stop when `stop` fires. It fires `stop` itself when a task ends.
    pub fn new(stop: CancellationToken) -> Self {
        Self { stop, tasks: JoinSet::new(), names: HashMap::new() }
    }

    /// Starts a task. `task` gets a token that it must heed at every await that may be long.
    pub fn spawn<F, Fut>(&mut self, name: &'static str, task: F)
    where
        F: FnOnce(CancellationToken) -> Fut,
        Fut: Future<Output = Result<(), TaskError>> + Send + 'static,
    {
        let future = task(self.stop.child_token());
        let handle = self.tasks.spawn(future.instrument(info_span!("task", name)));
        self.names.insert(handle.id(), name);
    }

    /// Waits for `stop` or for the first task to end, then gives the rest `grace` to finish.
    /// Without tasks it waits for `stop`.
    ///
    /// # Errors
    ///
    /// The first thing that went wrong; what follows from it is only logged.
    pub async fn run(mut self, grace: Duration) -> Result<(), SupervisorError> {
        let first_end = async {
            match self.tasks.join_next_with_id().await {
                Some(end) => end,
                None => std::future::pending().await,
            }
        };
        let first_end = self.stop.run_until_cancelled(first_end).await;
        // A task may have heeded the stop before we were woken by it.
        let asked = self.stop.is_cancelled();
        let mut outcome = match first_end.map(|end| self.inspect(end)) {
            // Before anyone asked, even `Ok` is a failure: a server that stopped serving.
            Some(Ok(name)) if !asked => Err(SupervisorError::EndedEarly { name }),
            Some(Err(error)) => Err(error),
            Some(Ok(_)) | None => Ok(()),
        };

        self.stop.cancel();
        let drain = async {
            while let Some(end) = self.tasks.join_next_with_id().await {
                let Err(error) = self.inspect(end) else { continue };
                if outcome.is_ok() {
                    outcome = Err(error);
                } else {
                    tracing::warn!(error = %Chain(&error), "another task failed during shutdown");
                }
            }
        };
        if tokio::time::timeout(grace, drain).await.is_err() {
            let mut names: Vec<_> = self.names.values().copied().collect();
            names.sort_unstable();
            self.tasks.shutdown().await;
            outcome = outcome.and(Err(SupervisorError::GraceExpired { names, grace }));
        }
        outcome
    }

    /// What one task's end means; the name if it ended well.
    fn inspect(&mut self, end: TaskEnd) -> Result<&'static str, SupervisorError> {
        let id = end.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let name = self.names.remove(&id).expect("every task was named when it started");
        match end {
            Ok((_, Ok(()))) => Ok(name),
            Ok((_, Err(source))) => Err(SupervisorError::Failed { name, source }),
            Err(error) => Err(SupervisorError::Panicked { name, message: panic_message(error) }),
        }
    }
}

type TaskEnd = Result<(Id, Result<(), TaskError>), JoinError>;

/// Tasks are aborted only by `shutdown`, whose ends nobody looks at: the rest panicked.
fn panic_message(error: JoinError) -> String {
    let Ok(panic) = error.try_into_panic() else { return "aborted".to_owned() };
    let panic: &(dyn Any + Send) = &*panic;
    if let Some(words) = panic.downcast_ref::<&str>() {
        return (*words).to_owned();
    }
    panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "without words".to_owned())
}
