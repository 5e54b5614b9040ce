//! A directory that appears whole or not at all: filled beside its destination, then renamed.
//!
//! ```text
//! parent/.NAME.tercet-partial-PID-N/lock     held by the process that fills it
//! parent/.NAME.tercet-partial-PID-N/store/   becomes parent/NAME
//! ```
//!
//! A directory of that name whose lock nobody holds was left by a process that died, and is removed.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::file::open_regular;
use crate::manifest::{FileEntry, FileHash};

/// Bytes gathered before they are hashed and written: a huge page, and written where one may lie, so
/// that file systems whose cache has huge pages keep them in such.
const BUFFER_BYTES: usize = 2 << 20;
/// Attempts at a name nobody else took; only a crowd of processes in one directory needs a second.
const ATTEMPTS: u32 = 16;
const LOCK_FILE: &str = "lock";
const STORE_DIR: &str = "store";

/// Why a store was not written. Nothing was left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The destination is there already.
    #[error("{} already exists: name another destination, or remove it", path.display())]
    Exists {
        /// The destination.
        path: PathBuf,
    },
    /// The destination is not the name of a directory inside another.
    #[error("{} cannot be the name of a store", path.display())]
    Name {
        /// The destination.
        path: PathBuf,
    },
    /// The process was told to stop.
    #[error("told to stop before the store was whole")]
    Stopped,
    /// The operating system refused.
    #[error("failed to {action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file, named as it would be in the finished store.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

/// Stores that are being written by this process, and whether they are to be.
static WRITING: AtomicU64 = AtomicU64::new(0);
static STOPPED: AtomicBool = AtomicBool::new(false);

/// Lets every store that this process writes fail at its next write, and leave nothing behind; for a
/// process that is told to stop. Returns whether any is being written.
pub fn stop_writing() -> bool {
    STOPPED.store(true, Ordering::SeqCst);
    WRITING.load(Ordering::SeqCst) > 0
}

fn go_on() -> Result<(), WriteError> {
    if STOPPED.load(Ordering::SeqCst) { Err(WriteError::Stopped) } else { Ok(()) }
}

/// A store that is being written. Dropped before [`Staging::finish`], it disappears.
#[derive(Debug)]
pub(crate) struct Staging {
    dest: PathBuf,
    parent: PathBuf,
    /// The directory that holds the lock and the store; `None` when there is nothing to remove.
    partial: Option<PathBuf>,
    _lock: File,
}

impl Staging {
    /// Begins a store at `dest`, which must not exist and whose parent must.
    pub(crate) fn begin(dest: &Path) -> Result<Self, WriteError> {
        let Some(name) = dest.file_name() else {
            return Err(WriteError::Name { path: dest.to_owned() });
        };
        let parent = match dest.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        if fs::symlink_metadata(dest).is_ok() {
            return Err(WriteError::Exists { path: dest.to_owned() });
        }
        let prefix = format!(".{}.tercet-partial-", name.to_string_lossy());
        remove_abandoned(&parent, &prefix);
        let error = |action, source| WriteError::Io { action, path: dest.to_owned(), source };
        for _ in 0..ATTEMPTS {
            match Self::claim(&parent, &prefix) {
                Ok(Some((partial, lock))) => {
                    let partial = Some(partial);
                    WRITING.fetch_add(1, Ordering::SeqCst);
                    let staging = Self { dest: dest.to_owned(), parent, partial, _lock: lock };
                    go_on()?;
                    fs::create_dir(staging.path("")).map_err(|source| error("create", source))?;
                    return Ok(staging);
                }
                Ok(None) => {}
                Err(source) => return Err(error("create", source)),
            }
        }
        Err(error("create", ErrorKind::AlreadyExists.into()))
    }

    /// Tries to make a new directory and to lock it; `None` if another process was quicker.
    fn claim(parent: &Path, prefix: &str) -> io::Result<Option<(PathBuf, File)>> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let partial = parent.join(format!("{prefix}{}-{number}", std::process::id()));
        match fs::create_dir(&partial) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(None),
            made => made?,
        }
        let lock_path = partial.join(LOCK_FILE);
        let lock = File::create_new(&lock_path).inspect_err(|_| {
            let _ = fs::remove_dir(&partial);
        })?;
        // Between these two lines another process may take the directory for an abandoned one.
        match lock.try_lock() {
            Ok(()) if lock_path.exists() => Ok(Some((partial, lock))),
            Ok(()) | Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => {
                let _ = fs::remove_dir_all(&partial);
                Err(error)
            }
        }
    }

    /// Begins a file.
    pub(crate) fn create(&self, name: &str) -> Result<StagedFile, WriteError> {
        go_on()?;
        let shown = self.dest.join(name);
        match File::create_new(self.path(name)) {
            Ok(file) => Ok(StagedFile {
                file,
                name: name.to_owned(),
                shown,
                hash: blake3::Hasher::new(),
                bytes: 0,
                buffer: Vec::with_capacity(BUFFER_BYTES),
            }),
            Err(source) => Err(WriteError::Io { action: "create", path: shown, source }),
        }
    }

    /// Makes the store appear at its destination, durably.
    pub(crate) fn finish(mut self) -> Result<(), WriteError> {
        let error = |action, source| WriteError::Io { action, path: self.dest.clone(), source };
        go_on()?;
        let store = self.path("");
        sync_dir(&store).map_err(|source| error("sync", source))?;
        // An empty directory would be replaced silently.
        if fs::symlink_metadata(&self.dest).is_ok() {
            return Err(WriteError::Exists { path: self.dest.clone() });
        }
        if let Err(source) = fs::rename(&store, &self.dest) {
            let taken = matches!(
                source.kind(),
                ErrorKind::AlreadyExists | ErrorKind::DirectoryNotEmpty | ErrorKind::NotADirectory
            );
            return Err(match taken {
                true => WriteError::Exists { path: self.dest.clone() },
                false => error("rename", source),
            });
        }
        sync_dir(&self.parent).map_err(|source| error("sync", source))?;
        self.remove();
        Ok(())
    }

    /// A file of the store that is being written; the store itself for an empty name.
    fn path(&self, name: &str) -> PathBuf {
        let partial = self.partial.as_deref().unwrap_or(&self.dest);
        partial.join(STORE_DIR).join(name)
    }

    fn remove(&mut self) {
        if let Some(partial) = self.partial.take() {
            // What cannot be removed now is removed by the next import to this destination.
            let _ = fs::remove_dir_all(partial);
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        self.remove();
        WRITING.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Removes what dead processes left. Whatever cannot be locked or removed is somebody else's.
fn remove_abandoned(parent: &Path, prefix: &str) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(prefix) {
            continue;
        }
        let Ok((lock, _)) = open_regular(&entry.path().join(LOCK_FILE)) else { continue };
        if lock.try_lock().is_ok() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// A file of a store that is being written: hashed as it goes, synced when it ends.
#[derive(Debug)]
pub(crate) struct StagedFile {
    file: File,
    name: String,
    shown: PathBuf,
    hash: blake3::Hasher,
    bytes: u64,
    buffer: Vec<u8>,
}

impl StagedFile {
    /// Appends bytes.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> Result<(), WriteError> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BUFFER_BYTES - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            if self.buffer.len() == BUFFER_BYTES {
                self.flush()?;
            }
            bytes = later;
        }
        Ok(())
    }

    /// Ends the file.
    pub(crate) fn finish(mut self) -> Result<FileEntry, WriteError> {
        self.flush()?;
        self.file.sync_all().map_err(|source| self.error("sync", source))?;
        let blake3 = FileHash(self.hash.finalize().into());
        Ok(FileEntry { name: self.name, bytes: self.bytes, blake3 })
    }

    fn flush(&mut self) -> Result<(), WriteError> {
        go_on()?;
        self.file.write_all(&self.buffer).map_err(|source| self.error("write", source))?;
        self.hash.update(&self.buffer);
        self.bytes += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn error(&self, action: &'static str, source: io::Error) -> WriteError {
        WriteError::Io { action, path: self.shown.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_store_appears_whole() {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("model");
        let staging = Staging::begin(&dest).unwrap();
        let mut file = staging.create("a").unwrap();
        file.write(b"12").unwrap();
        file.write(b"3").unwrap();
        let entry = file.finish().unwrap();
        assert_eq!((entry.name.as_str(), entry.bytes), ("a", 3));
        assert_eq!(entry.blake3, FileHash(blake3::hash(b"123").into()));
        assert!(!dest.exists());
        staging.finish().unwrap();
        assert_eq!(fs::read(dest.join("a")).unwrap(), b"123");
        assert_eq!(names(dir.path()), ["model"]);
    }

    #[test]
    fn pieces_of_any_length_make_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("model");
        let staging = Staging::begin(&dest).unwrap();
        let mut file = staging.create("a").unwrap();
        let mut whole = Vec::new();
        for bytes in [3, BUFFER_BYTES - 3, BUFFER_BYTES, 2 * BUFFER_BYTES + 1, 0, BUFFER_BYTES - 1]
        {
            let piece: Vec<u8> = (0..bytes).map(|at| (at % 251) as u8).collect();
            file.write(&piece).unwrap();
            whole.extend(piece);
        }
        let entry = file.finish().unwrap();
        assert_eq!(entry.bytes, whole.len() as u64);
        assert_eq!(entry.blake3, FileHash(blake3::hash(&whole).into()));
        staging.finish().unwrap();
        assert!(fs::read(dest.join("a")).unwrap() == whole);
    }

    #[test]
    fn what_is_not_finished_disappears() {
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::begin(&dir.path().join("model")).unwrap();
        staging.create("a").unwrap().write(b"1").unwrap();
        assert_eq!(names(dir.path()).len(), 1);
        drop(staging);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn only_what_the_dead_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("model");
        let alive = Staging::begin(&dest).unwrap();
        let abandoned = dir.path().join(".model.tercet-partial-1-0");
        fs::create_dir_all(abandoned.join(STORE_DIR)).unwrap();
        fs::write(abandoned.join(LOCK_FILE), b"").unwrap();
        let foreign = dir.path().join(".model.tercet-partial-notes");
        fs::create_dir(&foreign).unwrap();
        let second = Staging::begin(&dest).unwrap();
        assert!(!abandoned.exists());
        assert!(foreign.exists() && alive.path("").exists() && second.path("").exists());

        second.create("a").unwrap().finish().unwrap();
        second.finish().unwrap();
        let text = alive.finish().unwrap_err().to_string();
        assert!(text.ends_with("model already exists: name another destination, or remove it"));
        assert!(dest.join("a").exists());
    }

    #[test]
    fn destinations_that_cannot_be_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let refusal = |dest: &Path| Staging::begin(dest).unwrap_err().to_string();
        assert!(refusal(dir.path()).contains("already exists"));
        assert!(refusal(&dir.path().join("no/model")).starts_with("failed to create"));
        assert!(refusal(Path::new("/")).contains("cannot be the name of a store"));
    }
}
