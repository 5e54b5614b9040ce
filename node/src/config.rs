//! The configuration of a process: flags over environment over file over defaults.
//!
//! This is the only place that reads the environment. `docs/configuration.md` says what wins and
//! how variables are named.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

mod listen;
mod units;

pub use listen::{ListenError, check_listen_address};
pub use units::{ByteSize, Duration, UnitError};

/// Where a configuration comes from, the strongest last.
#[derive(Clone, Debug, Default)]
pub struct Sources<'a> {
    /// A TOML file; it must exist if it is named.
    pub file: Option<&'a Path>,
    /// Variables, see [`environment`]. `TERCET_WORKER__THREADS` sets `threads` in `[worker]`.
    pub environment: Vec<(String, String)>,
    /// The flags that were given, as a partial tree.
    pub flags: toml::Table,
}

/// Why there is no configuration. The process ends with [`Exit::Config`](crate::exit::Exit).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file could not be read.
    #[error("failed to read the configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
}

/// Loads a configuration of type `T`, whose missing keys are its own defaults.
///
/// # Errors
///
/// One sentence that names the key, where it was set, and what was expected there.
pub fn load<T: DeserializeOwned>(_sources: &Sources<'_>) -> Result<T, ConfigError> {
    unimplemented!()
}

/// The variables of this process whose names begin with `prefix` (`TERCET_`), except those in
/// `not` (whole names): they belong to the command line and are no part of the tree.
pub fn environment(prefix: &str, not: &[&str]) -> Vec<(String, String)> {
    let (_, _) = (prefix, not);
    unimplemented!()
}

/// The effective configuration as TOML, for `--check-config`.
///
/// # Errors
///
/// If `config` is not a table that TOML can hold: a bug, told rather than hidden.
pub fn show<T: Serialize>(config: &T) -> Result<String, toml::ser::Error> {
    toml::to_string_pretty(config)
}
