//! Keeps what the registry says of this machine true while it changes: how many threads may compute,
//! and how fast.

use std::sync::Arc;
use std::time::Duration;

use node::{Chain, TaskError};
use proto::ids::ModelId;
use proto::plan::WorkerModel;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::config::cpu::CpuLimits;
use crate::engine::{EngineConfig, EngineError};
use crate::measure::measure_steps;
use crate::pace::{Drift, Rest, is_slower, window};
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

/// Takes the number of threads that these limits allow, for engines that are built from now on, and says
/// in the registry with how many this worker computes, and how much longer that takes under a quota that
/// gives them less than a CPU each.
pub(crate) async fn follow(
    limits: CpuLimits,
    asked: Option<usize>,
    service: &Service,
    published: &Published,
) {
    let allowed = limits.threads(asked);
    if service.threads() != allowed {
        let (before, reason) = (service.threads(), limits.explain(asked));
        tracing::info!(before, reason, "the threads of engines that are built from now on changed");
        service.set_threads(allowed);
    }
    // An engine keeps the threads that it was built with.
    let in_use = service.threads_in_use();
    let now = u32::try_from(in_use).unwrap_or(u32::MAX);
    let memory_bytes = service.offered_bytes();
    let before = published.current();
    let (stretch_before, stretch) = (published.stretch(), stretch(&limits, in_use, service));
    // Both were computed from whole numbers: equal limits give equal bits.
    let is_as_quick = stretch.to_bits() == stretch_before.to_bits();
    if (before.threads, before.memory_bytes) == (now, memory_bytes) && is_as_quick {
        return;
    }
    tracing::info!(
        before = before.threads,
        now,
        stretch_before,
        stretch,
        "this worker computes with as many threads, and its quota makes steps so many times as long"
    );
    published.set_stretch(stretch);
    let told = published.change(|record| {
        record.threads = now;
        record.memory_bytes = memory_bytes;
        // Until they are measured: threads share the work evenly.
        let by_threads = f64::from(before.threads.max(1)) / f64::from(now.max(1));
        scale(&mut record.models, by_threads * stretch / stretch_before);
        service.pace().publish(record.models.clone());
    });
    if let Err(error) = told.await {
        tracing::info!(error = %Chain(&*error), "the registry does not know it yet");
    }
}

/// How many times as long as unhindered steps take with so many threads.
fn stretch(limits: &CpuLimits, threads: usize, service: &Service) -> f64 {
    match service.identity().stub {
        // Who waits in place of computing waits as long under every quota.
        Some(_) => 1.0,
        None => limits.stretch(threads),
    }
}

/// What this machine measured before it was registered.
#[derive(Clone, Debug)]
pub(crate) struct AtStart {
    pub(crate) models: Vec<WorkerModel>,
    pub(crate) threads: u32,
    /// How many times as long as unhindered those times are.
    pub(crate) stretch: f64,
}

impl AtStart {
    /// What those times would be with so many threads and so much longer than unhindered: what a quota or
    /// fewer cores take is nothing that measuring again could give back. More threads are not counted on.
    fn under(&self, threads: u32, stretch: f64) -> Vec<WorkerModel> {
        let by_threads = f64::from(self.threads.max(1)) / f64::from(threads.max(1));
        let mut models = self.models.clone();
        scale(&mut models, by_threads.max(1.0) * stretch / self.stretch);
        models
    }
}

/// Ends when `stop` fires. Until then what is published is kept as fast as steps really are: a departure
/// that lasts for `drift_time` is published, and a large one sooner. Without a stage it is kept no slower
/// than this machine is: `at_start` is what it measured before it was registered.
///
/// # Errors
///
/// If measuring or the thread that reads the limits panicked.
pub(crate) async fn watch_pace(
    at_start: AtStart,
    service: Arc<Service>,
    published: Arc<Published>,
    drift_time: Duration,
    stop: CancellationToken,
) -> Result<(), TaskError> {
    let (mut drift, mut rest) = (Drift::default(), Rest::default());
    let mut ticks = interval(window(drift_time));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        if let Some(factor) = drift.observe(service.pace().take()) {
            let limits = tokio::task::spawn_blocking(CpuLimits::read).await?;
            adjust(factor, limits, &service, &published).await;
        }
        let record = published.current();
        let usual = at_start.under(record.threads, published.stretch());
        let is_slow = is_slower(&record.models, &usual);
        if rest.observe(service.holds_a_stage(), is_slow) {
            measure_again(&service, &published).await?;
        }
    }
    Ok(())
}

/// Publishes how fast this machine is now, if nothing else is to be done.
///
/// # Errors
///
/// If measuring panicked.
pub(crate) async fn measure_again(
    service: &Arc<Service>,
    published: &Published,
) -> Result<(), TaskError> {
    // Who wants a stage meanwhile waits for a second.
    let Some(resting) = service.rest() else { return Ok(()) };
    let measuring = service.clone();
    let measured = tokio::task::spawn_blocking(move || measure(&measuring)).await?;
    drop(resting);
    let (models, stretch) = match measured {
        Ok(measured) => measured,
        Err(error) => {
            tracing::warn!(error = %Chain(&error), "this worker could not measure itself again");
            return Ok(());
        }
    };
    tracing::info!("this worker has measured itself again");
    published.set_stretch(stretch);
    let told = published.change(|record| {
        record.models = models;
        service.pace().publish(record.models.clone());
    });
    if let Err(error) = told.await {
        tracing::info!(error = %Chain(&*error), "the registry does not know it yet");
    }
    Ok(())
}

/// Times all models as at the start of this process, and says how many times as long as unhindered those
/// times are. Blocks the caller for about a second for each.
fn measure(service: &Service) -> Result<(Vec<WorkerModel>, f64), EngineError> {
    let identity = service.identity();
    let engine = EngineConfig { threads: service.threads(), ..identity.engine };
    let stretch = stretch(&CpuLimits::read(), engine.threads, service);
    let models = identity.stores.iter().map(|store| {
        let id = ModelId(store.id().0);
        let steps = match identity.stub {
            Some(profile) => profile.steps(),
            None => measure_steps(store, &engine)?,
        };
        let mut model = WorkerModel { id, steps };
        // Steps were timed while they computed; under a quota they stand still besides.
        scale(std::slice::from_mut(&mut model), stretch);
        Ok(model)
    });
    let models: Result<_, EngineError> = models.collect();
    Ok((models?, stretch))
}

/// Multiplies all published times by `factor`, which steps took under these limits: where they changed,
/// that is in it.
pub(crate) async fn adjust(
    factor: f64,
    limits: CpuLimits,
    service: &Service,
    published: &Published,
) {
    tracing::info!(factor, "steps take longer or shorter than published: the times are changed");
    published.set_stretch(stretch(&limits, service.threads_in_use(), service));
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
    fn what_limits_take_makes_nobody_measure_again() {
        let steps = vec![StepTime { rows: 1, layer_ns: 1000, head_ns: 1000 }];
        let models = vec![WorkerModel { steps, ..WorkerModel::default() }];
        let at_start = AtStart { models, threads: 4, stretch: 2.0 };
        let usual = |threads, stretch| at_start.under(threads, stretch)[0].steps[0].layer_ns;
        assert_eq!(usual(4, 2.0), 1000);
        assert_eq!((usual(4, 6.0), usual(2, 2.0), usual(1, 1.0)), (3000, 2000, 2000));
        assert_eq!(usual(8, 2.0), 1000, "twice as many may be no faster");
        let under_less = at_start.under(2, 6.0);
        assert!(is_slower(&under_less, &at_start.models));
        assert!(!is_slower(&under_less, &at_start.under(2, 6.0)));
        assert!(is_slower(&under_less, &at_start.under(2, 2.0)), "the quota is gone");
    }

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
