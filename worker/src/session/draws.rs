//! PURE. Whose tokens an earlier stage may say it has drawn: those of rows whose residual stream
//! went out of this stage and was not followed by another.

use std::collections::{BTreeMap, HashMap};

use proto::ids::{Generation, PrefixHash, SequenceId};
use proto::step::{Output, Row, RowStatus, Step};

/// The last row of each sequence whose residual stream went out here. A draw is refused unless it
/// is of that row: another position, history or generation was not computed for it.
#[derive(Debug)]
pub(crate) struct Draws {
    capacity: usize,
    due: HashMap<SequenceId, Due>,
    /// Sequences by when they were noted.
    by_age: BTreeMap<u64, SequenceId>,
    /// Counts what was noted.
    now: u64,
}

#[derive(Debug)]
struct Due {
    generation: Generation,
    position: u32,
    hash_after: PrefixHash,
    noted: u64,
}

impl Draws {
    /// Room for `capacity` sequences; the one noted longest ago makes room for another.
    pub(crate) fn new(capacity: usize) -> Self {
        assert!(capacity > 0);
        Self { capacity, due: HashMap::new(), by_age: BTreeMap::new(), now: 0 }
    }

    /// Notes what a step that was computed here lets be drawn, and forgets sequences that ended.
    pub(crate) fn note(&mut self, step: &Step) {
        for row in &step.rows {
            if row.output == Output::State && row.status == RowStatus::Ok {
                self.note_row(row);
            }
        }
        for sequence in &step.ended_sequences {
            self.forget(*sequence);
        }
    }

    fn note_row(&mut self, row: &Row) {
        self.forget(row.sequence);
        while self.due.len() >= self.capacity
            && let Some((_, oldest)) = self.by_age.pop_first()
        {
            self.due.remove(&oldest);
        }
        self.now += 1;
        self.by_age.insert(self.now, row.sequence);
        let due = Due {
            generation: row.generation,
            position: row.position + row.tokens.len() as u32 - 1,
            hash_after: row.prefix_hash_after,
            noted: self.now,
        };
        self.due.insert(row.sequence, due);
    }

    fn forget(&mut self, sequence: SequenceId) {
        if let Some(due) = self.due.remove(&sequence) {
            self.by_age.remove(&due.noted);
        }
    }

    /// Whether every row of a step that an earlier stage has drawn was due.
    ///
    /// # Errors
    ///
    /// What is wrong with the first that was not, for people.
    pub(crate) fn check(&self, step: &Step) -> Result<(), String> {
        step.rows.iter().try_for_each(|row| self.check_row(row))
    }

    fn check_row(&self, row: &Row) -> Result<(), String> {
        let Row { sequence, generation, position, .. } = row;
        if row.prefix_hash_before.then_all(&row.tokens) != row.prefix_hash_after {
            return Err(format!("the tokens of sequence {sequence} do not lead to its hash after"));
        }
        let is_due = row.tokens.len() == 1
            && self.due.get(sequence).is_some_and(|due| {
                due.generation == *generation
                    && due.position == *position
                    && due.hash_after == row.prefix_hash_after
            });
        if is_due {
            return Ok(());
        }
        Err(format!(
            "a token of sequence {sequence} (generation {generation}) is said to be drawn at \
             position {position}, which was not due"
        ))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proto::ids::{Epoch, Incarnation, PipelineId, StepId, Term};
    use proto::step::{Sampled, StepHeader};

    use super::*;
    use crate::tests::harness::row;

    fn step(rows: Vec<Row>) -> Step {
        Step {
            header: StepHeader {
                pipeline: PipelineId(1),
                epoch: Epoch(1),
                term: Term(1),
                dst_incarnation: Incarnation([0; 16]),
                step: StepId(1),
                acked_step: StepId(0),
                deadline_remaining: std::time::Duration::ZERO,
            },
            rows,
            ended_sequences: Vec::new(),
            stage_times: Vec::new(),
            activations: Bytes::new(),
        }
    }

    fn drawn(sequence: u64, position: u32) -> Row {
        let sampled = Sampled { token: 1, logprob: None, top: Vec::new() };
        row(sequence, position, 1, Output::Drawn(Box::new(sampled)))
    }

    #[test]
    fn only_the_row_that_went_out_is_drawn() {
        let mut draws = Draws::new(8);
        let refused = |draws: &Draws, row: Row| draws.check(&step(vec![row])).unwrap_err();
        assert!(refused(&draws, drawn(1, 4)).contains("not due"), "nothing went out");
        draws.note(&step(vec![row(1, 0, 5, Output::State), row(2, 0, 5, Output::None)]));
        draws.check(&step(vec![drawn(1, 4)])).unwrap();
        draws.check(&step(vec![drawn(1, 4)])).expect("a step may come again");
        refused(&draws, drawn(2, 4));
        refused(&draws, drawn(1, 5));
        refused(&draws, Row { generation: Generation(2), ..drawn(1, 4) });
        let mut other = drawn(1, 4);
        other.tokens[0] ^= 1;
        assert!(refused(&draws, other.clone()).contains("hash after"));
        other.prefix_hash_after = other.prefix_hash_before.then_all(&other.tokens);
        refused(&draws, other);
        draws.check(&step(vec![drawn(1, 4), drawn(2, 4)])).expect_err("all rows must be due");
        // The next row takes its place; the end takes it away.
        draws.note(&step(vec![row(1, 5, 1, Output::State)]));
        refused(&draws, drawn(1, 4));
        draws.check(&step(vec![drawn(1, 5)])).unwrap();
        let mut last = step(vec![]);
        last.ended_sequences = vec![SequenceId(1)];
        draws.note(&last);
        refused(&draws, drawn(1, 5));
    }

    #[test]
    fn no_more_is_remembered_than_agreed() {
        let mut draws = Draws::new(2);
        for sequence in 1..=3 {
            draws.note(&step(vec![row(sequence, 0, 1, Output::State)]));
        }
        assert_eq!((draws.due.len(), draws.by_age.len()), (2, 2));
        draws.check(&step(vec![drawn(1, 0)])).expect_err("the oldest was forgotten");
        draws.check(&step(vec![drawn(2, 0), drawn(3, 0)])).unwrap();
    }
}
