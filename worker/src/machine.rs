//! Keeps what the registry says of this machine true while it changes: how many threads may compute,
//! and how fast.

use std::sync::Arc;
use std::time::Duration;

use node::{Chain, TaskError};
use proto::plan::WorkerModel;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::config::cpu::CpuLimits;
use crate::pace::{Drift, window};
use crate::record::Published;
use crate::service::Service;

/// How often the limits of cores and quota are read again: people and orchestrators change them, and
/// nobody tells us.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Ends when `stop` fires. `asked` are the threads that the configuration asks for.
///
/// # Errors
///
/// If the thread that looks panicked.
pub(crate) async fn watch_cpus(
    asked: Option<usize>,
    service: Arc<Service>,
    published: Arc<Published>,
    stop: CancellationToken,
) -> Result<(), TaskError> {
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let limits = tokio::task::spawn_blocking(CpuLimits::read).await?;
        follow(limits, asked, &service, &published).await;
    }
    Ok(())
}

/// Takes the number of threads that these limits allow, for engines that are built from now on.
pub(crate) async fn follow(
    limits: CpuLimits,
    asked: Option<usize>,
    service: &Service,
    published: &Published,
) {
    let (before, now) = (service.threads(), limits.threads(asked));
    if before == now {
        return;
    }
    let reason = limits.explain(asked);
    tracing::info!(before, reason, "the threads of engines that are built from now on changed");
    service.set_threads(now);
    let memory_bytes = service.offered_bytes();
    let told = published.change(|record| {
        record.threads = u32::try_from(now).unwrap_or(u32::MAX);
        record.memory_bytes = memory_bytes;
        // Until they are measured: threads share the work evenly.
        scale(&mut record.models, before as f64 / now as f64);
        service.pace().publish(record.models.clone());
    });
    if let Err(error) = told.await {
        tracing::info!(error = %Chain(&*error), "the registry does not know it yet");
    }
}

/// Ends when `stop` fires. Until then what is published is kept as fast as steps really are: a departure
/// that lasts for `drift_time` is published, and a large one sooner.
///
/// # Errors
///
/// None.
pub(crate) async fn watch_pace(
    service: Arc<Service>,
    published: Arc<Published>,
    drift_time: Duration,
    stop: CancellationToken,
) -> Result<(), TaskError> {
    let mut drift = Drift::default();
    let mut ticks = interval(window(drift_time));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        if let Some(factor) = drift.observe(service.pace().take()) {
            adjust(factor, &service, &published).await;
        }
    }
    Ok(())
}

/// Multiplies all published times by `factor`.
pub(crate) async fn adjust(factor: f64, service: &Service, published: &Published) {
    tracing::info!(factor, "steps take longer or shorter than published: the times are changed");
    let told = published.change(|record| {
        scale(&mut record.models, factor);
        service.pace().publish(record.models.clone());
    });
    if let Err(error) = told.await {
        tracing::info!(error = %Chain(&*error), "the registry does not know it yet");
    }
}

/// Multiplies all times by `factor`.
pub(crate) fn scale(models: &mut [WorkerModel], factor: f64) {
    let scaled = |nanos: u64| ((nanos as f64 * factor) as u64).max(1);
    for step in models.iter_mut().flat_map(|model| &mut model.steps) {
        step.layer_ns = scaled(step.layer_ns);
        step.head_ns = scaled(step.head_ns);
    }
}

#[cfg(test)]
mod tests {
    use proto::plan::StepTime;

    use super::*;

    #[test]
    fn fewer_threads_take_longer() {
        let steps = vec![StepTime { rows: 4, layer_ns: 1000, head_ns: 0 }];
        let mut models = vec![WorkerModel { steps, ..WorkerModel::default() }];
        scale(&mut models, 4.0 / 2.0);
        assert_eq!(models[0].steps[0], StepTime { rows: 4, layer_ns: 2000, head_ns: 1 });
        scale(&mut models, f64::INFINITY);
        assert_eq!(models[0].steps[0].layer_ns, u64::MAX, "it overflows nowhere");
    }
}
