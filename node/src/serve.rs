//! One accept loop for every server of a process: HTTP, gRPC and what watches it.
//!
//! ```text
//! accept ──▶ table: room? ──no──▶ a silent or idle one makes room, else a refusal at once
//!              │ yes
//!              ▼
//!        one task a connection: first bytes ── hyper ── Tracked (which requests are open) ── the router
//!              │
//!              └─ ends it: no request head in time, idle for long, told to make room, stopped
//! ```
//!
//! A connection is *silent* until the head of its first request is there, *idle* while no request
//! is open, and *busy* while one that has arrived is answered. Nothing that a client does or leaves
//! undone keeps the others out: whoever is not busy makes room for a newcomer, and so does a busy one
//! whose client reads nothing of what is there.

mod grpc;
mod messages;
mod refusal;
mod requests;
mod socket;
mod table;
#[cfg(test)]
mod tests;
mod thread;

use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

pub use grpc::{CallLimits, Concurrency, Method, with_limits};
pub use messages::QuietCall;
pub use requests::FirstByte;
use requests::Tracked;
use socket::Socket;
use table::{Admission, Cut, Place, Table};
pub use thread::on_own_thread;

/// After an accept that failed because the process lacks something (a descriptor, mostly): the
/// next one would fail as well.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How often a lasting trouble of one server is logged.
const WARN_INTERVAL: Duration = Duration::from_secs(10);

/// File descriptors that a server gives back when there are none: for a dozen connections to
/// workers, the registry and files.
const SPARE_DESCRIPTORS: usize = 12;

/// How long after a shortage of descriptors a server takes no more connections than it had left.
const SHORTAGE_MEMORY: Duration = Duration::from_secs(60);

/// How long a connection may take to close in order, before its socket is just closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Refusals that are being said at once; further newcomers are closed without a word.
const REFUSALS: usize = 16;

/// Bytes that hyper buffers of one HTTP/1 connection, and so of one request head.
const HTTP1_BUFFER_BYTES: usize = 64 << 10;

/// Flow control of each connection beyond [`Http2::roomy`]: what HTTP/2 starts with.
const SMALL_WINDOW_BYTES: u32 = (64 << 10) - 1;

/// Connections that the kernel holds for us to accept, at most what `net.core.somaxconn` allows: a burst
/// of as many as all places of a large server. Beyond it the kernel forgets connections of which their
/// clients believe that they are open, so that nobody cuts them, nor answers them for half a minute.
const BACKLOG: u32 = 4096;

/// A listener for [`serve`].
///
/// # Errors
///
/// What the operating system says.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A restarted server takes its address back although connections of the last one linger.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// What a server speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1 and HTTP/2, told apart by the first bytes.
    Http,
    /// HTTP/2 from the first byte.
    Grpc,
}

/// How long a client may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// From the accept to the end of the head of the first request, however the bytes come.
    pub first_request: Duration,
    /// From the first byte of a later HTTP/1 request to the end of its head.
    pub head: Duration,
    /// Without an open request, after the last.
    pub idle: Duration,
    /// Without reading any of what is written to it: its socket's buffers are full. So long it may also
    /// keep all its answers waiting in all, until it has taken 16 KiB.
    pub write: Duration,
    /// From the accept, without a whole request, before it makes room for another connection. So
    /// whoever sends at once is served, however many come and stay silent.
    pub grace: Duration,
}

impl Timeouts {
    /// What suits HTTP.
    pub const USUAL: Self = Self {
        // A client sends when it is connected; a lost packet is sent again within a second.
        first_request: Duration::from_secs(5),
        head: Duration::from_secs(10),
        // Longer than the pools of common clients and proxies (aiohttp 15 s, nginx 60 s).
        idle: Duration::from_secs(75),
        // A busy client reads something every second.
        write: Duration::from_secs(30),
        // A round trip in a country. A full server takes its limit of newcomers in this time.
        grace: Duration::from_millis(50),
    };
}

/// What HTTP/2 connections may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Http2 {
    /// How often a quiet client is probed.
    pub keepalive_interval: Duration,
    /// How long it may take to answer that.
    pub keepalive_timeout: Duration,
    /// Streams of one connection.
    pub streams: u32,
    /// Bytes of one request that may be unread.
    pub stream_window_bytes: u32,
    /// Bytes of all requests of one connection that may be unread.
    pub connection_window_bytes: u32,
    /// So many connections have these windows; those that come while as many are open have the
    /// 64 KiB that HTTP/2 starts with. Connections times windows bounds what is unread in all.
    pub roomy: usize,
    /// Bytes of the headers of one request.
    pub header_bytes: u32,
}

impl Default for Http2 {
    fn default() -> Self {
        Self {
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
            streams: 256,
            // Prompts are small, and a client's round trip may be 100 ms: 2.5 MB/s.
            stream_window_bytes: 256 << 10,
            connection_window_bytes: 256 << 10,
            roomy: 64,
            header_bytes: 16 << 10,
        }
    }
}

/// HTTP/2 streams that were reset and not yet accepted; more is an attack.
const RESET_STREAMS_MAX: usize = 32;

/// What a server does with its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Its name in metrics and logs.
    pub name: &'static str,
    /// What it speaks.
    pub protocol: Protocol,
    /// Connections that may be open at once.
    pub connections: usize,
    /// How long clients may take.
    pub timeouts: Timeouts,
    /// What HTTP/2 connections may do.
    pub http2: Http2,
    /// How long open requests may go on after the server was told to stop; absent: to their end.
    pub linger: Option<Duration>,
}

impl Options {
    /// The defaults, for at most so many connections.
    pub fn new(name: &'static str, protocol: Protocol, connections: usize) -> Self {
        Self {
            name,
            protocol,
            connections,
            timeouts: Timeouts::USUAL,
            http2: Http2::default(),
            linger: None,
        }
    }
}

/// Says once what the metrics of connections mean.
pub fn describe() {
    metrics::describe_gauge!("tercet_connections_open", "connections of clients, by server");
    metrics::describe_counter!(
        "tercet_connections_cut_total",
        "connections that the server closed: silent, idle, for room, for descriptors, not reading, by server"
    );
    metrics::describe_counter!(
        "tercet_connections_refused_total",
        "connections refused because every other was being answered, by server"
    );
    metrics::describe_counter!(
        "tercet_unreadable_requests_total",
        "HTTP/1 requests whose head is no HTTP or too large, and HTTP/2 connections that broke the protocol or \
         flooded, by server and cause"
    );
}

/// Where connections come from. A trait so that a shortage of descriptors can be tested.
trait Accept {
    fn accept(&self) -> impl Future<Output = io::Result<(TcpStream, SocketAddr)>> + Send;
}

impl Accept for TcpListener {
    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        Self::accept(self).await
    }
}

/// Serves `router` on `listener` until `stop` fires and open requests are answered, or
/// [`Options::linger`] is over.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    options: Options,
    stop: CancellationToken,
) {
    accept_from(listener, router, options, stop).await;
}

async fn accept_from(
    listener: impl Accept,
    router: Router,
    options: Options,
    stop: CancellationToken,
) {
    let table = Table::new(options.name, options.connections, options.timeouts.grace);
    let mut server = Server {
        table,
        router,
        options,
        open: JoinSet::new(),
        refusals: Arc::new(Semaphore::new(REFUSALS)),
        shortage: None,
        warned: None,
        stop: stop.clone(),
    };
    let accepting = async {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => server.take(stream, peer).await,
                Err(error) => server.failed(&error).await,
            }
        }
    };
    stop.run_until_cancelled(accepting).await;
    drop(listener);
    let answered = async { while server.open.join_next().await.is_some() {} };
    match options.linger {
        None => answered.await,
        // Whoever is left is cut off when the set is dropped.
        Some(linger) => drop(tokio::time::timeout(linger, answered).await),
    }
}

struct Server {
    table: Arc<Table>,
    router: Router,
    options: Options,
    open: JoinSet<()>,
    refusals: Arc<Semaphore>,
    /// When descriptors were last missing.
    shortage: Option<Instant>,
    /// When a trouble was last logged.
    warned: Option<Instant>,
    stop: CancellationToken,
}

impl Server {
    /// A connection was accepted: serves it, as soon as another has made room if need be, or
    /// refuses it.
    async fn take(&mut self, stream: TcpStream, peer: SocketAddr) {
        // Forget those that have ended.
        while let Some(ended) = self.open.try_join_next() {
            if let Err(error) = ended {
                tracing::error!(server = self.options.name, %error, "serving a connection panicked");
            }
        }
        if self.shortage.is_some_and(|since| since.elapsed() > SHORTAGE_MEMORY) {
            self.shortage = None;
            self.table.set_limit(self.options.connections);
        }
        loop {
            match self.table.admit(Instant::now()) {
                Admission::Entered(place) => {
                    let connection = Connection {
                        router: self.router.clone(),
                        options: self.options,
                        place,
                        stop: self.stop.clone(),
                    };
                    self.open.spawn(connection.serve(stream, peer));
                    return;
                }
                Admission::Wait(until) => {
                    // Either way it asks again.
                    let _ = timeout_at(until, self.table.gone.notified()).await;
                }
                Admission::Full => return self.refuse(stream),
            }
        }
    }

    fn refuse(&mut self, stream: TcpStream) {
        let (server, open) = (self.options.name, self.table.open());
        metrics::counter!("tercet_connections_refused_total", "server" => server).increment(1);
        if self.may_warn() {
            tracing::warn!(server, open, "connections are refused: every other is being answered");
        }
        if let Ok(permit) = Arc::clone(&self.refusals).try_acquire_owned() {
            let protocol = self.options.protocol;
            self.open.spawn(async move {
                refusal::say(stream, protocol).await;
                drop(permit);
            });
        }
    }

    /// No connection could be accepted.
    async fn failed(&mut self, error: &io::Error) {
        if concerns_one_connection(error.kind()) {
            tracing::debug!(%error, "a connection ended before it was accepted");
            return;
        }
        let (server, open) = (self.options.name, self.table.open());
        if self.may_warn() {
            tracing::warn!(server, open, %error, "failed to accept connections");
        }
        // Only once per pause: those that were cut must get a chance to end.
        if self.shortage.is_none_or(|since| since.elapsed() >= ACCEPT_PAUSE) {
            self.table.give_back(SPARE_DESCRIPTORS);
            self.shortage = Some(Instant::now());
        }
        sleep(ACCEPT_PAUSE).await;
    }

    /// Whether a lasting trouble is to be logged again.
    fn may_warn(&mut self) -> bool {
        let may = self.warned.is_none_or(|last| last.elapsed() >= WARN_INTERVAL);
        if may {
            self.warned = Some(Instant::now());
        }
        may
    }
}

/// Whether an accept failed with something that only the one connection had.
fn concerns_one_connection(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, Interrupted,
        NetworkDown, NetworkUnreachable, PermissionDenied, TimedOut,
    };
    matches!(
        kind,
        ConnectionAborted
            | ConnectionRefused
            | ConnectionReset
            | HostUnreachable
            | Interrupted
            | NetworkDown
            | NetworkUnreachable
            | PermissionDenied
            | TimedOut
    )
}

/// One connection and all that ends it.
struct Connection {
    router: Router,
    options: Options,
    place: Place,
    stop: CancellationToken,
}

impl Connection {
    async fn serve(self, stream: TcpStream, peer: SocketAddr) {
        let activity = Arc::clone(&self.place.activity);
        let mut socket = Socket::new(stream, activity, self.options.timeouts.write);
        let cut = match self.begin(&mut socket).await {
            // On the heap: silent connections do without what serving needs.
            Begun::Speaks => Box::pin(self.answer(socket, peer)).await,
            Begun::Ended => None,
            Begun::Cut(why) => Some(why),
        };
        if let Some(why) = cut {
            let server = self.options.name;
            tracing::debug!(server, %peer, why = why.name(), "connection cut");
            metrics::counter!("tercet_connections_cut_total",
                "server" => server, "cause" => why.name())
            .increment(1);
        }
    }

    /// Waits for the first bytes of the client.
    async fn begin(&self, socket: &mut Socket) -> Begun {
        let (activity, timeouts) = (&self.place.activity, &self.options.timeouts);
        let mut speaking = pin!(socket.begin());
        loop {
            let due = activity.deadline(timeouts);
            let (at, late) = due.unwrap_or((Instant::now() + timeouts.first_request, Cut::Silent));
            tokio::select! {
                biased;
                begun = speaking.as_mut() => {
                    return if begun.is_ok() { Begun::Speaks } else { Begun::Ended };
                }
                () = activity.changed.notified() => {}
                () = sleep_until(at) => return Begun::Cut(late),
                () = self.stop.cancelled() => return Begun::Ended,
            }
            if let Some(why) = self.place.must_end() {
                return Begun::Cut(why);
            }
        }
    }

    /// Serves a client that has begun to speak; why it was cut, if it was.
    async fn answer(&self, socket: Socket, peer: SocketAddr) -> Option<Cut> {
        let Options { name: server, timeouts, .. } = self.options;
        let activity = Arc::clone(&self.place.activity);
        let addresses = (socket.local_address(), peer);
        let router = self.router.clone();
        let tracked = Tracked::new(router, Arc::clone(&activity), addresses, timeouts.idle);
        let builder = builder(&self.options, self.place.others);
        let connection =
            builder.serve_connection(TokioIo::new(socket), TowerToHyperService::new(tracked));
        let mut connection = pin!(connection);
        // From when on it is closing in order, and why.
        let mut closing: Option<(Instant, Option<Cut>)> = None;
        loop {
            let due = activity.deadline(&timeouts).map(|(at, _)| at);
            let close = closing.and_then(|(began, _)| Some(began.max(activity.quiet_since()?)));
            // Whether answers are read is looked at now and then: at every part of one would be a lot.
            let look = Instant::now() + timeouts.write / 4;
            let next =
                close.map(|since| since + CLOSE_TIMEOUT).or(due).map_or(look, |at| at.min(look));
            tokio::select! {
                // A request that is there is seen before the word that the connection must end.
                biased;
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        if let Some(cause) = unreadable(&*error) {
                            metrics::counter!("tercet_unreadable_requests_total",
                                "server" => server, "cause" => cause)
                            .increment(1);
                        }
                        tracing::debug!(server, error = &*error, "connection ended");
                    }
                    return closing.and_then(|(_, why)| why);
                }
                () = activity.changed.notified() => {}
                () = sleep_until(next) => {}
                () = self.stop.cancelled(), if closing.is_none() => {
                    connection.as_mut().graceful_shutdown();
                    closing = Some((Instant::now(), None));
                }
            }
            if let Some(why) = self.place.must_end() {
                return Some(why);
            }
            let now = Instant::now();
            if let Some((began, why)) = closing
                && let Some(quiet) = activity.quiet_since()
                && began.max(quiet) + CLOSE_TIMEOUT <= now
            {
                return why;
            }
            match activity.deadline(&timeouts).filter(|(at, _)| *at <= now) {
                // Clients of HTTP/2 hear that they must connect again.
                Some((_, Cut::Idle)) if closing.is_none() => {
                    connection.as_mut().graceful_shutdown();
                    closing = Some((now, Some(Cut::Idle)));
                }
                Some((_, why)) if closing.is_none() || why == Cut::Unread => return Some(why),
                _ => {}
            }
        }
    }
}

/// How a connection began.
enum Begun {
    /// It is clear which version of HTTP its client speaks.
    Speaks,
    /// The client went away, or the server stops: nothing was asked.
    Ended,
    /// It was cut.
    Cut(Cut),
}

/// Why hyper refused the head of an HTTP/1 request, or the whole of an HTTP/2 connection, if that ended
/// the connection: it answers itself, so nobody behind it hears of it. Of a single request that HTTP/2
/// resets it does not tell us.
fn unreadable(error: &(dyn Error + Send + Sync + 'static)) -> Option<&'static str> {
    let error = error.downcast_ref::<hyper::Error>()?;
    match (error.is_parse_too_large(), error.is_parse()) {
        (true, _) => Some("head_too_large"),
        (_, true) => Some("malformed"),
        // What the client said before it went away is no refusal of ours.
        _ => match error.source()?.downcast_ref::<h2::Error>()? {
            ended if !ended.is_library() => None,
            ended if ended.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM) => Some("flood"),
            _ => Some("http2"),
        },
    }
}

/// How hyper serves one connection, beside `others`.
fn builder(options: &Options, others: usize) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    if options.protocol == Protocol::Grpc {
        builder = builder.http2_only();
    }
    let limits = &options.http2;
    let (stream_window, connection_window) = match others < limits.roomy {
        true => (limits.stream_window_bytes, limits.connection_window_bytes),
        false => (SMALL_WINDOW_BYTES, SMALL_WINDOW_BYTES),
    };
    // The deadline of heads is ours: hyper's begins only once it knows the version.
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .max_buf_size(HTTP1_BUFFER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(limits.keepalive_interval)
        .keep_alive_timeout(limits.keepalive_timeout)
        .max_concurrent_streams(limits.streams)
        .initial_stream_window_size(stream_window)
        .initial_connection_window_size(connection_window)
        .max_header_list_size(limits.header_bytes)
        .max_pending_accept_reset_streams(RESET_STREAMS_MAX);
    builder
}
