//! The gRPC API for clients, and the one for operators: decode, ask the service, encode. No
//! decisions.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::IntoResponse;
use futures::{Stream, stream};
use node::serve::{CallLimits, Concurrency, Method, with_limits};
use node::telemetry::propagation;
use proto::convert;
use proto::generate::GenerateEvent;
use proto::pb;
use proto::pb::inference_server::{Inference, InferenceServer};
use proto::pb::operator_server::{Operator, OperatorServer};
use tonic::service::Routes;
use tonic::{Code, Request, Response, Status};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tracing::Instrument;

use crate::answer::Answer;
use crate::arrival;
use crate::compute::Compute;
use crate::driver::OrderError;
use crate::metrics;
use crate::request::RequestError;
use crate::service::{Service, Wanted};
use crate::spans::request_span;

/// The name of the service in gRPC health.
const SERVICE: &str = "tercet.v1.Inference";

/// From the head of a call to the first byte of its message: clients send both together.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a request may take to arrive: 4 MiB at 1.1 Mbit/s.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes of all requests that have begun and are not here yet: four of the largest. Beyond it the
/// oldest are cut.
const UNFINISHED_BYTES: usize = 4 * proto::limits::CLIENT_MESSAGE_BYTES;

/// Calls that have begun and whose request is not here yet, a kilobyte each. Beyond it the oldest
/// are cut.
const UNFINISHED_CALLS: usize = 1024;

/// Bytes of a request for the status: it is empty.
const SMALL_MESSAGE_BYTES: usize = 4 << 10;

/// Where the methods of operators are.
pub(crate) const OPERATOR_PATH: &str = "/tercet.v1.Operator/{method}";

/// How long an operator waits for a plan to be decided: as long as a planner may take, and the pause
/// before it.
const PLAN_TIMEOUT: Duration = Duration::from_secs(75);

/// Operators' calls that are served at once: a few people, and what they have running.
const OPERATORS: usize = 16;

/// What requests may be.
pub(crate) struct Limits {
    /// Requests that have arrived and wait for their answer to begin; more are refused.
    pub(crate) requests: usize,
    /// The longest that a request waits before its answer begins.
    pub(crate) wait: Duration,
}

/// The methods, within their limits. Only [`Inference::generate`] can be full: health, status and
/// reflection never wait behind it.
///
/// # Errors
///
/// If the descriptors do not decode.
pub(crate) fn router(
    limits: Limits,
    service: Arc<Service>,
    health: tonic_health::pb::health_server::HealthServer<
        impl tonic_health::pb::health_server::Health,
    >,
) -> Result<Router, tonic_reflection::server::Error> {
    let inference = InferenceServer::new(InferenceApi { service })
        .max_decoding_message_size(proto::limits::CLIENT_MESSAGE_BYTES)
        .max_encoding_message_size(proto::limits::MESSAGE_BYTES);
    let routes = Routes::new(inference)
        .add_service(health)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);
    let requests = Concurrency::until_answered(limits.requests);
    let methods = vec![
        Method::unary("/tercet.v1.Inference/Generate", proto::limits::CLIENT_MESSAGE_BYTES)
            .with_concurrency(&requests),
        Method::unary("/tercet.v1.Inference/Status", SMALL_MESSAGE_BYTES),
    ];
    let calls = CallLimits {
        first_message: FIRST_MESSAGE_TIMEOUT,
        whole_message: ARRIVAL_TIMEOUT,
        unfinished_bytes: UNFINISHED_BYTES,
        unfinished_messages: UNFINISHED_CALLS,
        // Whatever waits longer says so itself.
        answer: Some(limits.wait + ARRIVAL_TIMEOUT),
    };
    let router = with_limits(routes.into_axum_router(), methods, calls);
    // Outermost: what the limits refuse is counted too.
    Ok(router.layer(middleware::from_fn(count_refusals)))
}

fn reflection<'a>() -> tonic_reflection::server::Builder<'a> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

/// Says in gRPC health what the driver says of the pipeline. The process itself (`""`) serves as
/// long as it answers. Ends never.
pub(crate) async fn report_health(health: HealthReporter, service: Arc<Service>) {
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

/// How long the client waits, as gRPC's own libraries say it when their user sets a deadline.
const GRPC_TIMEOUT: &str = "grpc-timeout";

/// What that says: up to eight digits and a unit. `None` for anything else.
fn timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let count: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    Some(match unit {
        b'H' => Duration::from_secs(count * 3600),
        b'M' => Duration::from_secs(count * 60),
        b'S' => Duration::from_secs(count),
        b'm' => Duration::from_millis(count),
        b'u' => Duration::from_micros(count),
        b'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

/// The earlier of two deadlines in milliseconds from now, of which 0 is none.
pub(crate) fn earlier(deadline_ms: u32, timeout: Duration) -> u32 {
    let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX).max(1);
    match deadline_ms {
        0 => timeout_ms,
        deadline_ms => deadline_ms.min(timeout_ms),
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
        let mut request = convert::decode_generate(message)
            .map_err(|error| Status::invalid_argument(node::Chain(&error).to_string()))?;
        if let Some(timeout) =
            metadata.get(GRPC_TIMEOUT).and_then(|value| timeout(value.as_bytes()))
        {
            request.deadline_ms = earlier(request.deadline_ms, timeout);
        }
        let span = request_span(&request, &self.service.model.name, 1, true);
        propagation::extract(&span, &metadata);
        let started = async {
            // Of what was decoded; dropped when the texts are tokens.
            let _room = self.service.room_for(&request)?;
            let prepared = self.service.prepare(request, Wanted::Answer, false).await?;
            self.service.start(&prepared, 0, span.clone()).await
        };
        let answer = started.instrument(span.clone()).await.map_err(|error| status_of(&error))?;
        Ok(Response::new(Box::pin(events(answer, self.service.compute()))))
    }

    async fn status(
        &self,
        _: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        let status = self.service.status().await.map_err(|error| status_of(&error))?;
        Ok(Response::new(convert::encode_status(&status)))
    }
}

/// The methods of operators, within their limits: for a server where clients are not.
pub(crate) fn operator_router(service: Arc<Service>) -> Router {
    let operator = OperatorServer::new(OperatorApi { service })
        .max_decoding_message_size(SMALL_MESSAGE_BYTES)
        .max_encoding_message_size(proto::limits::CLIENT_MESSAGE_BYTES);
    let calls = Concurrency::until_answered(OPERATORS);
    let method = |path| Method::unary(path, SMALL_MESSAGE_BYTES).with_concurrency(&calls);
    let methods = [
        "/tercet.v1.Operator/Status",
        "/tercet.v1.Operator/Drain",
        "/tercet.v1.Operator/Plan",
        "/tercet.v1.Operator/Question",
    ];
    let limits = CallLimits {
        first_message: FIRST_MESSAGE_TIMEOUT,
        whole_message: FIRST_MESSAGE_TIMEOUT,
        unfinished_bytes: OPERATORS * SMALL_MESSAGE_BYTES,
        unfinished_messages: OPERATORS,
        answer: Some(PLAN_TIMEOUT),
    };
    let routes = Routes::new(operator).into_axum_router();
    let router = with_limits(routes, methods.map(method).into(), limits);
    let router = router.layer(middleware::from_fn(refuse_pages));
    router.layer(middleware::from_fn(count_refused_orders))
}

/// Refuses what is not declared to be gRPC. A web page that a person visits may have her browser send
/// anything to her own machine, but not under this type without asking first, which nobody here answers.
async fn refuse_pages(request: axum::extract::Request, next: Next) -> axum::response::Response {
    let declared = request.headers().get(header::CONTENT_TYPE);
    if declared.is_some_and(|declared| declared.as_bytes().starts_with(b"application/grpc")) {
        return next.run(request).await;
    }
    StatusCode::UNSUPPORTED_MEDIA_TYPE.into_response()
}

struct OperatorApi {
    service: Arc<Service>,
}

#[tonic::async_trait]
impl Operator for OperatorApi {
    async fn status(
        &self,
        _: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        let status = self.service.status().await.map_err(|error| status_of(&error))?;
        Ok(Response::new(convert::encode_status(&status)))
    }

    async fn drain(
        &self,
        request: Request<pb::DrainRequest>,
    ) -> Result<Response<pb::DrainResponse>, Status> {
        let order = convert::decode_drain(request.into_inner())
            .map_err(|error| Status::invalid_argument(node::Chain(&error).to_string()))?;
        let drained = self.service.drain(order).await.map_err(|error| refusal_of(&error))?;
        Ok(Response::new(convert::encode_drained(&drained)))
    }

    async fn plan(
        &self,
        request: Request<pb::PlanRequest>,
    ) -> Result<Response<pb::PlanResponse>, Status> {
        let pb::PlanRequest { cluster_id, least_gain } = request.into_inner();
        let planned = self.service.plan(cluster_id, least_gain).await;
        let planned = planned.map_err(|error| refusal_of(&error))?;
        Ok(Response::new(convert::encode_planned(&planned)))
    }

    async fn question(
        &self,
        request: Request<pb::QuestionRequest>,
    ) -> Result<Response<pb::QuestionResponse>, Status> {
        let question = self.service.question(request.into_inner().cluster_id).await;
        let problem = question.map_err(|error| refusal_of(&error))?;
        let problem_json =
            serde_json::to_string(&problem).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(pb::QuestionResponse { problem_json }))
    }
}

/// The map from refused orders to gRPC statuses.
fn refusal_of(error: &OrderError) -> Status {
    let message = error.to_string();
    match error {
        OrderError::NotLeading { .. }
        | OrderError::OtherCluster { .. }
        | OrderError::TooLate { .. } => Status::failed_precondition(message),
        OrderError::UnknownWorker { .. } => Status::not_found(message),
        OrderError::Full => Status::resource_exhausted(message),
        OrderError::Beginning | OrderError::Stopping => Status::unavailable(message),
    }
}

/// An answer's events; an error is the last of them.
fn events(
    answer: Answer,
    compute: Arc<Compute>,
) -> impl Stream<Item = Result<pb::GenerateEvent, Status>> + Send {
    stream::unfold(Some(answer), move |answer| {
        let compute = Arc::clone(&compute);
        async move {
            let mut answer = answer?;
            let encoded = match answer.next().await? {
                Ok(event) => {
                    let cost = match &event {
                        GenerateEvent::Started(started) => started.prompt_logprobs.len(),
                        GenerateEvent::Delta(_) | GenerateEvent::Finished(_) => 0,
                    };
                    compute.on_answer(cost, move || convert::encode_event(&event)).await
                }
                Err(error) => Err(error),
            };
            Some(match encoded {
                Ok(event) => (Ok(event), Some(answer)),
                Err(error) => (Err(status_of(&error)), None),
            })
        }
    })
}

/// Waits for an answer to begin and counts it if it was refused: then the status stands in the
/// headers. What breaks off later has it in the trailers, and is counted where it broke.
async fn count_refusals(request: axum::extract::Request, next: Next) -> axum::response::Response {
    arrival::scope(arrival::of(request.extensions()), async move {
        let arrived = arrival::of_this_request();
        let response = next.run(request).await;
        if let Some(status) = Status::from_header_map(response.headers())
            && status.code() != Code::Ok
        {
            metrics::refused(cause_of(status.code()), "grpc", "grpc", arrived.elapsed());
        }
        response
    })
    .await
}

/// Counts an operator's call that was refused: apart from clients' requests, and not with the times that
/// those take.
async fn count_refused_orders(
    request: axum::extract::Request,
    next: Next,
) -> axum::response::Response {
    let response = next.run(request).await;
    if let Some(status) = Status::from_header_map(response.headers())
        && status.code() != Code::Ok
    {
        metrics::refused_order(cause_of_order(status.code()));
    }
    response
}

/// As an operator's call is counted: of what it names, and of who leads, others speak than of requests.
fn cause_of_order(code: Code) -> &'static str {
    match code {
        Code::NotFound => "worker_not_found",
        Code::FailedPrecondition => "not_in_order",
        other => cause_of(other),
    }
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
        RequestError::Full { .. } | RequestError::FullOfTokens { .. } | RequestError::NoMemory => {
            Status::resource_exhausted(message)
        }
        RequestError::Unavailable { .. } | RequestError::Lost { .. } => {
            Status::unavailable(message)
        }
        RequestError::TimedOut { .. } => Status::deadline_exceeded(message),
        RequestError::SlowReader { .. } => Status::aborted(message),
        RequestError::Internal { .. } => Status::internal(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_counted_apart_from_requests() {
        let unknown =
            refusal_of(&OrderError::UnknownWorker { worker: "w9".into(), there: "w1".into() });
        assert_eq!(cause_of_order(unknown.code()), "worker_not_found");
        assert_eq!(cause_of_order(refusal_of(&OrderError::Full).code()), "rate_limit_exceeded");
        for code in [Code::NotFound, Code::FailedPrecondition] {
            assert_ne!(cause_of_order(code), cause_of(code));
        }
        node::metrics::install().unwrap();
        metrics::refused_order("worker_not_found");
        let page = node::metrics::render();
        let counted = page.lines().find(|line| line.contains("cause=\"worker_not_found\""));
        assert!(counted.is_some_and(|line| line.contains("endpoint=\"operator\"")), "{counted:?}");
        assert_eq!(page.matches("worker_not_found").count(), 1, "no time is noted");
    }

    #[test]
    fn the_deadline_of_a_call_is_that_of_its_request() {
        let millis = |value: &str| timeout(value.as_bytes()).map(|timeout| timeout.as_millis());
        assert_eq!(
            ["2H", "3M", "4S", "5m", "6000u"].map(millis),
            [7_200_000, 180_000, 4000, 5, 6].map(Some)
        );
        assert_eq!(timeout(b"99999999n"), Some(Duration::from_nanos(99_999_999)));
        for wrong in ["", "S", "5", "5x", "-5S", "123456789S", "5 S"] {
            assert_eq!(timeout(wrong.as_bytes()), None, "{wrong:?}");
        }
        assert_eq!(earlier(0, Duration::from_secs(2)), 2000);
        assert_eq!(earlier(500, Duration::from_secs(2)), 500);
        assert_eq!(earlier(5000, Duration::from_micros(2)), 1, "0 would be none");
        assert_eq!(earlier(0, Duration::from_secs(1 << 40)), u32::MAX);
    }
}
