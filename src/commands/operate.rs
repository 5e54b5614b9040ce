//! `tercet drain` and `tercet roll`: an operator's commands to a running cluster.

use clap::Args;
use client::Operator;
use client::drain::DrainArgs;
use client::endpoint::OperatorArgs;
use client::roll::RollArgs;

use crate::{Failure, settings};

/// Has a worker used no more: its stages move elsewhere while everything is served on, and then it ends.
///
/// It ends as after SIGTERM, with exit code 0. Where nobody can take its stages it goes on serving, and
/// this command waits; with --force it goes all the same, and what runs on it waits until it is back.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet drain rack1-7071 --endpoint rack1:7420
  tercet drain rack1-7071 --admin 127.0.0.1:7421 --timeout 10m --json
  tercet drain rack1-7071 --force
  tercet drain rack1-7071 --cancel")]
pub(crate) struct DrainCommand {
    #[command(flatten)]
    drain: DrainArgs,
    #[command(flatten)]
    operator: OperatorArgs,
}

/// Replaces every worker by a new process, one after the other, while the others serve.
///
/// Each is drained and ends; whatever started it (systemd, Kubernetes, `tercet up`) must start it again
/// under its name. The next one's turn comes when the new process is there and nothing is being changed any
/// more. What runs on a worker that cannot be spared waits until its new process is there. If a worker does
/// not go or does not come back the rest is left as it is.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet roll --endpoint rack1:7420
  tercet roll rack1-7071 rack2-7071 --timeout 10m
  tercet roll --json | jq .back_s")]
pub(crate) struct RollCommand {
    #[command(flatten)]
    roll: RollArgs,
    #[command(flatten)]
    operator: OperatorArgs,
}

/// Runs `tercet drain`.
pub(crate) async fn drain(command: DrainCommand) -> Result<(), Failure> {
    let operator = connect(&command.operator).await?;
    Ok(client::drain::run(&operator, &command.drain).await?)
}

/// Runs `tercet roll`.
pub(crate) async fn roll(command: RollCommand) -> Result<(), Failure> {
    let operator = connect(&command.operator).await?;
    Ok(client::roll::run(&operator, &command.roll).await?)
}

/// A connection to where orders are taken.
pub(crate) async fn connect(args: &OperatorArgs) -> Result<Operator, Failure> {
    let variable = settings::endpoint_variable();
    let orders = args.resolve(variable.as_deref()).map_err(Failure::config)?;
    Ok(client::operator::connect(&orders).await?)
}
