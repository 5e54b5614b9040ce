//! The HTTP API: the part of OpenAI's that clients use, and what watches a process. Thin over the
//! same requests as gRPC.

mod arriving;
mod asked;
mod body;
mod chat;
mod choices;
mod completions;
mod errors;
mod host;
mod json;
mod logprobs;
mod models;
mod observe;
mod sse;
mod types;

#[cfg(test)]
mod polls;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{FromRef, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{any_service, get, post};
use tower_http::catch_panic::CatchPanicLayer;

use crate::grpc;
use crate::service::{Service, hex};
use body::Bodies;
use errors::ApiError;
pub(crate) use node::hosts::Hosts;

/// Characters of a client's own `x-request-id` that are sent back.
const REQUEST_ID_CHARS: usize = 128;

/// What every handler is given.
#[derive(Clone)]
pub(crate) struct Api {
    service: Arc<Service>,
    bodies: Arc<Bodies>,
}

impl FromRef<Api> for Arc<Service> {
    fn from_ref(api: &Api) -> Self {
        Arc::clone(&api.service)
    }
}

/// What requests may be.
pub(crate) struct Limits {
    /// Bytes of one body.
    pub(crate) body_bytes: usize,
    /// Requests that are read, wait or are answered as a whole at once.
    pub(crate) requests: usize,
    /// Whom they may be meant for.
    pub(crate) hosts: Hosts,
}

/// The routes.
pub(crate) fn router(service: Arc<Service>, limits: Limits) -> Router {
    let context = service.model.context as usize;
    let bodies =
        Arc::new(Bodies::new(limits.body_bytes, context, service.memory(), limits.requests));
    Router::new()
        .route("/v1/completions", post(completions::create))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .merge(watching())
        .fallback(async || ApiError::not_found("there is no such page"))
        .method_not_allowed_fallback(async || ApiError::method_not_allowed())
        .with_state(Api { service, bodies })
        .layer(middleware::from_fn_with_state(limits.hosts, host::check))
        .layer(middleware::from_fn(with_request_id))
        .layer(CatchPanicLayer::custom(|_| errors::panicked()))
        .layer(middleware::from_fn(observe::count_refusals))
}

/// Reads a body as the handler of `path` does, for a model of `context` tokens: for tests and
/// fuzzing of what bytes of strangers may cost.
///
/// # Errors
///
/// The error's body: also for another path, which has none to read.
#[doc(hidden)]
pub fn check_body(path: &str, body: &[u8], context: usize) -> Result<(), serde_json::Value> {
    let outcome = match path {
        "/v1/completions" => json::parse::<completions::Body>(body, context).map(drop),
        "/v1/chat/completions" => json::parse::<chat::Body>(body, context).map(drop),
        _ => Err(ApiError::not_found("there is no such page")),
    };
    outcome.map_err(|error| error.body())
}

/// The routes of those who watch the process and of those who operate the cluster, for a server of
/// their own. Who reaches it may order: clients are not to.
pub(crate) fn admin_router(service: Arc<Service>, hosts: Hosts) -> Router {
    let operator = grpc::operator_router(Arc::clone(&service));
    watching()
        .fallback(async || ApiError::not_found("there is no such page"))
        .method_not_allowed_fallback(async || ApiError::method_not_allowed())
        .with_state(service)
        .route(grpc::OPERATOR_PATH, any_service(operator))
        .layer(middleware::from_fn_with_state(hosts, host::check))
        .layer(CatchPanicLayer::custom(|_| errors::panicked()))
        .layer(middleware::from_fn(observe::count_refusals))
}

/// What watches a process. None of it waits for a request.
fn watching<S>() -> Router<S>
where
    S: Clone + Send + Sync + 'static,
    Arc<Service>: FromRef<S>,
{
    Router::new()
        .route("/health", get(observe::health))
        .route("/healthz", get(observe::health))
        .route("/livez", get(observe::health))
        .route("/ping", get(observe::health))
        .route("/ready", get(observe::ready))
        .route("/readyz", get(observe::ready))
        .route("/version", get(observe::version))
        .route("/metrics", get(observe::metrics_page))
}

/// What answers are told by: to clients, and in traces.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Gives every answer an `x-request-id`: the client's own if it is a plain text, a label only; else the
/// id that the answer itself has, or a new one for what has none.
async fn with_request_id(request: Request, next: Next) -> Response {
    let given =
        request.headers().get(REQUEST_ID).filter(|id| id.len() <= REQUEST_ID_CHARS).cloned();
    let mut response = next.run(request).await;
    match given {
        Some(given) => {
            response.headers_mut().insert(REQUEST_ID, given);
        }
        None if !response.headers().contains_key(REQUEST_ID) => {
            response = named(response, &new_id(""));
        }
        None => {}
    }
    response
}

/// An answer that is told by this id.
fn named(mut response: Response, id: &str) -> Response {
    let id = HeaderValue::from_str(id).unwrap_or(HeaderValue::from_static("unknown"));
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// The idempotency key that a client gave; empty if it gave none that can be used.
fn idempotency_key(headers: &HeaderMap) -> String {
    let key = headers.get("idempotency-key").and_then(|value| value.to_str().ok());
    key.filter(|key| key.len() <= proto::limits::NAME_BYTES).unwrap_or_default().to_owned()
}

/// How long a client waits for a whole answer, in seconds; fractions count.
const REQUEST_TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout");

/// The deadline that a client gave, in milliseconds from now; 0 if it gave none.
fn deadline_ms(headers: &HeaderMap) -> Result<u32, ApiError> {
    let Some(given) = headers.get(REQUEST_TIMEOUT) else { return Ok(0) };
    let seconds = given.to_str().ok().and_then(|given| given.trim().parse::<f64>().ok());
    let timeout = seconds.filter(|&seconds| seconds > 0.0);
    let timeout = timeout.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let timeout = timeout.ok_or_else(|| {
        let message = "x-request-timeout must be a number of seconds above 0";
        ApiError::invalid(Some("x-request-timeout"), message)
    })?;
    Ok(grpc::earlier(0, timeout))
}

/// A new id for a response.
fn new_id(prefix: &str) -> String {
    format!("{prefix}{}", hex(&rand::random::<[u8; 16]>()))
}

/// Seconds since 1970, for `created`.
pub(crate) fn now_unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
