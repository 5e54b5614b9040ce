//! Everyone who waits for an answer, from the driver's side and from theirs. An answer's tokens go
//! through a bounded channel; its end goes beside it and so never has to wait.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use proto::generate::{FinishReason, Timings};
use proto::ids::{NumericsClass, SequenceId};
use proto::step::Sampled;
use tokio::sync::{mpsc, oneshot};

use super::{Command, DriverHandle};
use crate::metrics;
use crate::request::RequestError;
use crate::scheduler::{Emission, EmissionEvent, Finish, SequenceError};
use crate::tick::Tick;

/// Tokens that a client may be behind, whatever comes: what is kept for it is bounded. One that is held
/// gets nowhere near.
pub(crate) const MAX_TOKENS_BEHIND: usize = 1024;

/// A client that is behind by so many tokens reads nothing at present, or is a slow one: others get the
/// rows of its answer until it is behind by half as many. Half of them last it for longer than it takes to
/// find out (50 ms) at 300 tokens per second, which is more than anybody reads.
const HELD_BEHIND: usize = 32;

/// A client that reads not one token for so long reads no more, and its KV is better used by another; as
/// long as a connection may stand still.
pub(crate) const HELD_MOST: Duration = Duration::from_secs(30);

/// A request that the router took.
pub(crate) struct Admitted {
    /// Of the pipeline that serves it.
    pub(crate) class: NumericsClass,
    /// Length of the answer at most.
    pub(crate) max_tokens: u32,
    /// Its tokens, or why nothing is left to do.
    pub(crate) answer: Result<Tokens, Finish>,
}

/// How an answer ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    pub(crate) finish: Finish,
    pub(crate) timings: Timings,
}

/// The tokens of one answer. Dropping it cancels the answer.
pub(crate) struct Tokens {
    sequence: SequenceId,
    /// A token was told.
    has_begun: bool,
    events: mpsc::Receiver<TokenEvent>,
    end: oneshot::Receiver<Result<End, RequestError>>,
}

#[derive(Debug)]
enum TokenEvent {
    PromptScores(Vec<f32>),
    Token { index: u32, sampled: Sampled },
}

impl Tokens {
    /// ln p of the prompt's tokens from the second on; to be asked for first, if at all.
    ///
    /// # Errors
    ///
    /// Why the answer ended before.
    pub(crate) async fn prompt_scores(&mut self) -> Result<Vec<f32>, RequestError> {
        match self.events.recv().await {
            Some(TokenEvent::PromptScores(scores)) => Ok(scores),
            Some(TokenEvent::Token { .. }) => {
                Err(RequestError::Internal { message: "the prompt was not scored".into() })
            }
            None => {
                end(&mut self.end, self.has_begun).await?;
                Ok(Vec::new())
            }
        }
    }

    /// The next token and its index; `None` when there are no more: see [`Tokens::end`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub(crate) async fn next(&mut self) -> Option<(u32, Sampled)> {
        loop {
            match self.events.recv().await? {
                TokenEvent::Token { index, sampled } => {
                    self.has_begun = true;
                    return Some((index, sampled));
                }
                TokenEvent::PromptScores(_) => {}
            }
        }
    }

    /// The next token, if it has come.
    #[cfg(test)]
    pub(crate) fn try_next(&mut self) -> Option<(u32, Sampled)> {
        match self.events.try_recv().ok()? {
            TokenEvent::Token { index, sampled } => Some((index, sampled)),
            TokenEvent::PromptScores(_) => None,
        }
    }

    /// How the answer ended, once there are no more tokens.
    ///
    /// # Errors
    ///
    /// Why it ended before its end.
    pub(crate) async fn end(mut self) -> Result<End, RequestError> {
        end(&mut self.end, self.has_begun).await
    }

    /// Ends the answer here: the client has all it wanted.
    pub(crate) async fn finish(mut self, driver: &DriverHandle) -> Timings {
        let (reply, timings) = oneshot::channel();
        driver.tell(Command::Finish { sequence: self.sequence, reply }).await;
        match timings.await {
            Ok(Some(timings)) => timings,
            // It had ended by itself.
            Ok(None) | Err(_) => {
                let end = end(&mut self.end, self.has_begun).await;
                end.map(|end| end.timings).unwrap_or_default()
            }
        }
    }
}

async fn end(
    end: &mut oneshot::Receiver<Result<End, RequestError>>,
    has_begun: bool,
) -> Result<End, RequestError> {
    end.await.unwrap_or_else(|_| Err(lost("the coordinator stopped".into(), has_begun)))
}

/// What it means to a client that nobody goes on with its answer: only one that has begun is cut off.
fn lost(reason: String, has_begun: bool) -> RequestError {
    match has_begun {
        true => RequestError::Lost { reason },
        false => RequestError::Unavailable { reason },
    }
}

/// Clients that one look for gone ones asks, in a row of all of them: bounds the time of a look.
const LOOK: usize = 1024;

/// Gone ones that a look finds at most: what is done about them takes longer than the look.
pub(crate) const GONE_AT_ONCE: usize = 32;

/// What all clients have got, since start. Lanes and the control task count together.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    finished: AtomicU64,
    failed: AtomicU64,
    prompt_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    preemptions: AtomicU64,
    prefix_queries: AtomicU64,
    prefix_hits: AtomicU64,
}

/// [`Totals`] at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    pub(crate) finished: u64,
    pub(crate) failed: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) generated_tokens: u64,
    pub(crate) preemptions: u64,
    pub(crate) prefix_queries: u64,
    pub(crate) prefix_hits: u64,
}

impl Totals {
    /// So many more tokens were computed.
    pub(crate) fn count_tokens(&self, prompt: u64, generated: u64) {
        self.prompt_tokens.fetch_add(prompt, Relaxed);
        self.generated_tokens.fetch_add(generated, Relaxed);
    }

    /// So many more times a sequence gave its KV back, to begin again.
    pub(crate) fn count_preemptions(&self, preemptions: u64) {
        self.preemptions.fetch_add(preemptions, Relaxed);
    }

    /// So many tokens of prompts more were looked for in the prefix cache, and found there.
    pub(crate) fn count_prefixes(&self, queries: u64, hits: u64) {
        self.prefix_queries.fetch_add(queries, Relaxed);
        self.prefix_hits.fetch_add(hits, Relaxed);
    }

    /// As they are now; nothing orders them with each other.
    pub(crate) fn counted(&self) -> Counted {
        Counted {
            finished: self.finished.load(Relaxed),
            failed: self.failed.load(Relaxed),
            prompt_tokens: self.prompt_tokens.load(Relaxed),
            generated_tokens: self.generated_tokens.load(Relaxed),
            preemptions: self.preemptions.load(Relaxed),
            prefix_queries: self.prefix_queries.load(Relaxed),
            prefix_hits: self.prefix_hits.load(Relaxed),
        }
    }
}

/// How a client gets on whose answer is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reader {
    /// It has caught up.
    Reads,
    /// It has not read so many tokens yet.
    IsBehind(usize),
}

/// Those who wait for answers, of one task: of the control task while they are in the queue, of a
/// lane while they run.
pub(crate) struct Clients {
    waiting: BTreeMap<SequenceId, Client>,
    totals: Arc<Totals>,
    /// The last that was looked at.
    looked_at: Option<SequenceId>,
}

/// The driver's side of one answer. It goes with its sequence from task to task.
pub(crate) struct Client {
    events: mpsc::Sender<TokenEvent>,
    end: oneshot::Sender<Result<End, RequestError>>,
    /// When the first byte of its request arrived.
    arrived: Tick,
    last_token: Option<Tick>,
    prompt_tokens: u32,
    generated_tokens: u32,
}

impl Client {
    /// Whether nobody listens any more.
    pub(crate) fn is_gone(&self) -> bool {
        self.events.is_closed()
    }

    /// Tokens that it was told and has not read.
    fn behind(&self) -> usize {
        self.events.max_capacity() - self.events.capacity()
    }

    fn ended(&self, reason: FinishReason, timings: Timings, now: Tick) -> metrics::Ended {
        metrics::Ended {
            reason: reason.name(),
            since_arrival: now.since(self.arrived),
            timings,
            prompt_tokens: self.prompt_tokens,
            generated_tokens: self.generated_tokens,
        }
    }
}

/// What to do about a sequence after something was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Then {
    /// Nothing.
    GoOn,
    /// It has not read what it was told: there is no hurry with more.
    Hold,
    /// Nobody wants the rest: cancel it.
    Cancel,
}

impl Clients {
    /// Nobody waits yet.
    pub(crate) fn new(totals: Arc<Totals>) -> Self {
        Self { waiting: BTreeMap::new(), totals, looked_at: None }
    }

    /// The client of a sequence comes with it.
    pub(crate) fn put(&mut self, sequence: SequenceId, client: Client) {
        self.waiting.insert(sequence, client);
    }

    /// The client of a sequence goes with it.
    pub(crate) fn take(&mut self, sequence: SequenceId) -> Option<Client> {
        self.waiting.remove(&sequence)
    }

    /// Someone waits for a sequence from now on, whose request arrived at `arrived`.
    pub(crate) fn add(
        &mut self,
        sequence: SequenceId,
        arrived: Tick,
        prompt_tokens: u32,
    ) -> Tokens {
        let (events, their_events) = mpsc::channel(MAX_TOKENS_BEHIND);
        let (end, their_end) = oneshot::channel();
        let last_token = None;
        let client =
            Client { events, end, arrived, last_token, prompt_tokens, generated_tokens: 0 };
        self.waiting.insert(sequence, client);
        Tokens { sequence, has_begun: false, events: their_events, end: their_end }
    }

    /// Tells whoever waits for it what happened to a sequence.
    pub(crate) fn tell(&mut self, emission: Emission, now: Tick) -> Then {
        let Emission { sequence, event } = emission;
        let Some(client) = self.waiting.get_mut(&sequence) else { return Then::GoOn };
        match event {
            EmissionEvent::PromptScores(scores) => {
                self.pass_on(sequence, TokenEvent::PromptScores(scores))
            }
            EmissionEvent::Token { index, sampled } => {
                client.generated_tokens += 1;
                match client.last_token.replace(now) {
                    None => metrics::first_token(now.since(client.arrived)),
                    Some(last) => metrics::next_token(now.since(last)),
                }
                self.pass_on(sequence, TokenEvent::Token { index, sampled })
            }
            EmissionEvent::Finished { finish, timings } => {
                self.end(sequence, Ok(End { finish, timings }), now);
                Then::GoOn
            }
            EmissionEvent::Failed(error) => {
                let has_begun = client.last_token.is_some();
                self.end(sequence, Err(of_sequence(error, has_begun)), now);
                Then::GoOn
            }
        }
    }

    /// The client ended the answer itself.
    pub(crate) fn finish(&mut self, sequence: SequenceId, timings: Timings, now: Tick) {
        if let Some(client) = self.waiting.remove(&sequence) {
            self.totals.finished.fetch_add(1, Relaxed);
            metrics::finished(client.ended(FinishReason::Stop, timings, now));
        }
    }

    /// Sequences whose clients went away; they are forgotten here. Looks at [`LOOK`] clients, or
    /// until [`GONE_AT_ONCE`] were found, and at the next ones the next time.
    pub(crate) fn take_gone(&mut self) -> Vec<SequenceId> {
        let from = self.looked_at.map_or(Bound::Unbounded, Bound::Excluded);
        let looked_at = self.waiting.range((from, Bound::Unbounded)).take(LOOK);
        let (mut count, mut last, mut gone) = (0, None, Vec::new());
        for (&sequence, client) in looked_at {
            (count, last) = (count + 1, Some(sequence));
            if client.is_gone() {
                gone.push(sequence);
            }
            if gone.len() == GONE_AT_ONCE {
                break;
            }
        }
        let is_whole = count < LOOK && gone.len() < GONE_AT_ONCE;
        self.looked_at = last.filter(|_| !is_whole);
        for sequence in &gone {
            self.waiting.remove(sequence);
            metrics::cancelled();
        }
        gone
    }

    /// How the client of a sequence that is held gets on; one who is not here wants nothing more.
    pub(crate) fn look_at(&self, sequence: SequenceId) -> Reader {
        let Some(client) = self.waiting.get(&sequence) else { return Reader::Reads };
        match client.behind() {
            few if few <= HELD_BEHIND / 2 => Reader::Reads,
            behind => Reader::IsBehind(behind),
        }
    }

    /// The client of a sequence has read nothing for too long: it gets no more.
    pub(crate) fn give_up(&mut self, sequence: SequenceId) {
        if let Some(client) = self.waiting.remove(&sequence) {
            metrics::cancelled();
            tracing::info!(%sequence, "client reads nothing, its answer is cut off");
            let behind = client.behind();
            // It may have gone.
            let _ = client.end.send(Err(RequestError::SlowReader { behind }));
        }
    }

    fn pass_on(&mut self, sequence: SequenceId, event: TokenEvent) -> Then {
        let Some(client) = self.waiting.get(&sequence) else { return Then::GoOn };
        let Err(error) = client.events.try_send(event) else {
            return if client.behind() >= HELD_BEHIND { Then::Hold } else { Then::GoOn };
        };
        if let Some(client) = self.waiting.remove(&sequence) {
            metrics::cancelled();
            if matches!(error, mpsc::error::TrySendError::Full(_)) {
                tracing::info!(%sequence, "client reads too slowly, its answer is cut off");
                let late = RequestError::SlowReader { behind: MAX_TOKENS_BEHIND };
                let _ = client.end.send(Err(late));
            }
        }
        Then::Cancel
    }

    fn end(&mut self, sequence: SequenceId, outcome: Result<End, RequestError>, now: Tick) {
        let Some(client) = self.waiting.remove(&sequence) else { return };
        match &outcome {
            Ok(end) => {
                self.totals.finished.fetch_add(1, Relaxed);
                metrics::finished(client.ended(end.finish.reason, end.timings, now));
            }
            Err(error) => {
                self.totals.failed.fetch_add(1, Relaxed);
                metrics::failed(error.kind());
            }
        }
        // A client that went away does not care.
        let _ = client.end.send(outcome);
    }
}

/// What the end of a sequence means to its client, who was told a token of it or not.
fn of_sequence(error: SequenceError, has_begun: bool) -> RequestError {
    match error {
        SequenceError::PipelineLost { reason } => lost(reason, has_begun),
        SequenceError::WaitedTooLong { .. } | SequenceError::NoPipeline { .. } => {
            RequestError::Unavailable { reason: error.to_string() }
        }
        SequenceError::GaveWay { limit, retry_after } => RequestError::Full { limit, retry_after },
        SequenceError::DeadlineExceeded { .. } => {
            RequestError::TimedOut { reason: error.to_string() }
        }
        SequenceError::NeverFits { .. } => RequestError::invalid("max_tokens", error.to_string()),
        _ => RequestError::Internal { message: error.to_string() },
    }
}
