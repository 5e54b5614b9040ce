//! The configuration file of servers, and the flags that go over it.
//!
//! One file may serve every machine of a cluster: each role reads its own section and what stands
//! above the sections.

use std::path::PathBuf;

use node::config::{ConfigError, EtcdEndpoints, Sources};
use node::membership::EtcdOptions;
use node::telemetry::TelemetryConfig;
use proto::names::ClusterName;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::Failure;

/// Variables of the one section that every command reads.
const TELEMETRY_PREFIX: &str = "TERCET_TELEMETRY__";

/// Variables that begin like settings and are none.
const OTHER_VARIABLES: [&str; 1] = [client::endpoint::ENDPOINT_VARIABLE];

/// Longest password file: a password, and an end of line.
const PASSWORD_MAX: node::config::ByteSize = node::config::ByteSize(4096);

/// Everything that can be set for a coordinator or a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Name of the cluster: which keys in etcd are its own.
    pub cluster: ClusterName,
    /// Where etcd is.
    pub etcd: EtcdSettings,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
    /// For `tercet coordinator`.
    pub coordinator: coordinator::Config,
    /// For `tercet worker`.
    pub worker: worker::Config,
}

/// Where etcd is, and who we are there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EtcdSettings {
    /// `http://host:port`, any member of the etcd cluster.
    pub endpoints: EtcdEndpoints,
    /// If etcd asks for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// A file with that user's password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        let coordinator = coordinator::Config::default();
        Self {
            cluster: coordinator.cluster.clone(),
            etcd: EtcdSettings::default(),
            telemetry: TelemetryConfig::default(),
            coordinator,
            worker: worker::Config::default(),
        }
    }
}

impl EtcdSettings {
    /// What the connection needs beside the endpoints.
    ///
    /// # Errors
    ///
    /// If the password cannot be read.
    pub fn options(&self) -> Result<EtcdOptions, Failure> {
        let credentials = match (&self.user, &self.password_file) {
            (None, None) => None,
            (Some(user), Some(path)) => Some((user.clone(), password(path)?)),
            _ => {
                return Err(Failure::config(
                    "etcd.user and etcd.password_file belong together: give both or neither",
                ));
            }
        };
        Ok(EtcdOptions { credentials })
    }
}

/// Bits of a file's mode by which others than its owner and its group may read or write it.
const OTHERS_MODE: u32 = 0o006;

impl EtcdSettings {
    /// What is wrong with how the password is kept, although it can be used. No reason to refuse:
    /// secrets that an orchestrator mounts are often readable in a container of their own.
    pub fn password_warning(&self) -> Option<String> {
        use std::os::unix::fs::PermissionsExt;
        let path = self.password_file.as_ref()?;
        let mode = std::fs::metadata(path).ok()?.permissions().mode();
        (mode & OTHERS_MODE != 0).then(|| {
            format!(
                "etcd.password_file {} can be read or written by everyone on this machine (mode \
                 {:o}): chmod 600 makes it private",
                path.display(),
                mode & 0o777
            )
        })
    }
}

fn password(path: &std::path::Path) -> Result<String, Failure> {
    let text = node::config::read_text(path, PASSWORD_MAX).map_err(|error| {
        Failure::config(format!("failed to read etcd.password_file {}: {error}", path.display()))
    })?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

impl Settings {
    /// Flags over environment over file over defaults.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the key.
    pub fn load(file: Option<&std::path::Path>, flags: Flags) -> Result<Self, ConfigError> {
        Self::from_sources(&Sources { file, environment: environment(), flags: flags.0 })
    }

    fn from_sources(sources: &Sources<'_>) -> Result<Self, ConfigError> {
        let mut settings: Self = node::config::load(sources)?;
        settings.coordinator.cluster = settings.cluster.clone();
        Ok(settings)
    }
}

/// The settings in force as `--check-config` shows them: those of one role.
#[derive(Debug, Serialize)]
pub struct Shown<'a> {
    cluster: &'a ClusterName,
    etcd: &'a EtcdSettings,
    telemetry: &'a TelemetryConfig,
    #[serde(skip_serializing_if = "Option::is_none")]
    coordinator: Option<&'a coordinator::Config>,
    #[serde(skip_serializing_if = "Option::is_none")]
    worker: Option<&'a worker::Config>,
}

impl Settings {
    /// What a coordinator reads.
    pub fn for_coordinator(&self) -> Shown<'_> {
        Shown { coordinator: Some(&self.coordinator), ..self.shown() }
    }

    /// What a worker reads.
    pub fn for_worker(&self) -> Shown<'_> {
        Shown { worker: Some(&self.worker), ..self.shown() }
    }

    fn shown(&self) -> Shown<'_> {
        let Self { cluster, etcd, telemetry, .. } = self;
        Shown { cluster, etcd, telemetry, coordinator: None, worker: None }
    }
}

/// Refuses a variable that begins like a setting and names none: a slip of the finger would
/// otherwise change nothing, in silence. Values are checked by whoever reads them.
///
/// # Errors
///
/// [`ConfigError::UnknownKey`], with what was probably meant.
pub fn check_variables() -> Result<(), ConfigError> {
    environment().into_iter().try_for_each(check_variable)
}

fn check_variable(variable: (String, String)) -> Result<(), ConfigError> {
    let name = variable.0.clone();
    let sources = Sources { environment: vec![variable], ..Sources::default() };
    match Settings::from_sources(&sources) {
        Err(ConfigError::UnknownKey { key, origin, hint, known }) => {
            let near = node::config::closest(&name, OTHER_VARIABLES);
            let hint = near.map_or(hint, |meant| format!(", did you mean {meant}?"));
            Err(ConfigError::UnknownKey { key, origin, hint, known })
        }
        // Not every command reads every section.
        _ => Ok(()),
    }
}

/// The variables that are settings.
fn environment() -> Vec<(String, String)> {
    node::config::environment(node::config::PREFIX, &OTHER_VARIABLES)
}

/// Where a coordinator is, if the environment says so.
pub fn endpoint_variable() -> Option<String> {
    node::config::variable(client::endpoint::ENDPOINT_VARIABLE)
}

/// What commands that are no servers read: only how they log and trace.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ClientSettings {
    telemetry: TelemetryConfig,
}

/// How a command that is no server logs and traces; `quiet` is its log filter unless another is
/// given.
///
/// # Errors
///
/// [`ConfigError`], which names the key.
pub fn client_telemetry(flags: Flags, quiet: &str) -> Result<TelemetryConfig, ConfigError> {
    let mut environment = environment();
    environment.retain(|(name, _)| name.starts_with(TELEMETRY_PREFIX));
    let settings: ClientSettings =
        node::config::load(&Sources { file: None, environment, flags: flags.0 })?;
    let mut telemetry = settings.telemetry;
    if telemetry.log.is_none() && node::config::variable("RUST_LOG").is_none() {
        telemetry.log = Some(quiet.to_owned());
    }
    Ok(telemetry)
}

/// The flags that were given, as a partial tree of settings.
#[derive(Clone, Debug, Default)]
pub struct Flags(pub(crate) Table);

impl Flags {
    /// Sets `key` (`worker.threads`) if the flag was given.
    pub fn set(&mut self, key: &str, value: Option<impl Into<Value>>) {
        let Some(value) = value else { return };
        let mut parts: Vec<&str> = key.split('.').collect();
        let Some(last) = parts.pop() else { return };
        let mut table = &mut self.0;
        for part in parts {
            let below = table.entry(part).or_insert_with(|| Value::Table(Table::new()));
            // Only this function fills the tree, and sections are never values.
            let Value::Table(below) = below else { return };
            table = below;
        }
        table.insert(last.to_owned(), value.into());
    }
}

#[cfg(test)]
mod tests;
