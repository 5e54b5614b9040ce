//! What a request may ask for: one check for gRPC and HTTP, before anything is computed.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use model::SamplingDefaults;
use proto::generate::{GenerateRequest, Priority, Prompt, Sampling};
use proto::ids::{NumericsClass, PrefixHash};
use proto::limits;
use proto::step::SamplingParameters;

use crate::scheduler::Caller;
use crate::text::{TemplateError, TextError};

#[cfg(test)]
mod tests;

/// The hottest that tokens may be drawn, as in OpenAI's API.
const MAX_TEMPERATURE: f32 = 2.0;

/// The repetition penalties of either end: far beyond any that leaves text readable, and no logit
/// becomes infinite by them.
const REPETITION_PENALTIES: RangeInclusive<f32> = 0.01..=10.0;

/// The strongest presence and frequency penalty, either way, as in OpenAI's API.
const MAX_PENALTY: f32 = 2.0;

/// The strongest bias of one token, either way, as in OpenAI's API.
const MAX_LOGIT_BIAS: f32 = 100.0;

/// Why a request was refused or its answer ended before its end. Both servers turn it into their
/// own form, each in one function.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    /// A parameter is wrong.
    #[error("{message}")]
    Invalid {
        /// Which one, in the words of the schema: `messages[2].role`.
        parameter: Cow<'static, str>,
        message: String,
    },
    /// Prompt and answer do not fit the context. The wording is OpenAI's: clients look for it.
    #[error(
        "This model's maximum context length is {limit} tokens. However, you requested \
         {requested} tokens ({prompt_tokens} in the prompt; {} in the completion). Please reduce \
         the length of the prompt or completion.",
        requested - prompt_tokens
    )]
    ContextLength {
        /// Tokens that prompt and answer may have together.
        limit: u64,
        prompt_tokens: u64,
        /// Prompt and answer; at least `prompt_tokens`.
        requested: u64,
    },
    /// More text than the context can hold, found before it was tokenised.
    #[error("This model's maximum context length is {context} tokens. However, {detail}.")]
    PromptBytes {
        context: u32,
        /// Part of OpenAI's sentence, hence no source, which would be said once more.
        detail: String,
    },
    /// Another model was asked for.
    #[error("the model {model:?} does not exist; this cluster serves {served:?}")]
    UnknownModel { model: String, served: String },
    /// The answer must have a class that is not served.
    #[error("the numerics class {wanted} was asked for, this cluster serves {served}")]
    ClassMismatch { wanted: NumericsClass, served: NumericsClass },
    /// As many wait as may.
    #[error("{limit} requests are waiting already, the most that may; try again later")]
    Full {
        limit: u32,
        /// When those who wait now will have been served, as things are.
        retry_after: Duration,
    },
    /// Those who wait will take as many tokens as may.
    #[error(
        "requests of {waiting} tokens are waiting already, of the {limit} that may; try again later"
    )]
    FullOfTokens {
        waiting: u64,
        limit: u64,
        /// As above.
        retry_after: Duration,
    },
    /// Other requests hold all the memory that there is for them.
    #[error("other requests take all the memory there is for them; try again later")]
    NoMemory,
    /// Nothing can take the request now.
    #[error("{reason}")]
    Unavailable { reason: String },
    /// The answer was on its way and cannot go on.
    #[error("the answer was cut off: {reason}")]
    Lost { reason: String },
    /// It took too long.
    #[error("{reason}")]
    TimedOut { reason: String },
    /// The client read nothing for too long.
    #[error("the client does not read its answer: {behind} tokens wait for it")]
    SlowReader { behind: usize },
    /// Something that should not happen did.
    #[error("{message}")]
    Internal { message: String },
}

impl RequestError {
    /// A parameter is wrong.
    pub(crate) fn invalid(
        parameter: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
    ) -> Self {
        Self::Invalid { parameter: parameter.into(), message: message.into() }
    }

    /// What a failed encoding of the prompt in the field `prompt` means to the client.
    pub(crate) fn of_text(error: TextError, prompt: &'static str) -> Self {
        match error {
            TextError::TooLong { context, .. } => {
                Self::PromptBytes { context, detail: error.to_string() }
            }
            TextError::Encode(_)
            | TextError::Template(TemplateError::Thread(_) | TemplateError::Panicked) => {
                Self::Internal { message: node::Chain(&error).to_string() }
            }
            TextError::Role { index, .. } => {
                Self::invalid(format!("messages[{index}].role"), error.to_string())
            }
            TextError::Arguments => Self::invalid(TEMPLATE_ARGUMENTS, error.to_string()),
            TextError::NoTemplate
            | TextError::PrivateUse
            | TextError::Template(_)
            | TextError::NoTokenizer
            | TextError::Pattern(_)
            | TextError::Run { .. }
            | TextError::TooMuch { .. } => Self::invalid(prompt, node::Chain(&error).to_string()),
        }
    }

    /// A short name of the kind, for `error.type` of spans and labels of metrics.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "invalid_request",
            Self::ContextLength { .. } | Self::PromptBytes { .. } => "context_length",
            Self::UnknownModel { .. } => "model_not_found",
            Self::ClassMismatch { .. } => "class_mismatch",
            Self::Full { .. } | Self::FullOfTokens { .. } => "queue_full",
            Self::NoMemory => "no_memory",
            Self::Unavailable { .. } => "unavailable",
            Self::Lost { .. } => "pipeline_lost",
            Self::TimedOut { .. } => "timeout",
            Self::SlowReader { .. } => "slow_reader",
            Self::Internal { .. } => "internal",
        }
    }
}

/// What the schema calls the arguments of a chat template.
pub(crate) const TEMPLATE_ARGUMENTS: &str = "template_arguments_json";

/// The field that a prompt came in.
pub(crate) fn field_of(prompt: &Prompt) -> &'static str {
    match prompt {
        Prompt::Text(_) | Prompt::Tokens(_) => "prompt",
        Prompt::Conversation { .. } => "messages",
    }
}

/// What a request is checked against.
#[derive(Clone, Debug)]
pub(crate) struct ServedModel {
    /// For people; what clients ask for.
    pub(crate) name: String,
    /// Hex.
    pub(crate) id: String,
    pub(crate) layers: u32,
    /// Ids are `0..vocab`.
    pub(crate) vocab: u32,
    /// Tokens of the longest sequence.
    pub(crate) context: u32,
    pub(crate) bos_token: Option<u32>,
    pub(crate) eos_tokens: Vec<u32>,
    /// What a request gets that does not say; in range.
    pub(crate) sampling: SamplingDefaults,
    /// When this process began to serve it, in seconds since 1970.
    pub(crate) created_unix_s: u64,
}

/// A request whose parameters are all in range. The prompt may still be too long.
#[derive(Clone, Debug)]
pub(crate) struct Checked {
    pub(crate) prompt: Prompt,
    /// `None`: as many as there is room for.
    pub(crate) max_tokens: Option<u32>,
    pub(crate) min_tokens: u32,
    /// Without seed and choice.
    pub(crate) sampling: SamplingParameters,
    pub(crate) stop: Vec<String>,
    pub(crate) include_stop: bool,
    /// The model's own, unless they are ignored, and the request's.
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) seed: Option<u64>,
    pub(crate) idempotency_key: String,
    pub(crate) class: Option<NumericsClass>,
    pub(crate) received: Vec<u32>,
    pub(crate) score_prompt: bool,
    /// From arrival to the last token; `None`: the server's limit.
    pub(crate) deadline: Option<Duration>,
    /// Of the prompts that it may share KV with.
    pub(crate) salt: PrefixHash,
    /// Who asks, if it says so.
    pub(crate) caller: Option<Caller>,
    /// Whose turn it is.
    pub(crate) priority: Priority,
}

/// Checks every parameter that does not need the prompt's length.
///
/// # Errors
///
/// [`RequestError`] for the first thing that is wrong.
pub(crate) fn check(
    request: GenerateRequest,
    model: &ServedModel,
) -> Result<Checked, RequestError> {
    if !request.model.is_empty() && request.model != model.name && request.model != model.id {
        let asked = request.model.chars().take(limits::NAME_BYTES).collect();
        return Err(RequestError::UnknownModel { model: asked, served: model.name.clone() });
    }
    check_prompt(&request.prompt)?;
    let sampling = with_defaults(request.sampling.clone(), model.sampling);
    let sampling = check_sampling(&sampling, request.top_logprobs, model)?;
    let stop_tokens = check_stops(&request, model)?;
    if request.max_tokens != 0 && request.min_tokens > request.max_tokens {
        return Err(RequestError::invalid(
            "min_tokens",
            format!(
                "min_tokens must be at most max_tokens ({}), found {}",
                request.max_tokens, request.min_tokens
            ),
        ));
    }
    if request.score_prompt && request.top_logprobs.is_none() {
        return Err(RequestError::invalid(
            "score_prompt",
            "score_prompt gives log probabilities: it needs top_logprobs",
        ));
    }
    check_length("idempotency_key", request.idempotency_key.len(), limits::NAME_BYTES)?;
    check_length("cache_salt", request.cache_salt.len(), limits::CALLER_BYTES)?;
    check_length("user", request.user.len(), limits::CALLER_BYTES)?;
    check_tokens("received_ids", &request.received_ids, limits::PROMPT_TOKENS, model)?;
    if request.resume_index != request.received_ids.len() as u64 {
        return Err(RequestError::invalid(
            "resume_index",
            format!(
                "resume_index must be the number of received_ids ({}), found {}",
                request.received_ids.len(),
                request.resume_index
            ),
        ));
    }
    if request.max_tokens != 0 && request.received_ids.len() > request.max_tokens as usize {
        return Err(RequestError::invalid("received_ids", "more received_ids than max_tokens"));
    }
    let class = match request.class.as_str() {
        "" => None,
        text => {
            Some(text.parse().map_err(|error| RequestError::invalid("class", format!("{error}")))?)
        }
    };
    Ok(Checked {
        prompt: request.prompt,
        max_tokens: (request.max_tokens != 0).then_some(request.max_tokens),
        min_tokens: request.min_tokens,
        sampling,
        stop: request.stop,
        include_stop: request.include_stop,
        stop_tokens,
        seed: request.seed,
        idempotency_key: request.idempotency_key,
        class,
        received: request.received_ids,
        score_prompt: request.score_prompt,
        deadline: (request.deadline_ms != 0)
            .then(|| Duration::from_millis(request.deadline_ms.into())),
        salt: salt_of(&request.cache_salt, &request.user),
        caller: (!request.user.is_empty()).then(|| caller_of_user(&request.user)),
        priority: request.priority,
    })
}

/// The caller that a request names.
fn caller_of_user(user: &str) -> Caller {
    caller("tercet caller by name 1", user.as_bytes())
}

/// The caller that a request comes from, if it names none. Of IPv6 a whole /64: that much one
/// household or machine has.
pub(crate) fn caller_of_peer(peer: Option<IpAddr>) -> Caller {
    match peer.map(|peer| peer.to_canonical()) {
        None => Caller::default(),
        Some(IpAddr::V4(peer)) => caller("tercet caller by address 1", &peer.octets()),
        Some(IpAddr::V6(peer)) => caller("tercet caller by address 1", &peer.octets()[..8]),
    }
}

/// A hash: names may be long, and what is kept for each caller is not.
fn caller(kind: &str, bytes: &[u8]) -> Caller {
    let mut hasher = blake3::Hasher::new_derive_key(kind);
    hasher.update(bytes);
    let mut caller = Caller::default();
    hasher.finalize_xof().fill(&mut caller.0);
    caller
}

/// Whose prompts share KV: those of one `cache_salt`, else of one `user`, else of all who name neither.
fn salt_of(cache_salt: &str, user: &str) -> PrefixHash {
    let (kind, text) = match (cache_salt, user) {
        ("", "") => return PrefixHash::EMPTY,
        ("", user) => ("tercet cache of a user 1", user),
        (salt, _) => ("tercet cache salt 1", salt),
    };
    let mut hasher = blake3::Hasher::new_derive_key(kind);
    hasher.update(text.as_bytes());
    let mut salt = PrefixHash::EMPTY;
    hasher.finalize_xof().fill(&mut salt.0);
    salt
}

/// What the request says, and the model's defaults where it says nothing.
fn with_defaults(sampling: Sampling, defaults: SamplingDefaults) -> Sampling {
    Sampling {
        temperature: sampling.temperature.or(defaults.temperature),
        top_k: sampling.top_k.or(defaults.top_k),
        top_p: sampling.top_p.or(defaults.top_p),
        min_p: sampling.min_p.or(defaults.min_p),
        repetition_penalty: sampling.repetition_penalty.or(defaults.repetition_penalty),
        ..sampling
    }
}

/// The length of an answer whose request does not say: the model's default, as far as the context
/// goes, but no less than what was asked for. `None`: as much as there is room for, as for an answer of
/// which the client has more already.
pub(crate) fn default_length(
    checked: &Checked,
    prompt: &[u32],
    model: &ServedModel,
) -> Option<u32> {
    let room = u64::from(model.context).saturating_sub(prompt.len() as u64);
    let length = model.sampling.max_new_tokens?.max(checked.min_tokens);
    let is_known_longer = checked.received.len() as u64 > u64::from(length);
    (!is_known_longer && u64::from(length) < room).then_some(length)
}

/// Checks the ids of the prompt in `field`, and that prompt and answer fit the context.
///
/// # Errors
///
/// [`RequestError::Invalid`] or [`RequestError::ContextLength`].
pub(crate) fn check_lengths(
    field: &'static str,
    prompt: &[u32],
    max_tokens: Option<u32>,
    model: &ServedModel,
) -> Result<(), RequestError> {
    if prompt.is_empty() {
        return Err(RequestError::invalid(field, "the prompt has no tokens"));
    }
    let prompt_tokens = prompt.len() as u64;
    let requested = prompt_tokens + u64::from(max_tokens.unwrap_or(1));
    if requested > u64::from(model.context) {
        let limit = model.context.into();
        return Err(RequestError::ContextLength { limit, prompt_tokens, requested });
    }
    // After the length, so that one that is too long is told so in the words that clients look for.
    check_tokens(field, prompt, limits::PROMPT_TOKENS, model)
}

fn check_prompt(prompt: &Prompt) -> Result<(), RequestError> {
    match prompt {
        Prompt::Text(_) => Ok(()),
        // Its ids and length are checked with the answer's: [`check_lengths`].
        Prompt::Tokens(_) => Ok(()),
        Prompt::Conversation { messages, template_arguments_json } => {
            check_length(
                TEMPLATE_ARGUMENTS,
                template_arguments_json.len(),
                limits::TEMPLATE_ARGUMENT_BYTES,
            )?;
            if messages.is_empty() {
                return Err(RequestError::invalid("messages", "messages must not be empty"));
            }
            check_length("messages", messages.len(), limits::CHAT_MESSAGES)
        }
    }
}

fn check_sampling(
    sampling: &Sampling,
    top_logprobs: Option<u32>,
    model: &ServedModel,
) -> Result<SamplingParameters, RequestError> {
    let temperature = in_range(
        "temperature",
        sampling.temperature,
        1.0,
        |v| (0.0..=MAX_TEMPERATURE).contains(&v),
        format_args!("from 0 to {MAX_TEMPERATURE}"),
    )?;
    let top_p = in_range(
        "top_p",
        sampling.top_p,
        1.0,
        |v| v > 0.0 && v <= 1.0,
        format_args!("above 0 and at most 1"),
    )?;
    let min_p = in_range(
        "min_p",
        sampling.min_p,
        0.0,
        |v| (0.0..=1.0).contains(&v),
        format_args!("from 0 to 1"),
    )?;
    let repetition_penalty = in_range(
        "repetition_penalty",
        sampling.repetition_penalty,
        1.0,
        |v| REPETITION_PENALTIES.contains(&v),
        format_args!("from {} to {}", REPETITION_PENALTIES.start(), REPETITION_PENALTIES.end()),
    )?;
    let penalty = |name, value| {
        let legal = |v: f32| (-MAX_PENALTY..=MAX_PENALTY).contains(&v);
        in_range(name, value, 0.0, legal, format_args!("from -{MAX_PENALTY} to {MAX_PENALTY}"))
    };
    let presence_penalty = penalty("presence_penalty", sampling.presence_penalty)?;
    let frequency_penalty = penalty("frequency_penalty", sampling.frequency_penalty)?;
    if let Some(top) = top_logprobs.filter(|&top| top > limits::TOP_LOGPROBS) {
        return Err(RequestError::invalid(
            "top_logprobs",
            format!("top_logprobs must be at most {}, found {top}", limits::TOP_LOGPROBS),
        ));
    }
    Ok(SamplingParameters {
        temperature,
        // More than there are tokens cuts nothing.
        top_k: sampling.top_k.filter(|&k| k < model.vocab).unwrap_or(0),
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias: check_bias(&sampling.logit_bias, model)?,
        top_logprobs,
        ..SamplingParameters::default()
    })
}

/// The biases in ascending order of their tokens, so that their order means nothing.
fn check_bias(bias: &[(u32, f32)], model: &ServedModel) -> Result<Vec<(u32, f32)>, RequestError> {
    check_length("logit_bias", bias.len(), limits::LOGIT_BIAS)?;
    let mut sorted = bias.to_vec();
    sorted.sort_by_key(|&(token, _)| token);
    for &(token, value) in &sorted {
        check_token("logit_bias", token, model)?;
        in_range(
            "logit_bias",
            Some(value),
            0.0,
            |v| (-MAX_LOGIT_BIAS..=MAX_LOGIT_BIAS).contains(&v),
            format_args!("from -{MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}"),
        )?;
    }
    if let Some(pair) = sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        let token = pair[0].0;
        return Err(RequestError::invalid(
            "logit_bias",
            format!("logit_bias names token {token} twice"),
        ));
    }
    Ok(sorted)
}

/// The tokens that end the answer.
fn check_stops(request: &GenerateRequest, model: &ServedModel) -> Result<Vec<u32>, RequestError> {
    check_length("stop", request.stop.len(), limits::STOP_STRINGS)?;
    for stop in &request.stop {
        if stop.is_empty() {
            return Err(RequestError::invalid("stop", "a stop string must not be empty"));
        }
        if stop.len() > limits::STOP_STRING_BYTES {
            return Err(RequestError::invalid(
                "stop",
                format!(
                    "a stop string may have {} bytes, found {}",
                    limits::STOP_STRING_BYTES,
                    stop.len()
                ),
            ));
        }
    }
    check_tokens("stop_token_ids", &request.stop_token_ids, limits::STOP_TOKENS, model)?;
    let own = if request.ignore_eos { &[][..] } else { &model.eos_tokens };
    let mut stop_tokens: Vec<u32> = own.iter().chain(&request.stop_token_ids).copied().collect();
    stop_tokens.sort_unstable();
    stop_tokens.dedup();
    Ok(stop_tokens)
}

fn check_tokens(
    parameter: &'static str,
    tokens: &[u32],
    limit: usize,
    model: &ServedModel,
) -> Result<(), RequestError> {
    check_length(parameter, tokens.len(), limit)?;
    tokens.iter().try_for_each(|&token| check_token(parameter, token, model))
}

fn check_token(
    parameter: &'static str,
    token: u32,
    model: &ServedModel,
) -> Result<(), RequestError> {
    if token < model.vocab {
        return Ok(());
    }
    Err(RequestError::invalid(
        parameter,
        format!("{parameter}: token ids must be below {}, found {token}", model.vocab),
    ))
}

fn check_length(parameter: &'static str, found: usize, limit: usize) -> Result<(), RequestError> {
    if found <= limit {
        return Ok(());
    }
    Err(RequestError::invalid(
        parameter,
        format!("{parameter} may have a length of {limit}, found {found}"),
    ))
}

/// `value` or `default`; NaN and infinities are in no range.
fn in_range(
    parameter: &'static str,
    value: Option<f32>,
    default: f32,
    legal: impl Fn(f32) -> bool,
    range: fmt::Arguments<'_>,
) -> Result<f32, RequestError> {
    let value = value.unwrap_or(default);
    if value.is_finite() && legal(value) {
        return Ok(value);
    }
    Err(RequestError::invalid(parameter, format!("{parameter} must be {range}, found {value}")))
}
