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

/// Those who wait. No step of work depends on how many they are.
#[derive(Debug)]
pub(super) struct Waiting {
    patience: Duration,
    queue: BTreeMap<Key, Box<Sequence>>,
    /// Nobody takes them as the pipelines are now.
    stranded: BTreeMap<Key, Box<Sequence>>,
    late: BTreeSet<(Tick, Key)>,
    /// How many of them have never run.
    newcomers: usize,
    sorting: Sorting,
}

/// How far it is told anew who is stranded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sorting {
    Done,
    /// Those up to this one are told apart; the others wait for their turn to be.
    UpTo(Option<Key>),
}

impl Waiting {
    pub(super) fn new(patience: Duration) -> Self {
        Self {
            patience,
            queue: BTreeMap::new(),
            stranded: BTreeMap::new(),
            late: BTreeSet::new(),
            newcomers: 0,
            sorting: Sorting::Done,
        }
    }

    /// When a sequence has waited for too long.
    fn late_at(&self, sequence: &Sequence) -> Tick {
        let patience = sequence.waiting_since() + self.patience;
        sequence.deadline().map_or(patience, |deadline| deadline.min(patience))
    }

    pub(super) fn insert(&mut self, sequence: Box<Sequence>, stranded: bool) {
        let key = key(&sequence);
        self.newcomers += usize::from(!sequence.was_admitted());
        self.late.insert((self.late_at(&sequence), key));
        if stranded { &mut self.stranded } else { &mut self.queue }.insert(key, sequence);
    }

    /// The first of the queue behind `after`, who stays. While it is told anew who is stranded, only
    /// of those of whom that is known: nobody is overtaken by one who came later.
    pub(super) fn next(&self, after: Option<Key>) -> Option<&Sequence> {
        let (&key, sequence) = self.queue.range(behind(after)).next()?;
        match self.sorting {
            Sorting::UpTo(last) if last.is_none_or(|last| key > last) => None,
            _ => Some(sequence),
        }
    }

    /// Takes one out.
    pub(super) fn take(&mut self, key: Key) -> Option<Box<Sequence>> {
        let sequence = self.queue.remove(&key).or_else(|| self.stranded.remove(&key))?;
        self.late.remove(&(self.late_at(&sequence), key));
        self.newcomers -= usize::from(!sequence.was_admitted());
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

    /// From now on it is to be told anew who is stranded, of all: see [`Waiting::sort`].
    pub(super) fn begin_to_sort(&mut self) {
        self.sorting = Sorting::UpTo(None);
    }

    /// Tells of the next ones anew whether they are stranded, `at_most` so many.
    pub(super) fn sort(&mut self, at_most: usize, is_stranded: impl Fn(&Sequence) -> bool) {
        for _ in 0..at_most {
            let Sorting::UpTo(last) = self.sorting else { return };
            let first = |map: &BTreeMap<Key, Box<Sequence>>| {
                map.range(behind(last)).next().map(|(&key, sequence)| (key, is_stranded(sequence)))
            };
            let (queued, stranded) = (first(&self.queue), first(&self.stranded));
            let Some((key, strands)) = queued.into_iter().chain(stranded).min() else {
                self.sorting = Sorting::Done;
                return;
            };
            let (from, to) = match strands {
                true => (&mut self.queue, &mut self.stranded),
                false => (&mut self.stranded, &mut self.queue),
            };
            if let Some(sequence) = from.remove(&key) {
                to.insert(key, sequence);
            }
            self.sorting = Sorting::UpTo(Some(key));
        }
    }

    /// Whether there are some of whom it is not known whether they are stranded.
    pub(super) fn is_sorting(&self) -> bool {
        self.sorting != Sorting::Done
    }

    /// How many have never run. Others were taken long ago.
    pub(super) fn newcomers(&self) -> usize {
        self.newcomers
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len() + self.stranded.len()
    }
}

fn behind(key: Option<Key>) -> (Bound<Key>, Bound<Key>) {
    (key.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded)
}
