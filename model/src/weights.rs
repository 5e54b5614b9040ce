//! A file of a store whose content was compared with the manifest, and what tells whether it still is so.
//!
//! ```text
//! open ─▶ identity ─▶ hash = the manifest's? ─▶ identity the same? ─▶ WeightFile
//!                                                  compute, then `is_unchanged`? ─▶ results may leave
//!                                                  else `verify` ─▶ compute once more, or leave
//! ```
//!
//! A copy in private memory (`--weights copy`) is hashed after it was made; no file changes it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::file::MappedFile;
use crate::identity::Identity;
use crate::manifest::FileHash;
use crate::store::StoreError;

/// The bytes of a file of a store, which were those that the manifest names. Clones share the memory.
#[derive(Clone, Debug)]
pub struct WeightFile(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    mapped: MappedFile,
    path: PathBuf,
    expected: FileHash,
    /// When the content was last compared; `None` for a copy.
    verified: Mutex<Option<Identity>>,
}

impl WeightFile {
    /// Compares the content of a file with `expected`, unless it is known to have been right when it
    /// was `known`. `done` is told how many bytes of it were read.
    pub(crate) fn verified(
        mapped: MappedFile,
        path: PathBuf,
        expected: FileHash,
        known: Option<Identity>,
        done: &mut dyn FnMut(u64),
    ) -> Result<Self, StoreError> {
        let now = mapped.identity().map_err(|source| read_error(&path, source))?;
        let verified = Mutex::new(now);
        let file = Self(Arc::new(Inner { mapped, path, expected, verified }));
        if known.is_none() || known != now {
            file.verify_with(done)?;
        }
        Ok(file)
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.0.mapped.bytes()
    }

    pub(crate) fn mapped(&self) -> &MappedFile {
        &self.0.mapped
    }

    /// What the file was when its content was last compared.
    pub(crate) fn identity(&self) -> Option<Identity> {
        *self.0.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same bytes in memory of this process alone, compared once more.
    ///
    /// # Errors
    ///
    /// If there is not so much memory, or the copy is not what the manifest says.
    pub fn copied(&self) -> io::Result<Self> {
        let Inner { mapped, path, expected, .. } = &*self.0;
        let (mapped, path, verified) = (mapped.copied()?, path.clone(), Mutex::new(None));
        let copy = Self(Arc::new(Inner { mapped, path, expected: *expected, verified }));
        let wrong = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        check_hash(copy.path(), copy.0.expected, copy.0.mapped.hash(&mut |_| {})).map_err(wrong)?;
        Ok(copy)
    }

    /// Whether nobody wrote to the file since its content was last compared: one system call, which
    /// reads nothing. What was computed before it was computed with the right bytes. A copy is
    /// always unchanged.
    pub fn is_unchanged(&self) -> bool {
        let verified = self.identity();
        // A file that cannot be looked at any more may be anything.
        self.0.mapped.identity().is_ok_and(|now| now == verified)
    }

    /// Compares the content with the manifest once more, by the threads of the pool that the caller is
    /// in; from then on [`Self::is_unchanged`] speaks of what the file is now.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if it is another one.
    pub fn verify(&self) -> Result<(), StoreError> {
        self.verify_with(&mut |_| {})
    }

    fn verify_with(&self, done: &mut dyn FnMut(u64)) -> Result<(), StoreError> {
        let identity = self.compare(done)?;
        *self.0.verified.lock().unwrap_or_else(PoisonError::into_inner) = identity;
        Ok(())
    }

    /// What the file was while its content was compared with the manifest and found right.
    fn compare(&self, done: &mut dyn FnMut(u64)) -> Result<Option<Identity>, StoreError> {
        let Inner { mapped, path, expected, .. } = &*self.0;
        let read_error = |source| read_error(path, source);
        let before = mapped.settled_identity().map_err(read_error)?;
        if let Some(identity) = before {
            // Reading beyond the end of a file that was cut short would end the process.
            let (expected_bytes, found_bytes) = (mapped.bytes().len() as u64, identity.bytes());
            if found_bytes != expected_bytes {
                return Err(StoreError::Size { path: path.clone(), found_bytes, expected_bytes });
            }
        }
        check_hash(path, *expected, mapped.hash(done))?;
        match mapped.identity().map_err(read_error)? {
            after if after == before => Ok(after),
            _ => Err(StoreError::Changing { path: path.clone() }),
        }
    }

    fn is(&self, other: &Weak<Inner>) -> bool {
        std::ptr::eq(Arc::as_ptr(&self.0), other.as_ptr())
    }
}

/// Looks after files beside other work: see [`FileWatch::look`] and [`FileWatch::compare`]. Keeps no memory
/// of theirs.
#[derive(Debug, Default)]
pub struct FileWatch {
    /// Files to which somebody wrote, what they were then, and that it was right.
    looked: Vec<(Weak<Inner>, Option<Identity>)>,
    /// The file that is being compared, how far, and the hash of what was read.
    comparing: Weak<Inner>,
    at: usize,
    hash: blake3::Hasher,
}

impl FileWatch {
    /// Looks whether anybody wrote to one of `files`: a system call each. What was written to is
    /// compared with the manifest, once for each time. Changes nothing about what
    /// [`WeightFile::is_unchanged`] says.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the content of one is another.
    pub fn look(&mut self, files: &[WeightFile]) -> Result<(), StoreError> {
        self.looked.retain(|(known, _)| files.iter().any(|file| file.is(known)));
        for file in files.iter().filter(|file| !file.is_unchanged()) {
            let now = file.0.mapped.identity().map_err(|source| read_error(file.path(), source))?;
            let known = self.looked.iter().position(|(known, _)| file.is(known));
            if known.is_some_and(|at| self.looked[at].1 == now) {
                continue;
            }
            let found = file.compare(&mut |_| {})?;
            match known {
                Some(at) => self.looked[at].1 = found,
                None => self.looked.push((Arc::downgrade(&file.0), found)),
            }
        }
        Ok(())
    }

    /// Compares at most `count` more bytes of `files`, one file after the other and again from the
    /// first. True when a file was read to its end.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the content of one is another.
    pub fn compare(&mut self, files: &[WeightFile], count: usize) -> Result<bool, StoreError> {
        let at = files.iter().position(|file| file.is(&self.comparing));
        let Some(file) = files.get(at.unwrap_or(0)) else { return Ok(false) };
        if at.is_none() {
            // The one that was begun is not held any more.
            self.begin(file);
        }
        let rest = file.bytes().get(self.at..).unwrap_or_default();
        let piece = &rest[..count.min(rest.len())];
        self.hash.update(piece);
        self.at += piece.len();
        if piece.len() < rest.len() {
            return Ok(false);
        }
        check_hash(file.path(), file.0.expected, self.hash.finalize().into())?;
        let next = (at.unwrap_or(0) + 1) % files.len();
        self.begin(&files[next]);
        Ok(true)
    }

    fn begin(&mut self, file: &WeightFile) {
        self.comparing = Arc::downgrade(&file.0);
        self.at = 0;
        self.hash = blake3::Hasher::new();
    }
}

fn read_error(path: &Path, source: io::Error) -> StoreError {
    StoreError::Read { path: path.to_owned(), source }
}

pub(crate) fn check_hash(
    path: &Path,
    expected: FileHash,
    found: [u8; 32],
) -> Result<(), StoreError> {
    let found = FileHash(found);
    match found == expected {
        true => Ok(()),
        false => Err(StoreError::Hash { path: path.to_owned(), found, expected }),
    }
}
