//! The safetensors container: a checked table of tensors over borrowed bytes, and its writer's half.
//!
//! ```text
//! u64 length of the header | header: JSON, may end in spaces | data, every byte in exactly one tensor
//! ```
//!
//! Nothing here knows what a tensor means.

mod bounded;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use bounded::Metadata;

/// Longest header: sixteen times that of the largest checkpoint in use.
pub const HEADER_BYTES_MAX: u64 = 16 << 20;
/// Most tensors in one file.
pub const TENSORS_MAX: usize = 65_536;
/// Most dimensions of a tensor.
pub const DIMENSIONS_MAX: usize = 8;
/// Most entries of `__metadata__`.
pub const METADATA_MAX: usize = 4_096;
/// Most bytes of its texts: those who describe a quantization there write some 100 KB.
pub const METADATA_BYTES_MAX: usize = 4 << 20;
/// What a checkpoint begins with that was cloned without git-lfs.
const LFS_POINTER: &[u8] = b"version https://git-lfs";
/// Bytes of the header's length.
const PREFIX_BYTES: usize = 8;

/// Why bytes are not a usable safetensors file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SafetensorsError {
    /// A git-lfs pointer in place of the data.
    #[error("this is a git-lfs pointer, not the data: fetch it with `git lfs pull`")]
    LfsPointer,
    /// The file ends inside its header.
    #[error("truncated: the file has {found_bytes} bytes, its header needs {needed_bytes}")]
    TruncatedHeader {
        /// Bytes there are.
        found_bytes: u64,
        /// Bytes up to the end of the header.
        needed_bytes: u64,
    },
    /// The header claims an absurd length.
    #[error("the header's length is {found_bytes} bytes, at most {HEADER_BYTES_MAX} are accepted")]
    HeaderTooLong {
        /// What the file says.
        found_bytes: u64,
    },
    /// The header is not the expected JSON.
    #[error("the header is not a table of tensors")]
    Header(#[source] serde_json::Error),
    /// A dtype that the format does not have, or whose elements are no whole bytes.
    #[error("tensor {tensor} has dtype {dtype}, expected a type of whole bytes such as BF16 or U8")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// What the header says.
        dtype: String,
    },
    /// A shape with too many dimensions, or more elements than any file holds.
    #[error("tensor {tensor} has the impossible shape {shape:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// What the header says.
        shape: Vec<u64>,
    },
    /// A tensor's bytes do not agree with its shape.
    #[error("tensor {tensor} has {found_bytes} bytes, its shape {shape:?} needs {needed_bytes}")]
    TensorBytes {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Bytes between its offsets.
        found_bytes: u64,
        /// Bytes of its elements.
        needed_bytes: u64,
    },
    /// Tensors overlap, or leave bytes to nobody.
    #[error("tensor {tensor} begins at byte {found} of the data, expected {expected}")]
    NotContiguous {
        /// The tensor.
        tensor: String,
        /// Where it begins.
        found: u64,
        /// Where the one before it ends.
        expected: u64,
    },
    /// The tensors end before or after the file does.
    #[error(
        "the data has {found_bytes} bytes, the tensors need {needed_bytes} (a truncated file?)"
    )]
    DataBytes {
        /// Bytes after the header.
        found_bytes: u64,
        /// Bytes of all tensors.
        needed_bytes: u64,
    },
}

/// Element types of checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// The upper half of an f32.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// A byte.
    U8,
    /// Another type of the format, which no weights here have: its name and the bytes of an element.
    Other(&'static str, usize),
}

/// Types of the format beside those that weights have here.
const OTHER_DTYPES: [Dtype; 13] = [
    Dtype::Other("BOOL", 1),
    Dtype::Other("I8", 1),
    Dtype::Other("F8_E5M2", 1),
    Dtype::Other("F8_E4M3", 1),
    Dtype::Other("F8_E8M0", 1),
    Dtype::Other("I16", 2),
    Dtype::Other("U16", 2),
    Dtype::Other("I32", 4),
    Dtype::Other("U32", 4),
    Dtype::Other("I64", 8),
    Dtype::Other("U64", 8),
    Dtype::Other("F64", 8),
    Dtype::Other("C64", 8),
];

impl Dtype {
    /// The name in a header.
    pub fn name(self) -> &'static str {
        match self {
            Self::Other(name, _) => name,
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F32 => "F32",
            Self::U8 => "U8",
        }
    }

    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Other(_, bytes) => bytes,
            Self::U8 => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    fn by_name(name: &str) -> Option<Self> {
        let of_weights = [Self::Bf16, Self::F16, Self::F32, Self::U8];
        of_weights.into_iter().chain(OTHER_DTYPES).find(|dtype| dtype.name() == name)
    }
}

/// One tensor of a file.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its shape, slowest dimension first; with a zero in it, the tensor has no bytes.
    pub shape: Vec<usize>,
    /// Its bytes, counted from the beginning of the file; inside the file.
    pub range: Range<usize>,
}

/// The table of one file.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// Every tensor by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// `__metadata__`: those of its values that are texts.
    pub metadata: BTreeMap<String, String>,
    /// Where the data begins.
    pub data_start: usize,
}

impl Table {
    /// Reads the table of `file`: the bytes of a whole file.
    ///
    /// Allocates in proportion to the header, never by a number that the header states.
    ///
    /// # Errors
    ///
    /// [`SafetensorsError`]: what is wrong, with the tensor's name where there is one.
    pub fn parse(file: &[u8]) -> Result<Self, SafetensorsError> {
        if file.starts_with(LFS_POINTER) {
            return Err(SafetensorsError::LfsPointer);
        }
        let found_bytes = file.len() as u64;
        let truncated =
            |needed_bytes| SafetensorsError::TruncatedHeader { found_bytes, needed_bytes };
        let (prefix, rest) = file
            .split_first_chunk::<PREFIX_BYTES>()
            .ok_or_else(|| truncated(PREFIX_BYTES as u64))?;
        let header_bytes = u64::from_le_bytes(*prefix);
        if header_bytes > HEADER_BYTES_MAX {
            return Err(SafetensorsError::HeaderTooLong { found_bytes: header_bytes });
        }
        let header = rest
            .get(..header_bytes as usize)
            .ok_or_else(|| truncated(header_bytes + PREFIX_BYTES as u64))?;
        let header: Header = serde_json::from_slice(header).map_err(SafetensorsError::Header)?;
        let data_start = PREFIX_BYTES + header_bytes as usize;
        let tensors = place(header.tensors, data_start, file.len())?;
        Ok(Self { tensors, metadata: header.metadata, data_start })
    }
}

/// Checks every size and that the tensors cover the data exactly once.
fn place(
    entries: BTreeMap<String, Entry>,
    data_start: usize,
    file_bytes: usize,
) -> Result<BTreeMap<String, Tensor>, SafetensorsError> {
    let data_bytes = (file_bytes - data_start) as u64;
    let mut in_order: Vec<(&String, &Entry)> = entries.iter().collect();
    in_order.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut expected = 0;
    for (tensor, Entry { data_offsets: [begin, end], .. }) in in_order {
        let (found, tensor) = (*begin, tensor.clone());
        if found != expected {
            return Err(SafetensorsError::NotContiguous { tensor, found, expected });
        }
        // A tensor that ends before it begins fails its own size check below.
        expected = *end;
    }
    if expected != data_bytes {
        return Err(SafetensorsError::DataBytes {
            found_bytes: data_bytes,
            needed_bytes: expected,
        });
    }
    entries
        .into_iter()
        .map(|(name, entry)| {
            let tensor = entry.check(&name, data_start, data_bytes)?;
            Ok((name, tensor))
        })
        .collect()
}

/// A tensor as the header describes it.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    #[serde(deserialize_with = "bounded::shape")]
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl Entry {
    fn check(
        self,
        name: &str,
        data_start: usize,
        data_bytes: u64,
    ) -> Result<Tensor, SafetensorsError> {
        let tensor = || name.to_owned();
        let Some(dtype) = Dtype::by_name(&self.dtype) else {
            return Err(SafetensorsError::Dtype { tensor: tensor(), dtype: self.dtype });
        };
        let needed_bytes = self
            .shape
            .iter()
            .try_fold(dtype.bytes() as u64, |bytes, &dim| bytes.checked_mul(dim))
            .filter(|_| self.shape.len() <= DIMENSIONS_MAX);
        let Some(needed_bytes) = needed_bytes else {
            return Err(SafetensorsError::Shape { tensor: tensor(), shape: self.shape });
        };
        let [begin, end] = self.data_offsets;
        let found_bytes = end.saturating_sub(begin);
        if found_bytes != needed_bytes || end > data_bytes {
            return Err(SafetensorsError::TensorBytes {
                tensor: tensor(),
                shape: self.shape,
                found_bytes,
                needed_bytes,
            });
        }
        // The tensor is inside a mapped file, so every number below fits `usize`.
        let shape = self.shape.into_iter().map(|dim| dim as usize).collect();
        let range = data_start + begin as usize..data_start + end as usize;
        Ok(Tensor { dtype, shape, range })
    }
}

/// The header's JSON, with names that occur once and no more entries than allowed.
struct Header {
    tensors: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object that maps names to tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header { tensors: BTreeMap::new(), metadata: BTreeMap::new() };
        let mut has_metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if std::mem::replace(&mut has_metadata, true) {
                    return Err(A::Error::custom("__metadata__ occurs twice"));
                }
                header.metadata = map.next_value::<Metadata>()?.0;
            } else if header.tensors.contains_key(&name) {
                return Err(A::Error::custom(format!("tensor {name} occurs twice")));
            } else if header.tensors.len() == TENSORS_MAX {
                return Err(A::Error::custom(format!("more than {TENSORS_MAX} tensors")));
            } else {
                let entry = map.next_value()?;
                header.tensors.insert(name, entry);
            }
        }
        Ok(header)
    }
}

/// What [`header`] needs to know of a tensor.
#[derive(Clone, Debug)]
pub(crate) struct NewTensor {
    pub(crate) name: &'static str,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

impl NewTensor {
    /// Bytes of its elements.
    pub(crate) fn bytes(&self) -> usize {
        self.dtype.bytes() * self.shape.iter().product::<usize>()
    }
}

/// The beginning of a file with these tensors in this order: length and header, padded with spaces
/// so that the data begins at a multiple of `alignment` bytes.
pub(crate) fn header(
    tensors: &[NewTensor],
    metadata: &BTreeMap<String, String>,
    alignment: usize,
) -> Vec<u8> {
    let mut table = serde_json::Map::new();
    table.insert("__metadata__".into(), serde_json::json!(metadata));
    let mut begin = 0;
    for tensor in tensors {
        let end = begin + tensor.bytes();
        let entry = serde_json::json!({
            "dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [begin, end],
        });
        table.insert(tensor.name.into(), entry);
        begin = end;
    }
    let mut bytes = vec![0; PREFIX_BYTES];
    bytes.extend_from_slice(serde_json::Value::Object(table).to_string().as_bytes());
    bytes.resize(bytes.len().next_multiple_of(alignment), b' ');
    let header_bytes = (bytes.len() - PREFIX_BYTES) as u64;
    bytes[..PREFIX_BYTES].copy_from_slice(&header_bytes.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests;
