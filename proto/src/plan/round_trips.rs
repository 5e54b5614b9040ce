//! Reads measured round trips from the registry, whatever a program of another version has written there.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::limits::{ROUND_TRIP_US, ROUND_TRIPS};
use crate::names::WorkerId;

/// One value: a figure, or something that this version does not know.
#[derive(Deserialize)]
#[serde(untagged)]
enum Figure {
    Us(u32),
    Unknown(IgnoredAny),
}

/// What cannot be a figure of a worker is left out, and so is what comes after the first
/// [`ROUND_TRIPS`].
pub(super) fn read<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, u32>, D::Error> {
    from.deserialize_map(Figures)
}

struct Figures;

impl<'de> Visitor<'de> for Figures {
    type Value = BTreeMap<String, u32>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("microseconds by worker")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut figures = BTreeMap::new();
        while let Some((id, figure)) = map.next_entry::<String, Figure>()? {
            if let Figure::Us(us @ 1..=ROUND_TRIP_US) = figure
                && figures.len() < ROUND_TRIPS
                && id.parse::<WorkerId>().is_ok()
            {
                figures.insert(id, us);
            }
        }
        Ok(figures)
    }
}
