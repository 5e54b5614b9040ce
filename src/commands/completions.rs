//! `tercet completions`: scripts for shells.

use clap::{Args, CommandFactory};
use clap_complete::Shell;
use client::command::TextWriter;

use crate::Failure;
use crate::cli::Cli;

/// Prints a completion script for a shell.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  tercet completions bash > ~/.local/share/bash-completion/completions/tercet")]
pub(crate) struct CompletionsCommand {
    /// For which shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Runs the command.
pub(crate) fn run(command: &CompletionsCommand) -> Result<(), Failure> {
    // Into memory first: clap_complete would panic when the reader goes away.
    let mut script = Vec::new();
    clap_complete::generate(command.shell, &mut Cli::command(), "tercet", &mut script);
    TextWriter::stdout().text(&String::from_utf8_lossy(&script))?;
    Ok(())
}
