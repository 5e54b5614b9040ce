//! `config.json`: which model it describes, and what in it is not supported.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::super::ImportError;
use super::super::text::TokenIds;
use crate::config::{
    Activation, HEAD_DIM_MAX, LLAMA_ROPE_THETA, ModelConfig, rope_inverse_frequencies,
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
    /// `tied_head` and `add_bos` are decided later.
    pub(super) model: ModelConfig,
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
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<RopeParameters>,
    partial_rotary_factor: Option<f64>,
    sliding_window: Option<u64>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    num_local_experts: Option<u64>,
    bos_token_id: Option<u32>,
    #[serde(default)]
    eos_token_id: TokenIds,
    weight_bits: Option<u64>,
    input_bits: Option<u64>,
    quantization_config: Option<Quantization>,
}

/// transformers 5 keeps RoPE's settings here.
#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    factor: Option<f64>,
}

#[derive(Deserialize)]
struct Quantization {
    quant_method: Option<String>,
    linear_class: Option<String>,
    modules_to_not_convert: Option<Vec<String>>,
    use_rms_norm: Option<bool>,
}

impl HuggingFaceConfig {
    pub(super) fn parse(json: &[u8], path: &Path) -> Result<Self, ImportError> {
        let fields: Fields = serde_json::from_slice(json)
            .map_err(|source| ImportError::Json { path: path.to_owned(), source })?;
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
        let theta = fields.rope_theta(family, &mut notes)?;
        let activation = fields.activation(family)?;
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
            context: required(fields.max_position_embeddings, "max_position_embeddings")?,
            rms_eps: fields.rms_norm_eps.ok_or_else(|| missing("rms_norm_eps"))? as f32,
            activation,
            sub_norms: family.sub_norms(),
            tied_head: true,
            // A head dimension beyond the limit is refused before its table is made.
            rope_inverse_frequencies: rope_inverse_frequencies(theta, head_dim.min(HEAD_DIM_MAX)),
            bos_token: fields.bos_token_id,
            eos_tokens: fields.eos_token_id.sorted(),
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
        refuse(self.num_local_experts.is_some_and(|n| n > 1), "a mixture of experts")?;
        refuse(self.sliding_window.is_some(), "sliding_window")?;
        refuse(self.partial_rotary_factor.is_some_and(|f| f != 1.0), "partial_rotary_factor")?;
        refuse(self.weight_bits.is_some_and(|bits| bits != 1), "weight_bits other than 1")?;
        refuse(self.input_bits.is_some_and(|bits| bits != 8), "input_bits other than 8")?;
        if let Some(quantization) = &self.quantization_config {
            refuse(quantization.use_rms_norm == Some(true), "use_rms_norm")?;
            match quantization.quant_method.as_deref() {
                Some("bitnet") => {}
                other => {
                    let method = other.unwrap_or("none");
                    refuse(true, &format!("quant_method {method:?}"))?;
                }
            }
        }
        if let Some(scaling) = &self.rope_scaling {
            let text = |key| scaling.get(key).and_then(Value::as_str);
            let kind = text("rope_type").or(text("type")).unwrap_or("of an unknown type");
            let factor = scaling.get("factor").and_then(Value::as_f64);
            refuse(
                !scaling.is_null() && !is_no_scaling(kind, factor),
                &format!("rope_scaling {kind}"),
            )?;
        }
        if let Some(rope) = &self.rope_parameters {
            let kind = rope.rope_type.as_deref().unwrap_or("default");
            refuse(!is_no_scaling(kind, rope.factor), &format!("rope_type {kind}"))?;
        }
        Ok(())
    }

    fn activation(&self, family: Family) -> Result<Activation, ImportError> {
        match (self.hidden_act.as_deref(), family) {
            (Some("relu2"), _) => Ok(Activation::SquaredRelu),
            (Some("silu"), _) => Ok(Activation::Silu),
            (None, Family::Llama | Family::BitNet2024) => Ok(Activation::Silu),
            (None, Family::BitNet) => Err(missing("hidden_act")),
            (Some(other), _) => Err(ImportError::Value {
                key: "hidden_act".into(),
                found: format!("{other:?}"),
                expected: "\"relu2\" or \"silu\"".into(),
            }),
        }
    }

    fn rope_theta(&self, family: Family, notes: &mut Vec<String>) -> Result<f64, ImportError> {
        let nested = self.rope_parameters.as_ref().and_then(|rope| rope.rope_theta);
        match nested.or(self.rope_theta) {
            Some(theta) if theta.is_finite() && theta > 0.0 => Ok(theta),
            Some(theta) => Err(ImportError::Value {
                key: "rope_theta".into(),
                found: theta.to_string(),
                expected: "a positive number".into(),
            }),
            None if family == Family::BitNet => Err(missing("rope_theta")),
            None => {
                notes
                    .push(format!("rope_theta is not given: {LLAMA_ROPE_THETA}, as Llama's class"));
                Ok(LLAMA_ROPE_THETA)
            }
        }
    }
}

fn is_no_scaling(kind: &str, factor: Option<f64>) -> bool {
    kind == "default" || (kind == "linear" && factor == Some(1.0))
}

fn missing(key: &str) -> ImportError {
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
