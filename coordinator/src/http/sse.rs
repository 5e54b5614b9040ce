//! Answers as a stream of server-sent events. A stream that fails says so in an event of OpenAI's
//! form and ends with `[DONE]`: clients take anything else for a complete answer.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use proto::generate::{GenerateEvent, Started};
use serde_json::{Value, json};

use super::choices::Prompts;
use super::errors::ApiError;
use super::types::StreamOptions;
use crate::compute::Compute;
use crate::request::RequestError;

/// How often a quiet stream says that it lives: proxies give up after 30 to 60 s.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The kinds of completions differ in what one event says about one choice.
pub(super) trait Chunks: Send + 'static {
    /// `object` of every chunk.
    const OBJECT: &'static str;

    /// `id` of every chunk.
    fn id(&self) -> &str;

    /// What writing an event costs, in tokens.
    fn cost(&self, index: usize, event: &GenerateEvent) -> usize;

    /// The choices that an event changes: none, one, or what comes before the answer.
    fn choice(&mut self, index: usize, event: &GenerateEvent) -> Option<Value>;
}

/// What a stream begins with.
pub(super) struct Start<C> {
    pub(super) chunks: C,
    pub(super) model: String,
    pub(super) prompts: Prompts,
    pub(super) options: StreamOptions,
}

/// One stream.
struct Stream<C> {
    events: BoxStream<'static, (usize, Result<GenerateEvent, RequestError>)>,
    /// Away while a long chunk is written, and for good if that fails.
    writer: Option<Writer<C>>,
    compute: Arc<Compute>,
    /// Sent and not yet: what follows the answers.
    ending: Option<Vec<Event>>,
}

/// What is common to all chunks of one stream.
struct Writer<C> {
    start: Start<C>,
    created_unix_s: u64,
    class: String,
    cached_tokens: u64,
    completion_tokens: u64,
}

/// The response that streams `events`. Long chunks are written in turns of `compute`.
pub(super) fn respond<C: Chunks>(
    events: BoxStream<'static, (usize, Result<GenerateEvent, RequestError>)>,
    start: Start<C>,
    compute: Arc<Compute>,
) -> Response {
    let writer = Writer {
        start,
        created_unix_s: super::now_unix_s(),
        class: String::new(),
        cached_tokens: 0,
        completion_tokens: 0,
    };
    let stream = Stream { events, writer: Some(writer), compute, ending: None };
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
            let written = match self.events.next().await {
                Some((index, Ok(event))) => self.write(index, event).await,
                Some((_, Err(error))) => Err(error),
                None => {
                    let mut ending = vec![done()];
                    ending.extend(self.writer.as_ref().and_then(Writer::usage_chunk));
                    self.ending = Some(ending);
                    continue;
                }
            };
            match written {
                Ok(Some(event)) => return Some(event),
                Ok(None) => {}
                Err(error) => {
                    let error = data(&ApiError::from(error).body());
                    self.ending = Some(vec![done(), error]);
                }
            }
        }
    }

    /// The chunk of an event, if it has one.
    async fn write(
        &mut self,
        index: usize,
        event: GenerateEvent,
    ) -> Result<Option<Event>, RequestError> {
        let Some(mut writer) = self.writer.take() else {
            let message = "an earlier part of the stream could not be written".into();
            return Err(RequestError::Internal { message });
        };
        let cost = writer.start.chunks.cost(index, &event);
        let work = move || {
            let chunk = writer.chunk(index, &event);
            (writer, chunk)
        };
        let (writer, chunk) = self.compute.on_answer(cost, work).await?;
        self.writer = Some(writer);
        Ok(chunk)
    }
}

impl<C: Chunks> Writer<C> {
    fn chunk(&mut self, index: usize, event: &GenerateEvent) -> Option<Event> {
        match event {
            GenerateEvent::Started(started) => self.class.clone_from(&started.class),
            GenerateEvent::Delta(delta) => self.completion_tokens += delta.tokens.len() as u64,
            GenerateEvent::Finished(finished) => {
                self.cached_tokens += self.start.prompts.cached_by(index, finished);
            }
        }
        let choice = self.start.chunks.choice(index, event)?;
        let usage = self.start.options.continuous_usage().then(|| self.usage());
        Some(data(&self.envelope(json!([choice]), usage)))
    }

    /// What tells the usage at the end, if that is wanted.
    fn usage_chunk(&self) -> Option<Event> {
        let wanted = self.start.options.include_usage();
        wanted.then(|| data(&self.envelope(json!([]), Some(self.usage()))))
    }

    fn envelope(&self, choices: Value, usage: Option<Value>) -> Value {
        let mut chunk = json!({
            "id": self.start.chunks.id(),
            "object": C::OBJECT,
            "created": self.created_unix_s,
            "model": self.start.model,
            "system_fingerprint": fingerprint(&self.class),
            "choices": choices,
        });
        if let Some(usage) = usage {
            chunk["usage"] = usage;
        }
        chunk
    }

    fn usage(&self) -> Value {
        usage(self.start.prompts, self.cached_tokens, self.completion_tokens)
    }
}

/// `usage` of every kind of answer; `cached_tokens` are those of the prompts that others had computed.
pub(super) fn usage(prompts: Prompts, cached_tokens: u64, completion_tokens: u64) -> Value {
    json!({
        "prompt_tokens": prompts.tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompts.tokens + completion_tokens,
        "prompt_tokens_details": { "cached_tokens": cached_tokens },
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

#[cfg(test)]
mod tests {
    use std::thread::{self, ThreadId};

    use super::*;

    /// Notes which thread writes the choices, the first of which is long.
    struct Noted(Arc<std::sync::Mutex<Vec<ThreadId>>>);

    impl Chunks for Noted {
        const OBJECT: &'static str = "test";

        fn id(&self) -> &str {
            "t"
        }

        fn cost(&self, index: usize, _: &GenerateEvent) -> usize {
            if index == 0 { 100_000 } else { 1 }
        }

        fn choice(&mut self, index: usize, _: &GenerateEvent) -> Option<Value> {
            assert!(index < 2, "a chunk that cannot be written");
            self.0.lock().unwrap().push(thread::current().id());
            Some(json!({ "index": index }))
        }
    }

    fn stream(indices: &[usize]) -> (Stream<Noted>, Arc<std::sync::Mutex<Vec<ThreadId>>>) {
        let noted = Arc::default();
        let start = Start {
            chunks: Noted(Arc::clone(&noted)),
            model: "m".into(),
            prompts: Prompts { tokens: 1, n: 1 },
            options: StreamOptions::default(),
        };
        let writer = Writer {
            start,
            created_unix_s: 0,
            class: String::new(),
            cached_tokens: 0,
            completion_tokens: 0,
        };
        let event = |&index: &usize| (index, Ok(GenerateEvent::Started(Started::default())));
        let events = stream::iter(indices.iter().map(event).collect::<Vec<_>>()).boxed();
        (Stream { events, writer: Some(writer), compute: Compute::new(), ending: None }, noted)
    }

    #[tokio::test]
    async fn long_chunks_are_not_written_on_a_thread_of_the_runtime() {
        let (mut stream, noted) = stream(&[0, 1, 0]);
        for _ in 0..4 {
            // The fourth is the end.
            assert!(stream.next().await.is_some());
        }
        assert!(stream.next().await.is_none());
        let here = thread::current().id();
        let threads: Vec<bool> = noted.lock().unwrap().iter().map(|id| *id == here).collect();
        assert_eq!(threads, [false, true, false]);
    }
}
