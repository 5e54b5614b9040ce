//! Hostile variants of the bundled model's tokenizer, each refused by what is wrong with it, before
//! anything that it asks for is done.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::*;

/// Tokens of the bundled model.
const VOCAB: u32 = 4096;

fn bundled() -> Value {
    let (_, json) =
        crate::bundled().files().iter().find(|(name, _)| *name == "tokenizer.json").unwrap();
    serde_json::from_slice(json).unwrap()
}

fn parsed(file: &Value) -> Result<TokenizerFile, TokenizerFileError> {
    TokenizerFile::parse(&serde_json::to_vec(file).unwrap(), VOCAB)
}

/// The bundled tokenizer with `value` at `pointer`.
fn with(pointer: &str, value: Value) -> Value {
    let mut file = bundled();
    *file.pointer_mut(pointer).unwrap() = value;
    file
}

fn refused(pointer: &str, value: Value, words: &str) {
    let error = parsed(&with(pointer, value)).expect_err(words);
    let text = match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    assert!(text.contains(words), "{text:?} should say {words:?}");
}

fn replace(text: &str, content: String) -> Value {
    json!({ "type": "Replace", "pattern": { "String": text }, "content": content })
}

#[test]
fn the_bundled_tokenizer_is_read_whole() {
    let file = parsed(&bundled()).unwrap();
    assert_eq!(file.highest_id(), Some(4095));
    assert_eq!(file.id_of("<|eot_id|>"), Some(2));
    assert_eq!(file.id_of("\u{120}a"), file.id_of("Ġa"));
    assert_eq!(file.wrapped.before, [0]);
    assert!(file.wrapped.after.is_empty());
    assert_eq!(file.expansion, 2, "bytes become letters");
    assert!(file.notes.is_empty());
    let TokenizerModel::Bpe(bpe) = &file.model else { panic!("it is BPE") };
    assert_eq!((bpe.vocab.len(), bpe.merges.len()), (4096, 3837));
    assert_eq!(bpe.merges[0], ("h".into(), "e".into()));
}

#[test]
fn texts_grow_by_a_bounded_factor() {
    let words = "how many bytes normalizer and pre-tokenizer may make of one";
    refused("/normalizer", replace("a", "b".repeat(100_000)), words);
    let eight: Vec<Value> = (0..8).map(|_| replace("a", "a".repeat(20))).collect();
    refused("/normalizer", json!({ "type": "Sequence", "normalizers": eight }), words);
    let nested = json!({ "type": "Sequence", "normalizers": [
        { "type": "Sequence", "normalizers": [replace("a", "a".repeat(20))] },
        { "type": "Sequence", "normalizers": [replace("a", "a".repeat(20))] },
    ] });
    refused("/normalizer", nested, words);
    let matches_nothing =
        json!({ "type": "Replace", "pattern": { "Regex": "x*" }, "content": "y".repeat(200) });
    refused("/normalizer", matches_nothing, words);
    refused("/normalizer", json!({ "type": "Prepend", "prepend": "y".repeat(200) }), words);
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false,
                             "trim_offsets": true, "use_regex": false });
    let doubled = vec![byte_level; 8];
    refused("/pre_tokenizer", json!({ "type": "Sequence", "pretokenizers": doubled }), words);
    let thirds = vec![json!({ "type": "NFKD" }); 3];
    refused("/normalizer", json!({ "type": "Sequence", "normalizers": thirds }), words);
    let many = vec![json!({ "type": "Strip", "strip_left": true, "strip_right": true }); 33];
    let many = json!({ "type": "Sequence", "normalizers": many });
    refused("/normalizer", many, "the number of parts of the normalizer is 33");
    refused("/normalizer", replace("a", "b".repeat(300_000)), "the length of the normalizer");

    // What models in use have, worst of all the last.
    let sentence_piece = json!({ "type": "Sequence", "normalizers": [
        { "type": "Prepend", "prepend": "\u{2581}" }, replace(" ", "\u{2581}".into()),
    ] });
    assert_eq!(parsed(&with("/normalizer", sentence_piece)).unwrap().expansion, 4 * 3 * 2);
    assert_eq!(parsed(&with("/normalizer", json!({ "type": "NFC" }))).unwrap().expansion, 6);
    let mut unigram = with(
        "/normalizer",
        json!({ "type": "Sequence", "normalizers": [
        { "type": "Nmt" }, { "type": "NFKC" },
        { "type": "Replace", "pattern": { "Regex": " {2,}" }, "content": " " },
    ] }),
    );
    unigram["pre_tokenizer"] = json!({ "type": "Metaspace", "replacement": "\u{2581}",
                                       "prepend_scheme": "always", "split": true });
    assert_eq!(parsed(&unigram).unwrap().expansion, 88);
}

#[test]
fn unknown_words_are_refused_by_name() {
    for (pointer, words) in [
        ("/normalizer", "has the normalizer \"Frob\", expected NFC,"),
        ("/pre_tokenizer", "has the pre-tokenizer \"Frob\", expected ByteLevel,"),
        ("/decoder", "has the decoder \"Frob\", expected ByteLevel,"),
        ("/post_processor", "has the post-processor \"Frob\", expected ByteLevel,"),
        ("/pre_tokenizer/pretokenizers/1", "has the pre-tokenizer \"Frob\""),
    ] {
        refused(pointer, json!({ "type": "Frob" }), words);
        refused(pointer, json!({ "kind": "NFC" }), "\"none\"");
    }
    refused("/model/type", json!("Frob"), "has the model \"Frob\", expected BPE, Unigram");
    refused("/model/type", json!("WordPiece"), "has the model \"WordPiece\"");
    refused("/version", json!("2.0"), "has the version \"2.0\"");
    let precompiled = json!({ "type": "Precompiled", "precompiled_charsmap": "AAAA" });
    refused("/normalizer", precompiled, "has the normalizer \"Precompiled\"");
    let joined = json!({ "type": "Metaspace", "replacement": "_", "prepend_scheme": "always" });
    refused("/decoder", joined, "its decoder's replacement is not");
    refused("/decoder", replace("\u{2581}", "x".into()), "its decoder replaces something other");
    let fixed = json!({ "type": "FixedLength", "length": 0 });
    refused("/pre_tokenizer", fixed, "FixedLength has no positive length");
}

#[test]
fn merges_are_words_of_the_vocabulary_and_not_too_many() {
    let merges = |merges: Value, words: &str| refused("/model/merges", merges, words);
    merges(json!([["q", "\u{3b1}\u{3b2}"]]), "names \"αβ\", which is not in the vocabulary");
    merges(json!([["\u{3b1}", "q"]]), "names \"α\", which is not in the vocabulary");
    merges(json!([["q", "x"]]), "names \"qx\", which is not in the vocabulary");
    merges(json!(["q"]), "merge \"q\" is not two texts");
    merges(json!([["a", "b", "c"]]), "expected a merge: two texts");
    let began = Instant::now();
    merges(json!(vec![["h", "e"]; 2_000_000]), "more than 32768 merges");
    assert!(began.elapsed() < Duration::from_secs(20), "it is given up at the first too many");
    let legacy = parsed(&with("/model/merges", json!(["#version: 0.2", "h e"]))).unwrap();
    let TokenizerModel::Bpe(bpe) = legacy.model else { panic!("it is BPE") };
    assert_eq!(bpe.merges, [("h".into(), "e".into())]);

    // The library would cut bytes off the right side, whatever they are.
    let mut file = with("/model/continuing_subword_prefix", json!("##"));
    let error = parsed(&file).unwrap_err().to_string();
    assert!(error.contains("without the prefix \"##\""), "{error}");
    file["model"]["continuing_subword_prefix"] = json!("#".repeat(17));
    assert!(parsed(&file).unwrap_err().to_string().contains("continuing_subword_prefix"));
    refused("/model/end_of_word_suffix", json!("x".repeat(17)), "end_of_word_suffix");
    refused("/model/unk_token", json!("<nothing>"), "unk_token \"<nothing>\" is not in the voc");
}

#[test]
fn vocabularies_fit_the_model() {
    let mut file = bundled();
    file["model"]["vocab"]["one too many"] = json!(4096);
    let error = parsed(&file).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("more than 4096 words"), "{source}");
    refused("/model/vocab/<|eot_id|>", json!(4096), "it has token 4096, the model's vocabulary");
    refused("/model/vocab/<|eot_id|>", json!(1), "two texts have the id 1");
    refused("/added_tokens/2/id", json!(5000), "it has token 5000, the model's vocabulary");
    let long = "x".repeat(TOKEN_BYTES_MAX + 1);
    refused("/added_tokens/2/content", json!(long), "the length of added token 2 in bytes");
    let mut file = bundled();
    let vocab = file["model"]["vocab"].as_object_mut().unwrap();
    vocab.remove("<|eot_id|>");
    vocab.insert(long, json!(2));
    assert!(parsed(&file).unwrap_err().to_string().contains("the length of token 2 in bytes"));
    let mut file = bundled();
    file["added_tokens"][2]["special"] = json!(false);
    file["added_tokens"][2]["lstrip"] = json!(true);
    assert!(parsed(&file).unwrap_err().to_string().contains("is not special, yet has lstrip"));

    let unigram = |vocab: Value| json!({ "type": "Unigram", "vocab": vocab, "unk_id": 0 });
    refused("/model", unigram(json!([["<unk>", 0.0], ["", -1.0]])), "piece 1 is empty");
    refused("/model", unigram(json!([])), "unk_id is 0, the vocabulary has 0 pieces");
    let long = "x".repeat(UNIGRAM_PIECE_BYTES_MAX + 1);
    refused("/model", unigram(json!([[long, 0.0]])), "the length of piece 0 in bytes");
    let pieces = json!([["<|begin_of_text|>", 0.0], ["<|end_of_text|>", 0.0], ["<|eot_id|>", 0.0]]);
    assert_eq!(parsed(&with("/model", unigram(pieces))).unwrap().highest_id(), Some(2));
}

#[test]
fn what_changes_prompts_in_silence_is_switched_off() {
    let mut file = bundled();
    file["truncation"] = json!({ "direction": "Right", "max_length": 4, "strategy": "LongestFirst",
                                 "stride": 0 });
    file["padding"] = json!({ "strategy": { "Fixed": 1_000_000_000 } });
    file["model"]["dropout"] = json!(0.5);
    let notes = parsed(&file).unwrap().notes;
    assert_eq!(notes.len(), 3, "{notes:?}");
    for word in ["truncation", "padding", "dropout"] {
        assert!(notes.iter().any(|note| note.contains(word)), "{word}: {notes:?}");
    }
}

#[test]
fn post_processors_write_the_text_once() {
    let piece = json!({ "Sequence": { "id": "A", "type_id": 0 } });
    let template = |single: Value| {
        json!({ "type": "TemplateProcessing", "single": single, "pair": [],
                "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } } })
    };
    let many = template(json!(vec![piece.clone(); 1000]));
    refused("/post_processor", many, "writes the text 1000 times, expected once");
    refused("/post_processor", template(json!([])), "writes the text 0 times");
    let token = json!({ "SpecialToken": { "id": "<s>", "type_id": 0 } });
    let mut tokens = vec![token.clone(); 17];
    tokens.push(piece.clone());
    refused("/post_processor", template(json!(tokens)), "puts around a text is 17");
    let unknown = json!([{ "SpecialToken": { "id": "<x>", "type_id": 0 } }, piece]);
    refused("/post_processor", template(unknown), "does not say which token \"<x>\" is");
    let both = template(json!([token, piece, token]));
    let file = parsed(&with("/post_processor", both)).unwrap();
    assert_eq!((file.wrapped.before, file.wrapped.after), (vec![1], vec![1]));
    let roberta = json!({ "type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1],
                          "trim_offsets": true, "add_prefix_space": true });
    let file = parsed(&with("/post_processor", roberta)).unwrap();
    assert_eq!((file.wrapped.before, file.wrapped.after), (vec![1], vec![2]));
}
