//! The body of a request: bounded in bytes and in time, and JSON.

use std::time::Duration;

use axum::extract::Request;
use axum::http::header;
use futures::StreamExt;
use serde::de::DeserializeOwned;

use super::errors::ApiError;

/// How long a body may take to arrive: a full one at less than 1 Mbit/s.
const BODY_PATIENCE: Duration = Duration::from_secs(30);

/// Reads and parses a body.
///
/// # Errors
///
/// 413, 415, 408 or 400, in this order.
pub(super) async fn read_json<T: DeserializeOwned>(
    request: Request,
    limit_bytes: usize,
) -> Result<T, ApiError> {
    // A web page of another origin can send every other type without asking.
    let media_type = request.headers().get(header::CONTENT_TYPE);
    let is_json = media_type
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .is_some_and(|essence| essence.trim().eq_ignore_ascii_case("application/json"));
    if !is_json {
        return Err(ApiError::media_type());
    }
    let read = read(request, limit_bytes);
    let bytes =
        tokio::time::timeout(BODY_PATIENCE, read).await.map_err(|_| ApiError::slow_body())??;
    serde_json::from_slice(&bytes).map_err(|error| {
        ApiError::invalid(None, format!("the body is not a valid request: {error}"))
    })
}

async fn read(request: Request, limit_bytes: usize) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    let mut frames = request.into_body().into_data_stream();
    while let Some(frame) = frames.next().await {
        let frame =
            frame.map_err(|_| ApiError::invalid(None, "the body broke off before its end"))?;
        if bytes.len() + frame.len() > limit_bytes {
            return Err(ApiError::too_large(limit_bytes));
        }
        bytes.extend_from_slice(&frame);
    }
    Ok(bytes)
}
