//! The span of one request, in the words of OpenTelemetry's conventions for generative AI. Prompts
//! and answers are never part of it.

use proto::generate::{GenerateRequest, Prompt};
use tracing::Span;
use tracing::field::Empty;

/// The span of a request, before it is checked; what comes later is recorded by the answer.
pub(crate) fn request_span(
    request: &GenerateRequest,
    served_model: &str,
    choices: usize,
    stream: bool,
) -> Span {
    let operation = match request.prompt {
        Prompt::Conversation { .. } => "chat",
        Prompt::Text(_) | Prompt::Tokens(_) => "text_completion",
    };
    let sampling = &request.sampling;
    let span = tracing::info_span!(
        "request",
        otel.name = format!("{operation} {served_model}"),
        otel.kind = "server",
        gen_ai.operation.name = operation,
        gen_ai.provider.name = "tercet",
        gen_ai.request.model = served_model,
        gen_ai.request.choice.count = choices as u64,
        gen_ai.request.stream = stream,
        gen_ai.request.max_tokens = Empty,
        gen_ai.request.temperature = Empty,
        gen_ai.request.top_p = Empty,
        gen_ai.request.top_k = Empty,
        gen_ai.request.seed = Empty,
        gen_ai.response.id = Empty,
        gen_ai.response.model = served_model,
        gen_ai.response.finish_reasons = Empty,
        gen_ai.usage.input_tokens = Empty,
        gen_ai.usage.output_tokens = Empty,
        error.type = Empty,
    );
    if request.max_tokens != 0 {
        span.record("gen_ai.request.max_tokens", request.max_tokens);
    }
    if let Some(temperature) = sampling.temperature {
        span.record("gen_ai.request.temperature", f64::from(temperature));
    }
    if let Some(top_p) = sampling.top_p {
        span.record("gen_ai.request.top_p", f64::from(top_p));
    }
    if let Some(top_k) = sampling.top_k {
        span.record("gen_ai.request.top_k", top_k);
    }
    if let Some(seed) = request.seed {
        span.record("gen_ai.request.seed", seed);
    }
    span
}
