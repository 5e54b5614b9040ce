//! The configuration of a process: flags over environment over file over defaults.
//!
//! This is the only place that reads the environment. `docs/configuration.md` says what wins and
//! how variables are named. Config structs are plain serde structs with `deny_unknown_fields` and
//! `default`; not with `flatten` or untagged enums, for those forget where a value came from and
//! which type a variable should have.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use tree::{Kind, Node, Origin, Problem, Wrong};

mod address;
mod listen;
mod printable;
mod range;
mod read;
mod suggest;
#[cfg(test)]
mod tests;
mod text;
mod tree;
mod units;

pub use address::{
    AddressError, EtcdEndpoint, EtcdEndpoints, HostPort, deserialize_listen,
    deserialize_optional_listen, deserialize_optional_url, listen_address, shown, without_secret,
};
pub use listen::{ListenError, check_listen_address};
pub use printable::printable;
pub use range::{TimeRange, TimeRangeError};
pub use suggest::closest;
pub use text::{TextError, read_text};
pub use units::{ByteSize, Duration, UnitError};

/// What the names of our variables begin with.
pub const PREFIX: &str = "TERCET_";

/// Between the parts of a variable's name. One underscore is part of many keys.
const SEPARATOR: &str = "__";

/// The longest file that is taken for a configuration: a hundred times one with every key.
const FILE_BYTES: ByteSize = ByteSize(1 << 20);

/// Where a configuration comes from, the strongest last.
#[derive(Clone, Debug, Default)]
pub struct Sources<'a> {
    /// A TOML file; it must exist if it is named.
    pub file: Option<&'a Path>,
    /// Variables by their whole names, see [`environment`]. `TERCET_WORKER__THREADS` sets
    /// `threads` in `[worker]`. Those that do not begin with [`PREFIX`] are passed over.
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
        /// Why not.
        source: TextError,
    },
    /// The file is no TOML.
    #[error("{}:{line} is not valid TOML: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What the parser said.
        message: String,
    },
    /// There is no such key.
    #[error("unknown key {key} {origin}{hint} (known there: {known})")]
    UnknownKey {
        /// The key with its sections.
        key: String,
        /// Where it was set.
        origin: String,
        /// What was probably meant: `, did you mean …?`, or nothing.
        hint: String,
        /// The keys that there are.
        known: String,
    },
    /// A key has a value that it cannot have.
    #[error("wrong value for {key} {origin}: {message}")]
    WrongValue {
        /// The key with its sections.
        key: String,
        /// Where it was set.
        origin: String,
        /// What was found and expected.
        message: String,
    },
    /// A key that has no default was not set.
    #[error("{key} is not set: write it into the configuration file, or set {variable}")]
    Missing {
        /// The key with its sections.
        key: String,
        /// The variable that would set it.
        variable: String,
    },
}

/// Loads a configuration of type `T`, whose missing keys are its own defaults.
///
/// # Errors
///
/// One sentence that names the key, where it was set, and what was expected there.
pub fn load<T: DeserializeOwned>(sources: &Sources<'_>) -> Result<T, ConfigError> {
    let mut tree = match sources.file {
        Some(path) => file(path)?,
        None => Node::table(Origin::Default),
    };
    // Sorted, so that which of two contradicting variables is blamed does not change.
    let mut variables: Vec<_> = sources.environment.iter().collect();
    variables.sort();
    for (name, value) in variables {
        let Some(key) = name.strip_prefix(PREFIX) else { continue };
        let origin = Origin::Variable(name.as_str().into());
        let path: Vec<String> = key.split(SEPARATOR).map(str::to_lowercase).collect();
        let leaf = Node { origin: origin.clone(), kind: Kind::Text(value.clone()) };
        let branch = path.into_iter().rev().fold(leaf, |node, key| Node {
            origin: origin.clone(),
            kind: Kind::Table([(key, node)].into()),
        });
        tree.merge(branch);
    }
    let flags = toml::Value::Table(sources.flags.clone());
    tree.merge(Node::from_toml(flags, &Origin::Flag));
    T::deserialize(tree).map_err(describe)
}

fn file(path: &Path) -> Result<Node, ConfigError> {
    let text = read_text(path, FILE_BYTES)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        let (line, message) = toml_problem(&text, &error);
        ConfigError::Syntax { path: path.to_owned(), line, message }
    })?;
    Ok(Node::from_toml(toml::Value::Table(table), &Origin::File(path.into())))
}

/// Where a TOML text is wrong, its line from 1, and how, in one line.
pub fn toml_problem(text: &str, error: &toml::de::Error) -> (usize, String) {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or("");
    (before.matches('\n').count() + 1, error.message().replace('\n', ", "))
}

fn describe(problem: Problem) -> ConfigError {
    let key = problem.key();
    let origin = problem.origin.to_string();
    match problem.wrong {
        Wrong::Unknown { known } => {
            let last = key.rsplit('.').next().unwrap_or_default();
            let hint = suggest::hint(closest(last, known.iter().copied()));
            let known = known.join(", ");
            ConfigError::UnknownKey { key, origin, hint, known }
        }
        Wrong::Value(message) => ConfigError::WrongValue { key, origin, message },
        Wrong::Missing => {
            let variable = format!("{PREFIX}{}", key.replace('.', SEPARATOR).to_uppercase());
            ConfigError::Missing { key, variable }
        }
    }
}

/// The variables of this process whose names begin with `prefix` (usually [`PREFIX`]), except
/// those in `not` (whole names): they belong to the command line and are no part of the tree.
pub fn environment(prefix: &str, not: &[&str]) -> Vec<(String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| {
            let name = name.into_string().ok()?;
            let ours = name.starts_with(prefix) && !not.contains(&name.as_str());
            // What is no text becomes a text that will not pass for a value.
            ours.then(|| (name, value.to_string_lossy().into_owned()))
        })
        .collect()
}

/// One variable of this process; `None` if it is not set, or to nothing.
pub fn variable(name: &str) -> Option<String> {
    let value = std::env::var_os(name)?;
    Some(value.to_string_lossy().into_owned()).filter(|value| !value.is_empty())
}

/// The effective configuration as TOML, for `--check-config`.
///
/// # Errors
///
/// If `config` is not a table that TOML can hold: a bug, told rather than hidden.
pub fn show<T: Serialize>(config: &T) -> Result<String, toml::ser::Error> {
    toml::to_string_pretty(config)
}
