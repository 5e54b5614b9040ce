//! Writes small Hugging Face directories: copies of fixtures, or made tensor by tensor.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use model::safetensors::Table;
use serde_json::{Value, json};

/// A tensor: its type, shape and bytes.
#[derive(Clone, Debug)]
pub(crate) struct NewTensor {
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

/// How floats are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "each test file uses some")]
pub(crate) enum FloatType {
    F32,
    F16,
    Bf16,
}

impl FloatType {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
        }
    }

    /// The bytes of `value`, which the type must hold exactly.
    fn encode(self, value: f32) -> Vec<u8> {
        let (bytes, back) = match self {
            Self::F32 => (value.to_le_bytes().to_vec(), value),
            Self::F16 => {
                let half = half::f16::from_f32(value);
                (half.to_le_bytes().to_vec(), half.to_f32())
            }
            Self::Bf16 => {
                let half = half::bf16::from_f32(value);
                (half.to_le_bytes().to_vec(), half.to_f32())
            }
        };
        assert_eq!(back, value, "a test's value must not be rounded");
        bytes
    }
}

/// A directory to be written.
#[derive(Clone, Debug)]
pub(crate) struct Directory {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, NewTensor>,
}

#[allow(dead_code, reason = "each test file uses some")]
impl Directory {
    pub(crate) fn new(config: Value) -> Self {
        Self { config, tensors: BTreeMap::new() }
    }

    /// A copy of a directory with one file of tensors.
    pub(crate) fn of(path: &Path) -> Self {
        let config = serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap();
        let file = fs::read(path.join("model.safetensors")).unwrap();
        let tensors = Table::parse(&file).unwrap().tensors.into_iter().map(|(name, tensor)| {
            let (dtype, data) = (tensor.dtype.name(), file[tensor.range].to_vec());
            (name, NewTensor { dtype, shape: tensor.shape, data })
        });
        Self { config, tensors: tensors.collect() }
    }

    /// Adds or replaces a tensor of floats.
    pub(crate) fn floats(&mut self, name: &str, kind: FloatType, shape: &[usize], values: &[f32]) {
        assert_eq!(values.len(), shape.iter().product::<usize>(), "{name}");
        let data = values.iter().flat_map(|value| kind.encode(*value)).collect();
        let tensor = NewTensor { dtype: kind.name(), shape: shape.to_vec(), data };
        self.tensors.insert(name.to_owned(), tensor);
    }

    /// Adds or replaces a matrix packed as transformers does: byte `[r, j]` holds rows `r`,
    /// `r + rows/4`, `r + 2 rows/4`, `r + 3 rows/4` of column `j`, lowest bits first.
    pub(crate) fn packed(&mut self, name: &str, shape: [usize; 2], trits: &[i8]) {
        let [rows, cols] = shape;
        let code = |row: usize, col: usize| (trits[row * cols + col] + 1) as u8;
        let quarter = rows / 4;
        let byte = |at: usize| {
            let (row, col) = (at / cols, at % cols);
            (0..4).fold(0, |byte, part| byte | code(part * quarter + row, col) << (2 * part))
        };
        let data = (0..quarter * cols).map(byte).collect();
        let tensor = NewTensor { dtype: "U8", shape: vec![quarter, cols], data };
        self.tensors.insert(name.to_owned(), tensor);
    }

    /// Gives a tensor another name.
    pub(crate) fn rename(&mut self, from: &str, to: &str) {
        let tensor = self.tensors.remove(from).unwrap();
        self.tensors.insert(to.to_owned(), tensor);
    }

    /// Writes `config.json` and one `model.safetensors`.
    pub(crate) fn write(&self, dir: &Path) {
        fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        fs::write(dir.join("model.safetensors"), file(self.tensors.iter())).unwrap();
    }

    /// Writes `config.json`, `files` files that share the tensors, and their index.
    pub(crate) fn write_sharded(&self, dir: &Path, files: usize) {
        fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        let mut map = serde_json::Map::new();
        for number in 0..files {
            let name = format!("model-{:05}-of-{files:05}.safetensors", number + 1);
            // Every file gets tensors of every layer.
            let tensors = || self.tensors.iter().skip(number).step_by(files);
            map.extend(tensors().map(|(tensor, _)| (tensor.clone(), json!(name))));
            fs::write(dir.join(name), file(tensors())).unwrap();
        }
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
        fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

fn file<'a>(tensors: impl Iterator<Item = (&'a String, &'a NewTensor)>) -> Vec<u8> {
    let mut table = serde_json::Map::new();
    table.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut data = Vec::new();
    for (name, NewTensor { dtype, shape, data: bytes }) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        table
            .insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        data.extend_from_slice(bytes);
    }
    let header = Value::Object(table).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}
