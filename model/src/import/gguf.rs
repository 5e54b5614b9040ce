//! GGUF files: which tensors the model that the metadata describes has, and where they are.

mod config;

use super::checkpoint::{Checkpoint, FLOAT_ACTIVATIONS, LayerTensors};
use super::gguf_tokenizer;
use super::matrix::{FloatFormat, Floats, Matrix, Trits};
use super::{I2sLayout, ImportError, ImportOptions};
use crate::config::ModelConfig;
use crate::gguf::{Gguf, GgufTensor, GgufType};
use crate::layout::{Norm, Projection};
pub(super) use config::Architecture;

/// Tensors of a file. Those that were asked for are marked; what is left is unknown.
struct Tensors<'g, 'a> {
    gguf: &'g Gguf<'a>,
    i2s_layout: I2sLayout,
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
            GgufType::I2S => Trits::I2s(self.i2s_layout, tensor.bytes),
            GgufType::Tq1_0 => Trits::Tq1_0(tensor.bytes),
            GgufType::Tq2_0 => Trits::Tq2_0(tensor.bytes),
            GgufType::F32 | GgufType::F16 | GgufType::Bf16 => {
                Trits::Ternary(self.floats(&tensor_name, rows, cols)?)
            }
            GgufType::Q8_0 | GgufType::Q6K => {
                return Err(wrong_tensor(&tensor_name, tensor, "trits", rows, cols));
            }
        };
        let inverted = false;
        Ok(Matrix { tensor: tensor_name, trits, scale, inverted, rows, cols, interleaved_heads })
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
pub(super) fn read<'a>(
    gguf: &Gguf<'a>,
    name: &str,
    options: &ImportOptions,
) -> Result<Checkpoint<'a>, ImportError> {
    const ARCHITECTURE: &str = "general.architecture";
    let metadata = &gguf.metadata;
    let missing = || ImportError::MissingKey { file: "metadata", key: ARCHITECTURE.into() };
    let architecture_name = metadata.string(ARCHITECTURE)?.ok_or_else(missing)?;
    let architecture = Architecture::by_name(architecture_name)?;
    let keys = config::Keys { metadata, architecture: architecture_name };
    keys.refuse_unsupported()?;

    let mut notes = Vec::new();
    keys.note_unknown(&mut notes);
    if gguf.trailing_bytes > 0 {
        let bytes = gguf.trailing_bytes;
        notes.push(format!("{bytes} bytes after the last tensor belong to nothing"));
    }
    let i2s_layout = i2s_layout(gguf, options, &mut notes)?;
    let mut tensors = Tensors { gguf, i2s_layout, used: Default::default() };
    let mut config =
        config::read_config(&keys, architecture, &mut tensors, name, options, &mut notes)?;
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
    let weights = match &layers[0].matrices[0].trits {
        Trits::I2s(..) => GgufType::I2S.name(),
        Trits::Tq1_0(_) => GgufType::Tq1_0.name(),
        Trits::Tq2_0(_) => GgufType::Tq2_0.name(),
        _ => "ternary floats",
    };
    notes.insert(0, format!("weights: {weights}, scales multiply"));
    // bitnet.cpp's own type is made of models that it computes with int8 activations.
    if architecture == Architecture::Llama && weights != GgufType::I2S.name() {
        notes.push(FLOAT_ACTIVATIONS.into());
    }
    let text = gguf_tokenizer::read(metadata, architecture, &mut config, &mut notes)?;
    let mut checkpoint = Checkpoint {
        config,
        text,
        source: name.to_owned(),
        format: format!("gguf {weights}"),
        notes,
        embedding,
        head,
        final_norm,
        layers,
        seen: Default::default(),
        odd_matrices: 0,
    };
    checkpoint.settle_scales(options)?;
    Ok(checkpoint)
}

/// The layout that was asked for, or the usual one: nothing in a file says which it has.
fn i2s_layout(
    gguf: &Gguf<'_>,
    options: &ImportOptions,
    notes: &mut Vec<String>,
) -> Result<I2sLayout, ImportError> {
    let is_there = gguf.tensors.values().any(|tensor| tensor.tensor_type == GgufType::I2S);
    match options.i2s_layout {
        Some(_) if !is_there => Err(ImportError::NoI2s),
        Some(layout) => {
            notes.push(format!("layout of I2_S: {layout}, as chosen"));
            Ok(layout)
        }
        None => Ok(I2sLayout::default()),
    }
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
