//! The tree of commands, flags and help texts.

use clap::error::{ContextKind, ContextValue};
use clap::{Args, Parser, Subcommand};
use node::config::{printable, shown};

use crate::commands::{
    ask::{ChatCommand, GenerateCommand, StatusCommand},
    bench::BenchCommand,
    completions::CompletionsCommand,
    eval::EvalCommand,
    import::ImportCommand,
    logits::LogitsCommand,
    model::ModelCommand,
    operate::{DrainCommand, RollCommand},
    plan::PlanCommand,
    serve::{CoordinatorCommand, WorkerCommand},
    up::UpCommand,
};

/// Serves ternary-weight language models on racks of ordinary CPU servers
#[derive(Debug, Parser)]
#[command(
    name = "tercet",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = "Examples:
  tercet up --workers 3                      a whole cluster in this process
  tercet generate \"Once upon a time\"         one answer, from the bundled model
  tercet chat --endpoint rack1:7420          a conversation with a cluster
  tercet import bitnet-2b/ store/            make a store of a checkpoint

Exit codes: 0 done, 1 failed, 2 wrong usage, 64 wrong configuration."
)]
pub struct Cli {
    /// Logs and traces.
    #[command(flatten)]
    pub(crate) telemetry: TelemetryArgs,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Characters of an argument that an error shows: enough to recognise it.
const SHOWN_CHARS: usize = 200;

impl Cli {
    /// Reads the command line. Where that makes no sense the process ends with a sentence that says so; help
    /// ends it too.
    pub fn read() -> Self {
        Self::try_parse().unwrap_or_else(|error| harmless(error).exit())
    }
}

/// The same error, in which arguments give a terminal no orders and hold no password.
fn harmless(mut error: clap::Error) -> clap::Error {
    let context: Vec<(ContextKind, ContextValue)> =
        error.context().map(|(kind, value)| (kind, value.clone())).collect();
    let mut is_hostile = false;
    for (kind, value) in context {
        let ContextValue::String(text) = value else { continue };
        let shown = argument(&text);
        if shown != text {
            is_hostile = true;
            error.insert(kind, ContextValue::String(shown));
        }
    }
    if is_hostile {
        // "To pass … as a value": the same argument once more.
        error.remove(ContextKind::Suggested);
    }
    error
}

/// An argument as an error shows it.
fn argument(text: &str) -> String {
    let whole = match text.contains('@') {
        // Perhaps an address with a password; shown in quotes, which are there already.
        true => shown(text).trim_matches('"').to_owned(),
        false => printable(text),
    };
    let mut short: String = whole.chars().take(SHOWN_CHARS).collect();
    if short.len() < whole.len() {
        short.push('…');
    }
    short
}

/// Where logs and traces go.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Logs and traces")]
pub(crate) struct TelemetryArgs {
    /// Which logs to show on standard error: a level, or a filter such as info,node=debug
    #[arg(long, global = true, value_name = "FILTER")]
    pub(crate) log: Option<String>,
    /// How logs are written
    #[arg(long, global = true, value_name = "FORMAT", value_parser = ["human", "json"])]
    pub(crate) log_format: Option<String>,
    /// Send traces to this OTLP collector (gRPC), such as http://127.0.0.1:4317
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) otlp: Option<String>,
}

/// What `tercet` can do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a whole cluster in this process, without etcd
    Up(UpCommand),
    /// Start a coordinator: plans, schedules, answers clients over gRPC and HTTP
    Coordinator(CoordinatorCommand),
    /// Start a worker: computes the layers that a coordinator gives it
    Worker(WorkerCommand),
    /// Go on from a text or from token ids
    ///
    /// Asks the coordinator at --endpoint or at TERCET_ENDPOINT, or computes in this process with
    /// --model. Without any of them, the bundled model answers in this process.
    Generate(GenerateCommand),
    /// Have a conversation
    ///
    /// The model's chat template is applied where the model is. Ctrl-C stops the answer; Ctrl-D or
    /// /exit ends the program. Without a terminal, every line of standard input is a message.
    ///
    /// Asks the coordinator at --endpoint or at TERCET_ENDPOINT, or computes in this process with
    /// --model. Without any of them, the bundled model answers in this process.
    Chat(ChatCommand),
    /// Show a cluster: who is in, which layers are where, how fast it is
    Status(StatusCommand),
    /// Show who runs which layers, or who would on other machines; or plan now
    ///
    /// Of the cluster at --endpoint or at TERCET_ENDPOINT, or for the machines in a file with --nodes.
    Plan(PlanCommand),
    /// Move a worker's stages elsewhere, and have it end
    Drain(DrainCommand),
    /// Replace every worker by a new process, one after the other
    Roll(RollCommand),
    /// Turn a checkpoint into a store
    Import(ImportCommand),
    /// List, show, check and make stores
    Model(ModelCommand),
    /// Measure the perplexity of a model on a text
    Eval(EvalCommand),
    /// Measure the machine, the kernels, an engine, a cluster
    Bench(BenchCommand),
    /// Look inside
    Debug(DebugCommand),
    /// Print a completion script for a shell
    Completions(CompletionsCommand),
}

/// Look inside.
#[derive(Debug, Args)]
pub(crate) struct DebugCommand {
    /// At what.
    #[command(subcommand)]
    pub(crate) what: DebugWhat,
}

/// What can be looked at.
#[derive(Debug, Subcommand)]
pub(crate) enum DebugWhat {
    /// The logits after every token, however the work is cut
    Logits(LogitsCommand),
}

#[cfg(test)]
mod tests;
