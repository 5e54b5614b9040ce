//! Spans reach a real OTLP collector with their parents, across every way of propagation.
//!
//! One test, for a process has one telemetry.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

use std::collections::HashMap;
use std::time::Duration;

use axum::http::HeaderMap;
use node::telemetry::{self, TelemetryConfig, propagation};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, async_trait};
use tracing::{info, info_span};

struct Collector(mpsc::Sender<ExportTraceServiceRequest>);

#[async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.send(request.into_inner()).await.unwrap();
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test]
async fn one_trace_goes_through_every_process() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, mut exports) = mpsc::channel(16);
    let mut servers = JoinSet::new();
    servers.spawn(
        tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(Collector(sender)))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );

    let config = TelemetryConfig {
        // Logs and spans are filtered apart: quiet logs lose no span.
        log: Some("error".to_owned()),
        otlp_endpoint: Some(endpoint),
        ..TelemetryConfig::default()
    };
    let guard = telemetry::init("tercet-test", &config).unwrap();

    // As a client does, then a coordinator, then two stages that are told by row.
    let client = info_span!("client", tokens = 7);
    let mut metadata = MetadataMap::new();
    metadata.insert("kept", "as it was".parse().unwrap());
    propagation::inject(&client, &mut metadata);
    assert_eq!(metadata.get("kept").unwrap(), "as it was");

    let coordinator = info_span!("coordinator");
    propagation::extract(&coordinator, &metadata);
    let row = propagation::traceparent(&coordinator).unwrap();
    let stage = info_span!("stage");
    assert!(propagation::set_parent(&stage, &row));
    stage.in_scope(|| {
        info!("an event");
        // Children inside a process need no help.
        info_span!("kernel").in_scope(|| {});
    });

    // As a browser does.
    let mut headers = HeaderMap::new();
    headers
        .insert("traceparent", metadata.get("traceparent").unwrap().as_bytes().try_into().unwrap());
    let http = info_span!("http");
    propagation::extract_http(&http, &headers);

    // Nonsense from outside makes a new trace and no noise.
    let stranger = info_span!("stranger");
    for nonsense in ["", "00-0-0-01", "00-00000000000000000000000000000000-0000000000000000-01"] {
        assert!(!propagation::set_parent(&stranger, nonsense), "{nonsense}");
    }
    // A trace that was not sampled elsewhere is not sampled here.
    let unsampled = info_span!("unsampled");
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
    assert!(propagation::set_parent(&unsampled, parent));
    assert_eq!(propagation::traceparent(&unsampled), None);

    drop((client, coordinator, stage, http, stranger, unsampled));
    guard.shutdown(Duration::from_secs(30)).await;

    exports.close();
    let mut spans: HashMap<String, Span> = HashMap::new();
    while let Some(export) = exports.recv().await {
        for resource in export.resource_spans {
            let attributes = resource.resource.unwrap().attributes;
            let service = attributes.iter().find(|a| a.key == "service.name").unwrap();
            assert!(format!("{:?}", service.value).contains("tercet-test"));
            let found = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            spans.extend(found.map(|span| (span.name.clone(), span)));
        }
    }
    let mut names: Vec<_> = spans.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["client", "coordinator", "http", "kernel", "stage", "stranger"]);
    let trace = &spans["client"].trace_id;
    for (child, parent) in [
        ("coordinator", "client"),
        ("stage", "coordinator"),
        ("kernel", "stage"),
        ("http", "client"),
    ] {
        assert_eq!(spans[child].parent_span_id, spans[parent].span_id, "{child}");
        assert_eq!(spans[child].trace_id, *trace, "{child}");
    }
    assert!(spans["client"].parent_span_id.is_empty());
    assert!(spans["stranger"].parent_span_id.is_empty());
    assert_ne!(spans["stranger"].trace_id, *trace);
    assert_eq!(spans["stage"].events.len(), 1);
    assert_eq!(row, format!("00-{}-{}-01", hex(trace), hex(&spans["coordinator"].span_id)));
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
