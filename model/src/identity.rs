//! What tells that an open file was written to: where it is, how long it is, and when it changed.
//!
//! Linux stamps a file before the first byte of a write lands in it, at a truncation, and when a
//! page of a shared map is written for the first time since it was last clean (not on tmpfs). The
//! stamp is the time of the last timer tick; a program can set the time of modification back, but
//! not that of the change. So: content was read, and the identity before and after is the same, hence
//! it was not written to in between, if the first was taken a tick after the last change.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Longer than the tick of any kernel (100 to 1000 a second).
const TICK: Duration = Duration::from_millis(12);

/// A file that is written to all the time never settles.
const TICKS_MAX: usize = 50;

/// One file at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    /// Seconds and nanoseconds since the epoch.
    modified: (i64, i64),
    /// Of content, links, owner or rights; the same.
    changed: (i64, i64),
}

impl Identity {
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self {
            device: found.dev(),
            inode: found.ino(),
            bytes: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }

    /// [`Self::of`], such that a later write gives another one: waits a tick if the last was just now.
    pub(crate) fn settled(file: &File) -> io::Result<Self> {
        let mut found = Self::of(file)?;
        for _ in 0..TICKS_MAX {
            let changed = found.changed_at();
            let age = changed.and_then(|changed| SystemTime::now().duration_since(changed).ok());
            // In the future: the clock of a file server, whose ticks are not known.
            let Some(left) = age.and_then(|age| TICK.checked_sub(age)) else { break };
            #[expect(clippy::disallowed_methods, reason = "waits a tick, off the async threads")]
            std::thread::sleep(left);
            let now = Self::of(file)?;
            if now == found {
                break;
            }
            found = now;
        }
        Ok(found)
    }

    /// Length of the file.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn changed_at(&self) -> Option<SystemTime> {
        let (seconds, nanos) = self.changed;
        let time = Duration::new(seconds.max(0) as u64, nanos.clamp(0, 999_999_999) as u32);
        UNIX_EPOCH.checked_add(time)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn every_write_shows_even_if_the_time_is_set_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, b"12345").unwrap();
        let file = File::open(&path).unwrap();
        let writer = File::options().write(true).open(&path).unwrap();
        let modified = writer.metadata().unwrap().modified().unwrap();
        for _ in 0..20 {
            let before = Identity::settled(&file).unwrap();
            assert_eq!(Identity::of(&file).unwrap(), before);
            writer.write_all_at(b"2", 1).unwrap();
            writer.set_modified(modified).unwrap();
            assert_ne!(Identity::of(&file).unwrap(), before);
        }
        let before = Identity::settled(&file).unwrap();
        writer.set_len(3).unwrap();
        assert_ne!(Identity::of(&file).unwrap(), before);
    }
}
