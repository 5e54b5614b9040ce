//! W3C trace context: how a trace goes on in the next process.
//!
//! A process that sends no spans itself (no OTLP endpoint) neither reads nor writes contexts.

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::metadata::MetadataMap;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

const TRACEPARENT: &str = "traceparent";

/// Puts the context of `span` into the metadata of an outgoing gRPC call.
pub fn inject(span: &Span, metadata: &mut MetadataMap) {
    let mut headers = Headers(std::mem::take(metadata).into_headers());
    TraceContextPropagator::new().inject_context(&span.context(), &mut headers);
    *metadata = MetadataMap::from_headers(headers.0);
}

/// Makes `span` a child of the caller's span, if the call came with one. Only before the span is
/// first entered.
pub fn extract(span: &Span, metadata: &MetadataMap) {
    adopt(span, &Metadata(metadata));
}

/// Makes `span` a child of the caller's span, if the HTTP request came with one. Only before the
/// span is first entered.
pub fn extract_http(span: &Span, headers: &HeaderMap) {
    adopt(span, &BorrowedHeaders(headers));
}

/// The `traceparent` of `span`; `None` if its trace is not sampled.
pub fn traceparent(span: &Span) -> Option<String> {
    let context = span.context();
    let span = context.span();
    let context = span.span_context();
    if !context.is_valid() || !context.is_sampled() {
        return None;
    }
    Some(format!("00-{}-{}-01", context.trace_id(), context.span_id()))
}

/// Makes `span` a child of the span that `traceparent` names. Returns whether it names one that
/// could be adopted. Only before the span is first entered.
pub fn set_parent(span: &Span, traceparent: &str) -> bool {
    adopt(span, &One(traceparent))
}

fn adopt(span: &Span, carrier: &dyn Extractor) -> bool {
    let nothing = Context::new();
    let parent = TraceContextPropagator::new().extract_with_context(&nothing, carrier);
    // An invalid parent would make the span a root even where it has a parent already.
    parent.span().span_context().is_valid() && span.set_parent(parent).is_ok()
}

/// Metadata on its way out: tonic's is HTTP headers inside.
struct Headers(HeaderMap);

impl Injector for Headers {
    fn set(&mut self, key: &str, value: String) {
        let Ok(key) = HeaderName::try_from(key) else { return };
        let Ok(value) = HeaderValue::try_from(value) else { return };
        self.0.insert(key, value);
    }
}

struct BorrowedHeaders<'a>(&'a HeaderMap);

impl Extractor for BorrowedHeaders<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct Metadata<'a>(&'a MetadataMap);

impl Extractor for Metadata<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.as_ref().keys().map(HeaderName::as_str).collect()
    }
}

/// A `traceparent` that came without its header.
struct One<'a>(&'a str);

impl Extractor for One<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        (key == TRACEPARENT).then_some(self.0)
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT]
    }
}
