//! Files of the outside: mapped whole, or read up to a limit. The only `unsafe` of this crate.
#![expect(unsafe_code, reason = "memory maps")]

use std::fs::{self, File, FileType, OpenOptions};
use std::io::{self, Read};
#[cfg(unix)]
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
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
        let (file, found_bytes) = open_regular(path)?;
        if found_bytes == 0 {
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

/// Opens a regular file for reading; the second is its length in bytes.
///
/// Anything else is refused at once: opening a FIFO waits for a writer that may never come, and a
/// device may act when it is opened or never end.
pub(crate) fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    // Looked at first, so that no device is opened, and once more when it is open: something else
    // may have taken the name in between, which must not make us wait either.
    check_regular(fs::metadata(path)?.file_type())?;
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    options.custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits());
    let file = options.open(path)?;
    let metadata = file.metadata()?;
    check_regular(metadata.file_type())?;
    Ok((file, metadata.len()))
}

fn check_regular(found: FileType) -> io::Result<()> {
    if found.is_file() {
        return Ok(());
    }
    let text = format!("not a regular file, but {}", kind_of(found));
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

/// What something that is no regular file is, in words.
pub(crate) fn kind_of(found: FileType) -> &'static str {
    if found.is_dir() {
        return "a directory";
    }
    #[cfg(unix)]
    if found.is_fifo() {
        return "a FIFO";
    } else if found.is_socket() {
        return "a socket";
    } else if found.is_char_device() || found.is_block_device() {
        return "a device";
    }
    "something else"
}

/// Reads a regular file that must not be longer than `limit_bytes`.
///
/// # Errors
///
/// What the operating system said; `InvalidInput` for a FIFO, a device or a directory, which are
/// refused without waiting, and `InvalidData` for a file that is too long.
pub fn read_limited(path: &Path, limit_bytes: u64) -> io::Result<Vec<u8>> {
    let (file, found_bytes) = open_regular(path)?;
    let too_long = || {
        let text = format!("longer than the {limit_bytes} bytes such a file may have");
        Err(io::Error::new(io::ErrorKind::InvalidData, text))
    };
    if found_bytes > limit_bytes {
        return too_long();
    }
    let mut bytes = Vec::with_capacity(found_bytes as usize);
    // The file may be growing, or be one of those under /proc that claim no length.
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
        let text = MappedFile::open(dir.path()).unwrap_err().to_string();
        assert_eq!(text, "not a regular file, but a directory");
    }

    /// Nobody ever writes to the FIFO: whoever waits for that hangs this test.
    #[cfg(unix)]
    #[test]
    fn fifos_sockets_and_devices_are_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let (fifo, socket) = (dir.path().join("fifo"), dir.path().join("socket"));
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&fifo, &link).unwrap();
        let cases = [
            (fifo.as_path(), "not a regular file, but a FIFO"),
            (&link, "not a regular file, but a FIFO"),
            (&socket, "not a regular file, but a socket"),
            (Path::new("/dev/zero"), "not a regular file, but a device"),
        ];
        for (path, expected) in cases {
            assert_eq!(MappedFile::open(path).unwrap_err().to_string(), expected);
            assert_eq!(read_limited(path, 5).unwrap_err().to_string(), expected);
        }
        // A regular file is not read otherwise than before.
        std::os::unix::fs::symlink(dir.path().join("file"), dir.path().join("other")).unwrap();
        fs::write(dir.path().join("file"), b"12345").unwrap();
        assert_eq!(read_limited(&dir.path().join("other"), 5).unwrap(), b"12345");
    }
}
