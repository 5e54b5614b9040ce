//! Tokenizers of strangers: hostile ones are refused, or cost no more than honest ones.

use serde_json::{Value, json};

use super::super::tests::{SMALL_VOCAB, small_tokenizer_json};
use super::*;

fn small() -> Value {
    serde_json::from_slice(&small_tokenizer_json()).unwrap()
}

fn opened(file: &Value) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_json(&serde_json::to_vec(file).unwrap(), SMALL_VOCAB, None)
}

#[test]
fn dropout_truncation_and_padding_do_not_change_a_prompt() {
    let text = "the user hi the user hi there thither";
    let want = opened(&small()).unwrap().encode_plain(text).unwrap();
    let mut file = small();
    file["model"]["dropout"] = json!(0.5);
    file["truncation"] = json!({ "direction": "Right", "max_length": 4, "strategy": "LongestFirst",
                                 "stride": 0 });
    file["padding"] = json!({ "strategy": { "Fixed": 1_000_000_000 }, "direction": "Right",
        "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "h" });
    let tokenizer = opened(&file).unwrap();
    for _ in 0..16 {
        assert_eq!(tokenizer.encode_plain(text).unwrap(), want);
    }
}

#[test]
fn a_post_processor_adds_nothing_of_its_own() {
    let text = "hi there";
    let want = opened(&small()).unwrap().encode_plain(text).unwrap();
    let mut file = small();
    file["post_processor"] = json!({ "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "x", "type_id": 0 } },
                   { "Sequence": { "id": "A", "type_id": 0 } },
                   { "SpecialToken": { "id": "x", "type_id": 0 } }],
        "pair": [], "special_tokens": { "x": { "id": "x", "ids": [1], "tokens": ["x"] } } });
    assert_eq!(opened(&file).unwrap().encode_plain(text).unwrap(), want);
}

#[test]
fn texts_that_would_grow_too_long_are_refused_before_they_do() {
    let mut file = small();
    let grow = |content: usize| json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "a".repeat(content) });
    file["normalizer"] = grow(32);
    let tokenizer = opened(&file).unwrap();
    assert_eq!(tokenizer.text_bytes_max(), EXPANDED_BYTES_MAX / 64);
    assert_eq!(tokenizer.encode_plain("a").unwrap().len(), 32);
    let text = super::super::Text::new(Some(tokenizer), None, 1 << 20);
    let prompt = proto::generate::Prompt::Text("a ".repeat(EXPANDED_BYTES_MAX / 128 + 1));
    let error = text.encode(&prompt).unwrap_err();
    assert!(matches!(error, TextError::TooMuch { .. }), "{error}");
    file["normalizer"] = grow(1_000);
    assert!(matches!(opened(&file), Err(TokenizerError::File(_))));
}

#[test]
fn what_the_library_does_not_take_is_an_error_and_no_panic() {
    let mut file = small();
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"] = json!({ "Regex": "(" });
    assert!(matches!(opened(&file), Err(TokenizerError::Part { part: "pre-tokenizer", .. })));
    file = small();
    file["normalizer"] = json!({ "type": "Strip" });
    assert!(matches!(opened(&file), Err(TokenizerError::Part { part: "normalizer", .. })));
    // The library gives the next free id, whatever the file says.
    file = small();
    let text = file["model"]["vocab"].as_object().unwrap().len();
    assert_eq!(text as u32, SMALL_VOCAB);
    file["model"]["vocab"].as_object_mut().unwrap().remove("the");
    file["model"]["merges"].as_array_mut().unwrap().pop();
    file["added_tokens"].as_array_mut().unwrap().push(json!({
        "id": 7, "content": "<new>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true }));
    let error = opened(&file).err().unwrap();
    assert!(matches!(error, TokenizerError::AddedId { listed: 7, given: 265, .. }), "{error}");
}
