//! Bodies as real clients send them, and errors as they expect them.

use std::time::Duration;

use serde::de::MapAccess;
use serde_json::{Value, json};

use super::errors::ApiError;
use super::json::{self, FromBody, Object};
use super::types::Parameters;
use crate::request::RequestError;

impl FromBody for Parameters {
    fn read<'de, A: MapAccess<'de>>(mut object: Object<'_, A>) -> Result<Self, A::Error> {
        let mut parameters = Self::default();
        while let Some(name) = object.name()? {
            parameters.field(&name, &mut object)?;
        }
        Ok(parameters)
    }
}

fn parameters(body: Value) -> Parameters {
    json::parse(body.to_string().as_bytes(), 16).unwrap()
}

#[test]
fn null_is_absent_and_unknown_fields_are_ignored() {
    let null = parameters(json!({
        "model": null, "max_tokens": null, "temperature": null, "stop": null, "seed": null,
        "n": null, "logit_bias": null, "stream": null, "stream_options": null,
        "user": null, "cache_salt": null, "metadata": {"a": 1}, "store": false, "reasoning_effort": "low",
    }));
    assert_eq!(null.choices().unwrap(), 1);
    assert_eq!(null.request().unwrap(), parameters(json!({})).request().unwrap());
}

#[test]
fn fields_take_the_forms_that_clients_send() {
    let request = parameters(json!({
        "temperature": 0, "top_k": -1, "seed": -1, "stop": "x",
        "logit_bias": {"5": 1, " 7": -100.0}, "min_tokens": 2, "ignore_eos": true,
    }))
    .request()
    .unwrap();
    assert_eq!(request.sampling.temperature, Some(0.0));
    assert_eq!(request.sampling.top_k, Some(0), "-1 is off, whatever the model's default is");
    assert_eq!(request.seed, Some(u64::MAX));
    assert_eq!(request.stop, ["x"]);
    let callers = parameters(json!({"user": "me", "cache_salt": "ours"})).request().unwrap();
    assert_eq!((&*callers.user, &*callers.cache_salt), ("me", "ours"));
    assert_eq!(request.sampling.logit_bias, [(7, -100.0), (5, 1.0)]);
    assert!(request.ignore_eos);
    let stops = parameters(json!({"stop": ["a", "b"], "seed": 7})).request().unwrap();
    assert_eq!((stops.stop, stops.seed), (vec!["a".into(), "b".into()], Some(7)));
}

#[test]
fn what_would_change_the_answer_is_refused_by_name() {
    for (body, parameter) in [
        (json!({"n": 0}), "n"),
        (json!({"n": 5}), "n"),
        (json!({"best_of": 3}), "best_of"),
        (json!({"guided_json": {}}), "guided_json"),
        (json!({"guided_choice": ["a", ["b"]]}), "guided_choice"),
        (json!({"structured_outputs": {}}), "structured_outputs"),
        (json!({"skip_special_tokens": false}), "skip_special_tokens"),
    ] {
        let parameters = parameters(body.clone());
        let error = parameters.choices().and_then(|_| parameters.request()).unwrap_err();
        assert_eq!(error.status.as_u16(), 400, "{body}");
        assert_eq!(error.body()["error"]["param"], parameter);
        assert_eq!(error.body()["error"]["type"], "invalid_request_error");
    }
}

#[test]
fn errors_have_the_type_that_makes_clients_do_the_right_thing() {
    let unavailable = RequestError::Unavailable { reason: "no worker".into() };
    let length = RequestError::ContextLength { limit: 16, prompt_tokens: 20, requested: 21 };
    let full = RequestError::Full { limit: 3, retry_after: Duration::from_secs(17) };
    for (error, status, kind, code) in [
        (RequestError::invalid("top_p", "bad"), 400, "invalid_request_error", None),
        (length, 400, "invalid_request_error", Some("context_length_exceeded")),
        (
            RequestError::UnknownModel { model: "x".into(), served: "y".into() },
            404,
            "not_found_error",
            Some("model_not_found"),
        ),
        (full, 429, "rate_limit_error", Some("rate_limit_exceeded")),
        (RequestError::NoMemory, 429, "rate_limit_error", Some("rate_limit_exceeded")),
        (unavailable, 503, "overloaded_error", Some("service_unavailable")),
        (RequestError::TimedOut { reason: "late".into() }, 504, "timeout_error", Some("timeout")),
        (RequestError::Internal { message: "x".into() }, 500, "server_error", None),
    ] {
        let error = ApiError::from(error);
        assert_eq!(error.status.as_u16(), status);
        let body = error.body();
        assert_eq!(body["error"]["type"], kind);
        assert_eq!(body["error"]["code"], json!(code));
        assert!(body["error"]["message"].is_string());
    }
}

#[test]
fn clients_are_told_when_to_come_again_and_when_that_is_in_vain() {
    let full = |limit| RequestError::Full { limit, retry_after: Duration::from_secs(17) };
    let tokens = Duration::from_secs(9);
    let tokens = RequestError::FullOfTokens { waiting: 7, limit: 8, retry_after: tokens };
    let length = RequestError::ContextLength { limit: 16, prompt_tokens: 20, requested: 21 };
    let model = RequestError::UnknownModel { model: "x".into(), served: "y".into() };
    let class = proto::ids::NumericsClass([1; 32]);
    for (error, retry_after, should_retry) in [
        (ApiError::from(full(3)), Some("17"), None),
        (tokens.into(), Some("9"), None),
        (RequestError::NoMemory.into(), Some("1"), None),
        (RequestError::Unavailable { reason: "no worker".into() }.into(), Some("1"), None),
        (ApiError::busy(8), Some("1"), None),
        (ApiError::slow_body(), None, None),
        (RequestError::Internal { message: "x".into() }.into(), None, None),
        (RequestError::invalid("top_p", "bad").into(), None, Some("false")),
        (length.into(), None, Some("false")),
        (model.into(), None, Some("false")),
        (RequestError::ClassMismatch { wanted: class, served: class }.into(), None, Some("false")),
        (RequestError::TimedOut { reason: "late".into() }.into(), None, Some("false")),
        (RequestError::SlowReader { behind: 9 }.into(), None, Some("false")),
        (ApiError::not_found("nothing"), None, Some("false")),
        (ApiError::too_large(9), None, Some("false")),
    ] {
        let words = format!("{error:?}");
        let response = axum::response::IntoResponse::into_response(error);
        let header = |name| response.headers().get(name).map(|value| value.to_str().unwrap());
        assert_eq!(header("retry-after"), retry_after, "{words}");
        assert_eq!(header("x-should-retry"), should_retry, "{words}");
    }
}

#[test]
fn a_client_may_say_how_long_it_waits() {
    let headers = |value: &str| {
        let mut headers = axum::http::HeaderMap::new();
        headers.insert("x-request-timeout", value.parse().unwrap());
        super::deadline_ms(&headers)
    };
    assert_eq!(super::deadline_ms(&axum::http::HeaderMap::new()).unwrap(), 0);
    assert_eq!(
        ["30", "0.25", " 1e9 ", "0.0000001"].map(|v| headers(v).unwrap()),
        [30_000, 250, u32::MAX, 1]
    );
    for wrong in ["", "0", "-1", "NaN", "inf", "1e300", "10s", "1,5"] {
        let error = headers(wrong).unwrap_err();
        assert_eq!(error.status.as_u16(), 400, "{wrong}");
        assert_eq!(error.body()["error"]["param"], "x-request-timeout");
    }
}

#[test]
fn who_may_wait_says_so_by_tier_or_priority() {
    use proto::generate::Priority::{Batch, Interactive};
    for (body, priority) in [
        (json!({}), Interactive),
        (json!({"service_tier": "auto"}), Interactive),
        (json!({"service_tier": "default", "priority": 0}), Interactive),
        (json!({"service_tier": "priority", "priority": -7}), Interactive),
        (json!({"service_tier": "flex"}), Batch),
        (json!({"priority": 1}), Batch),
        (json!({"service_tier": null, "priority": null}), Interactive),
    ] {
        assert_eq!(parameters(body.clone()).request().unwrap().priority, priority, "{body}");
    }
}
