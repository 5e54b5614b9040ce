//! Every field that can be wrong, and the file form.

use super::*;

fn good() -> Config {
    Config { id: Some("w1".parse().unwrap()), ..Config::default() }
}

#[test]
fn the_default_with_an_id_is_valid() {
    assert_eq!(good().validate(), Ok(()));
    assert!(good().memory_bytes > 1 << 20);
}

#[test]
fn each_wrong_field_is_named() {
    let check = |change: fn(&mut Config), expected: &str| {
        let mut config = good();
        change(&mut config);
        let error = config.validate().expect_err(expected);
        assert!(error.to_string().contains(expected), "{error}");
    };
    check(|c| c.id = None, "no id");
    check(|c| c.threads = Some(0), "threads");
    check(|c| c.threads = Some(100_000), "threads");
    check(|c| c.memory_bytes = 0, "memory");
    check(
        |c| c.shutdown_grace = Duration::from_secs(86_401),
        "shutdown_grace must be from 0s to 1d, found 86401s",
    );
    check(
        |c| c.drift_time = Duration::from_millis(999),
        "drift_time must be from 1s to 365d, found 999ms",
    );
    check(|c| c.drift_time = Duration::MAX, "drift_time must be from 1s to 365d");
    check(|c| c.isa = Some("avx9".into()), "scalar");
    check(|c| c.listen = "10.0.0.1:1".parse().unwrap(), "stage service");
    check(|c| c.http = Some("10.0.0.1:1".parse().unwrap()), "metrics");
    check(
        |c| {
            c.listen = "0.0.0.0:1".parse().unwrap();
            c.insecure = true;
        },
        "advertised",
    );
}

#[test]
fn more_memory_than_there_is_counts_as_not_given() {
    const GIB: u64 = 1 << 30;
    assert_eq!(within(8 * GIB, Some(10 * GIB)), (8 * GIB, None));
    assert_eq!(within(GIB, Some(GIB)), (GIB, None), "who asks for all of it gets it");
    assert_eq!(within(8 * GIB, None), (8 * GIB, None));
    let (taken, reason) = within(8 * GIB, Some(GIB));
    assert_eq!(taken, GIB / 100 * 80);
    let reason = reason.unwrap();
    assert!(reason.starts_with("memory 8GiB is more than the 1GiB that"), "{reason}");
    // A little too much takes a little less than there is, and no more costs more at once.
    assert_eq!(within(24 * GIB, Some(24 * GIB - GIB / 2)).0, 23 * GIB);
    assert_eq!(within(GIB + 1, Some(GIB)).0, GIB - 1);
    let greedy = Config { memory_bytes: u64::MAX, ..good() };
    assert!(memory::available_bytes().is_none() || greedy.memory_in_force().0 < u64::MAX);
    let stub = Some(StubProfile { layer_us: 1, row_us: 1, head_us: 1 });
    let stub = Config { stub_compute: stub, ..greedy };
    assert_eq!(stub.memory_in_force(), (u64::MAX, None), "it only says so");
}

#[test]
fn other_addresses_need_the_word() {
    let mut config = good();
    config.listen = "10.0.0.1:1".parse().unwrap();
    config.http = Some("10.0.0.1:2".parse().unwrap());
    config.insecure = true;
    assert_eq!(config.validate(), Ok(()));
    config.listen = "0.0.0.0:1".parse().unwrap();
    config.advertise = Some("rack1-host7:7071".parse().unwrap());
    assert_eq!(config.validate(), Ok(()));
}

#[test]
fn sizes_and_times_have_units_in_a_file() {
    let text = r#"{"id": "w1", "memory": "4GiB", "shutdown_grace": "1500ms"}"#;
    let config: Config = serde_json::from_str(text).unwrap();
    assert_eq!(config.memory_bytes, 4 << 30);
    assert_eq!(config.shutdown_grace, Duration::from_millis(1500));
    let again: Config = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
    assert_eq!(again, config);
    assert!(serde_json::from_str::<Config>(r#"{"storre": "x"}"#).is_err());
}
