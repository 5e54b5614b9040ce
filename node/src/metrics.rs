//! The process's one Prometheus recorder, behind the `metrics` macros.

use std::sync::{Mutex, OnceLock, PoisonError};

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

/// Upper bounds of histograms of times, in seconds: from one layer's share of a step to a long
/// generation. About three per decade.
const SECONDS_BUCKETS: [f64; 18] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0,
    60.0, 150.0, 600.0,
];

static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();

/// Why the recorder is not there.
#[derive(Debug, thiserror::Error)]
#[error("failed to install the metrics recorder")]
pub struct MetricsError {
    source: BuildError,
}

/// Installs the recorder. Calling it again does nothing, so that several roles in one process
/// need not agree on who does.
///
/// # Errors
///
/// If some other recorder is installed already.
pub fn install() -> Result<(), MetricsError> {
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    if RECORDER.get().is_some() {
        return Ok(());
    }
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS_BUCKETS)
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|source| MetricsError { source })?;
    RECORDER.get_or_init(|| handle);
    Ok(())
}

/// Everything recorded so far in Prometheus's text format; empty before [`install`].
pub fn render() -> String {
    let Some(handle) = RECORDER.get() else { return String::new() };
    // Moves what histograms gathered into their buckets, or it would be kept one by one.
    handle.run_upkeep();
    handle.render()
}
