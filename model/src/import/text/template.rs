//! Which chat template is taken, of all that the files hold.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::super::ImportError;
use crate::manifest::CHAT_TEMPLATE_BYTES_MAX;

/// Name of the template that is taken where several have names.
const DEFAULT: &str = "default";

/// A template, or several with names.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Template {
    One(String),
    List(Vec<NamedTemplate>),
    Map(BTreeMap<String, String>),
}

#[derive(Debug, Deserialize)]
pub(super) struct NamedTemplate {
    name: String,
    template: String,
}

/// The template of a Hugging Face directory: `chat_template.jinja` goes before
/// `chat_template.json`, and that before `tokenizer_config.json`, as in transformers.
pub(super) fn gather(
    jinja: Option<Vec<u8>>,
    json: Option<Template>,
    tokenizer_config: Option<Template>,
    notes: &mut Vec<String>,
) -> Result<Option<String>, ImportError> {
    let jinja = jinja.map(String::from_utf8).transpose().map_err(|_| ImportError::Value {
        key: "chat_template.jinja".into(),
        found: "not UTF-8".into(),
        expected: "text".into(),
    })?;
    let places = [
        ("chat_template.jinja", jinja),
        ("chat_template.json", json.and_then(|found| take(found, "chat_template.json", notes))),
        (
            "tokenizer_config.json",
            tokenizer_config.and_then(|found| take(found, "tokenizer_config.json", notes)),
        ),
    ];
    let mut taken: Option<(&str, String)> = None;
    for (place, found) in places {
        match (&taken, found) {
            (None, Some(text)) => {
                notes.push(format!("chat template: from {place}"));
                taken = Some((place, text));
            }
            (Some((first, text)), Some(other)) if *text != other => {
                notes.push(format!("chat template: {place} has another one than {first}: ignored"));
            }
            _ => {}
        }
    }
    let text = taken.map(|(_, text)| text);
    check_template(text.as_deref())?;
    Ok(text)
}

/// The one template, or the one that is named `default`.
fn take(template: Template, place: &str, notes: &mut Vec<String>) -> Option<String> {
    let named: Vec<(String, String)> = match template {
        Template::One(text) => return Some(text),
        Template::List(named) => named.into_iter().map(|t| (t.name, t.template)).collect(),
        Template::Map(named) => named.into_iter().collect(),
    };
    take_named(named, place, notes)
}

/// The template that is named `default`; a note says if there is none.
fn take_named(
    named: Vec<(String, String)>,
    place: &str,
    notes: &mut Vec<String>,
) -> Option<String> {
    const NAMES_SHOWN: usize = 8;
    let names: Vec<String> = named
        .iter()
        .take(NAMES_SHOWN)
        .map(|(name, _)| name.chars().take(32).collect::<String>())
        .collect();
    let found = named.into_iter().find(|(name, _)| name == DEFAULT).map(|(_, text)| text);
    if found.is_none() && !names.is_empty() {
        notes.push(format!(
            "chat template: {place} has {}, none named {DEFAULT:?}: none is taken",
            names.join(", ")
        ));
    }
    found
}

/// Refuses a template that no model needs.
pub(in super::super) fn check_template(template: Option<&str>) -> Result<(), ImportError> {
    match template {
        Some(text) if text.len() > CHAT_TEMPLATE_BYTES_MAX => Err(ImportError::Value {
            key: "the chat template's length".into(),
            found: format!("{} bytes", text.len()),
            expected: format!("at most {CHAT_TEMPLATE_BYTES_MAX}"),
        }),
        _ => Ok(()),
    }
}
