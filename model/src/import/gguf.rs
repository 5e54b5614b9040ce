//! GGUF files: which model the metadata describes, and where its tensors are.

use super::ImportError;
use super::checkpoint::{Checkpoint, LayerTensors, NO_SCALES};
use super::gguf_tokenizer;
use super::matrix::{FloatFormat, Floats, Matrix, Trits};
use crate::config::{
    Activation, HEAD_DIM_MAX, LLAMA_ROPE_THETA, ModelConfig, rope_inverse_frequencies,
};
use crate::gguf::{Gguf, GgufTensor, GgufType, Metadata, Value};
use crate::layout::{Norm, Projection};

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
pub(super) enum Architecture {
    /// BitNet b1.58 2B4T: `bitnet-b1.58`, first called `bitnet-25`.
    BitNetB158,
    /// 1bitLLM's models: `bitnet`.
    BitNet,
    /// Llama, with queries and keys in the order of interleaved RoPE: `llama`.
    Llama,
}

impl Architecture {
    fn by_name(name: &str) -> Result<Self, ImportError> {
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
struct Keys<'g, 'a> {
    metadata: &'g Metadata<'a>,
    architecture: &'a str,
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

    fn refuse_unsupported(&self) -> Result<(), ImportError> {
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

/// Tensors of a file. Those that were asked for are marked; what is left is unknown.
struct Tensors<'g, 'a> {
    gguf: &'g Gguf<'a>,
    used: std::collections::BTreeSet<String>,
}

impl<'g, 'a> Tensors<'g, 'a> {
    fn optional(&mut self, name: &str) -> Option<&'g GgufTensor<'a>> {
        let tensor = self.gguf.tensors.get(name)?;
        self.used.insert(name.to_owned());
        Some(tensor)
    }

    fn required(&mut self, name: &str) -> Result<&'g GgufTensor<'a>, ImportError> {
        self.optional(name).ok_or_else(|| ImportError::MissingTensor { tensor: name.to_owned() })
    }

    /// A float tensor of `rows` x `cols`, or a vector.
    fn floats(&mut self, name: &str, rows: usize, cols: usize) -> Result<Floats<'a>, ImportError> {
        let tensor = self.required(name)?;
        let format = match tensor.tensor_type {
            GgufType::F32 => Some(FloatFormat::F32),
            GgufType::F16 => Some(FloatFormat::F16),
            GgufType::Bf16 => Some(FloatFormat::Bf16),
            GgufType::Q8_0 => Some(FloatFormat::Q8_0),
            GgufType::Q6K => Some(FloatFormat::Q6K),
            GgufType::I2S | GgufType::Tq1_0 | GgufType::Tq2_0 => None,
        };
        let format = format.filter(|_| tensor.shape() == (rows as u64, cols as u64));
        let Some(format) = format else {
            return Err(wrong_tensor(name, tensor, "floats", rows, cols));
        };
        Ok(Floats { tensor: name.to_owned(), format, bytes: tensor.bytes, rows, cols })
    }

    fn matrix(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
        interleaved_heads: Option<usize>,
    ) -> Result<Matrix<'a>, ImportError> {
        let tensor = self.required(&format!("{name}.weight"))?;
        let tensor_name = format!("{name}.weight");
        let scale = match self.gguf.tensors.contains_key(format!("{name}.scale").as_str()) {
            true => Some(self.floats(&format!("{name}.scale"), 1, 1)?.vector()?[0]),
            false => None,
        };
        if tensor.shape() != (rows as u64, cols as u64) {
            return Err(wrong_tensor(&tensor_name, tensor, "trits", rows, cols));
        }
        let trits = match tensor.tensor_type {
            ternary @ (GgufType::I2S | GgufType::Tq1_0 | GgufType::Tq2_0) => {
                Trits::Gguf(ternary, tensor.bytes)
            }
            GgufType::F32 | GgufType::F16 | GgufType::Bf16 => {
                Trits::Ternary(self.floats(&tensor_name, rows, cols)?)
            }
            GgufType::Q8_0 | GgufType::Q6K => {
                return Err(wrong_tensor(&tensor_name, tensor, "trits", rows, cols));
            }
        };
        Ok(Matrix { tensor: tensor_name, trits, scale, rows, cols, interleaved_heads })
    }
}

fn wrong_tensor(
    name: &str,
    tensor: &GgufTensor<'_>,
    what: &str,
    rows: usize,
    cols: usize,
) -> ImportError {
    ImportError::Tensor {
        tensor: name.to_owned(),
        found: format!("{} {:?}", tensor.tensor_type.name(), tensor.dims),
        expected: match rows {
            1 => format!("{what} [{cols}]"),
            _ => format!("{what} [{cols}, {rows}]"),
        },
    }
}

fn projection_name(projection: Projection) -> &'static str {
    match projection {
        Projection::Q => "attn_q",
        Projection::K => "attn_k",
        Projection::V => "attn_v",
        Projection::O => "attn_output",
        Projection::Gate => "ffn_gate",
        Projection::Up => "ffn_up",
        Projection::Down => "ffn_down",
    }
}

/// Finds and checks everything that an import needs.
pub(super) fn read<'a>(gguf: &Gguf<'a>, name: &str) -> Result<Checkpoint<'a>, ImportError> {
    const ARCHITECTURE: &str = "general.architecture";
    let metadata = &gguf.metadata;
    let missing = || ImportError::MissingKey { file: "metadata", key: ARCHITECTURE.into() };
    let architecture_name = metadata.string(ARCHITECTURE)?.ok_or_else(missing)?;
    let architecture = Architecture::by_name(architecture_name)?;
    let keys = Keys { metadata, architecture: architecture_name };
    keys.refuse_unsupported()?;

    let mut tensors = Tensors { gguf, used: Default::default() };
    let mut notes = Vec::new();
    let mut config = read_config(&keys, architecture, &mut tensors, name, &mut notes)?;
    let (vocab, hidden) = (config.vocab as usize, config.hidden as usize);
    let embedding = tensors.floats("token_embd.weight", vocab, hidden)?;
    let head = read_head(&mut tensors, &embedding, &mut notes)?;
    config.tied_head = head.is_none();
    let final_norm = tensors.floats("output_norm.weight", 1, hidden)?.vector()?;
    let mut layers = Vec::new();
    for layer in 0..config.layers {
        layers.push(read_layer(&mut tensors, &config, architecture, architecture_name, layer)?);
    }
    if let Some(tensor) = gguf.tensors.keys().find(|name| !tensors.used.contains(**name)) {
        let tensor = (*tensor).to_owned();
        return Err(ImportError::UnknownTensor { hint: hint(&tensor), tensor });
    }
    let first = &layers[0].matrices[0];
    let weights = match &first.trits {
        Trits::Gguf(tensor_type, _) => tensor_type.name(),
        _ => "ternary floats",
    };
    notes.insert(0, format!("weights: {weights}, scales multiply"));
    let text = gguf_tokenizer::read(metadata, architecture, &mut config, &mut notes)?;
    Ok(Checkpoint {
        config,
        text,
        source: name.to_owned(),
        format: format!("gguf {weights}"),
        notes,
        embedding,
        head,
        final_norm,
        layers,
        scales: std::cell::RefCell::new(NO_SCALES),
        odd_matrices: 0,
    })
}

fn read_config(
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

/// The head, unless it is the embedding. Some files carry a copy of a tied one.
fn read_head<'a>(
    tensors: &mut Tensors<'_, 'a>,
    embedding: &Floats<'a>,
    notes: &mut Vec<String>,
) -> Result<Option<Floats<'a>>, ImportError> {
    const HEAD: &str = "output.weight";
    if !tensors.gguf.tensors.contains_key(HEAD) {
        notes.push("head: tied to the embedding".into());
        return Ok(None);
    }
    let head = tensors.floats(HEAD, embedding.rows, embedding.cols)?;
    if head.format == embedding.format && head.bytes == embedding.bytes {
        notes.push("head: tied to the embedding, whose copy output.weight was left out".into());
        return Ok(None);
    }
    notes.push("head: its own".into());
    Ok(Some(head))
}

fn read_layer<'a>(
    tensors: &mut Tensors<'_, 'a>,
    config: &ModelConfig,
    architecture: Architecture,
    architecture_name: &str,
    layer: u32,
) -> Result<LayerTensors<'a>, ImportError> {
    let mut matrices = Vec::with_capacity(Projection::ALL.len());
    for projection in Projection::ALL {
        let (rows, cols) = projection.shape(config);
        let permuted = architecture == Architecture::Llama
            && matches!(projection, Projection::Q | Projection::K);
        let heads = permuted.then_some(config.head_dim as usize);
        let name = format!("blk.{layer}.{}", projection_name(projection));
        matrices.push(tensors.matrix(&name, rows, cols, heads)?);
    }
    let mut norms = Vec::new();
    for norm in Norm::of(config) {
        let name = format!("blk.{layer}.{}.weight", norm.name());
        let is_sub_norm = matches!(norm, Norm::AttnSub | Norm::FfnSub);
        if is_sub_norm && !tensors.gguf.tensors.contains_key(name.as_str()) {
            return Err(ImportError::Unsupported(format!(
                "{name} is missing: a model of architecture {architecture_name} without \
                 sub-norms is not supported (the file was converted wrongly, or is another model)"
            )));
        }
        norms.push(tensors.floats(&name, 1, norm.len(config))?.vector()?);
    }
    Ok(LayerTensors { matrices, norms })
}

/// What an unknown tensor probably is.
fn hint(tensor: &str) -> &'static str {
    if tensor.ends_with(".bias") {
        ": biases are not supported"
    } else if tensor.contains("_exps") || tensor.contains("ffn_gate_inp") {
        ": mixtures of experts are not supported"
    } else if tensor.ends_with("_norm_in.weight") {
        ": norms in front of single projections are not supported"
    } else if tensor.contains("attn_q_norm") || tensor.contains("attn_k_norm") {
        ": norms of queries and keys are not supported"
    } else if tensor.ends_with("_sub_norm.weight") {
        ": a model of architecture llama has no sub-norms"
    } else {
        ""
    }
}
