//! What a worker is told at its start: fields, defaults, and what is refused. Reads no file.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use kernels::{Backend, Refusal};
use node::config::{
    ByteSize, HostPort, TimeRange, TimeRangeError, deserialize_listen, deserialize_optional_listen,
};
use proto::names::{RackName, WorkerId};
use proto::ports;
use serde::{Deserialize, Serialize};

use crate::config::cpu::CpuLimits;
use crate::engine::{Placement, Shortcuts, WeightMemory};
use crate::stub::StubProfile;

mod cgroup;
pub(crate) mod cpu;
mod memory;
#[cfg(test)]
mod tests;

/// Share of the machine's (or the control group's) memory that a worker takes by default.
/// The rest is for the system, the page cache of its own binary, and network buffers.
const MEMORY_SHARE_PERCENT: u64 = 80;

/// What is assumed when the machine does not say how much memory it has.
const UNKNOWN_MEMORY_BYTES: u64 = 4 << 30;

/// For a coordinator to prepare other workers and move to them what this one holds: the weights of a
/// large stage are read from a disk in less.
const DEFAULT_SHUTDOWN_GRACE: Duration = Duration::from_secs(60);

/// Longer than a neighbour's burst of work.
const DEFAULT_DRIFT_TIME: Duration = Duration::from_secs(60);

/// More threads than any machine we know; a larger number is a mistake in a config file.
const THREADS_MAX: usize = 1024;

/// The whole configuration of one worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Stable name, unique in the cluster. Absent: the caller fills in the host's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<WorkerId>,
    /// Where the stage service listens; port 0 takes a free one.
    #[serde(deserialize_with = "deserialize_listen")]
    pub listen: SocketAddr,
    /// `host:port` under which others reach it; by default the bound address.
    pub advertise: Option<HostPort>,
    /// Which rack the machine is in; absent: unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rack: Option<RackName>,
    /// Compute threads; fewer where cores or quota are fewer, and by default as many as those.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// A store, or a directory that holds stores.
    pub store: PathBuf,
    /// Bytes that weights, KV and the working memory of steps may take together; written as `4GiB`
    /// or a number. More than machine and control groups give counts as not given.
    #[serde(rename = "memory", with = "as_size")]
    pub memory_bytes: u64,
    /// Name of the kernels to use; by default the fastest that this CPU runs.
    pub isa: Option<String>,
    /// Whether work on zeros is left out; exact either way.
    pub skip_zeros: bool,
    /// Whether rows of the head that provably do not win are left out; exact either way.
    pub screen: bool,
    /// Whether weights are read from the mapped files, or from a copy for each memory node.
    pub weights: WeightMemory,
    /// Whether weights stay in memory, whatever else wants it.
    pub lock_memory: bool,
    /// Whether every compute thread stays on a core of its own.
    pub pin_threads: bool,
    /// Where `/metrics` and `/health` are served; by default nowhere.
    #[serde(deserialize_with = "deserialize_optional_listen")]
    pub http: Option<SocketAddr>,
    /// Waits and hashes in place of arithmetic, for tests of many workers; absent: it computes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stub_compute: Option<StubProfile>,
    /// How long the coordinator may take to move elsewhere what the worker holds, after the process was
    /// asked to stop.
    #[serde(with = "as_time")]
    pub shutdown_grace: Duration,
    /// Steps that take a quarter longer or shorter than the worker says for so long make it say so; when
    /// it is four times as long or short a quarter of that is enough.
    #[serde(with = "as_time")]
    pub drift_time: Duration,
    /// Allows an address other than loopback without TLS.
    pub insecure: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            id: None,
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, ports::WORKER)),
            advertise: None,
            rack: None,
            threads: None,
            store: PathBuf::from("store"),
            memory_bytes: default_memory_bytes(),
            isa: None,
            skip_zeros: true,
            screen: true,
            weights: WeightMemory::Map,
            lock_memory: false,
            pin_threads: false,
            http: None,
            stub_compute: None,
            shutdown_grace: DEFAULT_SHUTDOWN_GRACE,
            drift_time: DEFAULT_DRIFT_TIME,
            insecure: false,
        }
    }
}

/// Why a configuration is refused. The process ends with exit code 64.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigError {
    /// Nobody gave the worker a name.
    #[error("the worker has no id")]
    NoId,
    /// No compute threads, or absurdly many.
    #[error("threads must be 1 to {THREADS_MAX}, found {found}")]
    Threads {
        /// What was given.
        found: usize,
    },
    /// No memory at all.
    #[error("memory must be more than zero")]
    Memory,
    /// A time that makes no sense.
    #[error(transparent)]
    Time(#[from] TimeRangeError),
    /// The kernels asked for cannot be had on this machine.
    #[error("the kernels {found:?} cannot be used (this machine runs {available})")]
    Isa {
        /// What was given.
        found: String,
        /// Names of those that it runs.
        available: String,
        /// What is wrong with them.
        source: Refusal,
    },
    /// Others cannot be told to connect to "every address".
    #[error(
        "listening on {listen} needs an advertised address that others can reach: give --advertise \
         host:port"
    )]
    Advertise {
        /// Where it would listen.
        listen: SocketAddr,
    },
    /// Open to the network without TLS.
    #[error("refusing to serve {what} (worker.{key})")]
    Listen {
        /// Which server.
        what: &'static str,
        /// The key of its address.
        key: &'static str,
        /// Why.
        source: node::config::ListenError,
    },
}

impl Config {
    /// Checks everything that needs neither a file nor a socket.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], with the field and what it must be.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.worker_id()?;
        if let Some(found) = self.threads.filter(|threads| !(1..=THREADS_MAX).contains(threads)) {
            return Err(ConfigError::Threads { found });
        }
        if self.memory_bytes == 0 {
            return Err(ConfigError::Memory);
        }
        TimeRange::STOP.check("shutdown_grace", self.shutdown_grace.into())?;
        TimeRange::DRIFT.check("drift_time", self.drift_time.into())?;
        self.backend()?;
        let listen = |what, key, address, insecure| {
            node::config::check_listen_address(address, insecure)
                .map_err(|source| ConfigError::Listen { what, key, source })
        };
        listen("the stage service", "listen", self.listen, self.insecure)?;
        if let Some(http) = self.http {
            listen("metrics", "http", http, self.insecure)?;
        }
        match &self.advertise {
            None if self.listen.ip().to_canonical().is_unspecified() => {
                Err(ConfigError::Advertise { listen: self.listen })
            }
            _ => Ok(()),
        }
    }

    /// The worker's name.
    ///
    /// # Errors
    ///
    /// [`ConfigError::NoId`] if it was not given one.
    pub fn worker_id(&self) -> Result<&WorkerId, ConfigError> {
        self.id.as_ref().ok_or(ConfigError::NoId)
    }

    /// Bytes that the worker takes, and why those are fewer than were asked for, if they are: more than
    /// machine and control groups give would end the process once it is full. Reads their limits.
    pub(crate) fn memory_in_force(&self) -> (u64, Option<String>) {
        // Who computes nothing takes next to nothing.
        let given = match self.stub_compute {
            Some(_) => None,
            None => memory::available_bytes(),
        };
        within(self.memory_bytes, given)
    }

    /// Which work is left out.
    pub fn shortcuts(&self) -> Shortcuts {
        Shortcuts { zeros: self.skip_zeros, screen: self.screen }
    }

    /// Where weights and threads are.
    pub fn placement(&self) -> Placement {
        Placement { weights: self.weights, lock: self.lock_memory, pin: self.pin_threads }
    }

    /// The kernels to use: those named, else the fastest that this CPU runs.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Isa`] if the CPU lacks what was named, or computes something else with it.
    pub fn backend(&self) -> Result<Backend, ConfigError> {
        let Some(name) = &self.isa else { return Ok(Backend::detect()) };
        Backend::named(name).map_err(|source| ConfigError::Isa {
            found: name.clone(),
            available: Backend::available().map(Backend::name).collect::<Vec<_>>().join(", "),
            source,
        })
    }
}

/// Threads that can compute at a time on this machine, within the quotas of the control groups.
pub fn available_threads() -> usize {
    CpuLimits::read().threads(None)
}

/// [`MEMORY_SHARE_PERCENT`] of what the machine or the control group gives.
fn default_memory_bytes() -> u64 {
    share_of(memory::available_bytes().unwrap_or(UNKNOWN_MEMORY_BYTES))
}

/// What a worker takes of so many bytes.
fn share_of(bytes: u64) -> u64 {
    bytes / 100 * MEMORY_SHARE_PERCENT
}

/// As many bytes as were asked for. Where fewer are given, as many less than those as were asked for beyond
/// them: who asked for 24 GiB of a machine that turns out to have 23.5 meant nearly all of it. At least the
/// usual share, which is for a number that has nothing to do with this machine.
fn within(asked: u64, given: Option<u64>) -> (u64, Option<String>) {
    match given {
        Some(given) if asked > given => {
            let taken = given.saturating_sub(asked - given).max(share_of(given));
            let [asked, given, shown] = [asked, given, taken].map(ByteSize);
            let reason = format!(
                "memory {asked} is more than the {given} that machine and control groups give: \
                 {shown} are taken"
            );
            (taken, Some(reason))
        }
        _ => (asked, None),
    }
}

/// A number of bytes, in a file as a size with a unit.
mod as_size {
    use node::config::ByteSize;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &u64, s: S) -> Result<S::Ok, S::Error> {
        ByteSize(*bytes).serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
        ByteSize::deserialize(d).map(ByteSize::bytes)
    }
}

/// A span of time, in a file as a text with a unit.
mod as_time {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(
        time: &std::time::Duration,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        node::config::Duration(*time).serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<std::time::Duration, D::Error> {
        node::config::Duration::deserialize(d).map(node::config::Duration::get)
    }
}
