//! Who is admitted, and whose rows go into the next step.

use std::collections::VecDeque;

use bytes::Bytes;
use proto::step::Row;

use super::Scheduler;
use super::microbatch::{chunk_tokens, decode_steps};
use crate::tick::Tick;

/// The part of a step's tokens (one in so many) that decode rows leave to prefill when there is
/// any, so that many running answers never keep a new one from starting.
const PREFILL_SHARE: usize = 4;

impl Scheduler {
    /// Gives KV to those who wait, in their order. The first of the queue blocks the others when
    /// it does not fit: a long request is never overtaken for ever by short ones.
    pub(super) fn admit(&mut self, now: Tick) {
        let Some(active) = &mut self.active else { return };
        let mut running =
            self.sequences.len() - self.waiting.values().map(VecDeque::len).sum::<usize>();
        for queue in self.waiting.values_mut() {
            while let Some(&id) = queue.front() {
                if self.held || running >= self.limits.running_requests as usize {
                    return;
                }
                let sequence = self.sequences.get_mut(&id).expect("who waits is known");
                let Some(blocks) = active.blocks.take(sequence.blocks_needed()) else { return };
                sequence.admit(blocks, now);
                queue.pop_front();
                self.prefilling.push_back(id);
                running += 1;
            }
        }
    }

    /// Rows to draw for, before all others: their sequences have waited for a whole round.
    pub(super) fn pick_draws(&mut self) -> (Vec<Row>, Bytes) {
        let most = (self.limits.step_tokens as usize).min(self.draw_ready.len());
        let ready: Vec<_> = self.draw_ready.drain(..most).collect();
        let rows = ready.into_iter().filter_map(|id| self.sequences.get_mut(&id)?.draw_row(id));
        let (rows, states): (_, Vec<_>) = rows.unzip();
        (rows, states.concat().into())
    }

    /// Decode rows first, and how many they are; then prefill chunks in the order of admission.
    pub(super) fn pick_rows(&mut self) -> (Vec<Row>, usize) {
        let Some(active) = &self.active else { return (Vec::new(), 0) };
        let mut budget = self.limits.step_tokens as usize;
        let is_prefilling = !self.prefilling.is_empty();
        // Not "everyone who is ready": sequences would clump into one step, and all stages but
        // one would wait for it.
        let decoding = self.running_count() - self.prefilling.len();
        let steps = decode_steps(&active.shape, decoding, budget);
        if !is_prefilling && active.decoding_steps() >= steps {
            // Who is ready joins those of the next step that comes back.
            return (Vec::new(), 0);
        }
        let reserved = if is_prefilling { (budget / PREFILL_SHARE).max(1) } else { 0 };
        let share = decoding.div_ceil(steps);
        let decode_rows = share.min(budget - reserved).min(self.decode_ready.len());

        let mut rows = Vec::new();
        for id in self.decode_ready.drain(..decode_rows) {
            let sequence = self.sequences.get_mut(&id).expect("who is ready is known");
            rows.push(sequence.next_row(id, 1));
        }
        let prompts = self.prefilling.iter().map(|id| self.sequences[id].prompt_tokens());
        let chunk = chunk_tokens(&active.shape, prompts.sum(), self.limits.step_tokens as usize);
        budget = chunk.min(budget - rows.len());
        let mut done = 0;
        for &id in &self.prefilling {
            if budget == 0 {
                break;
            }
            let sequence = self.sequences.get_mut(&id).expect("who prefills is known");
            let row = sequence.next_row(id, budget);
            budget -= row.tokens.len();
            rows.push(row);
            if sequence.unsent() > 0 {
                // Ends before the budget only where scoring ends: its next chunk is another row,
                // and a step has one row of a sequence.
                continue;
            }
            done += 1;
        }
        if done > 0 {
            let sequences = &self.sequences;
            self.prefilling.retain(|id| sequences[id].unsent() > 0);
        }
        (rows, decode_rows)
    }
}
