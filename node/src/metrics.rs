//! The process's one Prometheus recorder, behind the `metrics` macros.

use std::io;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::{JoinError, spawn_blocking};

use crate::telemetry;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

/// Upper bounds of histograms of times, in seconds: from one layer's share of a step to a long
/// generation. About three per decade.
const SECONDS_BUCKETS: [f64; 18] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0,
    60.0, 150.0, 600.0,
];

/// Upper bounds of what is added to computing in a step, in seconds: a millisecond is much there.
const ADDED_BUCKETS: [f64; 16] = [
    0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05,
    0.1, 0.5, 2.5,
];

/// Upper bounds of histograms of tokens of one request, up to the longest context there is.
const TOKENS_BUCKETS: [f64; 18] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0,
    50000.0, 100000.0, 200000.0, 500000.0,
];

/// How often histograms are folded into their buckets, so that a process nobody scrapes does not
/// keep every value it ever recorded.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Pages that are made at once: who scrapes needs one, and more take each other's time.
const PAGES_AT_ONCE: usize = 2;

static PAGES: Semaphore = Semaphore::const_new(PAGES_AT_ONCE);

static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();

/// Why the recorder is not there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    /// Another recorder is there already.
    #[error("failed to install the metrics recorder")]
    Install {
        /// What the exporter said.
        source: BuildError,
    },
    /// The thread that keeps it small did not start.
    #[error("failed to start the thread that folds metrics")]
    Thread {
        /// What the operating system said.
        source: io::Error,
    },
}

/// Installs the recorder. Calling it again does nothing, so that several roles in one process
/// need not agree on who does.
///
/// # Errors
///
/// If some other recorder is installed already, or no thread can be started.
pub fn install() -> Result<(), MetricsError> {
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    if RECORDER.get().is_some() {
        return Ok(());
    }
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS_BUCKETS)
        .and_then(|builder| {
            // A whole name goes before an end of one.
            let added = Matcher::Full("tercet_step_added_seconds".to_owned());
            builder.set_buckets_for_metric(added, &ADDED_BUCKETS)
        })
        .and_then(|builder| {
            builder.set_buckets_for_metric(Matcher::Suffix("_tokens".to_owned()), &TOKENS_BUCKETS)
        })
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|source| MetricsError::Install { source })?;
    let handle = RECORDER.get_or_init(|| handle);
    metrics::describe_counter!(
        "tercet_log_lines_lost_total",
        "Lines of the log that were lost because nobody read them."
    );
    metrics::describe_gauge!("tercet_membership_reachable", "1 while etcd answers, 0 while not.");
    metrics_process::Collector::default().describe();
    // A thread and not a task, for the recorder belongs to the process and not to a runtime.
    thread::Builder::new()
        .name("metrics".into())
        .spawn(|| {
            loop {
                thread::park_timeout(UPKEEP_INTERVAL);
                handle.run_upkeep();
            }
        })
        .map_err(|source| MetricsError::Thread { source })?;
    Ok(())
}

/// Everything recorded so far, and what the process uses now (`process_*`), in Prometheus's text
/// format; empty before [`install`].
pub fn render() -> String {
    metrics_process::Collector::default().collect();
    metrics::counter!("tercet_log_lines_lost_total").absolute(telemetry::lost_lines());
    RECORDER.get().map(PrometheusHandle::render).unwrap_or_default()
}

/// The same, changed by `change`, for a server: thousands of lines take longer than an async thread may be
/// held.
///
/// # Errors
///
/// If `change` panics, or the runtime ends.
pub async fn page(
    change: impl FnOnce(String) -> String + Send + 'static,
) -> Result<String, JoinError> {
    // It is never closed. The turn lasts as long as the work, whoever has gone away meanwhile.
    let turn = PAGES.acquire().await;
    spawn_blocking(move || {
        let _turn = turn;
        change(render())
    })
    .await
}
