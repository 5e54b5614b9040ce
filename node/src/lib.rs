//! Being a good process: config, telemetry, supervisor, membership, connections of clients.
//!
//! This room knows nothing of models, layers or requests: keys are strings and values are bytes.

mod chain;
pub mod config;
pub mod descriptors;
pub mod exit;
pub mod hosts;
pub mod membership;
pub mod metrics;
pub mod observe;
pub mod serve;
pub mod signals;
pub mod socket;
mod supervisor;
pub mod telemetry;
pub mod threads;

pub use chain::Chain;
pub use supervisor::{Supervisor, SupervisorError, TaskError};
