//! Tokenizer, special tokens, chat template and defaults of sampling of a checkpoint. A fact that
//! several files can state is gathered here from all of them: `docs/models.md` has the table.

mod added;
mod others;
mod sampling;
mod special;
mod template;

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::ImportError;
use crate::config::{EOS_TOKENS_MAX, ModelConfig};
use crate::sampling::SamplingDefaults;
use crate::special::{LIST, SpecialTexts};
use crate::tokenizer::TokenizerFile;
use crate::writer::ModelText;
pub(super) use others::OtherTokens;
pub(super) use sampling::SamplingSource;
use special::SpecialToken;
pub(super) use special::{Claims, TokenIds};
use template::Template;
pub(super) use template::check_template;

/// Ends a turn in Llama 3's vocabulary, which BitNet's chat templates use too.
const END_OF_TURN: &str = "<|eot_id|>";
/// Texts of tokens that end a turn where a chat template writes them.
const ENDS_OF_TURN: [&str; 6] =
    [END_OF_TURN, "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<|end_of_turn|>"];
/// Classes of transformers' tokenizers that put BOS in front unless they are told not to.
const ADDING_CLASSES: [&str; 6] = [
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizer",
    "CodeLlamaTokenizerFast",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
];

/// The text files of a Hugging Face directory.
#[derive(Debug, Default)]
pub(super) struct HuggingFaceText {
    pub(super) tokenizer: Option<Vec<u8>>,
    pub(super) tokenizer_config: TokenizerConfig,
    pub(super) special_tokens_map: SpecialTokensMap,
    /// What `tokenizer_config.json` and `special_tokens_map.json` say of other special tokens.
    pub(super) other_tokens: [OtherTokens; 2],
    pub(super) generation_config: GenerationConfig,
    /// `chat_template.jinja`, which goes before all others.
    pub(super) template: Option<Vec<u8>>,
    /// `chat_template.json`, as processors of several media write it.
    pub(super) template_json: TemplateJson,
    /// The names of the templates in [`NAMED_TEMPLATES`].
    pub(super) named_templates: Vec<String>,
    /// [`NAMED_DEFAULT`].
    pub(super) named_default: Option<Vec<u8>>,
    /// `added_tokens.json`: ids by text.
    pub(super) added_tokens: BTreeMap<String, u32>,
}

/// The folder in which transformers keeps templates for other uses than chats.
pub(super) const NAMED_TEMPLATES: &str = "additional_chat_templates";

/// The one of them that transformers takes for chats.
pub(super) const NAMED_DEFAULT: &str = "additional_chat_templates/default.jinja";

/// `tokenizer_config.json`.
#[derive(Debug, Default, Deserialize)]
pub(super) struct TokenizerConfig {
    tokenizer_class: Option<String>,
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
    chat_template: Option<Template>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    #[serde(default)]
    added_tokens_decoder: added::Decoder,
}

/// `special_tokens_map.json`.
#[derive(Debug, Default, Deserialize)]
pub(super) struct SpecialTokensMap {
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
}

/// `chat_template.json`.
#[derive(Debug, Default, Deserialize)]
pub(super) struct TemplateJson {
    chat_template: Option<Template>,
}

/// `generation_config.json`.
#[derive(Debug, Default, Deserialize)]
pub(super) struct GenerationConfig {
    #[serde(default)]
    bos_token_id: TokenIds,
    #[serde(default)]
    eos_token_id: TokenIds,
    /// Everything else; the defaults of sampling among it.
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

/// What `config.json` says of special tokens.
#[derive(Debug, Default)]
pub(super) struct ConfigTokens {
    pub(super) bos: Option<u32>,
    pub(super) eos: Vec<u32>,
}

/// Text and special tokens of a Hugging Face directory; completes `config`.
pub(super) fn from_hugging_face(
    files: HuggingFaceText,
    said: &ConfigTokens,
    config: &mut ModelConfig,
    notes: &mut Vec<String>,
) -> Result<ModelText, ImportError> {
    let HuggingFaceText { tokenizer, tokenizer_config, generation_config, .. } = files;
    template::note_others(NAMED_TEMPLATES, files.named_templates, notes);
    let template = template::gather(
        [("chat_template.jinja", files.template), (NAMED_DEFAULT, files.named_default)],
        files.template_json.chat_template,
        tokenizer_config.chat_template,
        notes,
    )?;
    let file = tokenizer.as_deref().map(|json| parse_tokenizer(json, config)).transpose()?;
    let texts = |token: Option<SpecialToken>| token.map(SpecialToken::text);
    let bos_texts = [texts(tokenizer_config.bos_token), texts(files.special_tokens_map.bos_token)];
    let eos_texts = [texts(tokenizer_config.eos_token), texts(files.special_tokens_map.eos_token)];
    let special = others::gather(files.other_tokens, notes);
    let text_files = ["tokenizer_config.json", "special_tokens_map.json"];
    let elsewhere = added::Elsewhere {
        decoder: tokenizer_config.added_tokens_decoder,
        listed: files.added_tokens,
        special: {
            let first = bos_texts.iter().chain(&eos_texts).flatten().map(String::as_str);
            let others = special.iter().flat_map(|(_, text)| text.texts()).map(String::as_str);
            first.chain(others).collect()
        },
    };
    let (tokenizer, file) = match (tokenizer, file) {
        (Some(json), Some(file)) => match added::merged(&file, elsewhere, config.vocab, notes) {
            Some(tokens) => {
                let json = added::rewritten(&json, &tokens)?;
                let file = parse_tokenizer(&json, config)?;
                (Some(json), Some(file))
            }
            None => (Some(json), Some(file)),
        },
        other => other,
    };

    // What puts the token in front of text is believed first, then what only names it.
    let mut bos = Claims::new("BOS", config.vocab);
    if let Some(file) = &file {
        bos.ids("tokenizer.json's post-processor", file.wrapped.before.first().copied())?;
    }
    for (place, text) in text_files.into_iter().zip(&bos_texts) {
        bos.text(place, text.as_deref(), file.as_ref(), notes)?;
    }
    bos.ids("generation_config.json", generation_config.bos_token_id.first())?;
    bos.ids("config.json", said.bos)?;
    config.bos_token = bos.first(notes);

    let mut eos = Claims::new("EOS", config.vocab);
    eos.ids("generation_config.json", generation_config.eos_token_id.sorted())?;
    eos.ids("config.json", said.eos.iter().copied())?;
    for (place, text) in text_files.into_iter().zip(&eos_texts) {
        eos.text(place, text.as_deref(), file.as_ref(), notes)?;
    }
    config.eos_tokens = eos.all(notes);

    if let Some(file) = &file {
        let class = tokenizer_config.tokenizer_class.as_deref().unwrap_or_default();
        let writes_bos =
            config.bos_token.is_some() && file.wrapped.before.first() == config.bos_token.as_ref();
        config.add_bos = match tokenizer_config.add_bos_token {
            Some(add) => {
                if add != writes_bos {
                    let does = if writes_bos { "adds" } else { "does not add" };
                    notes.push(format!(
                        "BOS: tokenizer_config.json says add_bos_token = {add}, tokenizer.json's \
                         post-processor {does} it: add_bos_token is believed"
                    ));
                }
                add
            }
            None => writes_bos || ADDING_CLASSES.contains(&class),
        };
        note_wrapped(file, tokenizer_config.add_eos_token, notes);
    }
    let first = |texts: [Option<String>; 2]| texts.into_iter().flatten().next();
    let (bos_text, eos_text) = (first(bos_texts), first(eos_texts));
    let sampling = sampling::gather(SamplingSource::Generation(&generation_config.rest), notes);
    finish(file.as_ref(), template.as_deref(), config, notes)?;
    let text_of = |id: Option<u32>| file.as_ref()?.added_text(id?).map(str::to_owned);
    Ok(ModelText {
        bos_text: bos_text.or_else(|| text_of(config.bos_token)),
        eos_text: eos_text.or_else(|| text_of(config.eos_tokens.first().copied())),
        special: named_in(template.as_deref(), special, notes)?,
        tokenizer,
        chat_template: template,
        sampling,
    })
}

/// Those special tokens' texts that a template names.
pub(super) fn named_in(
    template: Option<&str>,
    mut special: SpecialTexts,
    notes: &mut Vec<String>,
) -> Result<SpecialTexts, ImportError> {
    special.keep_named_in(template);
    // Templates use the list to look for tokens in texts of people, and do without.
    if let Some((what, found, most)) = special.wrong()
        && special.drop_list()
    {
        notes.push(format!(
            "warning: special tokens: {what} is {found}, at most {most}: the template gets no {LIST}"
        ));
    }
    match special.wrong() {
        None => Ok(special),
        Some((key, found, most)) => Err(ImportError::Value {
            key,
            found: found.to_string(),
            expected: format!("at most {most}"),
        }),
    }
}

/// Says what a post-processor would add that is not added here.
fn note_wrapped(file: &TokenizerFile, add_eos: Option<bool>, notes: &mut Vec<String>) {
    let more: Vec<u32> = file.wrapped.before.iter().skip(1).copied().collect();
    if !more.is_empty() {
        notes.push(format!(
            "tokenizer: {more:?} after BOS, as its post-processor says, is left out"
        ));
    }
    if add_eos == Some(true) || !file.wrapped.after.is_empty() {
        notes.push("tokenizer: EOS is not added to text, which could not go on behind it".into());
    }
}

/// Reads and checks a tokenizer for this model.
pub(super) fn parse_tokenizer(
    json: &[u8],
    config: &ModelConfig,
) -> Result<TokenizerFile, ImportError> {
    TokenizerFile::parse(json, config.vocab).map_err(ImportError::TokenizerFile)
}

/// Defaults of sampling in GGUF metadata.
pub(super) fn sampling_of(
    source: SamplingSource<'_, '_>,
    notes: &mut Vec<String>,
) -> SamplingDefaults {
    sampling::gather(source, notes)
}

/// Completes special tokens, and says what they are. Every tokenizer comes through here.
pub(super) fn finish(
    tokenizer: Option<&TokenizerFile>,
    template: Option<&str>,
    config: &mut ModelConfig,
    notes: &mut Vec<String>,
) -> Result<(), ImportError> {
    if let Some(tokenizer) = tokenizer {
        for end in ENDS_OF_TURN {
            let written = || template.is_some_and(|template| template.contains(end));
            if end == END_OF_TURN || written() {
                config.eos_tokens.extend(tokenizer.id_of(end));
            }
        }
        notes.extend_from_slice(&tokenizer.notes);
        notes.push(format!("tokenizer: ids up to {}", tokenizer.highest_id().unwrap_or(0)));
    } else {
        notes.push("tokenizer: none, only token ids work".into());
        config.add_bos = false;
    }
    config.add_bos &= config.bos_token.is_some();
    config.eos_tokens.sort_unstable();
    config.eos_tokens.dedup();
    if config.eos_tokens.len() > EOS_TOKENS_MAX {
        return Err(ImportError::Value {
            key: "the number of EOS tokens".into(),
            found: config.eos_tokens.len().to_string(),
            expected: format!("at most {EOS_TOKENS_MAX}"),
        });
    }
    notes.push(format!(
        "special tokens: BOS {}, added to text: {}; EOS {:?}",
        config.bos_token.map_or_else(|| "none".into(), |token| token.to_string()),
        if config.add_bos { "yes" } else { "no" },
        config.eos_tokens,
    ));
    Ok(config.validate()?)
}
