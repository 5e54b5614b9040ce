//! How near several workers come to the sum of what each gives alone, as stages of one pipeline and as
//! replicas.
//!
//! Every arrangement is a cluster of real processes with sockets between them: etcd, workers and a
//! coordinator. Workers may be held under CPU quotas, so that several machines of any speed fit one; the
//! coordinator, etcd and this process are outside of them. Arrangements are measured in turn, several
//! rounds of all.
//!
//! * `options` what is measured (pure)
//! * `groups` control groups; `guard` ends a process however its bench ends; `processes` those of a bench
//! * `cluster` starts one arrangement; `load` keeps it busy and looks at it
//! * `figures` what is made of that (pure)

use std::io;
use std::time::Duration;

use client::ClientError;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::Report;
use super::machine::Machine;

mod cluster;
mod figures;
mod groups;
pub mod guard;
mod load;
mod options;
mod processes;

pub use self::figures::Figures;
pub use self::groups::{GroupError, Quota};
pub use self::load::LoadError;
pub use self::options::{Form, Options, OptionsError};
pub use self::processes::ProcessError;

use self::cluster::{Cluster, Wanted};
use self::figures::Observed;
use self::groups::Place;
use self::load::{Load, Times};
use self::options::Series;
use self::processes::Processes;

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScalingError {
    /// A process is not there.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// No registry.
    #[error("failed to start a registry (install etcd-server, or name one that runs with --etcd)")]
    Etcd(#[source] ProcessError),
    /// No port for it.
    #[error("failed to find a free port")]
    Port(#[source] io::Error),
    /// Workers cannot be held under quotas.
    #[error("workers cannot be held under quotas here")]
    Group(#[from] GroupError),
    /// The coordinator is somewhere else.
    #[error("the coordinator does not say where it listens: {said:?}")]
    Address {
        /// What it said.
        said: String,
    },
    /// It does not answer.
    #[error("failed to ask the coordinator")]
    Client(#[source] ClientError),
    /// Not all workers serve.
    #[error("the cluster was not ready within {waited:.0?}: {reason}")]
    NotReady {
        /// How long it had.
        waited: Duration,
        /// What the coordinator says.
        reason: String,
    },
    /// Some requests would wait for others.
    #[error(
        "{requests} requests of {tokens} tokens need {needed} KV blocks, the cluster has {found}"
    )]
    NoRoom {
        /// How many at once.
        requests: u64,
        /// Of each.
        tokens: u64,
        /// Blocks.
        needed: u64,
        /// Blocks.
        found: u32,
    },
    /// The load could not be measured.
    #[error("failed to measure {what}")]
    Load {
        /// Which arrangement.
        what: String,
        /// Why.
        source: LoadError,
    },
    /// Told to stop.
    #[error("told to stop before everything was measured")]
    Stopped,
}

/// What was measured: what `tercet bench scaling --json` prints. Rates are medians.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// Version of the program.
    pub version: &'static str,
    /// Where.
    pub machine: Machine,
    /// Name of the model.
    pub model: String,
    /// CPUs of each worker; absent: they were not held under quotas.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub quotas: Vec<f64>,
    /// Sequences that decoded at once, for each worker.
    pub sequences: u32,
    /// Tokens of their answers.
    pub generate: u32,
    /// Prompts that were read at once, for each worker.
    pub prompts: u32,
    /// Tokens of each.
    pub prompt: u32,
    /// Times everything was measured.
    pub rounds: u32,
    /// How long each time, in seconds.
    pub window_s: f64,
    /// Single workers, one of each quota.
    pub alone: Vec<Arrangement>,
    /// Several workers.
    pub together: Vec<Arrangement>,
}

/// Workers that work together, or one alone.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Arrangement {
    /// How; one alone is a replica.
    pub form: Form,
    /// Which workers, by number from 1.
    pub workers: Vec<usize>,
    /// Layers of each stage of each pipeline, in the last round.
    pub layers: Vec<Vec<u32>>,
    /// Tokens that were generated.
    pub decode: Figures,
    /// Tokens of prompts that were read.
    pub prefill: Figures,
}

/// Measures everything. Every process and control group is gone when it ends, however it does.
///
/// # Errors
///
/// [`ScalingError`].
pub async fn measure(
    options: &Options,
    stop: &CancellationToken,
    report: Report<'_>,
) -> Result<Measured, ScalingError> {
    let mut processes = Processes::new()?;
    let measured = stop.run_until_cancelled(measure_all(options, &mut processes, report)).await;
    let ended = processes.end(0).await;
    let measured = measured.unwrap_or(Err(ScalingError::Stopped))?;
    ended?;
    Ok(measured)
}

async fn measure_all(
    options: &Options,
    processes: &mut Processes,
    report: Report<'_>,
) -> Result<Measured, ScalingError> {
    let place = match options.quotas.is_empty() {
        true => None,
        false => Some(Place::find()?),
    };
    let etcd = cluster::etcd(options, processes).await?;
    let (alone, mut all) = options.series();
    let total = u64::from(options.rounds) * all.len() as u64;
    let mut number = 0;
    for round in 0..options.rounds {
        for series in &mut all {
            report(&format!("{}, round {}", series.what(), round + 1), number.into(), total);
            let wanted =
                Wanted { form: series.form, workers: &series.workers, number, etcd: &etcd };
            let (layers, observed) = measure_one(options, wanted, place.as_ref(), processes)
                .await
                .map_err(|error| error.of(series.what()))?;
            series.layers = layers;
            for (rounds, observed) in series.rounds.iter_mut().zip(observed) {
                rounds.push(observed);
            }
            number += 1;
        }
    }
    Ok(assemble(options, alone, &all))
}

type Layers = Vec<Vec<u32>>;

/// Starts an arrangement, measures it, and ends it.
async fn measure_one(
    options: &Options,
    wanted: Wanted<'_>,
    place: Option<&Place>,
    processes: &mut Processes,
) -> Result<(Layers, [Observed; 2]), ScalingError> {
    let Cluster { client, layers, first } =
        Cluster::start(options, wanted, place, processes).await?;
    let times = Times { warm_up: options.warm_up, window: options.window };
    let workers = wanted.workers.len() as u32;
    let mut observed = [Observed::default(), Observed::default()];
    let ids = processes.ids(first);
    for (load, observed) in options.loads(wanted.number.into()).into_iter().zip(&mut observed) {
        let load = Load { requests: load.requests * workers, ..load };
        let cpu_seconds = || ids.iter().copied().map(processes::cpu_seconds_of).collect();
        *observed = tokio::select! {
            biased;
            error = processes.failed() => return Err(error.into()),
            measured = load::measure(&client, load, times, &cpu_seconds) => measured
                .map_err(|source| ScalingError::Load { what: String::new(), source })?,
        };
    }
    processes.end(first).await?;
    Ok((layers, observed))
}

impl ScalingError {
    /// Says which arrangement.
    fn of(self, arrangement: String) -> Self {
        match self {
            Self::Load { source, .. } => Self::Load { what: arrangement, source },
            other => other,
        }
    }
}

/// The figures of all series; the first `alone` are single workers.
fn assemble(options: &Options, alone: usize, all: &[Series]) -> Measured {
    let stand_ins = options.stand_ins();
    let median = |worker: usize, kind: usize| {
        let own = all[..alone].iter().find(|series| series.workers == [stand_ins[worker]]);
        own.map_or(0.0, |series| Figures::of(&series.rounds[kind], &[]).tokens_per_s)
    };
    let arrangement = |series: &Series| {
        let figures = |kind: usize| {
            let alone: Vec<f64> = series.workers.iter().map(|&w| median(w, kind)).collect();
            Figures::of(&series.rounds[kind], &alone)
        };
        Arrangement {
            form: series.form,
            workers: series.workers.iter().map(|worker| worker + 1).collect(),
            layers: series.layers.clone(),
            decode: figures(0),
            prefill: figures(1),
        }
    };
    let (single, several) = all.split_at(alone);
    Measured {
        version: env!("CARGO_PKG_VERSION"),
        machine: Machine::this(),
        model: options.model.clone(),
        quotas: options.quotas.iter().map(|quota| quota.cpus()).collect(),
        sequences: options.sequences,
        generate: options.generate,
        prompts: options.prompts,
        prompt: options.prompt,
        rounds: options.rounds,
        window_s: options.window.as_secs_f64(),
        alone: single.iter().map(arrangement).collect(),
        together: several.iter().map(arrangement).collect(),
    }
}

#[cfg(test)]
mod tests;
