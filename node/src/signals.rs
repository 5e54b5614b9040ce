//! Signals whose default would end the process before it could leave well or say why.
//!
//! | signal | to a server | to a command that writes |
//! |---|---|---|
//! | SIGTERM, SIGINT, SIGHUP, SIGXCPU, SIGPWR | the first asks it to stop well, the second ends it | ends it, with nothing half-written left |
//! | SIGHUP, where it was ignored at the start (`nohup`) | ignored still | ignored still |
//! | SIGUSR1, SIGUSR2 | ignored, with a warning: log rotation sends them, and a worker must not leave a pipeline for that | as the system does |
//! | SIGALRM, SIGVTALRM, SIGPROF, SIGIO, SIGSTKFLT | ignored, with a warning: nothing here asks for them | as the system does |
//! | real-time signals (SIGRTMIN to SIGRTMAX) | the same: service managers and debuggers send them | as the system does |
//! | SIGXFSZ | ignored: the write that went too far fails, and says so | the same |
//! | SIGPIPE | ignored (Rust's own start does) | the same |
//!
//! All others do what the system does. SIGQUIT is for whoever wants a core dump at once.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::Signal;
use tokio::signal::unix::{self, SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Shells and systemd take `128 + signal` as "ended by that signal".
const SIGNAL_BASE: i32 = 128;

/// Which mean that the process is to stop.
const STOPPING: [Signal; 5] =
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGXCPU, Signal::SIGPWR];

/// Which mean nothing to a server.
const MEANINGLESS: [Signal; 7] = [
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGIO,
    Signal::SIGSTKFLT,
];

/// Lets writes beyond the limit on the size of files fail, in place of ending the process: their
/// errors are told, and what was half written is removed. For every command, at its start; must be
/// called inside a runtime.
///
/// # Errors
///
/// If the operating system does not let us.
pub fn survive_file_size_limit() -> io::Result<()> {
    // A handler, once there, stays for good, and a signal that is handled ends nothing.
    listener(Signal::SIGXFSZ).map(drop)
}

/// The listener for signals. Keep it as long as the process should heed them.
#[derive(Debug)]
pub struct Signals {
    stop: CancellationToken,
    _listener: JoinSet<()>,
}

impl Signals {
    /// Starts to listen. Must be called inside a runtime.
    ///
    /// # Errors
    ///
    /// If the operating system does not let us.
    pub fn listen() -> io::Result<Self> {
        let stop = CancellationToken::new();
        let asked = stop.clone();
        let mut listener = stop_signals(move |signal| {
            if asked.is_cancelled() {
                tracing::warn!("told to stop a second time, ending at once");
                std::process::exit(exit_code(signal));
            }
            tracing::info!(signal = signal.as_str(), "told to stop");
            asked.cancel();
        })?;
        for signal in MEANINGLESS {
            let mut heard = self::listener(signal)?;
            listener.spawn(async move {
                while heard.recv().await.is_some() {
                    tracing::warn!(signal = signal.as_str(), "a signal that means nothing here");
                }
            });
        }
        let first = nix::libc::SIGRTMIN();
        for number in first..=nix::libc::SIGRTMAX() {
            let mut heard = signal(SignalKind::from_raw(number))?;
            let name = format!("SIGRTMIN+{}", number - first);
            listener.spawn(async move {
                while heard.recv().await.is_some() {
                    tracing::warn!(signal = name, "a signal that means nothing here");
                }
            });
        }
        Ok(Self { stop, _listener: listener })
    }

    /// Fires at the first signal. May also be fired by hand.
    pub fn stop(&self) -> CancellationToken {
        self.stop.clone()
    }
}

/// While it lives, a signal that asks to stop interrupts what the process writes.
#[derive(Debug)]
pub struct Interruption {
    /// SIGINT is somebody else's.
    left: Arc<AtomicBool>,
    _listener: JoinSet<()>,
}

impl Interruption {
    /// Starts to listen. `interrupt` makes what is being written end by itself, and says whether
    /// anything is; if nothing is, the process ends. Must be called inside a runtime.
    ///
    /// # Errors
    ///
    /// If the operating system does not let us.
    pub fn listen(interrupt: impl Fn(i32) -> bool + Send + Sync + 'static) -> io::Result<Self> {
        let told = AtomicBool::new(false);
        let left = Arc::new(AtomicBool::new(false));
        let is_left = Arc::clone(&left);
        let listener = stop_signals(move |signal| {
            if signal == Signal::SIGINT && is_left.load(Ordering::SeqCst) {
                return;
            }
            // Whoever says it twice does not want to wait for what is under way.
            let again = told.swap(true, Ordering::SeqCst);
            if again || !interrupt(exit_code(signal)) {
                std::process::exit(exit_code(signal));
            }
        })?;
        Ok(Self { left, _listener: listener })
    }

    /// Leaves SIGINT to somebody who listens for it himself, from now on.
    pub fn leave_interrupt(&self) {
        self.left.store(true, Ordering::SeqCst);
    }
}

/// Calls `heard` for every signal that asks the process to stop, one after the other.
fn stop_signals(heard: impl Fn(Signal) + Send + Sync + 'static) -> io::Result<JoinSet<()>> {
    let heard = Arc::new(heard);
    let mut listeners = JoinSet::new();
    for signal in STOPPING {
        // `nohup` and its like: whoever started us wants us to outlive the terminal.
        if signal == Signal::SIGHUP && is_ignored(signal) {
            continue;
        }
        let mut listener = self::listener(signal)?;
        let heard = Arc::clone(&heard);
        listeners.spawn(async move {
            while listener.recv().await.is_some() {
                heard(signal);
            }
        });
    }
    Ok(listeners)
}

fn listener(kind: Signal) -> io::Result<unix::Signal> {
    signal(SignalKind::from_raw(kind as i32))
}

/// As a shell shows that a process was ended by this signal.
fn exit_code(signal: Signal) -> i32 {
    SIGNAL_BASE + signal as i32
}

/// Whether this process ignores `signal`, which it does only if whoever started it wanted that. Where
/// the system does not say (it is Linux that has the file), it does not.
fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ignores(&status, signal as u32)
}

/// Whether the mask of ignored signals in `/proc/PID/status` has this one.
fn ignores(status: &str, signal: u32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_mask() {
        let status = "Name:\ttercet\nSigBlk:\t0000000000000003\nSigIgn:\t0000000000001001\n";
        assert!(ignores(status, Signal::SIGHUP as u32));
        assert!(ignores(status, Signal::SIGPIPE as u32));
        assert!(!ignores(status, Signal::SIGTERM as u32));
        assert!(!ignores("", 1) && !ignores("SigIgn:\tnonsense", 1));
    }
}
