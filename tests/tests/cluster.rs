//! One coordinator, real workers, real etcd: what holds while all is well and when a worker dies.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

use std::process::Output;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tests::cluster::{Cluster, json_of, listening};
use tests::etcd::Etcd;
use tests::http;
use tests::model::{bundled_store, comma_separated, golden, ids};
use tests::process::{self, Process, wait_for};
use tests::scrape::Scrape;

/// In how many stages every cluster here runs.
const STAGES: usize = 3;

/// How long the cluster may take to settle after a change: a lease, and a margin.
const SETTLE: Duration = Duration::from_secs(30);

/// The status hears of the last end a moment after the client does.
fn until_kv_is_free(cluster: &Cluster) {
    wait_for("KV to be free", SETTLE, || {
        (cluster.status()["queue"]["kv_blocks_used"] == 0).then_some(())
    });
}

fn local(more: &[&str]) -> Value {
    let store = bundled_store();
    let mut arguments = vec!["generate", "--model", store.to_str().unwrap(), "--json"];
    arguments.extend(more);
    json_of(&process::run(&arguments))
}

#[test]
fn a_cluster_gives_the_tokens_of_one_process_and_sixteen_at_once_too() {
    let cluster = Cluster::start(bundled_store(), STAGES, STAGES);
    let status = cluster.status();
    let stages = status["plan"]["pipelines"][0]["stages"].as_array().unwrap().len();
    assert_eq!(stages, STAGES);

    // Different prompts, lengths, samplings and seeds, so that a mix-up cannot go unseen.
    let prompts = ["Once upon a time,", "Tom had a red ball.", "The dog", "One day, Lily"];
    let requests: Vec<Vec<String>> = (0..16)
        .map(|index| {
            let temperature = if index % 3 == 0 { "0" } else { "0.9" };
            let max_tokens = (12 + 3 * index).to_string();
            let seed = index.to_string();
            let prompt = prompts[index % prompts.len()];
            ["--max-tokens", &max_tokens, "--temperature", temperature, "--seed", &seed, prompt]
                .map(str::to_owned)
                .to_vec()
        })
        .collect();
    let answers: Vec<Value> = thread::scope(|scope| {
        let running: Vec<_> = requests
            .iter()
            .map(|request| {
                let cluster = &cluster;
                scope.spawn(move || {
                    let request: Vec<&str> = request.iter().map(String::as_str).collect();
                    json_of(&cluster.generate(&request))
                })
            })
            .collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (request, answer) in requests.iter().zip(&answers) {
        let request: Vec<&str> = request.iter().map(String::as_str).collect();
        let alone = local(&request);
        for field in ["tokens", "text", "finish_reason", "usage"] {
            assert_eq!(answer[field], alone[field], "{field} of {request:?}");
        }
    }
    until_kv_is_free(&cluster);
}

/// Nobody knows how long they get, so none of them may keep KV for a whole context, of which there are
/// four: they run together, and those that have to make room for others go on with the same tokens.
#[test]
fn chats_of_open_length_share_the_kv_of_four_contexts() {
    const CHATS: usize = 32;
    const KINDS: usize = 8;
    let blocks = (4 * 512 / proto::BLOCK_TOKENS).to_string();
    let limits = [("TERCET_COORDINATOR__LIMITS__KV_BLOCKS", blocks.as_str())];
    let cluster = Cluster::start_with(bundled_store(), 1, 1, &limits);
    let address = cluster.http();
    let chat = |kind: usize| {
        let message = json!({ "role": "user", "content": format!("Tom had {} red", kind + 2) });
        let request = json!({ "messages": [message], "seed": kind, "stream": true });
        http::stream(address, "/v1/chat/completions", &request).unwrap().text
    };
    let alone: Vec<_> = (0..KINDS).map(chat).collect();
    assert_eq!(Scrape::of(address).value("tercet_preemptions_total"), 0.0);
    let together: Vec<_> = thread::scope(|scope| {
        let running: Vec<_> = (0..CHATS).map(|n| scope.spawn(move || chat(n % KINDS))).collect();
        let mut most = 0.0_f64;
        while !running.iter().all(thread::ScopedJoinHandle::is_finished) {
            most = most.max(Scrape::of(address).value("tercet_requests_running"));
        }
        assert!(most > 4.0, "no more of them than whole contexts ran at once: {most}");
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (index, text) in together.iter().enumerate() {
        assert_eq!(*text, alone[index % KINDS], "chat {index}");
    }
    assert!(Scrape::of(address).value("tercet_preemptions_total") > 0.0, "KV did not run out");
    until_kv_is_free(&cluster);
}

/// What they have in common is computed once, and tokens and log probabilities are those of a cluster
/// that computes everything.
#[test]
fn prompts_that_begin_alike_share_their_kv_to_the_bit() {
    const MANY: u32 = 12;
    const COMMON: u32 = 8 * proto::BLOCK_TOKENS;
    let run = |flags: &str| {
        let flags = format!("--stages {STAGES} {flags}");
        let cluster = Cluster::start_flags(bundled_store(), STAGES, &flags, &[]);
        let ask = |number: u32| {
            let common = (0..COMMON).map(|index| 8 + index * index % 4000);
            let prompt: Vec<_> = common.chain([100 + number, 200]).collect();
            let request = json!({
                "prompt": prompt, "max_tokens": 12, "logprobs": 3, "seed": number,
                "temperature": 0.9, "ignore_eos": true,
            });
            let answer = http::post(cluster.http(), "/v1/completions", &request).unwrap();
            assert_eq!(answer.status, 200, "{}", answer.body);
            answer.json()["choices"].clone()
        };
        let answers: Vec<_> = thread::scope(|scope| {
            let running: Vec<_> = (0..MANY).map(|n| scope.spawn(move || ask(n))).collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        // What is counted is told at the next tick.
        let all = f64::from(MANY * (COMMON + 2));
        let told = wait_for("all prompts to be counted", SETTLE, || {
            let told = Scrape::of(cluster.http());
            let hits = told.value("tercet_prefix_cache_hits_total");
            let computed = told.value("tercet_prompt_tokens_total");
            (hits + computed >= all).then_some((hits, computed))
        });
        (answers, told.0)
    };
    let (with, hits) = run("");
    let (without, none) = run("--no-prefix-cache");
    // A row that is sent again, or a plan made meanwhile, may cost a hit.
    assert!(hits >= f64::from((MANY - 2) * COMMON), "{hits}");
    assert_eq!(none, 0.0);
    for (number, (with, without)) in with.iter().zip(&without).enumerate() {
        assert_eq!(with, without, "prompt {number}");
    }
}

#[test]
fn token_ids_go_through_the_pipeline_as_they_are() {
    let cluster = Cluster::start(bundled_store(), STAGES, STAGES);
    let golden = golden();
    let prompt = comma_separated(&ids(&golden["greedy"][0]["prompt_ids"]));
    let request =
        ["--tokens", &prompt, "--max-tokens", "20", "--temperature", "0", "--top-logprobs", "3"];
    let answer = json_of(&cluster.generate(&request));
    assert_eq!(answer["tokens"], local(&request)["tokens"]);
    assert_eq!(answer["logprobs"], local(&request)["logprobs"], "bit for bit");
    assert_eq!(answer["top_logprobs"].as_array().unwrap().len(), 20);
}

#[test]
fn a_late_worker_stands_by_and_an_idle_one_leaves_cleanly() {
    let mut cluster = Cluster::start(bundled_store(), STAGES, STAGES);
    let epoch = cluster.status()["plan"]["pipelines"][0]["epoch"].clone();
    let mut late = cluster.start_worker("late");
    wait_for("the late worker to stand by", SETTLE, || {
        (cluster.state_of("late")? == "standby").then_some(())
    });
    assert_eq!(cluster.status()["plan"]["pipelines"][0]["epoch"], epoch, "nothing was moved");

    late.signal(Signal::SIGTERM);
    assert!(late.wait(SETTLE).success(), "{}", late.log());
    wait_for("the registry to forget it", SETTLE, || {
        cluster.state_of("late").is_none().then_some(())
    });
    assert_eq!(
        json_of(&cluster.generate(&["--max-tokens", "4", "Tom"]))["usage"]["completion_tokens"],
        4
    );

    // Everyone else leaves cleanly, too.
    cluster.coordinator().signal(Signal::SIGTERM);
    assert!(cluster.coordinator().wait(SETTLE).success(), "{}", cluster.coordinator().log());
    for index in 0..STAGES {
        cluster.worker(index).signal(Signal::SIGTERM);
        let status = cluster.worker(index).wait(SETTLE);
        assert!(status.success(), "{}", cluster.worker(index).log());
    }
}

/// A request long enough to be running when something happens to it.
fn long_request(cluster: &Cluster, seed: u32) -> Output {
    let seed = seed.to_string();
    cluster.generate(&["--max-tokens", "480", "--ignore-eos", "--seed", &seed, "Once upon a time,"])
}

#[test]
fn a_killed_worker_costs_no_request_and_no_token() {
    for stage in 0..STAGES {
        let mut cluster = Cluster::start(bundled_store(), STAGES, STAGES);
        let all_at_once = |cluster: &Cluster, meanwhile: &dyn Fn()| -> Vec<Output> {
            thread::scope(|scope| {
                let running: Vec<_> =
                    (0..4).map(|seed| scope.spawn(move || long_request(cluster, seed))).collect();
                meanwhile();
                running.into_iter().map(|thread| thread.join().unwrap()).collect()
            })
        };
        let want = all_at_once(&cluster, &|| {});
        let stage_worker =
            cluster.status()["plan"]["pipelines"][0]["stages"][stage]["worker"].clone();
        let stage_worker = stage_worker.as_str().unwrap().to_owned();
        let index: usize = stage_worker.strip_prefix("worker-").unwrap().parse().unwrap();

        let pid = nix::unistd::Pid::from_raw(cluster.worker(index).id().try_into().unwrap());
        let replacement = Mutex::new(None);
        let found = all_at_once(&cluster, &|| {
            wait_for("all requests to run", SETTLE, || {
                (cluster.status()["queue"]["running"] == 4).then_some(())
            });
            nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
            *replacement.lock().unwrap() = Some(cluster.start_worker(&stage_worker));
        });
        for (want, found) in want.iter().zip(&found) {
            let stderr = String::from_utf8_lossy(&found.stderr);
            assert!(found.status.success(), "stage {stage}: {stderr}");
            assert_eq!(json_of(found)["tokens"], json_of(want)["tokens"], "stage {stage}");
        }
        cluster.worker(index).kill();
        until_kv_is_free(&cluster);
    }
}

#[test]
fn a_client_that_goes_away_frees_its_kv() {
    let cluster = Cluster::start(bundled_store(), STAGES, STAGES);
    let grpc = cluster.grpc().to_owned();
    let mut client = process::Process::start(
        "client",
        &["generate", "--endpoint", &grpc, "--max-tokens", "490", "--ignore-eos", "Once"],
    );
    wait_for("the request to hold KV", SETTLE, || {
        (cluster.status()["queue"]["running"].as_u64()? > 0).then_some(())
    });
    client.kill();
    until_kv_is_free(&cluster);
}

#[test]
fn a_cluster_serves_on_while_etcd_is_down_and_ends_in_order() {
    let grace = [("TERCET_COORDINATOR__SHUTDOWN_GRACE", "1s")];
    let mut cluster = Cluster::start_with(bundled_store(), STAGES, STAGES, &grace);
    let request = ["--max-tokens", "8", "--temperature", "0", "Tom"];
    let before = json_of(&cluster.generate(&request));
    cluster.etcd().kill();
    // Longer than a lease: what is placed keeps serving.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(8) {
        assert_eq!(json_of(&cluster.generate(&request))["tokens"], before["tokens"]);
    }
    cluster.etcd().restart();
    let late = cluster.start_worker("late");
    wait_for("changes to be seen again", SETTLE, || {
        (cluster.state_of("late")? == "standby").then_some(())
    });
    assert_eq!(json_of(&cluster.generate(&request))["tokens"], before["tokens"]);
    drop(late);

    // An answer uses the whole grace, and then etcd does not answer.
    cluster.etcd().kill();
    let pid = nix::unistd::Pid::from_raw(cluster.coordinator().id().try_into().unwrap());
    let answer = thread::scope(|scope| {
        let cluster = &cluster;
        let answer = scope.spawn(move || long_request(cluster, 1));
        wait_for("the request to run", SETTLE, || {
            (cluster.status()["queue"]["running"] == 1).then_some(())
        });
        nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
        answer.join().unwrap()
    });
    let said = String::from_utf8_lossy(&answer.stderr);
    assert!(!answer.status.success() && said.contains("stopping"), "{said}");
    let coordinator = cluster.coordinator();
    assert!(coordinator.wait(SETTLE).success(), "{}", coordinator.log());
}

#[test]
fn a_standby_says_that_it_does_not_lead_and_who_does() {
    let folder = tempfile::TempDir::new().unwrap();
    let store = folder.path().join("store");
    let store = store.to_str().unwrap();
    assert!(process::run(&["model", "synth", "--shape", "tiny", store]).status.success());
    let etcd = Etcd::start();
    let start = |name: &str| {
        let any = "127.0.0.1:0";
        let whose = ["coordinator", "--etcd", etcd.url(), "--cluster", "pair", "--model", store];
        let mut process =
            Process::start(name, &[&whose, &["--grpc", any, "--http", any][..]].concat());
        let (grpc, http) = listening(&mut process);
        (process, grpc, http)
    };
    let ready = |http: &str| tests::http::get(http, "/ready").unwrap();
    let (first, first_grpc, first_http) = start("first");
    // It leads when it no longer waits for that, but for workers.
    wait_for("a leader", SETTLE, || ready(&first_http).body.contains("worker").then_some(()));

    let (mut second, grpc, http) = start("second");
    let sentence = format!("this coordinator does not lead; the one at {first_grpc} does");
    wait_for("the leader's address", SETTLE, || {
        let answer = ready(&http);
        assert_eq!(answer.status, 503, "{}", answer.body);
        answer.body.contains(&sentence).then_some(())
    });
    // Refused at once: nothing that this process waits for would bring an answer.
    let body = serde_json::json!({"prompt": [9], "max_tokens": 1});
    let answer = tests::http::post(&http, "/v1/completions", &body).unwrap();
    assert_eq!(answer.status, 503, "{}", answer.body);
    assert!(answer.body.contains(&sentence), "{}", answer.body);
    let output = process::run(&["generate", "--endpoint", &grpc, "--tokens", "9"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains(&sentence), "{stderr}");

    // When that one goes, this one leads, and says so no more.
    first.signal(Signal::SIGTERM);
    wait_for("the next leader", SETTLE, || ready(&http).body.contains("worker").then_some(()));
    assert!(!ready(&http).body.contains("lead"), "{}", ready(&http).body);
    second.signal(Signal::SIGTERM);
    assert!(second.wait(SETTLE).success(), "{}", second.log());
}
