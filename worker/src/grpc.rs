//! The stage service on the wire: decodes, calls the [`Service`], encodes. No decisions.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use futures::stream::unfold;
use node::serve::{
    CallLimits, Concurrency, Http2, Method, Options, Protocol, QuietCall, with_limits,
};
use proto::convert::{
    WireError, decode_prepare, decode_step, decode_step_header, encode_held, encode_reply,
    encode_result,
};
use proto::ids::{Epoch, Incarnation, KeyDigest, PipelineId, PipelineRef, StepId, Term};
use proto::key::CoordinatorKey;
use proto::pb::stage_server::{Stage, StageServer};
use proto::step::{ResultSource, StepReply, StepVerdict};
use proto::{limits, pb};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};
use tonic_health::server::HealthReporter;

use crate::bridge::IN_FLIGHT_MAX;
use crate::callers::{Caller, Refusals};
use crate::error::{RunError, ServiceError, UnreadableCause, UnreadableMessage};
use crate::service::{Acquaintance, Service};
use crate::stage::ResultReader;
use crate::telemetry;

/// Replies that may wait on one stream of steps; as many as steps may be in flight, twice.
const REPLIES_MAX: usize = 2 * IN_FLIGHT_MAX as usize;

/// Steps of one stream of a stranger that are answered FENCED before it ends: as many as a coordinator has in
/// flight when another is elected, twice.
const STRANGERS_FENCED: usize = REPLIES_MAX;

/// Connections: a coordinator has a handful, the stage before and people one each.
const CONNECTIONS: usize = 256;

/// Calls that one connection may have open at a time: a coordinator has a handful.
const CALLS_PER_CONNECTION: u32 = 64;

/// Connections that may have the large windows of flow control: those of two pipelines, for a new
/// one is made before the old one is gone. 64 MiB may be unread in them, and 15 MiB in the others.
const ROOMY_CONNECTIONS: usize = 16;

/// HTTP/2 header lists are method, path and a trace context.
const HEADER_LIST_BYTES: u32 = 16 << 10;

/// Streams of steps whose senders are known: one for each stage that may be held, and as many again while
/// they are made anew, twice. Those of strangers are bounded by `node::serve`.
const STEP_STREAMS: usize = 4 * limits::HELD_STAGES;

/// Readers of results: one for each stage that may be held, and one that takes over from each.
const RESULT_READERS: usize = 2 * limits::HELD_STAGES;

/// A preparation names every stage of the pipeline: 512 of them with all their names take less.
const PREPARE_BYTES: usize = 1 << 20;

/// What else is asked is a few numbers and names.
const SMALL_MESSAGE_BYTES: usize = 16 << 10;

/// What callers may have begun and not finished.
const CALL_LIMITS: CallLimits = CallLimits {
    // A caller sends its message with the call, or soon after.
    first_message: Duration::from_secs(5),
    // The largest needs half a second on the slowest network that is of use.
    whole_message: Duration::from_secs(10),
    // One of the largest and half of another: honest ones are a hundredth of that, and arrive in
    // a millisecond.
    unfinished_bytes: limits::MESSAGE_BYTES + limits::MESSAGE_BYTES / 2,
    unfinished_messages: 1024,
    // Preparing takes as long as reading the weights.
    answer: None,
};

/// How long connections may take to close once all streams have ended.
const LINGER: Duration = Duration::from_millis(500);

/// Answers with what the worker says.
struct StageService {
    service: Arc<Service>,
    /// [`STEP_STREAMS`].
    streams: Arc<Semaphore>,
    refusals: Arc<Refusals>,
}

/// A stream of answers.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Stage for StageService {
    type StepsStream = Answers<pb::StepReply>;
    type ResultsStream = Answers<pb::StepResult>;

    async fn prepare(
        &self,
        request: Request<pb::PrepareRequest>,
    ) -> Result<Response<pb::PrepareResponse>, Status> {
        let preparing = async {
            let caller = caller(&request)?;
            let request = decode_prepare(request.into_inner())?;
            let (pipeline, epoch, stage) = (request.pipeline, request.epoch, request.stage);
            let prepared = self.service.prepare(request, caller).await?;
            tracing::info!(%pipeline, %epoch, stage, "epoch is prepared");
            Ok(Response::new(pb::PrepareResponse {
                numerics_class: prepared.class.0.to_vec().into(),
                weight_bytes: prepared.weight_bytes,
                kv_bytes: prepared.kv_bytes,
            }))
        };
        self.said("Prepare", preparing.await)
    }

    async fn activate(
        &self,
        request: Request<pb::ActivateRequest>,
    ) -> Result<Response<pb::ActivateResponse>, Status> {
        let activating = async {
            let caller = caller(&request)?;
            let pb::ActivateRequest { pipeline, epoch, term, dst_incarnation } =
                request.into_inner();
            let incarnation = incarnation(&dst_incarnation)?;
            let (pipeline, epoch, term) = (PipelineId(pipeline), Epoch(epoch), Term(term));
            self.service.activate(pipeline, epoch, term, incarnation, caller).await?;
            Ok(Response::new(pb::ActivateResponse {}))
        };
        self.said("Activate", activating.await)
    }

    async fn retire(
        &self,
        request: Request<pb::RetireRequest>,
    ) -> Result<Response<pb::RetireResponse>, Status> {
        let retiring = async {
            let caller = caller(&request)?;
            let pb::RetireRequest { pipeline, epoch, term, dst_incarnation } = request.into_inner();
            let incarnation = incarnation(&dst_incarnation)?;
            let at = PipelineRef { id: PipelineId(pipeline), epoch: Epoch(epoch) };
            self.service.retire(at, Term(term), incarnation, caller).await?;
            Ok(Response::new(pb::RetireResponse {}))
        };
        self.said("Retire", retiring.await)
    }

    async fn dismiss(
        &self,
        request: Request<pb::DismissRequest>,
    ) -> Result<Response<pb::DismissResponse>, Status> {
        let dismissing = async {
            let caller = caller(&request)?;
            let pb::DismissRequest { term, dst_incarnation } = request.into_inner();
            let incarnation = incarnation(&dst_incarnation)?;
            self.service.dismiss(Term(term), incarnation, caller).await?;
            Ok(Response::new(pb::DismissResponse {}))
        };
        self.said("Dismiss", dismissing.await)
    }

    async fn describe(
        &self,
        _request: Request<pb::DescribeRequest>,
    ) -> Result<Response<pb::DescribeResponse>, Status> {
        let identity = self.service.identity();
        let description = self.service.describe();
        let held = description.held.as_ref();
        let layers =
            held.map_or(0..0, |prepare| prepare.stages[prepare.stage as usize].layers.clone());
        Ok(Response::new(pb::DescribeResponse {
            worker: identity.id.clone(),
            incarnation: identity.incarnation.0.to_vec().into(),
            state: description.state.name().into(),
            pipeline: held.map_or(0, |prepare| prepare.pipeline.0),
            epoch: held.map_or(0, |prepare| prepare.epoch.0),
            term: description.term.0,
            layers_begin: layers.start,
            layers_end: layers.end,
            steps: description.steps,
            isa: identity.engine.backend.isa().into(),
            version: env!("CARGO_PKG_VERSION").into(),
            held: description.stages.iter().map(encode_held).collect(),
            prepared_bytes: description.prepared_bytes,
        }))
    }

    async fn steps(
        &self,
        request: Request<Streaming<pb::StepMessage>>,
    ) -> Result<Response<Self::StepsStream>, Status> {
        let opening = || {
            let key = caller(&request)?.key.map(|key| key.digest());
            let quiet = request.extensions().get::<QuietCall>().cloned();
            let (replies, queue) = mpsc::channel(REPLIES_MAX);
            let mut edge = Edge {
                key,
                quiet,
                place: None,
                service: self.service.clone(),
                streams: self.streams.clone(),
                refusals: self.refusals.clone(),
                inbound: request.into_inner(),
                replies,
                queue,
                has_refused: false,
                fences_left: STRANGERS_FENCED,
                ended: false,
            };
            // Another's may be for a stage that is prepared in a moment.
            if self.service.acquaintance(key) == Acquaintance::Known {
                edge.admit()?;
            }
            Ok(edge)
        };
        let edge = self.said("Steps", opening())?;
        let answers = unfold(edge, |mut edge| async {
            let answer = edge.next().await?;
            edge.ended = answer.is_err();
            Some((answer, edge))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn results(
        &self,
        request: Request<pb::ResultsRequest>,
    ) -> Result<Response<Self::ResultsStream>, Status> {
        let reading = || {
            let key = caller(&request)?.key;
            let pb::ResultsRequest { pipeline, epoch, term, dst_incarnation, after_step } =
                request.into_inner();
            let source = ResultSource {
                pipeline: PipelineId(pipeline),
                term: Term(term),
                incarnation: incarnation(&dst_incarnation)?,
            };
            let (epoch, after) = (Epoch(epoch), StepId(after_step));
            let ResultSource { pipeline, term, incarnation } = source;
            let reader = self.service.results(pipeline, epoch, term, incarnation, after, key)?;
            Ok((source, reader))
        };
        let (source, reader) = self.said("Results", reading())?;
        let results = unfold(Some(reader), move |reader: Option<ResultReader>| async move {
            let mut reader = reader?;
            match reader.next().await {
                Ok(result) => Some((Ok(encode_result(source, &result)), Some(reader))),
                Err(end) => Some((Err(ServiceError::from(end).into()), None)),
            }
        });
        Ok(Response::new(Box::pin(results)))
    }
}

impl StageService {
    /// What a call of `method` is answered; a refusal is counted.
    fn said<T>(&self, method: &'static str, outcome: Result<T, ServiceError>) -> Result<T, Status> {
        outcome.map_err(|error| {
            self.refusals.note(method, &error);
            error.into()
        })
    }
}

fn incarnation(bytes: &[u8]) -> Result<Incarnation, ServiceError> {
    Incarnation::try_from(bytes).map_err(|error| ServiceError::Wire(error.into()))
}

/// What a caller shows of who it is.
fn caller<T>(request: &Request<T>) -> Result<Caller, ServiceError> {
    let address = request.remote_addr().map(|address| address.ip().to_canonical());
    Ok(Caller { key: CoordinatorKey::of(request.metadata())?, address })
}

/// One stream of steps.
struct Edge {
    /// Of the key that its sender showed.
    key: Option<KeyDigest>,
    /// Says that its sender is known.
    quiet: Option<QuietCall>,
    /// Once it is: its place among the streams that there may be.
    place: Option<OwnedSemaphorePermit>,
    service: Arc<Service>,
    streams: Arc<Semaphore>,
    refusals: Arc<Refusals>,
    inbound: Streaming<pb::StepMessage>,
    /// Given to the stages that this stream feeds, for what later stages say.
    replies: mpsc::Sender<StepReply>,
    queue: mpsc::Receiver<StepReply>,
    /// A refused step of one that is not known was logged.
    has_refused: bool,
    /// So many more steps of a stranger are answered.
    fences_left: usize,
    /// After an error nothing follows.
    ended: bool,
}

impl Edge {
    /// The next answer; `None` when the stream is over. A step that is taken has none, unless its
    /// sender wants one.
    async fn next(&mut self) -> Option<Result<pb::StepReply, Status>> {
        if self.ended {
            return None;
        }
        loop {
            let message = tokio::select! {
                // What later stages say goes first: their steps came first.
                biased;
                () = self.service.closing().cancelled() => {
                    let error = ServiceError::Closing;
                    self.refusals.count("Steps", &error);
                    return Some(Err(error.into()));
                }
                Some(reply) = self.queue.recv() => return Some(Ok(encode_reply(&reply))),
                message = self.inbound.message() => message,
            };
            let error = match message {
                Ok(Some(message)) => match self.take(message) {
                    Ok(None) => continue,
                    Ok(Some(reply)) => return Some(Ok(reply)),
                    Err(error) => error,
                },
                Ok(None) => return None,
                Err(status) => {
                    let error = UnreadableMessage::from(status);
                    telemetry::unreadable(&self.service.identity().id, error.cause);
                    if error.cause == UnreadableCause::Broken && self.place.is_some() {
                        tracing::info!(reason = %node::Chain(&error), "a stream of steps broke");
                    }
                    error.into()
                }
            };
            self.refusals.note("Steps", &error);
            return Some(Err(error.into()));
        }
    }

    /// Its sender is known: from now on its connection makes no room for others.
    fn admit(&mut self) -> Result<(), ServiceError> {
        if self.place.is_none() {
            let place = self.streams.clone().try_acquire_owned();
            let crowded = ServiceError::Crowded { calls: "streams of steps", limit: STEP_STREAMS };
            self.place = Some(place.map_err(|_| crowded)?);
            self.quiet.iter().for_each(QuietCall::admit);
        }
        Ok(())
    }

    /// Answers a step that no stage takes. Of one whose sender is not known only the first is logged.
    fn refuse(
        &mut self,
        (at, step): (PipelineRef, StepId),
        stage: u32,
        verdict: StepVerdict,
        detail: String,
    ) -> pb::StepReply {
        telemetry::refused(&self.service.identity().id, verdict);
        if self.place.is_some() || !self.has_refused {
            tracing::info!(%step, pipeline = %at, ?verdict, detail, "step refused");
        }
        self.has_refused = true;
        encode_reply(&StepReply { at, step, stage, verdict, detail })
    }

    /// Answers a step of a stranger. It may be a coordinator that was deposed: each has a key of its own, and
    /// one that hears FENCED lets go of its pipeline in place of trying again. Nobody learns more.
    fn turn_away(&mut self, message: &pb::StepMessage) -> Result<pb::StepReply, ServiceError> {
        let header = decode_step_header(message).map_err(|_| ServiceError::Key)?;
        if self.fences_left == 0 || !self.service.outdates(&header) {
            return Err(ServiceError::Key);
        }
        self.fences_left -= 1;
        let verdict = StepVerdict::Fenced;
        telemetry::refused(&self.service.identity().id, verdict);
        if !std::mem::replace(&mut self.has_refused, true) {
            self.refusals.tell("Steps", "fenced", &"its epoch or its term is over");
        }
        let at = PipelineRef { id: header.pipeline, epoch: header.epoch };
        let detail = "its epoch or its term is over".into();
        Ok(encode_reply(&StepReply { at, step: header.step, stage: 0, verdict, detail }))
    }

    /// One step: whether its sender's key is any that is known here, then the checks in the order that
    /// [`crate::session`] gives.
    fn take(&mut self, message: pb::StepMessage) -> Result<Option<pb::StepReply>, ServiceError> {
        if self.service.acquaintance(self.key) == Acquaintance::Stranger {
            return self.turn_away(&message).map(Some);
        }
        let acknowledge = message.acknowledge;
        let pipeline = PipelineId(message.pipeline);
        let at = PipelineRef { id: pipeline, epoch: Epoch(message.epoch) };
        let at = (at, StepId(message.step));
        let corrupt = StepVerdict::Corrupt;
        let header = match decode_step_header(&message) {
            Ok(header) => header,
            Err(error) => {
                let detail = node::Chain(&error).to_string();
                return Ok(Some(self.refuse(at, 0, corrupt, detail)));
            }
        };
        let stage = match self.service.judge(&header) {
            Ok(stage) => stage,
            Err((refusal, speaks_as)) => {
                let at = (PipelineRef { id: pipeline, epoch: refusal.epoch }, at.1);
                let refused = self.refuse(at, speaks_as, refusal.verdict, refusal.detail);
                return Ok(Some(refused));
            }
        };
        if !stage.admits(self.key) {
            return Err(ServiceError::Key);
        }
        self.admit()?;
        let step = match decode_step(message) {
            Ok(step) => step,
            Err(error) => {
                let verdict = match error {
                    WireError::Corrupt { .. } => corrupt,
                    // What arrived is what was sent: it would be refused again.
                    _ => StepVerdict::Invalid,
                };
                let detail = node::Chain(&error).to_string();
                return Ok(Some(self.refuse(at, stage.prepare().stage, verdict, detail)));
            }
        };
        match stage.arrive(step, &self.replies) {
            Ok(reply) if reply.verdict == StepVerdict::Accepted && !acknowledge => Ok(None),
            Ok(reply) => Ok(Some(encode_reply(&reply))),
            Err(_) => Err(ServiceError::EngineStopped),
        }
    }
}

/// The server of one worker, and the way to say how it is. Steps may come for a whole epoch, or
/// not at all; whatever else a caller begins must be whole in time.
///
/// # Errors
///
/// [`RunError::Reflection`] if the descriptors do not fit together.
pub(crate) fn serve(
    listener: TcpListener,
    service: Arc<Service>,
) -> Result<(HealthReporter, impl Future<Output = ()>), RunError> {
    let closing = service.closing().clone();
    let (health, health_service) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let reflection_v1 = reflection().build_v1().map_err(RunError::Reflection)?;
    let reflection_v1alpha = reflection().build_v1alpha().map_err(RunError::Reflection)?;
    let refusals = Arc::new(Refusals::new(&service.identity().id));
    let streams = Arc::new(Semaphore::new(STEP_STREAMS));
    let stage = StageServer::new(StageService { service, streams, refusals })
        .max_decoding_message_size(limits::MESSAGE_BYTES)
        .max_encoding_message_size(limits::MESSAGE_BYTES);
    let routes = Routes::new(stage)
        .add_service(health_service)
        .add_service(reflection_v1)
        .add_service(reflection_v1alpha);
    let methods = vec![
        Method::unary("/tercet.v1.Stage/Prepare", PREPARE_BYTES),
        Method::unary("/tercet.v1.Stage/Activate", SMALL_MESSAGE_BYTES),
        Method::unary("/tercet.v1.Stage/Retire", SMALL_MESSAGE_BYTES),
        Method::unary("/tercet.v1.Stage/Dismiss", SMALL_MESSAGE_BYTES),
        Method::unary("/tercet.v1.Stage/Describe", SMALL_MESSAGE_BYTES),
        Method::unary("/tercet.v1.Stage/Results", SMALL_MESSAGE_BYTES)
            .with_concurrency(&Concurrency::until_ended(RESULT_READERS)),
        // A pipeline that nobody asks anything is quiet.
        Method::streaming("/tercet.v1.Stage/Steps", limits::MESSAGE_BYTES).with_quiet_clients(),
    ];
    let router = with_limits(routes.into_axum_router(), methods, CALL_LIMITS);
    Ok((health, node::serve::serve(listener, router, options(), closing)))
}

/// What the worker does with its connections.
fn options() -> Options {
    let usual = Options::new("stage", Protocol::Grpc, CONNECTIONS);
    Options {
        http2: Http2 {
            keepalive_interval: limits::KEEPALIVE_INTERVAL,
            keepalive_timeout: limits::KEEPALIVE_TIMEOUT,
            streams: CALLS_PER_CONNECTION,
            stream_window_bytes: limits::STREAM_WINDOW_BYTES,
            connection_window_bytes: limits::CONNECTION_WINDOW_BYTES,
            roomy: ROOMY_CONNECTIONS,
            header_bytes: HEADER_LIST_BYTES,
        },
        linger: Some(LINGER),
        ..usual
    }
}

/// Says whether the worker takes new work.
pub(crate) async fn set_serving(health: &HealthReporter, serving: bool) {
    let status = match serving {
        true => tonic_health::ServingStatus::Serving,
        false => tonic_health::ServingStatus::NotServing,
    };
    for service in ["", <StageServer<StageService> as tonic::server::NamedService>::NAME] {
        health.set_service_status(service, status).await;
    }
}
