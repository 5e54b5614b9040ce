//! Values as Python's `str` and `repr` write them.

use std::rc::Rc;

use unicode_properties::{GeneralCategoryGroup, UnicodeGeneralCategory};

use super::Failure;
use super::meter::{Meter, Writer};
use super::value::{Object, Range, Value, View};
use crate::text::guard::STAND_INS;

/// Writes `str(value)`.
pub(super) fn str(out: &mut Writer, value: &Value) -> Result<(), Failure> {
    match value {
        Value::Undefined(_) => Ok(()),
        Value::Text(text) => out.push_str(&text.text),
        _ => repr(out, value),
    }
}

/// Writes `repr(value)`. A value's height is bounded, so this recursion is.
pub(super) fn repr(out: &mut Writer, value: &Value) -> Result<(), Failure> {
    match value {
        Value::Undefined(_) => out.push_str("Undefined"),
        Value::None => out.push_str("None"),
        Value::Bool(true) => out.push_str("True"),
        Value::Bool(false) => out.push_str("False"),
        Value::Int(_) => out.push_str(&value.as_int().unwrap_or_default().to_string()),
        Value::Float(value) => out.push_str(&float(*value)),
        Value::Text(text) if text.safe => {
            out.push_str("Markup(")?;
            quoted(out, &text.text)?;
            out.push(')')
        }
        Value::Text(text) => quoted(out, &text.text),
        Value::List(items) => {
            out.push('[')?;
            list(out, items)?;
            out.push(']')
        }
        Value::Tuple(items) => {
            out.push('(')?;
            list(out, items)?;
            out.push_str(if items.len() == 1 { ",)" } else { ")" })
        }
        Value::Dict(dict) => {
            out.push('{')?;
            for (index, (key, value)) in dict.entries.iter().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" })?;
                repr(out, key)?;
                out.push_str(": ")?;
                repr(out, value)?;
            }
            out.push('}')
        }
        Value::Object(object) => object_repr(out, value, object),
    }
}

fn list(out: &mut Writer, items: &[Value]) -> Result<(), Failure> {
    for (index, item) in items.iter().enumerate() {
        out.push_str(if index > 0 { ", " } else { "" })?;
        repr(out, item)?;
    }
    Ok(())
}

fn object_repr(out: &mut Writer, value: &Value, object: &Object) -> Result<(), Failure> {
    match object {
        Object::Range(Range { start, stop, step, .. }) => {
            let step = if *step == 1 { String::new() } else { format!(", {step}") };
            out.push_str(&format!("range({start}, {stop}{step})"))
        }
        Object::Loop(state) => {
            let (index, length) = (state.index0.get() + 1, state.items.len());
            out.push_str(&format!("<LoopContext {index}/{length}>"))
        }
        Object::View { kind, dict } => {
            out.push_str(value.type_name())?;
            out.push_str("([")?;
            for (index, (key, value)) in dict.entries.iter().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" })?;
                match kind {
                    View::Keys => repr(out, key)?,
                    View::Values => repr(out, value)?,
                    View::Items => {
                        out.push('(')?;
                        repr(out, key)?;
                        out.push_str(", ")?;
                        repr(out, value)?;
                        out.push(')')?;
                    }
                }
            }
            out.push_str("])")
        }
        // Python writes addresses of memory here.
        _ => Err(Failure::new(format!("a {} has no text", value.type_name()))),
    }
}

/// A text in quotes with Python's escapes.
fn quoted(out: &mut Writer, text: &str) -> Result<(), Failure> {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote)?;
    let mut plain_from = 0;
    for (at, character) in text.char_indices() {
        let escaped = match character {
            '\\' => "\\\\".to_owned(),
            '\n' => "\\n".to_owned(),
            '\r' => "\\r".to_owned(),
            '\t' => "\\t".to_owned(),
            _ if character == quote => format!("\\{quote}"),
            _ if is_printable(character) => continue,
            _ => match u32::from(character) {
                code @ 0..=0xff => format!("\\x{code:02x}"),
                code @ 0x100..=0xffff => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            },
        };
        out.push_str(&text[plain_from..at])?;
        out.push_str(&escaped)?;
        plain_from = at + character.len_utf8();
    }
    out.push_str(&text[plain_from..])?;
    out.push(quote)
}

/// Whether `repr` writes a character as it is, and `str.isprintable`. The stand-ins for the first
/// letters of special tokens count as printable: escaped, they would not be found again.
pub(super) fn is_printable(character: char) -> bool {
    let printable = !matches!(
        character.general_category_group(),
        GeneralCategoryGroup::Other | GeneralCategoryGroup::Separator
    );
    printable || character == ' ' || STAND_INS.contains(&u32::from(character))
}

/// A text's characters outside ASCII as Python's escapes.
pub(super) fn ascii(meter: &Rc<Meter>, text: &str) -> Result<String, Failure> {
    let mut out = Writer::new(meter);
    for character in text.chars() {
        match u32::from(character) {
            // A stand-in for a letter of a special token becomes that letter again later.
            code if character.is_ascii() || STAND_INS.contains(&code) => out.push(character)?,
            code @ ..=0xff => out.push_str(&format!("\\x{code:02x}"))?,
            code @ ..=0xffff => out.push_str(&format!("\\u{code:04x}"))?,
            code => out.push_str(&format!("\\U{code:08x}"))?,
        }
    }
    Ok(out.finish())
}

/// `repr` of a float: the shortest digits that read back the same.
pub(super) fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.into();
    }
    let mut shortest = format!("{value:e}");
    // Of two texts as short and as near as each other Python takes the one with an even last
    // digit, as writing so many digits of the exact value does.
    let digits = shortest.bytes().take_while(|byte| *byte != b'e').filter(u8::is_ascii_digit);
    let exact = format!("{value:.0$e}", digits.count().saturating_sub(1));
    if exact.parse() == Ok(value) {
        shortest = exact;
    }
    let (digits, exponent) = shortest.split_once('e').unwrap_or((&shortest, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let after = digits.split_once('.').map_or(0, |(_, after)| after.len() as i32);
        format!("{value:.0$}", (after - exponent).max(1) as usize)
    } else {
        format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
    }
}
