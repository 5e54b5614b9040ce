//! W3C trace context: how a trace goes on in the next process.

use axum::http::HeaderMap;
use tonic::metadata::MetadataMap;
use tracing::Span;

/// Puts the context of `span` into the metadata of an outgoing gRPC call.
pub fn inject(_span: &Span, _metadata: &mut MetadataMap) {
    unimplemented!()
}

/// Makes `span` a child of the caller's span, if the call came with one.
pub fn extract(_span: &Span, _metadata: &MetadataMap) {
    unimplemented!()
}

/// Makes `span` a child of the caller's span, if the HTTP request came with one.
pub fn extract_http(_span: &Span, _headers: &HeaderMap) {
    unimplemented!()
}

/// The `traceparent` of `span`; `None` if its trace is not sampled.
pub fn traceparent(_span: &Span) -> Option<String> {
    unimplemented!()
}

/// Makes `span` a child of the span that `traceparent` names. Returns whether it names one.
pub fn set_parent(_span: &Span, _traceparent: &str) -> bool {
    unimplemented!()
}
