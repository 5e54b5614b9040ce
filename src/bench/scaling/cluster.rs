//! A cluster of processes in one arrangement: etcd, workers, a coordinator.

use std::ffi::OsString;
use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use client::{Client, ClientError, Endpoint};
use proto::status::ClusterStatus;
use tokio::time::{Instant, sleep};

use super::groups::{Group, Place};
use super::processes::{ProcessError, Processes, Spec};
use super::{Form, Options, ScalingError};

/// How long a cluster may take from the last registration to its first token: engines are made and
/// weights are read, perhaps by a tenth of a CPU.
const READY_TIMEOUT: Duration = Duration::from_secs(600);

/// How often it is asked.
const READY_POLL: Duration = Duration::from_millis(50);

/// How long a reason that does not pass by itself may last: nobody else comes to help.
const HOPELESS_AFTER: Duration = Duration::from_secs(20);

/// The system chooses a free port.
const ANY_PORT: &str = "127.0.0.1:0";

/// What stands before the addresses of a coordinator.
const LISTENING: &str = "listening: ";

/// Where etcd is, started if need be. It serves all clusters of a bench, one after the other.
pub(super) async fn etcd(
    options: &Options,
    processes: &mut Processes,
) -> Result<String, ScalingError> {
    if let Some(url) = &options.etcd {
        return Ok(url.clone());
    }
    // Sockets that a program opens by itself get ports of 127.0.0.1: a port of this address stays free
    // until etcd takes it.
    let [.., high, low] = std::process::id().to_be_bytes();
    let address = Ipv4Addr::new(127, high, low, 2);
    let (client, peer) = two_ports(address).map_err(ScalingError::Port)?;
    let (client, peer) = (format!("http://{address}:{client}"), format!("http://{address}:{peer}"));
    let data = processes.folder().join("etcd");
    let cluster = format!("bench={peer}");
    let flags = [
        // Nothing that it holds is needed after an end.
        "--unsafe-no-fsync",
        "--name=bench",
        "--log-level=error",
        "--listen-client-urls",
        &client,
        "--advertise-client-urls",
        &client,
        "--listen-peer-urls",
        &peer,
        "--initial-advertise-peer-urls",
        &peer,
        "--initial-cluster",
        &cluster,
        "--data-dir",
    ];
    let mut arguments: Vec<OsString> = flags.iter().map(OsString::from).collect();
    arguments.push(data.into());
    let spec = Spec {
        name: "etcd".into(),
        program: Some("etcd"),
        arguments,
        group: None,
        // Logs of all processes too: etcd is the last to end.
        remove: Some(processes.folder().to_owned()),
    };
    processes.start(spec).await.map_err(ScalingError::Etcd)?;
    Ok(client)
}

/// Two free ports of `address`, looked for at once so that they differ.
fn two_ports(address: Ipv4Addr) -> std::io::Result<(u16, u16)> {
    let (first, second) = (TcpListener::bind((address, 0))?, TcpListener::bind((address, 0))?);
    Ok((first.local_addr()?.port(), second.local_addr()?.port()))
}

/// A cluster that serves.
pub(super) struct Cluster {
    pub(super) client: Client,
    /// Layers of each stage of each pipeline.
    pub(super) layers: Vec<Vec<u32>>,
    /// Its processes are those from here on: the workers, then the coordinator.
    pub(super) first: usize,
}

/// What is started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub(super) form: Form,
    /// Which of the options' workers.
    pub(super) workers: &'a [usize],
    /// A name that no other cluster of this bench has.
    pub(super) number: u32,
    pub(super) etcd: &'a str,
}

impl Cluster {
    /// Starts it and waits until all of its workers serve.
    pub(super) async fn start(
        options: &Options,
        wanted: Wanted<'_>,
        place: Option<&Place>,
        processes: &mut Processes,
    ) -> Result<Self, ScalingError> {
        let first = processes.count();
        for &worker in wanted.workers {
            processes.start(worker_spec(options, wanted, worker, place)?).await?;
        }
        processes.lines(first, LISTENING).await?;
        processes.start(coordinator_spec(options, wanted)).await?;
        let addresses = processes.line(processes.count() - 1, LISTENING).await?;
        let grpc = addresses.strip_prefix("gRPC ").and_then(|rest| rest.split(',').next());
        let endpoint: Endpoint = grpc
            .and_then(|address| address.parse().ok())
            .ok_or_else(|| ScalingError::Address { said: addresses.clone() })?;
        let (client, status) = tokio::select! {
            biased;
            error = processes.failed() => return Err(error.into()),
            ready = ready(&endpoint, wanted) => ready?,
        };
        let pipelines = status.plan.pipelines.iter();
        let layers = pipelines.map(|pipeline| {
            pipeline.stages.iter().map(|stage| stage.layers[1] - stage.layers[0]).collect()
        });
        let cluster = Self { client, layers: layers.collect(), first };
        check_room(options, wanted, &status)?;
        Ok(cluster)
    }
}

fn worker_spec(
    options: &Options,
    wanted: Wanted<'_>,
    worker: usize,
    place: Option<&Place>,
) -> Result<Spec, ProcessError> {
    let name = format!("worker-{}", worker + 1);
    let mut arguments = common("worker", wanted);
    let mut flag = |name: &str, value: OsString| arguments.extend([name.into(), value]);
    flag("--id", name.clone().into());
    flag("--listen", ANY_PORT.into());
    flag("--store", options.store.clone().into());
    flag("--threads", options.threads.to_string().into());
    flag("--memory", options.memory_bytes.to_string().into());
    if let Some(isa) = &options.isa {
        flag("--isa", isa.into());
    }
    let group = match (place, options.quotas.get(worker)) {
        (Some(place), Some(&quota)) => {
            let name = format!("tercet-bench-{}-{}", std::process::id(), worker + 1);
            Some(Group::make(place, &name, quota)?)
        }
        _ => None,
    };
    Ok(Spec { name, program: None, arguments, group, remove: None })
}

fn coordinator_spec(options: &Options, wanted: Wanted<'_>) -> Spec {
    let (stages, pipelines) = shape(wanted);
    let mut arguments = common("coordinator", wanted);
    let mut flag = |name: &str, value: OsString| arguments.extend([name.into(), value]);
    flag("--model", options.store.clone().into());
    flag("--grpc", ANY_PORT.into());
    flag("--http", ANY_PORT.into());
    flag("--stages", stages.to_string().into());
    flag("--pipelines", pipelines.to_string().into());
    Spec { name: "coordinator".into(), program: None, arguments, group: None, remove: None }
}

fn common(role: &str, wanted: Wanted<'_>) -> Vec<OsString> {
    let cluster = format!("bench-{}-{}", std::process::id(), wanted.number);
    [role, "--etcd", wanted.etcd, "--cluster", &cluster].iter().map(OsString::from).collect()
}

/// Stages of each pipeline, and pipelines.
fn shape(wanted: Wanted<'_>) -> (usize, usize) {
    match wanted.form {
        Form::Replicas => (1, wanted.workers.len()),
        Form::Pipeline => (wanted.workers.len(), 1),
    }
}

async fn ready(
    endpoint: &Endpoint,
    wanted: Wanted<'_>,
) -> Result<(Client, ClusterStatus), ScalingError> {
    let client = Client::connect(endpoint).await?;
    let begin = Instant::now();
    let mut hopeless_since = None;
    loop {
        let status = client.status().await?;
        if serves(&status, wanted) {
            return Ok((client, status));
        }
        let reason = match &status.waiting {
            Some(waiting) => waiting.detail.clone(),
            None => status.plan.reason.clone(),
        };
        match &status.waiting {
            Some(waiting) if !waiting.cause.passes() => {
                let since = *hopeless_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= HOPELESS_AFTER {
                    return Err(ScalingError::NotReady { waited: begin.elapsed(), reason });
                }
            }
            _ => hopeless_since = None,
        }
        if begin.elapsed() >= READY_TIMEOUT {
            return Err(ScalingError::NotReady { waited: READY_TIMEOUT, reason });
        }
        sleep(READY_POLL).await;
    }
}

/// Whether the cluster computes as it was told, with all of its workers.
fn serves(status: &ClusterStatus, wanted: Wanted<'_>) -> bool {
    let (stages, count) = shape(wanted);
    let pipelines = &status.plan.pipelines;
    status.ready
        && pipelines.len() == count
        && pipelines.iter().all(|one| one.state == "active" && one.stages.len() == stages)
}

/// Requests that wait for KV are no load.
fn check_room(
    options: &Options,
    wanted: Wanted<'_>,
    status: &ClusterStatus,
) -> Result<(), ScalingError> {
    let workers = wanted.workers.len() as u64;
    for load in options.loads(0) {
        let tokens = u64::from(load.prompt) + u64::from(load.generate);
        let requests = u64::from(load.requests) * workers;
        let needed = requests * tokens.div_ceil(u64::from(proto::BLOCK_TOKENS));
        let found = status.queue.kv_blocks_total;
        if needed > u64::from(found) {
            return Err(ScalingError::NoRoom { requests, tokens, needed, found });
        }
    }
    Ok(())
}

impl From<ClientError> for ScalingError {
    fn from(source: ClientError) -> Self {
        Self::Client(source)
    }
}
