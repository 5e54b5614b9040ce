//! What surrounds attention over blocks: storing keys and values, merging segments, the end.

use std::arch::x86_64::*;

use super::{WIDTH, functions, load, store, store_u16};
use crate::scalar::attention as scalar;
use crate::scalar::half::narrow_f16;
use crate::views::{AttentionState, KV_BLOCK_TOKENS, KvBlockMut};

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
pub(super) fn attend_merge(into: &mut AttentionState<'_>, other: &AttentionState<'_>) {
    let max = scalar::greater(*into.max, *other.max) + 0.0;
    let (c, p) = (functions::exp_of_one(*into.max - max), functions::exp_of_one(*other.max - max));
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
