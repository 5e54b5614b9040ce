//! A whole cluster in this process: coordinator and workers on loopback, registry in memory. The
//! same code as a real cluster, but for etcd.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use client::waiting::Notices;
use client::{Client, ClientError, Endpoint};
use coordinator::{Bound, SamplingSource};
use node::membership::{Event, Membership, Memory};
use proto::keys::Keys;
use proto::plan::KvType;
use proto::status::{ClusterStatus, WaitCause, Waiting};
use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use worker::engine::{Placement, Shortcuts};

/// How long workers may take to measure themselves and register: they read every weight once,
/// perhaps from a slow disk.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(300);

/// How long the cluster may take from the last registration to its first token.
const READY_TIMEOUT: Duration = Duration::from_secs(300);

/// How long a person waits before being told why.
const NOTICE_AFTER: Duration = Duration::from_secs(1);

/// How long a reason that does not pass by itself may last: in one process nobody comes to help, but
/// on a loaded machine a worker may look lost for a moment.
const HOPELESS_AFTER: Duration = Duration::from_secs(10);

/// How often the coordinator is asked whether it is ready. The answer costs it nothing.
const READY_POLL: Duration = Duration::from_millis(10);

/// How long the parts may take to stop. Nobody waits for an answer any more.
const STOP_GRACE: Duration = Duration::from_secs(3);

/// How long each kind of part may take to end in all: its grace, and what it does after that (telling
/// clients, leaving the registry, closing connections).
const END_TIMEOUT: Duration = Duration::from_secs(STOP_GRACE.as_secs() + 5);

/// A free port of this machine.
pub const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// What a cluster in this process is made of.
#[derive(Clone, Debug)]
pub struct LocalOptions {
    /// The model's store.
    pub store: PathBuf,
    /// How many workers.
    pub workers: u32,
    /// Exactly so many stages; absent: the planner's choice.
    pub stages: Option<u32>,
    /// Compute threads of each worker.
    pub threads: usize,
    /// How KV is stored.
    pub kv_type: KvType,
    /// Which kernels; absent: the fastest.
    pub isa: Option<String>,
    /// Which work is left out where that cannot be seen.
    pub shortcuts: Shortcuts,
    /// Where weights and threads are.
    pub placement: Placement,
    /// Where the coordinator's gRPC API listens.
    pub grpc: SocketAddr,
    /// Where the coordinator's HTTP API listens.
    pub http: SocketAddr,
    /// Where health, readiness and metrics are answered by a thread of their own; absent: nowhere.
    pub admin: Option<SocketAddr>,
    /// Allows addresses that other machines reach, without TLS.
    pub insecure: bool,
    /// Where the defaults of sampling come from.
    pub sampling_defaults: SamplingSource,
    /// The most KV blocks; absent: the coordinator's default.
    pub kv_blocks: Option<u32>,
}

impl LocalOptions {
    /// One worker with every core, on free ports.
    pub fn new(store: impl Into<PathBuf>) -> Self {
        Self {
            store: store.into(),
            workers: 1,
            stages: None,
            threads: threads_each(1),
            kv_type: KvType::default(),
            isa: None,
            shortcuts: Shortcuts::default(),
            placement: Placement::default(),
            grpc: ANY_PORT,
            http: ANY_PORT,
            admin: None,
            insecure: false,
            sampling_defaults: SamplingSource::default(),
            kv_blocks: None,
        }
    }

    /// So many workers, which share the cores.
    pub fn with_workers(self, workers: u32) -> Self {
        Self { workers, threads: threads_each(workers), ..self }
    }

    /// The coordinator's configuration.
    ///
    /// # Panics
    ///
    /// Never: its name is a constant, and a legal one.
    pub fn coordinator(&self) -> coordinator::Config {
        let mut config = coordinator::Config {
            cluster: CLUSTER.parse().expect("a legal name"),
            model: self.store.clone(),
            kv_type: self.kv_type,
            stages: self.stages,
            grpc: self.grpc,
            http: self.http,
            admin: self.admin,
            insecure: self.insecure,
            sampling_defaults: self.sampling_defaults,
            shutdown_grace: node::config::Duration(STOP_GRACE),
            // No balancer looks at a process of one user.
            lame_duck: node::config::Duration(Duration::ZERO),
            // Every worker there will be is there before the coordinator starts.
            settle: node::config::Duration(Duration::ZERO),
            ..coordinator::Config::default()
        };
        if let Some(blocks) = self.kv_blocks {
            config.limits.kv_blocks = blocks;
        }
        config
    }

    /// The configuration of the worker at `index`.
    ///
    /// # Panics
    ///
    /// Never: digits are legal in a name.
    pub fn worker(&self, index: u32) -> worker::Config {
        let defaults = worker::Config::default();
        worker::Config {
            id: Some(format!("worker-{}", index + 1).parse().expect("a legal name")),
            listen: ANY_PORT,
            threads: Some(self.threads),
            store: self.store.clone(),
            // They share the machine.
            memory_bytes: defaults.memory_bytes / u64::from(self.workers.max(1)),
            isa: self.isa.clone(),
            skip_zeros: self.shortcuts.zeros,
            screen: self.shortcuts.screen,
            weights: self.placement.weights,
            lock_memory: self.placement.lock,
            pin_threads: self.placement.pin,
            shutdown_grace: STOP_GRACE,
            ..defaults
        }
    }
}

/// Compute threads of each of `workers` workers that share this machine.
pub fn threads_each(workers: u32) -> usize {
    (worker::config::available_threads() / workers.max(1) as usize).max(1)
}

/// The name of every cluster in a process.
const CLUSTER: &str = "local";

/// Why a cluster in this process did not start, or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LocalError {
    /// The coordinator failed.
    #[error("the coordinator failed")]
    Coordinator(#[source] Box<coordinator::RunError>),
    /// A worker failed.
    #[error("{id} failed")]
    Worker {
        /// Which.
        id: String,
        /// Why.
        source: Box<worker::RunError>,
    },
    /// A part ended although nobody asked it to.
    #[error("{part} ended before it was told to")]
    EndedEarly {
        /// Which.
        part: String,
    },
    /// A part panicked.
    #[error("a part of the cluster panicked")]
    Panicked(#[source] JoinError),
    /// Some workers are not in the registry.
    #[error("only {found} of {wanted} workers registered within {waited:?}")]
    Workers {
        /// How many did.
        found: usize,
        /// How many there are.
        wanted: u32,
        /// How long they had.
        waited: Duration,
    },
    /// There is no pipeline that answers.
    #[error("the cluster was not ready within {waited:?}: {reason}")]
    NotReady {
        /// How long it had.
        waited: Duration,
        /// What the coordinator says.
        reason: String,
    },
    /// There never will be one.
    #[error("the cluster cannot start: {reason}")]
    Hopeless {
        /// What the coordinator says.
        reason: String,
    },
    /// The coordinator did not answer us.
    #[error("failed to ask the cluster in this process")]
    Client(#[from] ClientError),
}

type PartEnd = Result<String, LocalError>;

/// A running cluster. Dropping it ends everything at once; [`LocalCluster::stop`] ends it well.
#[derive(Debug)]
pub struct LocalCluster {
    bound: Bound,
    coordinator_stop: CancellationToken,
    workers_stop: CancellationToken,
    parts: JoinSet<PartEnd>,
}

impl LocalCluster {
    /// Starts everything and waits until the cluster has generated a token.
    ///
    /// # Errors
    ///
    /// [`LocalError`]: the first part that failed, or what was not ready in time.
    pub async fn start(options: &LocalOptions) -> Result<Self, LocalError> {
        let mut cluster = Self::start_parts(options).await?;
        cluster.ready().await?;
        Ok(cluster)
    }

    async fn start_parts(options: &LocalOptions) -> Result<Self, LocalError> {
        let registry = Memory::new();
        let keys = Keys::new(CLUSTER);
        let mut parts = JoinSet::new();
        let workers_stop = CancellationToken::new();
        for index in 0..options.workers {
            let config = options.worker(index);
            let (keys, stop) = (keys.clone(), workers_stop.clone());
            // Each has its own connection to the registry, as processes have.
            let registry: Arc<dyn Membership> = Arc::new(registry.another());
            parts.spawn(async move {
                let id = config.id.as_ref().map(ToString::to_string).unwrap_or_default();
                loop {
                    let run = worker::run(
                        config.clone(),
                        keys.clone(),
                        Arc::clone(&registry),
                        None,
                        stop.clone(),
                    );
                    match Box::pin(run).await {
                        // An operator had it drained: here nobody else starts it again.
                        Ok(()) if !stop.is_cancelled() => {
                            tracing::info!(worker = id, "starts again");
                        }
                        Ok(()) => return Ok(id),
                        Err(source) => {
                            return Err(LocalError::Worker { id, source: Box::new(source) });
                        }
                    }
                }
            });
        }
        registered(&registry, &keys, options.workers, &mut parts).await?;

        let coordinator_stop = CancellationToken::new();
        let (bound_sender, bound) = oneshot::channel();
        let (config, stop) = (options.coordinator(), coordinator_stop.clone());
        let registry: Arc<dyn Membership> = Arc::new(registry);
        parts.spawn(async move {
            Box::pin(coordinator::run(config, keys, registry, Some(bound_sender), stop))
                .await
                .map(|()| "the coordinator".to_owned())
                .map_err(|source| LocalError::Coordinator(Box::new(source)))
        });
        let bound = tokio::select! {
            biased;
            Ok(bound) = bound => bound,
            error = first_end(&mut parts) => return Err(error),
        };
        Ok(Self { bound, coordinator_stop, workers_stop, parts })
    }

    /// Where the coordinator's gRPC API listens.
    pub fn grpc(&self) -> SocketAddr {
        self.bound.grpc
    }

    /// Where the coordinator's HTTP API listens.
    pub fn http(&self) -> SocketAddr {
        self.bound.http
    }

    /// Where those who watch are answered, if anywhere.
    pub fn admin(&self) -> Option<SocketAddr> {
        self.bound.admin
    }

    /// Where a client finds the coordinator.
    pub fn endpoint(&self) -> Endpoint {
        // A coordinator that listens everywhere is reached on loopback.
        let mut address = self.bound.grpc;
        if address.ip().is_unspecified() {
            address.set_ip(Ipv4Addr::LOCALHOST.into());
        }
        address.into()
    }

    /// A client of this cluster.
    ///
    /// # Errors
    ///
    /// If the coordinator does not answer.
    pub async fn client(&self) -> Result<Client, LocalError> {
        Ok(Client::connect(&self.endpoint()).await?)
    }

    /// Waits until the cluster has generated a token through its pipelines.
    async fn ready(&mut self) -> Result<ClusterStatus, LocalError> {
        let client = self.client().await?;
        let began = Instant::now();
        let asking = async {
            let mut notices = Notices::stderr();
            // Since when there is only what does not pass by itself.
            let mut hopeless_since = None;
            loop {
                let status = client.status().await?;
                if status.ready {
                    return Ok(status);
                }
                if let Some(Waiting { cause, detail: reason }) = status.waiting {
                    let since = *hopeless_since.get_or_insert_with(Instant::now);
                    if cause.passes() {
                        hopeless_since = None;
                    } else if cause == WaitCause::Refused || since.elapsed() >= HOPELESS_AFTER {
                        // A worker here is as large as the others, and reads the same store.
                        return Err(LocalError::Hopeless { reason });
                    }
                    if began.elapsed() >= READY_TIMEOUT {
                        return Err(LocalError::NotReady { waited: READY_TIMEOUT, reason });
                    }
                    if began.elapsed() >= NOTICE_AFTER {
                        notices.say(&reason);
                    }
                }
                tokio::time::sleep(READY_POLL).await;
            }
        };
        tokio::select! {
            biased;
            error = first_end(&mut self.parts) => Err(error),
            answer = asking => answer,
        }
    }

    /// Waits until a part fails, which no part of a healthy cluster does.
    pub async fn failed(&mut self) -> LocalError {
        first_end(&mut self.parts).await
    }

    /// Stops the coordinator, then the workers: nobody loses a stage that he still needs.
    ///
    /// # Errors
    ///
    /// The first part that did not stop well. What does not stop in time is ended.
    pub async fn stop(mut self) -> Result<(), LocalError> {
        let mut outcome = Ok(());
        let workers = self.parts.len().saturating_sub(1);
        for (stop, left) in [(&self.coordinator_stop, workers), (&self.workers_stop, 0)] {
            stop.cancel();
            let ending = async {
                while self.parts.len() > left {
                    let Some(end) = self.parts.join_next().await else { break };
                    let end = end.unwrap_or_else(|error| Err(LocalError::Panicked(error)));
                    if outcome.is_ok() {
                        outcome = end.map(drop);
                    }
                }
            };
            // What does not end in time is aborted with the set of tasks.
            let _ = tokio::time::timeout(END_TIMEOUT, ending).await;
        }
        outcome
    }
}

/// Waits until `wanted` workers are in the registry.
async fn registered(
    registry: &Memory,
    keys: &Keys,
    wanted: u32,
    parts: &mut JoinSet<PartEnd>,
) -> Result<(), LocalError> {
    let mut watch = registry.watch(&keys.workers());
    let mut known = BTreeSet::new();
    let deadline = Instant::now() + REGISTER_TIMEOUT;
    let mut notices = Notices::stderr();
    let mut notice_at = Instant::now() + NOTICE_AFTER;
    while known.len() < wanted as usize {
        let event = tokio::select! {
            biased;
            error = first_end(parts) => return Err(error),
            event = watch.next() => event,
            () = tokio::time::sleep_until(notice_at), if notice_at < deadline => {
                let found = known.len();
                notices.say(&format!(
                    "{found} of {wanted} workers are there, the others read and measure the model"
                ));
                notice_at += NOTICE_AFTER;
                continue;
            }
            () = tokio::time::sleep_until(deadline) => {
                let found = known.len();
                return Err(LocalError::Workers { found, wanted, waited: REGISTER_TIMEOUT });
            }
        };
        match event {
            Event::Reset(snapshot) => {
                known = snapshot.entries.into_iter().map(|entry| entry.key).collect();
            }
            Event::Put(entry) => {
                known.insert(entry.key);
            }
            Event::Delete { key, .. } => {
                known.remove(&key);
            }
        }
    }
    Ok(())
}

/// What the first end of a part means while nobody has asked for one.
async fn first_end(parts: &mut JoinSet<PartEnd>) -> LocalError {
    match parts.join_next().await {
        Some(Ok(Ok(part))) => LocalError::EndedEarly { part },
        Some(Ok(Err(error))) => error,
        Some(Err(error)) => LocalError::Panicked(error),
        None => std::future::pending().await,
    }
}

impl LocalError {
    /// Whether the configuration is at fault: the process ends with another code then.
    pub fn is_config(&self) -> bool {
        match self {
            Self::Coordinator(source) => matches!(**source, coordinator::RunError::Config(_)),
            Self::Worker { source, .. } => matches!(**source, worker::RunError::Config(_)),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests;
