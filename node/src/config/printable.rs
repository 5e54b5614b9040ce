//! Texts of others as they may be shown to people.

/// The text with what a terminal obeys, or what hides or reorders letters, written out: control
/// characters, marks of direction. Quotes and backslashes stay as they are.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\\' | '"' | '\'' => shown.push(character),
            _ => shown.extend(character.escape_debug()),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_obeys_is_written_out() {
        assert_eq!(printable("C:\\a \"b\" 'c' é 你 🙂"), "C:\\a \"b\" 'c' é 你 🙂");
        let hostile = "\u{1b}[2J\r\n\u{7}\u{9b}\u{202e}\u{7f}";
        assert_eq!(printable(hostile), r"\u{1b}[2J\r\n\u{7}\u{9b}\u{202e}\u{7f}");
    }
}
