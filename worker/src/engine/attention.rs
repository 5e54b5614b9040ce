//! The attention of a step: storing keys and values, then every query head over its row's blocks.

use std::ops::Range;

use kernels::{ATTENTION_STATE_HEADER, AttentionState, KV_BLOCK_TOKENS};

use super::barrier::Poisoned;
use super::buffers::{Local, SEGMENT_TOKENS, UNITS_PER_THREAD};
use super::cache::Layer;
use super::profile::Part;
use super::rows::Batch;
use super::shared::Member;
use super::step::Step;

/// Spans of tokens and KV heads for each thread: so many that it does not matter who gets the last.
const SPANS_PER_THREAD: usize = 16;

/// Consecutive tokens of one row of the step (their indices), whose query heads over one KV head
/// attend together.
struct Run<'m> {
    kv_head: usize,
    tokens: Range<usize>,
    cache: Layer<'m>,
}

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

    /// Every query head of every token attends to its context. The unit of work is a KV head and
    /// some consecutive tokens, which share its blocks. When there are few units for many threads,
    /// the segments of a context are shared out too and merged in another phase; the operations and
    /// their order are the same.
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
        let units = self.batch.tokens().len() * self.model.config().kv_heads as usize;
        let Some(segments) = self.segments else {
            self.attend_spans(member, local, layer, units);
            return Ok(());
        };
        self.attend_segments(member, local, layer, units, segments);
        self.meet(member, local, Part::Attention)?;
        self.merge_segments(member, local, units, segments);
        Ok(())
    }

    /// Spans of tokens, each over its whole context: segment after segment, each merged into those
    /// before it.
    fn attend_spans(&self, member: &Member<'_>, local: &mut Local, layer: usize, units: usize) {
        let cache = self.cache.layer(member, layer);
        let tokens = self.batch.tokens().len();
        let most = local.filled.len() / self.group();
        let span = (units / (SPANS_PER_THREAD * member.threads())).clamp(1, most);
        let spans = tokens.div_ceil(span);
        let total = spans * self.model.config().kv_heads as usize;
        while let Some(range) = member.take(&self.queue, 1, total) {
            for index in range {
                // Head after head, so that its blocks stay in the cache, and the longest contexts
                // first, so that what comes last is short and threads finish together.
                let (kv_head, start) = (index / spans, (spans - 1 - index % spans) * span);
                self.attend_span(member, local, cache, kv_head, start..tokens.min(start + span));
            }
        }
    }

    /// One KV head and some tokens, which may be of several rows of the step.
    fn attend_span(
        &self,
        member: &Member<'_>,
        local: &mut Local,
        cache: Layer<'_>,
        kv_head: usize,
        tokens: Range<usize>,
    ) {
        let mut rest = &self.batch.tokens()[tokens.clone()];
        let mut start = tokens.start;
        while let Some(first) = rest.first() {
            let count = rest.iter().take_while(|token| token.row == first.row).count();
            self.attend_run(member, local, cache, kv_head, start..start + count);
            start += count;
            rest = &rest[count..];
        }
    }

    /// One KV head and consecutive tokens of one row of the step.
    fn attend_run(
        &self,
        member: &Member<'_>,
        local: &mut Local,
        cache: Layer<'_>,
        kv_head: usize,
        tokens: Range<usize>,
    ) {
        self.load_queries(member, local, kv_head, tokens.clone());
        let Local { queries, filled, states, segments, .. } = local;
        let run = Run { kv_head, tokens, cache };
        let (position, end) = self.positions(&run.tokens);
        self.attend_segment(&run, 0, queries, filled, states);
        let token_len = self.group() * self.state_len();
        let len = run.tokens.len() * token_len;
        for start in (SEGMENT_TOKENS..end).step_by(SEGMENT_TOKENS) {
            self.attend_segment(&run, start, queries, filled, segments);
            // The tokens before `start` have nothing in this segment.
            let first = start.saturating_sub(position) * token_len;
            self.merge(&mut states[first..len], &mut segments[first..len]);
        }
        for (token, states) in run.tokens.zip(states.chunks_exact_mut(token_len)) {
            self.finish_heads(member, states, kv_head, token);
        }
    }

    /// Single segments of single tokens, into `partial_states`, `[units][segments_each]`.
    fn attend_segments(
        &self,
        member: &Member<'_>,
        local: &mut Local,
        layer: usize,
        units: usize,
        segments_each: usize,
    ) {
        let cache = self.cache.layer(member, layer);
        let kv_heads = self.model.config().kv_heads as usize;
        let mut loaded = None;
        while let Some(range) = member.take(&self.queue, 1, units * segments_each) {
            for index in range {
                let (unit, start) = (index / segments_each, index % segments_each * SEGMENT_TOKENS);
                let (token, kv_head) = (unit / kv_heads, unit % kv_heads);
                if start >= self.context(token) {
                    continue;
                }
                let tokens = token..token + 1;
                if loaded != Some(unit) {
                    self.load_queries(member, local, kv_head, tokens.clone());
                    loaded = Some(unit);
                }
                let memory = self.planes.partial_states.row(member, index);
                let run = Run { kv_head, tokens, cache };
                self.attend_segment(&run, start, &local.queries, &mut local.filled, memory);
            }
        }
    }

    /// Merges what [`Self::attend_segments`] left, left to right.
    fn merge_segments(
        &self,
        member: &Member<'_>,
        local: &mut Local,
        units: usize,
        segments_each: usize,
    ) {
        let partial = self.planes.partial_states.read(member);
        let kv_heads = self.model.config().kv_heads as usize;
        let len = self.planes.partial_states.width();
        while let Some(range) = member.take(&self.queue, 1, units) {
            for unit in range {
                let (token, kv_head) = (unit / kv_heads, unit % kv_heads);
                let mut of_unit = partial[unit * segments_each * len..].chunks_exact(len);
                let rest = self.context(token).div_ceil(SEGMENT_TOKENS) - 1;
                let into = &mut local.states[..len];
                into.copy_from_slice(of_unit.next().expect("a context has a token"));
                for segment in of_unit.take(rest) {
                    local.segments[..len].copy_from_slice(segment);
                    self.merge(into, &mut local.segments[..len]);
                }
                self.finish_heads(member, into, kv_head, token);
            }
        }
    }

    /// Attends to the segment that starts at `start`, block by block, for all tokens of the run that
    /// see some of it; their part of `memory`, `[tokens][group][2 + d]`, becomes their state.
    /// `queries` is `[tokens][group][d]`; `filled` is overwritten.
    fn attend_segment(
        &self,
        run: &Run<'_>,
        start: usize,
        queries: &[f32],
        filled: &mut [u8],
        memory: &mut [f32],
    ) {
        let (group, state) = (self.group(), self.state_len());
        let d = state - ATTENTION_STATE_HEADER;
        let blocks = &self.batch.row_of(run.tokens.start).blocks;
        let block = |at: usize| run.cache.block(run.kv_head, blocks[at / KV_BLOCK_TOKENS].0);
        let (position, end) = self.positions(&run.tokens);
        let rows = run.tokens.len() * group;
        // The first row that sees the slot at position `at`.
        let first = |at: usize| at.saturating_sub(position) * group;
        for state in memory[first(start) * state..rows * state].chunks_exact_mut(state) {
            AttentionState::over(state).reset();
        }
        let segment_end = end.min(start + SEGMENT_TOKENS);
        for at in (start..segment_end).step_by(KV_BLOCK_TOKENS) {
            let first = first(at);
            for (row, filled) in filled[..rows].iter_mut().enumerate().skip(first) {
                *filled = (position + row / group + 1 - at).min(KV_BLOCK_TOKENS) as u8;
            }
            let next = at + KV_BLOCK_TOKENS;
            self.backend.attend_group(
                &queries[first * d..rows * d],
                block(at),
                (next < end).then(|| block(next)),
                &filled[first..rows],
                &mut memory[first * state..rows * state],
            );
        }
    }

    /// Merges states, row by row.
    fn merge(&self, into: &mut [f32], segments: &mut [f32]) {
        let len = self.state_len();
        for (into, segment) in into.chunks_exact_mut(len).zip(segments.chunks_exact_mut(len)) {
            let segment = AttentionState::over(segment);
            self.backend.attend_merge(&mut AttentionState::over(into), &segment);
        }
    }

    /// The output of a token's query heads over `kv_head`, from their states.
    fn finish_heads(&self, member: &Member<'_>, states: &mut [f32], kv_head: usize, token: usize) {
        let first = token * self.model.config().heads as usize + kv_head * self.group();
        for (pair, state) in (first..).zip(states.chunks_exact_mut(self.state_len())) {
            let out = self.planes.attended.row(member, pair);
            self.backend.attend_finish(&AttentionState::over(state), out);
        }
    }

    /// The queries of the tokens' heads over `kv_head` after RoPE, into `local.queries`.
    fn load_queries(
        &self,
        member: &Member<'_>,
        local: &mut Local,
        kv_head: usize,
        tokens: Range<usize>,
    ) {
        let shape = self.model.config();
        let (heads, d) = (shape.heads as usize, shape.head_dim as usize);
        let len = self.group() * d;
        let all = self.planes.query.read(member);
        for (token, queries) in tokens.zip(local.queries.chunks_exact_mut(len)) {
            queries.copy_from_slice(&all[token * heads * d + kv_head * len..][..len]);
            for query in queries.chunks_exact_mut(d) {
                self.rotate(member, token, query);
            }
        }
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

    /// Floats in an attention state.
    fn state_len(&self) -> usize {
        ATTENTION_STATE_HEADER + self.model.config().head_dim as usize
    }

    /// How many tokens a token sees: itself and all before it.
    fn context(&self, token: usize) -> usize {
        self.batch.tokens()[token].position as usize + 1
    }

    /// The position of the first of consecutive tokens of a row, and that after the last.
    fn positions(&self, tokens: &Range<usize>) -> (usize, usize) {
        let position = self.batch.tokens()[tokens.start].position as usize;
        (position, position + tokens.len())
    }
}

/// Into how many segments the longest context of a step is shared out: where there are few units for
/// many threads, more than one segment, and memory for `states_max` partial states suffices. `None`
/// where every unit is one thread's.
pub(super) fn shared_segments(
    batch: &Batch<'_>,
    kv_heads: usize,
    threads: usize,
    states_max: usize,
) -> Option<usize> {
    let units = batch.tokens().len() * kv_heads;
    let last = batch.tokens().iter().map(|token| token.position as usize).max()?;
    let segments = (last + 1).div_ceil(SEGMENT_TOKENS);
    let pays = units <= UNITS_PER_THREAD * threads && segments > 1;
    (pays && units * segments <= states_max).then_some(segments)
}
