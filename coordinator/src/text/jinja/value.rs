//! Python's values as templates see them. All but namespaces are immutable, as in the immutable
//! sandbox; each knows how deep it is, so that nothing that walks one runs out of stack.

use std::cell::{Cell, RefCell};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use super::meter::{Held, Meter};
use super::{Failure, operate};

/// Levels that a value may have: half as many again as JSON that clients send.
pub(super) const MAX_HEIGHT: u16 = 192;

/// An integer, packed so that a [`Value`] stays three words long.
#[derive(Clone, Copy, Debug)]
#[repr(Rust, packed(8))]
pub(super) struct Packed(i128);

/// A value.
#[derive(Clone, Debug)]
pub(super) enum Value {
    /// What a name stands for that nothing was given to, with Jinja2's words for it.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(Packed),
    Float(f64),
    Text(Rc<Held<Text>>),
    List(Rc<Held<Items>>),
    Tuple(Rc<Held<Items>>),
    Dict(Rc<Held<Dict>>),
    Object(Rc<Held<Object>>),
}

/// A text.
#[derive(Debug)]
pub(super) struct Text {
    pub(super) text: String,
    /// Marked as safe HTML (`Markup`).
    pub(super) safe: bool,
}

/// The items of a list or tuple.
#[derive(Debug)]
pub(super) struct Items {
    pub(super) items: Vec<Value>,
    height: u16,
    /// A pair of `groupby`, whose parts have the names `grouper` and `list`.
    pub(super) is_group: bool,
}

impl std::ops::Deref for Items {
    type Target = [Value];

    fn deref(&self) -> &[Value] {
        &self.items
    }
}

/// Keys and values in the order in which they came.
#[derive(Debug)]
pub(super) struct Dict {
    pub(super) entries: Vec<(Value, Value)>,
    /// Hash and place of each key, sorted; only of dicts that are long enough to need it.
    index: Vec<(u64, usize)>,
    height: u16,
}

/// Bytes that an entry of a dict takes while the dict is made: itself, and its place in two
/// indices, the one that finds equal keys and the one that is kept.
const DICT_ENTRY_BYTES: usize = size_of::<(Value, Value)>() + 2 * size_of::<(u64, usize)>();

/// Entries of a dict that are looked through one by one.
const SMALL_DICT: usize = 8;

/// What else a value may be.
#[derive(Debug)]
pub(super) enum Object {
    /// `namespace()`: the only value that changes.
    Namespace(RefCell<Vec<(Rc<str>, Value)>>),
    /// `range()`.
    Range(Range),
    /// What a generator or iterator has left.
    Iterator { items: Rc<Held<Items>>, next: Cell<usize> },
    /// `dict.items()` and the like.
    View { kind: View, dict: Rc<Held<Dict>> },
    /// A method with its object, not called yet.
    Method { object: Value, name: Rc<str> },
    /// A function that is always there.
    Function(Function),
    /// `{% macro %}` or the body of `{% call %}`.
    Macro(Macro),
    /// `loop`.
    Loop(Loop),
    /// `cycler()`.
    Cycler { items: Rc<Held<Items>>, at: Cell<usize> },
    /// `joiner()`.
    Joiner { separator: Value, used: Cell<bool> },
}

/// What a view shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum View {
    Keys,
    Values,
    Items,
}

/// `range(start, stop, step)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: i128,
    pub(super) stop: i128,
    pub(super) step: i128,
    pub(super) len: usize,
}

impl Range {
    pub(super) fn at(self, index: usize) -> i128 {
        self.start + self.step * index as i128
    }
}

/// The functions that are always there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Function {
    Range,
    Dict,
    Namespace,
    Cycler,
    Joiner,
    RaiseException,
    StrftimeNow,
}

/// A macro and where it was made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Macro {
    /// Which of the template's macros.
    pub(super) index: usize,
    pub(super) scope: ScopeId,
}

/// A scope on the stack of scopes; its serial number tells whether it is still there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ScopeId {
    pub(super) at: usize,
    pub(super) serial: u64,
}

/// The state of a loop.
#[derive(Debug)]
pub(super) struct Loop {
    pub(super) items: Rc<Held<Items>>,
    pub(super) index0: Cell<usize>,
    pub(super) depth0: usize,
    /// Which of the template's loops and where it stands, if it may call itself.
    pub(super) recursive: Option<(usize, ScopeId)>,
    /// What `changed` was last asked.
    pub(super) asked: RefCell<Option<Vec<Value>>>,
}

impl Value {
    pub(super) fn int(value: impl Into<i128>) -> Self {
        Self::Int(Packed(value.into()))
    }

    /// A count; none is beyond an integer's range.
    pub(super) fn count(value: usize) -> Self {
        Self::Int(Packed(value as i128))
    }

    pub(super) fn text(meter: &Rc<Meter>, text: impl Into<String>) -> Result<Self, Failure> {
        Self::marked(meter, text, false)
    }

    pub(super) fn marked(
        meter: &Rc<Meter>,
        text: impl Into<String>,
        safe: bool,
    ) -> Result<Self, Failure> {
        let text = text.into();
        Ok(Self::Text(Held::share(meter, text.capacity(), Text { text, safe })?))
    }

    pub(super) fn list(meter: &Rc<Meter>, items: Vec<Self>) -> Result<Self, Failure> {
        Ok(Self::List(share_items(meter, items)?))
    }

    pub(super) fn tuple(meter: &Rc<Meter>, items: Vec<Self>) -> Result<Self, Failure> {
        Ok(Self::Tuple(share_items(meter, items)?))
    }

    /// A pair of `groupby`.
    pub(super) fn group(meter: &Rc<Meter>, key: Self, list: Self) -> Result<Self, Failure> {
        let height = above(key.height().max(list.height()))?;
        let items = Items { items: vec![key, list], height, is_group: true };
        Ok(Self::Tuple(Held::share(meter, 2 * size_of::<Self>(), items)?))
    }

    /// A generator that gives `items`, once.
    pub(super) fn iterator(meter: &Rc<Meter>, items: Vec<Self>) -> Result<Self, Failure> {
        let items = share_items(meter, items)?;
        Self::object(meter, Object::Iterator { items, next: Cell::new(0) })
    }

    pub(super) fn object(meter: &Rc<Meter>, object: Object) -> Result<Self, Failure> {
        Ok(Self::Object(Held::share(meter, 0, object)?))
    }

    /// A dict; of equal keys the first stays and the last one's value.
    pub(super) fn dict(meter: &Rc<Meter>, entries: Vec<(Self, Self)>) -> Result<Self, Failure> {
        Ok(Self::Dict(share_dict(meter, entries)?))
    }

    pub(super) fn undefined(words: impl Into<Rc<str>>) -> Self {
        Self::Undefined(words.into())
    }

    pub(super) fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(&text.text),
            _ => None,
        }
    }

    pub(super) fn is_undefined(&self) -> bool {
        matches!(self, Self::Undefined(_))
    }

    /// The integer that an integer or truth value is.
    pub(super) fn as_int(&self) -> Option<i128> {
        match self {
            Self::Int(value) => Some(value.0),
            Self::Bool(value) => Some((*value).into()),
            _ => None,
        }
    }

    /// The number that a number or truth value is.
    pub(super) fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            _ => self.as_int().map(|value| value as f64),
        }
    }

    /// The name of the value's type.
    pub(super) fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Text(text) if text.safe => "Markup",
            Self::Text(_) => "str",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Dict(_) => "dict",
            Self::Object(object) => match &***object {
                Object::Namespace(_) => "Namespace",
                Object::Range(_) => "range",
                Object::Iterator { .. } => "generator",
                Object::View { kind: View::Keys, .. } => "dict_keys",
                Object::View { kind: View::Values, .. } => "dict_values",
                Object::View { kind: View::Items, .. } => "dict_items",
                Object::Method { .. } => "builtin_function_or_method",
                Object::Function(_) => "function",
                Object::Macro(_) => "Macro",
                Object::Loop(_) => "LoopContext",
                Object::Cycler { .. } => "Cycler",
                Object::Joiner { .. } => "Joiner",
            },
        }
    }

    /// Whether it counts as true.
    pub(super) fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(value) => *value,
            Self::Int(value) => value.0 != 0,
            Self::Float(value) => *value != 0.0,
            Self::Text(text) => !text.text.is_empty(),
            Self::List(items) | Self::Tuple(items) => !items.is_empty(),
            Self::Dict(dict) => !dict.entries.is_empty(),
            Self::Object(object) => match &***object {
                Object::Range(range) => range.len > 0,
                Object::View { dict, .. } => !dict.entries.is_empty(),
                Object::Loop(state) => !state.items.is_empty(),
                _ => true,
            },
        }
    }

    /// Levels of values inside values. A namespace counts as none: the renderer holds every
    /// namespace until the end and then empties them one by one.
    fn height(&self) -> u16 {
        match self {
            Self::List(items) | Self::Tuple(items) => items.height,
            Self::Dict(dict) => dict.height,
            Self::Object(object) => match &***object {
                Object::Iterator { items, .. } | Object::Cycler { items, .. } => items.height + 1,
                Object::Loop(state) => state.items.height + 1,
                Object::View { dict, .. } => dict.height + 1,
                Object::Method { object, .. } => object.height() + 1,
                _ => 0,
            },
            _ => 0,
        }
    }

    /// The same value, not only an equal one.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::None, Self::None) => true,
            (Self::Bool(a), Self::Bool(b)) => a == b,
            (Self::Int(a), Self::Int(b)) => a.0 == b.0,
            (Self::Text(a), Self::Text(b)) => Rc::ptr_eq(a, b) || a.text == b.text,
            (Self::List(a), Self::List(b)) => Rc::ptr_eq(a, b),
            (Self::Tuple(a), Self::Tuple(b)) => Rc::ptr_eq(a, b),
            (Self::Dict(a), Self::Dict(b)) => Rc::ptr_eq(a, b),
            (Self::Object(a), Self::Object(b)) => Rc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// A hash under which equal values are equal.
    ///
    /// # Errors
    ///
    /// For values that Python does not hash.
    pub(super) fn hash(&self, meter: &Meter) -> Result<u64, Failure> {
        let mut hasher = DefaultHasher::new();
        self.hash_into(meter, &mut hasher)?;
        Ok(hasher.finish())
    }

    fn hash_into(&self, meter: &Meter, hasher: &mut DefaultHasher) -> Result<(), Failure> {
        meter.spend(1)?;
        match self {
            Self::Undefined(_) => 2_u8.hash(hasher),
            Self::None => 3_u8.hash(hasher),
            Self::Text(text) => {
                meter.scan(text.text.len())?;
                text.text.hash(hasher);
            }
            Self::Tuple(items) => {
                for item in items.iter() {
                    item.hash_into(meter, hasher)?;
                }
            }
            Self::Float(value) => match operate::exact_int(*value) {
                Some(value) => Some(value).hash(hasher),
                None => value.to_bits().hash(hasher),
            },
            Self::Bool(_) | Self::Int(_) => self.as_int().hash(hasher),
            Self::Object(object) => Rc::as_ptr(object).hash(hasher),
            Self::List(_) | Self::Dict(_) => {
                return Err(Failure::new(format!("unhashable type: {:?}", self.type_name())));
            }
        }
        Ok(())
    }
}

impl Hash for Packed {
    fn hash<H: Hasher>(&self, state: &mut H) {
        { self.0 }.hash(state);
    }
}

fn above(height: u16) -> Result<u16, Failure> {
    if height < MAX_HEIGHT {
        Ok(height + 1)
    } else {
        Err(Failure::Limit(format!("a value had more than {MAX_HEIGHT} levels")))
    }
}

/// Shares the items of a list, tuple or iterator.
pub(super) fn share_items(
    meter: &Rc<Meter>,
    items: Vec<Value>,
) -> Result<Rc<Held<Items>>, Failure> {
    meter.spend(1 + items.len() / 8)?;
    let height = above(items.iter().map(Value::height).max().unwrap_or(0))?;
    let bytes = items.capacity() * size_of::<Value>();
    Held::share(meter, bytes, Items { items, height, is_group: false })
}

/// Shares a dict's entries.
pub(super) fn share_dict(
    meter: &Rc<Meter>,
    entries: Vec<(Value, Value)>,
) -> Result<Rc<Held<Dict>>, Failure> {
    let mut dict = Dict { entries: Vec::new(), index: Vec::new(), height: 0 };
    meter.room(entries.len().saturating_mul(DICT_ENTRY_BYTES))?;
    let mut hashed = Vec::with_capacity(entries.len());
    for (place, (key, _)) in entries.iter().enumerate() {
        hashed.push((key.hash(meter)?, place));
    }
    // Equal keys have equal hashes, and the sort keeps the order of those.
    hashed.sort_unstable();
    let mut entries: Vec<Option<(Value, Value)>> = entries.into_iter().map(Some).collect();
    for start in 0..hashed.len() {
        let (hash, first) = hashed[start];
        // One that an earlier one took in has no equals left: without this, many equal keys would
        // be walked through once for each of them.
        if entries[first].is_none() {
            continue;
        }
        for &(_, later) in hashed[start + 1..].iter().take_while(|other| other.0 == hash) {
            meter.spend(1)?;
            let (Some(kept), Some(other)) = (&entries[first], &entries[later]) else { continue };
            if operate::is_equal(meter, &kept.0, &other.0)? {
                let newer = entries[later].take();
                if let (Some(kept), Some(newer)) = (&mut entries[first], newer) {
                    kept.1 = newer.1;
                }
            }
        }
    }
    dict.entries = entries.into_iter().flatten().collect();
    dict.entries.shrink_to_fit();
    let tallest = dict.entries.iter().map(|(key, value)| key.height().max(value.height())).max();
    dict.height = above(tallest.unwrap_or(0))?;
    if dict.entries.len() > SMALL_DICT {
        for (place, (key, _)) in dict.entries.iter().enumerate() {
            dict.index.push((key.hash(meter)?, place));
        }
        dict.index.sort_unstable();
    }
    let bytes = dict.entries.capacity() * size_of::<(Value, Value)>()
        + dict.index.capacity() * size_of::<(u64, usize)>();
    Held::share(meter, bytes, dict)
}

impl Dict {
    /// The value of `key`.
    ///
    /// # Errors
    ///
    /// If a dict cannot have such a key.
    pub(super) fn get(&self, meter: &Meter, key: &Value) -> Result<Option<&Value>, Failure> {
        let hash = key.hash(meter)?;
        if self.index.is_empty() {
            for (found, value) in &self.entries {
                if operate::is_equal(meter, found, key)? {
                    return Ok(Some(value));
                }
            }
            return Ok(None);
        }
        let start = self.index.partition_point(|entry| entry.0 < hash);
        for &(_, place) in self.index[start..].iter().take_while(|entry| entry.0 == hash) {
            let (found, value) = &self.entries[place];
            if operate::is_equal(meter, found, key)? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }
}
