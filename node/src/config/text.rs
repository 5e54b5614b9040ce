//! Small text files that somebody names: a configuration, a list, a secret.

use std::fs::{File, FileType, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::ByteSize;

/// How long a pipe may say nothing: a command that prints a secret asks another machine for it.
const SILENCE: Duration = Duration::from_secs(5);

/// Why there is no text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// The operating system gave none, or it is not UTF-8.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A terminal, a disk, a source of zeros: no text that somebody wrote down, and perhaps without end.
    #[error("it is a device and not a file")]
    Device,
    /// Longer than whatever it may hold.
    #[error("it has more than {limit}, which is the most")]
    TooLong {
        /// The most that it may have.
        limit: ByteSize,
    },
    /// It is a pipe into which nobody writes.
    #[error("it is a pipe, and nothing came out of it for {} seconds", waited.as_secs())]
    Silent {
        /// So long.
        waited: Duration,
    },
}

/// The text in the file at `path`, of at most `limit` bytes. It may be a pipe (`/dev/fd/63`, as shells write
/// `<(command)`), or `/dev/null`, which is empty.
///
/// # Errors
///
/// [`TextError`]; its words go behind the name of the file.
pub fn read_text(path: &Path, limit: ByteSize) -> Result<String, TextError> {
    read_within(path, limit, SILENCE)
}

fn read_within(path: &Path, limit: ByteSize, silence: Duration) -> Result<String, TextError> {
    // Before it is opened, which some devices take for an order.
    let meta = std::fs::metadata(path)?;
    if is_device(meta.file_type()) && !is_null(&meta) {
        return Err(TextError::Device);
    }
    // A pipe that nobody writes to would wait here, and for good.
    let file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    let mut bytes = Vec::new();
    // One more, to see that there is more.
    let mut file = Patient { file, silence }.take(limit.0.saturating_add(1));
    if let Err(error) = file.read_to_end(&mut bytes) {
        return Err(match error.kind() {
            io::ErrorKind::TimedOut => TextError::Silent { waited: silence },
            _ => error.into(),
        });
    }
    if bytes.len() as u64 > limit.0 {
        return Err(TextError::TooLong { limit });
    }
    String::from_utf8(bytes).map_err(|error| {
        io::Error::new(io::ErrorKind::InvalidData, error.utf8_error().to_string()).into()
    })
}

fn is_device(kind: FileType) -> bool {
    kind.is_char_device() || kind.is_block_device()
}

fn is_null(meta: &Metadata) -> bool {
    std::fs::metadata("/dev/null").is_ok_and(|null| null.rdev() == meta.rdev())
}

/// Reads a file that does not block, and waits for each part for so long.
struct Patient {
    file: File,
    silence: Duration,
}

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let timeout = PollTimeout::try_from(self.silence).unwrap_or(PollTimeout::MAX);
        // A pipe that nobody has opened for writing yet is not at its end, which only this tells.
        let ready = poll(&mut [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)], timeout);
        match ready {
            Ok(0) => Err(io::ErrorKind::TimedOut.into()),
            Err(Errno::EINTR) => Err(io::ErrorKind::Interrupted.into()),
            Err(error) => Err(error.into()),
            Ok(_) => self.file.read(buffer),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    const LIMIT: ByteSize = ByteSize(8);

    #[test]
    fn files_are_read_up_to_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        std::fs::write(&path, "eight by").unwrap();
        assert_eq!(read_text(&path, LIMIT).unwrap(), "eight by");
        std::fs::write(&path, "nine byte").unwrap();
        assert!(matches!(read_text(&path, LIMIT), Err(TextError::TooLong { limit: LIMIT })));
        std::fs::write(&path, b"\xff").unwrap();
        assert!(matches!(read_text(&path, LIMIT), Err(TextError::Io(_))));
        assert!(matches!(read_text(dir.path(), LIMIT), Err(TextError::Io(_))));
        assert!(matches!(read_text(&dir.path().join("none"), LIMIT), Err(TextError::Io(_))));
    }

    #[test]
    fn devices_are_refused_but_for_the_empty_one() {
        assert!(matches!(read_text(Path::new("/dev/zero"), LIMIT), Err(TextError::Device)));
        assert_eq!(read_text(Path::new("/dev/null"), LIMIT).unwrap(), "");
    }

    #[test]
    fn pipes_are_read_to_their_end_and_silent_ones_are_not_waited_for() {
        let (reader, mut writer) = io::pipe().unwrap();
        let path = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader));
        let writing = std::thread::spawn(move || {
            writer.write_all(b"one ").unwrap();
            writer.write_all(b"two").unwrap();
        });
        assert_eq!(read_text(Path::new(&path), LIMIT).unwrap(), "one two");
        writing.join().unwrap();

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let waited = Duration::from_millis(20);
        let silent = read_within(&path, LIMIT, waited).unwrap_err();
        assert!(matches!(silent, TextError::Silent { .. }), "{silent}");
        let to = path.clone();
        let writing = std::thread::spawn(move || std::fs::write(to, "fifo").unwrap());
        assert_eq!(read_text(&path, LIMIT).unwrap(), "fifo");
        writing.join().unwrap();
    }
}
