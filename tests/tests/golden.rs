//! What independent references say of the fixtures and of the bundled model.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

use serde_json::Value;
use tempfile::TempDir;
use tests::cluster::json_of;
use tests::model::{bundled_store, comma_separated, fixture, golden, ids, json, store_of};
use tests::process::run;

/// Logits of the fixtures agree with the numpy reference to this; formats.md, section 12.1.
const LOGIT_TOLERANCE: f32 = 1e-4;

/// Perplexity agrees with the one measured when the model was made to this share.
const PERPLEXITY_TOLERANCE: f64 = 0.005;

fn logits(store: &str, tokens: &[u32]) -> Vec<Vec<f32>> {
    let tokens = comma_separated(tokens);
    let arguments =
        ["debug", "logits", "--model", store, "--tokens", &tokens, "--kv-type", "f32", "--json"];
    serde_json::from_value(json_of(&run(&arguments))["logits"].clone()).unwrap()
}

fn largest_difference(found: &[Vec<f32>], wanted: &[Vec<f32>]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let rows = found.iter().zip(wanted);
    let differences = rows.flat_map(|(found, wanted)| {
        assert_eq!(found.len(), wanted.len());
        found.iter().zip(wanted).map(|(found, wanted)| (found - wanted).abs())
    });
    differences.fold(0.0, f32::max)
}

#[test]
fn every_fixture_gives_the_logits_of_the_reference() {
    let expected = json(&fixture("expected.json"));
    let tokens = ids(&expected["ids"]);
    let cases = [
        ("tiny_bf16", "tiny_bf16"),
        ("tiny_packed", "tiny_packed"),
        ("tiny_llama", "tiny_llama"),
        ("tiny_i2s.gguf", "tiny_packed"),
        ("tiny_tq1.gguf", "tiny_packed"),
        ("tiny_tq2.gguf", "tiny_packed"),
    ];
    let logits_of =
        |name: &str| serde_json::from_value::<Vec<Vec<f32>>>(expected[name].clone()).unwrap();
    for (source, reference) in cases {
        let store = store_of(&fixture(source), source);
        let found = logits(store.to_str().unwrap(), &tokens);
        let difference = largest_difference(&found, &logits_of(reference));
        assert!(difference < LOGIT_TOLERANCE, "{source} is off by {difference}");
    }
}

#[test]
fn the_command_line_imports_what_the_library_imports() {
    let folder = TempDir::new().unwrap();
    let store = folder.path().join("store");
    let (source, store) = (fixture("tiny_packed"), store.to_str().unwrap().to_owned());
    let output = run(&["import", source.to_str().unwrap(), &store]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(run(&["model", "verify", &store]).status.success());
    let shown = json_of(&run(&["model", "show", &store, "--json"]));
    let library = model::Store::open(&store_of(&fixture("tiny_packed"), "tiny_packed")).unwrap();
    assert_eq!(shown["id"], library.manifest().id.to_string());
}

#[test]
fn perplexity_is_what_was_measured_when_the_model_was_made() {
    let golden = golden();
    let folder = TempDir::new().unwrap();
    let tokens = folder.path().join("tokens.json");
    std::fs::write(&tokens, golden["heldout_fixed"]["token_ids"].to_string()).unwrap();
    let store = bundled_store();
    let found = json_of(&run(&[
        "eval",
        "--model",
        store.to_str().unwrap(),
        "--tokens-file",
        tokens.to_str().unwrap(),
        "--json",
    ]));
    let heldout = &golden["heldout_fixed"];
    let wanted = heldout["ppl"].as_f64().unwrap();
    let perplexity = found["perplexity"].as_f64().unwrap();
    let share = (perplexity / wanted - 1.0).abs();
    assert!(share < PERPLEXITY_TOLERANCE, "{perplexity}, measured {wanted}");
    assert_eq!(found["tokens"], heldout["tokens"]);
}

#[test]
fn greedy_continuations_match_token_for_token() {
    let golden = golden();
    let store = bundled_store();
    for case in golden["greedy"].as_array().unwrap() {
        let prompt = comma_separated(&ids(&case["prompt_ids"]));
        let wanted = ids(&case["output_ids"]);
        let count = wanted.len().to_string();
        let found = json_of(&run(&[
            "generate",
            "--model",
            store.to_str().unwrap(),
            "--tokens",
            &prompt,
            "--max-tokens",
            &count,
            "--temperature",
            "0",
            "--kv-type",
            "f32",
            "--json",
        ]));
        let found_ids = ids(&found["tokens"]);
        assert_eq!(found_ids, wanted, "{}", case["prompt"]);
        if case.get("chat").is_some() {
            continue; // Its prompt spells special tokens, and text is never parsed for them.
        }
        let text = case["prompt"].as_str().unwrap();
        let from_text: Value = json_of(&run(&[
            "generate",
            "--model",
            store.to_str().unwrap(),
            "--max-tokens",
            &count,
            "--temperature",
            "0",
            "--kv-type",
            "f32",
            "--json",
            text,
        ]));
        assert_eq!(from_text["tokens"], found["tokens"], "text and ids are one prompt");
    }
}
