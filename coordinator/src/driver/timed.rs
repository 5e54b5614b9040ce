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

/// How the tests of every task and handler measure how long they compute at once.
#[cfg(test)]
pub(crate) mod testing {
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    /// The most that a task may compute at once is 500 µs. Tests are not optimised, which makes them ten
    /// to forty times slower, and what one does for the first time brings pages of memory: seventy times as
    /// much is allowed, in CPU time of the thread, so that others who compute do not count.
    pub(crate) const LONGEST_POLL: Duration = Duration::from_millis(35);

    /// What this thread has computed.
    pub(crate) fn cpu_time() -> Duration {
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
    }

    /// The longest of the polls that were observed.
    #[derive(Clone, Default)]
    pub(crate) struct Longest(Arc<Mutex<Duration>>);

    impl Longest {
        pub(crate) fn observe(&self) -> impl FnMut(Duration) + Send + 'static {
            let longest = Arc::clone(&self.0);
            move |took| {
                let mut longest = longest.lock().unwrap();
                *longest = took.max(*longest);
            }
        }

        pub(crate) fn get(&self) -> Duration {
            *self.0.lock().unwrap()
        }
    }
}
