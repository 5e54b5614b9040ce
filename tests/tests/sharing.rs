//! Callers and classes on a real cluster: whoever sends a lot keeps nobody else waiting, batch makes room,
//! and no token of anybody changes.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::cluster::Cluster;
use tests::http;
use tests::model::bundled_store;
use tests::process::wait_for;
use tests::scrape::Scrape;

/// Far longer than anything here takes.
const SETTLE: Duration = Duration::from_secs(60);

/// Requests of the caller who sends most.
const MANY: u32 = 24;

/// As many run at once.
const PLACES: &str = "4";

fn request(number: u32, user: &str, tokens: u32, more: &Value) -> Value {
    let prompt: Vec<_> = (0..40).map(|index| 8 + (number * 97 + index * index) % 4000).collect();
    let mut request = json!({
        "prompt": prompt, "max_tokens": tokens, "seed": number, "temperature": 0.9,
        "ignore_eos": true, "user": user,
    });
    for (name, value) in more.as_object().unwrap() {
        request[name] = value.clone();
    }
    request
}

/// What a header says, if it is there.
fn header<'a>(answer: &'a http::Answer, name: &str) -> Option<&'a str> {
    let mut lines = answer.headers.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

/// The text of an answer, and how long it took.
fn ask(address: &str, request: &Value) -> (String, Duration) {
    let begin = Instant::now();
    let mut request = request.clone();
    request["stream"] = json!(true);
    let answer = http::stream(address, "/v1/completions", &request).unwrap();
    (answer.text, begin.elapsed())
}

#[test]
fn who_sends_a_lot_keeps_nobody_waiting_and_batch_makes_room() {
    let limits = [
        ("TERCET_COORDINATOR__LIMITS__RUNNING_REQUESTS", PLACES),
        ("TERCET_COORDINATOR__LIMITS__WAITING_REQUESTS", "64"),
    ];
    let cluster = Cluster::start_with(bundled_store(), 1, 1, &limits);
    let address = cluster.http();
    for (class, more) in [
        ("interactive", json!({})),
        ("flex", json!({ "service_tier": "flex" })),
        ("later", json!({ "priority": 5 })),
    ] {
        let small = request(1000, "little", 24, &json!({}));
        let (alone, _) = ask(address, &small);
        let many = |number: u32| request(number, "much", 100, &more);
        let (first, _) = ask(address, &many(0));
        let preempted = Scrape::of(address).value("tercet_preemptions_total");
        thread::scope(|scope| {
            let running: Vec<_> =
                (0..MANY).map(|n| scope.spawn(move || ask(address, &many(n % 8)).0)).collect();
            let places: f64 = PLACES.parse().unwrap();
            wait_for("all places to be taken, and others to wait", SETTLE, || {
                let told = Scrape::of(address);
                let (runs, waits) =
                    (told.value("tercet_requests_running"), told.value("tercet_requests_waiting"));
                (runs >= places && waits > places).then_some(())
            });
            for _ in 0..3 {
                let (beside, took) = ask(address, &small);
                assert_eq!(beside, alone, "{class}");
                let left = running.iter().filter(|thread| !thread.is_finished()).count();
                assert!(left > 0, "{class}: it waited for all of them, {took:?}");
            }
            let left = running.iter().filter(|thread| !thread.is_finished()).count();
            assert!(
                left as u32 > MANY / 2,
                "{class}: it waited for {} others",
                MANY as usize - left
            );
            let answers: Vec<_> =
                running.into_iter().map(|thread| thread.join().unwrap()).collect();
            for (index, text) in answers.iter().enumerate() {
                assert_eq!(*text, answers[index % 8], "{class}: {index}");
            }
            assert_eq!(answers[0], first, "{class}: what made room goes on with the same tokens");
        });
        let since = Scrape::of(address).value("tercet_preemptions_total") - preempted;
        assert!(since >= 1.0, "{class}: nobody made room");
    }
}

#[test]
fn a_full_queue_says_when_to_come_again_and_gives_way_to_who_has_less() {
    let limits = [
        ("TERCET_COORDINATOR__LIMITS__RUNNING_REQUESTS", "1"),
        ("TERCET_COORDINATOR__LIMITS__WAITING_REQUESTS", "2"),
    ];
    let cluster = Cluster::start_with(bundled_store(), 1, 1, &limits);
    let address = cluster.http();
    let long = |number: u32, user: &str| {
        let more = json!({ "stream": true });
        http::stream(address, "/v1/completions", &request(number, user, 400, &more))
    };
    thread::scope(|scope| {
        let running: Vec<_> = (0..3).map(|n| scope.spawn(move || long(n, "much"))).collect();
        wait_for("the queue to be full", SETTLE, || {
            (Scrape::of(address).value("tercet_requests_waiting") >= 2.0).then_some(())
        });
        let refused = request(9, "much", 400, &json!({}));
        let refused = http::post(address, "/v1/completions", &refused).unwrap();
        assert_eq!(refused.status, 429, "{}", refused.body);
        let after: u64 = header(&refused, "retry-after").unwrap().parse().unwrap();
        assert!((1..=60).contains(&after), "{after}");
        assert_eq!(header(&refused, "x-should-retry"), None);
        let mut wrong = request(9, "much", 400, &json!({}));
        wrong["top_p"] = json!(7);
        let wrong = http::post(address, "/v1/completions", &wrong).unwrap();
        assert_eq!((wrong.status, header(&wrong, "x-should-retry")), (400, Some("false")));
        // One of another caller takes the place of the last that waits, whose client hears 429.
        let other = scope.spawn(move || ask(address, &request(5, "little", 8, &json!({}))).0);
        let outcomes: Vec<_> = running.into_iter().map(|thread| thread.join().unwrap()).collect();
        let refused = outcomes.iter().filter(|outcome| outcome.is_err()).count();
        assert_eq!(refused, 1, "{outcomes:?}");
        assert!(!other.join().unwrap().is_empty());
    });
}
