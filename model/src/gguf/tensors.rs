//! Tensors of a GGUF file: types, sizes, and where each lies.
//!
//! Numbers of types mean different things in different forks, so the room that each tensor has up
//! to the next one is compared with what its type needs: that settles every collision.

use std::collections::BTreeMap;

use super::{GgufError, NAME_BYTES_MAX, Reader};

/// Most dimensions of a tensor.
const DIMENSIONS_MAX: u32 = 4;
/// Bytes after the codes of an I2_S tensor: its scale and padding.
const I2S_TAIL_BYTES: u64 = 32;

/// Types that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgufType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// 32 int8 with an f16 scale.
    Q8_0,
    /// 256 six-bit numbers with 16 int8 scales and an f16 scale.
    Q6K,
    /// 128 trits in 32 bytes; one f32 scale after the whole tensor.
    I2S,
    /// 256 trits in base 3, with an f16 scale.
    Tq1_0,
    /// 256 trits of two bits, with an f16 scale.
    Tq2_0,
}

impl GgufType {
    /// Name for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q6K => "Q6_K",
            Self::I2S => "I2_S",
            Self::Tq1_0 => "TQ1_0",
            Self::Tq2_0 => "TQ2_0",
        }
    }

    /// Elements and bytes of a block.
    pub fn block(self) -> (u64, u64) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q6K => (256, 210),
            Self::I2S => (128, 32),
            Self::Tq1_0 => (256, 54),
            Self::Tq2_0 => (256, 66),
        }
    }

    fn by_id(id: u32) -> Option<Self> {
        match id {
            0 => Some(Self::F32),
            1 => Some(Self::F16),
            8 => Some(Self::Q8_0),
            14 => Some(Self::Q6K),
            30 => Some(Self::Bf16),
            34 => Some(Self::Tq1_0),
            35 => Some(Self::Tq2_0),
            36 => Some(Self::I2S),
            _ => None,
        }
    }

    /// Bytes of a tensor with `elements` in rows of `row`.
    fn tensor_bytes(self, tensor: &str, row: u64, elements: u64) -> Result<u64, GgufError> {
        let (block, block_bytes) = self.block();
        // I2_S blocks run across the ends of rows, all others do not.
        let (unit, found) = match self {
            Self::I2S => ("tensor", elements),
            _ => ("row", row),
        };
        if !found.is_multiple_of(block) {
            return Err(GgufError::Blocks {
                tensor: tensor.into(),
                type_name: self.name(),
                unit,
                found,
                block,
            });
        }
        let tail_bytes = if self == Self::I2S { I2S_TAIL_BYTES } else { 0 };
        // `elements` was checked to be at most 2^60 and a block has at most 4 bytes per element.
        Ok(elements / block * block_bytes + tail_bytes)
    }
}

/// One tensor of a file.
#[derive(Clone, Debug)]
pub struct GgufTensor<'a> {
    /// Type of its elements.
    pub tensor_type: GgufType,
    /// Its dimensions, fastest first: 1 to 4, none zero.
    pub dims: Vec<u64>,
    /// Exactly the bytes that type and dimensions need.
    pub bytes: &'a [u8],
}

impl GgufTensor<'_> {
    /// Rows and columns; a vector has one row.
    pub fn shape(&self) -> (u64, u64) {
        (self.dims[1..].iter().product(), self.dims[0])
    }
}

/// A tensor as the file describes it.
struct Info<'a> {
    name: &'a str,
    dims: Vec<u64>,
    elements: u64,
    type_id: u32,
    offset: u64,
}

impl<'a> Info<'a> {
    fn read(reader: &mut Reader<'a>) -> Result<Self, GgufError> {
        let name = reader.string("a tensor's name", NAME_BYTES_MAX)?;
        if name.is_empty() {
            return Err(GgufError::Empty { what: "a tensor's name" });
        }
        let dimensions = reader.u32(name)?;
        if dimensions > DIMENSIONS_MAX {
            return Err(GgufError::TooMany {
                what: format!("the number of dimensions of tensor {name}"),
                found: u64::from(dimensions),
                most: u64::from(DIMENSIONS_MAX),
            });
        }
        let dims = (0..dimensions).map(|_| reader.u64(name)).collect::<Result<Vec<_>, _>>()?;
        let elements = dims
            .iter()
            .try_fold(1u64, |elements, dim| elements.checked_mul(*dim))
            // Leaves room for bytes per element and for alignment in every sum below.
            .filter(|elements| (1..=1 << 60).contains(elements) && !dims.is_empty());
        let Some(elements) = elements else {
            return Err(GgufError::Shape { tensor: name.into(), dims });
        };
        let (type_id, offset) = (reader.u32(name)?, reader.u64(name)?);
        Ok(Self { name, dims, elements, type_id, offset })
    }

    /// The error for a type that cannot be read, named with the help of the room it has.
    fn unsupported(&self, room_bytes: u64) -> GgufError {
        const RECONVERT: &str = ": download the i2_s file, or convert from safetensors";
        let per_block = |elements, bytes| {
            let (whole, n) = (self.elements.is_multiple_of(elements), self.elements / elements);
            whole && n.checked_mul(bytes).is_some_and(|b| b <= room_bytes && room_bytes - b < 64)
        };
        let (name, hint) = match self.type_id {
            37 => ("I8_S", ""),
            38 => ("TL1, whose layout is not in the file", RECONVERT),
            39 if per_block(32, 17) => ("MXFP4", ""),
            39 => ("TL2, whose layout is not in the file", RECONVERT),
            40 => ("NVFP4 or an early Q1_0", ""),
            41 => ("Q1_0, which is binary", ""),
            42 if per_block(64, 18) => ("Q2_0 in groups of 64", ""),
            42 if per_block(128, 34) => ("Q2_0 in groups of 128", ""),
            42 => ("TL2, whose layout is not in the file", RECONVERT),
            134 | 135 => ("IQ1_BN or IQ2_BN of ik_llama.cpp", RECONVERT),
            142 | 143 => ("PQ2_0 or PTQ1_0 of PrismML", ""),
            2..=7 | 9..=13 | 15..=29 | 31..=33 => ("a quantised or integer type", ""),
            _ => ("unknown", ""),
        };
        GgufError::UnsupportedType { tensor: self.name.into(), id: self.type_id, name, hint }
    }
}

/// Reads the tensor infos, and checks that the tensors fill the data in order and without gaps. The
/// second is how many bytes of the file come after all of them.
pub(super) fn read<'a>(
    reader: &mut Reader<'a>,
    tensors: u64,
    alignment: u64,
) -> Result<(BTreeMap<&'a str, GgufTensor<'a>>, u64), GgufError> {
    let mut infos = Vec::new();
    for _ in 0..tensors {
        infos.push(Info::read(reader)?);
    }
    infos.sort_by_key(|info| info.offset);
    if infos.is_empty() {
        return Ok((BTreeMap::new(), reader.left_bytes()));
    }
    let padding_bytes = (reader.at as u64).next_multiple_of(alignment) - reader.at as u64;
    reader.bytes("the padding before the data", padding_bytes)?;
    let data = &reader.file[reader.at..];

    let mut placed = BTreeMap::new();
    let mut expected = 0;
    for (index, info) in infos.iter().enumerate() {
        if info.offset != expected {
            let (tensor, found) = (info.name.into(), info.offset);
            return Err(GgufError::Offset { tensor, found, expected });
        }
        // Offsets ascend, so the room is not negative; it may end past the end of the file.
        let next = infos.get(index + 1).map(|next| next.offset);
        let end = next.unwrap_or(data.len() as u64);
        let room_bytes = end.min(data.len() as u64).saturating_sub(info.offset);
        let Some(tensor_type) = GgufType::by_id(info.type_id) else {
            return Err(info.unsupported(room_bytes));
        };
        let bytes = tensor_type.tensor_bytes(info.name, info.dims[0], info.elements)?;
        let padded_bytes = bytes.next_multiple_of(alignment);
        // The last tensor may lack its padding, or be followed by bytes that belong to nothing.
        let fits = match next {
            Some(_) => room_bytes == padded_bytes,
            None => room_bytes >= bytes,
        };
        if !fits {
            return Err(GgufError::TensorBytes {
                tensor: info.name.into(),
                type_name: tensor_type.name(),
                dims: info.dims.clone(),
                needed_bytes: bytes,
                padded_bytes: if next.is_some() { padded_bytes } else { bytes },
                found_bytes: room_bytes,
            });
        }
        expected = info.offset + padded_bytes;
        let bytes = &data[info.offset as usize..][..bytes as usize];
        let tensor = GgufTensor { tensor_type, dims: info.dims.clone(), bytes };
        if placed.insert(info.name, tensor).is_some() {
            return Err(GgufError::Duplicate { what: "tensor", name: info.name.into() });
        }
    }
    Ok((placed, (data.len() as u64).saturating_sub(expected)))
}
