//! Bad input of every kind: one sentence, no panic, nothing left behind, and no allocation that the
//! file does not justify.

#![allow(clippy::unwrap_used, reason = "a helper of tests may fail like a test")]

#[path = "support/gguf_writer.rs"]
mod gguf_writer;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use gguf_writer::{GgufWriter, Meta, string};
use model::gguf::Gguf;
use model::import::{check_gguf, check_safetensors};
use model::safetensors::Table;
use model::{ImportOptions, Manifest, Store, import, synth};
use proptest::prelude::*;

/// Remembers the largest single allocation of each thread.
struct Counting;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn note(bytes: usize) {
    // A thread that is ending has no counter any more, and no test.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(bytes)));
}

#[expect(unsafe_code, reason = "an allocator that counts")]
// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `dealloc`'s contract.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        note(new_size);
        // SAFETY: the caller keeps `realloc`'s contract.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Room for tables, messages and rows beside what is proportional to the file.
const SMALL_BYTES: usize = 1 << 20;

/// Runs `read` on `bytes` and checks its largest allocation. Returns the refusal, if it refused.
fn refusal<T, E: Error + 'static>(
    bytes: &[u8],
    read: impl FnOnce(&[u8]) -> Result<T, E>,
) -> Option<String> {
    LARGEST.set(0);
    let result = read(bytes);
    let largest = LARGEST.get();
    let justified = 8 * bytes.len() + SMALL_BYTES;
    assert!(largest <= justified, "allocated {largest} bytes for a file of {}", bytes.len());
    result.err().map(|error| chain(&error))
}

fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    assert!(!text.contains('\n'), "one line: {text}");
    text
}

fn check(bytes: &[u8], expected: &str) {
    let text = refusal(bytes, check_gguf).unwrap_or_else(|| panic!("accepted: {expected}"));
    assert!(text.contains(expected), "{text:?} should say {expected:?}");
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

fn read(name: &str) -> Vec<u8> {
    fs::read(fixture(name)).unwrap()
}

/// Header of a GGUF file: magic, version, counts.
fn gguf_header(version: u32, tensors: u64, entries: u64) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend(tensors.to_le_bytes());
    bytes.extend(entries.to_le_bytes());
    bytes
}

/// A metadata entry with raw bytes for its value.
fn entry(key: &str, value_type: u32, value: &[u8]) -> Vec<u8> {
    [string(key), value_type.to_le_bytes().to_vec(), value.to_vec()].concat()
}

/// A tensor's info.
fn info(name: &str, dims: &[u64], tensor_type: u32, offset: u64) -> Vec<u8> {
    let mut bytes = string(name);
    bytes.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
    bytes.extend(tensor_type.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

/// One tensor after no metadata, with `data` bytes of data.
fn one_tensor(info: Vec<u8>, data: usize) -> Vec<u8> {
    let mut bytes = [gguf_header(3, 1, 0), info].concat();
    bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
    bytes
}

/// The cases of llama.cpp's `test-gguf`, and those that it lacks.
#[test]
fn hostile_gguf_headers_are_refused() {
    let with =
        |entries: &[Vec<u8>]| [gguf_header(3, 0, entries.len() as u64), entries.concat()].concat();
    let lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n";
    check(lfs, "git-lfs pointer");
    check(b"", "does not begin with \"GGUF\"");
    check(b"GGU", "does not begin with \"GGUF\"");
    check(b"FUGG0000000000000000", "does not begin with \"GGUF\"");
    check(b"GGUF", "truncated: the version");
    check(&gguf_header(1, 0, 0), "version 1 is not supported");
    check(&gguf_header(0, 0, 0), "version 0 is not supported");
    check(&gguf_header(4, 0, 0), "version 4 is not supported");
    check(&gguf_header(3u32.swap_bytes(), 0, 0), "big-endian");
    check(&gguf_header(3, u64::MAX, 0), "the number of tensors is 18446744073709551615");
    check(&gguf_header(3, 0, u64::MAX), "the number of metadata entries is 1844");
    check(&gguf_header(3, 0, 60_000), "truncated: a metadata key");
    check(&gguf_header(3, 60_000, 0), "truncated: a tensor's name");

    let long_key = [gguf_header(3, 0, 1), u64::MAX.to_le_bytes().to_vec()].concat();
    check(&long_key, "the length of a metadata key is 1844");
    check(&with(&[entry("", 4, &[0; 4])]), "a metadata key is empty");
    check(&with(&[entry("a", 13, &[0; 4])]), "metadata a has type 13");
    let two = with(&[entry("a", 7, &[2])]);
    assert_eq!(Gguf::parse(&two).unwrap().metadata.bool("a").unwrap(), Some(true), "as in C");
    check(&with(&[entry("a", 4, &[0; 4]), entry("a", 4, &[0; 4])]), "metadata key a occurs twice");
    check(&with(&[entry("a", 8, &u64::MAX.to_le_bytes())]), "the length of a is 1844");
    check(&with(&[entry("a", 8, &(1u64 << 20).to_le_bytes())]), "truncated: a needs 1048576");
    let latin1 = [1u64.to_le_bytes().as_slice(), &[0xff]].concat();
    let needed = entry("general.architecture", 8, &latin1);
    check(&with(&[needed]), "general.architecture is not UTF-8");

    // BAD_VALUE_SIZE: arrays of absurd length, of each element type, and of arrays.
    for element in 0..13u32 {
        for count in [u64::MAX, u64::MAX / 8, 1 << 61, 1 << 40, 1 << 32] {
            let array = [&element.to_le_bytes()[..], &count.to_le_bytes()].concat();
            let expected = if element == 9 { "array of arrays" } else { "truncated: array a" };
            check(&with(&[entry("a", 9, &array)]), expected);
        }
    }
    let bad_element = [&99u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
    check(&with(&[entry("a", 9, &bad_element)]), "metadata a has type 99");

    let align = |value_type, value: &[u8]| with(&[entry("general.alignment", value_type, value)]);
    check(&align(4, &0u32.to_le_bytes()), "general.alignment is 0");
    check(&align(4, &13u32.to_le_bytes()), "general.alignment is 13");
    check(&align(4, &(1u32 << 31).to_le_bytes()), "general.alignment is 2147483648");
    check(&align(10, &32u64.to_le_bytes()), "general.alignment has type u64, expected u32");
    check(&align(8, &string("32")), "general.alignment has type string");
    check(&with(&[]), "metadata has no general.architecture");
}

#[test]
fn hostile_gguf_tensors_are_refused() {
    let t = |dims: &[u64], tensor_type, offset, data| {
        one_tensor(info("t", dims, tensor_type, offset), data)
    };
    check(&t(&[], 0, 0, 0), "impossible shape []");
    check(&t(&[1, 1, 1, 1, 1], 0, 0, 32), "the number of dimensions of tensor t is 5");
    check(&t(&[0], 0, 0, 0), "impossible shape [0]");
    check(&t(&[4, 0], 0, 0, 0), "impossible shape [4, 0]");
    check(&t(&[u64::MAX], 0, 0, 0), "impossible shape");
    check(&t(&[1 << 32, 1 << 32], 0, 0, 0), "impossible shape");
    check(&t(&[1 << 62, 4], 0, 0, 0), "impossible shape");
    check(&t(&[1 << 60], 0, 0, 0), "needs 4611686018427387904 bytes, the file has 0");
    check(&t(&[8], 0, 0, 31), "needs 32 bytes, the file has 31");
    assert_eq!(Gguf::parse(&t(&[8], 0, 0, 64)).unwrap().trailing_bytes, 32);
    check(&t(&[8], 0, 32, 64), "begins at byte 32 of the data, expected 0");
    check(&t(&[8], 0, 1, 64), "begins at byte 1 of the data");
    check(&t(&[8], 0, u64::MAX, 64), "begins at byte 1844");
    check(&t(&[100], 35, 0, 66), "100 elements in a row, expected a multiple of 256");
    check(&t(&[100], 36, 0, 66), "100 elements in a tensor, expected a multiple of 128");
    check(&one_tensor(info("", &[8], 0, 0), 32), "a tensor's name is empty");

    // The same numbers mean different things in different forks.
    check(&t(&[128], 38, 0, 64), "type 38 (TL1");
    check(&t(&[64], 39, 0, 34), "type 39 (MXFP4)");
    check(&t(&[256], 39, 0, 640), "type 39 (TL2");
    check(&t(&[64], 42, 0, 18), "type 42 (Q2_0 in groups of 64)");
    check(&t(&[1280], 42, 0, 340), "type 42 (Q2_0 in groups of 128)");
    check(&t(&[256], 42, 0, 640), "type 42 (TL2");
    check(&t(&[256], 143, 0, 56), "type 143 (PQ2_0 or PTQ1_0 of PrismML)");
    check(&t(&[256], 12, 0, 144), "type 12 (a quantised or integer type)");
    check(&t(&[256], 4_000_000, 0, 144), "type 4000000 (unknown)");

    let two = |second: &str, offset| {
        let infos = [info("a", &[8], 0, 0), info(second, &[8], 0, offset)].concat();
        let mut bytes = [gguf_header(3, 2, 0), infos].concat();
        bytes.resize(bytes.len().next_multiple_of(32) + 64, 0);
        bytes
    };
    check(&two("a", 32), "tensor a occurs twice");
    check(&two("b", 0), "needs 32 bytes, the file has 0");
    check(&two("b", 64), "needs 32 bytes, the file has 64");
}

#[test]
fn truncation_anywhere_is_refused() {
    let whole = read("tiny_tq2.gguf");
    check_gguf(&whole).unwrap();
    let header_bytes = 4096;
    for len in (0..header_bytes).chain((header_bytes..whole.len()).step_by(9973)) {
        assert!(refusal(&whole[..len], check_gguf).is_some(), "{len} bytes");
    }
    let config = read("tiny_packed/config.json");
    let whole = read("tiny_packed/model.safetensors");
    check_safetensors(&config, &whole).unwrap();
    for len in (0..header_bytes).chain((header_bytes..whole.len()).step_by(9973)) {
        let text = refusal(&whole[..len], |bytes| check_safetensors(&config, bytes));
        assert!(text.is_some(), "{len} bytes");
    }
}

/// The fixture's metadata and tensors, to be spoilt.
fn writer() -> GgufWriter {
    GgufWriter::of(&read("tiny_i2s.gguf"))
}

#[test]
fn unsupported_gguf_models_are_refused_by_name() {
    let arch = "bitnet-b1.58";
    let set = |key: &str, value: Meta, expected: &str| {
        let mut gguf = writer();
        gguf.metadata.retain(|(k, _)| k != key);
        gguf.metadata.push((key.to_owned(), value));
        check(&gguf.bytes(), expected);
    };
    let key = |key: &str| format!("{arch}.{key}");
    set("general.architecture", Meta::String("maple".into()), "architecture \"maple\"");
    set("general.architecture", Meta::U32(3), "has type u32, expected a string");
    set("prism.hadamard.version", Meta::U32(1), "prism.hadamard.version");
    set("split.count", Meta::U16(3), "a split GGUF file");
    set(&key("expert_count"), Meta::U32(8), "expert_count = 8 is not supported");
    set(&key("rope.scaling.type"), Meta::String("yarn".into()), "rope.scaling.type = yarn");
    set(&key("rope.freq_base"), Meta::F32(f32::NAN), "rope.freq_base is NaN");
    set(&key("rope.dimension_count"), Meta::U32(32), "rope.dimension_count is 32");
    set(&key("block_count"), Meta::U32(0), "the number of layers is 0");
    set(&key("block_count"), Meta::U32(3), "tensor blk.2.attn_q.weight is missing");
    set(&key("block_count"), Meta::U32(1), "tensor blk.1.attn_k.weight is unknown");
    set(&key("block_count"), Meta::U32(4_000_000_000), "the number of layers is 4000000000");
    set(&key("embedding_length"), Meta::U32(512), "the head dimension");
    set(&key("attention.head_count"), Meta::U32(0), "expected a multiple of 0 heads");
    set(&key("attention.head_count"), Meta::I32(-4), "an integer that is not negative");
    set(&key("feed_forward_length"), Meta::U32(512), "expected trits [256, 512]");
    set(&key("vocab_size"), Meta::U32(513), "expected 512, the rows of the embedding");
    set(&key("hidden_activation"), Meta::String("gelu".into()), "expected relu2 or silu");
    set("tokenizer.ggml.bos_token_id", Meta::U32(512), "expected an id below 512");
    set("tokenizer.ggml.model", Meta::String("gpt2".into()), "no tokenizer.ggml.tokens");
    set("tokenizer.chat_template", Meta::U32(1), "has type u32, expected a string");
}

#[test]
fn spoilt_gguf_tensors_are_refused_by_name() {
    let spoil = |spoil: fn(&mut GgufWriter), expected: &str| {
        let mut gguf = writer();
        spoil(&mut gguf);
        check(&gguf.bytes(), expected);
    };
    spoil(
        |g| g.tensor("blk.0.ffn_sub_norm.weight").name = "x".into(),
        "ffn_sub_norm.weight is missing: a model of architecture bitnet-b1.58 without",
    );
    spoil(
        |g| g.tensor("blk.0.attn_q.weight").name = "blk.0.attn_q.bias".into(),
        "attn_q.weight is missing",
    );
    spoil(|g| g.add("blk.0.attn_q.bias", &[256], 0, vec![0; 1024]), "biases are not supported");
    spoil(|g| g.add("blk.0.ffn_gate_inp.weight", &[256], 0, vec![0; 1024]), "mixtures of experts");
    spoil(
        |g| g.tensor("blk.1.ffn_up.weight").data[3] = 0xff,
        "blk.1.ffn_up.weight holds the invalid code 3 in row 0",
    );
    spoil(
        |g| {
            // All codes; the scale behind them stays.
            let data = &mut g.tensor("blk.1.ffn_up.weight").data;
            let codes = data.len() - 32;
            data[..codes].fill(0x55);
        },
        "zeros among 196608 weights",
    );
    spoil(
        |g| g.tensor("output_norm.weight").data[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
        "output_norm.weight holds a number that is not finite",
    );
    spoil(|g| g.tensor("token_embd.weight").data[1] = 0x7c, "token_embd.weight holds a number");
    spoil(
        |g| {
            let q = g.tensor("blk.0.attn_q.weight");
            let scale = q.data.len() - 32;
            q.data[scale..scale + 4].copy_from_slice(&(-1.0f32).to_le_bytes());
        },
        "blk.0.attn_q.weight has the scale -1",
    );
    spoil(
        |g| g.tensor("blk.0.attn_q.weight").dims = vec![128, 512],
        "is I2_S [128, 512], expected trits [256, 256]",
    );

    let mut tq2 = GgufWriter::of(&read("tiny_tq2.gguf"));
    tq2.tensor("blk.0.attn_k.weight").data[64] ^= 1;
    check(&tq2.bytes(), "blk.0.attn_k.weight of type TQ2_0 has blocks of different scales");
}

/// Imports a copy of a Hugging Face fixture after `spoil` had its way with the directory.
fn spoilt(name: &str, spoil: impl FnOnce(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), source.join(entry.file_name())).unwrap();
    }
    spoil(&source);
    let dest = dir.path().join("dest");
    let result = import(&source, &dest, &ImportOptions::default(), &mut |_| {});
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "nothing is left behind: {left:?}");
    chain(&result.expect_err("it is bad"))
}

fn replace(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from}");
    fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn bad_hugging_face_directories_are_refused() {
    let config = |from: &'static str, to: &'static str, expected: &str| {
        let text = spoilt("tiny_packed", |dir| replace(&dir.join("config.json"), from, to));
        assert!(text.contains(expected), "{text:?} should say {expected:?}");
    };
    config("{", "", "failed to use");
    config(
        "\"bitnet\",\n \"vocab",
        "\"gemma\",\n \"vocab",
        "model_type \"gemma\" is not supported",
    );
    config("\"vocab_size\": 512,", "", "config.json has no vocab_size");
    config(
        "\"vocab_size\": 512",
        "\"vocab_size\": 513",
        "BF16 [512, 256], expected floats of [513, 256]",
    );
    config("\"vocab_size\": 512", "\"vocab_size\": -1", "invalid value");
    config("\"vocab_size\": 512", "\"vocab_size\": 99999999999", "expected at most");
    config(
        "\"num_hidden_layers\": 2",
        "\"num_hidden_layers\": 3",
        "model.layers.2.self_attn.q_proj.weight is missing",
    );
    config("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1", "tensor model.layers.1.");
    config(
        "\"num_attention_heads\": 4",
        "\"num_attention_heads\": 0",
        "expected a multiple of 0 heads",
    );
    config("relu2", "gelu", "hidden_act is \"gelu\"");
    config(
        "\"attention_bias\": false",
        "\"attention_bias\": true",
        "attention_bias is not supported",
    );
    config(
        "\"use_cache\": true",
        "\"rope_scaling\": {\"type\": \"yarn\"}",
        "rope_scaling yarn is not supported",
    );
    config("\"use_cache\": true", "\"sliding_window\": 512", "sliding_window is not supported");
    config("\"quant_method\": \"bitnet\"", "\"quant_method\": \"gptq\"", "quant_method \"gptq\"");
    config(
        "\"quant_method\"",
        "\"use_rms_norm\": true, \"quant_method\"",
        "use_rms_norm is not supported",
    );
    config(
        "\"quant_method\"",
        "\"modules_to_not_convert\": [\"mlp\"], \"quant_method\"",
        "modules_to_not_convert leaves model.layers.0.mlp.gate_proj",
    );
    config("\"eos_token_id\": 2", "\"eos_token_id\": 512", "special token 512");
    config(
        "\"tie_word_embeddings\": true",
        "\"tie_word_embeddings\": false",
        "lm_head.weight is missing",
    );

    let index = |map: &str, expected: &str| {
        let map = map.to_owned();
        let text = spoilt("tiny_packed", |dir| {
            // Beside a whole file no index counts.
            fs::rename(dir.join("model.safetensors"), dir.join("part.safetensors")).unwrap();
            fs::write(dir.join("model.safetensors.index.json"), map).unwrap();
        });
        assert!(text.contains(expected), "{text:?} should say {expected:?}");
    };
    index(
        r#"{"weight_map":{"a":"../model.safetensors"}}"#,
        "names the file \"../model.safetensors\"",
    );
    index(r#"{"weight_map":{"a":"/etc/x.safetensors"}}"#, "names the file");
    index(r#"{"weight_map":{"a":"x/y.safetensors"}}"#, "names the file");
    index(r#"{"weight_map":{"a":"config.json"}}"#, "names the file \"config.json\"");
    index(r#"{"weight_map":{"a":"absent.safetensors"}}"#, "names absent.safetensors, which is not");
    index(r#"{"weight_map":{"a":"part.safetensors"}}"#, "tensor a in part.safetensors is missing");
    index(r#"{"weight_map":{}}"#, "the number of files");
    index("[", "failed to use");
    index(&"[".repeat(100_000), "failed to use");

    let text = spoilt("tiny_packed", |dir| {
        fs::write(dir.join("model.safetensors"), "version https://git-lfs.github.com/spec/v1\n")
            .unwrap();
    });
    assert!(
        text.ends_with("git-lfs pointer, not the data: fetch it with `git lfs pull`"),
        "{text}"
    );
    let text = spoilt("tiny_packed", |dir| fs::remove_file(dir.join("model.safetensors")).unwrap());
    assert!(text.contains("has no model.safetensors"), "{text}");
    let text = spoilt("tiny_packed", |dir| fs::remove_file(dir.join("config.json")).unwrap());
    assert!(text.contains("neither a GGUF file nor a directory"), "{text}");
    let text = spoilt("tiny_packed", |dir| {
        fs::write(dir.join("tokenizer.json"), r#"{"model":{"vocab":{"a":512}}}"#).unwrap();
    });
    assert!(text.contains("it has token 512"), "{text}");
    let text = spoilt("tiny_packed", |dir| {
        let path = dir.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let name = b"layers.0.mlp.gate_proj.weight_scale";
        let at = bytes.windows(name.len()).position(|window| window == name).unwrap();
        bytes[at..at + 10].copy_from_slice(b"layers.0.x");
        fs::write(&path, bytes).unwrap();
    });
    assert!(text.contains("gate_proj.weight_scale is missing"), "{text}");
}

#[test]
fn a_hub_id_and_a_taken_destination_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let options = ImportOptions::default();
    let hub = Path::new("microsoft/bitnet-b1.58-2B-4T");
    let error = import(hub, &dir.path().join("a"), &options, &mut |_| {}).unwrap_err();
    assert!(chain(&error).contains("a model of a hub must be downloaded first"));
    let error = import(&fixture("tiny_packed"), dir.path(), &options, &mut |_| {}).unwrap_err();
    assert!(chain(&error).contains("already exists"));
    let nowhere = dir.path().join("no/where");
    let error = import(&fixture("tiny_packed"), &nowhere, &options, &mut |_| {}).unwrap_err();
    assert!(chain(&error).contains("failed to create"), "{}", chain(&error));
}

/// A full disk, as a limit on the size of files that a child of this test meets.
#[test]
fn a_full_disk_leaves_nothing_behind() {
    const CHILD: &str = "TERCET_TEST_FULL_DISK";
    if let Some(dest) = std::env::var_os(CHILD) {
        let dest = PathBuf::from(dest);
        let error = import(&fixture("tiny_packed"), &dest, &ImportOptions::default(), &mut |_| {});
        let text = chain(&error.unwrap_err());
        assert!(text.starts_with("failed to write the store: failed to write "), "{text}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // The signal that goes with the limit is ignored, so that writing fails as on a full disk.
    let status = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\""])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "a_full_disk_leaves_nothing_behind"])
        .env(CHILD, dir.path().join("store"))
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn damaged_stores_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("store");
    synth(&"2x64x128x2x1x40".parse().unwrap(), 1, &dest, &mut |_| {}).unwrap();
    let problem = |expected: &str| {
        let found = Store::open(&dest).and_then(|store| store.verify(|_| {}));
        let text = chain(&found.unwrap_err());
        assert!(text.contains(expected), "{text:?} should say {expected:?}");
    };
    let restore = |name: &str, spoil: &dyn Fn(&mut Vec<u8>), expected: &str| {
        let path = dest.join(name);
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        spoil(&mut bad);
        fs::write(&path, bad).unwrap();
        problem(expected);
        fs::write(&path, good).unwrap();
    };
    let layer = "layer-0001.safetensors";
    restore(layer, &|bytes| *bytes.last_mut().unwrap() ^= 1, "has hash");
    restore(layer, &|bytes| bytes.truncate(100), "has 100 bytes, the manifest says");
    restore(layer, &|bytes| bytes.push(0), "the manifest says");
    restore("manifest.json", &|bytes| bytes.truncate(100), "not a manifest");
    let edit = |from: &'static str, to: &'static str| {
        move |bytes: &mut Vec<u8>| {
            let text = String::from_utf8(bytes.clone()).unwrap();
            assert!(text.contains(from), "{from}");
            *bytes = text.replacen(from, to, 1).into_bytes();
        }
    };
    let manifest = "manifest.json";
    restore(manifest, &edit("\"format\": 1", "\"format\": 0"), "import the model again");
    restore(manifest, &edit("\"version\": 2", "\"version\": 1"), "import the model again");
    restore(manifest, &edit("embed.safetensors", "../embed"), "file ../embed in place of embed");
    restore(manifest, &edit("\"layers\": 2", "\"layers\": 3"), "file none in place of layer-0002");
    restore(manifest, &edit("\"layers\": 2", "\"layers\": 99999999"), "the number of layers is");
    restore(manifest, &edit("\"context\": 4096", "\"context\": 4095"), "damaged or was edited");
    let other_context = |seal: fn(Manifest) -> Manifest| {
        move |bytes: &mut Vec<u8>| {
            edit("\"context\": 4096", "\"context\": 4095")(bytes);
            let changed: Manifest = serde_json::from_slice(bytes).unwrap();
            *bytes = serde_json::to_vec(&seal(changed)).unwrap();
        }
    };
    restore(manifest, &other_context(Manifest::with_digest), "its manifest says");
    let without = |changed| Manifest { digest: None, ..changed };
    restore(manifest, &other_context(without), "its manifest says");
    restore(manifest, &edit("\"context\"", "\"surprise\": 1, \"context\""), "unknown field");
    fs::remove_file(dest.join(layer)).unwrap();
    problem("failed to read");
    fs::remove_file(dest.join(manifest)).unwrap();
    problem("is not a model store: it has no manifest.json");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn changed_gguf_files_never_panic(
        changes in prop::collection::vec((0usize..3000, any::<u8>()), 1..8),
        cut in prop::option::of(0usize..600_000),
    ) {
        let mut bytes = read("tiny_tq1.gguf");
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        bytes.truncate(cut.unwrap_or(bytes.len()));
        refusal(&bytes, |bytes| Gguf::parse(bytes).map(|_| ()));
        refusal(&bytes, check_gguf);
    }

    #[test]
    fn changed_safetensors_files_never_panic(
        changes in prop::collection::vec((0usize..4000, any::<u8>()), 1..8),
        cut in prop::option::of(0usize..600_000),
    ) {
        let config = read("tiny_packed/config.json");
        let mut bytes = read("tiny_packed/model.safetensors");
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        bytes.truncate(cut.unwrap_or(bytes.len()));
        refusal(&bytes, |bytes| Table::parse(bytes).map(|_| ()));
        refusal(&bytes, |bytes| check_safetensors(&config, bytes));
    }

    #[test]
    fn changed_configs_never_panic(at in 0usize..600, byte in any::<u8>()) {
        let mut config = read("tiny_packed/config.json");
        config[at] = byte;
        let file = read("tiny_packed/model.safetensors");
        refusal(&file, |file| check_safetensors(&config, file));
        refusal(&config, |config| Manifest::parse(config).map(|_| ()));
    }
}

#[test]
fn a_store_that_is_not_there_is_told_from_a_directory_that_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let missing = model::Store::open(&dir.path().join("nostore")).unwrap_err();
    let words = missing.to_string();
    assert!(words.starts_with("there is no directory ") && words.ends_with("nostore"), "{words}");
    let empty = model::Store::open(dir.path()).unwrap_err().to_string();
    assert!(empty.contains("is not a model store: it has no manifest.json"), "{empty}");
}
