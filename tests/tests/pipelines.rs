//! Several pipelines in one cluster of real processes and a real etcd: workers that come, go, restart
//! and die while answers stream. No answer fails, and none is another than it would have been.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]
#![expect(clippy::print_stdout, reason = "how long streams stalled is a result")]

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tests::cluster::Cluster;
use tests::http::{self, Streamed};
use tests::model::bundled_store;
use tests::process::{Process, wait_for};

/// Within which a planned change must be over: the hold-down of these clusters, a planning interval,
/// what a worker takes to start, and a margin for a busy machine.
const SETTLE: Duration = Duration::from_secs(60);

/// Clusters here improve what serves soon after the last change.
const QUICK: &[(&str, &str)] = &[("TERCET_COORDINATOR__HOLD_DOWN", "1s")];

/// Streams at once.
const STREAMS: usize = 16;

/// Tokens of each answer: seconds of it, with that many at once.
const TOKENS: usize = 200;

/// The request of stream `index`: sampled, so that any wrong logit shows in the text.
fn request(index: usize) -> Value {
    let prompts = ["Once upon a time,", "Tom had a red ball.", "The dog", "One day, Lily"];
    json!({
        "prompt": prompts[index % prompts.len()],
        "max_tokens": TOKENS, "temperature": 0.9, "seed": index, "stream": true,
        "ignore_eos": true,
    })
}

/// What each stream gives while nothing happens.
fn undisturbed(cluster: &Cluster) -> Vec<String> {
    (0..STREAMS).map(|index| stream(cluster, index).unwrap().text).collect()
}

fn stream(cluster: &Cluster, index: usize) -> Result<Streamed, String> {
    http::stream(cluster.http(), "/v1/completions", &request(index))
}

/// What streams found while something was done to the cluster.
#[derive(Debug, Default)]
struct Found {
    whole: usize,
    wrong: Vec<String>,
    longest_gap: Duration,
}

/// Streams answer after answer, [`STREAMS`] at once, until `disturb` has ended.
fn streaming(cluster: &mut Cluster, disturb: impl FnOnce(&mut Cluster)) -> Found {
    let expected = undisturbed(cluster);
    let (address, over) = (cluster.http().to_owned(), AtomicBool::new(false));
    let one = |index: usize| {
        let mut found = Found::default();
        while !over.load(Ordering::Relaxed) {
            match http::stream(&address, "/v1/completions", &request(index)) {
                Ok(answer) if answer.text == expected[index] => {
                    found.whole += 1;
                    found.longest_gap = found.longest_gap.max(answer.longest_gap);
                }
                Ok(answer) => found.wrong.push(format!("stream {index} altered: {}", answer.text)),
                Err(error) => found.wrong.push(format!("stream {index} failed: {error}")),
            }
        }
        found
    };
    thread::scope(|scope| {
        let streams: Vec<_> = (0..STREAMS).map(|index| scope.spawn(move || one(index))).collect();
        disturb(cluster);
        over.store(true, Ordering::Relaxed);
        let mut all = Found::default();
        for stream in streams {
            let found = stream.join().unwrap();
            all.whole += found.whole;
            all.wrong.extend(found.wrong);
            all.longest_gap = all.longest_gap.max(found.longest_gap);
        }
        all
    })
}

/// Checks that nothing failed and nothing was altered, and says how long the longest stall was.
fn assert_unharmed(what: &str, found: &Found) {
    assert!(
        found.wrong.is_empty(),
        "{what}: {} of {}: {:#?}",
        found.wrong.len(),
        found.whole,
        found.wrong
    );
    assert!(found.whole >= STREAMS, "{what}: only {} answers", found.whole);
    println!("{what}: {} answers, longest stall {:?}", found.whole, found.longest_gap);
}

/// The workers of every pipeline that serves, those of one pipeline together.
fn placed(cluster: &Cluster) -> BTreeSet<Vec<String>> {
    let status = cluster.status();
    let pipelines = status["plan"]["pipelines"].as_array().unwrap();
    let active = pipelines.iter().filter(|pipeline| pipeline["state"] == "active");
    let workers = |pipeline: &Value| {
        let stages = pipeline["stages"].as_array().unwrap();
        stages.iter().map(|stage| stage["worker"].as_str().unwrap().to_owned()).collect()
    };
    active.map(workers).collect()
}

fn wait_until_placed(
    cluster: &Cluster,
    what: &str,
    wanted: impl Fn(&BTreeSet<Vec<String>>) -> bool,
) {
    wait_for(what, SETTLE, || wanted(&placed(cluster)).then_some(()));
}

/// How many workers serve in any pipeline.
fn workers_placed(placed: &BTreeSet<Vec<String>>) -> usize {
    placed.iter().map(Vec::len).sum()
}

/// The newest epoch of all pipelines: a revision of the registry, so it counts changes of the plan from
/// above.
fn newest_epoch(cluster: &Cluster) -> u64 {
    let status = cluster.status();
    let pipelines = status["plan"]["pipelines"].as_array().unwrap();
    pipelines.iter().filter_map(|pipeline| pipeline["epoch"].as_u64()).max().unwrap()
}

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
    let mut late = Vec::new();
    let found = streaming(&mut cluster, |cluster| {
        for count in 2..=4 {
            late.push(cluster.start_worker(&format!("worker-{}", count - 1)));
            wait_until_placed(cluster, "the late worker to serve", |placed| {
                workers_placed(placed) == count
            });
        }
    });
    assert_unharmed("three workers join one by one", &found);

    // Each dies without a word, and comes back.
    let expected = undisturbed(&cluster);
    for (index, worker) in late.iter_mut().enumerate() {
        let id = format!("worker-{}", index + 1);
        worker.kill();
        wait_until_placed(&cluster, "the others to serve without it", |placed| {
            !placed.iter().flatten().any(|other| *other == id) && workers_placed(placed) == 3
        });
        *worker = cluster.start_worker(&id);
        wait_until_placed(&cluster, "it to serve again", |placed| workers_placed(placed) == 4);
        assert_eq!(stream(&cluster, index).unwrap().text, expected[index]);
    }
    let epoch = newest_epoch(&cluster);
    // At rest: what is well is left alone.
    assert_eq!(undisturbed(&cluster), expected);
    assert_eq!(newest_epoch(&cluster), epoch);
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

fn restart_all(
    cluster: &mut Cluster,
    workers: usize,
    what: &str,
    whole: impl Fn(&BTreeSet<Vec<String>>) -> bool,
) {
    let found = streaming(cluster, |cluster| {
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
