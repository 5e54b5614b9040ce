//! OpenAI's own Python client against a real cluster.

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tests::cluster::{Cluster, json_of};
use tests::http;
use tests::model::{bundled_store, repository};
use tests::process::{Process, run_with_input};
use tests::python;

const PROMPT: &str = "Once upon a time, there was a boy";

fn check(cluster: &Cluster, mode: &str) -> Command {
    let mut command = Command::new(python::with_openai());
    command.arg(repository().join("tests/openai/check.py"));
    command.args([&format!("http://{}/v1", cluster.http()), mode, PROMPT]);
    command
}

/// The coordinator's own tests compare its language with what this writes.
#[test]
fn jinja2_itself_writes_what_the_cases_of_templates_expect() {
    let folder = repository().join("coordinator/tests/jinja");
    let mut command = Command::new(python::with_openai());
    let output = command.arg(folder.join("render.py")).arg(&folder).arg("--check").output();
    let output = output.unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("cases agree"), "{told}");
}

#[test]
fn the_client_lists_completes_and_chats_as_the_command_line_does() {
    let cluster = Cluster::start(bundled_store(), 3, 3);
    let seen = json_of(&check(&cluster, "all").output().unwrap());

    assert_eq!(seen["models"].as_array().unwrap().len(), 1);
    assert_eq!(seen["retrieved"], seen["models"][0]);

    let generated = json_of(&cluster.generate(&[
        "--max-tokens",
        "24",
        "--temperature",
        "0.8",
        "--seed",
        "7",
        PROMPT,
    ]));
    let completions = &seen["completions"];
    assert_eq!(completions["text"], generated["text"]);
    assert_eq!(completions["streamed_text"], generated["text"]);
    assert_eq!(completions["finish_reason"], generated["finish_reason"]);
    assert_eq!(completions["streamed_finish_reason"], generated["finish_reason"]);
    for usage in ["usage", "streamed_usage"] {
        let (found, wanted) = (&completions[usage], &generated["usage"]);
        assert_eq!(found["prompt_tokens"], wanted["prompt_tokens"]);
        assert_eq!(found["completion_tokens"], wanted["completion_tokens"]);
    }
    assert!(completions["chunks"].as_u64().unwrap() > 5, "it was streamed piece by piece");

    let arguments = [
        "chat",
        "--endpoint",
        cluster.grpc(),
        "--max-tokens",
        "24",
        "--temperature",
        "0",
        "--seed",
        "7",
        "--json",
    ];
    let output = run_with_input(&arguments, PROMPT);
    let chatted = json_of(&output);
    let chat = &seen["chat"];
    assert_eq!(chat["text"], chatted["text"]);
    assert_eq!(chat["streamed_text"], chatted["text"]);
    assert_eq!(chat["role"], "assistant");
    assert_eq!(chat["logprobs"], chat["usage"]["completion_tokens"]);
    assert_eq!(chat["top_logprobs"], 2);

    let errors = &seen["errors"];
    assert_eq!(errors["unknown model"]["class"], "NotFoundError");
    assert_eq!(errors["unknown model"]["code"], "model_not_found");
    assert_eq!(errors["too long"]["code"], "context_length_exceeded");
    for bad in ["too long", "bad temperature", "tools"] {
        assert_eq!(errors[bad]["class"], "BadRequestError", "{bad}: {errors}");
        assert_eq!(errors[bad]["type"], "invalid_request_error");
    }
}

#[test]
fn the_client_sees_a_stream_that_fails_midway_as_an_error() {
    // Answers that have begun wait until their deadline for a pipeline that goes on with them: here none
    // comes.
    let deadline = [("TERCET_COORDINATOR__LIMITS__REQUEST_DEADLINE", "4s")];
    let mut cluster = Cluster::start_with(bundled_store(), 3, 3, &deadline);
    let mut client = Process::spawn("openai client", check(&cluster, "interrupted"));
    client.wait_for_log("streaming", Duration::from_secs(60));
    cluster.worker(1).kill();
    let status = client.wait(Duration::from_secs(15));
    assert!(status.success(), "{}", client.log());
    let log = client.log();
    let seen: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    assert_eq!(seen["class"], "APIError", "{seen}");
    assert!(seen["error"].as_str().unwrap().contains("deadline of the request passed"), "{seen}");
    assert!(seen["pieces"].as_u64().unwrap() > 0);
}

#[test]
fn what_scripts_send_by_hand_is_answered_in_openais_form() {
    let cluster = Cluster::start(bundled_store(), 1, 1);
    let at = cluster.http();

    let by_ids =
        json!({"prompt": [[0, 10, 11], [0, 12]], "max_tokens": 3, "temperature": 0, "stop": null});
    let answer = http::post(at, "/v1/completions", &by_ids).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    let indices: Vec<_> = answer.json()["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["index"].as_u64().unwrap())
        .collect();
    assert_eq!(indices, [0, 1]);

    let cases = [
        ("/v1/completions", "{", 400, "invalid_request_error"),
        ("/v1/completions", "[]", 400, "invalid_request_error"),
        ("/v1/completions", r#"{"max_tokens": 3}"#, 400, "invalid_request_error"),
        ("/v1/completions", r#"{"prompt": "x", "max_tokens": -1}"#, 400, "invalid_request_error"),
        ("/v1/completions", r#"{"prompt": "x", "top_p": 2}"#, 400, "invalid_request_error"),
        ("/v1/completions", r#"{"prompt": [99999999]}"#, 400, "invalid_request_error"),
        ("/v1/chat/completions", r#"{"messages": []}"#, 400, "invalid_request_error"),
        ("/v1/nothing", "{}", 404, "not_found_error"),
    ];
    for (path, body, status, kind) in cases {
        let answer = http::request(at, "POST", path, body).unwrap();
        assert_eq!(answer.status, status, "{path} {body}: {}", answer.body);
        let error = &answer.json()["error"];
        assert_eq!(error["type"], kind, "{path} {body}: {error}");
        assert!(!error["message"].as_str().unwrap().is_empty());
    }

    let streamed = json!({"prompt": "Tom", "max_tokens": 3, "temperature": 0, "stream": true});
    let answer = http::post(at, "/v1/completions", &streamed).unwrap();
    assert!(answer.headers.to_ascii_lowercase().contains("content-type: text/event-stream"));
    assert!(answer.body.trim_end().ends_with("data: [DONE]"), "{}", answer.body);

    let metrics = http::get(at, "/metrics").unwrap();
    for name in ["tercet_generation_tokens_total", "tercet_time_to_first_token_seconds_bucket"] {
        assert!(metrics.body.contains(name), "{name} in {}", metrics.body);
    }
    assert_eq!(http::get(at, "/health").unwrap().status, 200);
}
