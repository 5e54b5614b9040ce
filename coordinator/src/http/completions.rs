//! `POST /v1/completions`: a prompt is gone on with, as it is.

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use proto::generate::{GenerateEvent, GenerateRequest, Prompt};
use serde::Deserialize;
use serde_json::{Value, json};

use super::body::read_json;
use super::choices::{Choices, Wanted, WholeAnswer};
use super::errors::ApiError;
use super::logprobs::ForCompletion;
use super::sse::{self, Chunks, class_of, fingerprint, usage};
use super::types::Parameters;
use super::{Api, idempotency_key, new_id, now_unix_s};

/// Prompts in one request: what evaluation harnesses send at once.
const MAX_PROMPTS: usize = 64;

/// The length of an answer when the request gives none, as in OpenAI's API.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// The body of a request.
#[derive(Debug, Deserialize)]
pub(super) struct Body {
    prompt: Option<Prompts>,
    echo: Option<bool>,
    logprobs: Option<u32>,
    suffix: Option<String>,
    #[serde(flatten)]
    parameters: Parameters,
}

/// All the forms that a prompt may have.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

impl Prompts {
    fn into_prompts(self) -> Vec<Prompt> {
        match self {
            Self::Text(text) => vec![Prompt::Text(text)],
            Self::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
            Self::Tokens(tokens) => vec![Prompt::Tokens(tokens)],
            Self::TokenLists(lists) => lists.into_iter().map(Prompt::Tokens).collect(),
        }
    }
}

/// Answers a request.
pub(super) async fn create(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let headers = request.headers().clone();
    let body: Body = read_json(request, api.body_bytes).await?;
    let (requests, n) = body.requests(&idempotency_key(&headers))?;
    let streamed = body.parameters.stream.unwrap_or(false);
    let texts: Vec<Option<String>> = requests
        .iter()
        .map(|request| match &request.prompt {
            Prompt::Text(text) => Some(text.clone()),
            _ => None,
        })
        .collect();
    let prompts_only = body.parameters.max_tokens == Some(0);
    let wanted = Wanted { requests, n, prompts_only, stream: streamed };
    let choices = Choices::start(&api, &headers, wanted).await?;
    let prompts = if body.echo.unwrap_or(false) {
        let prompts = choices.prompts.iter().zip(texts);
        prompts.map(|(prompt, text)| EchoedPrompt::new(&api, prompt.prompt(), text)).collect()
    } else {
        Vec::new()
    };
    let shape =
        Shape { id: new_id("cmpl-"), logprobs: body.logprobs.is_some(), prompts, n: choices.n };
    if streamed {
        let options = body.parameters.stream_options.unwrap_or_default();
        let prompt_tokens = choices.prompt_tokens();
        let offsets = vec![0; choices.prompts.len() * choices.n];
        let chunks = CompletionChunks { shape, offsets };
        let model = api.service.model.name.clone();
        return Ok(sse::respond(choices.events(), chunks, model, prompt_tokens, options));
    }
    let prompt_tokens = choices.prompt_tokens();
    let answers = choices.whole().await?;
    let completion_tokens = answers.iter().map(WholeAnswer::completion_tokens).sum();
    let class = class_of(answers.iter().map(|answer| &answer.started));
    let listed: Vec<Value> =
        answers.iter().enumerate().map(|(index, answer)| shape.choice(index, answer)).collect();
    Ok(Json(json!({
        "id": shape.id,
        "object": CompletionChunks::OBJECT,
        "created": now_unix_s(),
        "model": api.service.model.name,
        "system_fingerprint": fingerprint(class),
        "choices": listed,
        "usage": usage(prompt_tokens, completion_tokens),
    }))
    .into_response())
}

impl Body {
    /// One request for each prompt, and how many answers to each.
    fn requests(&self, idempotency_key: &str) -> Result<(Vec<GenerateRequest>, u32), ApiError> {
        let n = self.parameters.choices()?;
        if self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::unsupported("suffix", "a suffix"));
        }
        let prompts = self.prompt.clone().map(Prompts::into_prompts).unwrap_or_default();
        if prompts.is_empty() || prompts.len() > MAX_PROMPTS {
            let message =
                format!("prompt must hold 1 to {MAX_PROMPTS} prompts, found {}", prompts.len());
            return Err(ApiError::invalid(Some("prompt"), message));
        }
        let common = self.parameters.request()?;
        let echo = self.echo.unwrap_or(false);
        let max_tokens = match self.parameters.max_tokens {
            None => DEFAULT_MAX_TOKENS,
            // There will be no answer; its least length is what the prompt is checked with.
            Some(0) if echo => 1,
            Some(0) => {
                let message = "max_tokens must be at least 1, or 0 with echo";
                return Err(ApiError::invalid(Some("max_tokens"), message));
            }
            Some(max_tokens) => max_tokens,
        };
        let requests = prompts
            .into_iter()
            .map(|prompt| GenerateRequest {
                prompt,
                max_tokens,
                top_logprobs: self.logprobs,
                score_prompt: echo && self.logprobs.is_some(),
                idempotency_key: idempotency_key.to_owned(),
                ..common.clone()
            })
            .collect();
        Ok((requests, n))
    }
}

/// A prompt that stands before its answers.
struct EchoedPrompt {
    text: String,
    tokens: Vec<String>,
}

impl EchoedPrompt {
    /// `text` as the client gave it, else that of the tokens.
    fn new(api: &Api, prompt: &[u32], text: Option<String>) -> Self {
        let tokens = api.service.texts(prompt);
        Self { text: text.unwrap_or_else(|| tokens.concat()), tokens }
    }
}

/// What all choices of one response have in common.
struct Shape {
    id: String,
    logprobs: bool,
    /// Empty unless they are echoed.
    prompts: Vec<EchoedPrompt>,
    n: usize,
}

impl Shape {
    fn choice(&self, index: usize, answer: &WholeAnswer) -> Value {
        let prompt = self.prompts.get(index / self.n);
        let mut lists = ForCompletion::default();
        if let Some(prompt) = prompt {
            push_prompt(&mut lists, prompt, &answer.started);
        }
        for entry in answer.deltas.iter().flat_map(|delta| &delta.logprobs) {
            lists.push_answer(entry);
        }
        let echoed = prompt.map_or("", |prompt| &prompt.text);
        json!({
            "index": index,
            "text": format!("{echoed}{}", answer.text),
            "logprobs": self.logprobs.then(|| lists.into_json()),
            "finish_reason": answer.finish_reason(),
        })
    }
}

fn push_prompt(
    lists: &mut ForCompletion,
    prompt: &EchoedPrompt,
    started: &proto::generate::Started,
) {
    let scores = started.prompt_logprobs.iter().map(|entry| Some(entry.logprob));
    for (token, logprob) in prompt.tokens.iter().zip([None].into_iter().chain(scores)) {
        lists.push_prompt(token.clone(), logprob);
    }
}

/// The chunks of a stream.
struct CompletionChunks {
    shape: Shape,
    /// Characters of each choice so far, for `text_offset`.
    offsets: Vec<usize>,
}

impl Chunks for CompletionChunks {
    const OBJECT: &'static str = "text_completion";

    fn id(&self) -> &str {
        &self.shape.id
    }

    fn choice(&mut self, index: usize, event: &GenerateEvent) -> Option<Value> {
        let mut lists = ForCompletion::from_offset(self.offsets[index]);
        let (text, finish_reason) = match event {
            GenerateEvent::Started(started) => {
                let prompt = self.shape.prompts.get(index / self.shape.n)?;
                push_prompt(&mut lists, prompt, started);
                (prompt.text.as_str(), None)
            }
            GenerateEvent::Delta(delta) => {
                if delta.text.is_empty() && delta.logprobs.is_empty() {
                    return None;
                }
                for entry in &delta.logprobs {
                    lists.push_answer(entry);
                }
                (delta.text.as_str(), None)
            }
            GenerateEvent::Finished(finished) => ("", Some(finished.reason.name())),
        };
        self.offsets[index] = lists.offset();
        Some(json!({
            "index": index,
            "text": text,
            "logprobs": (self.shape.logprobs && finish_reason.is_none()).then(|| lists.into_json()),
            "finish_reason": finish_reason,
        }))
    }
}
