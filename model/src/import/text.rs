//! Tokenizer, special tokens and chat template of a checkpoint.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};

use super::ImportError;
use crate::config::ModelConfig;
use crate::manifest::CHAT_TEMPLATE_BYTES_MAX;
use crate::writer::ModelText;

/// Ends a turn in Llama 3's vocabulary, which BitNet's chat templates use too.
const END_OF_TURN: &str = "<|eot_id|>";
/// Texts of tokens that are looked up by themselves.
const WANTED: [&str; 1] = [END_OF_TURN];

/// `eos_token_id`: absent, a number, or a list.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(untagged)]
pub(super) enum TokenIds {
    #[default]
    None,
    One(u32),
    Many(Vec<u32>),
}

impl TokenIds {
    pub(super) fn sorted(&self) -> Vec<u32> {
        let mut ids = match self {
            Self::None => vec![],
            Self::One(id) => vec![*id],
            Self::Many(ids) => ids.clone(),
        };
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

/// The text files of a Hugging Face directory.
#[derive(Debug, Default)]
pub(super) struct HuggingFaceText {
    pub(super) tokenizer: Option<Vec<u8>>,
    pub(super) tokenizer_config: TokenizerConfig,
    pub(super) generation_config: GenerationConfig,
    /// `chat_template.jinja`, which goes before the one in `tokenizer_config.json`.
    pub(super) template: Option<Vec<u8>>,
}

/// `tokenizer_config.json`.
#[derive(Debug, Default, Deserialize)]
pub(super) struct TokenizerConfig {
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
    chat_template: Option<Template>,
    add_bos_token: Option<bool>,
}

/// `generation_config.json`.
#[derive(Debug, Default, Deserialize)]
pub(super) struct GenerationConfig {
    #[serde(default)]
    eos_token_id: TokenIds,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Object { content: String },
}

impl SpecialToken {
    fn text(self) -> String {
        match self {
            Self::Text(text) | Self::Object { content: text } => text,
        }
    }
}

/// A template, or several with names.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Template {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// Text and special tokens of a Hugging Face directory; completes `config`.
pub(super) fn from_hugging_face(
    files: HuggingFaceText,
    config: &mut ModelConfig,
    notes: &mut Vec<String>,
) -> Result<ModelText, ImportError> {
    let HuggingFaceText { tokenizer, tokenizer_config, generation_config, template } = files;
    let template = match (template, tokenizer_config.chat_template) {
        (Some(jinja), _) => {
            notes.push("chat template: from chat_template.jinja".into());
            let text = String::from_utf8(jinja).map_err(|_| ImportError::Value {
                key: "chat_template.jinja".into(),
                found: "not UTF-8".into(),
                expected: "text".into(),
            })?;
            Some(text)
        }
        (None, Some(template)) => {
            notes.push("chat template: from tokenizer_config.json".into());
            match template {
                Template::One(text) => Some(text),
                Template::Named(named) => {
                    named.into_iter().find(|t| t.name == "default").map(|t| t.template)
                }
            }
        }
        (None, None) => None,
    };
    check_template(template.as_deref())?;
    config.eos_tokens.extend(generation_config.eos_token_id.sorted());
    let summary = tokenizer.as_deref().map(TokenizerSummary::parse).transpose()?;
    if let Some(summary) = &summary {
        let by_post_processor =
            summary.first_token.is_some() && summary.first_token == config.bos_token;
        config.add_bos = tokenizer_config.add_bos_token.unwrap_or(by_post_processor);
    }
    let bos_text = tokenizer_config.bos_token.map(SpecialToken::text);
    let eos_text = tokenizer_config.eos_token.map(SpecialToken::text);
    finish(summary.as_ref(), config, notes)?;
    let text_of = |id: Option<u32>| summary.as_ref()?.special.get(&id?).cloned();
    Ok(ModelText {
        bos_text: bos_text.or_else(|| text_of(config.bos_token)),
        eos_text: eos_text.or_else(|| text_of(config.eos_tokens.first().copied())),
        tokenizer,
        chat_template: template,
    })
}

/// Completes special tokens, and says what they are. Every tokenizer comes through here.
pub(super) fn finish(
    tokenizer: Option<&TokenizerSummary>,
    config: &mut ModelConfig,
    notes: &mut Vec<String>,
) -> Result<(), ImportError> {
    if let Some(tokenizer) = tokenizer {
        if tokenizer.highest_id >= config.vocab {
            return Err(ImportError::Tokenizer(format!(
                "it has token {}, the model's vocabulary ends before {}",
                tokenizer.highest_id, config.vocab
            )));
        }
        config.eos_tokens.extend(tokenizer.wanted.values());
        notes.push(format!("tokenizer: ids up to {}", tokenizer.highest_id));
    } else {
        notes.push("tokenizer: none, only token ids work".into());
        config.add_bos = false;
    }
    config.add_bos &= config.bos_token.is_some();
    config.eos_tokens.sort_unstable();
    config.eos_tokens.dedup();
    notes.push(format!(
        "special tokens: BOS {}, added to text: {}; EOS {:?}",
        config.bos_token.map_or_else(|| "none".into(), |token| token.to_string()),
        if config.add_bos { "yes" } else { "no" },
        config.eos_tokens,
    ));
    Ok(config.validate()?)
}

/// Refuses a template that no model needs.
pub(super) fn check_template(template: Option<&str>) -> Result<(), ImportError> {
    match template {
        Some(text) if text.len() > CHAT_TEMPLATE_BYTES_MAX => Err(ImportError::Value {
            key: "the chat template's length".into(),
            found: format!("{} bytes", text.len()),
            expected: format!("at most {CHAT_TEMPLATE_BYTES_MAX}"),
        }),
        _ => Ok(()),
    }
}

/// What an import needs to know of a `tokenizer.json`.
#[derive(Debug, Default)]
pub(super) struct TokenizerSummary {
    highest_id: u32,
    /// Ids of those [`WANTED`] texts that are tokens.
    wanted: BTreeMap<String, u32>,
    /// Texts of the added tokens.
    special: BTreeMap<u32, String>,
    /// The token that a template post-processor puts in front.
    first_token: Option<u32>,
}

impl TokenizerSummary {
    pub(super) fn parse(json: &[u8]) -> Result<Self, ImportError> {
        let file: TokenizerFile = serde_json::from_slice(json)
            .map_err(|source| ImportError::Json { path: "tokenizer.json".into(), source })?;
        let mut summary = Self {
            highest_id: file.model.vocab.highest_id,
            wanted: file.model.vocab.wanted,
            ..Self::default()
        };
        for token in file.added_tokens {
            summary.highest_id = summary.highest_id.max(token.id);
            if WANTED.contains(&token.content.as_str()) {
                summary.wanted.insert(token.content.clone(), token.id);
            }
            summary.special.insert(token.id, token.content);
        }
        summary.first_token = file.post_processor.and_then(|processor| processor.first_token());
        Ok(summary)
    }
}

#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    model: TokenizerModel,
    post_processor: Option<PostProcessor>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

#[derive(Deserialize)]
struct TokenizerModel {
    vocab: VocabSummary,
}

/// A post-processor; only what puts a token in front matters.
#[derive(Deserialize)]
struct PostProcessor {
    #[serde(default)]
    processors: Vec<PostProcessor>,
    #[serde(default)]
    single: Vec<TemplatePiece>,
    #[serde(default)]
    special_tokens: BTreeMap<String, TemplateToken>,
}

impl PostProcessor {
    fn first_token(&self) -> Option<u32> {
        let name = match self.single.first() {
            Some(TemplatePiece { special: Some(special) }) => &special.id,
            _ => return self.processors.iter().find_map(Self::first_token),
        };
        self.special_tokens.get(name)?.ids.first().copied()
    }
}

#[derive(Deserialize)]
struct TemplatePiece {
    #[serde(rename = "SpecialToken")]
    special: Option<PieceName>,
}

#[derive(Deserialize)]
struct PieceName {
    id: String,
}

#[derive(Deserialize)]
struct TemplateToken {
    ids: Vec<u32>,
}

/// A vocabulary of which only a few facts are kept: a map from text to id (BPE, WordPiece), or a
/// list of pairs (Unigram).
#[derive(Debug, Default)]
struct VocabSummary {
    highest_id: u32,
    wanted: BTreeMap<String, u32>,
}

impl<'de> Deserialize<'de> for VocabSummary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(VocabVisitor)
    }
}

struct VocabVisitor;

impl<'de> Visitor<'de> for VocabVisitor {
    type Value = VocabSummary;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a vocabulary")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<VocabSummary, A::Error> {
        let mut summary = VocabSummary::default();
        while let Some((text, id)) = map.next_entry::<String, u32>()? {
            summary.highest_id = summary.highest_id.max(id);
            if WANTED.contains(&text.as_str()) {
                summary.wanted.insert(text, id);
            }
        }
        Ok(summary)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<VocabSummary, A::Error> {
        let mut summary = VocabSummary::default();
        let mut next_id = 0u32;
        while let Some((text, _)) = seq.next_element::<(String, f64)>()? {
            summary.highest_id = next_id;
            if WANTED.contains(&text.as_str()) {
                summary.wanted.insert(text, next_id);
            }
            next_id = next_id.saturating_add(1);
        }
        Ok(summary)
    }
}
