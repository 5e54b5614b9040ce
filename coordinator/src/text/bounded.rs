//! Texts that may not grow beyond a limit, whoever writes them.

use std::{fmt, io};

/// Takes no more than `limit_bytes`.
pub(crate) struct BoundedOutput {
    pub(crate) bytes: Vec<u8>,
    /// More was written than fits.
    pub(crate) overflowed: bool,
    limit_bytes: usize,
}

impl BoundedOutput {
    /// An empty output.
    pub(crate) fn new(limit_bytes: usize) -> Self {
        Self { bytes: Vec::new(), overflowed: false, limit_bytes }
    }
}

impl io::Write for BoundedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit_bytes {
            self.overflowed = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Write for BoundedOutput {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        io::Write::write_all(self, text.as_bytes()).map_err(|_| fmt::Error)
    }
}
