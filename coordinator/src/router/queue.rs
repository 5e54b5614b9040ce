//! Those who wait, by priority and arrival, and when each has waited for too long.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::time::Duration;

use proto::ids::SequenceId;

use super::Key;
use crate::scheduler::{Priority, Sequence};
use crate::tick::Tick;

/// Where a sequence stands in the queue. Names ascend by arrival, so one that comes back from a
/// pipeline stands before those that came after it.
pub(super) fn key(sequence: &Sequence) -> Key {
    (sequence.priority(), sequence.id())
}

/// Those who wait. No step of work depends on how many they are, but for a change of the pipelines.
#[derive(Debug)]
pub(super) struct Waiting {
    patience: Duration,
    queue: BTreeMap<Key, Box<Sequence>>,
    /// Fit on no pipeline that serves now.
    stranded: BTreeMap<Key, Box<Sequence>>,
    late: BTreeSet<(Tick, Key)>,
}

impl Waiting {
    pub(super) fn new(patience: Duration) -> Self {
        Self { patience, queue: BTreeMap::new(), stranded: BTreeMap::new(), late: BTreeSet::new() }
    }

    /// When a sequence has waited for too long.
    fn late_at(&self, sequence: &Sequence) -> Tick {
        let patience = sequence.waiting_since() + self.patience;
        sequence.deadline().map_or(patience, |deadline| deadline.min(patience))
    }

    pub(super) fn insert(&mut self, sequence: Box<Sequence>, stranded: bool) {
        let key = key(&sequence);
        self.late.insert((self.late_at(&sequence), key));
        if stranded { &mut self.stranded } else { &mut self.queue }.insert(key, sequence);
    }

    /// The first of the queue behind `after`, who stays.
    pub(super) fn next(&self, after: Option<Key>) -> Option<&Sequence> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.queue.range((from, Bound::Unbounded)).next().map(|(_, sequence)| &**sequence)
    }

    /// Takes one out.
    pub(super) fn take(&mut self, key: Key) -> Option<Box<Sequence>> {
        let sequence = self.queue.remove(&key).or_else(|| self.stranded.remove(&key))?;
        self.late.remove(&(self.late_at(&sequence), key));
        Some(sequence)
    }

    /// Takes one out of whom only the name is known.
    pub(super) fn withdraw(&mut self, sequence: SequenceId) -> Option<Box<Sequence>> {
        Priority::ALL.into_iter().find_map(|priority| self.take((priority, sequence)))
    }

    /// Takes out one that has waited for too long.
    pub(super) fn pop_late(&mut self, now: Tick) -> Option<Box<Sequence>> {
        let &(at, key) = self.late.first()?;
        if at > now {
            return None;
        }
        self.take(key)
    }

    /// Takes out the first, stranded or not.
    pub(super) fn pop_first(&mut self) -> Option<Box<Sequence>> {
        let first = self.queue.keys().next().or_else(|| self.stranded.keys().next()).copied()?;
        self.take(first)
    }

    /// Tells anew who is stranded.
    pub(super) fn sort(&mut self, is_stranded: impl Fn(&Sequence) -> bool) {
        let mut all = std::mem::take(&mut self.queue);
        all.append(&mut self.stranded);
        (self.stranded, self.queue) =
            all.into_iter().partition(|(_, sequence)| is_stranded(sequence));
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len() + self.stranded.len()
    }
}
