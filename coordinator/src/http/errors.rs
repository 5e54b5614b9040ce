//! Errors in OpenAI's form. Clients decide by status and `type` whether to try again, so both are
//! chosen with care: `invalid_request_error` is never retried, whatever the status.

use std::borrow::Cow;

use axum::Json;
use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
pub(super) use node::observe::refusal_cause as cause_of;
use serde_json::{Value, json};

use crate::request::RequestError;

/// When a client may come again after a missing pipeline or memory, in seconds.
const RETRY_AFTER_S: u64 = 1;

/// Tells OpenAI's clients, who go by the status, that another try brings the same.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// For what is no field's fault.
pub(super) const NO_FIELD: Option<&str> = None;

/// An error on its way to a client.
#[derive(Debug)]
pub(crate) struct ApiError {
    pub(super) status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    parameter: Option<Cow<'static, str>>,
    message: String,
    /// An answer was taken and broke off: counted there, and no refusal.
    broke_off: bool,
    /// When to come again, in seconds, where that is known better than by rule.
    retry_after_s: Option<u64>,
    /// Another try brings the same, whatever the status says.
    final_answer: bool,
}

impl ApiError {
    /// A parameter or the body is wrong.
    pub(super) fn invalid<P>(parameter: Option<P>, message: impl Into<String>) -> Self
    where
        P: Into<Cow<'static, str>>,
    {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "invalid_request_error",
            code: None,
            parameter: parameter.map(Into::into),
            message: message.into(),
            broke_off: false,
            retry_after_s: None,
            final_answer: true,
        }
    }

    /// A feature that is not there, and whose absence would change the answer.
    pub(super) fn unsupported(parameter: impl Into<Cow<'static, str>>, what: &str) -> Self {
        let message = format!("{what} is not supported by this server");
        Self { code: Some("unsupported_value"), ..Self::invalid(Some(parameter), message) }
    }

    /// Nothing is there.
    pub(super) fn not_found(message: &str) -> Self {
        Self {
            status: StatusCode::NOT_FOUND,
            kind: "not_found_error",
            ..Self::invalid(NO_FIELD, message)
        }
    }

    /// Another method was meant.
    pub(super) fn method_not_allowed() -> Self {
        let error = Self::invalid(NO_FIELD, "this method is not allowed here");
        Self { status: StatusCode::METHOD_NOT_ALLOWED, ..error }
    }

    /// The request is meant for another host.
    pub(super) fn misdirected() -> Self {
        let message = "this server does not answer to that host name; use localhost or its address";
        Self { status: StatusCode::MISDIRECTED_REQUEST, ..Self::invalid(NO_FIELD, message) }
    }

    /// As many requests are open as may be.
    pub(super) fn busy(limit: usize) -> Self {
        let message =
            format!("{limit} requests are open already, the most that may; try again later");
        Self {
            status: StatusCode::TOO_MANY_REQUESTS,
            kind: "rate_limit_error",
            code: Some("rate_limit_exceeded"),
            final_answer: false,
            ..Self::invalid(NO_FIELD, message)
        }
    }

    /// More token ids than the context holds, of which the rest was not read.
    pub(super) fn context_length(parameter: Option<String>, context: usize) -> Self {
        let message = format!(
            "This model's maximum context length is {context} tokens. However, the prompt has \
             more token ids than that."
        );
        Self { code: Some("context_length_exceeded"), ..Self::invalid(parameter, message) }
    }

    /// The body is compressed or otherwise encoded.
    pub(super) fn encoded(encoding: &str) -> Self {
        let message = format!("the body has content-encoding {encoding}; send it without one");
        Self { status: StatusCode::UNSUPPORTED_MEDIA_TYPE, ..Self::invalid(NO_FIELD, message) }
    }

    /// `Host` is missing, given twice, or is another than the target's.
    pub(super) fn host(message: &'static str) -> Self {
        Self::invalid(NO_FIELD, message)
    }

    /// The body is longer than allowed.
    pub(super) fn too_large(limit_bytes: usize) -> Self {
        Self {
            status: StatusCode::PAYLOAD_TOO_LARGE,
            kind: "request_too_large",
            ..Self::invalid(NO_FIELD, format!("the body may have {limit_bytes} bytes"))
        }
    }

    /// The body is not JSON.
    pub(super) fn media_type() -> Self {
        Self {
            status: StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ..Self::invalid(NO_FIELD, "the body must be application/json")
        }
    }

    /// The client stopped sending.
    pub(super) fn slow_body() -> Self {
        Self {
            status: StatusCode::REQUEST_TIMEOUT,
            kind: "timeout_error",
            final_answer: false,
            ..Self::invalid(NO_FIELD, "the body did not arrive in time")
        }
    }

    /// The answer broke off that had been taken.
    pub(super) fn broke_off(error: RequestError) -> Self {
        Self { broke_off: true, ..Self::from(error) }
    }

    /// What it is counted under: of a closed set.
    fn cause(&self) -> &'static str {
        match self.code {
            Some(code) => code,
            None => cause_of(self.status),
        }
    }

    /// `{"error": …}`, as a body and as the last event of a stream.
    pub(super) fn body(&self) -> Value {
        json!({
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.parameter,
                "code": self.code,
            }
        })
    }
}

impl From<RequestError> for ApiError {
    /// The one map from errors to HTTP.
    fn from(error: RequestError) -> Self {
        let (status, kind, code) = match &error {
            RequestError::Invalid { .. } => {
                (StatusCode::BAD_REQUEST, "invalid_request_error", None)
            }
            RequestError::ContextLength { .. } | RequestError::PromptBytes { .. } => {
                let code = "context_length_exceeded";
                (StatusCode::BAD_REQUEST, "invalid_request_error", Some(code))
            }
            RequestError::UnknownModel { .. } => {
                (StatusCode::NOT_FOUND, "not_found_error", Some("model_not_found"))
            }
            RequestError::ClassMismatch { .. } => {
                (StatusCode::CONFLICT, "conflict_error", Some("class_mismatch"))
            }
            RequestError::Full { .. }
            | RequestError::FullOfTokens { .. }
            | RequestError::NoMemory => {
                (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("rate_limit_exceeded"))
            }
            RequestError::Unavailable { .. } | RequestError::Lost { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, "overloaded_error", Some("service_unavailable"))
            }
            RequestError::TimedOut { .. } => {
                (StatusCode::GATEWAY_TIMEOUT, "timeout_error", Some("timeout"))
            }
            RequestError::SlowReader { .. } | RequestError::Internal { .. } => {
                (StatusCode::INTERNAL_SERVER_ERROR, "server_error", None)
            }
        };
        let parameter = match &error {
            RequestError::Invalid { parameter, .. } => Some(parameter.clone()),
            RequestError::UnknownModel { .. } => Some("model".into()),
            _ => None,
        };
        let retry_after_s = match &error {
            RequestError::Full { retry_after, .. }
            | RequestError::FullOfTokens { retry_after, .. } => Some(retry_after.as_secs()),
            _ => None,
        };
        let final_answer = match &error {
            RequestError::Full { .. }
            | RequestError::FullOfTokens { .. }
            | RequestError::NoMemory
            | RequestError::Unavailable { .. }
            | RequestError::Lost { .. }
            | RequestError::Internal { .. } => false,
            // Its own deadline is as short the next time, and its client reads as slowly.
            RequestError::TimedOut { .. } | RequestError::SlowReader { .. } => true,
            RequestError::Invalid { .. }
            | RequestError::ContextLength { .. }
            | RequestError::PromptBytes { .. }
            | RequestError::UnknownModel { .. }
            | RequestError::ClassMismatch { .. } => true,
        };
        let message = node::Chain(&error).to_string();
        let broke_off = false;
        Self { status, kind, code, parameter, message, broke_off, retry_after_s, final_answer }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let refused =
            if self.broke_off { Outcome::BrokeOff } else { Outcome::Refused(self.cause()) };
        response.extensions_mut().insert(refused);
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            let seconds = self.retry_after_s.unwrap_or(RETRY_AFTER_S);
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        if self.final_answer {
            response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        response
    }
}

/// What became of a request that ends in an error; goes with the response to where it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// No answer was taken, for this cause.
    Refused(&'static str),
    /// One was, and broke off.
    BrokeOff,
}

/// A handler panicked: the process lives on and says so.
pub(super) fn panicked() -> axum::http::Response<Body> {
    tracing::error!("a request's handler panicked");
    let message = "the server failed on this request".to_owned();
    ApiError::from(RequestError::Internal { message }).into_response()
}
