//! Bytes of tokens to whole characters, as they come.

/// Turns bytes into text, holding back what may be the beginning of a character.
///
/// What comes out, joined, is what `String::from_utf8_lossy` makes of all the bytes: however
/// they were cut, an impossible sequence becomes one U+FFFD.
#[derive(Clone, Debug, Default)]
pub(crate) struct Detokenizer {
    /// The beginning of a character: at most three bytes.
    held: Vec<u8>,
}

impl Detokenizer {
    /// The characters that are whole now.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = self.held.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, broken) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = broken;
                    let Some(wrong_bytes) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[wrong_bytes..];
                }
            }
        }
        self.held = rest.to_vec();
        text
    }

    /// What was held back: no more bytes will come to complete it.
    pub(crate) fn finish(&mut self) -> String {
        let held = std::mem::take(&mut self.held);
        String::from_utf8_lossy(&held).into_owned()
    }
}
