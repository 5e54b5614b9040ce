//! The proof of a backend at start-up: small known answers through every operation, compared with
//! those of the scalar definition, so that a CPU, a compiler or an emulator that computes something
//! else is found before it serves anyone. The thorough comparison is that of the tests.

use crate::backend::Backend;
use crate::float_matrix::{FloatKind, FloatMatrix};
use crate::known_answer::Inputs;
use crate::scalar::noise::draw_key;
use crate::screen::{
    Kept, ScreenInput, ScreenMatrix, ScreenQuery, Threshold, pack_screen_group, screen_cols,
};
use crate::ternary_columns::{ColumnPacker, TernaryColumns, padded_rows};
use crate::ternary_matrix::{Arrangement, TernaryMatrix, pack_tile, padded_cols};
use crate::views::{
    ATTENTION_STATE_HEADER, AttentionState, Columns, KV_BLOCK_TOKENS, KvBlockMut, Quantised,
};
use crate::workspace::Workspace;

/// Computes answers with the backend it is given.
type Check = fn(Backend, &mut Inputs, &mut Answers);

/// What is compared, by name. An operation that is dispatched has its place here; a test looks for
/// it.
const CHECKS: &[(&str, Check)] = &[
    ("quantisation", quantise),
    ("ternary products", ternary),
    ("ternary products of many rows", ternary_many),
    ("products that skip zeros", sparse),
    ("the head", head),
    ("the screen of the head", screen),
    ("sums and norms", reductions),
    ("gates and additions", elements),
    ("exp, ln, sin and cos", functions),
    ("bounds of noise", noise),
    ("RoPE", rope),
    ("attention", attention),
];

/// What the definition gives.
pub(crate) struct Proof {
    /// `[checks]`
    expected: Vec<Answers>,
}

impl Proof {
    /// Computes the answers of the definition.
    pub(crate) fn new(definition: Backend) -> Self {
        let expected = (0..CHECKS.len()).map(|check| answers(definition, check)).collect();
        Self { expected }
    }

    /// Compares the answers of `backend`.
    ///
    /// # Errors
    ///
    /// The name of the first operation whose results differ.
    pub(crate) fn check(&self, backend: Backend) -> Result<(), &'static str> {
        for (check, expected) in self.expected.iter().enumerate() {
            if answers(backend, check) != *expected {
                return Err(CHECKS[check].0);
            }
        }
        Ok(())
    }
}

fn answers(backend: Backend, check: usize) -> Answers {
    let mut answers = Answers(Vec::new());
    CHECKS[check].1(backend, &mut Inputs(0x2545_f491_4f6c_dd1d), &mut answers);
    answers
}

/// Bits of results. None is a NaN: its bits are not defined.
#[derive(PartialEq, Eq)]
struct Answers(Vec<u32>);

impl Answers {
    fn floats(&mut self, x: &[f32]) {
        self.0.extend(x.iter().map(|x| x.to_bits()));
    }

    fn codes(&mut self, q: &[i8]) {
        self.0.extend(q.iter().map(|q| *q as u32));
    }
}

/// Finite floats of every kind: zeros of both signs, subnormals, the largest, ties of rounding.
const EDGES: [f32; 16] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    -1.5,
    2.5,
    f32::MAX,
    f32::MIN,
    f32::MIN_POSITIVE,
    f32::from_bits(1),
    f32::from_bits(0x807f_ffff),
    65_504.0,
    88.72284,
    -87.33655,
    -103.98,
];

fn quantise(backend: Backend, inputs: &mut Inputs, answers: &mut Answers) {
    let mut q = [0; padded_cols(300)];
    let mut row = |x: &[f32]| match backend.quantise(x, &mut q) {
        Ok((scale, sum)) => {
            answers.codes(&q);
            answers.floats(&[scale]);
            answers.0.push(sum as u32);
        }
        Err(not_finite) => answers.0.push(not_finite.index as u32),
    };
    let mut x = inputs.floats(300);
    row(&x);
    let halves: Vec<f32> = (0..=254).map(|i| (i - 127) as f32 + 0.5).collect();
    row(&halves);
    row(&EDGES);
    row(&[1e-7; 41]);
    (x[77], x[299]) = (f32::NAN, f32::INFINITY);
    row(&x);
}

/// Random codes of some rows of activations; the second and the third are of the extremes, of which no
/// sum may saturate or wrap.
struct Codes {
    q: Vec<i8>,
    stride: usize,
    scale: Vec<f32>,
    sum: Vec<i32>,
}

impl Codes {
    fn new(inputs: &mut Inputs, n: usize, cols: usize) -> Self {
        let stride = padded_cols(cols);
        let mut q = vec![0; n * stride];
        for (i, row) in q.chunks_mut(stride).enumerate() {
            match i {
                1 => row[..cols].fill(-128),
                2 => row[..cols].fill(127),
                _ => row[..cols].fill_with(|| inputs.bits() as i8),
            }
        }
        let sum = q.chunks(stride).map(|row| row.iter().map(|q| i32::from(*q)).sum()).collect();
        let scale = (0..n).map(|_| 9.0 + inputs.float()).collect();
        Self { q, stride, scale, sum }
    }

    fn view(&self) -> Quantised<'_> {
        Quantised::new(&self.q, self.stride, &self.scale, &self.sum)
    }
}

/// A whole matrix of such rows, each of `cols` trits.
fn pack_rows(arrangement: Arrangement, rows: &[&[i8]], cols: usize) -> Vec<u8> {
    let mut packed =
        vec![0; rows.len().div_ceil(TernaryMatrix::TILE_ROWS) * TernaryMatrix::tile_bytes(cols)];
    let tiles = packed.chunks_mut(TernaryMatrix::tile_bytes(cols));
    for (tile, rows) in tiles.zip(rows.chunks(TernaryMatrix::TILE_ROWS)) {
        pack_tile(arrangement, rows, cols, tile);
    }
    packed
}

/// Matrices packed from random trits: more columns than any kernel gathers at once, tiles whole and
/// short; and more than few rows of activations are kept together for.
fn ternary(backend: Backend, inputs: &mut Inputs, answers: &mut Answers) {
    /// Every register tile and its remainders; a second group.
    const N: [usize; 11] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 35];

    for (rows, cols, counts) in [(6, 2_400, &N[..]), (3, 8_300, &N[..5])] {
        let trits: Vec<i8> = (0..rows * cols).map(|_| (inputs.bits() % 3) as i8 - 1).collect();
        let codes = Codes::new(inputs, counts[counts.len() - 1], cols);
        let ones = vec![1; cols];
        let mut trits: Vec<&[i8]> = trits.chunks(cols).collect();
        trits[rows - 2] = &ones;
        for arrangement in [Arrangement::Tiles, Arrangement::Rows] {
            let packed = pack_rows(arrangement, &trits, cols);
            let w = TernaryMatrix::new(&packed, arrangement, rows, cols, 0.37);
            let w = w.expect("packed for this shape");
            // The extremes alone, too: one row has a kernel of its own.
            for tokens in counts.iter().map(|n| 0..*n).chain([1..2, 2..3]) {
                let mut y = vec![0.0; tokens.len() * rows];
                let x = codes.view().part(tokens);
                backend.ternary(w, 0..w.tiles(), x, Columns::new(&mut y, rows, 0..rows));
                answers.floats(&y);
            }
        }
    }
}

/// A panel and a short one, extremes among them, by more rows than pay for what is prepared for one and
/// more columns than are unpacked at once; and so few that their sums stay where they are.
fn ternary_many(backend: Backend, inputs: &mut Inputs, answers: &mut Answers) {
    const ROWS: usize = 102;
    const COLS: usize = 700;
    const N: [usize; 3] = [Workspace::PANEL + 30, 20, 9];

    let trits: Vec<i8> = (0..ROWS * COLS).map(|_| (inputs.bits() % 3) as i8 - 1).collect();
    let codes = Codes::new(inputs, N[0], COLS);
    let rows: Vec<&[i8]> = trits.chunks(COLS).collect();
    let mut workspace = Workspace::new();
    for arrangement in [Arrangement::Tiles, Arrangement::Rows] {
        let packed = pack_rows(arrangement, &rows, COLS);
        let w = TernaryMatrix::new(&packed, arrangement, ROWS, COLS, 0.37);
        let w = w.expect("packed for this shape");
        for n in N {
            let mut y = vec![0.0; n * ROWS];
            let columns = Columns::new(&mut y, ROWS, 0..ROWS);
            let x = codes.view().part(0..n);
            backend.ternary_many(w, 0..w.tiles(), x, columns, &mut workspace);
            answers.floats(&y);
        }
    }
}

/// Lists of what is not zero, and the products of what is listed: pairs of columns and an odd one,
/// more than are gathered at once; groups of rows and a short one; extremes that may not wrap.
fn sparse(backend: Backend, inputs: &mut Inputs, answers: &mut Answers) {
    const ROWS: usize = 262;
    const COLS: usize = 301;
    const STRIDE: usize = padded_cols(COLS);

    let trits: Vec<i8> = (0..ROWS * COLS).map(|_| (inputs.bits() % 3) as i8 - 1).collect();
    let mut columns = ColumnPacker::new(ROWS, COLS).expect("a shape that can be");
    let rows: Vec<&[i8]> = trits.chunks(COLS).collect();
    rows.iter().enumerate().for_each(|(row, trits)| columns.row(row, trits));
    let packed = pack_rows(Arrangement::Rows, &rows, COLS);
    let columns = columns.finish();
    let by_columns = TernaryColumns::new(&columns, ROWS, COLS, 0.37).expect("packed for it");
    let by_rows = TernaryMatrix::new(&packed, Arrangement::Rows, ROWS, COLS, 0.37);
    let by_rows = by_rows.expect("packed for it");

    let mut gate = inputs.floats(ROWS);
    gate[..EDGES.len()].copy_from_slice(&EDGES);
    gate[ROWS - 1] = f32::NAN;
    let (mut places, mut y) = ([0; ROWS + COLS], [0.0; ROWS]);
    for zeros in [0, 3] {
        let mut q = [0; STRIDE];
        for (i, q) in q[..COLS].iter_mut().enumerate() {
            *q = if zeros == 0 {
                -128
            } else if i % 4 < zeros {
                0
            } else {
                inputs.bits() as i8
            };
        }
        let (scale, sum) = ([9.0], [q.iter().map(|q| i32::from(*q)).sum()]);
        let x = Quantised::new(&q, STRIDE, &scale, &sum);
        let count = backend.nonzero(&q[..COLS], &mut places);
        answers.0.extend_from_slice(&places[..count]);
        let mut sums = [0; padded_rows(ROWS)];
        backend.ternary_columns(by_columns, &places[..count], x, &mut sums);
        answers.0.extend(sums.map(|sum| sum as u32));
        let count = backend.positive(&gate, 0, &mut places);
        answers.0.extend_from_slice(&places[..count]);
        backend.ternary_rows(by_rows, &places[..count], x, &mut y[..count]);
        answers.floats(&y);
    }
}

fn head(backend: Backend, inputs: &mut Inputs, answers: &mut Answers) {
    const ROWS: usize = 13;
    const MOST: usize = 9;
    let shapes =
        [(FloatKind::Bf16, 83), (FloatKind::F16, 83), (FloatKind::Bf16, 5), (FloatKind::Bf16, 301)];
    for (kind, cols) in shapes {
        // Without the upper bit of the exponent: magnitudes below 2, subnormals among them.
        let bits: Vec<u16> = (0..ROWS * cols).map(|_| inputs.bits() as u16 & 0xbfff).collect();
        let w = FloatMatrix::new(kind, &bits, ROWS, cols).expect("made for this shape");
        let x = inputs.floats(MOST * cols);
        for n in 1..=MOST {
            let mut y = [0.0; MOST * ROWS];
            let y = &mut y[..n * ROWS];
            backend.head(w, 0..ROWS, &x[..n * cols], Columns::new(y, ROWS, 0..ROWS));
            answers.floats(y);
        }
    }
}

/// Which rows are kept, with thresholds among the logits and among scores, and single rows.
fn screen(backend: Backend, inputs: &mut Inputs, answers: &mut Answers) {
    const ROWS: usize = 64;
    const COLS: usize = 1_400;
    const POSITIONS: usize = 15;
    let mut bits: Vec<u16> =
        (0..ROWS * COLS).map(|_| (inputs.float().to_bits() >> 16) as u16).collect();
    // Rows and activations of the greatest codes, of which no sum may saturate or wrap.
    bits[..COLS].fill(0x3f80);
    bits[COLS..2 * COLS].fill(0xbf80);
    let w = FloatMatrix::new(FloatKind::Bf16, &bits, ROWS, COLS).expect("made for this shape");
    let mut wide = vec![0.0; ROWS * COLS];
    wide.chunks_mut(COLS).enumerate().for_each(|(row, wide)| w.widen_row(row, wide));
    let mut packed = vec![0; ScreenMatrix::group_bytes(COLS)];
    pack_screen_group(&wide.chunks(COLS).collect::<Vec<_>>(), COLS, &mut packed);
    let screen = ScreenMatrix::new(&packed, ROWS, COLS).expect("packed for this shape");
    let mut x = inputs.floats(POSITIONS * COLS);
    x[COLS..2 * COLS].fill(3.0);
    // So much above the others that a second plane of codes is needed.
    x[2 * COLS] = 500.0;
    let stride = 2 * screen_cols(COLS);
    let mut codes = vec![0; POSITIONS * stride];
    let rows = x.chunks(COLS).zip(codes.chunks_mut(stride));
    let queries: Vec<_> =
        rows.map(|(x, codes)| ScreenQuery::new(x, codes).expect("finite")).collect();
    // The last are many of one plane each, of which two thresholds say enough.
    for (from, to) in [(0, 1), (1, 2), (2, 3), (0, 3), (0, 9), (3, POSITIONS)] {
        let step = if to == POSITIONS { 5 } else { 1 };
        let input = ScreenInput::new(&codes[from * stride..to * stride], &queries[from..to], COLS);
        let most: [f32; ROWS] = std::array::from_fn(|row| row as f32 / 4.0);
        let of_logits = [-500.0, -10.0, 0.0, 3.0, 10.0, 4_199.0].map(Threshold::of_logits);
        let of_scores = [-20.0, 7.0].map(|least| Threshold::of_scores(least, 3.0, &most));
        let with_bounds = of_scores.map(Threshold::with_bounds);
        let thresholds = of_logits.into_iter().chain(of_scores).chain(with_bounds);
        for threshold in thresholds.step_by(step) {
            let mut kept = [Kept::default(); POSITIONS];
            let thresholds = [threshold; POSITIONS];
            let n = to - from;
            let bytes = backend.screen(screen, 0, input, &thresholds[..n], &mut kept[..n]);
            answers.0.push(bytes as u32);
            for Kept { rows, bounds } in kept {
                answers.0.extend([rows as u32, (rows >> 32) as u32]);
                answers.floats(&bounds);
            }
        }
    }
    // Eight together, and some that are left.
    let mut y = [0.0; 11];
    backend.head_rows(w, &[63, 0, 17, 17, 1, 2, 3, 5, 8, 13, 21], &x[..COLS], &mut y);
    answers.floats(&y);
}

fn reductions(backend: Backend, inputs: &mut Inputs, answers: &mut Answers) {
    for length in [0, 1, 7, 8, 15, 16, 17, 31, 33, 100, 257] {
        let (a, b) = (inputs.floats(length), inputs.floats(length));
        answers.floats(&[backend.dot(&a, &b), backend.sum(&a)]);
        if length > 0 {
            let mut y = vec![0.0; length];
            backend.rms_norm(&a, &b, 1e-5, &mut y);
            answers.floats(&y);
        }
    }
    // Lanes that get nothing keep their -0.
    answers.floats(&[backend.dot(&[-0.0; 3], &[1.0; 3]), backend.sum(&[-0.0; 33])]);
    answers.floats(&[backend.dot(&EDGES[..7], &EDGES[5..12])]);
}

fn elements(backend: Backend, inputs: &mut Inputs, answers: &mut Answers) {
    let mut gate = inputs.floats(61);
    gate[..EDGES.len()].copy_from_slice(&EDGES);
    let up: Vec<f32> = inputs.floats(61);
    let mut y = vec![0.0; 61];
    backend.silu_mul(&gate, &up, &mut y);
    answers.floats(&y);
    backend.add(&mut y, &gate);
    answers.floats(&y);
    // A closed gate, by definition.
    (gate[3], gate[60]) = (f32::NAN, -f32::NAN);
    backend.squared_relu_mul(&gate, &up, &mut y);
    answers.floats(&y);
}

fn functions(backend: Backend, inputs: &mut Inputs, answers: &mut Answers) {
    // Of every magnitude, up to 2^121.
    let power_of_two = |i: usize| f32::from_bits((8 + i as u32 % 240) << 23);
    let mut x: Vec<f32> = (0..261).map(|i| inputs.float() * power_of_two(i)).collect();
    x[..EDGES.len()].copy_from_slice(&EDGES);
    let mut y = vec![0.0; x.len()];
    backend.exp(&x, &mut y);
    answers.floats(&y);
    backend.sin(&x, &mut y);
    answers.floats(&y);
    backend.cos(&x, &mut y);
    answers.floats(&y);
    let small = inputs.floats(100);
    backend.exp(&small, &mut y[..100]);
    answers.floats(&y[..100]);
    x.iter_mut().for_each(|x| *x = x.abs());
    backend.ln(&x, &mut y);
    answers.floats(&y);
}

fn noise(backend: Backend, _: &mut Inputs, answers: &mut Answers) {
    for (key, first) in [(0, 0), (draw_key(42, 1, 17), 64), (u64::MAX, u32::MAX - 3)] {
        let mut bounds = [0.0; 77];
        backend.noise(key, first, &mut bounds);
        answers.floats(&bounds);
    }
}

fn rope(backend: Backend, inputs: &mut Inputs, answers: &mut Answers) {
    let frequencies: Vec<f32> = (0..21).map(|i| 1.0 / (1 + i * i) as f32).collect();
    let (mut cos, mut sin) = ([0.0; 21], [0.0; 21]);
    for position in [0, 7, 40_001] {
        backend.rope_table(&frequencies, position, &mut cos, &mut sin);
        answers.floats(&cos);
        answers.floats(&sin);
        let mut x = inputs.floats(42);
        backend.rope(&mut x, &cos, &sin);
        answers.floats(&x);
    }
}

fn attention(backend: Backend, inputs: &mut Inputs, answers: &mut Answers) {
    // Whole registers, and what is left over.
    for d in [64, 36] {
        let size = d * KV_BLOCK_TOKENS;
        let (mut k, mut v) = (vec![0u16; size], vec![0u16; size]);
        attend(backend, d, KvBlockMut::F16 { k: &mut k, v: &mut v }, inputs, answers);
        answers.0.extend(k.iter().chain(&v).map(|bits| u32::from(*bits)));
        let (mut k, mut v) = (vec![0.0; size], vec![0.0; size]);
        attend(backend, d, KvBlockMut::F32 { k: &mut k, v: &mut v }, inputs, answers);
        answers.floats(&k);
        answers.floats(&v);
    }
}

/// A full block, then some tokens of the next one, then a segment of their own that is merged.
fn attend(
    backend: Backend,
    d: usize,
    mut block: KvBlockMut<'_>,
    inputs: &mut Inputs,
    answers: &mut Answers,
) {
    let q = inputs.floats(d);
    let mut memory = vec![0.0; ATTENTION_STATE_HEADER + d];
    let mut next = memory.clone();
    let mut state = AttentionState::over(&mut memory);
    let mut other = AttentionState::over(&mut next);
    state.reset();
    other.reset();
    for filled in [KV_BLOCK_TOKENS, 11] {
        for slot in 0..filled {
            // Among them subnormals of f16.
            let small = if slot % 5 == 0 { 1.0 / 16_384.0 } else { 1.0 };
            let scaled: Vec<f32> = inputs.floats(2 * d).iter().map(|x| x * small).collect();
            backend.store_kv(&scaled[..d], &scaled[d..], slot, block.reborrow());
        }
        backend.attend_block(&q, block.as_block(), filled, &mut state);
    }
    backend.attend_block(&q, block.as_block(), 3, &mut other);
    backend.attend_merge(&mut state, &other);
    let mut out = vec![0.0; d];
    backend.attend_finish(&state, &mut out);
    answers.floats(&out);
    answers.floats(&memory);

    // So many rows that every number that passes over a block together is among them.
    for n in [2, 3, 6, 7, 8, 9] {
        let q = inputs.floats(n * d);
        let filled: Vec<u8> = (0..n).map(|row| 9 + row as u8 / 4).collect();
        let mut states = vec![0.0; n * (ATTENTION_STATE_HEADER + d)];
        for memory in states.chunks_exact_mut(ATTENTION_STATE_HEADER + d) {
            AttentionState::over(memory).reset();
        }
        backend.attend_group(&q, block.as_block(), None, &filled, &mut states);
        answers.floats(&states);
    }
}
