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

/// Values and keys of one file: an index of a model of 65,536 tensors has 131,072, each of an
/// `added_tokens_decoder` 14, which leaves room for one of 299,000, more than any vocabulary has words. They
/// take some 400 MiB at most.
const VALUES_MAX: usize = 1 << 22;

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

#[cfg(test)]
mod tests {
    use serde::de::IgnoredAny;

    use super::*;

    #[test]
    fn a_whole_vocabulary_of_added_tokens_has_room() {
        let entry = r#""7":{"content":"a","lstrip":false,"normalized":false,"rstrip":false,"single_word":false,"special":true},"#;
        let decoder = format!("{{{}\"x\":0}}", entry.repeat(152_000));
        assert!(parse::<IgnoredAny>(decoder.as_bytes(), Path::new("x")).is_ok());
        // The list, its first value, and one more with each comma.
        let list = |values: usize| format!("[{}0]", "0,".repeat(values - 1));
        assert!(parse::<IgnoredAny>(list(VALUES_MAX - 1).as_bytes(), Path::new("x")).is_ok());
        let error = parse::<IgnoredAny>(list(VALUES_MAX).as_bytes(), Path::new("x")).unwrap_err();
        assert!(error.to_string().contains("more than 4194304"), "{error}");
    }
}
