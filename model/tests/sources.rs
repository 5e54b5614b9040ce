//! What a person may give to `import` that is no checkpoint, or a part of one: named, with what to
//! give in its place, and never waited for.

#![allow(clippy::unwrap_used, reason = "a helper of tests may fail like a test")]

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use model::{ImportOptions, Store, import, synth};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Why `source` does not import, with its causes.
fn refusal(source: &Path) -> String {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("store");
    let error = import(source, &dest, &ImportOptions::default(), &mut |_| {});
    let error = error.err().unwrap_or_else(|| panic!("{} was imported", source.display()));
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

fn check(source: &Path, expected: &str) {
    let text = refusal(source);
    assert!(text.contains(expected), "{text:?} should say {expected:?}");
}

#[test]
fn a_file_of_a_directory_is_answered_with_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    copy(&fixture("tiny_packed"), &model);
    let give = format!("give the directory: {}", model.display());
    for name in ["config.json", "model.safetensors"] {
        check(&model.join(name), &give);
    }
    let alone = dir.path().join("alone.safetensors");
    fs::copy(model.join("model.safetensors"), &alone).unwrap();
    check(&alone, "one file of a model: give the directory that holds all of them");
    fs::remove_file(model.join("config.json")).unwrap();
    check(&model, "it has weights but no config.json: download that file, too");
}

#[test]
fn a_folder_of_a_hub_cache_is_answered_with_its_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("models--microsoft--bitnet");
    let (older, newer) = (cache.join("snapshots/0aa1"), cache.join("snapshots/1bb2"));
    copy(&fixture("tiny_packed"), &older);
    copy(&fixture("tiny_packed"), &newer);
    check(&cache, &format!("hub cache, give the snapshot: {}", older.display()));
    fs::create_dir(cache.join("refs")).unwrap();
    fs::write(cache.join("refs/main"), "1bb2\n").unwrap();
    check(&cache, &format!("hub cache, give the snapshot: {}", newer.display()));
    // A reference to what is not there, or leads elsewhere, is not followed.
    for wrong in ["../..", "ffff", ""] {
        fs::write(cache.join("refs/main"), wrong).unwrap();
        check(&cache, &format!("give the snapshot: {}", older.display()));
    }
    fs::remove_dir_all(cache.join("snapshots")).unwrap();
    fs::create_dir(cache.join("snapshots")).unwrap();
    check(&cache, "hub cache without a snapshot: download the model again");
}

#[test]
fn parts_of_weights_are_answered_with_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    copy(&fixture("tiny_packed"), dir.path());
    let whole = dir.path().join("model.safetensors");
    fs::rename(&whole, dir.path().join("model-00001-of-00002.safetensors")).unwrap();
    check(
        dir.path(),
        "parts of the weights (model-00001-of-00002.safetensors) but no \
         model.safetensors.index.json: download that file, too",
    );
    fs::rename(
        dir.path().join("model-00001-of-00002.safetensors"),
        dir.path().join("a.safetensors"),
    )
    .unwrap();
    check(dir.path(), "has a.safetensors, but no model.safetensors: rename it if it holds");
    fs::remove_file(dir.path().join("a.safetensors")).unwrap();
    check(dir.path(), "has no model.safetensors: is the download complete?");
    let index = r#"{"weight_map":{"a":"model-00002-of-00002.safetensors"}}"#;
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    check(
        dir.path(),
        "model.safetensors.index.json names model-00002-of-00002.safetensors, which is not there: is \
         the download complete?",
    );
}

#[test]
fn a_store_is_said_to_be_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    synth(&"1x64x128x2x1x40".parse().unwrap(), 1, &store, &mut |_| {}).unwrap();
    check(&store, "it is a store already, and can be used as it is");
}

/// Nobody ever writes to these FIFOs: a reader that waits for that never ends.
#[cfg(unix)]
#[test]
fn a_fifo_in_place_of_any_file_is_refused_at_once() {
    let fifo = |path: &Path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let alone = dir.path().join("alone.gguf");
    fifo(&alone);
    check(&alone, "it is a FIFO");
    check(dir.path(), "alone.gguf: not a regular file, but a FIFO");
    let names = [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ];
    for name in names {
        let model = dir.path().join(format!("model with {name}"));
        copy(&fixture("tiny_packed"), &model);
        let _ = fs::remove_file(model.join(name));
        if name == "model.safetensors.index.json" {
            // Beside a whole file no index is read.
            fs::remove_file(model.join("model.safetensors")).unwrap();
        }
        fifo(&model.join(name));
        check(&model, &format!("{name}: not a regular file, but a FIFO"));
    }

    // A store: its manifest, a shard of it; and the lock of an import that somebody left behind.
    let store = dir.path().join("store");
    let left = dir.path().join(".store.tercet-partial-1-1");
    fs::create_dir(&left).unwrap();
    fifo(&left.join("lock"));
    synth(&"1x64x128x2x1x40".parse().unwrap(), 1, &store, &mut |_| {}).unwrap();
    for name in ["layer-0000.safetensors", "manifest.json"] {
        fs::remove_file(store.join(name)).unwrap();
        fifo(&store.join(name));
        assert!(Store::open(&store).is_err(), "{name}");
    }
}

#[test]
fn what_need_not_be_there_and_leads_nowhere_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let link = |folder: &Path, name: &str| {
        std::os::unix::fs::symlink("../blobs/gone", folder.join(name)).unwrap();
    };
    for name in [
        "generation_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.json",
        "chat_template.jinja",
        "modules.json",
        "additional_chat_templates",
    ] {
        let model = dir.path().join(name.replace('.', "-"));
        copy(&fixture("tiny_packed"), &model);
        let _ = fs::remove_file(model.join(name));
        link(&model, name);
        let text = refusal(&model);
        assert!(text.contains(&model.join(name).display().to_string()), "{name}: {text}");
    }
    // As what must be there is.
    for name in ["config.json", "model.safetensors"] {
        let model = dir.path().join(format!("needed {name}"));
        copy(&fixture("tiny_packed"), &model);
        fs::remove_file(model.join(name)).unwrap();
        link(&model, name);
        check(&model, "it is a link to ../blobs/gone, which is not there");
    }
    let template = dir.path().join("template");
    copy(&fixture("tiny_packed"), &template);
    fs::create_dir(template.join("additional_chat_templates")).unwrap();
    link(&template.join("additional_chat_templates"), "default.jinja");
    check(&template, "additional_chat_templates/default.jinja: it is a link to");
    // Nor is it taken for nothing in a store, or in a folder of stores.
    let stores = dir.path().join("stores");
    fs::create_dir_all(stores.join("one")).unwrap();
    link(&stores.join("one"), "manifest.json");
    assert_eq!(model::find_stores(&stores), [stores.join("one")]);
    let error = Store::open(&stores.join("one")).unwrap_err();
    assert!(matches!(error, model::StoreError::Read { .. }), "{error}");
}

#[test]
fn more_values_than_any_file_has_are_refused_before_they_are_built() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    copy(&fixture("tiny_packed"), &model);
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    let many = format!("{{\"x\":[{}0],{}", "0,".repeat(1 << 22), &config.trim_start()[1..]);
    fs::write(model.join("config.json"), many).unwrap();
    check(&model, "config.json is more than 4194304, expected fewer");
}
