//! Writes small GGUF files: copies of fixtures to be spoilt or extended.

use model::gguf::{Gguf, GgufType, Value};

/// A metadata value.
#[derive(Clone, Debug)]
#[allow(dead_code, reason = "each test file uses some")]
pub(crate) enum Meta {
    U16(u16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// A string of any bytes.
    Bytes(Vec<u8>),
}

/// A tensor: its name, dimensions (fastest first), type number and bytes.
#[derive(Clone, Debug)]
pub(crate) struct NewTensor {
    pub(crate) name: String,
    pub(crate) dims: Vec<u64>,
    pub(crate) tensor_type: u32,
    pub(crate) data: Vec<u8>,
}

/// A file to be written.
#[derive(Clone, Debug, Default)]
pub(crate) struct GgufWriter {
    pub(crate) metadata: Vec<(String, Meta)>,
    pub(crate) tensors: Vec<NewTensor>,
}

/// A string as the file holds it.
pub(crate) fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn type_id(tensor_type: GgufType) -> u32 {
    match tensor_type {
        GgufType::F32 => 0,
        GgufType::F16 => 1,
        GgufType::Q8_0 => 8,
        GgufType::Q6K => 14,
        GgufType::Bf16 => 30,
        GgufType::Tq1_0 => 34,
        GgufType::Tq2_0 => 35,
        GgufType::I2S => 36,
    }
}

#[allow(dead_code, reason = "each test file uses some")]
impl GgufWriter {
    /// A copy of a file whose metadata are numbers and strings.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let gguf = Gguf::parse(bytes).unwrap();
        let metadata = gguf.metadata.keys().map(|key| {
            let value = match gguf.metadata.get(key).unwrap() {
                Value::Unsigned(value, _) => Meta::U32(*value as u32),
                Value::Signed(value, _) => Meta::I32(*value as i32),
                Value::Float(value, _) => Meta::F32(*value as f32),
                Value::Bool(value) => Meta::Bool(*value),
                Value::String(text) => Meta::String((*text).to_owned()),
                Value::NotUtf8(bytes) => Meta::Bytes(bytes.to_vec()),
                Value::Array(_) => panic!("the fixtures have no arrays"),
            };
            (key.to_owned(), value)
        });
        let tensors = gguf.tensors.iter().map(|(name, tensor)| NewTensor {
            name: (*name).to_owned(),
            dims: tensor.dims.clone(),
            tensor_type: type_id(tensor.tensor_type),
            data: tensor.bytes.to_vec(),
        });
        Self { metadata: metadata.collect(), tensors: tensors.collect() }
    }

    /// The tensor of this name.
    pub(crate) fn tensor(&mut self, name: &str) -> &mut NewTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    /// One more tensor.
    pub(crate) fn add(&mut self, name: &str, dims: &[u64], tensor_type: u32, data: Vec<u8>) {
        let (name, dims) = (name.to_owned(), dims.to_vec());
        self.tensors.push(NewTensor { name, dims, tensor_type, data });
    }

    /// Sets a metadata value.
    pub(crate) fn set(&mut self, key: &str, value: Meta) {
        self.metadata.retain(|(other, _)| other != key);
        self.metadata.push((key.to_owned(), value));
    }

    /// The file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            file.extend(string(key));
            file.extend(encode(value));
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            file.extend(string(&tensor.name));
            file.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| file.extend(dim.to_le_bytes()));
            file.extend(tensor.tensor_type.to_le_bytes());
            file.extend(offset.to_le_bytes());
            offset += (tensor.data.len() as u64).next_multiple_of(32);
        }
        for tensor in &self.tensors {
            file.resize(file.len().next_multiple_of(32), 0);
            file.extend(&tensor.data);
        }
        file.resize(file.len().next_multiple_of(32), 0);
        file
    }
}

fn encode(value: &Meta) -> Vec<u8> {
    let typed = |id: u32, bytes: &[u8]| [&id.to_le_bytes()[..], bytes].concat();
    let array = |id: u32, len: usize, elements: Vec<u8>| {
        let head = [&id.to_le_bytes()[..], &(len as u64).to_le_bytes()].concat();
        typed(9, &[head, elements].concat())
    };
    match value {
        Meta::U16(value) => typed(2, &value.to_le_bytes()),
        Meta::U32(value) => typed(4, &value.to_le_bytes()),
        Meta::I32(value) => typed(5, &value.to_le_bytes()),
        Meta::F32(value) => typed(6, &value.to_le_bytes()),
        Meta::Bool(value) => typed(7, &[u8::from(*value)]),
        Meta::String(text) => typed(8, &string(text)),
        Meta::Bytes(bytes) => typed(8, &[&(bytes.len() as u64).to_le_bytes()[..], bytes].concat()),
        Meta::Strings(texts) => {
            array(8, texts.len(), texts.iter().flat_map(|text| string(text)).collect())
        }
        Meta::I32s(values) => {
            array(5, values.len(), values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        Meta::F32s(values) => {
            array(6, values.len(), values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
    }
}
