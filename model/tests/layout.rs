//! The layout of a store: what it has no influence on, and what is said to another one.

#![allow(clippy::unwrap_used, reason = "a helper of tests may fail like a test")]

use std::fs;
use std::path::{Path, PathBuf};

use model::{Manifest, Store, import_bundled, synth};

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
    let (down, columns) = (shard.weights().down, shard.weights().down_columns);
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
