//! Attention of up to [`MAX_ROWS`] queries over one block of 32 tokens at a time: every vector of
//! keys and of values is widened once for all of them. Scores come for eight tokens at a time,
//! values for eight elements at a time.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{WIDTH, functions, load, load_u16, prefetch, store};
use crate::scalar::attention as scalar;
use crate::scalar::half::widen_f16;
use crate::scalar::reduce::LANES;
use crate::views::{ATTENTION_STATE_HEADER, AttentionState, KV_BLOCK_TOKENS, KvBlock};

/// Queries that pass over a block together: as many as leave room, with two registers of sums for
/// each, for two vectors of the block and a factor.
const MAX_ROWS: usize = 6;
/// Registers that hold one float per token of a block.
const GROUPS: usize = KV_BLOCK_TOKENS / WIDTH;
/// One float per token.
type PerToken = [__m256; GROUPS];

/// The lanes of the 16-lane rule in the order in which they can be folded at once: each comes right
/// after what it is added to.
pub(in crate::x86_64) const LANE_ORDER: [usize; LANES] =
    [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15];
const CACHE_LINE_BYTES: usize = 64;

/// Memory that will be read soon, asked for bit by bit.
#[derive(Clone, Copy)]
pub(in crate::x86_64) struct Ahead {
    start: *const u8,
    bytes: usize,
}

impl Ahead {
    pub(in crate::x86_64) const NOTHING: Self = Self { start: std::ptr::null(), bytes: 0 };

    pub(in crate::x86_64) fn of<E>(values: &[E]) -> Self {
        Self { start: values.as_ptr().cast(), bytes: size_of_val(values) }
    }

    /// Part `part` of `parts`.
    pub(in crate::x86_64) fn part(self, part: usize, parts: usize) -> Self {
        let bytes = self.bytes.div_ceil(parts);
        Self { start: self.start.wrapping_byte_add(part * bytes), bytes }
    }

    /// Asks for part `part` of `parts`.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    pub(in crate::x86_64) fn ask(self, part: usize, parts: usize) {
        let share = self.bytes.div_ceil(parts);
        for line in (part * share..(part + 1) * share).step_by(CACHE_LINE_BYTES) {
            prefetch(self.start, line);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn attend_block(
    q: &[f32],
    block: KvBlock<'_>,
    filled: usize,
    state: &mut AttentionState<'_>,
) {
    let state = AttentionState { max: &mut *state.max, sum: &mut *state.sum, acc: &mut *state.acc };
    match block {
        KvBlock::F16 { k, v } => {
            let eight = |bits: &[u16; WIDTH]| _mm256_cvtph_ps(load_u16(bits));
            attend(q, (k, v), (eight, widen_f16), [filled], [state], [Ahead::NOTHING; 2]);
        }
        KvBlock::F32 { k, v } => {
            let eight = |x: &[f32; WIDTH]| load(x);
            attend(q, (k, v), (eight, |x| x), [filled], [state], [Ahead::NOTHING; 2]);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
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
            let eight = |bits: &[u16; WIDTH]| _mm256_cvtph_ps(load_u16(bits));
            rows(q, (k, v), (eight, widen_f16), filled, states, ahead);
        }
        KvBlock::F32 { k, v } => {
            let eight = |x: &[f32; WIDTH]| load(x);
            rows(q, (k, v), (eight, |x| x), filled, states, ahead);
        }
    }
}

/// Divides the rows into parts of about one size, none above [`MAX_ROWS`].
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn rows<E: Copy>(
    q: &[f32],
    kv: (&[E], &[E]),
    widen: (impl Fn(&[E; WIDTH]) -> __m256 + Copy, impl Fn(E) -> f32 + Copy),
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
            _ => part!(6),
        }
        (q, filled, states) = (q_rest, filled_rest, states_rest);
    }
}

/// `N` queries: `q` is `[N][d]`, `kv` a block, `widen` turns eight of its elements, or one, into
/// floats. `ahead` is asked for during the scores and during the values.
#[target_feature(enable = "avx2,fma,f16c")]
fn attend<E: Copy, const N: usize>(
    q: &[f32],
    kv: (&[E], &[E]),
    widen: (impl Fn(&[E; WIDTH]) -> __m256 + Copy, impl Fn(E) -> f32 + Copy),
    filled: [usize; N],
    states: [AttentionState<'_>; N],
    ahead: [Ahead; 2],
) {
    let most = filled.iter().copied().fold(0, usize::max);
    let scores: [PerToken; N] = scores(q, kv.0, widen.0, most, ahead[0]);
    let mut acc: [&mut [f32]; N] = [(); N].map(|()| [].as_mut_slice());
    let mut p = [[0.0; KV_BLOCK_TOKENS]; N];
    let mut c = [0.0; N];
    for (row, state) in states.into_iter().enumerate() {
        c[row] = weights(&scores[row], filled[row], state.max, state.sum, &mut p[row]);
        acc[row] = state.acc;
    }
    // The tokens that all rows see, then the others row by row.
    let all = filled.iter().copied().fold(KV_BLOCK_TOKENS, usize::min);
    values(&p, c, 0..all, kv.1, widen, &mut acc, ahead[1]);
    for row in 0..N {
        if all < filled[row] {
            let acc = std::array::from_mut(&mut acc[row]);
            values(&[p[row]], [1.0], all..filled[row], kv.1, widen, acc, Ahead::NOTHING);
        }
    }
}

/// q · k of every row and token by the 16-lane rule, times d^-½; groups of slots that no row sees
/// are left out, others that are not filled give anything. A lane of the rule is a register of
/// eight tokens.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn scores<E, const N: usize>(
    q: &[f32],
    k: &[E],
    eight: impl Fn(&[E; WIDTH]) -> __m256 + Copy,
    most: usize,
    ahead: Ahead,
) -> [PerToken; N] {
    let mut scores = [[_mm256_setzero_ps(); GROUPS]; N];
    if N < 3 {
        let all: [PerToken; N] = group_scores(q, k, 0, eight, ahead);
        return all;
    }
    for group in (0..GROUPS).step_by(2).take_while(|group| group * WIDTH < most) {
        let two: [[__m256; 2]; N] = group_scores(q, k, group, eight, ahead);
        for (scores, two) in scores.iter_mut().zip(two) {
            scores[group..group + 2].copy_from_slice(&two);
        }
    }
    scores
}

/// [`scores`] of `G` groups of tokens from group `first` on.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn group_scores<E, const N: usize, const G: usize>(
    q: &[f32],
    k: &[E],
    first: usize,
    eight: impl Fn(&[E; WIDTH]) -> __m256 + Copy,
    ahead: Ahead,
) -> [[__m256; G]; N] {
    let d = q.len() / N;
    let sixteens = d / LANES;
    let (k_chunks, k_tail) = k.as_chunks::<{ LANES * KV_BLOCK_TOKENS }>();
    let k_chunks = &k_chunks[..sixteens];
    let mut q_chunks: [&[[f32; LANES]]; N] = [&[]; N];
    let mut q_tails: [&[f32]; N] = [&[]; N];
    for row in 0..N {
        let (chunks, tail) = q[row * d..][..d].as_chunks::<LANES>();
        (q_chunks[row], q_tails[row]) = (&chunks[..sixteens], tail);
    }
    // Lanes, and sums of lanes, that wait for the lane they are added to: one of every height.
    let mut waiting = [[[_mm256_setzero_ps(); G]; N]; 4];
    let mut sums = waiting[0];
    for (step, lane) in LANE_ORDER.into_iter().enumerate() {
        ahead.ask(first / G * LANES + step, LANES * GROUPS / G);
        sums = [[_mm256_setzero_ps(); G]; N];
        let at = lane * KV_BLOCK_TOKENS + first * WIDTH;
        let places = at..at + G * WIDTH;
        assert!(places.end <= LANES * KV_BLOCK_TOKENS && lane < LANES);
        for chunk in 0..sixteens {
            let k = eights::<E, G>(&k_chunks[chunk][places.clone()], eight);
            for row in 0..N {
                add_products(&mut sums[row], q_chunks[row][chunk][lane], k);
            }
        }
        if lane < d % LANES {
            let k = eights::<E, G>(&k_tail[places], eight);
            for row in 0..N {
                add_products(&mut sums[row], q_tails[row][lane], k);
            }
        }
        let height = step.trailing_ones() as usize;
        for near in &waiting[..height] {
            for (sums, near) in sums.iter_mut().zip(near) {
                for (sum, near) in sums.iter_mut().zip(near) {
                    *sum = _mm256_add_ps(*near, *sum);
                }
            }
        }
        if let Some(place) = waiting.get_mut(height) {
            *place = sums;
        }
    }
    let scale = _mm256_set1_ps(scalar::score_scale(d));
    for sum in sums.as_flattened_mut() {
        *sum = _mm256_mul_ps(*sum, scale);
    }
    sums
}

/// Widens `V` vectors.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn eights<E, const V: usize>(
    values: &[E],
    eight: impl Fn(&[E; WIDTH]) -> __m256 + Copy,
) -> [__m256; V] {
    let mut vectors = [_mm256_setzero_ps(); V];
    for (vector, values) in vectors.iter_mut().zip(values.as_chunks::<WIDTH>().0) {
        *vector = eight(values);
    }
    vectors
}

/// `sums += factor vectors`, fused.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_products<const V: usize>(sums: &mut [__m256; V], factor: f32, vectors: [__m256; V]) {
    let factor = _mm256_set1_ps(factor);
    for (sum, vector) in sums.iter_mut().zip(vectors) {
        *sum = _mm256_fmadd_ps(factor, vector, *sum);
    }
}

/// The weights of the first `filled` tokens relative to the new maximum, those of the others +0,
/// into `p`. Brings maximum and sum to it, and returns the factor that does so for the accumulator.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn weights(
    scores: &PerToken,
    filled: usize,
    max: &mut f32,
    sum: &mut f32,
    p: &mut [f32; KV_BLOCK_TOKENS],
) -> f32 {
    let slots = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let is_filled: PerToken = std::array::from_fn(|group| {
        let left = _mm256_set1_epi32(filled as i32 - (group * WIDTH) as i32);
        _mm256_castsi256_ps(_mm256_cmpgt_epi32(left, slots))
    });

    let mut greatest = _mm256_set1_ps(*max);
    for (score, is_filled) in scores.iter().zip(is_filled) {
        let score = _mm256_blendv_ps(greatest, *score, is_filled);
        // `max` gives its second operand if the first is a NaN: NaN scores are passed over.
        greatest = _mm256_max_ps(score, greatest);
    }
    let new_max = greatest_of(greatest) + 0.0;

    let mut weights = [_mm256_setzero_ps(); GROUPS];
    let (places, _) = p.as_chunks_mut::<WIDTH>();
    for group in 0..GROUPS {
        let weight = functions::exp(_mm256_sub_ps(scores[group], _mm256_set1_ps(new_max)));
        weights[group] = _mm256_and_ps(weight, is_filled[group]);
        store(&mut places[group], weights[group]);
    }
    // By the 16-lane rule tokens 16 to 31 follow 0 to 15 in their lanes. Weights are never -0, so
    // the +0 of a slot that is not filled leaves its lane as it is.
    let low = _mm256_add_ps(weights[0], weights[2]);
    let high = _mm256_add_ps(weights[1], weights[3]);
    let weight = super::reduce::finish(low, high, std::iter::empty());

    let c = functions::exp_of_one(*max - new_max);
    *max = new_max;
    *sum = *sum * c + weight;
    c
}

/// The greatest of eight floats, none of them a NaN.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn greatest_of(x: __m256) -> f32 {
    let four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
}

/// `acc = acc c`, then `acc += p[t] v[t]` for `tokens` in ascending order, for every row. `v` is
/// `[32][d]`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn values<E: Copy, const N: usize>(
    p: &[[f32; KV_BLOCK_TOKENS]; N],
    c: [f32; N],
    tokens: Range<usize>,
    v: &[E],
    widen: (impl Fn(&[E; WIDTH]) -> __m256 + Copy, impl Fn(E) -> f32 + Copy),
    acc: &mut [&mut [f32]; N],
    ahead: Ahead,
) {
    let d = v.len() / KV_BLOCK_TOKENS;
    let mut at = 0;
    macro_rules! strips {
        ($vectors:literal) => {
            while at + $vectors * WIDTH <= d {
                ahead.ask(at / ($vectors * WIDTH), d / ($vectors * WIDTH));
                strip_values::<E, N, $vectors>(p, c, tokens.clone(), v, at, widen.0, acc);
                at += $vectors * WIDTH;
            }
        };
    }
    match N {
        1 => strips!(8),
        2 => strips!(4),
        _ => strips!(2),
    }
    strips!(1);
    for ((acc, p), c) in acc.iter_mut().zip(p).zip(c) {
        for (i, acc) in acc.iter_mut().enumerate().skip(at) {
            *acc *= c;
            for t in tokens.clone() {
                *acc = p[t].mul_add(widen.1(v[t * d + i]), *acc);
            }
        }
    }
}

/// [`values`] for `V` vectors of elements from `at` on, whose sums stay in registers.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn strip_values<E, const N: usize, const V: usize>(
    p: &[[f32; KV_BLOCK_TOKENS]; N],
    c: [f32; N],
    tokens: Range<usize>,
    v: &[E],
    at: usize,
    eight: impl Fn(&[E; WIDTH]) -> __m256 + Copy,
    acc: &mut [&mut [f32]; N],
) {
    let d = v.len() / KV_BLOCK_TOKENS;
    let mut sums = [[_mm256_setzero_ps(); V]; N];
    for row in 0..N {
        let (acc, _) = acc[row][at..at + V * WIDTH].as_chunks::<WIDTH>();
        for (sum, acc) in sums[row].iter_mut().zip(acc) {
            *sum = _mm256_mul_ps(load(acc), _mm256_set1_ps(c[row]));
        }
    }
    for (t, v) in v.chunks_exact(d).enumerate().take(tokens.end).skip(tokens.start) {
        let v = eights::<E, V>(&v[at..at + V * WIDTH], eight);
        for row in 0..N {
            add_products(&mut sums[row], p[row][t % KV_BLOCK_TOKENS], v);
        }
    }
    for (acc, sums) in acc.iter_mut().zip(sums) {
        let (acc, _) = acc[at..at + V * WIDTH].as_chunks_mut::<WIDTH>();
        for (acc, sum) in acc.iter_mut().zip(sums) {
            store(acc, sum);
        }
    }
}
