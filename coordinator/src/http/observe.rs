//! What watches a process: health, readiness, version, metrics.

use axum::Json;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use proto::status::{WaitCause, Waiting};
use serde::Deserialize;
use serde_json::json;

use super::Api;

/// Prometheus's text format.
const METRICS_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Our names and vLLM's, where the meaning is the same.
const VLLM_NAMES: [(&str, &str); 9] = [
    ("tercet_requests_running", "vllm:num_requests_running"),
    ("tercet_requests_waiting", "vllm:num_requests_waiting"),
    ("tercet_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc"),
    ("tercet_prompt_tokens_total", "vllm:prompt_tokens_total"),
    ("tercet_generation_tokens_total", "vllm:generation_tokens_total"),
    ("tercet_request_success_total", "vllm:request_success_total"),
    ("tercet_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"),
    ("tercet_inter_token_latency_seconds", "vllm:inter_token_latency_seconds"),
    ("tercet_e2e_request_latency_seconds", "vllm:e2e_request_latency_seconds"),
];

/// The process lives: 200, whatever it can serve.
pub(super) async fn health() -> impl IntoResponse {
    Json(json!({ "status": "ok" }))
}

/// A token has come through the active pipeline.
pub(super) async fn ready(State(api): State<Api>) -> Response {
    if *api.service.readiness().borrow() {
        return Json(json!({ "status": "ready" })).into_response();
    }
    let waiting = match api.service.status().await {
        Ok(status) => status.waiting,
        Err(error) => Some(Waiting { cause: WaitCause::Starting, detail: error.to_string() }),
    };
    // It may have become ready in between; the next question finds it so.
    let (cause, reason) = waiting.map(|w| (w.cause.name(), w.detail)).unzip();
    let body = Json(json!({ "status": "not ready", "cause": cause, "reason": reason }));
    (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
}

/// Of the program.
pub(super) async fn version() -> impl IntoResponse {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

/// What may be asked of `/metrics`.
#[derive(Deserialize)]
pub(super) struct MetricsQuery {
    compat: Option<String>,
}

/// Prometheus's text; with `?compat=vllm` also under vLLM's names.
pub(super) async fn metrics(Query(query): Query<MetricsQuery>) -> impl IntoResponse {
    let mut text = node::metrics::render();
    if query.compat.as_deref() == Some("vllm") {
        text.push_str(&vllm_aliases(&text));
    }
    ([(header::CONTENT_TYPE, METRICS_CONTENT_TYPE)], text)
}

/// The samples of `text` that vLLM has too, under its names.
fn vllm_aliases(text: &str) -> String {
    let mut aliases = String::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        // Longer names are no prefixes of shorter ones, and suffixes (`_bucket`) stay.
        let alias = VLLM_NAMES.iter().find_map(|(ours, theirs)| {
            let rest = line.strip_prefix(ours)?;
            rest.starts_with(['{', ' ', '_']).then(|| format!("{theirs}{rest}\n"))
        });
        aliases.extend(alias);
    }
    aliases
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_keep_labels_and_suffixes() {
        let text = "# TYPE tercet_requests_running gauge\ntercet_requests_running 3\n\
                    tercet_request_success_total{finished_reason=\"stop\"} 2\n\
                    tercet_time_to_first_token_seconds_bucket{le=\"1\"} 4\nother 1\n";
        let want = "vllm:num_requests_running 3\n\
                    vllm:request_success_total{finished_reason=\"stop\"} 2\n\
                    vllm:time_to_first_token_seconds_bucket{le=\"1\"} 4\n";
        assert_eq!(vllm_aliases(text), want);
    }
}
