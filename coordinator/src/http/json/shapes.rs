//! The shapes that fields have: numbers, texts, lists with a bound, and values that are only
//! passed over.

use std::borrow::Cow;
use std::cell::Cell;
use std::marker::PhantomData;

use serde::de::{MapAccess, SeqAccess};
use serde_json::{Map, Value};

use super::{Items, Number, Object, Shape, Wrong};

/// The largest number of which a real one still says every digit: 2^53.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// A value or `null`, which is an absent one.
pub(crate) struct Maybe<S>(pub(crate) S);

impl<'de, S: Shape<'de>> Shape<'de> for Maybe<S> {
    type Value = Option<S::Value>;

    fn wanted(&self) -> Cow<'static, str> {
        self.0.wanted()
    }

    fn null(self) -> Result<Self::Value, Wrong> {
        Ok(None)
    }

    fn boolean(self, value: bool) -> Result<Self::Value, Wrong> {
        self.0.boolean(value).map(Some)
    }

    fn number(self, value: Number) -> Result<Self::Value, Wrong> {
        self.0.number(value).map(Some)
    }

    fn text(self, value: &str) -> Result<Self::Value, Wrong> {
        self.0.text(value).map(Some)
    }

    fn list<A: SeqAccess<'de>>(self, items: Items<'_, A>) -> Result<Self::Value, A::Error> {
        self.0.list(items).map(Some)
    }

    fn object<A: MapAccess<'de>>(self, object: Object<'_, A>) -> Result<Self::Value, A::Error> {
        self.0.object(object).map(Some)
    }
}

/// `true` or `false`.
pub(crate) struct Boolean;

impl Shape<'_> for Boolean {
    type Value = bool;

    fn wanted(&self) -> Cow<'static, str> {
        "true or false".into()
    }

    fn boolean(self, value: bool) -> Result<bool, Wrong> {
        Ok(value)
    }
}

/// A whole number that `T` can hold; `2.0` is one, as in vLLM.
pub(crate) struct Integer<T>(PhantomData<T>);

impl<T> Integer<T> {
    pub(crate) fn new() -> Self {
        Self(PhantomData)
    }
}

/// The whole numbers of a type.
pub(crate) trait Range: TryFrom<i128> {
    const LEAST: i128;
    const MOST: i128;
}

impl Range for u32 {
    const LEAST: i128 = 0;
    const MOST: i128 = u32::MAX as i128;
}

impl Range for i64 {
    const LEAST: i128 = i64::MIN as i128;
    const MOST: i128 = i64::MAX as i128;
}

/// A seed: OpenAI's are signed, ours are not.
impl Range for i128 {
    const LEAST: i128 = i64::MIN as i128;
    const MOST: i128 = u64::MAX as i128;
}

impl<T: Range> Shape<'_> for Integer<T> {
    type Value = T;

    fn wanted(&self) -> Cow<'static, str> {
        "an integer".into()
    }

    fn number(self, value: Number) -> Result<T, Wrong> {
        let whole = match value {
            Number::Whole(whole) => whole,
            Number::Real(real) if real.fract() == 0.0 && real.abs() <= EXACT => real as i128,
            Number::Real(real) if real.fract() != 0.0 => return Err(Wrong::Kind),
            Number::Real(_) => return Err(out_of_range::<T>(value)),
        };
        if !(T::LEAST..=T::MOST).contains(&whole) {
            return Err(out_of_range::<T>(value));
        }
        T::try_from(whole).map_err(|_| out_of_range::<T>(value))
    }
}

fn out_of_range<T: Range>(found: Number) -> Wrong {
    let (least, most) = (T::LEAST, T::MOST);
    Wrong::Because(format!("must be an integer from {least} to {most}, found {found}"))
}

/// A number of 32 bits.
pub(crate) struct Float;

impl Shape<'_> for Float {
    type Value = f32;

    fn wanted(&self) -> Cow<'static, str> {
        "a number".into()
    }

    fn number(self, value: Number) -> Result<f32, Wrong> {
        let number = match value {
            Number::Whole(whole) => whole as f32,
            Number::Real(real) => real as f32,
        };
        if number.is_finite() {
            return Ok(number);
        }
        Err(Wrong::Because(format!("must be a number of 32 bits, found {value}")))
    }
}

/// A text.
pub(crate) struct Text {
    cut_bytes: usize,
}

impl Text {
    /// As it is: the body's limit is its own.
    pub(crate) fn whole() -> Self {
        Self { cut_bytes: usize::MAX }
    }

    /// One of some words that are known, all short.
    pub(crate) fn word() -> Self {
        Self::cut(super::NAME_BYTES)
    }

    /// Cut after so many bytes: a longer one is none that is known.
    pub(crate) fn cut(cut_bytes: usize) -> Self {
        Self { cut_bytes }
    }
}

impl Shape<'_> for Text {
    type Value = String;

    fn wanted(&self) -> Cow<'static, str> {
        "a string".into()
    }

    fn text(self, value: &str) -> Result<String, Wrong> {
        Ok(value[..value.floor_char_boundary(self.cut_bytes)].to_owned())
    }
}

/// A list of at most so many.
pub(crate) struct List<F> {
    /// Makes the shape of an entry.
    pub(crate) item: F,
    pub(crate) limit: usize,
    /// With its article: "a list of integers".
    pub(crate) wanted: &'static str,
}

impl<'de, S: Shape<'de>, F: FnMut() -> S> Shape<'de> for List<F> {
    type Value = Vec<S::Value>;

    fn wanted(&self) -> Cow<'static, str> {
        self.wanted.into()
    }

    fn list<A: SeqAccess<'de>>(mut self, mut items: Items<'_, A>) -> Result<Self::Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next((self.item)())? {
            if list.len() == self.limit {
                return Err(items
                    .places
                    .refuse(format_args!("may have a length of {}, found more", self.limit)));
            }
            list.push(item);
        }
        Ok(list)
    }
}

/// Whatever it is: looked at no further.
pub(crate) struct Skip;

impl<'de> Shape<'de> for Skip {
    type Value = ();

    fn wanted(&self) -> Cow<'static, str> {
        "any value".into()
    }

    fn null(self) -> Result<(), Wrong> {
        Ok(())
    }

    fn boolean(self, _: bool) -> Result<(), Wrong> {
        Ok(())
    }

    fn number(self, _: Number) -> Result<(), Wrong> {
        Ok(())
    }

    fn text(self, _: &str) -> Result<(), Wrong> {
        Ok(())
    }

    fn list<A: SeqAccess<'de>>(self, mut items: Items<'_, A>) -> Result<(), A::Error> {
        while items.next(Skip)?.is_some() {}
        Ok(())
    }

    fn object<A: MapAccess<'de>>(self, mut object: Object<'_, A>) -> Result<(), A::Error> {
        while object.map.next_key_seed(object.places.seed(Skip))?.is_some() {
            object.skip()?;
        }
        Ok(())
    }
}

/// Whether there is anything but `null`.
pub(crate) struct Present;

impl<'de> Shape<'de> for Present {
    type Value = bool;

    fn wanted(&self) -> Cow<'static, str> {
        "any value".into()
    }

    fn null(self) -> Result<bool, Wrong> {
        Ok(false)
    }

    fn boolean(self, _: bool) -> Result<bool, Wrong> {
        Ok(true)
    }

    fn number(self, _: Number) -> Result<bool, Wrong> {
        Ok(true)
    }

    fn text(self, _: &str) -> Result<bool, Wrong> {
        Ok(true)
    }

    fn list<A: SeqAccess<'de>>(self, items: Items<'_, A>) -> Result<bool, A::Error> {
        Skip.list(items).map(|()| true)
    }

    fn object<A: MapAccess<'de>>(self, object: Object<'_, A>) -> Result<bool, A::Error> {
        Skip.object(object).map(|()| true)
    }
}

/// A list of which only matters whether anything is in it.
pub(crate) struct Filled;

impl<'de> Shape<'de> for Filled {
    type Value = bool;

    fn wanted(&self) -> Cow<'static, str> {
        "a list".into()
    }

    fn null(self) -> Result<bool, Wrong> {
        Ok(false)
    }

    fn list<A: SeqAccess<'de>>(self, mut items: Items<'_, A>) -> Result<bool, A::Error> {
        let filled = items.next(Skip)?.is_some();
        while filled && items.next(Skip)?.is_some() {}
        Ok(filled)
    }
}

const TOO_LARGE: &str = "holds more than a template may be given";

/// What may still be built of a tree of values.
pub(crate) struct TreeRoom {
    nodes: Cell<usize>,
    bytes: Cell<usize>,
}

impl TreeRoom {
    /// Room for so many values and so many bytes of texts and names.
    pub(crate) fn new(nodes: usize, bytes: usize) -> Self {
        Self { nodes: Cell::new(nodes), bytes: Cell::new(bytes) }
    }

    fn take(&self, text_bytes: usize) -> Result<(), Wrong> {
        let left = self.nodes.get().checked_sub(1).zip(self.bytes.get().checked_sub(text_bytes));
        let (nodes, bytes) = left.ok_or(Wrong::Whole(TOO_LARGE))?;
        self.nodes.set(nodes);
        self.bytes.set(bytes);
        Ok(())
    }
}

/// Any value, as a tree of bounded size.
#[derive(Clone, Copy)]
pub(crate) struct Tree<'a>(pub(crate) &'a TreeRoom);

impl Tree<'_> {
    fn leaf(self, value: impl Into<Value>) -> Result<Value, Wrong> {
        self.0.take(0)?;
        Ok(value.into())
    }
}

impl<'de> Shape<'de> for Tree<'_> {
    type Value = Value;

    fn wanted(&self) -> Cow<'static, str> {
        "any value".into()
    }

    fn null(self) -> Result<Value, Wrong> {
        self.leaf(Value::Null)
    }

    fn boolean(self, value: bool) -> Result<Value, Wrong> {
        self.leaf(value)
    }

    fn number(self, value: Number) -> Result<Value, Wrong> {
        match value {
            Number::Real(real) => self.leaf(real),
            Number::Whole(whole) => match (u64::try_from(whole), i64::try_from(whole)) {
                (Ok(unsigned), _) => self.leaf(unsigned),
                (_, Ok(signed)) => self.leaf(signed),
                _ => self.leaf(whole as f64),
            },
        }
    }

    fn text(self, value: &str) -> Result<Value, Wrong> {
        self.0.take(value.len())?;
        Ok(value.into())
    }

    fn list<A: SeqAccess<'de>>(self, mut items: Items<'_, A>) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next(self)? {
            list.push(item);
        }
        list.shrink_to_fit();
        self.0.take(0).map_err(|_| items.places.refuse_whole(TOO_LARGE))?;
        Ok(list.into())
    }

    fn object<A: MapAccess<'de>>(self, mut object: Object<'_, A>) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(name) = object.map.next_key_seed(object.places.seed(self))? {
            let value = object.value(self)?;
            // Names are texts: JSON has no others.
            if let Value::String(name) = name {
                map.insert(name, value);
            }
        }
        Ok(map.into())
    }
}
