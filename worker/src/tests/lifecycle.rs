//! A whole worker as its process runs it: registry, health, reflection, draining.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use node::membership::{Event, Leadership, Membership, Memory, Watch};
use proto::convert::encode_prepare;
use proto::ids::{Epoch, Incarnation, Term};
use proto::key::{CoordinatorKey, LeaderRecord};
use proto::keys::Keys;
use proto::pb::stage_client::StageClient;
use proto::plan::{StagePlan, StepTime, WorkerModel, WorkerRecord};
use proto::step::{Output, Prepare};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::harness::{
    KEY, LONG, Steps, Worker, connect, model_id, prepare, row, soon, step, store_dir,
};
use crate::config::cpu::CpuLimits;
use crate::machine::{adjust, follow, measure_again};
use crate::record::{Published, encode};
use crate::{Config, RunError, StubProfile, known_answer};

type Ended = JoinSet<Result<(), RunError>>;

pub(super) fn config() -> Config {
    Config {
        id: Some("w1".parse().unwrap()),
        listen: "127.0.0.1:0".parse().unwrap(),
        threads: Some(1),
        store: store_dir().to_owned(),
        ..Config::default()
    }
}

/// A worker, its registry, and how to stop it.
pub(super) struct Process {
    address: SocketAddr,
    watch: Watch,
    /// The worker's own connection.
    registry: Memory,
    /// Of the coordinator that the tests play.
    pub(super) leadership: Leadership,
    stop: CancellationToken,
    ended: Ended,
}

impl Process {
    pub(super) async fn start(config: Config) -> Self {
        Self::start_in(Memory::new(), config).await
    }

    /// With a registry in which there are others.
    async fn start_in(membership: Memory, config: Config) -> Self {
        let registry = membership.another();
        let keys = Keys::new("test");
        let mut watch = membership.watch(&keys.workers());
        let Event::Reset(_) = soon(watch.next()).await else { panic!("the first is a reset") };
        let record = LeaderRecord {
            address: "none:1".into(),
            key_digest: Some(KEY.digest()),
            ..LeaderRecord::default()
        };
        let record = serde_json::to_vec(&record).unwrap().into();
        let (bound, address) = oneshot::channel();
        let stop = CancellationToken::new();
        membership.get_or_create(&keys.cluster_id(), "test".into()).await.unwrap();
        let leadership = membership.campaign(&keys.leader(), record, &stop).await.unwrap();
        let mut ended = JoinSet::new();
        let workers = Arc::new(registry.clone());
        ended.spawn(crate::run(config, keys, workers, Some(bound), stop.clone()));
        let address = soon(address).await.expect("it starts");
        Self { address, watch, registry, leadership, stop, ended }
    }

    pub(super) async fn record(&mut self) -> WorkerRecord {
        match soon(self.watch.next()).await {
            Event::Put(entry) => serde_json::from_slice(&entry.value).unwrap(),
            other => panic!("{other:?} instead of a record"),
        }
    }

    pub(super) async fn end(mut self) -> Result<(), RunError> {
        soon(self.ended.join_next()).await.unwrap().unwrap()
    }
}

async fn health(address: SocketAddr, service: &str) -> ServingStatus {
    let channel = Channel::from_shared(format!("http://{address}")).unwrap();
    let mut client = HealthClient::new(soon(channel.connect()).await.unwrap());
    let request = HealthCheckRequest { service: service.into() };
    soon(client.check(request)).await.unwrap().into_inner().status()
}

#[tokio::test]
async fn an_idle_worker_registers_serves_and_leaves_at_once() {
    let mut process = Process::start(config()).await;
    let record = process.record().await;
    assert_eq!((record.id.as_str(), record.draining), ("w1", false));
    assert_eq!(record.address, process.address.to_string());
    assert_eq!(record.models.len(), 1);
    assert_eq!(record.models[0].id, model_id());
    assert!(record.models[0].layer_ns(1) > Some(0));
    assert_eq!(record.fault(), None);
    assert!(!record.machine.is_empty(), "every Linux machine has a name");
    assert_ne!(record.incarnation, Incarnation([0; 16]));
    let description = connect(&record.address)
        .await
        .describe(proto::pb::DescribeRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(description.incarnation, record.incarnation.0.to_vec());
    for service in ["", "tercet.v1.Stage"] {
        assert_eq!(health(process.address, service).await, ServingStatus::Serving, "{service:?}");
    }
    process.stop.cancel();
    let draining = process.record().await;
    assert!(draining.draining, "it says so before it goes");
    assert!(matches!(soon(process.watch.next()).await, Event::Delete { .. }));
    process.end().await.unwrap();
}

/// A worker's only stage, held at epoch 1.
async fn hold_a_stage(process: &Process, record: &WorkerRecord) -> (StageClient<Channel>, Prepare) {
    let plan = StagePlan {
        worker: record.id.clone(),
        incarnation: record.incarnation,
        address: record.address.clone(),
        layers: 0..4,
    };
    let term = Term(process.leadership.term);
    let prepare = Prepare { term, ..prepare(&[plan], 0, 1) };
    let mut client = connect(&record.address).await;
    soon(client.prepare(KEY.attach(encode_prepare(&prepare)))).await.unwrap();
    (client, prepare)
}

#[tokio::test]
async fn a_draining_worker_serves_until_the_coordinator_retires_its_stage() {
    let mut process = Process::start(config()).await;
    let record = process.record().await;
    let (mut client, prepare) = hold_a_stage(&process, &record).await;
    let next = Prepare { epoch: Epoch(2), ..prepare.clone() };
    soon(client.prepare(KEY.attach(encode_prepare(&next)))).await.unwrap();
    let mut steps = Steps::open(&mut client).await;
    steps.give(&step(&next, 1, vec![row(0, 0, 5, Output::None)])).await;

    process.stop.cancel();
    assert!(process.record().await.draining);
    assert_eq!(health(process.address, "").await, ServingStatus::NotServing);
    // It goes on with what it was prepared for, and takes nothing new.
    let later = Prepare { epoch: Epoch(3), ..prepare.clone() };
    let refused = soon(client.prepare(KEY.attach(encode_prepare(&later)))).await.unwrap_err();
    assert!(refused.message().contains("draining"), "{refused}");
    assert_eq!(refused.code(), tonic::Code::Unavailable, "nothing is wrong with this worker");
    soon(client.prepare(KEY.attach(encode_prepare(&next)))).await.unwrap();
    let activate = proto::pb::ActivateRequest {
        pipeline: 1,
        epoch: 2,
        term: prepare.term.0,
        dst_incarnation: record.incarnation.0.to_vec().into(),
    };
    soon(client.activate(KEY.attach(activate))).await.unwrap();
    steps.give(&step(&next, 2, vec![row(0, 5, 1, Output::None)])).await;
    assert!(process.ended.try_join_next().is_none(), "it still serves");
    let gone = process.watch.next().now_or_never();
    assert!(gone.is_none(), "it is in the registry as long as it serves: {gone:?}");

    let retire = proto::pb::RetireRequest {
        pipeline: 1,
        epoch: 2,
        term: prepare.term.0,
        dst_incarnation: record.incarnation.0.to_vec().into(),
    };
    soon(client.retire(KEY.attach(retire))).await.unwrap();
    assert!(matches!(soon(process.watch.next()).await, Event::Delete { .. }));
    process.end().await.unwrap();
}

#[tokio::test]
async fn a_dismissed_worker_ends_by_itself_once_it_holds_nothing_and_stops_nobody_else() {
    let mut process = Process::start(config()).await;
    let record = process.record().await;
    let (mut client, prepare) = hold_a_stage(&process, &record).await;
    let dismiss = proto::pb::DismissRequest {
        term: prepare.term.0,
        dst_incarnation: record.incarnation.0.to_vec().into(),
    };
    // A stranger may not, nor somebody who means an earlier start, or is of another term.
    soon(client.dismiss(tonic::Request::new(dismiss.clone()))).await.unwrap_err();
    let guess = CoordinatorKey::new([7; 16]);
    soon(client.dismiss(guess.attach(dismiss.clone()))).await.unwrap_err();
    let earlier =
        proto::pb::DismissRequest { dst_incarnation: vec![9; 16].into(), ..dismiss.clone() };
    soon(client.dismiss(KEY.attach(earlier))).await.unwrap_err();
    let later = proto::pb::DismissRequest { term: u64::MAX, ..dismiss.clone() };
    soon(client.dismiss(KEY.attach(later))).await.unwrap_err();
    assert_eq!(health(process.address, "").await, ServingStatus::Serving);

    soon(client.dismiss(KEY.attach(dismiss.clone()))).await.unwrap();
    soon(client.dismiss(KEY.attach(dismiss))).await.expect("saying so twice changes nothing");
    assert!(process.record().await.draining);
    assert!(process.ended.try_join_next().is_none(), "it still serves");
    let retire = proto::pb::RetireRequest {
        pipeline: 1,
        epoch: 1,
        term: prepare.term.0,
        dst_incarnation: record.incarnation.0.to_vec().into(),
    };
    soon(client.retire(KEY.attach(retire))).await.unwrap();
    assert!(matches!(soon(process.watch.next()).await, Event::Delete { .. }));
    soon(process.ended.join_next()).await.unwrap().unwrap().unwrap();
    assert!(!process.stop.is_cancelled(), "the caller's token stays the caller's");
}

#[tokio::test]
async fn a_draining_worker_whose_stage_nobody_retires_goes_when_its_grace_is_over() {
    let grace = Duration::from_millis(200);
    let mut process = Process::start(Config { shutdown_grace: grace, ..config() }).await;
    let record = process.record().await;
    let (_client, _prepare) = hold_a_stage(&process, &record).await;
    let begin = Instant::now();
    process.stop.cancel();
    assert!(process.record().await.draining);
    // A coordinator leads: it is given that time.
    assert!(matches!(soon(process.watch.next()).await, Event::Delete { .. }));
    assert!(begin.elapsed() >= grace, "{:?}", begin.elapsed());
    process.end().await.unwrap();
}

#[tokio::test]
async fn a_draining_worker_without_a_coordinator_goes_when_it_is_idle() {
    let mut process = Process::start(Config { shutdown_grace: LONG, ..config() }).await;
    let record = process.record().await;
    let (_client, _prepare) = hold_a_stage(&process, &record).await;
    let Process { mut watch, leadership, stop, mut ended, .. } = process;
    leadership.resign().await.unwrap();
    stop.cancel();
    assert!(matches!(soon(watch.next()).await, Event::Put(_)), "it says that it drains");
    assert!(matches!(soon(watch.next()).await, Event::Delete { .. }));
    soon(ended.join_next()).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_draining_worker_whose_registry_is_away_goes_when_it_is_idle() {
    let mut process = Process::start(Config { shutdown_grace: LONG, ..config() }).await;
    let record = process.record().await;
    let (_client, _prepare) = hold_a_stage(&process, &record).await;
    process.registry.disconnect();
    process.stop.cancel();
    process.end().await.unwrap();
}

/// A registration of a worker that the tests play the parts of, and what the registry hears of it.
async fn published(record: WorkerRecord) -> (Published, Watch) {
    let membership = Memory::new();
    let keys = Keys::new("test");
    let mut watch = membership.watch(&keys.workers());
    let Event::Reset(_) = soon(watch.next()).await else { panic!("the first is a reset") };
    let value = encode(&record).unwrap();
    let registration = membership.register(&keys.worker("w1"), value).await.unwrap();
    let Event::Put(_) = soon(watch.next()).await else { panic!("it is registered") };
    (Published::new(record, registration, 1.0), watch)
}

async fn next_record(watch: &mut Watch) -> WorkerRecord {
    let Event::Put(entry) = soon(watch.next()).await else { panic!("it is told") };
    serde_json::from_slice(&entry.value).unwrap()
}

#[tokio::test]
async fn a_worker_says_with_how_many_threads_its_engine_was_built() {
    let mut worker = Worker::start("w1").await;
    let steps = vec![StepTime { rows: 1, layer_ns: 900, head_ns: 300 }];
    let models = vec![WorkerModel { id: model_id(), steps }];
    let memory_bytes = worker.service.offered_bytes();
    let record = WorkerRecord { threads: 1, models, memory_bytes, ..WorkerRecord::default() };
    let (published, mut watch) = published(record).await;
    let held = worker.serve_alone(1).await;
    let limits = CpuLimits { logical: 8, physical: Some(4), quota: None };
    follow(limits, Some(3), &worker.service, &published).await;
    assert_eq!(worker.service.threads(), 3, "of the next engine");
    let told = published.current();
    assert_eq!((told.threads, told.models[0].steps[0].layer_ns), (1, 900), "of this one");

    worker.retire(&held).await.unwrap();
    follow(limits, Some(3), &worker.service, &published).await;
    loop {
        // What the next engine leaves of the memory may have been told before.
        let told = next_record(&mut watch).await;
        if told.threads != 1 {
            assert_eq!((told.threads, told.models[0].steps[0].layer_ns), (3, 300));
            break;
        }
    }
}

#[tokio::test]
async fn a_worker_without_a_stage_finds_out_that_it_is_fast_again() {
    let mut worker = Worker::start("w1").await;
    let steps = vec![StepTime { rows: 1, layer_ns: u64::MAX, head_ns: u64::MAX }];
    let models = vec![WorkerModel { id: model_id(), steps }];
    let record = WorkerRecord { threads: 1, models, ..WorkerRecord::default() };
    let (published, mut watch) = published(record).await;
    let held = worker.serve_alone(1).await;
    measure_again(&worker.service, &published).await.unwrap();
    let slow = published.current().models[0].layer_ns(1);
    assert_eq!(slow, Some(u64::MAX), "steps of its stage would be disturbed");
    worker.retire(&held).await.unwrap();
    measure_again(&worker.service, &published).await.unwrap();
    let told = next_record(&mut watch).await;
    let fast = told.models[0].layer_ns(1).expect("it is measured");
    assert!(fast > 0 && fast < 10_000_000_000, "{fast}");
}

#[tokio::test]
async fn threads_follow_the_limits_of_the_machine() {
    let mut worker = Worker::start("w1").await;
    let membership = Memory::new();
    let keys = Keys::new("test");
    let mut watch = membership.watch(&keys.workers());
    let Event::Reset(_) = soon(watch.next()).await else { panic!("the first is a reset") };
    let steps = vec![StepTime { rows: 1, layer_ns: 900, head_ns: 300 }];
    let models = vec![WorkerModel { id: model_id(), steps }];
    let record = WorkerRecord { threads: 1, models, ..WorkerRecord::default() };
    let value = encode(&record).unwrap();
    let registration = membership.register(&keys.worker("w1"), value).await.unwrap();
    let Event::Put(_) = soon(watch.next()).await else { panic!("it is registered") };
    let published = Published::new(record, registration, 1.0);

    let mut limits = CpuLimits { logical: 8, physical: Some(4), quota: None };
    follow(limits, Some(3), &worker.service, &published).await;
    let Event::Put(entry) = soon(watch.next()).await else { panic!("it is told") };
    let told: WorkerRecord = serde_json::from_slice(&entry.value).unwrap();
    let time = told.models[0].steps[0];
    assert_eq!((told.threads, time.layer_ns, time.head_ns), (3, 300, 100));
    assert_eq!(worker.service.threads(), 3);
    worker.serve_alone(1).await;

    limits.quota = Some(500);
    follow(limits, Some(3), &worker.service, &published).await;
    follow(limits, Some(3), &worker.service, &published).await;
    let Event::Put(entry) = soon(watch.next()).await else { panic!("it is told") };
    let told: WorkerRecord = serde_json::from_slice(&entry.value).unwrap();
    let want = (1, 2 * 900);
    assert_eq!((told.threads, told.models[0].steps[0].layer_ns), want, "one thread, half a CPU");
    assert!(told.memory_bytes > 0);

    adjust(2.0, limits, &worker.service, &published).await;
    let Event::Put(entry) = soon(watch.next()).await else { panic!("it is told") };
    let told: WorkerRecord = serde_json::from_slice(&entry.value).unwrap();
    assert_eq!(told.models[0].steps[0].layer_ns, 3600);
    // Steps are compared with what is published now: one row through four layers, without the head.
    let prepare = worker.serve_alone(2).await;
    let mut steps = worker.steps().await;
    steps.give(&step(&prepare, 1, vec![row(0, 0, 1, Output::None)])).await;
    let spent = async {
        loop {
            let spent = worker.service.pace().take();
            if spent.measured_ns > 0 {
                break spent;
            }
            tokio::task::yield_now().await;
        }
    };
    assert_eq!(soon(spent).await.predicted_ns, 4 * 3600);
    assert!(watch.next().now_or_never().is_none(), "what did not change is not written");
}

#[tokio::test]
async fn a_quota_that_changes_at_as_many_threads_changes_the_published_times() {
    let worker = Worker::start("w1").await;
    let steps = vec![StepTime { rows: 1, layer_ns: 900, head_ns: 300 }];
    let models = vec![WorkerModel { id: model_id(), steps }];
    let memory_bytes = worker.service.offered_bytes();
    let record = WorkerRecord { threads: 1, models, memory_bytes, ..WorkerRecord::default() };
    let (published, mut watch) = published(record).await;
    let mut limits = CpuLimits { logical: 8, physical: Some(4), quota: None };
    for (quota, layer_ns) in [(Some(500), 1800), (Some(250), 3600), (Some(1500), 900), (None, 900)]
    {
        limits.quota = quota;
        follow(limits, Some(1), &worker.service, &published).await;
        // And not again for a quota that is still the same.
        follow(limits, Some(1), &worker.service, &published).await;
        let told = published.current();
        assert_eq!((told.threads, told.models[0].steps[0].layer_ns), (1, layer_ns), "{quota:?}");
    }
    // Where steps tell of it first, it is not counted twice.
    limits.quota = Some(500);
    adjust(2.0, limits, &worker.service, &published).await;
    follow(limits, Some(1), &worker.service, &published).await;
    for layer_ns in [1800, 3600, 900, 1800] {
        assert_eq!(next_record(&mut watch).await.models[0].steps[0].layer_ns, layer_ns);
    }
    assert!(watch.next().now_or_never().is_none(), "what did not change is not written");
}

#[tokio::test]
async fn a_rack_is_told() {
    let rack = Some("r7".parse().unwrap());
    let mut process = Process::start(Config { rack, ..config() }).await;
    assert_eq!(process.record().await.rack, "r7");
    process.stop.cancel();
    process.end().await.unwrap();
}

#[tokio::test]
async fn a_worker_publishes_how_far_the_others_are() {
    let membership = Memory::new();
    let keys = Keys::new("test");
    let (near, far) = (
        TcpListener::bind("127.0.0.1:0").await.unwrap(),
        TcpListener::bind("127.0.0.1:0").await.unwrap(),
    );
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut held = Vec::new();
    for (id, listener) in [("w0", &near), ("w2", &far), ("w3", &gone)] {
        let record = WorkerRecord {
            id: id.to_owned(),
            incarnation: Incarnation([7; 16]),
            address: listener.local_addr().unwrap().to_string(),
            machine: format!("the machine of {id}"),
            ..WorkerRecord::default()
        };
        let value = encode(&record).unwrap();
        held.push(membership.register(&keys.worker(id), value).await.unwrap());
    }
    drop(gone);
    let mut process = Process::start_in(membership, config()).await;
    let before = process.record().await;
    assert_eq!(before.round_trips_us, [].into());
    let told = loop {
        // What an engine leaves of the memory may be told before.
        let told = process.record().await;
        if !told.round_trips_us.is_empty() {
            break told;
        }
    };
    assert_eq!(told.round_trips_us.keys().collect::<Vec<_>>(), ["w0", "w2"]);
    assert!(told.round_trips_us.values().all(|&us| us > 0), "{told:?}");
    let rest = WorkerRecord {
        round_trips_us: before.round_trips_us.clone(),
        memory_bytes: before.memory_bytes,
        ..told
    };
    assert_eq!(rest, before, "nothing else is lost");
    process.stop.cancel();
    process.end().await.unwrap();
}

#[tokio::test]
async fn a_stub_says_so_and_serves_without_weights() {
    let profile = StubProfile { layer_us: 3, row_us: 1, head_us: 5 };
    let mut process = Process::start(Config { stub_compute: Some(profile), ..config() }).await;
    let record = process.record().await;
    assert!(record.stub);
    assert_eq!(record.models[0].layer_ns(16), Some(19_000));
    let real = known_answer::prove(kernels::Backend::detect()).unwrap();
    assert_ne!(record.known_answer, real, "it shares no pipeline with one that computes");
    let (mut client, prepare) = hold_a_stage(&process, &record).await;
    let described = soon(client.describe(proto::pb::DescribeRequest {})).await.unwrap();
    assert_eq!(described.into_inner().held[0].bytes, 64 << 10, "16 blocks of four layers");
    let mut steps = Steps::open(&mut client).await;
    steps.give(&step(&prepare, 1, vec![row(0, 0, 5, Output::None)])).await;
    drop(steps);
    process.leadership.resign().await.unwrap();
    process.stop.cancel();
    soon(process.ended.join_next()).await.unwrap().unwrap().unwrap();
}

/// The answer to `GET path`, headers and all.
async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = soon(TcpStream::connect(address)).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    soon(stream.write_all(request.as_bytes())).await.unwrap();
    let mut answer = String::new();
    soon(stream.read_to_string(&mut answer)).await.unwrap();
    answer
}

#[tokio::test]
async fn whoever_watches_is_answered() {
    node::metrics::install().unwrap();
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let http = free.local_addr().unwrap();
    drop(free);
    let process = Process::start(Config { http: Some(http), ..config() }).await;
    let health = get(http, "/health").await;
    assert!(health.starts_with("HTTP/1.1 200"), "{health}");
    let metrics = get(http, "/metrics").await;
    let line = metrics.lines().find(|line| line.starts_with("tercet_build_info{"));
    assert!(line.is_some_and(|line| line.contains("isa=") && line.contains("w1")), "{metrics}");
    process.stop.cancel();
    process.end().await.unwrap();
}

#[tokio::test]
async fn both_versions_of_reflection_list_the_services() {
    use tonic_reflection::pb::{v1, v1alpha};

    let process = Process::start(config()).await;
    let channel = Channel::from_shared(format!("http://{}", process.address)).unwrap();
    let channel = soon(channel.connect()).await.unwrap();
    let expected = ["grpc.health.v1.Health", "tercet.v1.Stage"];

    use v1::server_reflection_request::MessageRequest;
    use v1::server_reflection_response::MessageResponse;
    let request = v1::ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel.clone());
    let answers = client.server_reflection_info(tokio_stream::once(request));
    let answer = soon(answers).await.unwrap().into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}");
    };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    assert!(expected.iter().all(|name| names.iter().any(|n| n == name)), "{names:?}");

    use v1alpha::server_reflection_request::MessageRequest as OldRequest;
    use v1alpha::server_reflection_response::MessageResponse as OldResponse;
    let request = v1alpha::ServerReflectionRequest {
        message_request: Some(OldRequest::ListServices(String::new())),
        ..Default::default()
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
    let answers = client.server_reflection_info(tokio_stream::once(request));
    let answer = soon(answers).await.unwrap().into_inner().message().await.unwrap().unwrap();
    let Some(OldResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}");
    };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    assert!(expected.iter().all(|name| names.iter().any(|n| n == name)), "{names:?}");
}

#[tokio::test]
async fn what_keeps_a_worker_from_starting_is_said() {
    let check = async |config: Config, words: &str| {
        let stop = CancellationToken::new();
        let run = crate::run(config, Keys::new("test"), Arc::new(Memory::new()), None, stop);
        let error = soon(run).await.unwrap_err();
        let text = node::Chain(&error).to_string();
        assert!(text.contains(words), "{text}");
    };
    let empty = tempfile::tempdir().unwrap();
    let nowhere = Config { store: empty.path().to_owned(), ..config() };
    check(nowhere, "neither is a store nor holds one: name a store").await;
    let missing = Config { store: empty.path().join("none"), ..config() };
    check(missing, "none does not exist: name a store, or a directory of stores, with --store")
        .await;
    check(Config { isa: Some("avx9".into()), ..config() }, "avx9").await;
    check(Config { threads: Some(0), ..config() }, "threads").await;
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let listen = taken.local_addr().unwrap();
    check(Config { listen, ..config() }, "failed to listen on").await;
}

#[tokio::test]
async fn a_worker_that_waits_for_its_key_can_be_stopped() {
    let membership = Memory::new();
    let keys = Keys::new("test");
    let holder = membership.another();
    let _held = holder.register(&keys.worker("w1"), "other".into()).await.unwrap();
    let stop = CancellationToken::new();
    let run = crate::run(config(), keys, Arc::new(membership), None, stop.clone());
    let mut ended: Ended = JoinSet::new();
    ended.spawn(run);
    stop.cancel();
    soon(ended.join_next()).await.unwrap().unwrap().unwrap();
}
