//! Reads the JSON of a body into bounded values, and says what is wrong with it in the words of the
//! one who sent it: the field, what it must be, what was found. What no field wants is skipped
//! without being built, and a list that is too long stops at its bound.
//!
//! Serde's own derived readers cannot do this: they buffer whatever they have not decided yet (27
//! times the body's bytes), read lists to their end, and speak of Rust's types.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;

use serde::de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor};

use super::errors::{ApiError, NO_FIELD};

mod shapes;
#[cfg(test)]
mod tests;

pub(super) use shapes::{
    Boolean, Filled, Float, Integer, List, Maybe, Present, Skip, Text, Tree, TreeRoom,
};

/// Bytes of a field's name that are looked at: no field has a longer one.
const NAME_BYTES: usize = 64;

/// Bytes of a word that a message about bad JSON repeats.
const WORD_BYTES: usize = 16;

/// A body that is an object.
pub(super) trait FromBody: Sized {
    /// Takes the fields.
    ///
    /// # Errors
    ///
    /// Whatever the reader says; the reason is noted with the [`Places`].
    fn read<'de, A: MapAccess<'de>>(object: Object<'_, A>) -> Result<Self, A::Error>;
}

/// Reads a body for a model of `context` tokens. It computes: not for an async thread.
///
/// # Errors
///
/// 400 with the field in `param`.
pub(super) fn parse<T: FromBody>(body: &[u8], context: usize) -> Result<T, ApiError> {
    if body.starts_with(b"\xef\xbb\xbf") {
        let message = "the body begins with a byte order mark; JSON has none";
        return Err(ApiError::invalid(NO_FIELD, message));
    }
    let text = std::str::from_utf8(body).map_err(|error| {
        let message = format!("the body is not UTF-8 at byte {}", error.valid_up_to());
        ApiError::invalid(NO_FIELD, message)
    })?;
    if text.trim_ascii().is_empty() {
        return Err(ApiError::invalid(NO_FIELD, "the body is empty; it must be a JSON object"));
    }
    let places = Places { context, ..Places::default() };
    let mut reader = serde_json::Deserializer::from_str(text);
    let outcome = places.seed(Whole::<T>(std::marker::PhantomData)).deserialize(&mut reader);
    let outcome = outcome.and_then(|value| reader.end().map(|()| value));
    outcome.map_err(|error| places.explain(&error, text))
}

struct Whole<T>(std::marker::PhantomData<T>);

impl<'de, T: FromBody> Shape<'de> for Whole<T> {
    type Value = T;

    fn wanted(&self) -> Cow<'static, str> {
        "an object".into()
    }

    fn object<A: MapAccess<'de>>(self, object: Object<'_, A>) -> Result<T, A::Error> {
        T::read(object)
    }
}

/// Where the reader is, and what it found wrong there.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// Token ids that one prompt may have.
    pub(super) context: usize,
    path: RefCell<Vec<Step>>,
    fault: RefCell<Option<ApiError>>,
}

#[derive(Debug)]
enum Step {
    Field(&'static str),
    Token(u32),
    Index(usize),
}

impl Places {
    /// Reads a value of the given shape here.
    pub(super) fn seed<S>(&self, shape: S) -> At<'_, S> {
        At { places: self, shape }
    }

    /// The place in the client's words: `messages[2].role`; `None` for the body as a whole.
    pub(super) fn name(&self) -> Option<String> {
        let mut name = String::new();
        for step in self.path.borrow().iter() {
            match step {
                Step::Field(field) if name.is_empty() => name.push_str(field),
                Step::Field(field) => name = format!("{name}.{field}"),
                Step::Token(token) => name = format!("{name}.{token}"),
                Step::Index(index) => name = format!("{name}[{index}]"),
            }
        }
        (!name.is_empty()).then_some(name)
    }

    /// The error that ends the reading, with this place as its `param`; `message` follows the
    /// place's name.
    pub(super) fn refuse<E: de::Error>(&self, message: impl fmt::Display) -> E {
        let name = self.name();
        let message = format!("{} {message}", name.as_deref().unwrap_or("the body"));
        self.fail(ApiError::invalid(name, message))
    }

    /// As [`Places::refuse`], at the outermost field.
    pub(super) fn refuse_whole<E: de::Error>(&self, message: impl fmt::Display) -> E {
        self.path.borrow_mut().truncate(1);
        self.refuse(message)
    }

    /// The error that ends the reading.
    pub(super) fn fail<E: de::Error>(&self, error: ApiError) -> E {
        *self.fault.borrow_mut() = Some(error);
        E::custom("refused")
    }

    /// Does `read` one step further in.
    fn within<T, E>(&self, step: Step, read: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        self.path.borrow_mut().push(step);
        let value = read()?;
        // After an error the path stays: it is the place of the error.
        self.path.borrow_mut().pop();
        Ok(value)
    }

    /// What to tell the client: what was noted, else what is wrong with the JSON itself.
    fn explain(&self, error: &serde_json::Error, text: &str) -> ApiError {
        if let Some(fault) = self.fault.take() {
            return fault;
        }
        let whole = error.to_string();
        let (line, column) = (error.line(), error.column());
        let place = format!("at line {line} column {column}");
        let what = whole.strip_suffix(&place).unwrap_or(&whole).trim_end();
        let name = self.name();
        let message = match what {
            "number out of range" => {
                let field = name.as_deref().unwrap_or("the body");
                return ApiError::invalid(
                    name.clone(),
                    format!("{field} holds a number out of range"),
                );
            }
            "recursion limit exceeded" => {
                format!("the body has lists or objects nested too deep {place}")
            }
            "trailing characters" => format!("the body goes on after its JSON value {place}"),
            _ => match word_at(text, line, column) {
                Some(word) => format!("the body is not valid JSON {place}: {what}, found {word}"),
                None => format!("the body is not valid JSON {place}: {what}"),
            },
        };
        ApiError::invalid(NO_FIELD, message)
    }
}

/// The bare word at a place, as `NaN`, `True` or `undefined`.
fn word_at(text: &str, line: usize, column: usize) -> Option<&str> {
    let line = text.split('\n').nth(line.checked_sub(1)?)?;
    let is_word = |byte: &u8| byte.is_ascii_alphanumeric();
    let bytes = line.as_bytes();
    let at = column.checked_sub(1)?.min(bytes.len().checked_sub(1)?);
    is_word(&bytes[at]).then_some(())?;
    let start = at - bytes[..at].iter().rev().take(WORD_BYTES).take_while(|b| is_word(b)).count();
    let length = bytes[start..].iter().take(WORD_BYTES).take_while(|b| is_word(b)).count();
    let word = line.get(start..start + length)?;
    word.starts_with(|c: char| c.is_ascii_alphabetic()).then_some(word)
}

/// A number as JSON gives it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Number {
    Whole(i128),
    Real(f64),
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(number) => write!(f, "{number}"),
            // The shortest form: `1e300` in place of three hundred digits.
            Self::Real(number) => write!(f, "{number:?}"),
        }
    }
}

/// Why one value was refused.
#[derive(Debug)]
pub(super) enum Wrong {
    /// It is of another kind than was wanted.
    Kind,
    /// What follows the name of the place.
    Because(String),
    /// What follows the name of the outermost field: the fault is that of the whole.
    Whole(&'static str),
}

/// What a value may be. Whatever a shape does not say it takes is refused in its own words.
pub(super) trait Shape<'de>: Sized {
    /// What is made of it.
    type Value;

    /// With its article: "an integer".
    fn wanted(&self) -> Cow<'static, str>;

    fn null(self) -> Result<Self::Value, Wrong> {
        Err(Wrong::Kind)
    }

    fn boolean(self, _: bool) -> Result<Self::Value, Wrong> {
        Err(Wrong::Kind)
    }

    fn number(self, _: Number) -> Result<Self::Value, Wrong> {
        Err(Wrong::Kind)
    }

    fn text(self, _: &str) -> Result<Self::Value, Wrong> {
        Err(Wrong::Kind)
    }

    fn list<A: SeqAccess<'de>>(self, items: Items<'_, A>) -> Result<Self::Value, A::Error> {
        Err(items.places.refuse(format_args!("must be {}, found a list", self.wanted())))
    }

    fn object<A: MapAccess<'de>>(self, object: Object<'_, A>) -> Result<Self::Value, A::Error> {
        Err(object.places.refuse(format_args!("must be {}, found an object", self.wanted())))
    }
}

/// A shape at a place: what serde drives.
pub(super) struct At<'p, S> {
    places: &'p Places,
    shape: S,
}

impl<'de, S: Shape<'de>> At<'_, S> {
    fn scalar<E: de::Error>(
        self,
        found: impl fmt::Display,
        take: impl FnOnce(S) -> Result<S::Value, Wrong>,
    ) -> Result<S::Value, E> {
        let wanted = self.shape.wanted();
        take(self.shape).map_err(|wrong| match wrong {
            Wrong::Kind => self.places.refuse(format_args!("must be {wanted}, found {found}")),
            Wrong::Because(message) => self.places.refuse(message),
            Wrong::Whole(message) => self.places.refuse_whole(message),
        })
    }
}

impl<'de, S: Shape<'de>> DeserializeSeed<'de> for At<'_, S> {
    type Value = S::Value;

    fn deserialize<D: de::Deserializer<'de>>(self, reader: D) -> Result<S::Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de, S: Shape<'de>> Visitor<'de> for At<'_, S> {
    type Value = S::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shape.wanted())
    }

    fn visit_unit<E: de::Error>(self) -> Result<S::Value, E> {
        self.scalar("null", S::null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<S::Value, E> {
        self.scalar(value, |shape| shape.boolean(value))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<S::Value, E> {
        self.scalar(value, |shape| shape.number(Number::Whole(value.into())))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<S::Value, E> {
        self.scalar(value, |shape| shape.number(Number::Whole(value.into())))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<S::Value, E> {
        let number = Number::Real(value);
        self.scalar(number, |shape| shape.number(number))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<S::Value, E> {
        self.scalar("a string", |shape| shape.text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<S::Value, A::Error> {
        self.shape.list(Items { list, places: self.places, next: 0 })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<S::Value, A::Error> {
        self.shape.object(Object { map, places: self.places, seen: Vec::new() })
    }
}

/// The entries of a list, one after another.
pub(super) struct Items<'p, A> {
    list: A,
    pub(super) places: &'p Places,
    next: usize,
}

impl<'de, A: SeqAccess<'de>> Items<'_, A> {
    /// The next entry, of the given shape.
    ///
    /// # Errors
    ///
    /// If it has another.
    pub(super) fn next<S: Shape<'de>>(&mut self, shape: S) -> Result<Option<S::Value>, A::Error> {
        let Self { list, places, next } = self;
        let item = places.within(Step::Index(*next), || list.next_element_seed(places.seed(shape)));
        *next += 1;
        item
    }
}

/// The fields of an object, one after another.
pub(super) struct Object<'p, A> {
    map: A,
    pub(super) places: &'p Places,
    seen: Vec<&'static str>,
}

impl<'de, A: MapAccess<'de>> Object<'_, A> {
    /// The name of the next field; one that is too long to be any is cut. Its value must be read
    /// next.
    ///
    /// # Errors
    ///
    /// If the JSON is broken.
    pub(super) fn name(&mut self) -> Result<Option<String>, A::Error> {
        self.map.next_key_seed(self.places.seed(Text::cut(NAME_BYTES)))
    }

    /// Reads the value of the field `name` into `slot`.
    ///
    /// # Errors
    ///
    /// If it is of another shape, or was there before: which of the two is meant?
    pub(super) fn take<S: Shape<'de>>(
        &mut self,
        name: &'static str,
        shape: S,
        slot: &mut S::Value,
    ) -> Result<(), A::Error> {
        let Self { map, places, seen } = self;
        places.within(Step::Field(name), || {
            if seen.contains(&name) {
                return Err(places.refuse("is given twice"));
            }
            seen.push(name);
            *slot = map.next_value_seed(places.seed(shape))?;
            Ok(())
        })
    }

    /// Reads the value of a field that is named by a token.
    ///
    /// # Errors
    ///
    /// If it is of another shape.
    pub(super) fn value_of_token<S: Shape<'de>>(
        &mut self,
        token: u32,
        shape: S,
    ) -> Result<S::Value, A::Error> {
        let Self { map, places, .. } = self;
        places.within(Step::Token(token), || map.next_value_seed(places.seed(shape)))
    }

    /// Reads a value at the place of the object itself.
    ///
    /// # Errors
    ///
    /// If it is of another shape.
    pub(super) fn value<S: Shape<'de>>(&mut self, shape: S) -> Result<S::Value, A::Error> {
        self.map.next_value_seed(self.places.seed(shape))
    }

    /// Passes over the value of a field that nobody wants.
    ///
    /// # Errors
    ///
    /// If the JSON is broken.
    pub(super) fn skip(&mut self) -> Result<(), A::Error> {
        self.value(Skip)
    }
}
