//! The prefix cache: sequences whose tokens begin alike, and who share a salt, share the KV of their
//! full blocks. What somebody is computing is waited for, so that it is computed once.
//!
//! A block is known from when the step that filled it came back well: then every stage holds it. By
//! exactness it has the same bits whoever fills it, so going on from it changes no token. Prompts that
//! are scored go on from nothing: their scores are made with their rows.

use std::collections::{BTreeMap, BTreeSet};

use proto::BLOCK_TOKENS;
use proto::ids::{BlockId, SequenceId};

use super::blocks::BlockKey;
use super::{PipelineScheduler, Sequence};

#[cfg(test)]
mod tests;

const TOKENS: usize = BLOCK_TOKENS as usize;

/// What is being computed, and who waits for it.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    /// Blocks that will be known, and whose rows fill them.
    computing: BTreeMap<BlockKey, SequenceId>,
    /// Those who wait for one of them.
    awaiting: BTreeSet<(BlockKey, SequenceId)>,
}

/// What a sequence may go on from.
#[derive(Debug, Default)]
pub(super) struct Prefix {
    /// Its first blocks.
    pub(super) blocks: Vec<BlockId>,
    /// The last block that it could go on from if it waited: somebody computes it.
    pub(super) awaited: Option<BlockKey>,
}

impl Prefixes {
    /// How many wait.
    pub(super) fn awaiting_count(&self) -> usize {
        self.awaiting.len()
    }
}

impl PipelineScheduler {
    /// Looks for the first blocks of a sequence.
    pub(super) fn find_prefix(&self, sequence: &Sequence) -> Prefix {
        let mut found = Prefix::default();
        if !self.limits.prefix_cache || sequence.scores() {
            return found;
        }
        for block in 0..sequence.shareable_blocks() {
            let key = sequence.key(block);
            match self.active.blocks.find(&key, sequence.tokens_of(block)) {
                Some(known) if found.awaited.is_none() => found.blocks.push(known),
                _ if self.is_worth_waiting(sequence, &key) => found.awaited = Some(key),
                _ => break,
            }
        }
        found
    }

    /// Whether somebody computes this whose turn is no later than that of a sequence: an interactive one
    /// waits for no batch.
    fn is_worth_waiting(&self, sequence: &Sequence, key: &BlockKey) -> bool {
        let computes = self.prefixes.computing.get(key).and_then(|id| self.sequences.get(id));
        computes.is_some_and(|computes| computes.priority() <= sequence.priority())
    }

    /// A sequence waits until `key` is known, or nobody computes it any more.
    pub(super) fn await_prefix(&mut self, id: SequenceId, key: BlockKey) {
        let Some(mut sequence) = self.sequences.remove(&id) else { return };
        self.leave_place(&mut sequence);
        sequence.awaits = Some(key);
        self.prefixes.awaiting.insert((key, id));
        self.sequences.insert(id, sequence);
    }

    /// A sequence begins with its first `shared` blocks known: others that need those after them, as
    /// far as its tokens are known, wait for it.
    pub(super) fn compute_prefix(&mut self, id: SequenceId, shared: usize) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.published = shared;
        sequence.computes = shared;
        if !self.limits.prefix_cache {
            return;
        }
        sequence.computes = sequence.feed_end() / TOKENS;
        for block in shared..sequence.computes {
            self.prefixes.computing.entry(sequence.key(block)).or_insert(id);
        }
    }

    /// The first `end` tokens of a sequence have been computed.
    pub(super) fn publish_prefix(&mut self, id: SequenceId, end: u32) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let full = end as usize / TOKENS;
        if !self.limits.prefix_cache || full <= sequence.published || self.probe == Some(id) {
            return;
        }
        let mut keys = Vec::with_capacity(full - sequence.published);
        for block in sequence.published..full {
            let key = sequence.key(block);
            let tokens = sequence.tokens_of(block);
            self.active.blocks.publish(sequence.blocks[block], key, tokens);
            keys.push(key);
        }
        sequence.published = full;
        for key in keys {
            self.stop_computing(key, id);
        }
    }

    /// A sequence leaves its pipeline or begins again: nobody waits for it any more, nor it for others.
    pub(super) fn leave_prefix(&mut self, sequence: &mut Sequence) {
        let id = sequence.id();
        if let Some(key) = sequence.awaits.take() {
            self.prefixes.awaiting.remove(&(key, id));
        }
        for block in sequence.published..sequence.computes {
            self.stop_computing(sequence.key(block), id);
        }
        (sequence.published, sequence.computes) = (0, 0);
    }

    /// Those who waited for it arrive again: they find it, or one of them computes it.
    fn stop_computing(&mut self, key: BlockKey, id: SequenceId) {
        if self.prefixes.computing.get(&key) != Some(&id) {
            return;
        }
        self.prefixes.computing.remove(&key);
        let all = (key, SequenceId(0))..=(key, SequenceId(u64::MAX));
        let woken: Vec<_> = self.prefixes.awaiting.range(all).map(|&(_, id)| id).collect();
        for id in woken {
            self.prefixes.awaiting.remove(&(key, id));
            if let Some(mut sequence) = self.sequences.remove(&id) {
                sequence.awaits = None;
                self.arrive(sequence);
            }
        }
    }
}

impl Sequence {
    /// What is known of its block number `block` once that is full.
    fn key(&self, block: usize) -> BlockKey {
        BlockKey { salt: self.request.salt, hash: self.log.hash_at((block + 1) * TOKENS) }
    }

    /// The tokens of its block number `block`, which is full.
    fn tokens_of(&self, block: usize) -> &[u32] {
        &self.log.tokens()[block * TOKENS..(block + 1) * TOKENS]
    }

    /// What its prompt begins with, shorter ones first: its first block, the first two, four, eight …
    pub(crate) fn beginnings(&self) -> impl Iterator<Item = BlockKey> {
        let full = self.log.prompt().len() / TOKENS;
        let ends = std::iter::successors(Some(1usize), |&blocks| blocks.checked_mul(2));
        ends.take_while(move |&blocks| blocks <= full).map(|blocks| self.key(blocks - 1))
    }

    /// How many blocks it may go on from: the last token that is known is computed for what comes
    /// after it.
    fn shareable_blocks(&self) -> usize {
        (self.log.tokens().len() - 1) / TOKENS
    }
}

#[cfg(test)]
impl PipelineScheduler {
    /// Whether it is known what a block holds, so that nobody may write it.
    pub(crate) fn is_known(&self, block: BlockId) -> bool {
        self.active.blocks.is_known(block)
    }

    /// Whoever waits does so for one that computes, who waits for nobody.
    pub(super) fn check_prefixes(&self) {
        for (key, id) in &self.prefixes.computing {
            let sequence = &self.sequences[id];
            assert!(!sequence.blocks.is_empty() && sequence.awaits.is_none(), "{id} computes");
            let mut blocks = sequence.published..sequence.computes;
            assert!(blocks.any(|block| sequence.key(block) == *key), "{id} does not fill it");
        }
        for (key, id) in &self.prefixes.awaiting {
            assert!(self.prefixes.computing.contains_key(key), "{id} waits for nobody");
            assert_eq!(self.sequences[id].awaits, Some(*key));
        }
        let waiting = self.sequences.values().filter(|sequence| sequence.awaits.is_some());
        assert_eq!(waiting.count(), self.prefixes.awaiting.len());
    }
}
