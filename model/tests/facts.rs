//! Facts of GGUF files that are easily taken wrongly: stated in several places, in other words, by
//! old or careless converters, or of no importance.

#![allow(clippy::unwrap_used, reason = "a helper of tests may fail like a test")]

#[path = "support/gguf_writer.rs"]
mod gguf_writer;
#[path = "support/stores.rs"]
mod stores;

use std::error::Error;
use std::fs;
use std::path::Path;

use gguf_writer::{GgufWriter, Meta};
use model::import::check_gguf;
use stores::Stored;

fn fixture(name: &str) -> GgufWriter {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
    GgufWriter::of(&fs::read(path).unwrap())
}

fn text(text: &str) -> Meta {
    Meta::String(text.into())
}

/// The innermost reason why the file does not import.
fn refusal(gguf: &GgufWriter) -> String {
    let error = check_gguf(&gguf.bytes()).unwrap_err();
    let mut error: &dyn Error = &error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Renames the architecture of every key.
fn with_architecture(mut gguf: GgufWriter, name: &str) -> GgufWriter {
    for (key, _) in &mut gguf.metadata {
        *key = key.replacen("bitnet-b1.58.", &format!("{name}."), 1);
    }
    gguf.set("general.architecture", text(name));
    gguf
}

#[test]
fn what_no_reader_needs_may_be_anything() {
    let plain = Stored::of_gguf(&fixture("tiny_tq2.gguf").bytes());
    let same = |spoil: &dyn Fn(&mut GgufWriter)| {
        let mut gguf = fixture("tiny_tq2.gguf");
        spoil(&mut gguf);
        let stored = Stored::of_gguf(&gguf.bytes());
        assert_eq!(stored.imported.id, plain.imported.id);
        stored
    };
    let latin1 = || Meta::Bytes(vec![b'a', 0xe9]);
    same(&|gguf| gguf.set("general.description", latin1()));
    same(&|gguf| gguf.set("general.tags", Meta::Strings(vec!["a".into()])));
    same(&|gguf| gguf.set(&"k".repeat(300), Meta::U32(1)));
    same(&|gguf| gguf.set("general.license.text", text(&"x".repeat(2 << 20))));
    // A name is for people: it is shown as well as it can be.
    let stored = same(&|gguf| gguf.set("general.name", latin1()));
    assert_eq!(stored.store.config().name, "a\u{fffd}");
    let stored = same(&|gguf| gguf.set("general.name", text(&"é".repeat(200))));
    assert_eq!(stored.store.config().name, "é".repeat(128));
    same(&|gguf| gguf.set("general.name", Meta::U32(7)));

    let mut longer = fixture("tiny_tq2.gguf").bytes();
    longer.extend([7; 1000]);
    let stored = Stored::of_gguf(&longer);
    assert_eq!(stored.imported.id, plain.imported.id);
    assert!(stored.notes("1000 bytes after the last tensor belong to nothing"));

    // What is needed must be text.
    let mut gguf = fixture("tiny_tq2.gguf");
    gguf.set("tokenizer.chat_template", latin1());
    assert_eq!(refusal(&gguf), "tokenizer.chat_template is not UTF-8");
}

#[test]
fn a_number_may_be_given_for_each_layer() {
    let plain = Stored::of_gguf(&fixture("tiny_tq2.gguf").bytes());
    for (key, value) in [
        ("feed_forward_length", 768),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 64),
        ("rope.dimension_count", 64),
    ] {
        let key = format!("bitnet-b1.58.{key}");
        let with = |values: Vec<i32>| {
            let mut gguf = fixture("tiny_tq2.gguf");
            gguf.set(&key, Meta::I32s(values));
            gguf
        };
        let stored = Stored::of_gguf(&with(vec![value, value]).bytes());
        assert_eq!(stored.imported.id, plain.imported.id, "{key}");
        let text = refusal(&with(vec![value, value * 2]));
        assert_eq!(text, format!("{key} differs between layers, which is not supported"));
        let text = refusal(&with(vec![value; 3]));
        assert!(text.starts_with(&format!("{key} is an array of 3 numbers")), "{text}");
        assert!(refusal(&with(vec![])).starts_with(&format!("{key} is an array of 0 numbers")));
    }
}

#[test]
fn settings_that_change_what_is_computed_are_refused_by_name() {
    let with = |key: &str, value: Meta| {
        let mut gguf = fixture("tiny_tq2.gguf");
        gguf.set(key, value);
        gguf
    };
    let arch = "bitnet-b1.58";
    let refused = [
        ("attention.causal", Meta::Bool(false), "= 0"),
        ("pooling_type", Meta::U32(1), "= 1"),
        ("attention.scale", Meta::F32(0.5), "is 0.5, expected 0.125, from the head dimension"),
        ("use_parallel_residual", Meta::Bool(true), "= 1"),
        ("logit_scale", Meta::F32(2.0), "= 2"),
        ("rope.scaling.factor", Meta::F32(4.0), "other than 1"),
        ("rope.scale_linear", Meta::F32(4.0), "= 4"),
        ("rope.scaling.attn_factor", Meta::F32(1.25), "= 1.25"),
        ("rope.scaling.type", text("longrope"), "= longrope"),
        ("hidden_activation", text("gelu"), "expected relu2 or silu"),
    ];
    for (key, value, expected) in refused {
        let found = refusal(&with(&format!("{arch}.{key}"), value));
        assert!(found.starts_with(&format!("{arch}.{key} ")), "{found}");
        assert!(found.contains(expected), "{found:?} should say {expected:?}");
    }
    let found = refusal(&with("general.type", text("adapter")));
    assert_eq!(found, "a GGUF file of the type \"adapter\" is not supported");

    let plain = Stored::of_gguf(&fixture("tiny_tq2.gguf").bytes());
    let neutral = [
        ("attention.causal", Meta::Bool(true)),
        ("pooling_type", Meta::U32(0)),
        ("attention.scale", Meta::F32(0.125)),
        ("logit_scale", Meta::F32(1.0)),
        ("rope.scaling.factor", Meta::F32(1.0)),
        ("rope.scaling.type", text("none")),
    ];
    for (key, value) in neutral {
        let stored = Stored::of_gguf(&with(&format!("{arch}.{key}"), value).bytes());
        assert_eq!(stored.imported.id, plain.imported.id, "{key}");
        assert!(!stored.notes("unknown here"));
    }
    let stored = Stored::of_gguf(&with(&format!("{arch}.surprise"), Meta::U32(3)).bytes());
    assert!(stored.notes("warning: bitnet-b1.58.surprise is unknown here and not heeded"));
}

/// A byte-level vocabulary of a few letters, one merge, and `special`.
fn with_tokenizer(gguf: &mut GgufWriter, special: &str, pre: Option<&str>) {
    let tokens = ["a", "b", "ab", "abc", "c", special].map(String::from).to_vec();
    gguf.metadata.retain(|(key, _)| !key.starts_with("tokenizer."));
    gguf.set("tokenizer.ggml.model", text("gpt2"));
    gguf.set("tokenizer.ggml.token_type", Meta::I32s(vec![1, 1, 1, 1, 1, 3]));
    gguf.set("tokenizer.ggml.tokens", Meta::Strings(tokens));
    gguf.set("tokenizer.ggml.merges", Meta::Strings(vec!["a b".into()]));
    gguf.set("tokenizer.ggml.bos_token_id", Meta::U32(5));
    if let Some(pre) = pre {
        gguf.set("tokenizer.ggml.pre", text(pre));
    }
}

#[test]
fn every_name_of_a_known_split_is_read() {
    let llama = with_architecture(fixture("tiny_tq2.gguf"), "llama");
    let with = |special: &str, pre: Option<&str>| {
        let mut gguf = llama.clone();
        gguf.tensors.retain(|tensor| !tensor.name.contains("_sub_norm"));
        with_tokenizer(&mut gguf, special, pre);
        gguf
    };
    let stored = |pre: &str| Stored::of_gguf(&with("<s>", Some(pre)).bytes());
    let falcon3 = stored("falcon3");
    assert!(falcon3.store.config().add_bos);
    for pre in ["falcon_e", "falcon-e", "falcon-h1", "llama-bpe", "llama3", "pixtral", "lfm2"] {
        assert_eq!(stored(pre).imported.id, falcon3.imported.id, "{pre}");
    }
    // The same split, but "abc" is a token only if merges make it one.
    let ids = |stored: &Stored| {
        let json = stored.store.tokenizer_json().unwrap().unwrap();
        let tokenizer: tokenizers::Tokenizer = serde_json::from_slice(&json).unwrap();
        tokenizer.encode("abc", false).unwrap().get_ids().to_vec()
    };
    assert_eq!(ids(&falcon3), [3]);
    for pre in ["smaug-bpe", "dbrx"] {
        let stored = stored(pre);
        assert_eq!(ids(&stored), [2, 4], "{pre}");
        assert!(!stored.store.config().add_bos, "{pre}");
    }

    // Files of older converters, which name no split: known by a token, or refused.
    for (special, pre) in [("<|begin_of_text|>", "llama-bpe"), (">>TITLE<<", "falcon3")] {
        let named = Stored::of_gguf(&with(special, Some(pre)).bytes());
        let unnamed = Stored::of_gguf(&with(special, None).bytes());
        assert_eq!(unnamed.imported.id, named.imported.id);
        assert!(unnamed.notes(&format!("pre is missing, taken as {pre} for it has {special}")));
    }
    let found = refusal(&with("<s>", None));
    assert!(found.contains("tokenizer.ggml.pre is missing, expected one of llama-bpe"), "{found}");
    let found = refusal(&with("<|begin_of_text|>", Some("mpt")));
    assert!(found.contains("tokenizer.ggml.pre is \"mpt\", expected one of"), "{found}");
}

#[test]
fn a_tensor_without_its_padding_is_not_said_to_need_what_it_has() {
    let mut gguf = fixture("tiny_tq2.gguf");
    gguf.tensors.retain(|tensor| tensor.name == "output_norm.weight");
    let mut bytes = gguf.bytes();
    let one = bytes.len();
    // A second tensor right behind the first, whose bytes are no multiple of the alignment.
    gguf.tensors[0].dims = vec![9];
    gguf.tensors[0].data = vec![0; 36];
    gguf.add("b", &[8], 0, vec![0; 32]);
    bytes = gguf.bytes();
    assert_ne!(bytes.len(), one);
    let name = bytes.windows(9).rposition(|w| w == [1, 0, 0, 0, 0, 0, 0, 0, b'b']).unwrap();
    // Behind the name: the number of dimensions, one dimension, the type; then the offset.
    let offset = name + 9 + 4 + 8 + 4;
    assert_eq!(bytes[offset], 64);
    bytes[offset] = 36;
    let error = model::gguf::Gguf::parse(&bytes).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor output_norm.weight of type F32 and shape [9] needs 36 bytes (64 with its padding), \
         the file has 36 for it"
    );
}
