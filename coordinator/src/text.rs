//! Text to tokens and back: tokenizer, chat template, incremental detokenisation, stop strings.
//! Pure but for the clock a template may ask for; whoever calls [`Text::encode`] must not be an
//! async thread, for it computes.
//!
//! ```text
//! messages ──template──▶ rendered, user text marked ──split at specials──▶ runs ──BPE──▶ ids
//! ids ──token bytes──▶ Detokenizer (whole characters) ──▶ StopMatcher (held back) ──▶ text
//! ```

mod detokenize;
mod guard;
mod jinja;
mod patterns;
mod stop;
mod strftime;
mod template;
mod tokenizer;
mod trial;

#[cfg(test)]
pub(crate) mod tests;

use proto::generate::{ChatMessage, Prompt};

pub(crate) use detokenize::Detokenizer;
use guard::Guard;
use jinja::Json;
pub use patterns::PatternError;
pub(crate) use stop::StopMatcher;
pub use template::TemplateError;
use template::{ChatTemplate, TemplateTexts};
pub(crate) use tokenizer::Tokenizer;
pub use tokenizer::TokenizerError;
pub use trial::{TrialError, try_text};

/// Characters of one run without a change between blank and not blank. Longer ones cost the
/// splitter's regular expression its back-tracking limit; no language writes them.
pub(crate) const MAX_RUN_CHARS: usize = 131_072;

/// Roles that a message may have. A template writes them literally, so a free role could spell a
/// special token.
pub(crate) const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Why a prompt could not be turned into tokens.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TextError {
    /// The model came without a tokenizer.
    #[error("this model has no tokenizer: only token ids can be completed")]
    NoTokenizer,
    /// The model came without a chat template.
    #[error("this model has no chat template: only plain prompts can be completed")]
    NoTemplate,
    /// More text than the context could ever hold.
    #[error("the prompt has {bytes} bytes, more than {context} tokens can hold")]
    TooLong { bytes: usize, context: u32 },
    /// More text than the tokenizer is given at once.
    #[error("the prompt has {bytes} bytes, at most {most} are tokenised with this model")]
    TooMuch { bytes: usize, most: usize },
    /// A run that the splitter is not asked to take.
    #[error(
        "the prompt has {chars} characters without a change between blank and not blank, the \
         limit is {MAX_RUN_CHARS}"
    )]
    Run { chars: usize },
    /// A role that no template may be given.
    #[error("message {index} has the role {role:?}, expected one of {}", ROLES.join(", "))]
    Role { index: usize, role: String },
    /// Nothing is left to mark the user's text with.
    #[error("the messages use every private-use character")]
    PrivateUse,
    /// The template's own arguments are not a JSON object.
    #[error("the template's arguments must be a JSON object")]
    Arguments,
    /// The template refused, or ran into a limit.
    #[error("failed to render the chat template")]
    Template(#[from] TemplateError),
    /// A pattern of the tokenizer took too long.
    #[error("failed to tokenize the prompt")]
    Pattern(#[source] PatternError),
    /// The tokenizer gave up.
    #[error("failed to tokenize the prompt")]
    Encode(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What is known of a model's text.
pub(crate) struct Text {
    tokenizer: Option<Tokenizer>,
    template: Option<ChatTemplate>,
    context: u32,
}

impl Text {
    /// Reads what the store has.
    ///
    /// # Errors
    ///
    /// [`TextSetupError`] if the tokenizer or the template cannot be used.
    pub(crate) fn open(store: &model::Store) -> Result<Self, TextSetupError> {
        let manifest = store.manifest();
        let config = store.config();
        let tokenizer = store
            .tokenizer_json()?
            .map(|json| {
                Tokenizer::from_json(
                    &json,
                    config.vocab,
                    config.add_bos.then_some(config.bos_token).flatten(),
                )
            })
            .transpose()?;
        let template = manifest
            .chat_template
            .as_deref()
            .map(|source| {
                let texts = TemplateTexts {
                    bos: manifest.bos_token_text.clone(),
                    eos: manifest.eos_token_text.clone(),
                    special: manifest.special_token_texts.clone(),
                };
                ChatTemplate::compile(source, texts)
            })
            .transpose()?;
        Ok(Self { tokenizer, template, context: config.context })
    }

    /// What is given, for tests.
    #[cfg(test)]
    pub(crate) fn new(
        tokenizer: Option<Tokenizer>,
        template: Option<ChatTemplate>,
        context: u32,
    ) -> Self {
        Self { tokenizer, template, context }
    }

    /// The tokenizer, if there is one.
    pub(crate) fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The bytes that a token adds to a text: none for a special one or without a tokenizer.
    pub(crate) fn token_text(&self, token: u32) -> &[u8] {
        self.tokenizer.as_ref().map_or(&[], |tokenizer| tokenizer.text_bytes(token))
    }

    /// The text of tokens as a whole: a character may be cut into several.
    pub(crate) fn decode(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> =
            tokens.iter().flat_map(|&token| self.token_text(token)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The text of a prompt, as it is tokenised; of such a length that it may be.
    ///
    /// # Errors
    ///
    /// [`TextError`]
    pub(crate) fn render(&self, prompt: Prompt) -> Result<Rendered, TextError> {
        let rendered = match prompt {
            Prompt::Tokens(ids) => return Ok(Rendered::Tokens(ids)),
            Prompt::Text(text) => Rendered::Plain(text),
            Prompt::Conversation { messages, template_arguments_json } => {
                let tokenizer = self.needed_tokenizer()?;
                let template = self.template.as_ref().ok_or(TextError::NoTemplate)?;
                self.render_chat(tokenizer, template, &messages, &template_arguments_json)?
            }
        };
        self.check_size(self.needed_tokenizer()?, rendered.text())?;
        Ok(rendered)
    }

    /// The tokens of a prompt. Text of the user never becomes a special token.
    ///
    /// # Errors
    ///
    /// [`TextError`]; ids are passed through unchecked.
    pub(crate) fn tokens(&self, rendered: Rendered) -> Result<Vec<u32>, TextError> {
        match rendered {
            Rendered::Tokens(ids) => Ok(ids),
            Rendered::Plain(text) => self.needed_tokenizer()?.encode_plain(&text),
            Rendered::Chat { text, guard } => {
                self.needed_tokenizer()?.encode_rendered(&text, &guard)
            }
        }
    }

    /// The tokens of a prompt that its answer begins with, its text, and where in it they stand.
    /// What the client gave as text comes back as it was given.
    ///
    /// # Errors
    ///
    /// As [`Text::tokens`].
    pub(crate) fn echo(&self, rendered: Rendered) -> Result<(Vec<u32>, Echo), TextError> {
        match rendered {
            Rendered::Plain(text) => {
                let (ids, offsets) = self.needed_tokenizer()?.encode_with_offsets(&text)?;
                Ok((ids, Echo { text, offsets: Some(offsets) }))
            }
            rendered => {
                let ids = self.tokens(rendered)?;
                let text = self.decode(&ids);
                Ok((ids, Echo { text, offsets: None }))
            }
        }
    }

    /// The tokens of a prompt, in one go.
    #[cfg(test)]
    pub(crate) fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>, TextError> {
        self.tokens(self.render(prompt.clone())?)
    }

    fn needed_tokenizer(&self) -> Result<&Tokenizer, TextError> {
        self.tokenizer.as_ref().ok_or(TextError::NoTokenizer)
    }

    fn render_chat(
        &self,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        messages: &[ChatMessage],
        arguments_json: &str,
    ) -> Result<Rendered, TextError> {
        for (index, message) in messages.iter().enumerate() {
            if !ROLES.contains(&message.role.as_str()) {
                return Err(TextError::Role {
                    index,
                    role: message.role.chars().take(32).collect(),
                });
            }
        }
        let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
        self.check_bytes(tokenizer, bytes.saturating_add(arguments_json.len()))?;
        let arguments = parse_arguments(arguments_json)?;

        let user_texts = messages.iter().map(|m| m.content.as_str()).chain([arguments_json]);
        let guard = Guard::new(tokenizer.special_texts(), user_texts)?;
        let text = template.render(messages, &arguments, &guard)?;
        Ok(Rendered::Chat { text, guard })
    }

    fn check_bytes(&self, tokenizer: &Tokenizer, bytes: usize) -> Result<(), TextError> {
        // No token has more bytes than the longest one, so this text needs more than the context.
        if bytes > tokenizer.longest_token_bytes().saturating_mul(self.context as usize) {
            return Err(TextError::TooLong { bytes, context: self.context });
        }
        let most = tokenizer.text_bytes_max();
        if bytes > most { Err(TextError::TooMuch { bytes, most }) } else { Ok(()) }
    }

    fn check_size(&self, tokenizer: &Tokenizer, text: &str) -> Result<(), TextError> {
        self.check_bytes(tokenizer, text.len())?;
        let (mut longest, mut run, mut blank) = (0, 0, false);
        for character in text.chars() {
            run = if character.is_whitespace() == blank { run + 1 } else { 1 };
            blank = character.is_whitespace();
            longest = longest.max(run);
        }
        if longest > MAX_RUN_CHARS { Err(TextError::Run { chars: longest }) } else { Ok(()) }
    }
}

/// A prompt whose length is known: what is tokenised.
pub(crate) enum Rendered {
    /// Already.
    Tokens(Vec<u32>),
    /// A text as the client gave it.
    Plain(String),
    /// What the template made of a conversation.
    Chat { text: String, guard: Guard },
}

impl Rendered {
    /// What is left to tokenise.
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Tokens(_) => "",
            Self::Plain(text) | Self::Chat { text, .. } => text,
        }
    }
}

/// A prompt as its answer begins with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Echo {
    /// The client's own, or that of its tokens as a whole.
    pub(crate) text: String,
    /// At which character of `text` each token begins; `None` for a prompt that came in tokens.
    pub(crate) offsets: Option<Vec<u32>>,
}

/// Why a model's tokenizer or template cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TextSetupError {
    /// The store could not give the tokenizer.
    #[error("failed to read the tokenizer")]
    Store(#[from] model::StoreError),
    /// The tokenizer is not one we can use.
    #[error("failed to load the tokenizer")]
    Tokenizer(#[from] TokenizerError),
    /// The chat template is not one we can use.
    #[error("failed to compile the chat template")]
    Template(#[from] TemplateError),
}

/// An empty text is no arguments.
fn parse_arguments(json: &str) -> Result<Vec<(String, Json)>, TextError> {
    if json.is_empty() {
        return Ok(Vec::new());
    }
    match Json::parse(json) {
        Ok(Json::Dict(arguments)) => Ok(arguments),
        _ => Err(TextError::Arguments),
    }
}
