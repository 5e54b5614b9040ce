//! `tercet generate`, `chat` and `status`: the client's commands, against a coordinator elsewhere
//! or a cluster in this process.

use clap::Args;
use client::chat::ChatArgs;
use client::endpoint::{Endpoint, EndpointArgs};
use client::generate::GenerateArgs;
use client::status::StatusArgs;
use client::waiting::Notices;
use client::{Client, CommandError};

use node::signals::Interruption;

use crate::commands::{ComputeArgs, ModelArgs};
use crate::local::{LocalCluster, LocalOptions};
use crate::pipeline::{blocks_for, check_stages};
use crate::{Failure, settings};

/// Sequences of a whole context that a cluster for one person holds: the one that is answered, and
/// one that was just cancelled.
const LOCAL_SEQUENCES: u32 = 2;

/// Who answers.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Who answers")]
pub(crate) struct TargetArgs {
    #[command(flatten)]
    endpoint: EndpointArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Goes on from a text or from token ids.
///
/// Asks the coordinator at --endpoint, or computes in this process with --model. Without either,
/// TERCET_ENDPOINT says whom to ask; without that, the bundled model answers in this process.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet generate \"Once upon a time\"
  tercet generate --model store/ --temperature 0 --max-tokens 50 --json \"The capital of France is\"
  tercet generate --model store/ --tokens 1,2,3 --stages 2 --top-logprobs 5 --json
  cat story.txt | tercet generate --endpoint rack1:7420 -")]
pub(crate) struct GenerateCommand {
    #[command(flatten)]
    generate: GenerateArgs,
    #[command(flatten)]
    target: TargetArgs,
}

/// Has a conversation.
///
/// The model's chat template is applied where the model is. Ctrl-C stops the answer; Ctrl-D or
/// /exit ends the program. Without a terminal, every line of standard input is a message.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet chat
  tercet chat --endpoint rack1:7420 --system \"Answer in one sentence.\"
  printf 'Hello.\\nTell me more.\\n' | tercet chat --json")]
pub(crate) struct ChatCommand {
    #[command(flatten)]
    chat: ChatArgs,
    #[command(flatten)]
    target: TargetArgs,
}

/// Shows a cluster: who is in, which layers are where, how fast it is.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet status
  tercet status --endpoint rack1:7420 --watch
  tercet status --json | jq '.workers[].state'")]
pub(crate) struct StatusCommand {
    #[command(flatten)]
    status: StatusArgs,
    #[command(flatten)]
    endpoint: EndpointArgs,
}

/// Who answers, decided.
enum Target {
    /// A coordinator somewhere.
    Endpoint(Endpoint),
    /// A cluster in this process.
    Local,
}

impl TargetArgs {
    /// `--endpoint` or `--model`; else the variable; else this process.
    fn decide(&self, variable: Option<&str>) -> Result<Target, Failure> {
        let ComputeArgs { stages, threads, kv_type, shortcuts } = self.compute;
        let local_flag = [
            ("--model", self.model.model.is_some()),
            ("--stages", stages.is_some()),
            ("--threads", threads.is_some()),
            ("--kv-type", kv_type.is_some()),
            ("--no-skip-zeros", shortcuts.no_skip_zeros),
            ("--no-screen", shortcuts.no_screen),
        ]
        .into_iter()
        .find_map(|(flag, given)| given.then_some(flag));
        match (&self.endpoint.endpoint, local_flag) {
            (Some(_), Some(flag)) => Err(Failure::usage(format!(
                "{flag} is for a model in this process and cannot be used with --endpoint"
            ))),
            (None, Some(_)) => Ok(Target::Local),
            (None, None) if variable.is_none() => Ok(Target::Local),
            (_, None) => {
                let resolved = self.endpoint.resolve(variable).map_err(Failure::config)?;
                Ok(Target::Endpoint(resolved))
            }
        }
    }

    /// A cluster in this process for one person's requests.
    async fn start(&self, quiet: bool) -> Result<LocalCluster, Failure> {
        let store = self.model.open(quiet)?;
        let config = store.config();
        let stages = self.compute.stages.unwrap_or(1);
        check_stages(stages, config.layers).map_err(Failure::usage)?;
        let mut options = LocalOptions::new(store.dir()).with_workers(stages);
        options.stages = Some(stages);
        options.kv_type = self.compute.kv_type.unwrap_or_default();
        options.shortcuts = self.compute.shortcuts.shortcuts();
        options.threads = self.compute.threads.unwrap_or(options.threads);
        options.kv_blocks = Some(blocks_for(config.context as usize) as u32 * LOCAL_SEQUENCES);
        Ok(LocalCluster::start(&options).await?)
    }

    /// Runs `command` with a client of whoever answers.
    async fn with_client(
        &self,
        quiet: bool,
        command: impl AsyncFnOnce(&Client) -> Result<(), CommandError>,
    ) -> Result<(), Failure> {
        match self.decide(settings::endpoint_variable().as_deref())? {
            Target::Endpoint(endpoint) => {
                let client = Notices::stderr().connect(&endpoint).await?;
                Ok(command(&client).await?)
            }
            Target::Local => {
                let mut cluster = Box::pin(self.start(quiet)).await?;
                let client = cluster.client().await?;
                let outcome = tokio::select! {
                    biased;
                    outcome = command(&client) => outcome.map_err(Failure::from),
                    error = cluster.failed() => Err(error.into()),
                };
                drop(client);
                // The answer is there: what goes wrong from here on changes nothing.
                if let Err(error) = cluster.stop().await {
                    tracing::warn!(error = %node::Chain(&error), "the cluster did not stop well");
                }
                outcome
            }
        }
    }
}

/// Runs `tercet generate`.
pub(crate) async fn generate(command: GenerateCommand) -> Result<(), Failure> {
    let GenerateCommand { generate, target } = command;
    let run = async |client: &Client| client::generate::run(client, &generate).await;
    target.with_client(generate.json, run).await
}

/// Runs `tercet chat`.
pub(crate) async fn chat(command: ChatCommand, interruption: &Interruption) -> Result<(), Failure> {
    let ChatCommand { chat, target } = command;
    let run = async |client: &Client| {
        // From now on Ctrl-C stops an answer.
        interruption.leave_interrupt();
        client::chat::run(client, &chat).await
    };
    target.with_client(chat.json, run).await
}

/// Runs `tercet status`.
pub(crate) async fn status(command: StatusCommand) -> Result<(), Failure> {
    let variable = settings::endpoint_variable();
    let endpoint = command.endpoint.resolve(variable.as_deref()).map_err(Failure::config)?;
    let client = Notices::stderr().connect(&endpoint).await?;
    Ok(client::status::run(&client, &command.status).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(endpoint: Option<&str>, model: Option<&str>, stages: Option<u32>) -> TargetArgs {
        TargetArgs {
            endpoint: EndpointArgs { endpoint: endpoint.map(String::from) },
            model: ModelArgs { model: model.map(String::from) },
            compute: ComputeArgs { stages, ..ComputeArgs::default() },
        }
    }

    fn decided(args: &TargetArgs, variable: Option<&str>) -> String {
        match args.decide(variable) {
            Ok(Target::Endpoint(endpoint)) => endpoint.to_string(),
            Ok(Target::Local) => "local".into(),
            Err(failure) => format!("{:?}", failure.exit()),
        }
    }

    #[test]
    fn who_answers() {
        let decide =
            |endpoint, model, stages, variable| decided(&target(endpoint, model, stages), variable);
        assert_eq!(decide(Some("a:1"), None, None, Some("b:2")), "a:1");
        assert_eq!(decide(None, None, None, Some("b:2")), "b:2");
        assert_eq!(decide(None, None, None, None), "local");
        assert_eq!(decide(None, Some("m"), None, Some("b:2")), "local");
        assert_eq!(decide(None, None, Some(2), Some("b:2")), "local");
        assert_eq!(decide(Some("a:1"), Some("m"), None, None), "Usage");
        assert_eq!(decide(Some("a:1"), None, Some(2), None), "Usage");
        assert_eq!(decide(None, None, None, Some("https://b")), "Config");
        assert_eq!(decide(Some("u:p@b"), None, None, None), "Config");
    }
}
