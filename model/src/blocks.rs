//! The block formats of checkpoints, one row at a time: bytes in, trits or floats out.
//!
//! Layouts are those of `formats.md` in the project's notes, restated in `docs/models.md`. Callers
//! have checked every length.

use std::fmt;
use std::str::FromStr;

use crate::gguf::GgufType;

/// A two-bit code that stands for no trit; its row says where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InvalidCode;

/// Code 0, 1, 2 to trit -1, 0, 1; remembers whether a 3 was seen.
#[derive(Default)]
struct Codes {
    seen: u8,
}

impl Codes {
    fn trit(&mut self, bits: u8) -> i8 {
        let code = bits & 3;
        // Bit 1 of `code & code << 1` is set for 3 only.
        self.seen |= code & (code << 1);
        code as i8 - 1
    }

    fn finish(self) -> Result<(), InvalidCode> {
        if self.seen & 2 == 0 { Ok(()) } else { Err(InvalidCode) }
    }
}

/// Row `row` of a matrix of `rows` x `cols`, packed by transformers: byte `[r, j]` holds rows
/// `r`, `rows/4 + r`, … of column `j`, lowest bits first.
pub(crate) fn hugging_face_row(
    bytes: &[u8],
    rows: usize,
    row: usize,
    out: &mut [i8],
) -> Result<(), InvalidCode> {
    let quarter = rows / 4;
    let (packed_row, shift) = (row % quarter, 2 * (row / quarter));
    let packed = &bytes[packed_row * out.len()..][..out.len()];
    let mut codes = Codes::default();
    for (trit, byte) in out.iter_mut().zip(packed) {
        *trit = codes.trit(byte >> shift);
    }
    codes.finish()
}

/// The order of the codes in I2_S tensors. Nothing in a file says which one it has: every order
/// has the same type number, the same name and the same size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum I2sLayout {
    /// `128x32`: 128 codes in 32 bytes. The official file, and what everyone but below writes.
    #[default]
    Of128In32,
    /// `64x16`: 64 codes in 16 bytes. Written by bitnet.cpp on ARM after November 2025.
    Of64In16,
}

/// A text names no layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("layout {0:?} is neither 128x32 nor 64x16")]
pub struct ParseI2sLayoutError(String);

impl FromStr for I2sLayout {
    type Err = ParseI2sLayoutError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "128x32" => Ok(Self::Of128In32),
            "64x16" => Ok(Self::Of64In16),
            _ => Err(ParseI2sLayoutError(text.to_owned())),
        }
    }
}

impl fmt::Display for I2sLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Of128In32 => "128x32",
            Self::Of64In16 => "64x16",
        })
    }
}

impl I2sLayout {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Of128In32, Self::Of64In16];

    fn block_bytes(self) -> usize {
        match self {
            Self::Of128In32 => 32,
            Self::Of64In16 => 16,
        }
    }
}

/// Row `row` of an I2_S tensor. Blocks run across rows; byte `p` of a block of `n` bytes holds its
/// elements `p`, `p + n`, `p + 2n`, `p + 3n`, highest bits first.
pub(crate) fn i2s_row(
    bytes: &[u8],
    layout: I2sLayout,
    row: usize,
    out: &mut [i8],
) -> Result<(), InvalidCode> {
    let mut codes = Codes::default();
    let block_bytes = layout.block_bytes();
    let first = row * out.len();
    for (index, trit) in out.iter_mut().enumerate() {
        let (block, element) =
            ((first + index) / (4 * block_bytes), (first + index) % (4 * block_bytes));
        let byte = bytes[block * block_bytes + element % block_bytes];
        *trit = codes.trit(byte >> (6 - 2 * (element / block_bytes)));
    }
    codes.finish()
}

/// The scale after the codes of an I2_S tensor of `elements`.
pub(crate) fn i2s_scale(bytes: &[u8], elements: usize) -> f32 {
    let scale = bytes[elements / 4..].first_chunk().expect("the tail has 32 bytes");
    f32::from_le_bytes(*scale)
}

/// Row `row` of a TQ1_0 tensor: five base-3 digits a byte, most significant first.
pub(crate) fn tq1_row(bytes: &[u8], row: usize, out: &mut [i8]) {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    let digit = |byte: u8, n: usize| ((u16::from(byte.wrapping_mul(POWERS[n])) * 3) >> 8) as i8 - 1;
    for (out, block) in blocks(GgufType::Tq1_0, bytes, row, out) {
        let (group_a, rest) = out.split_at_mut(160);
        let (group_b, group_c) = rest.split_at_mut(80);
        for (group, bytes) in
            [(group_a, &block[..32]), (group_b, &block[32..48]), (group_c, &block[48..52])]
        {
            for (n, digits) in group.chunks_exact_mut(bytes.len()).enumerate() {
                for (trit, byte) in digits.iter_mut().zip(bytes) {
                    *trit = digit(*byte, n);
                }
            }
        }
    }
}

/// Row `row` of a TQ2_0 tensor: two halves of 128; element `32 l + k` is bits `2l` of byte `k`.
pub(crate) fn tq2_row(bytes: &[u8], row: usize, out: &mut [i8]) -> Result<(), InvalidCode> {
    let mut codes = Codes::default();
    for (out, block) in blocks(GgufType::Tq2_0, bytes, row, out) {
        for (out, half) in out.chunks_exact_mut(128).zip(block.chunks_exact(32)) {
            for (plane, out) in out.chunks_exact_mut(32).enumerate() {
                for (trit, byte) in out.iter_mut().zip(half) {
                    *trit = codes.trit(byte >> (2 * plane));
                }
            }
        }
    }
    codes.finish()
}

/// The scale that all blocks of a TQ1_0 or TQ2_0 tensor share, if they do: the last two bytes.
pub(crate) fn shared_block_scale(tensor_type: GgufType, bytes: &[u8]) -> Option<f32> {
    let block_bytes = tensor_type.block().1 as usize;
    let mut scales = bytes.chunks_exact(block_bytes).map(|block| f16_at(block, block_bytes - 2));
    let first = scales.next()?;
    scales.all(|scale| scale.to_bits() == first.to_bits()).then_some(first)
}

/// Row `row` of a Q8_0 tensor: f16 scale, then 32 int8.
pub(crate) fn q8_0_row(bytes: &[u8], row: usize, out: &mut [f32]) {
    for (out, block) in blocks(GgufType::Q8_0, bytes, row, out) {
        let scale = f16_at(block, 0);
        for (value, byte) in out.iter_mut().zip(&block[2..]) {
            *value = scale * f32::from(*byte as i8);
        }
    }
}

/// Row `row` of a Q6_K tensor: `ql[128] qh[64] scales[16] d`.
pub(crate) fn q6_k_row(bytes: &[u8], row: usize, out: &mut [f32]) {
    for (out, block) in blocks(GgufType::Q6K, bytes, row, out) {
        let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
        let scale = f16_at(block, 208);
        for (index, value) in out.iter_mut().enumerate() {
            let (half, quarter, l) = (index / 128, index % 128 / 32, index % 32);
            let low = low[64 * half + 32 * (quarter & 1) + l] >> (4 * (quarter >> 1)) & 15;
            let high = high[32 * half + l] >> (2 * quarter) & 3;
            let quant = i16::from(low | high << 4) - 32;
            let block_scale = scales[8 * half + 2 * quarter + l / 16] as i8;
            *value = scale * f32::from(block_scale) * f32::from(quant);
        }
    }
}

/// The blocks of one row of `out.len()` elements, each with its part of `out`.
fn blocks<'a, T>(
    tensor_type: GgufType,
    bytes: &'a [u8],
    row: usize,
    out: &'a mut [T],
) -> impl Iterator<Item = (&'a mut [T], &'a [u8])> {
    let (block, block_bytes) = tensor_type.block();
    let row_bytes = out.len() / block as usize * block_bytes as usize;
    let bytes = &bytes[row * row_bytes..][..row_bytes];
    out.chunks_exact_mut(block as usize).zip(bytes.chunks_exact(block_bytes as usize))
}

fn f16_at(block: &[u8], offset: usize) -> f32 {
    half::f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Trits and packed bytes made by another implementation.
    struct Vectors(serde_json::Value);

    impl Vectors {
        fn load() -> Self {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/blocks.json");
            Self(serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap())
        }

        fn trits(&self) -> Vec<i8> {
            serde_json::from_value(self.0["codes"].clone()).unwrap()
        }

        fn bytes(&self, name: &str) -> Vec<u8> {
            let hex = self.0[name]["bytes"].as_str().unwrap();
            let digit = |c: u8| (c as char).to_digit(16).unwrap() as u8;
            hex.as_bytes().chunks(2).map(|c| digit(c[0]) << 4 | digit(c[1])).collect()
        }
    }

    #[test]
    fn published_vectors_decode_exactly() {
        let vectors = Vectors::load();
        let trits = vectors.trits();
        let mut out = vec![9i8; 512];

        let i2s = vectors.bytes("i2_s_128");
        i2s_row(&i2s, I2sLayout::default(), 0, &mut out).unwrap();
        assert_eq!(out, trits);
        let with_tail = [&i2s[..128], &0.75f32.to_le_bytes(), &[0xff; 28]].concat();
        assert_eq!(i2s_scale(&with_tail, 512), 0.75);

        let mut tq1 = vectors.bytes("tq1_0");
        out.fill(9);
        tq1_row(&tq1, 0, &mut out);
        assert_eq!(out, trits);
        // Its two blocks have different scales until one is copied over the other.
        assert_eq!(shared_block_scale(GgufType::Tq1_0, &tq1), None);
        tq1.copy_within(106..108, 52);
        assert_eq!(shared_block_scale(GgufType::Tq1_0, &tq1), Some(1.25));

        let mut tq2 = vectors.bytes("tq2_0");
        out.fill(9);
        tq2_row(&tq2, 0, &mut out).unwrap();
        assert_eq!(out, trits);
        assert_eq!(shared_block_scale(GgufType::Tq2_0, &tq2), None);
        tq2.copy_within(64..66, 130);
        assert_eq!(shared_block_scale(GgufType::Tq2_0, &tq2), Some(0.5));

        let packed = vectors.bytes("hf_packed_8x64");
        for row in 0..8 {
            let mut out = vec![9i8; 64];
            hugging_face_row(&packed, 8, row, &mut out).unwrap();
            assert_eq!(out, trits[row * 64..][..64], "row {row}");
        }
    }

    #[test]
    fn rows_are_where_they_should_be() {
        let vectors = Vectors::load();
        let trits = vectors.trits();
        for (row, expected) in trits.chunks(64).enumerate() {
            let mut out = vec![9i8; 64];
            i2s_row(&vectors.bytes("i2_s_128"), I2sLayout::default(), row, &mut out).unwrap();
            assert_eq!(out, expected);
        }
        for (row, expected) in trits.chunks(256).enumerate() {
            let mut out = vec![9i8; 256];
            tq1_row(&vectors.bytes("tq1_0"), row, &mut out);
            assert_eq!(out, expected);
            out.fill(9);
            tq2_row(&vectors.bytes("tq2_0"), row, &mut out).unwrap();
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn code_three_is_refused() {
        let vectors = Vectors::load();
        let mut i2s = vectors.bytes("i2_s_128");
        i2s[77] |= 0b11 << 4;
        assert_eq!(i2s_row(&i2s, I2sLayout::default(), 0, &mut [0; 512]), Err(InvalidCode));
        let mut tq2 = vectors.bytes("tq2_0");
        tq2[5] |= 0b11;
        assert_eq!(tq2_row(&tq2, 0, &mut [0; 512]), Err(InvalidCode));
        let mut packed = vectors.bytes("hf_packed_8x64");
        packed[0] |= 0b11 << 6;
        assert_eq!(hugging_face_row(&packed, 8, 6, &mut [0; 64]), Err(InvalidCode));
        assert_eq!(hugging_face_row(&packed, 8, 0, &mut [0; 64]), Ok(()));
    }

    #[test]
    fn q8_0_and_q6_k_follow_their_formulas() {
        // d = 0.5, quants -16..16.
        let mut q8 = 0x3800u16.to_le_bytes().to_vec();
        q8.extend((-16i8..16).map(|quant| quant as u8));
        let mut out = vec![0.0; 32];
        q8_0_row(&q8, 0, &mut out);
        let expected: Vec<f32> = (-16..16).map(|quant| quant as f32 * 0.5).collect();
        assert_eq!(out, expected);

        // Packed here element by element, the other way round than the reader goes.
        let quant = |i: usize| (i * 37 % 64) as i32 - 32;
        let scales: Vec<i8> = (0..16).map(|i| (i * 9 - 70) as i8).collect();
        let (mut low, mut high) = ([0u8; 128], [0u8; 64]);
        for i in 0..256 {
            let bits = (quant(i) + 32) as u8;
            let (half, within) = (i / 128, i % 128);
            low[64 * half + within % 64] |= (bits & 15) << if within < 64 { 0 } else { 4 };
            high[32 * half + within % 32] |= (bits >> 4) << (2 * (within / 32));
        }
        let mut q6 = [&low[..], &high[..]].concat();
        q6.extend(scales.iter().map(|scale| *scale as u8));
        q6.extend(0x3400u16.to_le_bytes());
        let mut out = vec![0.0; 256];
        q6_k_row(&q6, 0, &mut out);
        for (i, value) in out.iter().enumerate() {
            assert_eq!(*value, 0.25 * f32::from(scales[i / 16]) * quant(i) as f32, "element {i}");
        }
    }
}
