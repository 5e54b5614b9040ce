//! The shape of a model and what its layers compute; the same whatever file it came from.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Most layers a model may have: several times the deepest model known.
pub const LAYERS_MAX: u32 = 1024;
/// Widest input of a ternary product: a sum of this many int8 values is exact in f32 (2^17 * 2^7 = 2^24).
pub const WIDTH_MAX: u32 = 1 << 17;
/// Largest vocabulary: an order of magnitude above what is in use.
pub const VOCAB_MAX: u32 = 1 << 22;
/// Largest attention head.
pub const HEAD_DIM_MAX: u32 = 1024;
/// RoPE's base in Llama 1 and 2, and in models that do not say: the default of their class.
pub(crate) const LLAMA_ROPE_THETA: f64 = 10_000.0;
/// Longest context that a position may have.
pub const CONTEXT_MAX: u32 = 1 << 24;
/// Most end-of-sequence tokens.
pub const EOS_TOKENS_MAX: usize = 64;
/// Longest name or architecture, in bytes.
pub(crate) const TEXT_BYTES_MAX: usize = 256;

/// What stands between the gate and the up-projection of a feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `relu(gate)^2 * up`, as in BitNet b1.58 2B4T.
    SquaredRelu,
    /// `silu(gate) * up`, as in Llama.
    Silu,
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SquaredRelu => "relu2",
            Self::Silu => "silu",
        })
    }
}

/// A text names no activation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("activation {0:?} is neither relu2 nor silu")]
pub struct ParseActivationError(String);

impl FromStr for Activation {
    type Err = ParseActivationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let all = [Self::SquaredRelu, Self::Silu];
        let found = all.into_iter().find(|activation| activation.to_string() == text);
        found.ok_or_else(|| ParseActivationError(text.into()))
    }
}

/// Shapes, constants and special tokens of one model.
///
/// A value made by [`ModelConfig::validate`]d input satisfies every limit of this module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Name for people; not part of the model's id.
    pub name: String,
    /// Family: `bitnet-b1.58` (sub-norms), or `llama` (none). For people; not part of the id.
    pub architecture: String,
    /// Number of layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Inner width of the feed-forward block.
    pub ffn: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Width of one head; even.
    pub head_dim: u32,
    /// Rows of the embedding.
    pub vocab: u32,
    /// Most positions the model was made for.
    pub context: u32,
    /// Added to the mean square inside every norm.
    #[serde(with = "exact_f32")]
    pub rms_eps: f32,
    /// Activation of the feed-forward block.
    pub activation: Activation,
    /// Whether norms stand before the output and down projections.
    pub sub_norms: bool,
    /// Whether the head is the embedding.
    pub tied_head: bool,
    /// Radians per position of each pair of a head, `[head_dim / 2]`: computed once, in f64.
    #[serde(with = "exact_f32_list")]
    pub rope_inverse_frequencies: Vec<f32>,
    /// Token that begins a sequence.
    pub bos_token: Option<u32>,
    /// Tokens that end one; ascending.
    pub eos_tokens: Vec<u32>,
    /// Whether text is tokenised with `bos_token` in front.
    pub add_bos: bool,
}

/// Why a shape cannot be a model's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A number is outside what this program accepts.
    #[error("{field} is {found}, expected {least} to {most}")]
    OutOfRange {
        /// The field's name.
        field: &'static str,
        /// What it says.
        found: u64,
        /// Least accepted value.
        least: u64,
        /// Greatest accepted value.
        most: u64,
    },
    /// Two numbers contradict each other.
    #[error("{0}")]
    Inconsistent(String),
}

impl ModelConfig {
    /// Rows of the query projection and columns of the output projection.
    pub fn attention_width(&self) -> u32 {
        self.heads * self.head_dim
    }

    /// Rows of the key projection, and of the value projection.
    pub fn kv_width(&self) -> u32 {
        self.kv_heads * self.head_dim
    }

    /// Checks every limit and relation between fields.
    ///
    /// # Errors
    ///
    /// The first field that is out of range or contradicts another.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let in_range = |field, found: u32, most: u32| match found {
            0 => Err(range(field, 0, 1, most)),
            n if n > most => Err(range(field, n, 1, most)),
            _ => Ok(()),
        };
        in_range("the number of layers", self.layers, LAYERS_MAX)?;
        in_range("the hidden width", self.hidden, WIDTH_MAX)?;
        in_range("the feed-forward width", self.ffn, WIDTH_MAX)?;
        in_range("the number of heads", self.heads, WIDTH_MAX)?;
        in_range("the number of key-value heads", self.kv_heads, self.heads)?;
        in_range("the head dimension", self.head_dim, HEAD_DIM_MAX)?;
        in_range("the vocabulary size", self.vocab, VOCAB_MAX)?;
        in_range("the context length", self.context, CONTEXT_MAX)?;
        let attention = u64::from(self.heads) * u64::from(self.head_dim);
        if attention > u64::from(WIDTH_MAX) {
            return Err(ConfigError::OutOfRange {
                field: "heads times head dimension",
                found: attention,
                least: 1,
                most: u64::from(WIDTH_MAX),
            });
        }
        let consistent = |holds: bool, text: &dyn Fn() -> String| match holds {
            true => Ok(()),
            false => Err(ConfigError::Inconsistent(text())),
        };
        consistent(self.heads.is_multiple_of(self.kv_heads), &|| {
            format!("{} heads cannot share {} key-value heads", self.heads, self.kv_heads)
        })?;
        consistent(self.head_dim.is_multiple_of(2), &|| {
            format!("the head dimension {} is odd, RoPE needs pairs", self.head_dim)
        })?;
        consistent(self.rms_eps.is_finite() && self.rms_eps > 0.0, &|| {
            format!("the norm's epsilon is {}, expected a small positive number", self.rms_eps)
        })?;
        let pairs = self.head_dim as usize / 2;
        consistent(self.rope_inverse_frequencies.len() == pairs, &|| {
            format!("{} RoPE frequencies for {pairs} pairs", self.rope_inverse_frequencies.len())
        })?;
        let rope_is_finite = self.rope_inverse_frequencies.iter().all(|f| f.is_finite());
        consistent(rope_is_finite, &|| "a RoPE frequency is not finite".into())?;
        consistent(self.eos_tokens.len() <= EOS_TOKENS_MAX, &|| {
            format!("{} end-of-sequence tokens, at most {EOS_TOKENS_MAX}", self.eos_tokens.len())
        })?;
        consistent(self.eos_tokens.is_sorted_by(|a, b| a < b), &|| {
            "the end-of-sequence tokens are not ascending".into()
        })?;
        for &token in self.bos_token.iter().chain(&self.eos_tokens) {
            consistent(token < self.vocab, &|| {
                format!("special token {token} is outside the vocabulary of {}", self.vocab)
            })?;
        }
        consistent(!self.add_bos || self.bos_token.is_some(), &|| {
            "text should begin with a BOS token, but there is none".into()
        })?;
        for text in [&self.name, &self.architecture] {
            consistent(text.len() <= TEXT_BYTES_MAX, &|| {
                format!("a name of {} bytes, at most {TEXT_BYTES_MAX}", text.len())
            })?;
        }
        Ok(())
    }
}

fn range(field: &'static str, found: u32, least: u32, most: u32) -> ConfigError {
    ConfigError::OutOfRange {
        field,
        found: u64::from(found),
        least: u64::from(least),
        most: u64::from(most),
    }
}

/// `theta^(-2j/d)` for each pair `j` of a head of `head_dim`: in f64, rounded once to f32.
///
/// Computed when a model is imported and stored, so that no other machine's `pow` has a say.
pub fn rope_inverse_frequencies(theta: f64, head_dim: u32) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|pair| theta.powf(-2.0 * f64::from(pair) / f64::from(head_dim)) as f32)
        .collect()
}

/// f32 as the decimal of the same number in f64: any JSON reader that is within one f64 ulp gives
/// the same bits back.
mod exact_f32 {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &f32, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_f64(f64::from(*value))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f32, D::Error> {
        Ok(f64::deserialize(d)? as f32)
    }
}

/// A list of [`exact_f32`].
mod exact_f32_list {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(values: &[f32], s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(values.iter().map(|&value| f64::from(value)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<f32>, D::Error> {
        Ok(Vec::<f64>::deserialize(d)?.into_iter().map(|value| value as f32).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config() -> ModelConfig {
        ModelConfig {
            name: "tiny".into(),
            architecture: "bitnet-b1.58".into(),
            layers: 2,
            hidden: 256,
            ffn: 768,
            heads: 4,
            kv_heads: 1,
            head_dim: 64,
            vocab: 512,
            context: 128,
            rms_eps: 1e-5,
            activation: Activation::SquaredRelu,
            sub_norms: true,
            tied_head: true,
            rope_inverse_frequencies: rope_inverse_frequencies(500_000.0, 64),
            bos_token: Some(1),
            eos_tokens: vec![2],
            add_bos: false,
        }
    }

    #[test]
    fn wrong_shapes_are_named() {
        config().validate().unwrap();
        type Spoil = fn(&mut ModelConfig);
        let cases: [(Spoil, &str); 9] = [
            (|c| c.layers = 0, "the number of layers is 0, expected 1 to 1024"),
            (|c| c.heads = 3, "RoPE frequencies for"),
            (|c| c.kv_heads = 3, "4 heads cannot share 3 key-value heads"),
            (|c| c.kv_heads = 5, "the number of key-value heads is 5"),
            (|c| c.rms_eps = f32::NAN, "the norm's epsilon is NaN"),
            (|c| c.eos_tokens = vec![512], "special token 512 is outside the vocabulary of 512"),
            (|c| c.eos_tokens = vec![3, 2], "not ascending"),
            (|c| c.rope_inverse_frequencies[0] = f32::INFINITY, "a RoPE frequency is not finite"),
            (|c| (c.bos_token, c.add_bos) = (None, true), "there is none"),
        ];
        for (spoil, expected) in cases {
            let mut spoiled = config();
            spoil(&mut spoiled);
            // 3 heads of 64 with one kv head is a shape; 3 heads of 85 is not.
            if expected.starts_with("RoPE") {
                spoiled.head_dim = 66;
            }
            let text = spoiled.validate().unwrap_err().to_string();
            assert!(text.contains(expected), "{text} should say {expected}");
        }
    }

    #[test]
    fn frequencies_are_the_formula() {
        let table = rope_inverse_frequencies(10_000.0, 4);
        assert_eq!(table, [1.0, 0.01]);
    }

    proptest! {
        #[test]
        fn floats_keep_their_bits_through_json(bits in any::<u32>()) {
            let value = f32::from_bits(bits);
            prop_assume!(value.is_finite());
            let mut with = config();
            with.rms_eps = value;
            with.rope_inverse_frequencies = vec![value; 3];
            let json = serde_json::to_vec(&with).unwrap();
            let back: ModelConfig = serde_json::from_slice(&json).unwrap();
            prop_assert_eq!(back.rms_eps.to_bits(), bits);
            prop_assert!(back.rope_inverse_frequencies.iter().all(|f| f.to_bits() == bits));
        }
    }
}
