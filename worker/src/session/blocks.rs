//! PURE. What each block of the KV cache holds: the hash of the tokens before it and after each
//! of its slots. A row may be computed only on blocks that chain to its prefix hash.

use std::collections::HashMap;

use proto::BLOCK_TOKENS;
use proto::ids::{BlockId, PrefixHash};
use proto::step::Row;

use super::{Segment, segments};

const SLOTS: usize = BLOCK_TOKENS as usize;

/// One block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockRecord {
    /// Of all tokens before the block.
    parent: PrefixHash,
    /// Of all tokens up to and with each slot; meaningful below `filled`.
    hashes: [PrefixHash; SLOTS],
    /// Slots that hold what `hashes` says.
    filled: usize,
}

impl BlockRecord {
    const EMPTY: Self =
        Self { parent: PrefixHash::EMPTY, hashes: [PrefixHash::EMPTY; SLOTS], filled: 0 };

    /// Puts a row's hashes into the slots of `segment`. Tokens that are there already change
    /// nothing: by exactness the engine wrote the same bits again, so what follows them stands.
    fn write(&mut self, segment: Segment, parent: PrefixHash, hashes: &[PrefixHash]) {
        if self.holds(segment, parent, hashes) {
            return;
        }
        if segment.begin == 0 {
            self.parent = parent;
        }
        let (begin, end) = (segment.begin as usize, segment.end as usize);
        self.hashes[begin..end].copy_from_slice(hashes);
        self.filled = end;
    }

    /// Whether the slots of `segment` already hold exactly these tokens after this prefix. The
    /// hashes cover the prefix, so beyond the first slot they say it all.
    fn holds(&self, segment: Segment, parent: PrefixHash, hashes: &[PrefixHash]) -> bool {
        let (begin, end) = (segment.begin as usize, segment.end as usize);
        self.filled >= end
            && self.hashes[begin..end] == *hashes
            && (begin > 0 || self.parent == parent)
    }
}

/// Blocks as they will be when the rows accepted so far in a step are computed.
#[derive(Debug, Default)]
pub(super) struct Overlay(HashMap<BlockId, BlockRecord>);

/// Every block of one engine.
#[derive(Debug)]
pub(super) struct Blocks {
    /// By block id; `None` until first written.
    records: Vec<Option<Box<BlockRecord>>>,
}

impl Blocks {
    pub(super) fn new(count: u32) -> Self {
        Self { records: (0..count).map(|_| None).collect() }
    }

    /// Whether the row's block list holds exactly the tokens that its hash before names. The
    /// row's block ids were checked.
    pub(super) fn holds_prefix(&self, overlay: &Overlay, row: &Row) -> bool {
        let mut hash = PrefixHash::EMPTY;
        let mut remaining = row.position as usize;
        for &block in &row.blocks {
            if remaining == 0 {
                break;
            }
            let needed = remaining.min(SLOTS);
            let Some(record) = overlay.0.get(&block).or_else(|| self.record(block)) else {
                return false;
            };
            if record.filled < needed || record.parent != hash {
                return false;
            }
            hash = record.hashes[needed - 1];
            remaining -= needed;
        }
        remaining == 0 && hash == row.prefix_hash_before
    }

    /// Forgets everything from the row's first slot on.
    pub(super) fn forget(&mut self, row: &Row) {
        for segment in segments(row) {
            if let Some(record) = &mut self.records[segment.block.0 as usize] {
                record.filled = record.filled.min(segment.begin as usize);
            }
        }
    }

    /// What [`write`](Self::write) will do, in the overlay only.
    pub(super) fn write_tentatively(
        &self,
        overlay: &mut Overlay,
        row: &Row,
        hashes: &[PrefixHash],
    ) {
        for (segment, parent, hashes) in parts(row, hashes) {
            let now = || self.record(segment.block).copied().unwrap_or(BlockRecord::EMPTY);
            let record = overlay.0.entry(segment.block).or_insert_with(now);
            record.write(segment, parent, hashes);
        }
    }

    /// Records what a computed row wrote.
    pub(super) fn write(&mut self, row: &Row, hashes: &[PrefixHash]) {
        for (segment, parent, hashes) in parts(row, hashes) {
            let record = self.records[segment.block.0 as usize]
                .get_or_insert_with(|| Box::new(BlockRecord::EMPTY));
            record.write(segment, parent, hashes);
        }
    }

    pub(super) fn filled(&self) -> usize {
        self.records.iter().flatten().filter(|record| record.filled > 0).count()
    }

    fn record(&self, block: BlockId) -> Option<&BlockRecord> {
        self.records[block.0 as usize].as_deref()
    }
}

/// Each segment of a row with the hash before it and the hashes of its slots.
fn parts<'a>(
    row: &'a Row,
    hashes: &'a [PrefixHash],
) -> impl Iterator<Item = (Segment, PrefixHash, &'a [PrefixHash])> {
    segments(row).map(move |segment| {
        let first = segment.first_token;
        let parent = first.checked_sub(1).map_or(row.prefix_hash_before, |last| hashes[last]);
        let count = (segment.end - segment.begin) as usize;
        (segment, parent, &hashes[first..first + count])
    })
}
