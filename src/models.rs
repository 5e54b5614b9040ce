//! Which store `--model` means: a store, a checkpoint that is imported once, the bundled model, or
//! random weights that are made once.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use model::synth::ParseShapeError;
use model::{ImportError, ImportOptions, Progress, Store, StoreError, SynthError, SynthShape};

use crate::score;

/// The name under which the bundled model is asked for.
pub const BUNDLED: &str = "bundled";

/// What stands before the shape of a random model that is asked for.
pub const SYNTH: &str = "synth:";

/// The file that makes a directory a store.
const MANIFEST: &str = "manifest.json";

/// The file in a cached store that holds the warnings of its import, also those that came of its score.
const WARNINGS: &str = "import-warnings.json";

/// Longest such file: a few sentences.
const WARNINGS_BYTES_MAX: u64 = 64 << 10;

/// What a warning among an import's notes begins with.
const WARNING: &str = "warning: ";

/// Hexadecimal digits of a cached store's key: 64 bits tell apart what one machine ever imports.
const KEY_DIGITS: usize = 16;

/// Why there is no store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelsError {
    /// Nothing is there.
    #[error(
        "there is no model at {} (name a store, a Hugging Face directory, a GGUF file, `{BUNDLED}`, \
         or `{SYNTH}SHAPE`)", path.display()
    )]
    NotFound {
        /// What was named.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Nowhere to keep what was imported.
    #[error("no cache directory: set HOME or XDG_CACHE_HOME, or import the model by hand")]
    NoCache,
    /// The cache directory cannot be used.
    #[error("failed to use the cache directory {}", path.display())]
    Cache {
        /// Which.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The source cannot be read.
    #[error("failed to look at {}", path.display())]
    Look {
        /// Which.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// It cannot be imported.
    #[error("failed to import {}", path.display())]
    Import {
        /// Which.
        path: PathBuf,
        /// Why.
        source: ImportError,
    },
    /// The bundled model cannot be written to the cache.
    #[error("failed to set up the bundled model")]
    Bundled(#[source] ImportError),
    /// There are no random models of such a shape.
    #[error("failed to read what stands after `{SYNTH}`")]
    Shape(#[from] ParseShapeError),
    /// A random model cannot be made.
    #[error("failed to make random weights in {}", path.display())]
    Synth {
        /// Where.
        path: PathBuf,
        /// Why.
        source: SynthError,
    },
    /// The store cannot be used.
    #[error("failed to open the model {}", path.display())]
    Store {
        /// Which.
        path: PathBuf,
        /// Why.
        source: StoreError,
    },
}

/// Opens the model that `argument` names; without one, the bundled one.
///
/// A checkpoint is imported into the cache directory the first time. The key is where it is, how
/// long its files are and when they changed: a checkpoint that was replaced is imported again.
///
/// # Errors
///
/// [`ModelsError`].
pub fn open(
    argument: Option<&str>,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<Store, ModelsError> {
    let path = match argument {
        None | Some(BUNDLED) => {
            model::import_bundled(&cache_dir()?).map_err(ModelsError::Bundled)?
        }
        Some(text) if text.starts_with(SYNTH) => {
            synthesised(&text[SYNTH.len()..], &cache_dir()?, progress)?
        }
        Some(text) => {
            let path = Path::new(text);
            let found = fs::metadata(path)
                .map_err(|source| ModelsError::NotFound { path: path.to_owned(), source })?;
            if found.is_dir() && path.join(MANIFEST).is_file() {
                path.to_owned()
            } else {
                let (store, warnings) = imported(path, &cache_dir()?, progress)?;
                // Nobody reads the notes of what is imported on the way, nor remembers them later.
                for warning in warnings {
                    tracing::warn!(model = %path.display(), "{warning}");
                }
                store
            }
        }
    };
    open_store(&path)
}

fn open_store(path: &Path) -> Result<Store, ModelsError> {
    Store::open(path).map_err(|source| ModelsError::Store { path: path.to_owned(), source })
}

/// Where stores are kept that were made on the way: `$XDG_CACHE_HOME/tercet/stores`.
///
/// # Errors
///
/// [`ModelsError::NoCache`] if the environment names no place, [`ModelsError::Cache`] if it cannot
/// be made.
pub fn cache_dir() -> Result<PathBuf, ModelsError> {
    // An empty or relative path is to be ignored, says the XDG base directory specification.
    let variable = |name: &str| {
        node::config::variable(name).map(PathBuf::from).filter(|path| path.is_absolute())
    };
    let base = variable("XDG_CACHE_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".cache")))
        .ok_or(ModelsError::NoCache)?;
    let path = base.join("tercet").join("stores");
    match fs::create_dir_all(&path) {
        Ok(()) => Ok(path),
        Err(source) => Err(ModelsError::Cache { path, source }),
    }
}

/// The cached store of the checkpoint at `source`, imported now if it is not there, and the warnings of
/// its import.
fn imported(
    source: &Path,
    cache: &Path,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<(PathBuf, Vec<String>), ModelsError> {
    let found = |store: PathBuf| {
        let warnings = warnings_of(&store)?;
        Ok((store, warnings))
    };
    let key = key_of(source)
        .map_err(|error| ModelsError::Look { path: source.to_owned(), source: error })?;
    let store = cache.join(key);
    if store.join(MANIFEST).is_file() {
        return found(store);
    }
    let options =
        ImportOptions { try_text: Some(coordinator::try_text), ..ImportOptions::default() };
    match score::import_once(source, &store, &options, progress) {
        Ok(scored) => {
            let warnings = warnings_among(&scored.imported.notes);
            // It is only less to say next time.
            if let Err(error) = keep_warnings(&store, &warnings) {
                tracing::warn!(%error, store = %store.display(), "the warnings of an import are not kept");
            }
            Ok((store, warnings))
        }
        // Somebody else was quicker: stores appear whole, so theirs is as good.
        Err(_) if store.join(MANIFEST).is_file() => found(store),
        Err(error) => Err(ModelsError::Import { path: source.to_owned(), source: error }),
    }
}

fn warnings_among(notes: &[String]) -> Vec<String> {
    notes.iter().filter_map(|note| note.strip_prefix(WARNING)).map(str::to_owned).collect()
}

/// Writes the warnings of an import into its store, where they go when it goes.
fn keep_warnings(store: &Path, warnings: &[String]) -> io::Result<()> {
    let partial = store.join(format!(".{WARNINGS}-{}", std::process::id()));
    fs::write(&partial, serde_json::to_vec(warnings)?)?;
    fs::rename(partial, store.join(WARNINGS))
}

/// The warnings of a cached store's import. Where they are not kept, or not yet, what its manifest has.
fn warnings_of(store: &Path) -> Result<Vec<String>, ModelsError> {
    let kept = model::read_limited(&store.join(WARNINGS), WARNINGS_BYTES_MAX).ok();
    if let Some(kept) = kept.and_then(|json| serde_json::from_slice(&json).ok()) {
        return Ok(kept);
    }
    Ok(warnings_among(&open_store(store)?.manifest().provenance.notes))
}

/// The cached store of random weights of this shape (seed 0), made now if it is not there.
fn synthesised(
    shape: &str,
    cache: &Path,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<PathBuf, ModelsError> {
    let parsed: SynthShape = shape.parse()?;
    // Of the layout of this program, as what is imported.
    let layout = blake3::hash(model::Layout::current().to_string().as_bytes()).to_hex();
    let store = cache.join(format!("synth-{shape}-{}", &layout[..KEY_DIGITS]));
    if store.join(MANIFEST).is_file() {
        return Ok(store);
    }
    match model::synth(&parsed, 0, &store, progress) {
        Ok(_) => Ok(store),
        // Somebody else was quicker: stores appear whole, so theirs is as good.
        Err(_) if store.join(MANIFEST).is_file() => Ok(store),
        Err(source) => Err(ModelsError::Synth { path: store, source }),
    }
}

/// A name for the store of what is at `source` now, in the layout of this program.
fn key_of(source: &Path) -> io::Result<String> {
    let source = fs::canonicalize(source)?;
    let mut files = if source.is_dir() {
        let entries = fs::read_dir(&source)?.map(|entry| entry.map(|entry| entry.path()));
        entries.collect::<io::Result<Vec<_>>>()?
    } else {
        vec![source.clone()]
    };
    files.sort();
    let layout = model::Layout::current().to_string();
    let mut hasher = blake3::Hasher::new();
    // A cached store is what this program would import today.
    hasher.update(&model::IMPORT_REVISION.to_le_bytes());
    for part in [layout.as_bytes(), source.as_os_str().as_encoded_bytes()] {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    for file in files {
        // Follows links: a Hugging Face cache is made of them. What is there and leads nowhere is for the
        // import to name, if it needs it.
        let found = match fs::metadata(&file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => fs::symlink_metadata(&file)?,
            found => found?,
        };
        let changed = found.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = file.as_os_str().as_encoded_bytes();
        hasher.update(&(name.len() as u64).to_le_bytes()).update(name);
        hasher.update(&found.len().to_le_bytes());
        hasher.update(&changed.as_nanos().to_le_bytes());
    }
    let name = source.file_stem().unwrap_or_default().to_string_lossy();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    let name: String = name.chars().take(64).map(plain).collect();
    Ok(format!("{name}-{}", &hasher.finalize().to_hex()[..KEY_DIGITS]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_that_changed_has_another_key() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("my model!");
        fs::create_dir(&source).unwrap();
        fs::write(source.join("config.json"), "{}").unwrap();
        let first = key_of(&source).unwrap();
        assert!(first.starts_with("my_model_-"), "{first}");
        assert_eq!(key_of(&source).unwrap(), first);
        assert_eq!(key_of(&dir.path().join("./my model!")).unwrap(), first, "the same place");
        fs::write(source.join("config.json"), "{ }").unwrap();
        let longer = key_of(&source).unwrap();
        assert_ne!(longer, first);
        fs::write(source.join("more"), "").unwrap();
        assert_ne!(key_of(&source).unwrap(), longer);
    }

    #[test]
    fn the_warnings_of_an_import_are_said_whenever_its_store_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        // Without a tokenizer, so that nobody knows in which layout its I2_S is.
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny_i2s.gguf");
        let (store, first) = imported(&source, dir.path(), &mut |_| {}).unwrap();
        assert!(first.iter().any(|warning| warning.contains("whether I2_S is in the layout")));
        let (again, warnings) = imported(&source, dir.path(), &mut |_| panic!("is there")).unwrap();
        assert_eq!((&again, &warnings), (&store, &first));
        // Of a store of which they are not kept, those that its manifest has.
        fs::remove_file(store.join(WARNINGS)).unwrap();
        let (_, warnings) = imported(&source, dir.path(), &mut |_| panic!("is there")).unwrap();
        let notes = &open_store(&store).unwrap().manifest().provenance.notes.clone();
        assert_eq!(warnings, warnings_among(notes));
    }

    #[test]
    fn a_link_that_leads_nowhere_keeps_no_checkpoint_from_having_a_key() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        let without = key_of(dir.path()).unwrap();
        std::os::unix::fs::symlink("/no/such/file", dir.path().join("tokenizer.json")).unwrap();
        assert_ne!(key_of(dir.path()).unwrap(), without);
    }

    #[test]
    fn random_weights_are_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut parts = 0;
        let shape = "1x64x128x2x1x96";
        let first = synthesised(shape, dir.path(), &mut |_| parts += 1).unwrap();
        assert!(parts > 0);
        let again = synthesised(shape, dir.path(), &mut |_| panic!("it is there")).unwrap();
        assert_eq!(first, again);
        assert_eq!(Store::open(&first).unwrap().config().hidden, 64);
        let error = synthesised("../x", dir.path(), &mut |_| {}).unwrap_err();
        assert!(matches!(error, ModelsError::Shape(_)), "{error}");
    }

    #[test]
    fn what_is_not_there_is_named() {
        let error = open(Some("/no/such/model"), &mut |_| {}).unwrap_err();
        let text = node::Chain(&error).to_string();
        assert!(text.starts_with("there is no model at /no/such/model"), "{text}");
    }
}
