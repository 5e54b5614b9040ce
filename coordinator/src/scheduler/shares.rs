//! Who holds blocks, and for which caller: what everybody has of a pipeline, and whose turn it is.

use std::collections::BTreeMap;

use super::Sequence;
use super::types::{Caller, Priority};

/// How those stand who hold blocks, by class and caller.
#[derive(Debug, Default)]
pub(super) struct Holders {
    classes: [Class; Priority::ALL.len()],
    callers: BTreeMap<(Priority, Caller), Share>,
    /// Numbers of callers that were given out.
    last_line: u64,
}

/// Of one class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Class {
    /// Those who may need more blocks.
    pub(super) growing: u32,
    /// Hold all that they ever will, and began with less.
    pub(super) grown_up: u32,
    /// Blocks that they hold, one that is shared as often as it is held.
    pub(super) held_blocks: u32,
    /// Those whose clients read nothing at present.
    parked: u32,
    /// The turn of the last decode row that was taken.
    row_turn: u64,
    /// The turn of the last whose prompt was worked on.
    turn: u64,
}

/// What a caller has here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Share {
    /// The number of his line among those whose prompts are worked on.
    pub(super) line: u64,
    /// His sequences that hold blocks.
    pub(super) begun: u32,
    /// Those of them that have tokens to be read.
    pub(super) prefilling: u32,
    /// And those whose clients read nothing at present.
    pub(super) parked: u32,
    pub(super) held_blocks: u32,
    /// Of his next decode row, in virtual time: rows of callers who decode at once alternate.
    row_turn: u64,
    /// Of his next chunk: what he was served here, in time or, if nobody knows that, in tokens.
    pub(super) turn: u64,
}

impl Share {
    /// Sequences that go on token by token.
    pub(super) fn decoding(&self) -> usize {
        self.begun.saturating_sub(self.prefilling + self.parked) as usize
    }
}

/// Those of one class who have begun, but for those whose clients read nothing at present.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Crowd {
    pub(super) callers: usize,
    /// Callers who only read prompts.
    pub(super) readers: usize,
    pub(super) begun: usize,
    /// Sequences that go on token by token ...
    pub(super) decoding: usize,
    /// ... and how many the caller has of them who has the fewest, but for those who have none.
    pub(super) fewest: usize,
    pub(super) prefilling: usize,
}

impl Holders {
    pub(super) fn class(&self, priority: Priority) -> Class {
        self.classes[priority as usize]
    }

    /// Of both classes.
    pub(super) fn growing(&self) -> u32 {
        self.classes.iter().map(|class| class.growing).sum()
    }

    pub(super) fn grown_up(&self) -> u32 {
        self.classes.iter().map(|class| class.grown_up).sum()
    }

    pub(super) fn share(&self, priority: Priority, caller: Caller) -> Share {
        self.callers.get(&(priority, caller)).copied().unwrap_or_default()
    }

    /// The callers of a class who have begun something.
    pub(super) fn callers(&self, priority: Priority) -> impl Iterator<Item = (Caller, Share)> {
        let all = (priority, Caller::default())..=(priority, Caller([u8::MAX; 16]));
        self.callers.range(all).map(|(&(_, caller), &share)| (caller, share))
    }

    /// Those of a class.
    pub(super) fn crowd(&self, priority: Priority) -> Crowd {
        let mut crowd = Crowd { fewest: usize::MAX, ..Crowd::default() };
        for (_, share) in self.callers(priority) {
            let decoding = share.decoding();
            let begun = share.begun.saturating_sub(share.parked) as usize;
            if begun == 0 {
                continue;
            }
            crowd.callers += 1;
            crowd.begun += begun;
            crowd.prefilling += share.prefilling as usize;
            crowd.decoding += decoding;
            match decoding {
                0 => crowd.readers += 1,
                few => crowd.fewest = crowd.fewest.min(few),
            }
        }
        crowd
    }

    /// After its blocks have changed.
    pub(super) fn add(&mut self, sequence: &Sequence) {
        self.count(sequence, |value, by| *value += by);
    }

    /// Before its blocks change.
    pub(super) fn take(&mut self, sequence: &Sequence) {
        self.count(sequence, |value, by| *value -= by);
    }

    fn count(&mut self, sequence: &Sequence, change: impl Fn(&mut u32, u32)) {
        // A probe is nobody's.
        if sequence.blocks.is_empty() || sequence.is_probe() {
            return;
        }
        let (priority, caller) = (sequence.priority(), sequence.caller());
        let own = sequence.held_blocks();
        let class = &mut self.classes[priority as usize];
        change(&mut class.growing, u32::from(sequence.is_growing()));
        change(&mut class.grown_up, u32::from(sequence.is_grown_up()));
        change(&mut class.held_blocks, own);
        let last_line = &mut self.last_line;
        let share = self.callers.entry((priority, caller)).or_insert_with(|| {
            *last_line += 1;
            let (row_turn, turn) = (class.row_turn, class.turn);
            Share { line: *last_line, row_turn, turn, ..Share::default() }
        });
        change(&mut share.begun, 1);
        change(&mut share.held_blocks, own);
    }

    /// A caller may have nothing here any more: then nothing is kept of him.
    pub(super) fn leave(&mut self, sequence: &Sequence) {
        let key = (sequence.priority(), sequence.caller());
        if self.callers.get(&key).is_some_and(|share| share.begun == 0) {
            self.callers.remove(&key);
        }
    }

    /// Its prompt is to be read. The number of its caller's line.
    pub(super) fn begin_to_read(&mut self, sequence: &Sequence) -> u64 {
        let (priority, caller) = (sequence.priority(), sequence.caller());
        let turn = self.classes[priority as usize].turn;
        let Some(share) = self.callers.get_mut(&(priority, caller)) else { return 0 };
        if share.prefilling == 0 {
            share.turn = share.turn.max(turn);
        }
        share.prefilling += 1;
        share.line
    }

    /// Its prompt has been read, or is read no more.
    pub(super) fn end_to_read(&mut self, priority: Priority, caller: Caller) {
        if let Some(share) = self.callers.get_mut(&(priority, caller)) {
            share.prefilling = share.prefilling.saturating_sub(1);
        }
    }

    /// One of a caller's could go on, but its client reads nothing at present.
    pub(super) fn park(&mut self, priority: Priority, caller: Caller) {
        self.classes[priority as usize].parked += 1;
        if let Some(share) = self.callers.get_mut(&(priority, caller)) {
            share.parked += 1;
        }
    }

    /// It is parked no more.
    pub(super) fn unpark(&mut self, priority: Priority, caller: Caller) {
        let class = &mut self.classes[priority as usize];
        class.parked = class.parked.saturating_sub(1);
        if let Some(share) = self.callers.get_mut(&(priority, caller)) {
            share.parked = share.parked.saturating_sub(1);
        }
    }

    /// Those of both classes who could go on, but are held.
    pub(super) fn parked(&self) -> usize {
        self.classes.iter().map(|class| class.parked as usize).sum()
    }

    /// Rows of a caller's that cost so much are in a step, of prompts or answers.
    pub(super) fn serve(&mut self, priority: Priority, caller: Caller, cost: u64, reads: bool) {
        if let Some(share) = self.callers.get_mut(&(priority, caller)) {
            if reads {
                self.classes[priority as usize].turn = share.turn;
            }
            // Who only goes on with answers for a while owes his next prompt nothing for it.
            if reads || share.prefilling > 0 {
                share.turn = share.turn.saturating_add(cost);
            }
        }
    }

    /// The turn of the next decode row of a sequence.
    pub(super) fn next_row(&mut self, priority: Priority, caller: Caller) -> u64 {
        let now = self.classes[priority as usize].row_turn;
        let Some(share) = self.callers.get_mut(&(priority, caller)) else { return now };
        let turn = share.row_turn.max(now);
        share.row_turn = turn + 1;
        turn
    }

    /// A decode row of this turn was taken.
    pub(super) fn took_row(&mut self, priority: Priority, turn: u64) {
        let now = &mut self.classes[priority as usize].row_turn;
        *now = turn.max(*now);
    }
}

impl Sequence {
    /// Blocks that it holds. One that is shared counts for each: whoever begins with what is cached has
    /// taken it from the others no less than who fills it.
    pub(super) fn held_blocks(&self) -> u32 {
        self.blocks.len() as u32
    }

    pub(super) fn is_growing(&self) -> bool {
        !self.blocks.is_empty() && self.may_outgrow(self.blocks.len() as u32)
    }

    /// The router counts it among those that grow, which is over.
    pub(super) fn is_grown_up(&self) -> bool {
        let grew = self.promised() > 0 && self.may_outgrow(self.promised());
        grew && !self.blocks.is_empty() && !self.is_growing()
    }
}
