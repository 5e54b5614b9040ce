//! A model's id: a hash of what it computes, never of how it is stored.
//!
//! ```text
//! id       = BLAKE3(domain | shape | text | part("embed") | part("head")? | part("norm") | part("layer 0") | …
//!                | special?)
//! part(p)  = BLAKE3(tensor | tensor | …), tensors in the order of the store's shards
//! tensor   = name | rows u64 | columns u64 | scale f32 bits | values, row by row
//! values   = one signed byte per trit; f32 little-endian for floats, whatever type stores them
//! ```
//!
//! Every string and list is preceded by its length, every number is little-endian.
//! `docs/models.md` spells it out.

use std::fmt;
use std::str::FromStr;

use kernels::{FloatMatrix, TernaryMatrix};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::config::{Activation, ModelConfig};
use crate::special::SpecialTexts;

/// Separates these hashes from all others; changes when the recipe does.
const DOMAIN: &[u8] = b"tercet model id v1";
/// Bytes gathered before hashing: BLAKE3 is fast only on long inputs.
const GATHER_BYTES: usize = 128 * 1024;

/// BLAKE3 of a model's logical content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelId(pub [u8; 32]);

impl ModelId {
    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModelId({self})")
    }
}

/// A text is not 64 lowercase hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not 64 lowercase hexadecimal digits")]
pub struct ParseHashError;

/// Reads exactly 64 lowercase hexadecimal digits: nothing else ever becomes part of a path.
pub(crate) fn parse_hash(text: &str) -> Result<[u8; 32], ParseHashError> {
    let digits: &[u8; 64] = text.as_bytes().try_into().map_err(|_| ParseHashError)?;
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Ok(byte - b'0'),
        b'a'..=b'f' => Ok(byte - b'a' + 10),
        _ => Err(ParseHashError),
    };
    let mut bytes = [0; 32];
    for (byte, [high, low]) in bytes.iter_mut().zip(digits.as_chunks::<2>().0) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Ok(bytes)
}

impl FromStr for ModelId {
    type Err = ParseHashError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_hash(text).map(Self)
    }
}

impl Serialize for ModelId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ModelId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Hash of one part: the embedding, the head, the final norm, or a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PartDigest([u8; 32]);

/// The text that belongs to a model's content.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ContentText<'a> {
    pub(crate) tokenizer: Option<&'a [u8]>,
    pub(crate) chat_template: Option<&'a str>,
    pub(crate) bos_text: Option<&'a str>,
    pub(crate) eos_text: Option<&'a str>,
    /// Those that the template names.
    pub(crate) special: Option<&'a SpecialTexts>,
}

/// Combines what a model is into its id. `parts`: embed, head unless tied, norm, then the layers.
pub(crate) fn model_id(
    config: &ModelConfig,
    text: ContentText<'_>,
    parts: &[PartDigest],
) -> ModelId {
    let mut hash = blake3::Hasher::new();
    put_bytes(&mut hash, DOMAIN);
    let ModelConfig { layers, hidden, ffn, heads, kv_heads, head_dim, vocab, context, .. } = config;
    for number in [layers, hidden, ffn, heads, kv_heads, head_dim, vocab, context] {
        hash.update(&number.to_le_bytes());
    }
    hash.update(&config.rms_eps.to_bits().to_le_bytes());
    let activation = match config.activation {
        Activation::SquaredRelu => 0,
        Activation::Silu => 1,
    };
    let flags = [config.sub_norms, config.tied_head, config.add_bos].map(u8::from);
    hash.update(&[activation, flags[0], flags[1], flags[2]]);
    put_len(&mut hash, config.rope_inverse_frequencies.len());
    for frequency in &config.rope_inverse_frequencies {
        hash.update(&frequency.to_bits().to_le_bytes());
    }
    let bos = config.bos_token.map(u32::to_le_bytes);
    put_optional(&mut hash, bos.as_ref().map(|bytes| bytes.as_slice()));
    put_len(&mut hash, config.eos_tokens.len());
    for token in &config.eos_tokens {
        hash.update(&token.to_le_bytes());
    }
    put_optional(&mut hash, text.tokenizer);
    for text in [text.chat_template, text.bos_text, text.eos_text] {
        put_optional(&mut hash, text.map(str::as_bytes));
    }
    put_len(&mut hash, parts.len());
    for part in parts {
        hash.update(&part.0);
    }
    // Behind all else, and only where there are any: a model without them has the id that it always had.
    if let Some(special) = text.special.filter(|special| !special.is_empty()) {
        put_len(&mut hash, special.iter().count());
        for (name, text) in special.iter() {
            put_bytes(&mut hash, name.as_bytes());
            put_len(&mut hash, text.texts().len());
            text.texts().iter().for_each(|text| put_bytes(&mut hash, text.as_bytes()));
        }
    }
    ModelId(hash.finalize().into())
}

fn put_len(hash: &mut blake3::Hasher, len: usize) {
    hash.update(&(len as u64).to_le_bytes());
}

fn put_bytes(hash: &mut blake3::Hasher, bytes: &[u8]) {
    put_len(hash, bytes.len());
    hash.update(bytes);
}

fn put_optional(hash: &mut blake3::Hasher, bytes: Option<&[u8]>) {
    hash.update(&[u8::from(bytes.is_some())]);
    put_bytes(hash, bytes.unwrap_or_default());
}

/// Hashes the tensors of one part, row by row.
pub(crate) struct PartHasher {
    hash: blake3::Hasher,
    gathered: Vec<u8>,
}

impl PartHasher {
    pub(crate) fn new() -> Self {
        Self { hash: blake3::Hasher::new(), gathered: Vec::with_capacity(GATHER_BYTES) }
    }

    /// Begins a tensor. A float tensor has scale 1, a vector has one row.
    pub(crate) fn begin(&mut self, name: &str, rows: usize, cols: usize, scale: f32) {
        self.flush();
        put_bytes(&mut self.hash, name.as_bytes());
        put_len(&mut self.hash, rows);
        put_len(&mut self.hash, cols);
        self.hash.update(&scale.to_bits().to_le_bytes());
    }

    /// Adds trits of the current tensor, in row-major order.
    pub(crate) fn trits(&mut self, trits: &[i8]) {
        self.gather(bytemuck::cast_slice(trits));
    }

    /// Adds floats of the current tensor, in row-major order.
    pub(crate) fn floats(&mut self, values: &[f32]) {
        if cfg!(target_endian = "little") {
            self.gather(bytemuck::cast_slice(values));
        } else {
            values.iter().for_each(|value| self.gather(&value.to_le_bytes()));
        }
    }

    /// A whole vector.
    pub(crate) fn vector(&mut self, name: &str, values: &[f32]) {
        self.begin(name, 1, values.len(), 1.0);
        self.floats(values);
    }

    /// A whole packed matrix.
    pub(crate) fn ternary(&mut self, name: &str, matrix: TernaryMatrix<'_>) {
        self.begin(name, matrix.rows(), matrix.cols(), matrix.scale());
        let mut row_trits = vec![0; matrix.cols()];
        for row in 0..matrix.rows() {
            matrix.unpack_row(row, &mut row_trits);
            self.trits(&row_trits);
        }
    }

    /// A whole float matrix.
    pub(crate) fn float_matrix(&mut self, name: &str, matrix: FloatMatrix<'_>) {
        self.begin(name, matrix.rows(), matrix.cols(), 1.0);
        let mut values = vec![0.0; matrix.cols()];
        for row in 0..matrix.rows() {
            matrix.widen_row(row, &mut values);
            self.floats(&values);
        }
    }

    pub(crate) fn finish(mut self) -> PartDigest {
        self.flush();
        PartDigest(self.hash.finalize().into())
    }

    fn gather(&mut self, bytes: &[u8]) {
        if self.gathered.len() + bytes.len() > GATHER_BYTES {
            self.flush();
        }
        if bytes.len() >= GATHER_BYTES {
            self.hash.update(bytes);
        } else {
            self.gathered.extend_from_slice(bytes);
        }
    }

    fn flush(&mut self) {
        self.hash.update(&self.gathered);
        self.gathered.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lowercase_hex_of_the_right_length_is_an_id() {
        let text = "00ff".repeat(16);
        let id: ModelId = text.parse().unwrap();
        assert_eq!(id.to_string(), text);
        assert_eq!(serde_json::from_str::<ModelId>(&format!("\"{text}\"")).unwrap(), id);
        let long = "0".repeat(65);
        for wrong in ["", "00", "../../etc/passwd", &text.to_uppercase(), &text[1..], &long] {
            assert_eq!(wrong.parse::<ModelId>(), Err(ParseHashError), "{wrong}");
        }
    }

    #[test]
    fn gathering_does_not_change_a_digest() {
        let trits: Vec<i8> = (0..GATHER_BYTES * 2 + 77).map(|i| (i % 3) as i8 - 1).collect();
        let digest = |piece: usize| {
            let mut part = PartHasher::new();
            part.begin("q", 1, trits.len(), 0.5);
            trits.chunks(piece).for_each(|piece| part.trits(piece));
            part.finish()
        };
        assert_eq!(digest(1000), digest(trits.len()));
        assert_ne!(digest(1000), PartHasher::new().finish());
    }
}
