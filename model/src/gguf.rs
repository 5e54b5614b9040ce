//! The GGUF container, versions 2 and 3: checked tables of metadata and tensors over borrowed bytes.
//!
//! ```text
//! "GGUF" | u32 version | u64 tensors | u64 metadata entries | entries | tensor infos | padding | data
//! ```
//!
//! Parsing allocates in proportion to what it has already read, never by a number that the file
//! states: strings and arrays stay views of the file. What metadata and tensors mean is not known
//! here (see [`mod@crate::import`]).

mod metadata;
mod tensors;

use std::collections::BTreeMap;

pub use metadata::{Array, Metadata, Value, ValueType};
pub use tensors::{GgufTensor, GgufType};

/// Most metadata entries; real files have about 30.
pub const METADATA_MAX: u64 = 65_536;
/// Most tensors; a dense model of 1024 layers has under 20,000.
pub const TENSORS_MAX: u64 = 65_536;
/// Longest tensor name, in bytes: four times what ggml has room for.
pub const NAME_BYTES_MAX: u64 = 256;
/// Longest metadata key, in bytes: the format's own limit.
pub const KEY_BYTES_MAX: u64 = (1 << 16) - 1;
/// Longest string, in bytes: strings stay in the file, so this costs nothing, and a text that is
/// taken has a limit of its own. Longer than any license or template.
pub const STRING_BYTES_MAX: u64 = 64 << 20;
/// Largest alignment of the data: a huge page.
pub const ALIGNMENT_MAX: u32 = 2 << 20;
/// Alignment of a file that does not say.
const ALIGNMENT_DEFAULT: u32 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";
const MAGIC: &[u8; 4] = b"GGUF";
/// What a checkpoint begins with that was cloned without git-lfs.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// Why bytes are not a usable GGUF file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// A git-lfs pointer in place of the data.
    #[error("this is a git-lfs pointer, not the data: fetch it with `git lfs pull`")]
    LfsPointer,
    /// Not GGUF.
    #[error("not a GGUF file: it does not begin with \"GGUF\"")]
    Magic,
    /// The file was made for machines of the other byte order.
    #[error("this is a big-endian GGUF file: convert it to little-endian first")]
    BigEndian,
    /// A version that nobody should have any more, or does not have yet.
    #[error("GGUF version {found} is not supported, expected 2 or 3")]
    Version {
        /// The file's version.
        found: u32,
    },
    /// The file ends too early.
    #[error(
        "truncated: {what} needs {needed_bytes} bytes at byte {at}, the file has {left_bytes} left"
    )]
    Truncated {
        /// What was being read.
        what: String,
        /// Where.
        at: u64,
        /// Bytes it needs.
        needed_bytes: u64,
        /// Bytes there are.
        left_bytes: u64,
    },
    /// A count or length above its limit.
    #[error("{what} is {found}, at most {most} is accepted")]
    TooMany {
        /// What is counted.
        what: String,
        /// The file's number.
        found: u64,
        /// The limit.
        most: u64,
    },
    /// A text that is no UTF-8.
    #[error("{what} is not UTF-8")]
    NotUtf8 {
        /// Which text.
        what: String,
    },
    /// A key or a name occurs twice.
    #[error("{what} {name} occurs twice")]
    Duplicate {
        /// A key or a tensor.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A key or name without characters.
    #[error("{what} is empty")]
    Empty {
        /// Which.
        what: &'static str,
    },
    /// A value has a type that does not exist, or may not be there.
    #[error("metadata {key} has type {found}, expected {expected}")]
    ValueType {
        /// The key.
        key: String,
        /// What the file says.
        found: String,
        /// What was expected.
        expected: &'static str,
    },
    /// The alignment is not one.
    #[error("{ALIGNMENT_KEY} is {found}, expected a power of two up to {ALIGNMENT_MAX}")]
    Alignment {
        /// The file's number.
        found: u32,
    },
    /// A shape with a zero, or with more elements than any file holds.
    #[error("tensor {tensor} has the impossible shape {dims:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its dimensions, fastest first.
        dims: Vec<u64>,
    },
    /// A type that cannot be read.
    #[error("tensor {tensor} has type {id} ({name}), which is not supported{hint}")]
    UnsupportedType {
        /// The tensor.
        tensor: String,
        /// The file's number.
        id: u32,
        /// What that number probably means here.
        name: &'static str,
        /// What to do about it; empty or begins with a colon.
        hint: &'static str,
    },
    /// A shape that cannot be cut into the type's blocks.
    #[error(
        "tensor {tensor} of type {type_name} has {found} elements in a {unit}, expected a multiple of {block}"
    )]
    Blocks {
        /// The tensor.
        tensor: String,
        /// Its type.
        type_name: &'static str,
        /// What holds whole blocks: a row, or the tensor.
        unit: &'static str,
        /// Elements there.
        found: u64,
        /// Elements of a block.
        block: u64,
    },
    /// A tensor does not begin where the one before it ends.
    #[error("tensor {tensor} begins at byte {found} of the data, expected {expected}")]
    Offset {
        /// The tensor.
        tensor: String,
        /// Where the file says it begins.
        found: u64,
        /// Where it must.
        expected: u64,
    },
    /// The room for a tensor is not what its type needs: another layout under the same number, or
    /// a truncated file.
    #[error(
        "tensor {tensor} of type {type_name} and shape {dims:?} needs {needed_bytes} bytes{}, the file has {found_bytes} for it",
        padded(*.needed_bytes, *.padded_bytes)
    )]
    TensorBytes {
        /// The tensor.
        tensor: String,
        /// Its type.
        type_name: &'static str,
        /// Its dimensions, fastest first.
        dims: Vec<u64>,
        /// Bytes its elements need.
        needed_bytes: u64,
        /// The same with the padding before the next tensor, if there is a next one.
        padded_bytes: u64,
        /// Bytes up to the next tensor, or to the end of the file.
        found_bytes: u64,
    },
}

/// How many bytes a tensor takes with its padding, if that differs.
fn padded(needed_bytes: u64, padded_bytes: u64) -> String {
    match needed_bytes == padded_bytes {
        true => String::new(),
        false => format!(" ({padded_bytes} with its padding)"),
    }
}

/// A parsed file: views into its bytes.
#[derive(Clone, Debug)]
pub struct Gguf<'a> {
    /// Metadata by key.
    pub metadata: Metadata<'a>,
    /// Tensors by name.
    pub tensors: BTreeMap<&'a str, GgufTensor<'a>>,
    /// Bytes after the last tensor and its padding, which belong to nothing.
    pub trailing_bytes: u64,
}

impl<'a> Gguf<'a> {
    /// Reads the tables of `file`: the bytes of a whole file.
    ///
    /// # Errors
    ///
    /// [`GgufError`]: what is wrong, with the key or the tensor where there is one.
    pub fn parse(file: &'a [u8]) -> Result<Self, GgufError> {
        if file.starts_with(LFS_POINTER) {
            return Err(GgufError::LfsPointer);
        }
        let mut reader = Reader { file, at: 0 };
        if reader.array::<4>("the magic").map_err(|_| GgufError::Magic)? != MAGIC {
            return Err(GgufError::Magic);
        }
        match reader.u32("the version")? {
            2 | 3 => {}
            swapped if (1..=16).contains(&swapped.swap_bytes()) => {
                return Err(GgufError::BigEndian);
            }
            found => return Err(GgufError::Version { found }),
        }
        let tensors = reader.u64("the number of tensors")?;
        let entries = reader.u64("the number of metadata entries")?;
        at_most("the number of tensors", tensors, TENSORS_MAX)?;
        at_most("the number of metadata entries", entries, METADATA_MAX)?;
        let metadata = Metadata::read(&mut reader, entries)?;
        let alignment = alignment(&metadata)?;
        let (tensors, trailing_bytes) = tensors::read(&mut reader, tensors, u64::from(alignment))?;
        Ok(Self { metadata, tensors, trailing_bytes })
    }
}

fn alignment(metadata: &Metadata<'_>) -> Result<u32, GgufError> {
    let found = match metadata.get(ALIGNMENT_KEY) {
        None => ALIGNMENT_DEFAULT,
        Some(&Value::Unsigned(value, ValueType::U32)) => value as u32,
        Some(other) => {
            return Err(GgufError::ValueType {
                key: ALIGNMENT_KEY.into(),
                found: other.value_type().name().into(),
                expected: "u32",
            });
        }
    };
    match found.is_power_of_two() && found <= ALIGNMENT_MAX {
        true => Ok(found),
        false => Err(GgufError::Alignment { found }),
    }
}

fn at_most(what: &str, found: u64, most: u64) -> Result<(), GgufError> {
    match found <= most {
        true => Ok(()),
        false => Err(GgufError::TooMany { what: what.into(), found, most }),
    }
}

/// Reads numbers and strings from front to back, never past the end.
#[derive(Clone, Debug)]
struct Reader<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn left_bytes(&self) -> u64 {
        (self.file.len() - self.at) as u64
    }

    fn bytes(&mut self, what: &str, needed_bytes: u64) -> Result<&'a [u8], GgufError> {
        let left_bytes = self.left_bytes();
        if needed_bytes > left_bytes {
            let (what, at) = (what.into(), self.at as u64);
            return Err(GgufError::Truncated { what, at, needed_bytes, left_bytes });
        }
        let bytes = &self.file[self.at..][..needed_bytes as usize];
        self.at += needed_bytes as usize;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<&'a [u8; N], GgufError> {
        let bytes = self.bytes(what, N as u64)?;
        Ok(bytes.as_array().expect("exactly N bytes were asked for"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        self.array(what).map(|bytes| u32::from_le_bytes(*bytes))
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        self.array(what).map(|bytes| u64::from_le_bytes(*bytes))
    }

    fn string(&mut self, what: &str, most_bytes: u64) -> Result<&'a str, GgufError> {
        let bytes = self.text(what, most_bytes)?;
        std::str::from_utf8(bytes).map_err(|_| GgufError::NotUtf8 { what: what.into() })
    }

    /// A string whose encoding does not matter yet.
    fn text(&mut self, what: &str, most_bytes: u64) -> Result<&'a [u8], GgufError> {
        let bytes = self.u64(what)?;
        if bytes > most_bytes {
            let what = format!("the length of {what}");
            return Err(GgufError::TooMany { what, found: bytes, most: most_bytes });
        }
        self.bytes(what, bytes)
    }
}
