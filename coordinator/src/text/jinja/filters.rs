//! `|`: Jinja2's filters. Those that pick from lists are in [`lists`], those
//! that make numbers in [`numbers`].

mod lists;
mod numbers;

use std::cmp::Ordering;
use std::rc::Rc;

use super::digits::{self, Align};
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
            return numbers::call(&meter, name, &value, given);
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
        | "forceescape" | "wordcount" | "urlencode" => given.bind(name, [])?,
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
                _ if super::names::UNSUPPORTED_FILTERS.contains(&name) => {
                    Err(Failure::new(format!("the filter {name:?} is not supported")))
                }
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
    let between =
        |character: char| is_blank(character) || matches!(character, '-' | '(' | '{' | '[' | '<');
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if between(first) {
            // Python makes the rest of a group of these small, which changes none of them.
            out.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let end = rest.find(between).unwrap_or(rest.len());
        out.extend(first.to_uppercase());
        // As one text: a sigma at a word's end has a form of its own.
        out.push_str(&rest[first.len_utf8()..end].to_lowercase());
        rest = &rest[end..];
    }
    out
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

/// Sorts as Python's `sorted` does, by a key of each item. A merge sort of our own: the order of
/// foreign values may be none, as with what is no number, and the standard library's may panic
/// then; this one makes some order of it, and ends at the first comparison that fails.
pub(super) fn sort_by<T>(
    meter: &Rc<Meter>,
    items: &mut [T],
    key: impl Fn(&T) -> &Value,
) -> Result<(), Failure> {
    let len = items.len();
    meter.room(len.saturating_mul(2 * size_of::<usize>()))?;
    // Places of items: `order` is sorted in runs of `width`, `merged` in runs twice as long.
    let mut order: Vec<usize> = (0..len).collect();
    let mut merged = Vec::with_capacity(len);
    let is_less = |a: usize, b: usize| {
        let order = operate::compare(meter, key(&items[a]), key(&items[b]))?;
        Ok::<_, Failure>(order == Some(Ordering::Less))
    };
    let mut width = 1;
    while width < len {
        meter.scan(len * size_of::<usize>())?;
        merged.clear();
        for run in order.chunks(2 * width) {
            let (mut left, mut right) = run.split_at(width.min(run.len()));
            // Runs that are in order as they stand take one comparison.
            if let (Some(&last), Some(&first)) = (left.last(), right.first())
                && is_less(first, last)?
            {
                while let (Some(&a), Some(&b)) = (left.first(), right.first()) {
                    // Of equal ones the left comes first.
                    if is_less(b, a)? {
                        merged.push(b);
                        right = &right[1..];
                    } else {
                        merged.push(a);
                        left = &left[1..];
                    }
                }
            }
            merged.extend_from_slice(left);
            merged.extend_from_slice(right);
        }
        std::mem::swap(&mut order, &mut merged);
        width *= 2;
    }
    // Where each item goes: every swap brings one to its place, so this ends.
    merged.resize(len, 0);
    for (place, &from) in order.iter().enumerate() {
        merged[from] = place;
    }
    for place in 0..len {
        while merged[place] != place {
            let to = merged[place];
            items.swap(place, to);
            merged.swap(place, to);
        }
    }
    Ok(())
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
