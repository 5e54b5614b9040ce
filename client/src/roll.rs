//! `tercet roll`: every worker of a cluster is replaced by a new process of its name, one after the
//! other, while the others serve. What runs on one that cannot be spared waits until it is back.

use std::time::Duration;

use proto::status::{ClusterStatus, WorkerStatus};
use serde::Serialize;
use tokio::time::Instant;

use crate::command::TextWriter;
use crate::drain::drain;
use crate::operator::{Operator, OperatorError, Progress, TIMEOUT, settled, until};
use crate::{CommandError, operator};

/// What `tercet roll` is told, beside whom to tell.
#[derive(Clone, Debug, clap::Args)]
pub struct RollArgs {
    /// Ids of workers, in the order in which they are replaced [default: all, those first that have
    /// no stage]
    #[arg(value_name = "WORKER")]
    pub workers: Vec<String>,
    /// Stop when a worker does not go, or does not come back, within this time each
    #[arg(long, value_name = "TIME", default_value = TIMEOUT)]
    pub timeout: node::config::Duration,
    /// Print one JSON object a worker
    #[arg(long)]
    pub json: bool,
}

/// What is printed of each worker.
#[derive(Debug, Serialize)]
struct Report<'a> {
    worker: &'a str,
    /// As `tercet status` shows it now.
    state: String,
    /// Until it had ended, in seconds.
    drained_s: f64,
    /// From then until the new process was there, in seconds.
    back_s: f64,
    /// From then until nothing was being changed any more, in seconds.
    settled_s: f64,
}

/// Runs the command.
///
/// # Errors
///
/// [`OperatorError::Rolled`] for the first worker that cannot be replaced: those after it are left as they
/// are.
pub async fn run(operator: &Operator, args: &RollArgs) -> Result<(), CommandError> {
    let mut writer = TextWriter::stdout();
    let mut progress = Progress::stderr();
    let workers = in_order(&operator.status().await?, &args.workers)?;
    for (index, worker) in workers.iter().enumerate() {
        let report = match replace(operator, worker, args.timeout.get(), &mut progress).await {
            Ok(report) => report,
            Err(source) => {
                let (worker, left) = (worker.clone(), workers[index + 1..].to_vec());
                let source = Box::new(source);
                return Err(OperatorError::Rolled { worker, left, source }.into());
            }
        };
        if args.json {
            writer.json(&report)?;
            continue;
        }
        let Report { worker, state, drained_s, back_s, settled_s } = report;
        writer.text(&format!(
            "{worker}: ended after {drained_s:.1} s, back after {back_s:.1} s, {state} after \
             {settled_s:.1} s\n"
        ))?;
    }
    if !args.json {
        writer.text(&format!("{} of {} workers are replaced\n", workers.len(), workers.len()))?;
    }
    Ok(())
}

/// Who is replaced, in order: those that were named; else all, first those of which nobody will miss
/// anything.
fn in_order(status: &ClusterStatus, named: &[String]) -> Result<Vec<String>, OperatorError> {
    let there: Vec<String> = status.workers.iter().map(|worker| worker.id.clone()).collect();
    if !named.is_empty() {
        let mut order: Vec<String> = Vec::new();
        for worker in named {
            if !there.contains(worker) {
                return Err(OperatorError::UnknownWorker { worker: worker.clone(), there });
            }
            if !order.contains(worker) {
                order.push(worker.clone());
            }
        }
        return Ok(order);
    }
    let mut workers: Vec<&WorkerStatus> = status.workers.iter().collect();
    workers.sort_by_key(|worker| worker.state == "active");
    Ok(workers.into_iter().map(|worker| worker.id.clone()).collect())
}

/// Drains a worker, and waits until another process of its name is there and what serves is whole.
async fn replace<'a>(
    operator: &Operator,
    worker: &'a str,
    timeout: Duration,
    progress: &mut Progress,
) -> Result<Report<'a>, CommandError> {
    let began = Instant::now();
    // In any case: who cannot be spared is waited for, and comes back.
    let old = match drain(operator, worker, true, timeout, progress).await {
        Ok(drained) => drained.incarnation.to_string(),
        Err(CommandError::Operator(OperatorError::StillServes {
            worker, waited, detail, ..
        })) => {
            // It serves still, and is to go on with that.
            let stands = operator.cancel_drain(&worker).await.is_err();
            return Err(OperatorError::StillServes { worker, waited, detail, stands }.into());
        }
        Err(error) => return Err(error),
    };
    let drained = Instant::now();
    let found = until(drained + timeout, progress, async || {
        let status = operator.status().await?;
        Ok(is_back(&status, worker, &old))
    });
    if let Err(detail) = found.await? {
        let (worker, waited) = (worker.to_owned(), timeout);
        return Err(OperatorError::NotBack { worker, waited, detail }.into());
    }
    let back = Instant::now();
    // Now rather than after the hold-down, which is there for workers that come unannounced.
    let planned = operator.plan(true).await?;
    if !planned.possible {
        return Err(OperatorError::NoPlan { reason: planned.reason }.into());
    }
    let status = settled(operator, timeout, progress).await?;
    let state = status.workers.into_iter().find(|known| known.id == worker);
    Ok(Report {
        worker,
        state: state.map(|known| known.state).unwrap_or_default(),
        drained_s: (drained - began).as_secs_f64(),
        back_s: (back - drained).as_secs_f64(),
        settled_s: back.elapsed().as_secs_f64(),
    })
}

/// Whether another process than `old` is there under this name, or else what is known of it.
fn is_back(status: &ClusterStatus, worker: &str, old: &str) -> Result<(), String> {
    let new = status.workers.iter().find(|known| known.id == worker && known.incarnation != old);
    match new {
        Some(new) if matches!(new.state.as_str(), "active" | "standby") => Ok(()),
        Some(new) => {
            Err(format!("{worker} is back, and {}{}", new.state, operator::also(&new.detail)))
        }
        None => Err(format!("{worker} has ended and is to be started again")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(workers: &[(&str, &str, &str)]) -> ClusterStatus {
        let worker = |&(id, incarnation, state): &(&str, &str, &str)| WorkerStatus {
            id: id.to_owned(),
            incarnation: incarnation.to_owned(),
            state: state.to_owned(),
            ..WorkerStatus::default()
        };
        ClusterStatus { workers: workers.iter().map(worker).collect(), ..ClusterStatus::default() }
    }

    #[test]
    fn who_serves_nothing_is_replaced_first() {
        let there = status(&[("a", "1", "active"), ("b", "2", "standby"), ("c", "3", "active")]);
        let order = |named: &[&str]| {
            let named: Vec<String> = named.iter().map(|&one| one.to_owned()).collect();
            in_order(&there, &named).map_err(|error| error.to_string())
        };
        assert_eq!(order(&[]).unwrap(), ["b", "a", "c"]);
        assert_eq!(order(&["c", "a", "c"]).unwrap(), ["c", "a"], "as they were named, once each");
        assert_eq!(order(&["c", "x"]).unwrap_err(), "there is no worker \"x\"; there are a, b, c");
    }

    #[test]
    fn back_is_another_process_that_may_serve() {
        let back = |incarnation, state| is_back(&status(&[("a", incarnation, state)]), "a", "1");
        assert_eq!(back("2", "active"), Ok(()));
        assert_eq!(back("2", "standby"), Ok(()));
        assert!(back("1", "active").unwrap_err().contains("to be started again"));
        assert!(back("2", "unfit").unwrap_err().contains("back, and unfit"));
        assert!(is_back(&status(&[]), "a", "1").is_err());
    }
}
