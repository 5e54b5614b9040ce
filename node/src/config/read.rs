//! Reads a tree with serde. Text from variables takes the type that its reader expects.

use std::collections::btree_map;
use std::vec;

use serde::de::value::{MapAccessDeserializer, StrDeserializer};
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};
use serde::forward_to_deserialize_any;

use super::tree::{Kind, Node, Origin, Problem};

impl Node {
    /// Gives the visitor the value as it is.
    fn visit<'de, V: Visitor<'de>>(kind: Kind, visitor: V) -> Result<V::Value, Problem> {
        match kind {
            Kind::Table(table) => {
                visitor.visit_map(Entries { rest: table.into_iter(), value: None })
            }
            Kind::List(items) => visitor.visit_seq(Items { rest: items.into_iter() }),
            Kind::Text(text) => visitor.visit_string(text),
            Kind::Scalar(toml::Value::Integer(number)) => visitor.visit_i64(number),
            Kind::Scalar(toml::Value::Float(number)) => visitor.visit_f64(number),
            Kind::Scalar(toml::Value::Boolean(flag)) => visitor.visit_bool(flag),
            Kind::Scalar(toml::Value::String(text)) => visitor.visit_string(text),
            // Dates: no setting is one.
            Kind::Scalar(other) => visitor.visit_string(other.to_string()),
        }
    }

    /// Gives the visitor what `parse` makes of a text, or the value as it is.
    fn visit_parsed<'de, V: Visitor<'de>>(
        self,
        visitor: V,
        parse: impl FnOnce(&str) -> Option<toml::Value>,
    ) -> Result<V::Value, Problem> {
        let Self { origin, kind } = self;
        let kind = match kind {
            Kind::Text(text) => match parse(text.trim()) {
                Some(value) => Kind::Scalar(value),
                // The visitor says what it expected.
                None => Kind::Text(text),
            },
            other => other,
        };
        Self::visit(kind, visitor).map_err(|problem| problem.set_in(&origin))
    }
}

fn boolean(text: &str) -> Option<toml::Value> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "on" | "yes" => Some(true.into()),
        "false" | "0" | "off" | "no" => Some(false.into()),
        _ => None,
    }
}

fn integer(text: &str) -> Option<toml::Value> {
    text.parse::<i64>().ok().map(Into::into)
}

fn float(text: &str) -> Option<toml::Value> {
    text.parse::<f64>().ok().map(Into::into)
}

macro_rules! parsed {
    ($($method:ident $parse:ident),* $(,)?) => {
        $(
            fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
                self.visit_parsed(visitor, $parse)
            }
        )*
    };
}

impl<'de> Deserializer<'de> for Node {
    type Error = Problem;

    parsed! {
        deserialize_bool boolean,
        deserialize_i8 integer,
        deserialize_i16 integer,
        deserialize_i32 integer,
        deserialize_i64 integer,
        deserialize_u8 integer,
        deserialize_u16 integer,
        deserialize_u32 integer,
        deserialize_u64 integer,
        deserialize_f32 float,
        deserialize_f64 float,
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        Self::visit(self.kind, visitor).map_err(|problem| problem.set_in(&self.origin))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Problem> {
        visitor.visit_newtype_struct(self)
    }

    /// A variable lists with commas.
    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        let Self { origin, kind } = self;
        let kind = match kind {
            Kind::Text(text) => {
                let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
                let node =
                    |item: &str| Self { origin: origin.clone(), kind: Kind::Text(item.to_owned()) };
                Kind::List(items.map(node).collect())
            }
            other => other,
        };
        Self::visit(kind, visitor).map_err(|problem| problem.set_in(&origin))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Problem> {
        let Self { origin, kind } = self;
        match kind {
            Kind::Text(text) | Kind::Scalar(toml::Value::String(text)) => {
                visitor.visit_enum(IntoDeserializer::<Problem>::into_deserializer(text))
            }
            Kind::Table(table) => visitor.visit_enum(MapAccessDeserializer::new(Entries {
                rest: table.into_iter(),
                value: None,
            })),
            _ => Err(Problem::custom("expected a name")),
        }
        .map_err(|problem| problem.set_in(&origin))
    }

    forward_to_deserialize_any! {
        i128 u128 char str string bytes byte_buf unit unit_struct tuple tuple_struct map struct
        identifier ignored_any
    }
}

/// The entries of a table.
struct Entries {
    rest: btree_map::IntoIter<String, Node>,
    value: Option<(String, Node)>,
}

impl<'de> MapAccess<'de> for Entries {
    type Error = Problem;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Problem> {
        let Some((key, node)) = self.rest.next() else { return Ok(None) };
        let reader: StrDeserializer<'_, Problem> = key.as_str().into_deserializer();
        // A key that is not known is blamed on whoever set what is below it.
        let found =
            seed.deserialize(reader).map_err(|problem| problem.set_in(node.leaf_origin()))?;
        self.value = Some((key, node));
        Ok(Some(found))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Problem> {
        let (key, node) =
            self.value.take().ok_or_else(|| Problem::custom("a value was read before its key"))?;
        let origin = node.value_origin();
        // A value that was read and then refused is blamed on whoever set it, too.
        seed.deserialize(node).map_err(|problem| match origin {
            Some(origin) => problem.set_in(&origin).below(&key),
            None => problem.below(&key),
        })
    }
}

impl Node {
    /// Where this was set, if it is a value and not a table of them.
    fn value_origin(&self) -> Option<Origin> {
        (!matches!(self.kind, Kind::Table(_))).then(|| self.origin.clone())
    }

    /// Where the first value under this was set: a table may have several origins.
    fn leaf_origin(&self) -> &Origin {
        match &self.kind {
            Kind::Table(table) => table.values().next().map_or(&self.origin, Self::leaf_origin),
            _ => &self.origin,
        }
    }
}

/// The items of a list.
struct Items {
    rest: vec::IntoIter<Node>,
}

impl<'de> SeqAccess<'de> for Items {
    type Error = Problem;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Problem> {
        self.rest.next().map(|node| seed.deserialize(node)).transpose()
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.rest.len())
    }
}
