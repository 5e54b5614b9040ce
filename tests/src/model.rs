//! Where the models of the tests lie, and stores made of them once.

use std::path::{Path, PathBuf};

use model::{ImportOptions, SynthShape};

/// The root of the repository.
///
/// # Panics
///
/// Never: this package lies in a folder of it.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lie in the repository").into()
}

/// A checkpoint or file of `tests/fixtures`.
pub fn fixture(name: &str) -> PathBuf {
    repository().join("tests/fixtures").join(name)
}

/// What was measured on the bundled model when it was made.
///
/// # Panics
///
/// If the file is not there or not JSON.
pub fn golden() -> serde_json::Value {
    json(&repository().join("model/bundled/golden.json"))
}

/// A JSON file.
///
/// # Panics
///
/// If it is not there or not JSON.
pub fn json(path: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(path);
    let text = text.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Token ids of a JSON array.
///
/// # Panics
///
/// If it is not an array of ids.
pub fn ids(value: &serde_json::Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("an array of token ids")
}

/// Token ids as `--tokens` takes them.
pub fn comma_separated(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// A store of the bundled model, made once for all tests of a build.
///
/// # Panics
///
/// If it cannot be imported.
pub fn bundled_store() -> PathBuf {
    store_of(&repository().join("model/bundled"), "bundled")
}

/// A store of `source`, made once for all tests of a build.
///
/// # Panics
///
/// If it cannot be imported.
pub fn store_of(source: &Path, name: &str) -> PathBuf {
    store_made(name, |store| {
        let imported = model::import(source, store, &ImportOptions::default(), &mut |_| {});
        imported.err().map(|error| format!("{}: {error:?}", source.display()))
    })
}

/// A store of random weights, made once for all tests of a build.
///
/// # Panics
///
/// If it cannot be made.
pub fn synthetic_store(shape: &SynthShape, name: &str) -> PathBuf {
    store_made(name, |store| {
        let made = model::synth(shape, 1, store, &mut |_| {});
        made.err().map(|error| format!("{shape:?}: {error:?}"))
    })
}

/// `make` says what went wrong.
fn store_made(name: &str, make: impl FnOnce(&Path) -> Option<String>) -> PathBuf {
    let folder = crate::process::tercet().with_file_name("test-stores");
    std::fs::create_dir_all(&folder).expect("the target folder is writable");
    let built = std::fs::metadata(crate::process::tercet()).and_then(|program| program.modified());
    // Made anew for every build: the layout may have changed.
    let age = built.expect("the program is there").duration_since(std::time::UNIX_EPOCH);
    let store = folder.join(format!("{name}-{}", age.unwrap_or_default().as_nanos()));
    if !store.exists() {
        let failure = make(&store);
        // Another test may have been faster: a store is whole or absent.
        assert!(store.exists(), "{failure:?}");
    }
    store
}
