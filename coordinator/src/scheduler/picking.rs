//! Whose rows go into the next step.

use std::time::Duration;

use bytes::Bytes;
use proto::step::Row;

use super::microbatch::{chunk_tokens, decode_steps, in_flight_limit};
use super::queue::Ticket;
use super::shares::Crowd;
use super::sizing::Room;
use super::{PipelineScheduler, Priority, Stand};
use crate::tick::Tick;

/// The part of a step's tokens and time (one in so many) that decode rows leave to prefill when there is
/// any, so that many running answers never keep a new one from starting.
const PREFILL_SHARE: usize = 4;

/// Batch rows take at most one in so many parts of the time that the interactive rows of their step take: a
/// first token comes within one and a half times its idle time.
const BATCH_SHARE: u64 = 2;

/// A step that takes so long waits for the next one no more than a hundredth of it, if that is sent when it
/// comes back: rounds through the coordinator take less than a millisecond.
const LONG_STEP: Duration = Duration::from_millis(50);

/// What goes into one step.
#[derive(Debug, Default)]
pub(super) struct Picked {
    pub(super) rows: Vec<Row>,
    pub(super) decode_rows: usize,
    pub(super) room: Room,
}

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

    /// Decode rows first, and how many they are; then prefill chunks. Interactive ones, and then batch
    /// as far as it hinders them little.
    pub(super) fn pick_rows(&mut self, now: Tick) -> Picked {
        let [interactive, batch] = Priority::ALL.map(|priority| self.holders.crowd(priority));
        let (shape, most) = (self.active.shape, self.limits.step_tokens as usize);
        let is_alone = interactive.begun == 0;
        let foremost = if is_alone { batch } else { interactive };
        let decoding = interactive.decoding + batch.decoding;
        // Not "everyone who is ready": sequences would clump into one step, and all stages but
        // one would wait for it.
        let stages = shape.stages.max(1) as usize;
        let steps = decode_steps(&shape, decoding, most);
        let is_prefilling = !self.prefilling.is_empty();
        let fair = self.fair_ns(foremost, steps);
        // Where one has to be kept from taking more than his part of the time, the others are in every
        // step, and none is between theirs: so is batch in those of interactive ones on one stage.
        let is_kept = fair.is_some_and(|fair| {
            let whole = shape.cost.decode.at(decoding.div_ceil(steps) as u64);
            whole > fair || is_prefilling && u128::from(fair) < self.limits.step_time.as_nanos()
        });
        let is_mixed = stages == 1 && !is_alone && batch.begun > 0;
        let (steps, fair) = match is_kept || is_mixed {
            true if self.active.in_flight.len() >= stages => return Picked::default(),
            true => (stages, self.fair_ns(foremost, stages)),
            false => (steps, fair),
        };
        if !is_prefilling && self.active.decoding_steps() >= steps {
            // Who is ready joins those of the next step that comes back.
            return Picked::default();
        }
        let time = self.limits.step_time;
        let room = Room::new(shape.cost, self.fit.rate(), most, time, fair);
        let mut picked = Picked { room, ..Picked::default() };
        self.pick_probe(&mut picked);
        if !is_alone {
            let share = interactive.decoding.div_ceil(steps);
            self.pick_class(Priority::Interactive, interactive, share, &mut picked, now);
        }
        if batch.begun > 0 && self.may_send_batch() {
            if !is_alone {
                let tokens: usize = picked.rows.iter().map(|row| row.tokens.len()).sum();
                let usual = tokens.max(interactive.decoding.div_ceil(steps)) as u64;
                let line = shape.cost.decode;
                let free = line.step_ns.checked_div(line.row_ns).unwrap_or(0);
                picked.room.limit(((usual + free) / BATCH_SHARE).max(1) as usize);
            }
            let share = decoding.div_ceil(steps).saturating_sub(picked.decode_rows);
            self.pick_class(Priority::Batch, batch, share, &mut picked, now);
        }
        picked
    }

    /// Whether one more step of batch alone may be on its way: a first token of an interactive one waits for
    /// those that are. Several stages need theirs to be kept busy.
    fn may_send_batch(&self) -> bool {
        let stages = self.active.shape.stages;
        let is_long = stages == 1 && self.active.last_took() >= LONG_STEP;
        let most = if is_long { 1 } else { in_flight_limit(stages) - 1 };
        self.active.batch_steps() < most as usize
    }

    /// Whether one more step may be on its way, as far as newcomers are concerned: a stage alone has
    /// enough to do with one more than it computes, and they wait for what waits there.
    pub(super) fn may_queue(&self) -> bool {
        let is_short = self.active.last_took() < LONG_STEP;
        self.active.shape.stages > 1 || self.active.in_flight.len() <= 1 || is_short
    }

    /// How long a step may take for the sake of the callers who decode: as many times what the one with
    /// the fewest rows needs alone as there are callers. `None` for one caller, or if nobody knows.
    fn fair_ns(&self, crowd: Crowd, steps: usize) -> Option<u64> {
        let line = self.active.shape.cost.decode;
        if crowd.callers < 2 || crowd.decoding == 0 || line.row_ns == 0 {
            return None;
        }
        let alone = line.at(crowd.fewest.div_ceil(steps) as u64);
        Some(alone.saturating_mul(crowd.callers as u64))
    }

    /// The row of a probe goes before all others.
    fn pick_probe(&mut self, picked: &mut Picked) {
        let Some((ticket, id)) = self.prefilling.foremost() else { return };
        if let Some(probe) = self.sequences.get_mut(&id) {
            probe.place = None;
            picked.rows.push(probe.next_row(1));
            picked.room.take_chunk(0, 1);
        }
        self.prefilling.remove(ticket);
    }

    fn pick_class(
        &mut self,
        priority: Priority,
        crowd: Crowd,
        share: usize,
        picked: &mut Picked,
        now: Tick,
    ) {
        let most = picked.room.tokens();
        let reads = crowd.prefilling > 0;
        // Whoever only reads has as much of a step as those who decode.
        let part = most * crowd.readers / crowd.callers.max(1);
        let reserved = if reads { (most / PREFILL_SHARE).max(part).max(1) } else { 0 };
        let share = share.min(most.saturating_sub(reserved).max(1));
        // What the other class did with its part is nothing to this one.
        picked.room.free_decodes();
        if crowd.readers > 0 {
            picked.room.limit_decodes(crowd.callers - crowd.readers, crowd.callers);
        }
        self.pick_decodes(priority, share, picked, now);
        if reads {
            picked.room.keep_for_prompts(self.limits.step_time / PREFILL_SHARE as u32);
            self.pick_chunks(priority, picked);
        }
    }

    /// Chunks of the prompts of a class: callers by their turns, each one's in order of arrival.
    fn pick_chunks(&mut self, priority: Priority, picked: &mut Picked) {
        let prompts = self.prefilling.iter().map(|(_, id)| self.sequences[&id].tokens_to_feed());
        let shape = self.active.shape;
        let mut left = chunk_tokens(&shape, prompts.sum(), self.limits.step_tokens as usize);
        let reading = self.holders.callers(priority).filter(|(_, share)| share.prefilling > 0);
        let mut turns: Vec<_> =
            reading.map(|(caller, share)| (share.turn, share.line, caller)).collect();
        turns.sort_unstable();
        let mut first = true;
        for (_, line, caller) in turns {
            let mut after: Option<Ticket> = None;
            while let Some((ticket, id)) = self.prefilling.next_in_line(priority, line, after) {
                after = Some(ticket);
                let sequence = self.sequences.get_mut(&id).expect("who prefills is known");
                let (position, wanted) = (sequence.sent, sequence.unsent().min(left));
                let tokens = picked.room.chunk(position, wanted, first);
                if tokens == 0 {
                    return;
                }
                first = false;
                let row = sequence.next_row(tokens);
                let tokens = row.tokens.len();
                picked.rows.push(row);
                let cost = picked.room.take_chunk(position, tokens);
                left -= tokens;
                // One that ends before the budget does so where scoring ends: its next chunk is another
                // row, and a step has one row of a sequence.
                if sequence.unsent() == 0 {
                    sequence.place = None;
                    self.prefilling.remove(ticket);
                    self.holders.end_to_read(priority, caller);
                }
                self.holders.serve(priority, caller, cost, true);
                if left == 0 || picked.room.is_full() {
                    return;
                }
            }
        }
    }

    /// A row of each of the first of those of a class that are ready, at most `most`; those that have
    /// to wait for a block keep their places.
    fn pick_decodes(&mut self, priority: Priority, most: usize, picked: &mut Picked, now: Tick) {
        let mut ready = Vec::new();
        let mut after = None;
        while ready.len() < most
            && let Some((ticket, id)) = self.decode_ready.next_of(priority, after)
        {
            after = Some(ticket);
            let position = self.sequences.get(&id).map_or(0, |sequence| sequence.sent);
            // One goes in any case.
            let is_first = ready.is_empty() && picked.rows.is_empty();
            if !is_first && !picked.room.decodes(position) {
                break;
            }
            if self.grow(id, now) {
                let cost = picked.room.take_decode(position);
                ready.push((ticket, id, cost));
            }
        }
        // Rows are made last: one that was picked may have had to give its blocks to another.
        for (ticket, id, cost) in ready {
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            if sequence.place != Some((Stand::Decoding, ticket)) {
                continue;
            }
            sequence.place = None;
            let caller = sequence.caller();
            picked.rows.push(sequence.next_row(1));
            picked.decode_rows += 1;
            self.decode_ready.remove(ticket);
            self.holders.took_row(priority, ticket.turn());
            self.holders.serve(priority, caller, cost, false);
        }
    }
}
