//! The campaign: every kind of client that does not do its part, all at once for a minute, beside
//! honest ones, against real processes. Not part of `cargo test`: `./test --soak` runs it.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use tests::attack::{self, Tally};
use tests::cluster::Cluster;
use tests::honest::{self, Measured, quantile};
use tests::model::bundled_store;
use tests::process::{TICKS_PER_S, computed_ticks, free_ports, memory_mib, own_address};
use tokio::task::JoinSet;
use tokio::time::sleep;

/// How long honest clients are watched alone, before the attack and again after it: what else runs
/// on the machine meanwhile weighs on both sides.
const QUIET: Duration = Duration::from_secs(30);

/// How long they are watched among the others.
const ATTACK: Duration = Duration::from_secs(60);

/// Between the last attacker and the second quiet time.
const SETTLING: Duration = Duration::from_secs(1);

/// What honest streams may take among attackers, in times of what they take alone.
const SLOWER: u32 = 2;

/// The least that both sides must have measured: a quantile of 99 in a hundred needs hundreds.
const STREAMS: usize = 200;

/// What `/livez` may take.
const PROBE: Duration = Duration::from_millis(100);

/// Slack of deadlines on a machine that computes meanwhile.
const SLACK: Duration = Duration::from_secs(5);

/// Memory of the coordinator, and what a worker may grow by.
const COORDINATOR_MIB: u64 = 300;
const WORKER_GROWTH_MIB: u64 = 200;

/// Each of `ids` in hundredths of a core, since `before` was asked.
fn percent(ids: &[u32], before: &[u64], span: Duration) -> Vec<u64> {
    let ticks = ids.iter().zip(before).map(|(id, before)| computed_ticks(*id) - before);
    ticks.map(|ticks| ticks * 100 / TICKS_PER_S / span.as_secs()).collect()
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

/// One kind of attackers.
struct Kind {
    name: &'static str,
    /// How many there are.
    count: usize,
    /// By when each must be cut.
    limit: Duration,
    /// The longest that one of them goes without an attack: those that are carried out are counted.
    every: Duration,
    tally: Arc<Tally>,
}

impl Kind {
    fn new(name: &'static str, count: usize, limit: Duration, tally: Arc<Tally>) -> Self {
        Self { name, count, limit, every: limit + SLACK, tally }
    }

    fn ended(&self) -> u64 {
        self.tally.ended.load(Ordering::Relaxed)
    }

    /// The least that must have been carried out, or the attack was none.
    fn floor(&self) -> u64 {
        self.count as u64 * (ATTACK.as_secs() / self.every.as_secs()).max(1)
    }
}

/// Lets every kind of attacker loose.
fn attack(tasks: &mut JoinSet<()>, http: &str, grpc: &str, stage: &str) -> Vec<Kind> {
    const GENERATE: &str = "/tercet.v1.Inference/Generate";
    let long = Bytes::from(
        json!({ "prompt": "One day", "max_tokens": 64, "ignore_eos": true, "stream": true })
            .to_string(),
    );
    let first = Duration::from_secs(5);
    let message = Duration::from_secs(30);
    let worker_message = Duration::from_secs(10);
    let pause = Duration::from_secs(1);
    let drip = Duration::from_millis(50);
    let silent = |tasks: &mut JoinSet<()>, name, address: &str, words, count| {
        Kind::new(name, count, first, attack::silent(tasks, address, words, count))
    };
    let mut bodies =
        Kind::new("4 MiB lists", 24, message, attack::bodies(tasks, http, &million(), 24, pause));
    bodies.every = pause + SLACK;
    vec![
        silent(tasks, "silent, HTTP", http, b"", 200),
        silent(tasks, "half preface, HTTP", http, b"PRI * HT", 120),
        silent(tasks, "half head, HTTP", http, b"GET / HT", 120),
        silent(tasks, "silent, gRPC", grpc, b"", 440),
        silent(tasks, "silent, worker", stage, b"", 220),
        silent(tasks, "half preface, worker", stage, b"PRI * HT", 220),
        bodies,
        Kind::new(
            "calls without a message",
            3 * 150,
            first,
            attack::half_calls(tasks, grpc, GENERATE, b"", (3, 150)),
        ),
        Kind::new(
            "calls with half a message",
            150,
            message,
            attack::half_calls(tasks, grpc, GENERATE, b"\0\0\0\0\x09half", (1, 150)),
        ),
        Kind::new(
            "half messages, worker",
            8 * 8,
            worker_message,
            attack::half_messages(tasks, stage, "/tercet.v1.Stage/Steps", 60 << 20, (8, 8), drip),
        ),
        Kind::new(
            "calls without a message, worker",
            2 * 60,
            first,
            attack::half_calls(tasks, stage, "/tercet.v1.Stage/Prepare", b"", (2, 60)),
        ),
        Kind::new("slow readers", 8, message, attack::slow_readers(tasks, http, &long, 8)),
    ]
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
    let all: Vec<u32> = [&[coordinator], workers.as_slice()].concat();
    let ticks = || all.iter().map(|id| computed_ticks(*id)).collect::<Vec<_>>();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();

    let golden = runtime.block_on(honest::golden(&http));
    let quiet = || -> (Measured, Vec<Duration>) {
        let before = ticks();
        let (measured, probes) = runtime.block_on(async {
            tokio::join!(honest::watch(&http, &golden, QUIET), honest::probe(&admin, QUIET))
        });
        let computed = percent(&all, &before, QUIET);
        println!("quiet:  {measured}; /livez at most {:?}", probes.iter().max().unwrap());
        println!("cores:  coordinator, workers: {computed:?} %");
        (measured, probes)
    };
    let (mut alone, _) = quiet();
    let before: Vec<u64> = workers.iter().map(|id| memory_mib(*id, "VmRSS")).collect();

    let others = attack::runtime();
    let mut attackers = JoinSet::new();
    let kinds = {
        let _theirs = others.enter();
        attack(&mut attackers, &http, &grpc, &stage)
    };
    let ticks_before = ticks();
    let (attacked, admin_probes, main_probes) = runtime.block_on(async {
        tokio::join!(
            honest::watch(&http, &golden, ATTACK),
            honest::probe(&admin, ATTACK),
            honest::probe(&http, ATTACK),
        )
    });
    let computed = percent(&all, &ticks_before, ATTACK);
    runtime.block_on(attackers.shutdown());
    drop(others);

    println!("attack: {attacked}");
    println!("cores:  coordinator, workers: {computed:?} %");
    let slowest = *admin_probes.iter().max().unwrap();
    println!(
        "/livez: admin at most {slowest:?} (p99 {:?}), main port at most {:?}",
        quantile(&admin_probes, 99),
        main_probes.iter().max().unwrap()
    );
    for kind in &kinds {
        println!(
            "{}: {} ended (at least {}), at most {:?} (limit {:?}), {} not connected",
            kind.name,
            kind.ended(),
            kind.floor(),
            kind.tally.longest(),
            kind.limit,
            kind.tally.refused.load(Ordering::Relaxed),
        );
    }
    let high = memory_mib(coordinator, "VmHWM");
    let growth: Vec<u64> = (workers.iter().zip(&before))
        .map(|(id, before)| memory_mib(*id, "VmHWM").saturating_sub(*before))
        .collect();
    println!("memory: coordinator at most {high} MiB, workers grew by at most {growth:?} MiB");

    runtime.block_on(async { sleep(SETTLING).await });
    alone.add(quiet().0);

    assert_eq!(attacked.wrong, Vec::<String>::new());
    assert_eq!(alone.wrong, Vec::<String>::new());
    for streams in [alone.streams(), attacked.streams()] {
        assert!(streams >= STREAMS, "{streams} streams came to their end, {STREAMS} are needed");
    }
    assert!(high < COORDINATOR_MIB, "coordinator: {high} MiB");
    assert!(growth.iter().all(|growth| *growth <= WORKER_GROWTH_MIB), "workers: {growth:?} MiB");
    for kind in &kinds {
        let (name, ended, floor) = (kind.name, kind.ended(), kind.floor());
        assert!(ended >= floor, "{name}: {ended} attacks were carried out, not {floor}");
        assert!(kind.tally.longest() <= kind.limit + SLACK, "{name}: {:?}", kind.tally.longest());
    }
    assert!(slowest <= PROBE, "/livez took {slowest:?}");
    let (alone, attacked) = (alone.whole_p99(), attacked.whole_p99());
    println!("p99 of whole streams: {alone:?} alone, {attacked:?} among attackers");
    assert!(attacked <= SLOWER * alone, "streams took {attacked:?}, alone {alone:?}");
    assert_eq!(cluster.status()["plan"]["epoch"], epoch["epoch"], "the pipeline was not rebuilt");
}
