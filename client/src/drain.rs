//! `tercet drain`: a worker is used no more, and ends.

use std::time::Duration;

use proto::ids::Incarnation;
use proto::operator::{DrainState, Drained};
use serde::Serialize;
use tokio::time::Instant;

use crate::command::TextWriter;
use crate::operator::{Operator, OperatorError, Progress, TIMEOUT, until};
use crate::{CommandError, operator};

/// How long it is waited until an order is in the registry.
const KEPT_WITHIN: Duration = Duration::from_secs(20);

/// What `tercet drain` is told, beside whom to tell.
#[derive(Clone, Debug, clap::Args)]
pub struct DrainArgs {
    /// Id of the worker
    #[arg(value_name = "WORKER")]
    pub worker: String,
    /// Give up waiting after this time; the order stands
    #[arg(long, value_name = "TIME", default_value = TIMEOUT)]
    pub timeout: node::config::Duration,
    /// Order it and do not wait until it is done: the order is in the registry, and stands whoever leads
    #[arg(long)]
    pub no_wait: bool,
    /// Also where nobody can take its place: then what runs on it stops, and goes on once it is back
    #[arg(long)]
    pub force: bool,
    /// Take the order back: the worker may be used again
    #[arg(long, conflicts_with_all = ["timeout", "no_wait", "force"])]
    pub cancel: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    worker: &'a str,
    /// Hexadecimal, of the process that it is about.
    incarnation: String,
    state: DrainState,
    #[serde(skip_serializing_if = "str::is_empty")]
    detail: &'a str,
    /// How long was waited, in seconds.
    took_s: f64,
}

/// Runs the command.
///
/// # Errors
///
/// If the order is not taken, or not carried out in time.
pub async fn run(operator: &Operator, args: &DrainArgs) -> Result<(), CommandError> {
    let began = Instant::now();
    let DrainArgs { worker, timeout, no_wait, force, cancel, json } = args;
    let mut progress = Progress::stderr();
    let drained = match (*cancel, *no_wait) {
        (true, _) => operator.cancel_drain(worker).await?,
        (false, true) => order(operator, worker, *force, &mut progress).await?,
        (false, false) => drain(operator, worker, *force, timeout.get(), &mut progress).await?,
    };
    let mut writer = TextWriter::stdout();
    let took_s = began.elapsed().as_secs_f64();
    if *json {
        let Drained { incarnation, state, detail, kept: _ } = &drained;
        let incarnation = incarnation.to_string();
        return writer.json(&Report { worker, incarnation, state: *state, detail, took_s });
    }
    writer.text(&match drained.state {
        DrainState::Gone => format!("{worker} is drained and has ended, in {took_s:.1} s\n"),
        DrainState::InUse => format!("{worker} may be used again\n"),
        DrainState::Moving => format!("{worker} is drained: its stages are to move\n"),
        DrainState::Ending => format!("{worker} is drained: it has no stage, and is to end\n"),
    })
}

/// Orders it, and waits until the order stands whoever leads next.
async fn order(
    operator: &Operator,
    worker: &str,
    force: bool,
    progress: &mut Progress,
) -> Result<Drained, CommandError> {
    let mut first: Option<Incarnation> = None;
    let found = until(Instant::now() + KEPT_WITHIN, progress, async || {
        let drained = operator.drain(worker, first, force).await?;
        first.get_or_insert(drained.incarnation);
        Ok(match drained.kept {
            true => Ok(drained),
            false => Err(format!("the order to drain {worker} is to be written to the registry")),
        })
    });
    found.await?.map_err(|_| {
        OperatorError::NotKept { worker: worker.to_owned(), waited: KEPT_WITHIN }.into()
    })
}

/// Drains the process that is called `worker` now, and waits until it has ended.
///
/// # Errors
///
/// [`OperatorError::StillServes`] or [`OperatorError::StillThere`] after `timeout`, or what the
/// coordinator has against it.
pub(crate) async fn drain(
    operator: &Operator,
    worker: &str,
    force: bool,
    timeout: Duration,
    progress: &mut Progress,
) -> Result<Drained, CommandError> {
    let end = Instant::now() + timeout;
    // From the first answer on it is about that process, whoever is called so later.
    let mut first: Option<Drained> = None;
    let mut last = DrainState::Moving;
    let found = until(end, progress, async || {
        let incarnation: Option<Incarnation> = first.as_ref().map(|first| first.incarnation);
        // The order again: what is not in the registry yet a coordinator that leads anew does not know.
        let drained = operator.drain(worker, incarnation, force).await?;
        if first.is_none() {
            first = Some(drained.clone());
        }
        last = drained.state;
        let waits_for = match drained.state {
            DrainState::Gone => return Ok(Ok(drained)),
            DrainState::Ending => "to end",
            DrainState::Moving | DrainState::InUse => "to be without a stage",
        };
        let why = operator::also(&drained.detail);
        Ok(Err(format!("{worker} is {waits_for}{why}")))
    });
    match found.await? {
        Ok(drained) => Ok(drained),
        Err(detail) => {
            let (worker, waited) = (worker.to_owned(), timeout);
            Err(match last {
                DrainState::Ending => OperatorError::StillThere { worker, waited, detail },
                _ => OperatorError::StillServes { worker, waited, detail, stands: true },
            }
            .into())
        }
    }
}
