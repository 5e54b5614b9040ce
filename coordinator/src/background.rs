//! Threads for large work on one request, below the priority of those that serve: bodies and prompts
//! of many KiB that a stranger sends take no core from tokens.

use std::sync::LazyLock;

use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

/// How much nicer than the rest: where cores are short, three shares go to a thread that serves and one
/// to such work, and a thread that serves need not wait for it when it wakes. Not more: rendering a
/// conversation is bounded by the clock, and must come to its end on a machine that computes.
const NICENESS: i32 = 5;

/// Threads, of all requests: more only take turns on the same cores, and each large request brings
/// memory of its own.
pub(crate) const THREADS: usize = 4;

/// What all of them are called.
pub(crate) const THREAD_NAME: &str = "tercet-large";

/// The priority below which none goes.
#[cfg(test)]
const NICEST: i32 = 19;

/// One set for the process: its cores are the process's too. It has no event loop, only the threads
/// that work needs, which end some seconds after the last.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    Builder::new_current_thread()
        .thread_name(THREAD_NAME)
        .max_blocking_threads(THREADS)
        .on_thread_start(|| {
            // On Linux of this thread alone.
            if let Err(error) = rustix::process::nice(NICENESS) {
                tracing::warn!(%error, "failed to lower the priority of large work");
            }
        })
        .build()
        .expect("a runtime without an event loop asks nothing of the system")
});

/// Begins `work`, which computes; it waits if [`THREADS`] others have begun. Whoever calls bounds how
/// many wait.
pub(crate) fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    RUNTIME.spawn_blocking(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn niceness() -> i32 {
        rustix::process::getpriority_process(None).unwrap()
    }

    #[tokio::test]
    async fn large_work_has_a_lower_priority_and_leaves_that_of_others() {
        let before = niceness();
        let there = spawn(niceness).await.unwrap();
        assert_eq!((there, niceness()), ((before + NICENESS).min(NICEST), before));
    }
}
