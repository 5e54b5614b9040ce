//! The small trained model that comes with the program, and its store in a cache directory.
//!
//! The weights are inside the program (a few MB). A store is needed to map them, so the first use
//! makes one; its name tells content and layout, so a new model or layout makes another.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::import::{IMPORT_REVISION, ImportError, ImportOptions, import};
use crate::manifest::Layout;
use crate::staging::WriteError;
use crate::store::Store;

/// The bundled checkpoint: a packed Hugging Face directory inside the program.
#[derive(Clone, Copy, Debug)]
pub struct BundledModel {
    files: &'static [(&'static str, &'static [u8])],
}

macro_rules! bundled_files {
    ($($name:literal),*) => {
        &[$(($name, include_bytes!(concat!("../bundled/", $name)))),*]
    };
}

/// The model that is used when no other is named.
pub fn bundled() -> BundledModel {
    BundledModel {
        files: bundled_files![
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json"
        ],
    }
}

/// Digits of the content's hash in a store's name: enough to tell releases apart.
const NAME_DIGITS: usize = 16;

impl BundledModel {
    /// Name of the model.
    pub const NAME: &'static str = "tercet-stories";

    /// Its files: name and bytes.
    pub fn files(&self) -> &'static [(&'static str, &'static [u8])] {
        self.files
    }

    /// Name of its store: changes with the content, the layout and the program's version.
    fn store_name(&self) -> String {
        let mut hash = blake3::Hasher::new();
        for (name, bytes) in self.files {
            hash.update(name.as_bytes());
            hash.update(&(bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        }
        hash.update(Layout::current().to_string().as_bytes());
        hash.update(&IMPORT_REVISION.to_le_bytes());
        hash.update(env!("CARGO_PKG_VERSION").as_bytes());
        format!("{}-{}", Self::NAME, &hash.finalize().to_hex()[..NAME_DIGITS])
    }
}

/// The store of the bundled model inside `cache_dir`, which is created if needed: made at the first
/// call, found afterwards. Any number of processes may call this at the same time.
///
/// # Errors
///
/// [`ImportError`] if it cannot be written.
pub fn import_bundled(cache_dir: &Path) -> Result<PathBuf, ImportError> {
    let model = bundled();
    let dest = cache_dir.join(model.store_name());
    // A store appears whole or not at all: one that is there and is not whole is damaged, or of before
    // there were digests. (Looked at in this order, it cannot be one that another process just
    // finished.)
    let is_there = dest.exists();
    if is_whole(&dest) {
        return Ok(dest);
    }
    let write_error = |action, path: &Path, source| {
        ImportError::Write(WriteError::Io { action, path: path.to_owned(), source })
    };
    fs::create_dir_all(cache_dir).map_err(|e| write_error("create", cache_dir, e))?;
    if is_there {
        fs::remove_dir_all(&dest).map_err(|e| write_error("remove", &dest, e))?;
    }
    // The importer maps files, so the bytes become files for a moment.
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let (process, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let folder = format!(".{}-source-{process}-{number}", BundledModel::NAME);
    let folder = SourceDir(cache_dir.join(folder));
    // What the manifest names as the source.
    let source = folder.0.join("bundled");
    fs::create_dir_all(&source).map_err(|e| write_error("create", &source, e))?;
    for (name, bytes) in model.files {
        let path = source.join(name);
        fs::write(&path, bytes).map_err(|e| write_error("write", &path, e))?;
    }
    let options =
        ImportOptions { name: Some(BundledModel::NAME.into()), ..ImportOptions::default() };
    match import(&source, &dest, &options, &mut |_| {}) {
        Ok(_) => Ok(dest),
        // Another process was quicker, and made the same.
        Err(ImportError::Write(WriteError::Exists { .. })) if is_whole(&dest) => Ok(dest),
        Err(error) => Err(error),
    }
}

/// Whether a store is there and nothing in it is another bit than when it was made: it is small.
fn is_whole(dest: &Path) -> bool {
    let verified = Store::open(dest).and_then(|store| {
        store.verify_files(|_| {})?;
        Ok(store.manifest().has_digest())
    });
    verified.unwrap_or(false)
}

/// A directory that is removed when it is no longer needed.
struct SourceDir(PathBuf);

impl Drop for SourceDir {
    fn drop(&mut self) {
        // Left behind, it costs a few MB and harms nobody.
        let _ = fs::remove_dir_all(&self.0);
    }
}
