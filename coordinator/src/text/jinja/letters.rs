//! Python's ideas of letters, digits and cases.

use unicode_properties::{GeneralCategory, GeneralCategoryGroup, UnicodeGeneralCategory};

/// Letters in both cases or between them that are neither.
fn is_title(character: char) -> bool {
    character.general_category() == GeneralCategory::TitlecaseLetter
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

/// `str.isalpha`: letters that are no digits; marks and letter-like numbers are none.
pub(super) fn is_alpha(character: char) -> bool {
    character.general_category_group() == GeneralCategoryGroup::Letter
}

/// `str.isdecimal`.
pub(super) fn is_decimal(character: char) -> bool {
    character.general_category() == GeneralCategory::DecimalNumber
}

/// The value of a decimal digit. The digits of a script follow one another from its zero, and the
/// sets of digits that lie side by side are whole ones.
pub(super) fn decimal_value(character: char) -> Option<u32> {
    let code = u32::from(character);
    let is_digit = |code| char::from_u32(code).is_some_and(is_decimal);
    is_digit(code)
        .then(|| (1..=code).take_while(|back| is_digit(code - back)).count())
        .map(|before| u32::try_from(before).unwrap_or(0) % 10)
}

/// `str.isdigit`: decimals, and digits in circles, above, below and of scripts without a zero.
pub(super) fn is_digit(character: char) -> bool {
    is_decimal(character)
        || matches!(u32::from(character),
            0xb2 | 0xb3 | 0xb9 | 0x1369..=0x1371 | 0x19da | 0x2070 | 0x2074..=0x2079
            | 0x2080..=0x2089 | 0x2460..=0x2468 | 0x2474..=0x247c | 0x2488..=0x2490 | 0x24ea
            | 0x24f5..=0x24fd | 0x24ff | 0x2776..=0x277e | 0x2780..=0x2788 | 0x278a..=0x2792
            | 0x10a40..=0x10a43 | 0x10e60..=0x10e68 | 0x11052..=0x1105a | 0x1f100..=0x1f10a)
}

/// `str.isnumeric`: every number, and the Chinese letters that stand for one.
pub(super) fn is_numeric(character: char) -> bool {
    const HAN: &str = "㐅㒃㠪㭍一七万三九二五亖亿什仟仨伍佰億兆兩八六十千卄卅卌叁参參叄四壱壹幺廾廿\
        弌弍弎弐拾捌柒漆玖百肆萬貮貳贰阡陆陌陸零\
        \u{f96b}\u{f973}\u{f978}\u{f9b2}\u{f9d1}\u{f9d3}\u{f9fd}\u{20001}\u{20064}\u{200e2}\
        \u{20121}\u{2092a}\u{20983}\u{2098c}\u{2099c}\u{20aea}\u{20afd}\u{20b19}\u{22390}\
        \u{22998}\u{23b1b}\u{2626d}\u{2f890}";
    character.general_category_group() == GeneralCategoryGroup::Number || HAN.contains(character)
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
    characters.next().is_some_and(|first| first == '_' || unicode_ident::is_xid_start(first))
        && characters.all(unicode_ident::is_xid_continue)
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
