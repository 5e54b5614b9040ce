//! `tercet bench pipeline`: the client's command, against a coordinator.

use clap::Args;

use client::bench::BenchArgs;
use client::endpoint::EndpointArgs;
use client::waiting::Notices;

use crate::progress::Progress;
use crate::{Failure, settings};

/// Measures a running cluster from outside: how fast it reads a prompt, and how fast it generates
/// for one and for several requests at once.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet bench pipeline --endpoint rack1:7420
  tercet bench pipeline --prompt 512 --generate 32 --batch 1,8,16 --json")]
pub(crate) struct PipelineCommand {
    #[command(flatten)]
    endpoint: EndpointArgs,
    #[command(flatten)]
    bench: BenchArgs,
}

/// Runs the command.
pub(crate) async fn run(command: &PipelineCommand) -> Result<(), Failure> {
    let variable = settings::endpoint_variable();
    let endpoint = command.endpoint.resolve(variable.as_deref()).map_err(Failure::config)?;
    let client = Notices::stderr().connect(&endpoint).await?;
    let mut progress = Progress::new("measuring", command.bench.json);
    let measured = client::bench::measure(&client, &command.bench, &mut |what, done, total| {
        progress.show(what, done, total);
    })
    .await;
    progress.finish();
    Ok(client::bench::write(&measured?, command.bench.json)?)
}
