//! `tercet bench scaling` with real processes: what it prints adds up, and nothing is left of it, whatever
//! ends it. How fast a test runs says nothing, so no rate is looked at.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use tests::cluster::json_of;
use tests::model::bundled_store;
use tests::process::{Process, run, run_with, wait_for};

/// How long a start or an end may take on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// Where this machine makes groups of CPU time, of version 1 and 2.
const GROUPS: [&str; 2] = ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup"];

/// Whether a bench can hold workers under quotas here: only root can, and not in every container.
fn quotas_are_kept() -> bool {
    GROUPS.iter().any(|parent| {
        let group = Path::new(parent).join(format!("tercet-test-{}", std::process::id()));
        let is_made = fs::create_dir(&group).is_ok();
        let has_quota = ["cpu.max", "cpu.cfs_quota_us"]
            .iter()
            .any(|file| fs::OpenOptions::new().write(true).open(group.join(file)).is_ok());
        if is_made {
            fs::remove_dir(&group).unwrap();
        }
        is_made && has_quota
    })
}

/// What is left of the bench with process id `bench`: processes, groups and folders.
fn left_of(bench: u32) -> Vec<PathBuf> {
    let name = format!("bench-{bench}-");
    let mut left = Vec::new();
    for process in fs::read_dir("/proc").unwrap() {
        let path = process.unwrap().path();
        let line = fs::read(path.join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains(&name) {
            left.push(path);
        }
    }
    let groups = GROUPS.iter().filter_map(|parent| fs::read_dir(parent).ok()).flatten();
    let groups = groups.map(|group| group.unwrap().path());
    left.extend(groups.filter(|group| group.to_string_lossy().contains(&name)));
    left
}

fn number(value: &Value, key: &str) -> f64 {
    let number = value[key].as_f64().unwrap_or_else(|| panic!("{key} in {value}"));
    assert!(number.is_finite() && number >= 0.0, "{key} is {number}");
    number
}

/// Flags of a bench whose windows are so long.
fn flags<'a>(store: &'a str, window: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let small =
        "--threads 1 --sequences 4 --generate 40 --prompts 2 --prompt 40 --rounds 1 --warm-up 0s";
    let mut flags = vec!["bench", "scaling", "--model", store, "--window", window];
    flags.extend(small.split_whitespace());
    flags.extend(more);
    flags
}

#[test]
fn workers_together_are_compared_with_each_alone() {
    let store = bundled_store();
    let is_held = quotas_are_kept();
    // The second worker is four times as fast, where that can be had.
    let workers: &[&str] =
        if is_held { &["--json", "--quota", "0.2,0.8"] } else { &["--json", "--workers", "2"] };
    let measured = json_of(&run(&flags(store.to_str().unwrap(), "1s", workers)));
    assert_eq!(measured["sequences"], 4);
    let [alone, together] = ["alone", "together"].map(|key| measured[key].as_array().unwrap());
    let numbers: Vec<_> = alone.iter().map(|one| one["workers"].to_string()).collect();
    let forms: Vec<_> = together.iter().map(|one| one["form"].as_str().unwrap()).collect();
    assert_eq!(forms, ["replicas", "pipeline"]);
    let layers =
        |one: &Value| serde_json::from_value::<Vec<Vec<u32>>>(one["layers"].clone()).unwrap();
    assert_eq!(layers(&together[0]), [[6], [6]]);
    let cut = &layers(&together[1])[0];
    assert_eq!((cut.len(), cut.iter().sum()), (2, 6));
    if is_held {
        assert_eq!(measured["quotas"], serde_json::json!([0.2, 0.8]));
        assert_eq!(numbers, ["[1]", "[2]"]);
        assert!(cut.contains(&1), "the slow one has few layers: {cut:?}");
    } else {
        assert_eq!(numbers, ["[1]"], "both workers are of one kind");
    }
    for kind in ["decode", "prefill"] {
        let single: f64 = alone.iter().map(|one| number(&one[kind], "tokens_per_s")).sum();
        let both = if is_held { single } else { 2.0 * single };
        for one in alone {
            assert!(number(&one[kind], "tokens_per_s") > 0.0, "{kind} of {one}");
            assert_eq!(number(&one[kind], "share"), 1.0, "{kind} of {one}");
        }
        for one in together {
            let figures = &one[kind];
            let (rate, sum) =
                (number(figures, "tokens_per_s"), number(figures, "sum_tokens_per_s"));
            assert!(rate > 0.0, "{kind} of {one}");
            assert!((sum - both).abs() < 1e-6 * sum, "{kind} of {one}");
            assert!((number(figures, "share") - rate / sum).abs() < 1e-9, "{kind} of {one}");
            let list =
                |key: &str| serde_json::from_value::<Vec<f64>>(figures[key].clone()).unwrap();
            let (busy, cpus) = (list("busy"), list("worker_cpus"));
            assert_eq!((busy.len(), cpus.len()), (2, 2), "{kind} of {one}");
            let mean = busy.iter().sum::<f64>() / 2.0;
            assert!(mean > 0.0 && (number(figures, "bubble") - (1.0 - mean)).abs() < 1e-9);
            assert!((0.0..=1.0).contains(&number(figures, "network")), "{kind} of {one}");
            // A quota, and one period more at each end of the window.
            assert!(!is_held || cpus[0] < 0.3, "{kind} of {one}");
            assert!(number(figures, "coordinator_cpus") > 0.0, "{kind} of {one}");
        }
    }
}

/// A bench that is told to stop, or killed, ends its processes and removes its groups.
#[test]
fn nothing_is_left_however_it_ends() {
    let store = bundled_store();
    let quotas: &[&str] = if quotas_are_kept() { &["--quota", "0.5"] } else { &["--workers", "1"] };
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let flags = flags(store.to_str().unwrap(), "300s", quotas);
        let mut bench = Process::start("bench", &flags);
        let id = bench.id();
        // etcd, a worker, its coordinator, and a guard for each.
        wait_for("its processes to run", SOON, || (left_of(id).len() >= 5).then_some(()));
        bench.signal(signal);
        let status = bench.wait(SOON);
        assert!(!status.success(), "{signal}: {status}");
        if signal == Signal::SIGINT {
            assert_eq!(
                left_of(id),
                Vec::<PathBuf>::new(),
                "it waits for their end\n{}",
                bench.log()
            );
            assert!(bench.log().contains("error: told to stop"), "{}", bench.log());
        }
        wait_for("all of it to be gone", SOON, || left_of(id).is_empty().then_some(()));
    }
}

#[test]
fn what_cannot_be_started_is_told_in_one_sentence() {
    let store = bundled_store();
    let flags = flags(store.to_str().unwrap(), "1s", &["--workers", "1"]);
    let output = run_with(&flags, |command| {
        command.env("PATH", "");
    });
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let last = stderr.lines().last().unwrap();
    assert!(last.starts_with("error: failed to start a registry (install etcd-server"), "{stderr}");
    assert!(last.contains("failed to start etcd"), "{stderr}");
    for wrong in ["--workers 99", "--quota 0.01", "--quota 0.5,0.5 --workers 3", "--prompt 100000"]
    {
        let mut words = vec!["bench", "scaling"];
        words.extend(wrong.split_whitespace());
        let output = run(&words);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{wrong}: {stderr}");
        assert!(output.stdout.is_empty(), "{wrong}");
    }
}
