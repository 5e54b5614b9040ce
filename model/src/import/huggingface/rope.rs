//! RoPE's settings, which `config.json` may have at its top, in `rope_parameters` (transformers 5) or
//! in `rope_scaling`.

use serde_json::{Map, Value};

use super::super::ImportError;

/// The places, the one that goes before first.
pub(super) struct Rope<'a> {
    places: Vec<(&'static str, &'a Map<String, Value>)>,
}

impl<'a> Rope<'a> {
    /// # Errors
    ///
    /// [`ImportError::Value`] if one of the places is no object.
    pub(super) fn of(top: &'a Map<String, Value>) -> Result<Self, ImportError> {
        let mut places = Vec::new();
        for name in ["rope_parameters", "rope_scaling"] {
            match top.get(name) {
                None | Some(Value::Null) => {}
                Some(Value::Object(place)) => places.push((name, place)),
                Some(other) => return Err(wrong(name, other, "an object")),
            }
        }
        places.push(("", top));
        Ok(Self { places })
    }

    /// Refuses every scaling that is not none, and rotations of a part of each head.
    pub(super) fn refuse_unsupported(&self) -> Result<(), ImportError> {
        let unsupported =
            |what: String| Err(ImportError::Unsupported(format!("{what} is not supported")));
        for (name, place) in &self.places {
            let number = |key: &str| number(name, place, key);
            if number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
                return unsupported(key_in(name, "partial_rotary_factor"));
            }
            if name.is_empty() {
                continue;
            }
            if let Some((kind, _)) = place.iter().find(|(_, value)| value.is_object()) {
                return unsupported(format!("{name} of its own for {kind}"));
            }
            let kind = text(name, place, "rope_type")?.or(text(name, place, "type")?);
            let factor = number("factor")?;
            let scales_nothing = match kind {
                Some("default") => true,
                Some("linear") => factor == Some(1.0),
                Some(_) => false,
                None => factor.is_none_or(|factor| factor == 1.0),
            };
            if !scales_nothing {
                return unsupported(format!("{name} {}", kind.unwrap_or("of an unknown type")));
            }
        }
        Ok(())
    }

    /// RoPE's base; the first place that has one is heeded, as in transformers.
    pub(super) fn theta(&self, notes: &mut Vec<String>) -> Result<Option<f64>, ImportError> {
        let mut stated: Option<(f64, String)> = None;
        for (name, place) in &self.places {
            let Some(found) = number(name, place, "rope_theta")? else { continue };
            let key = key_in(name, "rope_theta");
            if !(found.is_finite() && found > 0.0) {
                let expected = "a positive number".into();
                return Err(ImportError::Value { key, found: found.to_string(), expected });
            }
            match &stated {
                None => stated = Some((found, key)),
                Some((theta, _)) if *theta == found => {}
                Some((theta, first)) => {
                    notes.push(format!("{first} is {theta} and {key} {found}: {theta} is taken"));
                }
            }
        }
        Ok(stated.map(|(theta, _)| theta))
    }
}

fn key_in(place: &str, key: &str) -> String {
    if place.is_empty() { key.into() } else { format!("{place}.{key}") }
}

fn wrong(key: &str, found: &Value, expected: &str) -> ImportError {
    // What is shown of a value that may be of any length.
    const SHOWN_CHARS: usize = 60;
    let found = found.to_string().chars().take(SHOWN_CHARS).collect();
    ImportError::Value { key: key.into(), found, expected: expected.into() }
}

fn number(place: &str, map: &Map<String, Value>, key: &str) -> Result<Option<f64>, ImportError> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => Err(wrong(&key_in(place, key), value, "a number")),
        },
    }
}

fn text<'a>(
    place: &str,
    map: &'a Map<String, Value>,
    key: &str,
) -> Result<Option<&'a str>, ImportError> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong(&key_in(place, key), other, "a text")),
    }
}
