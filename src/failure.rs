//! How a command fails: one sentence on standard error, and an exit code.

use std::error::Error;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use client::CommandError;
use node::Chain;
use node::config::printable;
use node::exit::Exit;

/// How long the last sentence may take to be written: nobody may be reading, and the exit code tells too.
const REPORT_TIMEOUT: Duration = Duration::from_secs(1);

/// The exit code of a process that a signal told to stop; 0 while none did.
static TOLD_TO_STOP: AtomicU8 = AtomicU8::new(0);

/// A signal told this process to stop: it ends with `code`, which says so.
pub(crate) fn told_to_stop(code: i32) {
    // Codes of signals fit: they are 128 and less than 64 more.
    TOLD_TO_STOP.store(u8::try_from(code).unwrap_or(u8::MAX), Ordering::SeqCst);
}

/// Why a command failed, with what that means for the exit code.
///
/// Every error turns into [`Exit::Failed`] with `?`; the other codes are asked for by name.
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    error: Box<dyn Error + Send + Sync>,
}

impl Failure {
    /// The command line makes no sense.
    pub fn usage(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { exit: Exit::Usage, error: error.into() }
    }

    /// The configuration makes no sense.
    pub fn config(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { exit: Exit::Config, error: error.into() }
    }

    /// The exit code.
    pub fn exit(&self) -> Exit {
        self.exit
    }

    /// Says what went wrong, unless whoever read our output went away: then nobody listens, and
    /// nothing is wrong.
    pub fn report(&self) -> ExitCode {
        if self.error.downcast_ref().is_some_and(CommandError::is_broken_pipe) {
            return Exit::Done.into();
        }
        let (written, is_written) = mpsc::channel();
        let message = self.to_string();
        thread::spawn(move || {
            // When standard error is closed, the exit code alone must do.
            let _ = writeln!(io::stderr(), "{message}");
            let _ = written.send(());
        });
        let _ = is_written.recv_timeout(REPORT_TIMEOUT);
        match TOLD_TO_STOP.load(Ordering::SeqCst) {
            0 => self.exit.into(),
            code => code.into(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It may repeat what the command line, a file or a server said.
        write!(f, "error: {}", printable(&Chain(&*self.error).to_string()))
    }
}

impl<E: Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { exit: Exit::Failed, error: Box::new(error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_and_a_code() {
        let failure = Failure::from(CommandError::Input(io::ErrorKind::NotFound.into()));
        let want = "error: failed to read from standard input: entity not found";
        assert_eq!((failure.to_string().as_str(), failure.exit()), (want, Exit::Failed));
        assert_eq!(Failure::usage("no").exit(), Exit::Usage);
        assert_eq!(Failure::config("no").to_string(), "error: no");
    }

    #[test]
    fn a_failure_gives_no_orders_to_a_terminal() {
        let failure = Failure::usage("no model at \u{1b}]0;x\u{7}\ny");
        assert_eq!(failure.to_string(), r"error: no model at \u{1b}]0;x\u{7}\ny");
    }

    #[test]
    fn a_reader_that_went_away_is_no_failure() {
        let failure = Failure::from(CommandError::Output(io::ErrorKind::BrokenPipe.into()));
        assert_eq!(failure.report(), ExitCode::SUCCESS);
    }
}
