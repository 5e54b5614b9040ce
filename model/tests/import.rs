//! Importing every fixture: what comes out is what went in, whatever container it came in.

#![allow(clippy::unwrap_used, reason = "a helper of tests may fail like a test")]

use std::path::{Path, PathBuf};

use model::{Activation, ImportOptions, Imported, LayerWeights, Store, import, import_bundled};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// Imports a fixture and verifies the store.
fn imported(name: &str, dir: &Path) -> (Imported, Store) {
    let dest = dir.join(name);
    let mut reports = 0;
    let result = import(&fixture(name), &dest, &ImportOptions::default(), &mut |progress| {
        assert!(progress.done <= progress.total);
        reports += 1;
    });
    let imported = result.unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(reports > 4, "{name}");
    let store = Store::open(&dest).unwrap();
    store.verify(|_| {}).unwrap();
    assert_eq!(store.id(), imported.id);
    (imported, store)
}

/// All trits of a layer, matrix by matrix, and all scales.
fn trits(weights: LayerWeights<'_>) -> (Vec<Vec<i8>>, Vec<f32>) {
    let LayerWeights { q, k, v, o, gate, up, down, .. } = weights;
    let matrices = [q, k, v, o, gate, up, down];
    let all = matrices.map(|matrix| {
        let mut trits = vec![0; matrix.rows() * matrix.cols()];
        for (row, out) in trits.chunks_mut(matrix.cols()).enumerate() {
            matrix.unpack_row(row, out);
        }
        trits
    });
    (all.to_vec(), matrices.map(|matrix| matrix.scale()).to_vec())
}

fn embedding(store: &Store) -> Vec<f32> {
    let shard = store.embedding().unwrap();
    let matrix = shard.matrix();
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    for (row, out) in values.chunks_mut(matrix.cols()).enumerate() {
        matrix.widen_row(row, out);
    }
    values
}

#[test]
fn every_fixture_imports_with_its_own_rules() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("tiny_bf16", "safetensors BF16 masters, ternary by their mean magnitude"),
        ("tiny_packed", "safetensors packed uint8, scales multiply"),
        ("tiny_llama", "safetensors packed uint8, scales divide"),
        ("tiny_i2s.gguf", "gguf I2_S"),
        ("tiny_tq1.gguf", "gguf TQ1_0"),
        ("tiny_tq2.gguf", "gguf TQ2_0"),
    ];
    for (name, format) in cases {
        let (imported, store) = imported(name, dir.path());
        assert_eq!(imported.format, format);
        let config = store.config();
        let is_llama = name == "tiny_llama";
        assert_eq!(config.tied_head, !is_llama, "{name}");
        assert_eq!(config.sub_norms, !is_llama, "{name}");
        assert_eq!(config.activation == Activation::Silu, is_llama, "{name}");
        let shape = (config.layers, config.hidden, config.ffn, config.heads, config.kv_heads);
        assert_eq!(shape, (2, 256, 768, 4, 1), "{name}");
        assert_eq!((config.vocab, config.head_dim, config.context), (512, 64, 128), "{name}");
        assert_eq!(config.rms_eps, 1e-5, "{name}");
        assert_eq!(config.rope_inverse_frequencies[1].to_bits(), 0x3f29_e1c5, "{name}");
        assert!(!imported.notes.is_empty());
        assert!(store.layer(2).is_err());
    }
}

#[test]
fn all_containers_hold_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let (_, packed) = imported("tiny_packed", dir.path());
    for name in ["tiny_i2s.gguf", "tiny_tq1.gguf", "tiny_tq2.gguf"] {
        let (_, store) = imported(name, dir.path());
        for layer in 0..2 {
            let (ours, theirs) = (packed.layer(layer).unwrap(), store.layer(layer).unwrap());
            let (ours, theirs) = (ours.weights(), theirs.weights());
            assert_eq!(trits(ours).0, trits(theirs).0, "{name}");
            for (ours, theirs) in trits(ours).1.into_iter().zip(trits(theirs).1) {
                // TQ types round the scale to f16.
                assert!((ours - theirs).abs() <= ours * 1e-3, "{name}: {ours} {theirs}");
            }
            assert_eq!(ours.attn_norm, theirs.attn_norm);
            assert_eq!(ours.attn_sub_norm, theirs.attn_sub_norm);
            assert_eq!(ours.ffn_sub_norm, theirs.ffn_sub_norm);
        }
        // The GGUF files hold the embedding as f16: bf16 values below its normal range are rounded.
        for (ours, theirs) in embedding(&packed).into_iter().zip(embedding(&store)) {
            assert!((ours - theirs).abs() < 3.1e-8, "{name}: {ours} {theirs}");
        }
        assert_eq!(
            packed.final_norm().unwrap().weight(),
            store.final_norm().unwrap().weight(),
            "{name}"
        );
    }
}

#[test]
fn the_bundled_model_is_made_once_and_by_many_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let stores: Vec<PathBuf> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| import_bundled(&cache))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect()
    });
    assert!(stores.iter().all(|store| *store == stores[0]));
    let store = Store::open(&stores[0]).unwrap();
    store.verify(|_| {}).unwrap();
    let config = store.config();
    assert_eq!((config.bos_token, config.add_bos), (Some(0), true));
    assert_eq!(config.eos_tokens, [1, 2]);
    let manifest = store.manifest();
    assert_eq!(manifest.bos_token_text.as_deref(), Some("<|begin_of_text|>"));
    assert!(manifest.chat_template.as_deref().unwrap().contains("<|eot_id|>"));
    assert!(store.tokenizer_json().unwrap().is_some());
    let left: Vec<_> = std::fs::read_dir(&cache).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");

    // Damage is noticed and repaired.
    std::fs::remove_file(stores[0].join("norm.safetensors")).unwrap();
    Store::open(&import_bundled(&cache).unwrap()).unwrap();
    // So is a wrong bit in a file of the right length.
    let layer = stores[0].join("layer-0001.safetensors");
    let mut bytes = std::fs::read(&layer).unwrap();
    bytes[5000] ^= 8;
    std::fs::write(&layer, bytes).unwrap();
    Store::open(&import_bundled(&cache).unwrap()).unwrap().verify(|_| {}).unwrap();
}
