//! Logs to stderr, spans to OTLP. What to log is each room's own affair.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub mod propagation;

/// What telemetry a process gives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// Which logs are shown: a level, or a filter such as `info,node=debug`.
    pub log: String,
    /// How they are shown.
    pub log_format: LogFormat,
    /// Where spans go: the URL of an OTLP gRPC collector, such as `http://127.0.0.1:4317`. Without
    /// one there are no spans.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp_endpoint: Option<String>,
    /// Which share of the traces that begin here is kept, 0 to 1. A trace that began elsewhere is
    /// kept if it was kept there.
    pub sample_ratio: f64,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            log: "info".to_owned(),
            log_format: LogFormat::Human,
            otlp_endpoint: None,
            sample_ratio: 1.0,
        }
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
}

/// Keeps telemetry going; sends what is left when it is dropped.
#[must_use = "spans are lost when this is dropped early"]
#[derive(Debug)]
pub struct TelemetryGuard {}

/// Starts logs and spans for the whole process. `service` names it in traces (`tercet-worker` …).
///
/// # Errors
///
/// If the configuration makes no sense, or it was done before. A collector that does not answer
/// is no error: spans are dropped and a warning says so.
pub fn init(_service: &str, _config: &TelemetryConfig) -> Result<TelemetryGuard, TelemetryError> {
    unimplemented!()
}

impl TelemetryGuard {
    /// Sends the spans that are left, for at most `timeout`.
    pub async fn shutdown(self, _timeout: Duration) {}
}
