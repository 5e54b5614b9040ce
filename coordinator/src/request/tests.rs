//! Every parameter at, inside and outside its bounds.

use proto::generate::ChatMessage;

use super::*;

fn model() -> ServedModel {
    ServedModel {
        name: "tiny".into(),
        id: "ab".repeat(32),
        layers: 2,
        vocab: 100,
        context: 16,
        bos_token: Some(0),
        eos_tokens: vec![1, 2],
        sampling: SamplingDefaults::default(),
        created_unix_s: 0,
    }
}

fn request() -> GenerateRequest {
    GenerateRequest { prompt: Prompt::Tokens(vec![0, 5]), ..GenerateRequest::default() }
}

#[test]
fn defaults_are_those_of_the_schema() {
    let checked = check(request(), &model()).unwrap();
    let want = SamplingParameters { temperature: 1.0, ..SamplingParameters::default() };
    assert_eq!(checked.sampling, want);
    assert_eq!(checked.stop_tokens, [1, 2]);
    assert_eq!((checked.max_tokens, checked.seed, checked.class), (None, None, None));
}

#[test]
fn what_a_request_does_not_say_is_the_models_default() {
    let sampling = SamplingDefaults {
        temperature: Some(0.7),
        top_k: Some(20),
        top_p: Some(0.9),
        min_p: Some(0.1),
        repetition_penalty: Some(1.1),
        max_new_tokens: Some(8),
    };
    let model = ServedModel { sampling, ..model() };
    let checked = check(request(), &model).unwrap();
    let want = SamplingParameters {
        temperature: 0.7,
        top_k: 20,
        top_p: 0.9,
        min_p: 0.1,
        repetition_penalty: 1.1,
        ..SamplingParameters::default()
    };
    assert_eq!(checked.sampling, want);
    let said = Sampling {
        temperature: Some(0.0),
        top_k: Some(0),
        top_p: Some(1.0),
        min_p: Some(0.0),
        repetition_penalty: Some(1.0),
        ..Sampling::default()
    };
    let checked = check(GenerateRequest { sampling: said, ..request() }, &model).unwrap();
    let want = SamplingParameters { temperature: 0.0, ..SamplingParameters::default() };
    assert_eq!(checked.sampling, want, "a request's own values win");
    // The context has 16.
    assert_eq!(default_length(&checked, &[0; 5], &model), Some(8));
    assert_eq!(default_length(&checked, &[0; 12], &model), None, "as many as there is room for");
    let least = Checked { min_tokens: 10, ..checked.clone() };
    assert_eq!(default_length(&least, &[0; 5], &model), Some(10), "asked for is asked for");
    let resumed = Checked { received: vec![0; 9], ..checked };
    assert_eq!(default_length(&resumed, &[0; 5], &model), None, "it has more already");
}

#[test]
fn numbers_keep_to_their_ranges() {
    type Set = fn(&mut Sampling, f32);
    let cases: [(&str, Set, &[f32], &[f32]); 6] = [
        ("temperature", |s, v| s.temperature = Some(v), &[0.0, 2.0], &[-0.1, 2.1]),
        ("top_p", |s, v| s.top_p = Some(v), &[1e-9, 1.0], &[0.0, -1.0, 1.01]),
        ("min_p", |s, v| s.min_p = Some(v), &[0.0, 1.0], &[-0.1, 1.1]),
        (
            "repetition_penalty",
            |s, v| s.repetition_penalty = Some(v),
            &[0.01, 0.1, 10.0],
            &[0.0, 1e-45, 1e-38, 0.009, -1.0, 10.1],
        ),
        ("presence_penalty", |s, v| s.presence_penalty = Some(v), &[-2.0, 2.0], &[-2.1, 2.1]),
        ("frequency_penalty", |s, v| s.frequency_penalty = Some(v), &[-2.0, 2.0], &[-2.1, 2.1]),
    ];
    for (name, set, legal, illegal) in cases {
        for &value in legal {
            let mut request = request();
            set(&mut request.sampling, value);
            check(request, &model()).unwrap_or_else(|error| panic!("{name} {value}: {error}"));
        }
        for &value in illegal.iter().chain(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]) {
            let mut request = request();
            set(&mut request.sampling, value);
            let error = check(request, &model()).unwrap_err();
            let RequestError::Invalid { parameter, .. } = error else { panic!("{error:?}") };
            assert_eq!(parameter, name, "{value}");
        }
    }
}

#[test]
fn lists_and_ids_keep_to_their_bounds() {
    type Change = fn(&mut GenerateRequest);
    let cases: [(&str, Change); 17] = [
        ("prompt", |r| r.prompt = Prompt::Tokens(vec![])),
        ("prompt", |r| r.prompt = Prompt::Tokens(vec![100])),
        ("messages", |r| {
            r.prompt =
                Prompt::Conversation { messages: vec![], template_arguments_json: String::new() }
        }),
        ("messages", |r| {
            r.prompt = Prompt::Conversation {
                messages: vec![ChatMessage::default(); limits::CHAT_MESSAGES + 1],
                template_arguments_json: String::new(),
            }
        }),
        (TEMPLATE_ARGUMENTS, |r| {
            r.prompt = Prompt::Conversation {
                messages: vec![ChatMessage::default()],
                template_arguments_json: " ".repeat(limits::TEMPLATE_ARGUMENT_BYTES + 1),
            }
        }),
        ("stop", |r| r.stop = vec!["x".into(); 5]),
        ("stop", |r| r.stop = vec![String::new()]),
        ("stop", |r| r.stop = vec!["x".repeat(65)]),
        ("stop_token_ids", |r| r.stop_token_ids = vec![100]),
        ("stop_token_ids", |r| r.stop_token_ids = vec![1; 65]),
        ("logit_bias", |r| r.sampling.logit_bias = vec![(100, 1.0)]),
        ("logit_bias", |r| r.sampling.logit_bias = vec![(3, 1.0), (4, 1.0), (3, 2.0)]),
        ("logit_bias", |r| r.sampling.logit_bias = vec![(3, f32::NAN)]),
        ("logit_bias", |r| r.sampling.logit_bias = (0..301).map(|i| (i % 100, 0.0)).collect()),
        ("top_logprobs", |r| r.top_logprobs = Some(21)),
        ("score_prompt", |r| r.score_prompt = true),
        ("class", |r| r.class = "xyz".into()),
    ];
    for (name, change) in cases {
        let mut request = request();
        change(&mut request);
        let checked = check(request, &model()).and_then(|checked| match &checked.prompt {
            Prompt::Tokens(tokens) => check_lengths("prompt", tokens, checked.max_tokens, &model()),
            _ => Ok(()),
        });
        match checked.unwrap_err() {
            RequestError::Invalid { parameter, .. } => assert_eq!(parameter, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn resuming_needs_all_that_was_received() {
    for (index, received, max_tokens, good) in [
        (2, vec![5, 6], 0, true),
        (1, vec![5, 6], 0, false),
        (3, vec![5, 6], 0, false),
        (2, vec![5, 100], 0, false),
        (2, vec![5, 6], 2, true),
        (2, vec![5, 6], 1, false),
    ] {
        let mut request = request();
        (request.resume_index, request.received_ids) = (index, received.clone());
        request.max_tokens = max_tokens;
        assert_eq!(check(request, &model()).is_ok(), good, "{index} {received:?} {max_tokens}");
    }
}

#[test]
fn the_model_goes_by_name_or_id() {
    for (name, good) in [("", true), ("tiny", true), (&*"ab".repeat(32), true), ("Tiny", false)] {
        let request = GenerateRequest { model: name.into(), ..request() };
        assert_eq!(check(request, &model()).is_ok(), good, "{name}");
    }
}

#[test]
fn too_long_is_said_in_the_words_that_clients_look_for() {
    check_lengths("prompt", &[5; 15], None, &model()).unwrap();
    check_lengths("prompt", &[5; 10], Some(6), &model()).unwrap();
    for (prompt, max_tokens) in [(16, None), (10, Some(7)), (15, Some(u32::MAX))] {
        let error = check_lengths("prompt", &vec![5; prompt], max_tokens, &model()).unwrap_err();
        assert!(matches!(error, RequestError::ContextLength { .. }));
        let words = error.to_string();
        assert!(words.starts_with("This model's maximum context length is 16 tokens"), "{words}");
    }
}

#[test]
fn a_prompt_without_an_answer_may_fill_the_context() {
    check_lengths("prompt", &[5; 16], Some(0), &model()).unwrap();
    let error = check_lengths("prompt", &[5; 17], Some(0), &model()).unwrap_err();
    assert!(matches!(error, RequestError::ContextLength { .. }));
}

#[test]
fn what_is_wrong_with_a_prompt_is_said_of_the_field_that_was_sent() {
    let conversation =
        Prompt::Conversation { messages: Vec::new(), template_arguments_json: String::new() };
    let prompts = [Prompt::Text(String::new()), Prompt::Tokens(Vec::new()), conversation];
    for (field, prompt) in ["prompt", "prompt", "messages"].into_iter().zip(&prompts) {
        assert_eq!(field_of(prompt), field);
        for error in [
            TextError::NoTokenizer,
            TextError::Run { chars: 1 },
            TextError::TooMuch { bytes: 2, most: 1 },
        ] {
            let RequestError::Invalid { parameter, .. } = RequestError::of_text(error, field)
            else {
                panic!("{field}");
            };
            assert_eq!(parameter, field);
        }
        for tokens in [&[][..], &[5, 100]] {
            let error = check_lengths(field, tokens, None, &model()).unwrap_err();
            let RequestError::Invalid { parameter, .. } = error else { panic!("{error:?}") };
            assert_eq!(parameter, field, "{tokens:?}");
        }
    }
    for (error, name) in [
        (TextError::Role { index: 2, role: "bot".into() }, "messages[2].role"),
        (TextError::Arguments, TEMPLATE_ARGUMENTS),
        (TextError::NoTemplate, "messages"),
    ] {
        let RequestError::Invalid { parameter, .. } = RequestError::of_text(error, "messages")
        else {
            panic!("{name}");
        };
        assert_eq!(parameter, name);
    }
}

#[test]
fn biases_are_sorted_and_end_tokens_can_be_ignored() {
    let mut request = request();
    request.sampling.logit_bias = vec![(9, 1.0), (3, -1.0)];
    request.sampling.top_k = Some(100);
    request.ignore_eos = true;
    request.stop_token_ids = vec![7, 7];
    let checked = check(request, &model()).unwrap();
    assert_eq!(checked.sampling.logit_bias, [(3, -1.0), (9, 1.0)]);
    assert_eq!(checked.sampling.top_k, 0, "a cut that cuts nothing is none");
    assert_eq!(checked.stop_tokens, [7]);
}
