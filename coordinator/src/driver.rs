//! What carries out the decisions of the pure parts, in this order: decide, persist, send. It decides
//! nothing itself. One control task owns cluster and router; one lane task for each pipeline owns its
//! scheduler and its links. Tokens never pass through the control task.
//!
//! ```text
//! servers ──Command──▶ ┌─────────┐ ──Event──▶ Cluster ──Action──▶ registry, calls to workers, lanes
//! registry, calls ───▶ │ control │ ──Sequence──▶ Router ──Assigned──▶ lanes
//! ticks ─────────────▶ └─────────┘
//!                        │     ▲ ended, returned, what is wrong
//!                        ▼     │
//!                       ┌───────┐ ──StepResult──▶ PipelineScheduler ──Step──▶ links
//!                       │ lanes │ ──Emission──▶ clients (bounded channels)
//!                       └───────┘
//! ```

mod actions;
mod admission;
mod checks;
mod clients;
mod control;
mod history;
mod lane;
mod lanes;
mod orders;
mod registry;
mod status;
pub(crate) mod timed;
mod waiting;

use std::time::Duration;

use proto::ids::SequenceId;
use proto::operator::{Drain, Drained, Planned};
use proto::status::ClusterStatus;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::cluster;
use crate::planner::Problem;
use crate::request::RequestError;
use crate::router::Wish;
use crate::scheduler::{Limits, Sequence};

pub(crate) use checks::Check;
#[cfg(test)]
pub(crate) use clients::MAX_TOKENS_BEHIND;
pub(crate) use clients::{Admitted, Counted, End, Tokens};
pub(crate) use control::Driver;
pub(crate) use history::new_cluster_id;
pub(crate) use orders::OrderError;

/// Requests and questions that may wait for the driver; then their senders wait.
const COMMANDS: usize = 1024;

/// What is asked of the driver.
pub(crate) enum Command {
    /// Take a request.
    Submit { submission: Box<Submission>, reply: oneshot::Sender<Result<Admitted, RequestError>> },
    /// An answer is complete for its client.
    Finish { sequence: SequenceId, reply: oneshot::Sender<Option<proto::generate::Timings>> },
    /// Tell how things are.
    Status { reply: oneshot::Sender<ClusterStatus> },
    /// Tell what readiness is made of.
    Checks { reply: oneshot::Sender<Vec<Check>> },
    /// An operator's order about a worker.
    Drain { order: Drain, reply: oneshot::Sender<Result<Drained, OrderError>> },
    /// An operator wants a plan.
    Plan { cluster_id: String, least_gain: bool, reply: orders::PlanReply },
    /// Tell what the planner would be asked.
    Question { cluster_id: String, reply: oneshot::Sender<Result<Problem, OrderError>> },
}

/// A request on its way to the router.
pub(crate) struct Submission {
    pub(crate) sequence: Box<Sequence>,
    pub(crate) wish: Wish,
    /// When its head arrived.
    pub(crate) arrived: Instant,
    /// From now to the last token.
    pub(crate) time_limit: Duration,
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

    /// What readiness is made of.
    ///
    /// # Errors
    ///
    /// [`RequestError::Unavailable`] if the driver has ended.
    pub(crate) async fn checks(&self) -> Result<Vec<Check>, RequestError> {
        let (reply, checks) = oneshot::channel();
        self.tell(Command::Checks { reply }).await;
        checks.await.map_err(|_| stopping())
    }

    /// Takes an operator's order about a worker, and tells how far it is.
    ///
    /// # Errors
    ///
    /// Why it was not taken.
    pub(crate) async fn drain(&self, order: Drain) -> Result<Drained, OrderError> {
        let (reply, drained) = oneshot::channel();
        self.tell(Command::Drain { order, reply }).await;
        drained.await.unwrap_or(Err(OrderError::Stopping))
    }

    /// Plans because an operator wants it; returns once it is decided what changes.
    ///
    /// # Errors
    ///
    /// Why nothing was decided here.
    pub(crate) async fn plan(
        &self,
        cluster_id: String,
        least_gain: bool,
    ) -> Result<Planned, OrderError> {
        let (reply, planned) = oneshot::channel();
        self.tell(Command::Plan { cluster_id, least_gain, reply }).await;
        planned.await.unwrap_or(Err(OrderError::Stopping))
    }

    /// What the planner would be asked now.
    ///
    /// # Errors
    ///
    /// Why that is not known here.
    pub(crate) async fn question(&self, cluster_id: String) -> Result<Problem, OrderError> {
        let (reply, question) = oneshot::channel();
        self.tell(Command::Question { cluster_id, reply }).await;
        question.await.unwrap_or(Err(OrderError::Stopping))
    }

    /// Whether a token has come through a pipeline within the last seconds, and nothing has been told
    /// to stop.
    pub(crate) fn readiness(&self) -> watch::Receiver<bool> {
        self.ready.clone()
    }

    /// A driver that has ended drops the command, and whoever waits for a reply sees that.
    pub(crate) async fn tell(&self, command: Command) {
        let _ = self.commands.send(command).await;
    }
}

/// Why nothing is served any more.
const STOPPING: &str = "the coordinator is stopping";

fn stopping() -> RequestError {
    RequestError::Unavailable { reason: STOPPING.into() }
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
    /// Where it takes operators' orders, if anywhere.
    pub(crate) admin: Option<String>,
    /// Names the socket of its gRPC server.
    pub(crate) socket: String,
    /// The token that probes go on from.
    pub(crate) first_token: u32,
    /// The model's token ids are `0..vocab`.
    pub(crate) vocab: u32,
    /// How long open answers may go on after the stop.
    pub(crate) grace: Duration,
    /// How long after the stop requests are still taken, while it says that it is not ready.
    pub(crate) lame_duck: Duration,
    /// Where lanes and links run: beside the work for clients.
    pub(crate) lanes: tokio::runtime::Handle,
}

/// For tests of what stands on the driver.
#[cfg(test)]
pub(crate) mod testing {
    use super::clients::{Clients, Then};
    use super::{Command, DriverHandle, SequenceId, Tokens, mpsc, watch};
    use crate::scheduler::{Emission, EmissionEvent};
    use crate::tick::Tick;

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
        let mut clients = Clients::new(Default::default());
        let tokens = clients.add(SequenceId(1), Tick::ZERO, 1);
        (Feed(clients), tokens)
    }

    impl Feed {
        /// Whether the answer is still wanted after this.
        pub(crate) fn tell(&mut self, event: EmissionEvent) -> bool {
            let emission = Emission { sequence: SequenceId(1), event };
            self.0.tell(emission, Tick::ZERO) != Then::Cancel
        }
    }
}
