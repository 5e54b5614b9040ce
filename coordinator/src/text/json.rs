//! `tojson` as `transformers` gives it to templates: Python's `json.dumps` without escaping HTML.

use std::io;

use serde::Serialize;
use serde_json::ser::Formatter;

use super::bounded::BoundedOutput;

/// Levels of one value: as deep as JSON that clients send may be.
const MAX_DEPTH: usize = 128;

/// How Python was asked to write.
pub(crate) struct PythonJson {
    /// Spaces of one level; `None`: all on one line.
    pub(crate) indent: Option<usize>,
    /// Between items.
    pub(crate) item_separator: String,
    /// Between key and value.
    pub(crate) key_separator: String,
    /// Write everything outside ASCII as `\uXXXX`.
    pub(crate) ensure_ascii: bool,
}

impl PythonJson {
    /// `value` as JSON of at most `limit_bytes`. Values that share their parts are small in
    /// memory and may still be endless to write, so the limit holds while writing.
    ///
    /// # Errors
    ///
    /// What the serialiser says of a value that JSON does not have, and of one that is too long
    /// or too deep.
    pub(crate) fn write(
        &self,
        value: &impl Serialize,
        limit_bytes: usize,
    ) -> serde_json::Result<String> {
        let mut output = BoundedOutput::new(limit_bytes);
        let formatter = PythonFormatter { style: self, depth: 0, has_value: false };
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut output, formatter))?;
        Ok(String::from_utf8_lossy(&output.bytes).into_owned())
    }
}

struct PythonFormatter<'a> {
    style: &'a PythonJson,
    depth: usize,
    has_value: bool,
}

impl PythonFormatter<'_> {
    fn new_line<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        let Some(indent) = self.style.indent else { return Ok(()) };
        writer.write_all(b"\n")?;
        writer.write_all(" ".repeat(indent.saturating_mul(self.depth)).as_bytes())
    }

    fn open<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: u8) -> io::Result<()> {
        if self.depth == MAX_DEPTH {
            let message = format!("more than {MAX_DEPTH} levels");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        self.depth += 1;
        self.has_value = false;
        writer.write_all(&[bracket])
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: u8) -> io::Result<()> {
        self.depth -= 1;
        if self.has_value {
            self.new_line(writer)?;
        }
        writer.write_all(&[bracket])
    }

    fn item<W: ?Sized + io::Write>(&self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.style.item_separator.as_bytes())?;
        }
        self.new_line(writer)
    }
}

impl Formatter for PythonFormatter<'_> {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b'[')
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b']')
    }

    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.item(writer, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b'{')
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b'}')
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.item(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.style.key_separator.as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        if !self.style.ensure_ascii {
            return writer.write_all(fragment.as_bytes());
        }
        let mut units = [0; 2];
        for character in fragment.chars() {
            if character.is_ascii() {
                writer.write_all(&[character as u8])?;
            } else {
                for unit in character.encode_utf16(&mut units) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }
}
