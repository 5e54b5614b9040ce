//! JSON in and out: what requests bring, and `tojson` as `transformers` gives it to templates, which
//! is Python's `json.dumps`.

use std::cell::Cell;
use std::fmt;
use std::rc::Rc;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::evaluate::Given;
use super::meter::{Meter, Writer};
use super::render::Renderer;
use super::value::Value;
use super::{Failure, operate, write};
use crate::text::guard::STAND_INS;

/// A JSON value whose objects keep their order: templates show it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Json>),
    Dict(Vec<(String, Json)>),
}

/// Values of one JSON text: thousands of tools have fewer, and each takes 32 bytes.
const MAX_JSON_VALUES: usize = 65_536;

impl Json {
    /// Parses JSON; its depth is bounded by the parser, its values by [`MAX_JSON_VALUES`].
    ///
    /// # Errors
    ///
    /// What the parser says.
    pub(crate) fn parse(text: &str) -> serde_json::Result<Self> {
        let values = Cell::new(MAX_JSON_VALUES);
        let mut deserializer = serde_json::Deserializer::from_str(text);
        let json = JsonSeed(&values).deserialize(&mut deserializer)?;
        deserializer.end()?;
        if let Some(number) = changed_number(text) {
            let why = if number == "-0" { "it has a sign" } else { "it has over 64 bits" };
            let message = format!("the integer {number} is not supported, {why}");
            return Err(serde::de::Error::custom(message));
        }
        Ok(json)
    }
}

/// The beginning of an integer that the parser would take for a float, which templates write
/// otherwise than Python writes the integer: one beyond 64 bits, and `-0`.
fn changed_number(text: &str) -> Option<String> {
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c == '"' || c == '-' || c.is_ascii_digit()) {
        rest = &rest[at..];
        if let Some(mut inside) = rest.strip_prefix('"') {
            while let Some(at) = inside.find(['"', '\\']) {
                let escapes = inside.as_bytes()[at] == b'\\';
                inside = &inside[at + 1..];
                if !escapes {
                    break;
                }
                let mut letters = inside.chars();
                letters.next();
                inside = letters.as_str();
            }
            rest = inside;
            continue;
        }
        let part = |c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.' | 'e' | 'E');
        let (number, after) = rest.split_at(rest.find(|c| !part(c)).unwrap_or(rest.len()));
        let fits = number.parse::<u64>().is_ok() || number.parse::<i64>().is_ok();
        if number == "-0" || !(fits || number.contains(['.', 'e', 'E'])) {
            return Some(number.chars().take(24).collect());
        }
        rest = after;
    }
    None
}

/// How many values may come.
#[derive(Clone, Copy)]
struct JsonSeed<'a>(&'a Cell<usize>);

impl<'de> DeserializeSeed<'de> for JsonSeed<'_> {
    type Value = Json;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Json, D::Error> {
        let Some(left) = self.0.get().checked_sub(1) else {
            let message = format!("more than {MAX_JSON_VALUES} values");
            return Err(serde::de::Error::custom(message));
        };
        self.0.set(left);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for JsonSeed<'_> {
    type Value = Json;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Int(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Int(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
        Ok(Json::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Json, E> {
        Ok(Json::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Json, E> {
        Ok(Json::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Json, A::Error> {
        // What a list says of its length is not believed: it grows as items come.
        let mut out = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            out.push(item);
        }
        Ok(Json::List(out))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Json, A::Error> {
        let mut out = Vec::new();
        while let Some(key) = entries.next_key()? {
            out.push((key, entries.next_value_seed(self)?));
        }
        Ok(Json::Dict(out))
    }
}

/// The value that JSON stands for; its parser has bounded its depth.
pub(super) fn read(meter: &Rc<Meter>, json: &Json) -> Result<Value, Failure> {
    meter.spend(1)?;
    Ok(match json {
        Json::Null => Value::None,
        Json::Bool(value) => Value::Bool(*value),
        Json::Int(value) => Value::int(*value),
        Json::Float(value) => Value::Float(*value),
        Json::Text(text) => {
            meter.scan(text.len())?;
            Value::text(meter, text.as_str())?
        }
        Json::List(items) => {
            let items = items.iter().map(|item| read(meter, item)).collect::<Result<_, _>>()?;
            Value::list(meter, items)?
        }
        Json::Dict(entries) => {
            let mut values = Vec::with_capacity(entries.len());
            for (key, value) in entries {
                values.push((Value::text(meter, key.as_str())?, read(meter, value)?));
            }
            Value::dict(meter, values)?
        }
    })
}

/// How `json.dumps` was asked to write.
struct Style {
    /// What stands for one level at the start of a line; `None`: all on one line.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

/// `value | tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn to_json(
    renderer: &mut Renderer<'_>,
    value: &Value,
    given: Given,
) -> Result<Value, Failure> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ensure_ascii, indent, separators, sort_keys] = given.bind("tojson", names)?;
    let meter = Rc::clone(&renderer.meter);
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Text(text)) => {
            super::digits::bounded(&text.text.len().to_string())?;
            Some(text.text.clone())
        }
        Some(value) => {
            let spaces = value.as_int().ok_or_else(|| Failure::new("indent must be a number"))?;
            let spaces = super::digits::bounded(&spaces.max(0).to_string())?;
            Some(" ".repeat(spaces))
        }
    };
    let (item_separator, key_separator) = match separators {
        None | Some(Value::None) => (if indent.is_some() { "," } else { ", " }.into(), ": ".into()),
        Some(pair) => {
            let pair = operate::items(&meter, &pair)?;
            match pair.items.as_slice() {
                [Value::Text(item), Value::Text(key)] => (item.text.clone(), key.text.clone()),
                _ => return Err(Failure::new("separators must be two texts")),
            }
        }
    };
    let style = Style {
        indent,
        item_separator,
        key_separator,
        ensure_ascii: is_true(ensure_ascii),
        sort_keys: is_true(sort_keys),
    };
    let mut out = Writer::new(&meter);
    dump(&mut out, &style, value, 0)?;
    renderer.text(out.finish())
}

fn new_line(out: &mut Writer, style: &Style, depth: usize) -> Result<(), Failure> {
    let Some(indent) = &style.indent else { return Ok(()) };
    out.push('\n')?;
    out.repeat(indent, depth)
}

/// Writes a value; its height is bounded, so this recursion is.
fn dump(out: &mut Writer, style: &Style, value: &Value, depth: usize) -> Result<(), Failure> {
    out.meter().spend(1)?;
    match value {
        Value::None => out.push_str("null"),
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Int(_) => write::repr(out, value),
        Value::Float(value) => out.push_str(&float(*value)),
        Value::Text(text) => quoted(out, style, &text.text),
        Value::List(items) | Value::Tuple(items) => {
            out.push('[')?;
            for (index, item) in items.iter().enumerate() {
                out.push_str(if index > 0 { &style.item_separator } else { "" })?;
                new_line(out, style, depth + 1)?;
                dump(out, style, item, depth + 1)?;
            }
            if !items.is_empty() {
                new_line(out, style, depth)?;
            }
            out.push(']')
        }
        Value::Dict(dict) => {
            let mut entries: Vec<&(Value, Value)> = dict.entries.iter().collect();
            if style.sort_keys {
                let meter = Rc::clone(out.meter());
                super::filters::sort_by(&meter, &mut entries, |entry| &entry.0)?;
            }
            out.push('{')?;
            for (index, (key, value)) in entries.iter().enumerate() {
                out.push_str(if index > 0 { &style.item_separator } else { "" })?;
                new_line(out, style, depth + 1)?;
                match key {
                    Value::Text(text) => quoted(out, style, &text.text)?,
                    Value::None => out.push_str("\"null\"")?,
                    Value::Bool(value) => {
                        out.push_str(if *value { "\"true\"" } else { "\"false\"" })?
                    }
                    Value::Int(_) | Value::Float(_) => {
                        out.push('"')?;
                        dump(out, style, key, depth)?;
                        out.push('"')?;
                    }
                    _ => return Err(Failure::new("keys must be str, int, float, bool or None")),
                }
                out.push_str(&style.key_separator)?;
                dump(out, style, value, depth + 1)?;
            }
            if !entries.is_empty() {
                new_line(out, style, depth)?;
            }
            out.push('}')
        }
        _ => {
            let kind = value.type_name();
            Err(Failure::new(format!("Object of type {kind} is not JSON serializable")))
        }
    }
}

fn float(value: f64) -> String {
    if value.is_nan() {
        "NaN".into()
    } else if value.is_infinite() {
        if value > 0.0 { "Infinity" } else { "-Infinity" }.into()
    } else {
        write::float(value)
    }
}

fn quoted(out: &mut Writer, style: &Style, text: &str) -> Result<(), Failure> {
    out.push('"')?;
    let mut plain_from = 0;
    for (at, character) in text.char_indices() {
        let code = u32::from(character);
        let escaped = match character {
            '"' => "\\\"".to_owned(),
            '\\' => "\\\\".to_owned(),
            '\n' => "\\n".to_owned(),
            '\r' => "\\r".to_owned(),
            '\t' => "\\t".to_owned(),
            '\x0c' => "\\f".to_owned(),
            '\x08' => "\\b".to_owned(),
            '\0'..='\x1f' => format!("\\u{code:04x}"),
            // A stand-in for a letter of a special token becomes that letter again later.
            _ if style.ensure_ascii && !character.is_ascii() && !STAND_INS.contains(&code) => {
                let mut units = [0; 2];
                character
                    .encode_utf16(&mut units)
                    .iter()
                    .map(|unit| format!("\\u{unit:04x}"))
                    .collect()
            }
            _ => continue,
        };
        out.push_str(&text[plain_from..at])?;
        out.push_str(&escaped)?;
        plain_from = at + character.len_utf8();
    }
    out.push_str(&text[plain_from..])?;
    out.push('"')
}
