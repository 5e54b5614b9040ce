//! What the files of a store are called and which tensors they hold. Shared by the reader and the writer.

use std::collections::BTreeMap;

use kernels::{Arrangement, FloatKind, ScreenMatrix, TernaryColumns, TernaryMatrix};

use crate::config::{Activation, ModelConfig};
use crate::safetensors::{Dtype, NewTensor};

/// Version of the store as a whole: files, names, manifest.
pub(crate) const STORE_FORMAT: u32 = 1;
/// Where data and every packed tensor begins: a cache line, and the widest vector load.
pub(crate) const ALIGNMENT: usize = 64;

pub(crate) const MANIFEST_FILE: &str = "manifest.json";
pub(crate) const TOKENIZER_FILE: &str = "tokenizer.json";
pub(crate) const EMBEDDING_FILE: &str = "embed.safetensors";
pub(crate) const HEAD_FILE: &str = "head.safetensors";
pub(crate) const NORM_FILE: &str = "norm.safetensors";
pub(crate) const SCREEN_FILE: &str = "screen.safetensors";
/// The one tensor of the embedding's, the head's, the norm's and the screen's file.
pub(crate) const WEIGHT: &str = "weight";

/// Name of the layout of the packed tensors of a store as a whole; each has its own beside it.
pub(crate) const LAYOUT: &str = "ternary-2bit";
/// Its version; another one is refused.
pub(crate) const LAYOUT_VERSION: u32 = 2;

/// The down projection by columns, beside `down` in a layer's file.
pub(crate) const DOWN_COLUMNS: &str = "down_columns";

/// Whether a layer has [`DOWN_COLUMNS`]: only squared ReLU makes so many inner values zero that it
/// pays. Stores of before have them for every model; there they are passed over.
pub(crate) fn has_down_columns(config: &ModelConfig) -> bool {
    config.activation == Activation::SquaredRelu
}

const LAYOUT_KEY: &str = "tercet.layout";
const VERSION_KEY: &str = "tercet.layout_version";

/// Name of a layer's file.
pub(crate) fn layer_file(layer: u32) -> String {
    format!("layer-{layer:04}.safetensors")
}

/// Every shard of a model, in the order in which their parts enter the model's id. The screen, which
/// follows from the head, has no part in it.
pub(crate) fn shard_files(config: &ModelConfig) -> Vec<String> {
    let head = (!config.tied_head).then(|| HEAD_FILE.to_owned());
    let screen = screen_tensor(config).map(|_| SCREEN_FILE.to_owned());
    [EMBEDDING_FILE.to_owned()]
        .into_iter()
        .chain(head)
        .chain([NORM_FILE.to_owned()])
        .chain(screen)
        .chain((0..config.layers).map(layer_file))
        .collect()
}

/// The ternary matrices of a layer, in the order in which a step reads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Projection {
    pub(crate) const ALL: [Self; 7] =
        [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Name of the tensor in a layer's file.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Q => "q",
            Self::K => "k",
            Self::V => "v",
            Self::O => "o",
            Self::Gate => "gate",
            Self::Up => "up",
            Self::Down => "down",
        }
    }

    /// The order of its blocks: by rows where some are not needed, because their gate is zero.
    pub(crate) fn arrangement(self) -> Arrangement {
        match self {
            Self::Up => Arrangement::Rows,
            _ => Arrangement::Tiles,
        }
    }

    /// Rows (outputs) and columns (inputs).
    pub(crate) fn shape(self, config: &ModelConfig) -> (usize, usize) {
        let (hidden, ffn) = (config.hidden, config.ffn);
        let (rows, cols) = match self {
            Self::Q => (config.attention_width(), hidden),
            Self::K | Self::V => (config.kv_width(), hidden),
            Self::O => (hidden, config.attention_width()),
            Self::Gate | Self::Up => (ffn, hidden),
            Self::Down => (hidden, ffn),
        };
        (rows as usize, cols as usize)
    }
}

/// The norms of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Norm {
    Attn,
    AttnSub,
    Ffn,
    FfnSub,
}

impl Norm {
    /// The norms that a layer of this model has.
    pub(crate) fn of(config: &ModelConfig) -> &'static [Self] {
        match config.sub_norms {
            true => &[Self::Attn, Self::AttnSub, Self::Ffn, Self::FfnSub],
            false => &[Self::Attn, Self::Ffn],
        }
    }

    /// Name of the tensor in a layer's file.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Attn => "attn_norm",
            Self::AttnSub => "attn_sub_norm",
            Self::Ffn => "ffn_norm",
            Self::FfnSub => "ffn_sub_norm",
        }
    }

    /// Number of weights.
    pub(crate) fn len(self, config: &ModelConfig) -> usize {
        let len = match self {
            Self::Attn | Self::Ffn => config.hidden,
            Self::AttnSub => config.attention_width(),
            Self::FfnSub => config.ffn,
        };
        len as usize
    }
}

/// The tensors of a layer's file in order: matrices first, so that each begins at [`ALIGNMENT`].
///
/// `None` if a matrix is too large to be addressed.
pub(crate) fn layer_tensors(config: &ModelConfig) -> Option<Vec<NewTensor>> {
    let mut tensors = Vec::new();
    for projection in Projection::ALL {
        let (rows, cols) = projection.shape(config);
        let shape = vec![TernaryMatrix::packed_bytes(rows, cols)?];
        tensors.push(NewTensor { name: projection.name(), dtype: Dtype::U8, shape });
    }
    if has_down_columns(config) {
        let (rows, cols) = Projection::Down.shape(config);
        let shape = vec![TernaryColumns::packed_bytes(rows, cols)?];
        tensors.push(NewTensor { name: DOWN_COLUMNS, dtype: Dtype::U8, shape });
    }
    for norm in Norm::of(config) {
        let shape = vec![norm.len(config)];
        tensors.push(NewTensor { name: norm.name(), dtype: Dtype::F32, shape });
    }
    Some(tensors)
}

/// The one tensor of the embedding's or head's file.
pub(crate) fn float_tensor(config: &ModelConfig, kind: FloatKind) -> NewTensor {
    let dtype = match kind {
        FloatKind::F16 => Dtype::F16,
        FloatKind::Bf16 => Dtype::Bf16,
    };
    let shape = vec![config.vocab as usize, config.hidden as usize];
    NewTensor { name: WEIGHT, dtype, shape }
}

/// The one tensor of the final norm's file.
pub(crate) fn norm_tensor(config: &ModelConfig) -> NewTensor {
    NewTensor { name: WEIGHT, dtype: Dtype::F32, shape: vec![config.hidden as usize] }
}

/// The one tensor of the screen's file; `None` if the model is too wide for one.
pub(crate) fn screen_tensor(config: &ModelConfig) -> Option<NewTensor> {
    let bytes = ScreenMatrix::packed_bytes(config.vocab as usize, config.hidden as usize)?;
    Some(NewTensor { name: WEIGHT, dtype: Dtype::U8, shape: vec![bytes] })
}

/// `__metadata__` of a layer's shard: that of any, and the layout of each packed tensor.
pub(crate) fn layer_metadata(config: &ModelConfig) -> BTreeMap<String, String> {
    let mut metadata = shard_metadata();
    for (tensor, layout) in packed_tensors(config) {
        metadata.insert(layout_key(tensor), layout.into());
    }
    metadata
}

/// `__metadata__` of any shard: which layout its packed tensors have.
pub(crate) fn shard_metadata() -> BTreeMap<String, String> {
    BTreeMap::from([
        (LAYOUT_KEY.into(), LAYOUT.into()),
        (VERSION_KEY.into(), LAYOUT_VERSION.to_string()),
    ])
}

/// Adds a packed matrix to a layer's `__metadata__`: its logical shape, and its scale as the
/// shortest decimal that reads back to the same f32. Those of `down` are those of its columns, too.
pub(crate) fn describe_matrix(
    metadata: &mut BTreeMap<String, String>,
    projection: Projection,
    config: &ModelConfig,
    scale: f32,
) {
    let (rows, cols) = projection.shape(config);
    metadata.insert(format!("{}.shape", projection.name()), format!("{rows}x{cols}"));
    metadata.insert(scale_key(projection), scale.to_string());
}

/// The packed tensors of a layer, and the name of the layout of each.
pub(crate) fn packed_tensors(
    config: &ModelConfig,
) -> impl Iterator<Item = (&'static str, &'static str)> + use<> {
    let matrices = Projection::ALL.map(|of| (of.name(), of.arrangement().layout()));
    let columns = has_down_columns(config).then_some((DOWN_COLUMNS, TernaryColumns::LAYOUT));
    matrices.into_iter().chain(columns)
}

/// The layout that the `__metadata__` of a layer's file names for a tensor.
pub(crate) fn layout_of_tensor<'a>(
    metadata: &'a BTreeMap<String, String>,
    tensor: &str,
) -> &'a str {
    metadata.get(&layout_key(tensor)).map_or("none", String::as_str)
}

/// The layout that a shard's `__metadata__` names, with its version.
pub(crate) fn layout_of(metadata: &BTreeMap<String, String>) -> (&str, &str) {
    let text = |key| metadata.get(key).map_or("none", String::as_str);
    (text(LAYOUT_KEY), text(VERSION_KEY))
}

/// The scale of a matrix in a layer's `__metadata__`, if there is a usable one.
pub(crate) fn scale_of(metadata: &BTreeMap<String, String>, projection: Projection) -> Option<f32> {
    let scale: f32 = metadata.get(&scale_key(projection))?.parse().ok()?;
    (scale.is_finite() && scale > 0.0).then_some(scale)
}

fn scale_key(projection: Projection) -> String {
    format!("{}.scale", projection.name())
}

/// `__metadata__` of the screen's file: which layout it has and of what shape.
pub(crate) fn screen_metadata(config: &ModelConfig) -> BTreeMap<String, String> {
    let mut metadata = shard_metadata();
    metadata.insert(format!("{WEIGHT}.layout"), ScreenMatrix::LAYOUT.into());
    metadata.insert(format!("{WEIGHT}.shape"), format!("{}x{}", config.vocab, config.hidden));
    metadata
}

fn layout_key(tensor: &str) -> String {
    format!("{tensor}.layout")
}
