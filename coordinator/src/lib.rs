//! Decides (planner, cluster, scheduler) and answers clients (gRPC, HTTP).
//!
//! ```text
//! grpc, http ──GenerateRequest──▶ request (checks, text) ──▶ driver ──steps──▶ workers (links)
//!                                              owns cluster, router, schedulers (pure)
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use node::Supervisor;
use node::config::HostPort;
use node::membership::Membership;
use node::serve::{Options, Protocol, Timeouts};
use proto::BLOCK_TOKENS;
use proto::keys::Keys;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

mod answer;
mod arrival;
mod background;
mod compute;
mod config;
mod driver;
mod error;
mod grpc;
mod http;
mod memory;
mod metrics;
mod request;
mod runtime;
mod service;
mod spans;
mod text;
mod tokenize;
mod workers;

// Pure: events in, actions out.
pub mod cluster;
pub mod planner;
pub mod router;
pub mod scheduler;
pub mod tick;
pub mod token_log;

pub use config::{
    CONVERSATION_TOKENS, Config, ConfigError, DEFAULT_GRPC, DEFAULT_HTTP, LimitsConfig, PlanFor,
    SamplingSource,
};
pub use error::RunError;
#[doc(hidden)]
pub use http::check_body;
pub use text::{PatternError, TemplateError, TextSetupError, TokenizerError, TrialError, try_text};
pub use tokenize::{TokenizeError, tokenize};

/// Where a coordinator listens, once it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The gRPC API.
    pub grpc: SocketAddr,
    /// The HTTP API.
    pub http: SocketAddr,
    /// The server of those who watch and operate, if it was asked for.
    pub admin: Option<SocketAddr>,
}

/// Serves one model until `stop` fires: campaigns, plans, answers clients.
///
/// `bound` is told where both servers listen as soon as they do, before there is a plan.
///
/// # Errors
///
/// [`RunError`] if it cannot start, or if one of its tasks fails.
pub async fn run(
    config: Config,
    keys: Keys,
    membership: Arc<dyn Membership>,
    bound: Option<oneshot::Sender<Bound>>,
    stop: CancellationToken,
) -> Result<(), RunError> {
    // Everything that can be wrong is found here, before any task exists.
    config.validate()?;
    let store = open_model(&config)?;
    let text = text::Text::open(&store)
        .map_err(|source| RunError::Text { path: config.model.clone(), source })?;
    allow_descriptors(config.limits.descriptors());
    let grpc_listener = bind("gRPC", config.grpc)?;
    let http_listener = bind("HTTP", config.http)?;
    let admin_listener = match config.admin {
        Some(address) => Some(bind("admin", address)?),
        None => None,
    };
    let admin = admin_listener.as_ref().map(|listener| local("admin", listener)).transpose()?;
    let (grpc, http) = (local("gRPC", &grpc_listener)?, local("HTTP", &http_listener)?);
    let made_up = Bytes::from(driver::new_cluster_id());
    let cluster_id = membership.get_or_create(&keys.cluster_id(), made_up).await?.value;
    let cluster_id = String::from_utf8_lossy(&cluster_id).into_owned();
    metrics::describe();
    node::serve::describe();

    let lanes = runtime::LaneRuntime::new().map_err(RunError::Threads)?;
    let model = served_model(&store, &config);
    let driver_config = driver::DriverConfig {
        cluster_name: config.cluster.to_string(),
        cluster: cluster_options(&config, &store, cluster_id)?,
        limits: scheduler_limits(&config, &model),
        advertise: config.advertise.as_ref().map_or_else(|| grpc.to_string(), ToString::to_string),
        http: reached_at(&config, http),
        admin: admin.map(|admin| advertised_admin(&config, admin)),
        socket: node::socket::name(grpc),
        first_token: model.bos_token.unwrap_or(0),
        vocab: model.vocab,
        grace: config.shutdown_grace.get(),
        lame_duck: config.lame_duck.get(),
        lanes: lanes.handle(),
    };
    let (driver, handle) = driver::Driver::new(driver_config, keys, membership, stop.child_token());
    let deadline = config.limits.request_deadline.get();
    let body_bytes = usize::try_from(config.limits.body_bytes.bytes()).unwrap_or(usize::MAX);
    let memory = memory::Memory::for_requests(body_bytes.max(proto::limits::CLIENT_MESSAGE_BYTES));
    let service = Arc::new(service::Service::new(model, text, handle, deadline, memory));
    let requests = config.limits.requests();
    let http_limits = http::Limits {
        body_bytes,
        requests,
        hosts: http::Hosts::of(http, config.advertise.as_ref().map(HostPort::host)),
    };
    let advertised = config.advertise.as_ref().map(HostPort::host);
    let admin_router = admin
        .map(|admin| http::admin_router(Arc::clone(&service), http::Hosts::of(admin, advertised)));
    let http_router = http::router(Arc::clone(&service), http_limits);
    let grpc_limits = grpc::Limits { requests, wait: config.limits.wait.get() };

    // Fires when no answer is open any more: the servers outlive the driver, so that every client
    // hears how its answer ended.
    let answered = CancellationToken::new();
    let last_answer = answered.clone().drop_guard();
    let (health, health_service) = tonic_health::server::health_reporter();
    let grpc_router = grpc::router(grpc_limits, Arc::clone(&service), health_service)?;
    let mut tasks = Supervisor::new(stop);
    tasks.spawn("driver", |_| async move {
        // Lanes run for as long as the driver does.
        let _lanes = lanes;
        Box::pin(driver.run(last_answer)).await;
        Ok(())
    });
    let connections = config.limits.connections as usize;
    // What is left once every answer has ended: watchers of health, uploads that nobody waits for.
    let linger = Some(CONNECTIONS_LINGER);
    let options = |name, protocol| Options { linger, ..Options::new(name, protocol, connections) };
    let grpc_options = Options { timeouts: GRPC_TIMEOUTS, ..options("grpc", Protocol::Grpc) };
    let http_options = options("http", Protocol::Http);
    let (grpc_stop, http_stop) = (answered.clone(), answered.clone());
    tasks.spawn("grpc", |_| async move {
        tokio::select! {
            () = node::serve::serve(grpc_listener, grpc_router, grpc_options, grpc_stop) => Ok(()),
            () = grpc::report_health(health, service) => Ok(()),
        }
    });
    tasks.spawn("http", |_| async move {
        node::serve::serve(http_listener, http_router, http_options, http_stop).await;
        Ok(())
    });
    if let (Some(listener), Some(router)) = (admin_listener, admin_router) {
        tasks.spawn("admin", |_| async move {
            let options = node::observe::options("admin");
            Ok(node::serve::on_own_thread(listener, router, options, answered).await?)
        });
    }
    tracing::info!(%grpc, %http, ?admin, "serves");
    if let Some(bound) = bound {
        // Nobody waits for it: their affair.
        let _ = bound.send(Bound { grpc, http, admin });
    }
    let grace = config.shutdown_grace.get() + CLOSING_TIME;
    Ok(tasks.run(grace).await?)
}

/// Clients of gRPC keep a connection for as long as they live, and connect again unseen when it is
/// closed in order: 15 minutes without a call is long.
const GRPC_TIMEOUTS: Timeouts = Timeouts { idle: Duration::from_secs(900), ..Timeouts::USUAL };

/// After the last answer, for connections to close.
const CLOSING_TIME: Duration = Duration::from_secs(3);

/// Of that, what connections are given to close in order.
const CONNECTIONS_LINGER: Duration = Duration::from_secs(2);

fn open_model(config: &Config) -> Result<model::Store, RunError> {
    let open = || {
        let store = model::Store::open(&config.model)?;
        if !store.manifest().has_digest() {
            // Nothing else tells that the numbers in an older manifest are right. Reads all weights,
            // before there is anything else to do.
            store.verify(|_| {})?;
        }
        Ok(store)
    };
    open().map_err(|source| RunError::Model { path: config.model.clone(), source })
}

/// Lets the process have so many files open, or says that it may not.
fn allow_descriptors(wanted: u64) {
    match node::descriptors::raise(wanted) {
        Ok(allowed) if allowed < wanted => tracing::warn!(
            allowed,
            wanted,
            "the hard limit of open files is below what limits.connections may take; raise it, or \
             connections are refused before that"
        ),
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, wanted, "the limit of open files cannot be raised"),
    }
}

fn bind(service: &'static str, address: SocketAddr) -> Result<TcpListener, RunError> {
    node::serve::listen(address).map_err(|source| RunError::Bind { service, address, source })
}

fn local(service: &'static str, listener: &TcpListener) -> Result<SocketAddr, RunError> {
    let address = SocketAddr::from(([0, 0, 0, 0], 0));
    listener.local_addr().map_err(|source| RunError::Bind { service, address, source })
}

/// Where operators reach the admin server: on this machine only if it listens there only.
fn advertised_admin(config: &Config, bound: SocketAddr) -> String {
    if bound.ip().to_canonical().is_loopback() {
        bound.to_string()
    } else {
        reached_at(config, bound)
    }
}

/// Where others reach another server than the gRPC one: by the name that they call that.
fn reached_at(config: &Config, bound: SocketAddr) -> String {
    match &config.advertise {
        Some(advertise) => format!("{}:{}", advertise.host(), bound.port()),
        None => bound.to_string(),
    }
}

fn served_model(store: &model::Store, served: &Config) -> request::ServedModel {
    let config = store.config();
    let of_model = match served.sampling_defaults {
        SamplingSource::Model => store.manifest().sampling,
        SamplingSource::None => model::SamplingDefaults::default(),
    };
    request::ServedModel {
        name: config.name.clone(),
        id: store.id().to_string(),
        layers: config.layers,
        vocab: config.vocab,
        context: config.context,
        bos_token: config.bos_token,
        eos_tokens: config.eos_tokens.clone(),
        sampling: served.sampling.or(of_model),
        created_unix_s: http::now_unix_s(),
    }
}

fn scheduler_limits(config: &Config, model: &request::ServedModel) -> scheduler::Limits {
    scheduler::Limits {
        waiting_requests: config.limits.waiting_requests,
        waiting_tokens: config.limits.waiting_tokens,
        wait: config.limits.wait.get(),
        running_requests: config.limits.running_requests,
        step_tokens: config.limits.step_tokens,
        context_tokens: model.context,
        step_time: config.limits.step_time.get(),
        step_deadline: config.limits.step_deadline.get(),
        prefix_cache: config.prefix_cache,
    }
}

/// What the planner must know of the model in a store.
pub fn model_costs(store: &model::Store, kv_type: proto::plan::KvType) -> planner::ModelCosts {
    let model = store.config();
    let kv_values = 2 * u64::from(model.kv_heads) * u64::from(model.head_dim);
    planner::ModelCosts {
        layers: model.layers,
        layer_bytes: store.layer_bytes(),
        embedding_bytes: store.embedding_bytes(),
        head_bytes: store.head_bytes() + store.screen_bytes(),
        tied_head: model.tied_head,
        kv_block_layer_bytes: u64::from(BLOCK_TOKENS)
            * kv_values
            * u64::from(kv_type.value_bytes()),
    }
}

/// KV blocks that a pipeline must have room for, so that one request of so many tokens fits, if none
/// may have more than `most`.
pub fn least_kv_blocks(tokens: u32, most: u32) -> u32 {
    tokens.div_ceil(BLOCK_TOKENS).min(most)
}

fn cluster_options(
    config: &Config,
    store: &model::Store,
    cluster_id: String,
) -> Result<cluster::Options, ConfigError> {
    let context_tokens = config.context.unwrap_or(CONVERSATION_TOKENS).min(store.config().context);
    Ok(cluster::Options {
        cluster_id,
        last_pipeline: proto::ids::PipelineId(0),
        model: proto::ids::ModelId(*store.id().as_bytes()),
        costs: model_costs(store, config.kv_type),
        kv_type: config.kv_type,
        stages: config.stages,
        pipelines: config.pipelines,
        min_kv_blocks: least_kv_blocks(context_tokens, config.limits.kv_blocks),
        max_kv_blocks: config.limits.kv_blocks,
        context_tokens,
        objective: config.objective.objective(config.token_time)?,
        max_step_tokens: config.limits.step_tokens,
        settle: config.settle.get(),
        hold_down: config.hold_down.get(),
        min_gain_percent: config.min_gain_percent,
        drift_time: config.drift_time.get(),
        allow_stub_compute: config.allow_stub_compute,
    })
}
