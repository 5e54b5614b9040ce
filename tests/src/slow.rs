//! A process that gets a tenth of its time: a stand-in for a machine that others use, which works wherever
//! tests run, without control groups.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long it runs, and how long it then stands still: short beside every deadline of the data plane.
const RUNS: Duration = Duration::from_millis(5);
const STOPS: Duration = Duration::from_millis(45);

/// Runs `meanwhile` while the process with this id gets a tenth of its time.
///
/// # Panics
///
/// If the process is gone, or `meanwhile` panics.
pub fn to_a_tenth<T>(id: u32, meanwhile: impl FnOnce() -> T) -> T {
    let pid = Pid::from_raw(id.try_into().expect("process ids are small"));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let over = &over;
        scope.spawn(move || {
            let signals = [(Signal::SIGSTOP, STOPS), (Signal::SIGCONT, RUNS)];
            // It ends with the process running.
            for &(signal, pause) in signals.iter().cycle() {
                if signal == Signal::SIGSTOP && over.load(Ordering::Relaxed) {
                    break;
                }
                kill(pid, signal).expect("it lives");
                rest(pause);
            }
        });
        let _ending = Ending::new(over);
        meanwhile()
    })
}

#[expect(clippy::disallowed_methods, reason = "a thread of its own, which paces another process")]
fn rest(pause: Duration) {
    thread::sleep(pause);
}

/// Tells other threads that it is over, also when a test fails.
pub struct Ending<'a>(&'a AtomicBool);

impl<'a> Ending<'a> {
    /// Sets `over` when it is dropped.
    pub fn new(over: &'a AtomicBool) -> Self {
        Self(over)
    }
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
