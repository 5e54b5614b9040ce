//! The body of a request: bounded in bytes and in time, and JSON. It is read here and parsed on a
//! thread that may compute, a large one on a thread of low priority; the memory of all bodies together
//! is bounded.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::http::{HeaderMap, header};
use futures::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::arriving::Arriving;
use super::errors::{ApiError, NO_FIELD};
use super::json::{self, FromBody};
use crate::background;
use crate::memory::{Memory, Room, SMALL_BYTES};
use crate::request::RequestError;

/// How long a body may take to arrive: a full one at less than 1 Mbit/s.
const BODY_PATIENCE: Duration = Duration::from_secs(30);

/// Bodies that are parsed at once, of the small and of the large ones: more only take turns on the
/// same cores. Small ones have turns of their own and so never wait for large ones.
const PARSED_AT_ONCE: usize = 2;

/// What all bodies share.
#[derive(Debug)]
pub(super) struct Bodies {
    limit_bytes: usize,
    context: usize,
    memory: Arc<Memory>,
    arriving: Arc<Arriving>,
    /// Of requests whose bodies are here.
    open: Arc<Semaphore>,
    open_limit: usize,
    parsing_small: Arc<Semaphore>,
    parsing_large: Arc<Semaphore>,
}

/// What was read of a body; the memory it takes is free for others when `room` is dropped.
#[derive(Debug)]
pub(super) struct Held<T> {
    pub(super) value: T,
    pub(super) room: Room,
    /// Its place among the open requests.
    pub(super) place: OwnedSemaphorePermit,
}

impl Bodies {
    /// Bodies of at most `limit_bytes` that share `memory`, of at most `open` requests, for a model of
    /// `context` tokens. As many more may be arriving.
    pub(super) fn new(
        limit_bytes: usize,
        context: usize,
        memory: Arc<Memory>,
        open: usize,
    ) -> Self {
        Self {
            arriving: Arriving::new(open, limit_bytes),
            open: Arc::new(Semaphore::new(open)),
            open_limit: open,
            limit_bytes,
            context,
            memory,
            parsing_small: Arc::new(Semaphore::new(PARSED_AT_ONCE)),
            parsing_large: Arc::new(Semaphore::new(PARSED_AT_ONCE)),
        }
    }

    /// Reads and parses a body.
    ///
    /// # Errors
    ///
    /// 415, 413, 429, 408 or 400.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the body; parsing that began runs to its end and holds its room
    /// until then.
    pub(super) async fn read_json<T: FromBody + Send + 'static>(
        &self,
        request: Request,
    ) -> Result<Held<T>, ApiError> {
        check_type(request.headers())?;
        // Before anything is read, so that a client that waits for `100 Continue` keeps it.
        let declared = content_length(request.headers());
        if declared.is_some_and(|bytes| bytes > self.limit_bytes as u64) {
            return Err(ApiError::too_large(self.limit_bytes));
        }
        let read = tokio::time::timeout(BODY_PATIENCE, self.read(request, declared));
        let body = read.await.map_err(|_| ApiError::slow_body())??;
        // Only now: a client that sends half a body takes no place from others.
        let place = Arc::clone(&self.open)
            .try_acquire_owned()
            .map_err(|_| ApiError::busy(self.open_limit))?;
        let mut room = Room::default();
        room.grow(&self.memory, body.len())?;
        let is_large = body.len() > SMALL_BYTES;
        let turns = if is_large { &self.parsing_large } else { &self.parsing_small };
        let turn = Arc::clone(turns).acquire_owned().await.map_err(|_| failed())?;
        let context = self.context;
        let parse = move || {
            let _turn = turn;
            json::parse::<T>(&body, context).map(|value| Held { value, room, place })
        };
        let parsed = match is_large {
            true => background::spawn(parse),
            false => tokio::task::spawn_blocking(parse),
        };
        parsed.await.map_err(|error| {
            tracing::error!(%error, "the parser panicked");
            failed()
        })?
    }

    async fn read(&self, request: Request, declared: Option<u64>) -> Result<Vec<u8>, ApiError> {
        let most = declared.map_or(self.limit_bytes, |bytes| bytes as usize);
        let mut bytes = Vec::new();
        let ticket = self.arriving.begin();
        let mut frames = request.into_body().into_data_stream();
        loop {
            let next = ticket.cut.run_until_cancelled(frames.next()).await;
            let Some(frame) = next.ok_or_else(ApiError::slow_body)? else { return Ok(bytes) };
            let frame =
                frame.map_err(|_| ApiError::invalid(NO_FIELD, "the request's body ended early"))?;
            let needed = bytes.len() + frame.len();
            if needed > self.limit_bytes {
                return Err(ApiError::too_large(self.limit_bytes));
            }
            if needed > bytes.capacity() {
                // What was declared is not believed before it comes.
                let capacity = (2 * needed).min(most).max(needed);
                bytes.reserve_exact(capacity - bytes.len());
            }
            ticket.grown_to(needed);
            bytes.extend_from_slice(&frame);
        }
    }
}

/// A web page of another origin can send every type but JSON without asking.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let media_type = headers.get(header::CONTENT_TYPE);
    let is_json = media_type
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .is_some_and(|essence| essence.trim().eq_ignore_ascii_case("application/json"));
    if !is_json {
        return Err(ApiError::media_type());
    }
    for encoding in headers.get_all(header::CONTENT_ENCODING) {
        let encoding = encoding.to_str().unwrap_or("that is not ASCII").trim();
        if !encoding.is_empty() && !encoding.eq_ignore_ascii_case("identity") {
            let shown: String = encoding.chars().take(proto::limits::NAME_BYTES).collect();
            return Err(ApiError::encoded(&shown));
        }
    }
    Ok(())
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}

fn failed() -> ApiError {
    RequestError::Internal { message: "the server failed on this body".to_owned() }.into()
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, Bytes};
    use futures::stream;
    use std::convert::Infallible;

    use super::super::json::Object;
    use super::*;
    use crate::memory::LARGE_BYTES;

    /// The thread that parsed, and whether it is one for large work.
    struct ParsedBy(std::thread::ThreadId, bool);

    impl FromBody for ParsedBy {
        fn read<'de, A: serde::de::MapAccess<'de>>(
            mut object: Object<'_, A>,
        ) -> Result<Self, A::Error> {
            while object.name()?.is_some() {
                object.skip()?;
            }
            let thread = std::thread::current();
            Ok(Self(thread.id(), thread.name() == Some(background::THREAD_NAME)))
        }
    }

    fn request(headers: &[(&str, &str)], body: Body) -> Request {
        let mut request = Request::post("/").header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(body).unwrap()
    }

    fn body_of(bytes: usize) -> String {
        format!("{{\"x\":\"{}\"}}", "a".repeat(bytes - 8))
    }

    async fn status(bodies: &Bodies, request: Request) -> (u16, String) {
        let error = bodies.read_json::<ParsedBy>(request).await.unwrap_err();
        (error.status.as_u16(), error.body()["error"]["message"].to_string())
    }

    impl std::fmt::Debug for ParsedBy {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            self.0.fmt(f)
        }
    }

    #[tokio::test]
    async fn no_body_is_parsed_on_a_thread_of_the_runtime() {
        let bodies = Bodies::new(4 << 20, 16, Memory::for_requests(4 << 20), 64);
        // This runtime has one thread: the test's own.
        for bytes in [16, SMALL_BYTES, 1 << 20] {
            let held = bodies.read_json::<ParsedBy>(request(&[], body_of(bytes).into())).await;
            assert_ne!(held.unwrap().value.0, std::thread::current().id());
        }
    }

    #[tokio::test]
    async fn large_bodies_alone_are_parsed_on_threads_of_low_priority() {
        let bodies = Bodies::new(4 << 20, 16, Memory::for_requests(4 << 20), 64);
        for (bytes, is_large) in [(16, false), (SMALL_BYTES, false), (SMALL_BYTES + 1, true)] {
            let held = bodies.read_json::<ParsedBy>(request(&[], body_of(bytes).into())).await;
            assert_eq!(held.unwrap().value.1, is_large, "{bytes} bytes");
        }
    }

    #[tokio::test]
    async fn memory_of_large_bodies_is_bounded_and_small_ones_are_served_all_the_same() {
        let bodies = Bodies::new(4 << 20, 16, Memory::for_requests(4 << 20), 64);
        let full = || request(&[], body_of(4 << 20).into());
        let mut held = Vec::new();
        let refused = loop {
            match bodies.read_json::<ParsedBy>(full()).await {
                Ok(body) => held.push(body),
                Err(error) => break error,
            }
        };
        assert_eq!(refused.status.as_u16(), 429);
        assert_eq!(held.len(), LARGE_BYTES / (4 << 20));
        let small = bodies.read_json::<ParsedBy>(request(&[], body_of(SMALL_BYTES).into())).await;
        small.unwrap();
        held.pop();
        bodies.read_json::<ParsedBy>(full()).await.unwrap();
    }

    #[tokio::test]
    async fn half_bodies_take_no_place_and_the_oldest_makes_room() {
        let bodies = Bodies::new(4 << 20, 16, Memory::for_requests(4 << 20), 2);
        let half = |bytes: usize| {
            let first = stream::iter([Ok::<_, Infallible>(Bytes::from(vec![b' '; bytes]))]);
            let frames = first.chain(stream::pending());
            Box::pin(bodies.read_json::<ParsedBy>(request(&[], Body::from_stream(frames))))
        };
        let mut halves = [half(1), half(1), half(1)];
        for half in &mut halves {
            assert!(futures::poll!(half.as_mut()).is_pending());
        }
        assert_eq!((&mut halves[0]).await.unwrap_err().status.as_u16(), 408);
        // Two are open and none is here.
        bodies.read_json::<ParsedBy>(request(&[], "{}".into())).await.unwrap();
        drop(halves);
        // A dozen large ones that stop a byte before their end keep no other out.
        let bodies = Bodies::new(4 << 20, 16, Memory::for_requests(4 << 20), 64);
        let full = || request(&[], body_of(4 << 20).into());
        let half = |bytes: usize| {
            let first = stream::iter([Ok::<_, Infallible>(Bytes::from(vec![b' '; bytes]))]);
            let frames = first.chain(stream::pending());
            Box::pin(bodies.read_json::<ParsedBy>(request(&[], Body::from_stream(frames))))
        };
        let mut halves: Vec<_> = (0..12).map(|_| half((4 << 20) - 1)).collect();
        for half in &mut halves {
            assert!(futures::poll!(half.as_mut()).is_pending());
        }
        bodies.read_json::<ParsedBy>(full()).await.unwrap();
    }

    #[tokio::test]
    async fn what_cannot_be_taken_is_refused_before_it_is_read() {
        let bodies = Bodies::new(1 << 10, 16, Memory::for_requests(1 << 10), 64);
        let never = || {
            let frames =
                stream::poll_fn(|_| -> std::task::Poll<Option<Result<Bytes, Infallible>>> {
                    panic!("the body was read")
                });
            Body::from_stream(frames)
        };
        let oversize = request(&[("content-length", "1025"), ("expect", "100-continue")], never());
        assert_eq!(status(&bodies, oversize).await.0, 413);
        let (code, message) =
            status(&bodies, request(&[("content-encoding", "gzip")], never())).await;
        assert_eq!(code, 415);
        assert!(message.contains("gzip"), "{message}");
        let plain = request(&[("content-encoding", "identity")], "{}".into());
        bodies.read_json::<ParsedBy>(plain).await.unwrap();
        // One that does not say how long it is.
        let chunks =
            stream::iter((0..3).map(|_| Ok::<_, Infallible>(Bytes::from(vec![b' '; 500]))));
        assert_eq!(status(&bodies, request(&[], Body::from_stream(chunks))).await.0, 413);
    }
}
