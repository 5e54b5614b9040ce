//! The matrices of a checkpoint, whatever packs them, as rows that the writer asks for.

use kernels::FloatKind;

use super::ImportError;
use crate::blocks::{self, I2sLayout};
use crate::gguf::GgufType;
use crate::writer::{FloatRows, TernaryRows, widen};

/// How the floats of a checkpoint are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FloatFormat {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q6K,
}

impl FloatFormat {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q6K => "Q6_K",
        }
    }
}

/// A float matrix inside a checkpoint. Its bytes have the length that format and shape need.
#[derive(Clone, Debug)]
pub(super) struct Floats<'a> {
    pub(super) tensor: String,
    pub(super) format: FloatFormat,
    pub(super) bytes: &'a [u8],
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl Floats<'_> {
    /// Widens a row to f32.
    ///
    /// # Errors
    ///
    /// [`ImportError::NotFinite`].
    pub(super) fn row(&self, row: usize, out: &mut [f32]) -> Result<(), ImportError> {
        match self.format {
            FloatFormat::F32 => {
                let bytes = &self.bytes[row * self.cols * 4..][..self.cols * 4];
                for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *value = f32::from_le_bytes(*bytes);
                }
            }
            FloatFormat::F16 => {
                for (value, bits) in out.iter_mut().zip(self.halves(row)) {
                    *value = half::f16::from_bits(bits).to_f32();
                }
            }
            FloatFormat::Bf16 => {
                for (value, bits) in out.iter_mut().zip(self.halves(row)) {
                    *value = f32::from_bits(u32::from(bits) << 16);
                }
            }
            FloatFormat::Q8_0 => blocks::q8_0_row(self.bytes, row, out),
            FloatFormat::Q6K => blocks::q6_k_row(self.bytes, row, out),
        }
        match out.iter().all(|value| value.is_finite()) {
            true => Ok(()),
            false => Err(ImportError::NotFinite { tensor: self.tensor.clone() }),
        }
    }

    fn halves(&self, row: usize) -> impl Iterator<Item = u16> {
        let bytes = &self.bytes[row * self.cols * 2..][..self.cols * 2];
        bytes.as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes))
    }

    /// Calls `each` with every row in order.
    fn for_each_row(
        &self,
        mut each: impl FnMut(&[f32]) -> Result<(), ImportError>,
    ) -> Result<(), ImportError> {
        let mut values = vec![0.0; self.cols];
        (0..self.rows).try_for_each(|row| {
            self.row(row, &mut values)?;
            each(&values)
        })
    }

    /// The whole of a vector.
    pub(super) fn vector(&self) -> Result<Vec<f32>, ImportError> {
        let mut values = vec![0.0; self.cols];
        self.row(0, &mut values)?;
        Ok(values)
    }

    /// What the magnitudes of the values are like; their mean is summed in f64 in row-major order.
    fn magnitudes(&self) -> Result<Magnitudes, ImportError> {
        let (mut sum, mut few) = (0.0, Vec::with_capacity(FEW_MAGNITUDES + 1));
        self.for_each_row(|row| {
            for magnitude in row.iter().map(|value| value.abs()) {
                sum += f64::from(magnitude);
                let is_new = few.len() <= FEW_MAGNITUDES && magnitude != 0.0;
                if is_new && !few.contains(&magnitude) {
                    few.push(magnitude);
                }
            }
            Ok(())
        })?;
        Ok(Magnitudes { mean: (sum / (self.rows as f64 * self.cols as f64)) as f32, few })
    }

    /// The one magnitude of all values that are not zero.
    fn one_magnitude(&self) -> Result<f32, ImportError> {
        let mut magnitude = 0.0;
        self.for_each_row(|row| {
            for value in row.iter().map(|value| value.abs()).filter(|value| *value != 0.0) {
                if magnitude == 0.0 {
                    magnitude = value;
                } else if value != magnitude {
                    return Err(ImportError::NotTernary {
                        tensor: self.tensor.clone(),
                        detail: format!("it holds both {magnitude} and {value}"),
                    });
                }
            }
            Ok(())
        })?;
        Ok(magnitude)
    }
}

/// Magnitudes up to which a matrix of master weights is none: trained ones have thousands, and a
/// ternary one as many as it has scales.
const FEW_MAGNITUDES: usize = 8;
/// Weights from which on so few magnitudes cannot be chance.
const MAGNITUDES_TELL_FROM: usize = 4096;

/// The magnitudes of a matrix of floats.
struct Magnitudes {
    mean: f32,
    /// Those that are not zero, in the order of their first; no more than one above
    /// [`FEW_MAGNITUDES`].
    few: Vec<f32>,
}

/// How the trits of a checkpoint are stored.
#[derive(Clone, Debug)]
pub(super) enum Trits<'a> {
    /// By transformers: four rows a byte.
    HuggingFace(&'a [u8]),
    /// In a GGUF file, with one scale at the end.
    I2s(I2sLayout, &'a [u8]),
    /// In a GGUF file, with a scale in every block.
    Tq1_0(&'a [u8]),
    /// The same.
    Tq2_0(&'a [u8]),
    /// Master weights: rounded after division by their mean magnitude.
    Masters(Floats<'a>),
    /// Floats of one magnitude, which is what a trit of 1 stands for.
    Ternary(Floats<'a>),
    /// Floats that are the trits themselves: a scale beside them says what 1 stands for.
    Units(Floats<'a>),
}

/// A ternary matrix inside a checkpoint.
#[derive(Clone, Debug)]
pub(super) struct Matrix<'a> {
    pub(super) tensor: String,
    pub(super) trits: Trits<'a>,
    /// The scale that the checkpoint gives, if it gives one; multiplies.
    pub(super) scale: Option<f32>,
    /// Whether the scale is the inverse of what it should be, and is put right.
    pub(super) inverted: bool,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Rows are in the order of llama.cpp's interleaved RoPE, in heads of this many.
    pub(super) interleaved_heads: Option<usize>,
}

/// Largest scale: thousands of times what weights are trained to, so that one that is larger can only
/// be an accident.
pub(super) const SCALE_MAX: f32 = 1e4;
/// Least mean magnitude, as in training.
const MEAN_MIN: f32 = 1e-5;

impl Matrix<'_> {
    /// Finds scale and rounding, which may take a pass over the floats.
    pub(super) fn resolve(&self) -> Result<ResolvedMatrix<'_>, ImportError> {
        let mut was_ternary = false;
        let (scale, inverse) = match &self.trits {
            Trits::HuggingFace(_) => (1.0, 1.0),
            Trits::I2s(_, bytes) => (blocks::i2s_scale(bytes, self.rows * self.cols), 1.0),
            Trits::Tq1_0(bytes) => (self.block_scale(GgufType::Tq1_0, bytes)?, 1.0),
            Trits::Tq2_0(bytes) => (self.block_scale(GgufType::Tq2_0, bytes)?, 1.0),
            Trits::Masters(floats) => {
                let Magnitudes { mean, few } = floats.magnitudes()?;
                match few.as_slice() {
                    // Ternary already: a packed model that was unpacked, or saved when loaded.
                    [magnitude] => {
                        was_ternary = true;
                        (*magnitude, 1.0 / magnitude)
                    }
                    few if (2..=FEW_MAGNITUDES).contains(&few.len())
                        && self.rows * self.cols >= MAGNITUDES_TELL_FROM =>
                    {
                        let count = few.len();
                        return Err(ImportError::NotTernary {
                            tensor: self.tensor.clone(),
                            detail: format!(
                                "as master weights it holds too few magnitudes ({count}), as \
                                 ternary ones too many"
                            ),
                        });
                    }
                    _ => {
                        let inverse = 1.0 / mean.max(MEAN_MIN);
                        // What transformers multiplies by: the weights are divided by the inverse
                        // again.
                        (1.0 / inverse, inverse)
                    }
                }
            }
            // A tensor of zeros has no magnitude; it is refused later, for being that.
            Trits::Ternary(floats) => match floats.one_magnitude()? {
                0.0 => (1.0, 1.0),
                magnitude => (magnitude, 1.0 / magnitude),
            },
            Trits::Units(floats) => match floats.one_magnitude()? {
                0.0 | 1.0 => (1.0, 1.0),
                magnitude => {
                    return Err(ImportError::NotTernary {
                        tensor: self.tensor.clone(),
                        detail: format!("it has a weight_scale and yet holds {magnitude}"),
                    });
                }
            },
        };
        let scale = scale * self.scale.unwrap_or(1.0);
        let scale = if self.inverted { 1.0 / scale } else { scale };
        if !(scale.is_finite() && scale > 0.0 && scale <= SCALE_MAX) {
            return Err(ImportError::Scale { tensor: self.tensor.clone(), found: scale });
        }
        Ok(ResolvedMatrix { matrix: self, scale, was_ternary, inverse, floats: Vec::new() })
    }

    /// The one scale of all blocks.
    fn block_scale(&self, tensor_type: GgufType, bytes: &[u8]) -> Result<f32, ImportError> {
        blocks::shared_block_scale(tensor_type, bytes).ok_or_else(|| ImportError::BlockScales {
            tensor: self.tensor.clone(),
            type_name: tensor_type.name(),
        })
    }
}

/// A matrix whose scale is known.
pub(super) struct ResolvedMatrix<'a> {
    matrix: &'a Matrix<'a>,
    scale: f32,
    /// Master weights that were ternary already.
    pub(super) was_ternary: bool,
    /// What floats are multiplied by before they are rounded.
    inverse: f32,
    /// Room for a row of floats.
    floats: Vec<f32>,
}

impl TernaryRows<ImportError> for ResolvedMatrix<'_> {
    fn scale(&self) -> f32 {
        self.scale
    }

    fn row(&mut self, row: usize, out: &mut [i8]) -> Result<(), ImportError> {
        let Matrix { tensor, trits, rows, cols, interleaved_heads, .. } = self.matrix;
        let row = interleaved_heads.map_or(row, |head_dim| interleaved_row(row, head_dim));
        let decoded = match trits {
            Trits::HuggingFace(bytes) => blocks::hugging_face_row(bytes, *rows, row, out),
            Trits::I2s(layout, bytes) => blocks::i2s_row(bytes, *layout, row, out),
            Trits::Tq1_0(bytes) => {
                blocks::tq1_row(bytes, row, out);
                Ok(())
            }
            Trits::Tq2_0(bytes) => blocks::tq2_row(bytes, row, out),
            Trits::Masters(floats) | Trits::Ternary(floats) | Trits::Units(floats) => {
                self.floats.resize(*cols, 0.0);
                floats.row(row, &mut self.floats)?;
                for (trit, value) in out.iter_mut().zip(&self.floats) {
                    *trit = (value * self.inverse).round_ties_even().clamp(-1.0, 1.0) as i8;
                }
                Ok(())
            }
        };
        decoded.map_err(|_| ImportError::InvalidCode { tensor: tensor.clone(), row })
    }
}

/// Where llama.cpp's converter put a row: within a head of `head_dim` rows, row `b * d/2 + j` is
/// stored at `2j + b`.
fn interleaved_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let (b, j) = (within / (head_dim / 2), within % (head_dim / 2));
    head * head_dim + 2 * j + b
}

/// An embedding or a head, with the type that it will be stored as.
pub(super) struct StoredFloats<'a> {
    floats: &'a Floats<'a>,
    kind: FloatKind,
    values: Vec<f32>,
}

/// Largest finite f16.
const F16_MAX: f32 = 65_504.0;

impl<'a> StoredFloats<'a> {
    /// Chooses the type: as stored if that is a 16-bit one, else one that holds every value
    /// exactly, else f16, else bf16. The second is a sentence if anything will be rounded.
    pub(super) fn choose(floats: &'a Floats<'a>) -> Result<(Self, Option<String>), ImportError> {
        let (kind, note) = match floats.format {
            FloatFormat::F16 => (FloatKind::F16, None),
            FloatFormat::Bf16 => (FloatKind::Bf16, None),
            FloatFormat::F32 | FloatFormat::Q8_0 | FloatFormat::Q6K => Self::narrow(floats)?,
        };
        Ok((Self { floats, kind, values: vec![0.0; floats.cols] }, note))
    }

    fn narrow(floats: &Floats<'_>) -> Result<(FloatKind, Option<String>), ImportError> {
        let (mut bf16_exact, mut f16_exact, mut f16_holds) = (true, true, true);
        floats.for_each_row(|row| {
            for &value in row {
                bf16_exact &= value.to_bits() & 0xffff == 0;
                f16_exact &= half::f16::from_f32(value).to_f32() == value;
                f16_holds &= value.abs() <= F16_MAX;
            }
            Ok(())
        })?;
        let rounded = |to| {
            let from = floats.format.name();
            Some(format!("{} was rounded from {from} to {to}", floats.tensor))
        };
        Ok(match (bf16_exact, f16_exact, f16_holds) {
            (true, ..) => (FloatKind::Bf16, None),
            (_, true, _) => (FloatKind::F16, None),
            (_, _, true) => (FloatKind::F16, rounded("f16")),
            _ => (FloatKind::Bf16, rounded("bf16, for f16 does not reach its values")),
        })
    }
}

impl FloatRows<ImportError> for StoredFloats<'_> {
    fn kind(&self) -> FloatKind {
        self.kind
    }

    fn row(&mut self, row: usize, out: &mut [u16]) -> Result<(), ImportError> {
        self.floats.row(row, &mut self.values)?;
        for (bits, value) in out.iter_mut().zip(&self.values) {
            *bits = match self.kind {
                FloatKind::F16 => half::f16::from_f32(*value).to_bits(),
                FloatKind::Bf16 => half::bf16::from_f32(*value).to_bits(),
            };
        }
        // A value just below the largest may still round to infinity.
        widen(self.kind, out, &mut self.values);
        match self.values.iter().all(|value| value.is_finite()) {
            true => Ok(()),
            false => Err(ImportError::NotFinite { tensor: self.floats.tensor.clone() }),
        }
    }
}
