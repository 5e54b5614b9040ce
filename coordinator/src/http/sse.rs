//! Answers as a stream of server-sent events. A stream that fails says so in an event of OpenAI's
//! form and ends with `[DONE]`: clients take anything else for a complete answer.

use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use proto::generate::{GenerateEvent, Started};
use serde_json::{Value, json};

use super::errors::ApiError;
use super::types::StreamOptions;
use crate::request::RequestError;

/// How often a quiet stream says that it lives: proxies give up after 30 to 60 s.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The kinds of completions differ in what one event says about one choice.
pub(super) trait Chunks: Send + 'static {
    /// `object` of every chunk.
    const OBJECT: &'static str;

    /// `id` of every chunk.
    fn id(&self) -> &str;

    /// The choices that an event changes: none, one, or what comes before the answer.
    fn choice(&mut self, index: usize, event: &GenerateEvent) -> Option<Value>;
}

/// What is common to all chunks of one stream.
struct Stream<C> {
    events: BoxStream<'static, (usize, Result<GenerateEvent, RequestError>)>,
    chunks: C,
    model: String,
    created_unix_s: u64,
    options: StreamOptions,
    class: String,
    prompt_tokens: u64,
    completion_tokens: u64,
    /// Sent and not yet: what follows the answers.
    ending: Option<Vec<Event>>,
}

/// The response that streams `events`.
pub(super) fn respond<C: Chunks>(
    events: BoxStream<'static, (usize, Result<GenerateEvent, RequestError>)>,
    chunks: C,
    model: String,
    prompt_tokens: u64,
    options: StreamOptions,
) -> Response {
    let stream = Stream {
        events,
        chunks,
        model,
        created_unix_s: super::now_unix_s(),
        options,
        class: String::new(),
        prompt_tokens,
        completion_tokens: 0,
        ending: None,
    };
    let stream = stream::unfold(stream, |mut stream| async {
        let event = stream.next().await?;
        Some((Ok::<_, Infallible>(event), stream))
    });
    Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

impl<C: Chunks> Stream<C> {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(ending) = &mut self.ending {
                return ending.pop();
            }
            match self.events.next().await {
                Some((index, Ok(event))) => {
                    if let Some(event) = self.chunk(index, &event) {
                        return Some(event);
                    }
                }
                Some((_, Err(error))) => {
                    let error = data(&ApiError::from(error).body());
                    self.ending = Some(vec![done(), error]);
                }
                None => {
                    let mut ending = vec![done()];
                    if self.options.include_usage() {
                        let usage = self.envelope(json!([]), Some(self.usage()));
                        ending.push(data(&usage));
                    }
                    self.ending = Some(ending);
                }
            }
        }
    }

    fn chunk(&mut self, index: usize, event: &GenerateEvent) -> Option<Event> {
        match event {
            GenerateEvent::Started(started) => self.class.clone_from(&started.class),
            GenerateEvent::Delta(delta) => self.completion_tokens += delta.tokens.len() as u64,
            GenerateEvent::Finished(_) => {}
        }
        let choice = self.chunks.choice(index, event)?;
        let usage = self.options.continuous_usage().then(|| self.usage());
        Some(data(&self.envelope(json!([choice]), usage)))
    }

    fn envelope(&self, choices: Value, usage: Option<Value>) -> Value {
        let mut chunk = json!({
            "id": self.chunks.id(),
            "object": C::OBJECT,
            "created": self.created_unix_s,
            "model": self.model,
            "system_fingerprint": fingerprint(&self.class),
            "choices": choices,
        });
        if let Some(usage) = usage {
            chunk["usage"] = usage;
        }
        chunk
    }

    fn usage(&self) -> Value {
        usage(self.prompt_tokens, self.completion_tokens)
    }
}

/// `usage` of every kind of answer.
pub(super) fn usage(prompt_tokens: u64, completion_tokens: u64) -> Value {
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    })
}

/// The numerics class, short: equal fingerprints, seeds and requests give equal answers.
pub(super) fn fingerprint(class: &str) -> String {
    format!("fp_{}", class.get(..16).unwrap_or(class))
}

/// The class that answered, of the first of some answers.
pub(super) fn class_of<'a>(mut started: impl Iterator<Item = &'a Started>) -> &'a str {
    started.next().map_or("", |started| started.class.as_str())
}

fn data(value: &Value) -> Event {
    // Without line breaks, which `Event` would not take.
    Event::default().data(value.to_string())
}

fn done() -> Event {
    Event::default().data("[DONE]")
}
