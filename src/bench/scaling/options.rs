//! What `bench scaling` measures: arrangements, loads, and what makes no sense. Pure.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::figures::Observed;
use super::groups::Quota;
use super::load::{Kind, Load};

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
    /// One quota for each worker at least.
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

/// One arrangement and what its rounds gave.
pub(super) struct Series {
    pub(super) form: Form,
    pub(super) workers: Vec<usize>,
    pub(super) layers: Vec<Vec<u32>>,
    /// By [`KINDS`].
    pub(super) rounds: [Vec<Observed>; 2],
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
        if !self.quotas.is_empty() && self.quotas.len() < workers as usize {
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
    pub(super) fn loads(&self, seed: u64) -> [Load; 2] {
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
    pub(super) fn stand_ins(&self) -> Vec<usize> {
        let quota = |worker: usize| self.quotas.get(worker);
        let workers = 0..self.worker_count() as usize;
        workers
            .map(|worker| (0..worker).find(|&w| quota(w) == quota(worker)).unwrap_or(worker))
            .collect()
    }

    /// Those who are measured alone, then all arrangements, in the order in which they are measured.
    pub(super) fn series(&self) -> (usize, Vec<Series>) {
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
    pub(super) fn what(&self) -> String {
        let numbers: Vec<_> = self.workers.iter().map(|w| (w + 1).to_string()).collect();
        match (self.form, &numbers[..]) {
            (_, [one]) => format!("worker {one} alone"),
            (Form::Replicas, all) => format!("{} replicas", all.len()),
            (Form::Pipeline, all) => format!("a pipeline of {}", all.len()),
        }
    }
}
