//! Looks after the weights of the stages that this worker holds, beside its work: whether somebody wrote
//! to their files, each second, and by and by whether every byte still is what it was.
//!
//! Steps look for themselves before their results leave ([`crate::engine::Engine::forward_verified`]).
//! This is for a worker that has none (engines that nobody came back for go as well), and for bytes that change though nobody writes to their file: of
//! a failing disk or failing memory, or of a map that another process writes to.

use std::sync::Arc;
use std::time::{Duration, Instant};

use model::{FileWatch, WeightFile};
use node::TaskError;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::bridge::EngineFailure;
use crate::engine::EngineError;
use crate::service::Service;

/// How often the files are looked at, and some of their bytes compared.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Of that, how long bytes are compared by one thread: one per cent of one core, some 10 to 30 MB each
/// second. A stage of 1 GiB is through in about a minute, of 20 GiB in about half an hour.
const COMPARE_FOR: Duration = Duration::from_millis(10);

/// Bytes that are compared between two looks at the clock: a fraction of a millisecond.
const PIECE_BYTES: usize = 256 << 10;

/// Ends when `stop` fires. What is not any more what it was goes to `failures`: the worker must end, and
/// say so.
///
/// # Errors
///
/// If the thread that looks panicked.
pub(crate) async fn look_after(
    service: Arc<Service>,
    failures: mpsc::Sender<EngineFailure>,
    stop: CancellationToken,
) -> Result<(), TaskError> {
    let mut watch = FileWatch::default();
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        service.forget_unwanted();
        let holdings = service.holdings();
        let look = move || {
            // They are held, and counted, as long as this takes.
            let files = holdings.iter().flat_map(|holding| holding.weight_files()).cloned();
            let looked = look(&mut watch, &files.collect::<Vec<_>>());
            (watch, looked)
        };
        let (back, looked) = tokio::task::spawn_blocking(look).await?;
        watch = back;
        if let Err(source) = looked {
            // A failure that is there already stops the process as well.
            drop(failures.try_send(EngineFailure::Refused(EngineError::Changed(source))));
            stop.cancelled().await;
        }
    }
    Ok(())
}

fn look(watch: &mut FileWatch, files: &[WeightFile]) -> Result<(), model::StoreError> {
    watch.look(files)?;
    let begin = Instant::now();
    while !files.is_empty() && begin.elapsed() < COMPARE_FOR {
        watch.compare(files, PIECE_BYTES)?;
    }
    Ok(())
}
