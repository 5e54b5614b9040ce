//! Items, places and lengths of values.

use std::rc::Rc;

use super::super::Failure;
use super::super::meter::{Held, Meter, Writer};
use super::super::value::{Items, Object, Range, Value, View, share_items};
use super::too_large;

/// Pays for a new list of `len` items before it is made, and checks that there is memory for it.
pub(super) fn charge_items(meter: &Meter, len: usize) -> Result<(), Failure> {
    meter.spend(1 + len / 2)?;
    if len > MAX_ITEMS {
        return Err(Failure::Limit(format!("a list had more than {MAX_ITEMS} items")));
    }
    meter.room(len * size_of::<Value>())
}

/// Items of one list, of three words each.
const MAX_ITEMS: usize = 1 << 20;

/// What iterating over a value gives.
///
/// # Errors
///
/// If it cannot be iterated over.
pub(in super::super) fn items(
    meter: &Rc<Meter>,
    value: &Value,
) -> Result<Rc<Held<Items>>, Failure> {
    let made = match value {
        Value::List(items) | Value::Tuple(items) => return Ok(Rc::clone(items)),
        Value::Undefined(_) => Vec::new(),
        Value::Text(text) => {
            meter.scan(text.text.len())?;
            charge_items(meter, text.text.chars().count())?;
            let letters = text.text.chars();
            letters.map(|letter| Value::text(meter, letter)).collect::<Result<_, _>>()?
        }
        Value::Dict(dict) => {
            charge_items(meter, dict.entries.len())?;
            dict.entries.iter().map(|entry| entry.0.clone()).collect()
        }
        Value::Object(object) => match &***object {
            Object::Range(range) => {
                charge_items(meter, range.len)?;
                (0..range.len).map(|index| Value::int(range.at(index))).collect()
            }
            Object::View { kind, dict } => {
                charge_items(meter, dict.entries.len())?;
                let entries = dict.entries.iter();
                match kind {
                    View::Keys => entries.map(|entry| entry.0.clone()).collect(),
                    View::Values => entries.map(|entry| entry.1.clone()).collect(),
                    View::Items => entries
                        .map(|(key, value)| Value::tuple(meter, vec![key.clone(), value.clone()]))
                        .collect::<Result<_, _>>()?,
                }
            }
            Object::Iterator { items, next } => {
                let from = next.replace(items.len());
                if from == 0 {
                    return Ok(Rc::clone(items));
                }
                charge_items(meter, items.len() - from)?;
                items[from..].to_vec()
            }
            _ => return Err(not_iterable(value)),
        },
        _ => return Err(not_iterable(value)),
    };
    share_items(meter, made)
}

fn not_iterable(value: &Value) -> Failure {
    Failure::new(format!("{:?} object is not iterable", value.type_name()))
}

/// Whether a value can be iterated over.
pub(in super::super) fn is_iterable(value: &Value) -> bool {
    match value {
        Value::Undefined(_)
        | Value::Text(_)
        | Value::List(_)
        | Value::Tuple(_)
        | Value::Dict(_) => true,
        Value::Object(object) => matches!(
            &***object,
            Object::Range(_) | Object::View { .. } | Object::Iterator { .. } | Object::Loop(_)
        ),
        _ => false,
    }
}

/// `len(value)`; `None` if it has none.
pub(in super::super) fn length(meter: &Meter, value: &Value) -> Result<Option<usize>, Failure> {
    Ok(Some(match value {
        Value::Undefined(_) => 0,
        Value::Text(text) => {
            meter.scan(text.text.len())?;
            text.text.chars().count()
        }
        Value::List(items) | Value::Tuple(items) => items.len(),
        Value::Dict(dict) => dict.entries.len(),
        Value::Object(object) => match &***object {
            Object::Range(range) => range.len,
            Object::View { dict, .. } => dict.entries.len(),
            Object::Loop(state) => state.items.len(),
            _ => return Ok(None),
        },
        _ => return Ok(None),
    }))
}

/// `value[key]`; `None` if Python raises an error there, which makes it undefined.
pub(in super::super) fn item(
    meter: &Rc<Meter>,
    value: &Value,
    key: &Value,
) -> Result<Option<Value>, Failure> {
    let place = |len: usize| {
        let index = key.as_int()?;
        let index = if index < 0 { index + len as i128 } else { index };
        usize::try_from(index).ok().filter(|&index| index < len)
    };
    Ok(match value {
        Value::List(items) | Value::Tuple(items) => {
            place(items.len()).map(|index| items[index].clone())
        }
        Value::Dict(dict) => match key {
            // An unhashable key is a type error, which is taken for a missing one.
            Value::List(_) | Value::Dict(_) => None,
            _ => dict.get(meter, key)?.cloned(),
        },
        Value::Text(text) => {
            if key.as_int().is_none() {
                return Ok(None);
            }
            let len = length(meter, value)?.unwrap_or(0);
            let found = place(len).and_then(|index| text.text.chars().nth(index));
            found.map(|found| Value::marked(meter, found, text.safe)).transpose()?
        }
        Value::Object(object) => match &***object {
            Object::Range(range) => place(range.len).map(|index| Value::int(range.at(index))),
            _ => None,
        },
        _ => None,
    })
}

/// `value[start:stop:step]`; `None` if it cannot be sliced.
pub(in super::super) fn slice(
    meter: &Rc<Meter>,
    value: &Value,
    bounds: [&Value; 3],
) -> Result<Option<Value>, Failure> {
    let Some(len) = (match value {
        Value::List(_) | Value::Tuple(_) | Value::Text(_) => length(meter, value)?,
        Value::Object(object) => match &***object {
            Object::Range(range) => Some(range.len),
            _ => None,
        },
        _ => None,
    }) else {
        return Ok(None);
    };
    let mut numbers = [None; 3];
    for (number, bound) in numbers.iter_mut().zip(bounds) {
        if !matches!(bound, Value::None) {
            let Some(bound) = bound.as_int() else { return Ok(None) };
            *number = Some(bound);
        }
    }
    let step = numbers[2].unwrap_or(1);
    if step == 0 {
        return Err(Failure::new("slice step cannot be zero"));
    }
    let len = len as i128;
    // As CPython's PySlice_AdjustIndices.
    let clip = |bound: i128| {
        let bound = if bound < 0 { bound.saturating_add(len) } else { bound };
        if step < 0 { bound.clamp(-1, len - 1) } else { bound.clamp(0, len) }
    };
    let start = numbers[0].map_or(if step < 0 { len - 1 } else { 0 }, clip);
    let stop = numbers[1].map_or(if step < 0 { -1 } else { len }, clip);
    let distance = if step < 0 { start - stop } else { stop - start };
    let stride = step.unsigned_abs();
    let count = if distance <= 0 { 0 } else { (distance as u128).div_ceil(stride) };
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    // The last one lies inside, so nothing here overflows.
    let at = |index: usize| usize::try_from(start + step * index as i128).unwrap_or(0);
    let pick = |items: &Items| {
        charge_items(meter, count)?;
        Ok::<_, Failure>((0..count).map(|index| items[at(index)].clone()).collect::<Vec<_>>())
    };
    Ok(Some(match value {
        Value::List(items) => Value::list(meter, pick(items)?)?,
        Value::Tuple(items) => Value::tuple(meter, pick(items)?)?,
        Value::Text(text) => {
            let mut out = Writer::new(meter);
            if step == 1 {
                let from = byte_of(&text.text, at(0).min(len as usize));
                let part = &text.text[from..];
                out.push_str(&part[..byte_of(part, count)])?;
            } else {
                meter.spend(1 + len as usize / 2)?;
                meter.room(len as usize * size_of::<char>())?;
                let letters: Vec<char> = text.text.chars().collect();
                for index in 0..count {
                    out.push(letters[at(index)])?;
                }
            }
            Value::marked(meter, out.finish(), text.safe)?
        }
        Value::Object(object) => match &***object {
            Object::Range(range) => {
                let step = range.step.saturating_mul(step);
                // The number after the last one may be beyond what an integer can be.
                let place = |index: i128| {
                    let offset = range.step.checked_mul(index)?;
                    range.start.checked_add(offset)
                };
                let first = place(start).ok_or_else(too_large)?;
                let stop = place(stop).ok_or_else(too_large)?;
                let range = Range { start: first, stop, step, len: count };
                Value::object(meter, Object::Range(range))?
            }
            _ => return Ok(None),
        },
        _ => return Ok(None),
    }))
}

/// Where the character number `index` begins, or the text ends.
fn byte_of(text: &str, index: usize) -> usize {
    text.char_indices().nth(index).map_or(text.len(), |(at, _)| at)
}
