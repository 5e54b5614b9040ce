//! Attention over one block of 32 tokens: scores for eight tokens at a time, values for eight
//! elements at a time.

use std::arch::x86_64::*;

use super::{WIDTH, functions, load, load_u16, store, store_u16};
use crate::scalar::attention as scalar;
use crate::scalar::half::{narrow_f16, widen_f16};
use crate::scalar::reduce::LANES;
use crate::views::{AttentionState, KV_BLOCK_TOKENS, KvBlock, KvBlockMut};

/// Registers that hold one float per token of a block.
const GROUPS: usize = KV_BLOCK_TOKENS / WIDTH;
/// One float per token.
type PerToken = [__m256; GROUPS];

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn store_kv(k: &[f32], v: &[f32], slot: usize, block: KvBlockMut<'_>) {
    let KvBlockMut::F16 { k: ks, v: vs } = block else {
        return scalar::store_kv(k, v, slot, block);
    };
    let (k_chunks, k_tail) = k.as_chunks::<WIDTH>();
    let (k_places, k_tail_places) = ks.as_chunks_mut::<{ WIDTH * KV_BLOCK_TOKENS }>();
    for (places, k) in k_places.iter_mut().zip(k_chunks) {
        let mut bits = [0; WIDTH];
        store_u16(&mut bits, narrow(load(k)));
        for (place, bits) in places[slot..].iter_mut().step_by(KV_BLOCK_TOKENS).zip(bits) {
            *place = bits;
        }
    }
    for (i, k) in k_tail.iter().enumerate() {
        k_tail_places[i * KV_BLOCK_TOKENS + slot] = narrow_f16(*k);
    }

    let (v_chunks, v_tail) = v.as_chunks::<WIDTH>();
    let (v_places, v_tail_places) = vs[slot * v.len()..][..v.len()].as_chunks_mut::<WIDTH>();
    for (place, v) in v_places.iter_mut().zip(v_chunks) {
        store_u16(place, narrow(load(v)));
    }
    for (place, v) in v_tail_places.iter_mut().zip(v_tail) {
        *place = narrow_f16(*v);
    }
}

/// Rounds to binary16, ties to even, whatever the rounding mode.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn narrow(x: __m256) -> __m128i {
    _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn attend_block(
    q: &[f32],
    block: KvBlock<'_>,
    filled: usize,
    state: &mut AttentionState<'_>,
) {
    match block {
        KvBlock::F16 { k, v } => {
            let eight = |bits: &[u16; WIDTH]| _mm256_cvtph_ps(load_u16(bits));
            let p = weights(scores(q, k, eight), filled, state);
            gather(&p[..filled], v, state.acc, eight, widen_f16);
        }
        KvBlock::F32 { k, v } => {
            let eight = |x: &[f32; WIDTH]| load(x);
            let p = weights(scores(q, k, eight), filled, state);
            gather(&p[..filled], v, state.acc, eight, |x| x);
        }
    }
}

/// q · k of every token of the block, by the 16-lane rule: each lane of the rule is a register of
/// eight tokens. Slots that are not filled give anything.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn scores<E>(q: &[f32], k: &[E], eight: impl Fn(&[E; WIDTH]) -> __m256) -> PerToken {
    let elements = k.as_chunks::<KV_BLOCK_TOKENS>().0;
    let mut lanes = [[_mm256_setzero_ps(); GROUPS]; LANES];
    for (first, lane) in lanes.iter_mut().enumerate() {
        let mut sums = *lane;
        for i in (first..q.len()).step_by(LANES) {
            let (k, _) = elements[i].as_chunks::<WIDTH>();
            for (sum, k) in sums.iter_mut().zip(k) {
                *sum = _mm256_fmadd_ps(_mm256_set1_ps(q[i]), eight(k), *sum);
            }
        }
        *lane = sums;
    }
    for distance in [8, 4, 2, 1] {
        let (near, far) = lanes.split_at_mut(distance);
        for (near, far) in near.iter_mut().zip(far) {
            *near = std::array::from_fn(|group| _mm256_add_ps(near[group], far[group]));
        }
    }
    let scale = _mm256_set1_ps(scalar::score_scale(q.len()));
    lanes[0].map(|score| _mm256_mul_ps(score, scale))
}

/// The weights of the first `filled` tokens, relative to the new maximum; those of the others are
/// +0. Brings the state's maximum, sum and accumulator to it.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn weights(
    scores: PerToken,
    filled: usize,
    state: &mut AttentionState<'_>,
) -> [f32; KV_BLOCK_TOKENS] {
    let slots = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let is_filled: PerToken = std::array::from_fn(|group| {
        let left = _mm256_set1_epi32(filled as i32 - (group * WIDTH) as i32);
        _mm256_castsi256_ps(_mm256_cmpgt_epi32(left, slots))
    });

    let mut greatest = _mm256_set1_ps(*state.max);
    for (score, is_filled) in scores.iter().zip(is_filled) {
        let score = _mm256_blendv_ps(greatest, *score, is_filled);
        // `max` gives its second operand if the first is a NaN: NaN scores are passed over.
        greatest = _mm256_max_ps(score, greatest);
    }
    let mut lanes = [0.0; WIDTH];
    store(&mut lanes, greatest);
    let max = lanes.into_iter().fold(*state.max, scalar::greater) + 0.0;

    let mut p = [0.0; KV_BLOCK_TOKENS];
    let mut weights = [_mm256_setzero_ps(); GROUPS];
    let (places, _) = p.as_chunks_mut::<WIDTH>();
    for group in 0..GROUPS {
        let weight = functions::exp(_mm256_sub_ps(scores[group], _mm256_set1_ps(max)));
        weights[group] = _mm256_and_ps(weight, is_filled[group]);
        store(&mut places[group], weights[group]);
    }
    // By the 16-lane rule tokens 16 to 31 follow 0 to 15 in their lanes. Weights are never -0, so
    // the +0 of a slot that is not filled leaves its lane as it is.
    let low = _mm256_add_ps(weights[0], weights[2]);
    let high = _mm256_add_ps(weights[1], weights[3]);
    let sum = super::reduce::finish(low, high, std::iter::empty());

    let c = exp_of_one(*state.max - max);
    *state.max = max;
    *state.sum = *state.sum * c + sum;
    scale(state.acc, c);
    p
}

/// `x = x c`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn scale(x: &mut [f32], c: f32) {
    let (chunks, tail) = x.as_chunks_mut::<WIDTH>();
    for x in chunks {
        store(x, _mm256_mul_ps(load(x), _mm256_set1_ps(c)));
    }
    for x in tail {
        *x *= c;
    }
}

/// Adds `p[t] v[t]` to the accumulator, in ascending order of tokens.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn gather<E: Copy>(
    p: &[f32],
    v: &[E],
    acc: &mut [f32],
    eight: impl Fn(&[E; WIDTH]) -> __m256,
    one: impl Fn(E) -> f32,
) {
    /// Elements whose sums stay in registers while all tokens pass: four chains of additions.
    const STRIP: usize = 4 * WIDTH;
    let d = acc.len();
    let mut at = 0;
    while at + STRIP <= d {
        let strip = acc[at..at + STRIP].as_chunks_mut::<WIDTH>().0;
        let mut sums = [0, 1, 2, 3].map(|i| load(&strip[i]));
        for (p, v) in p.iter().zip(v.chunks_exact(d)) {
            let (v, _) = v[at..at + STRIP].as_chunks::<WIDTH>();
            for (sum, v) in sums.iter_mut().zip(v) {
                *sum = _mm256_fmadd_ps(_mm256_set1_ps(*p), eight(v), *sum);
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

/// e^x of one float.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn exp_of_one(x: f32) -> f32 {
    _mm256_cvtss_f32(functions::exp(_mm256_set1_ps(x)))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn attend_merge(into: &mut AttentionState<'_>, other: &AttentionState<'_>) {
    let max = scalar::greater(*into.max, *other.max) + 0.0;
    let (c, p) = (exp_of_one(*into.max - max), exp_of_one(*other.max - max));
    *into.max = max;
    *into.sum = *into.sum * c + *other.sum * p;
    let (chunks, tail) = into.acc.as_chunks_mut::<WIDTH>();
    let (other_chunks, other_tail) = other.acc.as_chunks::<WIDTH>();
    for (acc, other) in chunks.iter_mut().zip(other_chunks) {
        let scaled = _mm256_mul_ps(load(acc), _mm256_set1_ps(c));
        store(acc, _mm256_fmadd_ps(_mm256_set1_ps(p), load(other), scaled));
    }
    for (acc, other) in tail.iter_mut().zip(other_tail) {
        *acc = p.mul_add(*other, *acc * c);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn attend_finish(state: &AttentionState<'_>, out: &mut [f32]) {
    let (chunks, tail) = out.as_chunks_mut::<WIDTH>();
    let (acc_chunks, acc_tail) = state.acc.as_chunks::<WIDTH>();
    for (out, acc) in chunks.iter_mut().zip(acc_chunks) {
        store(out, _mm256_div_ps(load(acc), _mm256_set1_ps(*state.sum)));
    }
    for (out, acc) in tail.iter_mut().zip(acc_tail) {
        *out = acc / *state.sum;
    }
}
