//! `config.json`: which model it describes, and what in it is not supported.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::super::text::{ConfigTokens, TokenIds};
use super::super::{ImportError, ImportOptions, LLAMA3_VOCAB, unstated_activation};
use super::json;
use super::rope::Rope;
use crate::config::{
    Activation, CONTEXT_MAX, HEAD_DIM_MAX, LLAMA_ROPE_THETA, ModelConfig, rope_inverse_frequencies,
};

/// How the floats beside the matrices are to be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Weights {
    /// A `weight_scale` divides, in place of multiplying.
    pub(super) divides: bool,
    /// Floats without a `weight_scale` are master weights, not trits.
    pub(super) masters: bool,
}

/// What `config.json` says.
#[derive(Debug)]
pub(super) struct HuggingFaceConfig {
    /// `tied_head`, the tokens and `add_bos` are decided later.
    pub(super) model: ModelConfig,
    /// What it says of special tokens.
    pub(super) tokens: ConfigTokens,
    pub(super) weights: Weights,
    /// `tie_word_embeddings`, if it is said.
    pub(super) tied: Option<bool>,
    /// `modules_to_not_convert`.
    pub(super) skipped: Vec<String>,
    pub(super) notes: Vec<String>,
}

/// The file's fields. Those that change what a model computes are read, even if only to refuse.
#[derive(Deserialize)]
struct Fields {
    #[serde(default)]
    architectures: Vec<String>,
    #[serde(default)]
    model_type: String,
    vocab_size: Option<u64>,
    hidden_size: Option<u64>,
    intermediate_size: Option<u64>,
    num_hidden_layers: Option<u64>,
    num_attention_heads: Option<u64>,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    hidden_act: Option<String>,
    max_position_embeddings: Option<u64>,
    rms_norm_eps: Option<f64>,
    sliding_window: Option<u64>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    num_local_experts: Option<u64>,
    num_experts: Option<u64>,
    n_routed_experts: Option<u64>,
    #[serde(default)]
    bos_token_id: TokenIds,
    #[serde(default)]
    eos_token_id: TokenIds,
    weight_bits: Option<u64>,
    input_bits: Option<u64>,
    quantization_config: Option<Quantization>,
    /// All others, by name.
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// Other fields that change what a model computes, with the values at which they change nothing: any
/// other is refused.
const UNSUPPORTED_FIELDS: [(&str, &[f64]); 16] = [
    ("attn_logit_softcapping", &[0.0]),
    ("final_logit_softcapping", &[0.0]),
    ("clip_qkv", &[0.0]),
    ("scale_emb", &[1.0]),
    ("embedding_multiplier", &[1.0]),
    ("residual_multiplier", &[1.0]),
    ("logits_scaling", &[1.0]),
    ("logit_scale", &[0.0, 1.0]),
    ("alibi", &[0.0]),
    ("use_qk_norm", &[0.0]),
    ("qk_norm", &[0.0]),
    ("use_parallel_residual", &[0.0]),
    ("is_encoder_decoder", &[0.0]),
    // An embedding model's.
    ("use_bidirectional_attention", &[0.0]),
    ("bidirectional", &[0.0]),
    ("is_causal", &[1.0]),
];
/// Fields in which other programs describe weights that only they can read.
const FOREIGN_WEIGHTS: [(&str, &str); 2] =
    [("quantization", "MLX"), ("compression_config", "compressed-tensors")];
/// Names that the context's length has beside `max_position_embeddings`, which goes before them.
const CONTEXT_FIELDS: [&str; 5] =
    ["n_positions", "max_sequence_length", "max_seq_len", "seq_length", "model_max_length"];

#[derive(Deserialize)]
struct Quantization {
    quant_method: Option<String>,
    linear_class: Option<String>,
    quantization_mode: Option<String>,
    modules_to_not_convert: Option<Vec<String>>,
    use_rms_norm: Option<bool>,
}

impl HuggingFaceConfig {
    /// `longest` is the longest text that the tokenizer's config expects, if it says so.
    pub(super) fn parse(
        json: &[u8],
        path: &Path,
        longest: Option<f64>,
        options: &ImportOptions,
    ) -> Result<Self, ImportError> {
        let fields: Fields = json::parse(json, path)?;
        let mut notes = Vec::new();
        fields.refuse_unsupported()?;
        let family = fields.family()?;
        let weights = fields.weights(family);
        let heads = required(fields.num_attention_heads, "num_attention_heads")?;
        let hidden = required(fields.hidden_size, "hidden_size")?;
        let head_dim = match fields.head_dim {
            Some(head_dim) => required(Some(head_dim), "head_dim")?,
            None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return Err(ImportError::Value {
                    key: "hidden_size".into(),
                    found: hidden.to_string(),
                    expected: format!("a multiple of {heads} heads, or a head_dim"),
                });
            }
        };
        let kv_heads = match fields.num_key_value_heads {
            Some(kv_heads) => required(Some(kv_heads), "num_key_value_heads")?,
            None => heads,
        };
        let rope = Rope::of(&fields.others)?;
        rope.refuse_unsupported()?;
        let theta = match rope.theta(&mut notes)? {
            Some(theta) => theta,
            None if family == Family::BitNet => return Err(missing("rope_theta")),
            None => {
                notes
                    .push(format!("rope_theta is not given: {LLAMA_ROPE_THETA}, as Llama's class"));
                LLAMA_ROPE_THETA
            }
        };
        let activation = fields.activation(family, options, &mut notes)?;
        let model = ModelConfig {
            name: String::new(),
            architecture: if family.sub_norms() { "bitnet-b1.58" } else { "llama" }.into(),
            layers: required(fields.num_hidden_layers, "num_hidden_layers")?,
            hidden,
            ffn: required(fields.intermediate_size, "intermediate_size")?,
            heads,
            kv_heads,
            head_dim,
            vocab: required(fields.vocab_size, "vocab_size")?,
            context: fields.context(longest, &mut notes)?,
            rms_eps: fields.rms_norm_eps.ok_or_else(|| missing("rms_norm_eps"))? as f32,
            activation,
            sub_norms: family.sub_norms(),
            tied_head: true,
            // A head dimension beyond the limit is refused before its table is made.
            rope_inverse_frequencies: rope_inverse_frequencies(theta, head_dim.min(HEAD_DIM_MAX)),
            bos_token: None,
            eos_tokens: Vec::new(),
            add_bos: false,
        };
        let (act, norms) = match (activation, family.sub_norms()) {
            (Activation::SquaredRelu, true) => ("squared ReLU", "sub-norms"),
            (Activation::SquaredRelu, false) => ("squared ReLU", "no sub-norms"),
            (Activation::Silu, true) => ("SiLU", "sub-norms"),
            (Activation::Silu, false) => ("SiLU", "no sub-norms"),
        };
        notes.push(format!("architecture: {act}, {norms}, rotate-half RoPE of base {theta}"));
        let quantization = fields.quantization_config;
        Ok(Self {
            model,
            tokens: ConfigTokens {
                bos: fields.bos_token_id.first(),
                eos: fields.eos_token_id.sorted(),
            },
            weights,
            tied: fields.tie_word_embeddings,
            skipped: quantization.and_then(|q| q.modules_to_not_convert).unwrap_or_default(),
            notes,
        })
    }
}

/// The model families that come in this form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    /// BitNet b1.58 2B4T.
    BitNet,
    /// 1bitLLM's first models, whose config may call itself `llama`.
    BitNet2024,
    /// Llama without sub-norms.
    Llama,
}

impl Family {
    fn sub_norms(self) -> bool {
        self != Self::Llama
    }
}

impl Fields {
    fn family(&self) -> Result<Family, ImportError> {
        // 1bitLLM's class differs from Microsoft's by one letter's case.
        if self.architectures.iter().any(|name| name == "BitnetForCausalLM") {
            return Ok(Family::BitNet2024);
        }
        let is_causal = |name: &String| name.ends_with("ForCausalLM");
        if !self.architectures.is_empty() && !self.architectures.iter().any(is_causal) {
            return Err(ImportError::Unsupported(format!(
                "architecture {:?} is not supported, expected a model for causal language modelling",
                self.architectures[0]
            )));
        }
        match self.model_type.as_str() {
            "bitnet" => Ok(Family::BitNet),
            "llama" => Ok(Family::Llama),
            other => Err(ImportError::Unsupported(format!(
                "model_type {other:?} is not supported, expected \"bitnet\" or \"llama\""
            ))),
        }
    }

    fn weights(&self, family: Family) -> Weights {
        let quantization = self.quantization_config.as_ref();
        let class = quantization.and_then(|quantization| quantization.linear_class.as_deref());
        Weights {
            divides: family != Family::BitNet2024 && class != Some("autobitlinear"),
            masters: quantization.is_some() || family == Family::BitNet2024,
        }
    }

    fn refuse_unsupported(&self) -> Result<(), ImportError> {
        let refuse = |found: bool, what: &str| match found {
            true => Err(ImportError::Unsupported(format!("{what} is not supported"))),
            false => Ok(()),
        };
        refuse(self.attention_bias == Some(true), "attention_bias")?;
        refuse(self.mlp_bias == Some(true), "mlp_bias")?;
        let experts = [self.num_local_experts, self.num_experts, self.n_routed_experts];
        refuse(experts.into_iter().flatten().any(|n| n > 1), "a mixture of experts")?;
        let slides = self.sliding_window.is_some() && self.use_sliding_window != Some(false);
        refuse(slides, "sliding_window")?;
        let mut layers = self.layer_types.iter().flatten();
        if let Some(kind) = layers.find(|kind| *kind != "full_attention") {
            refuse(true, &format!("layer_types {kind:?}"))?;
        }
        for (field, neutral) in UNSUPPORTED_FIELDS {
            let value = match self.others.get(field) {
                None | Some(Value::Null) => continue,
                Some(Value::Bool(value)) => Some(f64::from(u8::from(*value))),
                Some(other) => other.as_f64(),
            };
            let is_neutral = value.is_some_and(|value| neutral.contains(&value));
            refuse(!is_neutral, &format!("{field} = {}", self.others[field]))?;
        }
        for (field, program) in FOREIGN_WEIGHTS {
            let is_there = self.others.get(field).is_some_and(|value| !value.is_null());
            refuse(is_there, &format!("{field} (weights of {program})"))?;
        }
        refuse(self.weight_bits.is_some_and(|bits| bits != 1), "weight_bits other than 1")?;
        refuse(self.input_bits.is_some_and(|bits| bits != 8), "input_bits other than 8")?;
        if let Some(quantization) = &self.quantization_config {
            refuse(quantization.use_rms_norm == Some(true), "use_rms_norm")?;
            one_of("linear_class", &quantization.linear_class, ["bitlinear", "autobitlinear"])?;
            one_of("quantization_mode", &quantization.quantization_mode, ["offline", "online"])?;
            match quantization.quant_method.as_deref() {
                Some("bitnet") => {}
                other => {
                    let method = other.unwrap_or("none");
                    refuse(true, &format!("quant_method {method:?}"))?;
                }
            }
        }
        Ok(())
    }

    /// The longest sequence: of the fields that may say it, the first one there.
    fn context(&self, longest: Option<f64>, notes: &mut Vec<String>) -> Result<u32, ImportError> {
        const FIELD: &str = "max_position_embeddings";
        // Tokenizers without a limit say 1e30.
        let longest = longest.filter(|length| (1.0..=f64::from(CONTEXT_MAX)).contains(length));
        let longest = longest.map(|length| length as u32);
        let others = CONTEXT_FIELDS.into_iter().filter_map(|field| {
            let value = self.others.get(field)?.as_u64()?;
            Some((field, value))
        });
        let own = self.max_position_embeddings.map(|value| (FIELD, value));
        let mut stated = own.into_iter().chain(others);
        let Some((field, context)) = stated.next() else {
            let context = longest.ok_or_else(|| missing(FIELD))?;
            notes.push(format!(
                "context: {context}, for tokenizer_config.json says so and config.json nothing"
            ));
            return Ok(context);
        };
        let context = required(Some(context), field)?;
        if field != FIELD {
            notes.push(format!("context: {context}, by {field}"));
        }
        for (other, value) in stated.filter(|(_, value)| *value != u64::from(context)) {
            notes.push(format!("context: {context} by {field}, though {other} is {value}"));
        }
        if let Some(longest) = longest.filter(|longest| *longest != context) {
            notes.push(format!(
                "context: {context} by {field}, though tokenizer_config.json says {longest}"
            ));
        }
        Ok(context)
    }

    fn activation(
        &self,
        family: Family,
        options: &ImportOptions,
        notes: &mut Vec<String>,
    ) -> Result<Activation, ImportError> {
        if let Some(activation) = options.activation {
            notes.push(format!("activation: {activation}, as asked for"));
            return Ok(activation);
        }
        match (self.hidden_act.as_deref(), family) {
            (Some("relu2"), _) => Ok(Activation::SquaredRelu),
            (Some("silu" | "swish"), _) => Ok(Activation::Silu),
            (None, Family::BitNet2024) if self.vocab_size == Some(u64::from(LLAMA3_VOCAB)) => {
                Err(unstated_activation("hidden_act"))
            }
            (None, Family::Llama | Family::BitNet2024) => Ok(Activation::Silu),
            (None, Family::BitNet) => Err(missing("hidden_act")),
            (Some(other), _) => Err(ImportError::Value {
                key: "hidden_act".into(),
                found: format!("{other:?}"),
                expected: "\"relu2\" or \"silu\"".into(),
            }),
        }
    }
}

/// Refuses a word that an enumerated setting does not have.
fn one_of(key: &str, found: &Option<String>, words: [&str; 2]) -> Result<(), ImportError> {
    match found {
        Some(found) if !words.contains(&found.as_str()) => Err(ImportError::Value {
            key: key.into(),
            found: format!("{found:?}"),
            expected: format!("{:?} or {:?}", words[0], words[1]),
        }),
        _ => Ok(()),
    }
}

pub(super) fn missing(key: &str) -> ImportError {
    ImportError::MissingKey { file: "config.json", key: key.into() }
}

fn required(value: Option<u64>, key: &str) -> Result<u32, ImportError> {
    let value = value.ok_or_else(|| missing(key))?;
    u32::try_from(value).map_err(|_| ImportError::Value {
        key: key.into(),
        found: value.to_string(),
        expected: format!("at most {}", u32::MAX),
    })
}
