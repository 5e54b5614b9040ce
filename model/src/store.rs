//! A directory that holds a model: opening it, handing out its shards, verifying it.
//!
//! Every shard is compared with the manifest before it is handed out, and the manifest with its own
//! digest. A store never changes after it was renamed into place: replace it by renaming, never by
//! writing. Whoever writes to it under a running program is noticed (`weights`), whoever shortens a
//! mapped file ends that program (`sigbus`).

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::ModelConfig;
use crate::file::{MappedFile, is_listed, read_limited};
use crate::id::{ContentText, ModelId, model_id};
use crate::identity::Identity;
use crate::layout::{
    EMBEDDING_FILE, HEAD_FILE, MANIFEST_FILE, NORM_FILE, SCREEN_FILE, TOKENIZER_FILE, layer_file,
};
use crate::manifest::{FileEntry, FileHash, MANIFEST_BYTES_MAX, Manifest, ManifestError};
use crate::progress::Progress;
use crate::shard::{EmbeddingShard, HeadShard, LayerShard, NormShard, ScreenShard, ShardError};
use crate::weights::{WeightFile, check_hash};

/// Longest `tokenizer.json`: several times the largest in use.
pub const TOKENIZER_BYTES_MAX: u64 = 128 << 20;

/// Why a store, or a file in it, cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is nothing.
    #[error("there is no directory {}", path.display())]
    Missing {
        /// What was named.
        path: PathBuf,
    },
    /// There is no manifest.
    #[error(
        "{} is not a model store: it has no {MANIFEST_FILE} (`tercet import` makes a store of a \
         checkpoint)",
        path.display()
    )]
    NotAStore {
        /// The directory.
        path: PathBuf,
    },
    /// The operating system refused a file.
    #[error("failed to read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The manifest is bad.
    #[error("failed to use {}", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ManifestError,
    },
    /// A file has another length than the manifest says.
    #[error("{} has {found_bytes} bytes, the manifest says {expected_bytes}", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Its length.
        found_bytes: u64,
        /// What the manifest says.
        expected_bytes: u64,
    },
    /// A file has another content than the manifest says.
    #[error("{} has hash {found}, the manifest says {expected}", path.display())]
    Hash {
        /// The file.
        path: PathBuf,
        /// Its hash.
        found: FileHash,
        /// What the manifest says.
        expected: FileHash,
    },
    /// A file is being written to.
    #[error("{} changed while it was read: replace a store by renaming, never by writing", path.display())]
    Changing {
        /// The file.
        path: PathBuf,
    },
    /// The content is not that of the model that the manifest names.
    #[error("{} holds model {found}, its manifest says {expected}", path.display())]
    Id {
        /// The store.
        path: PathBuf,
        /// The id of its content.
        found: ModelId,
        /// What the manifest says.
        expected: ModelId,
    },
    /// A shard is bad.
    #[error("failed to use {}", path.display())]
    Shard {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ShardError,
    },
    /// A layer was asked for that the model does not have.
    #[error("layer {layer} does not exist, the model has {layers}")]
    NoSuchLayer {
        /// The layer.
        layer: u32,
        /// Layers of the model.
        layers: u32,
    },
}

impl StoreError {
    /// Whether something is there, and it is not what the manifest says: waiting makes it no better.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Manifest { .. }
            | Self::Size { .. }
            | Self::Hash { .. }
            | Self::Id { .. }
            | Self::Shard { .. } => true,
            Self::NotAStore { .. }
            | Self::Read { .. }
            | Self::Missing { .. }
            | Self::Changing { .. }
            | Self::NoSuchLayer { .. } => false,
        }
    }
}

/// A model on disk.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
    manifest: Manifest,
    /// What each file was when its content was last found right. Clones of a store share it.
    verified: Arc<Mutex<BTreeMap<String, Identity>>>,
}

impl Store {
    /// Opens a store: reads its manifest, and looks at the size of every file. Maps nothing yet.
    ///
    /// # Errors
    ///
    /// [`StoreError`], naming the file.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join(MANIFEST_FILE);
        let json = match read_limited(&path, MANIFEST_BYTES_MAX) {
            Ok(json) => json,
            // A link that leads nowhere is there, and told of as what could not be read.
            Err(_) if matches!(is_listed(&path), Ok(false)) => {
                let path = dir.to_owned();
                return Err(match dir.exists() {
                    true => StoreError::NotAStore { path },
                    false => StoreError::Missing { path },
                });
            }
            Err(source) => return Err(StoreError::Read { path, source }),
        };
        let manifest =
            Manifest::parse(&json).map_err(|source| StoreError::Manifest { path, source })?;
        let store = Self { dir: dir.to_owned(), manifest, verified: Arc::default() };
        for file in store.files() {
            let path = dir.join(&file.name);
            match std::fs::metadata(&path) {
                Ok(found) => store.check_size(path, file, found.len())?,
                Err(source) => return Err(StoreError::Read { path, source }),
            }
        }
        Ok(store)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the store holds.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Shapes and constants of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.manifest.config
    }

    /// The model's id.
    pub fn id(&self) -> ModelId {
        self.manifest.id
    }

    /// Maps a layer, and compares it with the manifest, if it was changed since that was last done.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if there is no such layer, or its file is bad.
    pub fn layer(&self, layer: u32) -> Result<LayerShard, StoreError> {
        let layers = self.config().layers;
        if layer >= layers {
            return Err(StoreError::NoSuchLayer { layer, layers });
        }
        self.shard(&layer_file(layer), LayerShard::new)
    }

    /// Maps the embedding and compares it as a layer.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if its file is bad.
    pub fn embedding(&self) -> Result<EmbeddingShard, StoreError> {
        self.shard(EMBEDDING_FILE, EmbeddingShard::new)
    }

    /// Maps the head (of a tied model, the embedding's file) and compares it as a layer.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if its file is bad.
    pub fn head(&self) -> Result<HeadShard, StoreError> {
        let name = if self.config().tied_head { EMBEDDING_FILE } else { HEAD_FILE };
        self.shard(name, HeadShard::new)
    }

    /// Maps the final norm and compares it as a layer.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if its file is bad.
    pub fn final_norm(&self) -> Result<NormShard, StoreError> {
        self.shard(NORM_FILE, NormShard::new)
    }

    /// Maps the screen of the head and compares it as a layer; `None` if the model is too wide for one.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if its file is bad.
    pub fn screen(&self) -> Result<Option<ScreenShard>, StoreError> {
        let has_screen = self.manifest.file(SCREEN_FILE).is_some();
        has_screen.then(|| self.shard(SCREEN_FILE, ScreenShard::new)).transpose()
    }

    /// Reads `tokenizer.json`; `None` if the model has none.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if it cannot be read, or is not the file that the manifest names.
    pub fn tokenizer_json(&self) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(file) = &self.manifest.tokenizer else { return Ok(None) };
        let path = self.dir.join(TOKENIZER_FILE);
        let json = read_limited(&path, TOKENIZER_BYTES_MAX)
            .map_err(|source| StoreError::Read { path: path.clone(), source })?;
        check_hash(&path, file.blake3, blake3::hash(&json).into())?;
        Ok(Some(json))
    }

    /// Bytes of one layer's file, header included; every layer has the same shape.
    pub fn layer_bytes(&self) -> u64 {
        self.file_bytes(&layer_file(0))
    }

    /// Bytes of the embedding's file.
    pub fn embedding_bytes(&self) -> u64 {
        self.file_bytes(EMBEDDING_FILE)
    }

    /// Bytes of the head's file; of a tied model, those of the embedding's.
    pub fn head_bytes(&self) -> u64 {
        self.file_bytes(if self.config().tied_head { EMBEDDING_FILE } else { HEAD_FILE })
    }

    /// Bytes of the file of the head's screen; 0 if there is none.
    pub fn screen_bytes(&self) -> u64 {
        self.file_bytes(SCREEN_FILE)
    }

    /// Whether nothing in it is another bit than when it was made: compares every file with the manifest,
    /// by the threads of the pool that the caller is in. Shards that are opened afterwards are not
    /// read again, unless they were changed. A store whose manifest has no digest, as those of before,
    /// is verified as by [`Self::verify`], which takes many times as long.
    ///
    /// `progress` is told bytes.
    ///
    /// # Errors
    ///
    /// [`StoreError`] with the first file that is wrong.
    pub fn verify_files(&self, progress: impl FnMut(&Progress<'_>)) -> Result<(), StoreError> {
        if !self.manifest.has_digest() {
            return self.verify(progress);
        }
        self.verify_some(&self.manifest.files.iter().collect::<Vec<_>>(), progress)?;
        self.tokenizer_json().map(drop)
    }

    /// [`Self::verify_files`] of what a stage of these layers computes with, and of norm, head and screen
    /// if it has the head. The manifest's own digest stands for the rest, if it has one.
    ///
    /// # Errors
    ///
    /// [`StoreError`] with the first file that is wrong.
    pub fn verify_stage(
        &self,
        layers: &Range<u32>,
        has_head: bool,
        progress: impl FnMut(&Progress<'_>),
    ) -> Result<(), StoreError> {
        let (is_first, is_tied) = (layers.start == 0, self.config().tied_head);
        let layers: Vec<String> = layers.clone().map(layer_file).collect();
        let is_wanted = |name: &str| match name {
            EMBEDDING_FILE => is_first || (has_head && is_tied),
            HEAD_FILE | NORM_FILE | SCREEN_FILE => has_head,
            layer => layers.iter().any(|wanted| wanted == layer),
        };
        let files = self.manifest.files.iter().filter(|file| is_wanted(&file.name));
        self.verify_some(&files.collect::<Vec<_>>(), progress)
    }

    /// Compares those of `files` that were not, or were changed since.
    fn verify_some(
        &self,
        files: &[&FileEntry],
        mut progress: impl FnMut(&Progress<'_>),
    ) -> Result<(), StoreError> {
        let total = files.iter().map(|file| file.bytes).sum();
        let mut done = 0;
        for file in files {
            self.open_file(file, &mut |bytes| {
                done += bytes;
                progress(&Progress { what: &file.name, done, total });
            })?;
        }
        Ok(())
    }

    /// Reads everything: hashes of files, codes of every matrix, floats, and the model's id.
    ///
    /// # Errors
    ///
    /// [`StoreError`] with the first thing that is wrong.
    pub fn verify(&self, mut progress: impl FnMut(&Progress)) -> Result<(), StoreError> {
        let names = self.files().count() as u64;
        let mut parts = Vec::new();
        for (done, file) in self.manifest.files.iter().enumerate() {
            progress(&Progress { what: &file.name, done: done as u64, total: names });
            self.verified().remove(&file.name);
            let path = self.dir.join(&file.name);
            let shard_error = |source| StoreError::Shard { path, source };
            if file.name == SCREEN_FILE {
                let screen = self.shard(SCREEN_FILE, ScreenShard::new)?;
                screen.verify(&self.head()?).map_err(shard_error)?;
                continue;
            }
            let digest = match file.name.as_str() {
                EMBEDDING_FILE => self.embedding()?.verify(),
                HEAD_FILE => self.head()?.verify(),
                NORM_FILE => self.final_norm()?.verify(),
                _ => self.shard(&file.name, LayerShard::new)?.verify(),
            };
            parts.push(digest.map_err(shard_error)?);
        }
        let tokenizer = self.tokenizer_json()?;
        let text = ContentText {
            tokenizer: tokenizer.as_deref(),
            chat_template: self.manifest.chat_template.as_deref(),
            bos_text: self.manifest.bos_token_text.as_deref(),
            eos_text: self.manifest.eos_token_text.as_deref(),
            special: Some(&self.manifest.special_token_texts),
        };
        let found = model_id(self.config(), text, &parts);
        if found != self.id() {
            let expected = self.id();
            return Err(StoreError::Id { path: self.dir.clone(), found, expected });
        }
        progress(&Progress { what: "all files", done: names, total: names });
        Ok(())
    }

    fn files(&self) -> impl Iterator<Item = &FileEntry> {
        self.manifest.files.iter().chain(&self.manifest.tokenizer)
    }

    /// Names come from the shape, and [`Manifest::parse`] checked that each has its entry.
    fn file_bytes(&self, name: &str) -> u64 {
        self.manifest.file(name).map_or(0, |file| file.bytes)
    }

    fn check_size(
        &self,
        path: PathBuf,
        file: &FileEntry,
        found_bytes: u64,
    ) -> Result<(), StoreError> {
        match found_bytes == file.bytes {
            true => Ok(()),
            false => Err(StoreError::Size { path, found_bytes, expected_bytes: file.bytes }),
        }
    }

    fn verified(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Identity>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps a file and compares it with its entry, unless that was done and it is unchanged since.
    fn open_file(
        &self,
        file: &FileEntry,
        done: &mut dyn FnMut(u64),
    ) -> Result<WeightFile, StoreError> {
        let path = self.dir.join(&file.name);
        let read_error = |source| StoreError::Read { path: path.clone(), source };
        let mapped = MappedFile::open(&path).map_err(read_error)?;
        self.check_size(path.clone(), file, mapped.bytes().len() as u64)?;
        let known = self.verified().get(&file.name).copied();
        let opened = WeightFile::verified(mapped, path, file.blake3, known, done)?;
        if let Some(identity) = opened.identity() {
            self.verified().insert(file.name.clone(), identity);
        }
        Ok(opened)
    }

    fn shard<T>(
        &self,
        name: &str,
        check: impl FnOnce(WeightFile, &ModelConfig) -> Result<T, ShardError>,
    ) -> Result<T, StoreError> {
        let path = self.dir.join(name);
        let file = self.manifest.file(name).expect("a manifest names every file of its shape");
        let opened = self.open_file(file, &mut |_| {})?;
        let shard = check(opened.clone(), self.config())
            .map_err(|source| StoreError::Shard { path: path.clone(), source })?;
        // What was read to check it was what had been compared.
        if !opened.is_unchanged() {
            return Err(StoreError::Changing { path });
        }
        Ok(shard)
    }
}

/// The stores that a directory names: itself if it is one, else those directly inside, by name.
/// A directory that cannot be read holds none.
pub fn find_stores(dir: &Path) -> Vec<PathBuf> {
    // A manifest that cannot be read is told of by whoever opens its store.
    let is_store = |dir: &Path| is_listed(&dir.join(MANIFEST_FILE)).unwrap_or(false);
    if is_store(dir) {
        return vec![dir.to_owned()];
    }
    let inside = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let visible = inside.filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."));
    let mut stores: Vec<PathBuf> =
        visible.map(|entry| entry.path()).filter(|path| is_store(path)).collect();
    stores.sort();
    stores
}
