//! The messages of one gRPC call, passed on whole or not at all: what a client has begun and not
//! finished is counted, bounded, and ends in time.
//!
//! A frame of HTTP/2 data holds parts of messages; a message is a flag, four bytes of length and
//! its body. Parts are held here until the message is whole, so that the decoder behind, which
//! makes room for a message when it sees its length, never waits for a client.

use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use bytes::BytesMut;
use http_body::Frame;
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::Status;

use super::requests::Arrival;

/// Flag and length, before each message.
const PREFIX_BYTES: usize = 5;

/// Parts shorter than this are copied together: each keeps the buffer alive that it was read into.
const SMALL_PART_BYTES: usize = 4 << 10;

/// What all calls of one server have begun and not finished.
#[derive(Debug)]
pub(super) struct Unfinished {
    limit_bytes: usize,
    limit_messages: usize,
    inner: Mutex<Begun>,
}

#[derive(Debug, Default)]
struct Begun {
    bytes: usize,
    next: u64,
    /// Calls that never finished a message come first; of equals the oldest.
    messages: BTreeMap<(bool, u64), Message>,
}

/// One message that has begun.
#[derive(Debug)]
struct Message {
    bytes: usize,
    /// Tells its call that it made room for another.
    cut: CancellationToken,
    /// The request, where nobody may be reading that.
    request: Option<Arrival>,
}

impl Unfinished {
    /// At most so many bytes in so many messages. One alone is never cut, so `limit_bytes` is that
    /// of the largest message at least.
    pub(super) fn new(limit_bytes: usize, limit_messages: usize) -> Arc<Self> {
        Arc::new(Self { limit_bytes, limit_messages, inner: Mutex::default() })
    }

    fn begun(&self) -> MutexGuard<'_, Begun> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A message begins, of a call that has finished one before (`proven`) or has not. `request` is that of a
    /// call which nobody may be reading when it is cut.
    fn begin(self: &Arc<Self>, proven: bool, request: Option<Arrival>) -> Ticket {
        let mut begun = self.begun();
        begun.next += 1;
        let key = (proven, begun.next);
        let cut = CancellationToken::new();
        begun.messages.insert(key, Message { bytes: 0, cut: cut.clone(), request });
        self.cut_beyond_limits(&mut begun);
        Ticket { all: Arc::clone(self), key, cut: Box::pin(cut.cancelled_owned()) }
    }

    fn cut_beyond_limits(&self, begun: &mut Begun) {
        while begun.messages.len() > 1
            && (begun.messages.len() > self.limit_messages || begun.bytes > self.limit_bytes)
        {
            let Some((_, message)) = begun.messages.pop_first() else { return };
            begun.bytes -= message.bytes;
            message.cut.cancel();
            // A client that takes nothing of the answer keeps whoever serves it from hearing of that.
            message.request.iter().for_each(Arrival::unwant);
        }
    }
}

/// One message that has begun; forgotten when dropped.
#[derive(Debug)]
struct Ticket {
    all: Arc<Unfinished>,
    key: (bool, u64),
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Ticket {
    /// More of it came.
    fn add(&self, more: usize) {
        let mut begun = self.all.begun();
        let Some(message) = begun.messages.get_mut(&self.key) else { return };
        message.bytes += more;
        begun.bytes += more;
        self.all.cut_beyond_limits(&mut begun);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut begun = self.all.begun();
        if let Some(message) = begun.messages.remove(&self.key) {
            begun.bytes -= message.bytes;
        }
    }
}

/// A call of a method whose clients may be quiet before their first message. Until the service knows its
/// caller it is a stranger's, whatever it sends: its connection makes room for others, and beyond the most
/// that may be open the oldest such calls are cut.
#[derive(Clone, Debug)]
pub struct QuietCall(Arc<Mutex<Option<Stranger>>>);

#[derive(Debug)]
struct Stranger {
    ticket: Ticket,
    arrival: Option<Arrival>,
}

impl QuietCall {
    /// One more beside those of `strangers`.
    pub(super) fn begin(strangers: &Arc<Unfinished>, arrival: Option<Arrival>) -> Self {
        let ticket = strangers.begin(false, arrival.clone());
        Self(Arc::new(Mutex::new(Some(Stranger { ticket, arrival }))))
    }

    fn stranger(&self) -> MutexGuard<'_, Option<Stranger>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The service knows who calls: from now on the call may be quiet for as long as it lasts.
    pub fn admit(&self) {
        let stranger = self.stranger().take();
        if let Some(arrival) = stranger.and_then(|stranger| stranger.arrival) {
            arrival.mark();
        }
    }

    /// Whether it was cut to make room for another.
    fn poll_cut(&self, context: &mut Context<'_>) -> bool {
        let mut stranger = self.stranger();
        let cut = stranger.as_mut().map(|stranger| stranger.ticket.cut.as_mut().poll(context));
        cut.is_some_and(|cut| cut.is_ready())
    }
}

/// How long and how large messages may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct MessageLimits {
    /// Bytes of one message.
    pub(super) message_bytes: usize,
    /// From the head of the call to the first byte of its first message; absent: as long as it
    /// likes.
    pub(super) first: Option<Duration>,
    /// From a message's first byte to its last.
    pub(super) whole: Duration,
    /// The request is one message: what follows it is not read. Waiting for the client to say that
    /// nothing does would give it the call for as long as it likes.
    pub(super) single: bool,
}

/// The body of one call.
pub(super) struct Messages {
    body: Body,
    limits: MessageLimits,
    all: Arc<Unfinished>,
    arrival: Option<Arrival>,
    quiet: Option<QuietCall>,
    /// Whole messages and what follows them, for the decoder.
    ready: VecDeque<Frame<Bytes>>,
    partial: Partial,
    /// There while a message is unfinished, and before the first if that has a deadline.
    ticket: Option<Ticket>,
    deadline: Option<Pin<Box<Sleep>>>,
    /// A message has been whole.
    proven: bool,
    ended: bool,
}

/// The message that is arriving.
#[derive(Debug, Default)]
struct Partial {
    prefix: [u8; PREFIX_BYTES],
    /// Bytes of the prefix that are here.
    prefix_bytes: usize,
    /// Bytes of the message that are still to come, once the prefix is whole.
    missing: usize,
    parts: VecDeque<Bytes>,
    small: BytesMut,
}

impl Partial {
    fn has_begun(&self) -> bool {
        self.prefix_bytes > 0
    }

    /// Holds a part, its prefix or what follows.
    fn hold(&mut self, part: Bytes) {
        if part.len() < SMALL_PART_BYTES {
            self.small.extend_from_slice(&part);
            return;
        }
        self.flush();
        self.parts.push_back(part);
    }

    fn flush(&mut self) {
        if !self.small.is_empty() {
            self.parts.push_back(std::mem::take(&mut self.small).freeze());
        }
    }

    /// Everything of the message that is now whole.
    fn take(&mut self) -> VecDeque<Bytes> {
        self.flush();
        self.prefix_bytes = 0;
        std::mem::take(&mut self.parts)
    }
}

impl Messages {
    pub(super) fn new(
        body: Body,
        limits: MessageLimits,
        all: &Arc<Unfinished>,
        arrival: Option<Arrival>,
    ) -> Self {
        let ticket = limits.first.map(|_| all.begin(false, None));
        let deadline = limits.first.map(|first| Box::pin(sleep(first)));
        Self {
            body,
            limits,
            all: Arc::clone(all),
            arrival,
            quiet: None,
            ready: VecDeque::new(),
            partial: Partial::default(),
            ticket,
            deadline,
            proven: false,
            ended: false,
        }
    }

    /// The same of a quiet call: it is for the service to say that it has arrived.
    pub(super) fn of_quiet(self, quiet: QuietCall) -> Self {
        Self { arrival: None, quiet: Some(quiet), ..self }
    }

    /// Waits until the first message is whole, or the client has none.
    ///
    /// # Errors
    ///
    /// What the call must end with: too slow, too large, cut to make room, broken.
    pub(super) async fn first(&mut self) -> Result<(), Status> {
        poll_fn(|context| self.poll_ready(context)).await
    }

    /// Reads until there is something for the decoder, or the end.
    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        while self.ready.is_empty() && !self.ended && !self.is_complete() {
            let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) else {
                return self.poll_trouble(context);
            };
            match frame {
                None => {
                    self.ended = true;
                    self.settle();
                    if self.partial.has_begun() {
                        let words = "the call ended in the middle of a message";
                        return Poll::Ready(Err(Status::invalid_argument(words)));
                    }
                }
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.feed(data)?,
                    Err(trailers) => self.ready.push_back(trailers),
                },
                Some(Err(error)) => return Poll::Ready(Err(Status::from_error(error.into()))),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Whether all of the request that is wanted is here.
    fn is_complete(&self) -> bool {
        self.limits.single && self.proven
    }

    /// Nothing came: is it too late, or was this message cut?
    fn poll_trouble(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        if self.quiet.as_ref().is_some_and(|quiet| quiet.poll_cut(context)) {
            let words =
                "too many calls of callers that are not known: this one made room for another";
            // Not RESOURCE_EXHAUSTED, which here says that a message is too large.
            return Poll::Ready(Err(Status::aborted(words)));
        }
        if let Some(ticket) = &mut self.ticket
            && ticket.cut.as_mut().poll(context).is_ready()
        {
            let words = "too many unfinished messages: this one made room for another";
            return Poll::Ready(Err(Status::resource_exhausted(words)));
        }
        let Some(deadline) = &mut self.deadline else { return Poll::Pending };
        ready!(deadline.as_mut().poll(context));
        let words = match self.partial.has_begun() {
            true => format!("a message was not whole within {:?}", self.limits.whole),
            false => format!("no message came within {:?}", self.limits.first.unwrap_or_default()),
        };
        Poll::Ready(Err(Status::deadline_exceeded(words)))
    }

    /// Takes a frame's data: parts of messages.
    fn feed(&mut self, mut data: Bytes) -> Result<(), Status> {
        while !data.is_empty() && !self.is_complete() {
            if !self.partial.has_begun() {
                // Most messages are whole at once.
                if let Some(whole) = whole_at_start(&mut data, self.limits.message_bytes) {
                    self.ready.push_back(Frame::data(whole));
                    self.proven = true;
                    self.settle();
                    continue;
                }
                self.begin();
            }
            if self.partial.prefix_bytes < PREFIX_BYTES {
                let start = self.partial.prefix_bytes;
                let part = data.split_to(data.len().min(PREFIX_BYTES - start));
                self.partial.prefix[start..start + part.len()].copy_from_slice(&part);
                self.partial.prefix_bytes += part.len();
                self.hold(part);
                if self.partial.prefix_bytes < PREFIX_BYTES {
                    break;
                }
                let [_, length @ ..] = self.partial.prefix;
                let length = u32::from_be_bytes(length) as usize;
                let limit = self.limits.message_bytes;
                if length > limit {
                    let words = format!("a message has {length} bytes, the most is {limit}");
                    return Err(Status::out_of_range(words));
                }
                self.partial.missing = length;
            }
            let part = data.split_to(data.len().min(self.partial.missing));
            self.partial.missing -= part.len();
            if !part.is_empty() {
                self.hold(part);
            }
            if self.partial.missing == 0 {
                self.ready.extend(self.partial.take().into_iter().map(Frame::data));
                self.proven = true;
                self.settle();
            }
        }
        Ok(())
    }

    fn hold(&mut self, part: Bytes) {
        if let Some(ticket) = &self.ticket {
            ticket.add(part.len());
        }
        self.partial.hold(part);
    }

    /// The first byte of a message is here.
    fn begin(&mut self) {
        if self.ticket.is_none() {
            self.ticket = Some(self.all.begin(self.proven, None));
        }
        let whole = self.limits.whole;
        match &mut self.deadline {
            Some(deadline) => deadline.as_mut().reset(Instant::now() + whole),
            None => self.deadline = Some(Box::pin(sleep(whole))),
        }
    }

    /// Nothing is unfinished.
    fn settle(&mut self) {
        self.ticket = None;
        self.deadline = None;
        if let Some(arrival) = self.arrival.take() {
            arrival.mark();
        }
    }
}

/// The message that `data` begins with, if it is whole and not too large.
fn whole_at_start(data: &mut Bytes, limit: usize) -> Option<Bytes> {
    let [_, length @ ..] = *data.first_chunk::<PREFIX_BYTES>()?;
    let length = u32::from_be_bytes(length) as usize;
    (length <= limit && data.len() - PREFIX_BYTES >= length)
        .then(|| data.split_to(PREFIX_BYTES + length))
}

impl HttpBody for Messages {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Err(status) = ready!(self.poll_ready(context)) {
            self.ended = true;
            self.ticket = None;
            self.partial = Partial::default();
            return Poll::Ready(Some(Err(status)));
        }
        Poll::Ready(self.ready.pop_front().map(Ok))
    }
}

#[cfg(test)]
mod tests;
