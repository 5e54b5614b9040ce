//! The KV cache: where a block of a layer lies. Which block holds what is the scheduler's business.
//!
//! The memory is `[layer][kv head][block]`, each block K `[dimension][32 tokens]` and then V
//! `[32 tokens][dimension]`. A KV head comes first so that a thread that stores keys owns one
//! contiguous part of its layer.

use kernels::{KV_BLOCK_TOKENS, KvBlock, KvBlockMut};
use model::ModelConfig;
use proto::plan::KvType;

use super::shared::{Buffer, Member, NoMemory, Shared, Team};
use super::{EngineConfig, EngineError, kv_bytes};

/// The KV cache of a stage.
pub(super) struct KvCache {
    values: Store,
    layers: usize,
    kv_heads: usize,
    /// Values of K, and of V, in one block of one KV head.
    half_block: usize,
    blocks: usize,
}

/// `[layers * kv heads][blocks * 2 * half block]`.
enum Store {
    F16(Buffer<u16>),
    F32(Buffer<f32>),
}

impl KvCache {
    /// Gets zero pages for all blocks of `layers` layers, untouched.
    ///
    /// # Errors
    ///
    /// [`EngineError::Memory`].
    pub(super) fn new(
        model: &ModelConfig,
        layers: u32,
        config: &EngineConfig,
    ) -> Result<Self, EngineError> {
        let kv_heads = model.kv_heads as usize;
        let half_block = model.head_dim as usize * KV_BLOCK_TOKENS;
        let blocks = config.kv_blocks as usize;
        let (layer_count, layers) = (layers, layers as usize);
        // What no integer counts no memory holds.
        let width = blocks.saturating_mul(2 * half_block);
        let rows = layers * kv_heads;
        let values = match config.kv_type {
            KvType::F16 => Buffer::zeros(rows, width).map(Store::F16),
            KvType::F32 => Buffer::zeros(rows, width).map(Store::F32),
        };
        let values = values.map_err(|NoMemory| {
            let bytes = kv_bytes(model, layer_count, config.kv_type, config.kv_blocks);
            EngineError::Memory { what: "the KV cache", bytes }
        })?;
        Ok(Self { values, layers, kv_heads, half_block, blocks })
    }

    /// Lends all of it to a team.
    pub(super) fn lend(&mut self, team: &Team) -> SharedCache<'_> {
        let Self { layers, kv_heads, half_block, blocks, .. } = *self;
        let (rows, width) = (layers * kv_heads, blocks * 2 * half_block);
        let values = match &mut self.values {
            Store::F16(values) => SharedStore::F16(values.lend(team, rows, width)),
            Store::F32(values) => SharedStore::F32(values.lend(team, rows, width)),
        };
        SharedCache { values, kv_heads, half_block, blocks }
    }
}

/// The KV cache in the hands of a team.
pub(super) struct SharedCache<'a> {
    values: SharedStore<'a>,
    kv_heads: usize,
    half_block: usize,
    blocks: usize,
}

enum SharedStore<'a> {
    F16(Shared<'a, u16>),
    F32(Shared<'a, f32>),
}

impl SharedCache<'_> {
    /// All blocks of one KV head of layer `layer`, to write in this phase.
    ///
    /// # Panics
    ///
    /// If they were given away in this phase before.
    pub(super) fn head<'m>(
        &'m self,
        member: &'m Member<'_>,
        layer: usize,
        kv_head: usize,
    ) -> HeadMut<'m> {
        let row = layer * self.kv_heads + kv_head;
        let values = match &self.values {
            SharedStore::F16(values) => ValuesMut::F16(values.row(member, row)),
            SharedStore::F32(values) => ValuesMut::F32(values.row(member, row)),
        };
        HeadMut { values, half_block: self.half_block }
    }

    /// Layer `layer`, to read in this phase.
    pub(super) fn layer<'m>(&'m self, member: &'m Member<'_>, layer: usize) -> Layer<'m> {
        let len = self.kv_heads * self.blocks * 2 * self.half_block;
        let of_layer = layer * len..(layer + 1) * len;
        let values = match &self.values {
            SharedStore::F16(values) => Values::F16(&values.read(member)[of_layer]),
            SharedStore::F32(values) => Values::F32(&values.read(member)[of_layer]),
        };
        Layer { values, half_block: self.half_block, blocks: self.blocks }
    }
}

/// All blocks of one KV head, writable.
pub(super) struct HeadMut<'m> {
    values: ValuesMut<'m>,
    half_block: usize,
}

enum ValuesMut<'m> {
    F16(&'m mut [u16]),
    F32(&'m mut [f32]),
}

impl HeadMut<'_> {
    /// Block `block` of this head.
    pub(super) fn block(&mut self, block: u32) -> KvBlockMut<'_> {
        let start = block as usize * 2 * self.half_block;
        let end = start + 2 * self.half_block;
        match &mut self.values {
            ValuesMut::F16(values) => {
                let (k, v) = values[start..end].split_at_mut(self.half_block);
                KvBlockMut::F16 { k, v }
            }
            ValuesMut::F32(values) => {
                let (k, v) = values[start..end].split_at_mut(self.half_block);
                KvBlockMut::F32 { k, v }
            }
        }
    }
}

/// One layer's keys and values, readable.
#[derive(Clone, Copy)]
pub(super) struct Layer<'m> {
    values: Values<'m>,
    half_block: usize,
    blocks: usize,
}

#[derive(Clone, Copy)]
enum Values<'m> {
    F16(&'m [u16]),
    F32(&'m [f32]),
}

impl<'m> Layer<'m> {
    /// Block `block` of KV head `kv_head`.
    pub(super) fn block(&self, kv_head: usize, block: u32) -> KvBlock<'m> {
        let start = (kv_head * self.blocks + block as usize) * 2 * self.half_block;
        let end = start + 2 * self.half_block;
        match self.values {
            Values::F16(values) => {
                let (k, v) = values[start..end].split_at(self.half_block);
                KvBlock::F16 { k, v }
            }
            Values::F32(values) => {
                let (k, v) = values[start..end].split_at(self.half_block);
                KvBlock::F32 { k, v }
            }
        }
    }
}
