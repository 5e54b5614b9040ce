//! The small HTTP server that every process has for whoever watches it: `/metrics`, `/health`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;

use crate::hosts::{HostError, Hosts};
use crate::serve::{Options, Protocol};

/// What `/metrics` is, to the letter that Prometheus expects.
const METRICS_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Connections of those who watch one process: probes, scrapers, people. They need a handful; the rest is
/// for strangers who say nothing, so that 2,560 of them a second wait out their grace beside whoever asks,
/// and ten times as many do not delay the accept loop.
const CONNECTIONS: usize = 128;

/// How long their answers may take once the process has stopped.
const LINGER: Duration = Duration::from_secs(1);

/// How a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Condition {
    /// Not yet able to serve.
    Starting,
    /// Serving.
    Serving,
    /// Told to stop: takes no new work.
    Stopping,
}

/// A process's condition, shared by whoever knows it and whoever is asked.
#[derive(Clone, Debug)]
pub struct Health(Arc<AtomicU8>);

impl Health {
    /// A process that starts.
    pub fn starting() -> Self {
        Self(Arc::new(AtomicU8::new(Condition::Starting as u8)))
    }

    /// Says how it is from now on.
    pub fn set(&self, condition: Condition) {
        self.0.store(condition as u8, Ordering::Relaxed);
    }

    /// How it is.
    pub fn get(&self) -> Condition {
        match self.0.load(Ordering::Relaxed) {
            1 => Condition::Serving,
            2 => Condition::Stopping,
            _ => Condition::Starting,
        }
    }
}

/// Routes `/metrics` and `/health`, to be served alone or merged into a larger router.
///
/// `/health` answers 200 while [`Condition::Serving`], otherwise 503, and says which in its body.
/// Requests that `hosts` does not allow are refused: no web page is to read what a process does.
pub fn router(health: Health, hosts: Hosts) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/health", get(report))
        .with_state(health)
        .layer(middleware::from_fn_with_state(hosts, check_host))
        .layer(middleware::from_fn(count_refusals))
}

/// Says once what the metrics of this server mean.
pub fn describe() {
    metrics::describe_counter!(
        "tercet_requests_refused_total",
        "requests that were refused before an answer was taken, by cause, protocol and endpoint"
    );
}

/// Counts a request that was refused, as a coordinator does.
async fn count_refusals(request: Request, next: Next) -> Response {
    let endpoint = match request.uri().path() {
        "/metrics" | "/health" => "probes",
        _ => "other",
    };
    let response = next.run(request).await;
    // That it does not serve, 503, is what a probe asked for.
    if response.status().is_client_error() {
        metrics::counter!(
            "tercet_requests_refused_total",
            "cause" => refusal_cause(response.status()),
            "protocol" => "http",
            "endpoint" => endpoint,
        )
        .increment(1);
    }
    response
}

/// The cause of a refusal that says no more than its status, as it is counted: of a closed set.
pub fn refusal_cause(status: StatusCode) -> &'static str {
    match status {
        StatusCode::BAD_REQUEST => "invalid_request",
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "not_authorized",
        StatusCode::NOT_FOUND => "unknown_route",
        StatusCode::METHOD_NOT_ALLOWED => "method_not_allowed",
        StatusCode::REQUEST_TIMEOUT => "body_timeout",
        StatusCode::LENGTH_REQUIRED => "length_required",
        StatusCode::PAYLOAD_TOO_LARGE => "body_too_large",
        StatusCode::UNSUPPORTED_MEDIA_TYPE => "media_type",
        StatusCode::MISDIRECTED_REQUEST => "misdirected",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_exceeded",
        StatusCode::SERVICE_UNAVAILABLE => "service_unavailable",
        StatusCode::GATEWAY_TIMEOUT => "timeout",
        status if status.is_server_error() => "internal",
        _ => "other",
    }
}

async fn check_host(State(hosts): State<Hosts>, request: Request, next: Next) -> Response {
    let status = match hosts.check(&request) {
        Ok(()) => return next.run(request).await,
        Err(HostError::Unclear(_)) => StatusCode::BAD_REQUEST,
        Err(HostError::Misdirected) => StatusCode::MISDIRECTED_REQUEST,
    };
    (status, Json(json!({ "status": "refused" }))).into_response()
}

/// How a server of such a router treats its connections. A probe and a scrape need one each.
pub fn options(name: &'static str) -> Options {
    // Whoever watches is answered at once: what lingers is stuck.
    Options { linger: Some(LINGER), ..Options::new(name, Protocol::Http, CONNECTIONS) }
}

async fn metrics() -> Response {
    match crate::metrics::page(std::convert::identity).await {
        Ok(text) => ([(header::CONTENT_TYPE, METRICS_CONTENT_TYPE)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "metrics were not written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

async fn report(State(health): State<Health>) -> Response {
    let (code, status) = match health.get() {
        Condition::Starting => (StatusCode::SERVICE_UNAVAILABLE, "starting"),
        Condition::Serving => (StatusCode::OK, "ok"),
        Condition::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
    };
    (code, Json(json!({ "status": status }))).into_response()
}
