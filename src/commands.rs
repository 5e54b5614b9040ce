//! The commands. Each file has the flags of some and runs them.

pub(crate) mod ask;
pub(crate) mod bench;
pub(crate) mod completions;
pub(crate) mod eval;
pub(crate) mod import;
pub(crate) mod logits;
pub(crate) mod model;
pub(crate) mod operate;
pub(crate) mod plan;
pub(crate) mod serve;
pub(crate) mod up;

use std::time::Duration;

use ::model::Store;
use clap::Args;
use node::signals::Interruption;
use node::telemetry::{self, TelemetryConfig, TelemetryGuard};
use proto::plan::KvType;
use worker::engine::{Placement, Shortcuts, WeightMemory};

use crate::cli::{Cli, Command, DebugWhat, TelemetryArgs};
use crate::failure::told_to_stop;
use crate::progress::Progress;
use crate::settings::{self, Flags};
use crate::{Failure, models, pipeline};

/// How long the last spans may take to reach the collector.
const TELEMETRY_GRACE: Duration = Duration::from_secs(2);

/// What commands that are no servers show of their logs, unless told otherwise: a person reads
/// the answer, not the logs. What a cluster in the process waits for is told by whoever waits.
const QUIET_LOG: &str = "warn,tercet::waiting=off";

/// Does what the command line says.
///
/// # Errors
///
/// One sentence, and what it means for the exit code.
pub async fn run(cli: Cli) -> Result<(), Failure> {
    let Cli { telemetry, command } = cli;
    settings::check_variables().map_err(Failure::config)?;
    node::signals::survive_file_size_limit()?;
    match command {
        // Servers read their telemetry from the same file as everything else.
        Command::Coordinator(command) => serve::coordinator(command, &telemetry).await,
        Command::Worker(command) => serve::worker(command, &telemetry).await,
        Command::Completions(command) => completions::run(&command),
        command => {
            let guard = start_telemetry("tercet-client", &quiet_telemetry(&telemetry)?)?;
            // Boxed: the futures of a whole cluster are large, and one is enough.
            let outcome = match command {
                // Told to stop, it leaves well.
                Command::Up(command) => Box::pin(up::run(command)).await,
                Command::Bench(command) if command.starts_processes() => {
                    Box::pin(bench::run(command)).await
                }
                command => {
                    let interruption = interruption()?;
                    Box::pin(run_client(command, &interruption)).await
                }
            };
            guard.shutdown(TELEMETRY_GRACE).await;
            outcome
        }
    }
}

async fn run_client(command: Command, interruption: &Interruption) -> Result<(), Failure> {
    match command {
        Command::Generate(command) => ask::generate(command).await,
        Command::Chat(command) => ask::chat(command, interruption).await,
        Command::Status(command) => ask::status(command).await,
        Command::Plan(command) => plan::run(command).await,
        Command::Drain(command) => operate::drain(command).await,
        Command::Roll(command) => operate::roll(command).await,
        Command::Import(command) => import::run(&command),
        Command::Model(command) => model::run(command),
        Command::Eval(command) => eval::run(&command),
        Command::Bench(command) => bench::run(command).await,
        Command::Debug(command) => match command.what {
            DebugWhat::Logits(command) => logits::run(&command),
        },
        Command::Up(_) | Command::Coordinator(_) | Command::Worker(_) | Command::Completions(_) => {
            Ok(())
        }
    }
}

/// The telemetry of a command that is no server.
fn quiet_telemetry(args: &TelemetryArgs) -> Result<TelemetryConfig, Failure> {
    let mut flags = Flags::default();
    telemetry_flags(&mut flags, args);
    settings::client_telemetry(flags, QUIET_LOG).map_err(Failure::config)
}

/// Puts the flags about logs and traces into the tree.
fn telemetry_flags(flags: &mut Flags, args: &TelemetryArgs) {
    flags.set("telemetry.log", args.log.clone());
    flags.set("telemetry.log_format", args.log_format.clone());
    flags.set("telemetry.otlp_endpoint", args.otlp.clone());
}

/// Logs, traces and counters of this process. Every role starts them, before its first task.
fn start_telemetry(service: &str, config: &TelemetryConfig) -> Result<TelemetryGuard, Failure> {
    let guard = telemetry::init(service, config).map_err(Failure::config)?;
    node::metrics::install()?;
    Ok(guard)
}

/// Which model, for commands that compute in this process.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct ModelArgs {
    /// A store, a Hugging Face directory, a GGUF file, `bundled`, or `synth:SHAPE` (random weights,
    /// such as synth:2b4t) [default: bundled]
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<String>,
}

impl ModelArgs {
    /// Opens it; a checkpoint is imported into the cache the first time.
    pub(crate) fn open(&self, quiet: bool) -> Result<Store, Failure> {
        let mut progress = Progress::new("importing", quiet);
        let store = models::open(self.model.as_deref(), &mut |report| {
            progress.show(report.what, report.done, report.total);
        });
        progress.finish();
        store.map_err(|error| match error {
            models::ModelsError::Shape(_) => Failure::usage(error),
            error => error.into(),
        })
    }
}

/// While it lives, a signal that asks to stop ends what this process writes, and nothing
/// half-written is left; if it writes nothing, the process ends.
fn interruption() -> Result<Interruption, Failure> {
    Ok(Interruption::listen(|code| {
        told_to_stop(code);
        ::model::stop_writing()
    })?)
}

/// How a model is cut and computed in this process.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct ComputeArgs {
    /// Compute in exactly so many stages [default: 1]
    #[arg(long, value_name = "N")]
    pub(crate) stages: Option<u32>,
    /// Compute threads [default: the cores, shared by the stages]
    #[arg(long, value_name = "N", value_parser = threads)]
    pub(crate) threads: Option<usize>,
    /// How keys and values are stored: f16 or f32 [default: f16]
    #[arg(long, value_name = "TYPE")]
    pub(crate) kv_type: Option<KvType>,
    #[command(flatten)]
    pub(crate) shortcuts: ShortcutArgs,
}

/// Work that is left out unless these are given: exact either way.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct ShortcutArgs {
    /// Compute with zeros too: the result is the same, only slower
    #[arg(long)]
    pub(crate) no_skip_zeros: bool,
    /// Compute every row of the head: the result is the same, only slower
    #[arg(long)]
    pub(crate) no_screen: bool,
}

impl ShortcutArgs {
    /// What is left out.
    pub(crate) fn shortcuts(self) -> Shortcuts {
        Shortcuts { zeros: !self.no_skip_zeros, screen: !self.no_screen }
    }
}

/// Where weights and threads are; results are the same.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct PlacementArgs {
    /// Read weights from the mapped files (map), or from a copy on huge pages for each memory node
    /// (copy) [default: map]
    #[arg(long, value_name = "WHERE")]
    pub(crate) weights: Option<WeightMemory>,
    /// Keep weights in memory, whatever else wants it
    #[arg(long)]
    pub(crate) lock_memory: bool,
    /// Keep every compute thread on a core of its own
    #[arg(long)]
    pub(crate) pin_threads: bool,
}

impl PlacementArgs {
    /// Where they are.
    pub(crate) fn placement(self) -> Placement {
        Placement {
            weights: self.weights.unwrap_or_default(),
            lock: self.lock_memory,
            pin: self.pin_threads,
        }
    }
}

/// Most threads that can be asked for: more is a slip of the finger.
const THREADS_MAX: usize = 1024;

pub(crate) fn threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(threads) if (1..=THREADS_MAX).contains(&threads) => Ok(threads),
        _ => Err(format!("must be a number from 1 to {THREADS_MAX}")),
    }
}

impl ComputeArgs {
    /// The pipeline of engines that these flags describe, for the model in `store`.
    pub(crate) fn pipeline(
        &self,
        store: &Store,
        backend: kernels::Backend,
    ) -> Result<pipeline::PipelineOptions, Failure> {
        let stages = self.stages.unwrap_or(1);
        pipeline::check_stages(stages, store.config().layers).map_err(Failure::usage)?;
        let defaults = pipeline::PipelineOptions::default();
        Ok(pipeline::PipelineOptions {
            stages,
            backend,
            // Stages compute one after the other here: each may have every core.
            threads: self.threads.unwrap_or(defaults.threads),
            kv_type: self.kv_type.unwrap_or_default(),
            shortcuts: self.shortcuts.shortcuts(),
            placement: Placement::default(),
        })
    }
}

/// For clap: the kernels of this name, if this machine runs them.
pub(crate) fn backend(name: &str) -> Result<kernels::Backend, String> {
    kernels::Backend::named(name).map_err(|refusal| {
        let names: Vec<_> = kernels::Backend::available().map(kernels::Backend::name).collect();
        format!("{refusal} (this machine runs {})", names.join(", "))
    })
}

/// For clap: a count that cannot be nothing.
pub(crate) fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err("must be a number of at least 1".to_owned()),
    }
}
