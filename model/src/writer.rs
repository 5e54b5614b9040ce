//! Writes a store from any source of tensors, row by row: never holds more than a tile, and the
//! columns of one packed matrix.

use std::path::Path;

use kernels::{
    Arrangement, ColumnPacker, FloatKind, ScreenMatrix, TernaryMatrix, pack_screen_group, pack_tile,
};

use crate::config::{ConfigError, ModelConfig};
use crate::id::{ContentText, ModelId, PartDigest, PartHasher, model_id};
use crate::layout::{
    self, ALIGNMENT, EMBEDDING_FILE, HEAD_FILE, MANIFEST_FILE, NORM_FILE, Norm, Projection,
    SCREEN_FILE, STORE_FORMAT, TOKENIZER_FILE, WEIGHT, layer_file, shard_files,
};
use crate::manifest::{FileEntry, Layout, Manifest, Provenance};
use crate::progress::Progress;
use crate::safetensors::{self, NewTensor};
use crate::sampling::SamplingDefaults;
use crate::special::SpecialTexts;
use crate::staging::{StagedFile, Staging, WriteError};

/// The text that goes with a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ModelText {
    /// `tokenizer.json`.
    pub(crate) tokenizer: Option<Vec<u8>>,
    pub(crate) chat_template: Option<String>,
    pub(crate) bos_text: Option<String>,
    pub(crate) eos_text: Option<String>,
    /// Of other tokens, those that the template names.
    pub(crate) special: SpecialTexts,
    /// Not part of the content that is hashed.
    pub(crate) sampling: SamplingDefaults,
}

impl ModelText {
    fn content(&self) -> ContentText<'_> {
        ContentText {
            tokenizer: self.tokenizer.as_deref(),
            chat_template: self.chat_template.as_deref(),
            bos_text: self.bos_text.as_deref(),
            eos_text: self.eos_text.as_deref(),
            special: Some(&self.special),
        }
    }
}

/// A ternary matrix whose rows can be had in order.
pub(crate) trait TernaryRows<E> {
    /// What a trit of 1 stands for; finite and positive.
    fn scale(&self) -> f32;
    /// Writes the trits of a row.
    fn row(&mut self, row: usize, out: &mut [i8]) -> Result<(), E>;
}

/// A float matrix whose rows can be had in order, as 16-bit floats.
pub(crate) trait FloatRows<E> {
    fn kind(&self) -> FloatKind;
    /// Writes the bits of a row.
    fn row(&mut self, row: usize, out: &mut [u16]) -> Result<(), E>;
}

/// A norm of the model: the final one, or one of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NormPlace {
    Final,
    Layer(u32, Norm),
}

/// What a store is written from.
pub(crate) trait Content {
    /// What can go wrong on the source's side.
    type Error: From<WriteError> + From<ConfigError>;
    fn config(&self) -> &ModelConfig;
    fn text(&self) -> &ModelText;
    fn norm(&self, place: NormPlace) -> Result<Vec<f32>, Self::Error>;
    fn projection(
        &self,
        layer: u32,
        projection: Projection,
    ) -> Result<Box<dyn TernaryRows<Self::Error> + '_>, Self::Error>;
    fn embedding(&self) -> Result<Box<dyn FloatRows<Self::Error> + '_>, Self::Error>;
    /// Asked for only if the head is not tied; twice, for its screen is made of it.
    fn head(&self) -> Result<Box<dyn FloatRows<Self::Error> + '_>, Self::Error>;
    /// Told after each matrix how many of its trits are zero.
    fn check_zeros(
        &mut self,
        layer: u32,
        projection: Projection,
        zeros: u64,
        trits: u64,
    ) -> Result<(), Self::Error>;
    /// Asked for at the end.
    fn provenance(&self) -> Provenance;
}

/// Writes `content` to `dest`, which appears whole or not at all.
pub(crate) fn write_store<C: Content>(
    content: &mut C,
    dest: &Path,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<ModelId, C::Error> {
    content.config().validate()?;
    let config = content.config().clone();
    let staging = Staging::begin(dest)?;
    let names = shard_files(&config);
    let total = names.len() as u64;
    let mut files = Vec::with_capacity(names.len());
    let mut parts = Vec::with_capacity(names.len());
    let mut layer = 0;
    for (done, name) in names.iter().enumerate() {
        progress(&Progress { what: name, done: done as u64, total });
        if name == SCREEN_FILE {
            let head = match config.tied_head {
                true => content.embedding()?,
                false => content.head()?,
            };
            files.push(write_screen(&staging, &config, head)?);
            continue;
        }
        let (file, part) = match name.as_str() {
            EMBEDDING_FILE => write_floats(&staging, name, &config, content.embedding()?)?,
            HEAD_FILE => write_floats(&staging, name, &config, content.head()?)?,
            NORM_FILE => write_norm(&staging, &config, &content.norm(NormPlace::Final)?)?,
            _ => {
                layer += 1;
                write_layer(&staging, content, &config, layer - 1)?
            }
        };
        files.push(file);
        parts.push(part);
    }
    let tokenizer = match &content.text().tokenizer {
        Some(json) => Some(write_whole(&staging, TOKENIZER_FILE, json)?),
        None => None,
    };
    let id = model_id(&config, content.text().content(), &parts);
    let text = content.text().clone();
    let manifest = Manifest {
        format: STORE_FORMAT,
        layout: Layout::current(),
        id,
        config,
        tokenizer,
        chat_template: text.chat_template,
        bos_token_text: text.bos_text,
        eos_token_text: text.eos_text,
        special_token_texts: text.special,
        sampling: text.sampling,
        provenance: content.provenance(),
        files,
        digest: None,
    }
    .with_digest();
    let mut json = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data");
    json.push(b'\n');
    write_whole(&staging, MANIFEST_FILE, &json)?;
    staging.finish()?;
    progress(&Progress { what: "all files", done: total, total });
    Ok(id)
}

fn write_whole(staging: &Staging, name: &str, bytes: &[u8]) -> Result<FileEntry, WriteError> {
    let mut file = staging.create(name)?;
    file.write(bytes)?;
    file.finish()
}

fn write_layer<C: Content>(
    staging: &Staging,
    content: &mut C,
    config: &ModelConfig,
    layer: u32,
) -> Result<(FileEntry, PartDigest), C::Error> {
    let too_large = || ConfigError::Inconsistent("a matrix is too large to be addressed".into());
    let tensors = layout::layer_tensors(config).ok_or_else(too_large)?;
    let mut metadata = layout::layer_metadata(config);
    let mut matrices = Vec::with_capacity(Projection::ALL.len());
    for projection in Projection::ALL {
        let matrix = content.projection(layer, projection)?;
        layout::describe_matrix(&mut metadata, projection, config, matrix.scale());
        matrices.push(matrix);
    }
    let mut file = staging.create(&layer_file(layer))?;
    file.write(&safetensors::header(&tensors, &metadata, ALIGNMENT))?;
    let mut part = PartHasher::new();
    let mut zeros = [0; Projection::ALL.len()];
    for ((projection, mut matrix), zeros) in
        Projection::ALL.into_iter().zip(matrices).zip(&mut zeros)
    {
        let (rows, cols) = projection.shape(config);
        part.begin(projection.name(), rows, cols, matrix.scale());
        let mut columns = match projection {
            Projection::Down if layout::has_down_columns(config) => {
                Some(ColumnPacker::new(rows, cols).ok_or_else(too_large)?)
            }
            _ => None,
        };
        let mut each_row = |row: usize, trits: &[i8]| {
            if let Some(columns) = &mut columns {
                columns.row(row, trits);
            }
        };
        let arrangement = projection.arrangement();
        *zeros = write_matrix(
            &mut file,
            &mut part,
            matrix.as_mut(),
            arrangement,
            (rows, cols),
            &mut each_row,
        )?;
        if let Some(columns) = columns {
            file.write(&columns.finish())?;
        }
    }
    for (projection, zeros) in Projection::ALL.into_iter().zip(zeros) {
        let (rows, cols) = projection.shape(config);
        content.check_zeros(layer, projection, zeros, rows as u64 * cols as u64)?;
    }
    for &norm in Norm::of(config) {
        let values = content.norm(NormPlace::Layer(layer, norm))?;
        file.write(&little_endian(&values))?;
        part.vector(norm.name(), &values);
    }
    Ok((file.finish()?, part.finish()))
}

/// Packs a matrix tile by tile, shows `each_row` its trits, and returns how many of them are zero.
fn write_matrix<E: From<WriteError>>(
    file: &mut StagedFile,
    part: &mut PartHasher,
    matrix: &mut dyn TernaryRows<E>,
    arrangement: Arrangement,
    (rows, cols): (usize, usize),
    each_row: &mut dyn FnMut(usize, &[i8]),
) -> Result<u64, E> {
    let mut trits = vec![0; TernaryMatrix::TILE_ROWS * cols];
    let mut packed = vec![0; TernaryMatrix::tile_bytes(cols)];
    let mut zeros = 0;
    for first in (0..rows).step_by(TernaryMatrix::TILE_ROWS) {
        let tile_rows = TernaryMatrix::TILE_ROWS.min(rows - first);
        let trits = &mut trits[..tile_rows * cols];
        for (row, out) in trits.chunks_exact_mut(cols).enumerate() {
            matrix.row(first + row, out)?;
            each_row(first + row, out);
        }
        zeros += trits.iter().filter(|trit| **trit == 0).count() as u64;
        part.trits(trits);
        let views: Vec<&[i8]> = trits.chunks_exact(cols).collect();
        pack_tile(arrangement, &views, cols, &mut packed);
        file.write(&packed)?;
    }
    Ok(zeros)
}

fn write_floats<E: From<WriteError>>(
    staging: &Staging,
    name: &str,
    config: &ModelConfig,
    mut matrix: Box<dyn FloatRows<E> + '_>,
) -> Result<(FileEntry, PartDigest), E> {
    let (rows, cols) = (config.vocab as usize, config.hidden as usize);
    let tensor = layout::float_tensor(config, matrix.kind());
    let mut file = staging.create(name)?;
    file.write(&safetensors::header(&[tensor], &layout::shard_metadata(), ALIGNMENT))?;
    let mut part = PartHasher::new();
    part.begin(WEIGHT, rows, cols, 1.0);
    let (mut bits, mut values) = (vec![0u16; cols], vec![0f32; cols]);
    for row in 0..rows {
        matrix.row(row, &mut bits)?;
        widen(matrix.kind(), &bits, &mut values);
        part.floats(&values);
        match cfg!(target_endian = "little") {
            true => file.write(bytemuck::cast_slice(&bits))?,
            false => bits.iter().try_for_each(|bits| file.write(&bits.to_le_bytes()))?,
        }
    }
    Ok((file.finish()?, part.finish()))
}

/// Packs the screen of a head, group by group.
fn write_screen<E: From<WriteError>>(
    staging: &Staging,
    config: &ModelConfig,
    mut head: Box<dyn FloatRows<E> + '_>,
) -> Result<FileEntry, E> {
    let (rows, cols) = (config.vocab as usize, config.hidden as usize);
    let tensor = layout::screen_tensor(config).expect("the list of files has a screen");
    let mut file = staging.create(SCREEN_FILE)?;
    file.write(&safetensors::header(&[tensor], &layout::screen_metadata(config), ALIGNMENT))?;
    let mut values = vec![0f32; ScreenMatrix::GROUP_ROWS.min(rows) * cols];
    let (mut bits, mut packed) = (vec![0u16; cols], vec![0; ScreenMatrix::group_bytes(cols)]);
    for first in (0..rows).step_by(ScreenMatrix::GROUP_ROWS) {
        let group = &mut values[..ScreenMatrix::GROUP_ROWS.min(rows - first) * cols];
        for (row, values) in group.chunks_exact_mut(cols).enumerate() {
            head.row(first + row, &mut bits)?;
            widen(head.kind(), &bits, values);
        }
        let views: Vec<&[f32]> = group.chunks_exact(cols).collect();
        pack_screen_group(&views, cols, &mut packed);
        file.write(&packed)?;
    }
    Ok(file.finish()?)
}

/// The values of 16-bit floats.
pub(crate) fn widen(kind: FloatKind, bits: &[u16], values: &mut [f32]) {
    match kind {
        FloatKind::Bf16 => {
            for (value, bits) in values.iter_mut().zip(bits) {
                *value = f32::from_bits(u32::from(*bits) << 16);
            }
        }
        FloatKind::F16 => {
            for (value, bits) in values.iter_mut().zip(bits) {
                *value = half::f16::from_bits(*bits).to_f32();
            }
        }
    }
}

fn write_norm(
    staging: &Staging,
    config: &ModelConfig,
    values: &[f32],
) -> Result<(FileEntry, PartDigest), WriteError> {
    let tensor: NewTensor = layout::norm_tensor(config);
    let mut file = staging.create(NORM_FILE)?;
    file.write(&safetensors::header(&[tensor], &layout::shard_metadata(), ALIGNMENT))?;
    file.write(&little_endian(values))?;
    let mut part = PartHasher::new();
    part.vector(WEIGHT, values);
    Ok((file.finish()?, part.finish()))
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
