//! Texts of others as they may be shown to people.

/// The text with what a terminal obeys, or what reorders or hides letters, written out: control characters,
/// ends of lines, marks of direction, blanks of no width. Everything that letters of any script are written
/// with stays as it is, joiners and variation selectors too.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match is_order(character) {
            true => shown.extend(character.escape_default()),
            false => shown.push(character),
        }
    }
    shown
}

/// Whether a character is there for its effect only.
fn is_order(character: char) -> bool {
    let is_mark = matches!(
        character,
        // The soft hyphen, blanks of no width, marks of direction.
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}'
        // Ends of lines and paragraphs, embeddings and overrides of direction.
        | '\u{2028}'..='\u{202e}'
        // Invisible operators, isolates of direction and what was before them.
        | '\u{2060}'..='\u{206f}'
        // The byte order mark, annotations, and tags, but for those that flags are written with.
        | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0001}'
    );
    character.is_control() || is_mark
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_obeys_is_written_out() {
        let hostile = "\u{1b}[2J\r\n\u{7}\u{9b}\u{202e}\u{7f}\0\u{200b}\u{2067}\u{2028}";
        let want = r"\u{1b}[2J\r\n\u{7}\u{9b}\u{202e}\u{7f}\u{0}\u{200b}\u{2067}\u{2028}";
        assert_eq!(printable(hostile), want);
    }

    #[test]
    fn letters_of_every_script_stay() {
        let plain = "C:\\a \"b\" 'c' é 你 🙂";
        // A combining accent, a joined conjunct, a family, a heart in colour, a half space.
        let joined = "e\u{301} क्\u{200d}ष 👩\u{200d}👧 ❤\u{fe0f} می\u{200c}شود";
        for text in [plain, joined] {
            assert_eq!(printable(text), text);
        }
    }
}
