//! Names that people give: checked where they are read, so that whoever holds one may put it into a
//! registry key or a log line as it is.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bytes of the longest cluster name: it is part of every registry key and of every metric.
pub const CLUSTER_NAME_BYTES: usize = 64;

/// Bytes of the longest worker id: it is part of a registry key and of every log line. A host's
/// name has up to 64 bytes, and a port follows it.
pub const WORKER_ID_BYTES: usize = 128;

/// Bytes of the longest name of a rack: it is part of every worker's record.
pub const RACK_NAME_BYTES: usize = 64;

/// Bytes of the longest name of a model, as stores have them.
pub const MODEL_NAME_BYTES: usize = 256;

/// Characters of a refused name that an error shows: enough to recognise it.
const SHOWN_CHARS: usize = 80;

/// A text that cannot be such a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} must be 1 to {most_bytes} letters, digits, dots, dashes or underscores \
     ([A-Za-z0-9._-]), found {found:?}"
)]
pub struct NameError {
    what: &'static str,
    most_bytes: usize,
    found: String,
}

/// A text that cannot name a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a model's name must be 1 to {MODEL_NAME_BYTES} bytes without control characters and without \
     blanks around it, found {found:?}"
)]
pub struct ModelNameError {
    found: String,
}

/// The name that a person gives a model. Clients ask for it and terminals show it; unlike other names
/// it is no part of a key, so `org/model 2B` is one.
///
/// # Errors
///
/// [`ModelNameError`].
pub fn model_name(text: &str) -> Result<String, ModelNameError> {
    let is_plain = text.trim() == text && !text.chars().any(char::is_control);
    if is_plain && (1..=MODEL_NAME_BYTES).contains(&text.len()) {
        return Ok(text.to_owned());
    }
    Err(ModelNameError { found: text.chars().take(SHOWN_CHARS).collect() })
}

/// Checks the one rule that all names have in common: no character that means something in a
/// registry key (`/`), and none that people cannot see.
fn check(what: &'static str, most_bytes: usize, text: &str) -> Result<(), NameError> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if (1..=most_bytes).contains(&text.len()) && text.bytes().all(legal) {
        return Ok(());
    }
    Err(NameError { what, most_bytes, found: text.chars().take(SHOWN_CHARS).collect() })
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $most_bytes:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::try_from(text.to_owned())
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                check($what, $most_bytes, &text)?;
                Ok(Self(text))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }
    };
}

name!(
    /// The name of a cluster: which keys in the registry are its own.
    ClusterName, "a cluster's name", CLUSTER_NAME_BYTES
);
name!(
    /// The name of a worker, unique in its cluster and the same after every start.
    WorkerId, "a worker's id", WORKER_ID_BYTES
);

name!(
    /// The name of a rack: machines with the same one are near one another.
    RackName, "a rack's name", RACK_NAME_BYTES
);

impl Default for ClusterName {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_a_key_can_hold() {
        let longest = "x".repeat(CLUSTER_NAME_BYTES);
        for good in ["a", "rack1", "Rack-1_b.c", "0", longest.as_str()] {
            assert_eq!(good.parse::<ClusterName>().unwrap().to_string(), good);
            assert_eq!(good.parse::<WorkerId>().unwrap().as_str(), good);
        }
        let too_long = "x".repeat(200);
        for bad in
            ["", " rack1", "rack1 ", "a b", "a/workers", "..\n", "a\0", "rück", too_long.as_str()]
        {
            let error = bad.parse::<ClusterName>().unwrap_err().to_string();
            assert!(error.contains("1 to 64 letters") && error.len() < 250, "{error}");
            assert!(bad.parse::<WorkerId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_model_may_be_called_almost_anything_that_can_be_shown() {
        for good in ["a", "microsoft/bitnet-b1.58-2B-4T", "Modèle 2", &"x".repeat(256)] {
            assert_eq!(model_name(good).unwrap(), good);
        }
        for bad in ["", " ", " a", "a ", "a\nb", "\u{1b}[2J", "a\0", &"x".repeat(257)] {
            let error = model_name(bad).unwrap_err().to_string();
            assert!(error.starts_with("a model's name must be") && error.len() < 400, "{error}");
        }
    }

    #[test]
    fn names_are_texts_in_files() {
        let name: ClusterName = serde_json::from_str("\"rack1\"").unwrap();
        assert_eq!(serde_json::to_string(&name).unwrap(), "\"rack1\"");
        assert!(serde_json::from_str::<WorkerId>("\"a/b\"").is_err());
    }
}
