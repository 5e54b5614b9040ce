//! The barrier between the phases of a step: spins first, then gives way, then sleeps. Safe code.
//!
//! A step has six to ten phases a layer, so waking threads at each would cost more than many of the
//! phases. Spinning alone would be wrong on a machine with more threads than cores, where the one
//! that is waited for may be the one that cannot run.

use std::hint;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;

/// Rounds of spinning before a waiter gives way: some 30 µs. Products end within 2 µs of one another
/// when no thread is held up.
const SPIN_ROUNDS: u32 = 2_000;

/// Times a waiter offers its core to others before it sleeps: a fraction of a microsecond each when
/// nobody wants it, so half a millisecond in all, more than a thread of a decode step waits for a
/// head's attention to a long context or for the sampler. Waking a sleeper takes some 50 µs.
const YIELD_ROUNDS: u32 = 1_000;

/// Another thread of the step panicked; nothing more will come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Poisoned;

/// A cache line (and its neighbour, which some CPUs fetch with it) of its own: an arrival does not
/// take from those who wait the line that they look at.
#[repr(align(128))]
struct Apart<T>(T);

/// Where all threads of a step meet, again and again.
pub(super) struct Barrier {
    threads: usize,
    arrived: Apart<AtomicUsize>,
    /// How often all have met. A waiter leaves when it changes.
    meetings: Apart<AtomicU32>,
    poisoned: AtomicBool,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
}

impl Barrier {
    /// A barrier for exactly `threads` threads.
    pub(super) fn new(threads: usize) -> Self {
        assert!(threads > 0, "a barrier needs a thread");
        Self {
            threads,
            arrived: Apart(AtomicUsize::new(0)),
            meetings: Apart(AtomicU32::new(0)),
            poisoned: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    /// Waits until every thread has called this as often as the caller.
    ///
    /// What a thread wrote before it came is seen by every thread after it left: each arrival is
    /// part of one chain of read-modify-writes, which the last arrival ends by changing `meetings`.
    ///
    /// # Errors
    ///
    /// [`Poisoned`] if a thread panicked before all had met.
    pub(super) fn wait(&self) -> Result<(), Poisoned> {
        let meeting = self.meetings.0.load(SeqCst);
        if self.arrived.0.fetch_add(1, SeqCst) + 1 == self.threads {
            // Nobody can arrive for the next meeting before `meetings` changes.
            self.arrived.0.store(0, SeqCst);
            self.meetings.0.store(meeting.wrapping_add(1), SeqCst);
            self.wake_sleepers();
            return self.check();
        }
        let is_over = || self.meetings.0.load(SeqCst) != meeting || self.poisoned.load(SeqCst);
        if !spin(is_over) {
            self.sleep_until(is_over);
        }
        self.check()
    }

    /// Lets every waiter go with an error, now and in the future.
    pub(super) fn poison(&self) {
        self.poisoned.store(true, SeqCst);
        self.wake_sleepers();
    }

    fn check(&self) -> Result<(), Poisoned> {
        if self.poisoned.load(SeqCst) { Err(Poisoned) } else { Ok(()) }
    }

    /// A sleeper counts itself before it looks a last time, and a waker changes the state before
    /// it looks for sleepers, both in the one order of `SeqCst`: so no sleeper is overlooked.
    fn sleep_until(&self, is_over: impl Fn() -> bool) {
        let mut asleep = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, SeqCst);
        while !is_over() {
            asleep = self.wake.wait(asleep).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, SeqCst);
    }

    fn wake_sleepers(&self) {
        if self.sleepers.load(SeqCst) > 0 {
            // Taken so that no sleeper stands between its last look and its sleep.
            drop(self.sleep.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }
}

/// Looks for a bounded time; false when it gave up.
fn spin(is_over: impl Fn() -> bool) -> bool {
    for _ in 0..SPIN_ROUNDS {
        if is_over() {
            return true;
        }
        hint::spin_loop();
    }
    for _ in 0..YIELD_ROUNDS {
        if is_over() {
            return true;
        }
        thread::yield_now();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More threads than cores, so that spinning, giving way and sleeping all happen.
    const THREADS: usize = 7;

    #[test]
    fn nobody_leaves_before_all_have_come() {
        let barrier = Barrier::new(THREADS);
        let counts: Vec<AtomicUsize> = (0..THREADS).map(|_| AtomicUsize::new(0)).collect();
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let (barrier, counts) = (&barrier, &counts);
                scope.spawn(move || {
                    for round in 1..=300 {
                        counts[thread].store(round, SeqCst);
                        barrier.wait().unwrap();
                        for count in counts {
                            assert_eq!(count.load(SeqCst), round);
                        }
                        barrier.wait().unwrap();
                    }
                });
            }
        });
    }

    #[test]
    fn a_poisoned_barrier_lets_everybody_go() {
        let barrier = Barrier::new(3);
        thread::scope(|scope| {
            let waiters: Vec<_> = (0..2).map(|_| scope.spawn(|| barrier.wait())).collect();
            while barrier.arrived.0.load(SeqCst) < 2 {
                thread::yield_now();
            }
            barrier.poison();
            for waiter in waiters {
                assert_eq!(waiter.join().unwrap(), Err(Poisoned));
            }
        });
        assert_eq!(barrier.wait(), Err(Poisoned));
    }
}
