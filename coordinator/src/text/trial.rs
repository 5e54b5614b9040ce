//! Tries a model's text as serving will, before the model is imported: what cannot be served is
//! found by whoever imports it, and not at the first start.

use std::time::Duration;

use model::{TextToTry, TriedText};

use super::patterns::PatternError;
use super::template::{ChatTemplate, TemplateTexts};
use super::tokenizer::{Tokenizer, TokenizerError, split_time};
use super::{Detokenizer, TextError};

/// Letters, blanks, a digit, a line's end, and characters of two, three and four bytes.
const PROBE: &str = "Once upon a time, 2 \u{e9}l\u{e8}ves\n\u{4f60}\u{597d} \u{1f642}";
/// What every vocabulary of text can write.
const PLAIN_PROBE: &str = "a";

/// A text that took too long is tried so often: a busy machine is no reason to refuse a model.
const TRIES: usize = 3;
/// Bytes of a text of short blocks of one letter.
const BLOCKS_BYTES: usize = 512;
/// Lengths of such blocks: a pattern that doubles its work with every letter takes milliseconds for
/// one of these, or gives up.
const BLOCKS: [usize; 4] = [11, 16, 21, 32];
/// Letters of a text of one letter, from short ones on: a single match cannot be stopped, and what
/// grows by the square or the cube of a text is found before it takes minutes.
const RUNS: [usize; 7] = [1 << 10, 2 << 10, 4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10];
/// Letters that are tried, of those that patterns name.
const LETTERS: usize = 16;
/// Of these, also long runs are tried, and of letters of every sort.
const RUN_LETTERS: usize = 2;
/// A letter of every sort.
const SORTS: [char; 4] = ['a', '0', '-', ' '];

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
    /// Its patterns take so long that a client's text could hold up all others.
    #[error("the tokenizer is too slow on a text of {text:?}")]
    Slow {
        /// How the text begins.
        text: String,
        /// Which part took how long.
        source: PatternError,
    },
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
        tried.notes.extend(try_patterns(tokenizer, split_time)?);
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
            bos: text.bos_text.map(str::to_owned),
            eos: text.eos_text.map(str::to_owned),
            special: text.special.clone(),
        };
        let tried_out =
            ChatTemplate::compile(source, texts).and_then(|template| template.try_out());
        if let Err(error) = tried_out {
            tried.template_refused = Some(node::Chain(&error).to_string());
        }
    }
    Ok(tried)
}

/// How long a text may take.
type Limit = fn(&str) -> Duration;

/// Tries the patterns on texts that make bad ones slow. Those that fail on a short text, or take longer than
/// `limit` gives, are refused; where one gives up on a long run of one letter, that is a note. It cannot
/// find every bad one: what a prompt may take is bounded too.
fn try_patterns(tokenizer: &Tokenizer, limit: Limit) -> Result<Option<String>, TrialError> {
    let patterns = tokenizer.patterns();
    if patterns.is_empty() {
        return Ok(None);
    }
    let letters = letters(&patterns);
    for text in strange_texts(&letters) {
        cut(tokenizer, limit, &text)?;
    }
    for letter in letters.iter().take(RUN_LETTERS).chain(&SORTS) {
        for length in RUNS {
            match cut(tokenizer, limit, &letter.to_string().repeat(length)) {
                Err(TrialError::Slow { source: source @ PatternError::GaveUp { .. }, .. }) => {
                    return Ok(Some(format!(
                        "tokenizer: prompts with {length} times {letter:?} in a row are refused: {source}"
                    )));
                }
                tried => tried?,
            }
        }
    }
    Ok(None)
}

/// Cuts a text as serving does, in time at least once.
fn cut(tokenizer: &Tokenizer, limit: Limit, text: &str) -> Result<(), TrialError> {
    for left in (0..TRIES).rev() {
        match tokenizer.cut_within(limit(text), text) {
            Err(TextError::Pattern(PatternError::TimedOut { .. })) if left > 0 => {}
            Err(TextError::Pattern(source)) => {
                let text = text.chars().take(2 * BLOCKS[1]).collect();
                return Err(TrialError::Slow { text, source });
            }
            tried => return tried.map_err(not_encoded),
        }
    }
    Ok(())
}

/// Letters and digits that the patterns name, and some of every sort but blanks.
fn letters(patterns: &[&str]) -> Vec<char> {
    let mut letters: Vec<char> = Vec::new();
    let named = patterns.iter().flat_map(|pattern| pattern.chars());
    for letter in named.filter(|letter| letter.is_alphanumeric()) {
        if letters.len() < LETTERS && !letters.contains(&letter) {
            letters.push(letter);
        }
    }
    for letter in SORTS {
        if letter != ' ' && !letters.contains(&letter) {
            letters.push(letter);
        }
    }
    letters
}

/// Short texts: blocks of every letter, and all letters.
fn strange_texts(letters: &[char]) -> Vec<String> {
    let all: String = letters.iter().collect();
    let mut texts = vec![all.repeat(BLOCKS_BYTES / all.len().max(1))];
    for letter in letters.iter().chain(&[' ']) {
        for block in BLOCKS {
            let end = if letter.is_alphanumeric() { " " } else { "a" };
            let block = letter.to_string().repeat(block) + end;
            texts.push(block.repeat(BLOCKS_BYTES / block.len()));
        }
    }
    texts
}

fn not_encoded(error: TextError) -> TrialError {
    match error {
        TextError::Encode(source) => TrialError::Encode(source),
        other => TrialError::Encode(other.into()),
    }
}

fn encoded(tokenizer: &Tokenizer, text: &str, vocab: u32) -> Result<Vec<u32>, TrialError> {
    let ids = tokenizer.encode_plain(text).map_err(not_encoded)?;
    match ids.iter().find(|id| **id >= vocab) {
        Some(&id) => Err(TrialError::Outside { id, vocab }),
        None => Ok(ids),
    }
}

#[cfg(test)]
mod tests {
    use model::Store;
    use serde_json::{Value, json};

    use super::super::patterns::tests::EXPONENTIAL;
    use super::super::tests::text_of_json;
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
            special: &manifest.special_token_texts,
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

    /// The bundled model's text, with this regular expression before its vocabulary.
    fn cut_by(pattern: &str) -> Result<TriedText, TrialError> {
        let split = json!({ "type": "Split", "pattern": { "Regex": pattern },
            "behavior": "Isolated", "invert": false });
        tried(|json| json["pre_tokenizer"] = split, None)
    }

    #[test]
    fn a_tokenizer_that_a_text_makes_slow_is_refused_by_name() {
        let normalizer = |pattern: &str| {
            let part =
                json!({ "type": "Replace", "pattern": { "Regex": pattern }, "content": "a" });
            tried(|json| json["normalizer"] = part, None)
        };
        for pattern in [EXPONENTIAL, "(?:(?:\\w+\\w+)+(?!z)!|\\b\\B)"] {
            for (part, tried) in
                [("normalizer", normalizer(pattern)), ("pre-tokenizer", cut_by(pattern))]
            {
                let error = tried.unwrap_err();
                let TrialError::Slow { source, .. } = &error else { panic!("{pattern}: {error}") };
                assert!(source.to_string().contains(part), "{source}");
            }
        }
        // Long runs make it give up, and no text that anybody writes.
        let notes = normalizer(r"(?i:'s|'t)(?!x)x|\s+(?!\S)y").unwrap().notes;
        assert!(notes[0].contains("times ' ' in a row are refused"), "{notes:?}");
        assert_eq!(notes.len(), 1);
    }

    #[test]
    fn what_is_never_done_in_time_is_named() {
        let json = |pattern: &str| json!({ "type": "Replace", "pattern": { "Regex": pattern }, "content": "a" });
        let text = text_of_json(|file| file["normalizer"] = json("x"));
        let tokenizer = text.tokenizer.as_ref().unwrap();
        // No time at all, for a pattern without fault: it was tried and is named.
        let error = try_patterns(tokenizer, |_| Duration::ZERO).unwrap_err();
        let TrialError::Slow { source, .. } = &error else { panic!("{error}") };
        assert!(matches!(source, PatternError::TimedOut { limit_ms: 0, .. }), "{source}");
        assert_eq!(try_patterns(tokenizer, split_time).unwrap(), None);
    }

    /// What families of models cut their texts by, as regular expressions.
    const FAMILIES: [(&str, &[&str]); 6] = [
        ("gpt-2", &[r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"]),
        (
            "llama-3",
            &[
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ],
        ),
        (
            "qwen2",
            &[
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ],
        ),
        (
            "o200k",
            &[
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ],
        ),
        (
            "deepseek-3",
            &[
                r"\p{N}{1,3}",
                "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
                r"[!-/:-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ],
        ),
        ("bloom", &[r" ?[^(\s|[.,!?…。，、।۔،])]+", "[0-9][0-9][0-9]"]),
    ];

    #[test]
    fn no_tokenizer_in_use_is_slow_on_any_text() {
        let long = |text: &str| text.repeat(20_000 / text.len());
        let texts = [
            " ",
            "\n",
            "\n ",
            "\r\n\t ",
            "7",
            "x",
            "X",
            "xX",
            "x ",
            "'s",
            "'",
            ".",
            "-=",
            "a.",
            "1 ",
            "\u{e9}",
            "e\u{301}",
            "\u{301}",
            "\u{4f60}",
            "\u{1f642}",
            "\u{1f642} ",
            "\u{3000}",
            "\u{200b}",
            "\u{7}",
        ];
        for (family, patterns) in FAMILIES {
            let splits: Vec<Value> = patterns
                .iter()
                .map(|pattern| {
                    json!({ "type": "Split", "pattern": { "Regex": pattern },
                        "behavior": "Isolated", "invert": false })
                })
                .collect();
            let parts = json!({ "type": "Sequence", "pretokenizers": splits });
            let text = text_of_json(|json| json["pre_tokenizer"] = parts);
            let tokenizer = text.tokenizer.as_ref().unwrap();
            let notes = try_patterns(tokenizer, split_time).unwrap();
            assert_eq!(notes, None, "{family}");
            for strange in texts.iter().flat_map(|text| [long(text), long(text) + "a"]) {
                let cut = tokenizer.cut_within(split_time(&strange), &strange);
                assert!(cut.is_ok(), "{family}: {:?}: {cut:?}", strange.get(..12));
            }
        }
        // Llama 2 has texts in place of patterns.
        let parts = json!({ "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "\u{2581}" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" },
        ] });
        let text = text_of_json(|json| {
            json["normalizer"] = parts;
            json["pre_tokenizer"] = Value::Null;
        });
        let tokenizer = text.tokenizer.as_ref().unwrap();
        assert_eq!(tokenizer.patterns(), <[&str; 0]>::default());
        tokenizer.cut_within(split_time(""), &long(" ")).unwrap();
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
