//! What watches a process: health, readiness, version, metrics.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use proto::status::{WaitCause, Waiting};
use serde::Deserialize;
use serde_json::json;

use super::asked::AskedQuery;
use super::errors::{Outcome, cause_of};
use crate::driver::Check;
use crate::service::Service;
use crate::{arrival, metrics};

/// Prometheus's text format.
const METRICS_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Our names and vLLM's, where the meaning is the same.
const VLLM_NAMES: [(&str, &str); 17] = [
    ("tercet_requests_running", "vllm:num_requests_running"),
    ("tercet_requests_waiting", "vllm:num_requests_waiting"),
    ("tercet_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc"),
    ("tercet_prompt_tokens_total", "vllm:prompt_tokens_total"),
    ("tercet_generation_tokens_total", "vllm:generation_tokens_total"),
    ("tercet_preemptions_total", "vllm:num_preemptions_total"),
    ("tercet_prefix_cache_queries_total", "vllm:prefix_cache_queries_total"),
    ("tercet_prefix_cache_hits_total", "vllm:prefix_cache_hits_total"),
    ("tercet_request_success_total", "vllm:request_success_total"),
    ("tercet_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"),
    ("tercet_inter_token_latency_seconds", "vllm:inter_token_latency_seconds"),
    ("tercet_e2e_request_latency_seconds", "vllm:e2e_request_latency_seconds"),
    ("tercet_request_queue_seconds", "vllm:request_queue_time_seconds"),
    ("tercet_request_prefill_seconds", "vllm:request_prefill_time_seconds"),
    ("tercet_request_decode_seconds", "vllm:request_decode_time_seconds"),
    ("tercet_request_prompt_tokens", "vllm:request_prompt_tokens"),
    ("tercet_request_generation_tokens", "vllm:request_generation_tokens"),
];

/// The process lives: 200, whatever it can serve.
pub(super) async fn health() -> impl IntoResponse {
    Json(json!({ "status": "ok" }))
}

/// What may be asked of `/ready`.
#[derive(Deserialize)]
pub(super) struct ReadyQuery {
    verbose: Option<String>,
}

/// A token came through a pipeline within the last seconds, and nothing stops; with `?verbose` what
/// that is made of.
pub(super) async fn ready(
    State(service): State<Arc<Service>>,
    AskedQuery(query): AskedQuery<ReadyQuery>,
) -> Response {
    let is_ready = *service.readiness().borrow();
    let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    if query.verbose.is_some() {
        let body = match service.checks().await {
            Ok(checks) => verbose(is_ready, &checks),
            Err(error) => json!({ "status": "not ready", "reason": error.to_string() }),
        };
        return (status, Json(body)).into_response();
    }
    if is_ready {
        return Json(json!({ "status": "ready" })).into_response();
    }
    let waiting = match service.status().await {
        Ok(status) => status.waiting,
        Err(error) => Some(Waiting { cause: WaitCause::Starting, detail: error.to_string() }),
    };
    // It may have become ready in between; the next question finds it so.
    let (cause, reason) = waiting.map(|w| (w.cause.name(), w.detail)).unzip();
    let body = Json(json!({ "status": "not ready", "cause": cause, "reason": reason }));
    (status, body).into_response()
}

fn verbose(is_ready: bool, checks: &[Check]) -> serde_json::Value {
    let checks: Vec<_> = checks
        .iter()
        .map(|check| {
            json!({
                "name": check.name,
                "passes": check.passes,
                "needed": check.needed,
                "detail": check.detail,
            })
        })
        .collect();
    json!({ "status": if is_ready { "ready" } else { "not ready" }, "checks": checks })
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
pub(super) async fn metrics_page(AskedQuery(query): AskedQuery<MetricsQuery>) -> Response {
    let is_for_vllm = query.compat.as_deref() == Some("vllm");
    let with_aliases = move |mut text: String| {
        if is_for_vllm {
            text.push_str(&vllm_aliases(&text));
        }
        text
    };
    match node::metrics::page(with_aliases).await {
        Ok(text) => ([(header::CONTENT_TYPE, METRICS_CONTENT_TYPE)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "metrics were not written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// Counts a request that was refused, at the one place that every response passes, and notes when
/// its first byte came.
pub(super) async fn count_refusals(request: Request, next: Next) -> Response {
    let endpoint = endpoint_of(request.uri().path());
    arrival::scope(arrival::of(request.extensions()), async move {
        let arrived = arrival::of_this_request();
        let response = next.run(request).await;
        let status = response.status();
        let cause = match response.extensions().get::<Outcome>() {
            Some(Outcome::Refused(cause)) => Some(*cause),
            Some(Outcome::BrokeOff) => None,
            // That it is not ready is what a probe asked for.
            None if endpoint == PROBES => None,
            None => {
                (status.is_client_error() || status.is_server_error()).then(|| cause_of(status))
            }
        };
        if let Some(cause) = cause {
            metrics::refused(cause, "http", endpoint, arrived.elapsed());
        }
        response
    })
    .await
}

/// What is asked by those who watch.
const PROBES: &str = "probes";

/// The label of a path: of a closed set, whatever is asked for.
fn endpoint_of(path: &str) -> &'static str {
    match path {
        "/v1/completions" => "completions",
        "/v1/chat/completions" => "chat_completions",
        "/health" | "/healthz" | "/livez" | "/ping" | "/ready" | "/readyz" | "/version"
        | "/metrics" => PROBES,
        path if path == "/v1/models" || path.starts_with("/v1/models/") => "models",
        _ => "other",
    }
}

/// The families of `text` that vLLM has too, under its names, with their `HELP` and `TYPE`.
fn vllm_aliases(text: &str) -> String {
    let mut aliases = String::new();
    for line in text.lines() {
        let (before, line) = match line.split_at_checked("# HELP ".len()) {
            Some((comment @ ("# HELP " | "# TYPE "), line)) => (comment, line),
            _ => ("", line),
        };
        // Longer names are no prefixes of shorter ones, and suffixes (`_bucket`) stay.
        let alias = VLLM_NAMES.iter().find_map(|(ours, theirs)| {
            let rest = line.strip_prefix(ours)?;
            is_of_the_family(rest).then(|| format!("{before}{theirs}{rest}\n"))
        });
        aliases.extend(alias);
    }
    aliases
}

/// Whether what follows a family's name in a line is not the rest of a longer name.
fn is_of_the_family(rest: &str) -> bool {
    let rest = ["_bucket", "_sum", "_count"]
        .iter()
        .find_map(|suffix| rest.strip_prefix(suffix))
        .unwrap_or(rest);
    rest.starts_with(['{', ' '])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn aliases_keep_comments_labels_and_suffixes() {
        let text = "# HELP tercet_requests_running that run\n# TYPE tercet_requests_running gauge\n\
                    tercet_requests_running 3\n\n\
                    tercet_request_success_total{finished_reason=\"stop\"} 2\n\
                    tercet_time_to_first_token_seconds_bucket{le=\"1\"} 4\n\
                    tercet_requests_running_late 1\nother 1\n";
        let want = "# HELP vllm:num_requests_running that run\n\
                    # TYPE vllm:num_requests_running gauge\n\
                    vllm:num_requests_running 3\n\
                    vllm:request_success_total{finished_reason=\"stop\"} 2\n\
                    vllm:time_to_first_token_seconds_bucket{le=\"1\"} 4\n";
        assert_eq!(vllm_aliases(text), want);
    }

    /// The grammar of an exposition: each family has one `HELP` and one `TYPE` before its samples,
    /// which stand together and differ in their labels; histograms have their three kinds.
    fn check(text: &str) -> BTreeMap<&str, &str> {
        let mut helps = Vec::new();
        let mut types = BTreeMap::new();
        let mut series = std::collections::BTreeSet::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, words) = help.split_once(' ').unwrap();
                assert!(!words.trim().is_empty() && !helps.contains(&name), "{line}");
                helps.push(name);
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert!(helps.contains(&name), "{name} has no HELP before its TYPE");
                assert!(types.insert(name, kind).is_none(), "{name} has two TYPEs");
            } else {
                let (sample, value) = line.rsplit_once(' ').unwrap();
                assert!(series.insert(sample), "{sample} stands twice");
                value.parse::<f64>().unwrap();
                let name = sample.split('{').next().unwrap();
                let family = ["_bucket", "_sum", "_count"]
                    .iter()
                    .filter_map(|suffix| name.strip_suffix(suffix))
                    .find(|family| types.get(family) == Some(&"histogram"))
                    .unwrap_or(name);
                let kind = types.get(family).unwrap_or_else(|| panic!("{name} has no TYPE"));
                assert_eq!(*kind == "histogram", family != name, "{line}");
                if *kind == "counter" {
                    assert!(name.ends_with("_total"), "{line}");
                }
            }
        }
        types
    }

    #[test]
    fn every_family_has_help_and_type_is_documented_and_has_its_alias() {
        node::metrics::install().unwrap();
        crate::metrics::describe();
        crate::metrics::queue(&proto::status::QueueStatus::default(), 0);
        crate::metrics::tokens(crate::driver::Counted::default());
        crate::metrics::task_poll("lane").record(0.0001);
        crate::metrics::membership(1, 1, true);
        let second = std::time::Duration::from_secs(1);
        let (compute, wait) = crate::metrics::stage_times(0, 0);
        compute.record(second);
        wait.record(second);
        crate::metrics::first_token(second);
        crate::metrics::next_token(second);
        crate::metrics::finished(crate::metrics::Ended {
            reason: "stop",
            since_arrival: second,
            timings: proto::generate::Timings::default(),
            prompt_tokens: 3,
            generated_tokens: 4,
        });
        crate::metrics::refused("invalid_request", "http", "completions", second);
        crate::metrics::failed("lost");
        crate::metrics::cancelled();
        crate::metrics::plan_written();
        let text = node::metrics::render();
        let whole = format!("{text}{}", vllm_aliases(&text));
        let types = check(&whole);
        let page = include_str!("../../../docs/metrics.md");
        for family in types.keys() {
            assert!(page.contains(&format!("`{family}`")), "{family} is not in docs/metrics.md");
        }
        for (ours, theirs) in VLLM_NAMES {
            assert!(types.contains_key(ours), "{ours} is gone");
            assert_eq!(types.get(ours), types.get(theirs), "{theirs}");
        }
        for name in ["cpu_seconds_total", "resident_memory_bytes", "open_fds", "threads"] {
            assert!(types.contains_key(format!("process_{name}").as_str()), "process_{name}");
        }
    }

    #[test]
    fn every_route_of_who_watches_is_a_probe() {
        let page = include_str!("../../../docs/connections.md");
        let line =
            page.lines().find(|line| line.contains("are served beside the HTTP API")).unwrap();
        let routes: Vec<&str> = line.split('`').filter(|word| word.starts_with('/')).collect();
        assert!(routes.len() >= 8 && routes.contains(&"/healthz"), "{routes:?}");
        for route in routes {
            assert_eq!(endpoint_of(route), PROBES, "{route}");
        }
    }

    /// How often a refusal was counted.
    fn counted(cause: &str, endpoint: &str) -> u64 {
        let text = node::metrics::render();
        let (cause, endpoint) = (format!("cause=\"{cause}\""), format!("endpoint=\"{endpoint}\""));
        let line = text.lines().find(|line| {
            line.starts_with("tercet_requests_refused_total{")
                && line.contains(&cause)
                && line.contains(&endpoint)
        });
        line.map_or(0, |line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
    }

    #[tokio::test]
    async fn what_cannot_be_read_of_a_query_or_a_path_is_answered_as_every_error() {
        use axum::Router;
        use axum::body::{Body, to_bytes};
        use axum::routing::get;
        use tower::ServiceExt;

        use super::super::asked::AskedName;

        node::metrics::install().unwrap();
        let router = Router::new()
            .route("/metrics", get(metrics_page))
            .route("/readyz", get(async |_: AskedQuery<ReadyQuery>| "ready"))
            .route("/v1/models/{*id}", get(async |AskedName(name): AskedName| name));
        let ask = async |path: &str| {
            let request = Request::builder().uri(path).body(Body::empty()).unwrap();
            let response = router.clone().oneshot(request).await.unwrap();
            let status = response.status().as_u16();
            let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
            (status, String::from_utf8(body.to_vec()).unwrap())
        };
        for path in [
            "/metrics?compat=vllm&compat=x",
            "/readyz?verbose&verbose",
            "/readyz?verbose=1&x=2&verbose",
            "/v1/models/%ff",
        ] {
            let (status, body) = ask(path).await;
            let body: serde_json::Value = serde_json::from_str(&body).expect(path);
            assert_eq!((status, &body["error"]["type"]), (400, &"invalid_request_error".into()));
        }
        for path in ["/metrics?compat=x&other&other", "/readyz?verbose", "/v1/models/a%2Fb"] {
            assert_eq!(ask(path).await.0, 200, "{path}");
        }
    }

    #[tokio::test]
    async fn a_refusal_is_counted_once_and_what_broke_off_is_not() {
        use axum::Router;
        use axum::body::Body;
        use axum::routing::get;
        use tower::ServiceExt;

        use super::super::errors::ApiError;
        use crate::request::RequestError;

        node::metrics::install().unwrap();
        let lost = || RequestError::Lost { reason: "gone".into() };
        let router = Router::new()
            .route("/v1/models/full", get(async || ApiError::busy(3)))
            .route("/v1/models/bare", get(async || StatusCode::LENGTH_REQUIRED))
            .route("/v1/models/lost", get(async move || ApiError::broke_off(lost())))
            .route("/v1/models/fine", get(async || "fine"))
            .route("/ready", get(async || StatusCode::SERVICE_UNAVAILABLE))
            .layer(axum::middleware::from_fn(count_refusals));
        let ask = async |path: &str| {
            let request = Request::builder().uri(path).body(Body::empty()).unwrap();
            router.clone().oneshot(request).await.unwrap().status().as_u16()
        };
        let names = [
            ("rate_limit_exceeded", "models"),
            ("length_required", "models"),
            ("service_unavailable", "models"),
            ("service_unavailable", "probes"),
            ("unknown_route", "other"),
        ];
        let count = || names.map(|(cause, endpoint)| counted(cause, endpoint));
        let before = count();
        for (path, status) in [
            ("/v1/models/full", 429),
            ("/v1/models/full", 429),
            ("/v1/models/bare", 411),
            ("/v1/models/lost", 503),
            ("/v1/models/fine", 200),
            ("/ready", 503),
            ("/nowhere", 404),
        ] {
            assert_eq!(ask(path).await, status, "{path}");
        }
        let after = count();
        let grown: Vec<u64> =
            after.iter().zip(before).map(|(after, before)| after - before).collect();
        assert_eq!(grown, [2, 1, 0, 0, 1]);
    }
}
