//! The KV blocks of one pipeline at one epoch: who holds which, and what the full ones hold.

use std::collections::{BTreeMap, VecDeque};

use proto::BLOCK_TOKENS;
use proto::ids::{BlockId, PrefixHash};

/// What a full block holds: its tokens and all before them, of sequences that share a salt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BlockKey {
    pub(crate) salt: PrefixHash,
    /// Of all tokens up to the end of the block.
    pub(crate) hash: PrefixHash,
}

/// Who holds which block.
///
/// A block has any number of holders: whoever shares one only reads it, because it is full. One that
/// nobody holds any more is free for others only when every step that names it has completed: a
/// stage may still be about to write it. A new epoch begins with a new pool, which is how blocks of
/// fenced steps come back.
///
/// A free block that holds what is known may be shared again, until it is taken for other tokens:
/// the one that was free longest first.
#[derive(Debug)]
pub(super) struct BlockPool {
    /// Hold nothing of use. First given back, first taken: a block rests as long as it can.
    free: VecDeque<BlockId>,
    /// Free, and hold what is known; by the order in which they came here.
    cached: BTreeMap<u64, BlockId>,
    /// Which block holds what.
    known: BTreeMap<BlockKey, BlockId>,
    blocks: Vec<Block>,
    /// How many have holders.
    held: u32,
    /// Counts blocks that came to `cached`.
    clock: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Block {
    holders: u32,
    /// Steps on their way that name it.
    pins: u32,
    /// What it holds, if `known` leads here.
    key: Option<BlockKey>,
    /// Its tokens then: a key is a hash, which two prompts may share.
    tokens: [u32; BLOCK_TOKENS as usize],
    /// Its place in `cached`.
    cached_at: Option<u64>,
}

impl BlockPool {
    /// `count` free blocks, `0..count`.
    pub(super) fn new(count: u32) -> Self {
        Self {
            free: (0..count).map(BlockId).collect(),
            cached: BTreeMap::new(),
            known: BTreeMap::new(),
            blocks: vec![Block::default(); count as usize],
            held: 0,
            clock: 0,
        }
    }

    /// Takes `count` blocks for one holder to write, all or none.
    pub(super) fn take(&mut self, count: u32) -> Option<Vec<BlockId>> {
        if self.free_count() < count {
            return None;
        }
        let mut taken = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let id = match self.free.pop_front() {
                Some(id) => id,
                None => self.evict()?,
            };
            self.block(id).holders = 1;
            taken.push(id);
        }
        self.held += count;
        Some(taken)
    }

    /// The block that was free longest; what it holds is not known any more.
    fn evict(&mut self) -> Option<BlockId> {
        let (_, id) = self.cached.pop_first()?;
        self.block(id).cached_at = None;
        self.disown(id);
        Some(id)
    }

    fn disown(&mut self, id: BlockId) {
        if let Some(key) = self.block(id).key.take() {
            self.known.remove(&key);
        }
    }

    /// The block that holds this, and these tokens.
    pub(super) fn find(&self, key: &BlockKey, tokens: &[u32]) -> Option<BlockId> {
        let id = self.known.get(key).copied()?;
        (self.blocks[id.0 as usize].tokens == *tokens).then_some(id)
    }

    /// How many of these are free.
    pub(super) fn free_among(&self, blocks: &[BlockId]) -> u32 {
        let is_free = |id: &&BlockId| self.blocks[id.0 as usize].cached_at.is_some();
        blocks.iter().filter(is_free).count() as u32
    }

    /// One more holds these, to read them; they were [found](Self::find).
    pub(super) fn share(&mut self, blocks: &[BlockId]) {
        for &id in blocks {
            let block = self.block(id);
            assert!(block.key.is_some(), "block {id} is shared, and nobody knows what it holds");
            block.holders += 1;
            let (holders, cached_at) = (block.holders, block.cached_at.take());
            if let Some(at) = cached_at {
                self.cached.remove(&at);
            }
            self.held += u32::from(holders == 1);
        }
    }

    /// A holder has filled a block with this; from now on others may share it. Nothing changes if
    /// another block is known to hold it, or this one already is.
    pub(super) fn publish(&mut self, id: BlockId, key: BlockKey, tokens: &[u32]) {
        assert!(self.block(id).holders > 0, "block {id} was filled by nobody");
        if self.block(id).key.is_none()
            && !self.known.contains_key(&key)
            && let Ok(tokens) = tokens.try_into()
        {
            self.block(id).key = Some(key);
            self.block(id).tokens = tokens;
            self.known.insert(key, id);
        }
    }

    /// Whatever these hold, a stage has lost it: nobody shares them any more who does not already.
    pub(super) fn forget(&mut self, blocks: &[BlockId]) {
        for &id in blocks {
            self.disown(id);
        }
    }

    /// A holder needs them no more. The last ones are taken for others first: without those before
    /// them they are of no use.
    pub(super) fn give_back(&mut self, blocks: &[BlockId]) {
        for &id in blocks.iter().rev() {
            let block = self.block(id);
            assert!(block.holders > 0, "block {id} was given back twice");
            block.holders -= 1;
            if block.holders == 0 {
                self.held -= 1;
                self.settle(id);
            }
        }
    }

    /// A step that names them was sent.
    pub(super) fn pin(&mut self, blocks: &[BlockId]) {
        for &id in blocks {
            self.block(id).pins += 1;
        }
    }

    /// A step that names them has completed.
    pub(super) fn unpin(&mut self, blocks: &[BlockId]) {
        for &id in blocks.iter().rev() {
            let block = self.block(id);
            assert!(block.pins > 0, "block {id} was completed more often than sent");
            block.pins -= 1;
            self.settle(id);
        }
    }

    /// Frees a block if nobody holds it and no step names it.
    fn settle(&mut self, id: BlockId) {
        let clock = self.clock + 1;
        let block = self.block(id);
        if block.holders > 0 || block.pins > 0 || block.cached_at.is_some() {
            return;
        }
        if block.key.is_some() {
            block.cached_at = Some(clock);
            self.clock = clock;
            self.cached.insert(clock, id);
        } else {
            self.free.push_back(id);
        }
    }

    /// Blocks that nobody holds and that a step on its way still names.
    pub(super) fn returning_count(&self) -> u32 {
        self.total() - self.held - self.free_count()
    }

    /// Blocks that may be taken.
    pub(super) fn free_count(&self) -> u32 {
        (self.free.len() + self.cached.len()) as u32
    }

    /// All blocks.
    pub(super) fn total(&self) -> u32 {
        self.blocks.len() as u32
    }

    fn block(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id.0 as usize]
    }
}

#[cfg(test)]
impl BlockPool {
    /// Every block is in one place, `holders` says how many hold each, and what is known leads to
    /// what says so.
    pub(super) fn check(&self, holders: &BTreeMap<BlockId, u32>) {
        for (id, block) in (0..).map(BlockId).zip(&self.blocks) {
            assert_eq!(block.holders, holders.get(&id).copied().unwrap_or(0), "holders of {id}");
            let places = [
                block.holders > 0 || block.pins > 0,
                self.free.iter().any(|free| *free == id),
                block.cached_at.is_some_and(|at| self.cached.get(&at) == Some(&id)),
            ];
            assert_eq!(places.iter().filter(|is| **is).count(), 1, "{id}: {places:?}");
            assert!(block.key.is_none_or(|key| self.known.get(&key) == Some(&id)));
        }
        let known = self.blocks.iter().filter(|block| block.key.is_some()).count();
        assert_eq!(self.known.len(), known);
        assert_eq!(self.held as usize, holders.len());
    }

    /// Whether it is known what a block holds.
    pub(super) fn is_known(&self, id: BlockId) -> bool {
        self.blocks[id.0 as usize].key.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_returns_when_given_back_and_no_step_names_it() {
        let mut pool = BlockPool::new(3);
        let mine = pool.take(2).unwrap();
        assert_eq!(pool.take(2), None, "all or none");
        pool.pin(&mine);
        pool.pin(&mine[..1]);
        pool.give_back(&mine);
        assert_eq!(pool.free_count(), 1, "two steps are on their way");
        assert_eq!(pool.returning_count(), 2);
        pool.unpin(&mine);
        assert_eq!(pool.free_count(), 2, "one still names the first block");
        pool.unpin(&mine[..1]);
        assert_eq!((pool.free_count(), pool.returning_count(), pool.total()), (3, 0, 3));
    }

    fn key(number: u8) -> BlockKey {
        BlockKey { salt: PrefixHash::EMPTY, hash: PrefixHash([number; 16]) }
    }

    /// Those of a block that this test says holds them.
    fn tokens(number: u8) -> [u32; BLOCK_TOKENS as usize] {
        [number.into(); BLOCK_TOKENS as usize]
    }

    #[test]
    fn two_prompts_of_one_hash_share_nothing() {
        let mut pool = BlockPool::new(2);
        let mine = pool.take(2).unwrap();
        pool.publish(mine[0], key(1), &tokens(1));
        assert_eq!(pool.find(&key(1), &tokens(1)), Some(mine[0]));
        assert_eq!(pool.find(&key(1), &tokens(2)), None, "another with the same hash");
        pool.publish(mine[1], key(1), &tokens(2));
        assert_eq!(pool.find(&key(1), &tokens(1)), Some(mine[0]), "the first stays");
        pool.publish(mine[1], key(2), &tokens(2)[1..]);
        assert_eq!(pool.find(&key(2), &tokens(2)), None, "one that is not full is not known");
        pool.check(&mine.iter().map(|&block| (block, 1)).collect());
    }

    #[test]
    fn a_block_that_is_known_is_shared_until_it_is_taken() {
        let mut pool = BlockPool::new(4);
        let mine = pool.take(3).unwrap();
        for (number, &block) in (0..).zip(&mine) {
            pool.publish(block, key(number), &tokens(number));
        }
        assert_eq!(pool.find(&key(1), &tokens(1)), Some(mine[1]));
        pool.share(&mine[..1]);
        pool.give_back(&mine);
        assert_eq!((pool.free_count(), pool.returning_count()), (3, 0), "one has a reader");
        assert_eq!(pool.free_among(&mine), 2);
        pool.share(&mine[1..2]);
        pool.pin(&mine[1..2]);
        pool.give_back(&mine[..2]);
        assert_eq!((pool.free_count(), pool.returning_count()), (3, 1), "a step names one");
        assert_eq!(pool.take(1).unwrap(), [BlockId(3)], "first those that hold nothing");
        assert_eq!(pool.take(1).unwrap(), [mine[2]], "then who was free longest");
        assert_eq!(
            (pool.find(&key(2), &tokens(2)), pool.find(&key(0), &tokens(0))),
            (None, Some(mine[0]))
        );
        pool.unpin(&mine[1..2]);
        assert_eq!(pool.take(2).unwrap(), [mine[0], mine[1]]);
        assert_eq!(pool.find(&key(1), &tokens(1)), None);
        pool.check(&(0..4).map(|block| (BlockId(block), 1)).collect());
    }

    #[test]
    fn what_comes_last_in_a_prefix_is_taken_first() {
        let mut pool = BlockPool::new(3);
        let mine = pool.take(3).unwrap();
        for (number, &block) in (0..).zip(&mine) {
            pool.publish(block, key(number), &tokens(number));
        }
        pool.publish(mine[0], key(9), &tokens(9));
        assert_eq!(pool.find(&key(9), &tokens(9)), None, "it is known to hold something else");
        pool.give_back(&mine);
        assert_eq!(pool.take(1).unwrap(), [mine[2]]);
        pool.forget(&mine[1..2]);
        assert_eq!(pool.find(&key(1), &tokens(1)), None);
        pool.check(&[(mine[2], 1)].into());
        assert_eq!(pool.take(2).unwrap(), [mine[1], mine[0]]);
    }
}
