//! The connection to a coordinator. The only file of this crate that names protobuf types.

use std::error::Error;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use node::telemetry::propagation;
use proto::convert::{self, WireError};
use proto::generate::{GenerateEvent, GenerateRequest, Prompt};
use proto::limits::CLIENT_MESSAGE_BYTES;
use proto::pb;
use proto::pb::inference_client::InferenceClient;
use proto::pb::stage_client::StageClient;
use proto::status::ClusterStatus;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};
use tracing::{Instrument, Span, field};

use crate::Endpoint;

mod stranger;
pub use stranger::Stranger;

/// How long opening a connection may take: a host that is there answers within round trips.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the coordinator may take to say how the cluster is. It reads only its own memory.
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);

/// How long after its deadline a request's refusal may arrive.
const DEADLINE_GRACE: Duration = Duration::from_secs(2);

/// How often a connection with an answer under way is probed. An answer may be silent for long
/// (a queue, a long prompt), so silence alone is no reason to give up: an unanswered probe is.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);

/// How long a probe may go unanswered.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection to a coordinator. Cheap to clone; clones share the connection.
#[derive(Clone, Debug)]
pub struct Client {
    endpoint: Endpoint,
    inference: InferenceClient<Channel>,
    channel: Channel,
}

/// Why a coordinator gave no answer, or no whole one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody listens, or not in time.
    #[error(
        "no coordinator answers at {endpoint}: {why} (start one with `tercet up`, or name another \
         with --endpoint)"
    )]
    Unreachable {
        /// Who was asked.
        endpoint: Endpoint,
        /// The innermost of what the transport said.
        why: String,
    },
    /// Somebody else does.
    #[error("{endpoint} {stranger}")]
    Stranger {
        /// Who was asked.
        endpoint: Endpoint,
        /// Who is there.
        stranger: Stranger,
    },
    /// The coordinator answered with an error.
    #[error("{refusal} (coordinator at {endpoint}): {message}")]
    Refused {
        /// Who was asked.
        endpoint: Endpoint,
        /// What kind of error.
        refusal: Refusal,
        /// In the coordinator's words.
        message: String,
    },
    /// The coordinator did not take an order.
    #[error("{message} (coordinator at {endpoint})")]
    Order {
        /// Who was asked.
        endpoint: Endpoint,
        /// What kind of error.
        refusal: Refusal,
        /// In the coordinator's words.
        message: String,
    },
    /// Whoever is there takes no orders.
    #[error(
        "{endpoint} is not where a coordinator takes orders: name the address that it was given as \
         --admin"
    )]
    NoOrders {
        /// Who was asked.
        endpoint: Endpoint,
    },
    /// The answer began and did not end.
    #[error("the answer broke off after {tokens} tokens (coordinator at {endpoint}): {message}")]
    BrokeOff {
        /// Who was asked.
        endpoint: Endpoint,
        /// Tokens that had arrived.
        tokens: u64,
        /// What happened.
        message: String,
    },
    /// What arrived is not what the contract says.
    #[error("the coordinator at {endpoint} sent something that cannot be understood")]
    Wire {
        /// Who was asked.
        endpoint: Endpoint,
        /// What was wrong.
        source: WireError,
    },
}

/// What kind of error a coordinator answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The request cannot be served by this model, ever.
    Invalid,
    /// The queue is full; a later try may succeed.
    Full,
    /// No pipeline serves at the moment, or the connection broke; a later try may succeed.
    Unavailable,
    /// The request's time was up.
    Late,
    /// What was asked for was made for another numerics class or model.
    Conflict,
    /// Something else went wrong.
    Failed,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Invalid => "the request was refused",
            Self::Full => "the cluster is full",
            Self::Unavailable => "the cluster cannot serve now",
            Self::Late => "the request ran out of time",
            Self::Conflict => "the request does not fit what is served",
            Self::Failed => "the request failed",
        })
    }
}

impl From<Code> for Refusal {
    fn from(code: Code) -> Self {
        match code {
            Code::InvalidArgument | Code::OutOfRange | Code::NotFound | Code::Unimplemented => {
                Self::Invalid
            }
            Code::ResourceExhausted => Self::Full,
            Code::Unavailable => Self::Unavailable,
            Code::DeadlineExceeded => Self::Late,
            Code::FailedPrecondition | Code::Aborted | Code::AlreadyExists => Self::Conflict,
            _ => Self::Failed,
        }
    }
}

impl ClientError {
    /// Whether another try, with nothing changed by a person, may succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::BrokeOff { .. } => true,
            Self::Refused { refusal, .. } | Self::Order { refusal, .. } => {
                matches!(refusal, Refusal::Full | Refusal::Unavailable | Refusal::Late)
            }
            Self::Stranger { .. } | Self::NoOrders { .. } | Self::Wire { .. } => false,
        }
    }
}

impl Client {
    /// Connects to the coordinator at `endpoint`.
    ///
    /// # Errors
    ///
    /// [`ClientError::Unreachable`] if nobody listens there.
    pub async fn connect(endpoint: &Endpoint) -> Result<Self, ClientError> {
        let channel = open(endpoint).await?;
        let inference = InferenceClient::new(channel.clone())
            .max_decoding_message_size(CLIENT_MESSAGE_BYTES)
            .max_encoding_message_size(CLIENT_MESSAGE_BYTES);
        Ok(Self { endpoint: endpoint.clone(), inference, channel })
    }

    /// Whom this client asks.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Asks for an answer. Dropping the [`Answer`] cancels it on every stage.
    ///
    /// The answer is one span of the process's trace, and the root of the request's trace if there
    /// is no other; its context travels with the request.
    ///
    /// # Errors
    ///
    /// If the coordinator does not take the request.
    pub async fn generate(&self, request: GenerateRequest) -> Result<Answer, ClientError> {
        let span = answer_span(&request);
        let mut message = Request::new(convert::encode_generate(&request));
        if request.deadline_ms > 0 {
            // The coordinator keeps the deadline; this is for one that does not answer at all.
            let deadline = Duration::from_millis(request.deadline_ms.into());
            message.set_timeout(deadline + DEADLINE_GRACE);
        }
        propagation::inject(&span, message.metadata_mut());
        let answer = self.inference.clone().generate(message).instrument(span.clone()).await;
        match answer {
            Ok(response) => Ok(Answer {
                endpoint: self.endpoint.clone(),
                events: response.into_inner(),
                span,
                tokens: 0,
                ended: false,
            }),
            Err(status) => {
                span.record("error.type", field::debug(status.code()));
                Err(self.refused(status).await)
            }
        }
    }

    /// The cluster as the coordinator sees it.
    ///
    /// # Errors
    ///
    /// If the coordinator does not say, or not in time.
    pub async fn status(&self) -> Result<ClusterStatus, ClientError> {
        let mut message = Request::new(pb::StatusRequest {});
        message.set_timeout(STATUS_TIMEOUT);
        propagation::inject(&Span::current(), message.metadata_mut());
        let status = self.inference.clone().status(message).await;
        match status {
            Ok(response) => Ok(convert::decode_status(response.into_inner())),
            Err(status) => Err(self.refused(status).await),
        }
    }

    /// The worker that is asked in place of a coordinator, if one is.
    async fn worker(&self) -> Option<Stranger> {
        let mut question = Request::new(pb::DescribeRequest {});
        question.set_timeout(stranger::PROBE_TIMEOUT);
        let answer = StageClient::new(self.channel.clone()).describe(question).await.ok()?;
        // It may say anything.
        answer.into_inner().worker.parse().ok().map(Stranger::Worker)
    }

    /// What a failed call means. Looks who is there if that was hardly a coordinator's answer.
    async fn refused(&self, status: Status) -> ClientError {
        let endpoint = self.endpoint.clone();
        let stranger = match status.code() {
            Code::Unimplemented => self.worker().await,
            _ => None,
        };
        let stranger = match stranger {
            None if is_strange(&status) => Stranger::at(&endpoint).await,
            known => known,
        };
        if let Some(stranger) = stranger {
            return ClientError::Stranger { endpoint, stranger };
        }
        ClientError::Refused { endpoint, refusal: status.code().into(), message: said(&status) }
    }
}

/// A connection to the server at `endpoint`.
///
/// # Errors
///
/// [`ClientError::Unreachable`] if nobody listens there, or who does in place of a coordinator.
pub(crate) async fn open(endpoint: &Endpoint) -> Result<Channel, ClientError> {
    let unreachable = |error: tonic::transport::Error| ClientError::Unreachable {
        endpoint: endpoint.clone(),
        why: innermost(&error),
    };
    let connected = Channel::from_shared(endpoint.uri())
        .map_err(|_| ClientError::Refused {
            endpoint: endpoint.clone(),
            refusal: Refusal::Invalid,
            message: "its host is not a valid name or address".into(),
        })?
        .user_agent(concat!("tercet/", env!("CARGO_PKG_VERSION")))
        .map_err(unreachable)?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .connect()
        .await;
    match connected {
        Ok(channel) => Ok(channel),
        // Nobody is there, or somebody who does not even greet.
        Err(error) => Err(match Stranger::at(endpoint).await {
            Some(stranger) => ClientError::Stranger { endpoint: endpoint.clone(), stranger },
            None => unreachable(error),
        }),
    }
}

/// Whether no coordinator says so: it was made here of what the connection did, or is of a kind that
/// coordinators do not send.
pub(crate) fn is_strange(status: &Status) -> bool {
    status.source().is_some()
        || matches!(status.code(), Code::Unknown | Code::Internal | Code::Unimplemented)
}

/// The span of one request, named and attributed by OpenTelemetry's GenAI conventions. Prompt and
/// answer are not in it.
fn answer_span(request: &GenerateRequest) -> Span {
    let operation = match request.prompt {
        Prompt::Conversation { .. } => "chat",
        Prompt::Text(_) | Prompt::Tokens(_) => "text_completion",
    };
    let span = tracing::info_span!(
        "client.generate",
        otel.name = %format!("{operation} {}", request.model).trim_end(),
        otel.kind = "client",
        gen_ai.operation.name = operation,
        gen_ai.provider.name = "tercet",
        gen_ai.request.model = %request.model,
        gen_ai.request.stream = true,
        gen_ai.request.max_tokens = field::Empty,
        gen_ai.request.temperature = field::Empty,
        gen_ai.request.seed = field::Empty,
        gen_ai.response.id = field::Empty,
        gen_ai.response.model = field::Empty,
        gen_ai.response.finish_reasons = field::Empty,
        gen_ai.usage.input_tokens = field::Empty,
        gen_ai.usage.output_tokens = field::Empty,
        error.type = field::Empty,
    );
    if request.max_tokens > 0 {
        span.record("gen_ai.request.max_tokens", request.max_tokens);
    }
    if let Some(temperature) = request.sampling.temperature {
        span.record("gen_ai.request.temperature", temperature);
    }
    if let Some(seed) = request.seed {
        span.record("gen_ai.request.seed", seed);
    }
    span
}

/// The innermost cause, which says what happened: those around it say that something did.
fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// What a status says, or at least its code. One that was made here of an error of the connection
/// says that, and not which part of a library noticed it.
pub(crate) fn said(status: &Status) -> String {
    if let Some(source) = status.source() {
        return format!("the connection broke: {}", innermost(source));
    }
    match status.message() {
        "" => status.code().description().to_owned(),
        message => message.to_owned(),
    }
}

/// The events of one answer, in order: `Started`, deltas, `Finished`.
///
/// A stream that ends has ended well: every other end is an error, and nothing follows an error.
#[derive(Debug)]
pub struct Answer {
    endpoint: Endpoint,
    events: Streaming<pb::GenerateEvent>,
    span: Span,
    /// That have arrived.
    tokens: u64,
    /// `Finished` or an error was passed on.
    ended: bool,
}

impl Answer {
    fn take(&mut self, event: pb::GenerateEvent) -> Result<GenerateEvent, ClientError> {
        let event = convert::decode_event(event)
            .map_err(|source| ClientError::Wire { endpoint: self.endpoint.clone(), source })?;
        match &event {
            GenerateEvent::Started(started) => {
                self.span.record("gen_ai.response.id", &started.request_id);
                self.span.record("gen_ai.response.model", &started.model);
            }
            GenerateEvent::Delta(delta) => self.tokens += delta.tokens.len() as u64,
            GenerateEvent::Finished(finished) => {
                self.ended = true;
                self.span.record("gen_ai.response.finish_reasons", finished.reason.name());
                self.span.record("gen_ai.usage.input_tokens", finished.prompt_tokens);
                self.span.record("gen_ai.usage.output_tokens", finished.completion_tokens);
            }
        }
        Ok(event)
    }

    fn broke_off(&self, message: String) -> ClientError {
        ClientError::BrokeOff { endpoint: self.endpoint.clone(), tokens: self.tokens, message }
    }

    fn failed(&self, status: &Status) -> ClientError {
        self.span.record("error.type", field::debug(status.code()));
        if self.tokens > 0 {
            return self.broke_off(said(status));
        }
        ClientError::Refused {
            endpoint: self.endpoint.clone(),
            refusal: status.code().into(),
            message: said(status),
        }
    }
}

impl Stream for Answer {
    type Item = Result<GenerateEvent, ClientError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let answer = self.get_mut();
        if answer.ended {
            return Poll::Ready(None);
        }
        let polled = {
            let _entered = answer.span.enter();
            Pin::new(&mut answer.events).poll_next(context)
        };
        let Poll::Ready(next) = polled else { return Poll::Pending };
        let item = match next {
            Some(Ok(event)) => answer.take(event),
            Some(Err(status)) => Err(answer.failed(&status)),
            None => Err(answer.broke_off("the coordinator ended the stream too early".into())),
        };
        answer.ended |= item.is_err();
        Poll::Ready(Some(item))
    }
}

#[cfg(test)]
pub(crate) mod tests;
