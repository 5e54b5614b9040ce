//! One answer on its way to a client: tokens in, text and events out.
//!
//! Text lags behind tokens: a token may end inside a character, and what may begin a stop string
//! is held back. Dropping an [`Answer`] lets go of its sequence: the driver sees the closed
//! channel and frees its KV.

use std::sync::Arc;

use proto::generate::{
    Candidate, Delta, FinishReason, Finished, GenerateEvent, Logprobs, Started, Timings,
};
use proto::step::Sampled;
use tracing::Span;

use crate::compute::Compute;
use crate::driver::{Admitted, DriverHandle, End, Tokens};
use crate::request::RequestError;
use crate::scheduler::Finish;
use crate::text::{Detokenizer, StopMatcher, Text, Tokenizer};

#[cfg(test)]
mod tests;

/// What an answer is made with.
pub(crate) struct AnswerParts {
    pub(crate) text: Arc<Text>,
    pub(crate) compute: Arc<Compute>,
    pub(crate) driver: DriverHandle,
    pub(crate) model: String,
    pub(crate) request_id: String,
    pub(crate) seed: u64,
    pub(crate) prompt: Arc<[u32]>,
    /// The tokens that the client has.
    pub(crate) received: Vec<u32>,
    pub(crate) stop: Vec<String>,
    pub(crate) include_stop: bool,
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) min_tokens: u32,
    pub(crate) logprobs: bool,
    pub(crate) score_prompt: bool,
    /// Of the request; ends with the answer.
    pub(crate) span: Span,
}

/// One answer on its way.
pub(crate) struct Answer {
    parts: AnswerParts,
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    /// Tokens of the answer so far, received ones included.
    completion_tokens: u32,
    state: State,
}

enum State {
    /// Not in the queue yet.
    New,
    /// In the queue; nothing was told yet.
    Admitted(Box<Admitted>),
    /// Tokens come.
    Streaming(Tokens),
    /// The last delta was told.
    Ending(Box<Finished>),
    /// Nothing more will be told.
    Done,
}

impl Answer {
    /// An answer that is not in the queue yet. What the client has of it is replayed, so that
    /// text goes on where it was.
    pub(crate) fn new(parts: AnswerParts) -> Self {
        let matcher = StopMatcher::new(parts.stop.clone(), parts.include_stop);
        let mut answer = Self {
            parts,
            detokenizer: Detokenizer::default(),
            matcher,
            completion_tokens: 0,
            state: State::New,
        };
        for token in std::mem::take(&mut answer.parts.received) {
            // The client has this text; a stop string in it would have ended the answer then,
            // and a client that goes on past one gets what it asked for.
            let _ = answer.take_token(token);
        }
        answer
    }

    /// The driver took it.
    pub(crate) fn admit(&mut self, admitted: Admitted) {
        self.state = State::Admitted(Box::new(admitted));
    }

    /// The next event: one `Started`, deltas, one `Finished`, then `None`. After an error `None`.
    ///
    /// # Errors
    ///
    /// [`RequestError`] if the answer ends before its end.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: an answer whose event was dropped must be dropped too.
    pub(crate) async fn next(&mut self) -> Option<Result<GenerateEvent, RequestError>> {
        let outcome = self.advance().await;
        match &outcome {
            None | Some(Ok(GenerateEvent::Started(_) | GenerateEvent::Delta(_))) => {}
            Some(Ok(GenerateEvent::Finished(finished))) => self.record_end(finished),
            Some(Err(error)) => {
                self.state = State::Done;
                self.parts.span.record("error.type", error.kind());
            }
        }
        outcome
    }

    async fn advance(&mut self) -> Option<Result<GenerateEvent, RequestError>> {
        match std::mem::replace(&mut self.state, State::Done) {
            State::New | State::Done => None,
            State::Admitted(admitted) => Some(self.begin(*admitted).await),
            State::Streaming(tokens) => Some(self.stream(tokens).await),
            State::Ending(finished) => Some(Ok(GenerateEvent::Finished(*finished))),
        }
    }

    async fn begin(&mut self, admitted: Admitted) -> Result<GenerateEvent, RequestError> {
        let mut started = Started {
            request_id: self.parts.request_id.clone(),
            model: self.parts.model.clone(),
            class: admitted.class.to_string(),
            seed: self.parts.seed,
            prompt_tokens: self.parts.prompt.len() as u32,
            max_tokens: admitted.max_tokens,
            prompt_logprobs: Vec::new(),
        };
        let mut tokens = match admitted.answer {
            Ok(tokens) => tokens,
            Err(finish) => {
                // It was complete before anything was computed.
                let finished =
                    self.finished(finish.reason, stop_reason(finish), Timings::default());
                self.state = State::Ending(Box::new(finished));
                return Ok(GenerateEvent::Started(started));
            }
        };
        if self.parts.score_prompt {
            let scores = tokens.prompt_scores().await?;
            let (text, prompt) = (Arc::clone(&self.parts.text), Arc::clone(&self.parts.prompt));
            let work = move || prompt_logprobs(text.tokenizer(), &prompt, scores);
            started.prompt_logprobs =
                self.parts.compute.on_answer(self.parts.prompt.len(), work).await?;
        }
        self.state = State::Streaming(tokens);
        Ok(GenerateEvent::Started(started))
    }

    async fn stream(&mut self, mut tokens: Tokens) -> Result<GenerateEvent, RequestError> {
        let Some((index, sampled)) = tokens.next().await else {
            let End { finish, timings } = tokens.end().await?;
            return Ok(self.last_delta(finish, timings));
        };
        let logprobs = if self.parts.logprobs { vec![self.logprobs(&sampled)] } else { Vec::new() };
        let (text, matched) = self.take_token(sampled.token);
        let delta = Delta { index: index.into(), tokens: vec![sampled.token], text, logprobs };
        self.state = match matched {
            None => State::Streaming(tokens),
            Some(stop) => {
                // The sequence ends here, whatever is on its way for it.
                let timings = tokens.finish(&self.parts.driver).await;
                State::Ending(Box::new(self.finished(FinishReason::Stop, stop, timings)))
            }
        };
        Ok(GenerateEvent::Delta(delta))
    }

    /// Counts a token and gives the text that it makes certain, and the stop string it completes.
    fn take_token(&mut self, token: u32) -> (String, Option<String>) {
        let index = self.completion_tokens;
        self.completion_tokens += 1;
        let ends = self.parts.stop_tokens.contains(&token) && index >= self.parts.min_tokens;
        let silent = ends && !self.parts.include_stop;
        let bytes = match self.parts.text.tokenizer() {
            Some(tokenizer) if !silent => tokenizer.text_bytes(token),
            _ => &[],
        };
        let text = self.detokenizer.push(bytes);
        // A stop string does not count before the least length either.
        if self.completion_tokens < self.parts.min_tokens {
            return (text, None);
        }
        let (text, matched) = self.matcher.push(&text);
        (text, matched.map(|matched| matched.stop))
    }

    /// What was held back, when the answer ended by itself; then its end.
    fn last_delta(&mut self, finish: Finish, timings: Timings) -> GenerateEvent {
        let (mut text, matched) = self.matcher.push(&self.detokenizer.finish());
        let (reason, stop_reason) = match matched {
            Some(matched) => (FinishReason::Stop, matched.stop),
            None => {
                text.push_str(&self.matcher.finish());
                (finish.reason, stop_reason(finish))
            }
        };
        let finished = self.finished(reason, stop_reason, timings);
        if text.is_empty() {
            return GenerateEvent::Finished(finished);
        }
        self.state = State::Ending(Box::new(finished));
        GenerateEvent::Delta(Delta {
            index: self.completion_tokens.into(),
            text,
            ..Delta::default()
        })
    }

    fn finished(&self, reason: FinishReason, stop_reason: String, timings: Timings) -> Finished {
        Finished {
            reason,
            stop_reason,
            prompt_tokens: self.parts.prompt.len() as u32,
            completion_tokens: self.completion_tokens,
            timings,
        }
    }

    fn logprobs(&self, sampled: &Sampled) -> Logprobs {
        let tokenizer = self.parts.text.tokenizer();
        let candidate = |entry: &proto::step::TokenLogprob| Candidate {
            token: entry.token,
            logprob: entry.logprob,
            token_bytes: token_bytes(tokenizer, entry.token),
        };
        Logprobs {
            token: sampled.token,
            logprob: sampled.logprob.unwrap_or(f32::NEG_INFINITY),
            token_bytes: token_bytes(tokenizer, sampled.token),
            top: sampled.top.iter().map(candidate).collect(),
        }
    }

    fn record_end(&self, finished: &Finished) {
        let span = &self.parts.span;
        span.record("gen_ai.response.id", self.parts.request_id.as_str());
        span.record("gen_ai.response.finish_reasons", finished.reason.name());
        span.record("gen_ai.usage.input_tokens", finished.prompt_tokens);
        span.record("gen_ai.usage.output_tokens", finished.completion_tokens);
    }
}

/// The stop token in the schema's words; empty when none ended the answer.
fn stop_reason(finish: Finish) -> String {
    finish.stop_token.map(|token| format!("<{token}>")).unwrap_or_default()
}

fn prompt_logprobs(
    tokenizer: Option<&Tokenizer>,
    prompt: &[u32],
    scores: Vec<f32>,
) -> Vec<Logprobs> {
    let later_tokens = prompt.iter().skip(1);
    later_tokens
        .zip(scores)
        .map(|(&token, logprob)| Logprobs {
            token,
            logprob,
            token_bytes: token_bytes(tokenizer, token),
            top: Vec::new(),
        })
        .collect()
}

fn token_bytes(tokenizer: Option<&Tokenizer>, token: u32) -> Vec<u8> {
    tokenizer.map(|tokenizer| tokenizer.token_bytes(token).to_vec()).unwrap_or_default()
}
