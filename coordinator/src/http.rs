//! The HTTP API: the part of OpenAI's that clients use, and what watches a process. Thin over the
//! same requests as gRPC.

mod body;
mod chat;
mod choices;
mod completions;
mod errors;
mod logprobs;
mod models;
mod observe;
mod sse;
mod types;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;

use crate::service::{Service, hex};
use errors::ApiError;

/// How long a client may take to send the headers of a request, or to begin a next one.
const HEADER_PATIENCE: Duration = Duration::from_secs(10);

/// How often a quiet HTTP/2 client is asked whether it lives.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);

/// After an accept that failed (no free file, mostly): the next one would fail as well.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Characters of a client's own `x-request-id` that are sent back.
const REQUEST_ID_CHARS: usize = 128;

/// What every handler is given.
#[derive(Clone)]
pub(crate) struct Api {
    service: Arc<Service>,
    body_bytes: usize,
}

/// The routes.
pub(crate) fn router(service: Arc<Service>, body_bytes: usize) -> Router {
    Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/v1/completions", post(completions::create))
        .route("/v1/chat/completions", post(chat::create))
        .route("/health", get(observe::health))
        .route("/livez", get(observe::health))
        .route("/ping", get(observe::health))
        .route("/ready", get(observe::ready))
        .route("/readyz", get(observe::ready))
        .route("/version", get(observe::version))
        .route("/metrics", get(observe::metrics))
        .fallback(async || ApiError::not_found("there is no such page"))
        .method_not_allowed_fallback(async || ApiError::method_not_allowed())
        .with_state(Api { service, body_bytes })
        .layer(middleware::from_fn(with_request_id))
        .layer(CatchPanicLayer::custom(|_| errors::panicked()))
}

/// Serves until `stop` fires and open answers have ended.
///
/// # Errors
///
/// Never, in the present form: a connection that fails is its client's affair.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    connections: u32,
    stop: CancellationToken,
) -> Result<(), node::TaskError> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_PATIENCE);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(HEADER_PATIENCE)
        .max_concurrent_streams(proto::limits::STREAMS_PER_CONNECTION)
        .max_header_list_size(16 << 10);
    let graceful = GracefulShutdown::new();
    let room = Arc::new(Semaphore::new(connections as usize));
    let mut open = JoinSet::new();
    loop {
        // Connections beyond the limit wait in the kernel's queue.
        let permit = tokio::select! {
            () = stop.cancelled() => break,
            permit = Arc::clone(&room).acquire_owned() => permit?,
        };
        let stream = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "failed to accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        // Tokens are small and must not wait for one another.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "failed to set TCP_NODELAY");
        }
        let service = TowerToHyperService::new(router.clone());
        let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
        let connection = graceful.watch(connection);
        open.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended");
            }
            drop(permit);
        });
        // Forget those that have ended.
        while open.try_join_next().is_some() {}
    }
    drop(listener);
    graceful.shutdown().await;
    Ok(())
}

/// Gives every answer an `x-request-id`: the client's own if it is a plain text, a label only.
async fn with_request_id(request: Request, next: Next) -> Response {
    let name = HeaderName::from_static("x-request-id");
    let given = request.headers().get(&name).filter(|id| id.len() <= REQUEST_ID_CHARS).cloned();
    let mut response = next.run(request).await;
    let id = given
        .or_else(|| HeaderValue::from_str(&hex(&rand::random::<[u8; 16]>())).ok())
        .unwrap_or(HeaderValue::from_static("unknown"));
    response.headers_mut().entry(name).or_insert(id);
    response
}

/// The idempotency key that a client gave; empty if it gave none that can be used.
fn idempotency_key(headers: &HeaderMap) -> String {
    let key = headers.get("idempotency-key").and_then(|value| value.to_str().ok());
    key.filter(|key| key.len() <= proto::limits::NAME_BYTES).unwrap_or_default().to_owned()
}

/// A new id for a response.
fn new_id(prefix: &str) -> String {
    format!("{prefix}{}", hex(&rand::random::<[u8; 16]>()))
}

/// Seconds since 1970, for `created`.
pub(crate) fn now_unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
