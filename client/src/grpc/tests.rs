//! The client against a real server on a real socket that says what it was told to say.

use std::sync::{Arc, Mutex};

use futures::StreamExt;
use proto::generate::{Delta, FinishReason, Finished, Started, Timings};
use proto::pb::inference_server::{Inference, InferenceServer};
use proto::status::ModelStatus;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::Response;
use tonic::transport::Server;

use super::*;

type Events = Vec<Result<GenerateEvent, Status>>;

/// A coordinator that answers every request with the same events.
pub(crate) struct Scripted {
    pub(crate) endpoint: Endpoint,
    requests: Arc<Mutex<Vec<GenerateRequest>>>,
    /// Gets one message when the client drops an answer that goes on for ever.
    dropped: mpsc::Receiver<()>,
    _server: JoinSet<()>,
}

struct Script {
    events: Events,
    /// After the events, say nothing until the client goes away.
    endless: bool,
    status: ClusterStatus,
    requests: Arc<Mutex<Vec<GenerateRequest>>>,
    dropped: mpsc::Sender<()>,
    tasks: Mutex<JoinSet<()>>,
}

impl Scripted {
    pub(crate) async fn start(events: Events, endless: bool) -> Self {
        Self::serve(events, endless, sample_status()).await
    }

    /// One that says that its cluster is so.
    pub(crate) async fn with_status(status: ClusterStatus) -> Self {
        Self::serve(Vec::new(), false, status).await
    }

    async fn serve(events: Events, endless: bool, status: ClusterStatus) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Endpoint::from(listener.local_addr().unwrap());
        let requests = Arc::default();
        let (dropped_sender, dropped) = mpsc::channel(8);
        let script = Script {
            events,
            endless,
            status,
            requests: Arc::clone(&requests),
            dropped: dropped_sender,
            tasks: Mutex::default(),
        };
        let mut server = JoinSet::new();
        server.spawn(async move {
            Server::builder()
                .add_service(InferenceServer::new(script))
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
                .unwrap();
        });
        Self { endpoint, requests, dropped, _server: server }
    }

    /// What was asked, in order.
    pub(crate) fn requests(&self) -> Vec<GenerateRequest> {
        self.requests.lock().unwrap().clone()
    }

    /// Waits until the client has dropped an endless answer.
    pub(crate) async fn dropped(&mut self) {
        self.dropped.recv().await.unwrap();
    }
}

#[tonic::async_trait]
impl Inference for Script {
    type GenerateStream = ReceiverStream<Result<pb::GenerateEvent, Status>>;

    async fn generate(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let request = convert::decode_generate(request.into_inner())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        self.requests.lock().unwrap().push(request);
        let mut events = self.events.clone().into_iter().peekable();
        // An error before the first event is the call's own.
        if let Some(Err(_)) = events.peek() {
            return Err(events.next().unwrap().unwrap_err());
        }
        let (sender, receiver) = mpsc::channel(1);
        let (endless, dropped) = (self.endless, self.dropped.clone());
        self.tasks.lock().unwrap().spawn(async move {
            for event in events {
                let _ = sender.send(event.map(|event| convert::encode_event(&event))).await;
            }
            if endless {
                sender.closed().await;
                dropped.send(()).await.unwrap();
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn status(
        &self,
        _: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        Ok(Response::new(convert::encode_status(&self.status)))
    }
}

fn sample_status() -> ClusterStatus {
    let model = ModelStatus { name: "tiny".into(), layers: 6, context: 512, ..Default::default() };
    ClusterStatus { cluster: "test".into(), term: 7, ready: true, model, ..Default::default() }
}

/// The events of an answer `text` of one token a word.
pub(crate) fn answer(text: &str) -> Events {
    let started = Started { request_id: "r1".into(), prompt_tokens: 3, ..Started::default() };
    let mut events = vec![Ok(GenerateEvent::Started(started))];
    let words = text.split_inclusive(' ');
    for (index, word) in words.clone().enumerate() {
        events.push(Ok(GenerateEvent::Delta(Delta {
            index: index as u64,
            tokens: vec![100 + index as u32],
            text: word.to_owned(),
            logprobs: vec![],
        })));
    }
    events.push(Ok(GenerateEvent::Finished(Finished {
        reason: FinishReason::Stop,
        stop_reason: String::new(),
        prompt_tokens: 3,
        completion_tokens: words.count() as u32,
        timings: Timings { queue_us: 1, prefill_us: 2, decode_us: 3, cached_tokens: 4 },
    })));
    events
}

async fn listen(events: Events) -> (Vec<GenerateEvent>, Option<ClientError>) {
    let server = Scripted::start(events, false).await;
    let client = Client::connect(&server.endpoint).await.unwrap();
    let mut answer = match client.generate(GenerateRequest::default()).await {
        Ok(answer) => answer,
        Err(error) => return (vec![], Some(error)),
    };
    let mut events = vec![];
    while let Some(event) = answer.next().await {
        match event {
            Ok(event) => events.push(event),
            Err(error) => {
                assert!(answer.next().await.is_none(), "nothing follows an error");
                return (events, Some(error));
            }
        }
    }
    (events, None)
}

#[tokio::test]
async fn an_answer_arrives_whole_and_in_order() {
    let script = answer("once upon a time");
    let want: Vec<_> = script.iter().map(|event| event.clone().unwrap()).collect();
    let (events, error) = listen(script).await;
    assert_eq!(events, want);
    assert!(error.is_none());
}

#[tokio::test]
async fn an_answer_without_an_end_is_an_error() {
    let mut script = answer("once upon");
    script.pop();
    let (events, error) = listen(script).await;
    assert_eq!(events.len(), 3);
    let error = error.unwrap();
    assert!(matches!(error, ClientError::BrokeOff { tokens: 2, .. }), "{error:?}");
    assert!(error.is_transient());
}

#[tokio::test]
async fn an_error_after_the_first_token_says_how_far_it_came() {
    let mut script = answer("once upon");
    *script.last_mut().unwrap() = Err(Status::unavailable("worker w2 died"));
    let error = listen(script).await.1.unwrap();
    let text = error.to_string();
    assert!(text.starts_with("the answer broke off after 2 tokens"), "{text}");
    assert!(text.ends_with("worker w2 died"), "{text}");
}

#[tokio::test]
async fn refusals_keep_the_words_of_the_coordinator() {
    for (status, refusal, transient) in [
        (Status::invalid_argument("too long"), Refusal::Invalid, false),
        (Status::resource_exhausted("queue of 64 is full"), Refusal::Full, true),
        (Status::unavailable("no pipeline"), Refusal::Unavailable, true),
        (Status::deadline_exceeded("30 s"), Refusal::Late, true),
        (Status::failed_precondition("another class"), Refusal::Conflict, false),
        (Status::internal("a bug"), Refusal::Failed, false),
    ] {
        let words = status.message().to_owned();
        let error = listen(vec![Err(status)]).await.1.unwrap();
        assert_eq!(error.is_transient(), transient, "{error}");
        match error {
            ClientError::Refused { refusal: found, message, .. } => {
                assert_eq!((found, message), (refusal, words));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn dropping_an_answer_cancels_it_at_the_server() {
    let mut script = answer("once upon");
    script.pop();
    let mut server = Scripted::start(script, true).await;
    let client = Client::connect(&server.endpoint).await.unwrap();
    let mut answer = client.generate(GenerateRequest::default()).await.unwrap();
    answer.next().await.unwrap().unwrap();
    drop(answer);
    server.dropped().await;
}

#[tokio::test]
async fn nobody_there_is_said_with_the_address_and_what_to_do() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint::from(listener.local_addr().unwrap());
    drop(listener);
    let error = Client::connect(&endpoint).await.unwrap_err();
    let text = node::Chain(&error).to_string();
    assert!(text.contains(&endpoint.to_string()), "{text}");
    assert!(text.contains("tercet up") && text.contains("refused"), "{text}");
    assert!(error.is_transient());
}

#[tokio::test]
async fn status_comes_as_the_domain_type() {
    let server = Scripted::start(vec![], false).await;
    let client = Client::connect(&server.endpoint).await.unwrap();
    assert_eq!(client.status().await.unwrap(), sample_status());
}

/// A server that answers every connection with `bytes`.
async fn says(bytes: &'static [u8]) -> (Endpoint, JoinSet<()>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint::from(listener.local_addr().unwrap());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 256]).await;
            let _ = stream.write_all(bytes).await;
        }
    });
    (endpoint, tasks)
}

/// The words of a failed `status` at `endpoint`.
async fn words_at(endpoint: &Endpoint) -> String {
    let error = match Client::connect(endpoint).await {
        Err(error) => error,
        Ok(client) => client.status().await.unwrap_err(),
    };
    node::Chain(&error).to_string()
}

#[tokio::test]
async fn who_is_no_coordinator_is_named() {
    let (http, _tasks) = says(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await;
    let words = words_at(&http).await;
    let want = "answers HTTP, not gRPC: is that the --http port? gRPC is 7420 by default";
    assert_eq!(words, format!("{http} {want}"));
    let (tls, _tasks) = says(&[21, 3, 3, 0, 2, 2, 70]).await;
    assert_eq!(words_at(&tls).await, format!("{tls} expects TLS, which is not supported yet"));
    let (mute, _tasks) = says(b"").await;
    let words = words_at(&mute).await;
    assert!(words.contains(&mute.to_string()) && !words.contains("h2 protocol"), "{words}");
    // A port that was free a moment ago.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = Endpoint::from(listener.local_addr().unwrap());
    drop(listener);
    let words = words_at(&closed).await;
    assert!(words.starts_with(&format!("no coordinator answers at {closed}: ")), "{words}");
    assert!(words.contains("refused") && !words.contains("transport"), "{words}");
}

#[tokio::test]
async fn a_server_of_both_versions_of_http_is_told_from_a_coordinator() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint::from(listener.local_addr().unwrap());
    let condition = node::observe::Health::starting();
    let stop = tokio_util::sync::CancellationToken::new();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let router = node::observe::router(condition, node::hosts::Hosts::Any);
        node::serve::serve(listener, router, node::observe::options("observe"), stop).await;
    });
    let words = words_at(&endpoint).await;
    assert!(words.contains("answers HTTP, not gRPC"), "{words}");
}
