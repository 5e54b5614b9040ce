//! GGUF files of every kind: architectures, versions, float types, scales, permuted rows.

#![allow(clippy::unwrap_used, reason = "a helper of tests may fail like a test")]

#[path = "support/gguf_writer.rs"]
mod gguf_writer;
#[path = "support/stores.rs"]
mod stores;

use std::fs;
use std::path::Path;

use gguf_writer::{GgufWriter, Meta};
use kernels::FloatKind;
use model::{Activation, I2sLayout, ImportOptions};
use stores::Stored;

fn fixture(name: &str) -> GgufWriter {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
    GgufWriter::of(&fs::read(path).unwrap())
}

fn imported(gguf: &GgufWriter) -> Stored {
    Stored::of_gguf(&gguf.bytes())
}

/// Renames the architecture of every key.
fn with_architecture(mut gguf: GgufWriter, name: &str) -> GgufWriter {
    for (key, _) in &mut gguf.metadata {
        *key = key.replacen("bitnet-b1.58.", &format!("{name}."), 1);
    }
    gguf.set("general.architecture", Meta::String(name.into()));
    gguf
}

/// Reorders the rows of a head as llama.cpp's converter does: it sees them as `[2][d/2]` and
/// swaps the two axes.
fn permute(gguf: &mut GgufWriter, name: &str, row_bytes: usize, heads: usize) {
    let tensor = gguf.tensor(name);
    let rows = tensor.dims[1] as usize;
    let half = rows / heads / 2;
    let row = |index: usize| tensor.data[index * row_bytes..][..row_bytes].to_vec();
    let mut stored = Vec::new();
    for head in 0..heads {
        for j in 0..half {
            for b in 0..2 {
                stored.extend(row((head * 2 + b) * half + j));
            }
        }
    }
    tensor.data[..rows * row_bytes].copy_from_slice(&stored);
}

#[test]
fn permuted_queries_and_keys_are_put_back() {
    // The bytes of a row of 256 trits, in each type; in I2_S, rows are whole blocks.
    for (name, row_bytes) in [("tiny_i2s.gguf", 64), ("tiny_tq1.gguf", 54), ("tiny_tq2.gguf", 66)] {
        for (heads, kv_heads) in [(4, 1), (8, 2), (16, 4)] {
            let mut plain = fixture(name);
            let head_dim = 256 / heads as u32;
            for (key, value) in [
                ("attention.head_count", heads as u32),
                ("attention.head_count_kv", kv_heads as u32),
                ("rope.dimension_count", head_dim),
            ] {
                plain.set(&format!("bitnet-b1.58.{key}"), Meta::U32(value));
            }
            let expected = imported(&plain);
            let mut llama = with_architecture(plain, "llama");
            llama.tensors.retain(|tensor| !tensor.name.contains("_sub_norm"));
            for layer in 0..2 {
                permute(&mut llama, &format!("blk.{layer}.attn_q.weight"), row_bytes, heads);
                permute(&mut llama, &format!("blk.{layer}.attn_k.weight"), row_bytes, kv_heads);
            }
            let found = imported(&llama);
            for layer in 0..2 {
                assert_eq!(found.matrices(layer), expected.matrices(layer), "{name} {heads}");
            }
            let config = found.store.config();
            assert_eq!((config.heads, config.kv_heads), (heads as u32, kv_heads as u32));
            assert_eq!((config.head_dim, config.sub_norms), (head_dim, false));
            assert_eq!(config.activation, Activation::Silu);
            assert!(found.notes("put back to rotate-half"));
        }
    }
}

#[test]
fn the_first_model_architecture_is_silu() {
    let mut gguf = with_architecture(fixture("tiny_tq2.gguf"), "bitnet");
    let config = imported(&gguf).store.config().clone();
    assert_eq!((config.activation, config.sub_norms), (Activation::Silu, true));
    gguf.set("bitnet.hidden_activation", Meta::String("relu2".into()));
    assert_eq!(imported(&gguf).store.config().activation, Activation::SquaredRelu);
}

#[test]
fn a_missing_rope_base_is_llamas_where_the_family_has_one() {
    let without = |architecture: &str| {
        let mut gguf = with_architecture(fixture("tiny_tq2.gguf"), architecture);
        gguf.metadata.retain(|(key, _)| !key.ends_with("rope.freq_base"));
        gguf
    };
    let stored = imported(&without("bitnet"));
    let expected = 10_000f64.powf(-2.0 / 64.0) as f32;
    assert_eq!(stored.store.config().rope_inverse_frequencies[1], expected);
    assert!(stored.notes("rope.freq_base is not given"));
    let error = model::import::check_gguf(&without("bitnet-25").bytes()).unwrap_err();
    assert_eq!(error.to_string(), "metadata has no bitnet-25.rope.freq_base");
}

#[test]
fn the_first_revision_of_2b4t_has_a_copy_of_its_embedding() {
    let plain = imported(&fixture("tiny_i2s.gguf"));
    let mut first = with_architecture(fixture("tiny_i2s.gguf"), "bitnet-25");
    let data = first.tensor("token_embd.weight").data.clone();
    first.add("output.weight", &[256, 512], 1, data);
    let stored = imported(&first);
    assert_eq!(stored.imported.id, plain.imported.id);
    assert_eq!(stored.store.config().activation, Activation::SquaredRelu);
    assert!(stored.notes("whose copy output.weight was left out"));

    // Another value in it, and it is a head of its own.
    first.tensor("output.weight").data[0] ^= 1;
    let stored = imported(&first);
    assert!(!stored.store.config().tied_head);
    assert_ne!(stored.imported.id, plain.imported.id);
    let ((_, embedding), (_, head)) = (stored.embedding(), stored.head());
    assert_ne!(head[0], embedding[0]);
    assert_eq!(head[1..], embedding[1..]);
}

#[test]
fn version_2_is_read_like_version_3() {
    let mut bytes = fixture("tiny_tq1.gguf").bytes();
    let expected = Stored::of_gguf(&bytes);
    assert_eq!(bytes[4], 3);
    bytes[4] = 2;
    assert_eq!(Stored::of_gguf(&bytes).imported.id, expected.imported.id);
}

#[test]
fn the_same_content_has_the_same_id_in_any_float_type() {
    let f16 = fixture("tiny_i2s.gguf");
    let first = imported(&f16);
    let (kind, values) = first.embedding();
    assert_eq!(kind, FloatKind::F16);

    // The same values as f32 are stored as the 16-bit type that holds them all, here bf16.
    let mut f32 = f16.clone();
    let tensor = f32.tensor("token_embd.weight");
    tensor.tensor_type = 0;
    tensor.data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let second = imported(&f32);
    assert_eq!(second.imported.id, first.imported.id);
    assert_eq!(second.embedding(), (FloatKind::Bf16, values));

    let mut other = f16.clone();
    other.tensor("token_embd.weight").data[0] ^= 1;
    assert_ne!(imported(&other).imported.id, first.imported.id);
}

#[test]
fn floats_that_fit_no_16_bit_type_are_rounded_and_said_to_be() {
    let with = |value: f32| {
        let mut gguf = fixture("tiny_i2s.gguf");
        let tensor = gguf.tensor("token_embd.weight");
        tensor.tensor_type = 0;
        tensor.data = vec![0; 512 * 256 * 4];
        tensor.data[..4].copy_from_slice(&value.to_le_bytes());
        imported(&gguf)
    };
    let first = |stored: &Stored| {
        let (kind, values) = stored.embedding();
        (kind, values[0])
    };
    let stored = with(0.1);
    assert_eq!(first(&stored), (FloatKind::F16, 0.099_975_586));
    assert!(stored.notes("token_embd.weight was rounded from F32 to f16"));
    let stored = with(100_001.0);
    assert_eq!(first(&stored), (FloatKind::Bf16, 99_840.0));
    assert!(stored.notes("rounded from F32 to bf16"));
    let stored = with(0.5);
    assert_eq!(first(&stored), (FloatKind::Bf16, 0.5));
    assert!(!stored.notes("rounded"));
}

/// Decodes Q6_K in the order in which ggml goes: four numbers at a time, two halves a block.
fn decode_q6_k(bytes: &[u8]) -> Vec<f64> {
    let mut values = Vec::new();
    for block in bytes.chunks(210) {
        let d = half::f16::from_le_bytes([block[208], block[209]]).to_f64();
        for part in 0..2 {
            let (ql, qh) = (&block[64 * part..][..64], &block[128 + 32 * part..][..32]);
            let scale = |index: usize| f64::from(block[192 + 8 * part + index] as i8) * d;
            let mut out = [0.0; 128];
            for l in 0..32 {
                let quant = |low: u8, shift: u8| {
                    f64::from(i32::from(low | ((qh[l] >> shift) & 3) << 4) - 32)
                };
                out[l] = scale(l / 16) * quant(ql[l] & 15, 0);
                out[l + 32] = scale(l / 16 + 2) * quant(ql[l + 32] & 15, 2);
                out[l + 64] = scale(l / 16 + 4) * quant(ql[l] >> 4, 4);
                out[l + 96] = scale(l / 16 + 6) * quant(ql[l + 32] >> 4, 6);
            }
            values.extend(out);
        }
    }
    values
}

fn decode_q8_0(bytes: &[u8]) -> Vec<f64> {
    let block = |block: &[u8]| {
        let d = half::f16::from_le_bytes([block[0], block[1]]).to_f64();
        block[2..].iter().map(|q| f64::from(*q as i8) * d).collect::<Vec<_>>()
    };
    bytes.chunks(34).flat_map(block).collect()
}

/// Bytes without a pattern.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Blocks of noise whose f16 scale, at byte `at`, is about a hundredth.
fn blocks(block_bytes: usize, at: usize) -> Vec<u8> {
    let mut bytes = noise(512 * 256 / if block_bytes == 34 { 32 } else { 256 } * block_bytes);
    for block in bytes.chunks_mut(block_bytes) {
        block[at + 1] = 0x20 | block[at + 1] & 1;
    }
    bytes
}

#[test]
fn q6_k_and_q8_0_embeddings_and_heads_hold_the_rounded_values() {
    let (q6_k, q8_0) = (blocks(210, 208), blocks(34, 0));
    let rounded = |values: Vec<f64>| -> Vec<f32> {
        values.into_iter().map(|value| half::f16::from_f64(value).to_f32()).collect()
    };
    let (of_q6_k, of_q8_0) = (rounded(decode_q6_k(&q6_k)), rounded(decode_q8_0(&q8_0)));
    let formats = [(14, "Q6_K", q6_k, of_q6_k), (8, "Q8_0", q8_0, of_q8_0)];
    for (embedding, head) in [(0, 1), (1, 0)] {
        let mut gguf = fixture("tiny_i2s.gguf");
        let (tensor_type, name, bytes, expected) = &formats[embedding];
        let tensor = gguf.tensor("token_embd.weight");
        (tensor.tensor_type, tensor.data) = (*tensor_type, bytes.clone());
        let tied = imported(&gguf);
        assert_eq!(tied.embedding(), (FloatKind::F16, expected.clone()), "{name}");
        assert!(tied.notes(&format!("token_embd.weight was rounded from {name} to f16")));

        let (tensor_type, name, bytes, of_head) = &formats[head];
        gguf.add("output.weight", &[256, 512], *tensor_type, bytes.clone());
        let untied = imported(&gguf);
        assert_eq!(untied.embedding(), (FloatKind::F16, expected.clone()), "{name}");
        assert_eq!(untied.head(), (FloatKind::F16, of_head.clone()), "{name}");
    }
}

#[test]
fn q8_0_that_f16_holds_is_not_rounded() {
    let mut gguf = fixture("tiny_i2s.gguf");
    let tensor = gguf.tensor("token_embd.weight");
    tensor.tensor_type = 8;
    // d = 1/128.
    let block = [&0x2000u16.to_le_bytes()[..], &[3u8; 32]].concat();
    tensor.data = block.repeat(512 * 256 / 32);
    let stored = imported(&gguf);
    assert!(stored.embedding().1.iter().all(|value| *value == 3.0 / 128.0));
    assert!(!stored.notes("rounded"));
}

/// Replaces a matrix of the first layer by floats: `magnitude` for a trit of 1.
fn as_floats(gguf: &mut GgufWriter, name: &str, trits: &[i8], tensor_type: u32, magnitude: f32) {
    let tensor = gguf.tensor(name);
    tensor.tensor_type = tensor_type;
    let values = trits.iter().map(|trit| f32::from(*trit) * magnitude);
    tensor.data = match tensor_type {
        0 => values.flat_map(f32::to_le_bytes).collect(),
        1 => values.flat_map(|value| half::f16::from_f32(value).to_le_bytes()).collect(),
        _ => values.flat_map(|value| half::bf16::from_f32(value).to_le_bytes()).collect(),
    };
}

#[test]
fn ternary_floats_are_the_packed_matrix() {
    let mut packed = fixture("tiny_tq2.gguf");
    for block in packed.tensor("blk.0.ffn_down.weight").data.chunks_mut(66) {
        block[64..].copy_from_slice(&half::f16::from_f32(0.375).to_le_bytes());
    }
    let expected = imported(&packed);
    let (trits, scale) = expected.matrices(0).remove(6);
    assert_eq!(scale, 0.375);
    for tensor_type in [0, 1, 30] {
        let mut floats = packed.clone();
        as_floats(&mut floats, "blk.0.ffn_down.weight", &trits, tensor_type, 0.375);
        assert_eq!(imported(&floats).imported.id, expected.imported.id, "type {tensor_type}");
    }
}

#[test]
fn scale_tensors_multiply_whatever_scale_is_inside() {
    let plain = fixture("tiny_i2s.gguf");
    let q = imported(&plain).matrices(0).remove(0);
    let scaled = |mut gguf: GgufWriter| {
        gguf.add("blk.0.attn_q.scale", &[1], 0, 0.5f32.to_le_bytes().to_vec());
        imported(&gguf).matrices(0).remove(0)
    };
    assert_eq!(scaled(plain.clone()), (q.0.clone(), q.1 * 0.5));
    // Unit trits stored as floats, and floats with a magnitude of their own.
    for magnitude in [1.0, 0.25] {
        let mut floats = plain.clone();
        as_floats(&mut floats, "blk.0.attn_q.weight", &q.0, 0, magnitude);
        assert_eq!(scaled(floats), (q.0.clone(), magnitude * 0.5));
    }
}

/// Reorders the codes of every I2_S tensor from 128 in 32 bytes to 64 in 16 bytes.
fn repack_64x16(gguf: &mut GgufWriter) {
    for tensor in gguf.tensors.iter_mut().filter(|tensor| tensor.tensor_type == 36) {
        let len = tensor.data.len() - 32;
        let code = |i: usize| tensor.data[i / 128 * 32 + i % 32] >> (6 - i % 128 / 32 * 2) & 3;
        let mut repacked = vec![0u8; len];
        for i in 0..len * 4 {
            repacked[i / 64 * 16 + i % 16] |= code(i) << (6 - i % 64 / 16 * 2);
        }
        tensor.data[..len].copy_from_slice(&repacked);
    }
}

#[test]
fn the_layout_of_arm_builds_is_read_when_it_is_asked_for() {
    let plain = fixture("tiny_i2s.gguf");
    let expected = imported(&plain);
    let mut arm = plain.clone();
    repack_64x16(&mut arm);
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("model.gguf");
    fs::write(&source, arm.bytes()).unwrap();
    let with = |i2s_layout: Option<I2sLayout>| {
        Stored::import_with(&source, &ImportOptions { i2s_layout, ..ImportOptions::default() })
    };
    let asked = with(Some("64x16".parse().unwrap())).unwrap();
    assert_eq!(asked.imported.id, expected.imported.id);
    assert!(asked.notes("layout of I2_S: 64x16, as chosen"));

    // Nothing is guessed: without being asked, the usual layout is read, and the model is another.
    let unasked = with(None).unwrap();
    assert_ne!(unasked.imported.id, expected.imported.id);
    assert_eq!(with(Some(I2sLayout::default())).unwrap().imported.id, unasked.imported.id);
    assert_eq!(
        "16x64".parse::<I2sLayout>().unwrap_err().to_string(),
        "layout \"16x64\" is neither 128x32 nor 64x16"
    );

    // It is refused where there is nothing that it could apply to.
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let options =
        ImportOptions { i2s_layout: Some(I2sLayout::default()), ..ImportOptions::default() };
    for name in ["tiny_tq2.gguf", "tiny_packed"] {
        let error = Stored::import_with(&fixtures.join(name), &options).err().unwrap();
        assert_eq!(
            error.to_string(),
            "the model has no I2_S tensors: no layout can be chosen for them"
        );
    }
}
