//! Tries a model's text as serving will, before the model is imported: what cannot be served is
//! found by whoever imports it, and not at the first start.

use model::{TextToTry, TriedText};

use super::template::{ChatTemplate, TemplateTexts};
use super::tokenizer::{Tokenizer, TokenizerError};
use super::{Detokenizer, TextError};

/// Letters, blanks, a digit, a line's end, and characters of two, three and four bytes.
const PROBE: &str = "Once upon a time, 2 \u{e9}l\u{e8}ves\n\u{4f60}\u{597d} \u{1f642}";
/// What every vocabulary of text can write.
const PLAIN_PROBE: &str = "a";

/// Why a model's text cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrialError {
    /// The tokenizer does not load.
    #[error("failed to load the tokenizer")]
    Tokenizer(#[from] TokenizerError),
    /// It fails on a text.
    #[error("failed to tokenize a short text")]
    Encode(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It makes nothing of a text.
    #[error("the tokenizer makes no tokens of {PLAIN_PROBE:?}")]
    NoTokens,
    /// It makes ids of which the model has none.
    #[error("the tokenizer makes token {id}, the model has {vocab}")]
    Outside {
        /// The id.
        id: u32,
        /// Tokens of the model.
        vocab: u32,
    },
}

/// Loads the tokenizer, takes a text there and back, compiles the chat template and renders a
/// conversation: what [`model::ImportOptions::try_text`] wants.
///
/// # Errors
///
/// [`TrialError`] if text cannot be served. A template that cannot be used is no error.
pub fn try_text(
    text: TextToTry<'_>,
) -> Result<TriedText, Box<dyn std::error::Error + Send + Sync>> {
    Ok(trial(text)?)
}

fn trial(text: TextToTry<'_>) -> Result<TriedText, TrialError> {
    let config = text.config;
    let mut tried = TriedText::default();
    let bos = config.add_bos.then_some(config.bos_token).flatten();
    let tokenizer = match text.tokenizer {
        Some(json) => Some(Tokenizer::from_json(json, config.vocab, bos)?),
        None => None,
    };
    if let Some(tokenizer) = &tokenizer {
        if encoded(tokenizer, PLAIN_PROBE, config.vocab)?.len() <= usize::from(bos.is_some()) {
            return Err(TrialError::NoTokens);
        }
        let ids = encoded(tokenizer, PROBE, config.vocab)?;
        let mut detokenizer = Detokenizer::default();
        let mut back: String =
            ids.iter().map(|id| detokenizer.push(tokenizer.text_bytes(*id))).collect();
        back += &detokenizer.finish();
        // SentencePiece puts a blank in front of a text.
        if back.trim_start() != PROBE {
            tried.notes.push(format!("tokenizer: {PROBE:?} comes back as {back:?}"));
        }
    }
    if let Some(source) = text.chat_template {
        let texts = TemplateTexts {
            bos: text.bos_text.unwrap_or_default().to_owned(),
            eos: text.eos_text.unwrap_or_default().to_owned(),
        };
        let tried_out =
            ChatTemplate::compile(source, texts).and_then(|template| template.try_out());
        if let Err(error) = tried_out {
            tried.template_refused = Some(node::Chain(&error).to_string());
        }
    }
    Ok(tried)
}

fn encoded(tokenizer: &Tokenizer, text: &str, vocab: u32) -> Result<Vec<u32>, TrialError> {
    let ids = tokenizer.encode_plain(text).map_err(|error| match error {
        TextError::Encode(source) => TrialError::Encode(source),
        other => TrialError::Encode(other.into()),
    })?;
    match ids.iter().find(|id| **id >= vocab) {
        Some(&id) => Err(TrialError::Outside { id, vocab }),
        None => Ok(ids),
    }
}

#[cfg(test)]
mod tests {
    use model::Store;
    use serde_json::{Value, json};

    use super::*;

    /// The bundled model's text, tried after a change of its tokenizer.
    fn tried(
        change: impl FnOnce(&mut Value),
        template: Option<&str>,
    ) -> Result<TriedText, TrialError> {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&model::import_bundled(dir.path()).unwrap()).unwrap();
        let mut json: Value =
            serde_json::from_slice(&store.tokenizer_json().unwrap().unwrap()).unwrap();
        change(&mut json);
        let json = serde_json::to_vec(&json).unwrap();
        let manifest = store.manifest();
        trial(TextToTry {
            config: store.config(),
            tokenizer: Some(&json),
            chat_template: template.or(manifest.chat_template.as_deref()),
            bos_text: manifest.bos_token_text.as_deref(),
            eos_text: manifest.eos_token_text.as_deref(),
        })
    }

    #[test]
    fn the_bundled_models_text_can_be_served() {
        assert_eq!(tried(|_| {}, None).unwrap(), TriedText::default());
    }

    #[test]
    fn what_serving_would_refuse_is_refused_at_import() {
        let error = tried(|json| json["decoder"] = json!({"type": "Fuse"}), None).unwrap_err();
        assert!(matches!(error, TrialError::Tokenizer(TokenizerError::Decoder { .. })), "{error}");
        let broken = json!({"type": "Replace", "pattern": {"Regex": "("}, "content": ""});
        let error = tried(|json| json["normalizer"] = broken, None).unwrap_err();
        assert!(matches!(error, TrialError::Tokenizer(TokenizerError::Part { .. })), "{error}");
        let removes = json!({"type": "Replace", "pattern": {"Regex": "."}, "content": ""});
        let error = tried(|json| json["normalizer"] = removes, None).unwrap_err();
        assert!(matches!(error, TrialError::NoTokens), "{error}");
        let lower = tried(|json| json["normalizer"] = json!({"type": "Lowercase"}), None).unwrap();
        assert!(lower.notes[0].contains("comes back as \"once upon"), "{:?}", lower.notes);
    }

    #[test]
    fn templates_that_cannot_be_used_are_left_out_with_their_reason() {
        let refused = |template: &str| tried(|_| {}, Some(template)).unwrap().template_refused;
        assert!(refused("{% for message in messages %}").is_some());
        assert!(refused("{{ messages | nonsense }}").is_some());
        let endless =
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}";
        assert!(refused(endless).is_some());
        // What is found only while rendering has its name in the import's reason.
        for (source, name) in [
            (
                "{% set ns = namespace() %}{% for i in [1] %}{% macro f() %}x{% endmacro %}\
                 {% set ns.f = f %}{% endfor %}{{ ns.f() }}",
                "a macro or loop is called after the block that it was made in",
            ),
            ("{{ 2 ** 127 }}", "an integer had more than 127 bits"),
        ] {
            assert!(refused(source).unwrap().contains(name), "{source}");
        }
        let refuses_systems = "{% if messages[0]['role'] == 'system' %}\
            {{ raise_exception('no system') }}{% endif %}{{ messages[0]['content'] }}";
        assert_eq!(refused(refuses_systems), None);
    }
}
