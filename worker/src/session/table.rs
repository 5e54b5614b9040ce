//! PURE. The newest generation seen of every sequence, in a table of limited size.

use std::collections::{BTreeMap, HashMap};

use proto::ids::{Generation, SequenceId};

/// When it is full, the sequence that was silent longest is forgotten. That is safe: a stale row
/// that slips through is still judged by the chain of its blocks.
#[derive(Debug)]
pub(super) struct Table {
    capacity: usize,
    entries: HashMap<SequenceId, Entry>,
    /// Sequences by the time they were last seen.
    by_age: BTreeMap<u64, SequenceId>,
    /// Counts admissions.
    now: u64,
}

#[derive(Debug)]
struct Entry {
    generation: Generation,
    last_seen: u64,
}

impl Table {
    pub(super) fn new(capacity: usize) -> Self {
        assert!(capacity > 0);
        Self { capacity, entries: HashMap::new(), by_age: BTreeMap::new(), now: 0 }
    }

    /// Notes a row's generation, or gives the newer one that was seen.
    pub(super) fn admit(
        &mut self,
        sequence: SequenceId,
        generation: Generation,
    ) -> Result<(), Generation> {
        if let Some(entry) = self.entries.get(&sequence) {
            if generation < entry.generation {
                return Err(entry.generation);
            }
            self.by_age.remove(&entry.last_seen);
        } else if self.entries.len() == self.capacity
            && let Some((_, oldest)) = self.by_age.pop_first()
        {
            self.entries.remove(&oldest);
        }
        self.now += 1;
        self.by_age.insert(self.now, sequence);
        self.entries.insert(sequence, Entry { generation, last_seen: self.now });
        Ok(())
    }

    /// Forgets a sequence that sends no more rows.
    pub(super) fn end(&mut self, sequence: SequenceId) {
        if let Some(entry) = self.entries.remove(&sequence) {
            self.by_age.remove(&entry.last_seen);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_generations_are_refused() {
        let mut table = Table::new(2);
        assert_eq!(table.admit(SequenceId(1), Generation(3)), Ok(()));
        assert_eq!(table.admit(SequenceId(1), Generation(2)), Err(Generation(3)));
        assert_eq!(table.admit(SequenceId(1), Generation(3)), Ok(()));
        assert_eq!(table.admit(SequenceId(1), Generation(4)), Ok(()));
        assert_eq!(table.admit(SequenceId(1), Generation(3)), Err(Generation(4)));
        table.end(SequenceId(1));
        assert_eq!(table.admit(SequenceId(1), Generation(0)), Ok(()));
    }

    #[test]
    fn the_longest_silent_one_makes_room() {
        let mut table = Table::new(2);
        table.admit(SequenceId(1), Generation(5)).unwrap();
        table.admit(SequenceId(2), Generation(5)).unwrap();
        table.admit(SequenceId(1), Generation(5)).unwrap();
        table.admit(SequenceId(3), Generation(5)).unwrap();
        assert_eq!(table.entries.len(), 2);
        assert_eq!(table.by_age.len(), 2);
        assert_eq!(table.admit(SequenceId(1), Generation(4)), Err(Generation(5)));
        assert_eq!(table.admit(SequenceId(2), Generation(4)), Ok(()), "2 was forgotten");
    }
}
