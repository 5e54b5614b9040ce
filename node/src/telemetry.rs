//! Logs to stderr, spans to OTLP. What to log is each room's own affair.
//!
//! Lines are written by a thread of their own. When nobody reads them (a pipe that is full, a stopped
//! terminal) lines are lost and counted, and whoever logs goes on: a log never holds up a request.

use std::error::Error;
use std::fmt;
use std::io::{self, IsTerminal};
use std::str::FromStr;
use std::sync::OnceLock;
use std::time::Duration;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use serde::{Deserialize, Serialize};
use tracing::level_filters::LevelFilter;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

use crate::config;

mod export;
pub mod propagation;

/// What is logged when nobody says.
const DEFAULT_LOG: &str = "info";

/// Libraries whose spans nobody wants in a trace of requests. The exporter's own would even
/// export themselves.
const SILENT: [&str; 5] = ["h2", "hyper", "tonic", "tower", "opentelemetry"];

/// Lines that may wait to be written: a second of a busy server at the level debug, a few MiB.
const LINES_MAX: usize = 8192;

/// Counts the lines that were lost.
static LOST_LINES: OnceLock<ErrorCounter> = OnceLock::new();

/// Time for the last spans when the guard is only dropped.
const DROP_TIMEOUT: Duration = Duration::from_secs(1);

/// What telemetry a process gives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// Which logs are shown: a level, or a filter such as `info,node=debug`. When it is not set,
    /// `RUST_LOG` says, and otherwise `info`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<String>,
    /// How they are shown.
    pub log_format: LogFormat,
    /// Where spans go: the URL of an OTLP gRPC collector, such as `http://127.0.0.1:4317`. When it
    /// is not set, `OTEL_EXPORTER_OTLP_ENDPOINT` says, and otherwise there are no spans.
    #[serde(
        skip_serializing_if = "Option::is_none",
        deserialize_with = "config::deserialize_optional_url"
    )]
    pub otlp_endpoint: Option<String>,
    /// Which share of the traces that begin here is kept, 0 to 1. A trace that began elsewhere is
    /// kept if it was kept there.
    pub sample_ratio: f64,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { log: None, log_format: LogFormat::Human, otlp_endpoint: None, sample_ratio: 1.0 }
    }
}

/// How logs are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// A line for people.
    Human,
    /// A JSON object a line, for programs.
    Json,
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Human => "human",
            Self::Json => "json",
        })
    }
}

impl FromStr for LogFormat {
    type Err = TelemetryError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            _ => Err(TelemetryError::Format { text: text.to_owned() }),
        }
    }
}

/// Why telemetry could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// Not a log format.
    #[error("log format must be human or json, not {text:?}")]
    Format {
        /// What was given.
        text: String,
    },
    /// Not a log filter.
    #[error("{text:?} is not a log filter")]
    Filter {
        /// What was given.
        text: String,
        /// What the parser said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// Not a share.
    #[error("sample_ratio must be from 0 to 1, not {ratio}")]
    Ratio {
        /// What was given.
        ratio: f64,
    },
    /// Not an address that spans can be sent to.
    #[error("{endpoint:?} is not an OTLP endpoint such as http://127.0.0.1:4317")]
    Endpoint {
        /// What was given.
        endpoint: String,
        /// What the exporter said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// An address that would be shown holds a password.
    #[error("traces cannot be sent there")]
    Secret(#[from] config::AddressError),
    /// Logs already go somewhere.
    #[error("telemetry was started twice in one process")]
    Twice {
        /// What the subscriber said.
        source: Box<dyn Error + Send + Sync>,
    },
}

/// Keeps telemetry going; sends what is left when it ends.
#[must_use = "spans are lost when this is dropped early"]
#[derive(Debug)]
pub struct TelemetryGuard {
    provider: Option<SdkTracerProvider>,
    /// Writes the last lines when it is dropped, for a second at most.
    _lines: WorkerGuard,
}

/// Starts logs and spans for the whole process. `service` names it in traces (`tercet-worker` …).
/// Must be called inside a runtime, whose threads carry the spans away.
///
/// # Errors
///
/// If the configuration makes no sense, or it was done before. A collector that does not answer
/// is no error: spans are dropped and a warning says so.
pub fn init(service: &str, config: &TelemetryConfig) -> Result<TelemetryGuard, TelemetryError> {
    if !(0.0..=1.0).contains(&config.sample_ratio) {
        return Err(TelemetryError::Ratio { ratio: config.sample_ratio });
    }
    let endpoint =
        config.otlp_endpoint.clone().or_else(|| config::variable("OTEL_EXPORTER_OTLP_ENDPOINT"));
    // The variable is no key of ours, and was not checked with them.
    let endpoint = endpoint.map(config::without_secret).transpose()?;
    let provider =
        endpoint.map(|endpoint| provider(service, endpoint, config.sample_ratio)).transpose()?;
    let spans = provider.as_ref().map(|provider| {
        let wanted = Targets::new()
            .with_default(LevelFilter::INFO)
            .with_targets(SILENT.map(|library| (library, LevelFilter::OFF)));
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("tercet"))
            .with_location(false)
            .with_threads(false)
            .with_filter(wanted)
    });

    let (lines, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(LINES_MAX)
        .lossy(true)
        .thread_name("log")
        .finish(io::stderr());
    let lost = lines.error_counter();
    tracing_subscriber::registry()
        .with(logs(config, lines)?)
        .with(spans)
        .try_init()
        .map_err(|error| TelemetryError::Twice { source: error.into() })?;
    LOST_LINES.get_or_init(|| lost);
    Ok(TelemetryGuard { provider, _lines: guard })
}

/// How many lines of the log were lost because nobody read them.
pub fn lost_lines() -> u64 {
    LOST_LINES.get().map_or(0, |lost| lost.dropped_lines() as u64)
}

/// The layer that writes to stderr; stdout belongs to what a command was asked for.
fn logs(
    config: &TelemetryConfig,
    lines: NonBlocking,
) -> Result<Box<dyn Layer<Registry> + Send + Sync>, TelemetryError> {
    let text = config
        .log
        .clone()
        .or_else(|| config::variable("RUST_LOG"))
        .unwrap_or_else(|| DEFAULT_LOG.to_owned());
    let filter = EnvFilter::try_new(&text)
        .map_err(|error| TelemetryError::Filter { text, source: error.into() })?;
    let lines = tracing_subscriber::fmt::layer().with_writer(lines);
    Ok(match config.log_format {
        LogFormat::Human => {
            let colours = io::stderr().is_terminal() && config::variable("NO_COLOR").is_none();
            lines.with_ansi(colours).with_filter(filter).boxed()
        }
        LogFormat::Json => lines.json().with_filter(filter).boxed(),
    })
}

fn provider(
    service: &str,
    endpoint: String,
    ratio: f64,
) -> Result<SdkTracerProvider, TelemetryError> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(&endpoint)
        .build()
        .map_err(|error| TelemetryError::Endpoint {
            endpoint: endpoint.clone(),
            source: error.into(),
        })?;
    let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(ratio)));
    let resource = Resource::builder().with_service_name(service.to_owned()).build();
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(export::Telling::new(exporter, endpoint))
        .with_sampler(sampler)
        .with_resource(resource)
        .build())
}

impl TelemetryGuard {
    /// Sends the spans that are left, for at most `timeout`.
    pub async fn shutdown(mut self, timeout: Duration) {
        let Some(provider) = self.provider.take() else { return };
        // It blocks, and what it waits for runs on this runtime.
        let last = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(timeout));
        match last.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the last spans were not sent"),
            Err(error) => tracing::warn!(%error, "the span exporter broke down"),
        }
    }
}

impl Drop for TelemetryGuard {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take() {
            // Whether it worked is of interest to nobody any more.
            let _ = provider.shutdown_with_timeout(DROP_TIMEOUT);
        }
    }
}
