//! Who calls a worker, how many may wait until it is known whether they lead, and what is said of those who
//! are refused.

use std::collections::HashMap;
use std::fmt::Display;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::key::CoordinatorKey;
use tokio::time::Instant;

use crate::error::ServiceError;
use crate::telemetry;

/// Between two lines of the log about strangers: whoever sends thousands of calls writes no log.
const NOTICE_INTERVAL: Duration = Duration::from_secs(10);

/// What is known of a caller before anything is asked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Caller {
    /// As shown with the call.
    pub(crate) key: Option<CoordinatorKey>,
    /// Where it calls from.
    pub(crate) address: Option<IpAddr>,
}

impl From<Option<CoordinatorKey>> for Caller {
    fn from(key: Option<CoordinatorKey>) -> Self {
        Self { key, address: None }
    }
}

/// Places for calls that wait. Beyond them a call is refused at once.
#[derive(Debug)]
pub(crate) struct Places {
    limit: usize,
    limit_of_one: usize,
    taken: Mutex<HashMap<Option<IpAddr>, usize>>,
}

/// One of them, free again when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    address: Option<IpAddr>,
}

impl Places {
    /// So many, and so many of them for one address.
    pub(crate) fn new(limit: usize, limit_of_one: usize) -> Arc<Self> {
        Arc::new(Self { limit, limit_of_one, taken: Mutex::default() })
    }

    /// A place for a caller at `address`, if there is one.
    pub(crate) fn enter(self: &Arc<Self>, address: Option<IpAddr>) -> Option<Place> {
        let mut taken = self.taken();
        let all: usize = taken.values().sum();
        let own = taken.get(&address).copied().unwrap_or(0);
        if all >= self.limit || own >= self.limit_of_one {
            return None;
        }
        *taken.entry(address).or_default() += 1;
        Some(Place { places: Arc::clone(self), address })
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<Option<IpAddr>, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        if let Some(own) = taken.get_mut(&self.address) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.address);
            }
        }
    }
}

/// Says now and then that calls are refused, and counts every one.
#[derive(Debug)]
pub(crate) struct Refusals {
    worker: String,
    /// When it was last said, and how many were not told of since.
    said: Mutex<(Option<Instant>, u64)>,
}

impl Refusals {
    pub(crate) fn new(worker: &str) -> Self {
        Self { worker: worker.to_owned(), said: Mutex::default() }
    }

    /// A call of `method` ends with `error`, which mostly is a refusal.
    pub(crate) fn note(&self, method: &'static str, error: &ServiceError) {
        if !error.is_refusal() {
            return;
        }
        let cause = self.count(method, error);
        let reason = node::Chain(error);
        if !error.is_of_strangers() {
            tracing::info!(method, cause, %reason, "a call is refused");
            return;
        }
        self.tell(method, cause, &reason);
    }

    /// Counts a call that this worker ends for a reason which was told already; its cause.
    pub(crate) fn count(&self, method: &'static str, error: &ServiceError) -> &'static str {
        let cause = error.cause();
        telemetry::call_refused(&self.worker, method, cause);
        cause
    }

    /// Says now and then that what a stranger sends is refused.
    pub(crate) fn tell(&self, method: &'static str, cause: &'static str, reason: &dyn Display) {
        let now = Instant::now();
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, others) = *said;
        if last.is_some_and(|last| now.saturating_duration_since(last) < NOTICE_INTERVAL) {
            said.1 += 1;
            return;
        }
        *said = (Some(now), 0);
        drop(said);
        tracing::info!(method, cause, %reason, others, "a stranger's call is refused");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::UnreadableMessage;

    #[test]
    fn what_is_refused_is_counted_and_what_broke_is_not() {
        node::metrics::install().unwrap();
        let refusals = Refusals::new("noted");
        let ended = |status: tonic::Status| {
            refusals.note("Steps", &UnreadableMessage::from(status).into());
            let text = node::metrics::render();
            let of_this = |line: &&str| {
                line.starts_with("tercet_calls_refused_total{") && line.contains("\"noted\"")
            };
            text.lines().filter(of_this).map(str::to_owned).collect::<Vec<_>>()
        };
        assert!(ended(tonic::Status::cancelled("the sender reset it")).is_empty());
        let counted = ended(tonic::Status::aborted("it made room"));
        assert!(counted.len() == 1 && counted[0].contains("cause=\"crowded\""), "{counted:?}");
    }

    #[test]
    fn one_address_takes_not_every_place() {
        let places = Places::new(4, 2);
        let at = |last| Some(IpAddr::from([10, 0, 0, last]));
        let held: Vec<Place> = (0..5).filter_map(|_| places.enter(at(1))).collect();
        assert_eq!(held.len(), 2);
        let other = places.enter(at(2)).unwrap();
        let third = places.enter(at(3)).unwrap();
        assert!(places.enter(at(4)).is_none(), "four in all");
        drop(third);
        assert!(places.enter(at(1)).is_none());
        drop(held);
        assert!(places.enter(at(1)).is_some());
        drop(other);
        assert!(places.taken().is_empty());
    }
}
