//! `POST /v1/completions`: a prompt is gone on with, as it is.

use std::borrow::Cow;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use proto::generate::{GenerateEvent, GenerateRequest, Prompt};
use serde::de::{MapAccess, SeqAccess};
use serde_json::{Value, json};

use super::body::Held;
use super::choices::{Choices, Prompts as Counted, Wanted, WholeAnswer, delta_cost};
use super::errors::ApiError;
use super::json::{Boolean, FromBody, Integer, Items, Maybe, Number, Object, Shape, Text, Wrong};
use super::logprobs::{ForCompletion, TextEnd};
use super::sse::{self, Chunks, class_of, fingerprint, usage};
use super::types::Parameters;
use super::{Api, deadline_ms, idempotency_key, named, new_id, now_unix_s};
use crate::compute::cost_of;
use crate::memory::Room;
use crate::request::RequestError;
use crate::service::Prepared;
use crate::text::{Echo, Text as ModelText};

/// Prompts in one request: what evaluation harnesses send at once.
const MAX_PROMPTS: usize = 64;

/// The length of an answer when the request gives none, as in OpenAI's API.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// The body of a request.
#[derive(Debug, Default)]
pub(super) struct Body {
    prompt: Option<Vec<Prompt>>,
    echo: Option<bool>,
    logprobs: Option<u32>,
    suffix: Option<String>,
    parameters: Parameters,
}

impl FromBody for Body {
    fn read<'de, A: MapAccess<'de>>(mut object: Object<'_, A>) -> Result<Self, A::Error> {
        let mut body = Self::default();
        while let Some(name) = object.name()? {
            match name.as_str() {
                "prompt" => object.take("prompt", Maybe(Prompts), &mut body.prompt)?,
                "echo" => object.take("echo", Maybe(Boolean), &mut body.echo)?,
                "logprobs" => object.take("logprobs", Maybe(Integer::new()), &mut body.logprobs)?,
                "suffix" => object.take("suffix", Maybe(Text::word()), &mut body.suffix)?,
                _ => body.parameters.field(&name, &mut object)?,
            }
        }
        Ok(body)
    }
}

/// All the forms that `prompt` may have.
struct Prompts;

impl<'de> Shape<'de> for Prompts {
    type Value = Vec<Prompt>;

    fn wanted(&self) -> Cow<'static, str> {
        "a string, a list of strings, a list of token ids or a list of such lists".into()
    }

    fn text(self, value: &str) -> Result<Vec<Prompt>, Wrong> {
        Ok(vec![Prompt::Text(value.to_owned())])
    }

    fn list<A: SeqAccess<'de>>(self, mut items: Items<'_, A>) -> Result<Vec<Prompt>, A::Error> {
        let first = match items.next(Entry)? {
            None => return Ok(Vec::new()),
            Some(First::Token(token)) => {
                return Ok(vec![Prompt::Tokens(token_ids(vec![token], items)?)]);
            }
            Some(First::Text(text)) => Prompt::Text(text),
            Some(First::Tokens(tokens)) => Prompt::Tokens(tokens),
        };
        let texts = matches!(first, Prompt::Text(_));
        let mut prompts = vec![first];
        loop {
            let next = if texts {
                items.next(Text::whole())?.map(Prompt::Text)
            } else {
                items.next(TokenIds)?.map(Prompt::Tokens)
            };
            let Some(next) = next else { return Ok(prompts) };
            if prompts.len() == MAX_PROMPTS {
                let message = format_args!("may hold {MAX_PROMPTS} prompts, found more");
                return Err(items.places.refuse(message));
            }
            prompts.push(next);
        }
    }
}

/// The first entry of `prompt`: it says what the others are.
enum First {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

struct Entry;

impl<'de> Shape<'de> for Entry {
    type Value = First;

    fn wanted(&self) -> Cow<'static, str> {
        "a string, a token id or a list of token ids".into()
    }

    fn number(self, value: Number) -> Result<First, Wrong> {
        Integer::new().number(value).map(First::Token)
    }

    fn text(self, value: &str) -> Result<First, Wrong> {
        Ok(First::Text(value.to_owned()))
    }

    fn list<A: SeqAccess<'de>>(self, items: Items<'_, A>) -> Result<First, A::Error> {
        TokenIds.list(items).map(First::Tokens)
    }
}

/// One prompt in tokens.
struct TokenIds;

impl<'de> Shape<'de> for TokenIds {
    type Value = Vec<u32>;

    fn wanted(&self) -> Cow<'static, str> {
        "a list of token ids".into()
    }

    fn list<A: SeqAccess<'de>>(self, items: Items<'_, A>) -> Result<Vec<u32>, A::Error> {
        token_ids(Vec::new(), items)
    }
}

/// `ids` and those that follow, at most a context of them.
fn token_ids<'de, A: SeqAccess<'de>>(
    mut ids: Vec<u32>,
    mut items: Items<'_, A>,
) -> Result<Vec<u32>, A::Error> {
    let context = items.places.context;
    while let Some(id) = items.next(Integer::new())? {
        if ids.len() >= context {
            let error = ApiError::context_length(items.places.name(), context);
            return Err(items.places.fail(error));
        }
        ids.push(id);
    }
    // There may be as many lists as prompts.
    ids.shrink_to_fit();
    Ok(ids)
}

/// Answers a request.
pub(super) async fn create(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let headers = request.headers().clone();
    let Held { value: body, room, place: _place } = api.bodies.read_json::<Body>(request).await?;
    let streamed = body.parameters.stream.unwrap_or(false);
    let options = body.parameters.stream_options.unwrap_or_default();
    let prompts_only = body.parameters.max_tokens == Some(0);
    let (echo, logprobs) = (body.echo.unwrap_or(false), body.logprobs.is_some());
    let (mut requests, n) = body.requests(&idempotency_key(&headers))?;
    let deadline_ms = deadline_ms(&headers)?;
    requests.iter_mut().for_each(|request| request.deadline_ms = deadline_ms);
    let wanted = Wanted { requests, n, prompts_only, echo, stream: streamed };
    let mut choices =
        Choices::start(&api, &headers, new_id("cmpl-"), wanted).await.map_err(as_sent)?;
    // Only an echo goes on holding the texts.
    let room = echo.then_some(room);
    let id = choices.id.clone();
    let echoed = |prompt: &mut Prepared| {
        let echo = prompt.echo.take()?;
        Some(EchoedPrompt { echo, tokens: prompt.prompt() })
    };
    let common = Common {
        id: choices.id.clone(),
        logprobs,
        prompts: choices.prompts.iter_mut().filter_map(echoed).collect(),
        n: choices.n,
        text: api.service.text(),
        _room: room,
    };
    let counted = choices.count_prompts();
    let model = api.service.model.name.clone();
    if streamed {
        let ends = vec![TextEnd::default(); choices.prompts.len() * choices.n];
        let chunks = CompletionChunks { common, ends };
        let stream = sse::Start { chunks, model, prompts: counted, options };
        let response = sse::respond(choices.events(), stream, api.service.compute());
        return Ok(named(response, &id));
    }
    let answers = choices.whole().await.map_err(ApiError::broke_off)?;
    let echoes: usize = common.prompts.iter().map(EchoedPrompt::cost).sum();
    let cost = answers.iter().map(WholeAnswer::cost).sum::<usize>() + echoes * common.n;
    let render = move || Json(common.whole(&model, counted, &answers)).into_response();
    Ok(named(api.service.compute().on_answer(cost, render).await?, &id))
}

/// `logprobs` is another word here for what the schema calls `top_logprobs`.
fn as_sent(error: RequestError) -> RequestError {
    match error {
        RequestError::Invalid { parameter, message } if parameter == "top_logprobs" => {
            RequestError::invalid("logprobs", message.replace("top_logprobs", "logprobs"))
        }
        other => other,
    }
}

impl Body {
    /// One request for each prompt, and how many answers to each.
    fn requests(self, idempotency_key: &str) -> Result<(Vec<GenerateRequest>, u32), ApiError> {
        let n = self.parameters.choices()?;
        if self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::unsupported("suffix", "a suffix"));
        }
        let prompts = self.prompt.unwrap_or_default();
        if prompts.is_empty() || prompts.len() > MAX_PROMPTS {
            let message =
                format!("prompt must hold 1 to {MAX_PROMPTS} prompts, found {}", prompts.len());
            return Err(ApiError::invalid(Some("prompt"), message));
        }
        let echo = self.echo.unwrap_or(false);
        let max_tokens = match self.parameters.max_tokens {
            None => DEFAULT_MAX_TOKENS,
            // There will be no answer: [`Wanted::prompts_only`].
            Some(0) if echo => 1,
            Some(0) => {
                let message = "max_tokens must be at least 1, or 0 with echo";
                return Err(ApiError::invalid(Some("max_tokens"), message));
            }
            Some(max_tokens) => max_tokens,
        };
        let common = self.parameters.request()?;
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
    echo: Echo,
    tokens: Arc<[u32]>,
}

impl EchoedPrompt {
    /// What writing it costs.
    fn cost(&self) -> usize {
        cost_of(self.tokens.len(), self.echo.text.len())
    }
}

/// What all choices of one response have in common.
struct Common {
    id: String,
    logprobs: bool,
    /// Empty unless they are echoed.
    prompts: Vec<EchoedPrompt>,
    n: usize,
    text: Arc<ModelText>,
    /// Of the texts in `prompts`.
    _room: Option<Room>,
}

impl Common {
    fn whole(&self, model: &str, counted: Counted, answers: &[WholeAnswer]) -> Value {
        let completion_tokens = answers.iter().map(WholeAnswer::completion_tokens).sum();
        let class = class_of(answers.iter().map(|answer| &answer.started));
        let listed: Vec<Value> =
            answers.iter().enumerate().map(|(index, answer)| self.choice(index, answer)).collect();
        json!({
            "id": self.id,
            "object": CompletionChunks::OBJECT,
            "created": now_unix_s(),
            "model": model,
            "system_fingerprint": fingerprint(class),
            "choices": listed,
            "usage": usage(counted, counted.cached(answers), completion_tokens),
        })
    }

    fn choice(&self, index: usize, answer: &WholeAnswer) -> Value {
        let prompt = self.prompts.get(index / self.n);
        let lists = self.logprobs.then(|| {
            let mut end = TextEnd::default();
            let mut lists = ForCompletion::new(&self.text, &mut end);
            if let Some(EchoedPrompt { echo, tokens }) = prompt {
                lists.push_prompt(tokens, echo, &answer.started.prompt_logprobs);
            }
            for entry in answer.deltas.iter().flat_map(|delta| &delta.logprobs) {
                lists.push_answer(entry);
            }
            lists.into_json()
        });
        let echoed = prompt.map_or("", |prompt| &prompt.echo.text);
        json!({
            "index": index,
            "text": format!("{echoed}{}", answer.text),
            "logprobs": lists,
            "finish_reason": answer.finish_reason(),
        })
    }
}

/// The chunks of a stream.
struct CompletionChunks {
    common: Common,
    /// Of each choice so far, for `text_offset`.
    ends: Vec<TextEnd>,
}

impl Chunks for CompletionChunks {
    const OBJECT: &'static str = "text_completion";

    fn id(&self) -> &str {
        &self.common.id
    }

    fn cost(&self, index: usize, event: &GenerateEvent) -> usize {
        match event {
            GenerateEvent::Started(_) => {
                self.common.prompts.get(index / self.common.n).map_or(0, EchoedPrompt::cost)
            }
            GenerateEvent::Delta(delta) => delta_cost(delta),
            GenerateEvent::Finished(_) => 0,
        }
    }

    fn choice(&mut self, index: usize, event: &GenerateEvent) -> Option<Value> {
        let mut lists = ForCompletion::new(&self.common.text, &mut self.ends[index]);
        let (text, finish_reason) = match event {
            GenerateEvent::Started(started) => {
                let EchoedPrompt { echo, tokens } =
                    self.common.prompts.get(index / self.common.n)?;
                if self.common.logprobs {
                    lists.push_prompt(tokens, echo, &started.prompt_logprobs);
                }
                (echo.text.as_str(), None)
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
        Some(json!({
            "index": index,
            "text": text,
            "logprobs": (self.common.logprobs && finish_reason.is_none()).then(|| lists.into_json()),
            "finish_reason": finish_reason,
        }))
    }
}
