//! Attention over one block of 32 tokens: scores for four tokens to a register, values for four
//! elements to a register.

use std::arch::aarch64::*;

use super::reduce::finish;
use super::{WIDTH, functions, load, load_u16, store, widen_f16};
use crate::scalar::attention as scalar;
use crate::scalar::half;
use crate::scalar::reduce::LANES;
use crate::scalar::transcendental::exp;
use crate::views::{ATTENTION_STATE_HEADER, AttentionState, KV_BLOCK_TOKENS, KvBlock};

/// Elements of the KV cache that are loaded at once.
const PAIR: usize = 2 * WIDTH;
/// Registers that hold one float per token of a block.
const GROUPS: usize = KV_BLOCK_TOKENS / WIDTH;
/// One float per token.
type PerToken = [float32x4_t; GROUPS];

/// The rows one after the other: a block stays in the first-level cache while they pass.
#[target_feature(enable = "neon")]
pub(super) fn attend_group(
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

#[target_feature(enable = "neon")]
pub(super) fn attend_block(
    q: &[f32],
    block: KvBlock<'_>,
    filled: usize,
    state: &mut AttentionState<'_>,
) {
    match block {
        KvBlock::F16 { k, v } => {
            let eight = |bits: &[u16; PAIR]| {
                let bits = load_u16(bits);
                [widen_f16(vget_low_u16(bits)), widen_f16(vget_high_u16(bits))]
            };
            let p = weights(scores(q, k, eight), filled, state);
            gather(&p[..filled], v, state.acc, eight, half::widen_f16);
        }
        KvBlock::F32 { k, v } => {
            let eight = |x: &[f32; PAIR]| {
                let (halves, _) = x.as_chunks::<WIDTH>();
                [load(&halves[0]), load(&halves[1])]
            };
            let p = weights(scores(q, k, eight), filled, state);
            gather(&p[..filled], v, state.acc, eight, |x| x);
        }
    }
}

/// q · k of every token of the block, by the 16-lane rule: each lane of the rule is a register of
/// four tokens. Slots that are not filled give anything.
#[target_feature(enable = "neon")]
#[inline]
fn scores<E>(q: &[f32], k: &[E], eight: impl Fn(&[E; PAIR]) -> [float32x4_t; 2]) -> PerToken {
    let elements = k.as_chunks::<KV_BLOCK_TOKENS>().0;
    let mut lanes = [[vdupq_n_f32(0.0); GROUPS]; LANES];
    for (first, lane) in lanes.iter_mut().enumerate() {
        let mut sums = *lane;
        for i in (first..q.len()).step_by(LANES) {
            let (pairs, _) = sums.as_chunks_mut::<2>();
            for (sums, k) in pairs.iter_mut().zip(elements[i].as_chunks::<PAIR>().0) {
                let k = eight(k);
                *sums = [vfmaq_n_f32(sums[0], k[0], q[i]), vfmaq_n_f32(sums[1], k[1], q[i])];
            }
        }
        *lane = sums;
    }
    for distance in [8, 4, 2, 1] {
        let (near, far) = lanes.split_at_mut(distance);
        for (near, far) in near.iter_mut().zip(far) {
            *near = std::array::from_fn(|group| vaddq_f32(near[group], far[group]));
        }
    }
    let scale = scalar::score_scale(q.len());
    lanes[0].map(|score| vmulq_n_f32(score, scale))
}

/// The weights of the first `filled` tokens, relative to the new maximum; those of the others are
/// +0. Brings the state's maximum, sum and accumulator to it.
#[target_feature(enable = "neon")]
#[inline]
fn weights(
    scores: PerToken,
    filled: usize,
    state: &mut AttentionState<'_>,
) -> [f32; KV_BLOCK_TOKENS] {
    let slots: [f32; KV_BLOCK_TOKENS] = std::array::from_fn(|slot| slot as f32);
    let (slots, _) = slots.as_chunks::<WIDTH>();
    let is_filled: [uint32x4_t; GROUPS] =
        std::array::from_fn(|group| vcltq_f32(load(&slots[group]), vdupq_n_f32(filled as f32)));

    let mut greatest = vdupq_n_f32(*state.max);
    for (score, is_filled) in scores.iter().zip(is_filled) {
        // Of a number and a NaN, `maxnm` gives the number: NaN scores are passed over.
        let greater = vmaxnmq_f32(greatest, *score);
        greatest = vbslq_f32(is_filled, greater, greatest);
    }
    let max = vmaxnmvq_f32(greatest) + 0.0;

    let mut p = [0.0; KV_BLOCK_TOKENS];
    let mut weights = [vdupq_n_f32(0.0); GROUPS];
    let (places, _) = p.as_chunks_mut::<WIDTH>();
    for group in 0..GROUPS {
        let weight = functions::exp(vsubq_f32(scores[group], vdupq_n_f32(max)));
        let bits = vandq_u32(vreinterpretq_u32_f32(weight), is_filled[group]);
        weights[group] = vreinterpretq_f32_u32(bits);
        store(&mut places[group], weights[group]);
    }
    // By the 16-lane rule tokens 16 to 31 follow 0 to 15 in their lanes. Weights are never -0, so
    // the +0 of a slot that is not filled leaves its lane as it is.
    let lanes = std::array::from_fn(|at| vaddq_f32(weights[at], weights[at + LANES / WIDTH]));
    let sum = finish(lanes, std::iter::empty());

    let c = exp(*state.max - max);
    *state.max = max;
    *state.sum = *state.sum * c + sum;
    for acc in state.acc.iter_mut() {
        *acc *= c;
    }
    p
}

/// Adds `p[t] v[t]` to the accumulator, in ascending order of tokens.
#[target_feature(enable = "neon")]
#[inline]
fn gather<E: Copy>(
    p: &[f32],
    v: &[E],
    acc: &mut [f32],
    eight: impl Fn(&[E; PAIR]) -> [float32x4_t; 2],
    one: impl Fn(E) -> f32,
) {
    /// Elements whose sums stay in registers while all tokens pass: eight chains of additions.
    const STRIP: usize = 4 * PAIR;
    let d = acc.len();
    let mut at = 0;
    while at + STRIP <= d {
        let (strip, _) = acc[at..at + STRIP].as_chunks_mut::<WIDTH>();
        let mut sums: [float32x4_t; STRIP / WIDTH] = std::array::from_fn(|i| load(&strip[i]));
        for (p, v) in p.iter().zip(v.chunks_exact(d)) {
            let (v, _) = v[at..at + STRIP].as_chunks::<PAIR>();
            for (sums, v) in sums.as_chunks_mut::<2>().0.iter_mut().zip(v) {
                let v = eight(v);
                *sums = [vfmaq_n_f32(sums[0], v[0], *p), vfmaq_n_f32(sums[1], v[1], *p)];
            }
        }
        for (place, sum) in strip.iter_mut().zip(sums) {
            store(place, sum);
        }
        at += STRIP;
    }
    for (i, acc) in acc.iter_mut().enumerate().skip(at) {
        for (p, v) in p.iter().zip(v.chunks_exact(d)) {
            *acc = p.mul_add(one(v[i]), *acc);
        }
    }
}
