//! Flags reach the settings, and names are made.

use clap::Parser;

use super::*;

#[derive(Debug, clap::Parser)]
pub(super) enum Line {
    Coordinator(CoordinatorCommand),
    Worker(WorkerCommand),
}

fn settings(line: &str) -> Settings {
    let flags = match Line::try_parse_from(["test"].into_iter().chain(line.split_whitespace())) {
        Ok(Line::Coordinator(command)) => command.flags(),
        Ok(Line::Worker(command)) => command.flags(),
        Err(error) => panic!("{error}"),
    };
    let tree = node::config::Sources { flags: flags.0, ..Default::default() };
    node::config::load(&tree).unwrap()
}

#[test]
fn every_flag_of_a_coordinator_reaches_its_setting() {
    let found = settings(
        "coordinator --etcd http://a:1,http://b:2 --cluster c --model s --grpc 127.0.0.1:1 \
         --http 127.0.0.1:2 --stages 2 --kv-type f32 --advertise h:1 --insecure --hold-down 3m \
         --min-gain-percent 7 --token-time 150ms --context 512 --objective throughput",
    );
    assert_eq!(found.etcd.endpoints.urls(), ["http://a:1", "http://b:2"]);
    assert_eq!(found.cluster.as_str(), "c");
    let want = coordinator::Config {
        model: "s".into(),
        grpc: "127.0.0.1:1".parse().unwrap(),
        http: "127.0.0.1:2".parse().unwrap(),
        stages: Some(2),
        kv_type: KvType::F32,
        advertise: Some("h:1".parse().unwrap()),
        insecure: true,
        hold_down: node::config::Duration::from_secs(180),
        min_gain_percent: 7,
        objective: coordinator::PlanFor::Throughput,
        token_time: Some(node::config::Duration::from_millis(150)),
        context: Some(512),
        ..coordinator::Config::default()
    };
    assert_eq!(found.coordinator, want);
}

#[test]
fn every_flag_of_a_worker_reaches_its_setting() {
    let found = settings(
        "worker --etcd http://a:1 --cluster c --id w --listen 127.0.0.1:3 --advertise h:3 \
         --rack r7 --threads 2 --store d --memory 2GiB --isa scalar --http 127.0.0.1:4 --insecure \
         --stub-compute layer_us=50,head_us=7",
    );
    assert_eq!(found.cluster.as_str(), "c");
    let want = worker::Config {
        id: Some("w".parse().unwrap()),
        listen: "127.0.0.1:3".parse().unwrap(),
        advertise: Some("h:3".parse().unwrap()),
        rack: Some("r7".parse().unwrap()),
        threads: Some(2),
        store: "d".into(),
        memory_bytes: 2 << 30,
        isa: Some("scalar".into()),
        http: Some("127.0.0.1:4".parse().unwrap()),
        stub_compute: Some(worker::StubProfile { layer_us: 50, row_us: 0, head_us: 7 }),
        insecure: true,
        ..worker::Config::default()
    };
    assert_eq!(found.worker, want);
}

#[test]
fn workers_of_one_host_have_different_names() {
    let (first, second) = (default_id(7071), default_id(7072));
    assert!(first.ends_with("-7071") && first != second, "{first}, {second}");
    assert_ne!(default_id(0), default_id(1));
    let id = Some(default_id(0).parse().unwrap());
    let config = worker::Config { id, ..worker::Config::default() };
    config.validate().unwrap();
}
