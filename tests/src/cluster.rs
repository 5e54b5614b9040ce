//! A cluster of real processes: one coordinator, workers, and etcd between them.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use serde_json::Value;

use crate::etcd::Etcd;
use crate::process::{self, Process, wait_for};

/// How long a cluster may take until it serves: two lease times and a margin for a busy machine.
const READY: Duration = Duration::from_secs(60);

/// A coordinator, its workers and its etcd.
pub struct Cluster {
    /// First, so that it ends last.
    workers: Vec<Process>,
    coordinator: Process,
    etcd: Etcd,
    store: PathBuf,
    flags: String,
    grpc: String,
    http: String,
    environment: Vec<(String, String)>,
}

/// The system chooses a port that is free, and the program says which.
const ANY_PORT: &str = "127.0.0.1:0";

/// The name under which all of them meet.
const NAME: &str = "test";

impl Cluster {
    /// Starts a coordinator and `workers` workers that serve `store` in `stages` stages.
    ///
    /// # Panics
    ///
    /// If it does not serve within a minute.
    pub fn start(store: PathBuf, workers: usize, stages: usize) -> Self {
        Self::start_with(store, workers, stages, &[])
    }

    /// The same, with variables in the environment of each process.
    ///
    /// # Panics
    ///
    /// If it does not serve within a minute.
    pub fn start_with(
        store: PathBuf,
        workers: usize,
        stages: usize,
        environment: &[(&str, &str)],
    ) -> Self {
        Self::start_flags(store, workers, &format!("--stages {stages}"), environment)
    }

    /// The same, with these flags of the coordinator in place of a number of stages.
    ///
    /// # Panics
    ///
    /// If it does not serve within a minute.
    pub fn start_flags(
        store: PathBuf,
        workers: usize,
        flags: &str,
        environment: &[(&str, &str)],
    ) -> Self {
        let stores = vec![store.clone(); workers];
        Self::start_on(store, &stores, flags, environment)
    }

    /// The same, with a worker on each of `stores`, all of the model that `store` is.
    ///
    /// # Panics
    ///
    /// If it does not serve within a minute.
    pub fn start_on(
        store: PathBuf,
        stores: &[PathBuf],
        flags: &str,
        environment: &[(&str, &str)],
    ) -> Self {
        let environment: Vec<(String, String)> =
            environment.iter().map(|&(key, value)| (key.into(), value.into())).collect();
        let etcd = Etcd::start();
        let Coordinator { process: coordinator, grpc, http } =
            launch_coordinator("coordinator", &etcd, &store, flags, &environment);
        let flags = flags.to_owned();
        let mut cluster =
            Self { workers: Vec::new(), coordinator, etcd, store, flags, grpc, http, environment };
        for (index, store) in stores.iter().enumerate() {
            let worker = cluster.start_worker_on(&format!("worker-{index}"), store);
            cluster.workers.push(worker);
        }
        cluster.wait_until_ready();
        cluster
    }

    /// Starts one more worker process; the caller keeps it.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn start_worker(&self, id: &str) -> Process {
        self.start_worker_on(id, &self.store)
    }

    /// The same, on a store of its own.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn start_worker_on(&self, id: &str, store: &Path) -> Process {
        self.start_worker_with(id, store, &[])
    }

    /// The same, with more variables in its environment.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn start_worker_with(&self, id: &str, store: &Path, more: &[(&str, &str)]) -> Process {
        let store = store.to_str().expect("test paths are text");
        let arguments = format!(
            "worker --etcd {} --cluster {NAME} --id {id} --listen {ANY_PORT} --threads 1 \
             --store {store}",
            self.etcd.url(),
        );
        let more = more.iter().map(|&(key, value)| (key.to_owned(), value.to_owned()));
        let environment: Vec<_> = self.environment.iter().cloned().chain(more).collect();
        launch(id, &arguments, &environment)
    }

    /// Starts one more coordinator of this cluster; the caller keeps it.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn start_coordinator(&self, name: &str) -> Coordinator {
        launch_coordinator(name, &self.etcd, &self.store, &self.flags, &self.environment)
    }

    /// Puts another coordinator in the place of this cluster's, which ends if it has not.
    pub fn replace_coordinator(&mut self, new: Coordinator) {
        let Coordinator { process, grpc, http } = new;
        (self.coordinator, self.grpc, self.http) = (process, grpc, http);
    }

    /// Puts another worker in the place of worker `index`, which ends if it has not.
    pub fn replace_worker(&mut self, index: usize, new: Process) {
        self.workers[index] = new;
    }

    /// Worker `index`, as it was started.
    pub fn worker(&mut self, index: usize) -> &mut Process {
        &mut self.workers[index]
    }

    /// Takes worker `index` out, to end it while others use the cluster. Another must be
    /// [put](Self::put_worker) in its place.
    pub fn take_worker(&mut self, index: usize) -> Process {
        self.workers.remove(index)
    }

    /// Takes all workers out.
    pub fn take_workers(&mut self) -> Vec<Process> {
        std::mem::take(&mut self.workers)
    }

    /// Puts a worker where one was taken out.
    pub fn put_worker(&mut self, index: usize, worker: Process) {
        self.workers.insert(index, worker);
    }

    /// The coordinator.
    pub fn coordinator(&mut self) -> &mut Process {
        &mut self.coordinator
    }

    /// The registry.
    pub fn etcd(&mut self) -> &mut Etcd {
        &mut self.etcd
    }

    /// Address of the gRPC API.
    pub fn grpc(&self) -> &str {
        &self.grpc
    }

    /// Address of the HTTP API.
    pub fn http(&self) -> &str {
        &self.http
    }

    /// Waits until a token has gone through the pipeline.
    ///
    /// # Panics
    ///
    /// If that takes more than a minute.
    pub fn wait_until_ready(&self) {
        wait_for("the cluster to be ready", READY, || {
            let answer = crate::http::get(&self.http, "/ready").ok()?;
            (answer.status == 200).then_some(())
        });
    }

    /// What `tercet status --json` prints.
    ///
    /// # Panics
    ///
    /// If it fails.
    pub fn status(&self) -> Value {
        let output = process::run(&["status", "--endpoint", &self.grpc, "--json"]);
        json_of(&output)
    }

    /// State of the worker called `id`, if the coordinator knows it.
    ///
    /// # Panics
    ///
    /// If the status cannot be had.
    pub fn state_of(&self, id: &str) -> Option<String> {
        let status = self.status();
        let workers = status["workers"].as_array().expect("a list of workers");
        let worker = workers.iter().find(|worker| worker["id"] == id)?;
        Some(worker["state"].as_str().expect("a state").into())
    }

    /// Runs an operator's command against this cluster: `drain`, `roll`, `plan`.
    pub fn operate(&self, arguments: &[&str]) -> Output {
        process::run(&[arguments, &["--endpoint", &self.grpc, "--json"]].concat())
    }

    /// The store that its workers serve.
    pub fn store(&self) -> &Path {
        &self.store
    }

    /// Runs `tercet generate` against this cluster.
    pub fn generate(&self, more: &[&str]) -> Output {
        let mut arguments = vec!["generate", "--endpoint", &self.grpc, "--json"];
        arguments.extend(more);
        process::run(&arguments)
    }
}

/// What a command printed with `--json`.
///
/// # Panics
///
/// If it failed or printed something else.
pub fn json_of(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", output.status);
    let found = serde_json::from_slice(&output.stdout);
    found.unwrap_or_else(|error| panic!("{error} in {}", String::from_utf8_lossy(&output.stdout)))
}

/// A coordinator's process and where it is reached.
pub struct Coordinator {
    /// The process.
    pub process: Process,
    /// Address of its gRPC API.
    pub grpc: String,
    /// Address of its HTTP API.
    pub http: String,
}

fn launch_coordinator(
    name: &str,
    etcd: &Etcd,
    store: &Path,
    flags: &str,
    environment: &[(String, String)],
) -> Coordinator {
    let model = store.to_str().expect("test paths are text");
    let arguments = format!(
        "coordinator --etcd {} --cluster {NAME} --model {model} --grpc {ANY_PORT} \
         --http {ANY_PORT} {flags}",
        etcd.url()
    );
    let mut process = launch(name, &arguments, environment);
    let (grpc, http) = listening(&mut process);
    Coordinator { process, grpc, http }
}

/// Test paths hold no spaces.
fn launch(name: &str, arguments: &str, environment: &[(String, String)]) -> Process {
    let arguments: Vec<&str> = arguments.split_whitespace().collect();
    Process::start_with(name, &arguments, |command| {
        command.envs(environment.iter().map(|(key, value)| (key, value)));
    })
}

/// Addresses of gRPC and HTTP of a coordinator, from the line that says them.
///
/// # Panics
///
/// If it does not say them within a minute.
pub fn listening(coordinator: &mut Process) -> (String, String) {
    coordinator.wait_for_log("listening: gRPC", READY);
    let line = wait_for("the end of a line", READY, || {
        let log = coordinator.log();
        let (_, rest) = log.split_once("listening: gRPC ")?;
        rest.split_once('\n').map(|(line, _)| line.to_owned())
    });
    let (grpc, http) = line.split_once(", HTTP ").expect("both addresses in one line");
    // With `--admin` a third follows.
    let http = http.split_once(", ").map_or(http, |(http, _)| http);
    (grpc.into(), http.into())
}
