//! Settings of `config.json` and the files beside it: stated in several places, in other words, or
//! for other models.

#![allow(clippy::unwrap_used, reason = "a helper of tests may fail like a test")]

#[path = "support/safetensors_writer.rs"]
mod safetensors_writer;
#[path = "support/stores.rs"]
mod stores;

use std::fs;
use std::path::Path;

use safetensors_writer::{Directory, NewTensor};
use serde_json::{Value, json};
use stores::Stored;

fn fixture() -> Directory {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny_packed");
    Directory::of(&path)
}

/// Imports the fixture with other fields; `null` takes one away. `files` stand beside it.
fn import(fields: &Value, files: &[(&str, &str)]) -> Result<Stored, String> {
    let mut directory = fixture();
    let config = directory.config.as_object_mut().unwrap();
    for (key, value) in fields.as_object().unwrap() {
        config.insert(key.clone(), value.clone());
    }
    config.retain(|_, value| !value.is_null());
    written(&directory, files)
}

fn written(directory: &Directory, files: &[(&str, &str)]) -> Result<Stored, String> {
    let dir = tempfile::tempdir().unwrap();
    directory.write(dir.path());
    files.iter().for_each(|(name, text)| fs::write(dir.path().join(name), text).unwrap());
    Stored::import(dir.path()).map_err(|error| error.to_string())
}

fn refused(fields: Value, expected: &str) {
    let text = import(&fields, &[]).err().unwrap_or_else(|| panic!("{fields} was imported"));
    assert_eq!(text, expected);
}

#[test]
fn rope_is_read_wherever_it_is_stated() {
    let id = |fields: Value| import(&fields, &[]).unwrap().imported.id;
    let top = id(json!({}));
    let same = [
        json!({"rope_theta": null, "rope_parameters": {"rope_theta": 500000.0}}),
        json!({"rope_theta": null, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        json!({"rope_theta": null, "rope_scaling": {"rope_theta": 5e5, "type": "default"}}),
        json!({"rope_scaling": {"rope_type": "linear", "factor": 1.0}}),
        json!({"rope_parameters": {"partial_rotary_factor": 1.0, "factor": null}}),
        json!({"partial_rotary_factor": 1.0, "sliding_window": 64, "use_sliding_window": false}),
    ];
    for fields in same {
        assert_eq!(id(fields.clone()), top, "{fields}");
    }
    let other = json!({"rope_parameters": {"rope_theta": 10000}});
    let stored = import(&other, &[]).unwrap();
    assert_ne!(stored.imported.id, top);
    assert!(
        stored.notes("rope_parameters.rope_theta is 10000 and rope_theta 500000: 10000 is taken")
    );
}

#[test]
fn other_rotations_are_refused_by_name() {
    refused(json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor is not supported");
    for place in ["rope_parameters", "rope_scaling"] {
        let with = |value: Value| json!({ place: value });
        refused(
            with(json!({"rope_theta": 5e5, "partial_rotary_factor": 0.5})),
            &format!("{place}.partial_rotary_factor is not supported"),
        );
        for kind in ["llama3", "yarn", "linear", "dynamic", "longrope", "surprise"] {
            refused(
                with(json!({"rope_theta": 5e5, "rope_type": kind, "factor": 8.0})),
                &format!("{place} {kind} is not supported"),
            );
            refused(
                with(json!({"type": kind, "factor": 8.0})),
                &format!("{place} {kind} is not supported"),
            );
        }
        refused(
            with(json!({"factor": 8.0})),
            &format!("{place} of an unknown type is not supported"),
        );
        refused(
            with(json!({"full_attention": {"rope_theta": 1e4}})),
            &format!("{place} of its own for full_attention is not supported"),
        );
        refused(with(json!("yarn")), &format!("{place} is \"yarn\", expected an object"));
        refused(
            with(json!({"rope_theta": "1e4"})),
            &format!("{place}.rope_theta is \"1e4\", expected a number"),
        );
        refused(with(json!({"type": 3})), &format!("{place}.type is 3, expected a text"));
    }
    refused(json!({"rope_theta": -1.0}), "rope_theta is -1, expected a positive number");
}

#[test]
fn the_length_of_the_context_is_found_and_disagreement_noted() {
    let stored = |fields: Value, tokenizer: &str| {
        import(&fields, &[("tokenizer_config.json", tokenizer)]).unwrap()
    };
    let context = |stored: &Stored| stored.store.config().context;
    let unlimited = r#"{"model_max_length": 1000000000000000019884624838656}"#;
    let plain = stored(json!({}), unlimited);
    assert_eq!(context(&plain), 128);
    assert!(!plain.notes("context:"));
    let shorter = stored(json!({}), r#"{"model_max_length": 64}"#);
    assert_eq!(context(&shorter), 128);
    assert!(shorter.notes("128 by max_position_embeddings, though tokenizer_config.json says 64"));
    let two = stored(json!({"max_sequence_length": 96}), "{}");
    assert_eq!(context(&two), 128);
    assert!(two.notes("128 by max_position_embeddings, though max_sequence_length is 96"));
    let other = stored(json!({"max_position_embeddings": null, "n_positions": 96}), "{}");
    assert_eq!(context(&other), 96);
    assert!(other.notes("context: 96, by n_positions"));
    let none = json!({"max_position_embeddings": null});
    let only_tokenizer = stored(none.clone(), r#"{"model_max_length": 64}"#);
    assert_eq!(context(&only_tokenizer), 64);
    assert!(only_tokenizer.notes("tokenizer_config.json says so and config.json nothing"));
    let error = import(&none, &[("tokenizer_config.json", unlimited)]).err().unwrap();
    assert_eq!(error, "config.json has no max_position_embeddings");
}

#[test]
fn words_that_no_setting_has_are_refused_and_synonyms_taken() {
    let silu = import(&json!({"hidden_act": "silu"}), &[]).unwrap();
    let swish = import(&json!({"hidden_act": "swish"}), &[]).unwrap();
    assert_eq!(swish.imported.id, silu.imported.id);
    refused(
        json!({"hidden_act": "gelu"}),
        "hidden_act is \"gelu\", expected \"relu2\" or \"silu\"",
    );
    let quantization = |key: &str, value: Value| json!({"quantization_config": {"quant_method": "bitnet", key: value}});
    refused(
        quantization("linear_class", json!("bitline")),
        "linear_class is \"bitline\", expected \"bitlinear\" or \"autobitlinear\"",
    );
    refused(
        quantization("quantization_mode", json!("later")),
        "quantization_mode is \"later\", expected \"offline\" or \"online\"",
    );
    import(&quantization("quantization_mode", Value::Null), &[]).unwrap();
    refused(
        json!({"architectures": ["LlamaForSequenceClassification"]}),
        "architecture \"LlamaForSequenceClassification\" is not supported, expected a model for \
         causal language modelling",
    );
    import(&json!({"architectures": []}), &[]).unwrap();
}

#[test]
fn fields_of_other_models_are_refused_unless_they_are_neutral() {
    let cases = [
        (json!({"is_causal": false}), "is_causal = false"),
        (json!({"use_bidirectional_attention": true}), "use_bidirectional_attention = true"),
        (json!({"final_logit_softcapping": 30.0}), "final_logit_softcapping = 30.0"),
        (json!({"scale_emb": 12}), "scale_emb = 12"),
        (json!({"use_qk_norm": true}), "use_qk_norm = true"),
        (json!({"residual_multiplier": "x"}), "residual_multiplier = \"x\""),
        (json!({"layer_types": ["full_attention", "sliding"]}), "layer_types \"sliding\""),
        (json!({"num_experts": 8}), "a mixture of experts"),
        (json!({"sliding_window": 64}), "sliding_window"),
        (json!({"quantization": {"bits": 2}}), "quantization (weights of MLX)"),
    ];
    for (fields, what) in cases {
        refused(fields, &format!("{what} is not supported"));
    }
    let neutral = json!({
        "is_causal": true, "use_bidirectional_attention": false, "scale_emb": 1,
        "use_qk_norm": false, "layer_types": ["full_attention", "full_attention"],
        "num_experts": 1, "logit_scale": 1.0,
    });
    let plain = import(&json!({}), &[]).unwrap();
    assert_eq!(import(&neutral, &[]).unwrap().imported.id, plain.imported.id);

    let stages = r#"[{"idx":0,"type":"sentence_transformers.models.Transformer"},
        {"idx":1,"path":"1_Pooling","type":"sentence_transformers.models.Pooling"}]"#;
    let error = import(&json!({}), &[("modules.json", stages)]).err().unwrap();
    assert!(error.starts_with("an embedding model (modules.json names sentence_transf"), "{error}");
    import(&json!({}), &[("modules.json", "[]")]).unwrap();
}

#[test]
fn tensors_that_no_reader_loads_are_left_out() {
    let plain = import(&json!({}), &[]).unwrap();
    let mut directory = fixture();
    let mut add = |name: &str, dtype, shape: &[usize], bytes| {
        let tensor = NewTensor { dtype, shape: shape.to_vec(), data: vec![0; bytes] };
        directory.tensors.insert(name.into(), tensor);
    };
    for layer in 0..2 {
        let prefix = format!("model.layers.{layer}.self_attn.rotary_emb");
        add(&format!("{prefix}.inv_freq"), "F32", &[32], 128);
        add(&format!("{prefix}.cos_cached"), "F16", &[2, 32], 128);
    }
    add("model.rotary_emb.inv_freq", "F64", &[32], 256);
    add("model.embeddings.position_ids", "I64", &[1, 4], 32);
    add("model.layers.0.self_attn.masked_bias", "BOOL", &[], 1);
    add("model.nothing", "F32", &[0, 256], 0);
    let stored = written(&directory, &[]).unwrap();
    assert_eq!(stored.imported.id, plain.imported.id);
    assert!(
        stored.notes("8 tensors that are no weights were left out (model.embeddings.position_ids)")
    );

    let bias = NewTensor { dtype: "F32", shape: vec![256], data: vec![0; 1024] };
    directory.tensors.insert("model.layers.0.self_attn.q_proj.bias".into(), bias);
    let error = written(&directory, &[]).err().unwrap();
    assert!(error.ends_with("biases are not supported"), "{error}");
}

#[test]
fn json_of_other_programs_is_read_or_named() {
    let plain = import(&json!({}), &[]).unwrap();
    let text = fixture().config.to_string();
    let marked = format!("\u{feff}{text}");
    let files = [("config.json", marked.as_str()), ("tokenizer_config.json", "\u{feff}{}")];
    assert_eq!(import(&json!({}), &files).unwrap().imported.id, plain.imported.id);
    for number in ["NaN", "Infinity", "-Infinity"] {
        let wrong = text.replacen('{', &format!("{{\n\"attention_dropout\": {number}, "), 1);
        let error = import(&json!({}), &[("config.json", &wrong)]).err().unwrap();
        assert!(error.starts_with("a number in line 2 of "), "{error}");
        assert!(
            error.ends_with(&format!("is {number}, expected a number that JSON has")),
            "{error}"
        );
    }
}
