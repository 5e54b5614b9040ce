//! How much there is in a JSON text, told before anything is built of it: a value takes tens of times the
//! bytes that it is written with.

/// Whether a JSON text has more than `most` values and keys. It may count too many of what is no JSON,
/// never too few of what is.
pub(crate) fn exceed(json: &[u8], most: usize) -> bool {
    let (mut values, mut in_text, mut escaped) = (1usize, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            // Before each value and each key stands one of these.
            b',' | b':' | b'[' | b'{' if !in_text => values += 1,
            _ => {}
        }
    }
    values > most
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_outside_of_texts() {
        for (json, values) in [
            ("1", 1),
            (r#"{"a": [1, 2], "b": "x,y:[{\\\""}"#, 7),
            ("[[], {}]", 5),
            (r#""\\", 1"#, 2),
        ] {
            assert!(!exceed(json.as_bytes(), values), "{json}");
            assert!(exceed(json.as_bytes(), values - 1), "{json}");
        }
    }
}
