//! Cuts a template into tokens as Jinja2 does with `trim_blocks` and `lstrip_blocks`.

use super::{CompileError, MAX_NAME_BYTES};

/// A token and the line it begins on.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Token {
    pub(super) line: u32,
    pub(super) kind: Kind,
}

/// What a token is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    /// Text between tags.
    Data(String),
    /// `{{`.
    PrintBegin,
    /// `}}`.
    PrintEnd,
    /// `{%`.
    BlockBegin,
    /// `%}`.
    BlockEnd,
    Name(Box<str>),
    Text(String),
    Int(i128),
    Float(f64),
    Sign(&'static str),
    End,
}

/// Longest first.
const SIGNS: [&str; 27] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}",
    ">", "<", "=", ".", ":", "|", ",", ";", "!",
];

/// Python's idea of a blank.
pub(super) fn is_blank(character: char) -> bool {
    character.is_whitespace() || ('\x1c'..='\x1f').contains(&character)
}

/// The tokens of `source`.
///
/// # Errors
///
/// [`CompileError::Syntax`].
pub(super) fn tokens(source: &str) -> Result<Vec<Token>, CompileError> {
    let mut source = source.replace("\r\n", "\n").replace('\r', "\n");
    if source.ends_with('\n') {
        source.pop();
    }
    let mut lexer = Lexer { source: &source, at: 0, line: 1, begins_line: true, out: Vec::new() };
    lexer.run()?;
    let line = lexer.line;
    let mut out = lexer.out;
    out.push(Token { line, kind: Kind::End });
    Ok(out)
}

struct Lexer<'a> {
    source: &'a str,
    at: usize,
    line: u32,
    /// The last thing read ended with a line break, or nothing was read yet.
    begins_line: bool,
    out: Vec<Token>,
}

impl<'a> Lexer<'a> {
    fn rest(&self) -> &'a str {
        &self.source[self.at..]
    }

    fn error(&self, what: impl Into<String>) -> CompileError {
        CompileError::Syntax { line: self.line, what: what.into() }
    }

    /// Goes on by `bytes`.
    fn advance(&mut self, bytes: usize) {
        let passed = &self.source[self.at..self.at + bytes];
        self.line += passed.matches('\n').count() as u32;
        if !passed.is_empty() {
            self.begins_line = passed.ends_with('\n');
        }
        self.at += bytes;
    }

    fn push(&mut self, kind: Kind) {
        self.out.push(Token { line: self.line, kind });
    }

    fn data(&mut self, text: &str) {
        if !text.is_empty() {
            self.push(Kind::Data(text.to_owned()));
        }
    }

    fn run(&mut self) -> Result<(), CompileError> {
        loop {
            let rest = self.rest();
            let opens =
                |&at: &usize| matches!(rest.as_bytes().get(at + 1), Some(b'%' | b'{' | b'#'));
            let Some(at) = rest.match_indices('{').map(|found| found.0).find(opens) else {
                self.data(rest);
                self.advance(rest.len());
                return Ok(());
            };
            let opening = &rest[at..at + 2];
            let sign = rest[at + 2..].chars().next().filter(|sign| matches!(sign, '-' | '+'));
            let text = self.stripped(&rest[..at], sign, opening == "{{");
            self.data(text);
            let inside = at + 2 + usize::from(sign.is_some());
            if opening == "{%"
                && let Some(raw) = raw_tag(&rest[inside..])
            {
                self.advance(inside + raw);
                self.raw()?;
                continue;
            }
            self.advance(inside);
            match opening {
                "{#" => self.comment()?,
                "{%" => {
                    self.push(Kind::BlockBegin);
                    self.tag("%}")?;
                }
                _ => {
                    self.push(Kind::PrintBegin);
                    self.tag("}}")?;
                }
            }
        }
    }

    /// The text before a tag without what the tag takes away.
    fn stripped<'t>(&self, text: &'t str, sign: Option<char>, prints: bool) -> &'t str {
        match sign {
            Some('-') => text.trim_end_matches(is_blank),
            None if !prints => {
                let line_from = text.rfind('\n').map_or(0, |at| at + 1);
                let at_line = line_from > 0 || self.begins_line;
                // Jinja2's expression wants at least one blank; none is nothing to take away.
                if at_line && text[line_from..].chars().all(is_blank) {
                    &text[..line_from]
                } else {
                    text
                }
            }
            _ => text,
        }
    }

    /// The length of a tag's end at the start of `rest`, with the blanks it takes away.
    fn end_len(rest: &str, end: &str, trims: bool) -> Option<usize> {
        if let Some(after) = rest.strip_prefix('-').and_then(|rest| rest.strip_prefix(end)) {
            return Some(rest.len() - after.trim_start_matches(is_blank).len());
        }
        if trims && rest.strip_prefix('+').is_some_and(|rest| rest.starts_with(end)) {
            return Some(1 + end.len());
        }
        let after = rest.strip_prefix(end)?;
        Some(end.len() + usize::from(trims && after.starts_with('\n')))
    }

    fn comment(&mut self) -> Result<(), CompileError> {
        let rest = self.rest();
        let at = rest.find("#}").ok_or_else(|| self.error("missing end of comment tag"))?;
        let signed = rest[..at].ends_with(['-', '+']);
        let from = at - usize::from(signed);
        let len = Self::end_len(&rest[from..], "#}", true).unwrap_or(2);
        self.advance(from + len);
        Ok(())
    }

    fn raw(&mut self) -> Result<(), CompileError> {
        let rest = self.rest();
        let mut from = 0;
        while let Some(found) = rest[from..].find("{%") {
            let at = from + found;
            let sign = rest[at + 2..].chars().next().filter(|sign| matches!(sign, '-' | '+'));
            let inside = at + 2 + usize::from(sign.is_some());
            let name = rest[inside..].trim_start_matches(is_blank);
            if let Some(after) = name.strip_prefix("endraw") {
                let after = after.trim_start_matches(is_blank);
                if let Some(len) = Self::end_len(after, "%}", true) {
                    let text = self.stripped(&rest[..at], sign, false);
                    self.data(text);
                    self.advance(rest.len() - after.len() + len);
                    return Ok(());
                }
            }
            from = at + 2;
        }
        Err(self.error("missing end of raw directive"))
    }

    /// The tokens of a tag up to its `end`.
    fn tag(&mut self, end: &str) -> Result<(), CompileError> {
        let mut open: Vec<char> = Vec::new();
        loop {
            let rest = self.rest();
            if open.is_empty()
                && let Some(len) = Self::end_len(rest, end, end == "%}")
            {
                self.push(if end == "%}" { Kind::BlockEnd } else { Kind::PrintEnd });
                self.advance(len);
                return Ok(());
            }
            let Some(first) = rest.chars().next() else {
                // The parser says what is missing.
                return Ok(());
            };
            if is_blank(first) {
                self.advance(rest.len() - rest.trim_start_matches(is_blank).len());
            } else if first.is_ascii_digit() {
                let after_dot = self.at > 0 && self.source.as_bytes()[self.at - 1] == b'.';
                let (kind, len) = number(rest, after_dot).map_err(|what| self.error(what))?;
                self.push(kind);
                self.advance(len);
            } else if first.is_alphanumeric() || first == '_' {
                let name = |character: char| character.is_alphanumeric() || character == '_';
                let len = rest.find(|character| !name(character)).unwrap_or(rest.len());
                if len > MAX_NAME_BYTES {
                    return Err(self.error(format!("a name of more than {MAX_NAME_BYTES} bytes")));
                }
                self.push(Kind::Name(rest[..len].into()));
                self.advance(len);
            } else if matches!(first, '\'' | '"') {
                let len = quoted_len(rest).ok_or_else(|| self.error("a text has no end"))?;
                let text = unescape(&rest[1..len - 1]).map_err(|what| self.error(what))?;
                self.push(Kind::Text(text));
                self.advance(len);
            } else {
                let sign = SIGNS.iter().find(|sign| **sign != "!" && rest.starts_with(**sign));
                let Some(&sign) = sign else {
                    return Err(self.error(format!("unexpected char {first:?}")));
                };
                match sign {
                    "(" => open.push(')'),
                    "[" => open.push(']'),
                    "{" => open.push('}'),
                    ")" | "]" | "}" if open.pop() != Some(first) => {
                        return Err(self.error(format!("unexpected {sign:?}")));
                    }
                    _ => {}
                }
                self.push(Kind::Sign(sign));
                self.advance(sign.len());
            }
        }
    }
}

/// The length of `raw %}` after a tag's opening.
fn raw_tag(inside: &str) -> Option<usize> {
    let after = inside.trim_start_matches(is_blank).strip_prefix("raw")?;
    let after = after.trim_start_matches(is_blank);
    let len = Lexer::end_len(after, "%}", false)?;
    Some(inside.len() - after.len() + len)
}

/// The length of digits with single underscores between them.
fn digits_len(text: &str, is_digit: impl Fn(u8) -> bool) -> usize {
    let bytes = text.as_bytes();
    let mut len = 0;
    loop {
        let digit = len + usize::from(len > 0 && bytes.get(len) == Some(&b'_'));
        match bytes.get(digit) {
            Some(&byte) if is_digit(byte) => len = digit + 1,
            _ => return len,
        }
    }
}

/// The number at the start of `text`, whose first byte is a digit.
fn number(text: &str, after_dot: bool) -> Result<(Kind, usize), String> {
    let decimal = |text: &str| digits_len(text, |byte| byte.is_ascii_digit());
    let whole = decimal(text);
    let exponent_len = |text: &str| {
        let after = text.strip_prefix(['e', 'E'])?;
        let after = after.strip_prefix(['+', '-']).unwrap_or(after);
        let len = decimal(after);
        (len > 0).then(|| text.len() - after.len() + len)
    };
    if !after_dot {
        let fraction = text[whole..].strip_prefix('.').map_or(0, decimal);
        let mut len = whole + if fraction > 0 { 1 + fraction } else { 0 };
        let exponent = exponent_len(&text[len..]);
        len += exponent.unwrap_or(0);
        if fraction > 0 || exponent.is_some() {
            let plain = text[..len].replace('_', "");
            let value = plain.parse().map_err(|_| format!("{plain} is no number"))?;
            return Ok((Kind::Float(value), len));
        }
    }
    let radix = match text.get(..2) {
        Some("0b" | "0B") => 2,
        Some("0o" | "0O") => 8,
        Some("0x" | "0X") => 16,
        _ => 10,
    };
    if radix != 10 {
        let digits = text[2..].strip_prefix('_').unwrap_or(&text[2..]);
        let len = digits_len(digits, |byte| char::from(byte).is_digit(radix));
        if len > 0 {
            let plain = digits[..len].replace('_', "");
            let value = i128::from_str_radix(&plain, radix)
                .map_err(|_| "an integer has more than 127 bits".to_owned())?;
            return Ok((Kind::Int(value), text.len() - digits.len() + len));
        }
    }
    let len = if text.starts_with('0') { digits_len(text, |byte| byte == b'0') } else { whole };
    let plain = text[..len].replace('_', "");
    let value = plain.parse().map_err(|_| "an integer has more than 127 bits".to_owned())?;
    Ok((Kind::Int(value), len))
}

/// The length of the quoted text at the start of `text`.
fn quoted_len(text: &str) -> Option<usize> {
    let quote = text.chars().next()?;
    let mut characters = text.char_indices().skip(1);
    while let Some((at, character)) = characters.next() {
        if character == '\\' {
            characters.next()?;
        } else if character == quote {
            return Some(at + 1);
        }
    }
    None
}

/// A quoted text's meaning: Jinja2 writes what is not ASCII as escapes first, then reads them all.
fn unescape(quoted: &str) -> Result<String, String> {
    let mut out = String::with_capacity(quoted.len());
    let mut rest = quoted;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let Some(kind) = rest.chars().next() else { return Err("\\ at end of string".into()) };
        let mut len = kind.len_utf8();
        let simple = match kind {
            '\n' => Some(""),
            '\\' => Some("\\"),
            '\'' => Some("'"),
            '"' => Some("\""),
            'a' => Some("\x07"),
            'b' => Some("\x08"),
            'f' => Some("\x0c"),
            'n' => Some("\n"),
            'r' => Some("\r"),
            't' => Some("\t"),
            'v' => Some("\x0b"),
            _ => None,
        };
        let digits = match kind {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            _ => 0,
        };
        if let Some(simple) = simple {
            out.push_str(simple);
        } else if digits > 0 {
            let code = rest
                .get(1..1 + digits)
                .filter(|code| code.bytes().all(|byte| byte.is_ascii_hexdigit()))
                .and_then(|code| u32::from_str_radix(code, 16).ok())
                .ok_or_else(|| format!("truncated \\{kind} escape"))?;
            let character = char::from_u32(code)
                .ok_or_else(|| format!("the escape \\{kind}{code:x} is no character"))?;
            out.push(character);
            len += digits;
        } else if kind.is_digit(8) {
            len = rest.bytes().take(3).take_while(|byte| (b'0'..=b'7').contains(byte)).count();
            let code = u32::from_str_radix(&rest[..len], 8).unwrap_or(0);
            out.extend(char::from_u32(code));
        } else if kind == 'N' {
            return Err("characters by name (\\N) are not supported".into());
        } else if kind.is_ascii() {
            out.push('\\');
            out.push(kind);
        } else {
            // The backslash of the escape that the character was turned into is taken by this one.
            let code = u32::from(kind);
            out.push('\\');
            out.push_str(&match code {
                0..=0xff => format!("x{code:02x}"),
                0x100..=0xffff => format!("u{code:04x}"),
                _ => format!("U{code:08x}"),
            });
        }
        rest = &rest[len..];
    }
    out.push_str(rest);
    Ok(out)
}
