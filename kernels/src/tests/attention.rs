//! Attention: equal on every backend, right by the textbook, and blind to what is not filled.

use super::{Random, check, scalar};
use crate::{
    ATTENTION_STATE_HEADER, AttentionState, Backend, KV_BLOCK_TOKENS, KvBlock, KvBlockMut,
};

/// Keys and values of some tokens in the blocks of one KV type.
struct Cache {
    f16: bool,
    d: usize,
    k16: Vec<u16>,
    v16: Vec<u16>,
    k32: Vec<f32>,
    v32: Vec<f32>,
}

impl Cache {
    /// Every slot that is not written holds a NaN.
    fn new(f16: bool, d: usize, blocks: usize) -> Self {
        let elements = blocks * d * KV_BLOCK_TOKENS;
        let (bits, nans) = (vec![0x7e00; elements], vec![f32::NAN; elements]);
        Self { f16, d, k16: bits.clone(), v16: bits, k32: nans.clone(), v32: nans }
    }

    fn block_mut(&mut self, block: usize) -> KvBlockMut<'_> {
        let elements = self.d * KV_BLOCK_TOKENS;
        let at = block * elements..(block + 1) * elements;
        match self.f16 {
            true => KvBlockMut::F16 { k: &mut self.k16[at.clone()], v: &mut self.v16[at] },
            false => KvBlockMut::F32 { k: &mut self.k32[at.clone()], v: &mut self.v32[at] },
        }
    }

    fn block(&self, block: usize) -> KvBlock<'_> {
        let elements = self.d * KV_BLOCK_TOKENS;
        let at = block * elements..(block + 1) * elements;
        match self.f16 {
            true => KvBlock::F16 { k: &self.k16[at.clone()], v: &self.v16[at] },
            false => KvBlock::F32 { k: &self.k32[at.clone()], v: &self.v32[at] },
        }
    }
}

/// Attention over `tokens` tokens of `kv` (`[tokens][key, value][d]`): the state after the last
/// merge, then the output.
fn attend(backend: Backend, q: &[f32], kv: &[f32], f16: bool) -> Vec<f32> {
    const SEGMENT_BLOCKS: usize = 8;
    let d = q.len();
    let tokens = kv.len() / (2 * d);
    let blocks = tokens.div_ceil(KV_BLOCK_TOKENS);
    let mut cache = Cache::new(f16, d, blocks);
    for (token, kv) in kv.chunks(2 * d).enumerate() {
        let (block, slot) = (token / KV_BLOCK_TOKENS, token % KV_BLOCK_TOKENS);
        backend.store_kv(&kv[..d], &kv[d..], slot, cache.block_mut(block));
    }
    let mut whole = vec![f32::NAN; ATTENTION_STATE_HEADER + d];
    for first in (0..blocks).step_by(SEGMENT_BLOCKS) {
        let mut memory = vec![f32::NAN; ATTENTION_STATE_HEADER + d];
        let mut state = AttentionState::over(&mut memory);
        state.reset();
        for block in first..blocks.min(first + SEGMENT_BLOCKS) {
            let filled = KV_BLOCK_TOKENS.min(tokens - block * KV_BLOCK_TOKENS);
            backend.attend_block(q, cache.block(block), filled, &mut state);
        }
        if first == 0 {
            whole = memory;
        } else {
            let state = AttentionState::over(&mut memory);
            backend.attend_merge(&mut AttentionState::over(&mut whole), &state);
        }
    }
    let mut out = vec![0.0; d];
    backend.attend_finish(&AttentionState::over(&mut whole), &mut out);
    [whole, out].concat()
}

#[test]
fn every_backend_equals_the_definition() {
    let mut random = Random(31);
    for d in [1, 2, 8, 15, 16, 24, 33, 64, 80, 128] {
        for tokens in [1, 2, 7, 8, 9, 31, 32, 33, 70, 257, 600] {
            let (qs, kvs) = (random.kinds(d), random.kinds(tokens * 2 * d));
            for (kind, (q, kv)) in qs.iter().zip(&kvs).enumerate() {
                for f16 in [true, false] {
                    let want = attend(scalar(), q, kv, f16);
                    for backend in Backend::available() {
                        let what = format!("dimension {d}, {tokens} tokens, kind {kind}, {f16}");
                        check(backend, &what, &attend(backend, q, kv, f16), &want);
                    }
                }
            }
        }
    }
}

/// Rows of a group with states that are worth something, over blocks of which slots hold all kinds
/// of values: one by one by the definition, and all at once.
#[test]
fn a_group_equals_its_rows() {
    let mut random = Random(33);
    for d in [1, 7, 16, 20, 24, 40, 64, 80, 128] {
        for n in 1..=20 {
            for f16 in [true, false] {
                let (qs, kvs) = (random.kinds(n * d), random.kinds(2 * KV_BLOCK_TOKENS * 2 * d));
                for (kind, (q, kv)) in qs.iter().zip(&kvs).enumerate() {
                    let mut cache = Cache::new(f16, d, 2);
                    for (token, kv) in kv.chunks(2 * d).enumerate() {
                        let (block, slot) = (token / KV_BLOCK_TOKENS, token % KV_BLOCK_TOKENS);
                        scalar().store_kv(&kv[..d], &kv[d..], slot, cache.block_mut(block));
                    }
                    // All of the first block; of the second as many as the row says.
                    let filled: Vec<u8> = match n {
                        1 => vec![1 + random.below(KV_BLOCK_TOKENS) as u8],
                        _ => (0..n).map(|row| 1 + (row * 31 / (n - 1)) as u8).collect(),
                    };
                    let width = ATTENTION_STATE_HEADER + d;
                    let mut want = vec![f32::NAN; n * width];
                    for (row, memory) in want.chunks_exact_mut(width).enumerate() {
                        let (q, mut state) = (&q[row * d..][..d], AttentionState::over(memory));
                        state.reset();
                        scalar().attend_block(q, cache.block(0), KV_BLOCK_TOKENS, &mut state);
                        let filled = usize::from(filled[row]);
                        scalar().attend_block(q, cache.block(1), filled, &mut state);
                    }
                    for backend in Backend::available() {
                        let mut states = vec![f32::NAN; n * width];
                        for memory in states.chunks_exact_mut(width) {
                            AttentionState::over(memory).reset();
                        }
                        let (first, second) = (cache.block(0), cache.block(1));
                        let whole = vec![KV_BLOCK_TOKENS as u8; n];
                        backend.attend_group(q, first, Some(second), &whole, &mut states);
                        backend.attend_group(q, second, None, &filled, &mut states);
                        let what = format!("dimension {d}, {n} rows, kind {kind}, f16 {f16}");
                        check(backend, &what, &states, &want);
                    }
                }
            }
        }
    }
}

#[test]
fn a_group_sees_any_number_of_tokens_and_no_more() {
    let (d, n) = (24, 5);
    let mut random = Random(34);
    let q = random.floats(n * d);
    for first in 1..=KV_BLOCK_TOKENS {
        for last in first..=KV_BLOCK_TOKENS {
            // Slots that nobody sees hold NaNs.
            let mut cache = Cache::new(true, d, 1);
            for slot in 0..last {
                let (k, v) = (random.floats(d), random.floats(d));
                scalar().store_kv(&k, &v, slot, cache.block_mut(0));
            }
            let filled = [first, last, first, last, last].map(|filled| filled as u8);
            let run = |backend: Backend| {
                let mut states = vec![0.0; n * (ATTENTION_STATE_HEADER + d)];
                for memory in states.chunks_exact_mut(ATTENTION_STATE_HEADER + d) {
                    AttentionState::over(memory).reset();
                }
                backend.attend_group(&q, cache.block(0), None, &filled, &mut states);
                states
            };
            let want = run(scalar());
            assert!(want.iter().all(|x| x.is_finite()), "what is not filled is not seen");
            for backend in Backend::available() {
                check(backend, &format!("{first} and {last} tokens"), &run(backend), &want);
            }
        }
    }
}

#[test]
fn scores_of_any_sign_of_zero_and_infinity() {
    // Keys that make every score -0, then some infinite.
    for backend in Backend::available() {
        let q = [1.0; 16];
        for special in [-0.0, 0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            for at in 0..3 {
                let mut kv = vec![-0.0; 3 * 32];
                kv[at * 32] = special;
                let want = attend(scalar(), &q, &kv, false);
                check(
                    backend,
                    &format!("{special} at {at}"),
                    &attend(backend, &q, &kv, false),
                    &want,
                );
            }
        }
    }
}

#[test]
fn it_is_the_attention_of_the_textbook() {
    let mut random = Random(32);
    for (d, tokens) in [(64, 5), (128, 32), (128, 300), (80, 700)] {
        let (q, kv) = (random.floats(d), random.floats(tokens * 2 * d));
        let score = |token: usize| -> f64 {
            let key = &kv[token * 2 * d..][..d];
            let dot: f64 = q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
            dot / (d as f64).sqrt()
        };
        let p: Vec<f64> = (0..tokens).map(|token| score(token).exp()).collect();
        let total: f64 = p.iter().sum();
        for backend in Backend::available() {
            for (f16, tolerance) in [(false, 1e-6), (true, 1e-3)] {
                let result = attend(backend, &q, &kv, f16);
                for (i, out) in result[ATTENTION_STATE_HEADER + d..].iter().enumerate() {
                    let value = |token: usize| f64::from(kv[token * 2 * d + d + i]);
                    let want = (0..tokens).map(|t| p[t] * value(t)).sum::<f64>() / total;
                    let error = (f64::from(*out) - want).abs();
                    assert!(error < tolerance, "{}: {out} is not {want}", backend.name());
                }
            }
        }
    }
}

#[test]
fn keys_and_values_are_stored_where_the_layout_says() {
    let d = 20;
    for backend in Backend::available() {
        let mut cache = Cache::new(true, d, 1);
        let k: Vec<f32> = (0..d).map(|i| i as f32).collect();
        let v: Vec<f32> = (0..d).map(|i| 100.0 + i as f32).collect();
        backend.store_kv(&k, &v, 5, cache.block_mut(0));
        for i in 0..d {
            assert_eq!(cache.k16[i * 32 + 5], crate::scalar::half::narrow_f16(i as f32));
            assert_eq!(cache.v16[5 * d + i], crate::scalar::half::narrow_f16(100.0 + i as f32));
        }
        let written = cache.k16.iter().chain(&cache.v16).filter(|bits| **bits != 0x7e00).count();
        assert_eq!(written, 2 * d, "{}: nothing else is written", backend.name());
    }
}

#[test]
fn every_rounding_to_f16_equals_the_definition() {
    // A dense walk of all floats, eight at a time.
    let all: Vec<f32> = (0..=u32::MAX).step_by(4_093).map(f32::from_bits).collect();
    for backend in Backend::available() {
        let mut cache = Cache::new(true, 1_024, 1);
        for x in all.chunks_exact(1_024) {
            backend.store_kv(x, x, 0, cache.block_mut(0));
            for (bits, x) in cache.v16.iter().zip(x) {
                let want = crate::scalar::half::narrow_f16(*x);
                assert_eq!(*bits, want, "{}: {x:e}", backend.name());
            }
        }
    }
}
