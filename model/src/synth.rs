//! Random models of exact shapes, for benchmarks and tests: nothing in them suits any kernel.
//!
//! Trits are uniform, norms are 1, the embedding is normal with deviation 0.02. Every value is a
//! function of the seed and its own place, so a row can be made without the rows before it.

mod random;

use std::path::Path;
use std::str::FromStr;

use kernels::FloatKind;

use crate::config::{Activation, ConfigError, ModelConfig, rope_inverse_frequencies};
use crate::id::ModelId;
use crate::layout::Projection;
use crate::manifest::Provenance;
use crate::progress::Progress;
use crate::staging::WriteError;
use crate::writer::{Content, FloatRows, ModelText, NormPlace, TernaryRows, write_store};
use random::{Draws, QUINTETS, TRITS_PER_DRAW, mix, normal_quantiles, quintets};

/// Standard deviation of the embedding, as models are initialised with.
const EMBEDDING_DEVIATION: f64 = 0.02;
/// RoPE's base in BitNet b1.58 2B4T and Llama 3.
const ROPE_THETA: f64 = 500_000.0;
/// Context of BitNet b1.58 2B4T.
const CONTEXT: u32 = 4096;

/// The shape of a random model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SynthShape {
    /// Layers.
    pub layers: u32,
    /// Width of the residual stream; a multiple of `heads`.
    pub hidden: u32,
    /// Inner width of the feed-forward block.
    pub ffn: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Vocabulary.
    pub vocab: u32,
    /// What the layers compute and whether the head is the embedding.
    pub family: SynthFamily,
}

/// What a random model is modelled on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SynthFamily {
    /// BitNet b1.58 2B4T: sub-norms, squared ReLU, tied head.
    BitNet,
    /// The first BitNet models: sub-norms, SiLU, tied head.
    BitNet2024,
    /// Llama: no sub-norms, SiLU, a head of its own.
    Llama,
}

/// A text names no shape.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "shape {0:?} is neither 2b4t, 700m, 8b, tiny nor LAYERSxHIDDENxFFNxHEADSxKV_HEADSxVOCAB \
     (such as 30x2560x6912x20x5x128256)"
)]
pub struct ParseShapeError(String);

/// Why a random model was not made. Nothing was left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SynthError {
    /// No model has such a shape.
    #[error("the shape cannot be used")]
    Shape(#[from] ConfigError),
    /// The store could not be written.
    #[error("failed to write the store")]
    Write(#[from] WriteError),
}

impl FromStr for SynthShape {
    type Err = ParseShapeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (numbers, family) = match text {
            "2b4t" => ([30, 2560, 6912, 20, 5, 128_256], SynthFamily::BitNet),
            "700m" => ([24, 1536, 4096, 16, 16, 32_002], SynthFamily::BitNet2024),
            "8b" => ([32, 4096, 14_336, 32, 8, 128_256], SynthFamily::Llama),
            "tiny" => ([2, 256, 768, 4, 1, 512], SynthFamily::BitNet),
            _ => {
                let numbers = parse_numbers(text).ok_or_else(|| ParseShapeError(text.into()))?;
                (numbers, SynthFamily::BitNet)
            }
        };
        let [layers, hidden, ffn, heads, kv_heads, vocab] = numbers;
        Ok(Self { layers, hidden, ffn, heads, kv_heads, vocab, family })
    }
}

fn parse_numbers(text: &str) -> Option<[u32; 6]> {
    let mut numbers = [0; 6];
    let mut parts = text.split('x');
    for number in &mut numbers {
        let digits = parts.next().filter(|part| part.bytes().all(|b| b.is_ascii_digit()))?;
        *number = digits.parse().ok()?;
    }
    parts.next().is_none().then_some(numbers)
}

impl SynthShape {
    fn config(&self, seed: u64) -> Result<ModelConfig, ConfigError> {
        if self.heads == 0 || !self.hidden.is_multiple_of(self.heads) {
            let text = format!("a width of {} is not {} equal heads", self.hidden, self.heads);
            return Err(ConfigError::Inconsistent(text));
        }
        let head_dim = self.hidden / self.heads;
        let (sub_norms, activation) = match self.family {
            SynthFamily::BitNet => (true, Activation::SquaredRelu),
            SynthFamily::BitNet2024 => (true, Activation::Silu),
            SynthFamily::Llama => (false, Activation::Silu),
        };
        let Self { layers, hidden, ffn, heads, kv_heads, vocab, family } = *self;
        // Checked before the table of frequencies is as long as `head_dim` says.
        let mut config = ModelConfig {
            name: format!("synth-{layers}x{hidden}x{ffn}x{heads}x{kv_heads}x{vocab}-{seed}"),
            architecture: if sub_norms { "bitnet-b1.58" } else { "llama" }.into(),
            layers,
            hidden,
            ffn,
            heads,
            kv_heads,
            head_dim,
            vocab,
            context: CONTEXT,
            rms_eps: 1e-5,
            activation,
            sub_norms,
            tied_head: family != SynthFamily::Llama,
            rope_inverse_frequencies: Vec::new(),
            bos_token: None,
            eos_tokens: Vec::new(),
            add_bos: false,
        };
        if head_dim <= crate::config::HEAD_DIM_MAX {
            config.rope_inverse_frequencies = rope_inverse_frequencies(ROPE_THETA, head_dim);
        }
        config.validate()?;
        Ok(config)
    }
}

/// Writes a random model to `dest`, which must not exist. It has no tokenizer. The same shape and
/// seed give the same model.
///
/// # Errors
///
/// [`SynthError`]; then `dest` does not exist.
pub fn synth(
    shape: &SynthShape,
    seed: u64,
    dest: &Path,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<ModelId, SynthError> {
    let mut random = RandomModel {
        config: shape.config(seed)?,
        seed,
        text: ModelText::default(),
        quintets: quintets(),
        quantiles: normal_quantiles(EMBEDDING_DEVIATION),
    };
    write_store(&mut random, dest, progress)
}

struct RandomModel {
    config: ModelConfig,
    seed: u64,
    text: ModelText,
    quintets: Vec<[i8; TRITS_PER_DRAW]>,
    quantiles: Vec<u16>,
}

impl Content for RandomModel {
    type Error = SynthError;

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn text(&self) -> &ModelText {
        &self.text
    }

    fn norm(&self, place: NormPlace) -> Result<Vec<f32>, SynthError> {
        let len = match place {
            NormPlace::Final => self.config.hidden as usize,
            NormPlace::Layer(_, norm) => norm.len(&self.config),
        };
        Ok(vec![1.0; len])
    }

    fn projection(
        &self,
        layer: u32,
        projection: Projection,
    ) -> Result<Box<dyn TernaryRows<SynthError> + '_>, SynthError> {
        let (_, cols) = projection.shape(&self.config);
        // Outputs of unit variance from inputs of unit variance: a trit has variance 2/3.
        let scale = (1.5 / cols as f64).sqrt() as f32;
        let tensor = u64::from(layer) * 8 + projection as u64;
        let stream = mix(self.seed ^ mix(tensor + 2));
        Ok(Box::new(RandomTrits { model: self, stream, scale }))
    }

    fn embedding(&self) -> Result<Box<dyn FloatRows<SynthError> + '_>, SynthError> {
        Ok(Box::new(RandomFloats { model: self, stream: mix(self.seed ^ mix(0)) }))
    }

    fn head(&self) -> Result<Box<dyn FloatRows<SynthError> + '_>, SynthError> {
        Ok(Box::new(RandomFloats { model: self, stream: mix(self.seed ^ mix(1)) }))
    }

    fn check_zeros(&mut self, _: u32, _: Projection, _: u64, _: u64) -> Result<(), SynthError> {
        Ok(())
    }

    fn provenance(&self) -> Provenance {
        Provenance {
            source: self.config.name.clone(),
            format: "synthetic".into(),
            notes: vec![format!("random weights from seed {}; says nothing sensible", self.seed)],
        }
    }
}

struct RandomTrits<'a> {
    model: &'a RandomModel,
    stream: u64,
    scale: f32,
}

impl TernaryRows<SynthError> for RandomTrits<'_> {
    fn scale(&self) -> f32 {
        self.scale
    }

    fn row(&mut self, row: usize, out: &mut [i8]) -> Result<(), SynthError> {
        let mut draws = Draws::of_row(self.stream, row);
        let table = &self.model.quintets;
        let quintet =
            |draw: u64| &table[((u64::from(draw as u32) * QUINTETS as u64) >> 32) as usize];
        let (pairs, rest) = out.as_chunks_mut::<{ 2 * TRITS_PER_DRAW }>();
        for pair in pairs {
            let draw = draws.next();
            pair[..TRITS_PER_DRAW].copy_from_slice(quintet(draw));
            pair[TRITS_PER_DRAW..].copy_from_slice(quintet(draw >> 32));
        }
        let draw = draws.next();
        let last = quintet(draw).iter().chain(quintet(draw >> 32));
        rest.iter_mut().zip(last).for_each(|(trit, drawn)| *trit = *drawn);
        Ok(())
    }
}

struct RandomFloats<'a> {
    model: &'a RandomModel,
    stream: u64,
}

impl FloatRows<SynthError> for RandomFloats<'_> {
    fn kind(&self) -> FloatKind {
        FloatKind::Bf16
    }

    fn row(&mut self, row: usize, out: &mut [u16]) -> Result<(), SynthError> {
        let mut draws = Draws::of_row(self.stream, row);
        for four in out.chunks_mut(4) {
            let draw = draws.next();
            for (index, bits) in four.iter_mut().enumerate() {
                *bits = self.model.quantiles[(draw >> (16 * index)) as u16 as usize];
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    #[test]
    fn shapes_read() {
        let shape: SynthShape = "2b4t".parse().unwrap();
        assert_eq!("30x2560x6912x20x5x128256".parse(), Ok(shape));
        let config = shape.config(0).unwrap();
        assert_eq!((config.head_dim, config.tied_head, config.sub_norms), (128, true, true));
        for name in ["700m", "8b", "tiny"] {
            name.parse::<SynthShape>().unwrap().config(0).unwrap();
        }
        let wrong = ["", "2B4T", "1x2x3x4x5", "1x2x3x4x5x6x7", "+1x2x3x4x5x6", "1x2x3x4x5x"];
        for wrong in wrong {
            assert!(wrong.parse::<SynthShape>().is_err(), "{wrong}");
        }
        for impossible in ["0x2x2x1x1x1", "1x6x2x4x1x1", "1x4000000000x2x1x1x1", "1x2x2x0x1x1"] {
            assert!(impossible.parse::<SynthShape>().unwrap().config(0).is_err(), "{impossible}");
        }
    }

    #[test]
    fn draws_have_the_distributions_promised() {
        let model = RandomModel {
            config: "tiny".parse::<SynthShape>().unwrap().config(1).unwrap(),
            seed: 1,
            text: ModelText::default(),
            quintets: quintets(),
            quantiles: normal_quantiles(EMBEDDING_DEVIATION),
        };
        let mut counts = [0usize; 3];
        let mut trits = vec![0i8; 100_003];
        model.projection(1, Projection::Down).unwrap().row(3, &mut trits).unwrap();
        trits.iter().for_each(|trit| counts[(trit + 1) as usize] += 1);
        // Four deviations of a binomial with n = 100,003 and p = 1/3.
        assert!(counts.iter().all(|count| count.abs_diff(33_334) < 600), "{counts:?}");

        let mut bits = vec![0u16; 100_001];
        model.embedding().unwrap().row(5, &mut bits).unwrap();
        let values: Vec<f64> = bits.iter().map(|b| half::bf16::from_bits(*b).to_f64()).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 3e-4, "{mean}");
        assert!((variance.sqrt() - 0.02).abs() < 3e-4, "{variance}");
    }

    #[test]
    fn the_same_seed_gives_the_same_model() {
        let dir = tempfile::tempdir().unwrap();
        let shape: SynthShape = "2x48x80x4x2x33".parse().unwrap();
        let make = |name: &str, seed| {
            let dest = dir.path().join(name);
            (synth(&shape, seed, &dest, &mut |_| {}).unwrap(), dest)
        };
        let ((first, dest), (second, _), (other, _)) = (make("a", 7), make("b", 7), make("c", 8));
        assert_eq!(first, second);
        assert_ne!(first, other);
        let store = Store::open(&dest).unwrap();
        assert_eq!(store.id(), first);
        store.verify(|_| {}).unwrap();
        let layer = store.layer(1).unwrap();
        let weights = layer.weights();
        assert_eq!((weights.down.rows(), weights.down.cols()), (48, 80));
        assert_eq!(weights.attn_sub_norm.unwrap(), [1.0; 48]);
        assert_eq!(store.head().unwrap().matrix().rows(), 33);
        assert!(store.tokenizer_json().unwrap().is_none());
    }
}
