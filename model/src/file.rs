//! Files of the outside: mapped whole, or read up to a limit.
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

use crate::identity::Identity;
use crate::sigbus::Named;

/// Bytes of a file that are resident beside their copy: a few huge pages.
const COPIED_BYTES: usize = 16 << 20;

/// Bytes that are read in before they are hashed: much enough for a disk and for many threads.
const HASHED_BYTES: usize = 16 << 20;

/// Fewer bytes are hashed sooner by one thread than handed out to many.
const HASHED_ALONE_BYTES: usize = 1 << 20;

/// A file mapped read-only, or a copy of one in private memory. An empty file is an empty map. Clones
/// share the memory.
#[derive(Clone, Debug)]
pub(crate) struct MappedFile {
    region: Option<Arc<Region>>,
}

#[derive(Debug)]
struct Region {
    /// Forgotten before the map goes.
    _named: Option<Named>,
    map: Mmap,
    /// What is mapped; `None` for a copy, which no file can change.
    file: Option<File>,
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let (file, found_bytes) = open_regular(path)?;
        if found_bytes == 0 {
            return Ok(Self { region: None });
        }
        // SAFETY: the map is read-only and private to this value. Its bytes may change while they
        // are read, if somebody writes to the file: every value of them is a valid one of the
        // integers and floats that they are read as, and what they are used for is checked against
        // `identity`. If the file is cut short, reading ends the process: see `sigbus`.
        let map = unsafe { Mmap::map(&file)? };
        // Before anything is read: what is read first decides on what pages the file is cached.
        advise_huge_pages(|advice| map.advise(advice));
        let named = Some(Named::new(&map, path));
        Ok(Self { region: Some(Arc::new(Region { _named: named, map, file: Some(file) })) })
    }

    /// What the mapped file is at this moment; `None` for a copy.
    pub(crate) fn identity(&self) -> io::Result<Option<Identity>> {
        self.file().map(Identity::of).transpose()
    }

    /// [`Self::identity`], such that whatever is written from now on changes it.
    pub(crate) fn settled_identity(&self) -> io::Result<Option<Identity>> {
        self.file().map(Identity::settled).transpose()
    }

    fn file(&self) -> Option<&File> {
        self.region.as_ref().and_then(|region| region.file.as_ref())
    }

    fn map(&self) -> Option<&Mmap> {
        self.region.as_ref().map(|region| &region.map)
    }

    /// BLAKE3 of the bytes, which are read into memory on the way, by the threads of the pool that the
    /// caller is in. `done` is told of every piece how many bytes it has.
    pub(crate) fn hash(&self, done: &mut dyn FnMut(u64)) -> [u8; 32] {
        let mut hash = blake3::Hasher::new();
        for (at, piece) in self.bytes().chunks(HASHED_BYTES).enumerate() {
            self.populate_range(at * HASHED_BYTES, piece.len());
            match piece.len() < HASHED_ALONE_BYTES {
                true => hash.update(piece),
                false => hash.update_rayon(piece),
            };
            done(piece.len() as u64);
        }
        hash.finalize().into()
    }

    fn populate_range(&self, offset: usize, len: usize) {
        #[cfg(target_os = "linux")]
        if let Some(map) = self.map().filter(|_| self.file().is_some()) {
            // Without it the pages come one by one as they are read.
            let _ = map.advise_range(Advice::PopulateRead, offset, len);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (offset, len);
    }

    /// The same bytes in memory of this process alone, on huge pages if the system has them. The
    /// calling thread writes every page first, and so decides on whose memory node they are.
    pub(crate) fn copied(&self) -> io::Result<Self> {
        let Some(from) = self.map() else { return Ok(Self { region: None }) };
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
        let map = map.make_read_only()?;
        Ok(Self { region: Some(Arc::new(Region { _named: None, map, file: None })) })
    }

    /// Keeps the bytes in memory, whatever else wants it.
    pub(crate) fn lock(&self) -> io::Result<()> {
        self.map().map_or(Ok(()), Mmap::lock)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.map().map(|map| &**map).unwrap_or_default()
    }

    /// Reads the file into memory, if it is not there, and maps all of it: bytes that will be read
    /// again and again.
    pub(crate) fn populate(&self) {
        let Some(map) = self.map() else { return };
        #[cfg(target_os = "linux")]
        if map.advise(Advice::PopulateRead).is_ok() {
            return;
        }
        // Linux before 5.14, or another system. Advice is only that.
        let _ = map.advise(Advice::WillNeed);
    }

    /// Tells the kernel that the bytes will be read front to back soon.
    pub(crate) fn advise_sequential(&self) {
        if let Some(map) = self.map() {
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
    let metadata = fs::metadata(path).map_err(|error| explained(path, error))?;
    check_regular(metadata.file_type())?;
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    options.custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits());
    let file = options.open(path)?;
    let metadata = file.metadata()?;
    check_regular(metadata.file_type())?;
    Ok((file, metadata.len()))
}

/// Whether its directory lists it: also a link that leads nowhere, which was meant to be something.
///
/// # Errors
///
/// What the operating system said, where it did not say that there is nothing.
pub(crate) fn is_listed(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if is_nothing(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether an error says that there is nothing of that name.
pub(crate) fn is_nothing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// The same error, and of a link that leads nowhere whither it leads.
fn explained(path: &Path, error: io::Error) -> io::Error {
    match fs::read_link(path) {
        Ok(target) if is_nothing(&error) => {
            let text = format!("it is a link to {}, which is not there", target.display());
            io::Error::new(error.kind(), text)
        }
        _ => error,
    }
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

/// The same for a file that need not be there: `None` if its directory does not list it.
///
/// # Errors
///
/// As [`read_limited`], also for a link that leads nowhere.
pub(crate) fn read_if_listed(path: &Path, limit_bytes: u64) -> io::Result<Option<Vec<u8>>> {
    match read_limited(path, limit_bytes) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if is_nothing(&error) && !is_listed(path)? => Ok(None),
        Err(error) => Err(error),
    }
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
