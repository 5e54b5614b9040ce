//! Builds a `tokenizer.json` from the metadata of a GGUF file, and takes its chat template.

mod vocabulary;

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};

use super::gguf::Architecture;
use super::text::{self, Claims, SamplingSource};
use super::{ImportError, LLAMA3_VOCAB};
use crate::config::ModelConfig;
use crate::gguf::{Metadata, Value};
use crate::special::{SpecialText, SpecialTexts, names};
use crate::writer::ModelText;
use vocabulary::{Vocabulary, Words, token_texts};

/// Splits text before BPE, as Llama 3 does.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with single digits, as Qwen 2 does.
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Chat template of BitNet b1.58 2B4T: the text of its `tokenizer_config.json`.
const BITNET_TEMPLATE: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = message['role'] | capitalize + ': '+ message['content'] | trim + '<|eot_id|>' %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";
/// Begins the keys of templates that have a name.
const NAMED_TEMPLATE: &str = "tokenizer.chat_template.";
/// What the wrong template of the official GGUF file contains.
const WRONG_TEMPLATE_MARK: &str = "BITNETAssistant";
/// Tokens by which a vocabulary is known that does not name its split: Llama 3's, and the first one
/// of Falcon3 and Falcon-E.
const KNOWN_BY_TOKEN: [(&str, &str); 2] =
    [("<|begin_of_text|>", "llama-bpe"), (">>TITLE<<", "falcon3")];
/// Longest piece of a SentencePiece vocabulary: every split of every piece is looked up.
const PIECE_BYTES_MAX: usize = 512;
/// SentencePiece's space.
const SPACE: char = '\u{2581}';

/// Keys of tokens that end an answer, the one for templates first.
const END_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// Keys of other special tokens, and the names that templates have for them. The first spelling of the
/// separator's is the format's own.
const OTHER_KEYS: [(&str, &str); 6] = [
    ("tokenizer.ggml.unknown_token_id", "unk_token"),
    ("tokenizer.ggml.separator_token_id", "sep_token"),
    ("tokenizer.ggml.seperator_token_id", "sep_token"),
    ("tokenizer.ggml.padding_token_id", "pad_token"),
    ("tokenizer.ggml.cls_token_id", "cls_token"),
    ("tokenizer.ggml.mask_token_id", "mask_token"),
];

/// What `tokenizer.ggml.model` is where there is no tokenizer, in llama.cpp.
const NO_TOKENIZER: [&str; 2] = ["none", "no_vocab"];

/// Text of a GGUF file; completes `config`. Without `tokenizer.ggml.model`, or where that says so, there
/// is no tokenizer.
pub(super) fn read(
    metadata: &Metadata<'_>,
    architecture: Architecture,
    config: &mut ModelConfig,
    notes: &mut Vec<String>,
) -> Result<ModelText, ImportError> {
    let claims = |name, keys: &[&'static str]| {
        let mut claims = Claims::new(name, config.vocab);
        for key in keys {
            let id = metadata.unsigned(key)?;
            claims.ids(key, id.map(|id| u32::try_from(id).unwrap_or(u32::MAX)))?;
        }
        Ok::<_, ImportError>(claims)
    };
    let bos = claims("BOS", &["tokenizer.ggml.bos_token_id"])?.first(notes);
    // An answer ends at any of them, as in llama.cpp; that they differ is what they are for.
    let eos = claims("EOS", &END_KEYS)?;
    config.bos_token = bos;
    config.eos_tokens = eos.all(&mut Vec::new());
    let template_eos = eos.first(&mut Vec::new());
    let template = template(metadata, architecture, config, notes)?;
    let sampling = text::sampling_of(SamplingSource::Gguf(metadata), notes);
    let model = metadata.string("tokenizer.ggml.model")?;
    let Some(model) = model.filter(|model| !NO_TOKENIZER.contains(model)) else {
        if let Some(model) = model {
            notes.push(format!("tokenizer: tokenizer.ggml.model is {model:?}"));
        }
        text::finish(None, template.as_deref(), config, notes)?;
        return Ok(ModelText { chat_template: template, sampling, ..ModelText::default() });
    };
    let texts = token_texts(metadata, notes)?;
    let vocabulary = Vocabulary::read(metadata, &texts)?;
    let add_bos = metadata.bool("tokenizer.ggml.add_bos_token")?;
    if metadata.bool("tokenizer.ggml.add_eos_token")? == Some(true) {
        notes.push("tokenizer: EOS is not added to text, which could not go on behind it".into());
    }
    let tokenizer = match model {
        "gpt2" => {
            let split = Split::choose(metadata, &vocabulary, architecture, config, notes)?;
            default_tokens(config, &vocabulary, &split.default_tokens(), notes);
            config.add_bos = add_bos.unwrap_or(split.adds_bos());
            byte_level(metadata, &vocabulary, split, config.bos_token.filter(|_| config.add_bos))?
        }
        "llama" => {
            // What llama.cpp takes where a file of this kind does not say.
            default_tokens(config, &vocabulary, &["<s>", "</s>"], notes);
            config.add_bos = add_bos.unwrap_or(true);
            sentence_piece(metadata, &vocabulary, config.bos_token.filter(|_| config.add_bos))?
        }
        other => {
            return Err(ImportError::Tokenizer(format!(
                "tokenizer.ggml.model is {other:?}, expected \"gpt2\" or \"llama\""
            )));
        }
    };
    let json = serde_json::to_vec(&tokenizer).expect("a tokenizer is plain data");
    let file = text::parse_tokenizer(&json, config)?;
    text::finish(Some(&file), template.as_deref(), config, notes)?;
    let text_of = |id: Option<u32>| Some(vocabulary.tokens.get(id? as usize)?.text.to_owned());
    let special = special(metadata, &vocabulary, template.as_deref(), notes)?;
    let special = text::named_in(template.as_deref(), special, notes)?;
    Ok(ModelText {
        special,
        tokenizer: Some(json),
        chat_template: template,
        bos_text: text_of(config.bos_token),
        eos_text: text_of(template_eos.or_else(|| config.eos_tokens.first().copied())),
        sampling,
    })
}

/// Texts of special tokens beside BOS and EOS. Keys of such that the template does not name are nobody's
/// concern, whatever they hold.
fn special(
    metadata: &Metadata<'_>,
    vocabulary: &Vocabulary<'_>,
    template: Option<&str>,
    notes: &mut Vec<String>,
) -> Result<SpecialTexts, ImportError> {
    let mut texts = SpecialTexts::default();
    let is_named = |name: &str| template.is_some_and(|template| names(template, name));
    for (key, name) in OTHER_KEYS.into_iter().filter(|(_, name)| is_named(name)) {
        let Some(id) = metadata.unsigned(key)? else { continue };
        let token = usize::try_from(id).ok().and_then(|id| vocabulary.tokens.get(id));
        match token {
            Some(token) => texts.add(name, SpecialText::One(token.text.to_owned())),
            // As llama.cpp, which takes its default then; no template is promised one.
            None => {
                notes.push(format!("special tokens: {key} is {id}, which is no token: ignored"))
            }
        }
    }
    Ok(texts)
}

/// The file's chat template, unless it is the wrong one that the official file carries.
fn template(
    metadata: &Metadata<'_>,
    architecture: Architecture,
    config: &ModelConfig,
    notes: &mut Vec<String>,
) -> Result<Option<String>, ImportError> {
    let Some(found) = metadata.string("tokenizer.chat_template")? else {
        // Without one that is the default, which llama.cpp's converter writes under that key.
        if let Some(named) = metadata.keys().find(|key| key.starts_with(NAMED_TEMPLATE)) {
            notes.push(format!("chat template: {named} is not the default one: none is taken"));
        }
        return Ok(None);
    };
    text::check_template(Some(found))?;
    let is_wrong = architecture == Architecture::BitNetB158
        && config.vocab == LLAMA3_VOCAB
        && found.contains(WRONG_TEMPLATE_MARK);
    if is_wrong {
        notes
            .push("chat template: the file's is known to be wrong, replaced by the model's".into());
        return Ok(Some(BITNET_TEMPLATE.into()));
    }
    notes.push("chat template: from the metadata".into());
    Ok(Some(found.into()))
}

/// How text is split before BPE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Split {
    /// Words of the vocabulary are tokens whatever the merges say.
    Llama3,
    /// The same split; only merges make tokens.
    Llama3Merged,
    Qwen2,
}

impl Split {
    fn choose(
        metadata: &Metadata<'_>,
        vocabulary: &Vocabulary<'_>,
        architecture: Architecture,
        config: &ModelConfig,
        notes: &mut Vec<String>,
    ) -> Result<Self, ImportError> {
        let pre = metadata.string("tokenizer.ggml.pre")?;
        if let Some(split) = pre.and_then(Self::by_name) {
            return Ok(split);
        }
        // Older converters knew no name, and wrote none.
        let is_unnamed = pre.is_none_or(|pre| pre == "default");
        let known = KNOWN_BY_TOKEN.iter().find(|(token, _)| vocabulary.ids.contains_key(token));
        if let Some((token, name)) = known.filter(|_| is_unnamed) {
            notes.push(format!(
                "tokenizer: tokenizer.ggml.pre is missing, taken as {name} for it has {token}"
            ));
            return Ok(Self::Llama3);
        }
        if pre.is_none() && architecture != Architecture::Llama && config.vocab == LLAMA3_VOCAB {
            notes.push("tokenizer: tokenizer.ggml.pre is missing, taken as llama-bpe".into());
            return Ok(Self::Llama3);
        }
        let names = Self::ALL.map(|split| split.names().join(", ")).join(", ");
        Err(ImportError::Tokenizer(format!(
            "tokenizer.ggml.pre is {}, expected one of {names}",
            pre.map_or_else(|| "missing".into(), |pre| format!("{pre:?}"))
        )))
    }

    const ALL: [Self; 3] = [Self::Llama3, Self::Llama3Merged, Self::Qwen2];

    /// Values of `tokenizer.ggml.pre` that llama.cpp and its relatives read alike.
    fn names(self) -> &'static [&'static str] {
        match self {
            Self::Llama3 => &[
                "llama-bpe",
                "llama3",
                "llama-v3",
                "falcon3",
                "falcon_e",
                "falcon-e",
                "falcon-h1",
                "pixtral",
                "midm-2.0",
                "lfm2",
                "jina-v5-nano",
            ],
            Self::Llama3Merged => &["smaug-bpe", "dbrx"],
            Self::Qwen2 => &["qwen2", "deepseek-r1-qwen", "megrez"],
        }
    }

    fn by_name(pre: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|split| split.names().contains(&pre))
    }

    fn adds_bos(self) -> bool {
        self == Self::Llama3
    }

    /// Texts of BOS and EOS where the metadata does not say which they are.
    fn default_tokens(self) -> [&'static str; 2] {
        match self {
            Self::Llama3 | Self::Llama3Merged => ["<|begin_of_text|>", "<|end_of_text|>"],
            // There is no BOS.
            Self::Qwen2 => ["", "<|endoftext|>"],
        }
    }
}

/// Takes BOS and EOS of a vocabulary by their usual texts where the metadata is silent.
fn default_tokens(
    config: &mut ModelConfig,
    vocabulary: &Vocabulary<'_>,
    [bos, eos]: &[&str; 2],
    notes: &mut Vec<String>,
) {
    let control = |text: &str| {
        let id = vocabulary.ids.get(text).copied()?;
        vocabulary.tokens[id as usize].is_control().then_some(id)
    };
    if config.bos_token.is_none()
        && let Some(id) = control(bos)
    {
        notes.push(format!("BOS: the metadata does not say, {bos} is {id}"));
        config.bos_token = Some(id);
    }
    if config.eos_tokens.is_empty()
        && let Some(id) = control(eos)
    {
        notes.push(format!("EOS: the metadata does not say, {eos} is {id}"));
        config.eos_tokens.push(id);
    }
}

/// `tokenizer.json`.
#[derive(serde::Serialize)]
struct TokenizerFile<'a> {
    version: &'static str,
    truncation: Json,
    padding: Json,
    added_tokens: Json,
    normalizer: Json,
    pre_tokenizer: Json,
    post_processor: Json,
    decoder: Json,
    model: Bpe<'a>,
}

/// A BPE model of `tokenizer.json`.
#[derive(serde::Serialize)]
struct Bpe<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    dropout: Json,
    unk_token: Option<&'a str>,
    continuing_subword_prefix: Json,
    end_of_word_suffix: Json,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: Words<'a>,
    merges: Vec<(&'a str, &'a str)>,
}

/// Byte-level BPE in the manner of GPT-2.
fn byte_level<'a>(
    metadata: &Metadata<'a>,
    vocabulary: &'a Vocabulary<'a>,
    split: Split,
    bos: Option<u32>,
) -> Result<TokenizerFile<'a>, ImportError> {
    const MERGES: &str = "tokenizer.ggml.merges";
    let array = metadata.array(MERGES)?;
    let texts = array.and_then(|array| array.strings());
    let texts = texts.ok_or_else(|| {
        ImportError::Tokenizer(format!("{MERGES} is missing, or not an array of strings"))
    })?;
    let mut merges = Vec::new();
    for text in texts {
        let known = |side: &str| vocabulary.ids.contains_key(side);
        let pair = text.split_once(' ').filter(|(left, right)| known(left) && known(right));
        merges.push(pair.ok_or_else(|| {
            ImportError::Tokenizer(format!("merge {text:?} is not two known tokens"))
        })?);
    }
    let (pattern, normalizer) = match split {
        Split::Llama3 | Split::Llama3Merged => (LLAMA3_SPLIT, Json::Null),
        Split::Qwen2 => (QWEN2_SPLIT, json!({"type": "NFC"})),
    };
    let byte_level = |trim_offsets: bool, prefix: bool, regex: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": trim_offsets,
            "use_regex": regex,
        })
    };
    let split_step = json!({
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false,
    });
    Ok(TokenizerFile {
        version: "1.0",
        truncation: Json::Null,
        padding: Json::Null,
        added_tokens: vocabulary.added_tokens(),
        normalizer,
        pre_tokenizer: json!({
            "type": "Sequence", "pretokenizers": [split_step, byte_level(true, false, false)],
        }),
        post_processor: post_processor(vocabulary, bos, Some(byte_level(false, true, true))),
        decoder: byte_level(true, true, true),
        model: Bpe {
            kind: "BPE",
            dropout: Json::Null,
            unk_token: None,
            continuing_subword_prefix: Json::Null,
            end_of_word_suffix: Json::Null,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: split == Split::Llama3,
            vocab: vocabulary.words(),
            merges,
        },
    })
}

/// What adds BOS, after `first` if there is one.
fn post_processor(vocabulary: &Vocabulary<'_>, bos: Option<u32>, first: Option<Json>) -> Json {
    let template = bos.and_then(|id| Some((id, vocabulary.tokens.get(id as usize)?.text)));
    let template = template.map(|(id, text)| {
        let token = |type_id: u32| json!({"SpecialToken": {"id": text, "type_id": type_id}});
        let sequence =
            |name: &str, type_id: u32| json!({"Sequence": {"id": name, "type_id": type_id}});
        let tokens = BTreeMap::from([(text, json!({"id": text, "ids": [id], "tokens": [text]}))]);
        json!({
            "type": "TemplateProcessing",
            "single": [token(0), sequence("A", 0)],
            "pair": [token(0), sequence("A", 0), token(1), sequence("B", 1)],
            "special_tokens": tokens,
        })
    });
    match (first, template) {
        (Some(first), Some(template)) => {
            json!({"type": "Sequence", "processors": [first, template]})
        }
        (Some(only), None) | (None, Some(only)) => only,
        (None, None) => Json::Null,
    }
}

/// SentencePiece BPE with byte fallback, in the manner of Llama 2: merges follow from the scores.
fn sentence_piece<'a>(
    metadata: &Metadata<'a>,
    vocabulary: &'a Vocabulary<'a>,
    bos: Option<u32>,
) -> Result<TokenizerFile<'a>, ImportError> {
    let merges = merges_by_score(metadata, vocabulary)?;
    let unknown = metadata.unsigned("tokenizer.ggml.unknown_token_id")?;
    let unknown = unknown.and_then(|id| vocabulary.tokens.get(id as usize)).map(|t| t.text);
    let add_space = metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let to_piece =
        json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE.to_string()});
    let from_piece =
        json!({"type": "Replace", "pattern": {"String": SPACE.to_string()}, "content": " "});
    let mut normalizers = vec![to_piece];
    let mut decoders = vec![from_piece, json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if add_space {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE.to_string()}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(TokenizerFile {
        version: "1.0",
        truncation: Json::Null,
        padding: Json::Null,
        added_tokens: vocabulary.added_tokens(),
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Json::Null,
        post_processor: post_processor(vocabulary, bos, None),
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: Bpe {
            kind: "BPE",
            dropout: Json::Null,
            unk_token: unknown.or(vocabulary.ids.contains_key("<unk>").then_some("<unk>")),
            continuing_subword_prefix: Json::Null,
            end_of_word_suffix: Json::Null,
            fuse_unk: true,
            byte_fallback: true,
            ignore_merges: false,
            vocab: vocabulary.words(),
            merges,
        },
    })
}

/// Every way to make a piece of two others: best piece first, as transformers converts such files.
fn merges_by_score<'a>(
    metadata: &Metadata<'a>,
    vocabulary: &'a Vocabulary<'a>,
) -> Result<Vec<(&'a str, &'a str)>, ImportError> {
    const SCORES: &str = "tokenizer.ggml.scores";
    let tokens = &vocabulary.tokens;
    let scores: Vec<f64> = match metadata.array(SCORES)? {
        Some(array) => {
            let values = array.iter().map(|value| match value {
                Value::Float(value, _) if value.is_finite() => Ok(value),
                _ => Err(ImportError::Tokenizer(format!("{SCORES} holds what is no number"))),
            });
            values.collect::<Result<_, _>>()?
        }
        None => Vec::new(),
    };
    if scores.len() != tokens.len() {
        let (found, expected) = (scores.len(), tokens.len());
        return Err(ImportError::Tokenizer(format!(
            "{SCORES} has {found} elements for {expected} tokens"
        )));
    }
    let mut scored = Vec::new();
    for (token, score) in tokens.iter().zip(scores).filter(|(token, _)| token.token_type == 1) {
        if token.text.len() > PIECE_BYTES_MAX {
            return Err(ImportError::Tokenizer(format!(
                "a piece has {} bytes, at most {PIECE_BYTES_MAX} are accepted",
                token.text.len()
            )));
        }
        let mut ways: Vec<_> = token
            .text
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| {
                let (left, right) = token.text.split_at(at);
                Some((*vocabulary.ids.get(left)?, *vocabulary.ids.get(right)?, left, right))
            })
            .collect();
        ways.sort_unstable_by_key(|(left, right, ..)| (*left, *right));
        scored.extend(ways.into_iter().map(|(.., left, right)| (score, left, right)));
    }
    // Stable: pieces of the same score keep the order of their ids.
    scored.sort_by(|(a, ..), (b, ..)| b.total_cmp(a));
    Ok(scored.into_iter().map(|(_, left, right)| (left, right)).collect())
}
