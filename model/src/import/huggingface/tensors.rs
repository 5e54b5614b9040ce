//! The tensors of all files of a Hugging Face directory, each taken once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::super::ImportError;
use super::super::matrix::{FloatFormat, Floats};
use crate::safetensors::{Dtype, Table, Tensor};

/// Ends of names of tensors that are no weights: tables of RoPE, masks, numbers of positions.
const BUFFERS: [&str; 7] = [
    ".rotary_emb.inv_freq",
    ".rotary_emb.original_inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".masked_bias",
    ".causal_mask",
    "position_ids",
];

pub(super) fn is_buffer(name: &str) -> bool {
    BUFFERS.iter().any(|end| name.ends_with(end))
}

/// The tensors of all files. Those that were asked for are taken out; what is left is unknown.
#[derive(Default)]
pub(super) struct Tensors<'a> {
    pub(super) left: BTreeMap<String, (Tensor, &'a [u8])>,
    pub(super) files: BTreeMap<String, PathBuf>,
}

impl<'a> Tensors<'a> {
    pub(super) fn add(&mut self, path: &Path, file: &'a [u8]) -> Result<(), ImportError> {
        let table = Table::parse(file)
            .map_err(|source| ImportError::Safetensors { path: path.to_owned(), source })?;
        for (name, tensor) in table.tensors {
            let bytes = &file[tensor.range.clone()];
            if self.left.insert(name.clone(), (tensor, bytes)).is_some() {
                return Err(ImportError::DuplicateTensor { tensor: name });
            }
            self.files.insert(name, path.to_owned());
        }
        Ok(())
    }

    /// Drops the buffers of older models, which follow from the config and no reader loads, and
    /// tensors without elements.
    pub(super) fn pass_over(&mut self, notes: &mut Vec<String>) {
        let is_buffer =
            |name: &str, tensor: &Tensor| self::is_buffer(name) || tensor.shape.contains(&0);
        let all = self.left.len();
        let first = self.left.iter().find(|(name, (tensor, _))| is_buffer(name, tensor));
        let Some(first) = first.map(|(name, _)| name.clone()) else { return };
        self.left.retain(|name, (tensor, _)| !is_buffer(name, tensor));
        let dropped = all - self.left.len();
        notes.push(format!("{dropped} tensors that are no weights were left out ({first})"));
    }

    pub(super) fn take(&mut self, name: &str) -> Result<(Tensor, &'a [u8]), ImportError> {
        self.left.remove(name).ok_or_else(|| ImportError::MissingTensor { tensor: name.to_owned() })
    }

    /// A float matrix, or a vector of one row.
    pub(super) fn floats(
        &mut self,
        name: &str,
        shape: &[usize],
    ) -> Result<Floats<'a>, ImportError> {
        let (tensor, bytes) = self.take(name)?;
        let format = float_format(tensor.dtype).filter(|_| tensor.shape == shape);
        let Some(format) = format else {
            return Err(wrong_tensor(name, &tensor, &format!("floats of {shape:?}")));
        };
        let cols = shape[shape.len() - 1];
        let rows = shape[..shape.len() - 1].iter().product();
        Ok(Floats { tensor: name.to_owned(), format, bytes, rows, cols })
    }

    /// A scale: one float.
    pub(super) fn scale(&mut self, name: &str) -> Result<Option<f32>, ImportError> {
        let Some((tensor, bytes)) = self.left.remove(name) else { return Ok(None) };
        let format = float_format(tensor.dtype).filter(|_| tensor.shape.iter().all(|d| *d == 1));
        let Some(format) = format else {
            return Err(wrong_tensor(name, &tensor, "one float (one scale per tensor)"));
        };
        let floats = Floats { tensor: name.to_owned(), format, bytes, rows: 1, cols: 1 };
        Ok(Some(floats.vector()?[0]))
    }
}

fn float_format(dtype: Dtype) -> Option<FloatFormat> {
    match dtype {
        Dtype::Bf16 => Some(FloatFormat::Bf16),
        Dtype::F16 => Some(FloatFormat::F16),
        Dtype::F32 => Some(FloatFormat::F32),
        Dtype::U8 | Dtype::Other(..) => None,
    }
}

pub(super) fn wrong_tensor(name: &str, tensor: &Tensor, expected: &str) -> ImportError {
    let found = format!("{} {:?}", tensor.dtype.name(), tensor.shape);
    ImportError::Tensor { tensor: name.to_owned(), found, expected: expected.to_owned() }
}
