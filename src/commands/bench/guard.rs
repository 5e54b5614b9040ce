//! `tercet bench guard`: not for people. See `bench::scaling::guard`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use node::signals::Signals;

use crate::Failure;
use crate::bench::scaling::guard::{Guard, run as guard};

/// Runs a program until standard input ends, then ends it and removes what it leaves.
#[derive(Debug, Args)]
pub(crate) struct GuardCommand {
    /// Control group that it starts in
    #[arg(long, value_name = "DIR", requires = "home")]
    group: Option<PathBuf>,
    /// Control group that the guard goes back to
    #[arg(long, value_name = "DIR", requires = "group")]
    home: Option<PathBuf>,
    /// Folder to remove when it has ended
    #[arg(long, value_name = "DIR")]
    remove: Option<PathBuf>,
    /// Program and arguments
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

/// Runs the command.
pub(crate) async fn run(command: GuardCommand) -> Result<(), Failure> {
    let GuardCommand { group, home, remove, program } = command;
    let signals = Signals::listen()?;
    Ok(guard(&Guard { program, group: group.zip(home), remove }, &signals.stop()).await?)
}
