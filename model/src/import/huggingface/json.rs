//! JSON as Python writes it: with a byte order mark, which is passed over, or with `NaN` and `Infinity`,
//! which are named.

use std::path::Path;

use serde::de::DeserializeOwned;

use super::super::ImportError;
use crate::values;

/// What some editors put in front of UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// Numbers that Python writes and JSON does not have.
const NO_NUMBERS: [&str; 3] = ["NaN", "Infinity", "-Infinity"];

/// Values and keys of one file: an index of a model of 65,536 tensors has 131,072, a list of 100,000 added
/// tokens 800,000. They take some 100 MiB at most.
const VALUES_MAX: usize = 1 << 20;

/// Reads the JSON of the file at `path`.
///
/// # Errors
///
/// [`ImportError::Json`], or [`ImportError::Value`] where there is a number that JSON does not have, or more
/// than [`VALUES_MAX`] of anything.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8], path: &Path) -> Result<T, ImportError> {
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
    if values::exceed(bytes, VALUES_MAX) {
        return Err(ImportError::Value {
            key: format!("the number of values in {}", path.display()),
            found: format!("more than {VALUES_MAX}"),
            expected: "fewer".into(),
        });
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let parsed = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let key = error.path().to_string();
        (if key == "." { String::new() } else { key }, error.into_inner())
    });
    let parsed = parsed.and_then(|value| match json.end() {
        Ok(()) => Ok(value),
        Err(error) => Err((String::new(), error)),
    });
    parsed.map_err(|(key, source)| {
        let line = bytes.split(|byte| *byte == b'\n').nth(source.line().saturating_sub(1));
        // The column is that of a byte at or near the beginning of what could not be read.
        let from = source.column().saturating_sub(2);
        let rest = line.and_then(|line| line.get(from..)).unwrap_or_default();
        let rest = String::from_utf8_lossy(&rest[..rest.len().min(16)]);
        let rest = rest.trim_start_matches([' ', ':', ',', '[']);
        match NO_NUMBERS.into_iter().find(|name| rest.starts_with(name)) {
            Some(name) => ImportError::Value {
                key: format!("a number in line {} of {}", source.line(), path.display()),
                found: name.into(),
                expected: "a number that JSON has".into(),
            },
            None => ImportError::Json { path: path.to_owned(), key, source },
        }
    })
}
