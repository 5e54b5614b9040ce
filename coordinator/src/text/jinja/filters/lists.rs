//! Filters that pick from lists, sort and join them.

use std::cmp::Ordering;
use std::rc::Rc;

use super::super::evaluate::{Found, Given};
use super::super::meter::{Held, Meter};
use super::super::render::Renderer;
use super::super::syntax::BinaryOp;
use super::super::value::Value;
use super::super::{Failure, checks, operate, short};
use super::{int_argument, sort_by};

/// The filters here.
pub(super) const NAMES: [&str; 19] = [
    "batch",
    "dictsort",
    "first",
    "groupby",
    "join",
    "last",
    "list",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "reverse",
    "select",
    "selectattr",
    "slice",
    "sort",
    "sum",
    "unique",
];

/// Lists of one `slice` or `batch`.
const MAX_SLICES: usize = 10_000;

/// Bytes of the text that names an attribute: templates' have some twenty.
const MAX_ATTRIBUTE_BYTES: usize = 4096;

/// Parts of one attribute, and attributes that one `sort` goes by: templates have up to three.
const MAX_PARTS: usize = 64;

/// Bytes that `unique` takes for one item while it looks for equal ones: an entry of its table,
/// a list of one value, and the item's place in the outcome.
const UNIQUE_BYTES: usize = 160;

pub(super) fn call(
    renderer: &mut Renderer<'_>,
    name: &str,
    value: &Value,
    given: Given,
) -> Result<Value, Failure> {
    let meter = Rc::clone(&renderer.meter);
    let is_true = |value: &Option<Value>| value.as_ref().is_some_and(Value::is_true);
    match name {
        "list" => {
            given.bind(name, [])?;
            let items = operate::items(&meter, value)?;
            meter.spend(items.len())?;
            Value::list(&meter, items.items.clone())
        }
        "join" => {
            let [separator, attribute] = given.bind(name, ["d", "attribute"])?;
            let separator = match &separator {
                Some(separator) => operate::to_text(&meter, separator)?,
                None => String::new(),
            };
            let items = operate::items(&meter, value)?;
            let parts = Parts::of(attribute.as_ref())?;
            if parts.is_empty() {
                return super::join(&meter, &items, &separator);
            }
            let mut found = Vec::new();
            for item in items.iter() {
                found.push(parts.find(renderer, item, None)?);
            }
            super::join(&meter, &found, &separator)
        }
        "first" => {
            given.bind(name, [])?;
            if let Some(letter) = value.as_str().and_then(|text| text.chars().next()) {
                return Value::text(&meter, letter);
            }
            let items = operate::items(&meter, value)?;
            let none = || Value::undefined("No first item, sequence was empty.");
            Ok(items.first().cloned().unwrap_or_else(none))
        }
        "last" => {
            given.bind(name, [])?;
            check_reversible(value)?;
            if let Some(letter) = value.as_str().and_then(|text| text.chars().next_back()) {
                return Value::text(&meter, letter);
            }
            let items = operate::items(&meter, value)?;
            let none = || Value::undefined("No last item, sequence was empty.");
            Ok(items.last().cloned().unwrap_or_else(none))
        }
        "reverse" => {
            given.bind(name, [])?;
            if let Value::Text(text) = value {
                meter.scan(text.text.len() * 4)?;
                let turned: String = text.text.chars().rev().collect();
                return Value::marked(&meter, turned, text.safe);
            }
            let items = operate::items(&meter, value)?;
            meter.spend(items.len())?;
            let turned = items.iter().rev().cloned().collect();
            if check_reversible(value).is_ok() {
                Value::iterator(&meter, turned)
            } else {
                Value::list(&meter, turned)
            }
        }
        "sort" => {
            let names = ["reverse", "case_sensitive", "attribute"];
            let [reverse, case, attribute] = given.bind(name, names)?;
            let parts = Parts::several(attribute.as_ref())?;
            let mut keyed = Vec::new();
            for item in operate::items(&meter, value)?.iter() {
                let mut keys = Vec::with_capacity(parts.len());
                for parts in &parts {
                    let key = parts.find(renderer, item, None)?;
                    keys.push(if is_true(&case) { key } else { ignore_case(&meter, key)? });
                }
                keyed.push((Value::list(&meter, keys)?, item.clone()));
            }
            sort(&meter, &mut keyed, is_true(&reverse))?;
            Value::list(&meter, keyed.into_iter().map(|(_, item)| item).collect())
        }
        "dictsort" => {
            let [case, by, reverse] = given.bind(name, ["case_sensitive", "by", "reverse"])?;
            let Value::Dict(dict) = value else {
                return Err(Failure::new("dictsort takes a mapping"));
            };
            let by_value = match by.as_ref().map(Value::as_str) {
                None | Some(Some("key")) => false,
                Some(Some("value")) => true,
                _ => return Err(Failure::new("you can only sort by either \"key\" or \"value\"")),
            };
            let mut keyed = Vec::new();
            for (key, value) in &dict.entries {
                let by = if by_value { value } else { key }.clone();
                let by = if is_true(&case) { by } else { ignore_case(&meter, by)? };
                keyed.push((by, Value::tuple(&meter, vec![key.clone(), value.clone()])?));
            }
            sort(&meter, &mut keyed, is_true(&reverse))?;
            Value::list(&meter, keyed.into_iter().map(|(_, item)| item).collect())
        }
        "unique" => {
            let [case, attribute] = given.bind(name, ["case_sensitive", "attribute"])?;
            let parts = Parts::of(attribute.as_ref())?;
            let items = operate::items(&meter, value)?;
            let bytes = items.len().saturating_mul(UNIQUE_BYTES);
            // Held while the table is there: the values made meanwhile come on top.
            let _table = Held::share(&meter, bytes, ())?;
            let mut seen: std::collections::HashMap<u64, Vec<Value>> = Default::default();
            let mut unique = Vec::new();
            for item in items.iter() {
                let key = parts.find(renderer, item, None)?;
                let key = if is_true(&case) { key } else { ignore_case(&meter, key)? };
                let alike = seen.entry(key.hash(&meter)?).or_default();
                let mut known = false;
                for other in alike.iter() {
                    known = known || operate::is_equal(&meter, other, &key)?;
                }
                if !known {
                    alike.push(key);
                    unique.push(item.clone());
                }
            }
            Value::iterator(&meter, unique)
        }
        "min" | "max" => {
            let [case, attribute] = given.bind(name, ["case_sensitive", "attribute"])?;
            let parts = Parts::of(attribute.as_ref())?;
            let wanted = if name == "min" { Ordering::Less } else { Ordering::Greater };
            let mut best: Option<(Value, Value)> = None;
            for item in operate::items(&meter, value)?.iter() {
                let key = parts.find(renderer, item, None)?;
                let key = if is_true(&case) { key } else { ignore_case(&meter, key)? };
                let better = match &best {
                    None => true,
                    Some((other, _)) => operate::compare(&meter, &key, other)? == Some(wanted),
                };
                if better {
                    best = Some((key, item.clone()));
                }
            }
            let none = || Value::undefined("No aggregated item, sequence was empty.");
            Ok(best.map_or_else(none, |(_, item)| item))
        }
        "sum" => {
            let [attribute, start] = given.bind(name, ["attribute", "start"])?;
            let parts = Parts::of(attribute.as_ref())?;
            let mut total = start.unwrap_or(Value::int(0));
            if total.as_str().is_some() {
                return Err(Failure::new("sum() can't sum strings"));
            }
            for item in operate::items(&meter, value)?.iter() {
                let item = parts.find(renderer, item, None)?;
                total = operate::binary(&meter, BinaryOp::Add, &total, &item)?;
            }
            Ok(total)
        }
        "groupby" => group_by(renderer, value, given),
        "map" => map(renderer, value, given),
        "select" | "reject" | "selectattr" | "rejectattr" => select(renderer, name, value, given),
        "slice" => slice(&meter, value, given),
        "batch" => batch(&meter, value, given),
        _ => Err(Failure::new(format!("No filter named {name:?}."))),
    }
}

fn check_reversible(value: &Value) -> Result<(), Failure> {
    use super::super::value::Object;
    let turns = match value {
        Value::Text(_) | Value::List(_) | Value::Tuple(_) | Value::Dict(_) => true,
        Value::Object(object) => matches!(&***object, Object::Range(_) | Object::View { .. }),
        // Nothing to turn round, and Jinja2's undefined has a length and items by number.
        _ => false,
    };
    let kind = value.type_name();
    if turns { Ok(()) } else { Err(Failure::new(format!("{kind:?} object is not reversible"))) }
}

fn ignore_case(meter: &Rc<Meter>, value: Value) -> Result<Value, Failure> {
    match &value {
        Value::Text(text) => {
            meter.scan(text.text.len())?;
            Value::text(meter, text.text.to_lowercase())
        }
        _ => Ok(value),
    }
}

/// Stable in both directions, as Python's is.
fn sort(meter: &Rc<Meter>, keyed: &mut [(Value, Value)], reverse: bool) -> Result<(), Failure> {
    if reverse {
        keyed.reverse();
    }
    sort_by(meter, keyed, |entry| &entry.0)?;
    if reverse {
        keyed.reverse();
    }
    Ok(())
}

/// Refuses an attribute's text that is longer than any template's, before it is split.
fn check_attribute(text: &str) -> Result<(), Failure> {
    if text.len() > MAX_ATTRIBUTE_BYTES {
        let message = format!("an attribute had more than {MAX_ATTRIBUTE_BYTES} bytes");
        return Err(Failure::Limit(message));
    }
    Ok(())
}

/// Refuses an attribute of too many parts, before it is split.
fn check_parts(text: &str, separator: char) -> Result<(), Failure> {
    if text.matches(separator).count() >= MAX_PARTS {
        return Err(Failure::Limit(format!("an attribute had more than {MAX_PARTS} parts")));
    }
    Ok(())
}

/// `a.b.0`: the way to a part of an item.
struct Parts(Vec<Part>);

enum Part {
    Name(String),
    Key(Value),
}

impl Parts {
    fn of(attribute: Option<&Value>) -> Result<Self, Failure> {
        Ok(match attribute {
            None | Some(Value::None) => Self(Vec::new()),
            Some(Value::Text(text)) => {
                check_attribute(&text.text)?;
                Self::read(&text.text)?
            }
            Some(other) => Self(vec![Part::Key(other.clone())]),
        })
    }

    fn read(text: &str) -> Result<Self, Failure> {
        check_parts(text, '.')?;
        let part = |part: &str| match part.parse::<u64>() {
            Ok(index) if part.bytes().all(|byte| byte.is_ascii_digit()) => {
                Part::Key(Value::int(index))
            }
            _ => Part::Name(part.to_owned()),
        };
        Ok(Self(text.split('.').map(part).collect()))
    }

    /// Several ways with commas between them.
    fn several(attribute: Option<&Value>) -> Result<Vec<Self>, Failure> {
        match attribute {
            Some(Value::Text(text)) => {
                check_attribute(&text.text)?;
                check_parts(&text.text, ',')?;
                text.text.split(',').map(Self::read).collect()
            }
            other => Ok(vec![Self::of(other)?]),
        }
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn find(
        &self,
        renderer: &mut Renderer<'_>,
        item: &Value,
        default: Option<&Value>,
    ) -> Result<Value, Failure> {
        let mut found = item.clone();
        for part in &self.0 {
            renderer.meter.spend(1)?;
            found = match part {
                Part::Name(name) => {
                    let name = renderer.text(name.as_str())?;
                    renderer.item_value(&found, &name)?
                }
                Part::Key(key) => renderer.item_value(&found, key)?,
            };
            if let (true, Some(default)) = (found.is_undefined(), default) {
                found = default.clone();
            }
        }
        Ok(found)
    }
}

/// `value | attr(name)`: attributes and no items.
pub(super) fn attr(
    renderer: &mut Renderer<'_>,
    value: &Value,
    name: &str,
) -> Result<Value, Failure> {
    if value.is_undefined() {
        return renderer.attribute_value(value, name);
    }
    if let Value::Dict(_) = value {
        // Only its methods: what lies under a key is no attribute.
        if let Found::Method = renderer.attribute(value, name)? {
            return renderer.attribute_value(value, name);
        }
        let name = short(name);
        return Ok(Value::undefined(format!("'dict object' has no attribute {name:?}")));
    }
    renderer.attribute_value(value, name)
}

fn given_text(given: &mut Given) -> Option<String> {
    if given.positional.is_empty() {
        return None;
    }
    match given.positional.remove(0) {
        Value::Text(text) => Some(text.text.clone()),
        _ => None,
    }
}

fn copy_of(renderer: &Renderer<'_>, given: &Given) -> Result<Given, Failure> {
    renderer.meter.spend(given.positional.len() + given.keyword.len())?;
    Ok(Given { positional: given.positional.clone(), keyword: given.keyword.clone() })
}

fn map(renderer: &mut Renderer<'_>, value: &Value, mut given: Given) -> Result<Value, Failure> {
    let meter = Rc::clone(&renderer.meter);
    let by_attribute =
        given.positional.is_empty() && given.keyword.iter().any(|(name, _)| &**name == "attribute");
    let items = operate::items(&meter, value)?;
    let mut mapped = Vec::new();
    if by_attribute {
        let [attribute, default] = given.bind("map", ["attribute", "default"])?;
        let parts = Parts::of(attribute.as_ref())?;
        let default = default.filter(|default| !matches!(default, Value::None));
        for item in items.iter() {
            mapped.push(parts.find(renderer, item, default.as_ref())?);
        }
    } else {
        let name = given_text(&mut given);
        let name = name.ok_or_else(|| Failure::new("map requires a filter argument"))?;
        for item in items.iter() {
            let given = copy_of(renderer, &given)?;
            mapped.push(super::call(renderer, &name, item.clone(), given)?);
        }
    }
    Value::iterator(&meter, mapped)
}

fn select(
    renderer: &mut Renderer<'_>,
    name: &str,
    value: &Value,
    mut given: Given,
) -> Result<Value, Failure> {
    let meter = Rc::clone(&renderer.meter);
    let items = operate::items(&meter, value)?;
    let parts = if name.ends_with("attr") {
        if given.positional.is_empty() {
            return Err(Failure::new("Missing parameter for attribute name"));
        }
        Parts::of(Some(&given.positional.remove(0)))?
    } else {
        Parts(Vec::new())
    };
    let test = if given.positional.is_empty() {
        None
    } else {
        Some(given_text(&mut given).ok_or_else(|| Failure::new("a test's name must be a text"))?)
    };
    let wanted = name.starts_with("select");
    let mut picked = Vec::new();
    for item in items.iter() {
        let found = parts.find(renderer, item, None)?;
        let passes = match &test {
            None => found.is_true(),
            Some(test) => {
                let given = copy_of(renderer, &given)?;
                checks::holds(renderer, test, &found, given)?
            }
        };
        if passes == wanted {
            picked.push(item.clone());
        }
    }
    Value::iterator(&meter, picked)
}

fn group_by(renderer: &mut Renderer<'_>, value: &Value, given: Given) -> Result<Value, Failure> {
    let meter = Rc::clone(&renderer.meter);
    let names = ["attribute", "default", "case_sensitive"];
    let [attribute, default, case] = given.bind("groupby", names)?;
    if attribute.is_none() {
        return Err(Failure::new("groupby takes an attribute"));
    }
    let parts = Parts::of(attribute.as_ref())?;
    let case = case.is_some_and(|case| case.is_true());
    let default = default.filter(|default| !matches!(default, Value::None));
    let mut keyed = Vec::new();
    for item in operate::items(&meter, value)?.iter() {
        let key = parts.find(renderer, item, default.as_ref())?;
        keyed.push((if case { key } else { ignore_case(&meter, key)? }, item.clone()));
    }
    sort(&meter, &mut keyed, false)?;
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for (key, item) in keyed {
        match groups.last_mut() {
            Some((last, items)) if operate::is_equal(&meter, last, &key)? => items.push(item),
            _ => groups.push((key, vec![item])),
        }
    }
    let mut out = Vec::with_capacity(groups.len());
    for (key, items) in groups {
        let key = match (case, items.first()) {
            (false, Some(first)) => parts.find(renderer, first, default.as_ref())?,
            _ => key,
        };
        let list = Value::list(&meter, items)?;
        out.push(Value::group(&meter, key, list)?);
    }
    Value::list(&meter, out)
}

fn small_count(value: Option<&Value>, what: &str) -> Result<usize, Failure> {
    let count = int_argument(value, 0)?;
    let count = usize::try_from(count).ok().filter(|&count| count > 0 && count <= MAX_SLICES);
    count.ok_or_else(|| Failure::new(format!("{what} takes a count up to {MAX_SLICES}")))
}

fn slice(meter: &Rc<Meter>, value: &Value, given: Given) -> Result<Value, Failure> {
    let [slices, fill] = given.bind("slice", ["slices", "fill_with"])?;
    let slices = small_count(slices.as_ref(), "slice")?;
    let fill = fill.filter(|fill| !matches!(fill, Value::None));
    let items = operate::items(meter, value)?;
    let (each, extra) = (items.len() / slices, items.len() % slices);
    let mut out = Vec::with_capacity(slices);
    let mut from = 0;
    for index in 0..slices {
        let len = each + usize::from(index < extra);
        meter.spend(1 + len)?;
        let mut part = items[from..from + len].to_vec();
        from += len;
        if index >= extra {
            part.extend(fill.clone());
        }
        out.push(Value::list(meter, part)?);
    }
    Value::iterator(meter, out)
}

fn batch(meter: &Rc<Meter>, value: &Value, given: Given) -> Result<Value, Failure> {
    let [count, fill] = given.bind("batch", ["linecount", "fill_with"])?;
    let count = small_count(count.as_ref(), "batch")?;
    let fill = fill.filter(|fill| !matches!(fill, Value::None));
    let mut out = Vec::new();
    for part in operate::items(meter, value)?.chunks(count) {
        let mut part = part.to_vec();
        meter.spend(1 + count)?;
        if let Some(fill) = &fill {
            part.resize(count, fill.clone());
        }
        out.push(Value::list(meter, part)?);
    }
    Value::iterator(meter, out)
}
