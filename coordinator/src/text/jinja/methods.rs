//! Python's methods of texts, lists and dicts.

use std::rc::Rc;

use super::digits::Align;
use super::evaluate::Given;
use super::lexer::is_blank;
use super::meter::{Meter, Writer};
use super::render::Renderer;
use super::value::{Loop, Object, Value, View};
use super::{CASE_GROWTH, Failure, digits, format, letters, operate, write};

/// Calls `object.name(…)`; there is such a method.
pub(super) fn call(
    renderer: &mut Renderer<'_>,
    object: &Value,
    name: &str,
    given: Given,
) -> Result<Value, Failure> {
    match object {
        Value::Text(text) => {
            renderer.meter.room(text.text.len().saturating_mul(CASE_GROWTH))?;
            renderer.meter.scan(text.text.len())?;
            if text.safe {
                return of_marked(renderer, &text.text, name, given);
            }
            of_text(renderer, &text.text, name, given)
        }
        Value::List(items) | Value::Tuple(items) => match name {
            "copy" => {
                given.bind(name, [])?;
                renderer.meter.spend(items.len())?;
                Value::list(&renderer.meter, items.items.clone())
            }
            _ => find_item(&renderer.meter, items, name, given),
        },
        Value::Dict(dict) => match name {
            "get" => {
                let [key, default] = given.bind(name, ["", ""])?;
                let key = key.ok_or_else(|| Failure::new("get takes a key"))?;
                let found = dict.get(&renderer.meter, &key)?;
                Ok(found.cloned().or(default).unwrap_or(Value::None))
            }
            "copy" => {
                given.bind(name, [])?;
                Ok(object.clone())
            }
            _ => {
                given.bind(name, [])?;
                let kind = match name {
                    "keys" => View::Keys,
                    "values" => View::Values,
                    _ => View::Items,
                };
                renderer.view(kind, object)
            }
        },
        Value::Object(inner) => match &***inner {
            Object::Range(_) => {
                let items = operate::items(&renderer.meter, object)?;
                find_item(&renderer.meter, &items, name, given)
            }
            Object::Cycler { items, at } => {
                given.bind(name, [])?;
                if name == "reset" {
                    at.set(0);
                    return Ok(Value::None);
                }
                let current = at.replace((at.get() + 1) % items.len());
                Ok(items[current].clone())
            }
            Object::Loop(state) if name == "cycle" => {
                let Given { positional, .. } = given;
                if positional.is_empty() {
                    return Err(Failure::new("no items for cycling given"));
                }
                Ok(positional[state.index0.get() % positional.len()].clone())
            }
            Object::Loop(state) => {
                if state.asked.borrow().is_none() {
                    renderer.hold(inner)?;
                }
                changed(&renderer.meter, state, given).map(Value::Bool)
            }
            _ => Err(Failure::new(format!("no method {name:?}"))),
        },
        _ => Err(Failure::new(format!("no method {name:?}"))),
    }
}

fn changed(meter: &Rc<Meter>, state: &Loop, given: Given) -> Result<bool, Failure> {
    let asked = given.positional;
    let before = state.asked.borrow();
    let mut same = before.as_ref().is_some_and(|before| before.len() == asked.len());
    for (before, now) in before.iter().flatten().zip(&asked) {
        same = same && (before.is_same(now) || operate::is_equal(meter, before, now)?);
    }
    drop(before);
    if !same {
        let before = state.asked.replace(Some(asked));
        drop(before);
    }
    Ok(!same)
}

fn find_item(
    meter: &Rc<Meter>,
    items: &[Value],
    name: &str,
    given: Given,
) -> Result<Value, Failure> {
    let [wanted, start, stop] = given.bind(name, ["", "", ""])?;
    let wanted = wanted.ok_or_else(|| Failure::new(format!("{name} takes an item")))?;
    let clip = |bound: Option<Value>, otherwise: usize| {
        let Some(bound) = bound else { return Ok(otherwise) };
        let bound = bound.as_int().ok_or_else(|| Failure::new("a place must be an integer"))?;
        let bound = if bound < 0 { bound + items.len() as i128 } else { bound };
        Ok::<_, Failure>(bound.clamp(0, items.len() as i128) as usize)
    };
    let (start, stop) = (clip(start, 0)?, clip(stop, items.len())?);
    let mut count = 0_usize;
    for (index, item) in items.iter().enumerate().take(stop).skip(start) {
        if item.is_same(&wanted) || operate::is_equal(meter, item, &wanted)? {
            if name == "index" {
                return Ok(Value::count(index));
            }
            count += 1;
        }
    }
    if name == "index" {
        return Err(Failure::new("it is not in the list"));
    }
    Ok(Value::count(count))
}

/// A method of a text marked as safe. Its arguments would be escaped; those that need it are
/// refused.
fn of_marked(
    renderer: &mut Renderer<'_>,
    text: &str,
    name: &str,
    given: Given,
) -> Result<Value, Failure> {
    let special = |value: &Value| match value {
        Value::Text(text) => !text.safe && text.text.contains(['&', '<', '>', '"', '\'']),
        Value::List(_) | Value::Tuple(_) | Value::Dict(_) | Value::Object(_) => true,
        _ => false,
    };
    let named = given.keyword.iter().map(|(_, value)| value);
    if matches!(name, "format" | "format_map") || given.positional.iter().chain(named).any(special)
    {
        let message = format!("{name} of a text marked as safe is not supported with such values");
        return Err(Failure::new(message));
    }
    let result = of_text(renderer, text, name, given)?;
    let meter = Rc::clone(&renderer.meter);
    let mark = |value: &Value| match value {
        Value::Text(text) => Value::marked(&meter, text.text.as_str(), true),
        other => Ok(other.clone()),
    };
    match &result {
        Value::List(items) => {
            let marked = items.iter().map(mark).collect::<Result<_, _>>()?;
            Value::list(&meter, marked)
        }
        Value::Tuple(items) => {
            let marked = items.iter().map(mark).collect::<Result<_, _>>()?;
            Value::tuple(&meter, marked)
        }
        other => mark(other),
    }
}

fn text_of<'v>(value: Option<&'v Value>, what: &str) -> Result<&'v str, Failure> {
    value.and_then(Value::as_str).ok_or_else(|| Failure::new(format!("{what} takes a text")))
}

/// `None` and what is not given mean the same.
fn optional_text<'v>(value: Option<&'v Value>, what: &str) -> Result<Option<&'v str>, Failure> {
    match value {
        None | Some(Value::None) => Ok(None),
        Some(_) => text_of(value, what).map(Some),
    }
}

fn int_of(value: Option<&Value>, otherwise: i128) -> Result<i128, Failure> {
    match value {
        None => Ok(otherwise),
        Some(value) => value
            .as_int()
            .ok_or_else(|| Failure::new(format!("{} is no integer", value.type_name()))),
    }
}

fn of_text(
    renderer: &mut Renderer<'_>,
    text: &str,
    name: &str,
    given: Given,
) -> Result<Value, Failure> {
    let meter = Rc::clone(&renderer.meter);
    let named = given.keyword.iter().map(|(_, value)| value);
    for value in given.positional.iter().chain(named) {
        meter.scan(value.as_str().map_or(0, str::len))?;
    }
    match name {
        "format" => return format::format(renderer, text, given),
        "format_map" => {
            let [map] = given.bind(name, [""])?;
            let Some(Value::Dict(dict)) = map else {
                return Err(Failure::new("format_map takes a mapping"));
            };
            let mut keyword = Vec::with_capacity(dict.entries.len());
            for (key, value) in &dict.entries {
                keyword.push((text_of(Some(key), name)?.into(), value.clone()));
            }
            return format::format(renderer, text, Given { positional: Vec::new(), keyword });
        }
        "split" | "rsplit" => {
            let [separator, most] = given.bind(name, ["sep", "maxsplit"])?;
            let separator = optional_text(separator.as_ref(), name)?;
            let most = int_of(most.as_ref(), -1)?;
            return split(&meter, text, separator, most, name == "rsplit");
        }
        "splitlines" => {
            let [keep] = given.bind(name, ["keepends"])?;
            let keep = keep.is_some_and(|keep| keep.is_true());
            let lines = letters::lines(text).map(|(line, end)| {
                let line = if keep { format!("{line}{end}") } else { line.to_owned() };
                Value::text(&meter, line)
            });
            return Value::list(&meter, lines.collect::<Result<_, _>>()?);
        }
        "expandtabs" => {
            let [size] = given.bind(name, ["tabsize"])?;
            return expand_tabs(&meter, text, int_of(size.as_ref(), 8)?);
        }
        _ => {}
    }
    let [first, second, third] = given.bind(name, ["", "", ""])?;
    let (first, second, third) = (first.as_ref(), second.as_ref(), third.as_ref());
    let taken = [first, second, third].iter().flatten().count();
    let most = match name {
        "count" | "find" | "index" | "rfind" | "rindex" | "startswith" | "endswith" | "replace" => {
            3
        }
        "center" | "ljust" | "rjust" => 2,
        "strip" | "lstrip" | "rstrip" | "join" | "partition" | "rpartition" | "removeprefix"
        | "removesuffix" | "zfill" => 1,
        _ => 0,
    };
    if taken > most {
        return Err(Failure::new(format!("{name} takes at most {most} arguments, not {taken}")));
    }
    let all = |test: fn(char) -> bool| Ok(Value::Bool(!text.is_empty() && text.chars().all(test)));
    match name {
        "upper" => Value::text(&meter, text.to_uppercase()),
        "lower" => Value::text(&meter, text.to_lowercase()),
        "capitalize" => Value::text(&meter, letters::capitalize(text)),
        "title" => Value::text(&meter, letters::title(text)),
        "swapcase" => Value::text(&meter, letters::swapcase(text)),
        "casefold" => Value::text(&meter, letters::casefold(text)),
        "isalnum" => all(letters::is_alnum),
        "isalpha" => all(letters::is_alpha),
        "isdecimal" => all(letters::is_decimal),
        "isdigit" => all(letters::is_digit),
        "isnumeric" => all(letters::is_numeric),
        "isspace" => all(is_blank),
        "isascii" => Ok(Value::Bool(text.is_ascii())),
        "isprintable" => Ok(Value::Bool(text.chars().all(write::is_printable))),
        "isidentifier" => Ok(Value::Bool(letters::is_identifier(text))),
        "islower" => Ok(Value::Bool(letters::is_lower(text))),
        "isupper" => Ok(Value::Bool(letters::is_upper(text))),
        "istitle" => Ok(Value::Bool(letters::is_titled(text))),
        "strip" | "lstrip" | "rstrip" => {
            Value::text(&meter, strip(&meter, text, optional_text(first, name)?, name)?)
        }
        "startswith" | "endswith" => {
            let window = window(text, second, third)?;
            let Some((_, window)) = window else { return Ok(Value::Bool(false)) };
            let has = |part: &Value| {
                let part = text_of(Some(part), name)?;
                // A longer one is not compared.
                meter.scan(if part.len() <= window.len() { part.len() } else { 0 })?;
                let starts = name == "startswith";
                Ok(if starts { window.starts_with(part) } else { window.ends_with(part) })
            };
            match first {
                Some(Value::Tuple(parts)) => {
                    for part in parts.iter() {
                        if has(part)? {
                            return Ok(Value::Bool(true));
                        }
                    }
                    Ok(Value::Bool(false))
                }
                Some(part) => has(part).map(Value::Bool),
                None => Err(Failure::new(format!("{name} takes a text"))),
            }
        }
        "find" | "rfind" | "index" | "rindex" => {
            let part = text_of(first, name)?;
            let found = window(text, second, third)?.and_then(|(from, window)| {
                let at = if name.starts_with('r') { window.rfind(part) } else { window.find(part) };
                at.map(|at| from + window[..at].chars().count())
            });
            match found {
                Some(at) => Ok(Value::count(at)),
                None if name.ends_with("find") => Ok(Value::int(-1)),
                None => Err(Failure::new("substring not found")),
            }
        }
        "count" => {
            let part = text_of(first, name)?;
            let Some((_, window)) = window(text, second, third)? else {
                return Ok(Value::count(0));
            };
            Ok(Value::count(if part.is_empty() {
                window.chars().count() + 1
            } else {
                window.matches(part).count()
            }))
        }
        "replace" => {
            let (old, new) = (text_of(first, name)?, text_of(second, name)?);
            let count = int_of(third, -1)?;
            Value::text(&meter, replace(&meter, text, old, new, count)?)
        }
        "join" => {
            let items = first.ok_or_else(|| Failure::new("join takes a list"))?;
            let mut out = Writer::new(&meter);
            for (index, item) in operate::items(&meter, items)?.iter().enumerate() {
                out.push_str(if index > 0 { text } else { "" })?;
                let item = item.as_str().ok_or_else(|| {
                    Failure::new(format!("join found a {} among texts", item.type_name()))
                })?;
                out.push_str(item)?;
            }
            Value::text(&meter, out.finish())
        }
        "partition" | "rpartition" => {
            let separator = text_of(first, name)?;
            if separator.is_empty() {
                return Err(Failure::new("empty separator"));
            }
            let last = name == "rpartition";
            let at = if last { text.rfind(separator) } else { text.find(separator) };
            let parts = match at {
                Some(at) => [&text[..at], separator, &text[at + separator.len()..]],
                None if last => ["", "", text],
                None => [text, "", ""],
            };
            let parts = parts.into_iter().map(|part| Value::text(&meter, part));
            Value::tuple(&meter, parts.collect::<Result<_, _>>()?)
        }
        "removeprefix" => {
            let part = text_of(first, name)?;
            Value::text(&meter, text.strip_prefix(part).unwrap_or(text))
        }
        "removesuffix" => {
            let part = text_of(first, name)?;
            Value::text(&meter, text.strip_suffix(part).unwrap_or(text))
        }
        "center" | "ljust" | "rjust" => {
            let first = first.ok_or_else(|| Failure::new(format!("{name} takes a width")))?;
            let fill = match second {
                None => ' ',
                Some(_) => {
                    let mut letters = text_of(second, name)?.chars();
                    match (letters.next(), letters.next()) {
                        (Some(fill), None) => fill,
                        _ => return Err(Failure::new("the fill character must be one")),
                    }
                }
            };
            let align = match name {
                "ljust" => Align::Left,
                "rjust" => Align::Right,
                _ => Align::Center,
            };
            justify(&meter, text, int_of(Some(first), 0)?, fill, align)
        }
        "zfill" => {
            let first = first.ok_or_else(|| Failure::new("zfill takes a width"))?;
            let width = usize::try_from(int_of(Some(first), 0)?.max(0)).unwrap_or(usize::MAX);
            let signed = text.starts_with(['+', '-']);
            let (sign, rest) = text.split_at(usize::from(signed));
            let mut out = Writer::new(&meter);
            digits::pad(&mut out, sign, rest, width, '0', Align::Sign)?;
            Value::text(&meter, out.finish())
        }
        _ => Err(Failure::new(format!("'str object' has no attribute {name:?}"))),
    }
}

/// `str.center` and the like.
pub(super) fn justify(
    meter: &Rc<Meter>,
    text: &str,
    width: i128,
    fill: char,
    align: Align,
) -> Result<Value, Failure> {
    let width = usize::try_from(width.max(0)).unwrap_or(usize::MAX);
    let mut out = Writer::new(meter);
    let len = text.chars().count();
    if align == Align::Center && width > len {
        // Python puts the odd one before the text if the width is odd.
        let missing = width - len;
        let before = missing / 2 + (missing & width & 1);
        let mut letter = [0; 4];
        let fill = &*fill.encode_utf8(&mut letter);
        out.repeat(fill, before)?;
        out.push_str(text)?;
        out.repeat(fill, missing - before)?;
    } else {
        digits::pad(&mut out, "", text, width, fill, align)?;
    }
    Value::text(meter, out.finish())
}

/// The part of `text` between two places, and where it begins.
fn window<'t>(
    text: &'t str,
    start: Option<&Value>,
    stop: Option<&Value>,
) -> Result<Option<(usize, &'t str)>, Failure> {
    let given = |value: Option<&Value>| match value {
        None | Some(Value::None) => Ok(None),
        Some(_) => int_of(value, 0).map(Some),
    };
    let (start, stop) = (given(start)?, given(stop)?);
    if start.is_none() && stop.is_none() {
        return Ok(Some((0, text)));
    }
    let len = text.chars().count() as i128;
    let clip = |bound: i128| (if bound < 0 { bound + len } else { bound }).max(0);
    let (start, stop) = (clip(start.unwrap_or(0)), clip(stop.unwrap_or(len)).min(len));
    if start > stop {
        return Ok(None);
    }
    let byte =
        |index: i128| text.char_indices().nth(index as usize).map_or(text.len(), |(at, _)| at);
    Ok(Some((start as usize, &text[byte(start)..byte(stop)])))
}

/// `str.strip` and its kind.
pub(super) fn strip<'t>(
    meter: &Rc<Meter>,
    text: &'t str,
    characters: Option<&str>,
    name: &str,
) -> Result<&'t str, Failure> {
    let mut wanted: Vec<char> = characters.unwrap_or("").chars().collect();
    meter.scan(wanted.len() * 8)?;
    wanted.sort_unstable();
    let goes = |character: char| match characters {
        None => is_blank(character),
        Some(_) => wanted.binary_search(&character).is_ok(),
    };
    Ok(match name {
        "lstrip" => text.trim_start_matches(goes),
        "rstrip" => text.trim_end_matches(goes),
        _ => text.trim_matches(goes),
    })
}

/// `str.replace`.
pub(super) fn replace(
    meter: &Rc<Meter>,
    text: &str,
    old: &str,
    new: &str,
    count: i128,
) -> Result<String, Failure> {
    let most = usize::try_from(count).unwrap_or(usize::MAX);
    let mut out = Writer::new(meter);
    let mut from = 0;
    for (at, found) in text.match_indices(old).take(most) {
        out.push_str(&text[from..at])?;
        out.push_str(new)?;
        from = at + found.len();
    }
    out.push_str(&text[from..])?;
    Ok(out.finish())
}

fn split(
    meter: &Rc<Meter>,
    text: &str,
    separator: Option<&str>,
    most: i128,
    from_right: bool,
) -> Result<Value, Failure> {
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    if separator.is_some_and(str::is_empty) {
        return Err(Failure::new("empty separator"));
    }
    let mut parts: Vec<Value> = Vec::new();
    let mut rest = text;
    loop {
        let found = match (separator, from_right) {
            (Some(separator), false) => rest.split_once(separator),
            (Some(separator), true) => rest.rsplit_once(separator).map(|(a, b)| (b, a)),
            (None, false) => {
                rest = rest.trim_start_matches(is_blank);
                rest.find(is_blank).map(|at| rest.split_at(at))
            }
            (None, true) => {
                rest = rest.trim_end_matches(is_blank);
                rest.char_indices()
                    .rfind(|(_, character)| is_blank(*character))
                    .map(|(at, blank)| (&rest[at + blank.len_utf8()..], &rest[..at]))
            }
        };
        if separator.is_none() && rest.is_empty() {
            break;
        }
        match found {
            Some((part, after)) if parts.len() < most => {
                parts.push(Value::text(meter, part)?);
                rest = after;
            }
            _ => {
                // What is left keeps its blanks but those before the split.
                let last = match (separator, from_right) {
                    (None, false) if found.is_none() => rest.trim_end_matches(is_blank),
                    (None, true) if found.is_none() => rest.trim_start_matches(is_blank),
                    _ => rest,
                };
                parts.push(Value::text(meter, last)?);
                break;
            }
        }
    }
    if from_right {
        parts.reverse();
    }
    Value::list(meter, parts)
}

fn expand_tabs(meter: &Rc<Meter>, text: &str, size: i128) -> Result<Value, Failure> {
    let size = usize::try_from(size.max(0)).unwrap_or(usize::MAX);
    let mut out = Writer::new(meter);
    let mut column = 0;
    for character in text.chars() {
        match character {
            '\t' if size == 0 => {}
            '\t' => {
                let blanks = size - column % size;
                out.repeat(" ", blanks)?;
                column += blanks;
            }
            '\n' | '\r' => {
                out.push(character)?;
                column = 0;
            }
            _ => {
                out.push(character)?;
                column += 1;
            }
        }
    }
    Value::text(meter, out.finish())
}
