//! Every field of both routes with every kind of value it may not have, and broken JSON of all
//! sorts: the answer names the field in the client's words and speaks of no type of Rust.

use serde_json::{Value, json};

use super::super::check_body;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
const CONTEXT: usize = 16;

/// The error that `body` is answered with: its parameter and message.
fn refused(path: &str, body: &[u8]) -> (Value, String) {
    let shown = String::from_utf8_lossy(body).chars().take(80).collect::<String>();
    let error = check_body(path, body, CONTEXT).expect_err(&shown)["error"].clone();
    assert_eq!(error["type"], "invalid_request_error", "{shown}");
    let message = error["message"].as_str().unwrap().to_owned();
    for word in
        ["struct", "enum", "variant", "untagged", "u32", "i64", "f32", "expected", "map", "refused"]
    {
        // serde_json's own words for broken JSON, which have no parameter.
        let is_syntax = error["param"].is_null() && word == "expected";
        assert!(is_syntax || !message.contains(word), "{shown}: {message}");
    }
    (error["param"].clone(), message)
}

fn taken(path: &str, body: &Value) {
    if let Err(error) = check_body(path, body.to_string().as_bytes(), CONTEXT) {
        panic!("{body}: {error}");
    }
}

/// A value of each kind of JSON, with its words.
fn kinds() -> [(&'static str, Value, &'static str); 6] {
    [
        ("boolean", json!(true), "true"),
        ("integer", json!(7), "7"),
        ("real", json!(1.5), "1.5"),
        ("string", json!("5"), "a string"),
        ("list", json!([[[]]]), "a list"),
        ("object", json!({"a": {}}), "an object"),
    ]
}

#[test]
fn every_field_says_what_it_must_be_and_what_was_found() {
    let both = [
        ("model", "a string", &["string"][..]),
        ("max_tokens", "an integer", &["integer"]),
        ("temperature", "a number", &["integer", "real"]),
        ("top_p", "a number", &["integer", "real"]),
        ("top_k", "an integer", &["integer"]),
        ("min_p", "a number", &["integer", "real"]),
        ("repetition_penalty", "a number", &["integer", "real"]),
        ("presence_penalty", "a number", &["integer", "real"]),
        ("frequency_penalty", "a number", &["integer", "real"]),
        ("logit_bias", "an object of token ids and numbers", &["object"]),
        ("seed", "an integer", &["integer"]),
        ("stop", "a string or a list of strings", &["string", "list"]),
        ("stop_token_ids", "a list of token ids", &["list"]),
        ("ignore_eos", "true or false", &["boolean"]),
        ("min_tokens", "an integer", &["integer"]),
        ("include_stop_str_in_output", "true or false", &["boolean"]),
        ("n", "an integer", &["integer"]),
        ("stream", "true or false", &["boolean"]),
        ("stream_options", "an object", &["object"]),
        ("class", "a string", &["string"]),
        ("best_of", "an integer", &["integer"]),
        ("cache_salt", "a string", &["string"]),
        ("user", "a string", &["string"]),
        ("skip_special_tokens", "true or false", &["boolean"]),
    ];
    let completions = [
        (
            "prompt",
            "a string, a list of strings, a list of token ids or a list of such lists",
            &["string", "list"][..],
        ),
        ("echo", "true or false", &["boolean"]),
        ("logprobs", "an integer", &["integer"]),
        ("suffix", "a string", &["string"]),
    ];
    let chat = [
        ("messages", "a list of messages", &["list"][..]),
        ("max_completion_tokens", "an integer", &["integer"]),
        ("logprobs", "true or false", &["boolean"]),
        ("top_logprobs", "an integer", &["integer"]),
        ("tools", "a list", &["list"]),
        ("functions", "a list", &["list"]),
        ("tool_choice", "a string or an object", &["string", "object"]),
        ("response_format", "an object with a type", &["object"]),
        ("modalities", "a list of strings", &["list"]),
        ("chat_template_kwargs", "an object", &["object"]),
        ("add_generation_prompt", "true or false", &["boolean"]),
        ("continue_final_message", "true or false", &["boolean"]),
    ];
    let fields = both.iter().flat_map(|field| [(COMPLETIONS, field), (CHAT, field)]);
    let fields = fields.chain(completions.iter().map(|field| (COMPLETIONS, field)));
    for (path, (field, wanted, right)) in fields.chain(chat.iter().map(|field| (CHAT, field))) {
        for (kind, value, found) in kinds() {
            if right.contains(&kind) {
                continue;
            }
            let (parameter, message) =
                refused(path, json!({ *field: value }).to_string().as_bytes());
            assert_eq!(parameter, *field);
            assert_eq!(message, format!("{field} must be {wanted}, found {found}"));
        }
        taken(path, &json!({ *field: null }));
    }
    // What no field wants may be anything.
    for (_, value, _) in kinds() {
        taken(COMPLETIONS, &json!({ "metadata": value, "store": value }));
        taken(CHAT, &json!({ "metadata": value, "guided_json": value, "audio": value }));
    }
}

#[test]
fn numbers_keep_to_what_their_fields_can_hold() {
    for (field, value, message) in [
        ("max_tokens", "-1", "max_tokens must be an integer from 0 to 4294967295, found -1"),
        (
            "max_tokens",
            "4294967296",
            "max_tokens must be an integer from 0 to 4294967295, found 4294967296",
        ),
        ("max_tokens", "1e99", "max_tokens must be an integer from 0 to 4294967295, found 1e99"),
        ("n", "-1", "n must be an integer from 0 to 4294967295, found -1"),
        (
            "seed",
            "18446744073709551616",
            "seed must be an integer from -9223372036854775808 to 18446744073709551615, found 1.8446744073709552e19",
        ),
        ("temperature", "1e300", "temperature must be a number of 32 bits, found 1e300"),
        ("temperature", "1e400", "temperature holds a number out of range"),
        ("min_p", "-1e400", "min_p holds a number out of range"),
    ] {
        let body = format!("{{\"{field}\": {value}}}");
        assert_eq!(refused(COMPLETIONS, body.as_bytes()), (field.into(), message.to_owned()));
    }
    for (field, value) in [
        ("max_tokens", json!(2.0)),
        ("n", json!(1.0)),
        ("top_k", json!(-1.0)),
        ("seed", json!(i64::MIN)),
        ("seed", json!(u64::MAX)),
        ("temperature", json!(0)),
        ("stop_token_ids", json!([1, 2.0])),
        ("prompt", json!([1.0, 2])),
        ("prompt", json!([])),
        ("prompt", json!([[]])),
    ] {
        taken(COMPLETIONS, &json!({ field: value }));
    }
}

#[test]
fn places_inside_a_field_have_their_own_names() {
    let too_many_messages = vec![json!({"role": "user"}); proto::limits::CHAT_MESSAGES + 1];
    let biases: serde_json::Map<_, _> = (0..=300).map(|t| (t.to_string(), json!(1))).collect();
    for (path, body, parameter, message) in [
        (COMPLETIONS, json!({"stop": ["a", 1]}), "stop[1]", "must be a string, found 1"),
        (COMPLETIONS, json!({"stop": vec!["a"; 9]}), "stop", "may have a length of 4, found more"),
        (COMPLETIONS, json!({"stop_token_ids": [1, -1]}), "stop_token_ids[1]", "found -1"),
        (COMPLETIONS, json!({"stop_token_ids": vec![1; 65]}), "stop_token_ids", "length of 64"),
        (COMPLETIONS, json!({"logit_bias": {"5": "x"}}), "logit_bias.5", "found a string"),
        (COMPLETIONS, json!({"logit_bias": {"x": 5}}), "logit_bias", "found \"x\""),
        (COMPLETIONS, json!({"logit_bias": biases}), "logit_bias", "length of 300"),
        (COMPLETIONS, json!({"prompt": ["a", 1]}), "prompt[1]", "must be a string, found 1"),
        (COMPLETIONS, json!({"prompt": [1, "a"]}), "prompt[1]", "an integer, found a string"),
        (COMPLETIONS, json!({"prompt": [[1], [2, null]]}), "prompt[1][1]", "found null"),
        (COMPLETIONS, json!({"prompt": [[[1]]]}), "prompt[0][0]", "found a list"),
        (COMPLETIONS, json!({"prompt": vec!["a"; 65]}), "prompt", "may hold 64 prompts"),
        (COMPLETIONS, json!({"prompt": vec![1; 17]}), "prompt", "maximum context length is 16"),
        (COMPLETIONS, json!({"prompt": [[1], vec![1; 17]]}), "prompt[1]", "context length is 16"),
        (
            COMPLETIONS,
            json!({"stream_options": {"include_usage": "yes"}}),
            "stream_options.include_usage",
            "must be true or false, found a string",
        ),
        (CHAT, json!({"messages": too_many_messages}), "messages", "length of 4096"),
        (CHAT, json!({"messages": ["hi"]}), "messages[0]", "found a string"),
        (CHAT, json!({"messages": [{"content": "a"}]}), "messages[0]", "needs a role"),
        (CHAT, json!({"messages": [{"role": 5}]}), "messages[0].role", "a string, found 5"),
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": 5}]}),
            "messages[0].content",
            "must be a string or a list of text parts, found 5",
        ),
        (
            CHAT,
            json!({"messages": [{"role": "user"}, {"role": "user"},
                {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
            "messages[2].content[0].type",
            "found \"image_url\"",
        ),
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": [{"type": 1}]}]}),
            "messages[0].content[0].type",
            "must be \"text\", found 1",
        ),
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}),
            "messages[0].content[0].text",
            "must be a string, found 1",
        ),
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": [{"text": "a"}]}]}),
            "messages[0].content[0]",
            "needs a type",
        ),
        (
            CHAT,
            json!({"messages": [{"role": "assistant", "tool_calls": [{}]}]}),
            "messages[0].tool_calls",
            "not supported",
        ),
        (
            CHAT,
            json!({"chat_template_kwargs": {"a": vec![0; 2000]}}),
            "chat_template_kwargs",
            "more than a template may be given",
        ),
        (
            CHAT,
            json!({"chat_template_kwargs": {"a": "b".repeat(70_000)}}),
            "chat_template_kwargs",
            "more than a template may be given",
        ),
    ] {
        let (found, text) = refused(path, body.to_string().as_bytes());
        assert_eq!(found, parameter, "{text}");
        assert!(text.contains(message), "{text}");
    }
}

#[test]
fn parts_of_a_text_are_joined_and_unknown_fields_passed_over() {
    taken(
        CHAT,
        &json!({"messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b", "type": "text"}]},
            {"role": "assistant", "content": null, "tool_calls": [], "refusal": {"a": [1]}},
        ], "tools": [], "tool_choice": "none", "response_format": {"type": "text", "x": [1]},
        "chat_template_kwargs": {"a": {"b": [1, -2, 0.5, null, true, "c"]}}}),
    );
}

#[test]
fn broken_json_is_said_in_plain_words() {
    for (body, parameter, words) in [
        (&b""[..], "", "the body is empty"),
        (b" \n\t ", "", "the body is empty"),
        (b"\xef\xbb\xbf{}", "", "byte order mark"),
        (b"\xff\xfe{\0}\0", "", "not UTF-8 at byte 0"),
        (b"{\"model\": \"\xc3\x28\"}", "", "not UTF-8 at byte 11"),
        (b"{\"metadata\": \"\xed\xa0\x80\"}", "", "not UTF-8"),
        (b"{\"model\": \"\\ud800\"}", "", "line 1 column"),
        (b"{\"temperature\": NaN}", "", "found NaN"),
        (b"{\"temperature\": -Infinity}", "", "found Infinity"),
        (b"{\"temperature\": nan}", "", "line 1 column"),
        (b"{\"stream\": True}", "", "found True"),
        (b"{\"stop\": None}", "", "found None"),
        (b"{\"n\": 1,}", "", "line 1 column 9"),
        (b"{\"n\": 1", "", "line 1 column 7"),
        (b"{'n': 1}", "", "line 1 column 2"),
        (b"{\"n\": 1} {}", "", "goes on after its JSON value"),
        (b"{\"n\": 1, \"n\": 1}", "n", "n is given twice"),
        (b"{\"n\": null, \"n\": 1}", "n", "n is given twice"),
        (b"[]", "", "the body must be an object, found a list"),
        (b"\"prompt\"", "", "the body must be an object, found a string"),
        (b"null", "", "the body must be an object, found null"),
        (b"prompt=a&n=1", "", "line 1 column 1"),
    ] {
        let (found, message) = refused(COMPLETIONS, body);
        assert_eq!(found.as_str().unwrap_or_default(), parameter, "{message}");
        assert!(message.contains(words), "{}: {message}", String::from_utf8_lossy(body));
    }
    let deep =
        |open: &str, close: &str| format!("{{\"x\": {}1{}}}", open.repeat(500), close.repeat(500));
    for body in [deep("[", "]"), deep("{\"a\":", "}")] {
        assert!(refused(CHAT, body.as_bytes()).1.contains("nested too deep"));
    }
}
