//! Attention of one query head over one block of 32 tokens at a time, with a running maximum.

use super::half::{narrow_f16, widen_f16};
use super::reduce::{sum, sum_of_products};
use super::transcendental::exp;
use crate::views::{ATTENTION_STATE_HEADER, AttentionState, KV_BLOCK_TOKENS, KvBlock, KvBlockMut};

/// An element of the KV cache.
trait Element: Copy {
    /// The nearest element, ties to even.
    fn narrow(x: f32) -> Self;
    /// The element's value, exact.
    fn widen(self) -> f32;
}

impl Element for f32 {
    fn narrow(x: f32) -> Self {
        x
    }
    fn widen(self) -> f32 {
        self
    }
}

/// The bits of an f16.
impl Element for u16 {
    fn narrow(x: f32) -> Self {
        narrow_f16(x)
    }
    fn widen(self) -> f32 {
        widen_f16(self)
    }
}

pub(crate) fn store_kv(k: &[f32], v: &[f32], slot: usize, block: KvBlockMut<'_>) {
    match block {
        KvBlockMut::F16 { k: ks, v: vs } => store(k, v, slot, ks, vs),
        KvBlockMut::F32 { k: ks, v: vs } => store(k, v, slot, ks, vs),
    }
}

fn store<E: Element>(k: &[f32], v: &[f32], slot: usize, ks: &mut [E], vs: &mut [E]) {
    let d = k.len();
    for (i, (k, v)) in k.iter().zip(v).enumerate() {
        ks[i * KV_BLOCK_TOKENS + slot] = E::narrow(*k);
        vs[slot * d + i] = E::narrow(*v);
    }
}

#[inline(always)]
pub(crate) fn attend_block(
    q: &[f32],
    block: KvBlock<'_>,
    filled: usize,
    state: &mut AttentionState<'_>,
) {
    match block {
        KvBlock::F16 { k, v } => attend(q, k, v, filled, state),
        KvBlock::F32 { k, v } => attend(q, k, v, filled, state),
    }
}

/// [`attend_block`] for one row after the other.
#[inline(always)]
pub(crate) fn attend_group(
    q: &[f32],
    block: KvBlock<'_>,
    _next: Option<KvBlock<'_>>,
    filled: &[u8],
    states: &mut [f32],
) {
    let d = q.len() / filled.len();
    let states = states.chunks_exact_mut(ATTENTION_STATE_HEADER + d);
    for ((q, filled), state) in q.chunks_exact(d).zip(filled).zip(states) {
        attend_block(q, block, usize::from(*filled), &mut AttentionState::over(state));
    }
}

/// `k` is `[d][32]`, `v` is `[32][d]`; slots from `filled` on are not read.
#[inline(always)]
fn attend<E: Element>(q: &[f32], k: &[E], v: &[E], filled: usize, state: &mut AttentionState<'_>) {
    let d = q.len();
    let scale = score_scale(d);
    let mut p = [0.0; KV_BLOCK_TOKENS];
    let p = &mut p[..filled];
    for (t, p) in p.iter_mut().enumerate() {
        let key = (0..d).map(|i| k[i * KV_BLOCK_TOKENS + t].widen());
        *p = sum_of_products(q.iter().copied().zip(key)) * scale;
    }

    let max = p.iter().fold(*state.max, |max, score| greater(max, *score)) + 0.0;
    let c = exp(*state.max - max);
    for p in p.iter_mut() {
        *p = exp(*p - max);
    }
    *state.max = max;
    *state.sum = *state.sum * c + sum(p);
    for (i, acc) in state.acc.iter_mut().enumerate() {
        *acc *= c;
        for (t, p) in p.iter().enumerate() {
            *acc = p.mul_add(v[t * d + i].widen(), *acc);
        }
    }
}

/// d^-½, by IEEE root and division.
pub(crate) fn score_scale(d: usize) -> f32 {
    1.0 / (d as f32).sqrt()
}

/// The greater of a maximum and a score; a NaN score is passed over (it comes back as a NaN
/// weight). The caller adds +0, so that of two zeros it does not matter which is taken.
pub(crate) fn greater(max: f32, score: f32) -> f32 {
    if score > max { score } else { max }
}

pub(crate) fn attend_merge(into: &mut AttentionState<'_>, other: &AttentionState<'_>) {
    let max = greater(*into.max, *other.max) + 0.0;
    let c = exp(*into.max - max);
    let p = exp(*other.max - max);
    *into.max = max;
    *into.sum = *into.sum * c + *other.sum * p;
    for (acc, other) in into.acc.iter_mut().zip(other.acc.iter()) {
        *acc = p.mul_add(*other, *acc * c);
    }
}

pub(crate) fn attend_finish(state: &AttentionState<'_>, out: &mut [f32]) {
    for (out, acc) in out.iter_mut().zip(state.acc.iter()) {
        *out = acc / *state.sum;
    }
}
