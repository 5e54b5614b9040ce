//! The small trained model that comes with the program.

use std::path::{Path, PathBuf};

use crate::import::ImportError;

/// The bundled checkpoint: a packed Hugging Face directory inside the program.
#[derive(Clone, Copy, Debug)]
pub struct BundledModel {
    files: &'static [(&'static str, &'static [u8])],
}

/// The model that is used when no other is named.
pub fn bundled() -> BundledModel {
    BundledModel { files: &[] }
}

impl BundledModel {
    /// Its files: name and bytes.
    pub fn files(&self) -> &'static [(&'static str, &'static [u8])] {
        self.files
    }
}

/// The store of the bundled model inside `cache_dir`: made at the first call, found afterwards.
///
/// # Errors
///
/// [`ImportError`] if it cannot be written.
pub fn import_bundled(_cache_dir: &Path) -> Result<PathBuf, ImportError> {
    unimplemented!("first landing: the interface")
}
