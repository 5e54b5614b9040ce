//! What is measured is there and makes sense; how fast a test runs says nothing.

use super::*;

fn tiny() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    model::synth(&"2x64x128x2x1x96".parse().unwrap(), 3, &path, &mut |_| {}).unwrap();
    let store = Store::open(&path).unwrap();
    (dir, store)
}

fn options() -> Options {
    Options {
        threads: 2,
        prompt: 40,
        chunk: 16,
        context: 5,
        generate: 3,
        batches: vec![1, 3],
        repeats: 2,
        read_bytes: 1 << 20,
        ..Options::default()
    }
}

#[test]
fn an_engine_is_measured() {
    let (_dir, store) = tiny();
    let mut parts = Vec::new();
    let measured = measure(&store, &options(), &mut |what, done, total| {
        parts.push(what.to_owned());
        assert_eq!((done + 1, total), (parts.len() as u64, 12));
    })
    .unwrap();
    assert_eq!(
        parts[..6],
        ["limits", "first steps", "prefill", "decode", "batch of 1", "batch of 3"]
    );
    let json = serde_json::to_value(&measured).unwrap();
    for key in ["prefill_tokens_per_s", "decode_tokens_per_s"] {
        assert!(json[key].as_f64().unwrap() > 0.0, "{key}");
    }
    for key in [
        "read_gb_per_s",
        "mac_g_per_s",
        "fma_g_per_s",
        "dense_decode_tokens_per_s",
        "prefill_tokens_per_s",
        "batched_tokens_per_s",
    ] {
        assert!(json["limits"][key].as_f64().unwrap() > 0.0, "{key}");
    }
    let batched = json["batched"].as_array().unwrap();
    assert_eq!((&batched[0]["batch"], &batched[1]["batch"]), (&1.into(), &3.into()));
    assert!(batched.iter().all(|batch| batch["tokens_per_s"].as_f64().unwrap() > 0.0));
    for key in ["gate", "down"] {
        let share = json["zeros"][key].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&share), "{key} {share}");
    }
    for parts in [&json["parts"]["prefill"], &json["parts"]["decode"], &batched[1]["parts"]] {
        let shares = parts.as_object().unwrap().values().map(|share| share.as_f64().unwrap());
        assert!((shares.sum::<f64>() - 1.0).abs() < 1e-9, "{parts}");
    }
    assert_eq!(json["parts"]["prefill"]["head"], 0.0, "prefill goes through no head");
    assert!(json["bytes_per_token"]["weights"].as_f64().unwrap() > 1000.0);
    // Two layers of one key and one value of 32 f16 each; 5 tokens, and the middle of 3 more.
    assert_eq!(json["bytes_per_token"]["kv"], f64::from(2 * 2 * 32 * 2 * (5 + 2)));
    assert!(json["peak_rss_bytes"].as_u64().unwrap() > 1 << 20);
    assert!(json["huge_page_bytes"].as_u64().unwrap() <= json["peak_rss_bytes"].as_u64().unwrap());
    assert_eq!(json["weight_bytes"].as_u64().unwrap(), measured.weight_bytes);
}

#[test]
fn what_cannot_be_measured_is_refused_in_a_sentence() {
    let (_dir, store) = tiny();
    let refused = |options: &Options| measure(&store, options, &mut |_, _, _| {}).unwrap_err();
    let error = refused(&Options { generate: 0, ..options() });
    assert_eq!(error.to_string(), "the number of tokens to generate must be at least 1");
    let error = refused(&Options { context: 4094, ..options() });
    let want = "decoding needs 4097 tokens, more than the model's context of 4096";
    assert_eq!(error.to_string(), want);
    assert!(matches!(refused(&Options { prompt: 5000, ..options() }), BenchError::Context { .. }));
    assert!(matches!(
        refused(&Options { batches: vec![1, 0], ..options() }),
        BenchError::Zero { .. }
    ));
}
