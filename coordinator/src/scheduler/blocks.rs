//! The KV blocks of one pipeline at one epoch.

use std::collections::VecDeque;

use proto::ids::BlockId;

/// Who holds which block.
///
/// A block that its owner gave back returns to the pool only when every step that names it has
/// completed: a stage may still be about to write it. A new epoch begins with a new pool, which
/// is how blocks of fenced steps come back.
#[derive(Debug)]
pub(super) struct BlockPool {
    /// First given back, first taken: a block rests as long as it can.
    free: VecDeque<BlockId>,
    blocks: Vec<Block>,
    /// How many have an owner.
    owned: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Block {
    owned: bool,
    /// Steps on their way that name it.
    pins: u32,
}

impl BlockPool {
    /// `count` free blocks, `0..count`.
    pub(super) fn new(count: u32) -> Self {
        Self {
            free: (0..count).map(BlockId).collect(),
            blocks: vec![Block::default(); count as usize],
            owned: 0,
        }
    }

    /// Takes `count` blocks for one owner, all or none.
    pub(super) fn take(&mut self, count: u32) -> Option<Vec<BlockId>> {
        if (self.free.len() as u64) < u64::from(count) {
            return None;
        }
        let taken: Vec<_> = self.free.drain(..count as usize).collect();
        for &block in &taken {
            self.block(block).owned = true;
        }
        self.owned += count;
        Some(taken)
    }

    /// The owner needs them no more.
    pub(super) fn give_back(&mut self, blocks: &[BlockId]) {
        for &id in blocks {
            let block = self.block(id);
            assert!(block.owned, "block {id} was given back twice");
            block.owned = false;
            if block.pins == 0 {
                self.free.push_back(id);
            }
        }
        self.owned -= blocks.len() as u32;
    }

    /// A step that names them was sent.
    pub(super) fn pin(&mut self, blocks: &[BlockId]) {
        for &id in blocks {
            self.block(id).pins += 1;
        }
    }

    /// A step that names them has completed.
    pub(super) fn unpin(&mut self, blocks: &[BlockId]) {
        for &id in blocks {
            let block = self.block(id);
            assert!(block.pins > 0, "block {id} was completed more often than sent");
            block.pins -= 1;
            if block.pins == 0 && !block.owned {
                self.free.push_back(id);
            }
        }
    }

    /// Blocks that were given back and that a step on its way still names.
    pub(super) fn returning_count(&self) -> u32 {
        self.total() - self.owned - self.free_count()
    }

    /// Blocks that nobody holds.
    pub(super) fn free_count(&self) -> u32 {
        self.free.len() as u32
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
}
