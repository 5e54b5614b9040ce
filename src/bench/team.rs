//! Threads that begin together, and the time until the last has ended.

use std::sync::Barrier;
use std::time::{Duration, Instant};

/// Runs `work` with 0 to `threads` - 1, each on a thread of its own, and returns the time from the
/// first beginning to the last end.
///
/// # Panics
///
/// If `work` does.
pub(super) fn time(threads: usize, work: impl Fn(usize) + Sync) -> Duration {
    let start = Barrier::new(threads);
    let run = |index: usize| {
        start.wait();
        let begin = Instant::now();
        work(index);
        (begin, Instant::now())
    };
    let times: Vec<(Instant, Instant)> = std::thread::scope(|scope| {
        let run = &run;
        let others: Vec<_> = (1..threads).map(|index| scope.spawn(move || run(index))).collect();
        let own = run(0);
        let join = |other: std::thread::ScopedJoinHandle<'_, _>| match other.join() {
            Ok(times) => times,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        std::iter::once(own).chain(others.into_iter().map(join)).collect()
    });
    let begin = times.iter().map(|(begin, _)| *begin).min();
    let end = times.iter().map(|(_, end)| *end).max();
    match (begin, end) {
        (Some(begin), Some(end)) => end.duration_since(begin),
        _ => Duration::ZERO,
    }
}

/// The times of `repeats` runs, in seconds.
pub(super) fn times(threads: usize, repeats: usize, work: impl Fn(usize) + Sync) -> Vec<f64> {
    // A clock that stands still between two looks would divide by nothing.
    let seconds = |time: Duration| time.as_secs_f64().max(1e-9);
    (0..repeats).map(|_| seconds(time(threads, &work))).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn everyone_works_once() {
        let done: Vec<AtomicUsize> = (0..3).map(|_| AtomicUsize::new(0)).collect();
        let times = times(3, 4, |index| {
            done[index].fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(times.len(), 4);
        assert!(times.iter().all(|time| *time > 0.0));
        assert!(done.iter().all(|count| count.load(Ordering::Relaxed) == 4));
    }
}
