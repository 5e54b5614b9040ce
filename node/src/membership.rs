//! Who is here and who decides: leased keys, watches, elections and fenced writes.
//!
//! The trait is served by [`Etcd`] in a deployment and by [`Memory`] inside one process. Keys and
//! values are opaque here: what they mean is `proto`'s affair. `docs/membership.md` tells what is
//! promised when things go wrong; both implementations pass the same tests.

use std::fmt;
use std::pin::Pin;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;

mod etcd;
mod memory;

pub use etcd::{Etcd, EtcdOptions};
pub use memory::{Memory, MemoryBackup};

/// Life of a lease that is not renewed, in seconds. etcd's own floor is 2 s; below 5 s a slow
/// disk of one etcd member looks like dead workers.
pub const LEASE_TTL_S: u64 = 5;

/// Number of a change of the whole store: larger is later, for all keys together. A store that lost its
/// data or was restored from a backup counts on from where it is then: numbers of before it say nothing.
pub type Revision = u64;

/// One key as it was at some revision.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// The whole key.
    pub key: String,
    /// What it holds.
    pub value: Bytes,
    /// The revision that made the key; a key that was deleted and made again has a new one.
    pub create_revision: Revision,
    /// The revision that last wrote it.
    pub mod_revision: Revision,
}

impl fmt::Debug for Entry {
    /// Values may be long or private: only their length is shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("key", &self.key)
            .field("value_bytes", &self.value.len())
            .field("create_revision", &self.create_revision)
            .field("mod_revision", &self.mod_revision)
            .finish()
    }
}

/// All keys under one prefix, as they were together at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The store's revision at that moment; at least every `mod_revision` in `entries`.
    pub revision: Revision,
    /// In order of their keys.
    pub entries: Vec<Entry>,
}

/// What a [`Watch`] tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Forget what you knew of this prefix: this is all there is. Always the first event, and
    /// told again when changes may have been missed. If its revision is lower than one that was
    /// told before, the store lost its data or was set back.
    Reset(Snapshot),
    /// A key was made or written.
    Put(Entry),
    /// A key is gone: deleted, or its lease ended.
    Delete {
        /// The key.
        key: String,
        /// The revision that removed it.
        revision: Revision,
    },
}

/// How [`Membership::write_if_leader`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    /// The value is there, written at this revision.
    Written(Revision),
    /// Not written: the writer is not the leader of that term (any more), or the key is not at
    /// the revision that the writer built on.
    Conflict,
    /// The store did not say. Read the key: if your value is there, it was written; if not, the
    /// same write may be tried again with the same `previous`, for at most one can succeed.
    Unknown,
}

/// Why membership could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MembershipError {
    /// No endpoint answered when the process started.
    #[error("failed to reach etcd at {endpoints}")]
    Connect {
        /// The endpoints, separated by commas.
        endpoints: String,
        /// The last thing that went wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer before the deadline; the store may come back.
    #[error("membership store did not answer in time to {operation} {key}")]
    Unavailable {
        /// What was asked: `list`, `register` ….
        operation: &'static str,
        /// The key or prefix.
        key: String,
        /// The last thing that went wrong, if anything but time did.
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The store answered that it will not: wrong password, no permission, value too large ….
    #[error("membership store refused to {operation} {key}")]
    Refused {
        /// What was asked.
        operation: &'static str,
        /// The key or prefix.
        key: String,
        /// The store's words.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Another live process holds the key, and held it for longer than a lease lives.
    #[error("key {key} is held by another live process (is the same id in use twice?)")]
    KeyTaken {
        /// The key.
        key: String,
    },
    /// The key is there and belongs to no lease, so that it never goes by itself.
    #[error(
        "key {key} has no lease: no process holds it, somebody put it there by hand, and it stays until it \
         is removed (etcdctl del {key})"
    )]
    NoLease {
        /// The key.
        key: String,
    },
    /// The stop token fired while waiting.
    #[error("stopped while waiting for {key}")]
    Stopped {
        /// The key waited for.
        key: String,
    },
}

impl MembershipError {
    /// Whether another try, with nothing changed by a person, may succeed.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::Unavailable { .. })
    }
}

/// The store that every process of a cluster agrees on.
///
/// Every call has a deadline of a few seconds, except [`campaign`](Self::campaign), which waits
/// as long as it takes. A store that goes away later breaks nothing: watches are silent and go on
/// where they were, leased keys come back, calls fail with an error that
/// [is transient](MembershipError::is_transient).
#[async_trait]
pub trait Membership: Send + Sync + 'static {
    /// The entry of `key`, made with `value` if there is none. All callers get the same one.
    ///
    /// # Errors
    ///
    /// If the store does not answer in time or refuses.
    async fn get_or_create(&self, key: &str, value: Bytes) -> Result<Entry, MembershipError>;

    /// Puts `key` there for as long as the registration lives, and again with the same value
    /// (and a new create revision) whenever the lease was lost.
    ///
    /// # Errors
    ///
    /// [`MembershipError::KeyTaken`] if the key was held by somebody else for longer than a lease
    /// outlives its owner, [`MembershipError::NoLease`] if nobody holds it and it is there; otherwise if
    /// the store does not answer in time or refuses.
    async fn register(&self, key: &str, value: Bytes) -> Result<Registration, MembershipError>;

    /// Every key that begins with `prefix`, as of now: no write that ended before is missing.
    ///
    /// # Errors
    ///
    /// If the store does not answer in time or refuses.
    async fn list(&self, prefix: &str) -> Result<Snapshot, MembershipError>;

    /// Follows every key that begins with `prefix`. Works from the moment the store can be
    /// reached; must be called inside a runtime.
    fn watch(&self, prefix: &str) -> Watch;

    /// Waits until `key` is ours: then this process leads, and the key's create revision is its
    /// term.
    ///
    /// # Errors
    ///
    /// [`MembershipError::Stopped`] if `stop` fires first, [`MembershipError::Refused`] if the
    /// store will not have it, [`MembershipError::NoLease`] if the key would be waited for in vain. A
    /// store that is away is waited for.
    async fn campaign(
        &self,
        key: &str,
        value: Bytes,
        stop: &CancellationToken,
    ) -> Result<Leadership, MembershipError>;

    /// Takes a key away that was last written at `revision`, whoever holds it; says whether it did.
    /// Whoever held it and lives finds that out: a leader's term is over, a registration is made
    /// again as soon as the key is free.
    ///
    /// # Errors
    ///
    /// If the store does not answer in time or refuses.
    async fn remove(&self, key: &str, revision: Revision) -> Result<bool, MembershipError>;

    /// Writes `key` in one transaction, if `leader_key` was created at `term` and `key` was last
    /// written at `previous` (`None`: does not exist). `value` must tell this write from every
    /// other: after a lost answer it is what decides whether the write was ours.
    ///
    /// # Errors
    ///
    /// If the store refuses. No answer is no error but [`WriteOutcome::Unknown`].
    async fn write_if_leader(
        &self,
        leader_key: &str,
        term: Revision,
        key: &str,
        previous: Option<Revision>,
        value: Bytes,
    ) -> Result<WriteOutcome, MembershipError>;
}

/// Takes away what a process that has ended left under a leased key, if `has_ended` says so of its
/// value: nobody has to wait for that lease then. Says whether it took anything away.
///
/// # Errors
///
/// If the store does not answer in time or refuses.
pub async fn clear(
    membership: &dyn Membership,
    key: &str,
    has_ended: impl Fn(&[u8]) -> bool + Send,
) -> Result<bool, MembershipError> {
    let found = membership.list(key).await?.entries.into_iter().find(|entry| entry.key == key);
    match found.filter(|entry| has_ended(&entry.value)) {
        Some(entry) => membership.remove(key, entry.mod_revision).await,
        None => Ok(false),
    }
}

/// What keeps a leased key alive; dropping it lets go of the lease in the background.
#[async_trait]
pub(crate) trait Held: Send + Sync {
    async fn update(&self, value: Bytes) -> Result<(), MembershipError>;
    async fn release(&self) -> Result<(), MembershipError>;
}

/// A key of ours under a lease, see [`Membership::register`].
///
/// Dropping it lets go of the key in the background; [`leave`](Self::leave) waits for that.
#[must_use = "the key is given up when this is dropped"]
pub struct Registration {
    held: Box<dyn Held>,
}

impl Registration {
    pub(crate) fn new(held: Box<dyn Held>) -> Self {
        Self { held }
    }

    /// Changes the value, now and for every time the key is registered again.
    ///
    /// # Errors
    ///
    /// If the store does not have it yet. The new value is kept all the same and written as soon
    /// as the store can be reached.
    pub async fn update(&self, value: Bytes) -> Result<(), MembershipError> {
        self.held.update(value).await
    }

    /// Takes the key away and waits until it is.
    ///
    /// # Errors
    ///
    /// If the store does not say so in time; the lease then ends by itself.
    pub async fn leave(self) -> Result<(), MembershipError> {
        self.held.release().await
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").finish_non_exhaustive()
    }
}

/// The right to write as leader of one term, see [`Membership::campaign`].
///
/// Only [`Membership::write_if_leader`] makes it safe: two processes may both believe for a while
/// that they lead. Dropping it resigns in the background.
#[must_use = "leadership is given up when this is dropped"]
pub struct Leadership {
    /// The create revision of the leader's key.
    pub term: Revision,
    /// Fires when the store said that the term is over, or went back. While the store is away it does not
    /// fire: nobody can lead anew then, and everything placed goes on.
    pub lost: CancellationToken,
    held: Box<dyn Held>,
}

impl Leadership {
    pub(crate) fn new(term: Revision, lost: CancellationToken, held: Box<dyn Held>) -> Self {
        Self { term, lost, held }
    }

    /// Lets the next candidate lead, at once.
    ///
    /// # Errors
    ///
    /// If the store does not say so in time; the lease then ends by itself.
    pub async fn resign(self) -> Result<(), MembershipError> {
        self.held.release().await
    }
}

impl fmt::Debug for Leadership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leadership").field("term", &self.term).finish_non_exhaustive()
    }
}

/// The changes under one prefix, in the order of their revisions, see [`Membership::watch`].
///
/// It never ends and never fails. A reader that is too slow is not waited for: it gets a
/// [`Event::Reset`] when it comes back.
pub struct Watch {
    events: Pin<Box<dyn Stream<Item = Event> + Send>>,
}

impl Watch {
    pub(crate) fn new(events: impl Stream<Item = Event> + Send + 'static) -> Self {
        Self { events: Box::pin(events) }
    }

    /// The next event.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Event {
        match self.events.next().await {
            Some(event) => event,
            // Both implementations go on for ever.
            None => std::future::pending().await,
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}
