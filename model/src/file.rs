//! Files of the outside: mapped whole, or read up to a limit. The only `unsafe` of this crate.
#![expect(unsafe_code, reason = "memory maps")]

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

#[cfg(target_os = "linux")]
use memmap2::UncheckedAdvice;
use memmap2::{Advice, Mmap, MmapMut};

/// Bytes of a file that are resident beside their copy: a few huge pages.
const COPIED_BYTES: usize = 16 << 20;

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
        // Before anything is read: what is read first decides on what pages the file is cached.
        advise_huge_pages(|advice| map.advise(advice));
        Ok(Self { map: Some(Arc::new(map)) })
    }

    /// The same bytes in memory of this process alone, on huge pages if the system has them. The
    /// calling thread writes every page first, and so decides on whose memory node they are.
    pub(crate) fn copied(&self) -> io::Result<Self> {
        let Some(from) = &self.map else { return Ok(Self { map: None }) };
        let mut map = MmapMut::map_anon(from.len())?;
        advise_huge_pages(|advice| map.advise(advice));
        for (at, piece) in map.chunks_mut(COPIED_BYTES).enumerate() {
            let offset = at * COPIED_BYTES;
            piece.copy_from_slice(&from[offset..][..piece.len()]);
            #[cfg(target_os = "linux")]
            // SAFETY: pages of a map of a file are read again from it when they are wanted. Where
            // this is refused they stay resident, which is all it is to spare.
            let _ = unsafe {
                from.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, piece.len())
            };
        }
        Ok(Self { map: Some(Arc::new(map.make_read_only()?)) })
    }

    /// Keeps the bytes in memory, whatever else wants it.
    pub(crate) fn lock(&self) -> io::Result<()> {
        self.map.as_ref().map_or(Ok(()), |map| map.lock())
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.map.as_ref().map(|map| &***map).unwrap_or_default()
    }

    /// Reads the file into memory, if it is not there, and maps all of it: bytes that will be read
    /// again and again.
    pub(crate) fn populate(&self) {
        let Some(map) = &self.map else { return };
        #[cfg(target_os = "linux")]
        if map.advise(Advice::PopulateRead).is_ok() {
            return;
        }
        // Linux before 5.14, or another system. Advice is only that.
        let _ = map.advise(Advice::WillNeed);
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
        let mapped = MappedFile::open(&path).unwrap();
        mapped.populate();
        let copy = mapped.copied().unwrap();
        assert_eq!(mapped.bytes(), b"12345", "what was let go of is read again");
        std::fs::write(&path, b"").unwrap();
        assert_eq!(copy.bytes(), b"12345");
        let empty = MappedFile::open(&path).unwrap();
        assert_eq!(empty.bytes(), b"");
        assert_eq!(empty.copied().unwrap().bytes(), b"");
        empty.populate();
        empty.lock().unwrap();
        assert_eq!(MappedFile::open(dir.path()).unwrap_err().to_string(), "not a regular file");
    }
}
