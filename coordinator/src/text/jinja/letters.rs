//! Python's ideas of letters, digits and cases.

/// Letters in both cases or between them that are neither.
fn is_title(character: char) -> bool {
    matches!(u32::from(character),
        0x1c5 | 0x1c8 | 0x1cb | 0x1f2
        | 0x1f88..=0x1f8f | 0x1f98..=0x1f9f | 0x1fa8..=0x1faf | 0x1fbc | 0x1fcc | 0x1ffc)
}

fn is_cased(character: char) -> bool {
    character.is_lowercase() || character.is_uppercase() || is_title(character)
}

/// `str.islower`.
pub(super) fn is_lower(text: &str) -> bool {
    text.chars().any(char::is_lowercase)
        && !text.chars().any(|character| character.is_uppercase() || is_title(character))
}

/// `str.isupper`.
pub(super) fn is_upper(text: &str) -> bool {
    text.chars().any(char::is_uppercase)
        && !text.chars().any(|character| character.is_lowercase() || is_title(character))
}

/// `str.istitle`.
pub(super) fn is_titled(text: &str) -> bool {
    let (mut any, mut inside) = (false, false);
    for character in text.chars() {
        if character.is_uppercase() || is_title(character) {
            if inside {
                return false;
            }
            (any, inside) = (true, true);
        } else if character.is_lowercase() {
            if !inside {
                return false;
            }
        } else {
            inside = false;
        }
    }
    any
}

/// Letters that are no digits: marks and letter-like numbers are none.
pub(super) fn is_alpha(character: char) -> bool {
    if character.is_ascii() {
        return character.is_ascii_alphabetic();
    }
    let code = u32::from(character);
    let letter_number = matches!(code,
        0x16ee..=0x16f0 | 0x2160..=0x2182 | 0x2185..=0x2188 | 0x3007 | 0x3021..=0x3029
        | 0x3038..=0x303a | 0xa6e6..=0xa6ef | 0x10140..=0x10174 | 0x10341 | 0x1034a
        | 0x103d1..=0x103d5 | 0x12400..=0x1246e);
    let circled = matches!(code, 0x24b6..=0x24e9 | 0x1f130..=0x1f149 | 0x1f150..=0x1f169
        | 0x1f170..=0x1f189);
    character.is_alphabetic() && !letter_number && !circled && !is_mark(code)
}

/// Marks that Unicode counts as alphabetic and Python not as letters: vowel signs of the larger
/// scripts.
fn is_mark(code: u32) -> bool {
    matches!(code,
        0x345 | 0x363..=0x36f | 0x5b0..=0x5bd | 0x5bf | 0x5c1 | 0x5c2 | 0x5c4 | 0x5c5 | 0x5c7
        | 0x610..=0x61a | 0x64b..=0x657 | 0x659..=0x65f | 0x670 | 0x6d6..=0x6dc | 0x6e1..=0x6e4
        | 0x6e7 | 0x6e8 | 0x6ed | 0x711 | 0x730..=0x73f | 0x7a6..=0x7b0 | 0x816..=0x82c
        | 0x8d4..=0x903 | 0x93a | 0x93b | 0x93e..=0x94c | 0x94e | 0x94f | 0x955..=0x957
        | 0x962 | 0x963 | 0x981..=0x983 | 0x9be..=0x9cc | 0x9d7 | 0x9e2 | 0x9e3
        | 0xa01..=0xa03 | 0xa3e..=0xa4c | 0xa51 | 0xa70 | 0xa71 | 0xa75 | 0xa81..=0xa83
        | 0xabe..=0xacc | 0xae2 | 0xae3 | 0xafa..=0xafc | 0xb01..=0xb03 | 0xb3e..=0xb4c
        | 0xb56 | 0xb57 | 0xb62 | 0xb63 | 0xb82 | 0xbbe..=0xbcc | 0xbd7 | 0xc00..=0xc04
        | 0xc3e..=0xc4c | 0xc55 | 0xc56 | 0xc62 | 0xc63 | 0xc81..=0xc83 | 0xcbe..=0xccc
        | 0xcd5 | 0xcd6 | 0xce2 | 0xce3 | 0xd00..=0xd03 | 0xd3e..=0xd4c | 0xd57 | 0xd62 | 0xd63
        | 0xe31 | 0xe34..=0xe3a | 0xe4d | 0xeb1 | 0xeb4..=0xeb9 | 0xebb | 0xebc | 0xecd
        | 0xf71..=0xf83 | 0xf8d..=0xfbc | 0x102b..=0x1038 | 0x103b..=0x103e | 0x1056..=0x1059
        | 0x17b6..=0x17c8 | 0x20d0..=0x20f0 | 0x302a..=0x302f | 0x3099 | 0x309a
        | 0xa823..=0xa827 | 0xfb1e)
}

/// `str.isdecimal` of a character outside ASCII too: the ten digits of the larger scripts.
pub(super) fn is_decimal(character: char) -> bool {
    decimal_value(character).is_some()
}

/// The value of a decimal digit.
pub(super) fn decimal_value(character: char) -> Option<u32> {
    const ZEROS: [u32; 66] = [
        0x30, 0x660, 0x6f0, 0x7c0, 0x966, 0x9e6, 0xa66, 0xae6, 0xb66, 0xbe6, 0xc66, 0xce6, 0xd66,
        0xde6, 0xe50, 0xed0, 0xf20, 0x1040, 0x1090, 0x17e0, 0x1810, 0x1946, 0x19d0, 0x1a80, 0x1a90,
        0x1b50, 0x1bb0, 0x1c40, 0x1c50, 0xa620, 0xa8d0, 0xa900, 0xa9d0, 0xa9f0, 0xaa50, 0xabf0,
        0xff10, 0x104a0, 0x10d30, 0x11066, 0x110f0, 0x11136, 0x111d0, 0x112f0, 0x11450, 0x114d0,
        0x11650, 0x116c0, 0x11730, 0x118e0, 0x11950, 0x11c50, 0x11d50, 0x11da0, 0x16a60, 0x16ac0,
        0x16b50, 0x1d7ce, 0x1d7d8, 0x1d7e2, 0x1d7ec, 0x1d7f6, 0x1e140, 0x1e2f0, 0x1e950, 0x1fbf0,
    ];
    let code = u32::from(character);
    ZEROS.iter().find(|&&zero| (zero..zero + 10).contains(&code)).map(|zero| code - zero)
}

/// `str.isdigit`: decimals and digits in circles, above and below.
pub(super) fn is_digit(character: char) -> bool {
    is_decimal(character)
        || matches!(u32::from(character),
            0xb2 | 0xb3 | 0xb9 | 0x2070 | 0x2074..=0x2079 | 0x2080..=0x2089 | 0x2460..=0x2468
            | 0x2474..=0x247c | 0x2488..=0x2490 | 0x24ea | 0x24f5..=0x24fd | 0x24ff
            | 0x2776..=0x277e | 0x2780..=0x2788 | 0x278a..=0x2792)
}

/// `str.isnumeric`.
pub(super) fn is_numeric(character: char) -> bool {
    const HAN: &str = "〇一二三四五六七八九十百千万亿億兆零壱壹弐貳贰参參叁四肆五伍六陸陆七漆柒八捌九玖拾佰陌仟阡萬";
    is_digit(character)
        || (!character.is_ascii() && character.is_numeric())
        || HAN.contains(character)
}

/// `str.isalnum`.
pub(super) fn is_alnum(character: char) -> bool {
    is_alpha(character) || is_numeric(character)
}

/// A letter at the head of a word. The few letters of two in one have a case for that.
fn head(character: char, out: &mut String) {
    let code = u32::from(character);
    match code {
        0x1c4..=0x1c6 => out.push('\u{1c5}'),
        0x1c7..=0x1c9 => out.push('\u{1c8}'),
        0x1ca..=0x1cc => out.push('\u{1cb}'),
        0x1f1..=0x1f3 => out.push('\u{1f2}'),
        // Georgian has capitals only for whole words.
        0x10d0..=0x10fa | 0x10fd..=0x10ff => out.push(character),
        // Greek letters with an iota below or beside them.
        0x1f80..=0x1faf => out.extend(char::from_u32(code | 8)),
        0x1fb3 | 0x1fbc => out.push('\u{1fbc}'),
        0x1fc3 | 0x1fcc => out.push('\u{1fcc}'),
        0x1ff3 | 0x1ffc => out.push('\u{1ffc}'),
        0x1fb2 | 0x1fb4 | 0x1fb7 | 0x1fc2 | 0x1fc4 | 0x1fc7 | 0x1ff2 | 0x1ff4 | 0x1ff7 => {
            let iota = |upper| if upper == '\u{399}' { '\u{345}' } else { upper };
            out.extend(character.to_uppercase().map(iota));
        }
        // Letters that become several, the first of which is large.
        0xdf | 0x587 | 0xfb00..=0xfb06 | 0xfb13..=0xfb17 => {
            let mut upper = character.to_uppercase();
            out.extend(upper.next());
            out.extend(upper.flat_map(char::to_lowercase));
        }
        _ => out.extend(character.to_uppercase()),
    }
}

/// The letters of a word after its head: a sigma at its end has a form of its own, which depends
/// on the letters around it.
fn tail(before: &str, text: &str, out: &mut String) {
    if !text.contains('Σ') {
        out.extend(text.chars().flat_map(char::to_lowercase));
        return;
    }
    let whole = format!("{before}{text}").to_lowercase();
    let skipped = before.to_lowercase().chars().count();
    out.extend(whole.chars().skip(skipped));
}

/// `str.capitalize`.
pub(super) fn capitalize(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    if let Some(first) = text.chars().next() {
        head(first, &mut out);
        let (before, after) = text.split_at(first.len_utf8());
        tail(before, after, &mut out);
    }
    out
}

/// `str.title`.
pub(super) fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut word = "";
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if !is_cased(first) {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let end = rest.find(|character| !is_cased(character)).unwrap_or(rest.len());
        (word, rest) = rest.split_at(end);
        out.push_str(&capitalize(word));
    }
    let _ = word;
    out
}

/// `str.swapcase`.
pub(super) fn swapcase(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    // Small as a whole: a sigma at a word's end has a form of its own.
    let small = text.to_lowercase();
    let mut small = small.chars();
    for character in text.chars() {
        let lower = small.by_ref().take(character.to_lowercase().count());
        if character.is_uppercase() {
            out.extend(lower);
            continue;
        }
        lower.for_each(drop);
        if character.is_lowercase() {
            out.extend(character.to_uppercase());
        } else {
            out.push(character);
        }
    }
    out
}

/// `str.casefold`: for nearly all letters the small form of the large one.
pub(super) fn casefold(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match u32::from(character) {
            // Dotless i and Cherokee keep their forms.
            0x131 | 0x13a0..=0x13f5 => out.push(character),
            0xab70..=0xabbf => out.extend(character.to_uppercase()),
            0x13f8..=0x13fd => out.extend(character.to_uppercase()),
            0x1e9e => out.push_str("ss"),
            _ => {
                let upper: String = character.to_uppercase().collect();
                out.extend(upper.chars().flat_map(char::to_lowercase));
            }
        }
    }
    out
}

/// `str.isidentifier`.
pub(super) fn is_identifier(text: &str) -> bool {
    let mut characters = text.chars();
    let starts = |character: char| character == '_' || character.is_alphabetic();
    characters.next().is_some_and(starts)
        && characters.all(|character| starts(character) || is_decimal(character))
}

/// The lines of a text as `str.splitlines` finds them, with their ends.
pub(super) fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let breaks = |character: char| {
            matches!(
                character,
                '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'
                    ..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
            )
        };
        let at = rest.find(breaks).unwrap_or(rest.len());
        let (line, after) = rest.split_at(at);
        let end = if after.starts_with("\r\n") {
            2
        } else {
            after.chars().next().map_or(0, char::len_utf8)
        };
        let (end, after) = after.split_at(end);
        rest = after;
        Some((line, end))
    })
}
