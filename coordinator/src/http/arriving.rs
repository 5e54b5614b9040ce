//! Bodies that have begun and are not here yet: bounded in number and in bytes. Whoever sends half a
//! body and waits makes room for newer ones; a client that does its part is never the oldest for long.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::memory::SMALL_BYTES;

/// Bytes of all bodies that have begun, beyond small ones: as many as may be held once they are whole.
const LARGE_BYTES: usize = crate::memory::LARGE_BYTES;

/// All bodies that have begun.
#[derive(Debug)]
pub(super) struct Arriving {
    limit: usize,
    limit_bytes: usize,
    begun: Mutex<Begun>,
}

#[derive(Debug, Default)]
struct Begun {
    next: u64,
    /// Of the large ones.
    bytes: usize,
    /// Oldest first.
    bodies: BTreeMap<u64, (usize, CancellationToken)>,
}

impl Begun {
    /// Cuts the oldest body, of the large ones if only they are to go.
    fn cut_oldest(&mut self, large: bool) -> bool {
        let fits = |bytes: usize| !large || bytes > SMALL_BYTES;
        let oldest = self.bodies.iter().find(|(_, (bytes, _))| fits(*bytes)).map(|(key, _)| *key);
        let Some((bytes, cut)) = oldest.and_then(|key| self.bodies.remove(&key)) else {
            return false;
        };
        self.bytes -= counted(bytes);
        cut.cancel();
        true
    }
}

/// What a body of so many bytes counts among the large ones.
fn counted(bytes: usize) -> usize {
    if bytes > SMALL_BYTES { bytes } else { 0 }
}

impl Arriving {
    /// At most `limit` bodies, of at most `body_bytes` each.
    pub(super) fn new(limit: usize, body_bytes: usize) -> Arc<Self> {
        let limit_bytes = LARGE_BYTES.max(body_bytes);
        Arc::new(Self { limit: limit.max(1), limit_bytes, begun: Mutex::default() })
    }

    fn begun(&self) -> MutexGuard<'_, Begun> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A body begins.
    pub(super) fn begin(self: &Arc<Self>) -> Ticket {
        let mut begun = self.begun();
        begun.next += 1;
        let key = begun.next;
        let cut = CancellationToken::new();
        begun.bodies.insert(key, (0, cut.clone()));
        while begun.bodies.len() > self.limit && begun.cut_oldest(false) {}
        Ticket { all: Arc::clone(self), key, cut }
    }
}

/// One body that has begun; forgotten when dropped.
#[derive(Debug)]
pub(super) struct Ticket {
    all: Arc<Arriving>,
    key: u64,
    /// It had to make room.
    pub(super) cut: CancellationToken,
}

impl Ticket {
    /// So many bytes of it are here. The oldest large ones make room for them; if it is that itself, it
    /// has taken longest.
    pub(super) fn grown_to(&self, bytes: usize) {
        let mut begun = self.all.begun();
        let Some((before, _)) = begun.bodies.get_mut(&self.key) else { return };
        let before = std::mem::replace(before, bytes);
        begun.bytes = begun.bytes - counted(before) + counted(bytes);
        while begun.bytes > self.all.limit_bytes && begun.cut_oldest(true) {}
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut begun = self.all.begun();
        if let Some((bytes, _)) = begun.bodies.remove(&self.key) {
            begun.bytes -= counted(bytes);
        }
    }
}
