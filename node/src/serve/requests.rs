//! Which requests of a connection are open, and which have arrived: noted round the router.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderValue, Request, Response, Version, header};
use http_body::{Frame, SizeHint};
use tokio::time::Instant;
use tonic::transport::server::TcpConnectInfo;
use tower::{Service, ServiceExt};

use super::table::{Activity, Call};

/// Clients are told to let go of an idle connection this much before we do, so that none sends a
/// request into a connection that is being closed.
const KEEP_ALIVE_MARGIN: Duration = Duration::from_secs(5);

/// Says that a request is here, for whoever knows better than the end of its body: a stream of
/// messages has arrived with the first.
#[derive(Clone, Debug)]
pub(super) struct Arrival(Arc<Call>);

impl Arrival {
    pub(super) fn mark(&self) {
        self.0.arrived();
        // Told to end just before: it goes on all the same.
        self.0.want();
    }

    /// The request is to end, and whoever serves it has been told.
    pub(super) fn unwant(&self) {
        self.0.unwant();
    }
}

/// When the first byte of a request came: beside it, in its extensions. Over HTTP/2, where a connection's
/// bytes are those of many requests, and for one that was sent before the last was answered, the moment when
/// its head was whole.
#[derive(Clone, Copy, Debug)]
pub struct FirstByte(pub Instant);

/// The router of one connection.
#[derive(Clone)]
pub(super) struct Tracked {
    router: Router,
    activity: Arc<Activity>,
    peer: TcpConnectInfo,
    keep_alive: HeaderValue,
}

impl Tracked {
    pub(super) fn new(
        router: Router,
        activity: Arc<Activity>,
        (local, remote): (Option<SocketAddr>, SocketAddr),
        idle: Duration,
    ) -> Self {
        let seconds = idle.saturating_sub(KEEP_ALIVE_MARGIN).as_secs();
        let keep_alive = HeaderValue::from_str(&format!("timeout={seconds}"))
            .unwrap_or(HeaderValue::from_static("timeout=1"));
        let peer = TcpConnectInfo { local_addr: local, remote_addr: Some(remote) };
        Self { router, activity, peer, keep_alive }
    }
}

impl<B> Service<Request<B>> for Tracked
where
    B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<axum::BoxError>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let call = Call::begin(&self.activity);
        if request.body().is_end_stream() {
            call.arrived();
        }
        let mut request = request.map(|body| Body::new(Arriving { body, call: Arc::clone(&call) }));
        request.extensions_mut().insert(self.peer.clone());
        request.extensions_mut().insert(Arrival(Arc::clone(&call)));
        request.extensions_mut().insert(FirstByte(call.first_byte));
        let is_http1 = request.version() < Version::HTTP_2;
        let keep_alive = is_http1.then(|| self.keep_alive.clone());
        let router = self.router.clone();
        Box::pin(async move {
            let mut response = router.oneshot(request).await?;
            if let Some(keep_alive) = keep_alive {
                response
                    .headers_mut()
                    .entry(header::HeaderName::from_static("keep-alive"))
                    .or_insert(keep_alive);
            }
            // Until the first part is asked for: with a shut window it never is.
            call.handed_over(0);
            Ok(response.map(|body| Body::new(Answer { body, call })))
        })
    }
}

/// A request's body, whose end is noted.
struct Arriving<B> {
    body: B,
    call: Arc<Call>,
}

impl<B: HttpBody<Data = Bytes> + Unpin> HttpBody for Arriving<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if frame.is_none() || self.body.is_end_stream() {
            self.call.arrived();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body: its request is open until it has ended.
struct Answer {
    body: Body,
    call: Arc<Call>,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.call.taken();
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        let (bytes, is_last) = match &frame {
            Some(Ok(frame)) => {
                let bytes = frame.data_ref().map_or(0, Bytes::len);
                (bytes, frame.is_trailers() || self.body.is_end_stream())
            }
            Some(Err(_)) | None => (0, true),
        };
        match is_last {
            // Not only when hyper lets go of it: its client may have it all by then.
            true => self.call.end_with(bytes),
            false => self.call.handed_over(bytes),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body and what is held until it has ended.
pub(super) struct Held<T> {
    body: Body,
    _until_ended: T,
}

impl<T> Held<T> {
    pub(super) fn new(body: Body, until_ended: T) -> Self {
        Self { body, _until_ended: until_ended }
    }
}

impl<T: Unpin> HttpBody for Held<T> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::super::table::{Admission, Table};
    use super::*;

    #[tokio::test]
    async fn a_request_ends_with_the_last_part_of_its_answer_and_not_when_that_is_dropped() {
        let table = Table::new("test", 1, Duration::ZERO);
        let Admission::Entered(place) = table.admit(Instant::now()) else { panic!("it is empty") };
        let call = Call::begin(&place.activity);
        call.arrived();
        let mut answer = Answer { body: Body::from("all"), call };
        assert!(place.activity.quiet_since().is_none(), "it is being answered");
        let part = poll_fn(|context| Pin::new(&mut answer).poll_frame(context)).await;
        assert!(part.is_some());
        assert!(place.activity.quiet_since().is_some(), "hyper may hold on to it");
        drop(answer);
        assert!(place.activity.quiet_since().is_some());
    }
}
