//! Membership inside one process: the rules of etcd on a map, with faults on request.
//!
//! Clones share one connection, as tasks of one process do; [`Memory::another`] is another
//! process at the same store, so that a test may cut one off and not the other.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{
    Entry, Event, Held, LEASE_TTL_S, Leadership, Membership, MembershipError, Registration,
    Revision, Snapshot, Watch, WriteOutcome,
};

mod state;

use state::{ClientId, LeaseId, Seen, State, Taken};

/// How long `register` waits for a key that somebody else holds: a lease, and a second for
/// whoever must notice that it ended.
const TAKEN_WAIT: Duration = Duration::from_secs(LEASE_TTL_S + 1);

/// The in-memory store, or rather one process's connection to it.
#[derive(Clone, Debug)]
pub struct Memory {
    store: Arc<Store>,
    client: Arc<Client>,
}

#[derive(Debug)]
struct Store {
    state: Mutex<State>,
    /// Tells waiters that something changed; they look for themselves at what.
    changed: watch::Sender<()>,
    /// Ends the leases that a backup brought back.
    expiry: Mutex<JoinSet<()>>,
}

/// Everything that a store held at one moment, see [`Memory::back_up`].
#[derive(Clone, Debug, Default)]
pub struct MemoryBackup(state::Backup);

#[derive(Debug)]
struct Client {
    id: ClientId,
    connected: watch::Sender<bool>,
    /// Ends the leases of a client that stays cut off.
    expiry: Mutex<JoinSet<()>>,
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl Memory {
    /// An empty store and a first connection to it.
    pub fn new() -> Self {
        let store = Store {
            state: Mutex::default(),
            changed: watch::Sender::new(()),
            expiry: Mutex::default(),
        };
        Self::connect(Arc::new(store))
    }

    /// Another process's connection to the same store: faults of one do not touch the other.
    pub fn another(&self) -> Self {
        Self::connect(self.store.clone())
    }

    fn connect(store: Arc<Store>) -> Self {
        let id = store.change(State::connect);
        let client = Client { id, connected: watch::Sender::new(true), expiry: Mutex::default() };
        Self { store, client: Arc::new(client) }
    }

    /// Fault: cuts this connection. Calls fail, watches are silent, and after [`LEASE_TTL_S`] the
    /// keys registered through it are gone.
    pub fn disconnect(&self) {
        self.client.connected.send_replace(false);
        self.store.change(|state| state.disconnect(self.client.id));
        let (store, id) = (self.store.clone(), self.client.id);
        let mut expiry = lock(&self.client.expiry);
        expiry.abort_all();
        expiry.spawn(async move {
            tokio::time::sleep(Duration::from_secs(LEASE_TTL_S)).await;
            store.change(|state| state.expire_client(id));
        });
    }

    /// Ends [`disconnect`](Self::disconnect): watches go on, lost keys are registered again, lost
    /// leaders learn of it.
    pub fn reconnect(&self) {
        lock(&self.client.expiry).abort_all();
        self.store.change(|state| state.reconnect(self.client.id));
        self.client.connected.send_replace(true);
    }

    /// Fault: forgets the past. A watch that is behind gets [`Event::Reset`].
    pub fn compact(&self) {
        self.store.change(State::compact);
    }

    /// What the store holds now.
    pub fn back_up(&self) -> MemoryBackup {
        MemoryBackup(lock(&self.store.state).back_up())
    }

    /// Fault: sets the store back to a backup, or with the default one to nothing: its revision falls,
    /// watches get [`Event::Reset`], leaders lose their term, and registrations are made anew. Keys
    /// that were leased then are there for [`LEASE_TTL_S`] more.
    pub fn restore(&self, backup: MemoryBackup) {
        let (stale, setbacks, restored) = self.store.change(|state| {
            let stale = state.restore(backup.0);
            (stale, state.setbacks(), state.snapshot("").revision)
        });
        let store = Arc::downgrade(&self.store);
        lock(&self.store.expiry).spawn(async move {
            tokio::time::sleep(Duration::from_secs(LEASE_TTL_S)).await;
            let Some(store) = store.upgrade() else { return };
            for key in stale {
                store.change(|state| state.expire_restored(setbacks, restored, &key));
            }
        });
    }

    /// Fault: ends the lease of `key`, although its owner is alive. Returns whether there was one.
    pub fn expire_lease(&self, key: &str) -> bool {
        self.store.change(|state| state.expire_key(key))
    }

    /// Fault: the next `write_if_leader` through this connection ends as
    /// [`WriteOutcome::Unknown`]: after it took effect if `applied`, else without.
    pub fn lose_next_answer(&self, applied: bool) {
        self.store.change(|state| state.lose_next_answer(self.client.id, applied));
    }

    /// Refuses when the connection is cut.
    fn check_connected(&self, operation: &'static str, key: &str) -> Result<(), MembershipError> {
        if *self.client.connected.borrow() {
            return Ok(());
        }
        Err(MembershipError::Unavailable { operation, key: key.to_owned(), source: None })
    }

    /// Waits for `key` to be free, then takes it under a new lease; not for one that no lease ends.
    async fn take(
        &self,
        key: &str,
        value: Bytes,
        lost: Option<CancellationToken>,
    ) -> Result<(Revision, Arc<Lease>), MembershipError> {
        let mut changed = self.store.changed.subscribe();
        let mut connected = self.client.connected.subscribe();
        loop {
            // A sender is kept in `self`, so neither wait can fail.
            let _ = connected.wait_for(|connected| *connected).await;
            changed.mark_unchanged();
            let taken = self
                .store
                .change(|state| state.take(self.client.id, key, value.clone(), lost.clone()));
            match taken {
                Taken::Ours(revision, id) => {
                    let lease = Lease { memory: self.clone(), key: key.to_owned(), id };
                    return Ok((revision, Arc::new(lease)));
                }
                Taken::NoLease => return Err(MembershipError::NoLease { key: key.to_owned() }),
                Taken::Held => {}
            }
            let _ = changed.changed().await;
        }
    }
}

impl Store {
    /// Runs `change` and wakes every waiter if it changed anything.
    fn change<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let mut state = lock(&self.state);
        let before = state.version();
        let result = change(&mut state);
        if state.version() != before {
            self.changed.send_replace(());
        }
        result
    }
}

/// No code can panic with the lock held and leave the map half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl Membership for Memory {
    async fn get_or_create(&self, key: &str, value: Bytes) -> Result<Entry, MembershipError> {
        self.check_connected("create", key)?;
        Ok(self.store.change(|state| state.get_or_create(key, value)))
    }

    async fn register(&self, key: &str, value: Bytes) -> Result<Registration, MembershipError> {
        self.check_connected("register", key)?;
        match tokio::time::timeout(TAKEN_WAIT, self.take(key, value, None)).await {
            Ok(taken) => Ok(Registration::new(Box::new(taken?.1))),
            Err(_) => Err(MembershipError::KeyTaken { key: key.to_owned() }),
        }
    }

    async fn list(&self, prefix: &str) -> Result<Snapshot, MembershipError> {
        self.check_connected("list", prefix)?;
        Ok(lock(&self.store.state).snapshot(prefix))
    }

    fn watch(&self, prefix: &str) -> Watch {
        let cursor = Cursor {
            store: self.store.clone(),
            changed: self.store.changed.subscribe(),
            connected: self.client.connected.subscribe(),
            prefix: prefix.to_owned(),
            seen: None,
        };
        Watch::new(stream::unfold(cursor, async |mut cursor| {
            let event = cursor.next().await?;
            Some((event, cursor))
        }))
    }

    async fn campaign(
        &self,
        key: &str,
        value: Bytes,
        stop: &CancellationToken,
    ) -> Result<Leadership, MembershipError> {
        let lost = CancellationToken::new();
        let elected = stop.run_until_cancelled(self.take(key, value, Some(lost.clone()))).await;
        let (term, lease) =
            elected.ok_or_else(|| MembershipError::Stopped { key: key.to_owned() })??;
        Ok(Leadership::new(term, lost, Box::new(lease)))
    }

    async fn remove(&self, key: &str, revision: Revision) -> Result<bool, MembershipError> {
        self.check_connected("remove", key)?;
        Ok(self.store.change(|state| state.remove(key, revision)))
    }

    async fn write_if_leader(
        &self,
        leader_key: &str,
        term: Revision,
        key: &str,
        previous: Option<Revision>,
        value: Bytes,
    ) -> Result<WriteOutcome, MembershipError> {
        if self.check_connected("write", key).is_err() {
            return Ok(WriteOutcome::Unknown);
        }
        Ok(self.store.change(|state| {
            let lost_answer = state.take_lost_answer(self.client.id);
            if lost_answer == Some(false) {
                return WriteOutcome::Unknown;
            }
            let outcome = state.write_if_leader(leader_key, term, key, previous, value);
            if lost_answer.is_some() { WriteOutcome::Unknown } else { outcome }
        }))
    }
}

/// One leased key; the lease ends when this is dropped.
struct Lease {
    memory: Memory,
    key: String,
    id: LeaseId,
}

#[async_trait]
impl Held for Arc<Lease> {
    async fn update(&self, value: Bytes) -> Result<(), MembershipError> {
        self.memory.store.change(|state| state.update(self.id, value));
        self.memory.check_connected("update", &self.key)
    }

    async fn release(&self) -> Result<(), MembershipError> {
        self.memory.store.change(|state| state.release(self.id));
        self.memory.check_connected("release", &self.key)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.memory.store.change(|state| state.release(self.id));
    }
}

/// How far one watch has read.
struct Cursor {
    store: Arc<Store>,
    changed: watch::Receiver<()>,
    connected: watch::Receiver<bool>,
    prefix: String,
    /// How far it was told; `None` before the first event.
    seen: Option<Seen>,
}

impl Cursor {
    /// The next event; `None` when the connection and the store are gone, for nothing can come.
    async fn next(&mut self) -> Option<Event> {
        loop {
            self.connected.wait_for(|connected| *connected).await.ok()?;
            self.changed.mark_unchanged();
            let event = lock(&self.store.state).after(&self.prefix, &mut self.seen);
            if event.is_some() {
                return event;
            }
            self.changed.changed().await.ok()?;
        }
    }
}
