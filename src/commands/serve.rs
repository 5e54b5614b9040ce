//! `tercet coordinator` and `tercet worker`: the roles of a real cluster, with etcd.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use client::command::TextWriter;
use coordinator::{PlanFor, SamplingSource};
use node::config::{self, ByteSize};
use node::membership::{Etcd, EtcdOptions, Membership};
use node::signals::Signals;
use proto::keys::Keys;
use proto::plan::KvType;
use tokio::sync::oneshot;
use worker::engine::WeightMemory;

use crate::Failure;
use crate::cli::TelemetryArgs;
use crate::commands::{PlacementArgs, TELEMETRY_GRACE, start_telemetry, telemetry_flags, threads};
use crate::settings::{EtcdSettings, Flags, Settings};

/// How long etcd may take to answer before that is said.
const NOTICE_AFTER: Duration = Duration::from_secs(1);

/// What coordinator and worker have in common.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Configuration")]
struct CommonArgs {
    /// Read settings from this TOML file; flags and environment go over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the settings in force and exit
    #[arg(long)]
    check_config: bool,
    /// etcd's endpoints, separated by commas [default: http://127.0.0.1:2379]
    #[arg(long, value_name = "URL")]
    etcd: Vec<String>,
    /// Name of the cluster [default: default]
    #[arg(long, value_name = "NAME")]
    cluster: Option<String>,
    /// Allow addresses that other machines reach, without TLS
    #[arg(long)]
    insecure: bool,
}

/// Starts a coordinator: plans, schedules, answers clients over gRPC and HTTP.
///
/// Several may run; one leads and the others stand by.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet coordinator --etcd http://etcd:2379 --cluster rack1 --model store/
  tercet coordinator --config /etc/tercet/tercet.toml --check-config")]
pub(crate) struct CoordinatorCommand {
    #[command(flatten)]
    common: CommonArgs,
    /// Directory of the model's store
    #[arg(long, value_name = "STORE")]
    model: Option<PathBuf>,
    /// Where the gRPC API listens [default: 127.0.0.1:7420]
    #[arg(long, value_name = "ADDR")]
    grpc: Option<String>,
    /// Where the HTTP API listens [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// Where health, readiness and metrics are answered by a thread of their own [default: nowhere]
    #[arg(long, value_name = "ADDR")]
    admin: Option<String>,
    /// Exactly so many stages in every pipeline [default: what the planner finds best]
    #[arg(long, value_name = "S")]
    stages: Option<u32>,
    /// Exactly so many pipelines [default: what the planner finds best]
    #[arg(long, value_name = "P")]
    pipelines: Option<u32>,
    /// How keys and values are stored: f16 or f32 [default: f16]
    #[arg(long, value_name = "TYPE")]
    kv_type: Option<KvType>,
    /// What plans are made for: throughput (the most tokens per second of all) or latency (the least
    /// time per token of one) [default: throughput]
    #[arg(long, value_name = "WHAT")]
    objective: Option<PlanFor>,
    /// No pipeline may take longer for a token of one answer, such as 200ms [default: any time]
    #[arg(long, value_name = "TIME")]
    token_time: Option<config::Duration>,
    /// Tokens of prompt and answer that people use [default: 2048, or the model's context]
    #[arg(long, value_name = "TOKENS")]
    context: Option<u32>,
    /// How others reach the gRPC API, as host:port [default: where it listens]
    #[arg(long, value_name = "ADDR")]
    advertise: Option<String>,
    /// How tokens are drawn where a request does not say: model (what its makers recommend, see
    /// `tercet model show`) or none (temperature 1) [default: model]
    #[arg(long, value_name = "FROM")]
    sampling_defaults: Option<SamplingSource>,
    /// Improve what serves only when no worker came, went or failed for so long, such as 30s
    /// [default: 10s]
    #[arg(long, value_name = "TIME")]
    hold_down: Option<config::Duration>,
    /// Improve what serves only for a gain of so many per cent, as predicted [default: 5]
    #[arg(long, value_name = "PERCENT")]
    min_gain_percent: Option<u32>,
    /// Plan with workers that compute nothing (`tercet worker --stub-compute`), to test many of them
    #[arg(long)]
    allow_stub_compute: bool,
    /// Compute every prompt from its beginning, whatever others began with
    #[arg(long)]
    no_prefix_cache: bool,
}

/// Starts a worker: computes the layers that a coordinator gives it.
///
/// Workers may come and go in any order; one that comes late stands by until it is needed.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet worker --etcd http://etcd:2379 --cluster rack1 --threads 16 --store store/
  tercet worker --config /etc/tercet/tercet.toml --listen 127.0.0.1:7072")]
pub(crate) struct WorkerCommand {
    #[command(flatten)]
    common: CommonArgs,
    /// Name in the cluster, the same after every start [default: host name and port]
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// Where it listens [default: 127.0.0.1:7071]
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// How others reach it, as host:port [default: where it listens]
    #[arg(long, value_name = "ADDR")]
    advertise: Option<String>,
    /// Rack that the machine is in [default: by measured round trips]
    #[arg(long, value_name = "NAME")]
    rack: Option<String>,
    /// Compute threads, at most the cores and whole CPUs of the quota [default: as many as those]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
    /// A store, or a directory of stores [default: store]
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Memory for weights, KV and steps, such as 4GiB [default: 80 % of the machine's]
    #[arg(long, value_name = "BYTES")]
    memory: Option<ByteSize>,
    /// Kernels to compute with [default: auto, the fastest for each operation]
    #[arg(long, value_name = "ISA")]
    isa: Option<String>,
    #[command(flatten)]
    placement: PlacementArgs,
    /// Where /metrics and /health are served [default: nowhere]
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// Wait and hash in place of arithmetic, to test many workers: layer_us=N,row_us=N,head_us=N
    #[arg(long, value_name = "PROFILE")]
    stub_compute: Option<String>,
}

impl CommonArgs {
    fn flags(&self, section: &str) -> Flags {
        let mut flags = Flags::default();
        if !self.etcd.is_empty() {
            flags.set("etcd.endpoints", Some(self.etcd.clone()));
        }
        flags.set("cluster", self.cluster.clone());
        flags.set(&format!("{section}.insecure"), self.insecure.then_some(true));
        flags
    }

    /// The settings in force: printed and `None` if that was all that was asked for.
    fn settings(&self, flags: Flags) -> Result<Settings, Failure> {
        Settings::load(self.config.as_deref(), flags).map_err(Failure::config)
    }
}

fn text(value: Option<&impl ToString>) -> Option<String> {
    value.map(ToString::to_string)
}

fn path(value: Option<&PathBuf>) -> Option<String> {
    value.map(|path| path.to_string_lossy().into_owned())
}

impl CoordinatorCommand {
    fn flags(&self) -> Flags {
        let mut flags = self.common.flags("coordinator");
        flags.set("coordinator.model", path(self.model.as_ref()));
        flags.set("coordinator.grpc", self.grpc.clone());
        flags.set("coordinator.http", self.http.clone());
        flags.set("coordinator.admin", self.admin.clone());
        flags.set("coordinator.stages", self.stages.map(i64::from));
        flags.set("coordinator.pipelines", self.pipelines.map(i64::from));
        flags.set("coordinator.kv_type", text(self.kv_type.as_ref()));
        flags.set("coordinator.objective", text(self.objective.as_ref()));
        flags.set("coordinator.token_time", text(self.token_time.as_ref()));
        flags.set("coordinator.context", self.context.map(i64::from));
        flags.set("coordinator.advertise", self.advertise.clone());
        flags.set("coordinator.hold_down", text(self.hold_down.as_ref()));
        let min_gain_percent = self.min_gain_percent.map(i64::from);
        flags.set("coordinator.min_gain_percent", min_gain_percent);
        let allow_stub_compute = self.allow_stub_compute.then_some(true);
        flags.set("coordinator.allow_stub_compute", allow_stub_compute);
        flags.set("coordinator.prefix_cache", self.no_prefix_cache.then_some(false));
        flags.set("coordinator.sampling_defaults", text(self.sampling_defaults.as_ref()));
        flags
    }
}

impl WorkerCommand {
    fn flags(&self) -> Flags {
        let mut flags = self.common.flags("worker");
        flags.set("worker.id", self.id.clone());
        flags.set("worker.listen", self.listen.clone());
        flags.set("worker.advertise", self.advertise.clone());
        flags.set("worker.rack", self.rack.clone());
        flags.set("worker.threads", self.threads.map(|threads| threads as i64));
        flags.set("worker.store", path(self.store.as_ref()));
        flags.set("worker.memory", text(self.memory.as_ref()));
        flags.set("worker.isa", self.isa.clone());
        let PlacementArgs { weights, lock_memory, pin_threads } = self.placement;
        let name = |weights| match weights {
            WeightMemory::Map => "map",
            WeightMemory::Copy => "copy",
        };
        flags.set("worker.weights", weights.map(name));
        flags.set("worker.lock_memory", lock_memory.then_some(true));
        flags.set("worker.pin_threads", pin_threads.then_some(true));
        flags.set("worker.http", self.http.clone());
        flags.set("worker.stub_compute", self.stub_compute.clone());
        flags
    }
}

/// Runs `tercet coordinator`.
pub(crate) async fn coordinator(
    command: CoordinatorCommand,
    telemetry: &TelemetryArgs,
) -> Result<(), Failure> {
    let mut flags = command.flags();
    telemetry_flags(&mut flags, telemetry);
    let settings = command.common.settings(flags)?;
    settings.coordinator.validate().map_err(Failure::config)?;
    let etcd = settings.etcd.options()?;
    if command.common.check_config {
        return show(&settings.for_coordinator(), &settings.etcd);
    }
    let guard = start_telemetry("tercet-coordinator", &settings.telemetry)?;
    let signals = Signals::listen()?;
    let outcome = Box::pin(run_coordinator(settings, etcd, &signals)).await;
    guard.shutdown(TELEMETRY_GRACE).await;
    outcome
}

async fn run_coordinator(
    settings: Settings,
    etcd: EtcdOptions,
    signals: &Signals,
) -> Result<(), Failure> {
    let Some(membership) = connect(&settings.etcd, etcd, signals).await? else { return Ok(()) };
    let keys = Keys::new(settings.cluster);
    let (sender, bound) = oneshot::channel();
    let running =
        coordinator::run(settings.coordinator, keys, membership, Some(sender), signals.stop());
    // Said by this process alone: whoever started it on port 0 reads it from standard output.
    let saying = async {
        let Ok(coordinator::Bound { grpc, http, admin }) = bound.await else { return Ok(()) };
        let admin = admin.map(|admin| format!(", admin {admin}")).unwrap_or_default();
        TextWriter::stdout().text(&format!("listening: gRPC {grpc}, HTTP {http}{admin}\n"))
    };
    let (ran, said) = tokio::join!(running, saying);
    ran?;
    Ok(said?)
}

/// Runs `tercet worker`.
pub(crate) async fn worker(
    command: WorkerCommand,
    telemetry: &TelemetryArgs,
) -> Result<(), Failure> {
    let mut flags = command.flags();
    telemetry_flags(&mut flags, telemetry);
    let mut settings = command.common.settings(flags)?;
    if settings.worker.id.is_none() {
        let id = default_id(settings.worker.listen.port());
        settings.worker.id = Some(id.parse().map_err(Failure::config)?);
    }
    settings.worker.validate().map_err(Failure::config)?;
    let etcd = settings.etcd.options()?;
    if command.common.check_config {
        return show(&settings.for_worker(), &settings.etcd);
    }
    let guard = start_telemetry("tercet-worker", &settings.telemetry)?;
    let signals = Signals::listen()?;
    let outcome = Box::pin(run_worker(settings, etcd, &signals)).await;
    guard.shutdown(TELEMETRY_GRACE).await;
    outcome
}

async fn run_worker(
    settings: Settings,
    etcd: EtcdOptions,
    signals: &Signals,
) -> Result<(), Failure> {
    let Some(membership) = connect(&settings.etcd, etcd, signals).await? else { return Ok(()) };
    let keys = Keys::new(settings.cluster);
    let (sender, bound) = oneshot::channel();
    let id = settings.worker.worker_id().map_err(Failure::config)?.clone();
    let running = worker::run(settings.worker, keys, membership, Some(sender), signals.stop());
    let saying = async {
        let Ok(address) = bound.await else { return Ok(()) };
        TextWriter::stdout().text(&format!("listening: {id} at {address}\n"))
    };
    let (ran, said) = tokio::join!(running, saying);
    ran?;
    Ok(said?)
}

/// A connection to etcd; `None` if the process was told to stop meanwhile.
async fn connect(
    settings: &EtcdSettings,
    options: EtcdOptions,
    signals: &Signals,
) -> Result<Option<Arc<dyn Membership>>, Failure> {
    if let Some(warning) = settings.password_warning() {
        tracing::warn!("{warning}");
    }
    let connecting = async {
        let mut connecting = pin!(Etcd::connect(&settings.endpoints, options));
        match tokio::time::timeout(NOTICE_AFTER, &mut connecting).await {
            Ok(connected) => connected,
            Err(_) => {
                tracing::info!(endpoints = %settings.endpoints, "waiting for etcd to answer");
                connecting.await
            }
        }
    };
    match signals.stop().run_until_cancelled(connecting).await {
        None => Ok(None),
        Some(connected) => Ok(Some(Arc::new(connected?))),
    }
}

fn show(settings: &impl serde::Serialize, etcd: &EtcdSettings) -> Result<(), Failure> {
    if let Some(warning) = etcd.password_warning() {
        // A remark beside what was asked for: that it cannot be written is no failure.
        let _ = writeln!(io::stderr(), "warning: {warning}");
    }
    Ok(TextWriter::stdout().text(&node::config::show(settings)?)?)
}

/// The host's name and the port: the same after every start, and two workers of one host differ.
/// On port 0 nothing is the same after a start; then the process id tells workers apart.
fn default_id(port: u16) -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let host: String = host.trim().chars().filter(|&c| plain(c)).take(64).collect();
    let host = if host.is_empty() { "worker".to_owned() } else { host };
    if port == 0 { format!("{host}-p{}", std::process::id()) } else { format!("{host}-{port}") }
}

#[cfg(test)]
mod keys;
#[cfg(test)]
mod tests;
