//! Starts workers and speaks to them as a coordinator does.

use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use kernels::Backend;
use model::Store;
use node::membership::MembershipError;
use proto::convert::{decode_reply, decode_result, encode_prepare, encode_step};
use proto::ids::{
    BlockId, Epoch, Generation, Incarnation, KnownAnswer, ModelId, PipelineId, PrefixHash,
    SequenceId, StepId, Term,
};
use proto::key::CoordinatorKey;
use proto::pb::stage_client::StageClient;
use proto::plan::{KvType, StagePlan};
use proto::step::{
    Output, Prepare, ResultSource, Row, RowStatus, Step, StepHeader, StepReply, StepResult,
    StepVerdict,
};
use proto::{BLOCK_TOKENS, limits, pb};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use crate::bridge::EngineFailure;
use crate::engine::{EngineConfig, Placement, Shortcuts};
use crate::service::{Identity, Service};
use crate::witness::{Leader, Reading, Source, Witness};

/// Four layers, so that pipelines of up to four stages can be made.
const SHAPE: &str = "4x64x128x4x2x256";

/// Nothing here takes long; what does, hangs.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const LONG: Duration = Duration::from_secs(600);

/// Of the coordinator that the harness plays.
pub(super) const KEY: CoordinatorKey = CoordinatorKey::new([42; 16]);

/// The registry's revision, unless a test says another: far beyond every epoch of these tests.
const REVISION: u64 = 1_000_000;

/// A registry that says what a test wants.
#[derive(Clone)]
pub(super) struct Registry(Arc<Mutex<Reading>>);

impl Registry {
    fn new() -> Self {
        let leader = Leader { term: Term(1), key_digest: Some(KEY.digest()) };
        let cluster = Some("test".to_owned());
        Self(Arc::new(Mutex::new(Reading { revision: REVISION, leader: Some(leader), cluster })))
    }

    /// Says what the registry says from now on.
    pub(super) fn set(&self, change: impl FnOnce(&mut Reading)) {
        change(&mut self.0.lock().unwrap());
    }

    /// Lets the coordinator of this harness lead at `term`, unless one of a later term does.
    pub(super) fn elect(&self, term: Term) {
        let leader = Leader { term, key_digest: Some(KEY.digest()) };
        self.set(|reading| {
            if reading.leader.is_none_or(|now| now.term < term) {
                reading.leader = Some(leader);
            }
        });
    }

    /// The registry is lost or set back: what it says from now on, led by this harness at `term`.
    pub(super) fn begin_anew(&self, cluster: &str, term: Term, revision: u64) {
        let leader = Leader { term, key_digest: Some(KEY.digest()) };
        self.set(|reading| {
            let cluster = Some(cluster.to_owned());
            *reading = Reading { revision, leader: Some(leader), cluster };
        });
    }
}

impl Source for Registry {
    fn read(&self) -> BoxFuture<'_, Result<Reading, MembershipError>> {
        let reading = self.0.lock().unwrap().clone();
        Box::pin(async move { Ok(reading) })
    }
}

/// Waits for what must come.
pub(super) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it does not come")
}

/// The directory of one store, made once for all tests.
pub(super) fn store_dir() -> &'static Path {
    static DIR: OnceLock<TempDir> = OnceLock::new();
    let dir = DIR.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let shape: model::SynthShape = SHAPE.parse().unwrap();
        model::synth(&shape, 7, &dir.path().join("store"), &mut |_| {}).unwrap();
        dir
    });
    Box::leak(dir.path().join("store").into_boxed_path())
}

pub(crate) fn store() -> Store {
    Store::open(store_dir()).unwrap()
}

pub(super) fn model_id() -> ModelId {
    ModelId(store().id().0)
}

/// A worker without registry.
pub(super) struct Worker {
    pub(super) id: String,
    pub(super) incarnation: Incarnation,
    pub(super) address: String,
    pub(super) service: Arc<Service>,
    pub(super) registry: Registry,
    pub(super) client: StageClient<Channel>,
    tasks: JoinSet<()>,
}

impl Worker {
    pub(super) async fn start(id: &str) -> Self {
        Self::start_with(id, "127.0.0.1:0", 1 << 30).await
    }

    pub(super) async fn start_with(id: &str, listen: &str, memory_bytes: u64) -> Self {
        Self::start_on(id, listen, memory_bytes, store()).await.0
    }

    /// With a store of its own; the second is told why an engine failed.
    pub(super) async fn start_on(
        id: &str,
        listen: &str,
        memory_bytes: u64,
        store: Store,
    ) -> (Self, mpsc::Receiver<EngineFailure>) {
        let listener = TcpListener::bind(listen).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let incarnation = Incarnation(rand::random());
        let identity = Identity {
            id: id.into(),
            incarnation,
            engine: EngineConfig {
                backend: Backend::detect(),
                threads: 1,
                kv_type: KvType::F16,
                kv_blocks: 1,
                max_step_tokens: 1,
                shortcuts: Shortcuts::default(),
                placement: Placement::default(),
            },
            memory_bytes,
            known_answer: KnownAnswer([7; 32]),
            stores: vec![Arc::new(store)],
            stub: None,
        };
        let (failures, failed) = mpsc::channel(1);
        let registry = Registry::new();
        let witness = Witness::new(registry.clone());
        let closing = CancellationToken::new();
        let stop = CancellationToken::new();
        let service = Arc::new(Service::new(identity, witness, failures, closing, stop));
        let (health, serving) = crate::grpc::serve(listener, service.clone()).unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            serving.await;
            drop(health);
        });
        let client = connect(&address).await;
        let id = id.into();
        (Self { id, incarnation, address, service, registry, client, tasks }, failed)
    }

    /// Ends the process, as far as others can see.
    pub(super) async fn kill(mut self) {
        self.service.closing().cancel();
        soon(self.tasks.join_next()).await.unwrap().unwrap();
    }

    /// As one stage of a plan.
    pub(super) fn plan(&self, layers: std::ops::Range<u32>) -> StagePlan {
        StagePlan {
            worker: self.id.clone(),
            incarnation: self.incarnation,
            address: self.address.clone(),
            layers,
        }
    }

    /// Prepared and active as the only stage of `pipeline` at `epoch`.
    pub(super) async fn serve_alone(&mut self, epoch: u64) -> Prepare {
        let prepare = prepare(&[self.plan(0..4)], 0, epoch);
        self.prepare(&prepare).await.unwrap();
        self.activate(&prepare).await.unwrap();
        prepare
    }

    pub(super) async fn prepare(
        &mut self,
        prepare: &Prepare,
    ) -> Result<pb::PrepareResponse, tonic::Status> {
        self.registry.elect(prepare.term);
        let request = KEY.attach(encode_prepare(prepare));
        soon(self.client.prepare(request)).await.map(tonic::Response::into_inner)
    }

    pub(super) async fn activate(&mut self, prepare: &Prepare) -> Result<(), tonic::Status> {
        let request = pb::ActivateRequest {
            pipeline: prepare.pipeline.0,
            epoch: prepare.epoch.0,
            term: prepare.term.0,
            dst_incarnation: prepare.dst_incarnation.0.to_vec().into(),
        };
        self.registry.elect(prepare.term);
        soon(self.client.activate(KEY.attach(request))).await.map(drop)
    }

    pub(super) async fn retire(&mut self, prepare: &Prepare) -> Result<(), tonic::Status> {
        let request = pb::RetireRequest {
            pipeline: prepare.pipeline.0,
            epoch: prepare.epoch.0,
            term: prepare.term.0,
            dst_incarnation: prepare.dst_incarnation.0.to_vec().into(),
        };
        self.registry.elect(prepare.term);
        soon(self.client.retire(KEY.attach(request))).await.map(drop)
    }

    pub(super) async fn describe(&mut self) -> pb::DescribeResponse {
        soon(self.client.describe(pb::DescribeRequest {})).await.unwrap().into_inner()
    }

    /// A connection of its own.
    pub(super) async fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        soon(endpoint.connect()).await.unwrap()
    }

    pub(super) async fn steps(&mut self) -> Steps {
        Steps::open(&mut self.client).await
    }

    pub(super) async fn try_results(
        &mut self,
        prepare: &Prepare,
        after_step: u64,
    ) -> Result<Results, tonic::Status> {
        let source = ResultSource {
            pipeline: prepare.pipeline,
            term: prepare.term,
            incarnation: self.incarnation,
        };
        let request = pb::ResultsRequest {
            pipeline: prepare.pipeline.0,
            epoch: prepare.epoch.0,
            term: prepare.term.0,
            dst_incarnation: self.incarnation.0.to_vec().into(),
            after_step,
        };
        soon(self.client.results(KEY.attach(request)))
            .await
            .map(|response| Results { stream: response.into_inner(), source })
    }

    pub(super) async fn results(&mut self, prepare: &Prepare, after_step: u64) -> Results {
        self.try_results(prepare, after_step).await.unwrap()
    }
}

pub(super) async fn connect(address: &str) -> StageClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    StageClient::new(soon(endpoint.connect()).await.unwrap())
        .max_decoding_message_size(limits::MESSAGE_BYTES)
        .max_encoding_message_size(limits::MESSAGE_BYTES)
}

/// A request for stage `stage` of these.
pub(crate) fn prepare(stages: &[StagePlan], stage: u32, epoch: u64) -> Prepare {
    Prepare {
        cluster_id: "test".into(),
        pipeline: PipelineId(1),
        epoch: Epoch(epoch),
        term: Term(1),
        dst_incarnation: stages[stage as usize].incarnation,
        model: model_id(),
        kv_type: KvType::F16,
        stage,
        stages: stages.to_vec(),
        kv_blocks: 16,
        max_step_tokens: 64,
        max_in_flight: 4,
        draws: false,
    }
}

/// A stream of steps and its answers.
pub(super) struct Steps {
    steps: mpsc::Sender<pb::StepMessage>,
    replies: Streaming<pb::StepReply>,
}

impl Steps {
    pub(super) async fn open(client: &mut StageClient<Channel>) -> Self {
        Self::open_as(client, |steps| KEY.attach(steps)).await
    }

    /// Opened by somebody else, who may show another key or none.
    pub(super) async fn open_as(
        client: &mut StageClient<Channel>,
        request: impl FnOnce(
            ReceiverStream<pb::StepMessage>,
        ) -> tonic::Request<ReceiverStream<pb::StepMessage>>,
    ) -> Self {
        let (steps, outbound) = mpsc::channel(8);
        let call = client.steps(request(ReceiverStream::new(outbound)));
        Self { steps, replies: soon(call).await.unwrap().into_inner() }
    }

    pub(super) async fn send(&self, step: &Step) {
        self.send_message(encode_step(step)).await;
    }

    /// Every step is answered, one that is taken too.
    pub(super) async fn send_message(&self, message: pb::StepMessage) {
        let message = pb::StepMessage { acknowledge: true, ..message };
        soon(self.steps.send(message)).await.unwrap();
    }

    pub(super) async fn reply(&mut self) -> StepReply {
        decode_reply(soon(self.replies.message()).await.unwrap().unwrap()).unwrap()
    }

    /// The next reply, or why there is none.
    pub(super) async fn next(&mut self) -> Result<StepReply, tonic::Status> {
        let reply = soon(self.replies.message()).await?;
        Ok(decode_reply(reply.expect("it ends with a status")).unwrap())
    }

    /// Why the stream ended.
    pub(super) async fn end(&mut self) -> tonic::Status {
        soon(self.replies.message()).await.expect_err("it must end with a status")
    }

    /// Sends a step and gives what is said of it.
    pub(super) async fn ask(&mut self, step: &Step) -> StepReply {
        self.send(step).await;
        self.reply().await
    }

    /// Sends a step that is taken.
    pub(super) async fn give(&mut self, step: &Step) {
        let reply = self.ask(step).await;
        assert_eq!(reply.verdict, StepVerdict::Accepted, "{reply:?}");
    }
}

/// A stream of results.
pub(super) struct Results {
    stream: Streaming<pb::StepResult>,
    source: ResultSource,
}

impl Results {
    pub(super) async fn next(&mut self) -> StepResult {
        let message = soon(self.stream.message()).await.unwrap().unwrap();
        let (source, result) = decode_result(message).unwrap();
        assert_eq!(source, self.source);
        result
    }

    /// Why the stream ended.
    pub(super) async fn end(&mut self) -> tonic::Status {
        soon(self.stream.message()).await.expect_err("it must end with a status")
    }
}

/// A step for the first stage, which `prepare` was prepared for.
pub(crate) fn step(prepare: &Prepare, number: u64, rows: Vec<Row>) -> Step {
    Step {
        header: StepHeader {
            pipeline: prepare.pipeline,
            epoch: prepare.epoch,
            term: prepare.term,
            dst_incarnation: prepare.stages[0].incarnation,
            step: StepId(number),
            acked_step: StepId(0),
            deadline_remaining: LONG,
        },
        rows,
        ended_sequences: Vec::new(),
        stage_times: Vec::new(),
        activations: Bytes::new(),
    }
}

/// Token `position` of a sequence.
fn token(sequence: u64, position: u32) -> u32 {
    (sequence as u32 * 31 + position * 7) % 256
}

/// A row of the right form that continues sequence `sequence`, whose blocks are two from
/// `2 * sequence` on.
pub(crate) fn row(sequence: u64, position: u32, count: u32, output: Output) -> Row {
    let tokens = |range: std::ops::Range<u32>| -> Vec<u32> {
        range.map(|position| token(sequence, position)).collect()
    };
    let before = PrefixHash::EMPTY.then_all(&tokens(0..position));
    let end = position + count;
    let tokens = tokens(position..end);
    let first_block = 2 * sequence as u32;
    Row {
        sequence: SequenceId(sequence),
        generation: Generation(1),
        position,
        prefix_hash_before: before,
        prefix_hash_after: before.then_all(&tokens),
        tokens,
        blocks: (0..end.div_ceil(BLOCK_TOKENS)).map(|i| BlockId(first_block + i)).collect(),
        output,
        status: RowStatus::Ok,
        detail: String::new(),
        traceparent: String::new(),
    }
}
