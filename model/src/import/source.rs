//! What the path that a person gave is: a GGUF file, a Hugging Face directory, or something else
//! that can be named.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{ImportError, huggingface};
use crate::file::{is_listed, kind_of, read_limited};
use crate::layout::MANIFEST_FILE;

/// Longest `refs/main` of a hub cache: a commit's hash, and room for a name.
const REVISION_BYTES_MAX: u64 = 256;
/// The folder of a hub cache in which the directories lie that can be imported.
const SNAPSHOTS: &str = "snapshots";

/// The GGUF file that `source` is or holds; `None` for a Hugging Face directory.
pub(super) fn find_gguf(source: &Path) -> Result<Option<PathBuf>, ImportError> {
    let unrecognised = |hint: String| ImportError::Unrecognised { path: source.to_owned(), hint };
    let metadata = fs::metadata(source).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            unrecognised("there is no such file; a model of a hub must be downloaded first".into())
        }
        _ => ImportError::Read { path: source.to_owned(), source: error },
    })?;
    if metadata.is_file() {
        return match hint_for_file(source) {
            Some(hint) => Err(unrecognised(hint)),
            None => Ok(Some(source.to_owned())),
        };
    }
    if !metadata.is_dir() {
        return Err(unrecognised(format!("it is {}", kind_of(metadata.file_type()))));
    }
    // Whatever it is: what is no regular file is refused by name when it is read.
    let is_there = |name: &str| {
        let path = source.join(name);
        is_listed(&path).map_err(|source| ImportError::Read { path, source })
    };
    if is_there(huggingface::CONFIG_FILE)? {
        return Ok(None);
    }
    let entries = fs::read_dir(source)
        .map_err(|error| ImportError::Read { path: source.to_owned(), source: error })?;
    let mut names: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    names.sort();
    let with = |extension: &str| {
        let names = names.iter();
        names.filter(|path| path.extension().is_some_and(|found| found == extension)).count()
    };
    let mut gguf = names.iter().filter(|path| path.extension().is_some_and(|e| e == "gguf"));
    match (gguf.next(), gguf.next()) {
        (Some(path), None) => Ok(Some(path.clone())),
        (Some(_), Some(_)) => {
            Err(unrecognised("it holds several GGUF files, name one of them".into()))
        }
        (None, _) if source.join(SNAPSHOTS).is_dir() => Err(unrecognised(hint_for_cache(source))),
        (None, _) if is_there(MANIFEST_FILE)? => {
            Err(unrecognised("it is a store already, and can be used as it is".into()))
        }
        (None, _) if with("safetensors") > 0 => {
            Err(unrecognised("it has weights but no config.json: download that file, too".into()))
        }
        (None, _) => Err(unrecognised("it holds no model that is known here".into())),
    }
}

/// What to do about a file that is a part of a Hugging Face directory.
fn hint_for_file(source: &Path) -> Option<String> {
    let ends = |end: &str| {
        let name = source.file_name().unwrap_or_default();
        name.as_encoded_bytes().to_ascii_lowercase().ends_with(end.as_bytes())
    };
    let is_part = [".json", ".safetensors", ".bin", ".pt", ".pth", ".jinja", ".model"];
    if !is_part.into_iter().any(ends) {
        return None;
    }
    let directory = match source.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    Some(match directory.join(huggingface::CONFIG_FILE).exists() {
        true => format!("give the directory: {}", directory.display()),
        false => "it is one file of a model: give the directory that holds all of them".into(),
    })
}

/// Which snapshot to give in place of a hub cache's folder of a model.
fn hint_for_cache(source: &Path) -> String {
    let snapshots = source.join(SNAPSHOTS);
    let main = read_limited(&source.join("refs").join("main"), REVISION_BYTES_MAX).ok();
    let main = main.and_then(|revision| String::from_utf8(revision).ok());
    // A plain name: a reference does not lead out of the cache.
    let main = main.map(|revision| revision.trim().to_owned());
    let main = main.filter(|name| !name.is_empty() && name.bytes().all(|b| b.is_ascii_hexdigit()));
    let mut found: Vec<PathBuf> = fs::read_dir(&snapshots)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    found.sort();
    let main = main.map(|name| snapshots.join(name)).filter(|path| found.contains(path));
    match main.or_else(|| found.into_iter().next()) {
        Some(path) => {
            format!("it is a folder of a hub cache, give the snapshot: {}", path.display())
        }
        None => "it is a folder of a hub cache without a snapshot: download the model again".into(),
    }
}
