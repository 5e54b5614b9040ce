//! PURE. What each block of the KV cache holds: the hash of the tokens before it and after each
//! of its slots. A row may be computed only on blocks that chain to its prefix hash.

use std::collections::HashMap;

use proto::BLOCK_TOKENS;
use proto::ids::{BlockId, PrefixHash, SequenceId};
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

    /// Whether writing puts other tokens in the place of some that are there.
    fn is_rewritten(&self, segment: Segment, parent: PrefixHash, hashes: &[PrefixHash]) -> bool {
        self.filled > segment.begin as usize && !self.holds(segment, parent, hashes)
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
pub(super) struct Overlay {
    records: HashMap<BlockId, BlockRecord>,
    /// A block that a known chain goes through will hold other tokens.
    breaks_chains: bool,
}

/// The full blocks of one sequence that were found to hold its tokens.
#[derive(Debug)]
struct Chain {
    blocks: Vec<BlockId>,
    /// Of all tokens in them.
    hash: PrefixHash,
    /// The value of [`Blocks::breaks`] up to which this is known.
    breaks: u64,
}

/// Every block of one engine.
#[derive(Debug)]
pub(super) struct Blocks {
    /// By block id; `None` until first written.
    records: Vec<Option<Box<BlockRecord>>>,
    /// Records with `filled > 0`.
    filled: usize,
    /// What need not be looked at again in every step: a sequence's work must not grow with its
    /// length. As many as there are blocks, for a live sequence has at least one.
    chains: HashMap<SequenceId, Chain>,
    /// By block id: how many chains go through it.
    chained: Vec<u32>,
    /// Counts the times that a block of a chain lost tokens; then all chains are looked at anew.
    breaks: u64,
    /// Records that were looked at to find whether a prefix is held.
    visited: u64,
}

impl Blocks {
    pub(super) fn new(count: u32) -> Self {
        Self {
            records: (0..count).map(|_| None).collect(),
            filled: 0,
            chains: HashMap::new(),
            chained: vec![0; count as usize],
            breaks: 0,
            visited: 0,
        }
    }

    /// Whether the row's block list holds exactly the tokens that its hash before names. The
    /// row's block ids were checked.
    pub(super) fn holds_prefix(&mut self, overlay: &Overlay, row: &Row) -> bool {
        let known = self.known_chain(row).filter(|_| !overlay.breaks_chains);
        let (first, mut hash) =
            known.map_or((0, PrefixHash::EMPTY), |chain| (chain.blocks.len(), chain.hash));
        let mut remaining = row.position as usize - first * SLOTS;
        let mut visited = 0;
        for &block in &row.blocks[first..] {
            if remaining == 0 {
                break;
            }
            visited += 1;
            let needed = remaining.min(SLOTS);
            let record = overlay.records.get(&block).or_else(|| self.record(block));
            let Some(record) = record.filter(|r| r.filled >= needed && r.parent == hash) else {
                self.visited += visited;
                return false;
            };
            hash = record.hashes[needed - 1];
            remaining -= needed;
        }
        self.visited += visited;
        remaining == 0 && hash == row.prefix_hash_before
    }

    /// The chain of a row's sequence, if it is still whole and the row goes on from it.
    fn known_chain(&self, row: &Row) -> Option<&Chain> {
        self.chains.get(&row.sequence).filter(|chain| {
            chain.breaks == self.breaks
                && chain.blocks.len() <= row.position as usize / SLOTS
                && row.blocks.starts_with(&chain.blocks)
        })
    }

    /// Remembers the full blocks of a row whose prefix is held and which was written.
    fn note_chain(&mut self, row: &Row) {
        let full = (row.position as usize + row.tokens.len()) / SLOTS;
        if full == 0 {
            return self.end(row.sequence);
        }
        let Some(hash) = self.record(row.blocks[full - 1]).map(|record| record.hashes[SLOTS - 1])
        else {
            return;
        };
        if self.known_chain(row).is_none() {
            self.end(row.sequence);
            if self.chains.len() >= self.records.len() {
                // Sequences whose end was never told.
                self.chains.clear();
                self.chained.fill(0);
            }
            let chain = Chain { blocks: Vec::new(), hash, breaks: self.breaks };
            self.chains.insert(row.sequence, chain);
        }
        let Some(chain) = self.chains.get_mut(&row.sequence) else { return };
        chain.hash = hash;
        for &block in &row.blocks[chain.blocks.len()..full] {
            chain.blocks.push(block);
            self.chained[block.0 as usize] += 1;
        }
    }

    /// Forgets the chain of a sequence that sends no more rows.
    pub(super) fn end(&mut self, sequence: SequenceId) {
        let chain = self.chains.remove(&sequence);
        for block in chain.into_iter().flat_map(|chain| chain.blocks) {
            self.chained[block.0 as usize] -= 1;
        }
    }

    fn is_chained(&self, block: BlockId) -> bool {
        self.chained[block.0 as usize] > 0
    }

    /// Forgets everything from the row's first slot on.
    pub(super) fn forget(&mut self, row: &Row) {
        for segment in segments(row) {
            let begin = segment.begin as usize;
            let is_chained = self.is_chained(segment.block);
            let Some(record) = &mut self.records[segment.block.0 as usize] else { continue };
            if record.filled > begin {
                record.filled = begin;
                self.filled -= usize::from(begin == 0);
                self.breaks += u64::from(is_chained);
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
            let record = overlay.records.entry(segment.block).or_insert_with(now);
            overlay.breaks_chains |=
                self.is_chained(segment.block) && record.is_rewritten(segment, parent, hashes);
            record.write(segment, parent, hashes);
        }
    }

    /// Records what a computed row wrote, whose prefix is held.
    pub(super) fn write(&mut self, row: &Row, hashes: &[PrefixHash]) {
        for (segment, parent, hashes) in parts(row, hashes) {
            let is_chained = self.is_chained(segment.block);
            let record = self.records[segment.block.0 as usize]
                .get_or_insert_with(|| Box::new(BlockRecord::EMPTY));
            let is_rewritten = record.is_rewritten(segment, parent, hashes);
            self.breaks += u64::from(is_chained && is_rewritten);
            self.filled += usize::from(record.filled == 0);
            record.write(segment, parent, hashes);
        }
        self.note_chain(row);
    }

    pub(super) fn filled(&self) -> usize {
        self.filled
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

#[cfg(test)]
impl Blocks {
    /// What the counter must say.
    pub(super) fn count_filled(&self) -> usize {
        self.records.iter().flatten().filter(|record| record.filled > 0).count()
    }

    /// Records that were looked at so far.
    pub(super) fn visited(&self) -> u64 {
        self.visited
    }
}
