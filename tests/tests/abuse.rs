//! The campaign: every kind of client that does not do its part, all at once for a minute, beside
//! honest ones, against real processes. Not part of `cargo test`: `./test --soak` runs it.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::{Value, json};
use tests::attack::{self, Tally};
use tests::cluster::Cluster;
use tests::model::bundled_store;
use tests::process::{free_ports, own_address};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// How long honest clients are watched alone.
const QUIET: Duration = Duration::from_secs(30);

/// How long they are watched among the others.
const ATTACK: Duration = Duration::from_secs(60);

const HONEST_CLIENTS: usize = 3;

/// Between two requests of an honest client: the machine shall not be full of them alone.
const THINKING: Duration = Duration::from_millis(300);

/// Slack of deadlines on a machine that computes meanwhile.
const SLACK: Duration = Duration::from_secs(5);

const MIB: u64 = 1 << 20;

/// What an honest client measured.
#[derive(Default)]
struct Measured {
    first_token: Vec<Duration>,
    between_tokens: Vec<Duration>,
    whole: Vec<Duration>,
    /// What went otherwise than golden.
    wrong: Vec<String>,
}

impl Measured {
    fn add(&mut self, other: Self) {
        self.first_token.extend(other.first_token);
        self.between_tokens.extend(other.between_tokens);
        self.whole.extend(other.whole);
        self.wrong.extend(other.wrong);
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} streams, {} wrong; p50/p99 ms: first token {}/{}, between tokens {}/{}, whole {}/{}",
            self.whole.len(),
            self.wrong.len(),
            quantile(&self.first_token, 50).as_millis(),
            quantile(&self.first_token, 99).as_millis(),
            quantile(&self.between_tokens, 50).as_millis(),
            quantile(&self.between_tokens, 99).as_millis(),
            quantile(&self.whole, 50).as_millis(),
            quantile(&self.whole, 99).as_millis(),
        )
    }
}

fn quantile(times: &[Duration], percent: usize) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort();
    let rank = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(rank).copied().unwrap_or_default()
}

/// The request of honest client `index`: sampled, so that any wrong logit shows in the tokens.
fn request(index: usize) -> Value {
    let prompts = ["One day, Tom", "Once upon a time", "The little dog"];
    json!({
        "prompt": prompts[index % prompts.len()],
        "max_tokens": 64, "temperature": 0.8, "seed": 7 + index, "stream": true,
        "ignore_eos": true,
    })
}

/// Streams one answer: its text, and when it was asked for and each part came.
async fn stream(address: &str, body: &str) -> Result<(String, Vec<Instant>), String> {
    let told = |error: std::io::Error| error.to_string();
    let mut moments = vec![Instant::now()];
    let mut stream = TcpStream::connect(address).await.map_err(told)?;
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.map_err(told)?;
    let (mut heard, mut read, mut text) = (Vec::new(), 0, String::new());
    loop {
        if stream.read_buf(&mut heard).await.map_err(told)? == 0 {
            let all = String::from_utf8_lossy(&heard);
            return Err(format!("ended early: {}", &all[all.len().saturating_sub(300)..]));
        }
        while let Some(length) = heard[read..].iter().position(|byte| *byte == b'\n') {
            let line = String::from_utf8_lossy(&heard[read..read + length]).into_owned();
            read += length + 1;
            let Some(event) = line.trim_end().strip_prefix("data: ") else { continue };
            if event == "[DONE]" {
                return Ok((text, moments));
            }
            let event: Value = serde_json::from_str(event).map_err(|error| error.to_string())?;
            match event["choices"][0]["text"].as_str() {
                Some(more) => text.push_str(more),
                None => return Err(event.to_string()),
            }
            moments.push(Instant::now());
        }
    }
}

/// Honest clients for `span`: each compares every answer with `golden`.
async fn honest(address: &str, golden: &Arc<Vec<String>>, span: Duration) -> Measured {
    let mut clients = JoinSet::new();
    for index in 0..HONEST_CLIENTS {
        let (address, golden) = (address.to_owned(), Arc::clone(golden));
        clients.spawn(async move {
            let body = request(index).to_string();
            let (start, mut measured) = (Instant::now(), Measured::default());
            while start.elapsed() < span {
                match stream(&address, &body).await {
                    Ok((text, moments)) => {
                        measured.first_token.push(moments[1] - moments[0]);
                        let gaps = moments[1..].windows(2).map(|pair| pair[1] - pair[0]);
                        measured.between_tokens.extend(gaps);
                        measured.whole.push(*moments.last().unwrap() - moments[0]);
                        if text != golden[index] {
                            measured.wrong.push(format!("{text:?}"));
                        }
                    }
                    Err(error) => measured.wrong.push(error),
                }
                sleep(THINKING).await;
            }
            measured
        });
    }
    let mut all = Measured::default();
    while let Some(measured) = clients.join_next().await {
        all.add(measured.unwrap());
    }
    all
}

/// How long `/livez` takes, four times a second for `span`; a failure counts as forever.
async fn probe(address: String, span: Duration) -> Vec<Duration> {
    let (start, mut times) = (Instant::now(), Vec::new());
    while start.elapsed() < span {
        let asked = Instant::now();
        let asking = async {
            let mut stream = TcpStream::connect(&address).await?;
            let get =
                format!("GET /livez HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
            stream.write_all(get.as_bytes()).await?;
            let mut heard = Vec::new();
            stream.read_to_end(&mut heard).await?;
            std::io::Result::Ok(heard.starts_with(b"HTTP/1.1 200"))
        };
        let fine = matches!(timeout(Duration::from_secs(10), asking).await, Ok(Ok(true)));
        times.push(if fine { asked.elapsed() } else { Duration::MAX });
        sleep(Duration::from_millis(250)).await;
    }
    times
}

/// A line of `/proc/ID/status`, in MiB.
fn memory_mib(id: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    let kib = line.trim_start_matches(':').trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() * 1024 / MIB
}

/// Valid JSON of 4 MiB with a million stop strings.
fn million() -> Bytes {
    let mut body = String::from("{\"prompt\":\"a\",\"max_tokens\":1,\"stop\":[\"a\"");
    while body.len() < (4 << 20) - 64 {
        body.push_str(",\"\"");
    }
    body.push_str("]}");
    body.into()
}

/// The address that the worker `index` said.
fn worker_address(cluster: &Cluster, index: usize) -> String {
    let status = cluster.status();
    status["workers"][index]["address"].as_str().unwrap().to_owned()
}

#[test]
fn nobody_is_stopped_by_those_who_do_not_do_their_part() {
    let host = own_address();
    let admin = format!("{host}:{}", free_ports(host).0);
    let mut cluster =
        Cluster::start_with(bundled_store(), 3, 3, &[("TERCET_COORDINATOR__ADMIN", &admin)]);
    let (http, grpc) = (cluster.http().to_owned(), cluster.grpc().to_owned());
    let (epoch, stage) = (cluster.status()["plan"].clone(), worker_address(&cluster, 0));
    let coordinator = cluster.coordinator().id();
    let workers: Vec<u32> = (0..3).map(|index| cluster.worker(index).id()).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut golden = Vec::new();
        for index in 0..HONEST_CLIENTS {
            golden.push(stream(&http, &request(index).to_string()).await.unwrap().0);
        }
        let golden = Arc::new(golden);
        let (quiet, quiet_probes) =
            tokio::join!(honest(&http, &golden, QUIET), probe(admin.clone(), QUIET));
        println!("quiet:  {quiet}; /livez at most {:?}", quiet_probes.iter().max().unwrap());
        let before: Vec<u64> = workers.iter().map(|id| memory_mib(*id, "VmRSS")).collect();

        let mut attackers = JoinSet::new();
        let tasks = &mut attackers;
        let long = Bytes::from(
            json!({
                "prompt": "One day", "max_tokens": 64, "ignore_eos": true, "stream": true,
            })
            .to_string(),
        );
        // Who it is, what became of it, and by when each must be cut.
        let first = Duration::from_secs(5);
        let message = Duration::from_secs(30);
        let kinds: [(&str, Arc<Tally>, Duration); 12] = [
            ("silent, HTTP", attack::silent(tasks, &http, b"", 200), first),
            ("half preface, HTTP", attack::silent(tasks, &http, b"PRI * HT", 120), first),
            ("half head, HTTP", attack::silent(tasks, &http, b"GET / HT", 120), first),
            ("silent, gRPC", attack::silent(tasks, &grpc, b"", 440), first),
            ("silent, worker", attack::silent(tasks, &stage, b"", 220), first),
            ("half preface, worker", attack::silent(tasks, &stage, b"PRI * HT", 220), first),
            (
                "4 MiB lists",
                attack::bodies(tasks, &http, &million(), 24, Duration::from_secs(1)),
                message,
            ),
            (
                "calls without a message",
                attack::half_calls(tasks, &grpc, "/tercet.v1.Inference/Generate", b"", (3, 150)),
                first,
            ),
            (
                "calls with half a message",
                attack::half_calls(
                    tasks,
                    &grpc,
                    "/tercet.v1.Inference/Generate",
                    b"\0\0\0\0\x09half",
                    (1, 150),
                ),
                message,
            ),
            (
                "half messages, worker",
                attack::half_messages(
                    tasks,
                    &stage,
                    "/tercet.v1.Stage/Steps",
                    60 << 20,
                    (8, 8),
                    Duration::from_millis(50),
                ),
                Duration::from_secs(10),
            ),
            (
                "calls without a message, worker",
                attack::half_calls(tasks, &stage, "/tercet.v1.Stage/Prepare", b"", (2, 60)),
                first,
            ),
            ("slow readers", attack::slow_readers(tasks, &http, &long, 8), Duration::from_secs(30)),
        ];
        let (attacked, admin_probes, main_probes) = tokio::join!(
            honest(&http, &golden, ATTACK),
            probe(admin.clone(), ATTACK),
            probe(http.clone(), ATTACK),
        );
        attackers.shutdown().await;

        println!("attack: {attacked}");
        let slowest = *admin_probes.iter().max().unwrap();
        println!(
            "/livez: admin at most {slowest:?} (p99 {:?}), main port at most {:?}",
            quantile(&admin_probes, 99),
            main_probes.iter().max().unwrap()
        );
        for (name, tally, limit) in &kinds {
            println!(
                "{name}: {} ended, at most {:?} (limit {limit:?}), {} not connected",
                tally.ended.load(Ordering::Relaxed),
                tally.longest(),
                tally.refused.load(Ordering::Relaxed),
            );
        }
        let high = memory_mib(coordinator, "VmHWM");
        let growth: Vec<u64> = (workers.iter().zip(&before))
            .map(|(id, before)| memory_mib(*id, "VmHWM").saturating_sub(*before))
            .collect();
        println!("memory: coordinator at most {high} MiB, workers grew by at most {growth:?} MiB");

        assert_eq!(attacked.wrong, Vec::<String>::new());
        assert!(quiet.wrong.is_empty(), "{:?}", quiet.wrong);
        assert!(high < 300, "coordinator: {high} MiB");
        assert!(growth.iter().all(|growth| *growth <= 200), "workers: {growth:?} MiB");
        for (name, tally, limit) in &kinds {
            assert!(tally.ended.load(Ordering::Relaxed) > 0, "{name} was never cut");
            assert!(tally.longest() <= *limit + SLACK, "{name}: {:?}", tally.longest());
        }
        assert!(slowest <= Duration::from_millis(100), "/livez took {slowest:?}");
        let (quiet, attacked) = (quantile(&quiet.whole, 99), quantile(&attacked.whole, 99));
        assert!(attacked <= 2 * quiet, "streams took {attacked:?}, quiet ones {quiet:?}");
    });
    assert_eq!(cluster.status()["plan"]["epoch"], epoch["epoch"], "the pipeline was not rebuilt");
}
