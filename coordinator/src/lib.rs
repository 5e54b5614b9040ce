//! Decides (planner, cluster, scheduler) and answers clients (gRPC, HTTP).
//!
//! ```text
//! grpc, http ──GenerateRequest──▶ request (checks, text) ──▶ driver ──steps──▶ workers (links)
//!                                                         owns cluster, scheduler (pure)
//! ```

use std::net::SocketAddr;
use std::sync::Arc;

use node::membership::Membership;
use proto::keys::Keys;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

mod config;
mod error;

// Pure: events in, actions out.
pub mod cluster;
pub mod planner;
pub mod scheduler;
pub mod tick;
pub mod token_log;

pub use config::{Config, ConfigError, DEFAULT_GRPC, DEFAULT_HTTP, LimitsConfig};
pub use error::RunError;

/// Where a coordinator listens, once it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The gRPC API.
    pub grpc: SocketAddr,
    /// The HTTP API.
    pub http: SocketAddr,
}

/// Serves one model until `stop` fires: campaigns, plans, answers clients.
///
/// `bound` is told where both servers listen as soon as they do, before there is a plan.
///
/// # Errors
///
/// [`RunError`] if it cannot start, or if one of its tasks fails.
pub async fn run(
    config: Config,
    keys: Keys,
    membership: Arc<dyn Membership>,
    bound: Option<oneshot::Sender<Bound>>,
    stop: CancellationToken,
) -> Result<(), RunError> {
    config.validate()?;
    let _ = (keys, membership, bound, stop);
    unimplemented!()
}
