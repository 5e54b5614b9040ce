//! A rack of workers on one machine: real processes that wait and hash in place of arithmetic, with a
//! real etcd. They come, drain and are killed while answers stream, and every token is compared with a
//! chain that is computed here: no sequence may ever get a wrong state.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]
#![expect(clippy::print_stdout, reason = "what was measured is a result")]

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::chain::{self, Check, Model};
use crate::cluster::Cluster;
use crate::process::{
    Process, TICKS_PER_S, busy_ticks, computed_ticks, memory_mib, status_number, wait_for,
};
use crate::scrape::Scrape;
use client::{Client, Endpoint};
use futures::StreamExt;
use nix::sys::signal::Signal;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

/// Within which all pipelines must be there, and again at the end: workers start, wait for the lease of
/// the process before them, are planned for after the hold-down, and prepare.
const SETTLE: Duration = Duration::from_secs(90);

/// Streams that share a connection.
const STREAMS_OF_CONNECTION: usize = 16;

/// Of the processes that run the streams.
const CLIENT_THREADS: usize = 2;

/// How often the answers have died that fail with their pipeline: see docs/scheduling.md.
const DEATHS: usize = 2;

/// One rack and what is done to it.
#[derive(Debug)]
pub struct Rack {
    /// For people.
    pub name: &'static str,
    /// Of the model.
    pub store: PathBuf,
    /// How many.
    pub workers: usize,
    /// Of every pipeline.
    pub stages: usize,
    /// What a step takes in a stage, as `--stub-compute` has it.
    pub profile: &'static str,
    /// How many at once.
    pub streams: usize,
    /// Of every answer.
    pub tokens: u32,
    /// Of the longest prompt.
    pub prompt: u32,
    /// How long streams run before anything is done.
    pub quiet: Duration,
    /// How long workers go and come.
    pub turmoil: Duration,
    /// Between two that go.
    pub pause: Duration,
}

/// What a rack did: while nothing was done to it, and while workers went and came.
#[derive(Debug)]
pub struct Done {
    /// While nothing was done.
    pub quiet: Figures,
    /// Then.
    pub turmoil: Figures,
}

/// What streams found.
#[derive(Debug, Default)]
struct Found {
    answers: u64,
    tokens: u64,
    wrong: Vec<String>,
    failed: Vec<Failure>,
}

#[derive(Debug)]
struct Failure {
    begin: Instant,
    end: Instant,
    message: String,
}

impl Found {
    fn add(&mut self, other: Self) {
        self.answers += other.answers;
        self.tokens += other.tokens;
        self.wrong.extend(other.wrong);
        self.failed.extend(other.failed);
    }
}

/// Answers that stream until they are told to stop.
struct Load {
    runtime: Runtime,
    streams: JoinSet<Found>,
    over: Arc<AtomicBool>,
}

impl Load {
    fn start(rack: &Rack, grpc: &str) -> Self {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(CLIENT_THREADS).enable_all().build().unwrap();
        let (over, next) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let model = Model::of(&rack.store);
        let endpoint: Endpoint = grpc.parse().unwrap();
        let mut streams = JoinSet::new();
        let mut client = None;
        for index in 0..rack.streams {
            if index % STREAMS_OF_CONNECTION == 0 {
                client = Some(runtime.block_on(Client::connect(&endpoint)).unwrap());
            }
            let (client, over, next) = (client.clone().unwrap(), over.clone(), next.clone());
            let (longest, tokens) = (rack.prompt, rack.tokens);
            let requests = move || {
                let goes_on = !over.load(Ordering::Relaxed);
                let number = next.fetch_add(1, Ordering::Relaxed);
                goes_on.then(|| chain::request(model, number, longest, tokens))
            };
            streams.spawn_on(stream(client, model, requests), runtime.handle());
        }
        Self { runtime, streams, over }
    }

    /// Lets every answer come to its end.
    fn end(self) -> Found {
        let Self { runtime, streams, over } = self;
        over.store(true, Ordering::Relaxed);
        let all = runtime.block_on(streams.join_all());
        let mut found = Found::default();
        all.into_iter().for_each(|one| found.add(one));
        found
    }
}

/// Streams answer after answer and checks every token.
async fn stream(
    client: Client,
    model: Model,
    mut requests: impl FnMut() -> Option<proto::generate::GenerateRequest>,
) -> Found {
    let mut found = Found::default();
    while let Some(request) = requests() {
        let proto::generate::Prompt::Tokens(prompt) = &request.prompt else { unreachable!() };
        let (mut check, wanted) = (Check::new(model, prompt), u64::from(request.max_tokens));
        let begin = Instant::now();
        let answered = async {
            let mut answer = client.generate(request).await.map_err(|error| error.to_string())?;
            while let Some(event) = answer.next().await {
                let event = event.map_err(|error| error.to_string())?;
                if let Err(wrong) = check.take(&event) {
                    return Ok(Some(wrong));
                }
            }
            let ended = check.tokens;
            Ok((ended != wanted).then(|| format!("it ended after {ended} tokens")))
        };
        match answered.await {
            Ok(None) => found.answers += 1,
            Ok(Some(wrong)) => found.wrong.push(wrong),
            Err(message) => found.failed.push(Failure { begin, end: Instant::now(), message }),
        }
        found.tokens += check.tokens;
    }
    found
}

/// What a coordinator did in a while.
#[derive(Debug)]
pub struct Figures {
    /// Of all pipelines together.
    pub steps_per_s: f64,
    /// CPU time of the coordinator for one of them, in ms.
    pub cpu_ms: f64,
    /// What half of them took, through the pipeline and back.
    pub round: Duration,
    /// What half of them, and 99 of a hundred, were held up at most beside computing.
    pub added: [Duration; 2],
    /// Share of what all CPUs of the machine can, whoever used it.
    pub busy: f64,
    /// Of that, the share of workers that were there all the time, coordinator, registry and clients.
    pub own: f64,
    /// Memory of the coordinator.
    pub memory_mib: u64,
    /// Threads of the coordinator.
    pub threads: u64,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { steps_per_s, cpu_ms, round, added: [half, most], .. } = self;
        write!(f, "{steps_per_s:.0} steps/s, coordinator {cpu_ms:.3} ms of CPU a step, ")?;
        write!(f, "round {round:.1?} (p50), added {half:.2?} (p50), {most:.2?} (p99); ")?;
        let [busy, own] = [self.busy, self.own].map(|share| share * 100.0);
        write!(f, "machine {busy:.0} % busy, {own:.0} % with this; ")?;
        write!(f, "coordinator {} MiB, {} threads", self.memory_mib, self.threads)
    }
}

/// Measures while `work` is done.
fn measured<T>(
    rack: &Rack,
    cluster: &mut Cluster,
    work: impl FnOnce(&mut Cluster) -> T,
) -> (Figures, T) {
    let all = |cluster: &mut Cluster| -> BTreeMap<u32, u64> {
        let workers = (0..rack.workers).map(|index| cluster.worker(index).id()).collect::<Vec<_>>();
        let others = [cluster.coordinator().id(), cluster.etcd().id(), std::process::id()];
        workers.into_iter().chain(others).map(|id| (id, computed_ticks(id))).collect()
    };
    let (http, id) = (cluster.http().to_owned(), cluster.coordinator().id());
    let look = || (Scrape::of(&http), computed_ticks(id), busy_ticks(), Instant::now());
    let own_before = all(cluster);
    let (before, ticks_before, machine_before, begin) = look();
    let done = work(cluster);
    let (after, ticks, machine, end) = look();
    let own = all(cluster).into_iter().filter_map(|(id, ticks)| Some(ticks - own_before.get(&id)?));
    let steps = |scrape: &Scrape| scrape.value("tercet_step_seconds_count");
    let steps = steps(&after) - steps(&before);
    let cpu_ms = (ticks - ticks_before) as f64 * 1000.0 / TICKS_PER_S as f64;
    let quantile = |name, share| after.quantile_since(&before, name, share);
    let machine = [machine.0 - machine_before.0, machine.1 - machine_before.1];
    let figures = Figures {
        steps_per_s: steps / (end - begin).as_secs_f64(),
        cpu_ms: cpu_ms / steps.max(1.0),
        round: quantile("tercet_step_seconds", 0.5),
        added: [0.5, 0.99].map(|share| quantile("tercet_step_added_seconds", share)),
        busy: machine[0] as f64 / machine[1].max(1) as f64,
        own: own.sum::<u64>() as f64 / machine[1].max(1) as f64,
        memory_mib: memory_mib(id, "VmRSS"),
        threads: status_number(id, "Threads"),
    };
    (figures, done)
}

#[expect(clippy::disallowed_methods, reason = "what other processes do meanwhile is measured")]
fn rest(time: Duration) {
    std::thread::sleep(time);
}

/// Pipelines that serve, by their numbers of stages.
fn serving(cluster: &Cluster) -> BTreeMap<usize, usize> {
    let status = cluster.status();
    let pipelines = status["plan"]["pipelines"].as_array().unwrap();
    let mut counts = BTreeMap::new();
    for pipeline in pipelines.iter().filter(|pipeline| pipeline["state"] == "active") {
        *counts.entry(pipeline["stages"].as_array().map_or(0, Vec::len)).or_default() += 1;
    }
    counts
}

fn wait_until_whole(cluster: &Cluster, rack: &Rack, what: &str) -> Duration {
    let begin = Instant::now();
    let wanted = BTreeMap::from([(rack.stages, rack.workers / rack.stages)]);
    wait_for(what, SETTLE, || {
        rest(Duration::from_millis(500));
        (serving(cluster) == wanted).then_some(())
    });
    begin.elapsed()
}

/// What was done to the workers.
#[derive(Default)]
struct Turmoil {
    kills: Vec<Instant>,
    drained: Vec<(String, Process)>,
}

impl Turmoil {
    /// Ends one worker after another, two without a word for every one in order, and starts a new
    /// process in the place of each at once.
    fn run(rack: &Rack, cluster: &mut Cluster) -> Self {
        let mut turmoil = Self::default();
        let begin = Instant::now();
        for round in 0_usize.. {
            let due = begin + rack.pause * round as u32;
            if due >= begin + rack.turmoil {
                break;
            }
            rest(due.saturating_duration_since(Instant::now()));
            // Coprime to the number of workers: each has its turn, neighbours at different times.
            let index = (round * 23 + 5) % rack.workers;
            let id = format!("worker-{index}");
            if round % 3 == 2 {
                cluster.worker(index).signal(Signal::SIGTERM);
                let old = cluster.take_worker(index);
                turmoil.drained.push((id.clone(), old));
                let new = cluster.start_worker(&id);
                cluster.put_worker(index, new);
            } else {
                cluster.worker(index).kill();
                turmoil.kills.push(Instant::now());
                let new = cluster.start_worker(&id);
                cluster.replace_worker(index, new);
            }
        }
        rest((begin + rack.turmoil).saturating_duration_since(Instant::now()));
        turmoil
    }

    /// Everyone who was asked to go must have gone in order.
    fn check(&mut self) {
        for (id, worker) in &mut self.drained {
            let status = worker.wait(SETTLE);
            assert!(
                status.success(),
                "{id} drains and exits by itself: {status}\n{}",
                worker.log()
            );
        }
    }

    /// Whether a stream may have failed: its pipeline was lost as often as the limit says.
    fn explains(&self, failure: &Failure) -> bool {
        let within = |kill: &&Instant| (failure.begin..=failure.end).contains(*kill);
        failure.message.contains("lost") && self.kills.iter().filter(within).count() >= DEATHS
    }
}

impl Rack {
    /// Starts it, lets answers stream, and ends and starts workers meanwhile.
    ///
    /// # Panics
    ///
    /// If a token was wrong, an answer failed that may not, a worker did not go in order, or not all
    /// serve at the beginning or again at the end.
    pub fn run(&self) -> Done {
        let environment = [
            ("TERCET_COORDINATOR__ALLOW_STUB_COMPUTE", "true"),
            ("TERCET_COORDINATOR__SETTLE", "2s"),
            ("TERCET_COORDINATOR__HOLD_DOWN", "1s"),
            ("TERCET_WORKER__STUB_COMPUTE", self.profile),
        ];
        let begin = Instant::now();
        let flags = format!("--stages {}", self.stages);
        let mut cluster =
            Cluster::start_flags(self.store.clone(), self.workers, &flags, &environment);
        let Self { name, workers, stages, streams, .. } = self;
        wait_until_whole(&cluster, self, "all workers to serve");
        println!("{name}: {workers} workers, {stages} in a pipeline, {streams} streams");
        println!("{name}: all serve after {:.1?}", begin.elapsed());

        let load = Load::start(self, cluster.grpc());
        rest(self.quiet / 10);
        let (quiet, ()) = measured(self, &mut cluster, |_| rest(self.quiet));
        println!("{name}, at rest: {quiet}");
        let (turbulent, mut turmoil) =
            measured(self, &mut cluster, |cluster| Turmoil::run(self, cluster));
        println!("{name}, while workers come and go: {turbulent}");
        let found = load.end();
        turmoil.check();
        let Found { answers, tokens, wrong, failed } = &found;
        let (killed, drained) = (turmoil.kills.len(), turmoil.drained.len());
        println!(
            "{name}: {killed} workers killed, {drained} drained; {answers} answers and {tokens} \
             tokens right, {} wrong, {} failed",
            wrong.len(),
            failed.len()
        );
        for failure in failed {
            let after = failure.end - failure.begin;
            println!("{name}: failed after {after:.1?}: {}", failure.message);
        }
        let again = wait_until_whole(&cluster, self, "all workers to serve again");
        println!("{name}: all serve again after {again:.1?}");

        assert_eq!(*wrong, Vec::<String>::new());
        let unexplained: Vec<_> = failed.iter().filter(|one| !turmoil.explains(one)).collect();
        assert!(
            unexplained.is_empty(),
            "{} of {}: {unexplained:#?}",
            unexplained.len(),
            failed.len()
        );
        assert!(*answers >= self.streams as u64, "{answers} answers");
        Done { quiet, turmoil: turbulent }
    }
}
