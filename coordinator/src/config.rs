//! What a coordinator is told at its start. Checked whole before a port is bound.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use model::SamplingDefaults;
use node::config::{
    ByteSize, Duration, HostPort, ListenError, TimeRange, TimeRangeError, check_listen_address,
    deserialize_listen, deserialize_optional_listen,
};
use proto::names::ClusterName;
use proto::plan::KvType;
use proto::{BLOCK_TOKENS, ports};
use serde::{Deserialize, Serialize};

use crate::planner::Objective;

/// Where the gRPC API listens unless told otherwise.
pub const DEFAULT_GRPC: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), ports::COORDINATOR_GRPC);

/// Where the HTTP API listens unless told otherwise.
pub const DEFAULT_HTTP: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), ports::COORDINATOR_HTTP);

/// Tokens of prompt and answer that people use, unless told otherwise: a conversation.
pub const CONVERSATION_TOKENS: u32 = 2048;

/// Two looks of a load balancer that looks every second.
const DEFAULT_LAME_DUCK: Duration = Duration::from_secs(2);

/// A coordinator's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of the cluster: which keys in the registry are its own. In a file it stands above the
    /// sections, for workers need it too.
    #[serde(skip)]
    pub cluster: ClusterName,
    /// Directory of the model's store.
    pub model: PathBuf,
    /// How KV is stored; part of the numerics class.
    pub kv_type: KvType,
    /// What plans are made for.
    pub objective: PlanFor,
    /// Of plans for throughput: no pipeline may take longer for a token of one answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_time: Option<Duration>,
    /// Tokens of prompt and answer that people use: every pipeline has KV for one such request, and is
    /// counted on for as many as it holds. Absent: [`CONVERSATION_TOKENS`]; never more than the
    /// model's context.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<u32>,
    /// Exactly so many stages in every pipeline; absent: as many as the planner finds best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stages: Option<u32>,
    /// Exactly so many pipelines; absent: as many as the planner finds best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pipelines: Option<u32>,
    /// Where the gRPC API listens.
    #[serde(deserialize_with = "deserialize_listen")]
    pub grpc: SocketAddr,
    /// Where the HTTP API listens.
    #[serde(deserialize_with = "deserialize_listen")]
    pub http: SocketAddr,
    /// Where whoever watches the process is answered by a thread of its own (health, readiness,
    /// metrics); absent: nowhere but beside the HTTP API.
    #[serde(
        deserialize_with = "deserialize_optional_listen",
        skip_serializing_if = "Option::is_none"
    )]
    pub admin: Option<SocketAddr>,
    /// How others reach the gRPC API (`host:port`); absent: at the address that was bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<HostPort>,
    /// Allows addresses that other machines reach, without TLS.
    pub insecure: bool,
    /// How long open answers may go on after the process was told to stop.
    pub shutdown_grace: Duration,
    /// How long after that requests are still taken, while readiness says no: whoever sends them
    /// here needs a moment to see it. At most the grace.
    pub lame_duck: Duration,
    /// While nothing serves, how long a plan waits for more workers after the last one came.
    pub settle: Duration,
    /// What serves is improved only when no worker came, went or failed for so long.
    pub hold_down: Duration,
    /// What serves is improved only for a gain of so many per cent, as predicted.
    pub min_gain_percent: u32,
    /// A speed counts as another one when it has changed by a quarter for so long, and in a quarter of
    /// that when it has changed fourfold.
    pub drift_time: Duration,
    /// Plans with workers that compute nothing, for tests of many workers.
    pub allow_stub_compute: bool,
    /// Prompts that begin alike share the KV of what they have in common.
    pub prefix_cache: bool,
    /// Where the defaults of sampling come from.
    pub sampling_defaults: SamplingSource,
    /// Defaults of sampling that go over the model's.
    pub sampling: SamplingDefaults,
    /// What requests may ask for and how many are taken.
    pub limits: LimitsConfig,
}

/// What requests may ask for and how many are taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Requests that may wait for KV; more get 429.
    pub waiting_requests: u32,
    /// Tokens that are expected of those who wait, prompts and answers; a request that would make them more
    /// gets 429.
    pub waiting_tokens: u64,
    /// The longest that a request waits for KV, or for a pipeline when there is none.
    pub wait: Duration,
    /// Requests that may run at once on one pipeline, whatever its KV would hold.
    pub running_requests: u32,
    /// Requests that each of the two servers works for at once, until their answer begins; more get 429.
    /// At least as many as may wait and run on one pipeline.
    pub open_requests: u32,
    /// Tokens in one step.
    pub step_tokens: u32,
    /// How long a step that reads prompts should take on the slowest stage: running answers wait for it.
    pub step_time: Duration,
    /// Blocks of 32 tokens in the KV cache, at most.
    pub kv_blocks: u32,
    /// Bytes of one HTTP request's body.
    pub body_bytes: ByteSize,
    /// Connections of clients, of each of the two servers. A newcomer takes the place of one that
    /// is silent or idle; if all are busy it is refused.
    pub connections: u32,
    /// The longest that one request may take, unless it asks for less.
    pub request_deadline: Duration,
    /// How long a step may be on its way before workers drop it.
    pub step_deadline: Duration,
}

/// What plans are made for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlanFor {
    /// The most tokens per second of all requests together.
    #[default]
    Throughput,
    /// The least time per token of a single one.
    Latency,
}

/// A word that names nothing that plans are made for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected throughput or latency")]
pub struct ParsePlanForError;

impl FromStr for PlanFor {
    type Err = ParsePlanForError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "throughput" => Ok(Self::Throughput),
            "latency" => Ok(Self::Latency),
            _ => Err(ParsePlanForError),
        }
    }
}

impl fmt::Display for PlanFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Throughput => "throughput",
            Self::Latency => "latency",
        })
    }
}

impl PlanFor {
    /// What the planner is asked for, if a token of one answer may take `token_time`.
    ///
    /// # Errors
    ///
    /// [`ConfigError::TokenTime`]: the least time knows no bound.
    pub fn objective(self, token_time: Option<Duration>) -> Result<Objective, ConfigError> {
        match (self, token_time) {
            (Self::Throughput, time) => {
                Ok(Objective::Throughput { token_time: time.map(Duration::get) })
            }
            (Self::Latency, None) => Ok(Objective::Latency),
            (Self::Latency, Some(_)) => Err(ConfigError::TokenTime),
        }
    }
}

/// Where the defaults of sampling come from, for requests that do not say how tokens are drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SamplingSource {
    /// What the model's makers recommend.
    #[default]
    Model,
    /// Temperature 1 and nothing cut.
    None,
}

/// A word that names no [`SamplingSource`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected model or none")]
pub struct ParseSamplingSourceError;

impl FromStr for SamplingSource {
    type Err = ParseSamplingSourceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "model" => Ok(Self::Model),
            "none" => Ok(Self::None),
            _ => Err(ParseSamplingSourceError),
        }
    }
}

impl fmt::Display for SamplingSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Model => "model",
            Self::None => "none",
        })
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cluster: ClusterName::default(),
            model: PathBuf::new(),
            kv_type: KvType::F16,
            objective: PlanFor::Throughput,
            token_time: None,
            context: None,
            stages: None,
            pipelines: None,
            grpc: DEFAULT_GRPC,
            http: DEFAULT_HTTP,
            admin: None,
            advertise: None,
            insecure: false,
            // Most answers end within it; the rest end with an error that says why.
            shutdown_grace: Duration::from_secs(10),
            lame_duck: DEFAULT_LAME_DUCK,
            // Workers of one cluster start within moments of each other.
            settle: Duration::from_millis(500),
            // Workers that start one by one, or restart, are placed together.
            hold_down: Duration::from_secs(10),
            // Measured speeds are hardly better.
            min_gain_percent: 5,
            // Longer than a neighbour's burst of work.
            drift_time: Duration::from_secs(60),
            allow_stub_compute: false,
            prefix_cache: true,
            sampling_defaults: SamplingSource::Model,
            sampling: SamplingDefaults::default(),
            limits: LimitsConfig::default(),
        }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            // A minute of short answers on one small machine.
            waiting_requests: 256,
            // As many contexts of 4096.
            waiting_tokens: 1 << 20,
            // Less than the minute after which proxies commonly give up.
            wait: Duration::from_secs(45),
            // Beyond this a token costs the same and everyone only waits longer.
            running_requests: 256,
            // 64 replicas of 16 answers each, on each server.
            open_requests: 1024,
            // As the scheduler's own default: 640 KB of activations for a width of 2560.
            step_tokens: 64,
            // Five tokens a second of running answers are as fast as people read.
            step_time: Duration::from_millis(200),
            // 128 Ki tokens: 32 contexts of 4096.
            kv_blocks: 4096,
            // A prompt of a whole context as token ids fits many times.
            body_bytes: ByteSize(4 << 20),
            // One for each open request, as clients of HTTP/1 have.
            connections: 1024,
            // The read timeout of OpenAI's own clients.
            request_deadline: Duration::from_secs(600),
            step_deadline: Duration::from_secs(30),
        }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// No model was named.
    #[error(
        "no model: give the directory of a model's store as --model, or as model in [coordinator]"
    )]
    NoModel,
    /// A number that makes no sense.
    #[error("{field} must be from {least} to {most}, found {found}")]
    Range {
        /// The key.
        field: &'static str,
        /// What was given.
        found: u64,
        /// The least.
        least: u64,
        /// The most.
        most: u64,
    },
    /// A time that makes no sense.
    #[error(transparent)]
    Time(#[from] TimeRangeError),
    /// Fewer requests than one pipeline takes.
    #[error(
        "limits.open_requests is {found}, and limits.waiting_requests and limits.running_requests are \
         {least} together"
    )]
    OpenRequests {
        /// What was given.
        found: u32,
        /// What is needed.
        least: u32,
    },
    /// More tokens than KV.
    #[error(
        "a context of {context} tokens needs {needed} KV blocks of 32, and limits.kv_blocks is \
         {kv_blocks}"
    )]
    Context {
        /// What was given.
        context: u32,
        /// Blocks for it.
        needed: u32,
        /// Blocks at most.
        kv_blocks: u32,
    },
    /// A bound where the least is wanted.
    #[error(
        "a bound on the time of a token is for plans for throughput: those for latency take the least"
    )]
    TokenTime,
    /// A default of sampling that no request may ask for.
    #[error("sampling.{field} is {found}, which no request may ask for")]
    Sampling {
        /// The key.
        field: &'static str,
        /// What was given.
        found: f32,
    },
    /// An address that others reach.
    #[error("refusing to serve {service} (coordinator.{key})")]
    Listen {
        /// gRPC, HTTP or admin.
        service: &'static str,
        /// The key of its address.
        key: &'static str,
        /// Why.
        source: ListenError,
    },
}

/// The most pipelines that may be asked for: more workers than that are no cluster of this kind.
const MAX_PIPELINES: u64 = 1 << 10;

impl LimitsConfig {
    /// Requests that are here at once, whatever becomes of them.
    pub(crate) fn requests(&self) -> usize {
        self.open_requests as usize
    }

    /// Open files that serving so many connections takes: those of both servers, and what the process has
    /// open beside them.
    pub(crate) fn descriptors(&self) -> u64 {
        2 * u64::from(self.connections) + 512
    }
}

impl Config {
    /// Checks everything that can be checked without touching the world.
    ///
    /// # Errors
    ///
    /// [`ConfigError`]: the first thing that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.model.as_os_str().is_empty() {
            return Err(ConfigError::NoModel);
        }
        let limits = &self.limits;
        let stages = self.stages.unwrap_or(1);
        for (field, found, least, most) in [
            ("stages", u64::from(stages), 1, proto::limits::STAGES as u64),
            ("pipelines", u64::from(self.pipelines.unwrap_or(1)), 1, MAX_PIPELINES),
            ("context", self.context.unwrap_or(1).into(), 1, 1 << 24),
            ("min_gain_percent", self.min_gain_percent.into(), 0, 100),
            ("limits.waiting_requests", limits.waiting_requests.into(), 1, 1 << 16),
            ("limits.waiting_tokens", limits.waiting_tokens, 1, 1 << 40),
            ("limits.running_requests", limits.running_requests.into(), 1, 1 << 16),
            ("limits.open_requests", limits.open_requests.into(), 1, 1 << 20),
            ("limits.step_tokens", limits.step_tokens.into(), 1, proto::limits::STEP_TOKENS as u64),
            ("limits.kv_blocks", limits.kv_blocks.into(), 1, 1 << 24),
            ("limits.connections", limits.connections.into(), 1, 1 << 20),
            ("limits.body_bytes", limits.body_bytes.bytes(), 1 << 10, 1 << 30),
        ] {
            if !(least..=most).contains(&found) {
                return Err(ConfigError::Range { field, found, least, most });
            }
        }
        let least = limits.waiting_requests + limits.running_requests;
        if limits.open_requests < least {
            return Err(ConfigError::OpenRequests { found: limits.open_requests, least });
        }
        let needed = self.context.unwrap_or(1).div_ceil(BLOCK_TOKENS);
        if needed > limits.kv_blocks {
            let (context, kv_blocks) = (self.context.unwrap_or(1), limits.kv_blocks);
            return Err(ConfigError::Context { context, needed, kv_blocks });
        }
        self.objective.objective(self.token_time)?;
        if let Some(token_time) = self.token_time {
            TimeRange::TOKEN.check("token_time", token_time)?;
        }
        TimeRange::STOP.check("shutdown_grace", self.shutdown_grace)?;
        TimeRange::STOP.check("lame_duck", self.lame_duck)?;
        TimeRange::PAUSE.check("settle", self.settle)?;
        TimeRange::PAUSE.check("hold_down", self.hold_down)?;
        TimeRange::DRIFT.check("drift_time", self.drift_time)?;
        TimeRange::PAUSE.check("limits.wait", limits.wait)?;
        TimeRange::DEADLINE.check("limits.request_deadline", limits.request_deadline)?;
        TimeRange::TOKEN.check("limits.step_time", limits.step_time)?;
        TimeRange::DEADLINE.check("limits.step_deadline", limits.step_deadline)?;
        let api = [("gRPC", "grpc", self.grpc), ("HTTP", "http", self.http)];
        let admin = self.admin.map(|address| ("admin", "admin", address));
        for (service, key, address) in api.into_iter().chain(admin) {
            check_listen_address(address, self.insecure).map_err(|source| ConfigError::Listen {
                service,
                key,
                source,
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usable() -> Config {
        Config { model: "store".into(), ..Config::default() }
    }

    #[test]
    fn no_limit_is_below_what_one_pipeline_takes() {
        let limits = LimitsConfig { open_requests: 511, ..LimitsConfig::default() };
        let error = Config { limits, ..usable() }.validate().unwrap_err().to_string();
        assert!(error.contains("open_requests is 511") && error.contains("are 512"), "{error}");
        let limits = LimitsConfig { kv_blocks: 64, ..LimitsConfig::default() };
        let config = Config { limits, context: Some(2049), ..usable() };
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains("needs 65 KV blocks") && error.contains("is 64"), "{error}");
        Config { context: Some(2048), ..config }.validate().unwrap();
    }

    #[test]
    fn what_cannot_work_is_refused_by_name() {
        usable().validate().unwrap();
        let mut limits = LimitsConfig { step_tokens: 0, ..LimitsConfig::default() };
        let (at_once, never) = (Duration::default(), Duration::from_secs(u64::MAX));
        let limited = |limits: LimitsConfig| Config { limits, ..usable() };
        for (config, words) in [
            (Config { model: PathBuf::new(), ..usable() }, "no model"),
            (Config { stages: Some(0), ..usable() }, "stages must be from 1"),
            (Config { limits: limits.clone(), ..usable() }, "limits.step_tokens"),
            (
                limited(LimitsConfig { step_deadline: at_once, ..LimitsConfig::default() }),
                "limits.step_deadline must be from 10ms to 365d, found 0s",
            ),
            (
                limited(LimitsConfig { request_deadline: at_once, ..LimitsConfig::default() }),
                "limits.request_deadline",
            ),
            (
                limited(LimitsConfig { open_requests: 0, ..LimitsConfig::default() }),
                "limits.open_requests must be from 1",
            ),
            (limited(LimitsConfig { wait: never, ..LimitsConfig::default() }), "limits.wait"),
            (Config { shutdown_grace: never, ..usable() }, "shutdown_grace"),
            (Config { lame_duck: never, ..usable() }, "lame_duck"),
            (Config { settle: never, ..usable() }, "settle"),
            (Config { hold_down: never, ..usable() }, "hold_down"),
            (Config { drift_time: never, ..usable() }, "drift_time"),
            (Config { context: Some(0), ..usable() }, "context must be from 1"),
            (Config { token_time: Some(at_once), ..usable() }, "token_time must be from 1us"),
            (
                Config { objective: PlanFor::Latency, token_time: Some(never), ..usable() },
                "is for plans for throughput",
            ),
            (Config { http: "0.0.0.0:1".parse().unwrap(), ..usable() }, "refusing to serve HTTP"),
            (Config { admin: "0.0.0.0:1".parse().ok(), ..usable() }, "refusing to serve admin"),
        ] {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        let open = Config { http: "0.0.0.0:1".parse().unwrap(), insecure: true, ..usable() };
        open.validate().unwrap();
        limits.step_tokens = 1;
        Config { limits, ..usable() }.validate().unwrap();
    }
}
