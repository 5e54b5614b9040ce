//! What calls of a gRPC server may do: a call takes a place among those that are served only when
//! its first message is whole, each method has its own limits, and beyond them the answer comes at
//! once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::middleware::{self, Next};
use axum::response::Response;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tonic::Status;

use super::messages::{MessageLimits, Messages, QuietCall, Unfinished};
use super::requests::{Arrival, Held};

/// How many calls of a method, or of several that share it, are served at once.
#[derive(Clone, Debug)]
pub struct Concurrency {
    permits: Arc<Semaphore>,
    limit: usize,
    until_ended: bool,
}

impl Concurrency {
    /// At most `limit` calls between their first message and the beginning of their answer.
    pub fn until_answered(limit: usize) -> Self {
        Self { permits: Arc::new(Semaphore::new(limit)), limit, until_ended: false }
    }

    /// At most `limit` calls between their first message and the end of their answer.
    pub fn until_ended(limit: usize) -> Self {
        Self { until_ended: true, ..Self::until_answered(limit) }
    }

    fn acquire(&self) -> Result<OwnedSemaphorePermit, Status> {
        let limit = self.limit;
        Arc::clone(&self.permits)
            .try_acquire_owned()
            .map_err(|_| Status::resource_exhausted(format!("{limit} such calls are open already")))
    }
}

/// One method and its limits.
#[derive(Clone, Debug)]
pub struct Method {
    path: &'static str,
    message_bytes: usize,
    /// Messages go on after the first, and the call is served before it.
    streams: bool,
    /// A client may wait before it sends its first message.
    waits: bool,
    concurrency: Option<Concurrency>,
}

impl Method {
    /// A method whose request is one message of at most so many bytes.
    pub fn unary(path: &'static str, message_bytes: usize) -> Self {
        Self { path, message_bytes, streams: false, waits: false, concurrency: None }
    }

    /// A method whose request is a stream of messages.
    pub fn streaming(path: &'static str, message_bytes: usize) -> Self {
        Self { streams: true, ..Self::unary(path, message_bytes) }
    }

    /// Lets clients wait for as long as they like before their first message, once the service has said
    /// with the request's [`QuietCall`] that it knows them.
    pub fn with_quiet_clients(self) -> Self {
        Self { waits: true, ..self }
    }

    /// Bounds how many calls are served at once.
    pub fn with_concurrency(self, concurrency: &Concurrency) -> Self {
        Self { concurrency: Some(concurrency.clone()), ..self }
    }
}

/// What the calls of one server may do together.
#[derive(Clone, Copy, Debug)]
pub struct CallLimits {
    /// From the head of a call to the first byte of its first message.
    pub first_message: Duration,
    /// From the first byte of a message to its last.
    pub whole_message: Duration,
    /// Bytes of all messages that have begun and are not whole: as many as the largest message at
    /// least. Beyond it the oldest are cut.
    pub unfinished_bytes: usize,
    /// Messages that have begun and are not whole, and calls that wait for their first. Beyond it
    /// the oldest are cut.
    pub unfinished_messages: usize,
    /// From the first message to the beginning of the answer; a client's `grpc-timeout` may make it
    /// shorter. Absent: as long as it takes.
    pub answer: Option<Duration>,
}

/// Calls of methods that may be quiet, of callers whom the service does not know: whoever it will know in a
/// moment has a handful. Beyond it the oldest are cut.
const QUIET_STRANGERS: usize = 256;

/// Sends of one watcher of health, or of one reader of reflection, are small.
const SMALL_MESSAGE_BYTES: usize = 16 << 10;

/// Watchers of health, and readers of reflection, of one server.
const WATCHERS: usize = 64;

/// The methods that every gRPC server has: health and reflection.
fn common_methods() -> Vec<Method> {
    let watchers = Concurrency::until_ended(WATCHERS);
    let readers = Concurrency::until_ended(WATCHERS);
    let reflection = |path| Method::streaming(path, SMALL_MESSAGE_BYTES).with_concurrency(&readers);
    vec![
        Method::unary("/grpc.health.v1.Health/Check", SMALL_MESSAGE_BYTES),
        Method::unary("/grpc.health.v1.Health/Watch", SMALL_MESSAGE_BYTES)
            .with_concurrency(&watchers),
        reflection("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"),
        reflection("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"),
    ]
}

/// `router` with these limits. Health and reflection are added to `methods`; calls of any other
/// method are answered UNIMPLEMENTED at once.
pub fn with_limits(router: Router, methods: Vec<Method>, limits: CallLimits) -> Router {
    let methods = methods.into_iter().chain(common_methods());
    let calls = Calls {
        methods: methods.map(|method| (method.path, method)).collect(),
        unfinished: Unfinished::new(limits.unfinished_bytes, limits.unfinished_messages),
        strangers: Unfinished::new(usize::MAX, QUIET_STRANGERS),
        limits,
    };
    router.layer(middleware::from_fn_with_state(Arc::new(calls), within_limits))
}

struct Calls {
    methods: HashMap<&'static str, Method>,
    unfinished: Arc<Unfinished>,
    /// Quiet calls of callers that are not known.
    strangers: Arc<Unfinished>,
    limits: CallLimits,
}

async fn within_limits(State(calls): State<Arc<Calls>>, request: Request, next: Next) -> Response {
    calls.serve(request, next).await.unwrap_or_else(|status| status.into_http())
}

impl Calls {
    async fn serve(&self, request: Request, next: Next) -> Result<Response, Status> {
        let (mut parts, body) = request.into_parts();
        let Some(method) = self.methods.get(parts.uri.path()) else {
            return Err(Status::unimplemented("unknown method"));
        };
        let limits = MessageLimits {
            message_bytes: method.message_bytes,
            first: (!method.waits).then_some(self.limits.first_message),
            whole: self.limits.whole_message,
            single: !method.streams,
        };
        let arrival = parts.extensions.remove::<Arrival>();
        let mut messages = Messages::new(body, limits, &self.unfinished, arrival.clone());
        if method.waits {
            let quiet = QuietCall::begin(&self.strangers, arrival);
            parts.extensions.insert(quiet.clone());
            messages = messages.of_quiet(quiet);
        }
        if !method.streams {
            messages.first().await?;
        }
        let permit = method.concurrency.as_ref().map(Concurrency::acquire).transpose()?;
        let within = shorter(grpc_timeout(&parts.headers), self.limits.answer);
        let answer = next.run(Request::from_parts(parts, Body::new(messages)));
        let response = match within {
            None => answer.await,
            Some(within) => timeout(within, answer).await.map_err(|_| {
                Status::deadline_exceeded(format!("no answer began within {within:?}"))
            })?,
        };
        Ok(match (permit, &method.concurrency) {
            (Some(permit), Some(concurrency)) if concurrency.until_ended => {
                response.map(|body| Body::new(Held::new(body, permit)))
            }
            _ => response,
        })
    }
}

fn shorter(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    one.into_iter().chain(other).min()
}

/// How long the client waits for an answer, if it says so: up to eight digits and a unit. What is
/// not that is passed over, as gRPC servers do.
fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn timeouts_of_clients_are_read() {
        let read = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", HeaderValue::from_static(text));
            grpc_timeout(&headers)
        };
        assert_eq!(read("3H"), Some(Duration::from_secs(3 * 3600)));
        assert_eq!(read("2M"), Some(Duration::from_secs(120)));
        assert_eq!(read("99999999S"), Some(Duration::from_secs(99_999_999)));
        assert_eq!(read("13m"), Some(Duration::from_millis(13)));
        assert_eq!(read("8u"), Some(Duration::from_micros(8)));
        assert_eq!(read("8n"), Some(Duration::from_nanos(8)));
        for wrong in ["", "S", "82f", "123456789H", "-1S", "1"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        assert_eq!(grpc_timeout(&HeaderMap::new()), None);
        let second = Duration::from_secs(1);
        assert_eq!(shorter(Some(second), Some(2 * second)), Some(second));
        assert_eq!(shorter(None, Some(second)), Some(second));
    }
}
