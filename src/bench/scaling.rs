//! How near several workers come to the sum of what each gives alone, as stages of one pipeline and as
//! replicas.
//!
//! Every arrangement is a cluster of real processes with sockets between them: etcd, workers and a
//! coordinator. Workers may be held under CPU quotas, so that several machines of any speed fit one; the
//! coordinator, etcd and this process are outside of them. Arrangements are measured in turn, several
//! rounds of all.
//!
//! * `groups` control groups; `guard` ends a process however its bench ends; `processes` those of a bench
//! * `cluster` starts one arrangement; `load` keeps it busy and looks at it
//! * `figures` what is made of that (pure)

use std::io;
use std::path::PathBuf;
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
mod processes;

pub use self::figures::Figures;
pub use self::groups::{GroupError, Quota};
pub use self::load::LoadError;
pub use self::processes::ProcessError;

use self::cluster::{Cluster, Wanted};
use self::figures::Observed;
use self::groups::Place;
use self::load::{Kind, Load, Times};
use self::processes::Processes;

/// Tokens of the prompt of a request that generates: so few that reading them takes no time to speak of.
const SHORT_PROMPT: u32 = 16;

/// Requests that a coordinator runs at once on one pipeline: a limit of its own.
const REQUESTS_MAX: u32 = 256;

/// The shortest window: some looks at it.
const WINDOW_LEAST: Duration = Duration::from_secs(1);

/// The longest window and warm-up: more is a slip of the finger.
const TIME_MAX: Duration = Duration::from_secs(3600);

/// How workers work together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// Each has the whole model.
    Replicas,
    /// Each has some layers.
    Pipeline,
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// The model's store.
    pub store: PathBuf,
    /// Its name.
    pub model: String,
    /// Its layers.
    pub layers: u32,
    /// Tokens of its longest sequence.
    pub context: u32,
    /// CPUs of each worker; none: as many as there are.
    pub quotas: Vec<Quota>,
    /// How many workers work together: arrangements of the first so many, of each of these numbers.
    pub workers: Vec<u32>,
    /// How.
    pub forms: Vec<Form>,
    /// Sequences that decode at once, for each worker.
    pub sequences: u32,
    /// Tokens of each of their answers.
    pub generate: u32,
    /// Prompts that are read at once, for each worker.
    pub prompts: u32,
    /// Tokens of each.
    pub prompt: u32,
    /// Times everything is measured.
    pub rounds: u32,
    /// Before each measurement.
    pub warm_up: Duration,
    /// Of each measurement.
    pub window: Duration,
    /// Compute threads of each worker, at most.
    pub threads: usize,
    /// Memory of each worker.
    pub memory_bytes: u64,
    /// Which kernels; `None`: the fastest.
    pub isa: Option<String>,
    /// A registry that runs; `None`: one is started.
    pub etcd: Option<String>,
}

/// Why an arrangement cannot be asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// One quota for each worker.
    #[error("{quotas} quotas for {workers} workers")]
    Quotas {
        /// How many quotas.
        quotas: usize,
        /// How many workers.
        workers: u32,
    },
    /// A stage has a layer at least.
    #[error("{workers} stages need as many layers, {model} has {layers}")]
    Layers {
        /// How many stages.
        workers: u32,
        /// Which model.
        model: String,
        /// How many it has.
        layers: u32,
    },
    /// A sequence is longer than the model's context.
    #[error(
        "prompt and answer make {tokens} tokens, more than the context of {context} of {model}"
    )]
    Context {
        /// How long.
        tokens: u64,
        /// Which model.
        model: String,
        /// How long they may be.
        context: u32,
    },
    /// Too short to tell anything, or too long to wait for.
    #[error("{what} is {found:?}, it must be from {least:?} to {TIME_MAX:?}")]
    Time {
        /// Window or warm-up.
        what: &'static str,
        /// How long.
        found: Duration,
        /// The least.
        least: Duration,
    },
    /// A coordinator does not run so many at once.
    #[error(
        "{requests} requests at once for {workers} workers, at most {REQUESTS_MAX} run on a pipeline"
    )]
    Requests {
        /// How many.
        requests: u64,
        /// For how many workers.
        workers: u32,
    },
}

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

/// One arrangement and what its rounds gave.
struct Series {
    form: Form,
    workers: Vec<usize>,
    layers: Vec<Vec<u32>>,
    /// By [`KINDS`].
    rounds: [Vec<Observed>; 2],
}

/// What is measured of each arrangement.
const KINDS: [Kind; 2] = [Kind::Decode, Kind::Prefill];

impl Options {
    /// Checks what can be checked before anything is started.
    ///
    /// # Errors
    ///
    /// [`OptionsError`].
    pub fn check(&self) -> Result<(), OptionsError> {
        let workers = self.worker_count();
        let (model, layers, context) = (self.model.clone(), self.layers, self.context);
        if !self.quotas.is_empty() && self.quotas.len() != workers as usize {
            return Err(OptionsError::Quotas { quotas: self.quotas.len(), workers });
        }
        if self.forms.contains(&Form::Pipeline) && workers > layers {
            return Err(OptionsError::Layers { workers, model, layers });
        }
        let times = [
            ("the window", self.window, WINDOW_LEAST),
            ("the warm-up", self.warm_up, Duration::ZERO),
        ];
        for (what, found, least) in times {
            if !(least..=TIME_MAX).contains(&found) {
                return Err(OptionsError::Time { what, found, least });
            }
        }
        for load in self.loads(0) {
            let tokens = u64::from(load.prompt) + u64::from(load.generate);
            if tokens > u64::from(context) {
                return Err(OptionsError::Context { tokens, model, context });
            }
            let requests = u64::from(load.requests) * u64::from(workers);
            if requests > u64::from(REQUESTS_MAX) {
                return Err(OptionsError::Requests { requests, workers });
            }
        }
        Ok(())
    }

    /// How many workers the largest arrangement has.
    fn worker_count(&self) -> u32 {
        self.workers.iter().copied().max().unwrap_or(1)
    }

    /// By [`KINDS`], for one worker.
    fn loads(&self, seed: u64) -> [Load; 2] {
        KINDS.map(|kind| match kind {
            Kind::Decode => Load {
                kind,
                requests: self.sequences,
                prompt: SHORT_PROMPT,
                generate: self.generate,
                seed,
            },
            Kind::Prefill => {
                Load { kind, requests: self.prompts, prompt: self.prompt, generate: 1, seed }
            }
        })
    }

    /// Of each worker: the first one of the same quota, who is measured alone for all of them.
    fn stand_ins(&self) -> Vec<usize> {
        let quota = |worker: usize| self.quotas.get(worker);
        let workers = 0..self.worker_count() as usize;
        workers
            .map(|worker| (0..worker).find(|&w| quota(w) == quota(worker)).unwrap_or(worker))
            .collect()
    }

    /// Those who are measured alone, then all arrangements, in the order in which they are measured.
    fn series(&self) -> (usize, Vec<Series>) {
        let stand_ins = self.stand_ins();
        let own = |worker: &usize| stand_ins[*worker] == *worker;
        let alone = (0..stand_ins.len()).filter(own).map(|worker| (Form::Replicas, vec![worker]));
        let together = self.workers.iter().filter(|&&count| count > 1).flat_map(|&count| {
            self.forms.iter().map(move |&form| (form, (0..count as usize).collect()))
        });
        let series = |(form, workers)| Series {
            form,
            workers,
            layers: Vec::new(),
            rounds: [Vec::new(), Vec::new()],
        };
        let alone: Vec<_> = alone.map(series).collect();
        let count = alone.len();
        (count, alone.into_iter().chain(together.map(series)).collect())
    }
}

impl Series {
    fn what(&self) -> String {
        let numbers: Vec<_> = self.workers.iter().map(|w| (w + 1).to_string()).collect();
        match (self.form, &numbers[..]) {
            (_, [one]) => format!("worker {one} alone"),
            (Form::Replicas, all) => format!("{} replicas", all.len()),
            (Form::Pipeline, all) => format!("a pipeline of {}", all.len()),
        }
    }
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
