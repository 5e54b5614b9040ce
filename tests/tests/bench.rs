//! `tercet bench` as scripts use it: the keys are there and make sense, and what makes no sense is
//! refused. How fast a test runs says nothing, so no rate is looked at.

use serde_json::Value;
use tests::cluster::{Cluster, json_of};
use tests::model::bundled_store;
use tests::process::run;

fn rate(value: &Value, key: &str) -> f64 {
    let rate = value[key].as_f64().unwrap_or_else(|| panic!("{key} in {value}"));
    assert!(rate.is_finite() && rate > 0.0, "{key} is {rate}");
    rate
}

#[test]
fn an_engine_is_measured_beside_its_limits() {
    let output = run(&[
        "bench",
        "engine",
        "--threads",
        "2",
        "--prompt",
        "40",
        "--generate",
        "3",
        "--batch",
        "1,2",
        "--repeat",
        "1",
        "--json",
    ]);
    let measured = json_of(&output);
    rate(&measured, "prefill_tokens_per_s");
    rate(&measured, "decode_tokens_per_s");
    let batches = measured["batched"].as_array().unwrap();
    assert_eq!(batches.len(), 2);
    for (batch, expected) in batches.iter().zip([1, 2]) {
        assert_eq!(batch["batch"], expected);
        rate(batch, "tokens_per_s");
    }
    for key in [
        "read_gb_per_s",
        "mac_g_per_s",
        "dense_decode_tokens_per_s",
        "prefill_tokens_per_s",
        "batched_tokens_per_s",
    ] {
        rate(&measured["limits"], key);
    }
    let peak = rate(&measured, "peak_rss_bytes");
    let weights = rate(&measured, "weight_bytes");
    assert!(peak > weights, "every weight was read");
    for key in ["gate", "down"] {
        let share = measured["zeros"][key].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&share), "{key} is {share}");
    }
}

#[test]
fn a_cluster_is_measured_from_outside() {
    let cluster = Cluster::start(bundled_store(), 2, 2);
    let output = run(&[
        "bench",
        "pipeline",
        "--endpoint",
        cluster.grpc(),
        "--prompt",
        "20",
        "--generate",
        "4",
        "--batch",
        "1,3",
        "--repeat",
        "1",
        "--json",
    ]);
    let measured = json_of(&output);
    rate(&measured, "prefill_tokens_per_s");
    rate(&measured, "decode_tokens_per_s");
    for batch in measured["batched"].as_array().unwrap() {
        rate(batch, "tokens_per_s");
    }
    assert_eq!(measured["stage_threads"][0].as_array().unwrap().len(), 2, "two stages");
}

#[test]
fn what_cannot_be_measured_is_refused_in_one_sentence() {
    for arguments in [
        &["bench", "engine", "--prompt", "100000", "--json"][..],
        &["bench", "engine", "--context", "100000"],
        &["bench", "engine", "--model", "synth:many"],
        &["bench", "engine", "--generate", "0"],
        &["bench", "kernel", "--shape", "sideways"],
    ] {
        let output = run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
        assert!(stderr.starts_with("error: "), "{arguments:?}: {stderr}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}
