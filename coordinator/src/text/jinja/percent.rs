//! `'…' % values`.

use std::rc::Rc;

use super::digits::{self, Align, Style};
use super::meter::{Held, Meter, Writer};
use super::value::{Text, Value};
use super::{Failure, operate, write};

/// A conversion between its `%` and its letter.
#[derive(Default)]
struct Field {
    left: bool,
    plus: bool,
    space: bool,
    alternate: bool,
    zero: bool,
    width: usize,
    precision: Option<usize>,
}

struct Source<'a> {
    values: &'a Value,
    /// Of a tuple, the next item; of anything else, whether it was used.
    next: usize,
}

impl Source<'_> {
    fn next(&mut self) -> Result<Value, Failure> {
        let found = match self.values {
            Value::Tuple(items) => items.get(self.next).cloned(),
            other if self.next == 0 => Some(other.clone()),
            _ => None,
        };
        self.next += 1;
        found.ok_or_else(|| Failure::new("not enough arguments for format string"))
    }

    fn is_used_up(&self) -> bool {
        match self.values {
            Value::Tuple(items) => self.next >= items.len(),
            // A mapping, and what could be one, may be left over.
            Value::Dict(_) | Value::List(_) => true,
            Value::Object(_) => true,
            _ => self.next > 0,
        }
    }
}

/// `text % values`.
pub(super) fn format(
    meter: &Rc<Meter>,
    text: &Held<Text>,
    values: &Value,
) -> Result<Value, Failure> {
    let mut out = Writer::new(meter);
    let mut source = Source { values, next: 0 };
    let mut named = false;
    let mut rest = &*text.text;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at])?;
        rest = &rest[at + 1..];
        let mut key = None;
        if rest.starts_with('(') {
            let end = key_end(rest).ok_or_else(|| Failure::new("incomplete format key"))?;
            let name = Value::text(meter, &rest[1..end])?;
            let Value::Dict(dict) = values else {
                return Err(Failure::new("format requires a mapping"));
            };
            let found = dict.get(meter, &name)?.cloned();
            key = Some(found.ok_or_else(|| Failure::new("a format key is missing"))?);
            named = true;
            rest = &rest[end + 1..];
        }
        let (field, after) = field(rest, &mut source)?;
        let mut letters = after.chars();
        let kind = letters.next().ok_or_else(|| Failure::new("incomplete format"))?;
        rest = letters.as_str();
        if kind == '%' {
            out.push('%')?;
            continue;
        }
        let value = match key {
            Some(value) => value,
            None => source.next()?,
        };
        conversion(&mut out, &field, kind, &value, text.safe)?;
    }
    out.push_str(rest)?;
    if !named && !source.is_used_up() {
        return Err(Failure::new("not all arguments converted during string formatting"));
    }
    Value::marked(meter, out.finish(), text.safe)
}

fn key_end(text: &str) -> Option<usize> {
    let mut depth = 0_usize;
    text.bytes().position(|byte| {
        match byte {
            b'(' => depth += 1,
            b')' => depth -= 1,
            _ => {}
        }
        depth == 0
    })
}

fn field<'t>(text: &'t str, source: &mut Source<'_>) -> Result<(Field, &'t str), Failure> {
    let mut field = Field::default();
    let mut rest = text;
    loop {
        match rest.bytes().next() {
            Some(b'-') => field.left = true,
            Some(b'+') => field.plus = true,
            Some(b' ') => field.space = true,
            Some(b'#') => field.alternate = true,
            Some(b'0') => field.zero = true,
            _ => break,
        }
        rest = &rest[1..];
    }
    let mut number = |rest: &mut &'t str| {
        if let Some(after) = rest.strip_prefix('*') {
            *rest = after;
            let value = source.next()?;
            let value = match value {
                Value::Int(_) | Value::Bool(_) => value.as_int(),
                _ => None,
            };
            return value.map(Some).ok_or_else(|| Failure::new("* wants int"));
        }
        let len = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (digits, after) = rest.split_at(len);
        *rest = after;
        if len == 0 { Ok(None) } else { digits::bounded(digits).map(|value| Some(value as i128)) }
    };
    if let Some(width) = number(&mut rest)? {
        field.left |= width < 0;
        field.width = usize::try_from(width.unsigned_abs()).unwrap_or(usize::MAX);
    }
    if let Some(after) = rest.strip_prefix('.') {
        rest = after;
        let precision = number(&mut rest)?.unwrap_or(0).max(0);
        field.precision = Some(usize::try_from(precision).unwrap_or(usize::MAX));
    }
    if field.width.max(field.precision.unwrap_or(0)) > digits::MAX_DIGITS {
        return Err(digits::too_wide());
    }
    // Lengths of C's integers mean nothing.
    rest = rest.strip_prefix(['h', 'l', 'L']).unwrap_or(rest);
    Ok((field, rest))
}

/// Writes one value; into a text that is `safe` as HTML, where only numbers stay as they are.
fn conversion(
    out: &mut Writer,
    field: &Field,
    kind: char,
    value: &Value,
    safe: bool,
) -> Result<(), Failure> {
    // markupsafe hides the value behind something that has a text and a number, nothing else.
    if safe && matches!(kind, 'c' | 'o' | 'x' | 'X') {
        return Err(Failure::new(format!("%{kind} in a text marked as safe")));
    }
    if safe && value.as_str().is_some() && !matches!(kind, 's' | 'r' | 'a') {
        let message = format!("%{kind} of a text in a text marked as safe is not supported");
        return Err(Failure::new(message));
    }
    let align = if field.left { Align::Left } else { Align::Right };
    let number = |out: &mut Writer, negative: bool, prefix: &str, digits: &str| {
        let sign = match (negative, field.plus, field.space) {
            (true, ..) => "-",
            (_, true, _) => "+",
            (_, _, true) => " ",
            _ => "",
        };
        let zeros = field.zero && !field.left;
        let (fill, align) = if zeros { ('0', Align::Sign) } else { (' ', align) };
        digits::pad(out, &format!("{sign}{prefix}"), digits, field.width, fill, align)
    };
    match kind {
        's' | 'r' | 'a' => {
            let mut text = Writer::new(out.meter());
            if kind == 's' { write::str(&mut text, value) } else { write::repr(&mut text, value) }?;
            let mut text = text.finish();
            if safe && !(kind == 's' && matches!(value, Value::Text(text) if text.safe)) {
                let mut escaped = Writer::new(out.meter());
                operate::escape(&mut escaped, &text)?;
                text = escaped.finish();
            }
            if kind == 'a' && !text.is_ascii() {
                text = write::ascii(out.meter(), &text)?;
            }
            if let Some(precision) = field.precision
                && let Some((at, _)) = text.char_indices().nth(precision)
            {
                text.truncate(at);
            }
            digits::pad(out, "", &text, field.width, ' ', align)
        }
        'c' => {
            let character = match value {
                Value::Text(text) if text.text.chars().count() == 1 => text.text.chars().next(),
                _ => value
                    .as_int()
                    .and_then(|code| u32::try_from(code).ok())
                    .and_then(char::from_u32),
            };
            let character = character.ok_or_else(|| Failure::new("%c requires int or char"))?;
            let text = String::from(character);
            digits::pad(out, "", &text, field.width, ' ', align)
        }
        'd' | 'i' | 'u' | 'o' | 'x' | 'X' => {
            let whole = match (kind, value) {
                ('d' | 'i' | 'u', Value::Float(value)) if value.is_finite() => {
                    // All the digits of a float, however large.
                    let digits = format!("{:.0}", value.abs().trunc());
                    Some((*value <= -1.0, digits))
                }
                _ => None,
            };
            let wrong = || Failure::new(format!("%{kind} requires a number"));
            let (radix, prefix) = match kind {
                'o' => (8, "0o"),
                'x' => (16, "0x"),
                'X' => (16, "0X"),
                _ => (10, ""),
            };
            let prefix = if field.alternate { prefix } else { "" };
            let (negative, digits) = match whole {
                Some(whole) => whole,
                None => {
                    let value = value.as_int().ok_or_else(wrong)?;
                    (value < 0, digits::integer(value.unsigned_abs(), radix, kind == 'X'))
                }
            };
            let zeros = field.precision.unwrap_or(0).saturating_sub(digits.len());
            number(out, negative, prefix, &format!("{}{digits}", "0".repeat(zeros)))
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
            let value = value.as_float();
            let value = value.ok_or_else(|| Failure::new("must be real number"))?;
            let style = match kind.to_ascii_lowercase() {
                'e' => Style::Exponent,
                'f' => Style::Fixed,
                _ => Style::General,
            };
            let precision = field.precision.unwrap_or(6);
            let mut digits = digits::float(value.abs(), style, precision, field.alternate);
            if kind.is_ascii_uppercase() {
                digits.make_ascii_uppercase();
            }
            number(out, value.is_sign_negative() && !value.is_nan(), "", &digits)
        }
        _ => Err(Failure::new(format!("unsupported format character {kind:?}"))),
    }
}
