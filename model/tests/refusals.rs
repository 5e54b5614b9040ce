//! The refusals that `docs/models.md` quotes: each is what is said, and none is left out.

#![allow(clippy::unwrap_used, reason = "a helper of tests may fail like a test")]

#[path = "support/gguf_writer.rs"]
mod gguf_writer;
#[path = "support/safetensors_writer.rs"]
mod safetensors_writer;

use std::collections::BTreeSet;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use gguf_writer::{GgufWriter, Meta};
use model::{I2sLayout, ImportOptions, import};
use safetensors_writer::{Directory, FloatType};
use serde_json::json;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// The innermost reason why `source` does not import.
fn reason(source: &Path) -> String {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("store");
    let error = import(source, &dest, &ImportOptions::default(), &mut |_| {}).err();
    let error = error.unwrap_or_else(|| panic!("{} was imported", source.display()));
    assert!(!dest.exists());
    let mut error: &dyn Error = &error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

fn of_bytes(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("model.gguf");
    fs::write(&source, bytes).unwrap();
    reason(&source)
}

fn of_gguf(name: &str, spoil: impl FnOnce(&mut GgufWriter)) -> String {
    let mut gguf = GgufWriter::of(&fs::read(fixture(name)).unwrap());
    spoil(&mut gguf);
    of_bytes(&gguf.bytes())
}

/// A GGUF file whose first query matrix has another type, with `data_bytes` of data.
fn of_type(tensor_type: u32, data_bytes: usize) -> String {
    of_gguf("tiny_i2s.gguf", |gguf| {
        let tensor = gguf.tensor("blk.0.attn_q.weight");
        tensor.tensor_type = tensor_type;
        tensor.data = vec![0; data_bytes];
    })
}

fn of_metadata(key: &str, value: Meta) -> String {
    of_gguf("tiny_i2s.gguf", |gguf| gguf.set(key, value))
}

fn of_new_tensor(name: &str) -> String {
    of_gguf("tiny_i2s.gguf", |gguf| gguf.add(name, &[256], 0, vec![0; 1024]))
}

fn of_directory(name: &str, spoil: impl FnOnce(&mut Directory)) -> String {
    let mut directory = Directory::of(&fixture(name));
    spoil(&mut directory);
    let dir = tempfile::tempdir().unwrap();
    directory.write(dir.path());
    reason(dir.path())
}

fn of_config(key: &'static str, value: serde_json::Value) -> String {
    of_directory("tiny_packed", |directory| directory.config[key] = value)
}

fn of_quantization(key: &'static str, value: serde_json::Value) -> String {
    of_directory("tiny_packed", |directory| {
        directory.config["quantization_config"][key] = value;
    })
}

fn with_pre(pre: &str) -> String {
    of_gguf("tiny_i2s.gguf", |gguf| {
        gguf.set("tokenizer.ggml.model", Meta::String("gpt2".into()));
        gguf.set("tokenizer.ggml.tokens", Meta::Strings(vec!["a".into(), "b".into()]));
        gguf.set("tokenizer.ggml.pre", Meta::String(pre.into()));
    })
}

fn pickled() -> String {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(fixture("tiny_packed/config.json"), dir.path().join("config.json")).unwrap();
    fs::write(dir.path().join("pytorch_model.bin"), b"PK").unwrap();
    reason(dir.path())
}

fn without_i2s() -> String {
    let (dir, i2s_layout) = (tempfile::tempdir().unwrap(), Some(I2sLayout::default()));
    let options = ImportOptions { i2s_layout, ..ImportOptions::default() };
    let result = import(&fixture("tiny_tq1.gguf"), &dir.path().join("s"), &options, &mut |_| {});
    result.unwrap_err().to_string()
}

/// Everything that the page quotes, made anew.
fn refusals() -> Vec<String> {
    let whole = fs::read(fixture("tiny_i2s.gguf")).unwrap();
    let version = |version: [u8; 4]| {
        let mut bytes = whole.clone();
        bytes[4..8].copy_from_slice(&version);
        of_bytes(&bytes)
    };
    let name = "model.layers.0.mlp.up_proj.weight";
    vec![
        of_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        of_bytes(b"PK\x03\x04"),
        version([1, 0, 0, 0]),
        version([0, 0, 0, 3]),
        of_bytes(&whole[..whole.len() - 4096]),
        of_metadata("split.count", Meta::U32(3)),
        pickled(),
        of_metadata("general.architecture", Meta::String("qwen3".into())),
        of_type(38, 256 * 256 / 4 + 32),
        of_type(39, 40_000),
        of_type(42, 256 * 256 / 64 * 18),
        of_type(142, 256 * 256 / 128 * 34),
        of_type(135, 256 * 256 / 4),
        of_type(12, 256 * 256 / 256 * 144),
        of_type(200, 256 * 256 / 4),
        of_gguf("tiny_i2s.gguf", |gguf| {
            gguf.tensors.retain(|tensor| tensor.name != "blk.0.ffn_sub_norm.weight");
        }),
        of_gguf("tiny_i2s.gguf", |gguf| gguf.tensor("blk.0.attn_q.weight").data[0] = 0xff),
        of_gguf("tiny_tq2.gguf", |gguf| gguf.tensor("blk.0.attn_q.weight").data[64] ^= 1),
        of_metadata("prism.hadamard.version", Meta::U32(1)),
        of_metadata("bitnet-b1.58.expert_count", Meta::U32(8)),
        of_metadata("bitnet-b1.58.rope.scaling.type", Meta::String("yarn".into())),
        of_new_tensor("blk.0.attn_q.bias"),
        of_new_tensor("blk.0.ffn_gate_exps.weight"),
        of_new_tensor("blk.0.attn_q_norm.weight"),
        of_new_tensor("blk.0.attn_q_norm_in.weight"),
        with_pre("mpt"),
        without_i2s(),
        of_config("model_type", json!("qwen3")),
        of_config("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0})),
        of_config("attention_bias", json!(true)),
        of_quantization("quant_method", json!("gptq")),
        of_quantization("use_rms_norm", json!(true)),
        of_quantization("modules_to_not_convert", json!(["mlp.down"])),
        of_directory("tiny_packed", |directory| {
            directory.floats("lm_head.weight", FloatType::Bf16, &[512, 256], &[0.0; 512 * 256]);
        }),
        of_directory("tiny_packed", |directory| {
            directory.tensors.remove(&format!("{name}_scale")).unwrap();
        }),
        of_directory("tiny_packed", |directory| {
            directory.floats(&format!("{name}_scale"), FloatType::F32, &[2], &[1.0; 2]);
        }),
        of_directory("tiny_bf16", |directory| {
            let config = directory.config.as_object_mut().unwrap();
            config.remove("quantization_config").unwrap();
            for tensor in directory.tensors.values_mut().filter(|t| t.shape == [256, 256]) {
                let (one, half) = ([0x80, 0x3f], [0x00, 0x3f]);
                tensor.data = [one, half].concat().repeat(256 * 128);
            }
        }),
    ]
}

#[test]
fn the_page_quotes_every_refusal_word_by_word() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/models.md");
    let page = fs::read_to_string(page).unwrap();
    let (_, quotes) = page.split_once("```text\ngit-lfs").expect("the list of refusals");
    let (quotes, _) = quotes.split_once("```").unwrap();
    let quoted: BTreeSet<&str> =
        quotes.lines().filter_map(|line| line.strip_prefix("    ")).collect();
    let said = refusals();
    let said: BTreeSet<&str> = said.iter().map(String::as_str).collect();
    let lines = |of: &BTreeSet<&str>, without| {
        of.difference(without).map(|line| format!("    {line}\n")).collect::<String>()
    };
    let (unquoted, unsaid) = (lines(&said, &quoted), lines(&quoted, &said));
    assert!(unquoted.is_empty(), "not on the page:\n{unquoted}");
    assert!(unsaid.is_empty(), "only on the page:\n{unsaid}");
}
