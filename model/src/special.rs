//! Texts of special tokens beside BOS and EOS that a chat template writes by name.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Longest text of a special token, in bytes.
pub(crate) const TOKEN_TEXT_BYTES_MAX: usize = 1024;
/// Texts of one list: vocabularies reserve a few thousand at most.
const LIST_TEXTS_MAX: usize = 4096;
/// Bytes of all texts together: those thousands are short, and a manifest has room for more than this.
const TEXTS_BYTES_MAX: usize = 256 << 10;
/// Names: transformers has six, and models of several media a few of their own.
const NAMES_MAX: usize = 64;
/// Longest name.
const NAME_BYTES_MAX: usize = 64;
/// The name under which transformers gives templates a list of texts.
pub(crate) const LIST: &str = "additional_special_tokens";

/// What templates are given under names of its own, and names of their language: none of them is a token's.
const RESERVED: [&str; 44] = [
    "bos_token",
    "eos_token",
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "raise_exception",
    "strftime_now",
    "range",
    "dict",
    "namespace",
    "cycler",
    "joiner",
    "lipsum",
    "loop",
    "self",
    "super",
    "caller",
    "varargs",
    "kwargs",
    "true",
    "false",
    "none",
    "True",
    "False",
    "None",
    "and",
    "or",
    "not",
    "in",
    "is",
    "if",
    "else",
    "elif",
    "for",
    "recursive",
    "set",
    "macro",
    "call",
    "filter",
    "block",
    "generation",
    "import",
];

/// Whether a template writes a name: not as a part of another.
pub(crate) fn names(template: &str, name: &str) -> bool {
    let is_part = |letter: Option<char>| letter.is_some_and(|c| c == '_' || c.is_alphanumeric());
    template.match_indices(name).any(|(at, _)| {
        let (before, after) = (&template[..at], &template[at + name.len()..]);
        !is_part(before.chars().next_back()) && !is_part(after.chars().next())
    })
}

/// What stands under one name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a text, or a list of them")]
pub enum SpecialText {
    /// A token's text.
    One(String),
    /// Those of several.
    Several(Vec<String>),
}

impl SpecialText {
    /// Each text.
    pub fn texts(&self) -> &[String] {
        match self {
            Self::One(text) => std::slice::from_ref(text),
            Self::Several(texts) => texts,
        }
    }
}

/// Texts by the names that a chat template knows them by, such as `unk_token` or
/// `additional_special_tokens`; BOS and EOS are not among them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SpecialTexts(BTreeMap<String, SpecialText>);

impl SpecialTexts {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &SpecialText)> {
        self.0.iter().map(|(name, text)| (name.as_str(), text))
    }

    /// Whether a template may know a token by this name: an identifier under which it is given nothing else.
    pub(crate) fn is_name(name: &str) -> bool {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        (1..=NAME_BYTES_MAX).contains(&name.len())
            && name.bytes().all(is_plain)
            && !name.starts_with(|first: char| first.is_ascii_digit())
            && !RESERVED.contains(&name)
    }

    /// Names a text. Nothing is kept of an empty one, nor under what is no name: transformers defines
    /// neither.
    pub(crate) fn add(&mut self, name: &str, text: SpecialText) {
        let is_there = text.texts().iter().any(|text| !text.is_empty());
        if is_there && Self::is_name(name) {
            self.0.insert(name.to_owned(), text);
        }
    }

    /// Keeps those that `template` names: the others are never asked for.
    pub(crate) fn keep_named_in(&mut self, template: Option<&str>) {
        self.0.retain(|name, _| template.is_some_and(|template| names(template, name)));
    }

    /// Takes the list away; whether there was one.
    pub(crate) fn drop_list(&mut self) -> bool {
        self.0.remove(LIST).is_some()
    }

    /// What is longer or more than is accepted: its name, how much there is, and the most.
    pub(crate) fn wrong(&self) -> Option<(String, usize, usize)> {
        if self.0.len() > NAMES_MAX {
            return Some(("the number of special tokens' names".into(), self.0.len(), NAMES_MAX));
        }
        let texts = self.0.values().flat_map(SpecialText::texts);
        let bytes: usize = texts.map(String::len).sum();
        if bytes > TEXTS_BYTES_MAX {
            let what = "the length of all special tokens' texts in bytes";
            return Some((what.into(), bytes, TEXTS_BYTES_MAX));
        }
        self.0.iter().find_map(|(name, text)| {
            let texts = text.texts();
            if texts.len() > LIST_TEXTS_MAX {
                return Some((format!("the number of {name}"), texts.len(), LIST_TEXTS_MAX));
            }
            let longest = texts.iter().map(String::len).max().unwrap_or(0);
            let what = || format!("the length of {name} in bytes");
            (longest > TOKEN_TEXT_BYTES_MAX).then(|| (what(), longest, TOKEN_TEXT_BYTES_MAX))
        })
    }

    /// A name that no template may know a token by, or one of a list where one text is, or the other way
    /// round.
    pub(crate) fn wrong_name(&self) -> Option<&str> {
        let is_right = |name: &str, text: &SpecialText| {
            Self::is_name(name) && (name == LIST) == matches!(text, SpecialText::Several(_))
        };
        self.iter().find(|(name, text)| !is_right(name, text)).map(|(name, _)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_name_is_none() {
        for template in ["{{ boi }}", "boi", "x['boi']", "my_boi~boi"] {
            assert!(names(template, "boi"), "{template}");
        }
        for template in ["{{ my_boi }}", "boing", "éboi", "boi2", ""] {
            assert!(!names(template, "boi"), "{template}");
        }
    }

    #[test]
    fn names_and_sizes_are_checked() {
        for name in
            ["unk_token", "image_token", "boi_token", "boi", "Unk_token", "imageStart", LIST]
        {
            assert!(SpecialTexts::is_name(name), "{name}");
        }
        for name in [
            "messages",
            "tools",
            "bos_token",
            "eos_token",
            "a b_token",
            "range",
            "0_token",
            "",
            "é",
        ] {
            assert!(!SpecialTexts::is_name(name), "{name}");
        }
        let mut texts = SpecialTexts::default();
        texts.add("unk_token", SpecialText::One(String::new()));
        texts.add("messages", SpecialText::One("x".into()));
        texts.add(LIST, SpecialText::Several(Vec::new()));
        assert!(texts.is_empty());
        texts.add("unk_token", SpecialText::One("<unk>".into()));
        texts.add("pad_token", SpecialText::One("x".repeat(TOKEN_TEXT_BYTES_MAX)));
        assert_eq!(texts.wrong(), None);
        texts.add("pad_token", SpecialText::One("x".repeat(TOKEN_TEXT_BYTES_MAX + 1)));
        assert_eq!(texts.wrong().unwrap().1, TOKEN_TEXT_BYTES_MAX + 1);
        texts.keep_named_in(Some("{{ unk_token }}"));
        assert_eq!(texts.iter().count(), 1);
        texts.add(LIST, SpecialText::Several(vec!["x".into(); LIST_TEXTS_MAX + 1]));
        assert_eq!(texts.wrong().unwrap().2, LIST_TEXTS_MAX);
        texts.add(LIST, SpecialText::Several(vec!["x".repeat(1000); 300]));
        assert_eq!(texts.wrong().unwrap().2, TEXTS_BYTES_MAX);
        assert_eq!(texts.wrong_name(), None);
        texts.keep_named_in(None);
        assert!(texts.is_empty());
        texts.add("pad_token", SpecialText::Several(vec!["x".into()]));
        assert_eq!(texts.wrong_name(), Some("pad_token"));
    }
}
