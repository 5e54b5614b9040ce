//! The root package: picks the role and wires the rooms. No decisions, no arithmetic.
//!
//! ```text
//! main ──▶ cli::Cli ──▶ commands::run ─┬─▶ client (generate, chat, status) ──▶ a coordinator
//!                                      ├─▶ local::LocalCluster: Memory registry, coordinator, workers
//!                                      ├─▶ coordinator::run, worker::run with etcd
//!                                      ├─▶ pipeline::Pipeline: engines without a network
//!                                      ├─▶ bench: limits, kernels, one engine
//!                                      └─▶ model: import (and score), synth, verify
//! ```

pub mod bench;
pub mod cli;
mod commands;
pub mod eval;
mod failure;
pub mod local;
pub mod logits;
pub mod models;
pub mod pipeline;
mod progress;
mod random;
pub mod score;
pub mod settings;

pub use commands::run;
pub use failure::Failure;
