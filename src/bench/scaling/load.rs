//! As many requests as keep a cluster busy, and what it does meanwhile.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use client::bench::Prompts;
use client::{Client, ClientError};
use futures::StreamExt;
use futures::future::try_join_all;
use proto::generate::GenerateEvent;
use proto::status::ClusterStatus;
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use super::figures::{Moment, Observed};

/// How often it is looked how far everything is.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How long the requests may take to begin: prompts of all sequences are read, perhaps by a tenth of a
/// CPU.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(600);

/// How long steps that nobody wants any more may be on their way.
const QUIET_TIMEOUT: Duration = Duration::from_secs(60);

/// How often it is looked whether there are any.
const QUIET_POLL: Duration = Duration::from_millis(20);

/// Prompts are random token ids below this: every model has so many.
const VOCAB: u32 = 256;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Short prompts and long answers.
    Decode,
    /// Long prompts and one token.
    Prefill,
}

/// Requests that are sent again and again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) kind: Kind,
    /// At once.
    pub(super) requests: u32,
    /// Tokens of each prompt.
    pub(super) prompt: u32,
    /// Tokens of each answer.
    pub(super) generate: u32,
    /// Different prompts for every measurement.
    pub(super) seed: u64,
}

/// How long is measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// From the beginning of the requests to the first look.
    pub(super) warm_up: Duration,
    /// From the first look to the last.
    pub(super) window: Duration,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A request failed.
    #[error("a request of the measurement failed")]
    Client(#[from] ClientError),
    /// They are not computed.
    #[error("{begun} of {wanted} requests began to be answered within {waited:?}")]
    Begin {
        /// How many were.
        begun: u32,
        /// How many there are.
        wanted: u32,
        /// How long they had.
        waited: Duration,
    },
    /// They do not end.
    #[error("{running} requests still run {waited:?} after they were given up")]
    Quiet {
        /// How many.
        running: u32,
        /// How long they had.
        waited: Duration,
    },
    /// Others served at the end than at the beginning.
    #[error("the plan changed while it was measured: {reason}")]
    Plan {
        /// Why it is as it is now.
        reason: String,
    },
}

/// Who has got a first token.
struct Begun {
    count: AtomicU32,
    changed: Notify,
}

/// Keeps the cluster busy with `load`, and looks at it for a while once it is. `cpu_seconds` says what its
/// processes have used.
pub(super) async fn measure(
    client: &Client,
    load: Load,
    times: Times,
    cpu_seconds: &(dyn Fn() -> Vec<f64> + Sync),
) -> Result<Observed, LoadError> {
    let begun = Begun { count: AtomicU32::new(0), changed: Notify::new() };
    // Where prompts are read they are read from the first moment on.
    let wanted = if load.kind == Kind::Decode { load.requests } else { 1 };
    let asking = (0..load.requests).map(|index| {
        let seed = (load.seed << 32) | u64::from(index);
        ask(client, load, Prompts::new(seed, VOCAB).of_this_run(), &begun)
    });
    let looking = async {
        let all = async {
            while begun.count.load(Ordering::Relaxed) < wanted {
                begun.changed.notified().await;
            }
        };
        timeout(BEGIN_TIMEOUT, all).await.map_err(|_| LoadError::Begin {
            begun: begun.count.load(Ordering::Relaxed),
            wanted,
            waited: BEGIN_TIMEOUT,
        })?;
        sleep(times.warm_up).await;
        look(client, load.kind, times.window, cpu_seconds).await
    };
    let observed = tokio::select! {
        asked = try_join_all(asking) => match asked {
            Ok(never) => match never.into_iter().next() {
                Some(never) => match never {},
                None => Observed::default(),
            },
            Err(error) => return Err(error.into()),
        },
        observed = looking => observed?,
    };
    quiet(client).await?;
    Ok(observed)
}

/// Sends one request after the other.
async fn ask(
    client: &Client,
    load: Load,
    mut prompts: Prompts,
    begun: &Begun,
) -> Result<Infallible, ClientError> {
    let mut is_first = true;
    loop {
        let mut events = client.generate(prompts.request(load.prompt, load.generate)).await?;
        while let Some(event) = events.next().await {
            if let GenerateEvent::Delta(delta) = event?
                && !delta.tokens.is_empty()
                && std::mem::take(&mut is_first)
            {
                begun.count.fetch_add(1, Ordering::Relaxed);
                begun.changed.notify_one();
            }
        }
    }
}

async fn look(
    client: &Client,
    kind: Kind,
    window: Duration,
    cpu_seconds: &(dyn Fn() -> Vec<f64> + Sync),
) -> Result<Observed, LoadError> {
    let begin = Instant::now();
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut moments = Vec::new();
    let mut serving = None;
    while begin.elapsed() <= window {
        ticks.tick().await;
        let status = client.status().await?;
        let now = epochs(&status);
        if *serving.get_or_insert_with(|| now.clone()) != now {
            return Err(LoadError::Plan { reason: status.plan.reason });
        }
        moments.push(moment(&status, kind, begin.elapsed(), cpu_seconds()));
    }
    Ok(Observed::of(&moments))
}

fn epochs(status: &ClusterStatus) -> Vec<(u64, u64)> {
    status.plan.pipelines.iter().map(|pipeline| (pipeline.id, pipeline.epoch)).collect()
}

fn moment(status: &ClusterStatus, kind: Kind, since: Duration, cpu_seconds: Vec<f64>) -> Moment {
    let pipelines = &status.plan.pipelines;
    let stages = || pipelines.iter().flat_map(|pipeline| &pipeline.stages);
    Moment {
        seconds: since.as_secs_f64(),
        tokens: match kind {
            Kind::Decode => status.rates.generated_tokens,
            Kind::Prefill => status.rates.prompt_tokens,
        },
        busy_ms: stages().map(|stage| stage.busy_ms).collect(),
        waited_ms: stages().map(|stage| stage.waited_ms).collect(),
        on_way_ms: pipelines.iter().map(|pipeline| pipeline.on_way_ms).sum(),
        cpu_seconds,
    }
}

/// Waits until nothing of the requests is left.
async fn quiet(client: &Client) -> Result<(), LoadError> {
    let begin = Instant::now();
    loop {
        let running = client.status().await?.queue.running;
        if running == 0 {
            return Ok(());
        }
        if begin.elapsed() >= QUIET_TIMEOUT {
            return Err(LoadError::Quiet { running, waited: QUIET_TIMEOUT });
        }
        sleep(QUIET_POLL).await;
    }
}
