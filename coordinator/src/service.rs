//! The one door to answers for both servers: checks, text, admission.

use std::sync::Arc;
use std::time::Duration;

use model::SamplingDefaults;
use proto::generate::{GenerateRequest, Prompt};
use proto::operator::{Drain, Drained, Planned};
use proto::status::{ClusterStatus, SamplingStatus};
use proto::step::SamplingParameters;
use tokio::sync::watch;
use tracing::Span;

use crate::answer::{Answer, AnswerParts};
use crate::arrival;
use crate::compute::{Compute, Share};
use crate::driver::{Check, DriverHandle, OrderError, Submission};
use crate::memory::{Memory, Room};
use crate::planner::Problem;
use crate::request::{self, Checked, RequestError, ServedModel};
use crate::router::Wish;
use crate::scheduler::{self, Sequence};
use crate::text::{Echo, Rendered, Text};

/// Bytes of a made-up idempotency key.
const RANDOM_KEY_BYTES: usize = 16;

/// What both servers serve.
pub(crate) struct Service {
    pub(crate) model: ServedModel,
    text: Arc<Text>,
    driver: DriverHandle,
    compute: Arc<Compute>,
    /// The longest that a request may take.
    request_deadline: Duration,
    memory: Arc<Memory>,
}

/// A request with its prompt in tokens: what every choice of it starts from.
pub(crate) struct Prepared {
    checked: Checked,
    /// In tokens.
    prompt: Arc<[u32]>,
    /// If it was asked for.
    pub(crate) echo: Option<Echo>,
    /// What each choice begins as.
    sequence: Sequence,
    seed: u64,
    request_id: String,
}

impl Prepared {
    /// The prompt in tokens.
    pub(crate) fn prompt(&self) -> Arc<[u32]> {
        Arc::clone(&self.prompt)
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
            compute: Compute::new(),
            request_deadline,
            memory,
        }
    }

    /// Checks a request and tokenises its prompt, off the async threads: both may take
    /// milliseconds. `echo`: with its text, to begin the answer with.
    ///
    /// ```text
    /// text ─────────────────────────────────▶ turns by its length ──tokenise──▶ ids
    /// conversation ──one turn, template──▶ text ──▲  (the same turn, if it is enough)
    /// ```
    ///
    /// # Errors
    ///
    /// [`RequestError`] for what is wrong with it; [`RequestError::NoMemory`] if its template makes
    /// more of it than there is memory for.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the request; work that began runs to its end.
    pub(crate) async fn prepare(
        &self,
        request: GenerateRequest,
        answer: Wanted,
        echo: bool,
    ) -> Result<Prepared, RequestError> {
        let bytes = prompt_bytes(&request.prompt);
        let share = match &request.prompt {
            Prompt::Conversation { .. } => Share::of(bytes).single(),
            Prompt::Text(_) | Prompt::Tokens(_) => Share::of(bytes),
        };
        let field = request::field_of(&request.prompt);
        let (model, text) = (self.model.clone(), Arc::clone(&self.text));
        let peer = arrival::peer_of_this_request();
        let begin = move || {
            let mut checked = request::check(request, &model)?;
            checked.caller.get_or_insert_with(|| request::caller_of_peer(peer));
            if answer == Wanted::PromptOnly {
                // The schema cannot say so: there a length of 0 is as many tokens as fit.
                checked.max_tokens = Some(0);
            }
            let rendered = text
                .render(std::mem::take(&mut checked.prompt))
                .map_err(|error| RequestError::of_text(error, field))?;
            let tokenise = Tokenise { text, model, checked, rendered, field, echo };
            let needed = Share::of(tokenise.rendered.text().len());
            if share.covers(needed) {
                tokenise.run().map(|prepared| Stage::Done(Box::new(prepared)))
            } else {
                Ok(Stage::Waits(needed, Box::new(tokenise)))
            }
        };
        match self.compute.on_prompt(share, begin).await?? {
            Stage::Done(prepared) => Ok(*prepared),
            Stage::Waits(needed, tokenise) => {
                // What the template added: the request's own bytes are counted already.
                let more = tokenise.rendered.text().len().saturating_sub(bytes);
                let mut room = Room::default();
                room.grow(&self.memory, more)?;
                let work = move || {
                    let _room = room;
                    tokenise.run()
                };
                self.compute.on_prompt(needed, work).await?
            }
        }
    }

    /// Turns at what takes longer than an async thread may be held, such as writing a long answer.
    pub(crate) fn compute(&self) -> Arc<Compute> {
        Arc::clone(&self.compute)
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
            compute: Arc::clone(&self.compute),
            driver: self.driver.clone(),
            model: self.model.name.clone(),
            request_id: prepared.request_id.clone(),
            seed: prepared.seed,
            prompt: Arc::clone(&prepared.prompt),
            received: checked.received.clone(),
            stop: checked.stop.clone(),
            include_stop: checked.include_stop,
            stop_tokens: checked.stop_tokens.clone(),
            min_tokens: checked.min_tokens,
            logprobs: checked.sampling.top_logprobs.is_some(),
            score_prompt: checked.score_prompt,
            span: span.clone(),
        };
        // All that the client has is replayed.
        let replayed = parts.received.len();
        let mut answer = self.compute.on_answer(replayed, move || Answer::new(parts)).await?;
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
        status.model.sampling = self.model.sampling_status();
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

/// How far a prompt has come in its first turn.
enum Stage {
    Done(Box<Prepared>),
    /// Its text needs more than it has.
    Waits(Share, Box<Tokenise>),
}

/// A checked request whose prompt is not in tokens yet.
struct Tokenise {
    text: Arc<Text>,
    model: ServedModel,
    checked: Checked,
    rendered: Rendered,
    /// Where the prompt came in.
    field: &'static str,
    echo: bool,
}

impl Tokenise {
    fn run(self) -> Result<Prepared, RequestError> {
        let Self { text, model, mut checked, rendered, field, echo } = self;
        let (prompt, echo) = if echo {
            text.echo(rendered).map(|(tokens, echo)| (tokens, Some(echo)))
        } else {
            text.tokens(rendered).map(|tokens| (tokens, None))
        }
        .map_err(|error| RequestError::of_text(error, field))?;
        request::check_lengths(field, &prompt, checked.max_tokens, &model)?;
        checked.max_tokens =
            checked.max_tokens.or_else(|| request::default_length(&checked, &prompt, &model));
        let request_id = hex(&rand::random::<[u8; RANDOM_KEY_BYTES]>());
        let key = match &checked.idempotency_key {
            key if key.is_empty() => &request_id,
            key => key,
        };
        let seed = checked.seed.unwrap_or_else(|| seed_of(key));
        let sequence = sequence(&checked, field, &prompt, seed)?;
        Ok(Prepared { checked, prompt: prompt.into(), echo, sequence, seed, request_id })
    }
}

/// What every choice of a request begins as: its prompt is hashed here, once and for all of them.
fn sequence(
    checked: &Checked,
    field: &'static str,
    prompt: &[u32],
    seed: u64,
) -> Result<Sequence, RequestError> {
    let request = scheduler::Request {
        prompt: prompt.to_vec(),
        forced: checked.received.clone(),
        max_tokens: checked.max_tokens.unwrap_or(0),
        min_tokens: checked.min_tokens,
        sampling: SamplingParameters { seed, ..checked.sampling.clone() },
        stop_tokens: checked.stop_tokens.clone(),
        score_prompt: checked.score_prompt,
        priority: checked.priority,
        caller: checked.caller.unwrap_or_default(),
        salt: checked.salt,
        deadline: None,
        traceparent: String::new(),
    };
    Sequence::new(request).map_err(|error| RequestError::invalid(field, error.to_string()))
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

impl ServedModel {
    /// The defaults of sampling as they are shown.
    pub(crate) fn sampling_status(&self) -> SamplingStatus {
        let SamplingDefaults {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            max_new_tokens,
        } = self.sampling;
        SamplingStatus { temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proto::generate::ChatMessage;

    use super::*;
    use crate::background;
    use crate::memory::LARGE_BYTES;
    use crate::text::tests::{SMALL_VOCAB, text_with_context};

    /// Far longer than anything here takes.
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_key_always_gives_the_same_seed() {
        assert_eq!(seed_of("a"), seed_of("a"));
        assert_ne!(seed_of("a"), seed_of("b"));
        // Written down: clients that retry after an upgrade must get the same tokens.
        assert_eq!(seed_of("key"), 16_130_938_569_539_944_529);
    }

    fn service(template: &str, context: u32) -> Service {
        let (driver, _) = crate::driver::testing::handle();
        service_of(template, context, driver)
    }

    /// Gives back what its template makes of the first message.
    pub(crate) fn service_of(template: &str, context: u32, driver: DriverHandle) -> Service {
        let model = ServedModel {
            name: "small".into(),
            id: "ab".repeat(32),
            layers: 1,
            vocab: SMALL_VOCAB,
            context,
            bos_token: Some(0),
            eos_tokens: vec![2],
            sampling: Default::default(),
            created_unix_s: 0,
        };
        let text = text_with_context(template, context);
        let memory = Memory::for_requests(4 << 20);
        Service::new(model, text, driver, Duration::from_secs(1), memory)
    }

    fn chat(content: &str) -> GenerateRequest {
        let message = ChatMessage { role: "user".into(), content: content.into() };
        let prompt = Prompt::Conversation {
            messages: vec![message],
            template_arguments_json: String::new(),
        };
        GenerateRequest { prompt, ..GenerateRequest::default() }
    }

    fn plain(text: String) -> GenerateRequest {
        GenerateRequest { prompt: Prompt::Text(text), ..GenerateRequest::default() }
    }

    /// Keeps the threads for large work busy until it is dropped.
    struct Busy {
        _threads: Vec<std::sync::mpsc::Sender<()>>,
    }

    impl Busy {
        fn new() -> Self {
            let threads = (0..background::THREADS).map(|_| {
                let (free, until_freed) = std::sync::mpsc::channel::<()>();
                drop(background::spawn(move || until_freed.recv()));
                free
            });
            Self { _threads: threads.collect() }
        }
    }

    #[tokio::test]
    async fn large_prompts_make_no_small_one_wait() {
        let service = service("{{ messages[0].content }}", 4096);
        let busy = Busy::new();
        let large = || plain("a ".repeat(2 << 20));
        let mut waiting: Vec<_> =
            (0..12).map(|_| Box::pin(service.prepare(large(), Wanted::Answer, false))).collect();
        for prompt in &mut waiting {
            assert!(futures::poll!(prompt.as_mut()).is_pending());
        }
        // Eight turns are one large prompt's, and eleven others wait in line.
        for small in [plain("hi".into()), chat("hi"), plain("hi ".repeat(1000))] {
            let prepared = service.prepare(small, Wanted::Answer, false);
            let prepared = tokio::time::timeout(LONG, prepared).await.expect("waits");
            assert!(!prepared.unwrap().prompt().is_empty());
        }
        drop((waiting, busy));
    }

    #[tokio::test]
    async fn turns_are_taken_for_what_a_template_makes_of_a_prompt() {
        let service = service("{{ messages[0].content * 200 }}", 1 << 20);
        let busy = Busy::new();
        // 20 KB are small, 120 KB are not.
        let small = service.prepare(chat(&"a ".repeat(50)), Wanted::Answer, false);
        let small = tokio::time::timeout(LONG, small).await.expect("waits").unwrap();
        let mut large = Box::pin(service.prepare(chat(&"a ".repeat(300)), Wanted::Answer, false));
        let tokenised = tokio::time::timeout(Duration::from_millis(300), large.as_mut()).await;
        assert!(tokenised.is_err(), "it was tokenised as if it were small");
        drop(busy);
        let large = tokio::time::timeout(LONG, large).await.expect("waits").unwrap();
        assert_eq!(small.prompt().len(), 1 + 200 * 100);
        assert_eq!(large.prompt().len(), 1 + 200 * 600);
    }

    #[tokio::test]
    async fn memory_of_what_templates_make_is_bounded() {
        let service = service("{{ messages[0].content * 200 }}", 1 << 20);
        let mut others = Room::default();
        others.grow(&service.memory, LARGE_BYTES).unwrap();
        // 100 KB: that much waits only if there is memory for it.
        let request = || service.prepare(chat(&"a ".repeat(250)), Wanted::Answer, false);
        let refused = request().await.err().expect("there is no memory");
        assert!(matches!(refused, RequestError::NoMemory), "{refused}");
        drop(others);
        assert_eq!(request().await.unwrap().prompt().len(), 1 + 200 * 500);
    }
}
