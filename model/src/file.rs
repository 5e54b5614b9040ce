//! Files of the outside: mapped whole, or read up to a limit. The only `unsafe` of this crate.
#![expect(unsafe_code, reason = "memory maps")]

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use memmap2::{Advice, Mmap, MmapMut};

/// A file mapped read-only, or a copy of one in private memory. An empty file is an empty map. Clones
/// share the memory.
#[derive(Clone, Debug)]
pub(crate) struct MappedFile {
    map: Option<Arc<Mmap>>,
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        if file.metadata()?.len() == 0 {
            return Ok(Self { map: None });
        }
        // SAFETY: the map is read-only and private to this value; files of a store never change
        // after they are renamed into place, and whoever shortens a file under a reader is told by
        // the documentation of stores that the reader dies of SIGBUS.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self { map: Some(Arc::new(map)) })
    }

    /// The same bytes in memory of this process alone, on huge pages if the system has them. The
    /// calling thread writes every page first, and so decides on whose memory node they are.
    pub(crate) fn copied(&self) -> io::Result<Self> {
        let Some(from) = &self.map else { return Ok(Self { map: None }) };
        let mut map = MmapMut::map_anon(from.len())?;
        advise_huge_pages(|advice| map.advise(advice));
        map.copy_from_slice(from);
        Ok(Self { map: Some(Arc::new(map.make_read_only()?)) })
    }

    /// Keeps the bytes in memory, whatever else wants it.
    pub(crate) fn lock(&self) -> io::Result<()> {
        self.map.as_ref().map_or(Ok(()), |map| map.lock())
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.map.as_ref().map(|map| &***map).unwrap_or_default()
    }

    /// Tells the kernel that all bytes will be read again and again: it may begin to read the file
    /// before anybody waits for it.
    pub(crate) fn advise_weights(&self) {
        if let Some(map) = &self.map {
            // Advice is only that: a kernel that refuses it changes nothing.
            let _ = map.advise(Advice::WillNeed);
            advise_huge_pages(|advice| map.advise(advice));
        }
    }

    /// Tells the kernel that the bytes will be read front to back soon.
    pub(crate) fn advise_sequential(&self) {
        if let Some(map) = &self.map {
            // Advice is only that: a kernel that refuses it changes nothing.
            let _ = map.advise(Advice::Sequential);
        }
    }
}

/// Asks for huge pages, which Linux alone gives on demand; for maps of files only some kernels do.
fn advise_huge_pages(advise: impl FnOnce(Advice) -> io::Result<()>) {
    #[cfg(target_os = "linux")]
    // Advice is only that.
    let _ = advise(Advice::HugePage);
    #[cfg(not(target_os = "linux"))]
    let _ = advise;
}

/// Reads a file that must not be longer than `limit_bytes`.
pub(crate) fn read_limited(path: &Path, limit_bytes: u64) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let found_bytes = file.metadata()?.len();
    let too_long = || {
        let text = format!("longer than the {limit_bytes} bytes such a file may have");
        Err(io::Error::new(io::ErrorKind::InvalidData, text))
    };
    if found_bytes > limit_bytes {
        return too_long();
    }
    let mut bytes = Vec::with_capacity(found_bytes as usize);
    // The file may be growing, or be a pipe that claims no length.
    file.take(limit_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit_bytes { too_long() } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_and_kinds_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"12345").unwrap();
        assert_eq!(read_limited(&path, 5).unwrap(), b"12345");
        let text = read_limited(&path, 4).unwrap_err().to_string();
        assert_eq!(text, "longer than the 4 bytes such a file may have");
        assert_eq!(MappedFile::open(&path).unwrap().bytes(), b"12345");
        let copy = MappedFile::open(&path).unwrap().copied().unwrap();
        std::fs::write(&path, b"").unwrap();
        assert_eq!(copy.bytes(), b"12345");
        let empty = MappedFile::open(&path).unwrap();
        assert_eq!(empty.bytes(), b"");
        assert_eq!(empty.copied().unwrap().bytes(), b"");
        empty.lock().unwrap();
        assert_eq!(MappedFile::open(dir.path()).unwrap_err().to_string(), "not a regular file");
    }
}
