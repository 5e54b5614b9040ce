//! Answers that nobody reads at present get no rows, so that they slow down none that is read. They
//! keep their blocks, and go on where they were when their clients read again.

use proto::ids::SequenceId;

use super::{PipelineScheduler, Stand};

impl PipelineScheduler {
    /// Its client is behind: it gets no more rows for its answer until [`Self::release`]. Rows on their
    /// way come back, and a prompt is read to its end. Unknown ids are ignored.
    pub fn hold(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.is_held = true;
        if let Some((Stand::Decoding, ticket)) = sequence.place {
            sequence.place = None;
            self.decode_ready.remove(ticket);
            self.park(id);
        }
    }

    /// Its client reads again. Unknown ids, and those that are not held, are ignored.
    pub fn release(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.is_held = false;
        if std::mem::take(&mut sequence.is_parked) {
            self.holders.unpark(sequence.priority(), sequence.caller());
            self.enqueue(Stand::Decoding, id);
        }
    }

    /// It could go on, but is held.
    pub(super) fn park(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.is_parked = true;
        self.holders.park(sequence.priority(), sequence.caller());
    }
}
