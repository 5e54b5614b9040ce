//! The stage service on the wire: decodes, calls the [`Service`], encodes. No decisions.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use futures::stream::unfold;
use proto::convert::{
    WireError, decode_prepare, decode_step, decode_step_header, encode_reply, encode_result,
};
use proto::ids::{Epoch, Incarnation, KeyDigest, PipelineId, StepId, Term};
use proto::key::CoordinatorKey;
use proto::pb::stage_server::{Stage, StageServer};
use proto::step::{StepReply, StepVerdict};
use proto::{limits, pb};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};
use tonic_health::server::HealthReporter;

use crate::bridge::IN_FLIGHT_MAX;
use crate::error::{RunError, ServiceError, UnreadableMessage};
use crate::service::Service;
use crate::stage::ResultReader;
use crate::telemetry;

/// Replies that may wait on one stream of steps; as many as steps may be in flight, twice.
const REPLIES_MAX: usize = 2 * IN_FLIGHT_MAX as usize;

/// Calls that one connection may have open at a time: a coordinator has a handful.
const CALLS_PER_CONNECTION: usize = 64;

/// HTTP/2 header lists are method, path and a trace context.
const HEADER_LIST_BYTES: u32 = 16 << 10;

/// Streams that were reset and not yet accepted; more is an attack.
const RESET_STREAMS_MAX: usize = 32;

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
        let pb::RetireRequest { epoch, term, dst_incarnation, .. } = request.into_inner();
        let incarnation = incarnation(&dst_incarnation)?;
        self.service.retire(Epoch(epoch), Term(term), incarnation, key).await?;
        Ok(Response::new(pb::RetireResponse {}))
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
        let reader = self.service.results(
            PipelineId(pipeline),
            Epoch(epoch),
            Term(term),
            incarnation(&dst_incarnation)?,
            StepId(after_step),
            key,
        )?;
        let results = unfold(Some(reader), |reader: Option<ResultReader>| async {
            let mut reader = reader?;
            match reader.next().await {
                Ok(result) => Some((Ok(encode_result(&result)), Some(reader))),
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
        let refuse = |epoch, stage, verdict, detail| {
            telemetry::refused(&self.service.identity().id, verdict);
            tracing::info!(%step, %epoch, ?verdict, detail, "step refused");
            Ok(encode_reply(&StepReply { epoch, step, stage, verdict, detail }))
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

/// The server of one worker, and the way to say how it is.
///
/// # Errors
///
/// [`RunError::Reflection`] if the descriptors do not fit together.
pub(crate) fn serve(
    listener: TcpListener,
    service: Arc<Service>,
) -> Result<(HealthReporter, impl Future<Output = Result<(), tonic::transport::Error>>), RunError> {
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
    let router = Server::builder()
        .concurrency_limit_per_connection(CALLS_PER_CONNECTION)
        .max_concurrent_streams(limits::STREAMS_PER_CONNECTION)
        .initial_stream_window_size(limits::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limits::CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(limits::KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(limits::KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(HEADER_LIST_BYTES)
        .http2_max_pending_accept_reset_streams(Some(RESET_STREAMS_MAX))
        .add_service(stage)
        .add_service(health_service)
        .add_service(reflection_v1)
        .add_service(reflection_v1alpha);
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let serving = async move {
        let closed = closing.clone();
        let server = router.serve_with_incoming_shutdown(incoming, closed.cancelled_owned());
        let give_up = async {
            closing.cancelled().await;
            // A watcher of health keeps its stream open for ever: it is cut off.
            tokio::time::sleep(LINGER).await;
        };
        tokio::select! {
            served = server => served,
            () = give_up => Ok(()),
        }
    };
    Ok((health, serving))
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
