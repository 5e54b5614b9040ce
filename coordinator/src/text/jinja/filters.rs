//! `|`: Jinja2's filters. Those that pick from lists are in [`lists`].

mod lists;

use std::cmp::Ordering;
use std::rc::Rc;

use super::digits::{self, Align, Style};
use super::evaluate::Given;
use super::lexer::is_blank;
use super::meter::{Meter, Writer};
use super::render::Renderer;
use super::value::{Text, Value, View};
use super::{CASE_GROWTH, Failure, json, letters, methods, operate, write};

/// Passes `value` through the filter `name`.
pub(super) fn call(
    renderer: &mut Renderer<'_>,
    name: &str,
    value: Value,
    given: Given,
) -> Result<Value, Failure> {
    renderer.deeper(|renderer| call_here(renderer, name, value, given))
}

fn call_here(
    renderer: &mut Renderer<'_>,
    name: &str,
    value: Value,
    given: Given,
) -> Result<Value, Failure> {
    let meter = Rc::clone(&renderer.meter);
    match name {
        "tojson" => return json::to_json(renderer, &value, given),
        "default" | "d" => {
            let [default, boolean] = given.bind(name, ["default_value", "boolean"])?;
            let boolean = boolean.is_some_and(|boolean| boolean.is_true());
            if value.is_undefined() || (boolean && !value.is_true()) {
                return default.map_or_else(|| renderer.text(""), Ok);
            }
            return Ok(value);
        }
        "attr" => {
            let [name] = given.bind(name, ["name"])?;
            let name = text_argument(name.as_ref(), "attr")?;
            return lists::attr(renderer, &value, &name.text);
        }
        "items" => {
            given.bind(name, [])?;
            if value.is_undefined() {
                return Value::iterator(&meter, Vec::new());
            }
            let view = renderer.view(View::Items, &value)?;
            let items = operate::items(&meter, &view)?;
            return Value::iterator(&meter, items.items.clone());
        }
        "length" | "count" => {
            given.bind(name, [])?;
            let length = operate::length(&meter, &value)?;
            let kind = value.type_name();
            let none = || Failure::new(format!("object of type {kind:?} has no len()"));
            return length.map(Value::count).ok_or_else(none);
        }
        "abs" | "int" | "float" | "round" | "filesizeformat" => {
            return number(&meter, name, &value, given);
        }
        _ => {}
    }
    if lists::NAMES.contains(&name) {
        return lists::call(renderer, name, &value, given);
    }
    of_text(renderer, name, &value, given)
}

fn text_argument(
    value: Option<&Value>,
    what: &str,
) -> Result<Rc<super::meter::Held<Text>>, Failure> {
    match value {
        Some(Value::Text(text)) => Ok(Rc::clone(text)),
        _ => Err(Failure::new(format!("{what} takes a text"))),
    }
}

fn int_argument(value: Option<&Value>, otherwise: i128) -> Result<i128, Failure> {
    match value {
        None => Ok(otherwise),
        Some(value) => value
            .as_int()
            .ok_or_else(|| Failure::new(format!("{} is no integer", value.type_name()))),
    }
}

/// Filters that make a text of one.
fn of_text(
    renderer: &mut Renderer<'_>,
    name: &str,
    value: &Value,
    given: Given,
) -> Result<Value, Failure> {
    let meter = Rc::clone(&renderer.meter);
    // A text marked as safe stays so where Jinja2 calls a method of it.
    let safe = matches!(value, Value::Text(text) if text.safe);
    let owned;
    let text = match value {
        Value::Text(text) => &*text.text,
        _ => {
            owned = operate::to_text(&meter, value)?;
            &owned
        }
    };
    meter.room(text.len().saturating_mul(CASE_GROWTH))?;
    meter.scan(text.len())?;
    let same = |text: String| Value::marked(&meter, text, safe);
    match name {
        "upper" | "lower" | "capitalize" | "title" | "string" | "safe" | "e" | "escape"
        | "forceescape" | "striptags" | "wordcount" | "urlencode" => given.bind(name, [])?,
        _ => {
            return match name {
                "trim" => {
                    let [characters] = given.bind(name, ["chars"])?;
                    let characters = match &characters {
                        None | Some(Value::None) => None,
                        Some(_) => Some(text_argument(characters.as_ref(), name)?),
                    };
                    let characters = characters.as_ref().map(|characters| &*characters.text);
                    same(methods::strip(&meter, text, characters, "strip")?.to_owned())
                }
                "center" => {
                    let [width] = given.bind(name, ["width"])?;
                    let width = int_argument(width.as_ref(), 80)?;
                    let centered = methods::justify(&meter, text, width, ' ', Align::Center)?;
                    same(operate::to_text(&meter, &centered)?)
                }
                "format" => {
                    let Given { positional, keyword } = given;
                    let values = if keyword.is_empty() {
                        Value::tuple(&meter, positional)?
                    } else if positional.is_empty() {
                        let mut entries = Vec::with_capacity(keyword.len());
                        for (name, value) in keyword {
                            entries.push((Value::text(&meter, &*name)?, value));
                        }
                        Value::dict(&meter, entries)?
                    } else {
                        return Err(Failure::new(
                            "can't handle positional and keyword arguments at the same time",
                        ));
                    };
                    let text = Value::marked(&meter, text, safe)?;
                    operate::binary(&meter, super::syntax::BinaryOp::Remainder, &text, &values)
                }
                "replace" => {
                    let [old, new, count] = given.bind(name, ["old", "new", "count"])?;
                    let (Some(old), Some(new)) = (old, new) else {
                        return Err(Failure::new("replace takes two texts"));
                    };
                    let old = operate::to_text(&meter, &old)?;
                    let new = operate::to_text(&meter, &new)?;
                    let count = count.filter(|count| !matches!(count, Value::None));
                    let count = int_argument(count.as_ref(), -1)?;
                    Value::text(&meter, methods::replace(&meter, text, &old, &new, count)?)
                }
                "indent" => indent(&meter, value, given),
                "truncate" => truncate(&meter, value, given),
                _ => Err(Failure::new(format!("No filter named {name:?}."))),
            };
        }
    };
    match name {
        "upper" => same(text.to_uppercase()),
        "lower" => same(text.to_lowercase()),
        "capitalize" => same(letters::capitalize(text)),
        "title" => Value::text(&meter, title(text)),
        "string" => same(text.to_owned()),
        "safe" => Value::marked(&meter, text, true),
        "e" | "escape" if safe => Ok(value.clone()),
        "e" | "escape" | "forceescape" => {
            let mut out = Writer::new(&meter);
            operate::escape(&mut out, text)?;
            Value::marked(&meter, out.finish(), true)
        }
        "striptags" => Value::text(&meter, strip_tags(text)?),
        "wordcount" => {
            let is_word = |character: char| letters::is_alnum(character) || character == '_';
            let words = text.split(|character| !is_word(character));
            Ok(Value::count(words.filter(|word| !word.is_empty()).count()))
        }
        _ => url_encode(&meter, value),
    }
}

/// Words begin after blanks, hyphens and opening brackets.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for character in text.chars() {
        if is_blank(character) || matches!(character, '-' | '(' | '{' | '[' | '<') {
            inside = false;
            // Python makes the rest of a group of these small, which changes none of them.
            out.push(character);
        } else if inside {
            out.extend(character.to_lowercase());
        } else {
            inside = true;
            out.extend(character.to_uppercase());
        }
    }
    out
}

/// Without tags and comments, blanks made one.
fn strip_tags(text: &str) -> Result<String, Failure> {
    let named = |part: &str| part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '#');
    if text.split('&').skip(1).any(named) {
        // Python would turn each of HTML's 2000 names of characters back into its character.
        return Err(Failure::new(
            "striptags of a text with HTML's names of characters is not supported",
        ));
    }
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("<!--") {
        let Some(end) = rest[start..].find("-->") else { break };
        plain.push_str(&rest[..start]);
        rest = &rest[start + end + 3..];
    }
    plain.push_str(rest);
    let mut out = String::with_capacity(plain.len());
    let mut rest = &*plain;
    while let Some(start) = rest.find('<') {
        let Some(end) = rest[start..].find('>') else { break };
        out.push_str(&rest[..start]);
        rest = &rest[start + end + 1..];
    }
    out.push_str(rest);
    Ok(letters::words(&out).collect::<Vec<_>>().join(" "))
}

fn quote_url(out: &mut Writer, text: &str, in_query: bool) -> Result<(), Failure> {
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => {
                out.push(char::from(byte))?;
            }
            b'/' if !in_query => out.push('/')?,
            b' ' if in_query => out.push('+')?,
            _ => out.push_str(&format!("%{byte:02X}"))?,
        }
    }
    Ok(())
}

fn url_encode(meter: &Rc<Meter>, value: &Value) -> Result<Value, Failure> {
    let mut out = Writer::new(meter);
    if value.as_str().is_some() || !operate::is_iterable(value) {
        quote_url(&mut out, &operate::to_text(meter, value)?, false)?;
        return Value::text(meter, out.finish());
    }
    let pair = |out: &mut Writer, index: usize, key: &Value, value: &Value| {
        out.push_str(if index > 0 { "&" } else { "" })?;
        quote_url(out, &operate::to_text(meter, key)?, true)?;
        out.push('=')?;
        quote_url(out, &operate::to_text(meter, value)?, true)
    };
    if let Value::Dict(dict) = value {
        for (index, (key, value)) in dict.entries.iter().enumerate() {
            pair(&mut out, index, key, value)?;
        }
    } else {
        for (index, item) in operate::items(meter, value)?.iter().enumerate() {
            match operate::items(meter, item)?.items.as_slice() {
                [key, value] => pair(&mut out, index, key, value)?,
                _ => return Err(Failure::new("urlencode takes pairs")),
            }
        }
    }
    Value::text(meter, out.finish())
}

fn indent(meter: &Rc<Meter>, value: &Value, given: Given) -> Result<Value, Failure> {
    let [width, first, blank] = given.bind("indent", ["width", "first", "blank"])?;
    let Value::Text(text) = value else {
        return Err(Failure::new(format!("indent of a {}", value.type_name())));
    };
    let blanks;
    let indention = match &width {
        Some(Value::Text(width)) => &*width.text,
        _ => {
            let width = int_argument(width.as_ref(), 4)?;
            blanks = " ".repeat(digits::bounded(&width.max(0).to_string())?);
            &blanks
        }
    };
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let (first, blank) = (is_true(first), is_true(blank));
    let mut out = Writer::new(meter);
    out.push_str(if first { indention } else { "" })?;
    let whole = format!("{}\n", text.text);
    for (index, (line, _)) in letters::lines(&whole).enumerate() {
        if index > 0 {
            out.push('\n')?;
            out.push_str(if blank || !line.is_empty() { indention } else { "" })?;
        }
        out.push_str(line)?;
    }
    Value::marked(meter, out.finish(), text.safe)
}

fn truncate(meter: &Rc<Meter>, value: &Value, given: Given) -> Result<Value, Failure> {
    let names = ["length", "killwords", "end", "leeway"];
    let [length, kill, end, leeway] = given.bind("truncate", names)?;
    let Value::Text(text) = value else {
        return Err(Failure::new(format!("truncate of a {}", value.type_name())));
    };
    let count = |value: Option<Value>, otherwise: i128| {
        let value = value.filter(|value| !matches!(value, Value::None));
        let value = int_argument(value.as_ref(), otherwise)?;
        let wrong = || Failure::new("truncate takes lengths that are not negative");
        usize::try_from(value).map_err(|_| wrong())
    };
    let (length, leeway) = (count(length, 255)?, count(leeway, 5)?);
    let end = match &end {
        None => "...".to_owned(),
        Some(_) => text_argument(end.as_ref(), "truncate")?.text.clone(),
    };
    let end_len = end.chars().count();
    if length < end_len {
        return Err(Failure::new("truncate's length is shorter than its end"));
    }
    if text.text.chars().count() <= length.saturating_add(leeway) {
        return Ok(value.clone());
    }
    let at = text.text.char_indices().nth(length - end_len).map_or(text.text.len(), |(at, _)| at);
    let mut kept = &text.text[..at];
    if !kill.is_some_and(|kill| kill.is_true()) {
        kept = kept.rsplit_once(' ').map_or(kept, |(before, _)| before);
    }
    let mut out = Writer::new(meter);
    out.push_str(kept)?;
    out.push_str(&end)?;
    Value::marked(meter, out.finish(), text.safe)
}

fn number(meter: &Rc<Meter>, name: &str, value: &Value, given: Given) -> Result<Value, Failure> {
    if let Value::Undefined(words) = value {
        return Err(Failure::new(words.to_string()));
    }
    if let Value::Text(text) = value {
        meter.scan(text.text.len())?;
    }
    match name {
        "abs" => {
            given.bind(name, [])?;
            match (value, value.as_int()) {
                (Value::Float(value), _) => Ok(Value::Float(value.abs())),
                (_, Some(value)) => Ok(Value::int(value.saturating_abs())),
                _ => {
                    Err(Failure::new(format!("bad operand type for abs(): {}", value.type_name())))
                }
            }
        }
        "int" => {
            let [default, base] = given.bind(name, ["default", "base"])?;
            let default = default.unwrap_or(Value::int(0));
            let base = int_argument(base.as_ref(), 10)?;
            Ok(to_int(value, base)?.map_or(default, Value::int))
        }
        "float" => {
            let [default] = given.bind(name, ["default"])?;
            let found = match value {
                Value::Text(text) => parse_float(&text.text),
                _ => value.as_float(),
            };
            Ok(found.map_or_else(|| default.unwrap_or(Value::Float(0.0)), Value::Float))
        }
        "round" => round(value, given),
        _ => {
            let [binary] = given.bind(name, ["binary"])?;
            let bytes = match value {
                Value::Text(text) => parse_float(&text.text),
                _ => value.as_float(),
            };
            let bytes = bytes.ok_or_else(|| Failure::new("could not convert to float"))?;
            Value::text(meter, file_size(bytes, binary.is_some_and(|binary| binary.is_true())))
        }
    }
}

fn file_size(bytes: f64, binary: bool) -> String {
    let (base, middle) = if binary { (1024.0_f64, "i") } else { (1000.0, "") };
    if bytes == 1.0 {
        return "1 Byte".into();
    }
    if bytes < base {
        return format!("{} Bytes", bytes.trunc());
    }
    let letters = [if binary { 'K' } else { 'k' }, 'M', 'G', 'T', 'P', 'E', 'Z', 'Y'];
    let mut unit = base;
    for (index, letter) in letters.iter().enumerate() {
        unit *= base;
        if bytes < unit || index + 1 == letters.len() {
            let size = digits::float(base * bytes / unit, Style::Fixed, 1, false);
            return format!("{size} {letter}{middle}B");
        }
    }
    String::new()
}

/// Digits as Python reads them: single underscores between, of any script.
fn plain_digits(text: &str) -> Option<String> {
    let text = text.trim_matches(is_blank);
    if text.starts_with('_') || text.ends_with('_') || text.contains("__") {
        return None;
    }
    let between = text.split('_').collect::<Vec<_>>();
    let joins = between
        .windows(2)
        .all(|pair| pair[0].ends_with(letters::is_alnum) && pair[1].starts_with(letters::is_alnum));
    let plain = between.concat();
    let ascii = |character: char| {
        letters::decimal_value(character).and_then(|digit| char::from_digit(digit, 10))
    };
    joins.then(|| plain.chars().map(|c| ascii(c).unwrap_or(c)).collect())
}

fn parse_float(text: &str) -> Option<f64> {
    let plain = plain_digits(text)?;
    let unsigned = plain.strip_prefix(['+', '-']).unwrap_or(&plain).to_ascii_lowercase();
    let named = matches!(&*unsigned, "inf" | "infinity" | "nan");
    let begins = unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    if named || begins { plain.parse().ok() } else { None }
}

fn parse_int(text: &str, base: u32) -> Result<Option<i128>, Failure> {
    let Some(plain) = plain_digits(text) else { return Ok(None) };
    let negative = plain.starts_with('-');
    let digits = plain.strip_prefix(['+', '-']).unwrap_or(&plain);
    let lower = digits.to_ascii_lowercase();
    let (base, digits) = match (lower.get(..2), base) {
        (Some("0b"), 2 | 0) => (2, &lower[2..]),
        (Some("0o"), 8 | 0) => (8, &lower[2..]),
        (Some("0x"), 16 | 0) => (16, &lower[2..]),
        (_, 0) if lower.starts_with('0') && lower.bytes().any(|byte| byte != b'0') => {
            return Ok(None);
        }
        (_, 0) => (10, &*lower),
        (_, base) => (base, &*lower),
    };
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(base)) {
        return Ok(None);
    }
    let value = i128::from_str_radix(digits, base)
        .map_err(|_| Failure::Limit("an integer had more than 127 bits".into()))?;
    Ok(Some(if negative { -value } else { value }))
}

fn to_int(value: &Value, base: i128) -> Result<Option<i128>, Failure> {
    let truncated = |value: f64| {
        if !value.is_finite() {
            return Ok(None);
        }
        let large = || Failure::Limit("an integer had more than 127 bits".into());
        operate::exact_int(value.trunc()).map(Some).ok_or_else(large)
    };
    match value {
        Value::Text(text) => {
            // Python takes a base that it does not know for a wrong number.
            let base =
                u32::try_from(base).ok().filter(|&base| base == 0 || (2..=36).contains(&base));
            let whole = match base {
                Some(base) => parse_int(&text.text, base)?,
                None => None,
            };
            match (whole, parse_float(&text.text)) {
                (Some(whole), _) => Ok(Some(whole)),
                (None, Some(value)) => truncated(value),
                (None, None) => Ok(None),
            }
        }
        Value::Float(value) if value.is_infinite() => {
            Err(Failure::new("cannot convert float infinity to integer"))
        }
        Value::Float(value) => truncated(*value),
        _ => Ok(value.as_int()),
    }
}

fn round(value: &Value, given: Given) -> Result<Value, Failure> {
    let [precision, method] = given.bind("round", ["precision", "method"])?;
    let precision = int_argument(precision.as_ref(), 0)?;
    let method = match &method {
        None => "common".to_owned(),
        Some(_) => text_argument(method.as_ref(), "round")?.text.clone(),
    };
    let small = i32::try_from(precision).ok().filter(|small| small.abs() <= 30);
    let small = small.ok_or_else(|| Failure::new("round's precision is beyond 30"))?;
    let wrong = || Failure::new(format!("round of a {}", value.type_name()));
    match &*method {
        "common" => match (value, value.as_int()) {
            (Value::Float(value), _) => {
                if small >= 0 {
                    // Rust, like Python, rounds the exact decimal value, halves to even.
                    let digits = format!("{value:.0$}", small as usize);
                    return Ok(Value::Float(digits.parse().unwrap_or(*value)));
                }
                let unit = 10_f64.powi(-small);
                Ok(Value::Float((value / unit).round_ties_even() * unit))
            }
            (_, Some(whole)) if small < 0 => {
                let unit = 10_i128.pow(small.unsigned_abs());
                let (quotient, rest) = (whole.div_euclid(unit), whole.rem_euclid(unit));
                let up = rest * 2 > unit || (rest * 2 == unit && quotient % 2 != 0);
                Ok(Value::int((quotient + i128::from(up)) * unit))
            }
            (_, Some(whole)) => Ok(Value::int(whole)),
            _ => Err(wrong()),
        },
        "ceil" | "floor" => {
            let up = method == "ceil";
            let rounded = |value: f64| if up { value.ceil() } else { value.floor() };
            let value = value.as_float().ok_or_else(wrong)?;
            let unit = 10_f64.powi(small);
            Ok(Value::Float(rounded(value * unit) / unit))
        }
        _ => Err(Failure::new("method must be common, ceil or floor")),
    }
}

/// Sorts as Python's `sorted` does, by a key of each item.
pub(super) fn sort_by<T>(
    meter: &Rc<Meter>,
    items: &mut [T],
    key: impl Fn(&T) -> &Value,
) -> Result<(), Failure> {
    let mut failure = None;
    items.sort_by(|a, b| {
        if failure.is_some() {
            return Ordering::Equal;
        }
        match operate::compare(meter, key(a), key(b)) {
            Ok(order) => order.unwrap_or(Ordering::Equal),
            Err(error) => {
                failure = Some(error);
                Ordering::Equal
            }
        }
    });
    failure.map_or(Ok(()), Err)
}

/// `str(value)` for a list of them with a text between.
pub(super) fn join(meter: &Rc<Meter>, items: &[Value], separator: &str) -> Result<Value, Failure> {
    let mut out = Writer::new(meter);
    for (index, item) in items.iter().enumerate() {
        out.push_str(if index > 0 { separator } else { "" })?;
        write::str(&mut out, item)?;
    }
    Value::text(meter, out.finish())
}
