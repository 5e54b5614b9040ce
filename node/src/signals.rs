//! SIGTERM and SIGINT: the first asks the process to stop well, the second ends it at once.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Shells and systemd take `128 + signal` as "ended by that signal".
const SIGNAL_BASE: i32 = 128;

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
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let stop = CancellationToken::new();
        let asked = stop.clone();
        let mut listener = JoinSet::new();
        listener.spawn(async move {
            loop {
                let kind = tokio::select! {
                    _ = terminate.recv() => SignalKind::terminate(),
                    _ = interrupt.recv() => SignalKind::interrupt(),
                };
                if asked.is_cancelled() {
                    tracing::warn!("told to stop a second time, ending at once");
                    std::process::exit(SIGNAL_BASE + kind.as_raw_value());
                }
                tracing::info!(signal = kind.as_raw_value(), "told to stop");
                asked.cancel();
            }
        });
        Ok(Self { stop, _listener: listener })
    }

    /// Fires at the first signal. May also be fired by hand.
    pub fn stop(&self) -> CancellationToken {
        self.stop.clone()
    }
}
