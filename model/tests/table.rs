//! Sources that would import wrongly in silence, one small checkpoint each: refused, put right or
//! warned of.

#![allow(clippy::unwrap_used, reason = "a helper of tests may fail like a test")]

#[path = "support/gguf_writer.rs"]
mod gguf_writer;
#[path = "support/safetensors_writer.rs"]
mod safetensors_writer;
#[path = "support/stores.rs"]
mod stores;

use std::fs;
use std::path::Path;

use gguf_writer::{GgufWriter, Meta};
use model::import::check_gguf;
use model::{Activation, ImportError, ImportOptions, Scales};
use safetensors_writer::{Directory, FloatType};
use serde_json::{Value, json};
use stores::Stored;

fn path(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

fn fixture(name: &str) -> GgufWriter {
    GgufWriter::of(&fs::read(path(name)).unwrap())
}

fn with_options(directory: &Directory, options: &ImportOptions) -> Result<Stored, ImportError> {
    let dir = tempfile::tempdir().unwrap();
    directory.write(dir.path());
    Stored::import_with(dir.path(), options)
}

fn imported(directory: &Directory) -> Stored {
    with_options(directory, &ImportOptions::default()).unwrap()
}

fn refusal(directory: &Directory) -> String {
    with_options(directory, &ImportOptions::default()).err().expect("it is bad").to_string()
}

fn of_gguf(gguf: &GgufWriter, options: &ImportOptions) -> Result<Stored, ImportError> {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("model.gguf");
    fs::write(&source, gguf.bytes()).unwrap();
    Stored::import_with(&source, options)
}

/// The fixture of packed weights with its matrices as bf16 floats of `magnitude`, without scales.
fn unpacked(quantization: Value, magnitude: f32) -> Directory {
    let mut directory = Directory::of(&path("tiny_packed"));
    directory.config["quantization_config"] = quantization;
    let packed = Stored::import(&path("tiny_packed")).unwrap();
    let projections = [
        ("self_attn.q_proj", 256, 256),
        ("self_attn.k_proj", 64, 256),
        ("self_attn.v_proj", 64, 256),
        ("self_attn.o_proj", 256, 256),
        ("mlp.gate_proj", 768, 256),
        ("mlp.up_proj", 768, 256),
        ("mlp.down_proj", 256, 768),
    ];
    for layer in 0..2 {
        for ((name, rows, cols), (trits, _)) in projections.iter().zip(packed.matrices(layer)) {
            let name = format!("model.layers.{layer}.{name}.weight");
            directory.tensors.remove(&format!("{name}_scale")).unwrap();
            let values: Vec<f32> = trits.iter().map(|t| f32::from(*t) * magnitude).collect();
            directory.floats(&name, FloatType::Bf16, &[*rows, *cols], &values);
        }
    }
    directory
}

#[test]
fn masters_that_are_ternary_already_are_taken_as_they_are() {
    let class = |class: &str, mode: &str| json!({"quant_method": "bitnet", "linear_class": class, "quantization_mode": mode});
    let packed = Stored::import(&path("tiny_packed")).unwrap();
    for quantization in [
        class("autobitlinear", "online"),
        class("autobitlinear", "offline"),
        class("bitlinear", "offline"),
        json!({"quant_method": "bitnet"}),
    ] {
        let stored = imported(&unpacked(quantization.clone(), 1.25));
        for layer in 0..2 {
            for (found, expected) in stored.matrices(layer).iter().zip(packed.matrices(layer)) {
                assert_eq!(found.1, 1.25, "{quantization}: the magnitude, whatever its density");
                assert_eq!(found.0, expected.0, "{quantization}");
            }
        }
        assert!(stored.notes("warning: 14 matrices of master weights are ternary already"));
    }
    // Real masters give no such note.
    assert!(!Stored::import(&path("tiny_bf16")).unwrap().notes("ternary already"));
}

#[test]
fn masters_of_a_few_magnitudes_are_neither_masters_nor_ternary() {
    let quantization = json!({"quant_method": "bitnet", "linear_class": "autobitlinear"});
    let mut directory = unpacked(quantization, 1.25);
    let name = "model.layers.1.mlp.up_proj.weight";
    // The lower half has another scale, as the shards of a training run leave it.
    let tensor = directory.tensors.get_mut(name).unwrap();
    let half = tensor.data.len() / 2;
    for bits in tensor.data[half..].chunks_mut(2).filter(|bits| bits[1] & 0x7f != 0) {
        bits[0] ^= 0x10;
    }
    assert_eq!(
        refusal(&directory),
        format!(
            "tensor {name} is not ternary: as master weights it holds too few magnitudes (2), as \
             ternary ones too many"
        )
    );
}

#[test]
fn ternary_weights_of_unknown_training_are_warned_of() {
    let warning = "warning: the source does not say that activations are int8";
    let mut plain = unpacked(json!({}), 0.5);
    plain.config.as_object_mut().unwrap().remove("quantization_config");
    assert!(imported(&plain).notes(warning));
    assert!(!Stored::import(&path("tiny_packed")).unwrap().notes(warning));
    // The same as a GGUF file; bitnet.cpp's own type is of models that have int8 activations.
    for (name, expected) in [("tiny_tq2.gguf", true), ("tiny_i2s.gguf", false)] {
        let mut gguf = with_architecture(fixture(name), "llama");
        gguf.tensors.retain(|tensor| !tensor.name.contains("_sub_norm"));
        let stored = of_gguf(&gguf, &ImportOptions::default()).unwrap();
        assert_eq!(stored.notes(warning), expected, "{name}");
    }
}

fn with_architecture(mut gguf: GgufWriter, name: &str) -> GgufWriter {
    for (key, _) in &mut gguf.metadata {
        *key = key.replacen("bitnet-b1.58.", &format!("{name}."), 1);
    }
    gguf.set("general.architecture", Meta::String(name.into()));
    gguf
}

/// The fixture with the vocabulary of Llama 3, and with scales that `scale` makes of the fixture's.
fn like_2b4t(vocab: u64, scale: impl Fn(f32) -> f32) -> GgufWriter {
    let mut gguf = fixture("tiny_i2s.gguf");
    if vocab != 512 {
        gguf.metadata.retain(|(key, _)| !key.ends_with("vocab_size"));
        let embedding = gguf.tensor("token_embd.weight");
        embedding.dims[1] = vocab;
        embedding.data.resize(vocab as usize * 256 * 2, 0);
    }
    for tensor in gguf.tensors.iter_mut().filter(|tensor| tensor.tensor_type == 36) {
        let at = tensor.data.len() - 32;
        let bytes = &mut tensor.data[at..at + 4];
        let found = f32::from_le_bytes(bytes.try_into().unwrap());
        bytes.copy_from_slice(&scale(found).to_le_bytes());
    }
    gguf
}

#[test]
fn inverted_scales_are_refused_or_put_right() {
    let right = of_gguf(&like_2b4t(512, |scale| scale * 1.25), &ImportOptions::default()).unwrap();
    assert!(!right.notes("inverses"));
    let inverted = |scale: f32| 1.0 / (scale * 1.25);
    // Another vocabulary may be another model: a warning.
    let stored = of_gguf(&like_2b4t(512, inverted), &ImportOptions::default()).unwrap();
    assert!(stored.notes("are they inverses? (--scales inverted)"));
    let with = |scales| ImportOptions { scales: Some(scales), ..ImportOptions::default() };
    let put_right = of_gguf(&like_2b4t(512, inverted), &with(Scales::Inverted)).unwrap();
    assert!(put_right.notes("scales: inverted, as asked for"));
    for (found, expected) in put_right.matrices(1).iter().zip(right.matrices(1)) {
        assert!((found.1 - expected.1).abs() < 1e-6, "{} {}", found.1, expected.1);
        assert_eq!(found.0, expected.0);
    }
    let stored = of_gguf(&like_2b4t(512, inverted), &with(Scales::Stored)).unwrap();
    assert!(!stored.notes("inverses"));

    let masters = Directory::of(&path("tiny_bf16"));
    let error = with_options(&masters, &with(Scales::Inverted)).err().unwrap().to_string();
    assert!(error.ends_with("that of master weights is computed"), "{error}");

    let error = check_gguf(&like_2b4t(128_256, inverted).bytes()).unwrap_err().to_string();
    assert!(error.starts_with("the scales of the first layer are 0.7"), "{error}");
    assert!(error.contains("say --scales inverted to put them right, or --scales stored"));
    check_gguf(&like_2b4t(128_256, |scale| scale * 1.25).bytes()).unwrap();
    assert_eq!(
        "upright".parse::<Scales>().unwrap_err().to_string(),
        "scales \"upright\" are neither stored nor inverted"
    );
}

#[test]
fn scales_that_can_only_be_accidents_are_refused_by_name() {
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 10_001.0] {
        let error = check_gguf(&like_2b4t(512, |_| scale).bytes()).unwrap_err().to_string();
        assert_eq!(
            error,
            format!(
                "tensor blk.0.attn_q.weight has the scale {scale}, expected a positive number up \
                 to 10000"
            )
        );
    }
    for scale in [1e-5, 24.5] {
        let stored = of_gguf(&like_2b4t(512, |_| scale), &ImportOptions::default()).unwrap();
        assert!(stored.notes("warning: scales outside 1e-4 to 8"), "{scale}");
    }
    assert!(!Stored::import(&path("tiny_packed")).unwrap().notes("warning"));
}

#[test]
fn an_activation_that_only_the_vocabulary_tells_is_refused_until_it_is_said() {
    let bitnet = |vocab| with_architecture(like_2b4t(vocab, |scale| scale), "bitnet");
    let error = check_gguf(&bitnet(128_256).bytes()).unwrap_err().to_string();
    assert!(error.starts_with("bitnet.hidden_activation is not given"), "{error}");
    assert!(error.ends_with("say --activation relu2 (or silu)"), "{error}");
    let mut stated = bitnet(128_256);
    stated.set("bitnet.hidden_activation", Meta::String("relu2".into()));
    assert_eq!(check_gguf(&stated.bytes()).unwrap().activation, Activation::SquaredRelu);

    let asked = |activation| ImportOptions { activation, ..ImportOptions::default() };
    for (activation, expected) in [
        (None, Activation::Silu),
        (Some(Activation::Silu), Activation::Silu),
        (Some("relu2".parse().unwrap()), Activation::SquaredRelu),
    ] {
        let stored = of_gguf(&bitnet(512), &asked(activation)).unwrap();
        assert_eq!(stored.store.config().activation, expected);
        assert_eq!(stored.notes("as asked for"), activation.is_some());
    }
    // 1bitLLM's class with that vocabulary, as a directory.
    let mut directory = Directory::of(&path("tiny_packed"));
    directory.config["architectures"] = json!(["BitnetForCausalLM"]);
    directory.config["vocab_size"] = json!(128_256);
    directory.config.as_object_mut().unwrap().remove("hidden_act");
    let text = refusal(&directory);
    assert!(text.starts_with("hidden_act is not given"), "{text}");
    directory.config["vocab_size"] = json!(512);
    let stored = with_options(&directory, &asked(Some(Activation::SquaredRelu))).unwrap();
    assert_eq!(stored.store.config().activation, Activation::SquaredRelu);
    assert_eq!(
        "gelu".parse::<Activation>().unwrap_err().to_string(),
        "activation \"gelu\" is neither relu2 nor silu"
    );
}
