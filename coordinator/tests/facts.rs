//! Facts that several files of a checkpoint state, as prompts show them: the bundled model with keys
//! changed, as strangers change them.
#![expect(clippy::unwrap_used, reason = "everything here is a test or helps one")]

use std::fs;
use std::path::Path;

use model::{ImportOptions, ModelId, Store, import};
use serde_json::{Value, json};

/// "Once upon a time" to the bundled model, with its begin of text.
const IDS: [u32; 5] = [0, 3719, 519, 261, 469];

fn edit(dir: &Path, name: &str, edit: impl FnOnce(&mut Value)) {
    let path = dir.join(name);
    let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// The id and the tokens, three times, of the bundled model after `change`.
fn tokens(change: impl FnOnce(&Path)) -> (ModelId, [Vec<u32>; 3]) {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    for (name, bytes) in model::bundled().files() {
        fs::write(source.join(name), bytes).unwrap();
    }
    change(&source);
    let store = dir.path().join("store");
    import(&source, &store, &ImportOptions::default(), &mut |_| {}).unwrap();
    let store = Store::open(&store).unwrap();
    let tokens = || coordinator::tokenize(&store, "Once upon a time").unwrap();
    (store.manifest().id, [tokens(), tokens(), tokens()])
}

#[test]
fn begin_of_text_is_found_whichever_file_is_silent() {
    let (id, all) = tokens(|_| {});
    assert_eq!(all, [IDS; 3]);
    let (same, all) = tokens(|dir| {
        edit(dir, "config.json", |config| {
            config.as_object_mut().unwrap().remove("bos_token_id").unwrap();
        });
    });
    assert_eq!((same, all), (id, [IDS.to_vec(), IDS.to_vec(), IDS.to_vec()]));
}

#[test]
fn dropout_of_training_draws_no_prompt() {
    let (_, all) = tokens(|dir| {
        edit(dir, "tokenizer.json", |tokenizer| tokenizer["model"]["dropout"] = json!(0.5));
    });
    assert_eq!(all, [IDS; 3]);
}
