//! What formats mean: permuted rows, float types, tokenizers from metadata, corrected templates.

#![allow(clippy::unwrap_used, reason = "a helper of tests may fail like a test")]

#[path = "support/gguf_writer.rs"]
mod gguf_writer;

use std::fs;
use std::path::Path;

use gguf_writer::{GgufWriter, Meta};
use model::{ImportOptions, Imported, Store, import};

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)).unwrap()
}

/// Imports a GGUF file and verifies the store.
fn imported(gguf: &GgufWriter) -> (Imported, Store, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("model.gguf");
    fs::write(&source, gguf.bytes()).unwrap();
    let dest = dir.path().join("store");
    let imported = import(&source, &dest, &ImportOptions::default(), &mut |_| {}).unwrap();
    let store = Store::open(&dest).unwrap();
    store.verify(|_| {}).unwrap();
    (imported, store, dir)
}

fn query_and_key(store: &Store) -> Vec<Vec<i8>> {
    let layer = store.layer(0).unwrap();
    let weights = layer.weights();
    let matrices = [weights.q, weights.k, weights.v];
    let unpack = |matrix: kernels::TernaryMatrix<'_>| {
        let mut trits = vec![0; matrix.rows() * matrix.cols()];
        trits.chunks_mut(matrix.cols()).enumerate().for_each(|(r, out)| matrix.unpack_row(r, out));
        trits
    };
    matrices.map(unpack).to_vec()
}

/// Renames the architecture of every key.
fn with_architecture(gguf: &mut GgufWriter, name: &str) {
    for (key, _) in &mut gguf.metadata {
        *key = key.replacen("bitnet-b1.58.", &format!("{name}."), 1);
    }
    gguf.set("general.architecture", Meta::String(name.into()));
}

#[test]
fn permuted_queries_and_keys_are_put_back() {
    let plain = GgufWriter::of(&fixture("tiny_i2s.gguf"));
    let (_, expected, _dir) = imported(&plain);

    let mut llama = plain;
    with_architecture(&mut llama, "llama");
    llama.tensors.retain(|tensor| !tensor.name.contains("_sub_norm"));
    for layer in 0..2 {
        for name in ["attn_q", "attn_k"] {
            // What llama.cpp's converter does: row (half b, index j) of a head goes to 2 j + b.
            let data = &mut llama.tensor(&format!("blk.{layer}.{name}.weight")).data;
            let original = data.clone();
            let row_bytes = 256 / 4;
            for row in 0..(data.len() - 32) / row_bytes {
                let (head, b, j) = (row / 64, row % 64 / 32, row % 32);
                let stored = head * 64 + 2 * j + b;
                data[stored * row_bytes..][..row_bytes]
                    .copy_from_slice(&original[row * row_bytes..][..row_bytes]);
            }
        }
    }
    let (imported, store, _dir) = imported(&llama);
    assert_eq!(query_and_key(&store), query_and_key(&expected));
    assert!(!store.config().sub_norms);
    assert!(imported.notes.iter().any(|note| note.contains("put back to rotate-half")));
}

#[test]
fn the_first_model_architecture_is_silu() {
    let mut gguf = GgufWriter::of(&fixture("tiny_tq2.gguf"));
    with_architecture(&mut gguf, "bitnet");
    let (_, store, _dir) = imported(&gguf);
    assert_eq!(store.config().activation, model::Activation::Silu);
    assert!(store.config().sub_norms);
    gguf.set("bitnet.hidden_activation", Meta::String("relu2".into()));
    let (_, store, _dir) = imported(&gguf);
    assert_eq!(store.config().activation, model::Activation::SquaredRelu);
}

/// The embedding as f32, and the bytes of its file's data.
fn embedding(store: &Store) -> (kernels::FloatKind, Vec<f32>) {
    let shard = store.embedding().unwrap();
    let matrix = shard.matrix();
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    values.chunks_mut(matrix.cols()).enumerate().for_each(|(r, out)| matrix.widen_row(r, out));
    (matrix.kind(), values)
}

#[test]
fn the_same_content_has_the_same_id_in_any_container() {
    let f16 = GgufWriter::of(&fixture("tiny_i2s.gguf"));
    let (first, store, _dir) = imported(&f16);
    let (kind, values) = embedding(&store);
    assert_eq!(kind, kernels::FloatKind::F16);

    // The same values as f32 are stored as the 16-bit type that holds them all, here bf16.
    let mut f32 = f16.clone();
    let tensor = f32.tensor("token_embd.weight");
    tensor.tensor_type = 0;
    tensor.data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let (second, store, _dir) = imported(&f32);
    assert_eq!(second.id, first.id);
    assert_eq!(embedding(&store), (kernels::FloatKind::Bf16, values));

    // A copy of the embedding as head is a tied head.
    let mut copied = f16.clone();
    let data = copied.tensor("token_embd.weight").data.clone();
    copied.add("output.weight", &[256, 512], 1, data);
    assert_eq!(imported(&copied).0.id, first.id);

    // Another value is another model, and so is a head of its own.
    let mut other = f16.clone();
    other.tensor("token_embd.weight").data[0] ^= 1;
    assert_ne!(imported(&other).0.id, first.id);
    copied.tensor("output.weight").data[0] ^= 1;
    let (untied, store, _dir) = imported(&copied);
    assert!(!store.config().tied_head);
    assert_ne!(untied.id, first.id);
    assert_eq!(store.head().unwrap().matrix().rows(), 512);
}

#[test]
fn floats_that_fit_no_16_bit_type_are_rounded_and_said_to_be() {
    let mut gguf = GgufWriter::of(&fixture("tiny_i2s.gguf"));
    let rounded = |gguf: &GgufWriter| {
        let (imported, store, _dir) = imported(gguf);
        let note = imported.notes.iter().find(|note| note.contains("rounded")).cloned();
        (embedding(&store), note)
    };
    let set = |gguf: &mut GgufWriter, value: f32| {
        let tensor = gguf.tensor("token_embd.weight");
        tensor.tensor_type = 0;
        tensor.data = vec![0; 512 * 256 * 4];
        tensor.data[..4].copy_from_slice(&value.to_le_bytes());
    };
    set(&mut gguf, 0.1);
    let ((kind, values), note) = rounded(&gguf);
    assert_eq!((kind, values[0]), (kernels::FloatKind::F16, 0.099_975_586));
    assert_eq!(note.unwrap(), "token_embd.weight was rounded from F32 to f16");
    set(&mut gguf, 100_001.0);
    let ((kind, values), note) = rounded(&gguf);
    assert_eq!((kind, values[0]), (kernels::FloatKind::Bf16, 99_840.0));
    assert!(note.unwrap().contains("bf16"));
    set(&mut gguf, 0.5);
    let ((kind, values), note) = rounded(&gguf);
    assert_eq!((kind, values[0], note), (kernels::FloatKind::Bf16, 0.5, None));

    // Q8_0: d = 1/128 and quants that f16 holds.
    let tensor = gguf.tensor("token_embd.weight");
    tensor.tensor_type = 8;
    let block = [&0x2000u16.to_le_bytes()[..], &[3u8; 32]].concat();
    tensor.data = block.repeat(512 * 256 / 32);
    let ((_, values), note) = rounded(&gguf);
    assert!(values.iter().all(|value| *value == 3.0 / 128.0));
    assert_eq!(note, None);
}

#[test]
fn scale_tensors_multiply() {
    let plain = GgufWriter::of(&fixture("tiny_i2s.gguf"));
    let mut scaled = plain.clone();
    scaled.add("blk.0.attn_q.scale", &[1], 0, 0.5f32.to_le_bytes().to_vec());
    let scale = |gguf: &GgufWriter| {
        let (_, store, _dir) = imported(gguf);
        store.layer(0).unwrap().weights().q.scale()
    };
    assert_eq!(scale(&scaled), scale(&plain) * 0.5);
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
    let (_, store, _dir) = imported(&gguf);
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
        (|g| g.metadata.retain(|(key, _)| key != "tokenizer.ggml.pre"), "pre is missing"),
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
    let (_, store, _dir) = imported(&gguf);
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
    let (imported, store, _dir) = imported(&gguf);
    let template = store.manifest().chat_template.as_deref().unwrap();
    assert!(template.starts_with("{% set loop_messages = messages %}"));
    assert!(template.ends_with("{{ 'Assistant: ' }}{% endif %}"));
    assert_eq!(store.config().eos_tokens, [260, 261]);
    for expected in ["known to be wrong", "taken as llama-bpe"] {
        assert!(imported.notes.iter().any(|note| note.contains(expected)), "{expected}");
    }
}
