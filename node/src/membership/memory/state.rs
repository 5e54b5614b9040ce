//! The map itself: keys, leases, revisions and a bounded past. No clock, no tasks.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use crate::membership::{Entry, Event, Revision, Snapshot, WriteOutcome};

/// Changes kept for watches that are behind; one that is further behind gets a reset.
const HISTORY_LEN: usize = 4096;

/// One connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ClientId(u64);

/// One lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LeaseId(u64);

/// Everything in the store.
#[derive(Debug, Default)]
pub(super) struct State {
    revision: Revision,
    /// Counts what `revision` does not: changes that waiters must look at and that write nothing.
    wakes: u64,
    entries: BTreeMap<String, Entry>,
    /// Keys that no lease ends.
    unleased: BTreeSet<String>,
    leases: BTreeMap<LeaseId, Lease>,
    clients: BTreeMap<ClientId, Client>,
    /// The latest changes, in the order of their revisions.
    history: VecDeque<(Revision, Event)>,
    /// Changes up to this revision may be missing from `history`.
    compacted: Revision,
    /// How often the store was set back.
    setbacks: u64,
    next_id: u64,
}

/// The store as it was once.
#[derive(Clone, Debug, Default)]
pub(super) struct Backup {
    revision: Revision,
    entries: BTreeMap<String, Entry>,
    /// Which of them were under a lease.
    leased: BTreeSet<String>,
}

/// What came of taking a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It is under a new lease.
    Ours(Revision, LeaseId),
    /// It is under somebody else's.
    Held,
    /// It is under none.
    NoLease,
}

/// How far a watch has read: the number of setbacks that it knows of, and a revision.
pub(super) type Seen = (u64, Revision);

#[derive(Debug)]
struct Client {
    connected: bool,
    /// What the next fenced write does before its answer is lost.
    lost_answer: Option<bool>,
}

#[derive(Debug)]
struct Lease {
    client: ClientId,
    key: String,
    value: Bytes,
    /// The key is in the map under this lease.
    present: bool,
    /// `value` was changed while the owner was cut off and is not in the map yet.
    stale: bool,
    /// For leaders: how they learn that their term is over. Registrations are made again instead.
    lost: Option<CancellationToken>,
    /// The owner let go while cut off: the key stays until the lease ends.
    abandoned: bool,
}

impl State {
    /// Differs after anything that somebody may be waiting for.
    pub(super) fn version(&self) -> (Revision, u64) {
        (self.revision, self.wakes)
    }

    pub(super) fn connect(&mut self) -> ClientId {
        self.next_id += 1;
        let id = ClientId(self.next_id);
        self.clients.insert(id, Client { connected: true, lost_answer: None });
        id
    }

    pub(super) fn disconnect(&mut self, id: ClientId) {
        self.client(id).connected = false;
    }

    pub(super) fn reconnect(&mut self, id: ClientId) {
        self.client(id).connected = true;
        self.wakes += 1;
        // What the owner let go of while it was away, it lets go of now.
        let abandoned = self.leases_where(|lease| lease.client == id && lease.abandoned);
        for lease in abandoned {
            self.release(lease);
        }
        self.settle();
    }

    /// Ends every lease of a client that was silent for too long.
    pub(super) fn expire_client(&mut self, id: ClientId) {
        for lease in self.leases_where(|lease| lease.client == id) {
            self.expire(lease);
        }
        self.settle();
    }

    /// Ends the lease that holds `key`; false if none does.
    pub(super) fn expire_key(&mut self, key: &str) -> bool {
        let found = self.leases_where(|lease| lease.present && lease.key == key);
        for lease in &found {
            self.expire(*lease);
        }
        self.settle();
        !found.is_empty()
    }

    pub(super) fn lose_next_answer(&mut self, id: ClientId, applied: bool) {
        self.client(id).lost_answer = Some(applied);
    }

    pub(super) fn take_lost_answer(&mut self, id: ClientId) -> Option<bool> {
        self.client(id).lost_answer.take()
    }

    pub(super) fn back_up(&self) -> Backup {
        let held = self.leases.values().filter(|lease| lease.present);
        let leased = held.map(|lease| lease.key.clone()).collect();
        Backup { revision: self.revision, entries: self.entries.clone(), leased }
    }

    /// Sets everything back. Who held a key holds it no more: owners that are connected register
    /// again where the key is free, leaders are told. Returns the keys that are there under leases
    /// of before, which end in their time.
    pub(super) fn restore(&mut self, backup: Backup) -> BTreeSet<String> {
        let Backup { revision, entries, leased } = backup;
        (self.revision, self.entries) = (revision, entries);
        let is_unleased = |key: &&String| !leased.contains(*key);
        self.unleased = self.entries.keys().filter(is_unleased).cloned().collect();
        self.history.clear();
        self.compacted = revision;
        self.setbacks += 1;
        self.wakes += 1;
        for lease in self.leases.values_mut() {
            lease.present = false;
        }
        self.settle();
        leased
    }

    /// Deletes a key whose lease nobody has renewed since a restoration, `setbacks` of which there
    /// were then. One that was made since is another's.
    pub(super) fn expire_restored(&mut self, setbacks: u64, restored: Revision, key: &str) {
        let old = self.entries.get(key).is_some_and(|entry| entry.create_revision <= restored);
        if self.setbacks == setbacks && old {
            self.delete(key);
            self.settle();
        }
    }

    pub(super) fn setbacks(&self) -> u64 {
        self.setbacks
    }

    /// Forgets every change but the last.
    pub(super) fn compact(&mut self) {
        self.history.retain(|(revision, _)| *revision == self.revision);
        self.compacted = self.revision.saturating_sub(1);
    }

    pub(super) fn snapshot(&self, prefix: &str) -> Snapshot {
        let entries = self.entries.values().filter(|entry| entry.key.starts_with(prefix));
        Snapshot { revision: self.revision, entries: entries.cloned().collect() }
    }

    /// The first event under `prefix` after `seen`, which moves on; `None` if there is none yet.
    pub(super) fn after(&self, prefix: &str, seen: &mut Option<Seen>) -> Option<Event> {
        let current = |seen: &Seen| seen.0 == self.setbacks && seen.1 >= self.compacted;
        let Some((_, last)) = seen.filter(current) else {
            *seen = Some((self.setbacks, self.revision));
            return Some(Event::Reset(self.snapshot(prefix)));
        };
        let start = self.history.partition_point(|(revision, _)| *revision <= last);
        let mut later = self.history.range(start..);
        let found = later.find(|(_, event)| event_key(event).starts_with(prefix));
        *seen = Some((self.setbacks, found.map_or(self.revision, |(revision, _)| *revision)));
        found.map(|(_, event)| event.clone())
    }

    pub(super) fn get_or_create(&mut self, key: &str, value: Bytes) -> Entry {
        match self.entries.get(key) {
            Some(entry) => entry.clone(),
            None => {
                self.unleased.insert(key.to_owned());
                self.put(key, value)
            }
        }
    }

    /// Puts `key` under a new lease, if it is free.
    pub(super) fn take(
        &mut self,
        client: ClientId,
        key: &str,
        value: Bytes,
        lost: Option<CancellationToken>,
    ) -> Taken {
        if self.unleased.contains(key) {
            return Taken::NoLease;
        }
        if self.entries.contains_key(key) {
            return Taken::Held;
        }
        self.next_id += 1;
        let id = LeaseId(self.next_id);
        let revision = self.put(key, value.clone()).create_revision;
        let key = key.to_owned();
        let (present, stale, abandoned) = (true, false, false);
        let lease = Lease { client, key, value, present, stale, lost, abandoned };
        self.leases.insert(id, lease);
        Taken::Ours(revision, id)
    }

    /// Changes a lease's value: at once if its key is there and its owner connected.
    pub(super) fn update(&mut self, id: LeaseId, value: Bytes) {
        let Some(lease) = self.leases.get_mut(&id) else { return };
        lease.value = value;
        lease.stale = true;
        self.settle();
    }

    /// Ends a lease because its owner says so. One who is cut off can say nothing yet.
    pub(super) fn release(&mut self, id: LeaseId) {
        let Some(lease) = self.leases.get_mut(&id) else { return };
        if !self.clients[&lease.client].connected && lease.present {
            lease.abandoned = true;
            return;
        }
        if let Some(lease) = self.leases.remove(&id).filter(|lease| lease.present) {
            self.delete(&lease.key);
        }
        self.settle();
    }

    /// Takes away a key that was last written at `revision`; false if that is not so.
    pub(super) fn remove(&mut self, key: &str, revision: Revision) -> bool {
        if self.entries.get(key).is_none_or(|entry| entry.mod_revision != revision) {
            return false;
        }
        if !self.expire_key(key) {
            self.delete(key);
            self.settle();
        }
        true
    }

    pub(super) fn write_if_leader(
        &mut self,
        leader_key: &str,
        term: Revision,
        key: &str,
        previous: Option<Revision>,
        value: Bytes,
    ) -> WriteOutcome {
        let leads = self.entries.get(leader_key).is_some_and(|e| e.create_revision == term);
        let found = self.entries.get(key).map(|entry| entry.mod_revision);
        if !leads || found != previous {
            return WriteOutcome::Conflict;
        }
        // What is written without a lease is under none any more.
        self.leases.values_mut().filter(|lease| lease.key == key).for_each(|l| l.present = false);
        self.unleased.insert(key.to_owned());
        WriteOutcome::Written(self.put(key, value).mod_revision)
    }

    /// Ends a lease against its owner's will: the key goes, the lease waits to be made anew.
    fn expire(&mut self, id: LeaseId) {
        let Some(lease) = self.leases.get_mut(&id).filter(|lease| lease.present) else { return };
        lease.present = false;
        let key = lease.key.clone();
        self.delete(&key);
    }

    /// Lets connected owners learn what became of their leases and do what they want: registrations
    /// put their key there again if it is free and write their new value, leaders are told, and
    /// leases that nobody wants are forgotten.
    fn settle(&mut self) {
        let clients = &self.clients;
        let owed: Vec<LeaseId> = self
            .leases
            .iter()
            .filter(|(_, lease)| !lease.present || lease.stale)
            .filter(|(_, lease)| clients[&lease.client].connected)
            .map(|(id, _)| *id)
            .collect();
        for id in owed {
            let lease = &self.leases[&id];
            if !lease.present && (lease.lost.is_some() || lease.abandoned) {
                if let Some(lost) = &lease.lost {
                    lost.cancel();
                }
                self.leases.remove(&id);
            } else if lease.present || !self.entries.contains_key(&lease.key) {
                let (key, value) = (lease.key.clone(), lease.value.clone());
                self.put(&key, value);
                if let Some(lease) = self.leases.get_mut(&id) {
                    (lease.present, lease.stale) = (true, false);
                }
            }
        }
    }

    fn put(&mut self, key: &str, value: Bytes) -> Entry {
        self.revision += 1;
        let create_revision = self.entries.get(key).map_or(self.revision, |e| e.create_revision);
        let entry =
            Entry { key: key.to_owned(), value, create_revision, mod_revision: self.revision };
        self.entries.insert(key.to_owned(), entry.clone());
        self.record(Event::Put(entry.clone()));
        entry
    }

    fn delete(&mut self, key: &str) {
        if self.entries.remove(key).is_some() {
            self.unleased.remove(key);
            self.revision += 1;
            self.record(Event::Delete { key: key.to_owned(), revision: self.revision });
        }
    }

    fn record(&mut self, event: Event) {
        self.history.push_back((self.revision, event));
        if self.history.len() > HISTORY_LEN
            && let Some((revision, _)) = self.history.pop_front()
        {
            self.compacted = revision;
        }
    }

    fn leases_where(&self, wanted: impl Fn(&Lease) -> bool) -> Vec<LeaseId> {
        self.leases.iter().filter(|(_, lease)| wanted(lease)).map(|(id, _)| *id).collect()
    }

    fn client(&mut self, id: ClientId) -> &mut Client {
        // Clients are never removed: every id in use names one.
        self.clients.get_mut(&id).expect("a connection that was made")
    }
}

fn event_key(event: &Event) -> &str {
    match event {
        Event::Put(entry) => &entry.key,
        Event::Delete { key, .. } => key,
        // Resets are made for one watch and not recorded.
        Event::Reset(_) => "",
    }
}
