//! Clients that do everything but their part: for the campaign of `tests/tests/abuse.rs`. They
//! cost little themselves: buffers are made once, and whoever is cut pauses before he comes again.
//! In life they have machines of their own; here they run at the lowest priority.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{self, SendRequest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Whoever is cut comes again after this.
const PAUSE: Duration = Duration::from_millis(50);

/// How long an attacker waits for the server to cut him before he says that it did not.
const LIMIT: Duration = Duration::from_secs(45);

/// The lowest priority that a thread can have.
const LOWEST_PRIORITY: i32 = 19;

/// Threads of all attackers.
const THREADS: usize = 2;

/// A runtime for attackers: what they compute themselves takes no core from those that they attack,
/// nor from honest clients.
///
/// # Panics
///
/// If it cannot be made.
pub fn runtime() -> Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(THREADS).thread_name("attacker").enable_all();
    builder.on_thread_start(|| {
        // Of this thread alone, on Linux.
        rustix::process::nice(LOWEST_PRIORITY).expect("a thread may lower its priority");
    });
    builder.build().expect("a runtime starts")
}

/// What became of one kind of attacker.
#[derive(Debug, Default)]
pub struct Tally {
    /// Attempts that ended.
    pub ended: AtomicU64,
    /// The longest that one was suffered, in milliseconds.
    pub longest_ms: AtomicU64,
    /// Connections that could not be made.
    pub refused: AtomicU64,
}

impl Tally {
    fn note(&self, since: Instant) {
        let elapsed = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.ended.fetch_add(1, Ordering::Relaxed);
        self.longest_ms.fetch_max(elapsed, Ordering::Relaxed);
    }

    /// The longest that one was suffered.
    pub fn longest(&self) -> Duration {
        Duration::from_millis(self.longest_ms.load(Ordering::Relaxed))
    }
}

async fn connect(address: &str, tally: &Tally) -> Option<TcpStream> {
    match TcpStream::connect(address).await {
        Ok(stream) => Some(stream),
        Err(_) => {
            tally.refused.fetch_add(1, Ordering::Relaxed);
            sleep(PAUSE).await;
            None
        }
    }
}

/// `count` connections that send `words` and then nothing, made again whenever they are cut.
pub fn silent(
    tasks: &mut JoinSet<()>,
    address: &str,
    words: &'static [u8],
    count: usize,
) -> Arc<Tally> {
    let tally = Arc::new(Tally::default());
    for _ in 0..count {
        let (address, tally) = (address.to_owned(), Arc::clone(&tally));
        tasks.spawn(async move {
            loop {
                let Some(mut stream) = connect(&address, &tally).await else { continue };
                let since = Instant::now();
                let said = stream.write_all(words).await.is_ok();
                let mut heard = [0; 256];
                let cut = async { while said && stream.read(&mut heard).await.unwrap_or(0) > 0 {} };
                let _ = timeout(LIMIT, cut).await;
                tally.note(since);
                sleep(PAUSE).await;
            }
        });
    }
    tally
}

/// `count` clients that each post `body` again and again, with a pause.
pub fn bodies(
    tasks: &mut JoinSet<()>,
    address: &str,
    body: &Bytes,
    count: usize,
    pause: Duration,
) -> Arc<Tally> {
    let tally = Arc::new(Tally::default());
    for _ in 0..count {
        let (address, tally, body) = (address.to_owned(), Arc::clone(&tally), body.clone());
        tasks.spawn(async move {
            let head = format!(
                "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\
                 content-type: application/json\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            loop {
                let Some(mut stream) = connect(&address, &tally).await else { continue };
                let since = Instant::now();
                let posting = async {
                    stream.write_all(head.as_bytes()).await?;
                    stream.write_all(&body).await?;
                    let mut heard = [0; 1024];
                    while stream.read(&mut heard).await? > 0 {}
                    std::io::Result::Ok(())
                };
                // Refused in the middle or answered: either way it is over.
                let _ = timeout(LIMIT, posting).await;
                tally.note(since);
                sleep(pause).await;
            }
        });
    }
    tally
}

/// A connection of HTTP/2 that answers pings; `window` is what the server may send unread.
async fn http2(address: &str, window: u32, tally: &Tally) -> Option<Http2> {
    let stream = connect(address, tally).await?;
    let handshake = client::Builder::new().initial_window_size(window).handshake(stream);
    let Ok(Ok((sender, connection))) = timeout(LIMIT, handshake).await else {
        tally.refused.fetch_add(1, Ordering::Relaxed);
        sleep(PAUSE).await;
        return None;
    };
    let mut driver = JoinSet::new();
    driver.spawn(async move {
        // Ends with the connection, however that ends.
        let _ = connection.await;
    });
    Some(Http2 { sender, _driver: driver })
}

struct Http2 {
    sender: SendRequest<Bytes>,
    _driver: JoinSet<()>,
}

/// `connections` times `calls` calls of gRPC that send `words` of a message and then nothing.
pub fn half_calls(
    tasks: &mut JoinSet<()>,
    address: &str,
    path: &'static str,
    words: &'static [u8],
    (connections, calls): (usize, usize),
) -> Arc<Tally> {
    let tally = Arc::new(Tally::default());
    for _ in 0..connections {
        let (address, tally) = (address.to_owned(), Arc::clone(&tally));
        tasks.spawn(async move {
            loop {
                let Some(mut http2) = http2(&address, 65_535, &tally).await else { continue };
                let mut open = JoinSet::new();
                for _ in 0..calls {
                    let Ok(ready) = http2.sender.clone().ready().await else { break };
                    http2.sender = ready;
                    let request = request(&address, path, "application/grpc");
                    let Ok((answer, mut body)) = http2.sender.send_request(request, false) else {
                        break;
                    };
                    let tally = Arc::clone(&tally);
                    let since = Instant::now();
                    open.spawn(async move {
                        if !words.is_empty() {
                            let _ = body.send_data(Bytes::from_static(words), false);
                        }
                        let _ = timeout(LIMIT, answer).await;
                        tally.note(since);
                    });
                }
                while open.join_next().await.is_some() {}
                sleep(PAUSE).await;
            }
        });
    }
    tally
}

fn request(address: &str, path: &str, kind: &str) -> http::Request<()> {
    http::Request::post(format!("http://{address}{path}"))
        .header("content-type", kind)
        .header("te", "trailers")
        .body(())
        .expect("the parts are valid")
}

/// `connections` times `streams` calls that each declare a message of `declared` bytes and send it
/// slowly, a part each `pause`, but for its end.
pub fn half_messages(
    tasks: &mut JoinSet<()>,
    address: &str,
    path: &'static str,
    declared: u32,
    (connections, streams): (usize, usize),
    pause: Duration,
) -> Arc<Tally> {
    let tally = Arc::new(Tally::default());
    let part = Bytes::from(vec![0_u8; 64 << 10]);
    for _ in 0..connections {
        let (address, tally, part) = (address.to_owned(), Arc::clone(&tally), part.clone());
        tasks.spawn(async move {
            loop {
                let Some(mut http2) = http2(&address, 65_535, &tally).await else { continue };
                let mut open = JoinSet::new();
                for _ in 0..streams {
                    let Ok(ready) = http2.sender.clone().ready().await else { break };
                    http2.sender = ready;
                    let request = request(&address, path, "application/grpc");
                    let Ok((_answer, mut body)) = http2.sender.send_request(request, false) else {
                        break;
                    };
                    let (tally, part) = (Arc::clone(&tally), part.clone());
                    let since = Instant::now();
                    open.spawn(async move {
                        let prefix = [&[0], declared.to_be_bytes().as_slice()].concat();
                        let mut sent = body.send_data(prefix.into(), false).is_ok();
                        let mut left = declared as usize - 1;
                        while sent && left > 0 && since.elapsed() < LIMIT {
                            body.reserve_capacity(part.len().min(left));
                            let room = timeout(
                                LIMIT,
                                std::future::poll_fn(|context| body.poll_capacity(context)),
                            );
                            let Ok(Some(Ok(room))) = room.await else { break };
                            let piece = part.slice(..room.min(part.len()).min(left));
                            left -= piece.len();
                            sent = body.send_data(piece, false).is_ok();
                            sleep(pause).await;
                        }
                        // The rest never comes: it waits to be cut.
                        if sent {
                            let reset = std::future::poll_fn(|context| body.poll_reset(context));
                            let _ = timeout(LIMIT, reset).await;
                        }
                        tally.note(since);
                    });
                }
                while open.join_next().await.is_some() {}
                sleep(PAUSE).await;
            }
        });
    }
    tally
}

/// `count` clients that ask for a long streamed answer over HTTP/2 and read none of it.
pub fn slow_readers(
    tasks: &mut JoinSet<()>,
    address: &str,
    body: &Bytes,
    count: usize,
) -> Arc<Tally> {
    let tally = Arc::new(Tally::default());
    for _ in 0..count {
        let (address, tally, body) = (address.to_owned(), Arc::clone(&tally), body.clone());
        tasks.spawn(async move {
            loop {
                let Some(http2) = http2(&address, 0, &tally).await else { continue };
                let since = Instant::now();
                let reading = async {
                    let mut sender = http2.sender.clone().ready().await.ok()?;
                    let request = request(&address, "/v1/completions", "application/json");
                    let (answer, mut stream) = sender.send_request(request, false).ok()?;
                    stream.send_data(body.clone(), true).ok()?;
                    let mut answer = answer.await.ok()?;
                    // The window is shut: nothing comes until the server gives up.
                    answer.body_mut().data().await
                };
                let _ = timeout(LIMIT, reading).await;
                tally.note(since);
                sleep(PAUSE).await;
            }
        });
    }
    tally
}
