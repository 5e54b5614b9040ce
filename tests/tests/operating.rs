//! What operators do to a cluster of real processes and a real etcd while answers stream: drain, plan,
//! roll; and a worker that gets slow. No answer fails, and none is another than it would have been.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

use std::collections::BTreeMap;
use std::process::Output;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use serde_json::Value;
use tests::cluster::{Cluster, json_of};
use tests::model::bundled_store;
use tests::process::{self, wait_for};
use tests::slow::to_a_tenth;
use tests::streams::{
    QUICK, SETTLE, assert_unharmed, placed, streaming, undisturbed, wait_until_placed,
    workers_placed,
};

/// A minute of the defaults takes two seconds here.
const DRIFT: &str = "2s";

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Somebody's stage in the only pipeline.
fn stage(cluster: &Cluster, index: usize) -> String {
    placed(cluster).into_iter().next().unwrap()[index].clone()
}

/// A worker's place among the processes.
fn number(id: &str) -> usize {
    id.strip_prefix("worker-").unwrap().parse().unwrap()
}

fn until_standing_by(cluster: &Cluster, id: &str) {
    wait_for("the new process to stand by", SETTLE, || {
        (cluster.state_of(id)? == "standby").then_some(())
    });
}

/// The process start of every worker.
fn incarnations(cluster: &Cluster) -> BTreeMap<String, String> {
    let status = cluster.status();
    let workers = status["workers"].as_array().unwrap().iter();
    let text = |worker: &Value, key: &str| worker[key].as_str().unwrap().to_owned();
    workers.map(|worker| (text(worker, "id"), text(worker, "incarnation"))).collect()
}

/// Starts workers again that have ended well, as systemd would, while `meanwhile` runs.
fn supervised<T>(cluster: &mut Cluster, meanwhile: impl FnOnce(&Cluster) -> T) -> T {
    let workers = cluster.take_workers().into_iter().enumerate();
    let workers: Vec<_> =
        workers.map(|(index, worker)| (format!("worker-{index}"), worker)).collect();
    let (workers, over) = (Mutex::new(workers), AtomicBool::new(false));
    let result = thread::scope(|scope| {
        let cluster = &*cluster;
        let (workers, over) = (&workers, &over);
        scope.spawn(move || {
            while !over.load(Ordering::Relaxed) {
                for (id, worker) in workers.lock().unwrap().iter_mut() {
                    if let Some(status) = worker.ended() {
                        assert!(status.success(), "{id}: {status}\n{}", worker.log());
                        *worker = cluster.start_worker(id);
                    }
                }
                process::pause();
            }
        });
        let _ending = tests::slow::Ending::new(over);
        meanwhile(cluster)
    });
    for (index, (_, worker)) in workers.into_inner().unwrap().into_iter().enumerate() {
        cluster.put_worker(index, worker);
    }
    result
}

#[test]
fn drain_slowness_and_roll_cost_nobody_an_answer() {
    let flags = "--stages 3 --pipelines 1 --admin 127.0.0.1:0";
    let quick =
        [("TERCET_COORDINATOR__HOLD_DOWN", "1s"), ("TERCET_COORDINATOR__DRIFT_TIME", DRIFT)];
    let mut cluster = Cluster::start_flags(bundled_store(), 4, flags, &quick);
    let expected = undisturbed(&cluster);
    let whole = |cluster: &Cluster| {
        wait_until_placed(cluster, "the pipeline to be whole", |placed| {
            workers_placed(placed) == 3
        });
    };

    // A stage moves to the spare, the worker ends by itself; the next process is the spare, twice.
    let drain = |cluster: &mut Cluster, id: &str| {
        let index = number(id);
        let mut old = cluster.take_worker(index);
        let before = incarnations(cluster)[id].clone();
        let report = json_of(&cluster.operate(&["drain", id]));
        println!("drain: {report}");
        assert_eq!((&report["worker"], &report["state"]), (&id.into(), &"gone".into()));
        assert_eq!(report["incarnation"], before);
        let status = old.wait(SETTLE);
        assert!(status.success(), "{status}\n{}", old.log());
        let more = [("TERCET_WORKER__DRIFT_TIME", DRIFT)];
        let new = cluster.start_worker_with(id, cluster.store(), &more);
        cluster.put_worker(index, new);
        until_standing_by(cluster, id);
        whole(cluster);
    };
    let quick_to_tell = stage(&cluster, 1);
    let found = streaming(&mut cluster, &expected, |cluster| {
        drain(cluster, &quick_to_tell);
        let first = stage(cluster, 0);
        drain(cluster, &first);
        // Nothing is better than what serves, or it is changed: nobody notices either way.
        let planned = json_of(&cluster.operate(&["plan", "--apply"]));
        assert_eq!(planned["possible"], true);
        assert!(!planned["reason"].as_str().unwrap().is_empty(), "{planned}");
        whole(cluster);
    });
    assert_unharmed("two drains, and plan --apply", &found);

    // It got a stage when the other was drained, and becomes slow. Where other work on the machine has made
    // it so already, the plan has done without it since: it takes the place of another that is drained.
    let has_stage =
        |cluster: &Cluster| placed(cluster).iter().flatten().any(|id| *id == quick_to_tell);
    let found = streaming(&mut cluster, &expected, |cluster| {
        if !has_stage(cluster) {
            let other = stage(cluster, 0);
            drain(cluster, &other);
        }
        assert!(has_stage(cluster));
        let began = Instant::now();
        to_a_tenth(cluster.worker(number(&quick_to_tell)).id(), || {
            wait_until_placed(cluster, "the slow worker to be out", |placed| {
                workers_placed(placed) == 3
                    && !placed.iter().flatten().any(|id| *id == quick_to_tell)
            });
        });
        println!("slowed to a tenth, out after {:?}", began.elapsed());
    });
    assert_unharmed("a worker slowed to a tenth", &found);

    let before = incarnations(&cluster);
    let found = streaming(&mut cluster, &expected, |cluster| {
        let rolled = supervised(cluster, |cluster| cluster.operate(&["roll", "--timeout", "60s"]));
        assert!(rolled.status.success(), "{}", said(&rolled));
        let lines = String::from_utf8_lossy(&rolled.stdout).into_owned();
        println!("roll:\n{lines}");
        let reports: Vec<Value> =
            lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(reports.len(), 4);
        assert!(reports.iter().all(|report| report["back_s"].as_f64().unwrap() > 0.0));
        whole(cluster);
    });
    assert_unharmed("a roll of three stages and a spare", &found);
    let after = incarnations(&cluster);
    assert_eq!(before.len(), after.len());
    assert!(before.iter().all(|(id, old)| after[id] != *old), "{before:?} {after:?}");
}

/// Nobody can take the stage of anybody: what runs waits for each new process.
#[test]
fn a_cluster_without_a_spare_is_rolled_by_one_command() {
    let flags = "--stages 3 --pipelines 1 --admin 127.0.0.1:0";
    let mut cluster = Cluster::start_flags(bundled_store(), 3, flags, QUICK);
    let expected = undisturbed(&cluster);
    let before = incarnations(&cluster);
    let found = streaming(&mut cluster, &expected, |cluster| {
        let rolled = supervised(cluster, |cluster| cluster.operate(&["roll", "--timeout", "60s"]));
        assert!(rolled.status.success(), "{}", said(&rolled));
        let lines = String::from_utf8_lossy(&rolled.stdout).into_owned();
        println!("roll:\n{lines}");
        assert_eq!(lines.lines().count(), 3);
        wait_until_placed(cluster, "the pipeline to be whole", |placed| {
            workers_placed(placed) == 3
        });
    });
    assert_unharmed("a roll of three stages without a spare", &found);
    let after = incarnations(&cluster);
    assert_eq!(before.len(), after.len());
    assert!(before.iter().all(|(id, old)| after[id] != *old), "{before:?} {after:?}");
}

#[test]
fn a_plan_that_is_applied_takes_a_newcomer_at_once_and_what_cannot_be_done_is_said() {
    // Left to itself it would wait for ten minutes.
    let slow = [("TERCET_COORDINATOR__HOLD_DOWN", "10m")];
    let mut cluster = Cluster::start_flags(bundled_store(), 1, "--admin 127.0.0.1:0", &slow);
    let expected = undisturbed(&cluster);
    let mut late = None;
    let found = streaming(&mut cluster, &expected, |cluster| {
        late = Some(cluster.start_worker("worker-1"));
        until_standing_by(cluster, "worker-1");
        // What would come of it changes nothing.
        let what_if =
            json_of(&cluster.operate(&["plan", "--what-if", "add:more=worker-0,remove:worker-1"]));
        assert_eq!(what_if["pipelines"].as_array().unwrap().len(), 2, "{what_if}");
        assert!(what_if["before_tokens_per_s"].as_f64().unwrap() > 0.0, "{what_if}");
        assert_eq!(cluster.state_of("worker-1").unwrap(), "standby");
        let planned = json_of(&cluster.operate(&["plan", "--apply"]));
        println!("plan --apply: {planned}");
        assert_eq!((&planned["changes"], &planned["possible"]), (&true.into(), &true.into()));
        assert_eq!(planned["plan"]["pipelines"].as_array().unwrap().len(), 2, "{planned}");
        assert_eq!(workers_placed(&placed(cluster)), 2, "it serves when the command has ended");
        let again = json_of(&cluster.operate(&["plan", "--apply"]));
        assert_eq!(again["changes"], false, "{again}");
    });
    assert_unharmed("plan --apply with a newcomer", &found);

    let refused = |arguments: &[&str], want: &str| {
        let output = cluster.operate(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", said(&output));
        let said = said(&output);
        assert!(said.contains(want), "{arguments:?}: {said}");
        assert_eq!(said.matches("error: ").count(), 1, "{said}");
    };
    refused(&["drain", "worker-7"], "no worker \"worker-7\"; there are worker-0, worker-1");
    refused(&["roll", "worker-7"], "no worker \"worker-7\"; there are worker-0, worker-1");
    // Both at once cannot go: who has to stay serves on, and is kept when the order is taken back.
    let nowhere = json_of(&cluster.operate(&["drain", "worker-1", "--no-wait"]));
    assert_ne!(nowhere["state"], "in_use");
    refused(&["drain", "worker-0", "--timeout", "1s"], "still has a stage after 1s");
    let kept = json_of(&cluster.operate(&["drain", "worker-0", "--cancel"]));
    assert_eq!(kept["state"], "in_use");
    let mut late = late.unwrap();
    assert!(late.wait(SETTLE).success(), "{}", late.log());
    // Nobody starts it again, and nobody else is touched.
    late = cluster.start_worker("worker-1");
    until_standing_by(&cluster, "worker-1");
    refused(
        &["roll", "worker-1", "worker-0", "--timeout", "3s"],
        "the roll stopped at worker worker-1 and did not touch worker-0: worker worker-1 did not come \
         back within 3s",
    );
    assert!(late.wait(SETTLE).success());
    assert_eq!(cluster.state_of("worker-0").unwrap(), "active");

    // A coordinator that stands by, and one without an admin address, say so.
    let standby = cluster.start_coordinator("standby");
    let asked = |endpoint: &str| {
        let output =
            process::run(&["drain", "worker-0", "--endpoint", endpoint, "--timeout", "1s"]);
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        said(&output)
    };
    let want = format!("this coordinator does not lead; the one at {} does", cluster.grpc());
    wait_for("the standby to say who leads", SETTLE, || {
        asked(&standby.grpc).contains(&want).then_some(())
    });
    // Orders are taken at the admin address only.
    let output = process::run(&["drain", "worker-0", "--admin", cluster.grpc()]);
    let told = said(&output);
    assert!(told.contains("is not where a coordinator takes orders"), "{told}");
    assert_eq!(cluster.state_of("worker-0").unwrap(), "active");
}
