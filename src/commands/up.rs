//! `tercet up`: a whole cluster in this process.

use std::net::SocketAddr;

use clap::Args;
use client::command::TextWriter;
use client::generate::Completion;
use coordinator::SamplingSource;
use futures::StreamExt;
use kernels::Backend;
use node::config::listen_address;
use node::signals::Signals;
use proto::generate::{GenerateEvent, GenerateRequest, Prompt, Sampling};
use proto::plan::KvType;
use proto::status::ClusterStatus;
use serde::Serialize;
use tokio::task::JoinSet;

use crate::Failure;
use crate::commands::{ModelArgs, PlacementArgs, threads};
use crate::local::{LocalCluster, LocalOptions, threads_each};
use crate::pipeline::check_stages;

/// Most workers that make sense in one process: each has threads of its own.
const WORKERS_MAX: i64 = 64;

/// Tokens of the answer to `--prompt`: a paragraph.
const PROMPT_MAX_TOKENS: u32 = 200;

/// How that answer is drawn: varied, but the same every time.
const PROMPT_TEMPERATURE: f32 = 0.7;
const PROMPT_TOP_P: f32 = 0.9;
const PROMPT_SEED: u64 = 1;

/// Starts a whole cluster in this process, without etcd.
///
/// A coordinator and its workers talk over loopback exactly as they would between machines. Serves
/// until Ctrl-C.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet up
  tercet up --workers 3 --prompt \"Once upon a time\"
  tercet up --model store/ --workers 2 --threads 8 --http 127.0.0.1:9000")]
pub(crate) struct UpCommand {
    /// How many workers
    #[arg(long, value_name = "N", default_value = "1",
          value_parser = clap::value_parser!(u32).range(1..=WORKERS_MAX))]
    workers: u32,
    /// Cut the model into so many stages [default: one for each worker, if it has the layers]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(1..=WORKERS_MAX))]
    stages: Option<u32>,
    #[command(flatten)]
    model: ModelArgs,
    /// Where the HTTP API listens
    #[arg(long, value_name = "ADDR", default_value_t = coordinator::DEFAULT_HTTP,
          value_parser = listen_address)]
    http: SocketAddr,
    /// Where the gRPC API listens
    #[arg(long, value_name = "ADDR", default_value_t = coordinator::DEFAULT_GRPC,
          value_parser = listen_address)]
    grpc: SocketAddr,
    /// Where health, readiness and metrics are answered by a thread of their own [default: nowhere]
    #[arg(long, value_name = "ADDR", value_parser = listen_address)]
    admin: Option<SocketAddr>,
    /// Allow addresses that other machines reach, without TLS
    #[arg(long)]
    insecure: bool,
    /// Compute threads of each worker [default: the cores, shared by the workers]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
    /// How keys and values are stored: f16 or f32
    #[arg(long, value_name = "TYPE", default_value_t = KvType::F16)]
    kv_type: KvType,
    /// How tokens are drawn where a request does not say: model (what its makers recommend, see
    /// `tercet model show`) or none (temperature 1)
    #[arg(long, value_name = "FROM", default_value_t = SamplingSource::Model)]
    sampling_defaults: SamplingSource,
    #[command(flatten)]
    placement: PlacementArgs,
    /// Answer this before serving
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Stop after the answer to --prompt
    #[arg(long, requires = "prompt")]
    once: bool,
    /// Print one JSON object when ready, and one with the answer to --prompt
    #[arg(long)]
    json: bool,
}

/// What `--json` prints when the cluster is ready.
#[derive(Serialize)]
struct Ready<'a> {
    grpc: SocketAddr,
    http: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    admin: Option<SocketAddr>,
    model: &'a str,
    store: String,
    isa: &'static str,
    workers: u32,
    stages: usize,
}

/// Runs the command.
pub(crate) async fn run(command: UpCommand) -> Result<(), Failure> {
    let signals = Signals::listen()?;
    let stop = signals.stop();
    // A store that is being made on the way disappears then.
    let mut told = JoinSet::new();
    let until = stop.clone();
    told.spawn(async move {
        until.cancelled().await;
        ::model::stop_writing();
    });
    let store = match command.model.open(command.json) {
        Err(_) if stop.is_cancelled() => return Ok(()),
        opened => opened?,
    };
    let options = command.options(store.dir(), store.config().layers)?;
    let started = stop.run_until_cancelled(LocalCluster::start(&options)).await;
    let mut cluster = match started {
        None => return Ok(()),
        Some(Err(error)) if error.is_config() => return Err(Failure::config(error)),
        Some(started) => started?,
    };
    let served = {
        let serving = serve(&command, &options, &cluster);
        tokio::pin!(serving);
        tokio::select! {
            served = &mut serving => Some(served),
            () = stop.cancelled() => None,
        }
    };
    let outcome = match served {
        None => Ok(()),
        Some(Err(failure)) => Err(failure),
        Some(Ok(())) if command.once => Ok(()),
        Some(Ok(())) => tokio::select! {
            error = cluster.failed() => Err(error.into()),
            () = stop.cancelled() => Ok(()),
        },
    };
    let stopped = cluster.stop().await;
    outcome.and(stopped.map_err(Failure::from))
}

impl UpCommand {
    fn options(&self, store: &std::path::Path, layers: u32) -> Result<LocalOptions, Failure> {
        if let Some(stages) = self.stages {
            check_stages(stages, layers).map_err(Failure::usage)?;
            if stages > self.workers {
                return Err(Failure::usage(format!(
                    "{stages} stages need as many workers, found --workers {}",
                    self.workers
                )));
            }
        }
        Ok(LocalOptions {
            workers: self.workers,
            // Whoever asks for workers here wants to see them work together.
            stages: Some(self.stages.unwrap_or_else(|| self.workers.min(layers))),
            threads: self.threads.unwrap_or_else(|| threads_each(self.workers)),
            kv_type: self.kv_type,
            placement: self.placement.placement(),
            grpc: self.grpc,
            http: self.http,
            admin: self.admin,
            insecure: self.insecure,
            sampling_defaults: self.sampling_defaults,
            ..LocalOptions::new(store)
        })
    }
}

/// Says what there is, answers the prompt, says how to go on.
async fn serve(
    command: &UpCommand,
    options: &LocalOptions,
    cluster: &LocalCluster,
) -> Result<(), Failure> {
    let client = cluster.client().await?;
    let status = client.status().await?;
    let mut writer = TextWriter::stdout();
    if command.json {
        writer.json(&Ready {
            grpc: cluster.grpc(),
            http: cluster.http(),
            admin: cluster.admin(),
            model: &status.model.name,
            store: options.store.display().to_string(),
            isa: Backend::detect().isa(),
            workers: options.workers,
            stages: status.plan.pipelines.iter().map(|pipeline| pipeline.stages.len()).sum(),
        })?;
    } else {
        writer.text(&what_there_is(&status, options, cluster))?;
    }
    if let Some(prompt) = &command.prompt {
        let mut events = client.generate(request(prompt)).await?;
        if command.json {
            writer.json(&Completion::collect(events, false).await?)?;
        } else {
            writer.text(&format!("\n{prompt}"))?;
            while let Some(event) = events.next().await {
                if let GenerateEvent::Delta(delta) = event? {
                    writer.text(&delta.text)?;
                }
            }
            writer.end_line()?;
        }
    }
    if !command.json && !command.once {
        writer.text(&how_to_go_on(cluster))?;
    }
    Ok(())
}

fn request(prompt: &str) -> GenerateRequest {
    GenerateRequest {
        prompt: Prompt::Text(prompt.to_owned()),
        max_tokens: PROMPT_MAX_TOKENS,
        sampling: Sampling {
            temperature: Some(PROMPT_TEMPERATURE),
            top_p: Some(PROMPT_TOP_P),
            ..Sampling::default()
        },
        seed: Some(PROMPT_SEED),
        ..GenerateRequest::default()
    }
}

/// Which worker computes what, and where the doors are.
fn what_there_is(status: &ClusterStatus, options: &LocalOptions, cluster: &LocalCluster) -> String {
    let model = &status.model;
    let mut text = format!("model     {}, {} layers\n", model.name, model.layers);
    for pipeline in &status.plan.pipelines {
        for stage in &pipeline.stages {
            let [begin, end] = stage.layers;
            text += &format!("{:<9} layers {begin}..{end}", stage.worker);
            text += &format!(" ({} on {})\n", threads_of(options.threads), stage.address);
        }
    }
    let idle = status.workers.iter().filter(|worker| worker.state == "standby");
    for worker in idle {
        text += &format!("{:<9} stands by\n", worker.id);
    }
    text += &format!("kernels   {}\n", Backend::choose());
    text += &format!("gRPC      {}\nHTTP      http://{}\n", cluster.grpc(), cluster.http());
    if let Some(admin) = cluster.admin() {
        text += &format!("admin     http://{admin}\n");
    }
    text
}

fn threads_of(threads: usize) -> String {
    if threads == 1 { "1 thread".to_owned() } else { format!("{threads} threads") }
}

fn how_to_go_on(cluster: &LocalCluster) -> String {
    let endpoint = match cluster.grpc() {
        coordinator::DEFAULT_GRPC => String::new(),
        other => format!(" --endpoint {other}"),
    };
    let generate = match endpoint.as_str() {
        // Without an endpoint the bundled model would answer in a process of its own.
        "" => format!(" --endpoint {}", coordinator::DEFAULT_GRPC),
        given => given.to_owned(),
    };
    let http = cluster.http();
    format!(
        "\nGo on in another terminal:\n  \
         tercet chat{generate}\n  \
         tercet status{endpoint}\n  \
         curl http://{http}/v1/completions -H 'content-type: application/json' \\\n       \
         -d '{{\"prompt\": \"One day, Tom\", \"max_tokens\": 60}}'\n\n\
         ready: serving until Ctrl-C\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        up: UpCommand,
    }

    fn parse(flags: &str) -> UpCommand {
        Line::try_parse_from(["test"].into_iter().chain(flags.split_whitespace())).unwrap().up
    }

    #[test]
    fn stages_need_workers_and_layers() {
        let options = |flags: &str| parse(flags).options("store".as_ref(), 6);
        assert_eq!(options("--workers 3 --stages 3").unwrap().stages, Some(3));
        assert_eq!(options("--workers 3").unwrap().stages, Some(3), "one for each worker");
        assert_eq!(options("--workers 8").unwrap().stages, Some(6), "there are six layers");
        for flags in ["--stages 2", "--workers 8 --stages 7"] {
            let failure = options(flags).unwrap_err();
            assert_eq!(failure.exit(), node::exit::Exit::Usage, "{flags}");
        }
    }

    #[test]
    fn workers_share_the_cores_unless_told() {
        let options = |flags: &str| parse(flags).options("store".as_ref(), 6).unwrap();
        assert_eq!(options("--workers 64").threads, threads_each(64));
        assert_eq!(options("--workers 2 --threads 5").threads, 5);
        let open = options("--http 0.0.0.0:1 --insecure");
        assert!(open.insecure && open.coordinator().insecure);
        open.coordinator().validate().unwrap();
        assert!(options("--admin 0.0.0.0:1").coordinator().validate().is_err());
    }

    #[test]
    fn the_coordinator_is_told_who_watches_and_where_defaults_come_from() {
        let told = |flags: &str| parse(flags).options("store".as_ref(), 6).unwrap().coordinator();
        let (usual, other) = (told(""), told("--admin 127.0.0.1:9 --sampling-defaults none"));
        assert_eq!((usual.admin, usual.sampling_defaults), (None, SamplingSource::Model));
        assert_eq!(other.admin, Some(([127, 0, 0, 1], 9).into()));
        assert_eq!(other.sampling_defaults, SamplingSource::None);
    }
}
