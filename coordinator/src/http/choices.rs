//! The answers that one HTTP request asks for: some prompts, some choices of each.

use axum::http::HeaderMap;
use futures::stream::{self, BoxStream};
use futures::{StreamExt, future};
use node::telemetry::propagation;
use proto::generate::{Delta, Finished, GenerateEvent, GenerateRequest, Started};
use tracing::Instrument;

use super::Api;
use crate::answer::Answer;
use crate::compute::cost_of;
use crate::request::RequestError;
use crate::service::{self, Prepared};
use crate::spans::request_span;

/// All answers to one HTTP request, in the order of their indices.
pub(super) struct Choices {
    answers: Vec<Answer>,
    pub(super) prompts: Vec<Prepared>,
    /// Of the answer, and of whatever else is told of it: to its client and in its trace.
    pub(super) id: String,
    /// Answers to each prompt.
    pub(super) n: usize,
}

/// One answer, whole.
#[derive(Default)]
pub(super) struct WholeAnswer {
    pub(super) started: Started,
    pub(super) text: String,
    /// Without their texts.
    pub(super) deltas: Vec<Delta>,
    pub(super) finished: Option<Finished>,
}

/// What one HTTP request asks for.
pub(super) struct Wanted {
    /// One for each prompt.
    pub(super) requests: Vec<GenerateRequest>,
    /// Answers to each prompt.
    pub(super) n: u32,
    /// Only the prompts are looked at: answers are empty.
    pub(super) prompts_only: bool,
    /// The answers begin with their prompts.
    pub(super) echo: bool,
    /// As a stream; for the span.
    pub(super) stream: bool,
}

impl Choices {
    /// Prepares every request, then puts its answers into the queue.
    ///
    /// # Errors
    ///
    /// The first thing that was refused; what was taken before is cancelled.
    pub(super) async fn start(
        api: &Api,
        headers: &HeaderMap,
        id: String,
        wanted: Wanted,
    ) -> Result<Self, RequestError> {
        let Wanted { requests, n, prompts_only, echo, stream } = wanted;
        let Some(first) = requests.first() else {
            return Err(RequestError::invalid("prompt", "there is no prompt"));
        };
        let choices = requests.len() * n as usize;
        let span = request_span(first, &api.service.model.name, choices, stream);
        span.record("gen_ai.response.id", id.as_str());
        propagation::extract_http(&span, headers);
        let started = async {
            let mut prompts = Vec::with_capacity(requests.len());
            for request in requests {
                let answer = if prompts_only {
                    service::Wanted::PromptOnly
                } else {
                    service::Wanted::Answer
                };
                let prepared = api.service.prepare(request, answer, echo).await?;
                prompts.push(prepared.with_id(id.clone()));
            }
            let mut answers = Vec::with_capacity(choices);
            for prompt in &prompts {
                for choice in 0..n {
                    answers.push(api.service.start(prompt, choice, span.clone()).await?);
                }
            }
            Ok(Self { answers, prompts, id, n: n as usize })
        };
        started.instrument(span.clone()).await
    }

    /// What all prompts are together.
    pub(super) fn count_prompts(&self) -> Prompts {
        let tokens = self.prompts.iter().map(|prompt| prompt.prompt().len() as u64).sum();
        Prompts { tokens, n: self.n }
    }

    /// Waits for all answers at once: none may fall behind while another is read.
    ///
    /// # Errors
    ///
    /// The first answer's error.
    pub(super) async fn whole(self) -> Result<Vec<WholeAnswer>, RequestError> {
        future::try_join_all(self.answers.into_iter().map(whole)).await
    }

    /// All events as they come, with the index of their choice.
    pub(super) fn events(self) -> BoxStream<'static, (usize, Result<GenerateEvent, RequestError>)> {
        let streams = self.answers.into_iter().enumerate().map(|(index, answer)| {
            stream::unfold(answer, move |mut answer| async move {
                let event = answer.next().await?;
                Some(((index, event), answer))
            })
            .boxed()
        });
        stream::select_all(streams).boxed()
    }
}

/// The prompts of one HTTP request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prompts {
    /// The length of all together.
    pub(super) tokens: u64,
    /// Answers to each.
    pub(super) n: usize,
}

impl Prompts {
    /// Tokens of its prompt that the answer number `index` found in the prefix cache; of several
    /// answers to one prompt the first says it, for the others share with that.
    pub(super) fn cached_by(self, index: usize, finished: &Finished) -> u64 {
        let is_first = index.is_multiple_of(self.n.max(1));
        if is_first { finished.timings.cached_tokens.into() } else { 0 }
    }

    /// The same of all answers together.
    pub(super) fn cached(self, answers: &[WholeAnswer]) -> u64 {
        let ends = answers
            .iter()
            .enumerate()
            .filter_map(|(index, answer)| Some(self.cached_by(index, answer.finished.as_ref()?)));
        ends.sum()
    }
}

/// What writing the log probabilities of a delta costs.
pub(super) fn delta_cost(delta: &Delta) -> usize {
    delta.logprobs.iter().map(|entry| 1 + entry.top.len()).sum()
}

async fn whole(mut answer: Answer) -> Result<WholeAnswer, RequestError> {
    let mut whole = WholeAnswer::default();
    while let Some(event) = answer.next().await {
        match event? {
            GenerateEvent::Started(started) => whole.started = started,
            GenerateEvent::Delta(mut delta) => {
                whole.text.push_str(&std::mem::take(&mut delta.text));
                whole.deltas.push(delta);
            }
            GenerateEvent::Finished(finished) => whole.finished = Some(finished),
        }
    }
    Ok(whole)
}

impl WholeAnswer {
    /// In OpenAI's words; an answer that was read to its end has one.
    pub(super) fn finish_reason(&self) -> &'static str {
        self.finished.as_ref().map_or("stop", |finished| finished.reason.name())
    }

    /// What writing it costs: candidates of a token cost as much as the token.
    pub(super) fn cost(&self) -> usize {
        let entries = self.deltas.iter().map(delta_cost).sum();
        cost_of(entries, self.text.len())
    }

    /// Length of the answer.
    pub(super) fn completion_tokens(&self) -> u64 {
        self.finished.as_ref().map_or(0, |finished| finished.completion_tokens.into())
    }
}
