//! Metadata of a GGUF file: which model it describes, and what in it is not supported.

use super::super::{ImportError, ImportOptions, LLAMA3_VOCAB, unstated_activation};
use super::Tensors;
use crate::config::{
    Activation, HEAD_DIM_MAX, LLAMA_ROPE_THETA, ModelConfig, TEXT_BYTES_MAX,
    rope_inverse_frequencies,
};
use crate::gguf::{Array, Metadata, Value};

/// Numbers and switches that change what a model computes, behind the architecture's name, with the
/// values at which they change nothing: anything else is refused.
const UNSUPPORTED_KEYS: [(&str, &[f64]); 17] = [
    ("expert_count", &[0.0]),
    ("attention.sliding_window", &[0.0]),
    ("attention.clamp_kqv", &[0.0]),
    ("attention.max_alibi_bias", &[0.0]),
    ("attention.temperature_scale", &[0.0, 1.0]),
    ("attn_logit_softcapping", &[0.0]),
    ("final_logit_softcapping", &[0.0]),
    ("router_logit_softcapping", &[0.0]),
    ("logit_scale", &[0.0, 1.0]),
    ("embedding_scale", &[0.0, 1.0]),
    ("residual_scale", &[0.0, 1.0]),
    ("use_parallel_residual", &[0.0]),
    ("swin_norm", &[0.0]),
    // Not zero: mean, first, last token or a rank: an embedding model's.
    ("pooling_type", &[0.0]),
    ("attention.causal", &[1.0]),
    ("rope.scaling.attn_factor", &[0.0, 1.0]),
    ("rope.scale_linear", &[0.0, 1.0]),
];

/// How far, relatively, a scale in f32 may be from the one it stands for.
const SCALE_EXACT: f64 = 1e-5;

/// Keys behind the architecture's name that are heeded, or say nothing that a reader needs.
const KNOWN_KEYS: [&str; 25] = [
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "hidden_activation",
    "tensor_data_layout",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "attention.causal",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    // Settings of kinds of scaling that are refused.
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "leading_dense_block_count",
    "expert_used_count",
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

    /// An integer, or the same one for each layer.
    fn optional(&self, key: &str) -> Result<Option<u32>, ImportError> {
        let key = self.key(key);
        let value = match self.metadata.get(&key) {
            Some(Value::Array(array)) => Some(self.one_of_all(&key, array)?),
            _ => self.metadata.unsigned(&key)?,
        };
        let Some(value) = value else { return Ok(None) };
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

    /// The model's name for people: the file's own, as long as a name may be.
    fn name(&self, otherwise: &str) -> String {
        let name = self.metadata.label("general.name").filter(|name| !name.trim().is_empty());
        let name = name.as_deref().unwrap_or(otherwise);
        name[..name.floor_char_boundary(TEXT_BYTES_MAX)].to_owned()
    }

    fn required_float(&self, key: &str) -> Result<f64, ImportError> {
        self.metadata.float(&self.key(key))?.ok_or_else(|| self.missing(key))
    }

    /// The one number of an array with a number for each layer.
    fn one_of_all(&self, key: &str, array: &Array<'_>) -> Result<u64, ImportError> {
        let layers = self.metadata.unsigned(&self.key("block_count"))?;
        if layers.is_some_and(|layers| layers != array.len() as u64) {
            return Err(ImportError::Value {
                key: key.into(),
                found: format!("an array of {} numbers", array.len()),
                expected: "one number, or one for each layer".into(),
            });
        }
        let mut all = array.iter().map(|value| value.unsigned());
        match all.next().flatten() {
            Some(first) if all.all(|value| value == Some(first)) => Ok(first),
            _ => Err(ImportError::Unsupported(format!(
                "{key} differs between layers, which is not supported"
            ))),
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
        if let Some(kind) = self.metadata.label("general.type").filter(|kind| kind != "model") {
            return unsupported(format!("a GGUF file of the type {kind:?}"));
        }
        for (key, neutral) in UNSUPPORTED_KEYS {
            let key = self.key(key);
            let value = match self.metadata.get(&key) {
                Some(Value::Bool(value)) => Some(f64::from(u8::from(*value))),
                _ => self.metadata.float(&key)?,
            };
            if let Some(value) = value.filter(|value| !neutral.contains(value)) {
                return unsupported(format!("{key} = {value}"));
            }
        }
        self.refuse_rope_scaling()
    }

    /// Refuses scaled positions: of the known kinds, only those that scale nothing are taken.
    fn refuse_rope_scaling(&self) -> Result<(), ImportError> {
        let unsupported =
            |what: String| Err(ImportError::Unsupported(format!("{what} is not supported")));
        let key = self.key("rope.scaling.type");
        let kind = self.metadata.string(&key)?;
        let factor = self.metadata.float(&self.key("rope.scaling.factor"))?;
        let scales = factor.is_some_and(|factor| factor != 0.0 && factor != 1.0);
        match kind {
            Some("none") => Ok(()),
            // llama.cpp takes positions as scaled linearly if only a factor is given.
            None | Some("linear") if !scales => Ok(()),
            None => unsupported(format!("{} other than 1", self.key("rope.scaling.factor"))),
            Some("linear") => unsupported(format!("{key} = linear with a factor other than 1")),
            Some(kind) => unsupported(format!("{key} = {kind}")),
        }
    }

    /// Keys of the architecture that nobody here knows: they may matter to somebody.
    pub(super) fn note_unknown(&self, notes: &mut Vec<String>) {
        let prefix = self.key("");
        let known = |key: &&str| {
            KNOWN_KEYS.contains(key) || UNSUPPORTED_KEYS.iter().any(|(known, _)| known == key)
        };
        let keys = self.metadata.keys().filter_map(|key| key.strip_prefix(prefix.as_str()));
        let unknown: Vec<&str> = keys.filter(|key| !known(key)).collect();
        if let Some(first) = unknown.first() {
            let more = match unknown.len() - 1 {
                0 => String::new(),
                more => format!(" and {more} more of its keys are"),
            };
            let is = if unknown.len() == 1 { " is" } else { "" };
            notes.push(format!("warning: {prefix}{first}{more}{is} unknown here and not heeded"));
        }
    }
}

/// Shapes and constants. The head, the tokens and the tokenizer are decided later.
pub(super) fn read_config(
    keys: &Keys<'_, '_>,
    architecture: Architecture,
    tensors: &mut Tensors<'_, '_>,
    name: &str,
    options: &ImportOptions,
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
    let scale = keys.metadata.float(&keys.key("attention.scale"))?.filter(|scale| *scale != 0.0);
    let expected = 1.0 / f64::from(head_dim).sqrt();
    let other = |scale: &f64| scale.is_nan() || (scale - expected).abs() > expected * SCALE_EXACT;
    if let Some(found) = scale.filter(other) {
        return Err(ImportError::Value {
            key: keys.key("attention.scale"),
            found: found.to_string(),
            expected: format!("{expected}, from the head dimension"),
        });
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
    let embedding = tensors.required("token_embd.weight")?;
    let vocab = u32::try_from(embedding.shape().0).unwrap_or(u32::MAX);
    let activation = match keys.metadata.string(&keys.key("hidden_activation"))? {
        _ if options.activation.is_some() => {
            let activation = options.activation.expect("just looked at");
            notes.push(format!("activation: {activation}, as asked for"));
            activation
        }
        // This architecture has other models than the one of this vocabulary, and another activation.
        None if architecture == Architecture::BitNet && vocab == LLAMA3_VOCAB => {
            return Err(unstated_activation(&keys.key("hidden_activation")));
        }
        None => architecture.activation(),
        Some("relu2" | "relu_sqr") => Activation::SquaredRelu,
        Some("silu" | "swish") => Activation::Silu,
        Some(other) => {
            return Err(ImportError::Value {
                key: keys.key("hidden_activation"),
                found: other.into(),
                expected: "relu2 or silu".into(),
            });
        }
    };
    if let Some(found) = keys.optional("vocab_size")?.filter(|found| *found != vocab) {
        return Err(ImportError::Value {
            key: keys.key("vocab_size"),
            found: found.to_string(),
            expected: format!("{vocab}, the rows of the embedding"),
        });
    }
    let mut config = ModelConfig {
        name: keys.name(name),
        architecture: if architecture.sub_norms() { "bitnet-b1.58" } else { "llama" }.into(),
        layers: keys.required("block_count")?,
        hidden,
        ffn: keys.required("feed_forward_length")?,
        heads,
        kv_heads: keys.optional("attention.head_count_kv")?.unwrap_or(heads),
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
