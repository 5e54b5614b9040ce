//! `POST /v1/chat/completions`: the model's chat template is applied to a conversation.

use std::borrow::Cow;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use proto::generate::{ChatMessage, GenerateEvent, GenerateRequest, Prompt};
use proto::limits;
use serde::de::{MapAccess, SeqAccess};
use serde_json::{Map, Value, json};

use super::body::Held;
use super::choices::{Choices, Prompts, Wanted, WholeAnswer, delta_cost};
use super::errors::ApiError;
use super::json::{
    Boolean, Filled, FromBody, Integer, Items, List, Maybe, Object, Present, Shape, Skip, Text,
    Wrong,
};
use super::logprobs;
use super::sse::{self, Chunks, class_of, fingerprint, usage};
use super::types::{Arguments, Parameters, SHOWN_CHARS};
use super::{Api, deadline_ms, idempotency_key, named, new_id, now_unix_s};
use crate::request::{RequestError, TEMPLATE_ARGUMENTS};

/// Entries of `modalities`: OpenAI has two.
const MAX_MODALITIES: usize = 8;

/// The body of a request.
#[derive(Debug, Default)]
pub(super) struct Body {
    messages: Option<Vec<ChatMessage>>,
    /// The newer name of `max_tokens`.
    max_completion_tokens: Option<u32>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    tools: bool,
    functions: bool,
    tool_choice: Option<String>,
    response_format: Option<String>,
    /// Whether one of them is not text.
    spoken: bool,
    audio: bool,
    chat_template: bool,
    chat_template_kwargs: Option<Map<String, Value>>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    parameters: Parameters,
}

impl FromBody for Body {
    fn read<'de, A: MapAccess<'de>>(mut object: Object<'_, A>) -> Result<Self, A::Error> {
        let mut body = Self::default();
        while let Some(name) = object.name()? {
            match name.as_str() {
                "messages" => {
                    let (item, limit) = (|| Turn, limits::CHAT_MESSAGES);
                    let turns = Maybe(List { item, limit, wanted: "a list of messages" });
                    object.take("messages", turns, &mut body.messages)?;
                }
                "max_completion_tokens" => object.take(
                    "max_completion_tokens",
                    Maybe(Integer::new()),
                    &mut body.max_completion_tokens,
                )?,
                "logprobs" => object.take("logprobs", Maybe(Boolean), &mut body.logprobs)?,
                "top_logprobs" => {
                    object.take("top_logprobs", Maybe(Integer::new()), &mut body.top_logprobs)?;
                }
                "tools" => object.take("tools", Filled, &mut body.tools)?,
                "functions" => object.take("functions", Filled, &mut body.functions)?,
                "tool_choice" => {
                    object.take("tool_choice", Maybe(WordOrObject), &mut body.tool_choice)?;
                }
                "response_format" => {
                    object.take("response_format", Maybe(TypeOf), &mut body.response_format)?;
                }
                "modalities" => {
                    let (item, limit) = (Text::word, MAX_MODALITIES);
                    let list = Maybe(List { item, limit, wanted: "a list of strings" });
                    let mut modalities = None;
                    object.take("modalities", list, &mut modalities)?;
                    body.spoken = modalities.iter().flatten().any(|modality| modality != "text");
                }
                "audio" => object.take("audio", Present, &mut body.audio)?,
                "chat_template" => {
                    object.take("chat_template", Present, &mut body.chat_template)?;
                }
                "chat_template_kwargs" => object.take(
                    "chat_template_kwargs",
                    Maybe(Arguments),
                    &mut body.chat_template_kwargs,
                )?,
                "add_generation_prompt" => object.take(
                    "add_generation_prompt",
                    Maybe(Boolean),
                    &mut body.add_generation_prompt,
                )?,
                "continue_final_message" => object.take(
                    "continue_final_message",
                    Maybe(Boolean),
                    &mut body.continue_final_message,
                )?,
                _ => body.parameters.field(&name, &mut object)?,
            }
        }
        Ok(body)
    }
}

/// One turn.
struct Turn;

impl<'de> Shape<'de> for Turn {
    type Value = ChatMessage;

    fn wanted(&self) -> Cow<'static, str> {
        "an object with a role and a content".into()
    }

    fn object<A: MapAccess<'de>>(self, mut object: Object<'_, A>) -> Result<Self::Value, A::Error> {
        let (mut role, mut content, mut calls) = (None, None, false);
        while let Some(name) = object.name()? {
            match name.as_str() {
                "role" => object.take("role", Maybe(Text::word()), &mut role)?,
                "content" => object.take("content", Maybe(Content), &mut content)?,
                "tool_calls" => object.take("tool_calls", Filled, &mut calls)?,
                _ => object.skip()?,
            }
        }
        if calls {
            let place = object.places.name().unwrap_or_default();
            let what = "a message with tool calls";
            let error = ApiError::unsupported(format!("{place}.tool_calls"), what);
            return Err(object.places.fail(error));
        }
        let Some(role) = role else { return Err(object.places.refuse("needs a role")) };
        // The newer name for the same role; templates know the older.
        let role = if role == "developer" { "system".to_owned() } else { role };
        Ok(ChatMessage { role, content: content.unwrap_or_default() })
    }
}

/// What a turn says: a text or parts of one.
struct Content;

impl<'de> Shape<'de> for Content {
    type Value = String;

    fn wanted(&self) -> Cow<'static, str> {
        "a string or a list of text parts".into()
    }

    fn text(self, value: &str) -> Result<String, Wrong> {
        Ok(value.to_owned())
    }

    fn list<A: SeqAccess<'de>>(self, mut items: Items<'_, A>) -> Result<String, A::Error> {
        let mut content = String::new();
        while let Some(part) = items.next(Part)? {
            if content.is_empty() {
                content = part;
            } else {
                content.push_str(&part);
            }
        }
        Ok(content)
    }
}

struct Part;

impl<'de> Shape<'de> for Part {
    type Value = String;

    fn wanted(&self) -> Cow<'static, str> {
        "an object with a type and a text".into()
    }

    fn object<A: MapAccess<'de>>(self, mut object: Object<'_, A>) -> Result<String, A::Error> {
        let (mut kind, mut text) = (None, None);
        while let Some(name) = object.name()? {
            match name.as_str() {
                "type" => object.take("type", Maybe(PartType), &mut kind)?,
                "text" => object.take("text", Maybe(Text::whole()), &mut text)?,
                _ => object.skip()?,
            }
        }
        match (kind, text) {
            (Some(()), Some(text)) => Ok(text),
            (None, _) => Err(object.places.refuse("needs a type")),
            (_, None) => Err(object.places.refuse("needs a text")),
        }
    }
}

struct PartType;

impl Shape<'_> for PartType {
    type Value = ();

    fn wanted(&self) -> Cow<'static, str> {
        "\"text\"".into()
    }

    fn text(self, value: &str) -> Result<(), Wrong> {
        if value == "text" {
            return Ok(());
        }
        let shown: String = value.chars().take(SHOWN_CHARS).collect();
        Err(Wrong::Because(format!("must be \"text\", the only part there is, found {shown:?}")))
    }
}

/// A word, or an object that stands for none of them.
struct WordOrObject;

impl<'de> Shape<'de> for WordOrObject {
    type Value = String;

    fn wanted(&self) -> Cow<'static, str> {
        "a string or an object".into()
    }

    fn text(self, value: &str) -> Result<String, Wrong> {
        Text::word().text(value)
    }

    fn object<A: MapAccess<'de>>(self, object: Object<'_, A>) -> Result<String, A::Error> {
        Skip.object(object).map(|()| "object".to_owned())
    }
}

/// The `type` of an object; empty if it has none.
struct TypeOf;

impl<'de> Shape<'de> for TypeOf {
    type Value = String;

    fn wanted(&self) -> Cow<'static, str> {
        "an object with a type".into()
    }

    fn object<A: MapAccess<'de>>(self, mut object: Object<'_, A>) -> Result<String, A::Error> {
        let mut kind = None;
        while let Some(name) = object.name()? {
            match name.as_str() {
                "type" => object.take("type", Maybe(Text::word()), &mut kind)?,
                _ => object.skip()?,
            }
        }
        Ok(kind.unwrap_or_default())
    }
}

/// Answers a request.
pub(super) async fn create(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let headers = request.headers().clone();
    let Held { value: body, room, place: _place } = api.bodies.read_json::<Body>(request).await?;
    let n = body.parameters.choices()?;
    let streamed = body.parameters.stream.unwrap_or(false);
    let options = body.parameters.stream_options.unwrap_or_default();
    let with_logprobs = body.logprobs.unwrap_or(false);
    let mut generate = body.request(idempotency_key(&headers))?;
    generate.deadline_ms = deadline_ms(&headers)?;
    let wanted =
        Wanted { requests: vec![generate], n, prompts_only: false, echo: false, stream: streamed };
    let choices =
        Choices::start(&api, &headers, new_id("chatcmpl-"), wanted).await.map_err(as_sent)?;
    // The texts are tokens now.
    drop(room);
    let id = choices.id.clone();
    let prompts = choices.count_prompts();
    let model = api.service.model.name.clone();
    if streamed {
        let chunks = ChatChunks { id: id.clone(), logprobs: with_logprobs };
        let stream = sse::Start { chunks, model, prompts, options };
        let response = sse::respond(choices.events(), stream, api.service.compute());
        return Ok(named(response, &id));
    }
    let answers = choices.whole().await.map_err(ApiError::broke_off)?;
    let cost = answers.iter().map(WholeAnswer::cost).sum();
    let name = id.clone();
    let render = move || Json(whole(&id, &model, with_logprobs, prompts, &answers)).into_response();
    Ok(named(api.service.compute().on_answer(cost, render).await?, &name))
}

/// The arguments of the template have another name here than in the schema.
fn as_sent(error: RequestError) -> RequestError {
    match error {
        RequestError::Invalid { parameter, message } if parameter == TEMPLATE_ARGUMENTS => {
            let name = "chat_template_kwargs";
            RequestError::invalid(name, message.replace(TEMPLATE_ARGUMENTS, name))
        }
        other => other,
    }
}

fn whole(
    id: &str,
    model: &str,
    with_logprobs: bool,
    prompts: Prompts,
    answers: &[WholeAnswer],
) -> Value {
    let completion_tokens = answers.iter().map(WholeAnswer::completion_tokens).sum();
    let class = class_of(answers.iter().map(|answer| &answer.started));
    let listed: Vec<Value> = answers
        .iter()
        .enumerate()
        .map(|(index, answer)| {
            let entries = answer.deltas.iter().flat_map(|delta| &delta.logprobs);
            json!({
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": answer.text,
                    "refusal": null,
                },
                "logprobs": with_logprobs.then(|| logprobs::for_chat(entries)),
                "finish_reason": answer.finish_reason(),
            })
        })
        .collect();
    json!({
        "id": id,
        "object": "chat.completion",
        "created": now_unix_s(),
        "model": model,
        "system_fingerprint": fingerprint(class),
        "choices": listed,
        "usage": usage(prompts, prompts.cached(answers), completion_tokens),
    })
}

impl Body {
    fn request(self, idempotency_key: String) -> Result<GenerateRequest, ApiError> {
        self.refuse_unsupported()?;
        let messages = self.messages.unwrap_or_default();
        let mut arguments = self.chat_template_kwargs.unwrap_or_default();
        if let Some(add) = self.add_generation_prompt {
            arguments.insert("add_generation_prompt".into(), add.into());
        }
        let template_arguments_json =
            if arguments.is_empty() { String::new() } else { Value::from(arguments).to_string() };
        let (name, max_tokens) = match self.max_completion_tokens {
            Some(max_tokens) => ("max_completion_tokens", Some(max_tokens)),
            None => ("max_tokens", self.parameters.max_tokens),
        };
        let common = self.parameters.request()?;
        if max_tokens == Some(0) {
            return Err(ApiError::invalid(Some(name), format!("{name} must be at least 1")));
        }
        let wanted = self.logprobs.unwrap_or(false);
        if self.top_logprobs.is_some_and(|top| top > 0) && !wanted {
            let message = "top_logprobs needs logprobs to be true";
            return Err(ApiError::invalid(Some("top_logprobs"), message));
        }
        Ok(GenerateRequest {
            prompt: Prompt::Conversation { messages, template_arguments_json },
            max_tokens: max_tokens.unwrap_or(0),
            top_logprobs: wanted.then(|| self.top_logprobs.unwrap_or(0)),
            idempotency_key,
            ..common
        })
    }

    fn refuse_unsupported(&self) -> Result<(), ApiError> {
        if self.tools || self.functions {
            let name = if self.tools { "tools" } else { "functions" };
            return Err(ApiError::unsupported(name, "calling tools"));
        }
        if !matches!(self.tool_choice.as_deref(), None | Some("none" | "auto")) {
            return Err(ApiError::unsupported("tool_choice", "choosing a tool"));
        }
        if !matches!(self.response_format.as_deref(), None | Some("text")) {
            return Err(ApiError::unsupported("response_format", "a response format but text"));
        }
        if self.spoken || self.audio {
            let name = if self.spoken { "modalities" } else { "audio" };
            return Err(ApiError::unsupported(name, "anything but text"));
        }
        if self.chat_template {
            let what = "a chat template in a request";
            return Err(ApiError::unsupported("chat_template", what));
        }
        if self.continue_final_message == Some(true) {
            let what = "going on with the last message";
            return Err(ApiError::unsupported("continue_final_message", what));
        }
        Ok(())
    }
}

/// The chunks of a stream.
struct ChatChunks {
    id: String,
    logprobs: bool,
}

impl Chunks for ChatChunks {
    const OBJECT: &'static str = "chat.completion.chunk";

    fn id(&self) -> &str {
        &self.id
    }

    fn cost(&self, _: usize, event: &GenerateEvent) -> usize {
        match event {
            GenerateEvent::Delta(delta) => delta_cost(delta),
            GenerateEvent::Started(_) | GenerateEvent::Finished(_) => 0,
        }
    }

    fn choice(&mut self, index: usize, event: &GenerateEvent) -> Option<Value> {
        let (delta, entries, finish_reason) = match event {
            GenerateEvent::Started(_) => {
                (json!({ "role": "assistant", "content": "" }), None, None)
            }
            GenerateEvent::Delta(delta) => {
                if delta.text.is_empty() && delta.logprobs.is_empty() {
                    return None;
                }
                let entries = self.logprobs.then(|| logprobs::for_chat(delta.logprobs.iter()));
                (json!({ "content": delta.text }), entries, None)
            }
            GenerateEvent::Finished(finished) => (json!({}), None, Some(finished.reason.name())),
        };
        Some(json!({
            "index": index,
            "delta": delta,
            "logprobs": entries,
            "finish_reason": finish_reason,
        }))
    }
}
