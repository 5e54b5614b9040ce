//! The logits of the reference implementation, for small models of three kinds: packed, master
//! weights, and Llama-type with a head of its own.

use std::collections::HashMap;
use std::path::Path;

use kernels::Backend;
use model::{ImportOptions, import};
use worker::engine::EngineConfig;

use crate::pipeline::{Pipeline, Sequence, open, plain};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures");

/// The reference sums floats in another order; int8 rounding makes more of that in a few places.
const TOLERANCE: f32 = 1e-4;

/// `expected.json`: the ids, and for each model the logits after each of them.
#[derive(serde::Deserialize)]
struct Expected {
    ids: Vec<u32>,
    #[serde(flatten)]
    logits: HashMap<String, Vec<Vec<f32>>>,
}

#[test]
fn logits_are_those_of_the_reference() {
    let fixtures = Path::new(FIXTURES);
    let text = std::fs::read_to_string(fixtures.join("expected.json")).unwrap();
    let expected: Expected = serde_json::from_str(&text).unwrap();
    for name in ["tiny_packed", "tiny_bf16", "tiny_llama"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        import(&fixtures.join(name), &path, &ImportOptions::default(), &mut |_| {}).unwrap();
        let store = open(&path);
        let mut sequence = Sequence::new(0, expected.ids.len());
        sequence.tokens.clone_from(&expected.ids);
        let config = EngineConfig { backend: Backend::detect(), ..plain() };
        let found = Pipeline::open(&store, 2, config).logits(&sequence, 5);
        let want = expected.logits[name].concat();
        assert_eq!(found.len(), want.len(), "{name}");
        for (index, (found, want)) in found.iter().zip(&want).enumerate() {
            let difference = (found - want).abs();
            assert!(difference < TOLERANCE, "{name}, {index}: {found} is not {want}");
        }
    }
}
