//! The layout of a store: what it has no influence on, and what is said to another one.

#![allow(clippy::unwrap_used, reason = "a helper of tests may fail like a test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use model::safetensors::Table;
use model::synth::SynthFamily;
use model::{Manifest, Store, SynthShape, import_bundled, synth};
use serde_json::json;

/// A random store.
fn tiny(dir: &Path) -> PathBuf {
    let dest = dir.join("store");
    synth(&"tiny".parse().unwrap(), 0, &dest, &mut |_| {}).unwrap();
    dest
}

/// Why a store cannot be verified, causes and all.
fn failure(store: &Path) -> String {
    let result = Store::open(store).and_then(|store| store.verify(|_| {}));
    let mut error: &dyn std::error::Error = &result.unwrap_err();
    let mut text = error.to_string();
    while let Some(source) = error.source() {
        text = format!("{text}: {source}");
        error = source;
    }
    text
}

/// Changes the bytes of a file of the store, and in the manifest the hash of the file and the digest.
fn exchange(store: &Path, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let (path, manifest) = (store.join(name), store.join("manifest.json"));
    let mut bytes = fs::read(&path).unwrap();
    let old = blake3::hash(&bytes).to_hex();
    change(&mut bytes);
    fs::write(path, &bytes).unwrap();
    let text = fs::read_to_string(&manifest).unwrap();
    let text = text.replace(old.as_str(), blake3::hash(&bytes).to_hex().as_str());
    let changed: Manifest = serde_json::from_str(&text).unwrap();
    fs::write(manifest, serde_json::to_vec_pretty(&changed.with_digest()).unwrap()).unwrap();
}

fn replace(bytes: &mut [u8], from: &str, to: &str) {
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
}

#[test]
fn ids_are_of_the_content_and_not_of_the_layout() {
    // As they were in stores of layout version 1.
    let dir = tempfile::tempdir().unwrap();
    let random = Store::open(&tiny(dir.path())).unwrap().id();
    assert_eq!(
        random.to_string(),
        "80584af92a1040d2ef00ec046f8c79f736ea9f953cd2214226bb9ecd9751dd1b"
    );
    let bundled = Store::open(&import_bundled(dir.path()).unwrap()).unwrap().id();
    assert_eq!(
        bundled.to_string(),
        "547c1a52837024ac041a38f79ce6af004ddd65808979acaab2333c936bab893f"
    );
}

#[test]
fn another_layout_is_to_be_imported_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = tiny(dir.path());
    let manifest = store.join("manifest.json");
    let json = fs::read_to_string(&manifest).unwrap();
    let old = json
        .replace("\"name\": \"ternary-2bit\"", "\"name\": \"ternary-2bit-tile4x128\"")
        .replace("\"version\": 2", "\"version\": 1");
    assert_ne!(old, json);
    fs::write(&manifest, old).unwrap();
    let text = failure(&store);
    assert!(
        text.ends_with(
            "the store has layout ternary-2bit-tile4x128 version 1, this program reads \
             ternary-2bit version 2: import the model again"
        ),
        "{text}"
    );
    fs::write(&manifest, json).unwrap();

    // One tensor that is not arranged as it has to be.
    exchange(&store, "layer-0000.safetensors", |bytes| {
        replace(bytes, "ternary-2bit-row128", "ternary-2bit-row999");
    });
    let text = failure(&store);
    let want = "tensor up has layout ternary-2bit-row999, expected ternary-2bit-row128: import";
    assert!(text.contains(want), "{text}");
}

#[test]
fn both_forms_of_a_matrix_have_the_same_trits() {
    let dir = tempfile::tempdir().unwrap();
    let store = tiny(dir.path());
    let shard = Store::open(&store).unwrap().layer(0).unwrap();
    let (down, columns) = (shard.weights().down, shard.weights().down_columns.unwrap());
    let (mut row, mut column) = (vec![0; down.cols()], vec![0; down.rows()]);
    for c in (0..down.cols()).step_by(37) {
        columns.unpack_column(c, &mut column);
        for (r, trit) in column.iter().enumerate() {
            down.unpack_row(r, &mut row);
            assert_eq!(row[c], *trit);
        }
    }
    let at = columns.bytes().as_ptr() as usize - shard.bytes().as_ptr() as usize;
    drop(shard);
    // Another trit where there was a valid one.
    exchange(&store, "layer-0000.safetensors", |bytes| {
        let next = ((bytes[at] & 0b11) + 1) % 3;
        bytes[at] = bytes[at] & !0b11 | next;
    });
    let text = failure(&store);
    assert!(text.ends_with("matrices down and down_columns differ"), "{text}");
}

/// Adds the down projection by columns to a layer's file, as every store had it before.
fn with_columns(store: &Store, layer: u32) -> Vec<u8> {
    let shard = store.layer(layer).unwrap();
    let down = shard.weights().down;
    let mut columns = kernels::ColumnPacker::new(down.rows(), down.cols()).unwrap();
    let mut trits = vec![0; down.cols()];
    for row in 0..down.rows() {
        down.unpack_row(row, &mut trits);
        columns.row(row, &trits);
    }
    let columns = columns.finish();
    let old = shard.bytes();
    let Table { tensors, mut metadata, .. } = Table::parse(old).unwrap();
    metadata.insert("down_columns.layout".into(), kernels::TernaryColumns::LAYOUT.into());
    let mut in_order: Vec<_> = tensors.into_iter().collect();
    in_order.sort_by_key(|(_, tensor)| tensor.range.start);
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    let mut add = |name: &str, dtype: &str, shape: &[usize], bytes: &[u8]| {
        let offsets = [data.len(), data.len() + bytes.len()];
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        header.insert(name.into(), entry);
        data.extend_from_slice(bytes);
    };
    for (name, tensor) in in_order {
        add(&name, tensor.dtype.name(), &tensor.shape, &old[tensor.range]);
        if name == "down" {
            add("down_columns", "U8", &[columns.len()], &columns);
        }
    }
    header.insert("__metadata__".into(), json!(metadata));
    let mut bytes = vec![0; 8];
    bytes.extend(serde_json::Value::Object(header).to_string().into_bytes());
    bytes.resize(bytes.len().next_multiple_of(64), b' ');
    let header_bytes = bytes.len() as u64 - 8;
    bytes[..8].copy_from_slice(&header_bytes.to_le_bytes());
    bytes.extend(data);
    bytes
}

#[test]
fn down_is_kept_by_columns_only_where_that_pays_and_older_stores_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let shape = |family| SynthShape { family, ..SynthShape::from_str("tiny").unwrap() };
    for (family, pays) in
        [(SynthFamily::BitNet, true), (SynthFamily::BitNet2024, false), (SynthFamily::Llama, false)]
    {
        let dest = dir.path().join(format!("{family:?}"));
        synth(&shape(family), 0, &dest, &mut |_| {}).unwrap();
        let store = Store::open(&dest).unwrap();
        store.verify(|_| {}).unwrap();
        assert_eq!(store.layer(1).unwrap().weights().down_columns.is_some(), pays, "{family:?}");
        if pays {
            continue;
        }
        // What the matrices need, a few norms and a header, and nothing like one matrix more.
        let matrices = (256 * 256 * 2 + 64 * 256 * 2 + 768 * 256 * 3) / 4;
        let bytes = store.layer_bytes();
        assert!((matrices..matrices + 768 * 256 / 8).contains(&bytes), "{family:?}: {bytes}");

        let down = |store: &Store| {
            let shard = store.layer(1).unwrap();
            let weights = shard.weights();
            let mut trits = vec![0; weights.down.cols()];
            weights.down.unpack_row(7, &mut trits);
            (trits, weights.attn_norm.to_vec(), weights.ffn_norm.to_vec(), weights.down.scale())
        };
        let expected = down(&store);
        let longer: Vec<Vec<u8>> = (0..2).map(|layer| with_columns(&store, layer)).collect();
        for (layer, longer) in longer.iter().enumerate() {
            exchange(&dest, &format!("layer-{layer:04}.safetensors"), |bytes| {
                bytes.clone_from(longer);
            });
        }
        let manifest = dest.join("manifest.json");
        let text = fs::read_to_string(&manifest).unwrap();
        let (from, to) =
            (format!("\"bytes\": {bytes},"), format!("\"bytes\": {},", longer[0].len()));
        assert_eq!(text.matches(&from).count(), 2);
        let changed: Manifest = serde_json::from_str(&text.replace(&from, &to)).unwrap();
        fs::write(&manifest, serde_json::to_vec_pretty(&changed.with_digest()).unwrap()).unwrap();
        let older = Store::open(&dest).unwrap();
        older.verify(|_| {}).unwrap();
        assert_eq!(down(&older), expected, "{family:?}");
        assert_eq!(older.id(), store.id());
        assert!(older.layer_bytes() > bytes);
    }
}
