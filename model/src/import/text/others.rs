//! Special tokens beside BOS and EOS that transformers gives to chat templates.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use crate::special::{LIST, SpecialText, SpecialTexts};

/// What `tokenizer_config.json` or `special_tokens_map.json` says of them. Whatever is no text is
/// passed over: no reader of weights needs it.
#[derive(Debug, Default, Deserialize)]
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

/// What transformers calls the map of special tokens, without BOS and EOS, of both files.
pub(super) fn gather([config, map]: [OtherTokens; 2]) -> SpecialTexts {
    let (mut named, mut listed) = (config.named(), config.listed());
    if config.added_tokens_decoder.is_none() {
        named.extend(map.named());
        listed.extend(map.listed());
    }
    let mut seen = std::collections::HashSet::new();
    listed.retain(|text| seen.insert(text.clone()));
    let mut texts = SpecialTexts::default();
    for (name, text) in named {
        texts.add(&name, SpecialText::One(text));
    }
    texts.add(LIST, SpecialText::Several(listed));
    texts
}
