//! The control task against a registry in memory, without workers.

use bytes::Bytes;
use node::membership::{Entry, Memory, Registration, Revision, Snapshot, WriteOutcome};
use proto::ids::ModelId;
use proto::key::LeaderRecord;
use proto::plan::KvType;
use tokio::sync::oneshot;

use super::*;
use crate::driver::Submission;
use crate::driver::timed::testing::{LONGEST_POLL, Longest, cpu_time};
use crate::planner::{ModelCosts, Objective};
use crate::request::RequestError;
use crate::router::Wish;
use crate::scheduler::{Limits, Request, Sequence};

pub(in crate::driver) fn config(lame_duck: Duration, grace: Duration) -> DriverConfig {
    DriverConfig {
        cluster_name: "c".to_owned(),
        cluster: cluster::Options {
            cluster_id: "1".to_owned(),
            last_pipeline: PipelineId(0),
            model: ModelId([1; 32]),
            costs: ModelCosts {
                layers: 2,
                layer_bytes: 1,
                embedding_bytes: 1,
                head_bytes: 1,
                tied_head: false,
                kv_block_layer_bytes: 1,
            },
            kv_type: KvType::F16,
            stages: Some(1),
            pipelines: None,
            min_kv_blocks: 1,
            max_kv_blocks: 1,
            max_step_tokens: 1,
            context_tokens: 1,
            objective: Objective::default(),
            settle: Duration::ZERO,
            hold_down: Duration::ZERO,
            min_gain_percent: 5,
            drift_time: Duration::from_secs(60),
            allow_stub_compute: false,
        },
        limits: Limits::default(),
        advertise: "c:1".to_owned(),
        http: "c:2".to_owned(),
        admin: None,
        socket: String::new(),
        first_token: 0,
        vocab: 1,
        grace,
        lame_duck,
        lanes: tokio::runtime::Handle::current(),
    }
}

/// A registry whose calls to `list` panic.
struct Broken(Memory);

#[tonic::async_trait]
impl Membership for Broken {
    async fn get_or_create(&self, key: &str, value: Bytes) -> Result<Entry, MembershipError> {
        self.0.get_or_create(key, value).await
    }

    async fn register(&self, key: &str, value: Bytes) -> Result<Registration, MembershipError> {
        self.0.register(key, value).await
    }

    async fn list(&self, prefix: &str) -> Result<Snapshot, MembershipError> {
        panic!("asked for {prefix}")
    }

    fn watch(&self, prefix: &str) -> Watch {
        self.0.watch(prefix)
    }

    async fn campaign(
        &self,
        key: &str,
        value: Bytes,
        stop: &CancellationToken,
    ) -> Result<Leadership, MembershipError> {
        self.0.campaign(key, value, stop).await
    }

    async fn remove(&self, key: &str, revision: Revision) -> Result<bool, MembershipError> {
        self.0.remove(key, revision).await
    }

    async fn write_if_leader(
        &self,
        leader_key: &str,
        term: Revision,
        key: &str,
        previous: Option<Revision>,
        value: Bytes,
    ) -> Result<WriteOutcome, MembershipError> {
        self.0.write_if_leader(leader_key, term, key, previous, value).await
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_panics_ends_the_driver() {
    let grace = Duration::ZERO;
    let membership = Arc::new(Broken(Memory::new()));
    let stop = CancellationToken::new();
    let (driver, _handle) = Driver::new(config(grace, grace), Keys::new("c"), membership, stop);
    let answered = CancellationToken::new();
    let mut run = JoinSet::new();
    run.spawn(driver.run(answered.clone().drop_guard()));
    let end = tokio::time::timeout(Duration::from_secs(60), run.join_next()).await;
    let end = end.expect("it goes on, and waits for an answer for ever").unwrap().unwrap_err();
    assert!(end.is_panic());
    assert!(answered.is_cancelled(), "nobody waits for the rest");
}

#[tokio::test(start_paused = true)]
async fn after_the_stop_requests_are_taken_for_a_while_and_then_refused() {
    let (lame_duck, grace) = (Duration::from_secs(2), Duration::from_secs(5));
    let membership = Arc::new(Memory::new());
    membership.disconnect();
    let stop = CancellationToken::new();
    let (driver, handle) =
        Driver::new(config(lame_duck, grace), Keys::new("c"), membership, stop.clone());
    let answered = CancellationToken::new();
    let begin = Instant::now();
    let mut run = JoinSet::new();
    run.spawn(driver.run(answered.clone().drop_guard()));
    stop.cancel();
    let ask = || {
        let submission = Box::new(Submission {
            sequence: Box::new(Sequence::new(Request::probe(1)).unwrap()),
            wish: Wish::default(),
            arrived: Instant::now(),
            time_limit: Duration::from_secs(60),
        });
        let (reply, admitted) = oneshot::channel();
        let command = Command::Submit { submission, reply };
        let handle = handle.clone();
        async move {
            handle.tell(command).await;
            admitted.await
        }
    };
    // It hears of the stop in its own time.
    let heard = async { while handle.checks().await.unwrap()[0].passes {} };
    tokio::time::timeout(lame_duck / 2, heard).await.expect("it is never told");
    let Err(RequestError::Unavailable { reason }) = ask().await.unwrap() else { panic!("taken") };
    // The first is told what the cluster lacks, or waits until everyone is refused.
    assert!(begin.elapsed() <= lame_duck + Duration::from_secs(1), "{reason}");
    run.join_next().await.unwrap().unwrap();
    assert!(answered.is_cancelled());
    assert!(begin.elapsed() >= lame_duck, "who sends requests here needs a moment to see it");
    assert!(begin.elapsed() < grace, "and nobody waits for longer without an open answer");
}

#[tokio::test(start_paused = true)]
async fn a_coordinator_that_restarts_does_not_wait_for_its_own_lease() {
    let (near, keys) = (Memory::new(), Keys::new("c"));
    let far = near.another();
    let leads = async |socket: &str| {
        let stop = CancellationToken::new();
        let incarnation = Incarnation([1; 16]);
        let socket = socket.to_owned();
        let before = LeaderRecord { incarnation, socket, ..LeaderRecord::default() };
        let value = serde_json::to_vec(&before).unwrap().into();
        let held = far.campaign(&keys.leader(), value, &stop).await.unwrap();
        // It is killed: it gives nothing up.
        far.disconnect();
        let grace = Duration::ZERO;
        let membership = Arc::new(near.clone());
        let at_socket = DriverConfig { socket: "s".to_owned(), ..config(grace, grace) };
        let (driver, _handle) = Driver::new(at_socket, keys.clone(), membership, stop.clone());
        let mut run = JoinSet::new();
        run.spawn(driver.run(CancellationToken::new().drop_guard()));
        let is_another = async {
            loop {
                let found = near.list(&keys.leader()).await.unwrap().entries.pop();
                let found = found.map(|entry| serde_json::from_slice(&entry.value).unwrap());
                if found.is_some_and(|found: LeaderRecord| found.incarnation != incarnation) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let leads = tokio::time::timeout(Duration::from_secs(1), is_another).await.is_ok();
        stop.cancel();
        run.join_next().await.unwrap().unwrap();
        far.reconnect();
        drop(held);
        leads
    };
    assert!(leads("s").await, "it waits for a lease whose owner has ended");
    assert!(!leads("another").await, "that one may live");
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_is_away_does_not_hold_up_the_end() {
    let begin = Instant::now();
    registry::resign(std::future::pending()).await;
    assert_eq!(begin.elapsed(), registry::RESIGN_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn no_poll_computes_for_long_however_long_the_queue_is() {
    const MANY: u32 = 20_000;
    let mut config = config(Duration::ZERO, Duration::from_secs(60));
    config.limits.waiting_requests = 2 * MANY;
    let membership = Arc::new(Memory::new());
    // It does not lead, so that everyone who waits fails at the first tick.
    membership.disconnect();
    let stop = CancellationToken::new();
    let (mut driver, _handle) = Driver::new(config, Keys::new("c"), membership, stop.clone());
    let pipeline = PipelineId(1);
    driver.router.set_pipeline(pipeline, 1, proto::ids::NumericsClass([1; 32]));
    driver.router.hold(pipeline, true);
    let template = Box::new(Sequence::new(Request::probe(1)).unwrap());
    let mut clients = Vec::new();
    for _ in 0..MANY {
        let taken = driver.router.submit(template.clone(), Wish::default(), Tick::ZERO).unwrap();
        clients.push(driver.clients.add(taken.sequence, Tick::ZERO, 1));
    }
    // Half of them go away.
    clients.truncate(MANY as usize / 2);
    let longest = Longest::default();
    let mut run = JoinSet::new();
    let answered = CancellationToken::new();
    run.spawn(timed(driver.work(answered.clone().drop_guard()), cpu_time, longest.observe()));
    for client in clients {
        let end = client.end().await.unwrap_err();
        assert!(end.to_string().contains("does not lead"), "{end}");
    }
    stop.cancel();
    run.join_next().await.unwrap().unwrap();
    let longest = longest.get();
    assert!(longest < LONGEST_POLL, "the control task computed for {longest:?} at once");
}

#[tokio::test(start_paused = true)]
async fn no_poll_computes_for_long_however_much_there_is_to_read_of_workers() {
    const MANY: usize = 256;
    let (membership, keys) = (Memory::new(), Keys::new("c"));
    let mut registrations = Vec::new();
    for index in 0..MANY {
        let id = format!("w{index}");
        let record = WorkerRecord {
            id: id.clone(),
            incarnation: Incarnation([1; 16]),
            address: format!("host-{index}:1"),
            // A label: nothing is inferred from the figures, which are the most that there may be.
            rack: "r".to_owned(),
            round_trips_us: (0..proto::limits::ROUND_TRIPS as u32)
                .map(|other| (format!("other-{other}"), 100 + other))
                .collect(),
            ..WorkerRecord::default()
        };
        let value = serde_json::to_vec(&record).unwrap().into();
        registrations.push(membership.register(&keys.worker(&id), value).await.unwrap());
    }
    let (stop, longest) = (CancellationToken::new(), Longest::default());
    let config = config(Duration::ZERO, Duration::ZERO);
    let (driver, handle) = Driver::new(config, keys, Arc::new(membership), stop.clone());
    let mut run = JoinSet::new();
    let answered = CancellationToken::new();
    run.spawn(timed(driver.work(answered.clone().drop_guard()), cpu_time, longest.observe()));
    let knows_all = async { while handle.status().await.unwrap().workers.len() < MANY {} };
    tokio::time::timeout(Duration::from_secs(60), knows_all).await.expect("it hears of them");
    stop.cancel();
    run.join_next().await.unwrap().unwrap();
    let longest = longest.get();
    assert!(longest < LONGEST_POLL, "the control task computed for {longest:?} at once");
}
