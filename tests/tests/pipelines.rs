//! Several pipelines in one cluster of real processes and a real etcd: workers that come, go, restart
//! and die while answers stream. No answer fails, and none is another than it would have been.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

use std::collections::BTreeSet;

use nix::sys::signal::Signal;
use tests::cluster::Cluster;
use tests::model::bundled_store;
use tests::process::{Process, wait_for};
use tests::scrape::Scrape;
use tests::streams::{
    QUICK, SETTLE, assert_unharmed, placed, stream, streaming, undisturbed, wait_until_placed,
    workers_placed,
};

/// The newest epoch of all pipelines: a revision of the registry, so it counts changes of the plan from
/// above.
fn newest_epoch(cluster: &Cluster) -> u64 {
    let status = cluster.status();
    let pipelines = status["plan"]["pipelines"].as_array().unwrap();
    pipelines.iter().filter_map(|pipeline| pipeline["epoch"].as_u64()).max().unwrap()
}

/// Plans that the coordinator has written.
fn plans(cluster: &Cluster) -> f64 {
    Scrape::of(cluster.http()).value("tercet_plans_written_total")
}

/// A worker that comes is planned for once ...
const PLANS_FOR_A_COMER: f64 = 1.0;
/// ... and one that is killed and comes back when it is lost and when it is back.
const PLANS_FOR_A_DEATH: f64 = 2.0;

/// Ends a worker in order and starts another process in its place; the new one.
fn replace(cluster: &Cluster, worker: &mut Process, id: &str) -> Process {
    worker.signal(Signal::SIGTERM);
    let status = worker.wait(SETTLE);
    assert!(status.success(), "{id} drains and exits by itself: {status}\n{}", worker.log());
    cluster.start_worker(id)
}

#[test]
fn every_worker_counts_however_they_come() {
    let mut cluster = Cluster::start_flags(bundled_store(), 1, "", QUICK);
    let alone = [vec!["worker-0".to_owned()]];
    assert_eq!(placed(&cluster), BTreeSet::from(alone));
    let mut workers = vec![cluster.take_worker(0)];
    let expected = undisturbed(&cluster);
    let found = streaming(&mut cluster, &expected, |cluster| {
        for count in 2..=4 {
            workers.push(cluster.start_worker(&format!("worker-{}", count - 1)));
            wait_until_placed(cluster, "the late worker to serve", |placed| {
                workers_placed(placed) == count
            });
        }
    });
    assert_unharmed("three workers join one by one", &found);

    let mut allowed = 4.0 * PLANS_FOR_A_COMER;
    let written = plans(&cluster);
    assert!((1.0..=allowed).contains(&written), "{written} plans for four who came");

    // Each dies without a word, and comes back.
    for (index, worker) in workers.iter_mut().enumerate() {
        let id = format!("worker-{index}");
        worker.kill();
        wait_until_placed(&cluster, "the others to serve without it", |placed| {
            !placed.iter().flatten().any(|other| *other == id) && workers_placed(placed) == 3
        });
        *worker = cluster.start_worker(&id);
        wait_until_placed(&cluster, "it to serve again", |placed| workers_placed(placed) == 4);
        assert_eq!(stream(&cluster, index).unwrap().text, expected[index]);
        allowed += PLANS_FOR_A_DEATH;
        let written = plans(&cluster);
        assert!(written <= allowed, "{written} plans when {id} had died, not {allowed}");
    }
    let epoch = newest_epoch(&cluster);
    // At rest: what is well is left alone.
    assert_eq!(undisturbed(&cluster), expected);
    assert_eq!(newest_epoch(&cluster), epoch);
    assert!(plans(&cluster) <= allowed, "{} plans", plans(&cluster));
}

#[test]
fn restarting_every_worker_in_turn_costs_nobody_an_answer_with_a_spare() {
    let mut cluster = Cluster::start_flags(bundled_store(), 4, "--stages 3 --pipelines 1", QUICK);
    restart_all(&mut cluster, 4, "rolling restart of three stages and a spare", |placed| {
        workers_placed(placed) == 3
    });
}

#[test]
fn restarting_every_worker_in_turn_costs_nobody_an_answer_without_a_spare() {
    let mut cluster = Cluster::start_flags(bundled_store(), 3, "", QUICK);
    wait_until_placed(&cluster, "all three to serve", |placed| workers_placed(placed) == 3);
    restart_all(&mut cluster, 3, "rolling restart of three workers, all in use", |placed| {
        workers_placed(placed) == 3
    });
}

/// The one pipeline that there can be stands still while a worker of it is restarted, and no longer.
#[test]
fn restarting_a_worker_that_cannot_be_spared_costs_nobody_an_answer() {
    let flags = "--stages 3 --pipelines 1";
    let mut cluster = Cluster::start_flags(bundled_store(), 3, flags, QUICK);
    restart_all(&mut cluster, 1, "restart of a worker that cannot be spared", |placed| {
        workers_placed(placed) == 3
    });
}

fn restart_all(
    cluster: &mut Cluster,
    workers: usize,
    what: &str,
    whole: impl Fn(&BTreeSet<Vec<String>>) -> bool,
) {
    let expected = undisturbed(cluster);
    let found = streaming(cluster, &expected, |cluster| {
        for index in 0..workers {
            let id = format!("worker-{index}");
            let mut old = cluster.take_worker(index);
            let new = replace(cluster, &mut old, &id);
            cluster.put_worker(index, new);
            wait_for("the new process to be known", SETTLE, || {
                let state = cluster.state_of(&id)?;
                (state == "active" || state == "standby").then_some(())
            });
            wait_until_placed(cluster, "the plan to be whole", &whole);
        }
    });
    assert_unharmed(what, &found);
}
