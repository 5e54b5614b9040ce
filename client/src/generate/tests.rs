//! Arguments, requests and the shape of the JSON.

use clap::Parser;
use proto::generate::{Candidate, FinishReason, Finished, Sampling, Started};
use serde_json::json;

use super::*;
use crate::grpc::tests::{Scripted, answer};

#[derive(Debug, clap::Parser)]
struct Line {
    #[command(flatten)]
    generate: GenerateArgs,
}

fn parse(flags: &[&str]) -> Result<GenerateArgs, clap::Error> {
    Line::try_parse_from(["test"].iter().chain(flags)).map(|line| line.generate)
}

#[test]
fn the_request_is_what_the_arguments_say() {
    let args = parse(&[
        "Once",
        "--max-tokens=9",
        "--temperature=0",
        "--seed=4",
        "--stop=x",
        "--ignore-eos",
        "--idempotency-key=k",
        "--json",
        "--top-logprobs=3",
    ]);
    let want = GenerateRequest {
        prompt: Prompt::Text("Once".into()),
        max_tokens: 9,
        sampling: Sampling { temperature: Some(0.0), ..Sampling::default() },
        stop: vec!["x".into()],
        ignore_eos: true,
        seed: Some(4),
        idempotency_key: "k".into(),
        top_logprobs: Some(3),
        ..GenerateRequest::default()
    };
    assert_eq!(args.unwrap().request().unwrap(), want);

    let args = parse(&["--tokens", "1, 2,3"]).unwrap();
    assert_eq!(args.request().unwrap().prompt, Prompt::Tokens(vec![1, 2, 3]));
}

#[test]
fn what_makes_no_sense_is_a_usage_error() {
    for flags in [
        &[][..],
        &["text", "--tokens", "1"],
        &["text", "more"],
        &["--tokens", ""],
        &["--tokens", "1,,2"],
        &["--tokens", "1,-2"],
        &["--tokens", "4294967296"],
        &["text", "--top-logprobs", "2"],
        &["text", "--json", "--top-logprobs", "21"],
        &["text", "--no-such-flag"],
    ] {
        assert_eq!(parse(flags).unwrap_err().exit_code(), 2, "{flags:?}");
    }
}

fn place(token: u32, logprob: f32, other: u32) -> Logprobs {
    let candidate = |token, logprob| Candidate { token, logprob, token_bytes: vec![] };
    let top = vec![candidate(token, logprob), candidate(other, -4.5)];
    Logprobs { token, logprob, token_bytes: vec![], top }
}

#[test]
fn the_json_has_the_fields_that_scripts_rely_on() {
    let mut completion = Completion::new(true);
    let started = Started { prompt_tokens: 2, ..Started::default() };
    let delta = |index, token, text: &str| Delta {
        index,
        tokens: vec![token],
        text: text.into(),
        logprobs: vec![place(token, -0.5, 9)],
    };
    let finished = Finished {
        reason: FinishReason::Length,
        stop_reason: String::new(),
        prompt_tokens: 2,
        completion_tokens: 2,
        timings: Timings { queue_us: 1, prefill_us: 20, decode_us: 300, cached_tokens: 2 },
    };
    for event in [
        GenerateEvent::Started(started),
        GenerateEvent::Delta(delta(0, 7, "")),
        GenerateEvent::Delta(delta(1, 8, "é")),
        GenerateEvent::Finished(finished),
    ] {
        completion.add(&event);
    }
    let top = |token| json!([{"token": token, "logprob": -0.5}, {"token": 9, "logprob": -4.5}]);
    let mut want = json!({
        "tokens": [7, 8],
        "text": "é",
        "finish_reason": "length",
        "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4},
        "timings": {"queue_us": 1, "prefill_us": 20, "decode_us": 300, "cached_tokens": 2},
        "logprobs": [-0.5, -0.5],
        "top_logprobs": [top(7), top(8)],
    });
    assert_eq!(serde_json::to_value(&completion).unwrap(), want);

    completion.logprobs = None;
    completion.top_logprobs = None;
    let fields = want.as_object_mut().unwrap();
    fields.remove("logprobs");
    fields.remove("top_logprobs");
    assert_eq!(serde_json::to_value(&completion).unwrap(), want, "only when asked for");
}

#[test]
fn a_logprob_reads_back_to_the_same_bits() {
    let completion = Completion { logprobs: Some(vec![-0.1, -1e-7]), ..Completion::default() };
    let text = serde_json::to_string(&completion).unwrap();
    assert!(text.contains("[-0.1,-1e-7]"), "{text}");
}

#[tokio::test]
async fn a_stream_is_collected_to_its_end() {
    let server = Scripted::start(answer("once upon a time"), false).await;
    let client = Client::connect(&server.endpoint).await.unwrap();
    let events = client.generate(GenerateRequest::default()).await.unwrap();
    let completion = Completion::collect(events, false).await.unwrap();
    assert_eq!(completion.text, "once upon a time");
    assert_eq!(completion.tokens, [100, 101, 102, 103]);
    assert_eq!(completion.finish_reason, "stop");
    assert_eq!(completion.usage.total_tokens, 7);
}

#[test]
fn the_summary_counts_the_rate_without_the_first_token() {
    let usage = Usage { completion_tokens: 11, ..Usage::default() };
    let timings = Timings {
        queue_us: 20_000,
        prefill_us: 100_000,
        decode_us: 2_000_000,
        ..Timings::default()
    };
    let completion = Completion { usage, timings, ..Completion::default() };
    assert_eq!(summary(&completion), "[11 tokens, 5.0 tokens/s, first after 0.12 s]");
    assert_eq!(summary(&Completion::default()), "[0 tokens, first after 0.00 s]");
}
