//! Bodies as real clients send them, and errors as they expect them.

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
    for (error, status, kind, code) in [
        (RequestError::invalid("top_p", "bad"), 400, "invalid_request_error", None),
        (length, 400, "invalid_request_error", Some("context_length_exceeded")),
        (
            RequestError::UnknownModel { model: "x".into(), served: "y".into() },
            404,
            "not_found_error",
            Some("model_not_found"),
        ),
        (RequestError::Full { limit: 3 }, 429, "rate_limit_error", Some("rate_limit_exceeded")),
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
