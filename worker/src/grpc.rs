//! The stage service on the wire: decodes, calls the [`Service`], encodes. No decisions.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use futures::stream::unfold;
use node::serve::{CallLimits, Http2, Method, Options, Protocol, with_limits};
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
use tokio::sync::mpsc;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};
use tonic_health::server::HealthReporter;

use crate::bridge::IN_FLIGHT_MAX;
use crate::error::{RunError, ServiceError, UnreadableMessage};
use crate::service::Service;
use crate::stage::ResultReader;
use crate::telemetry;

/// Replies that may wait on one stream of steps; as many as steps may be in flight, twice.
const REPLIES_MAX: usize = 2 * IN_FLIGHT_MAX as usize;

/// Connections: a coordinator has a handful, the stage before and people one each.
const CONNECTIONS: usize = 256;

/// Calls that one connection may have open at a time: a coordinator has a handful.
const CALLS_PER_CONNECTION: u32 = 64;

/// Connections that may have the large windows of flow control: those of two pipelines, for a new
/// one is made before the old one is gone. 64 MiB may be unread in them, and 15 MiB in the others.
const ROOMY_CONNECTIONS: usize = 16;

/// HTTP/2 header lists are method, path and a trace context.
const HEADER_LIST_BYTES: u32 = 16 << 10;

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
        let key = key(&request)?;
        let request = decode_prepare(request.into_inner()).map_err(ServiceError::from)?;
        let (pipeline, epoch, stage) = (request.pipeline, request.epoch, request.stage);
        match self.service.prepare(request, key).await {
            Ok(prepared) => {
                tracing::info!(%pipeline, %epoch, stage, "epoch is prepared");
                Ok(Response::new(pb::PrepareResponse {
                    numerics_class: prepared.class.0.to_vec().into(),
                    weight_bytes: prepared.weight_bytes,
                    kv_bytes: prepared.kv_bytes,
                }))
            }
            Err(error) => {
                let status = Status::from(error);
                tracing::info!(%pipeline, %epoch, stage, reason = status.message(), "not prepared");
                Err(status)
            }
        }
    }

    async fn activate(
        &self,
        request: Request<pb::ActivateRequest>,
    ) -> Result<Response<pb::ActivateResponse>, Status> {
        let key = key(&request)?;
        let pb::ActivateRequest { pipeline, epoch, term, dst_incarnation } = request.into_inner();
        let incarnation = incarnation(&dst_incarnation)?;
        let (pipeline, epoch, term) = (PipelineId(pipeline), Epoch(epoch), Term(term));
        self.service.activate(pipeline, epoch, term, incarnation, key).await?;
        Ok(Response::new(pb::ActivateResponse {}))
    }

    async fn retire(
        &self,
        request: Request<pb::RetireRequest>,
    ) -> Result<Response<pb::RetireResponse>, Status> {
        let key = key(&request)?;
        let pb::RetireRequest { pipeline, epoch, term, dst_incarnation } = request.into_inner();
        let incarnation = incarnation(&dst_incarnation)?;
        let at = PipelineRef { id: PipelineId(pipeline), epoch: Epoch(epoch) };
        self.service.retire(at, Term(term), incarnation, key).await?;
        Ok(Response::new(pb::RetireResponse {}))
    }

    async fn dismiss(
        &self,
        request: Request<pb::DismissRequest>,
    ) -> Result<Response<pb::DismissResponse>, Status> {
        let key = key(&request)?;
        let pb::DismissRequest { term, dst_incarnation } = request.into_inner();
        self.service.dismiss(Term(term), incarnation(&dst_incarnation)?, key).await?;
        Ok(Response::new(pb::DismissResponse {}))
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
        }))
    }

    async fn steps(
        &self,
        request: Request<Streaming<pb::StepMessage>>,
    ) -> Result<Response<Self::StepsStream>, Status> {
        let key = key(&request)?.map(|key| key.digest());
        let (replies, queue) = mpsc::channel(REPLIES_MAX);
        let edge = Edge {
            key,
            service: self.service.clone(),
            inbound: request.into_inner(),
            replies,
            queue,
            ended: false,
        };
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
        let key = key(&request)?;
        let pb::ResultsRequest { pipeline, epoch, term, dst_incarnation, after_step } =
            request.into_inner();
        let source = ResultSource {
            pipeline: PipelineId(pipeline),
            term: Term(term),
            incarnation: incarnation(&dst_incarnation)?,
        };
        let reader = self.service.results(
            source.pipeline,
            Epoch(epoch),
            source.term,
            source.incarnation,
            StepId(after_step),
            key,
        )?;
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

fn incarnation(bytes: &[u8]) -> Result<Incarnation, ServiceError> {
    Incarnation::try_from(bytes).map_err(|error| ServiceError::Wire(error.into()))
}

/// What a caller shows of who it is.
fn key<T>(request: &Request<T>) -> Result<Option<CoordinatorKey>, ServiceError> {
    Ok(CoordinatorKey::of(request.metadata())?)
}

/// One stream of steps.
struct Edge {
    /// Of the key that its sender showed.
    key: Option<KeyDigest>,
    service: Arc<Service>,
    inbound: Streaming<pb::StepMessage>,
    /// Given to the stages that this stream feeds, for what later stages say.
    replies: mpsc::Sender<StepReply>,
    queue: mpsc::Receiver<StepReply>,
    /// After an error nothing follows.
    ended: bool,
}

impl Edge {
    /// The next answer; `None` when the stream is over.
    async fn next(&mut self) -> Option<Result<pb::StepReply, Status>> {
        if self.ended {
            return None;
        }
        tokio::select! {
            // What later stages say goes first: their steps came first.
            biased;
            () = self.service.closing().cancelled() => {
                Some(Err(ServiceError::Closing.into()))
            }
            Some(reply) = self.queue.recv() => Some(Ok(encode_reply(&reply))),
            message = self.inbound.message() => match message {
                Ok(Some(message)) => Some(self.take(message)),
                Ok(None) => None,
                Err(status) => {
                    let error = UnreadableMessage::from(status);
                    tracing::info!(reason = %node::Chain(&error), "a stream of steps broke");
                    telemetry::unreadable(&self.service.identity().id, error.cause);
                    Some(Err(ServiceError::from(error).into()))
                }
            },
        }
    }

    /// One step, in the order of checks that [`crate::session`] gives.
    fn take(&self, message: pb::StepMessage) -> Result<pb::StepReply, Status> {
        let (epoch, step) = (Epoch(message.epoch), StepId(message.step));
        let pipeline = PipelineId(message.pipeline);
        let refuse = |epoch, stage, verdict, detail| {
            telemetry::refused(&self.service.identity().id, verdict);
            let at = PipelineRef { id: pipeline, epoch };
            tracing::info!(%step, pipeline = %at, ?verdict, detail, "step refused");
            Ok(encode_reply(&StepReply { at, step, stage, verdict, detail }))
        };
        let corrupt = |stage, error: &WireError| {
            refuse(epoch, stage, StepVerdict::Corrupt, node::Chain(error).to_string())
        };
        let header = match decode_step_header(&message) {
            Ok(header) => header,
            Err(error) => return corrupt(0, &error),
        };
        let stage = match self.service.judge(&header) {
            Ok(stage) => stage,
            Err((refusal, speaks_as)) => {
                return refuse(refusal.epoch, speaks_as, refusal.verdict, refusal.detail);
            }
        };
        if !stage.admits(self.key) {
            return Err(ServiceError::Key.into());
        }
        let step = match decode_step(message) {
            Ok(step) => step,
            Err(error @ WireError::Corrupt { .. }) => {
                return corrupt(stage.prepare().stage, &error);
            }
            // What arrived is what was sent: it would be refused again.
            Err(error) => {
                let detail = node::Chain(&error).to_string();
                return refuse(epoch, stage.prepare().stage, StepVerdict::Invalid, detail);
            }
        };
        match stage.arrive(step, &self.replies) {
            Ok(reply) => Ok(encode_reply(&reply)),
            Err(_) => Err(ServiceError::EngineStopped.into()),
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
    let stage = StageServer::new(StageService { service })
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
        Method::unary("/tercet.v1.Stage/Results", SMALL_MESSAGE_BYTES),
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
