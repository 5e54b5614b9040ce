//! `'…'.format(…)`: fields in braces and Python's small language for them.

use super::digits::{self, Align, Style};
use super::evaluate::Given;
use super::meter::Writer;
use super::render::Renderer;
use super::value::Value;
use super::{Failure, operate, write};

/// A text, the fields in its fields' specifications, and nothing in those: Python's.
const MAX_LEVELS: usize = 3;

/// What the fields of one text are filled with.
struct Source {
    positional: Vec<Value>,
    keyword: Vec<(std::rc::Rc<str>, Value)>,
    /// The next field without a name; `None` once one was given a number.
    next: Option<usize>,
    numbered: bool,
}

/// `text.format(…)`.
pub(super) fn format(
    renderer: &mut Renderer<'_>,
    text: &str,
    given: Given,
) -> Result<Value, Failure> {
    let Given { positional, keyword } = given;
    let mut source = Source { positional, keyword, next: Some(0), numbered: false };
    let mut out = Writer::new(&renderer.meter);
    fill(renderer, &mut out, text, &mut source, MAX_LEVELS)?;
    renderer.text(out.finish())
}

/// Writes `text`, whose fields may have fields inside them `levels` deep.
fn fill(
    renderer: &mut Renderer<'_>,
    out: &mut Writer,
    text: &str,
    source: &mut Source,
    levels: usize,
) -> Result<(), Failure> {
    if levels == 0 {
        return Err(Failure::new("max string recursion exceeded"));
    }
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at])?;
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            out.push_str(brace)?;
            rest = after;
            continue;
        }
        if brace == "}" {
            return Err(Failure::new("single '}' encountered in format string"));
        }
        let mut depth = 1;
        let end = rest.bytes().position(|byte| {
            match byte {
                b'{' => depth += 1,
                b'}' => depth -= 1,
                _ => {}
            }
            depth == 0
        });
        let end = end.ok_or_else(|| Failure::new("expected '}' before end of string"))?;
        let field = &rest[..end];
        rest = &rest[end + 1..];
        write_field(renderer, out, field, source, levels)?;
    }
    out.push_str(rest)
}

fn write_field(
    renderer: &mut Renderer<'_>,
    out: &mut Writer,
    field: &str,
    source: &mut Source,
    levels: usize,
) -> Result<(), Failure> {
    // Brackets may hold what else ends a name.
    let mut in_brackets = false;
    let name_end = field
        .bytes()
        .position(|byte| {
            match byte {
                b'[' => in_brackets = true,
                b']' => in_brackets = false,
                _ => {}
            }
            !in_brackets && matches!(byte, b'!' | b':')
        })
        .unwrap_or(field.len());
    let (name, rest) = field.split_at(name_end);
    let (conversion, specification) = match rest.strip_prefix('!') {
        Some(rest) => {
            let conversion = rest.chars().next();
            let conversion = conversion.ok_or_else(|| Failure::new("missing conversion"))?;
            let rest = &rest[conversion.len_utf8()..];
            match rest.strip_prefix(':') {
                Some(specification) => (Some(conversion), specification),
                None if rest.is_empty() => (Some(conversion), ""),
                None => return Err(Failure::new("expected ':' after conversion specifier")),
            }
        }
        None => (None, rest.strip_prefix(':').unwrap_or("")),
    };
    let mut value = find(renderer, name, source)?;
    match conversion {
        None => {}
        Some('s') => value = renderer.text(operate::to_text(&renderer.meter, &value)?)?,
        Some('r') => {
            let mut text = Writer::new(&renderer.meter);
            write::repr(&mut text, &value)?;
            value = renderer.text(text.finish())?;
        }
        Some(other) => {
            return Err(Failure::new(format!("the conversion {other:?} is not supported")));
        }
    }
    let mut spelled = Writer::new(&renderer.meter);
    fill(renderer, &mut spelled, specification, source, levels - 1)?;
    write_value(out, &value, &spelled.finish())
}

fn find(renderer: &mut Renderer<'_>, name: &str, source: &mut Source) -> Result<Value, Failure> {
    let first_end = name.find(['.', '[']).unwrap_or(name.len());
    let (first, mut rest) = name.split_at(first_end);
    let index = if first.is_empty() {
        if source.numbered {
            return Err(Failure::new("cannot switch from manual field specification"));
        }
        let index = source.next.unwrap_or(0);
        source.next = Some(index + 1);
        Some(index)
    } else if first.bytes().all(|byte| byte.is_ascii_digit()) {
        if source.next.is_some_and(|next| next > 0) {
            return Err(Failure::new("cannot switch from automatic field numbering"));
        }
        source.numbered = true;
        first.parse().ok()
    } else {
        None
    };
    let found = match index {
        Some(index) => source.positional.get(index).cloned(),
        None => {
            renderer.meter.look_up(first, source.keyword.iter().map(|(other, _)| &**other))?;
            let found = source.keyword.iter().find(|(other, _)| &**other == first);
            found.map(|(_, value)| value.clone())
        }
    };
    let mut value = found.ok_or_else(|| Failure::new(format!("no value for {{{first}}}")))?;
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('.') {
            let end = after.find(['.', '[']).unwrap_or(after.len());
            value = renderer.attribute_value(&value, &after[..end])?;
            rest = &after[end..];
        } else {
            let inner = rest.strip_prefix('[').and_then(|inner| inner.split_once(']'));
            let (key, after) = inner.ok_or_else(|| Failure::new("missing ']' in format string"))?;
            let key = match key.parse::<u64>() {
                Ok(index) => Value::int(index),
                Err(_) => renderer.text(key)?,
            };
            value = renderer.item_value(&value, &key)?;
            rest = after;
        }
    }
    Ok(value)
}

/// What stands after a field's colon.
#[derive(Default)]
struct Specification {
    fill: Option<char>,
    align: Option<Align>,
    sign: Option<char>,
    alternate: bool,
    zero: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

fn align_of(character: char) -> Option<Align> {
    match character {
        '<' => Some(Align::Left),
        '>' => Some(Align::Right),
        '^' => Some(Align::Center),
        '=' => Some(Align::Sign),
        _ => None,
    }
}

fn parse(text: &str) -> Result<Specification, Failure> {
    let mut out = Specification::default();
    let mut rest = text;
    let mut letters = text.chars();
    let (first, second) = (letters.next(), letters.next());
    if let (Some(fill), Some(align)) = (first, second.and_then(align_of)) {
        (out.fill, out.align) = (Some(fill), Some(align));
        rest = letters.as_str();
    } else if let Some(align) = first.and_then(align_of) {
        out.align = Some(align);
        rest = &rest[1..];
    }
    if let Some(sign) = rest.chars().next().filter(|sign| matches!(sign, '+' | '-' | ' ')) {
        out.sign = Some(sign);
        rest = &rest[1..];
    }
    if let Some(after) = rest.strip_prefix('#') {
        (out.alternate, rest) = (true, after);
    }
    if let Some(after) = rest.strip_prefix('0') {
        (out.zero, rest) = (true, after);
    }
    let number = |rest: &mut &str| {
        let len = rest.bytes().take_while(u8::is_ascii_digit).count();
        let digits = &rest[..len];
        *rest = &rest[len..];
        if len == 0 { Ok(None) } else { digits::bounded(digits).map(Some) }
    };
    out.width = number(&mut rest)?.unwrap_or(0);
    if let Some(grouping) = rest.chars().next().filter(|sign| matches!(sign, ',' | '_')) {
        out.grouping = Some(grouping);
        rest = &rest[1..];
    }
    if let Some(mut after) = rest.strip_prefix('.') {
        let precision = number(&mut after)?;
        out.precision =
            Some(precision.ok_or_else(|| Failure::new("format specifier missing precision"))?);
        rest = after;
    }
    let mut letters = rest.chars();
    out.kind = letters.next();
    if letters.next().is_some() {
        return Err(Failure::new("invalid format specifier"));
    }
    Ok(out)
}

/// Writes a value as its field says.
pub(super) fn write_value(
    out: &mut Writer,
    value: &Value,
    specification: &str,
) -> Result<(), Failure> {
    if specification.is_empty() {
        return write::str(out, value);
    }
    let field = parse(specification)?;
    let unknown = || {
        let (kind, found) = (field.kind.unwrap_or(' '), value.type_name());
        Failure::new(format!("unknown format code {kind:?} for object of type {found:?}"))
    };
    match value {
        Value::Text(text) => {
            let misfit = field.sign.is_some() || field.alternate || field.grouping.is_some();
            if !matches!(field.kind, None | Some('s')) || misfit || field.align == Some(Align::Sign)
            {
                return Err(unknown());
            }
            let end = match field.precision {
                Some(precision) => text.text.char_indices().nth(precision).map(|(at, _)| at),
                None => None,
            };
            let body = &text.text[..end.unwrap_or(text.text.len())];
            let fill = field.fill.unwrap_or(if field.zero { '0' } else { ' ' });
            let align = field.align.unwrap_or(Align::Left);
            digits::pad(out, "", body, field.width, fill, align)
        }
        Value::Float(_) | Value::Int(_) | Value::Bool(_) => number(out, value, &field, unknown),
        _ => Err(Failure::new(format!(
            "unsupported format string passed to {}.__format__",
            value.type_name()
        ))),
    }
}

fn number(
    out: &mut Writer,
    value: &Value,
    field: &Specification,
    unknown: impl Fn() -> Failure,
) -> Result<(), Failure> {
    if matches!(value, Value::Bool(_)) && field.kind.is_none() {
        // Python formats a truth value without a type as an integer once there is a width.
        let number = Value::int(value.as_int().unwrap_or_default());
        return self::number(out, &number, field, unknown);
    }
    let integer = value.as_int();
    let kind = field.kind;
    if kind == Some('n') && field.grouping.is_some() {
        return Err(unknown());
    }
    let (negative, prefix, mut digits) = match (integer, kind) {
        (Some(value), None | Some('d' | 'n' | 'b' | 'o' | 'x' | 'X')) => {
            let (radix, prefix) = match kind {
                Some('b') => (2, "0b"),
                Some('o') => (8, "0o"),
                Some('x') => (16, "0x"),
                Some('X') => (16, "0X"),
                _ => (10, ""),
            };
            if field.precision.is_some() || (field.grouping == Some(',') && radix != 10) {
                return Err(unknown());
            }
            let digits = digits::integer(value.unsigned_abs(), radix, kind == Some('X'));
            (value < 0, if field.alternate { prefix } else { "" }, digits)
        }
        (Some(value), Some('c')) => {
            let character = u32::try_from(value).ok().and_then(char::from_u32);
            let character = character.ok_or_else(&unknown)?;
            let plain = field.sign.is_none() && field.precision.is_none() && !field.alternate;
            if !plain || field.grouping.is_some() {
                return Err(unknown());
            }
            (false, "", String::from(character))
        }
        (_, None | Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | 'n' | '%')) => {
            let value = value.as_float().ok_or_else(&unknown)?;
            let negative = value.is_sign_negative() && !value.is_nan();
            let size = value.abs();
            let precision = field.precision.unwrap_or(6);
            let style = match kind.map(|kind| kind.to_ascii_lowercase()) {
                Some('e') => Style::Exponent,
                Some('f' | '%') => Style::Fixed,
                _ => Style::General,
            };
            let mut digits = match kind {
                None => digits::plain(size, field.precision, field.alternate),
                Some('%') => digits::float(size * 100.0, style, precision, field.alternate) + "%",
                _ => digits::float(size, style, precision, field.alternate),
            };
            if kind.is_some_and(|kind| kind.is_ascii_uppercase()) {
                digits.make_ascii_uppercase();
            }
            (negative, "", digits)
        }
        _ => return Err(unknown()),
    };
    let sign = match (negative, field.sign) {
        (true, _) => "-",
        (_, Some('+')) => "+",
        (_, Some(' ')) => " ",
        _ => "",
    };
    let (fill, align) = match (field.fill, field.align, field.zero) {
        (None, None, true) => ('0', Align::Sign),
        (fill, align, zero) => (
            fill.unwrap_or(if zero { '0' } else { ' ' }),
            align.unwrap_or(if zero { Align::Sign } else { Align::Right }),
        ),
    };
    if let Some(separator) = field.grouping {
        let every = if matches!(kind, Some('b' | 'o' | 'x' | 'X')) { 4 } else { 3 };
        // Zeros that fill the field are digits, and are grouped too.
        let zeros = fill == '0' && align == Align::Sign;
        let before = sign.len() + prefix.len();
        let width = if zeros { field.width.saturating_sub(before) } else { 0 };
        digits = grouped(&digits, separator, every, width);
    }
    digits::pad(out, &format!("{sign}{prefix}"), &digits, field.width, fill, align)
}

/// Digits before the point in groups, with zeros in front until all has `width` characters; no
/// separator begins it, so it may have one more.
fn grouped(digits: &str, separator: char, every: usize, width: usize) -> String {
    // A hexadecimal integer has groups of four; in anything else an `e` begins an exponent.
    let is_digit = |c: char| if every == 4 { c.is_ascii_hexdigit() } else { c.is_ascii_digit() };
    let whole = digits.find(|c| !is_digit(c)).unwrap_or(digits.len());
    let (whole, rest) = digits.split_at(whole);
    let width = width.saturating_sub(rest.len());
    let separators = |count: usize| count.saturating_sub(1) / every;
    let mut count = whole.len();
    // Infinity and what is no number have no digits, and the zeros before them no groups.
    while !whole.is_empty() && count + separators(count) < width {
        count += 1;
    }
    let mut out = "0".repeat(if whole.is_empty() { width } else { 0 });
    let zeros = std::iter::repeat_n('0', count - whole.len());
    for (index, digit) in zeros.chain(whole.chars()).enumerate() {
        if index > 0 && (count - index).is_multiple_of(every) {
            out.push(separator);
        }
        out.push(digit);
    }
    out + rest
}
