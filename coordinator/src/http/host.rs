//! Refuses requests that are meant for somebody else, in OpenAI's form.

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use node::hosts::{HostError, Hosts};

use super::errors::ApiError;

/// Refuses requests that are meant for somebody else with 421, and those that do not say it as
/// RFC 9112 demands with 400.
pub(super) async fn check(State(hosts): State<Hosts>, request: Request, next: Next) -> Response {
    match hosts.check(&request) {
        Err(HostError::Unclear(message)) => ApiError::host(message).into_response(),
        Err(HostError::Misdirected) => ApiError::misdirected().into_response(),
        Ok(()) => next.run(request).await,
    }
}
