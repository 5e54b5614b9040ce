//! The `tercet` binary: arguments, runtime, run, exit code.

use std::process::ExitCode;
use std::time::Duration;

use tercet::cli::Cli;

/// How long threads that block (a read from a terminal) may hold up the end: not at all worth
/// waiting for.
const BLOCKED_GRACE: Duration = Duration::from_millis(50);

fn main() -> ExitCode {
    let cli = Cli::read();
    // For network and timers; computing has its own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(node::threads::for_network())
        .thread_name("tercet-io")
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(tercet::run(cli));
            runtime.shutdown_timeout(BLOCKED_GRACE);
            outcome
        }
        Err(error) => Err(error.into()),
    };
    match outcome {
        Ok(()) => node::exit::Exit::Done.into(),
        Err(failure) => failure.report(),
    }
}
