//! The memory that requests of clients hold together, whichever server they came by, until their
//! texts are tokens. What has arrived counts, not what was announced.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::request::RequestError;

/// Bytes of a request that count as small. Small ones are bounded by the number of open requests
/// alone, 1024 x 32 KiB = 32 MiB over HTTP and as much over gRPC by default, so that those who send
/// large ones, however slowly, cannot shut out the others.
pub(crate) const SMALL_BYTES: usize = 32 << 10;

/// Bytes beyond [`SMALL_BYTES`] of all requests together: twelve of the largest by default. A body
/// costs at most three times its bytes while it is parsed, so all of them stay below 200 MiB.
pub(crate) const LARGE_BYTES: usize = 48 << 20;

/// A permit stands for so many bytes.
const PERMIT_BYTES: usize = 1 << 10;

/// What all requests share.
#[derive(Debug)]
pub(crate) struct Memory {
    large: Arc<Semaphore>,
}

/// The memory that one request holds; free for others when it is dropped.
#[derive(Debug, Default)]
pub(crate) struct Room(Option<OwnedSemaphorePermit>);

impl Memory {
    /// For requests of at most `request_bytes`: at least one of that size fits.
    pub(crate) fn for_requests(request_bytes: usize) -> Arc<Self> {
        let permits = LARGE_BYTES.max(request_bytes).div_ceil(PERMIT_BYTES);
        Arc::new(Self { large: Arc::new(Semaphore::new(permits)) })
    }
}

impl Room {
    /// Takes what a request of so many bytes needs, beside what it has.
    ///
    /// # Errors
    ///
    /// [`RequestError::NoMemory`] if others have it.
    pub(crate) fn grow(&mut self, memory: &Memory, bytes: usize) -> Result<(), RequestError> {
        let needed = bytes.saturating_sub(SMALL_BYTES).div_ceil(PERMIT_BYTES);
        let held = self.0.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let Some(more) = needed.checked_sub(held).filter(|&more| more > 0) else { return Ok(()) };
        let more = u32::try_from(more).map_err(|_| RequestError::NoMemory)?;
        let more = Arc::clone(&memory.large)
            .try_acquire_many_owned(more)
            .map_err(|_| RequestError::NoMemory)?;
        match &mut self.0 {
            Some(held) => held.merge(more),
            none => *none = Some(more),
        }
        Ok(())
    }
}
