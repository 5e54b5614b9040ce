//! Attention of up to [`MAX_ROWS`] queries over one block of 32 tokens at a time: every vector of
//! keys and of values is widened once for all of them. Scores come for sixteen tokens at a time,
//! values for sixteen elements at a time.

use std::arch::x86_64::*;
use std::ops::Range;

use super::reduce::fold_lanes;
use super::{functions, load, load_tail, load_u16, load_u16_tail, store, store_tail};
use crate::scalar::attention as scalar;
use crate::scalar::reduce::LANES;
use crate::views::{ATTENTION_STATE_HEADER, AttentionState, KV_BLOCK_TOKENS, KvBlock};
use crate::x86_64::avx2::attend::{Ahead, LANE_ORDER};

/// Queries that pass over a block together: as many as leave room, with two registers of sums for
/// each, for two vectors of the block and a factor.
const MAX_ROWS: usize = 8;
/// Registers that hold one float per token of a block.
const GROUPS: usize = KV_BLOCK_TOKENS / LANES;
/// One float per token.
type PerToken = [__m512; GROUPS];

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn attend_block(
    q: &[f32],
    block: KvBlock<'_>,
    filled: usize,
    state: &mut AttentionState<'_>,
) {
    let state = AttentionState { max: &mut *state.max, sum: &mut *state.sum, acc: &mut *state.acc };
    match block {
        KvBlock::F16 { k, v } => {
            let sixteen = |bits: &[u16; LANES]| widen_f16(load_u16(bits));
            let rest = |bits: &[u16]| widen_f16(load_u16_tail(bits));
            attend(q, (k, v), (sixteen, rest), [filled], [state], [Ahead::NOTHING; 2]);
        }
        KvBlock::F32 { k, v } => {
            let (sixteen, rest) = (|x: &[f32; LANES]| load(x), |x: &[f32]| load_tail(x));
            attend(q, (k, v), (sixteen, rest), [filled], [state], [Ahead::NOTHING; 2]);
        }
    }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn attend_group(
    q: &[f32],
    block: KvBlock<'_>,
    next: Option<KvBlock<'_>>,
    filled: &[u8],
    states: &mut [f32],
) {
    let ahead = match next {
        Some(KvBlock::F16 { k, .. }) => Ahead::of(k),
        Some(KvBlock::F32 { k, .. }) => Ahead::of(k),
        None => Ahead::NOTHING,
    };
    match block {
        KvBlock::F16 { k, v } => {
            let sixteen = |bits: &[u16; LANES]| widen_f16(load_u16(bits));
            let rest = |bits: &[u16]| widen_f16(load_u16_tail(bits));
            rows(q, (k, v), (sixteen, rest), filled, states, ahead);
        }
        KvBlock::F32 { k, v } => {
            let (sixteen, rest) = (|x: &[f32; LANES]| load(x), |x: &[f32]| load_tail(x));
            rows(q, (k, v), (sixteen, rest), filled, states, ahead);
        }
    }
}

/// What `_mm512_cvtph_ps` gives, which as Rust has it says that exceptions are off, and so does not
/// take its operand from memory.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn widen_f16(bits: __m256i) -> __m512 {
    _mm512_cvt_roundph_ps::<_MM_FROUND_CUR_DIRECTION>(bits)
}

/// Divides the rows into parts of about one size, none above [`MAX_ROWS`].
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn rows<E>(
    q: &[f32],
    kv: (&[E], &[E]),
    widen: (impl Fn(&[E; LANES]) -> __m512 + Copy, impl Fn(&[E]) -> __m512 + Copy),
    filled: &[u8],
    states: &mut [f32],
    next: Ahead,
) {
    let d = q.len() / filled.len();
    let parts = filled.len().div_ceil(MAX_ROWS);
    let (mut q, mut filled, mut states) = (q, filled, states);
    for part in 0..parts {
        let n = filled.len().div_ceil(parts - part);
        let (q_part, q_rest) = q.split_at(n * d);
        let (filled_part, filled_rest) = filled.split_at(n);
        let (states_part, states_rest) = states.split_at_mut(n * (ATTENTION_STATE_HEADER + d));
        // The first part waits for the values, so they are asked for while it computes scores.
        let ahead = if part == 0 { [Ahead::of(kv.1), next] } else { [Ahead::NOTHING; 2] };
        macro_rules! part {
            ($n:literal) => {{
                let mut each = states_part.chunks_exact_mut(ATTENTION_STATE_HEADER + d);
                let states = [(); $n]
                    .map(|()| AttentionState::over(each.next().expect("one state for each row")));
                let filled = std::array::from_fn(|row| usize::from(filled_part[row]));
                attend::<E, $n>(q_part, kv, widen, filled, states, ahead);
            }};
        }
        match n {
            1 => part!(1),
            2 => part!(2),
            3 => part!(3),
            4 => part!(4),
            5 => part!(5),
            6 => part!(6),
            7 => part!(7),
            _ => part!(8),
        }
        (q, filled, states) = (q_rest, filled_rest, states_rest);
    }
}

/// `N` queries: `q` is `[N][d]`, `kv` a block, `widen` turns sixteen of its elements, or fewer, into
/// floats. `ahead` is asked for during the scores and during the values.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn attend<E, const N: usize>(
    q: &[f32],
    kv: (&[E], &[E]),
    widen: (impl Fn(&[E; LANES]) -> __m512 + Copy, impl Fn(&[E]) -> __m512 + Copy),
    filled: [usize; N],
    mut states: [AttentionState<'_>; N],
    ahead: [Ahead; 2],
) {
    let scores: [PerToken; N] = scores(q, kv.0, widen.0, ahead[0]);
    let mut acc: [&mut [f32]; N] = [(); N].map(|()| [].as_mut_slice());
    let mut p = [[0.0; KV_BLOCK_TOKENS]; N];
    // Each row's old maximum less the new one; a register holds those of all rows.
    let (mut difference, mut c) = ([0.0; LANES], [0.0; LANES]);
    let mut weight = [0.0; N];
    for (row, state) in states.iter_mut().enumerate() {
        let max = greatest(&scores[row], filled[row], *state.max) + 0.0;
        difference[row] = *state.max - max;
        *state.max = max;
        weight[row] = weights(&scores[row], filled[row], max, &mut p[row]);
    }
    store(&mut c, functions::exp(load(&difference)));
    for (row, state) in states.into_iter().enumerate() {
        *state.sum = *state.sum * c[row] + weight[row];
        acc[row] = state.acc;
    }
    // The tokens that all rows see, then the others row by row.
    let all = filled.iter().copied().fold(KV_BLOCK_TOKENS, usize::min);
    let of_all = Factors { c: &c, p: &p, tokens: 0..all };
    values(&of_all, kv.1, widen, &mut acc, ahead[1]);
    for row in 0..N {
        if all < filled[row] {
            let acc = std::array::from_mut(&mut acc[row]);
            let of_one = Factors { c: &[1.0], p: &[p[row]], tokens: all..filled[row] };
            values(&of_one, kv.1, widen, acc, Ahead::NOTHING);
        }
    }
}

/// q · k of every row and token by the 16-lane rule, times d^-½; slots that are not filled give
/// anything. A lane of the rule is a register of sixteen tokens.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn scores<E, const N: usize>(
    q: &[f32],
    k: &[E],
    sixteen: impl Fn(&[E; LANES]) -> __m512 + Copy,
    ahead: Ahead,
) -> [PerToken; N] {
    let d = q.len() / N;
    let sixteens = d / LANES;
    let (k_chunks, k_tail) = k.as_chunks::<KV_BLOCK_TOKENS>().0.as_chunks::<LANES>();
    let k_chunks = &k_chunks[..sixteens];
    let mut q_chunks: [&[[f32; LANES]]; N] = [&[]; N];
    let mut q_tails: [&[f32]; N] = [&[]; N];
    for row in 0..N {
        let (chunks, tail) = q[row * d..][..d].as_chunks::<LANES>();
        (q_chunks[row], q_tails[row]) = (&chunks[..sixteens], tail);
    }
    // Lanes, and sums of lanes, that wait for the lane they are added to: one of every height.
    let mut waiting = [[[_mm512_setzero_ps(); GROUPS]; N]; 4];
    let mut sums = waiting[0];
    for (step, lane) in LANE_ORDER.into_iter().enumerate() {
        ahead.ask(step, LANES);
        sums = [[_mm512_setzero_ps(); GROUPS]; N];
        assert!(lane < LANES, "so that nothing is checked in the loop");
        for chunk in 0..sixteens {
            let k = sixteens_of::<E, GROUPS>(&k_chunks[chunk][lane], sixteen);
            for row in 0..N {
                add_products(&mut sums[row], q_chunks[row][chunk][lane], k);
            }
        }
        if lane < d % LANES {
            let k = sixteens_of::<E, GROUPS>(&k_tail[lane], sixteen);
            for row in 0..N {
                add_products(&mut sums[row], q_tails[row][lane], k);
            }
        }
        let height = step.trailing_ones() as usize;
        for near in &waiting[..height] {
            for (sums, near) in sums.iter_mut().zip(near) {
                for (sum, near) in sums.iter_mut().zip(near) {
                    *sum = _mm512_add_ps(*near, *sum);
                }
            }
        }
        if let Some(place) = waiting.get_mut(height) {
            *place = sums;
        }
    }
    let scale = _mm512_set1_ps(scalar::score_scale(d));
    for sum in sums.as_flattened_mut() {
        *sum = _mm512_mul_ps(*sum, scale);
    }
    sums
}

/// Widens `V` vectors.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn sixteens_of<E, const V: usize>(
    values: &[E],
    sixteen: impl Fn(&[E; LANES]) -> __m512 + Copy,
) -> [__m512; V] {
    let mut vectors = [_mm512_setzero_ps(); V];
    for (vector, values) in vectors.iter_mut().zip(values.as_chunks::<LANES>().0) {
        *vector = sixteen(values);
    }
    vectors
}

/// `sums += factor vectors`, fused.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn add_products<const V: usize>(sums: &mut [__m512; V], factor: f32, vectors: [__m512; V]) {
    let factor = _mm512_set1_ps(factor);
    for (sum, vector) in sums.iter_mut().zip(vectors) {
        *sum = _mm512_fmadd_ps(factor, vector, *sum);
    }
}

/// The lanes of both groups whose tokens are filled.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn lanes_filled(filled: usize) -> [__mmask16; GROUPS] {
    let slots = u32::MAX >> (KV_BLOCK_TOKENS - filled);
    [slots as __mmask16, (slots >> LANES) as __mmask16]
}

/// The greatest of `max` and the scores of the filled slots; NaN scores are passed over.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn greatest(scores: &PerToken, filled: usize, max: f32) -> f32 {
    let mut greatest = _mm512_set1_ps(max);
    for (score, lanes) in scores.iter().zip(lanes_filled(filled)) {
        // `max` gives its second operand if the first is a NaN.
        greatest = _mm512_mask_max_ps(greatest, lanes, *score, greatest);
    }
    let low = _mm512_castps512_ps256(greatest);
    let eight = _mm256_max_ps(low, _mm512_extractf32x8_ps::<1>(greatest));
    let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
}

/// The weights of the first `filled` tokens relative to `max`, those of the others +0, into `p`.
/// Returns their sum.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn weights(scores: &PerToken, filled: usize, max: f32, p: &mut [f32; KV_BLOCK_TOKENS]) -> f32 {
    let max = _mm512_set1_ps(max);
    let lanes = lanes_filled(filled);
    let low = functions::exp(_mm512_sub_ps(scores[0], max));
    let high = functions::exp(_mm512_sub_ps(scores[1], max));
    let low = _mm512_maskz_mov_ps(lanes[0], low);
    let high = _mm512_maskz_mov_ps(lanes[1], high);
    let (places, _) = p.as_chunks_mut::<LANES>();
    store(&mut places[0], low);
    store(&mut places[1], high);
    // By the 16-lane rule tokens 16 to 31 follow 0 to 15 in their lanes. Weights are never -0, so
    // the +0 of a slot that is not filled leaves its lane as it is.
    fold_lanes(_mm512_add_ps(low, high))
}

/// What accumulators and values are multiplied by.
struct Factors<'a, const N: usize> {
    /// For every row, of its accumulator.
    c: &'a [f32],
    /// For every row, of the values of each token.
    p: &'a [[f32; KV_BLOCK_TOKENS]; N],
    /// The tokens whose values are added.
    tokens: Range<usize>,
}

/// `acc = acc c`, then `acc += p[t] v[t]` for the tokens in ascending order, for every row. `v` is
/// `[32][d]`.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn values<E, const N: usize>(
    factors: &Factors<'_, N>,
    v: &[E],
    widen: (impl Fn(&[E; LANES]) -> __m512 + Copy, impl Fn(&[E]) -> __m512 + Copy),
    acc: &mut [&mut [f32]; N],
    ahead: Ahead,
) {
    let d = v.len() / KV_BLOCK_TOKENS;
    let mut at = 0;
    macro_rules! strips {
        ($vectors:literal) => {
            while at + $vectors * LANES <= d {
                let ahead = ahead.part(at / ($vectors * LANES), d / ($vectors * LANES));
                strip_values::<E, N, $vectors>(factors, v, at, widen.0, acc, ahead);
                at += $vectors * LANES;
            }
        };
    }
    match N {
        1 | 2 => strips!(8),
        3..7 => strips!(4),
        _ => strips!(2),
    }
    strips!(1);
    if at < d {
        for ((acc, p), c) in acc.iter_mut().zip(factors.p).zip(factors.c) {
            let mut sum = _mm512_mul_ps(load_tail(&acc[at..]), _mm512_set1_ps(*c));
            for t in factors.tokens.clone() {
                let v = widen.1(&v[t * d + at..(t + 1) * d]);
                sum = _mm512_fmadd_ps(_mm512_set1_ps(p[t]), v, sum);
            }
            store_tail(&mut acc[at..], sum);
        }
    }
}

/// [`values`] for `V` vectors of elements from `at` on, whose sums stay in registers.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn strip_values<E, const N: usize, const V: usize>(
    factors: &Factors<'_, N>,
    v: &[E],
    at: usize,
    sixteen: impl Fn(&[E; LANES]) -> __m512 + Copy,
    acc: &mut [&mut [f32]; N],
    ahead: Ahead,
) {
    let d = v.len() / KV_BLOCK_TOKENS;
    let mut sums = [[_mm512_setzero_ps(); V]; N];
    for row in 0..N {
        let (acc, _) = acc[row][at..at + V * LANES].as_chunks::<LANES>();
        for (sum, acc) in sums[row].iter_mut().zip(acc) {
            *sum = _mm512_mul_ps(load(acc), _mm512_set1_ps(factors.c[row]));
        }
    }
    let tokens = v.chunks_exact(d).enumerate();
    for (t, v) in tokens.take(factors.tokens.end).skip(factors.tokens.start) {
        // Some with every token: asked for all at once, lines wait for one another.
        ahead.ask(t, KV_BLOCK_TOKENS);
        let v = sixteens_of::<E, V>(&v[at..at + V * LANES], sixteen);
        for (sums, p) in sums.iter_mut().zip(factors.p) {
            add_products(sums, p[t % KV_BLOCK_TOKENS], v);
        }
    }
    for (acc, sums) in acc.iter_mut().zip(sums) {
        let (acc, _) = acc[at..at + V * LANES].as_chunks_mut::<LANES>();
        for (acc, sum) in acc.iter_mut().zip(sums) {
            store(acc, sum);
        }
    }
}
