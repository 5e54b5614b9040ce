//! Hugging Face directories of every kind, written here: names, rules of scales, files.

#![allow(clippy::unwrap_used, reason = "a helper of tests may fail like a test")]

#[path = "support/safetensors_writer.rs"]
mod safetensors_writer;
#[path = "support/stores.rs"]
mod stores;

use std::fs;
use std::path::Path;

use model::Activation;
use safetensors_writer::{Directory, FloatType};
use serde_json::{Value, json};
use stores::Stored;

const HIDDEN: usize = 64;
const FFN: usize = 96;
const KV: usize = 32;
const VOCAB: usize = 40;
/// Paths and shapes of a layer's matrices, in the order of a store.
const MATRICES: [(&str, [usize; 2]); 7] = [
    ("self_attn.q_proj", [HIDDEN, HIDDEN]),
    ("self_attn.k_proj", [KV, HIDDEN]),
    ("self_attn.v_proj", [KV, HIDDEN]),
    ("self_attn.o_proj", [HIDDEN, HIDDEN]),
    ("mlp.gate_proj", [FFN, HIDDEN]),
    ("mlp.up_proj", [FFN, HIDDEN]),
    ("mlp.down_proj", [HIDDEN, FFN]),
];

/// Numbers without a pattern, each a function of tensor and place (SplitMix64).
fn noise(tensor: usize, place: usize) -> u64 {
    let z = (tensor as u64 * 1_000_003 + place as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Multiples of 1/64 up to 1, which every float type here holds exactly.
fn floats(tensor: usize, len: usize) -> Vec<f32> {
    (0..len).map(|place| (noise(tensor, place) % 129) as f32 / 64.0 - 1.0).collect()
}

fn trits(tensor: usize, len: usize) -> Vec<i8> {
    (0..len).map(|place| (noise(tensor, place) % 3) as i8 - 1).collect()
}

/// `config.json` of the shape above, with `more` keys.
fn config(model_type: &str, more: &Value) -> Value {
    let mut config = json!({
        "model_type": model_type, "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "bos_token_id": 1, "eos_token_id": [2, 3],
    });
    let all = config.as_object_mut().unwrap();
    all.extend(more.as_object().unwrap().clone());
    config
}

/// A directory whose embedding and norms are there, and whose matrices `add` adds: it is told the
/// path, the shape and a number of its own for each.
fn directory(
    config: Value,
    kind: FloatType,
    mut add: impl FnMut(&mut Directory, &str, [usize; 2], usize),
) -> Directory {
    let mut directory = Directory::new(config);
    let embedding = floats(1, VOCAB * HIDDEN);
    directory.floats("model.embed_tokens.weight", kind, &[VOCAB, HIDDEN], &embedding);
    directory.floats("model.norm.weight", kind, &[HIDDEN], &floats(2, HIDDEN));
    for layer in 0..2 {
        let prefix = format!("model.layers.{layer}.");
        for (number, norm) in ["input_layernorm", "post_attention_layernorm"].iter().enumerate() {
            let values = floats(10 + layer * 2 + number, HIDDEN);
            directory.floats(&format!("{prefix}{norm}.weight"), kind, &[HIDDEN], &values);
        }
        for (number, (path, shape)) in MATRICES.into_iter().enumerate() {
            add(&mut directory, &format!("{prefix}{path}"), shape, 100 + layer * 7 + number);
        }
    }
    directory
}

/// Adds the two sub-norms of each layer under these names.
fn add_sub_norms(directory: &mut Directory, kind: FloatType, attn: &str, ffn: &str) {
    for layer in 0..2 {
        let prefix = format!("model.layers.{layer}.");
        let (of_attn, of_ffn) = (floats(50 + layer, HIDDEN), floats(60 + layer, FFN));
        directory.floats(&format!("{prefix}{attn}.weight"), kind, &[HIDDEN], &of_attn);
        directory.floats(&format!("{prefix}{ffn}.weight"), kind, &[FFN], &of_ffn);
    }
}

/// Imports it from one file.
fn imported(directory: &Directory) -> Stored {
    let dir = tempfile::tempdir().unwrap();
    directory.write(dir.path());
    Stored::import(dir.path()).unwrap()
}

fn refusal(directory: &Directory) -> String {
    let dir = tempfile::tempdir().unwrap();
    directory.write(dir.path());
    Stored::import(dir.path()).err().expect("it is bad").to_string()
}

/// What training does with master weights, written out in f64.
fn ternary_by_mean(masters: &[f32]) -> (Vec<i8>, f64) {
    let sum: f64 = masters.iter().map(|value| f64::from(value.abs())).sum();
    let mean = sum / masters.len() as f64;
    let trit = |value: &f32| (f64::from(*value) / mean).round_ties_even().clamp(-1.0, 1.0) as i8;
    (masters.iter().map(trit).collect(), mean)
}

fn close(found: f32, expected: f64) -> bool {
    (f64::from(found) - expected).abs() <= expected * 1e-6
}

/// The quantisation that Microsoft's own checkpoints name.
fn autobitlinear(mode: &str) -> Value {
    json!({"quantization_config": {
        "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": mode,
    }})
}

#[test]
fn two_files_with_an_index_are_the_same_model_as_one() {
    for name in ["tiny_bf16", "tiny_packed", "tiny_llama"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
        let whole = Stored::import(&path).unwrap();
        for files in [1, 2, 5] {
            let dir = tempfile::tempdir().unwrap();
            Directory::of(&path).write_sharded(dir.path(), files);
            let sharded = Stored::import(dir.path()).unwrap();
            assert_eq!(sharded.imported.id, whole.imported.id, "{name} in {files} files");
        }
    }
}

#[test]
fn the_type_of_master_weights_does_not_matter() {
    let masters = |kind| {
        directory(config("llama", &autobitlinear("online")), kind, |d, path, shape, number| {
            let values = floats(number, shape[0] * shape[1]);
            d.floats(&format!("{path}.weight"), kind, &shape, &values);
        })
    };
    let first = imported(&masters(FloatType::Bf16));
    for layer in 0..2 {
        for (number, (trits, scale)) in first.matrices(layer).into_iter().enumerate() {
            let [rows, cols] = MATRICES[number].1;
            let masters = floats(100 + layer as usize * 7 + number, rows * cols);
            let (expected, mean) = ternary_by_mean(&masters);
            assert_eq!(trits, expected, "matrix {number} of layer {layer}");
            assert!(close(scale, mean), "{scale} for a mean of {mean}");
        }
    }
    assert!(first.notes("BF16 masters"));
    for kind in [FloatType::F16, FloatType::F32] {
        assert_eq!(imported(&masters(kind)).imported.id, first.imported.id, "{kind:?}");
    }
}

#[test]
fn one_bit_llm_has_other_names_for_the_same() {
    // The masters of `microsoft`, and of `first`, whose config calls itself a Llama.
    let add = |d: &mut Directory, path: &str, shape: [usize; 2], number| {
        let values = floats(number, shape[0] * shape[1]);
        d.floats(&format!("{path}.weight"), FloatType::F16, &shape, &values);
    };
    let mut microsoft = directory(config("bitnet", &autobitlinear("online")), FloatType::F16, add);
    add_sub_norms(&mut microsoft, FloatType::F16, "self_attn.attn_sub_norm", "mlp.ffn_sub_norm");
    let own = json!({
        "architectures": ["BitnetForCausalLM"], "weight_bits": 1, "input_bits": 8,
    });
    let mut first = directory(config("llama", &own), FloatType::F16, add);
    add_sub_norms(&mut first, FloatType::F16, "self_attn.inner_attn_ln", "mlp.ffn_layernorm");

    let (microsoft, first) = (imported(&microsoft), imported(&first));
    assert_eq!(first.imported.id, microsoft.imported.id);
    assert!(first.notes("F16 masters"));
    let config = first.store.config();
    assert_eq!((config.activation, config.sub_norms), (Activation::Silu, true));
    for layer in 0..2 {
        let shard = first.store.layer(layer).unwrap();
        let weights = shard.weights();
        let number = layer as usize;
        assert_eq!(weights.attn_sub_norm.unwrap(), floats(50 + number, HIDDEN));
        assert_eq!(weights.ffn_sub_norm.unwrap(), floats(60 + number, FFN));
        assert_eq!(weights.attn_norm, floats(10 + number * 2, HIDDEN));
        assert_eq!(weights.ffn_norm, floats(11 + number * 2, HIDDEN));
    }
}

#[test]
fn one_bit_llm_says_what_it_cannot_be() {
    let with = |more: Value| {
        let add = |d: &mut Directory, path: &str, shape: [usize; 2], number| {
            let values = floats(number, shape[0] * shape[1]);
            d.floats(&format!("{path}.weight"), FloatType::F32, &shape, &values);
        };
        let mut config = config("llama", &json!({"architectures": ["BitnetForCausalLM"]}));
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        directory(config, FloatType::F32, add)
    };
    assert_eq!(
        refusal(&with(json!({"weight_bits": 2}))),
        "weight_bits other than 1 is not supported"
    );
    assert_eq!(
        refusal(&with(json!({"input_bits": 4}))),
        "input_bits other than 8 is not supported"
    );
    assert_eq!(
        refusal(&with(json!({}))),
        "tensor model.layers.0.self_attn.inner_attn_ln.weight is missing"
    );
}

/// Packed or float matrices of the same trits, with the same stored scale.
fn ternary(config: Value, packed: bool, scale: Option<f32>, magnitude: f32) -> Directory {
    directory(config, FloatType::Bf16, |d, path, shape, number| {
        let trits = trits(number, shape[0] * shape[1]);
        let name = format!("{path}.weight");
        if packed {
            d.packed(&name, shape, &trits);
        } else {
            let values: Vec<f32> = trits.iter().map(|trit| f32::from(*trit) * magnitude).collect();
            d.floats(&name, FloatType::Bf16, &shape, &values);
        }
        if let Some(scale) = scale {
            d.floats(&format!("{path}.weight_scale"), FloatType::Bf16, &[1], &[scale]);
        }
    })
}

#[test]
fn scales_divide_unless_the_class_is_autobitlinear() {
    let with = |quantization: Value| {
        let more = json!({"quantization_config": quantization});
        imported(&ternary(config("llama", &more), true, Some(24.5), 1.0))
    };
    let class = |class: &str| json!({"quant_method": "bitnet", "linear_class": class});
    let skipped = json!({"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]});
    let cases = [
        (json!({"quant_method": "bitnet"}), 1.0 / 24.5),
        (json!({"quant_method": "bitnet", "modules_to_not_convert": null}), 1.0 / 24.5),
        (skipped, 1.0 / 24.5),
        (class("bitlinear"), 1.0 / 24.5),
        (class("autobitlinear"), 24.5),
    ];
    for (quantization, expected) in cases {
        let stored = with(quantization);
        for (number, (found, scale)) in stored.matrices(1).into_iter().enumerate() {
            assert_eq!(scale, expected);
            assert_eq!(found, trits(107 + number, found.len()));
        }
    }
}

#[test]
fn ternary_floats_are_the_packed_model() {
    let divides = json!({"quantization_config": {"quant_method": "bitnet"}});
    let multiplies = autobitlinear("offline");
    let config = |more: &Value| config("llama", more);
    // A packed model that was unpacked and saved again keeps its scales, whichever rule they obey.
    for (more, stored, magnitude) in [(&divides, 8.0, 0.125), (&multiplies, 0.75, 0.75)] {
        let packed = imported(&ternary(config(more), true, Some(stored), 1.0));
        let saved_again = imported(&ternary(config(more), false, Some(stored), 1.0));
        assert_eq!(saved_again.imported.id, packed.imported.id, "{more}");
        assert!(saved_again.notes("trits stored as BF16"));
        // Without a quantization_config, floats are what they say.
        let plain = imported(&ternary(config(&json!({})), false, None, magnitude));
        assert_eq!(plain.imported.id, packed.imported.id, "{more}");
        assert!(plain.notes("ternary values stored as BF16"));
    }
}

#[test]
fn floats_that_are_not_ternary_are_refused_by_name() {
    let spoilt = |more: &Value, scale, at: usize, value: f32| {
        let mut directory = ternary(config("llama", more), false, scale, 1.0);
        let mut values: Vec<f32> = trits(104, FFN * HIDDEN).into_iter().map(f32::from).collect();
        values[at] = value;
        let name = "model.layers.0.mlp.gate_proj.weight";
        directory.floats(name, FloatType::Bf16, &[FFN, HIDDEN], &values);
        refusal(&directory)
    };
    assert_eq!(
        spoilt(&json!({}), None, 1000, 0.5),
        "tensor model.layers.0.mlp.gate_proj.weight is not ternary: it holds both 1 and 0.5"
    );
    assert_eq!(
        spoilt(&autobitlinear("offline"), Some(2.0), FFN * HIDDEN - 1, -3.0),
        "tensor model.layers.0.mlp.gate_proj.weight is not ternary: it holds both 1 and 3"
    );
    let doubled = ternary(config("llama", &autobitlinear("offline")), false, Some(2.0), 0.5);
    assert_eq!(
        refusal(&doubled),
        "tensor model.layers.0.self_attn.q_proj.weight is not ternary: it has a weight_scale and \
         yet holds 0.5"
    );
}

#[test]
fn what_must_be_converted_first_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let directory = ternary(config("llama", &json!({})), false, None, 1.0);
    directory.write(dir.path());
    fs::write(dir.path().join("tokenizer.model"), b"\n").unwrap();
    let stored = Stored::import(dir.path()).unwrap();
    assert!(stored.notes("tokenizer.model is not read: save it as tokenizer.json"));
    assert!(stored.store.tokenizer_json().unwrap().is_none());

    // Beside safetensors, a pickled copy of the weights does not matter.
    for name in ["pytorch_model.bin.index.json", "pytorch_model.bin"] {
        fs::write(dir.path().join(name), b"{}").unwrap();
        assert_eq!(Stored::import(dir.path()).unwrap().imported.id, stored.imported.id);
    }
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let error = Stored::import(dir.path()).err().unwrap();
    assert_eq!(
        error.to_string(),
        "pytorch_model.bin is not supported: save the model as safetensors first"
    );
}
