//! The one door to answers for both servers: checks, text, admission.

use std::sync::Arc;
use std::time::Duration;

use proto::generate::{GenerateRequest, Prompt};
use proto::operator::{Drain, Drained, Planned};
use proto::status::ClusterStatus;
use proto::step::SamplingParameters;
use tokio::sync::{Semaphore, watch};
use tracing::Span;

use crate::answer::{Answer, AnswerParts};
use crate::arrival;
use crate::background;
use crate::driver::{Check, DriverHandle, OrderError, Submission};
use crate::memory::{Memory, Room, SMALL_BYTES};
use crate::planner::Problem;
use crate::request::{self, Checked, RequestError, ServedModel};
use crate::router::Wish;
use crate::scheduler::{self, Priority, Sequence};
use crate::text::Text;

/// Prompts that are tokenised at once: more only take turns on the same cores.
const ENCODING_AT_ONCE: usize = 8;

/// A prompt takes one turn of [`ENCODING_AT_ONCE`] for each of these bytes, all turns at most: the
/// tokenizer needs up to a hundred times as much memory while it works.
const BYTES_FOR_A_TURN: usize = 512 << 10;

/// Answers that are written at once, of those that are written as a whole.
const RENDERING_AT_ONCE: usize = 4;

/// Bytes of a made-up idempotency key.
const RANDOM_KEY_BYTES: usize = 16;

/// What both servers serve.
pub(crate) struct Service {
    pub(crate) model: ServedModel,
    text: Arc<Text>,
    driver: DriverHandle,
    encoding: Arc<Semaphore>,
    rendering: Arc<Semaphore>,
    /// The longest that a request may take.
    request_deadline: Duration,
    memory: Arc<Memory>,
}

/// A request with its prompt in tokens: what every choice of it starts from.
pub(crate) struct Prepared {
    checked: Checked,
    /// In tokens.
    prompt: Vec<u32>,
    /// What each choice begins as.
    sequence: Sequence,
    seed: u64,
    request_id: String,
}

impl Prepared {
    /// The prompt in tokens.
    pub(crate) fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// With the id that its client is told.
    pub(crate) fn with_id(self, request_id: String) -> Self {
        Self { request_id, ..self }
    }
}

/// What a request is prepared for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// A text that goes on after the prompt.
    Answer,
    /// The prompt itself, and its scores.
    PromptOnly,
}

impl Service {
    /// A service for one model.
    pub(crate) fn new(
        model: ServedModel,
        text: Text,
        driver: DriverHandle,
        request_deadline: Duration,
        memory: Arc<Memory>,
    ) -> Self {
        Self {
            model,
            text: Arc::new(text),
            driver,
            encoding: Arc::new(Semaphore::new(ENCODING_AT_ONCE)),
            rendering: Arc::new(Semaphore::new(RENDERING_AT_ONCE)),
            request_deadline,
            memory,
        }
    }

    /// Checks a request and tokenises its prompt, off the async threads: both may take
    /// milliseconds.
    ///
    /// # Errors
    ///
    /// [`RequestError`] for what is wrong with it.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the request; work that began runs to its end.
    pub(crate) async fn prepare(
        &self,
        request: GenerateRequest,
        answer: Wanted,
    ) -> Result<Prepared, RequestError> {
        let bytes = prompt_bytes(&request.prompt);
        let turns = u32::try_from(1 + bytes / BYTES_FOR_A_TURN)
            .unwrap_or(u32::MAX)
            .min(ENCODING_AT_ONCE as u32);
        let model = self.model.clone();
        let request_id = hex(&rand::random::<[u8; RANDOM_KEY_BYTES]>());
        let work = move |text: &Text| {
            let mut checked = request::check(request, &model)?;
            if answer == Wanted::PromptOnly {
                // The schema cannot say so: there a length of 0 is as many tokens as fit.
                checked.max_tokens = Some(0);
            }
            let prompt = match std::mem::take(&mut checked.prompt) {
                Prompt::Tokens(tokens) => tokens,
                prompt => text.encode(&prompt).map_err(RequestError::of_text)?,
            };
            request::check_lengths(&prompt, checked.max_tokens, &model)?;
            checked.max_tokens =
                checked.max_tokens.or_else(|| request::default_length(&checked, &prompt, &model));
            let key = match &checked.idempotency_key {
                key if key.is_empty() => &request_id,
                key => key,
            };
            let seed = checked.seed.unwrap_or_else(|| seed_of(key));
            let sequence = sequence(&checked, &prompt, seed)?;
            Ok(Prepared { checked, prompt, sequence, seed, request_id })
        };
        self.off_thread(&self.encoding, turns, bytes > SMALL_BYTES, work).await?
    }

    /// Does what takes longer than an async thread may be held, such as writing a long answer.
    ///
    /// # Errors
    ///
    /// If it panics.
    pub(crate) async fn compute<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Text) -> T + Send + 'static,
    ) -> Result<T, RequestError> {
        self.off_thread(&self.rendering, 1, false, work).await
    }

    /// What requests hold together.
    pub(crate) fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.memory)
    }

    /// The memory for a request that has arrived.
    ///
    /// # Errors
    ///
    /// [`RequestError::NoMemory`]
    pub(crate) fn room_for(&self, request: &GenerateRequest) -> Result<Room, RequestError> {
        let ids = match &request.prompt {
            Prompt::Tokens(tokens) => tokens.len(),
            Prompt::Text(_) | Prompt::Conversation { .. } => 0,
        };
        let ids = ids + request.received_ids.len();
        let mut room = Room::default();
        room.grow(&self.memory, prompt_bytes(&request.prompt) + ids * size_of::<u32>())?;
        Ok(room)
    }

    /// The model's text.
    pub(crate) fn text(&self) -> Arc<Text> {
        Arc::clone(&self.text)
    }

    async fn off_thread<T: Send + 'static>(
        &self,
        turns: &Arc<Semaphore>,
        count: u32,
        is_large: bool,
        work: impl FnOnce(&Text) -> T + Send + 'static,
    ) -> Result<T, RequestError> {
        let stopping =
            |_| RequestError::Unavailable { reason: "the coordinator is stopping".into() };
        let turn = Arc::clone(turns).acquire_many_owned(count).await.map_err(stopping)?;
        let text = Arc::clone(&self.text);
        let work = move || {
            // Held until the work is done, whoever still waits for it.
            let _turn = turn;
            work(&text)
        };
        let work = match is_large {
            true => background::spawn(work),
            false => tokio::task::spawn_blocking(work),
        };
        work.await.map_err(|error| {
            tracing::error!(%error, "work on a request panicked");
            RequestError::Internal { message: "the server failed on this request".into() }
        })
    }

    /// Asks for one choice of a prepared request: it is in the queue when this returns.
    ///
    /// # Errors
    ///
    /// [`RequestError`] if it is not taken.
    pub(crate) async fn start(
        &self,
        prepared: &Prepared,
        choice: u32,
        span: Span,
    ) -> Result<Answer, RequestError> {
        let checked = &prepared.checked;
        let deadline = checked.deadline.unwrap_or(Duration::MAX).min(self.request_deadline);
        let parts = AnswerParts {
            text: Arc::clone(&self.text),
            driver: self.driver.clone(),
            model: self.model.name.clone(),
            request_id: prepared.request_id.clone(),
            seed: prepared.seed,
            prompt: prepared.prompt.clone(),
            received: checked.received.clone(),
            stop: checked.stop.clone(),
            include_stop: checked.include_stop,
            stop_tokens: checked.stop_tokens.clone(),
            min_tokens: checked.min_tokens,
            logprobs: checked.sampling.top_logprobs.is_some(),
            score_prompt: checked.score_prompt,
            span: span.clone(),
        };
        let mut answer = if parts.received.is_empty() {
            Answer::new(parts)
        } else {
            // All that the client has is replayed.
            self.compute(move |_| Answer::new(parts)).await?
        };
        let mut sequence = Box::new(prepared.sequence.clone());
        sequence.set_choice(choice);
        sequence
            .set_traceparent(node::telemetry::propagation::traceparent(&span).unwrap_or_default());
        let submission = Submission {
            sequence,
            wish: Wish { as_many_as_fit: checked.max_tokens.is_none(), class: checked.class },
            arrived: arrival::of_this_request(),
            time_limit: deadline,
        };
        answer.admit(self.driver.submit(submission).await?);
        Ok(answer)
    }

    /// The cluster as it is now.
    ///
    /// # Errors
    ///
    /// [`RequestError::Unavailable`] while the process stops.
    pub(crate) async fn status(&self) -> Result<ClusterStatus, RequestError> {
        let mut status = self.driver.status().await?;
        status.model.name.clone_from(&self.model.name);
        status.model.id.clone_from(&self.model.id);
        status.model.layers = self.model.layers;
        status.model.context = self.model.context;
        status.model.has_tokenizer = self.text.tokenizer().is_some();
        Ok(status)
    }

    /// What readiness is made of.
    ///
    /// # Errors
    ///
    /// [`RequestError::Unavailable`] while the process stops.
    pub(crate) async fn checks(&self) -> Result<Vec<Check>, RequestError> {
        self.driver.checks().await
    }

    /// Takes an operator's order about a worker, and tells how far it is.
    ///
    /// # Errors
    ///
    /// [`OrderError`]
    pub(crate) async fn drain(&self, order: Drain) -> Result<Drained, OrderError> {
        self.driver.drain(order).await
    }

    /// Plans because an operator wants it, in a cluster of this id; with `least_gain` only for the
    /// gain that the settings ask for.
    ///
    /// # Errors
    ///
    /// [`OrderError`]
    pub(crate) async fn plan(
        &self,
        cluster_id: String,
        least_gain: bool,
    ) -> Result<Planned, OrderError> {
        self.driver.plan(cluster_id, least_gain).await
    }

    /// What the planner would be asked now, in a cluster of this id.
    ///
    /// # Errors
    ///
    /// [`OrderError`]
    pub(crate) async fn question(&self, cluster_id: String) -> Result<Problem, OrderError> {
        self.driver.question(cluster_id).await
    }

    /// Whether a token has come through a pipeline within the last seconds, now and whenever that
    /// changes.
    pub(crate) fn readiness(&self) -> watch::Receiver<bool> {
        self.driver.readiness()
    }
}

/// What every choice of a request begins as: its prompt is hashed here, once and for all of them.
fn sequence(checked: &Checked, prompt: &[u32], seed: u64) -> Result<Sequence, RequestError> {
    let request = scheduler::Request {
        prompt: prompt.to_vec(),
        forced: checked.received.clone(),
        max_tokens: checked.max_tokens.unwrap_or(0),
        min_tokens: checked.min_tokens,
        sampling: SamplingParameters { seed, ..checked.sampling.clone() },
        stop_tokens: checked.stop_tokens.clone(),
        score_prompt: checked.score_prompt,
        priority: Priority::Interactive,
        deadline: None,
        traceparent: String::new(),
    };
    Sequence::new(request).map_err(|error| RequestError::invalid("prompt", error.to_string()))
}

/// Bytes that a prompt's text is made of, before the template.
fn prompt_bytes(prompt: &Prompt) -> usize {
    match prompt {
        Prompt::Tokens(_) => 0,
        Prompt::Text(text) => text.len(),
        Prompt::Conversation { messages, template_arguments_json } => {
            let contents: usize = messages.iter().map(|message| message.content.len()).sum();
            contents + template_arguments_json.len()
        }
    }
}

/// The seed of a request that gives none: the same key, the same tokens.
fn seed_of(idempotency_key: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"tercet seed 1");
    hasher.update(idempotency_key.as_bytes());
    let mut bytes = [0; 8];
    hasher.finalize_xof().fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_always_gives_the_same_seed() {
        assert_eq!(seed_of("a"), seed_of("a"));
        assert_ne!(seed_of("a"), seed_of("b"));
        // Written down: clients that retry after an upgrade must get the same tokens.
        assert_eq!(seed_of("key"), 16_130_938_569_539_944_529);
    }
}
