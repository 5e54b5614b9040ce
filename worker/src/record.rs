//! What this worker says of itself in the registry, which changes while it serves.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use node::TaskError;
use node::membership::{MembershipError, Registration};
use proto::plan::WorkerRecord;

/// The record and the key that holds it.
#[derive(Debug)]
pub(crate) struct Published {
    record: Mutex<WorkerRecord>,
    /// One writes at a time; `None` once the worker has left.
    registration: tokio::sync::Mutex<Option<Registration>>,
}

impl Published {
    /// Of a record that was registered.
    pub(crate) fn new(record: WorkerRecord, registration: Registration) -> Self {
        Self {
            record: Mutex::new(record),
            registration: tokio::sync::Mutex::new(Some(registration)),
        }
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

/// As it is written to the registry.
///
/// # Errors
///
/// If it is no JSON: a bug, told rather than hidden.
pub(crate) fn encode(record: &WorkerRecord) -> Result<Bytes, serde_json::Error> {
    serde_json::to_vec(record).map(Bytes::from)
}
