//! What the machine can do at best, and the tokens per second of a model that this allows.

use std::hint::black_box;

use kernels::Backend;
use model::ModelConfig;
use serde::Serialize;

use super::{LINE_BYTES, Report, Spread, aligned, team};

/// Memory that is read in order: far more than any cache holds.
pub const READ_BYTES: usize = 1 << 30;

/// The operand that the multiply-adds find in the first-level cache, in elements of one byte; that
/// of f32 has as many bytes.
const L1_BYTES: usize = 8 << 10;

/// Times each loop is run; the middle one counts.
const REPEATS: usize = 5;

/// How long one run of a loop of arithmetic shall take, in seconds: many times what starting
/// threads takes.
const LOOP_SECONDS: f64 = 0.04;

/// Bits of a weight of the dense limit's head: those of q6_K, in which the engines that we compare
/// with hold theirs.
const HEAD_BITS: f64 = 6.5625;

/// What some threads together can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Limits {
    /// Threads.
    pub threads: usize,
    /// Memory read in order, in 10^9 bytes per second.
    pub read_gb_per_s: f64,
    /// Multiply-adds of int8 as ternary products of many rows do them, with one operand from the
    /// first-level cache and nothing to unpack, in 10^9 per second.
    pub mac_g_per_s: f64,
    /// Fused multiply-adds of f32 with one operand from the first-level cache, in 10^9 per second:
    /// the form in which an exact head is computed.
    pub fma_g_per_s: f64,
}

impl Limits {
    /// The better of two measurements, figure by figure: what disturbs only takes away.
    pub fn best(self, other: Self) -> Self {
        Self {
            threads: self.threads,
            read_gb_per_s: self.read_gb_per_s.max(other.read_gb_per_s),
            mac_g_per_s: self.mac_g_per_s.max(other.mac_g_per_s),
            fma_g_per_s: self.fma_g_per_s.max(other.fma_g_per_s),
        }
    }
}

/// [`Limits`] with all that was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Measured {
    /// The medians.
    #[serde(flatten)]
    pub limits: Limits,
    /// Of the reading.
    pub read: Spread,
    /// Of the multiply-adds of int8.
    pub mac: Spread,
    /// Of those of f32.
    pub fma: Spread,
}

/// Memory to be read, mapped and written once.
pub struct Memory(Vec<u64>);

impl Memory {
    /// So many bytes, each of them touched.
    pub fn new(bytes: usize) -> Self {
        // Not zeros: the system gives one page for all zeros, and a cache holds that.
        Self((0..bytes as u64 / 8).map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect())
    }
}

/// Measures what `threads` threads can do with `backend`, reading `memory`.
pub fn measure(backend: Backend, threads: usize, memory: &Memory) -> Measured {
    let words = &memory.0;
    let read = team::times(threads, REPEATS, |index| {
        let part = words.len() * index / threads..words.len() * (index + 1) / threads;
        black_box(backend.probe_read(black_box(&words[part])));
    });
    let rates = |work: f64, times: &[f64]| {
        Spread::of(&times.iter().map(|time| work / 1e9 / time).collect::<Vec<_>>())
    };
    let read = rates(size_of_val(words.as_slice()) as f64, &read);

    let codes = std::array::from_fn(|index| (index % 3) as u8);
    let x: Vec<i8> = (0..L1_BYTES + LINE_BYTES).map(|index| (index * 31) as i8).collect();
    let x = aligned(&x, L1_BYTES);
    let mac = arithmetic(threads, x.len(), |rounds| {
        black_box(backend.probe_multiply(&codes, black_box(x), rounds));
    });
    let w = std::array::from_fn(|index| index as f32);
    let x: Vec<f32> = (0..(L1_BYTES + LINE_BYTES) / 4).map(|index| index as f32).collect();
    let x = aligned(&x, L1_BYTES / 4);
    let fma = arithmetic(threads, x.len(), |rounds| {
        black_box(backend.probe_fma(&w, black_box(x), rounds));
    });
    let limits = Limits {
        threads,
        read_gb_per_s: read.median,
        mac_g_per_s: mac.median,
        fma_g_per_s: fma.median,
    };
    Measured { limits, read, mac, fma }
}

/// The rate of `work`, which is told how many rounds of `len` multiply-adds to do, in 10^9 per
/// second.
fn arithmetic(threads: usize, len: usize, work: impl Fn(usize) + Sync) -> Spread {
    // Doubles the rounds until they take a part of the time that is wanted.
    let mut rounds = 16;
    loop {
        let time = team::times(1, 1, |_| work(rounds))[0];
        if time > LOOP_SECONDS / 8.0 {
            rounds = ((rounds as f64 * LOOP_SECONDS / time) as usize).max(1);
            break;
        }
        rounds *= 2;
    }
    let times = team::times(threads, REPEATS, |_| work(rounds));
    let done = (threads * len * rounds) as f64 / 1e9;
    Spread::of(&times.iter().map(|time| done / time).collect::<Vec<_>>())
}

/// Measures every number of threads in `threads` with every one of `backends`.
pub fn measure_all(
    backends: &[Backend],
    threads: &[usize],
    report: Report<'_>,
) -> Vec<(Backend, Measured)> {
    let total = (threads.len() * backends.len()) as u64;
    report("memory", 0, total);
    let memory = Memory::new(READ_BYTES);
    let cases = threads.iter().flat_map(|threads| backends.iter().map(move |it| (*threads, *it)));
    let measure = |(index, (threads, backend)): (usize, (usize, Backend))| {
        report(&format!("{}, {threads} threads", backend.name()), index as u64, total);
        (backend, measure(backend, threads, &memory))
    };
    cases.enumerate().map(measure).collect()
}

/// What one token needs of the machine, whatever computes it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TokenWork {
    /// Weights of the ternary matrices: multiply-adds of a token without head.
    pub linear_macs: u64,
    /// Weights of the head: multiply-adds of its logits.
    pub head_macs: u64,
    /// Bytes of the dense limit: linears at 2 bits a weight and a head at 6.56.
    pub dense_bytes: u64,
}

impl TokenWork {
    /// Of a model of this shape.
    pub fn of(config: &ModelConfig) -> Self {
        let (hidden, ffn) = (u64::from(config.hidden), u64::from(config.ffn));
        let head_dim = u64::from(config.head_dim);
        let query = u64::from(config.heads) * head_dim;
        let key = u64::from(config.kv_heads) * head_dim;
        let layer = hidden * (2 * query + 2 * key + 3 * ffn);
        let linear_macs = u64::from(config.layers) * layer;
        let head_macs = u64::from(config.vocab) * hidden;
        let head_bytes = (head_macs as f64 * HEAD_BITS / 8.0) as u64;
        Self { linear_macs, head_macs, dense_bytes: linear_macs.div_ceil(4) + head_bytes }
    }

    /// Tokens per second of one sequence if every byte of the dense limit is read once for each.
    pub fn dense_decode_tokens_per_s(&self, limits: &Limits) -> f64 {
        limits.read_gb_per_s * 1e9 / self.dense_bytes as f64
    }

    /// Tokens per second of a prompt: no head.
    pub fn prefill_tokens_per_s(&self, limits: &Limits) -> f64 {
        limits.mac_g_per_s * 1e9 / self.linear_macs as f64
    }

    /// Tokens per second of many sequences: linears at the rate of ternary products, the head by
    /// exact multiply-adds of f32.
    pub fn batched_tokens_per_s(&self, limits: &Limits) -> f64 {
        let linear = self.linear_macs as f64 / (limits.mac_g_per_s * 1e9);
        let head = self.head_macs as f64 / (limits.fma_g_per_s * 1e9);
        1.0 / (linear + head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_of_2b4t_is_what_the_paper_says() {
        let dir = tempfile::tempdir().unwrap();
        let shape = "2x2560x6912x20x5x32".parse().unwrap();
        model::synth(&shape, 0, &dir.path().join("store"), &mut |_| {}).unwrap();
        let store = model::Store::open(&dir.path().join("store")).unwrap();
        let mut config = store.config().clone();
        (config.layers, config.vocab) = (30, 128_256);
        let work = TokenWork::of(&config);
        assert_eq!((work.linear_macs, work.head_macs), (2_084_044_800, 328_335_360));
        assert_eq!(work.dense_bytes / 100_000, 7_903);
        let limits =
            Limits { threads: 2, read_gb_per_s: 37.9, mac_g_per_s: 320.0, fma_g_per_s: 197.0 };
        assert_eq!(work.dense_decode_tokens_per_s(&limits).round(), 48.0);
        assert_eq!(work.prefill_tokens_per_s(&limits).round(), 154.0);
        assert_eq!(work.batched_tokens_per_s(&limits).round(), 122.0);
    }

    #[test]
    fn limits_are_measured() {
        let memory = Memory::new(1 << 20);
        for backend in Backend::available() {
            let measured = measure(backend, 2, &memory);
            let Limits { threads, read_gb_per_s, mac_g_per_s, fma_g_per_s } = measured.limits;
            assert_eq!(threads, 2);
            for rate in [read_gb_per_s, mac_g_per_s, fma_g_per_s] {
                assert!(rate.is_finite() && rate > 0.0, "{measured:?}");
            }
            assert!(measured.mac.min <= mac_g_per_s && mac_g_per_s <= measured.mac.max);
        }
    }
}
