//! Clients that do not do their part, over real sockets; timeouts are milliseconds.

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::body::{Body, Bytes};
use axum::routing::{get, post};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::AbortHandle;

use super::*;

/// Longer than any test takes: what ends in time does so for another reason.
const LONG: Duration = Duration::from_secs(600);

/// Longer than a busy machine takes for anything here.
const PATIENCE: Duration = Duration::from_secs(20);

/// The preface of HTTP/2 and empty SETTINGS.
const HTTP2_HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";

fn patient(connections: usize) -> Options {
    let grace = Duration::from_millis(5);
    let timeouts = Timeouts { first_request: LONG, head: LONG, idle: LONG, write: LONG, grace };
    Options { timeouts, ..Options::new("test", Protocol::Http, connections) }
}

fn router() -> Router {
    // An answer that never ends, for whoever asks.
    let endless = || async {
        let first = futures::stream::iter([Ok::<_, Infallible>(Bytes::from_static(b"x"))]);
        Body::from_stream(futures::StreamExt::chain(first, futures::stream::pending()))
    };
    let drops = || async {
        let drop = || Some((Ok::<_, Infallible>(Bytes::from_static(b"x")), ()));
        Body::from_stream(futures::stream::unfold((), move |()| async move { drop() }))
    };
    Router::new()
        .route("/", get(async || "hello"))
        .route("/since", get(since))
        .route("/drops", get(drops))
        .route("/endless", get(endless))
        .route("/flood", get(async || Body::from(vec![b'x'; 64 << 20])))
        .route("/body", post(async |body: Bytes| body.len().to_string()))
}

/// How many milliseconds ago the first byte of the request came.
async fn since(axum::Extension(FirstByte(came)): axum::Extension<FirstByte>) -> String {
    format!("{:05}", came.elapsed().as_millis())
}

/// A server that ends with its test.
struct Running {
    address: SocketAddr,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Running {
    async fn start(options: Options) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, router(), options, stop.clone()));
        Self { address, stop, tasks }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// A connection on which `bytes` were sent.
    async fn send(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = self.connect().await;
        stream.write_all(bytes).await.unwrap();
        stream
    }

    /// What a client that does its part hears.
    async fn hear(&self) -> String {
        hear(self.send(GET).await).await
    }

    /// Lets clients do `act` in the background.
    fn meanwhile(&mut self, act: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        self.tasks.spawn(act)
    }
}

/// Reads an answer up to its body of five letters, or the end.
async fn hear(mut stream: TcpStream) -> String {
    let mut heard = Vec::new();
    let reading = async {
        while !heard.ends_with(b"hello") && stream.read_buf(&mut heard).await.unwrap_or(0) > 0 {}
    };
    tokio::time::timeout(PATIENCE, reading).await.expect("an answer comes");
    String::from_utf8_lossy(&heard).into_owned()
}

/// Waits until the server has closed; answers pings meanwhile, or sends a byte of `drip` at a
/// time.
async fn until_closed(mut stream: TcpStream, drip: &[u8]) {
    let pongs = drip.is_empty();
    let mut drip = drip.iter();
    let mut buffer = [0; 4096];
    let closed = async {
        loop {
            tokio::select! {
                read = stream.read(&mut buffer) => match read {
                    Ok(0) | Err(_) => return,
                    Ok(length) => {
                        if let Some(pong) = pong(&buffer[..length]).filter(|_| pongs) {
                            // It may be closed by now.
                            let _ = stream.write_all(&pong).await;
                        }
                    }
                },
                () = sleep(Duration::from_millis(5)) => if let Some(byte) = drip.next() {
                    let _ = stream.write_all(&[*byte]).await;
                },
            }
        }
    };
    tokio::time::timeout(PATIENCE, closed).await.expect("the server closes");
}

/// The answers to the pings among some frames.
fn pong(mut frames: &[u8]) -> Option<Vec<u8>> {
    let mut pongs = Vec::new();
    while let [a, b, c, kind, flags, ..] = *frames {
        let length = 9 + u32::from_be_bytes([0, a, b, c]) as usize;
        let (frame, rest) = frames.split_at_checked(length)?;
        if kind == 6 && flags == 0 {
            let mut pong = frame.to_vec();
            pong[4] = 1;
            pongs.extend(pong);
        }
        frames = rest;
    }
    Some(pongs)
}

#[tokio::test]
async fn whoever_sends_no_whole_head_is_cut_however_the_bytes_come() {
    let mut options = patient(64);
    options.timeouts.first_request = Duration::from_millis(60);
    options.http2.keepalive_interval = Duration::from_millis(5);
    for protocol in [Protocol::Http, Protocol::Grpc] {
        let server = Running::start(Options { protocol, ..options }).await;
        let long_head = [b"GET / HTTP/1.1\r\nx: ".as_slice(), &[b'y'; 10_000]].concat();
        let long_hello = [HTTP2_HELLO, &HTTP2_HELLO[24..].repeat(1000)].concat();
        let continuation = b"\0\0\x01\x09\0\0\0\0\x01\x84".repeat(100);
        for (sent, drip) in [
            (b"".as_slice(), b"".as_slice()),
            (b"P", b""),
            (b"PRI * HT", b""),
            (&HTTP2_HELLO[..20], b""),
            (&HTTP2_HELLO[..24], b""),
            (HTTP2_HELLO, b""),
            (HTTP2_HELLO, &long_hello[24..]),
            (&[HTTP2_HELLO, b"\0\0\x01\x01\0\0\0\0\x01\x82"].concat(), &continuation),
            (b"GET / HT", b""),
            (b"", &long_head),
        ] {
            let started = Instant::now();
            until_closed(server.send(sent).await, drip).await;
            let took = started.elapsed();
            let is_http1 = sent.iter().chain(drip).next() == Some(&b'G');
            let is_refused = protocol == Protocol::Grpc && is_http1;
            assert!(is_refused || took >= options.timeouts.first_request, "{sent:?} {took:?}");
        }
    }
}

#[tokio::test]
async fn before_a_client_has_begun_it_is_told_nothing_and_however_it_begins_it_is_served() {
    let mut options = patient(8);
    options.protocol = Protocol::Grpc;
    options.timeouts.first_request = Duration::from_millis(50);
    let server = Running::start(options).await;
    for words in [&b""[..], b"P", &HTTP2_HELLO[..15]] {
        let mut heard = Vec::new();
        let mut silent = server.send(words).await;
        let closed = tokio::time::timeout(PATIENCE, silent.read_to_end(&mut heard));
        // No settings: what speaks HTTP/2 is not made for a client that says nothing.
        assert_eq!(closed.await.unwrap().unwrap(), 0, "after {words:?}: {heard:?}");
    }
    options.timeouts.first_request = LONG;
    for (protocol, cuts) in [(Protocol::Grpc, 1..33), (Protocol::Http, 1..33)] {
        options.protocol = protocol;
        let server = Running::start(options).await;
        for cut in cuts {
            let (first, rest) = HTTP2_HELLO.split_at(cut);
            let mut client = server.send(first).await;
            client.set_nodelay(true).unwrap();
            tokio::task::yield_now().await;
            client.write_all(rest).await.unwrap();
            let mut frame = [0; 9];
            let settings = tokio::time::timeout(PATIENCE, client.read_exact(&mut frame));
            settings.await.unwrap().unwrap();
            assert_eq!(frame[3], 4, "SETTINGS come first, cut at {cut}");
        }
        for cut in 0..GET.len() {
            if protocol == Protocol::Http {
                let mut client = server.send(&GET[..cut]).await;
                tokio::task::yield_now().await;
                client.write_all(&GET[cut..]).await.unwrap();
                assert!(hear(client).await.ends_with("hello"), "cut at {cut}");
            }
        }
    }
}

#[tokio::test]
async fn an_idle_connection_is_cut_later_and_told_so_before() {
    let mut options = patient(64);
    options.timeouts.idle = Duration::from_millis(60);
    options.http2.keepalive_interval = Duration::from_millis(5);
    let server = Running::start(options).await;
    let mut stream = server.send(GET).await;
    let mut heard = vec![0; 1024];
    let length = stream.read(&mut heard).await.unwrap();
    assert!(String::from_utf8_lossy(&heard[..length]).contains("keep-alive: timeout=0"));
    until_closed(stream, b"").await;
    // The same for HTTP/2 that answers pings: `GET /` in HPACK's table.
    let request = [HTTP2_HELLO, b"\0\0\x03\x01\x05\0\0\0\x01\x82\x84\x86"].concat();
    until_closed(server.send(&request).await, b"").await;
}

#[tokio::test]
async fn a_later_head_that_drips_is_cut() {
    let mut options = patient(64);
    options.timeouts.head = Duration::from_millis(60);
    let server = Running::start(options).await;
    let mut stream = server.send(GET).await;
    let mut heard = vec![0; 1024];
    while !heard.ends_with(b"hello") {
        heard.clear();
        stream.read_buf(&mut heard).await.unwrap();
    }
    until_closed(stream, &[b'G'; 10_000]).await;
}

#[tokio::test]
async fn silent_clients_that_come_again_for_ever_keep_nobody_out() {
    let mut server = Running::start(patient(4)).await;
    let address = server.address;
    let cut = Arc::new(AtomicUsize::new(0));
    for index in 0..12 {
        let cut = Arc::clone(&cut);
        let words: &[u8] = [b"".as_slice(), b"PRI * HT", HTTP2_HELLO, b"POST /body HT"][index % 4];
        server.meanwhile(async move {
            loop {
                let Ok(mut stream) = TcpStream::connect(address).await else { continue };
                if stream.write_all(words).await.is_ok() {
                    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
                }
                cut.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    for _ in 0..20 {
        let heard = server.hear().await;
        assert!(heard.starts_with("HTTP/1.1 200"), "{heard:?}");
    }
    assert!(cut.load(Ordering::Relaxed) > 8, "they made room for one another");
}

#[tokio::test]
async fn a_request_begins_with_its_first_byte() {
    let server = Running::start(patient(4)).await;
    let mut stream = server.connect().await;
    // The first of its connection, and a later one.
    for _ in 0..2 {
        stream.write_all(b"GE").await.unwrap();
        sleep(Duration::from_millis(300)).await;
        stream.write_all(b"T /since HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut heard = Vec::new();
        while !heard.windows(4).any(|end| end == b"\r\n\r\n") || heard.ends_with(b"\n") {
            assert!(stream.read_buf(&mut heard).await.unwrap() > 0);
        }
        let text = String::from_utf8(heard).unwrap();
        let waited: u64 = text[text.len() - 5..].parse().unwrap();
        assert!((100..20_000).contains(&waited), "{text}");
        // What is between two requests counts for none.
        sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn half_bodies_make_room_too() {
    let server = Running::start(patient(2)).await;
    let half = b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nhalf";
    let first = server.send(half).await;
    let _second = server.send(half).await;
    // Both are known to be open once the third was served.
    assert!(server.hear().await.starts_with("HTTP/1.1 200"));
    until_closed(first, b"").await;
}

#[tokio::test]
async fn a_newcomer_hears_at_once_that_every_other_is_busy() {
    let started = Instant::now();
    let server = Running::start(patient(1)).await;
    let mut busy = server.send(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(busy.read(&mut [0; 1024]).await.unwrap() > 0, "it is being answered");
    let heard = server.hear().await;
    assert!(heard.starts_with("HTTP/1.1 503"), "{heard:?}");
    assert!(heard.contains("retry-after: 1") && heard.contains("overloaded_error"), "{heard:?}");
    drop(busy);
    // Its place is free again as soon as the server sees that.
    while !server.hear().await.starts_with("HTTP/1.1 200") {}
    assert!(started.elapsed() < PATIENCE);
}

#[tokio::test]
async fn a_client_that_stops_reading_is_cut() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let opened = recorder.handle();
    let _here = metrics::set_default_local_recorder(&recorder);
    let mut options = patient(4);
    options.timeouts.write = Duration::from_millis(20);
    let server = Running::start(options).await;
    let mut stream = server.send(b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(stream.read(&mut [0; 1024]).await.unwrap() > 0, "it is being answered");
    // Not for a time: on a busy machine it would read again before the server looks.
    let cut = async {
        while !opened.render().contains("tercet_connections_open{server=\"test\"} 0") {
            sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, cut).await.expect("it is cut");
    // What was in the buffers comes, then the end; not the whole answer.
    let mut heard = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut heard)).await.unwrap();
    assert!(heard.len() < 64 << 20, "{}", heard.len());
}

#[tokio::test]
async fn a_burst_of_connections_is_held_until_it_is_accepted() {
    // More than the 128 of the standard library, and nobody accepts.
    let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let burst = futures::future::join_all((0..400).map(|_| TcpStream::connect(address)));
    let open = tokio::time::timeout(Duration::from_secs(1), burst).await.expect("none is dropped");
    assert!(open.iter().all(Result::is_ok));
}

#[tokio::test]
async fn a_client_that_opens_no_window_for_its_answer_is_cut() {
    let mut options = patient(4);
    options.timeouts.write = Duration::from_millis(20);
    let server = Running::start(options).await;
    // SETTINGS with an initial window of 0, then GET /endless of x.
    let settings = b"\0\0\x06\x04\0\0\0\0\0\0\x04\0\0\0\0";
    let get = b"\0\0\x0f\x01\x05\0\0\0\x01\x82\x04\x08/endless\x86\x41\x01x";
    let hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let stream = server.send(&[&hello[..], settings, get].concat()).await;
    until_closed(stream, b"").await;
    // A client that waits for its answer is not meant.
    let mut waiting = server.send(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let mut heard = [0; 1024];
    while !heard.contains(&b'x') {
        assert!(waiting.read(&mut heard).await.unwrap() > 0);
    }
    let more = async { while waiting.read(&mut heard).await.unwrap() > 0 {} };
    assert!(tokio::time::timeout(Duration::from_millis(200), more).await.is_err(), "it was cut");
}

#[tokio::test]
async fn clients_that_read_nothing_and_come_again_for_ever_keep_nobody_out() {
    let mut server = Running::start(patient(16)).await;
    let address = server.address;
    let came = Arc::new(AtomicUsize::new(0));
    // SETTINGS with an initial window of 0, then GET /.
    let settings = b"\0\0\x06\x04\0\0\0\0\0\0\x04\0\0\0\0";
    let get = b"\0\0\x06\x01\x05\0\0\0\x01\x82\x84\x86\x41\x01x";
    let words = [&HTTP2_HELLO[..24], settings, get].concat();
    for _ in 0..24 {
        let (came, words) = (Arc::clone(&came), words.clone());
        server.meanwhile(async move {
            loop {
                let Ok(mut stream) = TcpStream::connect(address).await else { continue };
                if stream.write_all(&words).await.is_ok() {
                    came.fetch_add(1, Ordering::Relaxed);
                    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
                }
            }
        });
    }
    while came.load(Ordering::Relaxed) < 24 {
        sleep(Duration::from_millis(1)).await;
    }
    sleep(Duration::from_millis(20)).await;
    let mut served = 0;
    for _ in 0..20 {
        served += usize::from(server.hear().await.starts_with("HTTP/1.1 200"));
    }
    assert!(served >= 10, "{served} of 20 were served");
}

#[tokio::test]
async fn a_client_that_takes_its_answer_in_drops_is_cut() {
    let mut options = patient(4);
    options.timeouts.write = Duration::from_millis(250);
    let server = Running::start(options).await;
    // SETTINGS with an initial window of 0, then GET /drops of x, and room for a byte again and again.
    let settings = b"\0\0\x06\x04\0\0\0\0\0\0\x04\0\0\0\0";
    let get = b"\0\0\x0d\x01\x05\0\0\0\x01\x82\x04\x06/drops\x86\x41\x01x";
    let hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let stream = server.send(&[&hello[..], settings, get].concat()).await;
    let (mut reads, mut writes) = stream.into_split();
    let room = b"\0\0\x04\x08\0\0\0\0\x01\0\0\0\x01";
    let dripping = async {
        while writes.write_all(room).await.is_ok() {
            sleep(Duration::from_millis(2)).await;
        }
    };
    let mut heard = Vec::new();
    let reading = async {
        // An error is the end as well.
        let _ = reads.read_to_end(&mut heard).await;
    };
    let both = async {
        tokio::select! {
            () = dripping => {}
            () = reading => {}
        }
    };
    tokio::time::timeout(PATIENCE, both).await.expect("the server closes");
    let drop = b"\0\0\x01\0\0\0\0\0\x01x";
    let drops = heard.windows(drop.len()).filter(|found| found == drop).count();
    assert!(drops > 2, "it took {drops}, each in time");
}

#[tokio::test]
async fn heads_that_cannot_be_read_are_answered_and_counted() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let counted = recorder.handle();
    let _here = metrics::set_default_local_recorder(&recorder);
    let server = Running::start(patient(8)).await;
    let many = [b"GET / HTTP/1.1\r\nx: ".as_slice(), &[b'y'; HTTP1_BUFFER_BYTES]].concat();
    for (sent, status, cause) in [
        (b"GET / SPDY/9\r\n\r\n".as_slice(), "400", "malformed"),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", "400", "malformed"),
        (&many, "431", "head_too_large"),
    ] {
        let line =
            format!("tercet_unreadable_requests_total{{server=\"test\",cause=\"{cause}\"}} ");
        let count = || {
            let text = counted.render();
            let rest = text.lines().find_map(|found| found.strip_prefix(&line));
            rest.map_or(0, |count| count.parse::<u32>().unwrap())
        };
        let before = count();
        let heard = hear(server.send(sent).await).await;
        assert!(heard.starts_with(&format!("HTTP/1.1 {status}")), "{heard:?}");
        let counting = async {
            while count() == before {
                sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(PATIENCE, counting).await.expect("it is counted");
    }
    assert!(server.hear().await.starts_with("HTTP/1.1 200"));
    assert_eq!(counted.render().matches("tercet_unreadable_requests_total{").count(), 2);
}

#[tokio::test]
async fn connections_that_break_http2_are_counted() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let counted = recorder.handle();
    let _here = metrics::set_default_local_recorder(&recorder);
    let server = Running::start(patient(8)).await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    // Its first frame is to be SETTINGS; DATA is of no stream; a window is opened by nothing.
    let frames: [&[u8]; 3] = [
        b"\0\0\x08\x06\0\0\0\0\x01pingpong",
        b"\0\0\0\x04\0\0\0\0\0\0\0\x01\0\0\0\0\0\0x",
        b"\0\0\0\x04\0\0\0\0\0\0\0\x04\x08\0\0\0\0\0\0\0\0\0",
    ];
    let line = "tercet_unreadable_requests_total{server=\"test\",cause=\"http2\"} ";
    let count = || {
        let text = counted.render();
        let rest = text.lines().find_map(|found| found.strip_prefix(line));
        rest.map_or(0, |count| count.parse::<u32>().unwrap())
    };
    for (number, frames) in (1..).zip(frames) {
        until_closed(server.send(&[preface, frames].concat()).await, &[]).await;
        let counting = async {
            while count() < number {
                sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(PATIENCE, counting).await.expect("it is counted");
    }
    // One that just goes away broke nothing.
    drop(server.send(&[preface, b"\0\0\0\x04\0\0\0\0\0".as_slice()].concat()).await);
    assert!(server.hear().await.starts_with("HTTP/1.1 200"));
    assert_eq!(count(), 3);
}

#[tokio::test]
async fn stopping_waits_for_answers_and_not_for_silent_ones() {
    let mut server = Running::start(patient(8)).await;
    let _silent = server.send(b"").await;
    let _half = server.send(b"GET / HT").await;
    let _hello = server.send(HTTP2_HELLO).await;
    let mut busy = server.send(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(busy.read(&mut [0; 1024]).await.unwrap() > 0);
    server.stop.cancel();
    assert!(
        tokio::time::timeout(Duration::from_millis(50), server.tasks.join_next()).await.is_err(),
        "an answer is under way"
    );
    drop(busy);
    tokio::time::timeout(PATIENCE, server.tasks.join_next()).await.unwrap().unwrap().unwrap();
}

/// Gives one connection, and then has no descriptors.
struct Exhausted {
    listener: TcpListener,
    accepted: AtomicUsize,
    failures: Arc<AtomicUsize>,
}

impl Accept for Exhausted {
    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        if self.accepted.fetch_add(1, Ordering::Relaxed) == 0 {
            return self.listener.accept().await;
        }
        self.failures.fetch_add(1, Ordering::Relaxed);
        // EMFILE of Linux.
        Err(io::Error::from_raw_os_error(24))
    }
}

#[tokio::test]
async fn without_descriptors_it_pauses_and_gives_some_back() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let failures = Arc::new(AtomicUsize::new(0));
    let source = Exhausted { listener, accepted: AtomicUsize::new(0), failures: failures.clone() };
    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let started = Instant::now();
    let mut options = patient(8);
    options.timeouts.first_request = LONG;
    tasks.spawn(accept_from(source, router(), options, stop.clone()));
    let silent = TcpStream::connect(address).await.unwrap();
    while failures.load(Ordering::Relaxed) < 4 {
        sleep(Duration::from_millis(1)).await;
    }
    // Read before the clock is, so that a slow test fails no good server.
    let pauses = u32::try_from(failures.load(Ordering::Relaxed)).unwrap() - 1;
    assert!(started.elapsed() >= pauses * ACCEPT_PAUSE, "it must not spin");
    drop(silent);
    stop.cancel();
    tasks.join_next().await.unwrap().unwrap();
}

#[tokio::test]
async fn a_server_of_its_own_thread_answers_while_this_one_is_stuck() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    tasks.spawn(on_own_thread(listener, router(), patient(4), stop.clone()));
    tokio::task::yield_now().await;
    // This runtime has one thread, and it does not await: as if it computed.
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    io::Write::write_all(&mut stream, GET).unwrap();
    let mut heard = [0; 12];
    io::Read::read_exact(&mut stream, &mut heard).unwrap();
    assert_eq!(&heard, b"HTTP/1.1 200");
    stop.cancel();
    tasks.join_next().await.unwrap().unwrap().unwrap();
}
