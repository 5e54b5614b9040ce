//! Hugging Face directories: `config.json`, one or several safetensors files, tokenizer and template.

mod config;
mod json;
mod rope;
mod tensors;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::checkpoint::{Checkpoint, FLOAT_ACTIVATIONS, LayerTensors};
use super::matrix::{Floats, Matrix, Trits};
use super::text::{self, HuggingFaceText, NAMED_DEFAULT, NAMED_TEMPLATES};
use super::{ImportError, ImportOptions, map, name_of};
use crate::config::ModelConfig;
use crate::file::{MappedFile, is_listed, is_nothing, read_if_listed, read_limited};
use crate::layout::{Norm, Projection};
use crate::safetensors::Dtype;
use crate::store::TOKENIZER_BYTES_MAX;
use config::{HuggingFaceConfig, Weights};
use tensors::{Tensors, is_buffer, wrong_tensor};

pub(super) const CONFIG_FILE: &str = "config.json";
const INDEX_FILE: &str = "model.safetensors.index.json";
const SINGLE_FILE: &str = "model.safetensors";
/// Weights in the form that PyTorch pickles: reading it means running what it says.
const PICKLED_FILES: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
/// A tokenizer in SentencePiece's own form.
const SENTENCE_PIECE_FILE: &str = "tokenizer.model";
const TOKENIZER_FILE: &str = "tokenizer.json";
const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_FILE: &str = "special_tokens_map.json";
/// The stages of a model of sentence-transformers.
const STAGES_FILE: &str = "modules.json";
/// Longest JSON file beside the tokenizer: an index names every tensor.
const JSON_BYTES_MAX: u64 = 16 << 20;
/// Most files of a sharded model.
const FILES_MAX: usize = 1024;

/// A directory whose files are mapped.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    config: Vec<u8>,
    files: Vec<(PathBuf, MappedFile)>,
    /// Where the index says each tensor is, if there is an index.
    index: Option<BTreeMap<String, String>>,
    /// There is an index that does not count.
    ignores_index: bool,
}

/// `model.safetensors.index.json`; what else it says does not matter.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Directory {
    pub(super) fn open(path: &Path) -> Result<Self, ImportError> {
        let config = read(&path.join(CONFIG_FILE), JSON_BYTES_MAX)?;
        let is_there = |name: &str| listed(&path.join(name));
        // A single file goes before an index, which may be left over, as in transformers.
        let is_single = is_there(SINGLE_FILE)?;
        let ignores_index = is_single && is_there(INDEX_FILE)?;
        let index: Option<Index> =
            if is_single { None } else { read_json(&path.join(INDEX_FILE))? };
        let index = index.map(|index| index.weight_map);
        if index.is_none() && !is_single {
            for pickled in PICKLED_FILES {
                if is_there(pickled)? {
                    return Err(ImportError::Unsupported(format!(
                        "{pickled} is not supported: save the model as safetensors first"
                    )));
                }
            }
        }
        let names = match &index {
            None => {
                refuse_parts(path)?;
                vec![SINGLE_FILE.to_owned()]
            }
            Some(index) => file_names(&path.join(INDEX_FILE), index)?,
        };
        let mut files = Vec::new();
        for name in names {
            let directory = path;
            let path = directory.join(&name);
            if index.is_some() && !listed(&path)? {
                return Err(ImportError::Unsupported(format!(
                    "{} names {name}, which is not there: is the download complete?",
                    directory.join(INDEX_FILE).display()
                )));
            }
            let file = map(&path)?;
            file.advise_sequential();
            files.push((path, file));
        }
        Ok(Self { path: path.to_owned(), config, files, index, ignores_index })
    }

    /// Finds and checks everything that an import needs.
    pub(super) fn read(&self, options: &ImportOptions) -> Result<Checkpoint<'_>, ImportError> {
        self.refuse_embedding()?;
        let limits: Option<TokenizerLimits> = read_json(&self.path.join(TOKENIZER_CONFIG_FILE))?;
        let longest = limits.and_then(|limits| limits.model_max_length?.as_f64());
        let path = self.path.join(CONFIG_FILE);
        let mut config = HuggingFaceConfig::parse(&self.config, &path, longest, options)?;
        let mut tensors = Tensors::default();
        for (path, file) in &self.files {
            tensors.add(path, file.bytes())?;
        }
        if self.ignores_index {
            config.notes.push(format!("weights: {INDEX_FILE} is ignored beside {SINGLE_FILE}"));
        }
        let weights = self.index.iter().flatten().filter(|(tensor, _)| !is_buffer(tensor));
        for (tensor, file) in weights {
            let found = tensors.files.get(tensor).and_then(|path| path.file_name());
            if found.is_none_or(|found| found != file.as_str()) {
                return Err(ImportError::MissingTensor { tensor: format!("{tensor} in {file}") });
            }
        }
        let path = |name| self.path.join(name);
        let text = HuggingFaceText {
            tokenizer: read_optional(&path(TOKENIZER_FILE), TOKENIZER_BYTES_MAX)?,
            tokenizer_config: read_json(&path(TOKENIZER_CONFIG_FILE))?.unwrap_or_default(),
            special_tokens_map: read_json(&path(SPECIAL_TOKENS_FILE))?.unwrap_or_default(),
            other_tokens: [
                read_json(&path(TOKENIZER_CONFIG_FILE))?.unwrap_or_default(),
                read_json(&path(SPECIAL_TOKENS_FILE))?.unwrap_or_default(),
            ],
            generation_config: read_json(&path("generation_config.json"))?.unwrap_or_default(),
            template_json: read_json(&path("chat_template.json"))?.unwrap_or_default(),
            template: read_optional(&path("chat_template.jinja"), JSON_BYTES_MAX)?,
            named_templates: template_names(&path(NAMED_TEMPLATES))?,
            named_default: read_optional(&path(NAMED_DEFAULT), JSON_BYTES_MAX)?,
            added_tokens: read_json(&path("added_tokens.json"))?.unwrap_or_default(),
        };
        if text.tokenizer.is_none() && listed(&path(SENTENCE_PIECE_FILE))? {
            let note = format!("{SENTENCE_PIECE_FILE} is not read: save it as {TOKENIZER_FILE}");
            config.notes.push(note);
        }
        read_checkpoint(config, tensors, text, &name_of(&self.path), options)
    }

    /// Refuses a model whose output is one vector for a text.
    fn refuse_embedding(&self) -> Result<(), ImportError> {
        let stages: Option<serde_json::Value> = read_json(&self.path.join(STAGES_FILE))?;
        let stages = stages.iter().flat_map(|stages| stages.as_array().into_iter().flatten());
        let mut kinds = stages.filter_map(|stage| stage.get("type")?.as_str());
        match kinds.find(|kind| kind.ends_with("Pooling")) {
            Some(kind) => Err(ImportError::Unsupported(format!(
                "an embedding model ({STAGES_FILE} names {kind}) is not supported"
            ))),
            None => Ok(()),
        }
    }
}

/// What `tokenizer_config.json` says about lengths.
#[derive(Deserialize)]
struct TokenizerLimits {
    model_max_length: Option<serde_json::Value>,
}

/// The whole of a model given as bytes, without writing it.
pub(super) fn check(config: &[u8], file: &[u8]) -> Result<ModelConfig, ImportError> {
    let options = ImportOptions::default();
    let config = HuggingFaceConfig::parse(config, Path::new(CONFIG_FILE), None, &options)?;
    let mut tensors = Tensors::default();
    tensors.add(Path::new(SINGLE_FILE), file)?;
    read_checkpoint(config, tensors, HuggingFaceText::default(), "checked", &options)?.check()
}

/// The files that an index names, each once: plain names, so that none leads out of the directory.
fn file_names(path: &Path, index: &BTreeMap<String, String>) -> Result<Vec<String>, ImportError> {
    let mut names: Vec<String> = index.values().cloned().collect();
    names.sort();
    names.dedup();
    let plain = |name: &str| {
        name.ends_with(".safetensors")
            && !name.starts_with('.')
            && !name.contains(['/', '\\', ':', '\0'])
    };
    if let Some(name) = names.iter().find(|name| !plain(name)) {
        return Err(ImportError::FileName { path: path.to_owned(), name: name.clone() });
    }
    if names.is_empty() || names.len() > FILES_MAX {
        return Err(ImportError::Value {
            key: format!("the number of files in {INDEX_FILE}"),
            found: names.len().to_string(),
            expected: format!("1 to {FILES_MAX}"),
        });
    }
    Ok(names)
}

/// Refuses weights of which [`SINGLE_FILE`] is not the whole, with what is missing.
fn refuse_parts(path: &Path) -> Result<(), ImportError> {
    if listed(&path.join(SINGLE_FILE))? {
        return Ok(());
    }
    let entries = std::fs::read_dir(path)
        .map_err(|source| ImportError::Read { path: path.to_owned(), source })?;
    let is_weights = |name: &String| name.ends_with(".safetensors");
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(is_weights).collect();
    names.sort();
    Err(ImportError::Unsupported(match names.first() {
        None => format!("{} has no {SINGLE_FILE}: is the download complete?", path.display()),
        Some(name) if name.contains("-of-") => format!(
            "{} has parts of the weights ({name}) but no {INDEX_FILE}: download that file, too",
            path.display()
        ),
        Some(name) => format!(
            "{} has {name}, but no {SINGLE_FILE}: rename it if it holds the whole model",
            path.display()
        ),
    }))
}

fn read(path: &Path, limit_bytes: u64) -> Result<Vec<u8>, ImportError> {
    read_limited(path, limit_bytes)
        .map_err(|source| ImportError::Read { path: path.to_owned(), source })
}

fn read_optional(path: &Path, limit_bytes: u64) -> Result<Option<Vec<u8>>, ImportError> {
    read_if_listed(path, limit_bytes)
        .map_err(|source| ImportError::Read { path: path.to_owned(), source })
}

/// Whether something of that name is there, be it what it may.
fn listed(path: &Path) -> Result<bool, ImportError> {
    is_listed(path).map_err(|source| ImportError::Read { path: path.to_owned(), source })
}

/// The names of the templates in a folder, sorted; of a folder with very many only the first found.
fn template_names(folder: &Path) -> Result<Vec<String>, ImportError> {
    const NAMES_MAX: usize = 256;
    let read_error = |source| ImportError::Read { path: folder.to_owned(), source };
    let entries = match std::fs::read_dir(folder) {
        // No folder, or a file of that name, in which nothing can be.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(Vec::new()),
        Err(error) if is_nothing(&error) && !listed(folder)? => return Ok(Vec::new()),
        entries => entries.map_err(read_error)?,
    };
    let names = entries.flatten().filter_map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.strip_suffix(".jinja").map(str::to_owned)
    });
    let mut names: Vec<String> = names.take(NAMES_MAX).collect();
    names.sort();
    Ok(names)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, ImportError> {
    let Some(json) = read_optional(path, JSON_BYTES_MAX)? else { return Ok(None) };
    json::parse(&json, path).map(Some)
}

/// Names of a layer's matrices behind `model.layers.N.`.
fn projection_name(projection: Projection) -> &'static str {
    match projection {
        Projection::Q => "self_attn.q_proj",
        Projection::K => "self_attn.k_proj",
        Projection::V => "self_attn.v_proj",
        Projection::O => "self_attn.o_proj",
        Projection::Gate => "mlp.gate_proj",
        Projection::Up => "mlp.up_proj",
        Projection::Down => "mlp.down_proj",
    }
}

/// Names that a layer's norms may have behind `model.layers.N.`: Microsoft's, then 1bitLLM's.
fn norm_names(norm: Norm) -> [&'static str; 2] {
    match norm {
        Norm::Attn => ["input_layernorm.weight"; 2],
        Norm::AttnSub => ["self_attn.attn_sub_norm.weight", "self_attn.inner_attn_ln.weight"],
        Norm::Ffn => ["post_attention_layernorm.weight"; 2],
        Norm::FfnSub => ["mlp.ffn_sub_norm.weight", "mlp.ffn_layernorm.weight"],
    }
}

fn read_checkpoint<'a>(
    config: HuggingFaceConfig,
    mut tensors: Tensors<'a>,
    text: HuggingFaceText,
    name: &str,
    options: &ImportOptions,
) -> Result<Checkpoint<'a>, ImportError> {
    let HuggingFaceConfig { mut model, tokens, weights, tied, skipped, mut notes } = config;
    if model.name.is_empty() {
        model.name = name.to_owned();
    }
    model.validate()?;
    let (vocab, hidden) = (model.vocab as usize, model.hidden as usize);
    let embedding = tensors.floats("model.embed_tokens.weight", &[vocab, hidden])?;
    let head = read_head(&mut tensors, &embedding, tied, &mut notes)?;
    model.tied_head = head.is_none();
    let final_norm = tensors.floats("model.norm.weight", &[hidden])?.vector()?;

    let mut layers = Vec::new();
    for layer in 0..model.layers {
        layers.push(read_layer(&mut tensors, &model, weights, &skipped, layer)?);
    }
    tensors.pass_over(&mut notes);
    if let Some(tensor) = tensors.left.keys().next() {
        return Err(ImportError::UnknownTensor { hint: hint(tensor), tensor: tensor.clone() });
    }
    let format = describe(&layers[0].matrices[0], weights);
    notes.insert(0, format!("weights: {format}"));
    if matches!(layers[0].matrices[0].trits, Trits::Ternary(_)) {
        notes.push(FLOAT_ACTIVATIONS.into());
    }
    let text = text::from_hugging_face(text, &tokens, &mut model, &mut notes)?;
    let mut checkpoint = Checkpoint {
        config: model,
        text,
        source: name.to_owned(),
        format: format!("safetensors {format}"),
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

/// The head, unless it is the embedding. A tied model may still carry a copy.
fn read_head<'a>(
    tensors: &mut Tensors<'a>,
    embedding: &Floats<'a>,
    tied: Option<bool>,
    notes: &mut Vec<String>,
) -> Result<Option<Floats<'a>>, ImportError> {
    const HEAD: &str = "lm_head.weight";
    let is_there = tensors.left.contains_key(HEAD);
    let tied = tied.unwrap_or(!is_there);
    if tied && !is_there {
        notes.push("head: tied to the embedding".into());
        return Ok(None);
    }
    let head = tensors.floats(HEAD, &[embedding.rows, embedding.cols])?;
    if !tied {
        notes.push("head: its own".into());
        return Ok(Some(head));
    }
    if head.format != embedding.format || head.bytes != embedding.bytes {
        return Err(ImportError::Unsupported(
            "config.json ties the head to the embedding, yet lm_head.weight differs from it".into(),
        ));
    }
    notes.push("head: tied to the embedding, whose copy lm_head.weight was left out".into());
    Ok(None)
}

fn read_layer<'a>(
    tensors: &mut Tensors<'a>,
    model: &ModelConfig,
    weights: Weights,
    skipped: &[String],
    layer: u32,
) -> Result<LayerTensors<'a>, ImportError> {
    let prefix = format!("model.layers.{layer}.");
    let mut matrices = Vec::with_capacity(Projection::ALL.len());
    for projection in Projection::ALL {
        let path = format!("{prefix}{}", projection_name(projection));
        if let Some(skipped) = skipped.iter().find(|skipped| path.contains(skipped.as_str())) {
            return Err(ImportError::Unsupported(format!(
                "modules_to_not_convert leaves {path} (by {skipped:?}) without ternary weights, \
                 which is not supported"
            )));
        }
        matrices.push(read_matrix(tensors, model, weights, projection, &path)?);
    }
    let mut norms = Vec::new();
    for norm in Norm::of(model) {
        let [name, other] = norm_names(*norm).map(|name| format!("{prefix}{name}"));
        let name = if tensors.left.contains_key(&name) { name } else { other };
        norms.push(tensors.floats(&name, &[norm.len(model)])?.vector()?);
    }
    Ok(LayerTensors { matrices, norms })
}

fn read_matrix<'a>(
    tensors: &mut Tensors<'a>,
    model: &ModelConfig,
    weights: Weights,
    projection: Projection,
    path: &str,
) -> Result<Matrix<'a>, ImportError> {
    let (rows, cols) = projection.shape(model);
    let name = format!("{path}.weight");
    let scale = tensors.scale(&format!("{path}.weight_scale"))?;
    let scale = scale.map(|stored| if weights.divides { 1.0 / stored } else { stored });
    let dtype = tensors.left.get(&name).map(|(tensor, _)| tensor.dtype);
    // The tensors are believed over the mode that the config names: saved models get it wrong.
    let trits = if dtype == Some(Dtype::U8) {
        let (tensor, bytes) = tensors.take(&name)?;
        if !rows.is_multiple_of(4) || tensor.shape != [rows / 4, cols] {
            return Err(wrong_tensor(&name, &tensor, &format!("U8 [{}, {cols}]", rows / 4)));
        }
        if scale.is_none() {
            return Err(ImportError::MissingTensor { tensor: format!("{path}.weight_scale") });
        }
        Trits::HuggingFace(bytes)
    } else {
        let floats = tensors.floats(&name, &[rows, cols])?;
        match (scale, weights.masters) {
            (Some(_), _) => Trits::Units(floats),
            (None, true) => Trits::Masters(floats),
            (None, false) => Trits::Ternary(floats),
        }
    };
    let (inverted, interleaved_heads) = (false, None);
    Ok(Matrix { tensor: name, trits, scale, inverted, rows, cols, interleaved_heads })
}

/// What the matrices are, in words.
fn describe(matrix: &Matrix<'_>, weights: Weights) -> String {
    let rule = if weights.divides { "divide" } else { "multiply" };
    match &matrix.trits {
        Trits::Masters(floats) => {
            format!("{} masters, ternary by their mean magnitude", floats.format.name())
        }
        Trits::Ternary(floats) => format!("ternary values stored as {}", floats.format.name()),
        Trits::Units(floats) => {
            format!("trits stored as {}, scales {rule}", floats.format.name())
        }
        _ => format!("packed uint8, scales {rule}"),
    }
}

/// What an unknown tensor probably is.
fn hint(tensor: &str) -> &'static str {
    let ends = |ends: &[&str]| ends.iter().any(|end| tensor.ends_with(end));
    if ends(&[".bias"]) {
        ": biases are not supported"
    } else if ends(&["_proj.rms_norm.weight", "_proj.norm.weight"]) {
        ": norms in front of single projections (use_rms_norm) are not supported"
    } else if tensor.contains("expert") || tensor.contains("block_sparse_moe") {
        ": mixtures of experts are not supported"
    } else if ends(&["q_norm.weight", "k_norm.weight"]) {
        ": norms of queries and keys are not supported"
    } else if ends(&["sub_norm.weight", "inner_attn_ln.weight", "ffn_layernorm.weight"]) {
        ": a model of this type has no sub-norms"
    } else {
        ""
    }
}
