//! Metadata of a GGUF file: which model it describes, and what in it is not supported.

use super::super::ImportError;
use super::Tensors;
use crate::config::{
    Activation, HEAD_DIM_MAX, LLAMA_ROPE_THETA, ModelConfig, rope_inverse_frequencies,
};
use crate::gguf::{Metadata, Value};

/// Metadata that changes what a model computes, behind the architecture's name: present and not
/// neutral, it is refused.
const UNSUPPORTED_KEYS: [&str; 8] = [
    "expert_count",
    "attention.sliding_window",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
    "final_logit_softcapping",
];

/// Architectures of GGUF files that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Architecture {
    /// BitNet b1.58 2B4T: `bitnet-b1.58`, first called `bitnet-25`.
    BitNetB158,
    /// 1bitLLM's models: `bitnet`.
    BitNet,
    /// Llama, with queries and keys in the order of interleaved RoPE: `llama`.
    Llama,
}

impl Architecture {
    pub(super) fn by_name(name: &str) -> Result<Self, ImportError> {
        match name {
            "bitnet-b1.58" | "bitnet-25" => Ok(Self::BitNetB158),
            "bitnet" => Ok(Self::BitNet),
            "llama" => Ok(Self::Llama),
            _ => Err(ImportError::Unsupported(format!(
                "architecture {name:?} is not supported, expected bitnet-b1.58, bitnet-25, \
                 bitnet or llama"
            ))),
        }
    }

    fn sub_norms(self) -> bool {
        self != Self::Llama
    }

    /// What the family computes if the file does not say.
    fn activation(self) -> Activation {
        match self {
            Self::BitNetB158 => Activation::SquaredRelu,
            Self::BitNet | Self::Llama => Activation::Silu,
        }
    }
}

/// Metadata of one architecture.
pub(super) struct Keys<'g, 'a> {
    pub(super) metadata: &'g Metadata<'a>,
    pub(super) architecture: &'a str,
}

impl<'g, 'a> Keys<'g, 'a> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn optional(&self, key: &str) -> Result<Option<u32>, ImportError> {
        let key = self.key(key);
        let Some(value) = self.metadata.unsigned(&key)? else { return Ok(None) };
        u32::try_from(value).map(Some).map_err(|_| ImportError::Value {
            key,
            found: value.to_string(),
            expected: format!("at most {}", u32::MAX),
        })
    }

    fn required(&self, key: &str) -> Result<u32, ImportError> {
        self.optional(key)?.ok_or_else(|| self.missing(key))
    }

    fn missing(&self, key: &str) -> ImportError {
        ImportError::MissingKey { file: "metadata", key: self.key(key) }
    }

    fn required_float(&self, key: &str) -> Result<f64, ImportError> {
        self.metadata.float(&self.key(key))?.ok_or_else(|| self.missing(key))
    }

    /// Key-value heads: absent (as many as heads), a number, or the same number for each layer.
    fn kv_heads(&self, heads: u32) -> Result<u32, ImportError> {
        const KEY: &str = "attention.head_count_kv";
        let Some(Value::Array(array)) = self.metadata.get(&self.key(KEY)) else {
            return Ok(self.optional(KEY)?.unwrap_or(heads));
        };
        let mut all = array.iter().map(|value| value.unsigned());
        let first = all.next().flatten();
        match first.and_then(|first| u32::try_from(first).ok()) {
            Some(kv_heads) if all.all(|value| value == first) => Ok(kv_heads),
            _ => Err(ImportError::Unsupported(
                "layers with different numbers of key-value heads are not supported".into(),
            )),
        }
    }

    pub(super) fn refuse_unsupported(&self) -> Result<(), ImportError> {
        let unsupported =
            |what: String| Err(ImportError::Unsupported(format!("{what} is not supported")));
        if let Some(key) = self.metadata.keys().find(|key| key.starts_with("prism.hadamard.")) {
            return unsupported(format!("a rotation of the inputs ({key})"));
        }
        if self.metadata.unsigned("split.count")?.is_some_and(|count| count > 1) {
            return unsupported(
                "a split GGUF file (join it with `gguf-split --merge` first)".into(),
            );
        }
        for key in UNSUPPORTED_KEYS.map(|key| self.key(key)) {
            let value = self.metadata.float(&key)?;
            if let Some(value) = value.filter(|value| *value != 0.0) {
                return unsupported(format!("{key} = {value}"));
            }
        }
        let key = self.key("rope.scaling.type");
        match self.metadata.string(&key)? {
            None | Some("none") => Ok(()),
            Some("linear") => {
                let factor = self.metadata.float(&self.key("rope.scaling.factor"))?;
                match factor.is_none_or(|factor| factor == 1.0) {
                    true => Ok(()),
                    false => unsupported(format!("{key} = linear with a factor other than 1")),
                }
            }
            Some(kind) => unsupported(format!("{key} = {kind}")),
        }
    }
}

/// Shapes and constants. The head, the tokens and the tokenizer are decided later.
pub(super) fn read_config(
    keys: &Keys<'_, '_>,
    architecture: Architecture,
    tensors: &mut Tensors<'_, '_>,
    name: &str,
    notes: &mut Vec<String>,
) -> Result<ModelConfig, ImportError> {
    let (heads, hidden) =
        (keys.required("attention.head_count")?, keys.required("embedding_length")?);
    let head_dim = match keys.optional("attention.key_length")? {
        Some(head_dim) => head_dim,
        None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(ImportError::Value {
                key: keys.key("embedding_length"),
                found: hidden.to_string(),
                expected: format!("a multiple of {heads} heads"),
            });
        }
    };
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(found) = keys.optional(key)?.filter(|found| *found != head_dim) {
            return Err(ImportError::Value {
                key: keys.key(key),
                found: found.to_string(),
                expected: format!("{head_dim}, the head dimension"),
            });
        }
    }
    let theta = match keys.metadata.float(&keys.key("rope.freq_base"))? {
        Some(theta) => theta,
        None if architecture == Architecture::BitNetB158 => {
            return Err(keys.missing("rope.freq_base"));
        }
        None => {
            notes.push(format!(
                "{} is not given: {LLAMA_ROPE_THETA}, as for Llama",
                keys.key("rope.freq_base")
            ));
            LLAMA_ROPE_THETA
        }
    };
    if !(theta.is_finite() && theta > 0.0) {
        return Err(ImportError::Value {
            key: keys.key("rope.freq_base"),
            found: theta.to_string(),
            expected: "a positive number".into(),
        });
    }
    let activation = match keys.metadata.string(&keys.key("hidden_activation"))? {
        None => architecture.activation(),
        Some("relu2" | "relu_sqr") => Activation::SquaredRelu,
        Some("silu") => Activation::Silu,
        Some(other) => {
            return Err(ImportError::Value {
                key: keys.key("hidden_activation"),
                found: other.into(),
                expected: "relu2 or silu".into(),
            });
        }
    };
    let embedding = tensors.required("token_embd.weight")?;
    let vocab = u32::try_from(embedding.shape().0).unwrap_or(u32::MAX);
    if let Some(found) = keys.optional("vocab_size")?.filter(|found| *found != vocab) {
        return Err(ImportError::Value {
            key: keys.key("vocab_size"),
            found: found.to_string(),
            expected: format!("{vocab}, the rows of the embedding"),
        });
    }
    let mut config = ModelConfig {
        name: keys.metadata.string("general.name")?.unwrap_or(name).to_owned(),
        architecture: if architecture.sub_norms() { "bitnet-b1.58" } else { "llama" }.into(),
        layers: keys.required("block_count")?,
        hidden,
        ffn: keys.required("feed_forward_length")?,
        heads,
        kv_heads: keys.kv_heads(heads)?,
        head_dim,
        vocab,
        context: keys.required("context_length")?,
        rms_eps: keys.required_float("attention.layer_norm_rms_epsilon")? as f32,
        activation,
        sub_norms: architecture.sub_norms(),
        tied_head: true,
        rope_inverse_frequencies: rope_inverse_frequencies(theta, head_dim.min(HEAD_DIM_MAX)),
        bos_token: None,
        eos_tokens: Vec::new(),
        add_bos: false,
    };
    config.validate()?;
    if tensors.gguf.tensors.contains_key("rope_freqs.weight") {
        let factors = tensors.floats("rope_freqs.weight", 1, head_dim as usize / 2)?.vector()?;
        for (pair, factor) in factors.iter().enumerate() {
            let frequency = theta.powf(-2.0 * pair as f64 / f64::from(head_dim));
            config.rope_inverse_frequencies[pair] = (frequency / f64::from(*factor)) as f32;
        }
        config.validate()?;
        notes.push("RoPE frequencies are divided by rope_freqs.weight".into());
    }
    let act = match activation {
        Activation::SquaredRelu => "squared ReLU",
        Activation::Silu => "SiLU",
    };
    let norms = if architecture.sub_norms() { "sub-norms" } else { "no sub-norms" };
    let order = match architecture {
        Architecture::Llama => "interleaved in the file, put back to rotate-half",
        _ => "rotate-half",
    };
    notes.push(format!(
        "architecture {}: {act}, {norms}, RoPE of base {theta}, {order}",
        keys.architecture
    ));
    Ok(config)
}
