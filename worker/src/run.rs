//! One worker from its start to its end: proves its kernels, measures itself, registers, serves,
//! drains.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kernels::{Backend, KERNEL_REVISION, Refusal};
use model::{Store, StoreError};
use node::Chain;
use node::hosts::Hosts;
use node::membership::Membership;
use node::observe::{Condition, Health};
use node::{Supervisor, TaskError};
use proto::ids::{Incarnation, KnownAnswer, ModelId};
use proto::keys::Keys;
use proto::limits;
use proto::plan::{KvType, WORKER_FORMAT, WorkerModel, WorkerRecord};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::bridge::EngineFailure;
use crate::config::Config;
use crate::config::cpu::CpuLimits;
use crate::engine::EngineConfig;
use crate::error::RunError;
use crate::leaving::{Leaving, REGISTRY_TIMEOUT};
use crate::measure::{measure_steps, measured_layers};
use crate::record::{Published, encode, register};
use crate::service::{Identity, Service, offered_bytes};
use crate::witness::{RegistryKeys, Witness};
use crate::{grpc, known_answer, machine, nearness, standby, stub, telemetry, verify, weights};

/// How long the registry may take before that is said.
const NOTICE_AFTER: Duration = Duration::from_secs(1);

/// Characters of a machine's name that are told: Linux has names of up to 64 bytes.
const MACHINE_NAME_CHARS: usize = 64;

/// What stopping takes beyond leaving and draining: streams end, connections close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Serves as one worker of a cluster until `stop` fires, or the coordinator dismisses it, and what
/// it holds was moved elsewhere.
///
/// `bound` is told the address of the stage service once it accepts connections and the worker
/// is in the registry.
///
/// # Errors
///
/// What kept it from starting, from serving, or from stopping well.
pub async fn run(
    config: Config,
    keys: Keys,
    membership: Arc<dyn Membership>,
    bound: Option<oneshot::Sender<SocketAddr>>,
    stop: CancellationToken,
) -> Result<(), RunError> {
    // Everything that can be wrong is found here, before anything is served.
    config.validate()?;
    // The caller's token stays the caller's: a worker that fails or is dismissed stops nobody else.
    let stop = stop.child_token();
    let id = config.worker_id()?.to_string();
    let checks = config.clone();
    let checked = tokio::task::spawn_blocking(move || check_machine(&checks));
    // Reading a large model from a slow disk takes minutes, in which the process must be able to end.
    let Some(checked) = stop.run_until_cancelled(checked).await else {
        tracing::info!(worker = id, "stopped before its models were verified");
        return Ok(());
    };
    let Checked { engine, known_answer, memory_bytes, stretch, stores, models } =
        checked.map_err(RunError::StartUp)??;
    let listener = listen(config.listen)?;
    let address = listener.local_addr().map_err(|source| listen_error(config.listen, source))?;
    let observer = match config.http {
        Some(http) => Some((http, listen(http)?)),
        None => None,
    };

    let incarnation = Incarnation(rand::random());
    let record = WorkerRecord {
        format: WORKER_FORMAT,
        id: id.clone(),
        incarnation,
        address: config.advertise.as_ref().map_or_else(|| address.to_string(), ToString::to_string),
        machine: machine_name(),
        rack: config.rack.as_ref().map(ToString::to_string).unwrap_or_default(),
        version: env!("CARGO_PKG_VERSION").into(),
        isa: engine.backend.isa().into(),
        threads: u32::try_from(engine.threads).unwrap_or(u32::MAX),
        memory_bytes: offered_bytes(memory_bytes, &stores, &engine),
        kernel_revision: KERNEL_REVISION,
        known_answer,
        models,
        draining: false,
        stub: config.stub_compute.is_some(),
        socket: node::socket::name(address),
        round_trips_us: BTreeMap::new(),
    };
    telemetry::describe();
    node::serve::describe();
    node::observe::describe();
    telemetry::build_info(&id, engine.backend.isa());
    let (failures, failed) = mpsc::channel(1);
    let watch_failures = failures.clone();
    let closing = CancellationToken::new();
    let identity = Identity {
        id: id.clone(),
        incarnation,
        engine,
        memory_bytes,
        known_answer,
        stores,
        stub: config.stub_compute,
    };
    let witness = Witness::new(RegistryKeys {
        membership: membership.clone(),
        leader: keys.leader(),
        cluster_id: keys.cluster_id(),
    });
    let service =
        Arc::new(Service::new(identity, witness, failures, closing.clone(), stop.clone()));
    let (health, serving) = grpc::serve(listener, service.clone())?;
    grpc::set_serving(&health, true).await;
    let condition = Health::starting();

    let mut tasks = Supervisor::new(stop.clone());
    tasks.spawn("grpc", |_| async move {
        serving.await;
        Ok(())
    });
    tasks.spawn("engine", |_| watch_engines(failed, closing.clone()));
    let watched = service.clone();
    // A worker that drains goes on serving.
    tasks.spawn("weights", |_| weights::look_after(watched, watch_failures, closing.clone()));
    if let Some((http, listener)) = observer {
        let router = node::observe::router(condition.clone(), Hosts::of(http, None));
        let closing = closing.clone();
        tasks.spawn("http", |_| async move {
            let options = node::observe::options("observe");
            Ok(node::serve::on_own_thread(listener, router, options, closing).await?)
        });
    }
    let key = keys.worker(&id);
    let value = encode(&record).map_err(RunError::Record)?;
    let registering = async {
        let mut registering = Box::pin(register(&*membership, &key, &record, value));
        match tokio::time::timeout(NOTICE_AFTER, &mut registering).await {
            Ok(registered) => registered,
            Err(_) => {
                tracing::info!(
                    worker = id,
                    "waiting for the registry to take the worker in: an earlier process of its id \
                     may hold the key until its lease ends",
                );
                registering.await
            }
        }
    };
    let Some(registered) = stop.run_until_cancelled(registering).await else {
        tracing::info!(worker = id, "stopped before the registry took it in");
        return Ok(());
    };
    let registration =
        registered.map_err(|source| RunError::Register { id: id.clone(), source })?;
    condition.set(Condition::Serving);
    tracing::info!(
        worker = id,
        %incarnation,
        %address,
        advertised = record.address,
        models = record.models.len(),
        "worker is in the registry",
    );
    if let Some(bound) = bound {
        // Nobody may be waiting any more.
        let _ = bound.send(address);
    }
    let (watched, registry) = (service.clone(), membership.clone());
    tasks.spawn("standby", |stop| standby::tell(watched, registry, keys.clone(), stop));
    let grace = config.shutdown_grace;
    let (models, threads) = (record.models.clone(), record.threads);
    service.pace().publish(models.clone());
    let at_start = machine::AtStart { models, threads, stretch };
    let published = Arc::new(Published::new(record, registration, stretch));
    let (watched, told) = (service.clone(), published.clone());
    tasks.spawn("cpus", |stop| machine::watch_cpus(config.threads, watched, told, stop));
    let (watched, told) = (service.clone(), published.clone());
    tasks.spawn("pace", |stop| {
        machine::watch_pace(at_start, watched, told, config.drift_time, stop)
    });
    let (registry, workers, told) = (membership.clone(), keys.workers(), published.clone());
    tasks.spawn("nearness", |stop| nearness::watch(registry, workers, told, stop));
    let leaving =
        Leaving { id: id.clone(), published, membership, keys, service, health, condition };
    tasks.spawn("drain", |stop| leaving.leave_after(stop, grace));
    tasks.run(grace + 2 * REGISTRY_TIMEOUT + CLOSE_TIMEOUT).await?;
    tracing::info!(worker = id, "worker has left");
    Ok(())
}

/// What a worker knows of itself and its machine.
struct Checked {
    /// As large as any that a coordinator may ask for.
    engine: EngineConfig,
    known_answer: KnownAnswer,
    /// Bytes that it may take for all that it does.
    memory_bytes: u64,
    /// How many times as long as unhindered everything takes under the quota.
    stretch: f64,
    stores: Vec<Arc<Store>>,
    models: Vec<WorkerModel>,
}

/// The name of this machine; empty if it has none.
fn machine_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().chars().filter(|c| !c.is_control()).take(MACHINE_NAME_CHARS).collect()
}

/// Proves the kernels, opens the stores, and times some layers and the head of each, which are verified
/// before. Computes for about a second.
fn check_machine(config: &Config) -> Result<Checked, RunError> {
    let backend = config.backend()?;
    let limits = CpuLimits::read();
    let threads = limits.threads(config.threads);
    let reason = limits.explain(config.threads);
    if config.threads.is_some_and(|asked| asked > threads) {
        tracing::warn!("more threads were asked for than can compute at a time: {reason}");
    } else {
        tracing::info!("{reason}");
    }
    let (memory_bytes, less) = config.memory_in_force();
    if let Some(reason) = less {
        tracing::warn!("{reason}");
    }
    // Who waits in place of computing waits as long under every quota.
    let stretch = if config.stub_compute.is_some() { 1.0 } else { limits.stretch(threads) };
    let engine = EngineConfig {
        backend,
        threads,
        kv_type: KvType::F32,
        kv_blocks: 1,
        max_step_tokens: limits::STEP_TOKENS as u32,
        shortcuts: config.shortcuts(),
        placement: config.placement(),
    };
    let choice = Backend::choose();
    let reason = match config.isa {
        Some(_) => format!("they were asked for; {choice}"),
        None => choice.to_string(),
    };
    tracing::info!(isa = backend.isa(), reason, "kernels chosen");
    for (isa, refusal) in &choice.refused {
        // Nothing is served wrong, but a CPU, a compiler or a kernel is broken.
        if matches!(refusal, Refusal::Differs(_)) {
            tracing::error!(isa, %refusal, "kernels refused");
        }
    }
    let known_answer = match config.stub_compute {
        Some(profile) => {
            tracing::warn!(%profile, "nothing is computed: answers are hashes, for tests");
            stub::known_answer()
        }
        None => known_answer::prove(backend)?,
    };
    let paths = model::find_stores(&config.store);
    if paths.is_empty() {
        let path = config.store.clone();
        return Err(RunError::NoStore { exists: path.exists(), path });
    }
    let mut stores: Vec<Arc<Store>> = Vec::with_capacity(paths.len());
    let mut models = Vec::with_capacity(paths.len());
    for store in usable(paths)? {
        let path = store.dir().to_owned();
        let id = ModelId(store.id().0);
        // Two stores of one model differ in layout only; one is enough.
        if stores.iter().any(|other| other.id() == store.id()) {
            tracing::info!(model = %id, path = %path.display(), "a second store of this model");
            continue;
        }
        let steps = match config.stub_compute {
            Some(profile) => profile.steps(),
            None => {
                match store.manifest().has_digest() {
                    // Of the rest each stage is verified when it is prepared: of a model that no
                    // single machine holds, a worker reads what it serves.
                    true => verify::stage(&store, &measured_layers(&store), true, |_| {})?,
                    false => verify::all(&store)?,
                }
                measure_steps(&store, &engine).map_err(RunError::Measure)?
            }
        };
        let mut model = WorkerModel { id, steps };
        // Steps were timed while they computed; under a quota they stand still besides.
        machine::scale(std::slice::from_mut(&mut model), stretch);
        let steps = &model.steps;
        tracing::info!(model = %id, path = %path.display(), ?steps, "store opened");
        models.push(model);
        stores.push(Arc::new(store));
    }
    Ok(Checked { engine, known_answer, memory_bytes, stretch, stores, models })
}

/// The stores that can be opened: one of several that cannot be is passed over with a warning.
///
/// # Errors
///
/// Why the first cannot be opened, if none can be.
fn usable(paths: Vec<PathBuf>) -> Result<Vec<Store>, StoreError> {
    let mut stores = Vec::with_capacity(paths.len());
    let mut failed = None;
    for path in paths {
        match Store::open(&path) {
            Ok(store) => stores.push(store),
            Err(error) => {
                tracing::warn!(path = %path.display(), error = %Chain(&error), "store passed over");
                failed.get_or_insert(error);
            }
        }
    }
    match failed {
        Some(error) if stores.is_empty() => Err(error),
        _ => Ok(stores),
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener, RunError> {
    node::serve::listen(address).map_err(|source| listen_error(address, source))
}

fn listen_error(address: SocketAddr, source: std::io::Error) -> RunError {
    RunError::Listen { address, source }
}

/// Ends when an engine's thread panicked or refuses to compute, and then ends every stream at once:
/// nobody must wait for a result that will not come.
async fn watch_engines(
    mut failed: mpsc::Receiver<EngineFailure>,
    closing: CancellationToken,
) -> Result<(), TaskError> {
    tokio::select! {
        failure = failed.recv() => match failure {
            Some(failure) => {
                tracing::error!(error = %Chain(&failure), "this worker ends");
                closing.cancel();
                Err(failure.into())
            }
            None => Ok(()),
        },
        () = closing.cancelled() => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bridge::EngineFailure;

    #[test]
    fn a_store_that_cannot_be_opened_is_passed_over_beside_others() {
        let dir = tempfile::tempdir().unwrap();
        let good = model::import_bundled(dir.path()).unwrap();
        let broken = dir.path().join("broken");
        std::fs::create_dir(&broken).unwrap();
        std::os::unix::fs::symlink("gone", broken.join("manifest.json")).unwrap();
        let found = model::find_stores(dir.path());
        assert_eq!(found.len(), 2, "{found:?}");
        let stores = usable(found).unwrap();
        assert_eq!(stores.iter().map(Store::dir).collect::<Vec<_>>(), [good.as_path()]);
        let error = usable(vec![broken.clone(), broken]).unwrap_err();
        assert!(matches!(error, StoreError::Read { .. }), "{error}");
    }

    #[tokio::test]
    async fn an_engine_that_fails_ends_the_process_and_every_stream() {
        let (failures, failed) = mpsc::channel(1);
        let closing = CancellationToken::new();
        let stop = CancellationToken::new();
        let mut tasks = Supervisor::new(stop.clone());
        tasks.spawn("engine", |_| watch_engines(failed, closing.clone()));
        failures.send(EngineFailure::new("blocks of lead")).await.unwrap();
        let error = tasks.run(CLOSE_TIMEOUT).await.unwrap_err();
        let text = Chain(&error).to_string();
        assert_eq!(text, "task engine failed: the engine's thread panicked: blocks of lead");
        assert!(closing.is_cancelled() && stop.is_cancelled());
    }
}
