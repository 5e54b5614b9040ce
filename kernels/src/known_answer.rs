//! The known-answer test: fixed inputs through every kernel. A worker hashes what it yields and
//! publishes the digest; machines whose digests differ never share a pipeline.

use crate::backend::Backend;
use crate::float_matrix::{FloatKind, FloatMatrix};
use crate::scalar::noise::{draw_key, gumbel};
use crate::ternary_matrix::{Arrangement, TernaryMatrix, pack_tile, padded_cols};
use crate::views::{
    ATTENTION_STATE_HEADER, AttentionState, Columns, KV_BLOCK_TOKENS, KvBlockMut, Quantised,
};

/// Rows of activations: one pair, one triple of register tiles and a remainder.
const N: usize = 7;
/// Rows of weights: whole tiles and a short one.
const M: usize = 11;
/// Columns: more than the kernels widen at once, and not whole blocks.
const K: usize = 1_300;
/// Dimension of a head.
const D: usize = 128;
/// Tokens: more than one segment, the last block not full.
const TOKENS: usize = 300;
/// Tokens of an attention segment.
const SEGMENT_TOKENS: usize = 256;

/// Feeds the bytes (little-endian) of a fixed set of results of every kernel to `sink`. They are
/// equal on every backend and every machine; no result is a NaN.
pub fn known_answer(backend: Backend, sink: &mut dyn FnMut(&[u8])) {
    let mut inputs = Inputs(0x9e37_79b9_7f4a_7c15);
    linear_layers(backend, &mut inputs, sink);
    elements(backend, &mut inputs, sink);
    attention(backend, &mut inputs, sink);
    draws(backend, sink);
}

/// A fixed sequence of inputs (xorshift64*), the same on every machine.
pub(crate) struct Inputs(pub(crate) u64);

impl Inputs {
    pub(crate) fn bits(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }

    /// From -4 to 4 in steps of 2^-21, exact.
    pub(crate) fn float(&mut self) -> f32 {
        (self.bits() >> 8) as f32 * (1.0 / 2_097_152.0) - 4.0
    }

    pub(crate) fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.float()).collect()
    }
}

fn feed(x: &[f32], sink: &mut dyn FnMut(&[u8])) {
    for x in x {
        sink(&x.to_le_bytes());
    }
}

fn linear_layers(backend: Backend, inputs: &mut Inputs, sink: &mut dyn FnMut(&[u8])) {
    let stride = padded_cols(K);
    let (mut q, mut scale, mut sum) = (vec![0; N * stride], Vec::new(), Vec::new());
    let x = inputs.floats(N * K);
    for (x, q) in x.chunks(K).zip(q.chunks_mut(stride)) {
        let (row_scale, row_sum) =
            backend.quantise(x, q).expect("the inputs of the known-answer test are finite");
        scale.push(row_scale);
        sum.push(row_sum);
        q.iter().for_each(|q| sink(&q.to_le_bytes()));
    }
    feed(&scale, sink);

    let trits: Vec<i8> = (0..M * K).map(|_| (inputs.bits() % 3) as i8 - 1).collect();
    let rows: Vec<&[i8]> = trits.chunks(K).collect();
    let mut packed = Vec::new();
    for rows in rows.chunks(TernaryMatrix::TILE_ROWS) {
        let mut tile = vec![0; TernaryMatrix::tile_bytes(K)];
        pack_tile(Arrangement::Tiles, rows, K, &mut tile);
        packed.extend(tile);
    }
    let w = TernaryMatrix::new(&packed, Arrangement::Tiles, M, K, 0.75)
        .expect("the matrix was packed for this shape");
    let mut y = vec![0.0; N * M];
    for n in [1, 2, N] {
        let x = Quantised::new(&q[..n * stride], stride, &scale[..n], &sum[..n]);
        backend.ternary(w, 0..w.tiles(), x, Columns::new(&mut y[..n * M], M, 0..M));
        feed(&y[..n * M], sink);
    }

    for kind in [FloatKind::F16, FloatKind::Bf16] {
        // Clear the upper exponent bit: magnitudes below 2, no infinities or NaNs.
        let bits: Vec<u16> = (0..M * K).map(|_| inputs.bits() as u16 & 0xbfff).collect();
        let w = FloatMatrix::new(kind, &bits, M, K).expect("the bits were made for this shape");
        backend.head(w, 0..M, &x, Columns::new(&mut y, M, 0..M));
        feed(&y, sink);
    }
}

fn elements(backend: Backend, inputs: &mut Inputs, sink: &mut dyn FnMut(&[u8])) {
    let (a, b) = (inputs.floats(K), inputs.floats(K));
    let mut y = vec![0.0; K];
    feed(&[backend.dot(&a, &b), backend.sum(&a)], sink);
    backend.rms_norm(&a, &b, 1e-5, &mut y);
    feed(&y, sink);
    backend.squared_relu_mul(&a, &b, &mut y);
    feed(&y, sink);
    backend.silu_mul(&a, &b, &mut y);
    feed(&y, sink);
    backend.add(&mut y, &a);
    feed(&y, sink);

    // Wider than any use: exponents up to 2^121.
    let power_of_two = |i: usize| f32::from_bits((127 + i as u32 % 120) << 23);
    let wide: Vec<f32> = a.iter().enumerate().map(|(i, a)| a * power_of_two(i)).collect();
    backend.exp(&wide, &mut y);
    feed(&y, sink);
    let positive: Vec<f32> = wide.iter().map(|x| x.abs()).collect();
    backend.ln(&positive, &mut y);
    feed(&y, sink);
    backend.sin(&wide, &mut y);
    feed(&y, sink);
    backend.cos(&wide, &mut y);
    feed(&y, sink);

    let frequencies: Vec<f32> = (0..D / 2).map(|i| 1.0 / (1 + i * i) as f32).collect();
    let (mut cos, mut sin) = (vec![0.0; D / 2], vec![0.0; D / 2]);
    backend.rope_table(&frequencies, 4_095, &mut cos, &mut sin);
    feed(&cos, sink);
    feed(&sin, sink);
    let mut head = inputs.floats(D);
    backend.rope(&mut head, &cos, &sin);
    feed(&head, sink);
}

fn draws(backend: Backend, sink: &mut dyn FnMut(&[u8])) {
    for (seed, choice, position) in [(0, 0, 0), (42, 0, 17), (42, 1, 17)] {
        let key = draw_key(seed, choice, position);
        let mut bounds = [0.0; 100];
        backend.noise(key, 0, &mut bounds);
        feed(&bounds, sink);
        (0..100).for_each(|token| sink(&gumbel(key, token).to_le_bytes()));
    }
}

fn attention(backend: Backend, inputs: &mut Inputs, sink: &mut dyn FnMut(&[u8])) {
    let q = inputs.floats(D);
    let keys_and_values = inputs.floats(TOKENS * 2 * D);

    const BLOCK: usize = D * KV_BLOCK_TOKENS;
    let (mut k, mut v) = ([0u16; BLOCK], [0u16; BLOCK]);
    attend(backend, &q, &keys_and_values, KvBlockMut::F16 { k: &mut k, v: &mut v }, sink);
    let (mut k, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
    attend(backend, &q, &keys_and_values, KvBlockMut::F32 { k: &mut k, v: &mut v }, sink);
}

/// Attends with `q` to all tokens (`[TOKENS][key, value][D]`), stored in `block` 32 at a time.
fn attend(
    backend: Backend,
    q: &[f32],
    keys_and_values: &[f32],
    mut block: KvBlockMut<'_>,
    sink: &mut dyn FnMut(&[u8]),
) {
    let mut whole = [0.0; ATTENTION_STATE_HEADER + D];
    for (segment, tokens) in keys_and_values.chunks(SEGMENT_TOKENS * 2 * D).enumerate() {
        let mut memory = [0.0; ATTENTION_STATE_HEADER + D];
        let mut state = AttentionState::over(&mut memory);
        state.reset();
        for tokens in tokens.chunks(KV_BLOCK_TOKENS * 2 * D) {
            let mut filled = 0;
            for kv in tokens.chunks(2 * D) {
                backend.store_kv(&kv[..D], &kv[D..], filled, block.reborrow());
                filled += 1;
            }
            backend.attend_block(q, block.as_block(), filled, &mut state);
        }
        if segment == 0 {
            whole = memory;
        } else {
            let state = AttentionState::over(&mut memory);
            backend.attend_merge(&mut AttentionState::over(&mut whole), &state);
        }
    }
    feed(&whole, sink);
    let mut out = [0.0; D];
    backend.attend_finish(&AttentionState::over(&mut whole), &mut out);
    feed(&out, sink);
}
