//! Measures: what the machine can do, each kernel, and one engine against the machine.
//!
//! * `machine` which CPU; `team` threads that start together; `spread` what repeats gave
//! * `limits` bandwidth and multiply-adds, and the tokens per second that they allow
//! * `kernel` each product by shape, rows and instruction set
//! * `engine` prefill, decode and batches of one engine in this process
//! * `scaling` several workers, against the sum of what each gives alone
//! * `planning` the planner's time for random fleets, and what its plans give
//!
//! A cluster that runs is measured from outside, by the client (`client::bench`).

pub mod engine;
pub mod kernel;
pub mod limits;
pub mod machine;
pub mod planning;
pub mod scaling;
mod spread;
mod team;

use kernels::Backend;

pub use spread::Spread;

/// Told what is measured next, and how many of how many parts are done.
pub type Report<'a> = &'a mut dyn FnMut(&str, u64, u64);

/// Bytes of a cache line, on which the engine's memory and a store's tensors begin.
const LINE_BYTES: usize = 64;

/// The first `len` of `values` that begin on a cache line; a few less if `values` has no more.
fn aligned<T>(values: &[T], len: usize) -> &[T] {
    let values = values.get(values.as_ptr().align_offset(LINE_BYTES)..).unwrap_or_default();
    &values[..len.min(values.len())]
}

/// The kernels that this CPU runs in vectors; the definition where it has none of them.
pub fn vector_backends() -> Vec<Backend> {
    let all: Vec<_> = Backend::available().collect();
    if all.len() > 1 { all[1..].to_vec() } else { all }
}
