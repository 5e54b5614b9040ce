//! The gRPC API: decode, ask the service, encode. No decisions.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, stream};
use node::telemetry::propagation;
use proto::convert;
use proto::pb;
use proto::pb::inference_server::{Inference, InferenceServer};
use tokio_util::sync::CancellationToken;
use tonic::codegen::http;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::util::MapFutureLayer;
use tracing::Instrument;

use crate::answer::Answer;
use crate::arrival;
use crate::connections::Connections;
use crate::metrics;
use crate::request::RequestError;
use crate::service::{Service, Wanted};
use crate::spans::request_span;

/// How often a quiet client is asked whether it lives: clients may be far away.
const CLIENT_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);

/// How long a client may take to answer that.
const CLIENT_KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of the headers of one call.
const HEADER_BYTES: u32 = 16 << 10;

/// Flow control of one answer: hundreds of tokens. Beyond it the answer waits for its reader.
const ANSWER_WINDOW_BYTES: u32 = 256 << 10;

/// The name of the service in gRPC health.
const SERVICE: &str = "tercet.v1.Inference";

/// How long a request may take to arrive. [`Limits::wait`] is added: an answer begins after it.
const ARRIVAL_PATIENCE: Duration = Duration::from_secs(30);

/// What requests may be.
pub(crate) struct Limits {
    /// Requests that are read or wait for their answer to begin at once; more are not read.
    pub(crate) requests: usize,
    /// The longest that a request waits before its answer begins.
    pub(crate) wait: Duration,
}

/// Serves until `stop` fires and open answers have ended.
///
/// # Errors
///
/// If the transport fails or the descriptors do not decode.
pub(crate) async fn serve(
    connections: Connections,
    limits: Limits,
    service: Arc<Service>,
    health: HealthReporter,
    health_service: tonic_health::pb::health_server::HealthServer<
        impl tonic_health::pb::health_server::Health,
    >,
    stop: CancellationToken,
) -> Result<(), node::TaskError> {
    let inference = InferenceServer::new(InferenceApi { service: Arc::clone(&service) })
        .max_decoding_message_size(proto::limits::CLIENT_MESSAGE_BYTES)
        .max_encoding_message_size(proto::limits::MESSAGE_BYTES);
    let served = Server::builder()
        .http2_keepalive_interval(Some(CLIENT_KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(CLIENT_KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(HEADER_BYTES)
        .max_concurrent_streams(proto::limits::STREAMS_PER_CONNECTION)
        .initial_stream_window_size(ANSWER_WINDOW_BYTES)
        .initial_connection_window_size(proto::limits::CONNECTION_WINDOW_BYTES)
        .timeout(limits.wait + ARRIVAL_PATIENCE)
        .layer(MapFutureLayer::new(count_refusals))
        .layer(GlobalConcurrencyLimitLayer::new(limits.requests))
        .add_service(inference)
        .add_service(health_service)
        .add_service(reflection()?.build_v1()?)
        .add_service(reflection()?.build_v1alpha()?)
        .serve_with_incoming_shutdown(connections.into_stream(), stop.clone().cancelled_owned());
    tokio::select! {
        outcome = served => Ok(outcome?),
        () = report_health(health, &service) => Ok(()),
    }
}

fn reflection<'a>() -> Result<tonic_reflection::server::Builder<'a>, node::TaskError> {
    Ok(tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET))
}

/// Says in gRPC health what the driver says of the pipeline. The process itself (`""`) serves as
/// long as it answers. Ends never.
async fn report_health(health: HealthReporter, service: &Service) {
    let mut readiness = service.readiness();
    health.set_service_status("", ServingStatus::Serving).await;
    loop {
        let ready = *readiness.borrow_and_update();
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        health.set_service_status(SERVICE, status).await;
        if readiness.changed().await.is_err() {
            // The driver has ended; the server follows.
            health.set_service_status("", ServingStatus::NotServing).await;
            return std::future::pending().await;
        }
    }
}

struct InferenceApi {
    service: Arc<Service>,
}

type EventStream = Pin<Box<dyn Stream<Item = Result<pb::GenerateEvent, Status>> + Send>>;

#[tonic::async_trait]
impl Inference for InferenceApi {
    type GenerateStream = EventStream;

    async fn generate(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<EventStream>, Status> {
        let (metadata, _, message) = request.into_parts();
        let request = convert::decode_generate(message)
            .map_err(|error| Status::invalid_argument(node::Chain(&error).to_string()))?;
        let span = request_span(&request, &self.service.model.name, 1, true);
        propagation::extract(&span, &metadata);
        let started = async {
            // Of what was decoded; dropped when the texts are tokens.
            let _room = self.service.room_for(&request)?;
            let prepared = self.service.prepare(request, Wanted::Answer).await?;
            self.service.start(&prepared, 0, span.clone()).await
        };
        let answer = started.instrument(span.clone()).await.map_err(|error| status_of(&error))?;
        Ok(Response::new(Box::pin(events(answer))))
    }

    async fn status(
        &self,
        _: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        let status = self.service.status().await.map_err(|error| status_of(&error))?;
        Ok(Response::new(convert::encode_status(&status)))
    }
}

/// An answer's events; an error is the last of them.
fn events(answer: Answer) -> impl Stream<Item = Result<pb::GenerateEvent, Status>> + Send {
    stream::unfold(Some(answer), |answer| async move {
        let mut answer = answer?;
        Some(match answer.next().await? {
            Ok(event) => (Ok(convert::encode_event(&event)), Some(answer)),
            Err(error) => (Err(status_of(&error)), None),
        })
    })
}

/// Waits for an answer to begin and counts it if it was refused: then the status stands in the
/// headers. What breaks off later has it in the trailers, and is counted where it broke.
fn count_refusals<B, E>(
    call: impl Future<Output = Result<http::Response<B>, E>>,
) -> impl Future<Output = Result<http::Response<B>, E>> {
    arrival::scope(async move {
        let arrived = arrival::of_this_request();
        let outcome = call.await;
        if let Ok(response) = &outcome
            && let Some(status) = Status::from_header_map(response.headers())
            && status.code() != Code::Ok
        {
            metrics::refused(cause_of(status.code()), "grpc", "grpc", arrived.elapsed());
        }
        outcome
    })
}

/// As it is counted.
fn cause_of(code: Code) -> &'static str {
    match code {
        Code::InvalidArgument => "invalid_request",
        Code::OutOfRange => "body_too_large",
        Code::Unimplemented => "unknown_route",
        Code::NotFound => "model_not_found",
        Code::FailedPrecondition => "class_mismatch",
        Code::ResourceExhausted => "rate_limit_exceeded",
        Code::Unavailable => "service_unavailable",
        Code::DeadlineExceeded | Code::Cancelled => "timeout",
        Code::PermissionDenied | Code::Unauthenticated => "not_authorized",
        Code::Internal | Code::Unknown | Code::DataLoss | Code::Aborted => "internal",
        Code::Ok | Code::AlreadyExists => "other",
    }
}

/// The one map from errors to gRPC statuses.
fn status_of(error: &RequestError) -> Status {
    let message = node::Chain(error).to_string();
    match error {
        RequestError::Invalid { .. }
        | RequestError::ContextLength { .. }
        | RequestError::PromptBytes { .. } => Status::invalid_argument(message),
        RequestError::UnknownModel { .. } => Status::not_found(message),
        RequestError::ClassMismatch { .. } => Status::failed_precondition(message),
        RequestError::Full { .. } | RequestError::NoMemory => Status::resource_exhausted(message),
        RequestError::Unavailable { .. } | RequestError::Lost { .. } => {
            Status::unavailable(message)
        }
        RequestError::TimedOut { .. } => Status::deadline_exceeded(message),
        RequestError::SlowReader { .. } => Status::aborted(message),
        RequestError::Internal { .. } => Status::internal(message),
    }
}
