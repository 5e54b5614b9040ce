//! Why a worker could not start or stop well.

use crate::config::ConfigError;

/// Why a worker ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A field of the configuration is wrong.
    #[error("the worker's configuration is refused")]
    Config(#[from] ConfigError),
}
