//! The one door to answers for both servers: checks, text, admission.

use std::sync::Arc;
use std::time::Duration;

use proto::generate::{GenerateRequest, Prompt};
use proto::status::ClusterStatus;
use tokio::sync::{Semaphore, watch};
use tracing::Span;

use crate::answer::{Answer, AnswerParts};
use crate::driver::{DriverHandle, Submission};
use crate::request::{self, Checked, RequestError, ServedModel};
use crate::scheduler;
use crate::text::Text;

/// Prompts that are tokenised at once: more only take turns on the same cores.
const ENCODING_AT_ONCE: usize = 8;

/// Bytes of a made-up idempotency key.
const RANDOM_KEY_BYTES: usize = 16;

/// What both servers serve.
pub(crate) struct Service {
    pub(crate) model: ServedModel,
    text: Arc<Text>,
    driver: DriverHandle,
    encoding: Semaphore,
    /// The longest that a request may take.
    request_deadline: Duration,
}

/// A request with its prompt in tokens: what every choice of it starts from.
pub(crate) struct Prepared {
    checked: Checked,
    /// In tokens.
    prompt: Vec<u32>,
    seed: u64,
    request_id: String,
}

impl Prepared {
    /// The prompt in tokens.
    pub(crate) fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// Without an answer: only the prompt is looked at. The schema cannot say so, for there a
    /// length of 0 is as many tokens as fit.
    pub(crate) fn without_answer(mut self) -> Self {
        self.checked.max_tokens = Some(0);
        self
    }
}

impl Service {
    /// A service for one model.
    pub(crate) fn new(
        model: ServedModel,
        text: Text,
        driver: DriverHandle,
        request_deadline: Duration,
    ) -> Self {
        let encoding = Semaphore::new(ENCODING_AT_ONCE);
        Self { model, text: Arc::new(text), driver, encoding, request_deadline }
    }

    /// Checks a request and tokenises its prompt.
    ///
    /// # Errors
    ///
    /// [`RequestError`] for what is wrong with it.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the request; a tokenisation that began runs to its end.
    pub(crate) async fn prepare(&self, request: GenerateRequest) -> Result<Prepared, RequestError> {
        let mut checked = request::check(request, &self.model)?;
        let prompt = std::mem::take(&mut checked.prompt);
        let prompt = self.encode(prompt).await?;
        request::check_lengths(&prompt, checked.max_tokens, &self.model)?;
        let request_id = hex(&rand::random::<[u8; RANDOM_KEY_BYTES]>());
        let key =
            if checked.idempotency_key.is_empty() { &request_id } else { &checked.idempotency_key };
        let seed = checked.seed.unwrap_or_else(|| seed_of(key));
        Ok(Prepared { checked, prompt, seed, request_id })
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
        let mut sampling = checked.sampling.clone();
        (sampling.seed, sampling.choice) = (prepared.seed, choice);
        let deadline = checked.deadline.unwrap_or(Duration::MAX).min(self.request_deadline);
        let mut answer = Answer::new(AnswerParts {
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
            logprobs: sampling.top_logprobs.is_some(),
            score_prompt: checked.score_prompt,
            span: span.clone(),
        });
        let submission = Submission {
            request: scheduler::Request {
                prompt: prepared.prompt.clone(),
                forced: checked.received.clone(),
                max_tokens: checked.max_tokens.unwrap_or(0),
                min_tokens: checked.min_tokens,
                sampling,
                stop_tokens: checked.stop_tokens.clone(),
                score_prompt: checked.score_prompt,
                class: scheduler::Class::Interactive,
                deadline: None,
                traceparent: node::telemetry::propagation::traceparent(&span).unwrap_or_default(),
            },
            as_many_as_fit: checked.max_tokens.is_none(),
            time_limit: deadline,
            class: checked.class,
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

    /// Whether a token has come through the active pipeline, now and whenever that changes.
    pub(crate) fn readiness(&self) -> watch::Receiver<bool> {
        self.driver.readiness()
    }

    /// The text of the tokens of a prompt, one by one, as an answer that echoes it shows them.
    pub(crate) fn texts(&self, tokens: &[u32]) -> Vec<String> {
        let bytes = |&token: &u32| {
            self.text.tokenizer().map_or(&[][..], |tokenizer| tokenizer.text_bytes(token))
        };
        tokens.iter().map(|token| String::from_utf8_lossy(bytes(token)).into_owned()).collect()
    }

    async fn encode(&self, prompt: Prompt) -> Result<Vec<u32>, RequestError> {
        if let Prompt::Tokens(tokens) = prompt {
            return Ok(tokens);
        }
        let stopping =
            || RequestError::Unavailable { reason: "the coordinator is stopping".into() };
        let _turn = self.encoding.acquire().await.map_err(|_| stopping())?;
        let text = Arc::clone(&self.text);
        // Rendering and tokenising compute: milliseconds for a long prompt.
        match tokio::task::spawn_blocking(move || text.encode(&prompt)).await {
            Ok(tokens) => tokens.map_err(RequestError::of_text),
            Err(error) => {
                tracing::error!(%error, "tokenizer panicked");
                Err(RequestError::Internal {
                    message: "the tokenizer failed on this prompt".into(),
                })
            }
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
