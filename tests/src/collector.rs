//! An OTLP collector over gRPC that keeps what it is sent.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// One span as it arrived.
#[derive(Clone, Debug)]
pub struct Span {
    /// `service.name` of the process that sent it.
    pub service: String,
    /// Name.
    pub name: String,
    /// Trace, hex.
    pub trace: String,
    /// Id, hex.
    pub id: String,
    /// Parent's id, hex; empty at the root.
    pub parent: String,
    /// Attributes: key and value as text.
    pub attributes: Vec<(String, String)>,
}

impl Span {
    /// The attribute called `key`.
    pub fn attribute(&self, key: &str) -> Option<&str> {
        self.attributes.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }
}

/// A running collector; it stops when dropped.
pub struct Collector {
    spans: Arc<Mutex<Vec<Span>>>,
    address: SocketAddr,
    _runtime: Runtime,
}

impl Collector {
    /// Starts one on a free port.
    ///
    /// # Panics
    ///
    /// If there is no port or no thread for it.
    pub fn start() -> Self {
        let runtime = Runtime::new().expect("threads can be started");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let spans = Arc::<Mutex<Vec<Span>>>::default();
        let service = TraceServiceServer::new(Keep { spans: spans.clone() });
        let server = tonic::transport::Server::builder().add_service(service);
        runtime.spawn(async move {
            let served = server.serve_with_incoming(TcpListenerStream::new(listener)).await;
            served.expect("the collector serves until it is dropped");
        });
        Self { spans, address, _runtime: runtime }
    }

    /// Where it listens, as `OTEL_EXPORTER_OTLP_ENDPOINT` takes it.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All spans that have arrived.
    ///
    /// # Panics
    ///
    /// If the service panicked.
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().expect("the service does not panic").clone()
    }
}

struct Keep {
    spans: Arc<Mutex<Vec<Span>>>,
}

#[tonic::async_trait]
impl TraceService for Keep {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut kept = self.spans.lock().expect("the service does not panic");
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.map(|resource| texts(resource.attributes));
            let service = attributes.unwrap_or_default().into_iter();
            let service = service.filter(|(key, _)| key == "service.name").map(|(_, value)| value);
            let service: String = service.collect();
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                kept.push(Span {
                    service: service.clone(),
                    name: span.name,
                    trace: hex(&span.trace_id),
                    id: hex(&span.span_id),
                    parent: hex(&span.parent_span_id),
                    attributes: texts(span.attributes),
                });
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn texts(
    attributes: Vec<opentelemetry_proto::tonic::common::v1::KeyValue>,
) -> Vec<(String, String)> {
    use opentelemetry_proto::tonic::common::v1::any_value::Value;
    let text = |value: Value| match value {
        Value::StringValue(text) => text,
        Value::IntValue(number) => number.to_string(),
        Value::DoubleValue(number) => number.to_string(),
        Value::BoolValue(truth) => truth.to_string(),
        other => format!("{other:?}"),
    };
    let value = |value: Option<_>| {
        value.and_then(|any: opentelemetry_proto::tonic::common::v1::AnyValue| any.value)
    };
    attributes
        .into_iter()
        .filter_map(|attribute| Some((attribute.key, text(value(attribute.value)?))))
        .collect()
}
