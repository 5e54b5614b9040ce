//! The fastest backend for each operation and number of rows, found by measuring. There is no fixed
//! ranking: a CPU may split wide registers, lower its clock for them or lack a unit, and what is fastest
//! for one row is not for sixty. Whoever computes, the bits are the same, so that this may look at a clock.
//!
//! Every operation is small and its operands are in the caches: differences in arithmetic show there, and
//! where memory is the limit they hardly matter.

use std::fmt;
use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::backend::Backend;
use crate::float_matrix::{FloatKind, FloatMatrix};
use crate::known_answer::Inputs;
use crate::screen::{
    Kept, SCREEN_POSITIONS_MAX, ScreenInput, ScreenMatrix, ScreenQuery, Threshold,
    pack_screen_group, screen_cols,
};
use crate::ternary_columns::{ColumnPacker, TernaryColumns, padded_rows};
use crate::ternary_matrix::{Arrangement, TILE_ROWS, TernaryMatrix, pack_tile, padded_cols};
use crate::views::{ATTENTION_STATE_HEADER, Columns, KV_BLOCK_TOKENS, KvBlock, Quantised};
use crate::workspace::Workspace;

/// Times each backend does each operation; its shortest time counts, for what disturbs only adds.
const ROUNDS: usize = 5;
/// How long all of it may take: what is not measured then is done by the widest backend.
const MOST: Duration = Duration::from_millis(100);
/// A wider backend is taken that takes at most so much of the time of the fastest one: the difference is
/// within what measuring so shortly can tell.
const TIE: f64 = 1.05;

/// What is chosen by speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// [`Backend::ternary_many`], by rows of activations.
    Ternary,
    /// [`Backend::head`], by rows of activations.
    Head,
    /// [`Backend::screen`], by positions.
    Screen,
    /// [`Backend::attend_group`], by rows of queries.
    Attention,
    /// [`Backend::ternary_rows`].
    Rows,
    /// [`Backend::ternary_columns`].
    Columns,
}

impl Operation {
    /// Every one.
    pub const ALL: [Self; 6] =
        [Self::Ternary, Self::Head, Self::Screen, Self::Attention, Self::Rows, Self::Columns];

    /// Its name in logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ternary => "ternary products",
            Self::Head => "head",
            Self::Screen => "screen",
            Self::Attention => "attention",
            Self::Rows => "picked rows",
            Self::Columns => "picked columns",
        }
    }

    /// From which numbers of rows on it is measured anew.
    fn steps(self) -> &'static [usize] {
        match self {
            Self::Ternary => &[1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64],
            Self::Head | Self::Screen => &[1, 2, 4, 8, 16],
            Self::Attention => &[1, 4, 8, 24],
            Self::Rows | Self::Columns => &[1],
        }
    }
}

/// The fastest backend for each operation.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mix {
    /// Does what is not measured: the widest.
    pub(crate) base: Backend,
    /// For every operation, in their order: from so many rows on, this one.
    fastest: Vec<Vec<(usize, Backend)>>,
}

impl Mix {
    /// Measures `backends`, slowest first by the width of their registers; there is one at least.
    pub(crate) fn measure(backends: &[Backend], base: Backend) -> Self {
        // The definition is compared with, and serves where there is nothing else.
        let backends = if backends.len() > 1 { &backends[1..] } else { backends };
        let start = Instant::now();
        let mut inputs = Inputs(0x6a09_e667_f3bc_c908);
        let fastest = Operation::ALL.into_iter().map(|operation| {
            let mut trial = Trial::new(operation, &mut inputs);
            let steps = operation.steps().iter();
            let of_step = |&n: &usize| {
                if backends.len() == 1 || start.elapsed() > MOST {
                    return (n, base);
                }
                let mut times = vec![f64::INFINITY; backends.len()];
                // The first round fills the caches.
                for round in 0..=ROUNDS {
                    for (time, backend) in times.iter_mut().zip(backends) {
                        let start = Instant::now();
                        trial.run(*backend, n);
                        if round > 0 {
                            *time = time.min(start.elapsed().as_secs_f64());
                        }
                    }
                }
                (n, backends[choose(&times)])
            };
            steps.map(of_step).collect()
        });
        Self { base, fastest: fastest.collect() }
    }

    /// The one for `n` rows.
    pub(crate) fn of(&self, operation: Operation, n: usize) -> Backend {
        let steps = &self.fastest[operation as usize];
        let step = steps.iter().rev().find(|(from, _)| *from <= n);
        step.map_or(self.base, |(_, backend)| *backend)
    }
}

impl fmt::Display for Mix {
    /// `avx512, amx from 6 rows on` for every operation.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (operation, steps) in Operation::ALL.into_iter().zip(&self.fastest) {
            let separator = if operation == Operation::ALL[0] { "" } else { "; " };
            write!(f, "{separator}{} by ", operation.name())?;
            let mut last = None;
            for (from, backend) in steps {
                match last {
                    None => write!(f, "{}", backend.name())?,
                    Some(last) if last == backend => {}
                    Some(_) => write!(f, ", {} from {from} rows on", backend.name())?,
                }
                last = Some(backend);
            }
        }
        Ok(())
    }
}

/// The last of `times` that is as good as the shortest.
fn choose(times: &[f64]) -> usize {
    let least = times.iter().copied().fold(f64::INFINITY, f64::min);
    times.iter().rposition(|time| *time <= least * TIE).unwrap_or(0)
}

/// Operands of one operation.
struct Trial {
    operation: Operation,
    bytes: Vec<u8>,
    floats: Vec<f32>,
    halves: Vec<u16>,
    codes: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
    queries: Vec<ScreenQuery>,
    out: Vec<f32>,
    totals: Vec<i32>,
    workspace: Workspace,
}

/// Rows and columns of weights: a fraction of a second-level cache, and whole bands.
const M: usize = 256;
const K: usize = 2560;
/// Rows of the head, and of a group of its screen.
const HEAD_ROWS: usize = ScreenMatrix::GROUP_ROWS;
/// Dimension of an attention head, and blocks that are attended to.
const D: usize = 128;
const BLOCKS: usize = 4;
/// Rows or columns that are picked: every third.
const PICKED: usize = M / 3;

impl Trial {
    fn new(operation: Operation, inputs: &mut Inputs) -> Self {
        let most = operation.steps().iter().copied().max().unwrap_or(1);
        let mut trial = Self {
            operation,
            bytes: Vec::new(),
            floats: Vec::new(),
            halves: Vec::new(),
            codes: (0..most * padded_cols(K)).map(|_| inputs.bits() as i8).collect(),
            scales: vec![1.0; most],
            sums: Vec::new(),
            queries: Vec::new(),
            out: vec![0.0; most * M],
            totals: vec![0; padded_rows(M)],
            workspace: Workspace::new(),
        };
        let of_row = |row: &[i8]| row.iter().map(|q| i32::from(*q)).sum();
        trial.sums = trial.codes.chunks(padded_cols(K)).map(of_row).collect();
        let mut trits = |count: usize| -> Vec<i8> {
            (0..count).map(|_| (inputs.bits() % 3) as i8 - 1).collect()
        };
        match operation {
            Operation::Ternary | Operation::Rows => {
                let arrangement = arrangement(operation);
                let tile_bytes = TernaryMatrix::tile_bytes(K);
                trial.bytes = vec![0; M / TILE_ROWS * tile_bytes];
                for tile in trial.bytes.chunks_mut(tile_bytes) {
                    let trits = trits(TILE_ROWS * K);
                    pack_tile(arrangement, &trits.chunks(K).collect::<Vec<_>>(), K, tile);
                }
            }
            Operation::Columns => {
                let trits = trits(M * K);
                if let Some(mut packer) = ColumnPacker::new(M, K) {
                    trits.chunks(K).enumerate().for_each(|(row, trits)| packer.row(row, trits));
                    trial.bytes = packer.finish();
                }
            }
            Operation::Head => {
                // bf16 of 1 to 2, of either sign.
                let float = |bits: u32| 0x3f80 | (bits as u16 & 0x807f);
                trial.halves = (0..HEAD_ROWS * K).map(|_| float(inputs.bits())).collect();
                trial.floats = inputs.floats(most * K);
            }
            Operation::Screen => {
                let rows: Vec<_> = (0..HEAD_ROWS).map(|_| inputs.floats(K)).collect();
                trial.bytes = vec![0; ScreenMatrix::group_bytes(K)];
                let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
                pack_screen_group(&rows, K, &mut trial.bytes);
                trial.codes = vec![0; most * 2 * screen_cols(K)];
                for codes in trial.codes.chunks_mut(2 * screen_cols(K)) {
                    trial.queries.extend(ScreenQuery::new(&inputs.floats(K), codes));
                }
            }
            Operation::Attention => {
                trial.halves = vec![0x3c00; 2 * BLOCKS * D * KV_BLOCK_TOKENS];
                trial.floats = inputs.floats(most * D);
                trial.out = vec![0.0; most * (ATTENTION_STATE_HEADER + D)];
            }
        }
        trial
    }

    /// Does the operation once with `n` rows.
    fn run(&mut self, backend: Backend, n: usize) {
        let stride = padded_cols(K);
        let x = |codes| Quantised::new(codes, stride, &self.scales[..n], &self.sums[..n]);
        match self.operation {
            Operation::Ternary => {
                let x = x(&self.codes[..n * stride]);
                let w = TernaryMatrix::new(&self.bytes, arrangement(self.operation), M, K, 1.0);
                let Ok(w) = w else { return };
                let height = backend.cut(n).tokens.min(n);
                for first in (0..n).step_by(height.max(1)) {
                    let tokens = first..n.min(first + height);
                    let y = Columns::new(&mut self.out[..tokens.len() * M], M, 0..M);
                    let workspace = &mut self.workspace;
                    backend.ternary_many(w, 0..w.tiles(), x.part(tokens), y, workspace);
                }
            }
            Operation::Rows => {
                let w = TernaryMatrix::new(&self.bytes, arrangement(self.operation), M, K, 1.0);
                let Ok(w) = w else { return };
                let rows: [u32; PICKED] = std::array::from_fn(|i| 3 * i as u32);
                let x = x(&self.codes[..n * stride]);
                backend.ternary_rows(w, &rows, x, &mut self.out[..PICKED]);
            }
            Operation::Columns => {
                let Ok(w) = TernaryColumns::new(&self.bytes, M, K, 1.0) else { return };
                let columns: [u32; PICKED] = std::array::from_fn(|i| 3 * i as u32);
                self.totals.fill(0);
                let x = x(&self.codes[..n * stride]);
                backend.ternary_columns(w, &columns, x, &mut self.totals);
            }
            Operation::Head => {
                let w = FloatMatrix::new(FloatKind::Bf16, &self.halves, HEAD_ROWS, K);
                let Ok(w) = w else { return };
                let y = Columns::new(&mut self.out[..n * HEAD_ROWS], HEAD_ROWS, 0..HEAD_ROWS);
                backend.head(w, 0..HEAD_ROWS, &self.floats[..n * K], y);
            }
            Operation::Screen => {
                let Ok(w) = ScreenMatrix::new(&self.bytes, HEAD_ROWS, K) else { return };
                let codes = &self.codes[..n * 2 * screen_cols(K)];
                let x = ScreenInput::new(codes, &self.queries[..n], K);
                let mut kept = [Kept::default(); SCREEN_POSITIONS_MAX];
                // Nothing is settled, so both planes are read.
                let thresholds = [Threshold::of_logits(f64::NEG_INFINITY); SCREEN_POSITIONS_MAX];
                black_box(backend.screen(w, 0, x, &thresholds[..n], &mut kept[..n]));
            }
            Operation::Attention => {
                let size = D * KV_BLOCK_TOKENS;
                let states = &mut self.out[..n * (ATTENTION_STATE_HEADER + D)];
                let filled = vec![KV_BLOCK_TOKENS as u8; n];
                for block in self.halves.chunks(2 * size) {
                    let (k, v) = block.split_at(size);
                    let block = KvBlock::F16 { k, v };
                    backend.attend_group(&self.floats[..n * D], block, None, &filled, states);
                }
            }
        }
        black_box(&mut self.out);
    }
}

/// How the weights of an operation lie.
fn arrangement(operation: Operation) -> Arrangement {
    match operation {
        Operation::Rows => Arrangement::Rows,
        _ => Arrangement::Tiles,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_is_taken_and_the_widest_of_equals() {
        assert_eq!(choose(&[3.0, 1.0, 2.0]), 1);
        assert_eq!(choose(&[1.0, 1.0, 1.0 + 0.9 * (TIE - 1.0)]), 2);
        assert_eq!(choose(&[1.0, 1.0, 1.0 + 1.1 * (TIE - 1.0)]), 1);
        assert_eq!(choose(&[1.0]), 0);
    }

    #[test]
    fn every_number_of_rows_has_a_backend() {
        let proven: Vec<_> = Backend::available().collect();
        let base = proven[proven.len() - 1];
        let mix = Mix::measure(&proven, base);
        for operation in Operation::ALL {
            for n in [1, 5, 7, 100, 4096] {
                assert!(proven.contains(&mix.of(operation, n)), "{operation:?} of {n}");
            }
        }
        let text = mix.to_string();
        assert!(Operation::ALL.iter().all(|it| text.contains(it.name())), "{text}");
    }

    #[test]
    fn steps_ascend_from_one() {
        for operation in Operation::ALL {
            let steps = operation.steps();
            assert!(steps[0] == 1 && steps.is_sorted(), "{operation:?}");
        }
    }
}
