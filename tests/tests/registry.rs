//! A registry that comes back empty, older or with its keys deleted: the cluster serves on or again,
//! without hands, whoever leads afterwards.

use std::time::Duration;

use serde_json::Value;
use tests::cluster::{Cluster, json_of};
use tests::model::bundled_store;
use tests::process::{self, wait_for};

const STAGES: usize = 2;

/// One stands by.
const WORKERS: usize = STAGES + 1;

/// Within which requests are answered again after anything that happens here.
const AGAIN: Duration = Duration::from_secs(15);

/// What happens to the registry.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Restored from a backup.
    SetBack,
    /// Its disk was lost.
    Emptied,
    /// All keys of the cluster were deleted.
    Deleted,
}

/// What happens afterwards, for a cluster is not well that only looks so while nobody touches it.
#[derive(Clone, Copy, Debug)]
enum Then {
    /// A worker of the pipeline dies.
    WorkerDies,
    /// The coordinator dies and is started again.
    CoordinatorRestarts,
    /// The coordinator dies, and another one stood by.
    StandbyLeads,
}

#[test]
fn a_registry_is_lost_and_then_a_worker() {
    lose_registries(Then::WorkerDies);
}

#[test]
fn a_registry_is_lost_and_the_coordinator_restarted() {
    lose_registries(Then::CoordinatorRestarts);
}

#[test]
fn a_registry_is_lost_and_then_the_leader() {
    lose_registries(Then::StandbyLeads);
}

fn lose_registries(then: Then) {
    let mut cluster = Cluster::start(bundled_store(), WORKERS, STAGES);
    let wanted = tokens_of(&process::run(&local())).expect("one process answers");
    for (index, fault) in [Fault::SetBack, Fault::Emptied, Fault::Deleted].into_iter().enumerate() {
        let standby = matches!(then, Then::StandbyLeads)
            .then(|| cluster.start_coordinator(&format!("standby-{index}")));
        if matches!(fault, Fault::SetBack) {
            cluster.etcd().back_up();
        }
        // Numbers of before and after must not pass for one another by chance.
        cluster.etcd().write_junk(60);
        strike(&mut cluster, fault);
        let case = format!("{fault:?}, {then:?}");
        match then {
            Then::WorkerDies => {
                serves(cluster.grpc(), &wanted, &format!("{case}: before"));
                let index = cluster_worker_in_use(&cluster);
                let new = format!("{}-again", index);
                cluster.worker(index).kill();
                serves(cluster.grpc(), &wanted, &case);
                let new = cluster.start_worker(&format!("{new}-{fault:?}").to_lowercase());
                cluster.replace_worker(index, new);
            }
            Then::CoordinatorRestarts => {
                cluster.coordinator().kill();
                let again = cluster.start_coordinator(&format!("coordinator-{index}"));
                cluster.replace_coordinator(again);
                serves(cluster.grpc(), &wanted, &case);
            }
            Then::StandbyLeads => {
                let standby = standby.expect("one was started");
                cluster.coordinator().kill();
                cluster.replace_coordinator(standby);
                serves(cluster.grpc(), &wanted, &case);
            }
        }
        cluster.wait_until_ready();
    }
}

fn strike(cluster: &mut Cluster, fault: Fault) {
    match fault {
        Fault::SetBack | Fault::Emptied => cluster.etcd().set_back(),
        Fault::Deleted => cluster.etcd().delete_all("/tercet/"),
    }
}

/// A worker of the pipeline, by its place among those of the cluster.
fn cluster_worker_in_use(cluster: &Cluster) -> usize {
    let status = cluster.status();
    let stages = status["plan"]["pipelines"][0]["stages"].as_array().expect("there are stages");
    let worker = stages[0]["worker"].as_str().expect("a name");
    // `worker-1`, or `1-again-…` for the one that took its place.
    let index = worker.trim_start_matches("worker-").split('-').next();
    index.and_then(|index| index.parse().ok()).expect("a number")
}

/// Asks until an answer comes, which must be the right one and come in time.
fn serves(grpc: &str, wanted: &Value, case: &str) {
    let found = wait_for(case, AGAIN, || {
        let mut request = vec!["generate", "--endpoint", grpc, "--json"];
        request.extend(REQUEST);
        tokens_of(&process::run(&request))
    });
    assert_eq!(found, *wanted, "{case}");
}

const REQUEST: [&str; 5] = ["--max-tokens", "24", "--temperature", "0", "Once upon a time,"];

fn local() -> Vec<&'static str> {
    let store = bundled_store();
    let store = Box::leak(store.to_str().expect("test paths are text").to_owned().into_boxed_str());
    let mut request = vec!["generate", "--model", store, "--json"];
    request.extend(REQUEST);
    request
}

fn tokens_of(output: &std::process::Output) -> Option<Value> {
    output.status.success().then(|| json_of(output)["tokens"].clone())
}
