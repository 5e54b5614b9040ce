//! Text of GGUF files: tokenizers from metadata, special tokens, corrected templates.

#![allow(clippy::unwrap_used, reason = "a helper of tests may fail like a test")]

#[path = "support/gguf_writer.rs"]
mod gguf_writer;
#[path = "support/stores.rs"]
mod stores;

use std::fs;
use std::path::Path;

use gguf_writer::{GgufWriter, Meta};
use stores::Stored;

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)).unwrap()
}

fn imported(gguf: &GgufWriter) -> Stored {
    Stored::of_gguf(&gguf.bytes())
}

/// A byte-level vocabulary of 256 bytes, a few merges and the special tokens of Llama 3.
fn with_byte_level_tokenizer(gguf: &mut GgufWriter) {
    let byte = |byte: u8| {
        let shown = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let hidden = (0..byte).filter(|b| !matches!(b, 33..=126 | 161..=172 | 174..=255)).count();
        let code = if shown { u32::from(byte) } else { 256 + hidden as u32 };
        char::from_u32(code).unwrap().to_string()
    };
    let mut tokens: Vec<String> = (0..=255).map(byte).collect();
    tokens.extend(["he", "hel", "\u{120}h"].map(String::from));
    let normal = tokens.len();
    tokens.extend(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"].map(String::from));
    let types = (0..tokens.len()).map(|id| if id < normal { 1 } else { 3 }).collect();
    let merges = ["h e", "he l", "\u{120} h"].map(String::from).to_vec();
    gguf.set("tokenizer.ggml.model", Meta::String("gpt2".into()));
    gguf.set("tokenizer.ggml.pre", Meta::String("llama-bpe".into()));
    gguf.set("tokenizer.ggml.tokens", Meta::Strings(tokens));
    gguf.set("tokenizer.ggml.token_type", Meta::I32s(types));
    gguf.set("tokenizer.ggml.merges", Meta::Strings(merges));
    gguf.set("tokenizer.ggml.bos_token_id", Meta::U32(normal as u32));
    gguf.set("tokenizer.ggml.eos_token_id", Meta::U32(normal as u32 + 1));
    gguf.set("tokenizer.ggml.add_bos_token", Meta::Bool(true));
}

#[test]
fn a_byte_level_tokenizer_is_built_from_metadata() {
    let mut gguf = GgufWriter::of(&fixture("tiny_i2s.gguf"));
    with_byte_level_tokenizer(&mut gguf);
    gguf.set("tokenizer.chat_template", Meta::String("{{ messages }}".into()));
    let Stored { store, .. } = &imported(&gguf);
    let manifest = store.manifest();
    assert_eq!(manifest.config.bos_token, Some(259));
    assert_eq!(manifest.config.eos_tokens, [260, 261], "<|eot_id|> ends a turn");
    assert!(manifest.config.add_bos);
    assert_eq!(manifest.bos_token_text.as_deref(), Some("<|begin_of_text|>"));
    assert_eq!(manifest.eos_token_text.as_deref(), Some("<|end_of_text|>"));
    assert_eq!(manifest.chat_template.as_deref(), Some("{{ messages }}"));

    let json = store.tokenizer_json().unwrap().unwrap();
    let tokenizer: tokenizers::Tokenizer = serde_json::from_slice(&json).unwrap();
    let ids = |text: &str| tokenizer.encode(text, true).unwrap().get_ids().to_vec();
    assert_eq!(ids("hello hi"), [259, 257, 108, 111, 258, 105]);
    assert_eq!(ids("hel<|eot_id|>"), [259, 257, 261]);
    let text = "Grüße, don't 1234\n\n  x";
    assert_eq!(tokenizer.decode(&ids(text), true).unwrap(), text);
}

#[test]
fn qwen2_splits_digits_one_by_one_and_normalises() {
    let mut gguf = GgufWriter::of(&fixture("tiny_i2s.gguf"));
    with_byte_level_tokenizer(&mut gguf);
    let ids_of = |gguf: &GgufWriter, text: &str| {
        let stored = imported(gguf);
        let json = stored.store.tokenizer_json().unwrap().unwrap();
        let tokenizer: tokenizers::Tokenizer = serde_json::from_slice(&json).unwrap();
        tokenizer.encode(text, true).unwrap().get_ids().to_vec()
    };
    // A merge of two digits, which only a pattern that keeps digits together lets happen.
    for (key, value) in &mut gguf.metadata {
        match (key.as_str(), value) {
            ("tokenizer.ggml.merges", Meta::Strings(merges)) => merges.push("1 2".into()),
            ("tokenizer.ggml.tokens", Meta::Strings(tokens)) => tokens.push("12".into()),
            ("tokenizer.ggml.token_type", Meta::I32s(types)) => types.push(1),
            _ => {}
        }
    }
    gguf.metadata.retain(|(key, _)| key != "tokenizer.ggml.add_bos_token");
    // "e" with a combining acute accent: two code points, or one when normalised.
    let text = "12e\u{301}";
    assert_eq!(ids_of(&gguf, text), [259, 262, 101, 0xcc, 0x81]);
    gguf.set("tokenizer.ggml.pre", Meta::String("qwen2".into()));
    assert_eq!(ids_of(&gguf, text), [49, 50, 0xc3, 0xa9], "no BOS, digits apart, é as one");
}

#[test]
fn unknown_and_broken_tokenizers_are_refused() {
    let refusal = |spoil: fn(&mut GgufWriter)| {
        let mut gguf = GgufWriter::of(&fixture("tiny_i2s.gguf"));
        with_byte_level_tokenizer(&mut gguf);
        spoil(&mut gguf);
        model::import::check_gguf(&gguf.bytes()).unwrap_err().to_string()
    };
    type Spoil = fn(&mut GgufWriter);
    let cases: [(Spoil, &str); 7] = [
        (
            |g| g.set("tokenizer.ggml.pre", Meta::String("mystery".into())),
            "is \"mystery\", expected",
        ),
        (
            |g| {
                // Nor has it a token by which its family is known.
                g.metadata.retain(|(key, _)| key != "tokenizer.ggml.pre");
                for (_, value) in &mut g.metadata {
                    if let Meta::Strings(texts) = value {
                        texts.iter_mut().for_each(|t| *t = t.replace("begin_of_text", "begin"));
                    }
                }
            },
            "pre is missing",
        ),
        (|g| g.set("tokenizer.ggml.model", Meta::String("rwkv".into())), "model is \"rwkv\""),
        (|g| g.set("tokenizer.ggml.merges", Meta::Strings(vec!["h zz".into()])), "merge \"h zz\""),
        (|g| g.set("tokenizer.ggml.token_type", Meta::I32s(vec![1])), "1 elements for 262 tokens"),
        (
            |g| g.set("tokenizer.ggml.tokens", Meta::Strings(vec!["a".into(); 2])),
            "262 tokens|for 2",
        ),
        (|g| g.set("tokenizer.ggml.tokens", Meta::I32s(vec![1])), "array of i32"),
    ];
    for (spoil, expected) in cases {
        let text = refusal(spoil);
        assert!(expected.split('|').any(|part| text.contains(part)), "{text:?}: {expected:?}");
    }
}

#[test]
fn a_file_that_says_it_has_no_tokenizer_has_none() {
    for model in ["none", "no_vocab"] {
        let mut gguf = GgufWriter::of(&fixture("tiny_i2s.gguf"));
        gguf.set("tokenizer.ggml.model", Meta::String(model.into()));
        let stored = imported(&gguf);
        assert_eq!(stored.store.manifest().tokenizer, None);
        assert!(stored.notes(&format!("tokenizer.ggml.model is {model:?}")));
        assert!(stored.notes("tokenizer: none, only token ids work"));
    }
}

#[test]
fn tokens_without_a_text_are_called_as_llama_cpp_calls_them() {
    let mut gguf = GgufWriter::of(&fixture("tiny_i2s.gguf"));
    with_byte_level_tokenizer(&mut gguf);
    let tokens = |gguf: &mut GgufWriter, change: fn(&mut Vec<String>)| {
        for (key, value) in &mut gguf.metadata {
            match (key.as_str(), value) {
                ("tokenizer.ggml.tokens", Meta::Strings(texts)) => change(texts),
                ("tokenizer.ggml.token_type", Meta::I32s(types)) => types.resize(264, 1),
                _ => {}
            }
        }
    };
    tokens(&mut gguf, |texts| texts.extend(["".into(), "".into()]));
    let stored = imported(&gguf);
    assert!(stored.notes("warning: tokenizer: tokens without a text (2, the first is 262)"));
    let json = stored.store.tokenizer_json().unwrap().unwrap();
    let tokenizer: tokenizers::Tokenizer = serde_json::from_slice(&json).unwrap();
    assert_eq!(tokenizer.id_to_token(262).as_deref(), Some("[EMPTY_262]"));
    assert_eq!(tokenizer.id_to_token(263).as_deref(), Some("[EMPTY_263]"));
    // Equal texts llama.cpp refuses, and what is called as one without a text is equal to it.
    for (change, text) in [
        ((|texts| texts[263] = "he".into()) as fn(&mut Vec<String>), "\"he\""),
        (|texts| texts[263] = "[EMPTY_262]".into(), "\"[EMPTY_262]\""),
    ] {
        let mut equal = gguf.clone();
        tokens(&mut equal, change);
        let refusal = model::import::check_gguf(&equal.bytes()).unwrap_err().to_string();
        assert!(refusal.contains("have the same text") && refusal.contains(text), "{refusal}");
    }
}

#[test]
fn other_special_tokens_are_read_from_metadata() {
    let mut gguf = GgufWriter::of(&fixture("tiny_i2s.gguf"));
    with_byte_level_tokenizer(&mut gguf);
    gguf.set(
        "tokenizer.chat_template",
        Meta::String("{{ unk_token ~ pad_token ~ sep_token }}".into()),
    );
    gguf.set("tokenizer.ggml.unknown_token_id", Meta::U32(65));
    gguf.set("tokenizer.ggml.seperator_token_id", Meta::U32(261));
    gguf.set("tokenizer.ggml.mask_token_id", Meta::U32(66));
    gguf.set("tokenizer.ggml.padding_token_id", Meta::U32(9999));
    let stored = imported(&gguf);
    let special = serde_json::to_value(&stored.store.manifest().special_token_texts).unwrap();
    assert_eq!(special, serde_json::json!({"unk_token": "A", "sep_token": "<|eot_id|>"}));
    assert!(stored.notes("tokenizer.ggml.padding_token_id is 9999, which is no token: ignored"));
    // What no template names may be anything.
    gguf.set("tokenizer.chat_template", Meta::String("{{ unk_token }}".into()));
    gguf.set("tokenizer.ggml.mask_token_id", Meta::String("[MASK]".into()));
    let stored = imported(&gguf);
    assert!(!stored.notes("padding_token_id"), "{:?}", stored.imported.notes);
}

#[test]
fn a_sentencepiece_tokenizer_is_built_from_metadata() {
    let mut tokens = vec!["<unk>".to_owned(), "<s>".into(), "</s>".into()];
    tokens.extend((0..=255u32).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["\u{2581}", "h", "i", "hi", "\u{2581}hi"].map(String::from));
    let mut types = vec![2, 3, 3];
    types.extend([6; 256]);
    types.extend([1; 5]);
    let mut scores = vec![0.0; 259];
    scores.extend([-9.0, -8.0, -7.0, -2.0, -1.0]);
    let mut gguf = GgufWriter::of(&fixture("tiny_i2s.gguf"));
    gguf.set("tokenizer.ggml.model", Meta::String("llama".into()));
    gguf.set("tokenizer.ggml.tokens", Meta::Strings(tokens));
    gguf.set("tokenizer.ggml.token_type", Meta::I32s(types));
    gguf.set("tokenizer.ggml.scores", Meta::F32s(scores));
    gguf.set("tokenizer.ggml.bos_token_id", Meta::U32(1));
    gguf.set("tokenizer.ggml.eos_token_id", Meta::U32(2));
    let Stored { store, .. } = &imported(&gguf);
    assert!(store.config().add_bos);
    let json = store.tokenizer_json().unwrap().unwrap();
    let tokenizer: tokenizers::Tokenizer = serde_json::from_slice(&json).unwrap();
    let ids = tokenizer.encode("hi hié", true).unwrap().get_ids().to_vec();
    // BOS, "▁hi", "▁hi", then é as its two bytes.
    assert_eq!(ids, [1, 263, 263, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "hi hié");
}

#[test]
fn the_official_files_defects_are_corrected() {
    // The official vocabulary size with a narrow model: the embedding is what it takes.
    let mut gguf = GgufWriter::of(&fixture("tiny_i2s.gguf"));
    let embedding = gguf.tensor("token_embd.weight");
    embedding.dims = vec![256, 128_256];
    embedding.data = vec![0; 128_256 * 256 * 2];
    gguf.set("bitnet-b1.58.vocab_size", Meta::U32(128_256));
    with_byte_level_tokenizer(&mut gguf);
    gguf.metadata.retain(|(key, _)| key != "tokenizer.ggml.pre");
    let wrong = "{% for m in messages %}Human: {{ m }}\n\nBITNETAssistant: {% endfor %}";
    gguf.set("tokenizer.chat_template", Meta::String(wrong.into()));
    let stored = imported(&gguf);
    let store = &stored.store;
    let template = store.manifest().chat_template.as_deref().unwrap();
    assert!(template.starts_with("{% set loop_messages = messages %}"));
    assert!(template.ends_with("{{ 'Assistant: ' }}{% endif %}"));
    assert_eq!(store.config().eos_tokens, [260, 261]);
    for expected in ["known to be wrong", "taken as llama-bpe"] {
        assert!(stored.notes(expected), "{expected}");
    }
}

#[test]
fn a_template_for_a_purpose_is_not_taken_for_the_default() {
    let mut gguf = GgufWriter::of(&fixture("tiny_i2s.gguf"));
    with_byte_level_tokenizer(&mut gguf);
    gguf.set("tokenizer.chat_template.tool_use", Meta::String("{{ tools }}".into()));
    let stored = imported(&gguf);
    assert_eq!(stored.store.manifest().chat_template, None);
    let note = "tokenizer.chat_template.tool_use is not the default one: none is taken";
    assert!(stored.notes(note), "{:?}", stored.imported.notes);

    gguf.set("tokenizer.chat_template", Meta::String("{{ messages }}".into()));
    let stored = imported(&gguf);
    assert_eq!(stored.store.manifest().chat_template.as_deref(), Some("{{ messages }}"));
    assert!(!stored.notes("none is taken"), "{:?}", stored.imported.notes);
}

#[test]
fn special_tokens_that_the_metadata_leaves_out_are_known_by_their_texts() {
    let without_ids = || {
        let mut gguf = GgufWriter::of(&fixture("tiny_i2s.gguf"));
        with_byte_level_tokenizer(&mut gguf);
        gguf.metadata.retain(|(key, _)| !key.ends_with("os_token_id"));
        gguf
    };
    let stored = imported(&without_ids());
    assert_eq!(stored.store.config().bos_token, Some(259));
    assert_eq!(stored.store.config().eos_tokens, [260, 261]);
    for note in ["<|begin_of_text|> is 259", "<|end_of_text|> is 260"] {
        assert!(stored.notes(note), "{note}: {:?}", stored.imported.notes);
    }
    // Qwen has no BOS, and another end.
    let mut qwen = without_ids();
    qwen.set("tokenizer.ggml.pre", Meta::String("qwen2".into()));
    qwen.metadata.retain(|(key, _)| key != "tokenizer.ggml.add_bos_token");
    for (_, value) in &mut qwen.metadata {
        if let Meta::Strings(texts) = value {
            texts.iter_mut().for_each(|text| *text = text.replace("end_of_text", "endoftext"));
        }
    }
    let stored = imported(&qwen);
    assert_eq!(stored.store.config().bos_token, None);
    assert_eq!(stored.store.config().eos_tokens, [260, 261]);
    // A word that merely looks like one is none; only the end of a turn is one whatever its type
    // says, as in llama.cpp.
    let mut words = without_ids();
    words.set("tokenizer.ggml.token_type", Meta::I32s(vec![1; 262]));
    words.metadata.retain(|(key, _)| key != "tokenizer.ggml.add_bos_token");
    let stored = imported(&words);
    assert_eq!(stored.store.config().bos_token, None, "{:?}", stored.imported.notes);
    assert_eq!(stored.store.config().eos_tokens, [261], "{:?}", stored.imported.notes);
    // Where it does say, it is believed.
    let mut said = without_ids();
    said.set("tokenizer.ggml.bos_token_id", Meta::U32(261));
    said.set("tokenizer.ggml.eom_token_id", Meta::U32(7));
    let stored = imported(&said);
    assert_eq!(stored.store.config().bos_token, Some(261));
    assert_eq!(stored.store.config().eos_tokens, [7, 261]);
}

#[test]
fn defaults_of_sampling_are_read_from_metadata() {
    let mut gguf = GgufWriter::of(&fixture("tiny_i2s.gguf"));
    gguf.set("general.sampling.temp", Meta::F32(0.6));
    gguf.set("general.sampling.top_k", Meta::I32(20));
    gguf.set("general.sampling.top_p", Meta::F32(7.0));
    let stored = imported(&gguf);
    let sampling = &stored.store.manifest().sampling;
    assert_eq!((sampling.temperature, sampling.top_k), (Some(0.6), Some(20)));
    assert_eq!(sampling.top_p, None, "no request could ask for it");
    assert!(stored.notes("the metadata has top_p = 7"), "{:?}", stored.imported.notes);
}
