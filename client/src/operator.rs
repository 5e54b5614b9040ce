//! What an operator's commands share: where orders are taken, waiting until they are carried out, and
//! `tercet plan --apply`.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io;
use std::time::Duration;

use node::config::HostPort;
use proto::operator::Planned;
use proto::status::{ClusterStatus, PlanStatus, WaitCause};
use serde::Serialize;
use tokio::time::Instant;

use crate::command::TextWriter;
use crate::endpoint::Orders;
use crate::status::plan_table;
use crate::waiting::Notices;
use crate::{ClientError, CommandError, Endpoint};

mod grpc;

pub use grpc::Operator;

/// How often it is looked how far an order is. The answer costs the coordinator nothing.
pub(crate) const POLL: Duration = Duration::from_millis(200);

/// For clap: what may be waited for; minutes for a model that is read from a slow disk.
pub(crate) const TIMEOUT: &str = "5m";

/// Why what an operator wanted is not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OperatorError {
    /// It was started without.
    #[error(
        "the coordinator at {endpoint} takes no orders: start it with --admin, or name one with \
         --admin"
    )]
    NoAdmin {
        /// Who was asked.
        endpoint: Endpoint,
    },
    /// It says that orders are taken at no address.
    #[error(
        "the coordinator at {endpoint} says that it takes orders at {admin:?}, which is no address"
    )]
    WrongAdmin {
        /// Who was asked.
        endpoint: Endpoint,
        /// What it says.
        admin: String,
    },
    /// Somebody else decides.
    #[error("{detail} (coordinator at {endpoint})")]
    StandsBy {
        /// Who was asked.
        endpoint: Endpoint,
        /// In the coordinator's words.
        detail: String,
    },
    /// A worker has a stage for too long.
    #[error("worker {worker} still has a stage after {waited:?}{}; {}", also(detail), order(*stands))]
    StillServes {
        /// Which worker.
        worker: String,
        /// How long was waited.
        waited: Duration,
        /// Why, for people.
        detail: String,
        /// It is to go still, as soon as it can.
        stands: bool,
    },
    /// The registry is away, or the coordinator is of an earlier version.
    #[error(
        "the order to drain {worker} was taken, and was not in the registry after {waited:?}: it is \
         forgotten if another coordinator leads before"
    )]
    NotKept {
        /// Which worker.
        worker: String,
        /// How long was waited.
        waited: Duration,
    },
    /// It has none, and is there.
    #[error(
        "worker {worker} has no stage any more and did not end within {waited:?}{}",
        also(detail)
    )]
    StillThere {
        /// Which worker.
        worker: String,
        /// How long was waited.
        waited: Duration,
        /// Why, for people.
        detail: String,
    },
    /// Nobody started it again.
    #[error(
        "worker {worker} did not come back within {waited:?}{}: does anything start it again after it \
         ended well?",
        also(detail)
    )]
    NotBack {
        /// Which worker.
        worker: String,
        /// How long was waited.
        waited: Duration,
        /// What is known of it.
        detail: String,
    },
    /// A change of what serves takes too long.
    #[error("what serves was still being changed after {waited:?}: {detail}")]
    NotSettled {
        /// How long was waited.
        waited: Duration,
        /// What was waited for.
        detail: String,
    },
    /// The planner finds nothing.
    #[error("there is no plan: {reason}")]
    NoPlan {
        /// In the coordinator's words.
        reason: String,
    },
    /// A plan was made and did not come to serve.
    #[error("the plan did not come to serve: {reason}")]
    NotApplied {
        /// In the coordinator's words.
        reason: String,
    },
    /// A worker that is not there.
    #[error("there is no worker {worker:?}; {}", known(there))]
    UnknownWorker {
        /// Who was named.
        worker: String,
        /// Who is there.
        there: Vec<String>,
    },
    /// The roll of a cluster stops here.
    #[error("the roll stopped at worker {worker}{}", untouched(left))]
    Rolled {
        /// Which worker.
        worker: String,
        /// Who was not touched.
        left: Vec<String>,
        /// Why.
        source: Box<CommandError>,
    },
}

pub(crate) fn also(detail: &str) -> String {
    if detail.is_empty() { String::new() } else { format!(" ({detail})") }
}

fn order(stands: bool) -> &'static str {
    match stands {
        true => "the order stands until `tercet drain --cancel`",
        false => "the order was taken back",
    }
}

fn known(workers: &[String]) -> String {
    match workers {
        [] => "there are no workers".to_owned(),
        workers => format!("there are {}", workers.join(", ")),
    }
}

fn untouched(left: &[String]) -> String {
    match left {
        [] => String::new(),
        left => format!(" and did not touch {}", left.join(", ")),
    }
}

/// Connects to where orders are taken, and says if that takes long.
///
/// # Errors
///
/// If nobody is there, or nobody who takes orders.
pub async fn connect(orders: &Orders) -> Result<Operator, CommandError> {
    let asked = match orders {
        Orders::At(endpoint) => return Ok(Operator::at(endpoint, String::new()).await?),
        Orders::AsSaidBy(endpoint) => endpoint,
    };
    let client = Notices::stderr().connect(asked).await?;
    let status = client.status().await?;
    let endpoint = admin_of(&status, asked)?;
    Ok(Operator::at(&endpoint, status.cluster_id).await?)
}

/// Where the coordinator at `asked`, whose cluster is so, takes orders.
fn admin_of(status: &ClusterStatus, asked: &Endpoint) -> Result<Endpoint, OperatorError> {
    let endpoint = asked.clone();
    if let Some(waiting) = &status.waiting
        && waiting.cause == WaitCause::Leadership
    {
        return Err(OperatorError::StandsBy { endpoint, detail: waiting.detail.clone() });
    }
    let Some(admin) = &status.admin else { return Err(OperatorError::NoAdmin { endpoint }) };
    match HostPort::read(admin, None, "host:port") {
        Ok(address) => Ok(asked.beside(&address)),
        Err(_) => Err(OperatorError::WrongAdmin { endpoint, admin: admin.clone() }),
    }
}

/// What is told while an order is carried out.
pub(crate) type Progress = Notices<io::Stderr>;

/// Asks again and again until `look` finds what it looks for (`Ok(Ok(_))`); the last that it said in its
/// place when the time is over. A coordinator that does not answer for a while is asked again.
///
/// # Errors
///
/// What asking failed with, if asking again cannot help.
pub(crate) async fn until<T>(
    end: Instant,
    progress: &mut Progress,
    mut look: impl AsyncFnMut() -> Result<Result<T, String>, ClientError>,
) -> Result<Result<T, String>, ClientError> {
    loop {
        let waits_for = match look().await {
            Ok(Ok(found)) => return Ok(Ok(found)),
            Ok(Err(waits_for)) => waits_for,
            Err(error) if error.is_transient() => node::Chain(&error).to_string(),
            Err(error) => return Err(error),
        };
        if Instant::now() >= end {
            return Ok(Err(waits_for));
        }
        progress.say(&waits_for);
        tokio::time::sleep(POLL).await;
    }
}

/// What is still being changed, if anything is.
fn under_way(plan: &PlanStatus) -> Option<String> {
    let mut changing = plan.pipelines.iter().filter(|pipeline| pipeline.state != "active");
    let first = changing.next()?;
    Some(format!("pipeline {} is {}", first.id, first.state))
}

/// Waits until nothing is being changed any more and requests are served; the cluster then.
///
/// # Errors
///
/// [`OperatorError::NotSettled`], or what asking failed with.
pub(crate) async fn settled(
    operator: &Operator,
    timeout: Duration,
    progress: &mut Progress,
) -> Result<ClusterStatus, CommandError> {
    let found = until(Instant::now() + timeout, progress, async || {
        let status = operator.status().await?;
        Ok(match (under_way(&status.plan), &status.waiting) {
            (Some(change), _) => Err(change),
            (None, Some(waiting)) => Err(waiting.detail.clone()),
            (None, None) => Ok(status),
        })
    });
    match found.await? {
        Ok(status) => Ok(status),
        Err(detail) => Err(OperatorError::NotSettled { waited: timeout, detail }.into()),
    }
}

/// What `tercet plan --apply --json` prints.
#[derive(Debug, Serialize)]
struct Applied<'a> {
    #[serde(flatten)]
    planned: &'a Planned,
    /// Until it served, in seconds.
    took_s: f64,
    plan: &'a PlanStatus,
}

/// Has the coordinator plan now, waits until that serves, and prints what came of it.
///
/// # Errors
///
/// If there is no plan, or it does not serve within `timeout`, or the coordinator takes no orders.
pub async fn run_apply(
    operator: &Operator,
    timeout: Duration,
    json: bool,
) -> Result<(), CommandError> {
    let began = Instant::now();
    let epochs = |plan: &PlanStatus| -> BTreeSet<(u64, u64)> {
        plan.pipelines.iter().map(|pipeline| (pipeline.id, pipeline.epoch)).collect()
    };
    let before = epochs(&operator.status().await?.plan);
    let planned = operator.plan(false).await?;
    if !planned.possible {
        return Err(OperatorError::NoPlan { reason: planned.reason }.into());
    }
    let status = match planned.changes {
        true => {
            let status = settled(operator, timeout, &mut Progress::stderr()).await?;
            if epochs(&status.plan) == before {
                return Err(OperatorError::NotApplied { reason: status.plan.reason }.into());
            }
            status
        }
        false => operator.status().await?,
    };
    let mut writer = TextWriter::stdout();
    if json {
        let took_s = began.elapsed().as_secs_f64();
        return writer.json(&Applied { planned: &planned, took_s, plan: &status.plan });
    }
    let mut text = plan_table(&status.plan);
    let Planned { tokens_per_s, before_tokens_per_s, layers_moved, reason, .. } = &planned;
    // Writing to a String cannot fail.
    let _ = match planned.changes {
        true => writeln!(
            text,
            "changed: {tokens_per_s:.1} tokens/s are predicted in place of {before_tokens_per_s:.1}, \
             {layers_moved} layers moved, in {:.1} s",
            began.elapsed().as_secs_f64()
        ),
        false => writeln!(text, "nothing changes: what serves is the best plan ({reason})"),
    };
    writer.text(&text)
}

#[cfg(test)]
mod tests;
