//! Keeps users' text from spelling special tokens inside a rendered chat template.
//!
//! A template only copies, cuts and joins the texts it is given. If the letters of a special token
//! appear in the users' texts in order (with anything between), some cutting could spell it, so
//! then the first letter of every special token is replaced in those texts by a stand-in that
//! appears nowhere else. A special token found in what was rendered thus begins in the template's
//! own text. The stand-ins become the letters again after the rendered text was split at its
//! special tokens. Other texts are passed through untouched, so templates that look for tags
//! (`</think>`) still find them.

use std::borrow::Cow;

use super::TextError;

/// Characters that stand in for others: private-use, so that no template gives them a meaning
/// and changing case leaves them alone.
pub(super) const STAND_INS: std::ops::RangeInclusive<u32> = 0xF_0000..=0xF_FFFD;

/// The stand-ins of one conversation; empty when its texts are harmless.
#[derive(Default)]
pub(crate) struct Guard {
    /// (letter, stand-in), one for each distinct first letter of a special token.
    pairs: Vec<(char, char)>,
}

impl Guard {
    /// Decides whether `user_texts`, in their order, could spell one of `specials`.
    ///
    /// # Errors
    ///
    /// [`TextError::PrivateUse`] if the texts use up every character that could stand in.
    pub(crate) fn new<'a>(
        specials: impl Iterator<Item = &'a str> + Clone,
        user_texts: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<Self, TextError> {
        let could_spell =
            specials.clone().any(|special| is_subsequence(special, user_texts.clone()));
        if !could_spell {
            return Ok(Self { pairs: Vec::new() });
        }
        let mut letters: Vec<char> =
            specials.filter_map(|special| special.chars().next()).collect();
        letters.sort_unstable();
        letters.dedup();
        let used: std::collections::HashSet<char> = user_texts
            .flat_map(str::chars)
            .filter(|&character| STAND_INS.contains(&u32::from(character)))
            .collect();
        let free =
            STAND_INS.filter_map(char::from_u32).filter(|character| !used.contains(character));
        let pairs: Vec<(char, char)> = letters.iter().copied().zip(free).collect();
        if pairs.len() < letters.len() {
            return Err(TextError::PrivateUse);
        }
        Ok(Self { pairs })
    }

    /// A user's text as the template may see it.
    pub(crate) fn protect<'a>(&self, text: &'a str) -> Cow<'a, str> {
        self.replace(text, |(letter, stand_in)| (letter, stand_in))
    }

    /// What [`Guard::protect`] was given.
    pub(crate) fn restore<'a>(&self, text: &'a str) -> Cow<'a, str> {
        self.replace(text, |(letter, stand_in)| (stand_in, letter))
    }

    fn replace<'a>(
        &self,
        text: &'a str,
        direction: impl Fn((char, char)) -> (char, char),
    ) -> Cow<'a, str> {
        if self.pairs.is_empty() {
            return Cow::Borrowed(text);
        }
        let replaced = text.chars().map(|character| {
            let pair = self.pairs.iter().map(|&pair| direction(pair));
            pair.into_iter().find(|pair| pair.0 == character).map_or(character, |pair| pair.1)
        });
        Cow::Owned(replaced.collect())
    }
}

/// Whether the letters of `needle` appear in `texts` in order, in any case.
fn is_subsequence<'a>(needle: &str, texts: impl Iterator<Item = &'a str>) -> bool {
    let mut wanted = needle.chars().flat_map(char::to_lowercase).peekable();
    for character in texts.flat_map(str::chars).flat_map(char::to_lowercase) {
        if wanted.next_if_eq(&character).is_some() && wanted.peek().is_none() {
            return true;
        }
    }
    wanted.peek().is_none()
}
