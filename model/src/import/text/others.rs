//! Special tokens beside BOS and EOS that transformers gives to chat templates.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};

use crate::special::{LIST, SpecialText, SpecialTexts};

/// Characters of a name that a note shows.
const NOTED_CHARS: usize = 64;

/// What `tokenizer_config.json` or `special_tokens_map.json` says of them. Whatever is no text is
/// passed over: no reader of weights needs it. Of two values of a key the last counts, as in Python.
#[derive(Debug, Default)]
pub(in super::super) struct OtherTokens {
    unk_token: Option<Value>,
    sep_token: Option<Value>,
    pad_token: Option<Value>,
    cls_token: Option<Value>,
    mask_token: Option<Value>,
    additional_special_tokens: Option<Value>,
    /// Names of a model's own in version 4 of transformers, more of the list in version 5.
    extra_special_tokens: Option<Value>,
    /// Names of a model's own in version 5.
    model_specific_special_tokens: Option<Value>,
    /// Where it is, transformers does not look at `special_tokens_map.json`.
    added_tokens_decoder: Option<IgnoredAny>,
}

impl<'de> Deserialize<'de> for OtherTokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Keys)
    }
}

/// Reads [`OtherTokens`]; a derived reader refuses a key that is there twice.
struct Keys;

impl<'de> Visitor<'de> for Keys {
    type Value = OtherTokens;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<OtherTokens, A::Error> {
        let mut tokens = OtherTokens::default();
        while let Some(key) = map.next_key::<String>()? {
            let value = match key.as_str() {
                "unk_token" => &mut tokens.unk_token,
                "sep_token" => &mut tokens.sep_token,
                "pad_token" => &mut tokens.pad_token,
                "cls_token" => &mut tokens.cls_token,
                "mask_token" => &mut tokens.mask_token,
                "additional_special_tokens" => &mut tokens.additional_special_tokens,
                "extra_special_tokens" => &mut tokens.extra_special_tokens,
                "model_specific_special_tokens" => &mut tokens.model_specific_special_tokens,
                "added_tokens_decoder" => {
                    tokens.added_tokens_decoder = map.next_value()?;
                    continue;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            *value = map.next_value()?;
        }
        Ok(tokens)
    }
}

impl OtherTokens {
    /// Texts that have a name of their own.
    fn named(&self) -> BTreeMap<String, String> {
        let fields = [
            ("unk_token", &self.unk_token),
            ("sep_token", &self.sep_token),
            ("pad_token", &self.pad_token),
            ("cls_token", &self.cls_token),
            ("mask_token", &self.mask_token),
        ];
        let own = [&self.extra_special_tokens, &self.model_specific_special_tokens];
        let own = own.into_iter().flatten().filter_map(Value::as_object).flat_map(Map::iter);
        let own = own.map(|(name, value)| (name.as_str(), value));
        let fields = fields.into_iter().filter_map(|(name, value)| Some((name, value.as_ref()?)));
        let texts = own.chain(fields);
        texts.filter_map(|(name, value)| Some((name.to_owned(), text(value)?))).collect()
    }

    /// Texts of the list.
    fn listed(&self) -> Vec<String> {
        let lists = [&self.additional_special_tokens, &self.extra_special_tokens];
        let lists = lists.into_iter().flatten().filter_map(Value::as_array);
        lists.flatten().filter_map(text).collect()
    }
}

/// A text, as it is or as the content of an object. An empty one counts as none.
fn text(value: &Value) -> Option<String> {
    let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
    (!text.is_empty()).then(|| text.to_owned())
}

/// What version 4 of transformers calls the map of special tokens, without BOS and EOS, of both files.
pub(super) fn gather([config, map]: [OtherTokens; 2], notes: &mut Vec<String>) -> SpecialTexts {
    let (mut named, mut listed) = (config.named(), config.listed());
    if config.added_tokens_decoder.is_none() {
        named.extend(map.named());
        // It repeats nothing; what the config says twice stays.
        let mut seen: HashSet<String> = listed.iter().cloned().collect();
        listed.extend(map.listed().into_iter().filter(|text| seen.insert(text.clone())));
    }
    let mut texts = SpecialTexts::default();
    let (named, left_out): (Vec<_>, Vec<_>) =
        named.into_iter().partition(|(name, _)| SpecialTexts::is_name(name));
    if let Some((first, _)) = left_out.first() {
        let (count, first) = (left_out.len(), first.chars().take(NOTED_CHARS).collect::<String>());
        notes.push(format!(
            "special tokens: left out are such with names that no template knows one by ({count}, the \
             first is {first:?})"
        ));
    }
    for (name, text) in named {
        texts.add(&name, SpecialText::One(text));
    }
    texts.add(LIST, SpecialText::Several(listed));
    texts
}
