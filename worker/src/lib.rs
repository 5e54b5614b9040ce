//! Computes its layers: the engine, session checks, the stage service and its links.
//!
//! A worker is pure dataflow: a step carries all it needs, and only the coordinator decides.
//!
//! ```text
//!  coordinator, or the stage before            the stage after, or the coordinator
//!        │ steps        ▲ replies                    ▲ steps            ▲ results
//!        ▼              │                            │                  │
//!  ┌─ grpc ── decode ── encode ─┐              ┌─ link ─┐          ┌─ grpc ─┐
//!  │ service ─▶ session::epochs │              └────────┘          └────────┘
//!  │            which stage?    │                    ▲                  ▲
//!  └──────────┬─────────────────┘                    └──── stage ───────┘
//!             ▼                                             ▲  session::ledger: kept outputs
//!           stage ──▶ bridge ──▶ executor (engine's thread) ┘
//!                                session: blocks, generations ─▶ engine
//! ```

mod bridge;
mod callers;
pub mod config;
pub mod engine;
mod error;
mod executor;
mod grpc;
mod known_answer;
mod leaving;
mod link;
mod machine;
pub mod measure;
mod nearness;
mod pace;
mod record;
mod reserve;
mod run;
mod service;
mod session;
mod stage;
mod standby;
mod stub;
mod telemetry;
#[cfg(test)]
mod tests;
mod topology;
mod verify;
mod weights;
mod witness;

pub use config::{Config, ConfigError};
pub use error::RunError;
pub use run::run;
pub use stub::{StubProfile, StubProfileError};
