//! Counts the memory that engines take, from before it is taken until it is really given back: an engine
//! that was retired ends its last step first, and its thread frees what it has.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

/// How long what is being given back may take: longer than a step of a large model, and than unmapping
/// hundreds of GiB.
const FREE_TIMEOUT: Duration = Duration::from_secs(10);

/// There is not so much memory, and none is about to become free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shortage {
    pub(crate) needed_bytes: u64,
    pub(crate) available_bytes: u64,
}

/// All the memory that engines may take together.
#[derive(Debug)]
pub(crate) struct Reserve {
    total_bytes: u64,
    used_bytes: watch::Sender<u64>,
}

/// Memory that one engine has; given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Charge {
    reserve: Arc<Reserve>,
    bytes: u64,
}

impl Reserve {
    pub(crate) fn new(total_bytes: u64) -> Arc<Self> {
        Arc::new(Self { total_bytes, used_bytes: watch::Sender::new(0) })
    }

    /// Takes `bytes`. Waits for memory that is being given back, which is all beyond `kept_bytes`: what
    /// is held on purpose.
    ///
    /// # Errors
    ///
    /// [`Shortage`] if it does not fit beside what is held, or nothing is given back in time.
    pub(crate) async fn take(
        self: &Arc<Self>,
        bytes: u64,
        kept_bytes: u64,
    ) -> Result<Charge, Shortage> {
        let deadline = Instant::now() + FREE_TIMEOUT;
        let mut changes = self.used_bytes.subscribe();
        loop {
            // What changes from here on ends the wait below.
            let used = *changes.borrow_and_update();
            let fits = |used: u64| used.saturating_add(bytes) <= self.total_bytes;
            let taken = self.used_bytes.send_if_modified(|used| {
                let fits = fits(*used);
                *used += if fits { bytes } else { 0 };
                fits
            });
            if taken {
                return Ok(Charge { reserve: self.clone(), bytes });
            }
            let available_bytes = self.total_bytes.saturating_sub(used);
            let shortage = Shortage { needed_bytes: bytes, available_bytes };
            if !fits(kept_bytes) || timeout_at(deadline, changes.changed()).await.is_err() {
                return Err(shortage);
            }
        }
    }
}

#[cfg(test)]
impl Reserve {
    pub(crate) fn used_bytes(&self) -> u64 {
        *self.used_bytes.borrow()
    }

    pub(crate) async fn is_free(&self) {
        self.used_bytes.subscribe().wait_for(|used| *used == 0).await.unwrap();
    }
}

impl Charge {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.reserve.used_bytes.send_modify(|used| *used = used.saturating_sub(self.bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn memory_is_waited_for_if_it_is_on_its_way() {
        let reserve = Reserve::new(100);
        let held = reserve.take(60, 0).await.unwrap();
        let begin = Instant::now();
        let shortage = reserve.take(50, 60).await.unwrap_err();
        assert_eq!(shortage, Shortage { needed_bytes: 50, available_bytes: 40 });
        assert_eq!(begin.elapsed(), Duration::ZERO, "nobody gives any of it back");
        // It is retired, and not yet free.
        let mut next = Box::pin(reserve.take(50, 0));
        assert!(futures::poll!(&mut next).is_pending());
        drop(held);
        let next = next.await.unwrap();
        assert_eq!(begin.elapsed(), Duration::ZERO);
        reserve.take(60, 0).await.unwrap_err();
        assert_eq!(begin.elapsed(), FREE_TIMEOUT, "it never became free");
        drop(next);
        reserve.take(100, 0).await.unwrap();
        reserve.take(101, 0).await.unwrap_err();
        reserve.take(u64::MAX, 0).await.unwrap_err();
    }
}
