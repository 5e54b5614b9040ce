//! What this worker says of itself in the registry, which changes while it serves.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use node::membership::{Membership, MembershipError, Registration, clear};
use node::{Chain, TaskError};
use proto::plan::{WorkerRecord, is_successor};

/// The record and the key that holds it.
#[derive(Debug)]
pub(crate) struct Published {
    record: Mutex<WorkerRecord>,
    /// How many times as long as unhindered its times are, for the quota that they were made under.
    stretch: Mutex<f64>,
    /// One writes at a time; `None` once the worker has left.
    registration: tokio::sync::Mutex<Option<Registration>>,
}

impl Published {
    /// Of a record that was registered, whose times are `stretch` times as long as unhindered.
    pub(crate) fn new(record: WorkerRecord, registration: Registration, stretch: f64) -> Self {
        Self {
            record: Mutex::new(record),
            stretch: Mutex::new(stretch),
            registration: tokio::sync::Mutex::new(Some(registration)),
        }
    }

    /// As it is now.
    pub(crate) fn current(&self) -> WorkerRecord {
        self.record().clone()
    }

    /// How many times as long as unhindered the record's times are.
    pub(crate) fn stretch(&self) -> f64 {
        *self.stretch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that of times that were changed, or are about to be.
    pub(crate) fn set_stretch(&self, stretch: f64) {
        *self.stretch.lock().unwrap_or_else(PoisonError::into_inner) = stretch;
    }

    /// Changes the record, and waits until the registry has it.
    ///
    /// # Errors
    ///
    /// If the registry does not have it yet. The change is kept all the same, and is written with the
    /// next or as soon as the registry can be reached.
    pub(crate) async fn change(
        &self,
        change: impl FnOnce(&mut WorkerRecord),
    ) -> Result<(), TaskError> {
        change(&mut self.record());
        let registration = self.registration.lock().await;
        let Some(registration) = &*registration else { return Ok(()) };
        // Whatever it is by now: another change may have come while this one waited.
        let value = encode(&self.record())?;
        Ok(registration.update(value).await?)
    }

    /// Takes the record away.
    ///
    /// # Errors
    ///
    /// If the registry does not say so in time; the lease then ends by itself.
    pub(crate) async fn leave(&self) -> Result<(), MembershipError> {
        match self.registration.lock().await.take() {
            Some(registration) => registration.leave().await,
            None => Ok(()),
        }
    }

    fn record(&self) -> MutexGuard<'_, WorkerRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Puts a worker's record into the registry. What an earlier process of its id left there is taken away,
/// if that one listened where this one does now; else its lease is waited for.
///
/// # Errors
///
/// As [`Membership::register`].
pub(crate) async fn register(
    membership: &dyn Membership,
    key: &str,
    record: &WorkerRecord,
    value: Bytes,
) -> Result<Registration, MembershipError> {
    let own = (record.incarnation, record.socket.as_str());
    let has_ended = |value: &[u8]| {
        serde_json::from_slice(value).is_ok_and(|found: WorkerRecord| {
            is_successor(own, (found.incarnation, found.socket.as_str()))
        })
    };
    match clear(membership, key, has_ended).await {
        Ok(true) => tracing::info!(key, "an earlier process at this address had left its key"),
        Ok(false) => {}
        // Registering finds out whether the registry answers.
        Err(error) => {
            tracing::info!(key, error = %Chain(&error), "what is under the key is not known");
        }
    }
    membership.register(key, value).await
}

/// As it is written to the registry.
///
/// # Errors
///
/// If it is no JSON: a bug, told rather than hidden.
pub(crate) fn encode(record: &WorkerRecord) -> Result<Bytes, serde_json::Error> {
    serde_json::to_vec(record).map(Bytes::from)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use node::membership::Memory;
    use proto::ids::Incarnation;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_a_process_at_the_same_socket_does_not_wait_for_an_earlier_lease() {
        let record = |incarnation, socket: &str| WorkerRecord {
            incarnation: Incarnation([incarnation; 16]),
            socket: socket.to_owned(),
            ..WorkerRecord::default()
        };
        let registers = async |before: &WorkerRecord, now: &WorkerRecord| {
            let near = Memory::new();
            let far = near.another();
            let held = far.register("w1", encode(before).unwrap()).await.unwrap();
            far.disconnect();
            let value = encode(now).unwrap();
            let taken = timeout(Duration::from_secs(1), register(&near, "w1", now, value)).await;
            drop(held);
            taken.is_ok_and(|registered| registered.is_ok())
        };
        assert!(registers(&record(1, "m/a:1"), &record(2, "m/a:1")).await);
        assert!(!registers(&record(1, "n/a:1"), &record(2, "m/a:1")).await, "another machine");
        assert!(!registers(&record(1, ""), &record(2, "")).await, "nobody knows");
        assert!(!registers(&record(2, "m/a:1"), &record(2, "m/a:1")).await, "it is itself");
    }
}
