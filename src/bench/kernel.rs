//! Each product by shape, rows of activations, instruction set and threads, on the shapes of
//! BitNet b1.58 2B4T.

use std::hint::black_box;
use std::str::FromStr;
use std::sync::Mutex;

use kernels::{
    Arrangement, Backend, Columns, FloatKind, FloatMatrix, Operation, Quantised, TernaryMatrix,
    Workspace, padded_cols,
};
use serde::Serialize;

use super::limits::{self, Limits, Memory};
use super::{LINE_BYTES, Report, Spread, aligned, team};
use crate::random::Random;

/// Packed weights that are passed through in turn: several times the last cache of a small
/// machine, so that a matrix has left it before its turn comes again.
const POOL_BYTES: usize = 256 << 20;

/// How long one repeat shall take, in seconds; a single pass may take longer.
const REPEAT_SECONDS: f64 = 0.05;

/// Times a product is measured; the middle one counts.
const REPEATS: usize = 5;

/// Rows of activations that can be asked for: as many as a step has by default, several times.
pub const ROWS_MAX: usize = 1024;

/// A product of BitNet b1.58 2B4T.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Queries.
    Q,
    /// Keys, or values.
    Kv,
    /// Output of attention.
    O,
    /// Gate, or up.
    Gate,
    /// Down.
    Down,
    /// The logits, from bf16 weights.
    Head,
}

impl Shape {
    /// Every one.
    pub const ALL: [Self; 6] = [Self::Q, Self::Kv, Self::O, Self::Gate, Self::Down, Self::Head];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q",
            Self::Kv => "kv",
            Self::O => "o",
            Self::Gate => "gate",
            Self::Down => "down",
            Self::Head => "head",
        }
    }

    /// By what kernels are chosen for it.
    pub fn operation(self) -> Operation {
        match self {
            Self::Head => Operation::Head,
            _ => Operation::Ternary,
        }
    }

    /// Rows (outputs) and columns (inputs) of its weights.
    pub fn size(self) -> (usize, usize) {
        match self {
            Self::Q | Self::O => (2560, 2560),
            Self::Kv => (640, 2560),
            Self::Gate => (6912, 2560),
            Self::Down => (2560, 6912),
            Self::Head => (128_256, 2560),
        }
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|shape| shape.name() == text);
        found.ok_or_else(|| format!("must be one of {}", Self::ALL.map(Self::name).join(", ")))
    }
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which products.
    pub shapes: Vec<Shape>,
    /// Rows of activations.
    pub rows: Vec<usize>,
    /// Which kernels.
    pub backends: Vec<Backend>,
    /// Numbers of threads, which share the rows of the weights.
    pub threads: Vec<usize>,
    /// Bytes of weights that are passed through in turn.
    pub pool_bytes: usize,
    /// Memory that is read for the limit of the bandwidth, in bytes.
    pub read_bytes: usize,
}

impl Default for Options {
    /// Everything, with all kernels that this CPU runs and every core.
    fn default() -> Self {
        Self {
            shapes: Shape::ALL.to_vec(),
            rows: vec![1, 2, 4, 8, 16, 32],
            backends: super::vector_backends(),
            threads: vec![std::thread::available_parallelism().map_or(1, usize::from)],
            pool_bytes: POOL_BYTES,
            read_bytes: limits::READ_BYTES,
        }
    }
}

/// One product measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Timing {
    /// Which.
    pub shape: Shape,
    /// Rows of weights.
    pub m: usize,
    /// Columns of weights.
    pub k: usize,
    /// Rows of activations.
    pub rows: usize,
    /// Which kernels.
    pub isa: &'static str,
    /// They are what is used if nobody says otherwise.
    pub chosen: bool,
    /// Threads.
    pub threads: usize,
    /// Microseconds of one product.
    pub us: Spread,
    /// Multiply-adds, in 10^9 per second, of the median.
    pub mac_g_per_s: f64,
    /// Weights read, in 10^9 bytes per second, of the median.
    pub gb_per_s: f64,
    /// Of the bandwidth.
    pub share_of_read: f64,
    /// Of the multiply-adds that the machine can do in this form: ternary ones in int8, the head's
    /// in f32.
    pub share_of_mac: f64,
}

/// Every product measured, and against what.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Timings {
    /// Of every pair of kernels and threads, in the order in which they were measured.
    pub limits: Vec<IsaLimits>,
    /// In the order of threads, shapes, rows, kernels.
    pub kernels: Vec<Timing>,
}

/// How much slower than another one the chosen kernels may be.
pub const SLOWER_MOST: f64 = 0.10;

impl Timings {
    /// The products for which other kernels were faster than the chosen ones by more than
    /// [`SLOWER_MOST`]: the chosen ones, and the fastest.
    pub fn badly_chosen(&self) -> Vec<(&Timing, &Timing)> {
        let same =
            |a: &Timing, b: &Timing| (a.shape, a.rows, a.threads) == (b.shape, b.rows, b.threads);
        let of_chosen = |chosen: &&Timing| chosen.chosen;
        let fastest = |chosen: &Timing| {
            let others = self.kernels.iter().filter(|other| same(chosen, other));
            others.max_by(|a, b| a.mac_g_per_s.total_cmp(&b.mac_g_per_s))
        };
        let pairs = self.kernels.iter().filter(of_chosen).filter_map(|it| Some((it, fastest(it)?)));
        let is_bad = |(chosen, fastest): &(&Timing, &Timing)| {
            chosen.mac_g_per_s * (1.0 + SLOWER_MOST) < fastest.mac_g_per_s
        };
        pairs.filter(is_bad).collect()
    }
}

/// What some threads can do with some kernels.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct IsaLimits {
    /// Which kernels.
    pub isa: &'static str,
    /// What they can do.
    #[serde(flatten)]
    pub limits: Limits,
}

/// Measures them. Takes up to a second for each product, more for the scalar ones.
pub fn measure(options: &Options, report: Report<'_>) -> Timings {
    let products = options.shapes.len() * options.rows.len();
    let total = (options.threads.len() * options.backends.len() * (products + 1)) as u64;
    let mut done = 0;
    let mut next = |what: &str| {
        report(what, done, total);
        done += 1;
    };
    let mut random = Random(1);
    let pool = Pool::new(options, &mut random);
    let memory = Memory::new(options.read_bytes);
    let mut timings = Timings { limits: Vec::new(), kernels: Vec::new() };
    for &threads in &options.threads {
        for &backend in &options.backends {
            let isa = backend.name();
            next(&format!("limits, {isa}, {threads} threads"));
            let limits = limits::measure(backend, threads, &memory).limits;
            timings.limits.push(IsaLimits { isa, limits });
        }
        let of_backends = timings.limits[timings.limits.len() - options.backends.len()..].to_vec();
        // Kernel beside kernel, so that all of them meet the same disturbances.
        for &shape in &options.shapes {
            for &rows in &options.rows {
                for (&backend, IsaLimits { isa, limits }) in
                    options.backends.iter().zip(&of_backends)
                {
                    next(&format!("{} of {rows} rows, {isa}, {threads} threads", shape.name()));
                    let case = Case { shape, rows, backend, threads };
                    timings.kernels.push(case.measure(&pool, *limits, &mut random));
                }
            }
        }
    }
    timings
}

/// Random weights for every product.
struct Pool {
    /// Four trits each, none of them invalid.
    ternary: Vec<u8>,
    /// bf16 of ordinary magnitude.
    head: Vec<u16>,
}

impl Pool {
    fn new(options: &Options, random: &mut Random) -> Self {
        let wants = |head| options.shapes.iter().any(|shape| (*shape == Shape::Head) == head);
        let (m, k) = Shape::Head.size();
        // One copy at least, of the largest.
        let largest = options.shapes.iter().filter(|shape| **shape != Shape::Head);
        let largest = largest.map(|shape| packed_bytes(*shape)).max().unwrap_or(0);
        let bytes = options.pool_bytes.max(largest) + LINE_BYTES;
        let trits: Vec<u8> = (0..=255).filter(|byte| byte & (byte >> 1) & 0x55 == 0).collect();
        let byte = |bits: u64| trits[((bits & 0xffff) as usize * trits.len()) >> 16];
        let ternary = (0..if wants(false) { bytes.div_ceil(4) } else { 0 }).flat_map(|_| {
            let bits = random.next();
            [byte(bits), byte(bits >> 16), byte(bits >> 32), byte(bits >> 48)]
        });
        let ternary = ternary.collect();
        // 2^-7 to 2^-6, of either sign.
        let float = |bits: u64| 0x3c00 | (bits as u16 & 0x807f);
        let head = (0..if wants(true) { (m * k + LINE_BYTES) / 4 } else { 0 }).flat_map(|_| {
            let bits = random.next();
            [float(bits), float(bits >> 16), float(bits >> 32), float(bits >> 48)]
        });
        Self { ternary, head: head.collect() }
    }
}

/// Bytes of a ternary product's weights.
fn packed_bytes(shape: Shape) -> usize {
    let (m, k) = shape.size();
    TernaryMatrix::packed_bytes(m, k).expect("a shape of 2B4T can be packed")
}

/// What a thread needs for itself.
struct Own {
    y: Vec<f32>,
    workspace: Workspace,
}

/// One product to measure.
#[derive(Clone, Copy)]
struct Case {
    shape: Shape,
    rows: usize,
    backend: Backend,
    threads: usize,
}

impl Case {
    fn measure(self, pool: &Pool, limits: Limits, random: &mut Random) -> Timing {
        let Self { shape, rows, backend, threads } = self;
        let (m, k) = shape.size();
        let x: Vec<f32> = (0..rows * k).map(|_| random.below(2001) as f32 - 1000.0).collect();
        let (seconds, bytes) = match shape {
            Shape::Head => {
                let w = FloatMatrix::new(FloatKind::Bf16, aligned(&pool.head, m * k), m, k)
                    .expect("the pool was made for this shape");
                let times = self.times(m, 1, |_, part, own| {
                    let y = Columns::new(&mut own.y, part.len(), 0..part.len());
                    backend.head(w, part, &x, y);
                });
                (times, 2 * m * k)
            }
            _ => (self.ternary(pool, &x), packed_bytes(shape)),
        };
        let us = seconds.iter().map(|seconds| seconds * 1e6).collect::<Vec<_>>();
        let us = Spread::of(&us);
        let per_s = 1e6 / us.median;
        let mac_g_per_s = (m * k * rows) as f64 / 1e9 * per_s;
        let gb_per_s = bytes as f64 / 1e9 * per_s;
        let most = if shape == Shape::Head { limits.fma_g_per_s } else { limits.mac_g_per_s };
        Timing {
            shape,
            m,
            k,
            rows,
            isa: backend.name(),
            chosen: backend == Backend::detect().fastest(shape.operation(), rows),
            threads,
            us,
            mac_g_per_s,
            gb_per_s,
            share_of_read: gb_per_s / limits.read_gb_per_s,
            share_of_mac: mac_g_per_s / most,
        }
    }

    /// Seconds of one product, several times.
    fn ternary(self, pool: &Pool, x: &[f32]) -> Vec<f64> {
        let (m, k) = self.shape.size();
        let stride = padded_cols(k);
        let mut q = vec![0; self.rows * stride + LINE_BYTES];
        let start = q.as_ptr().align_offset(LINE_BYTES).min(LINE_BYTES);
        let q = &mut q[start..][..self.rows * stride];
        let (mut scale, mut sum) = (Vec::new(), Vec::new());
        for (x, q) in x.chunks(k).zip(q.chunks_mut(stride)) {
            let (row_scale, row_sum) =
                self.backend.quantise(x, q).expect("the activations are finite");
            scale.push(row_scale);
            sum.push(row_sum);
        }
        let q = &*q;
        let matrices: Vec<_> = aligned(&pool.ternary, pool.ternary.len())
            .chunks_exact(packed_bytes(self.shape))
            .filter_map(|bytes| TernaryMatrix::new(bytes, Arrangement::Tiles, m, k, 0.01).ok())
            .collect();
        let tiles = matrices.first().map_or(0, |w| w.tiles());
        self.times(tiles, matrices.len(), |copy, part, own| {
            let (w, x) = (matrices[copy], Quantised::new(q, stride, &scale, &sum));
            let m = w.tile_rows(part.clone()).len();
            let y = Columns::new(&mut own.y[..self.rows * m], m, 0..m);
            self.backend.ternary_many(w, part, x, y, &mut own.workspace);
        })
    }

    /// Seconds of one product, several times: `work` does the parts of `copies` matrices in turn,
    /// with what its thread has of its own.
    fn times(
        self,
        parts: usize,
        copies: usize,
        work: impl Fn(usize, std::ops::Range<usize>, &mut Own) + Sync,
    ) -> Vec<f64> {
        let (m, _) = self.shape.size();
        let part = |index: usize| parts * index / self.threads..parts * (index + 1) / self.threads;
        let owns: Vec<Mutex<Own>> = (0..self.threads)
            .map(|index| {
                // Tiles have several rows each.
                let rows = part(index).len() * m.div_ceil(parts.max(1));
                Mutex::new(Own { y: vec![0.0; rows * self.rows], workspace: Workspace::new() })
            })
            .collect();
        let run = |count: usize| {
            let time = team::times(self.threads, 1, |index| {
                // Each thread has its own; the lock is taken once for many products.
                let Ok(mut own) = owns[index].lock() else { return };
                for product in 0..count {
                    work(product % copies, part(index), black_box(&mut own));
                }
            });
            time[0] / count as f64
        };
        // The first pass maps pages and fills caches.
        let one = run(1).min(run(copies.min(8)));
        let count = ((REPEAT_SECONDS / one) as usize).max(1);
        (0..REPEATS).map(|_| run(count)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_names() {
        for shape in Shape::ALL {
            assert_eq!(shape.name().parse(), Ok(shape));
        }
        assert!("up".parse::<Shape>().unwrap_err().contains("gate"));
    }

    #[test]
    fn a_bad_choice_is_found() {
        let options = Options {
            shapes: vec![Shape::Kv],
            rows: vec![1],
            backends: vec![Backend::detect().fastest(Operation::Ternary, 1)],
            pool_bytes: 0,
            read_bytes: 1 << 20,
            ..Options::default()
        };
        let mut timings = measure(&options, &mut |_, _, _| {});
        assert!(timings.kernels[0].chosen && timings.badly_chosen().is_empty());
        let other = Timing { chosen: false, isa: "other", ..timings.kernels[0].clone() };
        for (times, is_bad) in [(1.05, false), (1.15, true)] {
            let mac_g_per_s = other.mac_g_per_s * times;
            timings.kernels.truncate(1);
            timings.kernels.push(Timing { mac_g_per_s, ..other.clone() });
            let bad = timings.badly_chosen();
            assert_eq!(!bad.is_empty(), is_bad, "{times}");
            assert!(bad.iter().all(|(chosen, fastest)| chosen.chosen && fastest.isa == "other"));
        }
    }

    #[test]
    fn a_product_is_measured() {
        let options = Options {
            shapes: vec![Shape::Kv],
            rows: vec![1, 3],
            backends: vec![Backend::detect()],
            threads: vec![1, 2],
            pool_bytes: 0,
            read_bytes: 1 << 20,
        };
        let mut parts = Vec::new();
        let timings = measure(&options, &mut |_, done, total| parts.push((done, total)));
        assert_eq!(parts, (0..6).map(|done| (done, 6)).collect::<Vec<_>>());
        assert_eq!((timings.limits.len(), timings.kernels.len()), (2, 4));
        for timing in &timings.kernels {
            assert!(timing.us.min > 0.0 && timing.us.median <= timing.us.max, "{timing:?}");
            assert!(timing.mac_g_per_s > 0.0 && timing.gb_per_s > 0.0, "{timing:?}");
            assert!(timing.share_of_mac > 0.0 && timing.share_of_read > 0.0, "{timing:?}");
        }
    }
}
