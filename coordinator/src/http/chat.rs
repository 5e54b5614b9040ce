//! `POST /v1/chat/completions`: the model's chat template is applied to a conversation.

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use proto::generate::{ChatMessage, GenerateEvent, GenerateRequest, Prompt};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::body::read_json;
use super::choices::{Choices, Wanted, WholeAnswer};
use super::errors::ApiError;
use super::logprobs;
use super::sse::{self, Chunks, class_of, fingerprint, usage};
use super::types::Parameters;
use super::{Api, idempotency_key, new_id, now_unix_s};

/// The body of a request.
#[derive(Debug, Deserialize)]
pub(super) struct Body {
    messages: Option<Vec<Message>>,
    /// The newer name of `max_tokens`.
    max_completion_tokens: Option<u32>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    tools: Option<Vec<Value>>,
    functions: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    response_format: Option<Value>,
    modalities: Option<Vec<String>>,
    audio: Option<Value>,
    chat_template: Option<Value>,
    chat_template_kwargs: Option<Map<String, Value>>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    #[serde(flatten)]
    parameters: Parameters,
}

/// One turn.
#[derive(Clone, Debug, Deserialize)]
struct Message {
    role: String,
    content: Option<Content>,
    tool_calls: Option<Vec<Value>>,
}

/// What a turn says: a text or parts of one.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Clone, Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

/// Answers a request.
pub(super) async fn create(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let headers = request.headers().clone();
    let body: Body = read_json(request, api.body_bytes).await?;
    let n = body.parameters.choices()?;
    let generate = body.request(idempotency_key(&headers))?;
    let streamed = body.parameters.stream.unwrap_or(false);
    let wanted = Wanted { requests: vec![generate], n, prompts_only: false, stream: streamed };
    let choices = Choices::start(&api, &headers, wanted).await?;
    let id = new_id("chatcmpl-");
    let with_logprobs = body.logprobs.unwrap_or(false);
    let prompt_tokens = choices.prompt_tokens();
    if streamed {
        let options = body.parameters.stream_options.unwrap_or_default();
        let chunks = ChatChunks { id, logprobs: with_logprobs };
        let model = api.service.model.name.clone();
        return Ok(sse::respond(choices.events(), chunks, model, prompt_tokens, options));
    }
    let answers = choices.whole().await?;
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
    Ok(Json(json!({
        "id": id,
        "object": "chat.completion",
        "created": now_unix_s(),
        "model": api.service.model.name,
        "system_fingerprint": fingerprint(class),
        "choices": listed,
        "usage": usage(prompt_tokens, completion_tokens),
    }))
    .into_response())
}

impl Body {
    fn request(&self, idempotency_key: String) -> Result<GenerateRequest, ApiError> {
        self.refuse_unsupported()?;
        let messages = self
            .messages
            .iter()
            .flatten()
            .enumerate()
            .map(|(index, message)| message.turn(index))
            .collect::<Result<Vec<_>, _>>()?;
        let mut arguments = self.chat_template_kwargs.clone().unwrap_or_default();
        if let Some(add) = self.add_generation_prompt {
            arguments.insert("add_generation_prompt".into(), add.into());
        }
        let template_arguments_json =
            if arguments.is_empty() { String::new() } else { Value::from(arguments).to_string() };
        let common = self.parameters.request()?;
        let (name, max_tokens) = match self.max_completion_tokens {
            Some(max_tokens) => ("max_completion_tokens", Some(max_tokens)),
            None => ("max_tokens", self.parameters.max_tokens),
        };
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
        let some = |list: &Option<Vec<Value>>| list.as_ref().is_some_and(|list| !list.is_empty());
        if some(&self.tools) || some(&self.functions) {
            return Err(ApiError::unsupported("tools", "calling tools"));
        }
        let choice = self.tool_choice.as_ref().map(|choice| choice.as_str().unwrap_or("object"));
        if !matches!(choice, None | Some("none" | "auto")) {
            return Err(ApiError::unsupported("tool_choice", "choosing a tool"));
        }
        let format = self.response_format.as_ref();
        let format = format.map(|format| format.get("type").and_then(Value::as_str).unwrap_or(""));
        if !matches!(format, None | Some("text")) {
            return Err(ApiError::unsupported("response_format", "a response format but text"));
        }
        let spoken = self.modalities.iter().flatten().any(|modality| modality != "text");
        if spoken || self.audio.is_some() {
            return Err(ApiError::unsupported("modalities", "anything but text"));
        }
        if self.chat_template.is_some() {
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

impl Message {
    fn turn(&self, index: usize) -> Result<ChatMessage, ApiError> {
        if self.tool_calls.as_ref().is_some_and(|calls| !calls.is_empty()) {
            return Err(ApiError::unsupported("messages", "a message with tool calls"));
        }
        let content = match &self.content {
            None => String::new(),
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) => {
                let mut content = String::new();
                for part in parts {
                    let (true, Some(text)) = (part.kind == "text", &part.text) else {
                        let message = format!("message {index} has a part that is not a text");
                        return Err(ApiError::invalid(Some("messages"), message));
                    };
                    content.push_str(text);
                }
                content
            }
        };
        // The newer name for the same role; templates know the older.
        let role = if self.role == "developer" { "system" } else { &self.role };
        Ok(ChatMessage { role: role.to_owned(), content })
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
