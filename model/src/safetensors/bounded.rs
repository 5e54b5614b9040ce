//! Parts of a header whose size a stranger decides, counted while they are read.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{DIMENSIONS_MAX, METADATA_BYTES_MAX, METADATA_MAX};

/// `__metadata__`: those of its values that are texts, for nothing of a checkpoint's depends on the others.
pub(super) struct Metadata(pub(super) BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MetadataVisitor)
    }
}

struct MetadataVisitor;

impl<'de> Visitor<'de> for MetadataVisitor {
    type Value = Metadata;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of texts, or null")
    }

    fn visit_unit<E: Error>(self) -> Result<Metadata, E> {
        Ok(Metadata(BTreeMap::new()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
        let mut texts = BTreeMap::new();
        let (mut entries, mut bytes) = (0, 0);
        while let Some(key) = map.next_key::<String>()? {
            let MaybeText(text) = map.next_value()?;
            entries += 1;
            bytes += key.len() + text.as_ref().map_or(0, String::len);
            if entries > METADATA_MAX {
                return Err(A::Error::custom("__metadata__ has too many entries"));
            }
            if bytes > METADATA_BYTES_MAX {
                let text = format!("__metadata__ has more than {METADATA_BYTES_MAX} bytes");
                return Err(A::Error::custom(text));
            }
            texts.extend(text.map(|text| (key, text)));
        }
        Ok(Metadata(texts))
    }
}

/// A text, or something else, of which nothing is kept.
struct MaybeText(Option<String>);

impl<'de> Deserialize<'de> for MaybeText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MaybeTextVisitor)
    }
}

struct MaybeTextVisitor;

impl<'de> Visitor<'de> for MaybeTextVisitor {
    type Value = MaybeText;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<MaybeText, E> {
        Ok(MaybeText(Some(text.to_owned())))
    }

    fn visit_unit<E: Error>(self) -> Result<MaybeText, E> {
        Ok(MaybeText(None))
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<MaybeText, E> {
        Ok(MaybeText(None))
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<MaybeText, E> {
        Ok(MaybeText(None))
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<MaybeText, E> {
        Ok(MaybeText(None))
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<MaybeText, E> {
        Ok(MaybeText(None))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<MaybeText, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(MaybeText(None))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<MaybeText, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(MaybeText(None))
    }
}

/// Dimensions; of a tensor with too many of them only so many that it is refused for that.
pub(super) fn shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    deserializer.deserialize_seq(ShapeVisitor)
}

struct ShapeVisitor;

impl<'de> Visitor<'de> for ShapeVisitor {
    type Value = Vec<u64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
        let mut shape = Vec::new();
        while let Some(dimension) = seq.next_element()? {
            if shape.len() <= DIMENSIONS_MAX {
                shape.push(dimension);
            }
        }
        Ok(shape)
    }
}
