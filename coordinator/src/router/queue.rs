//! Those who wait, by class and their callers' turns, and when each has waited for too long.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::time::Duration;

use proto::ids::SequenceId;

use super::Key;
use super::lines::{Lines, Place};
use crate::scheduler::{Caller, Priority, Sequence};
use crate::tick::Tick;

/// The last ones of a line that are looked at for one that has never run.
const LAST_ONES: usize = 16;

/// What a sequence is kept under. Names ascend by arrival, so of one caller one that comes back from a
/// pipeline stands before those that came after it.
fn key(sequence: &Sequence) -> Key {
    (sequence.priority(), sequence.id())
}

/// Those who wait. No step of work depends on how many they are.
#[derive(Debug)]
pub(super) struct Waiting {
    patience: Duration,
    all: BTreeMap<Key, Waiter>,
    /// Those of each class whom somebody takes as the pipelines are now.
    lines: [Lines; Priority::ALL.len()],
    late: BTreeSet<(Tick, Key)>,
    /// How many of them have never run, and their tokens.
    newcomers: usize,
    new_tokens: u64,
    sorting: Sorting,
}

#[derive(Debug)]
struct Waiter {
    sequence: Box<Sequence>,
    /// Nobody takes it as the pipelines are now.
    stranded: bool,
}

/// How far it is told anew who is stranded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sorting {
    Done,
    /// Those up to this one are told apart; the others wait for their turn to be.
    UpTo(Option<Key>),
}

/// Where one stands that is looked at: class and place in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    priority: Priority,
    place: Place,
}

impl Spot {
    /// Who stands there.
    pub(super) fn id(self) -> SequenceId {
        self.place.id
    }

    fn key(self) -> Key {
        (self.priority, self.place.id)
    }
}

impl Waiting {
    pub(super) fn new(patience: Duration) -> Self {
        Self {
            patience,
            all: BTreeMap::new(),
            lines: Default::default(),
            late: BTreeSet::new(),
            newcomers: 0,
            new_tokens: 0,
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
        if !sequence.was_admitted() {
            self.newcomers += 1;
            self.new_tokens += sequence.tokens_expected();
        }
        self.late.insert((self.late_at(&sequence), key));
        if !stranded {
            self.lines_of(key).insert(sequence.caller(), key.1);
        }
        self.all.insert(key, Waiter { sequence, stranded });
    }

    fn lines_of(&mut self, (priority, _): Key) -> &mut Lines {
        &mut self.lines[priority as usize]
    }

    /// The counters of a class.
    pub(super) fn lines(&mut self, priority: Priority) -> &mut Lines {
        &mut self.lines[priority as usize]
    }

    /// Who is next behind `after`, and stays. While it is told anew who is stranded, only those of
    /// whom that is known: nobody is overtaken by one who came later.
    pub(super) fn next(&self, after: Option<Spot>) -> Option<(Spot, &Sequence)> {
        let classes = Priority::ALL.into_iter();
        let mut spots = classes.filter_map(|priority| {
            let after = match after {
                Some(after) if priority < after.priority => return None,
                Some(after) if priority == after.priority => Some(after.place),
                _ => None,
            };
            let place = self.lines[priority as usize].next(after)?;
            Some(Spot { priority, place })
        });
        let spot = spots.next()?;
        self.known(spot)
    }

    /// Who is first of the next caller of the class behind `after`, and stays.
    pub(super) fn next_line(&self, after: Spot) -> Option<(Spot, &Sequence)> {
        let place = self.lines[after.priority as usize].next_line(after.place)?;
        self.known(Spot { place, ..after })
    }

    fn known(&self, spot: Spot) -> Option<(Spot, &Sequence)> {
        match self.sorting {
            Sorting::UpTo(last) if last.is_none_or(|last| spot.key() > last) => None,
            _ => self.all.get(&spot.key()).map(|waiter| (spot, &*waiter.sequence)),
        }
    }

    /// Takes one out.
    pub(super) fn take(&mut self, key: Key) -> Option<Box<Sequence>> {
        let Waiter { sequence, stranded } = self.all.remove(&key)?;
        self.late.remove(&(self.late_at(&sequence), key));
        if !stranded {
            self.lines_of(key).remove(sequence.caller(), key.1);
        }
        if !sequence.was_admitted() {
            self.newcomers -= 1;
            self.new_tokens -= sequence.tokens_expected();
        }
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

    /// Takes out one that has never run to make room for a newcomer: of batch for an interactive one,
    /// else the last of a caller for whom more wait than for its own.
    pub(super) fn pop_for(&mut self, newcomer: &Sequence) -> Option<Box<Sequence>> {
        let (priority, caller) = (newcomer.priority(), newcomer.caller());
        let is_new =
            |&key: &Key| self.all.get(&key).is_some_and(|waiter| !waiter.sequence.was_admitted());
        let find = |class: Priority, than: Option<Caller>| {
            let longest = self.lines[class as usize].longest(than).take(LAST_ONES);
            longest.map(|id| (class, id)).find(is_new)
        };
        let batch = (priority == Priority::Interactive).then(|| find(Priority::Batch, None));
        let key = batch.flatten().or_else(|| find(priority, Some(caller)))?;
        self.take(key)
    }

    /// Takes out one, stranded or not.
    pub(super) fn pop_first(&mut self) -> Option<Box<Sequence>> {
        let (&first, _) = self.all.first_key_value()?;
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
            let Some((&key, waiter)) = self.all.range_mut(behind(last)).next() else {
                self.sorting = Sorting::Done;
                return;
            };
            let strands = is_stranded(&waiter.sequence);
            if std::mem::replace(&mut waiter.stranded, strands) != strands {
                let caller: Caller = waiter.sequence.caller();
                match strands {
                    true => self.lines_of(key).remove(caller, key.1),
                    false => self.lines_of(key).insert(caller, key.1),
                }
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

    /// Tokens that they will probably take, prompts and answers.
    pub(super) fn new_tokens(&self) -> u64 {
        self.new_tokens
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }
}

fn behind(key: Option<Key>) -> (Bound<Key>, Bound<Key>) {
    (key.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded)
}
