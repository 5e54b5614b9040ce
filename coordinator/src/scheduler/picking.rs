//! Whose rows go into the next step.

use bytes::Bytes;
use proto::step::Row;

use super::microbatch::{chunk_tokens, decode_steps};
use super::{PipelineScheduler, Stand};
use crate::tick::Tick;

/// The part of a step's tokens (one in so many) that decode rows leave to prefill when there is
/// any, so that many running answers never keep a new one from starting.
const PREFILL_SHARE: usize = 4;

impl PipelineScheduler {
    /// Rows to draw for, before all others: their sequences have waited for a whole round.
    pub(super) fn pick_draws(&mut self) -> (Vec<Row>, Bytes) {
        let most = (self.limits.step_tokens as usize).min(self.draw_ready.len());
        let ready: Vec<_> = (0..most).map_while(|_| self.draw_ready.pop_front()).collect();
        let rows = ready.into_iter().filter_map(|id| {
            let sequence = self.sequences.get_mut(&id)?;
            sequence.place = None;
            sequence.draw_row()
        });
        let (rows, states): (_, Vec<_>) = rows.unzip();
        (rows, states.concat().into())
    }

    /// Decode rows first, and how many they are; then prefill chunks in the order of admission.
    pub(super) fn pick_rows(&mut self, now: Tick) -> (Vec<Row>, usize) {
        let mut budget = self.limits.step_tokens as usize;
        let is_prefilling = !self.prefilling.is_empty();
        // Not "everyone who is ready": sequences would clump into one step, and all stages but
        // one would wait for it.
        let decoding = self.decoding_count();
        let shape = self.active.shape;
        let steps = decode_steps(&shape, decoding, budget);
        if !is_prefilling && self.active.decoding_steps() >= steps {
            // Who is ready joins those of the next step that comes back.
            return (Vec::new(), 0);
        }
        let reserved = if is_prefilling { (budget / PREFILL_SHARE).max(1) } else { 0 };
        let share = decoding.div_ceil(steps);
        let mut rows = self.pick_decodes(share.min(budget - reserved), now);
        let decode_rows = rows.len();
        let prompts = self.prefilling.iter().map(|(_, id)| self.sequences[&id].tokens_to_feed());
        let chunk = chunk_tokens(&shape, prompts.sum(), self.limits.step_tokens as usize);
        budget = chunk.min(budget - rows.len());
        let mut done = Vec::new();
        for (ticket, id) in self.prefilling.iter() {
            if budget == 0 {
                break;
            }
            let sequence = self.sequences.get_mut(&id).expect("who prefills is known");
            let row = sequence.next_row(budget);
            budget -= row.tokens.len();
            rows.push(row);
            // One that ends before the budget does so where scoring ends: its next chunk is another
            // row, and a step has one row of a sequence.
            if sequence.unsent() == 0 {
                sequence.place = None;
                done.push(ticket);
            }
        }
        for ticket in done {
            self.prefilling.remove(ticket);
        }
        (rows, decode_rows)
    }

    /// A row of each of the first of those that are ready, at most `most`; those that have to wait
    /// for a block keep their places.
    fn pick_decodes(&mut self, most: usize, now: Tick) -> Vec<Row> {
        let mut picked = Vec::new();
        let mut after = None;
        while picked.len() < most
            && let Some((ticket, id)) = self.decode_ready.next(after)
        {
            after = Some(ticket);
            if self.grow(id, now) {
                picked.push((ticket, id));
            }
        }
        // Rows are made last: one that was picked may have had to give its blocks to another.
        let rows = picked.into_iter().filter_map(|(ticket, id)| {
            let sequence = self.sequences.get_mut(&id)?;
            if sequence.place != Some((Stand::Decoding, ticket)) {
                return None;
            }
            sequence.place = None;
            self.decode_ready.remove(ticket);
            Some(sequence.next_row(1))
        });
        rows.collect()
    }
}
