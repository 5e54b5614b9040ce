//! The callers of one class: who of them waits, and whose turn it is. Each has a counter of the tokens that he
//! was served, and the one with the least is next (virtual token counters). Who comes anew begins
//! where the others are, so idleness earns nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Unbounded};

use proto::ids::SequenceId;

use crate::scheduler::Caller;

/// Callers who wait for nothing and run nothing of whom it is kept how far they are ahead: about half a
/// megabyte. Of more, those who are least ahead are forgotten.
const MOST_IDLE: usize = 1 << 12;

/// How far behind the others' turn a caller may have to stand when he comes back, in tokens: sixteen contexts
/// of 4096. What was served while nobody wanted it is no debt for ever.
const MOST_AHEAD: u64 = 1 << 16;

/// The lines of one class, one for each caller.
#[derive(Debug, Default)]
pub(super) struct Lines {
    callers: BTreeMap<Caller, Line>,
    /// Those for whom somebody waits, by counter.
    order: BTreeSet<(u64, Caller)>,
    /// The same, by how many wait.
    by_length: BTreeSet<(usize, Caller)>,
    /// Those for whom nobody waits or runs, by counter.
    idle: BTreeSet<(u64, Caller)>,
    /// Whose line was the last to become empty, and his counter then.
    last: (Caller, u64),
}

#[derive(Debug, Default)]
struct Line {
    /// Tokens served, counted from where he began.
    served: u64,
    waiting: BTreeSet<SequenceId>,
    running: u32,
}

/// Where a sequence stands: its caller's counter, its caller, its own arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    served: u64,
    caller: Caller,
    pub(super) id: SequenceId,
}

impl Lines {
    /// Where those are whose turn it is.
    fn level(&self) -> u64 {
        let (last, counter) = self.last;
        let last = || self.callers.get(&last).map_or(counter, |line| line.served);
        self.order.first().map_or_else(last, |&(served, _)| served)
    }

    /// A sequence waits from now on.
    pub(super) fn insert(&mut self, caller: Caller, id: SequenceId) {
        let level = self.level();
        let line = self.callers.entry(caller).or_default();
        if line.waiting.is_empty() {
            self.idle.remove(&(line.served, caller));
            line.served = line.served.clamp(level, level.saturating_add(MOST_AHEAD));
            self.order.insert((line.served, caller));
        }
        self.by_length.remove(&(line.waiting.len(), caller));
        line.waiting.insert(id);
        self.by_length.insert((line.waiting.len(), caller));
    }

    /// A sequence waits no more.
    pub(super) fn remove(&mut self, caller: Caller, id: SequenceId) {
        let Some(line) = self.callers.get_mut(&caller) else { return };
        if !line.waiting.remove(&id) {
            return;
        }
        let waiting = line.waiting.len();
        self.by_length.remove(&(waiting + 1, caller));
        if waiting > 0 {
            self.by_length.insert((waiting, caller));
            return;
        }
        self.order.remove(&(line.served, caller));
        self.last = (caller, line.served);
        self.rest(caller);
    }

    /// Those who wait in the longest line, the last first, if it is longer by two than that of
    /// `caller`: with one of its own more that one's is no longer yet.
    pub(super) fn longest(&self, than: Option<Caller>) -> impl Iterator<Item = SequenceId> {
        let own = than.and_then(|caller| self.callers.get(&caller));
        let own = own.map_or(0, |line| line.waiting.len());
        let longest = self.by_length.last();
        let longest = longest.filter(|&&(length, _)| than.is_none() || length > own + 1);
        let line = longest.and_then(|(_, caller)| self.callers.get(caller));
        line.into_iter().flat_map(|line| line.waiting.iter().rev().copied())
    }

    /// A sequence of a caller begins to run.
    pub(super) fn begin(&mut self, caller: Caller) {
        let line = self.callers.entry(caller).or_default();
        if line.waiting.is_empty() {
            self.idle.remove(&(line.served, caller));
        }
        line.running += 1;
    }

    /// A sequence of a caller runs no more.
    pub(super) fn end(&mut self, caller: Caller) {
        let Some(line) = self.callers.get_mut(&caller) else { return };
        line.running = line.running.saturating_sub(1);
        self.rest(caller);
    }

    /// A caller was served so many tokens, or fewer than was thought.
    pub(super) fn charge(&mut self, caller: Caller, tokens: i64) {
        let Some(line) = self.callers.get_mut(&caller) else { return };
        let before = line.served;
        line.served = before.saturating_add_signed(tokens);
        for set in [&mut self.order, &mut self.idle] {
            if set.remove(&(before, caller)) {
                set.insert((line.served, caller));
            }
        }
    }

    /// Keeps of a caller who wants nothing how far he is ahead, for a while.
    fn rest(&mut self, caller: Caller) {
        let level = self.level();
        let Some(line) = self.callers.get(&caller) else { return };
        if !line.waiting.is_empty() || line.running > 0 {
            return;
        }
        self.idle.insert((line.served, caller));
        while let Some(&(served, least)) = self.idle.first()
            && (served <= level || self.idle.len() > MOST_IDLE)
        {
            self.idle.pop_first();
            self.callers.remove(&least);
        }
    }

    /// Who is next behind `after`, and stays.
    pub(super) fn next(&self, after: Option<Place>) -> Option<Place> {
        let first = |&(served, caller): &(u64, Caller)| {
            let id = *self.callers.get(&caller)?.waiting.first()?;
            Some(Place { served, caller, id })
        };
        let Some(Place { served, caller, id }) = after else {
            return self.order.first().and_then(first);
        };
        let line = self.callers.get(&caller).filter(|line| line.served == served);
        let behind = line.and_then(|line| line.waiting.range((Excluded(id), Unbounded)).next());
        match behind {
            Some(&id) => Some(Place { served, caller, id }),
            None => {
                self.order.range((Excluded((served, caller)), Unbounded)).next().and_then(first)
            }
        }
    }

    /// Who is first of the callers behind that of `after`.
    pub(super) fn next_line(&self, after: Place) -> Option<Place> {
        let behind = (Excluded((after.served, after.caller)), Unbounded);
        let &(served, caller) = self.order.range(behind).next()?;
        let id = *self.callers.get(&caller)?.waiting.first()?;
        Some(Place { served, caller, id })
    }

    /// Callers of whom something is kept.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.callers.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(number: u32) -> Caller {
        let mut caller = Caller::default();
        caller.0[..4].copy_from_slice(&number.to_le_bytes());
        caller
    }

    /// Who is next, and is served so many tokens.
    fn serve(lines: &mut Lines, tokens: i64) -> Option<u64> {
        let place = lines.next(None)?;
        lines.begin(place.caller);
        lines.remove(place.caller, place.id);
        lines.charge(place.caller, tokens);
        Some(place.id.0)
    }

    #[test]
    fn callers_take_turns_by_tokens_and_each_is_served_in_order() {
        let mut lines = Lines::default();
        (1..=4).for_each(|id| lines.insert(caller(1), SequenceId(id)));
        (5..=8).for_each(|id| lines.insert(caller(2), SequenceId(id)));
        // One of the first costs three of the second.
        let cost = |id: u64| if id <= 4 { 300 } else { 100 };
        let mut order = Vec::new();
        while let Some(place) = lines.next(None) {
            order.push(serve(&mut lines, cost(place.id.0)).unwrap());
        }
        assert_eq!(order, [1, 5, 6, 7, 2, 8, 3, 4]);
        assert_eq!(lines.next(None), None);
    }

    #[test]
    fn everybody_who_waits_is_found_once_and_the_next_caller_behind_each() {
        let mut lines = Lines::default();
        for (id, who) in [(1, 1), (2, 2), (3, 1), (4, 3), (5, 2)] {
            lines.insert(caller(who), SequenceId(id));
        }
        lines.charge(caller(1), 7);
        let places = std::iter::successors(lines.next(None), |&place| lines.next(Some(place)));
        assert_eq!(places.map(|place| place.id.0).collect::<Vec<_>>(), [2, 5, 4, 1, 3]);
    }

    #[test]
    fn idleness_earns_nothing_and_a_pause_pays_no_debt() {
        let mut lines = Lines::default();
        (1..=100).for_each(|id| lines.insert(caller(1), SequenceId(id)));
        (1..=50).for_each(|id| assert_eq!(serve(&mut lines, 1000), Some(id)));
        // He was not here, and takes turns from now on.
        (201..=210).for_each(|id| lines.insert(caller(2), SequenceId(id)));
        let turns: Vec<_> = (0..6).map_while(|_| serve(&mut lines, 1000)).collect();
        assert_eq!(turns.iter().filter(|&&id| id > 200).count(), 3, "{turns:?}");
        // Who takes a lot and goes is not forgotten at once ...
        lines.charge(caller(2), 5000);
        (201..=210).for_each(|id| lines.remove(caller(2), SequenceId(id)));
        (0..3).for_each(|_| lines.end(caller(2)));
        lines.insert(caller(2), SequenceId(211));
        (0..4).for_each(|_| assert!(serve(&mut lines, 1000).unwrap() < 200));
        // ... and owes no more than a bound.
        lines.charge(caller(2), 1 << 40);
        lines.remove(caller(2), SequenceId(211));
        lines.insert(caller(2), SequenceId(212));
        let waits = (0..).take_while(|_| {
            let turn = serve(&mut lines, 1000).unwrap();
            lines.insert(caller(1), SequenceId(300 + turn));
            turn != 212
        });
        assert!(waits.count() as u64 <= MOST_AHEAD / 1000 + 1);
    }

    #[test]
    fn what_is_kept_of_callers_who_are_gone_is_bounded() {
        let mut lines = Lines::default();
        lines.insert(caller(0), SequenceId(1));
        for number in 1..=3 * MOST_IDLE as u32 {
            let id = SequenceId(1 + u64::from(number));
            lines.insert(caller(number), id);
            lines.begin(caller(number));
            lines.remove(caller(number), id);
            lines.charge(caller(number), i64::from(number));
            lines.end(caller(number));
        }
        assert_eq!(lines.len(), MOST_IDLE + 1);
        // Once the others are as far nothing is owed, and nothing kept.
        lines.charge(caller(0), 1 << 20);
        lines.insert(caller(9), SequenceId(99_999));
        lines.remove(caller(9), SequenceId(99_999));
        assert_eq!(lines.len(), 1);
    }
}
