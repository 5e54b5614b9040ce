//! Which chat template is taken, of all that the files hold.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::super::ImportError;
use crate::manifest::CHAT_TEMPLATE_BYTES_MAX;

/// Name of the template that is taken where several have names.
const DEFAULT: &str = "default";

/// A template, or several with names.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a template's text, or several with names")]
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

/// The template of a Hugging Face directory: `files` (`chat_template.jinja` and the default one of
/// the folder beside it) go before `chat_template.json`, and that before `tokenizer_config.json`,
/// as in transformers.
pub(super) fn gather(
    files: [(&'static str, Option<Vec<u8>>); 2],
    json: Option<Template>,
    tokenizer_config: Option<Template>,
    notes: &mut Vec<String>,
) -> Result<Option<String>, ImportError> {
    let mut places = Vec::new();
    for (place, bytes) in files {
        let text = bytes.map(String::from_utf8).transpose().map_err(|_| ImportError::Value {
            key: place.into(),
            found: "not UTF-8".into(),
            expected: "text".into(),
        })?;
        places.push((place, text));
    }
    for (place, template) in
        [("chat_template.json", json), ("tokenizer_config.json", tokenizer_config)]
    {
        places.push((place, template.and_then(|found| take(found, place, notes))));
    }
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

/// The template that is named `default`; a note says if there is none, and which others there are.
fn take_named(
    named: Vec<(String, String)>,
    place: &str,
    notes: &mut Vec<String>,
) -> Option<String> {
    let others = named.iter().map(|(name, _)| name.clone()).filter(|name| name != DEFAULT);
    let others: Vec<String> = others.collect();
    let found = named.into_iter().find(|(name, _)| name == DEFAULT).map(|(_, text)| text);
    if found.is_some() {
        note_others(place, others, notes);
    } else if !others.is_empty() {
        notes.push(format!(
            "chat template: {place} has {}, none named {DEFAULT:?}: none is taken",
            shown(&others)
        ));
    }
    found
}

/// Says that templates with other names than the default one are not used.
pub(super) fn note_others(place: &str, mut names: Vec<String>, notes: &mut Vec<String>) {
    names.retain(|name| name != DEFAULT);
    if !names.is_empty() {
        notes.push(format!("chat template: {place} also has {}: not used", shown(&names)));
    }
}

/// The first few of some names, cut to a length that can be read.
fn shown(names: &[String]) -> String {
    const NAMES_SHOWN: usize = 8;
    let cut = |name: &String| name.chars().take(32).collect::<String>();
    let mut text = names.iter().take(NAMES_SHOWN).map(cut).collect::<Vec<_>>().join(", ");
    if names.len() > NAMES_SHOWN {
        text += &format!(" and {} more", names.len() - NAMES_SHOWN);
    }
    text
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
