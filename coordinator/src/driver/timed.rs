//! How long a task computes at once: what else its thread is to do waits for so long.

use std::future::poll_fn;
use std::pin::pin;
use std::time::{Duration, Instant};

/// Runs `task`, and tells `observe` how long each of its polls took by `clock`.
pub(crate) async fn timed<F: Future>(
    task: F,
    clock: impl Fn() -> Duration,
    mut observe: impl FnMut(Duration),
) -> F::Output {
    let mut task = pin!(task);
    poll_fn(move |context| {
        let begin = clock();
        let outcome = task.as_mut().poll(context);
        observe(clock().saturating_sub(begin));
        outcome
    })
    .await
}

/// The time that passes.
pub(crate) fn wall_clock() -> impl Fn() -> Duration {
    let begin = Instant::now();
    move || begin.elapsed()
}
