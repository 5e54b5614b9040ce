//! Turns at what takes longer than an async thread may be held: tokenising prompts and writing long
//! answers. Small work has turns of its own, so that nothing large makes it wait.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::background;
use crate::memory::SMALL_BYTES;
use crate::request::RequestError;

/// Prompts that are tokenised at once, of the small and of the large ones: more only take turns on
/// the same cores.
const ENCODING_AT_ONCE: usize = 8;

/// A large prompt takes one turn of [`ENCODING_AT_ONCE`] for each of these bytes, all turns at most:
/// the tokenizer needs up to a hundred times as much memory while it works.
const BYTES_FOR_A_TURN: usize = 512 << 10;

/// Answers that are written at once, of the short and of the long ones.
const WRITING_AT_ONCE: usize = 4;

/// Tokens that are written where they come: 500 µs at 4 µs each, without optimisation.
const TOKENS_IN_PLACE: usize = 128;

/// Tokens of an answer that counts as large: it is written in 20 ms at most.
const SMALL_TOKENS: usize = 4096;

/// Bytes of text that cost about as much to write as one token with its log probability.
const BYTES_OF_A_TOKEN: usize = 64;

/// Turns of one kind of work.
#[derive(Debug)]
struct Turns {
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
}

impl Turns {
    fn new(count: usize) -> Self {
        let turns = || Arc::new(Semaphore::new(count));
        Self { small: turns(), large: turns() }
    }
}

/// How much a prompt takes to tokenise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    is_large: bool,
    turns: u32,
}

impl Share {
    /// Of a text of so many bytes.
    pub(crate) fn of(bytes: usize) -> Self {
        let turns = u32::try_from(1 + bytes / BYTES_FOR_A_TURN).unwrap_or(u32::MAX);
        Self { is_large: bytes > SMALL_BYTES, turns: turns.min(ENCODING_AT_ONCE as u32) }
    }

    /// One turn of those of this size: what rendering a template takes, whose length nobody knows.
    pub(crate) fn single(self) -> Self {
        Self { turns: 1, ..self }
    }

    /// Whether what takes `other` may go on in this.
    pub(crate) fn covers(self, other: Self) -> bool {
        (self.is_large || !other.is_large) && self.turns >= other.turns
    }
}

/// What writing an answer costs, in tokens.
pub(crate) fn cost_of(tokens: usize, text_bytes: usize) -> usize {
    tokens.saturating_add(text_bytes / BYTES_OF_A_TOKEN)
}

/// Does work on requests, in turns.
#[derive(Debug)]
pub(crate) struct Compute {
    encoding: Turns,
    writing: Turns,
}

impl Compute {
    /// All turns are free.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            encoding: Turns::new(ENCODING_AT_ONCE),
            writing: Turns::new(WRITING_AT_ONCE),
        })
    }

    /// Does `work` on a prompt once there is its `share` of turns.
    ///
    /// # Errors
    ///
    /// If it panics.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops work that still waits for its turn; what has one runs to its end.
    pub(crate) async fn on_prompt<T: Send + 'static>(
        &self,
        share: Share,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, RequestError> {
        let turns = if share.is_large { &self.encoding.large } else { &self.encoding.small };
        let turns = Arc::clone(turns).acquire_many_owned(share.turns).await.map_err(stopping)?;
        off_thread(turns, share.is_large, work).await
    }

    /// Does `work` on an answer, which writes as much as `cost` tokens: on this thread if that is
    /// little.
    ///
    /// # Errors
    ///
    /// As [`Compute::on_prompt`].
    ///
    /// # Cancel safety
    ///
    /// As [`Compute::on_prompt`].
    pub(crate) async fn on_answer<T: Send + 'static>(
        &self,
        cost: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, RequestError> {
        if cost <= TOKENS_IN_PLACE {
            return Ok(work());
        }
        let is_large = cost > SMALL_TOKENS;
        let turns = if is_large { &self.writing.large } else { &self.writing.small };
        let turn = Arc::clone(turns).acquire_owned().await.map_err(stopping)?;
        off_thread(turn, is_large, work).await
    }
}

async fn off_thread<T: Send + 'static>(
    turns: OwnedSemaphorePermit,
    is_large: bool,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, RequestError> {
    let work = move || {
        // Held until the work is done, whoever still waits for it.
        let _turns = turns;
        work()
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

fn stopping(_: tokio::sync::AcquireError) -> RequestError {
    RequestError::Unavailable { reason: "the coordinator is stopping".into() }
}
