//! Why a coordinator could not run.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::config::ConfigError;
use crate::text::TextSetupError;

/// Why a coordinator could not start, or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The configuration cannot be used.
    #[error("the configuration cannot be used")]
    Config(#[from] ConfigError),
    /// A port could not be bound.
    #[error("failed to listen for {service} on {address}")]
    Bind {
        /// gRPC or HTTP.
        service: &'static str,
        /// Where.
        address: SocketAddr,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// There are no threads to be had.
    #[error("failed to start the threads of lanes")]
    Threads(#[source] std::io::Error),
    /// The model's store could not be opened.
    #[error("failed to open the model {}", path.display())]
    Model {
        /// The store's directory.
        path: PathBuf,
        /// Why.
        source: model::StoreError,
    },
    /// The model's tokenizer or template could not be used.
    #[error("failed to use the text of the model {}", path.display())]
    Text {
        /// The store's directory.
        path: PathBuf,
        /// Why.
        source: TextSetupError,
    },
    /// The registry refused.
    #[error("failed to use the registry")]
    Membership(#[from] node::membership::MembershipError),
    /// The descriptors of the gRPC API do not fit together: a fault of the build.
    #[error("failed to set up gRPC reflection")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// A task failed.
    #[error("the coordinator stopped")]
    Stopped(#[from] node::SupervisorError),
}
