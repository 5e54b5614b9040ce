//! The attention of a step: storing keys and values, then every query head over its row's blocks.

use std::ops::Range;

use kernels::{AttentionState, KV_BLOCK_TOKENS};

use super::barrier::Poisoned;
use super::buffers::{Local, PAIRS_PER_THREAD, SEGMENT_TOKENS};
use super::cache::Layer;
use super::profile::Part;
use super::shared::Member;
use super::step::{Step, share};

impl Step<'_> {
    /// Rotates the keys, and writes keys and values to their blocks, by KV heads.
    pub(super) fn store_kv(&self, member: &Member<'_>, local: &mut Local, layer: usize) {
        let shape = self.model.config();
        let (kv_heads, d) = (shape.kv_heads as usize, shape.head_dim as usize);
        let (keys, values) = (self.planes.key.read(member), self.planes.value.read(member));
        while let Some(range) = member.take(&self.queue, 1, kv_heads) {
            for kv_head in range {
                let mut cache = self.cache.head(member, layer, kv_head);
                for (index, token) in self.batch.tokens().iter().enumerate() {
                    let start = (index * kv_heads + kv_head) * d;
                    local.rotated.copy_from_slice(&keys[start..][..d]);
                    self.rotate(member, index, &mut local.rotated);
                    let place = token.position as usize;
                    let block = self.batch.row_of(index).blocks[place / KV_BLOCK_TOKENS];
                    self.backend.store_kv(
                        &local.rotated,
                        &values[start..][..d],
                        place % KV_BLOCK_TOKENS,
                        cache.block(block.0),
                    );
                }
            }
        }
    }

    /// Every (token, query head) pair attends to its context. When there are few pairs for many
    /// threads, the segments of a context are shared out too and merged in another phase; the
    /// operations and their order are the same.
    ///
    /// # Errors
    ///
    /// [`Poisoned`] if another thread panicked.
    pub(super) fn attend(
        &self,
        member: &mut Member<'_>,
        local: &mut Local,
        layer: usize,
    ) -> Result<(), Poisoned> {
        let pairs = self.batch.tokens().len() * self.model.config().heads as usize;
        if pairs > PAIRS_PER_THREAD * member.threads() || self.longest_context() <= SEGMENT_TOKENS {
            self.attend_pairs(member, local, layer, pairs);
            return Ok(());
        }
        let segments = self.longest_context().div_ceil(SEGMENT_TOKENS);
        self.attend_segments(member, local, layer, pairs, segments);
        self.meet(member, local, Part::Attention)?;
        self.merge_segments(member, local, pairs, segments);
        Ok(())
    }

    /// Whole pairs: segment after segment, each merged into those before it.
    fn attend_pairs(&self, member: &Member<'_>, local: &mut Local, layer: usize, pairs: usize) {
        let cache = self.cache.layer(member, layer);
        // The query heads of one KV head together: they read the same blocks.
        let group = self.group();
        let count = share(pairs.div_ceil(group), member) * group;
        while let Some(range) = member.take(&self.queue, count, pairs) {
            for pair in range {
                self.load_query(member, pair, &mut local.rotated);
                let context = self.context(pair);
                let (first, rest) = segments(context);
                self.attend_segment(&local.rotated, cache, pair, first, &mut local.state);
                for segment in rest {
                    self.attend_segment(&local.rotated, cache, pair, segment, &mut local.segment);
                    self.merge(&mut local.state, &mut local.segment);
                }
                let out = self.planes.attended.row(member, pair);
                self.backend.attend_finish(&AttentionState::over(&mut local.state), out);
            }
        }
    }

    /// Single segments, into `partial_states`, `[pairs][segments_each]`.
    fn attend_segments(
        &self,
        member: &Member<'_>,
        local: &mut Local,
        layer: usize,
        pairs: usize,
        segments_each: usize,
    ) {
        let cache = self.cache.layer(member, layer);
        while let Some(range) = member.take(&self.queue, 1, pairs * segments_each) {
            for index in range {
                let (pair, start) = (index / segments_each, index % segments_each * SEGMENT_TOKENS);
                let end = self.context(pair).min(start + SEGMENT_TOKENS);
                if start < end {
                    self.load_query(member, pair, &mut local.rotated);
                    let memory = self.planes.partial_states.row(member, index);
                    self.attend_segment(&local.rotated, cache, pair, start..end, memory);
                }
            }
        }
    }

    /// Merges what [`Self::attend_segments`] left, left to right.
    fn merge_segments(
        &self,
        member: &Member<'_>,
        local: &mut Local,
        pairs: usize,
        segments_each: usize,
    ) {
        let states = self.planes.partial_states.read(member);
        while let Some(range) = member.take(&self.queue, 1, pairs) {
            for pair in range {
                let len = local.state.len();
                let mut of_pair = states[pair * segments_each * len..].chunks_exact(len);
                let rest = self.context(pair).div_ceil(SEGMENT_TOKENS) - 1;
                local.state.copy_from_slice(of_pair.next().expect("a context has a token"));
                for segment in of_pair.take(rest) {
                    local.segment.copy_from_slice(segment);
                    self.merge(&mut local.state, &mut local.segment);
                }
                let out = self.planes.attended.row(member, pair);
                self.backend.attend_finish(&AttentionState::over(&mut local.state), out);
            }
        }
    }

    /// Attends to the tokens of one segment, block by block; `memory` becomes its state.
    fn attend_segment(
        &self,
        query: &[f32],
        cache: Layer<'_>,
        pair: usize,
        tokens: Range<usize>,
        memory: &mut [f32],
    ) {
        let heads = self.model.config().heads as usize;
        let kv_head = pair % heads / self.group();
        let blocks = &self.batch.row_of(pair / heads).blocks;
        let mut state = AttentionState::over(memory);
        state.reset();
        for start in tokens.clone().step_by(KV_BLOCK_TOKENS) {
            let filled = (tokens.end - start).min(KV_BLOCK_TOKENS);
            let block = cache.block(kv_head, blocks[start / KV_BLOCK_TOKENS].0);
            self.backend.attend_block(query, block, filled, &mut state);
        }
    }

    fn merge(&self, into: &mut [f32], segment: &mut [f32]) {
        let segment = AttentionState::over(segment);
        self.backend.attend_merge(&mut AttentionState::over(into), &segment);
    }

    /// The pair's query after RoPE.
    fn load_query(&self, member: &Member<'_>, pair: usize, query: &mut [f32]) {
        let d = query.len();
        query.copy_from_slice(&self.planes.query.read(member)[pair * d..][..d]);
        self.rotate(member, pair / self.model.config().heads as usize, query);
    }

    /// RoPE of one head of a token.
    fn rotate(&self, member: &Member<'_>, token: usize, head: &mut [f32]) {
        let half = head.len() / 2;
        let cos = &self.planes.cos.read(member)[token * half..][..half];
        let sin = &self.planes.sin.read(member)[token * half..][..half];
        self.backend.rope(head, cos, sin);
    }

    /// Query heads of one KV head.
    fn group(&self) -> usize {
        let shape = self.model.config();
        (shape.heads / shape.kv_heads) as usize
    }

    /// How many tokens a pair sees: its own and all before it.
    fn context(&self, pair: usize) -> usize {
        self.batch.tokens()[pair / self.model.config().heads as usize].position as usize + 1
    }

    fn longest_context(&self) -> usize {
        let positions = self.batch.tokens().iter().map(|token| token.position as usize);
        positions.max().map_or(0, |last| last + 1)
    }
}

/// The segments of a context of at least one token: the first, and the others.
fn segments(context: usize) -> (Range<usize>, impl Iterator<Item = Range<usize>>) {
    let end = move |start: usize| context.min(start + SEGMENT_TOKENS);
    let rest = (SEGMENT_TOKENS..context).step_by(SEGMENT_TOKENS);
    (0..end(0), rest.map(move |start| start..end(start)))
}
