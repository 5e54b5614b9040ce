//! Sequences in an order, any of which leaves at the same small price.

use std::collections::BTreeMap;
use std::ops::Bound;

use proto::ids::SequenceId;

use super::types::Priority;

/// A place in a [`Queue`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket {
    rank: Rank,
    /// Of its caller.
    turn: u64,
    number: u64,
}

impl Ticket {
    /// When its caller's turn was.
    pub(super) fn turn(self) -> u64 {
        self.turn
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// Before everyone.
    Front,
    Of(Priority),
}

/// Sequences in an order.
#[derive(Debug, Default)]
pub(super) struct Queue {
    entries: BTreeMap<Ticket, SequenceId>,
    /// The last number that was given to those who queue up.
    last: u64,
}

impl Queue {
    /// Behind everyone.
    pub(super) fn push_back(&mut self, id: SequenceId) -> Ticket {
        self.push_turn(Priority::ALL[Priority::ALL.len() - 1], u64::MAX, id)
    }

    /// By priority, then by turn; of one turn in the order in which they come.
    pub(super) fn push_turn(&mut self, priority: Priority, turn: u64, id: SequenceId) -> Ticket {
        self.last += 1;
        self.insert(Ticket { rank: Rank::Of(priority), turn, number: self.last }, id)
    }

    /// By priority, then by name, which is the order of arrival: a queue that is entered so has no
    /// other order.
    pub(super) fn insert_by_arrival(&mut self, priority: Priority, id: SequenceId) -> Ticket {
        self.insert_in_line(priority, 0, id)
    }

    /// By priority and line, in each by name.
    pub(super) fn insert_in_line(
        &mut self,
        priority: Priority,
        line: u64,
        id: SequenceId,
    ) -> Ticket {
        self.insert(Ticket { rank: Rank::Of(priority), turn: line, number: id.0 }, id)
    }

    /// Before everyone, now and later; there may be one.
    pub(super) fn push_front(&mut self, id: SequenceId) -> Ticket {
        self.insert(Ticket { rank: Rank::Front, turn: 0, number: 0 }, id)
    }

    fn insert(&mut self, ticket: Ticket, id: SequenceId) -> Ticket {
        self.entries.insert(ticket, id);
        ticket
    }

    /// Who goes before everyone.
    pub(super) fn foremost(&self) -> Option<(Ticket, SequenceId)> {
        let (&ticket, &id) = self.entries.first_key_value()?;
        (ticket.rank == Rank::Front).then_some((ticket, id))
    }

    /// The first of a line behind `after`, who stays.
    pub(super) fn next_in_line(
        &self,
        priority: Priority,
        line: u64,
        after: Option<Ticket>,
    ) -> Option<(Ticket, SequenceId)> {
        let rank = Rank::Of(priority);
        let first = Ticket { rank, turn: line, number: 0 };
        let last = Ticket { number: u64::MAX, ..first };
        let from = after.map_or(Bound::Included(first), Bound::Excluded);
        let next = self.entries.range((from, Bound::Included(last))).next();
        next.map(|(&ticket, &id)| (ticket, id))
    }

    /// The first of a class behind `after`, who stays.
    pub(super) fn next_of(
        &self,
        priority: Priority,
        after: Option<Ticket>,
    ) -> Option<(Ticket, SequenceId)> {
        let first = Ticket { rank: Rank::Of(priority), turn: 0, number: 0 };
        let last = Ticket { turn: u64::MAX, number: u64::MAX, ..first };
        let from = after.map_or(Bound::Included(first), Bound::Excluded);
        let next = self.entries.range((from, Bound::Included(last))).next();
        next.map(|(&ticket, &id)| (ticket, id))
    }

    /// The first, who stays.
    #[cfg(test)]
    pub(super) fn front(&self) -> Option<SequenceId> {
        self.entries.first_key_value().map(|(_, &id)| id)
    }

    /// The first, who leaves.
    pub(super) fn pop_front(&mut self) -> Option<SequenceId> {
        self.entries.pop_first().map(|(_, id)| id)
    }

    /// The first behind `after`, who stays.
    pub(super) fn next(&self, after: Option<Ticket>) -> Option<(Ticket, SequenceId)> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let next = self.entries.range((from, Bound::Unbounded)).next();
        next.map(|(&ticket, &id)| (ticket, id))
    }

    /// Takes out who has this ticket.
    pub(super) fn remove(&mut self, ticket: Ticket) {
        self.entries.remove(&ticket);
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// In order, with their tickets.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Ticket, SequenceId)> {
        self.entries.iter().map(|(&ticket, &id)| (ticket, id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_arrives_stands_by_priority_and_name_behind_who_goes_before_everyone() {
        let mut queue = Queue::default();
        let before = queue.push_front(SequenceId(1 << 63 | 7));
        queue.insert_by_arrival(Priority::Batch, SequenceId(2));
        queue.insert_by_arrival(Priority::Interactive, SequenceId(9));
        queue.insert_by_arrival(Priority::Interactive, SequenceId(1));
        let ids: Vec<_> = queue.iter().map(|(_, id)| id.0).collect();
        assert_eq!(ids, [1 << 63 | 7, 1, 9, 2]);
        queue.remove(before);
        assert_eq!(queue.pop_front(), Some(SequenceId(1)));
    }

    #[test]
    fn whoever_leaves_the_others_keep_their_order() {
        let mut queue = Queue::default();
        let two = queue.push_back(SequenceId(2));
        queue.push_back(SequenceId(3));
        queue.push_front(SequenceId(1));
        queue.push_back(SequenceId(4));
        assert_eq!((queue.front(), queue.len()), (Some(SequenceId(1)), 4));
        let first = queue.next(None).unwrap();
        assert_eq!(
            (first.1, queue.next(Some(first.0))),
            (SequenceId(1), Some((two, SequenceId(2))))
        );
        queue.remove(two);
        queue.remove(two);
        assert_eq!(queue.pop_front(), Some(SequenceId(1)));
        let ids: Vec<_> = queue.iter().map(|(_, id)| id.0).collect();
        assert_eq!(ids, [3, 4]);
        assert!(!queue.is_empty());
    }
}
