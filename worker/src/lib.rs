//! Computes its layers: the engine, session checks, the stage service and its links.
//!
//! A worker is pure dataflow: a step carries all it needs, and only the coordinator decides.

pub mod config;
pub mod engine;
mod error;
pub mod measure;
mod session;

pub use config::{Config, ConfigError};
pub use error::RunError;

use std::net::SocketAddr;
use std::sync::Arc;

use node::membership::Membership;
use proto::keys::Keys;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Serves as one worker of a cluster until `stop` fires and what is in flight is done.
///
/// `bound` is told the address of the stage service once it accepts connections.
///
/// # Errors
///
/// What kept it from starting, or from stopping well.
pub async fn run(
    config: Config,
    _keys: Keys,
    _membership: Arc<dyn Membership>,
    _bound: Option<oneshot::Sender<SocketAddr>>,
    _stop: CancellationToken,
) -> Result<(), RunError> {
    config.validate()?;
    unimplemented!("lands next")
}
