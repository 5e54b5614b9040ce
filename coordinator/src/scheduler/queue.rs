//! Sequences in an order, any of which leaves at the same small price.

use std::collections::BTreeMap;
use std::ops::Bound;

use proto::ids::SequenceId;

use super::types::Priority;

/// A place in a [`Queue`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket(u64);

/// The first ticket of those who queue up, behind that of who goes before everyone. Names, which are
/// tickets too, begin with it.
const FIRST: u64 = 1;

/// Sequences in an order.
#[derive(Debug, Default)]
pub(super) struct Queue {
    entries: BTreeMap<u64, SequenceId>,
}

impl Queue {
    /// Behind everyone.
    pub(super) fn push_back(&mut self, id: SequenceId) -> Ticket {
        let last = self.entries.last_key_value();
        let ticket = last.map_or(FIRST, |(last, _)| last + 1);
        self.entries.insert(ticket, id);
        Ticket(ticket)
    }

    /// By priority, then by name, which is the order of arrival: a queue that is entered so has no
    /// other order.
    pub(super) fn insert_by_arrival(&mut self, priority: Priority, id: SequenceId) -> Ticket {
        // Names leave the highest bit alone, but for those of probes, which do not arrive.
        let ticket = (priority as u64) << 63 | id.0;
        self.entries.insert(ticket, id);
        Ticket(ticket)
    }

    /// Before everyone, now and later; there may be one.
    pub(super) fn push_front(&mut self, id: SequenceId) -> Ticket {
        let ticket = 0;
        self.entries.insert(ticket, id);
        Ticket(ticket)
    }

    /// The first, who stays.
    pub(super) fn front(&self) -> Option<SequenceId> {
        self.entries.first_key_value().map(|(_, &id)| id)
    }

    /// The first, who leaves.
    pub(super) fn pop_front(&mut self) -> Option<SequenceId> {
        self.entries.pop_first().map(|(_, id)| id)
    }

    /// The first behind `after`, who stays.
    pub(super) fn next(&self, after: Option<Ticket>) -> Option<(Ticket, SequenceId)> {
        let from = after.map_or(Bound::Unbounded, |Ticket(after)| Bound::Excluded(after));
        let next = self.entries.range((from, Bound::Unbounded)).next();
        next.map(|(&ticket, &id)| (Ticket(ticket), id))
    }

    /// Takes out who has this ticket.
    pub(super) fn remove(&mut self, ticket: Ticket) {
        self.entries.remove(&ticket.0);
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// In order, with their tickets.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Ticket, SequenceId)> {
        self.entries.iter().map(|(&ticket, &id)| (Ticket(ticket), id))
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
