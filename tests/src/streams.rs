//! Many answers at once from one cluster, while something is done to it: none may fail, and none may be
//! another than it would have been.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::http::{self, Streamed};
use crate::process::wait_for;
use crate::slow::Ending;

/// Within which a planned change must be over: the hold-down of these clusters, a planning interval,
/// what a worker takes to start, and a margin for a busy machine.
pub const SETTLE: Duration = Duration::from_secs(60);

/// Clusters here improve what serves soon after the last change.
pub const QUICK: &[(&str, &str)] = &[("TERCET_COORDINATOR__HOLD_DOWN", "1s")];

/// Streams at once.
pub const STREAMS: usize = 16;

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
///
/// # Panics
///
/// If one fails.
pub fn undisturbed(cluster: &Cluster) -> Vec<String> {
    let answer = |index| stream(cluster, index).unwrap_or_else(|error| panic!("{index}: {error}"));
    (0..STREAMS).map(|index| answer(index).text).collect()
}

/// The answer of stream `index`.
///
/// # Errors
///
/// What it ended with in place of `[DONE]`.
pub fn stream(cluster: &Cluster, index: usize) -> Result<Streamed, String> {
    http::stream(cluster.http(), "/v1/completions", &request(index))
}

/// What streams found while something was done to the cluster.
#[derive(Debug, Default)]
pub struct Found {
    /// Answers as they should be.
    pub whole: usize,
    /// What was wrong with the others.
    pub wrong: Vec<String>,
    /// The longest that anybody waited for the next token.
    pub longest_gap: Duration,
}

/// Streams answer after answer, [`STREAMS`] at once, until `disturb` has ended; each is to be as in
/// `expected`.
///
/// # Panics
///
/// If `disturb` does.
pub fn streaming(
    cluster: &mut Cluster,
    expected: &[String],
    disturb: impl FnOnce(&mut Cluster),
) -> Found {
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
        // A test that fails here ends, too.
        let ending = Ending::new(&over);
        disturb(cluster);
        drop(ending);
        let mut all = Found::default();
        for stream in streams {
            let found = stream.join().expect("a stream does not panic");
            all.whole += found.whole;
            all.wrong.extend(found.wrong);
            all.longest_gap = all.longest_gap.max(found.longest_gap);
        }
        all
    })
}

/// Checks that nothing failed and nothing was altered, and says how long the longest stall was.
///
/// # Panics
///
/// If something did.
#[expect(clippy::print_stdout, reason = "how long streams stalled is a result")]
pub fn assert_unharmed(what: &str, found: &Found) {
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
///
/// # Panics
///
/// If the status cannot be had.
pub fn placed(cluster: &Cluster) -> BTreeSet<Vec<String>> {
    let status = cluster.status();
    let pipelines = status["plan"]["pipelines"].as_array().expect("pipelines");
    let active = pipelines.iter().filter(|pipeline| pipeline["state"] == "active");
    let workers = |pipeline: &Value| {
        let stages = pipeline["stages"].as_array().expect("stages");
        let worker = |stage: &Value| stage["worker"].as_str().expect("a worker").to_owned();
        stages.iter().map(worker).collect()
    };
    active.map(workers).collect()
}

/// Waits until what serves is as it is `wanted`.
///
/// # Panics
///
/// If that takes longer than [`SETTLE`].
pub fn wait_until_placed(
    cluster: &Cluster,
    what: &str,
    wanted: impl Fn(&BTreeSet<Vec<String>>) -> bool,
) {
    wait_for(what, SETTLE, || wanted(&placed(cluster)).then_some(()));
}

/// How many workers serve in any pipeline.
pub fn workers_placed(placed: &BTreeSet<Vec<String>>) -> usize {
    placed.iter().map(Vec::len).sum()
}
