//! A whole coordinator over real sockets, with toy workers that speak the real protocol and
//! compute `next = (7 * token + position + 1) mod vocab`. The real workers are tested in `tests`.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use coordinator::{Bound, Config, LimitsConfig, RunError};
use futures::{Stream, StreamExt, stream};
use node::membership::{Membership, Memory, Registration};
use proto::convert;
use proto::ids::{
    Epoch, Incarnation, KnownAnswer, ModelId, NumericsClass, PipelineId, PipelineRef, Term,
};
use proto::key::LeaderRecord;
use proto::keys::Keys;
use proto::pb;
use proto::pb::inference_client::InferenceClient;
use proto::pb::operator_client::OperatorClient;
use proto::pb::stage_server::{Stage, StageServer};
use proto::plan::{KvType, PLAN_FORMAT, Plan, StepTime, WorkerModel, WorkerRecord};
use proto::step::{
    Output, ResultSource, RowResult, RowStatus, RowValue, Sampled, StepReply, StepResult,
    StepVerdict,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const VOCAB: u32 = 512;
const PATIENCE: Duration = Duration::from_secs(20);

/// What all toy workers of a cluster share: results go straight to whoever listens, as if the
/// steps had passed through every stage.
struct Toy {
    class: NumericsClass,
    results: broadcast::Sender<(PipelineId, StepResult)>,
    /// As real workers do: results that came before their listener are not lost.
    kept: Mutex<Vec<(PipelineId, StepResult)>>,
    /// Steps beyond this number are taken and never answered.
    stall_after: Mutex<u64>,
    /// What happens to the next result on its way, once.
    spoil: Mutex<Option<Spoil>>,
    /// Workers that were told to end.
    dismissed: Mutex<Vec<String>>,
}

type Spoil = fn(ResultSource, StepResult) -> pb::StepResult;

struct ToyWorker {
    toy: Arc<Toy>,
    id: String,
    incarnation: Incarnation,
}

fn next_token(token: u32, position: u32) -> u32 {
    // Never an end token: they are below 8 in no synthetic model's way.
    8 + (7 * token + position + 1) % (VOCAB - 8)
}

/// The answer that the toy model gives.
fn expected(prompt: &[u32], tokens: usize) -> Vec<u32> {
    let mut all = prompt.to_vec();
    for _ in 0..tokens {
        all.push(next_token(all[all.len() - 1], all.len() as u32 - 1));
    }
    all.split_off(prompt.len())
}

impl Toy {
    fn compute(&self, step: &proto::step::Step) -> StepResult {
        let rows = step.rows.iter().map(|row| {
            let last = row.tokens[row.tokens.len() - 1];
            let position = row.position + row.tokens.len() as u32 - 1;
            let value = match &row.output {
                Output::None | Output::Logits | Output::Drawn(_) => RowValue::None,
                Output::State => RowValue::State(position.to_le_bytes().to_vec().into()),
                Output::Score(targets) => RowValue::Scores(vec![-1.5; targets.len()]),
                Output::Sample(parameters) | Output::Draw(parameters) => {
                    RowValue::Sampled(Sampled {
                        token: next_token(last, position),
                        logprob: parameters.top_logprobs.map(|_| -0.5),
                        top: Vec::new(),
                    })
                }
            };
            RowResult {
                sequence: row.sequence,
                generation: row.generation,
                position: row.position,
                token_count: row.tokens.len() as u32,
                status: RowStatus::Ok,
                detail: String::new(),
                value,
            }
        });
        StepResult {
            epoch: step.header.epoch,
            step: step.header.step,
            rows: rows.collect(),
            stage_times: Vec::new(),
        }
    }
}

#[tonic::async_trait]
impl Stage for ToyWorker {
    type StepsStream = Pin<Box<dyn Stream<Item = Result<pb::StepReply, Status>> + Send>>;
    type ResultsStream = Pin<Box<dyn Stream<Item = Result<pb::StepResult, Status>> + Send>>;

    async fn prepare(
        &self,
        request: Request<pb::PrepareRequest>,
    ) -> Result<Response<pb::PrepareResponse>, Status> {
        let prepare = convert::decode_prepare(request.into_inner()).unwrap();
        assert_eq!(prepare.dst_incarnation, self.incarnation);
        assert_eq!(prepare.stages[prepare.stage as usize].worker, self.id);
        let numerics_class = Bytes::copy_from_slice(&self.toy.class.0);
        Ok(Response::new(pb::PrepareResponse { numerics_class, ..Default::default() }))
    }

    async fn activate(
        &self,
        _: Request<pb::ActivateRequest>,
    ) -> Result<Response<pb::ActivateResponse>, Status> {
        Ok(Response::new(pb::ActivateResponse {}))
    }

    async fn retire(
        &self,
        _: Request<pb::RetireRequest>,
    ) -> Result<Response<pb::RetireResponse>, Status> {
        Ok(Response::new(pb::RetireResponse {}))
    }

    async fn dismiss(
        &self,
        request: Request<pb::DismissRequest>,
    ) -> Result<Response<pb::DismissResponse>, Status> {
        assert_eq!(request.into_inner().dst_incarnation, self.incarnation.0[..]);
        self.toy.dismissed.lock().unwrap().push(self.id.clone());
        Ok(Response::new(pb::DismissResponse {}))
    }

    async fn describe(
        &self,
        _: Request<pb::DescribeRequest>,
    ) -> Result<Response<pb::DescribeResponse>, Status> {
        let incarnation = Bytes::copy_from_slice(&self.incarnation.0);
        let worker = self.id.clone();
        Ok(Response::new(pb::DescribeResponse { worker, incarnation, ..Default::default() }))
    }

    async fn steps(
        &self,
        request: Request<Streaming<pb::StepMessage>>,
    ) -> Result<Response<Self::StepsStream>, Status> {
        let toy = Arc::clone(&self.toy);
        let replies = stream::unfold(request.into_inner(), move |mut steps| {
            let toy = Arc::clone(&toy);
            async move {
                let step = convert::decode_step(steps.message().await.ok()??).unwrap();
                let header = step.header;
                if header.step.0 <= *toy.stall_after.lock().unwrap() {
                    let mut kept = toy.kept.lock().unwrap();
                    kept.push((header.pipeline, toy.compute(&step)));
                    let _ = toy.results.send(kept[kept.len() - 1].clone());
                }
                let reply = StepReply {
                    at: PipelineRef { id: header.pipeline, epoch: header.epoch },
                    step: header.step,
                    stage: 0,
                    verdict: StepVerdict::Accepted,
                    detail: String::new(),
                };
                Some((Ok(convert::encode_reply(&reply)), steps))
            }
        });
        Ok(Response::new(Box::pin(replies)))
    }

    async fn results(
        &self,
        request: Request<pb::ResultsRequest>,
    ) -> Result<Response<Self::ResultsStream>, Status> {
        let wanted = request.into_inner();
        let source = ResultSource {
            pipeline: PipelineId(wanted.pipeline),
            term: Term(wanted.term),
            incarnation: self.incarnation,
        };
        let kept = self.toy.kept.lock().unwrap();
        let live = self.toy.results.subscribe();
        let missed: Vec<_> = kept
            .iter()
            .filter(|(pipeline, result)| {
                let is_it = (pipeline.0, result.epoch.0) == (wanted.pipeline, wanted.epoch);
                is_it && result.step.0 > wanted.after_step
            })
            .map(|(_, result)| Ok(convert::encode_result(source, result)))
            .collect();
        drop(kept);
        let toy = Arc::clone(&self.toy);
        let live = stream::unfold(live, move |mut live| {
            let toy = Arc::clone(&toy);
            async move {
                let result = loop {
                    let (pipeline, result) = live.recv().await.ok()?;
                    if (pipeline.0, result.epoch.0) == (wanted.pipeline, wanted.epoch) {
                        break result;
                    }
                };
                let spoil = toy.spoil.lock().unwrap().take();
                let message = match spoil {
                    Some(spoil) => spoil(source, result),
                    None => convert::encode_result(source, &result),
                };
                Some((Ok(message), live))
            }
        });
        let results = stream::iter(missed).chain(live);
        Ok(Response::new(Box::pin(results)))
    }
}

/// A toy worker that runs, in a runtime of its own so that it can die with all its connections.
struct RunningWorker {
    runtime: Option<tokio::runtime::Runtime>,
    registration: Option<Registration>,
}

impl RunningWorker {
    /// As by `kill -9`: the sockets close, the lease stays until it runs out.
    fn die(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for RunningWorker {
    fn drop(&mut self) {
        self.die();
    }
}

struct Cluster {
    toy: Arc<Toy>,
    model: ModelId,
    membership: Memory,
    keys: Keys,
    bound: Bound,
    stop: CancellationToken,
    coordinator: JoinSet<Result<(), RunError>>,
    workers: Vec<RunningWorker>,
    incarnations: u8,
    _store: tempfile::TempDir,
}

impl Cluster {
    async fn start(workers: usize, stages: u32) -> Self {
        Self::start_with(workers, stages, LimitsConfig::default()).await
    }

    async fn start_with(workers: usize, stages: u32, limits: LimitsConfig) -> Self {
        Self::start_configured(workers, stages, |config| config.limits = limits).await
    }

    async fn start_configured(
        workers: usize,
        stages: u32,
        configure: impl FnOnce(&mut Config),
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("store");
        let shape = "4x64x128x2x2x512".parse().unwrap();
        let model = model::synth(&shape, 1, &store, &mut |_| {}).unwrap();
        let model = ModelId(*model.as_bytes());
        let membership = Memory::new();
        let keys = Keys::new("toy");
        let class = NumericsClass::form(model, KvType::F16, 1, KnownAnswer([7; 32]));
        let toy = Arc::new(Toy {
            class,
            results: broadcast::channel(1024).0,
            kept: Mutex::default(),
            stall_after: Mutex::new(u64::MAX),
            spoil: Mutex::default(),
            dismissed: Mutex::default(),
        });
        let mut config = Config {
            cluster: "toy".parse().unwrap(),
            model: store,
            stages: Some(stages),
            grpc: "127.0.0.1:0".parse().unwrap(),
            http: "127.0.0.1:0".parse().unwrap(),
            shutdown_grace: Duration::from_millis(200).into(),
            lame_duck: Duration::ZERO.into(),
            ..Config::default()
        };
        configure(&mut config);
        let (bound_sender, bound) = oneshot::channel();
        let stop = CancellationToken::new();
        let mut coordinator = JoinSet::new();
        coordinator.spawn(coordinator::run(
            config,
            keys.clone(),
            Arc::new(membership.clone()),
            Some(bound_sender),
            stop.clone(),
        ));
        let bound = bound.await.unwrap();
        let mut cluster = Self {
            toy,
            model,
            membership,
            keys,
            bound,
            stop,
            coordinator,
            workers: Vec::new(),
            incarnations: 0,
            _store: dir,
        };
        for worker in 0..workers {
            cluster.start_worker(&format!("w{worker}")).await;
        }
        cluster
    }

    async fn start_worker(&mut self, id: &str) {
        self.incarnations += 1;
        let incarnation = Incarnation([self.incarnations; 16]);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let worker = ToyWorker { toy: Arc::clone(&self.toy), id: id.into(), incarnation };
        let listener = listener.into_std().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            let served = tonic::transport::Server::builder()
                .add_service(StageServer::new(worker))
                .serve_with_incoming(TcpIncoming::from(listener));
            served.await.unwrap();
        });
        let record = WorkerRecord {
            id: id.into(),
            incarnation,
            address,
            version: "0".into(),
            isa: "toy".into(),
            threads: 1,
            memory_bytes: 1 << 30,
            kernel_revision: 1,
            known_answer: KnownAnswer([7; 32]),
            models: vec![WorkerModel {
                id: self.model,
                steps: vec![
                    StepTime { rows: 1, layer_ns: 1000, head_ns: 1000 },
                    StepTime { rows: 16, layer_ns: 2000, head_ns: 2000 },
                ],
            }],
            ..WorkerRecord::default()
        };
        let value = serde_json::to_vec(&record).unwrap();
        let registration =
            self.membership.register(&self.keys.worker(id), value.into()).await.unwrap();
        self.workers
            .push(RunningWorker { runtime: Some(runtime), registration: Some(registration) });
    }

    async fn client(&self) -> InferenceClient<tonic::transport::Channel> {
        InferenceClient::connect(format!("http://{}", self.bound.grpc)).await.unwrap()
    }

    /// Waits until gRPC health says what is wanted; `/ready` must agree.
    async fn until_ready(&self, ready: bool) {
        let endpoint = format!("http://{}", self.bound.grpc);
        let channel = Endpoint::from_shared(endpoint).unwrap().connect().await.unwrap();
        let mut health = HealthClient::new(channel);
        let service = "tercet.v1.Inference".to_owned();
        let mut changes = health.watch(HealthCheckRequest { service }).await.unwrap().into_inner();
        let wanted = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        let waited =
            async { while changes.message().await.unwrap().unwrap().status() != wanted {} };
        tokio::time::timeout(PATIENCE, waited).await.expect("readiness did not come");
        let response = http(self.bound.http, "GET", "/ready", "").await;
        let status = if ready { "HTTP/1.1 200" } else { "HTTP/1.1 503" };
        assert!(response.starts_with(status), "{response}");
    }

    async fn running(&self) -> u32 {
        let status = self.client().await.status(pb::StatusRequest {}).await.unwrap().into_inner();
        let queue = status.queue.unwrap();
        queue.running + queue.waiting
    }

    /// Asks again and again until so many requests are in the queue or run.
    async fn until_running(&self, wanted: u32) {
        let waited = async { while self.running().await != wanted {} };
        tokio::time::timeout(PATIENCE, waited).await.expect("another number of requests runs");
    }

    /// Asks again and again until everything was given back.
    async fn until_kv_is_free(&self) {
        let waited = async {
            loop {
                let status = self.client().await.status(pb::StatusRequest {}).await.unwrap();
                if status.into_inner().queue.unwrap().kv_blocks_used == 0 {
                    break;
                }
            }
        };
        tokio::time::timeout(PATIENCE, waited).await.expect("KV was not given back");
    }

    async fn end(mut self) {
        self.stop.cancel();
        let outcome = tokio::time::timeout(PATIENCE, self.coordinator.join_next()).await;
        outcome.expect("the coordinator did not stop").unwrap().unwrap().unwrap();
    }
}

fn tokens(prompt: &[u32], max_tokens: u32) -> pb::GenerateRequest {
    let ids = pb::TokenIds { ids: prompt.to_vec() };
    pb::GenerateRequest {
        prompt: Some(pb::generate_request::Prompt::Tokens(ids)),
        max_tokens,
        ..Default::default()
    }
}

/// All tokens of an answer, its first and its last event.
async fn generate(
    cluster: &Cluster,
    request: pb::GenerateRequest,
) -> Result<(pb::Started, Vec<u32>, pb::Finished), Status> {
    use pb::generate_event::Event;
    let mut events = cluster.client().await.generate(request).await?.into_inner();
    let (mut started, mut all, mut finished) = (None, Vec::new(), None);
    while let Some(event) = events.message().await? {
        match event.event.unwrap() {
            Event::Started(event) => started = Some(event),
            Event::Delta(delta) => {
                assert_eq!(delta.index, started.as_ref().map_or(0, |_| all.len() as u64));
                all.extend(delta.tokens);
            }
            Event::Finished(event) => finished = Some(event),
        }
    }
    Ok((started.unwrap(), all, finished.unwrap()))
}

/// One HTTP/1.1 exchange, whole.
async fn http(address: SocketAddr, method: &str, path: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    response
}

/// Sends `head` and reads until the server closes.
async fn exchange(address: SocketAddr, head: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    response
}

fn json_of(response: &str) -> serde_json::Value {
    let body = response.split("\r\n\r\n").nth(1).unwrap();
    serde_json::from_str(body).unwrap_or_else(|_| panic!("{response}"))
}

/// The data of every event of a stream.
fn events_of(response: &str) -> Vec<String> {
    response.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_come_through_one_stage_or_three() {
    for stages in [1, 3] {
        let cluster = Cluster::start(3, stages).await;
        cluster.until_ready(true).await;
        let prompt: Vec<u32> = (10..110).collect();
        let (started, answer, finished) = generate(&cluster, tokens(&prompt, 40)).await.unwrap();
        assert_eq!(answer, expected(&prompt, 40));
        assert_eq!((started.prompt_tokens, started.max_tokens), (100, 40));
        assert_eq!(started.class, cluster.toy.class.to_string());
        assert_eq!(finished.finish_reason, "length");
        assert_eq!((finished.prompt_tokens, finished.completion_tokens), (100, 40));

        let all = (0..16u32).map(|k| {
            let cluster = &cluster;
            async move {
                let prompt = [20 + k, 30, 40 + k];
                let (_, answer, _) = generate(cluster, tokens(&prompt, 30 + k)).await.unwrap();
                assert_eq!(answer, expected(&prompt, 30 + k as usize), "request {k}");
            }
        });
        futures::future::join_all(all).await;
        let status = cluster.client().await.status(pb::StatusRequest {}).await.unwrap();
        let status = status.into_inner();
        assert!(status.ready);
        assert_eq!(status.workers.len(), 3);
        assert_eq!(status.pipelines[0].stages.len(), stages as usize);
        // Control hears of the last end a moment after its client does.
        cluster.until_kv_is_free().await;
        cluster.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_seeds_and_resumption() {
    let cluster = Cluster::start(1, 1).await;
    cluster.until_ready(true).await;
    let keyed = pb::GenerateRequest { idempotency_key: "k".into(), ..tokens(&[9, 8], 5) };
    let (first, ..) = generate(&cluster, keyed.clone()).await.unwrap();
    let (second, ..) = generate(&cluster, keyed).await.unwrap();
    assert_eq!(first.seed, second.seed, "the same key, the same seed");
    let (other, ..) = generate(&cluster, tokens(&[9, 8], 5)).await.unwrap();
    assert_ne!(first.seed, other.seed, "no key, a random one");

    let whole = expected(&[9, 8], 10);
    let resumed = pb::GenerateRequest {
        resume_index: 4,
        received_ids: whole[..4].to_vec(),
        ..tokens(&[9, 8], 10)
    };
    let mut events = cluster.client().await.generate(resumed).await.unwrap().into_inner();
    let mut rest = Vec::new();
    while let Some(event) = events.message().await.unwrap() {
        if let Some(pb::generate_event::Event::Delta(delta)) = event.event {
            assert_eq!(delta.index, 4 + rest.len() as u64);
            rest.extend(delta.tokens);
        }
    }
    assert_eq!(rest, whole[4..], "received tokens are forced, the answer goes on after them");

    let class = "00".repeat(32);
    let error = generate(&cluster, pb::GenerateRequest { class, ..tokens(&[9], 1) }).await;
    assert_eq!(error.unwrap_err().code(), Code::FailedPrecondition);
    let long = vec![9; 100_000];
    let error = generate(&cluster, tokens(&long, 1)).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().starts_with("This model's maximum context length is"), "{error}");
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ran_on_a_dead_worker_goes_on_on_the_next_with_the_same_tokens() {
    let mut cluster = Cluster::start(2, 2).await;
    cluster.until_ready(true).await;
    *cluster.toy.stall_after.lock().unwrap() = 12;
    let mut events =
        cluster.client().await.generate(tokens(&[9, 8], 200)).await.unwrap().into_inner();
    let mut answer = Vec::new();
    while answer.is_empty() {
        let event = events.message().await.unwrap().unwrap();
        answer.extend(tokens_of(event));
    }
    let body = r#"{"prompt":[9,8],"max_tokens":200,"stream":true}"#;
    let address = cluster.bound.http;
    let mut streamed = JoinSet::new();
    streamed.spawn(async move { http(address, "POST", "/v1/completions", body).await });
    cluster.until_running(2).await;

    let mut dead = cluster.workers.pop().unwrap();
    dead.die();
    cluster.until_ready(false).await;
    *cluster.toy.stall_after.lock().unwrap() = u64::MAX;
    dead.registration.take().unwrap().leave().await.unwrap();
    cluster.start_worker("w9").await;
    let rest = tokio::time::timeout(PATIENCE, async {
        while let Some(event) = events.message().await.unwrap() {
            answer.extend(tokens_of(event));
        }
        answer
    });
    let answer = rest.await.expect("a request hangs after its worker's death");
    assert_eq!(answer, expected(&[9, 8], 200));
    let response = tokio::time::timeout(PATIENCE, streamed.join_next()).await;
    let response = response.expect("a stream hangs after its worker's death").unwrap().unwrap();
    let events = events_of(&response);
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"), "{response}");
    assert!(!response.contains("error"), "{response}");
    cluster.until_ready(true).await;
    cluster.end().await;
}

/// The tokens of one event of an answer.
fn tokens_of(event: pb::GenerateEvent) -> Vec<u32> {
    match event.event {
        Some(pb::generate_event::Event::Delta(delta)) => delta.tokens,
        _ => Vec::new(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn defaults_of_sampling_in_force_are_told() {
    let cluster = Cluster::start_configured(1, 1, |config| {
        config.sampling.temperature = Some(0.7);
        config.sampling.top_k = Some(20);
    })
    .await;
    cluster.until_ready(true).await;
    let models = http(cluster.bound.http, "GET", "/v1/models", "").await;
    let want = r#""sampling_defaults":{"temperature":0.7,"top_k":20}"#;
    assert!(models.contains(want), "{models}");
    let mut client = cluster.client().await;
    let status = client.status(pb::StatusRequest {}).await.unwrap().into_inner();
    let sampling = status.model.unwrap().sampling.unwrap();
    assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (Some(0.7), Some(20), None));
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_is_seen_before_anything_is_refused() {
    let cluster = Cluster::start_configured(1, 1, |config| {
        // Long enough for three requests on a busy machine.
        config.lame_duck = Duration::from_secs(1).into();
        config.shutdown_grace = Duration::from_secs(20).into();
    })
    .await;
    cluster.until_ready(true).await;
    let verbose = http(cluster.bound.http, "GET", "/readyz?verbose", "").await;
    assert!(verbose.starts_with("HTTP/1.1 200"), "{verbose}");
    let verbose = json_of(&verbose);
    let checks = verbose["checks"].as_array().unwrap();
    let names: Vec<_> = checks.iter().map(|check| check["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["process", "pipelines", "tokens", "leadership", "registry"]);
    assert!(checks[..4].iter().all(|check| check["passes"] == true), "{verbose}");

    cluster.stop.cancel();
    cluster.until_ready(false).await;
    let (_, answer, _) = generate(&cluster, tokens(&[9], 5)).await.expect("it is taken");
    assert_eq!(answer, expected(&[9], 5));
    let ready = http(cluster.bound.http, "GET", "/ready", "").await;
    assert_eq!(json_of(&ready)["reason"], "the coordinator is stopping");
    let live = http(cluster.bound.http, "GET", "/livez", "").await;
    assert!(live.starts_with("HTTP/1.1 200"), "{live}");
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_order_at_the_admin_address_and_nowhere_else() {
    let any = "127.0.0.1:0".parse().unwrap();
    let mut cluster = Cluster::start_configured(2, 1, |config| config.admin = Some(any)).await;
    cluster.until_ready(true).await;
    let admin = cluster.bound.admin.unwrap();
    let drain = |worker: &str, incarnation: &[u8], cancel| pb::DrainRequest {
        worker: worker.to_owned(),
        incarnation: Bytes::copy_from_slice(incarnation),
        cancel,
        ..Default::default()
    };
    // Not where clients are.
    for (closed, says) in [(cluster.bound.grpc, "unknown method"), (cluster.bound.http, "404")] {
        let mut stranger = OperatorClient::connect(format!("http://{closed}")).await.unwrap();
        let refused = stranger.drain(drain("w0", b"", false)).await.unwrap_err();
        assert!(refused.message().contains(says), "{closed}: {refused:?}");
        let refused = stranger.plan(pb::PlanRequest::default()).await.unwrap_err();
        assert!(refused.message().contains(says), "{closed}: {refused:?}");
    }
    let path = "/tercet.v1.Operator/Drain";
    // Nor from a web page, which may send this to the machine of whoever looks at it.
    // It is a drain of w0 in a frame of gRPC, but for the type.
    let frame = "\0\0\0\0\u{4}\u{12}\u{2}w0";
    let answer = http(admin, "POST", path, frame).await;
    assert!(answer.starts_with("HTTP/1.1 415"), "{answer}");

    let mut operator = OperatorClient::connect(format!("http://{admin}")).await.unwrap();
    let status = operator.status(pb::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.admin, admin.to_string(), "whoever asks for the status finds it");
    assert!(http(admin, "GET", "/readyz", "").await.starts_with("HTTP/1.1 200"), "as before");
    let code = async |operator: &mut OperatorClient<_>, order| {
        operator.drain(order).await.map(|drained| drained.into_inner()).map_err(|e| e.code())
    };
    let refused = operator.drain(drain("w7", b"", false)).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert_eq!(refused.message(), "there is no worker \"w7\"; there are w0, w1");
    let wrong = [
        (drain(&"w".repeat(1000), b"", false), Code::InvalidArgument),
        (drain("w0", b"short", false), Code::InvalidArgument),
        (
            pb::DrainRequest { cluster_id: "other".into(), ..drain("w0", b"", false) },
            Code::FailedPrecondition,
        ),
    ];
    for (order, wanted) in wrong {
        assert_eq!(code(&mut operator, order).await.unwrap_err(), wanted);
    }
    // The second worker may join after the first serves: then it is planned with a moment later.
    let waited = async {
        loop {
            let question = operator.question(pb::QuestionRequest::default()).await.unwrap();
            let problem = question.into_inner().problem_json;
            let problem: coordinator::planner::Problem = serde_json::from_str(&problem).unwrap();
            let workers: Vec<_> = problem.workers.iter().map(|worker| worker.id.as_str()).collect();
            if (workers, problem.options.incumbent.len()) == (vec!["w0", "w1"], 2) {
                break;
            }
        }
    };
    tokio::time::timeout(PATIENCE, waited).await.expect("not both workers serve");

    // A drain, and again: the same.
    let first = operator.drain(drain("w0", b"", false)).await.unwrap().into_inner();
    let incarnation = first.incarnation.clone();
    let waited = async {
        while cluster.toy.dismissed.lock().unwrap().is_empty() {
            let again = code(&mut operator, drain("w0", &incarnation, false)).await.unwrap();
            assert!(matches!(again.state(), pb::DrainState::Moving | pb::DrainState::Ending));
        }
    };
    tokio::time::timeout(PATIENCE, waited).await.expect("nobody told the worker to end");
    assert_eq!(*cluster.toy.dismissed.lock().unwrap(), ["w0"], "and no other");
    let late = code(&mut operator, drain("w0", b"", true)).await;
    assert_eq!(late.unwrap_err(), Code::FailedPrecondition, "it goes");
    assert_eq!(generate(&cluster, tokens(&[9, 30], 5)).await.unwrap().1, expected(&[9, 30], 5));
    cluster.workers[0].registration.take().unwrap().leave().await.unwrap();
    let waited = async {
        let gone = |drained: &pb::DrainResponse| drained.state() == pb::DrainState::Gone;
        while !gone(&code(&mut operator, drain("w0", &incarnation, false)).await.unwrap()) {}
    };
    tokio::time::timeout(PATIENCE, waited).await.expect("it is gone");

    // The one that is left is best as it is; a newcomer is taken at once.
    let plan = async |operator: &mut OperatorClient<_>| {
        operator.plan(pb::PlanRequest::default()).await.unwrap().into_inner()
    };
    let same = plan(&mut operator).await;
    assert!(same.possible && !same.changes && !same.reason.is_empty(), "{same:?}");
    cluster.start_worker("w0").await;
    let waited = async { while !plan(&mut operator).await.changes {} };
    tokio::time::timeout(PATIENCE, waited).await.expect("the newcomer is planned with");
    let kept = code(&mut operator, drain("w1", b"", true)).await.unwrap();
    assert_eq!(kept.state(), pb::DrainState::InUse, "taken back what was never ordered");
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_frees_its_kv() {
    let cluster = Cluster::start(1, 1).await;
    cluster.until_ready(true).await;
    *cluster.toy.stall_after.lock().unwrap() = 5;
    let mut events = cluster.client().await.generate(tokens(&[9], 200)).await.unwrap().into_inner();
    events.message().await.unwrap().unwrap();
    assert_eq!(cluster.running().await, 1);
    drop(events);
    cluster.until_running(0).await;
    cluster.end().await;
}

/// Defect 16 of the review: a flipped bit in a token id was forced into the log and true from then on.
#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_was_damaged_or_is_of_somebody_else_is_read_again() {
    fn altered(mut result: StepResult) -> StepResult {
        for row in &mut result.rows {
            if let RowValue::Sampled(sampled) = &mut row.value {
                sampled.token ^= 1;
            }
        }
        result
    }
    let spoils: [Spoil; 5] = [
        |source, result| {
            let whole = convert::encode_result(source, &result);
            let flipped = convert::encode_result(source, &altered(result));
            pb::StepResult { payload_crc32c: whole.payload_crc32c, ..flipped }
        },
        |source, result| {
            let source = ResultSource { pipeline: PipelineId(99), ..source };
            convert::encode_result(source, &altered(result))
        },
        |source, result| {
            let source = ResultSource { term: Term(source.term.0 + 1), ..source };
            convert::encode_result(source, &altered(result))
        },
        |source, result| {
            let source = ResultSource { incarnation: Incarnation([0xee; 16]), ..source };
            convert::encode_result(source, &altered(result))
        },
        |source, result| {
            let epoch = Epoch(result.epoch.0 + 1);
            convert::encode_result(source, &altered(StepResult { epoch, ..result }))
        },
    ];
    let cluster = Cluster::start(1, 1).await;
    cluster.until_ready(true).await;
    for (case, spoil) in spoils.into_iter().enumerate() {
        *cluster.toy.spoil.lock().unwrap() = Some(spoil);
        let prompt = [20, 30, 40 + case as u32];
        let (_, answer, _) = generate(&cluster, tokens(&prompt, 5)).await.unwrap();
        assert_eq!(answer, expected(&prompt, 5), "case {case}");
        assert!(cluster.toy.spoil.lock().unwrap().is_none(), "case {case} had its result");
    }
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_that_cannot_be_read_is_replaced() {
    let mut cluster = Cluster::start(0, 1).await;
    let strange = cluster.membership.another();
    let garbage = Bytes::from_static(b"{\"pipelines\": 7}");
    // Kept to the end: whoever holds a key takes it away when it leaves.
    let held = strange.register(&cluster.keys.plan(), garbage).await.unwrap();
    cluster.start_worker("w0").await;
    cluster.until_ready(true).await;
    let written = cluster.membership.list(&cluster.keys.plan()).await.unwrap();
    let plan: Plan = serde_json::from_slice(&written.entries[0].value).unwrap();
    assert_eq!((plan.format, plan.pipelines.len()), (PLAN_FORMAT, 1));
    assert_eq!(plan.pipelines[0].class, cluster.toy.class);
    let leader = cluster.membership.list(&cluster.keys.leader()).await.unwrap();
    let leader: LeaderRecord = serde_json::from_slice(&leader.entries[0].value).unwrap();
    assert_eq!(leader.address, cluster.bound.grpc.to_string());
    assert_eq!(leader.http, cluster.bound.http.to_string());
    assert_ne!(leader.incarnation, Incarnation::NONE);
    drop(held);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_worker_requests_get_a_clear_503() {
    let cluster = Cluster::start(0, 1).await;
    let error = tokio::time::timeout(PATIENCE, generate(&cluster, tokens(&[9], 1)));
    let error = error.await.expect("a request hangs without a worker").unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    let body = r#"{"prompt":[9],"max_tokens":1}"#;
    let response = http(cluster.bound.http, "POST", "/v1/completions", body).await;
    assert!(response.starts_with("HTTP/1.1 503"), "{response}");
    assert!(response.to_lowercase().contains("retry-after: 1"), "{response}");
    assert_eq!(json_of(&response)["error"]["type"], "overloaded_error");
    // Refused before a text of it is built.
    let endless = pb::GenerateRequest { stop: vec![String::new(); 1_000_000], ..tokens(&[9], 1) };
    let error = cluster.client().await.generate(endless).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert_eq!(error.message(), "stop may have a length of 4, found more");
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http_speaks_as_openai_does() {
    node::metrics::install().unwrap();
    let cluster = Cluster::start(1, 1).await;
    cluster.until_ready(true).await;
    let ask = |method: &'static str, path: &'static str, body: &'static str| {
        http(cluster.bound.http, method, path, body)
    };
    // What is wrong is called as it was sent, whatever it is called inside.
    let body = r#"{"prompt":[9],"max_tokens":1,"logprobs":21}"#;
    let refused = http(cluster.bound.http, "POST", "/v1/completions", body).await;
    assert!(refused.starts_with("HTTP/1.1 400"), "{refused}");
    let error = json_of(&refused)["error"].clone();
    assert_eq!(error["param"], "logprobs");
    assert!(!error["message"].as_str().unwrap().contains("top_logprobs"), "{error}");

    let models = json_of(&ask("GET", "/v1/models", "").await);
    let name = models["data"][0]["id"].as_str().unwrap().to_owned();
    assert_eq!((&models["object"], &models["has_more"]), (&"list".into(), &false.into()));
    let path = format!("/v1/models/{}", name.replace('/', "%2F"));
    assert_eq!(json_of(&http(cluster.bound.http, "GET", &path, "").await)["id"], *name);
    assert!(ask("GET", "/v1/models/a/b", "").await.starts_with("HTTP/1.1 404"));

    let body = r#"{"prompt":[[9,8],[7]],"max_tokens":6,"logprobs":1,"echo":true,"stop":null}"#;
    let answer = json_of(&ask("POST", "/v1/completions", body).await);
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
    let lists = &answer["choices"][0]["logprobs"];
    assert_eq!(lists["token_logprobs"].as_array().unwrap().len(), 2 + 6);
    assert_eq!(lists["token_logprobs"][0], serde_json::Value::Null, "the first has none");
    assert_eq!(
        (&lists["token_logprobs"][1], &lists["token_logprobs"][7]),
        (&(-1.5).into(), &(-0.5).into())
    );
    assert_eq!(answer["usage"]["total_tokens"], 3 + 12);
    assert_eq!(answer["choices"][1]["finish_reason"], "length");

    let body = r#"{"prompt":[9,8,7],"max_tokens":0,"logprobs":1,"echo":true}"#;
    let answer = json_of(&ask("POST", "/v1/completions", body).await);
    let scored = &answer["choices"][0];
    assert_eq!(scored["logprobs"]["token_logprobs"], serde_json::json!([null, -1.5, -1.5]));
    assert_eq!((&scored["finish_reason"], &scored["text"]), (&"length".into(), &"".into()));
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    let body = r#"{"prompt":[9,8,7],"max_tokens":0,"echo":true,"stream":true}"#;
    let events = events_of(&ask("POST", "/v1/completions", body).await);
    assert_eq!(events.last().unwrap(), "[DONE]");
    assert!(events.iter().any(|event| event.contains(r#""finish_reason":"length""#)), "{events:?}");

    let models = json_of(&ask("GET", "/v1/models", "").await);
    let context = models["data"][0]["max_model_len"].as_u64().unwrap() as usize;
    for (tokens, status) in [(context, 200), (context + 1, 400)] {
        let prompt = vec!["9"; tokens].join(",");
        let body = format!(r#"{{"prompt":[{prompt}],"max_tokens":0,"echo":true}}"#);
        let response = http(cluster.bound.http, "POST", "/v1/completions", &body).await;
        assert!(response.starts_with(&format!("HTTP/1.1 {status}")), "{tokens}: {response}");
    }

    let body = r#"{"prompt":[9,8],"max_tokens":6,"n":2,"stream":true,"stream_options":{"include_usage":true}}"#;
    let response = ask("POST", "/v1/completions", body).await;
    assert!(response.to_lowercase().contains("content-type: text/event-stream"), "{response}");
    let events = events_of(&response);
    let first: serde_json::Value = serde_json::from_str(&events[0]).unwrap();
    let id = first["id"].as_str().unwrap();
    assert!(id.starts_with("cmpl-"), "{id}");
    let name = format!("x-request-id: {id}\r\n");
    assert!(response.to_lowercase().contains(&name), "one id for the answer: {response}");
    assert_eq!(events.last().unwrap(), "[DONE]");
    let usage: serde_json::Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
    assert_eq!(usage["choices"], serde_json::json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 12);

    for (path, body, status, words) in [
        ("/v1/completions", r#"{"prompt":"text"}"#, 400, "no tokenizer"),
        ("/v1/completions", r#"{"prompt":[9],"temperature":3}"#, 400, "temperature"),
        ("/v1/completions", r#"{"prompt":[9],"model":"other"}"#, 404, "does not exist"),
        ("/v1/completions", r#"{"prompt":"#, 400, "not valid JSON"),
        ("/v1/completions", r#"{"prompt":[9],"logprobs":21}"#, 400, "logprobs must be at most 20"),
        ("/v1/completions", "{}", 400, "prompt"),
        ("/v1/completions", r#"{"prompt":[9],"max_tokens":0}"#, 400, "max_tokens"),
        ("/v1/chat/completions", r#"{"messages":[],"max_tokens":0}"#, 400, "max_tokens"),
        ("/v1/chat/completions", r#"{"messages":[]}"#, 400, "messages"),
        ("/v1/chat/completions", r#"{"messages":[],"tools":[{}]}"#, 400, "tools"),
        ("/v1/nothing", "{}", 404, "no such page"),
    ] {
        let response = http(cluster.bound.http, "POST", path, body).await;
        assert!(response.starts_with(&format!("HTTP/1.1 {status}")), "{body}: {response}");
        let error = json_of(&response)["error"].clone();
        assert!(error["message"].as_str().unwrap().contains(words), "{body}: {error}");
    }
    // A body that is too large is refused by its head, with an answer: none of it was read then, and
    // a client that has not sent it all sees no reset before the answer.
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
                Content-Type: application/json\r\nContent-Length: 5000000\r\n\r\n{\"prompt\":\"xx";
    let response = exchange(cluster.bound.http, head).await;
    assert!(response.starts_with("HTTP/1.1 413"), "{response}");
    // So is one that does not say how large it is, as soon as it is.
    let mut stream = TcpStream::connect(cluster.bound.http).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
                Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut left = 5_usize << 20;
    let (mut reads, mut writes) = stream.split();
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(1 << 16));
    let mut response = vec![0; 64];
    let read = loop {
        tokio::select! {
            biased;
            read = reads.read(&mut response) => break read.unwrap_or(0),
            written = writes.write_all(chunk.as_bytes()), if left > 0 => {
                left = written.map_or(0, |()| left.saturating_sub(1 << 16));
            }
        }
    };
    let response = String::from_utf8_lossy(&response[..read]);
    assert!(response.starts_with("HTTP/1.1 413"), "{response:?}");
    // A client that waits for leave to send hears at once, and sends nothing.
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
                Content-Type: application/json\r\nExpect: 100-continue\r\n\
                Content-Length: 5000000\r\n\r\n";
    let response = exchange(cluster.bound.http, head).await;
    assert!(response.starts_with("HTTP/1.1 413"), "{response}");
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
                Content-Type: application/json\r\nContent-Encoding: gzip\r\n\
                Content-Length: 0\r\n\r\n";
    let response = exchange(cluster.bound.http, head).await;
    assert!(response.starts_with("HTTP/1.1 415"), "{response}");
    assert!(response.contains("gzip"), "{response}");
    assert!(ask("GET", "/health", "").await.starts_with("HTTP/1.1 200"));
    let wrong = pb::GenerateRequest { model: "other".into(), ..tokens(&[9], 1) };
    assert_eq!(generate(&cluster, wrong).await.unwrap_err().code(), tonic::Code::NotFound);
    let wrong = tokens(&[9], u32::MAX);
    assert_eq!(generate(&cluster, wrong).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    let metrics = ask("GET", "/metrics", "").await;
    assert!(metrics.starts_with("HTTP/1.1 200"));
    for (cause, protocol, endpoint) in [
        ("invalid_request", "http", "completions"),
        ("invalid_request", "http", "chat_completions"),
        ("unsupported_value", "http", "chat_completions"),
        ("model_not_found", "http", "completions"),
        ("body_too_large", "http", "completions"),
        ("media_type", "http", "completions"),
        ("unknown_route", "http", "other"),
        ("model_not_found", "grpc", "grpc"),
        ("invalid_request", "grpc", "grpc"),
    ] {
        let labels = [("cause", cause), ("protocol", protocol), ("endpoint", endpoint)]
            .map(|(label, value)| format!(r#"{label}="{value}""#));
        let is_it = |line: &&str| {
            line.starts_with("tercet_requests_refused_total{")
                && labels.iter().all(|label| line.contains(label.as_str()))
        };
        assert!(metrics.lines().any(|line| is_it(&line)), "{labels:?} in {metrics}");
    }
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_says_what_was_known_of_a_prompt_and_salts_keep_callers_apart() {
    let cluster = Cluster::start(1, 1).await;
    cluster.until_ready(true).await;
    // Three blocks and a part of one.
    let prompt: Vec<u32> = (8..108).collect();
    let ask = async |fields: &str| {
        let body = format!(r#"{{"prompt":{prompt:?},"max_tokens":4,"logprobs":0{fields}}}"#);
        http(cluster.bound.http, "POST", "/v1/completions", &body).await
    };
    let cached = |answer: &serde_json::Value| {
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    let first = json_of(&ask("").await);
    let second = json_of(&ask("").await);
    assert_eq!((cached(&first), cached(&second)), (0, 96));
    assert_eq!(first["choices"], second["choices"]);
    for fields in [r#","user":"me""#, r#","cache_salt":"me""#, r#","cache_salt":"x","user":"me""#] {
        let found = [json_of(&ask(fields).await), json_of(&ask(fields).await)];
        assert_eq!([cached(&found[0]), cached(&found[1])], [0, 96], "{fields}");
    }
    let other = json_of(&ask(r#","cache_salt":"x","user":"you""#).await);
    assert_eq!(cached(&other), 96, "whoever knows the salt");
    let two = json_of(&ask(r#","n":2,"user":"two""#).await);
    assert_eq!(cached(&two), 0, "one prompt, which was not known");
    let scored = json_of(&ask(r#","echo":true"#).await);
    assert_eq!(cached(&scored), 0);
    let scores = scored["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!(scores.iter().filter(|score| **score == -1.5).count(), 99, "all were computed");
    let streamed = ask(r#","stream":true,"stream_options":{"include_usage":true}"#).await;
    let events = events_of(&streamed);
    let usage: serde_json::Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
    assert_eq!(cached(&usage), 96);
    let refused = ask(r#","cache_salt":"""#).await;
    assert!(refused.starts_with("HTTP/1.1 400") && refused.contains("cache_salt"), "{refused}");
    let refused = ask(&format!(r#","user":"{}""#, "x".repeat(1025))).await;
    assert!(refused.starts_with("HTTP/1.1 400") && refused.contains("user"), "{refused}");
    cluster.end().await;

    let cluster = Cluster::start_configured(1, 1, |config| config.prefix_cache = false).await;
    cluster.until_ready(true).await;
    let body = format!(r#"{{"prompt":{prompt:?},"max_tokens":4}}"#);
    for _ in 0..2 {
        let answer = http(cluster.bound.http, "POST", "/v1/completions", &body).await;
        assert_eq!(cached(&json_of(&answer)), 0, "it is switched off");
    }
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_of_somebody_else_is_refused() {
    let cluster = Cluster::start(0, 1).await;
    for (host, status) in [
        ("localhost", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]", 200),
        ("evil.test", 421),
        ("localhost.evil.test", 421),
        ("localhost\r\nHost: evil.test", 400),
        ("localhost\r\nHost: localhost", 400),
    ] {
        let head = format!("GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        let response = exchange(cluster.bound.http, &head).await;
        assert!(response.starts_with(&format!("HTTP/1.1 {status}")), "{host}: {response}");
    }
    for (head, status) in [
        ("GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n", "HTTP/1.1 200"),
        ("GET http://evil.test/health HTTP/1.1\r\nHost: localhost\r\n", "HTTP/1.1 400"),
        ("GET http://evil.test/health HTTP/1.1\r\nHost: evil.test\r\n", "HTTP/1.1 421"),
        ("GET http://evil.test/health HTTP/1.0\r\n", "HTTP/1.0 421"),
        ("GET /health HTTP/1.1\r\n", "HTTP/1.1 400"),
        // HTTP/1.0 has no Host, and no browser speaks it.
        ("GET /health HTTP/1.0\r\n", "HTTP/1.0 200"),
    ] {
        let whole = format!("{head}Connection: close\r\n\r\n");
        let response = exchange(cluster.bound.http, &whole).await;
        assert!(response.starts_with(status), "{head}: {response}");
    }
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_too_many_takes_an_idle_ones_place_or_is_refused_at_once() {
    let limits = LimitsConfig { connections: 1, ..LimitsConfig::default() };
    let cluster = Cluster::start_with(0, 1, limits).await;
    let mut first = cluster.client().await;
    first.status(pb::StatusRequest {}).await.unwrap();
    // The first is idle: it makes room.
    let mut second = cluster.client().await;
    let answered = tokio::time::timeout(PATIENCE, second.status(pb::StatusRequest {})).await;
    answered.expect("the second is never answered").unwrap();
    // A watcher of health is being answered for as long as it likes.
    let channel = Endpoint::from_shared(format!("http://{}", cluster.bound.grpc)).unwrap();
    let mut watcher = HealthClient::new(channel.connect().await.unwrap());
    let request = HealthCheckRequest { service: String::new() };
    let mut watching = watcher.watch(request).await.unwrap().into_inner();
    assert!(watching.message().await.unwrap().is_some());
    let mut third = InferenceClient::new(channel.connect_lazy());
    let answered = tokio::time::timeout(PATIENCE, third.status(pb::StatusRequest {})).await;
    // What the client's library makes of GOAWAY before its first call is its affair.
    answered.expect("the third is refused, and does not wait").unwrap_err();
    drop((watching, watcher));
    let mut fourth = InferenceClient::new(channel.connect_lazy());
    let served = async { while fourth.status(pb::StatusRequest {}).await.is_err() {} };
    tokio::time::timeout(PATIENCE, served).await.expect("the place is free again");
    cluster.end().await;
}
