//! How long the handlers of both servers compute at once, whatever they are asked.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, header};
use proto::status::{ClusterStatus, PipelineStatus, PlanStatus, StageStatus, WorkerStatus};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tower::ServiceExt;

use super::{Hosts, Limits, admin_router, router};
use crate::driver::timed::testing::{Longest, cpu_time};
use crate::driver::timed::timed;
use crate::driver::{Command, testing};
use crate::grpc;
use crate::request::RequestError;
use crate::service::tests::service_of;

/// The most that a handler may compute at once is 500 µs. Without optimisation the same work takes ten to
/// twenty times as long.
const LONGEST_POLL: Duration = Duration::from_millis(10);

/// Workers of a large cluster, each of them a pipeline.
const WORKERS: usize = 64;

/// Bytes of a large prompt.
const LARGE: usize = 1 << 20;

fn status() -> ClusterStatus {
    let worker = |index: usize| WorkerStatus {
        id: format!("worker-{index}"),
        address: format!("host-{index}:7071"),
        incarnation: "0123456789abcdef".repeat(2),
        state: "active".to_owned(),
        detail: "it serves".to_owned(),
        ..WorkerStatus::default()
    };
    let stage = |index: usize| StageStatus {
        worker: format!("worker-{index}"),
        address: format!("host-{index}:7071"),
        ..StageStatus::default()
    };
    let pipeline = |index: usize| PipelineStatus {
        id: index as u64,
        stages: vec![stage(index)],
        state: "active".to_owned(),
        ..PipelineStatus::default()
    };
    let pipelines = (0..WORKERS).map(pipeline).collect();
    ClusterStatus {
        workers: (0..WORKERS).map(worker).collect(),
        plan: PlanStatus { pipelines, ..PlanStatus::default() },
        ..ClusterStatus::default()
    }
}

/// A driver that takes no request.
async fn drive(mut commands: mpsc::Receiver<Command>) {
    while let Some(command) = commands.recv().await {
        // Whoever asked has gone.
        match command {
            Command::Status { reply } => drop(reply.send(status())),
            Command::Checks { reply } => drop(reply.send(Vec::new())),
            Command::Submit { reply, .. } => {
                let reason = "nothing serves".to_owned();
                drop(reply.send(Err(RequestError::Unavailable { reason })));
            }
            Command::Finish { .. }
            | Command::Drain { .. }
            | Command::Plan { .. }
            | Command::Question { .. } => {}
        }
    }
}

fn get(path: &str) -> Request<Body> {
    let request = Request::get(path).header(header::HOST, "localhost");
    request.body(Body::empty()).unwrap()
}

fn post(path: &str, body: &serde_json::Value) -> Request<Body> {
    Request::post(path)
        .header(header::HOST, "localhost")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(body.to_string()))
        .unwrap()
}

/// A call with an encoded message.
fn call(path: &str, message: &[u8]) -> Request<Body> {
    let mut frame = vec![0];
    frame.extend((message.len() as u32).to_be_bytes());
    frame.extend(message);
    Request::post(path)
        .header(header::HOST, "localhost")
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .body(Body::from(frame))
        .unwrap()
}

/// A `GenerateRequest` with nothing but a text, its second field.
fn generate(text: &str) -> Vec<u8> {
    let (mut message, mut bytes) = (vec![2 << 3 | 2], text.len());
    while bytes >= 0x80 {
        message.push(bytes as u8 | 0x80);
        bytes >>= 7;
    }
    message.push(bytes as u8);
    message.extend(text.as_bytes());
    message
}

/// Serves a request, and gives how many bytes were answered and the longest that was computed for it at
/// once.
async fn serve(router: &Router, request: Request<Body>) -> (usize, Duration) {
    let longest = Longest::default();
    let answer = async {
        let response = router.clone().oneshot(request).await.unwrap();
        to_bytes(response.into_body(), usize::MAX).await.unwrap().len()
    };
    let bytes = timed(answer, cpu_time, longest.observe()).await;
    (bytes, longest.get())
}

#[tokio::test]
async fn no_handler_computes_for_long_whatever_it_is_asked() {
    node::metrics::install().unwrap();
    crate::metrics::describe();
    // What many pipelines leave in the metrics: megabytes of text.
    for slot in 0..WORKERS as u32 {
        for stage in 0..4 {
            let (compute, wait) = crate::metrics::stage_times(slot, stage);
            compute.record(0.001);
            wait.record(0.001);
        }
    }
    let (handle, commands) = testing::handle();
    let mut tasks = JoinSet::new();
    tasks.spawn(drive(commands));
    let service = Arc::new(service_of("{{ messages[0].content }}", 1 << 20, handle));
    let hosts = || Hosts::of("127.0.0.1:1".parse().unwrap(), None);
    let limits = Limits { body_bytes: 4 << 20, requests: 8, hosts: hosts() };
    let http = router(Arc::clone(&service), limits);
    let admin = admin_router(Arc::clone(&service), hosts());
    let grpc_limits = grpc::Limits { requests: 8, wait: Duration::from_secs(60) };
    let (_reporter, health) = tonic_health::server::health_reporter();
    let grpc = grpc::router(grpc_limits, Arc::clone(&service), health).unwrap();

    let text = "a ".repeat(LARGE / 2);
    let completion = json!({ "model": "small", "prompt": text, "max_tokens": 1 });
    let message = json!({ "role": "user", "content": text });
    let chat = json!({ "model": "small", "messages": [message], "max_tokens": 1 });
    let asked = || {
        vec![
            (&http, get("/health")),
            (&http, get("/ready")),
            (&http, get("/readyz?verbose")),
            (&http, get("/version")),
            (&http, get("/v1/models")),
            (&http, get("/metrics")),
            (&http, get("/metrics?compat=vllm")),
            (&http, post("/v1/completions", &completion)),
            (&http, post("/v1/chat/completions", &chat)),
            (&admin, get("/metrics")),
            (&admin, call("/tercet.v1.Operator/Status", &[])),
            (&grpc, call("/tercet.v1.Inference/Status", &[])),
            (&grpc, call("/tercet.v1.Inference/Generate", &generate(&text))),
        ]
    };
    // What is done once for the process is done before.
    for (router, request) in asked() {
        serve(router, request).await;
    }
    let mut late = Vec::new();
    for (router, request) in asked() {
        let path = request.uri().to_string();
        let (bytes, longest) = serve(router, request).await;
        println!("{path}: {bytes} bytes, {longest:?} at once");
        if path.starts_with("/metrics") {
            assert!(bytes > 1 << 19, "{path}: only {bytes} bytes: not what a large cluster has");
        }
        late.extend((longest >= LONGEST_POLL).then(|| format!("{path}: {longest:?}")));
    }
    assert_eq!(late, [""; 0], "computed at once");
}
