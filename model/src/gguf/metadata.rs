//! Metadata of a GGUF file: typed values that stay in the file.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::{GgufError, KEY_BYTES_MAX, Reader, STRING_BYTES_MAX};

/// Types of metadata values, numbered as in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is what its name says")]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// Name for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::String => "string",
            Self::Array => "array",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        }
    }

    /// Bytes of a value of fixed size; of a string, those of its length.
    fn least_bytes(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::String => 8,
            // Type and count.
            Self::Array => 12,
        }
    }

    fn read(reader: &mut Reader<'_>, key: &str) -> Result<Self, GgufError> {
        let id = reader.u32(key)?;
        Self::ALL.get(id as usize).copied().ok_or_else(|| GgufError::ValueType {
            key: key.into(),
            found: id.to_string(),
            expected: "a type from 0 to 12",
        })
    }
}

/// One metadata value. Integers are widened and keep their type beside them.
#[derive(Clone, Debug)]
pub enum Value<'a> {
    /// u8, u16, u32, u64.
    Unsigned(u64, ValueType),
    /// i8, i16, i32, i64.
    Signed(i64, ValueType),
    /// f32, f64.
    Float(f64, ValueType),
    /// A boolean.
    Bool(bool),
    /// A string.
    String(&'a str),
    /// A string that is no UTF-8: of no use, and of no harm under a key that nobody needs.
    NotUtf8(&'a [u8]),
    /// An array.
    Array(Array<'a>),
}

impl<'a> Value<'a> {
    /// Its type in the file.
    pub fn value_type(&self) -> ValueType {
        match self {
            Self::Unsigned(_, value_type)
            | Self::Signed(_, value_type)
            | Self::Float(_, value_type) => *value_type,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) | Self::NotUtf8(_) => ValueType::String,
            Self::Array(_) => ValueType::Array,
        }
    }

    /// An integer of any type that is not negative.
    pub fn unsigned(&self) -> Option<u64> {
        match self {
            Self::Unsigned(value, _) => Some(*value),
            Self::Signed(value, _) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    fn read(reader: &mut Reader<'a>, key: &str, value_type: ValueType) -> Result<Self, GgufError> {
        let unsigned = |value| Ok(Self::Unsigned(value, value_type));
        let signed = |value| Ok(Self::Signed(value, value_type));
        match value_type {
            ValueType::U8 => unsigned(u64::from(u8::from_le_bytes(*reader.array(key)?))),
            ValueType::U16 => unsigned(u64::from(u16::from_le_bytes(*reader.array(key)?))),
            ValueType::U32 => unsigned(u64::from(reader.u32(key)?)),
            ValueType::U64 => unsigned(reader.u64(key)?),
            ValueType::I8 => signed(i64::from(i8::from_le_bytes(*reader.array(key)?))),
            ValueType::I16 => signed(i64::from(i16::from_le_bytes(*reader.array(key)?))),
            ValueType::I32 => signed(i64::from(i32::from_le_bytes(*reader.array(key)?))),
            ValueType::I64 => signed(i64::from_le_bytes(*reader.array(key)?)),
            ValueType::F32 => {
                let value = f32::from_le_bytes(*reader.array(key)?);
                Ok(Self::Float(f64::from(value), value_type))
            }
            ValueType::F64 => Ok(Self::Float(f64::from_le_bytes(*reader.array(key)?), value_type)),
            // As in C: whatever is not zero is true.
            ValueType::Bool => Ok(Self::Bool(*reader.array::<1>(key)? != [0])),
            ValueType::String => {
                let bytes = reader.text(key, STRING_BYTES_MAX)?;
                Ok(std::str::from_utf8(bytes).map_or(Self::NotUtf8(bytes), Self::String))
            }
            ValueType::Array => Ok(Self::Array(Array::read(reader, key)?)),
        }
    }
}

/// An array of metadata values of one type, which is not an array: walked once, kept as bytes.
#[derive(Clone, Debug)]
pub struct Array<'a> {
    element_type: ValueType,
    len: usize,
    /// No element is a string that is no UTF-8.
    is_utf8: bool,
    /// At the first element; every element was read once without an error.
    elements: Reader<'a>,
}

impl<'a> Array<'a> {
    fn read(reader: &mut Reader<'a>, key: &str) -> Result<Self, GgufError> {
        let element_type = ValueType::read(reader, key)?;
        if element_type == ValueType::Array {
            return Err(GgufError::ValueType {
                key: key.into(),
                found: "array of arrays".into(),
                expected: "an array of numbers or strings",
            });
        }
        let len = reader.u64(key)?;
        // Each element takes at least this much: a lie about the count ends here.
        let needed_bytes = len.saturating_mul(element_type.least_bytes());
        let left_bytes = reader.left_bytes();
        if needed_bytes > left_bytes {
            let (what, at) = (format!("array {key}"), reader.at as u64);
            return Err(GgufError::Truncated { what, at, needed_bytes, left_bytes });
        }
        let elements = reader.clone();
        let mut is_utf8 = true;
        if element_type == ValueType::String {
            for _ in 0..len {
                let element = Value::read(reader, key, element_type)?;
                is_utf8 &= !matches!(element, Value::NotUtf8(_));
            }
        } else {
            reader.bytes(key, needed_bytes)?;
        }
        Ok(Self { element_type, len: len as usize, is_utf8, elements })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Type of the elements.
    pub fn element_type(&self) -> ValueType {
        self.element_type
    }

    /// The elements, in order.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (mut reader, element_type) = (self.elements.clone(), self.element_type);
        // All were read once when the file was parsed, so no read fails.
        (0..self.len).map_while(move |_| Value::read(&mut reader, "", element_type).ok())
    }

    /// The elements, if they are strings and all of them UTF-8.
    pub fn strings(&self) -> Option<impl Iterator<Item = &'a str> + use<'a>> {
        (self.element_type == ValueType::String && self.is_utf8).then(|| {
            self.iter().filter_map(|value| match value {
                Value::String(text) => Some(text),
                _ => None,
            })
        })
    }
}

/// All metadata of a file, by key.
#[derive(Clone, Debug, Default)]
pub struct Metadata<'a>(BTreeMap<&'a str, Value<'a>>);

impl<'a> Metadata<'a> {
    pub(super) fn read(reader: &mut Reader<'a>, entries: u64) -> Result<Self, GgufError> {
        let mut values = BTreeMap::new();
        for _ in 0..entries {
            let key = reader.text("a metadata key", KEY_BYTES_MAX)?;
            if key.is_empty() {
                return Err(GgufError::Empty { what: "a metadata key" });
            }
            let Ok(key) = std::str::from_utf8(key) else {
                // Nobody needs such a key: its value is passed over.
                let value_type = ValueType::read(reader, "that is not UTF-8")?;
                Value::read(reader, "that is not UTF-8", value_type)?;
                continue;
            };
            let value_type = ValueType::read(reader, key)?;
            let value = Value::read(reader, key, value_type)?;
            if values.insert(key, value).is_some() {
                return Err(GgufError::Duplicate { what: "metadata key", name: key.into() });
            }
        }
        Ok(Self(values))
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value<'a>> {
        self.0.get(key)
    }

    /// All keys, ascending.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.0.keys().copied()
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        if matches!(value, Value::NotUtf8(_)) {
            return Err(GgufError::NotUtf8 { what: key.into() });
        }
        convert(value).map(Some).ok_or_else(|| GgufError::ValueType {
            key: key.into(),
            found: value.value_type().name().into(),
            expected,
        })
    }

    /// An integer of any type, not negative.
    ///
    /// # Errors
    ///
    /// [`GgufError::ValueType`] if the key holds something else.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "an integer that is not negative", Value::unsigned)
    }

    /// A float, or an integer.
    ///
    /// # Errors
    ///
    /// [`GgufError::ValueType`] if the key holds something else.
    pub fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.typed(key, "a number", |value| match value {
            Value::Float(value, _) => Some(*value),
            Value::Unsigned(value, _) => Some(*value as f64),
            Value::Signed(value, _) => Some(*value as f64),
            _ => None,
        })
    }

    /// A boolean.
    ///
    /// # Errors
    ///
    /// [`GgufError::ValueType`] if the key holds something else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a boolean", |value| match value {
            Value::Bool(value) => Some(*value),
            _ => None,
        })
    }

    /// A string.
    ///
    /// # Errors
    ///
    /// [`GgufError::ValueType`] if the key holds something else.
    pub fn string(&self, key: &str) -> Result<Option<&'a str>, GgufError> {
        self.typed(key, "a string", |value| match value {
            Value::String(text) => Some(*text),
            _ => None,
        })
    }

    /// A string for people, whatever its encoding: what is not UTF-8 is shown as U+FFFD.
    pub fn label(&self, key: &str) -> Option<Cow<'a, str>> {
        match self.get(key)? {
            Value::String(text) => Some(Cow::Borrowed(*text)),
            Value::NotUtf8(bytes) => Some(String::from_utf8_lossy(bytes)),
            _ => None,
        }
    }

    /// An array.
    ///
    /// # Errors
    ///
    /// [`GgufError::ValueType`] if the key holds something else, [`GgufError::NotUtf8`] if it holds
    /// strings that are not UTF-8.
    pub fn array(&self, key: &str) -> Result<Option<&Array<'a>>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) if !array.is_utf8 => {
                Err(GgufError::NotUtf8 { what: format!("a string in {key}") })
            }
            Some(Value::Array(array)) => Ok(Some(array)),
            Some(other) => Err(GgufError::ValueType {
                key: key.into(),
                found: other.value_type().name().into(),
                expected: "an array",
            }),
        }
    }
}
