//! A worker that gets a tenth of its time is out of every pipeline within a minute, with the settings that
//! people have. Not part of `cargo test`: `./test --soak` runs it; tests/tests/operating.rs has it with
//! shorter times.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

use std::time::{Duration, Instant};

use tests::cluster::Cluster;
use tests::model::bundled_store;
use tests::process::wait_for;
use tests::slow::to_a_tenth;
use tests::streams::{assert_unharmed, placed, streaming, undisturbed};

/// What is promised.
const WITHIN: Duration = Duration::from_secs(60);

#[test]
fn a_worker_slowed_to_a_tenth_is_out_of_the_pipeline_within_a_minute() {
    let flags = "--stages 3 --pipelines 1";
    let mut cluster = Cluster::start_flags(bundled_store(), 4, flags, &[]);
    let expected = undisturbed(&cluster);
    let found = streaming(&mut cluster, &expected, |cluster| {
        let slow = placed(cluster).into_iter().next().unwrap()[1].clone();
        let index: usize = slow.strip_prefix("worker-").unwrap().parse().unwrap();
        let began = Instant::now();
        to_a_tenth(cluster.worker(index).id(), || {
            wait_for("the slow worker to be out", WITHIN, || {
                let placed = placed(cluster);
                let whole = placed.iter().any(|pipeline| pipeline.len() == 3);
                (whole && !placed.iter().flatten().any(|one| *one == slow)).then_some(())
            });
        });
        println!("{slow} was out after {:?}", began.elapsed());
    });
    assert_unharmed("a worker slowed to a tenth", &found);
}
