//! Every key that takes an address or a name is checked alike, whether it comes by flag, variable
//! or file, for both roles.

use clap::Parser;
use node::Chain;
use node::config::{Sources, listen_address};

use super::tests::Line;
use super::*;

/// A key, the flag that sets it, and what it may and may not be.
struct Key {
    key: &'static str,
    flag: &'static str,
    roles: &'static [&'static str],
    good: &'static [&'static str],
    bad: &'static [&'static str],
}

const BOTH: &[&str] = &["coordinator", "worker"];
const COORDINATOR: &[&str] = &["coordinator"];
const WORKER: &[&str] = &["worker"];

const GOOD_NAMES: &[&str] = &["rack1", "a.b-c_D9"];
const BAD_NAMES: &[&str] = &[
    "",
    " rack1",
    "rack1 ",
    "a/workers",
    "a b",
    "ü",
    "a\tb",
    "a:1",
    "0123456789012345678901234567890123456789012345678901234567890123456789\
     0123456789012345678901234567890123456789012345678901234567890123456789",
];
const GOOD_LISTEN: &[&str] = &["127.0.0.1:0", "[::1]:7420", "10.1.2.3:65535"];
const BAD_LISTEN: &[&str] = &[
    "",
    "8081",
    ":8081",
    "localhost:8081",
    "127.0.0.1",
    "127.0.0.1:99999",
    "127.0.0.1:1/x",
    "::1:80:x",
    "http://127.0.0.1:1",
    "user:hunter2@127.0.0.1:1",
];
const GOOD_ADVERTISE: &[&str] = &["rack1-host7:7071", "10.0.0.1:1", "[fd00::7]:7071"];
const BAD_ADVERTISE: &[&str] = &[
    "",
    "host",
    "host:",
    ":1",
    "host:0",
    "host:99999",
    "http://host:1",
    "host:1/x",
    "a b:1",
    "0.0.0.0:1",
    "user:hunter2@host:1",
];
const GOOD_ETCD: &[&str] =
    &["http://a:2379", "a:2379", "http://a:1, http://b:2", "http://[::1]:2379", "http://a:1/"];
const BAD_ETCD: &[&str] = &[
    "",
    "http://a:1,",
    "http://a:1,,http://b:1",
    "http://a:99999",
    "http://a",
    "http://a:1/path",
    "http://user:hunter2@a:1",
    "user:hunter2@a:1",
    "etcd://a:1",
    "https://a:1",
    "http://a b:1",
    "http://a:x",
];

const KEYS: &[Key] = &[
    Key { key: "cluster", flag: "--cluster", roles: BOTH, good: GOOD_NAMES, bad: BAD_NAMES },
    Key { key: "worker.id", flag: "--id", roles: WORKER, good: GOOD_NAMES, bad: BAD_NAMES },
    Key { key: "worker.rack", flag: "--rack", roles: WORKER, good: GOOD_NAMES, bad: BAD_NAMES },
    Key { key: "etcd.endpoints", flag: "--etcd", roles: BOTH, good: GOOD_ETCD, bad: BAD_ETCD },
    Key {
        key: "coordinator.grpc",
        flag: "--grpc",
        roles: COORDINATOR,
        good: GOOD_LISTEN,
        bad: BAD_LISTEN,
    },
    Key {
        key: "coordinator.http",
        flag: "--http",
        roles: COORDINATOR,
        good: GOOD_LISTEN,
        bad: BAD_LISTEN,
    },
    Key {
        key: "coordinator.admin",
        flag: "--admin",
        roles: COORDINATOR,
        good: GOOD_LISTEN,
        bad: BAD_LISTEN,
    },
    Key {
        key: "worker.listen",
        flag: "--listen",
        roles: WORKER,
        good: GOOD_LISTEN,
        bad: BAD_LISTEN,
    },
    Key { key: "worker.http", flag: "--http", roles: WORKER, good: GOOD_LISTEN, bad: BAD_LISTEN },
    Key {
        key: "coordinator.advertise",
        flag: "--advertise",
        roles: COORDINATOR,
        good: GOOD_ADVERTISE,
        bad: BAD_ADVERTISE,
    },
    Key {
        key: "worker.advertise",
        flag: "--advertise",
        roles: WORKER,
        good: GOOD_ADVERTISE,
        bad: BAD_ADVERTISE,
    },
];

/// The settings with `value` for `key`, by flag, by variable and by file; errors in words.
fn three_ways(key: &Key, role: &str, value: &str) -> [Result<Settings, String>; 3] {
    let line = ["test", role, &format!("{}={value}", key.flag)].map(str::to_owned);
    let flags = match Line::try_parse_from(line) {
        Ok(Line::Coordinator(command)) => command.flags(),
        Ok(Line::Worker(command)) => command.flags(),
        Err(error) => panic!("{} {value:?} never reached the settings: {error}", key.flag),
    };
    let name = format!("TERCET_{}", key.key.replace('.', "__").to_uppercase());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tercet.toml");
    std::fs::write(&path, format!("{} = {}\n", key.key, toml::Value::from(value))).unwrap();
    let load = |sources: &Sources<'_>| {
        node::config::load(sources).map_err(|error| Chain(&error).to_string())
    };
    [
        load(&Sources { flags: flags.0, ..Sources::default() }),
        load(&Sources { environment: vec![(name, value.to_owned())], ..Sources::default() }),
        load(&Sources { file: Some(&path), ..Sources::default() }),
    ]
}

#[test]
fn what_a_key_may_be_does_not_depend_on_the_way_it_comes() {
    for key in KEYS {
        for role in key.roles {
            for value in key.good {
                let [flag, variable, file] = three_ways(key, role, value);
                let flag = flag.unwrap_or_else(|error| panic!("{value:?}: {error}"));
                assert_eq!(variable.as_ref(), Ok(&flag), "{} {value:?}", key.key);
                assert_eq!(file.as_ref(), Ok(&flag), "{} {value:?}", key.key);
            }
            for value in key.bad {
                let places = ["on the command line", "in the variable TERCET_", "tercet.toml: "];
                for (outcome, place) in three_ways(key, role, value).into_iter().zip(places) {
                    let words = outcome.expect_err(&format!("{} {value:?}", key.key));
                    assert!(words.starts_with(&format!("wrong value for {}", key.key)), "{words}");
                    assert!(words.contains(place), "{words}");
                    assert!(!words.contains("hunter2"), "a password is shown: {words}");
                    assert!(!words.contains('\n') && words.len() < 400, "{words}");
                }
            }
        }
    }
}

#[test]
fn no_key_with_an_address_is_forgotten() {
    let example = include_str!("../../../deploy/example.toml");
    let uncommented: Vec<&str> =
        example.lines().map(|line| line.strip_prefix("#: ").unwrap_or(line)).collect();
    let table: toml::Table = uncommented.join("\n").parse().unwrap();
    let mut leaves: Vec<(String, toml::Value)> = table.into_iter().collect();
    let mut addresses = 0;
    while let Some((key, value)) = leaves.pop() {
        match value {
            toml::Value::Table(table) => {
                leaves.extend(table.into_iter().map(|(below, v)| (format!("{key}.{below}"), v)));
            }
            // A collector's URL has a check of its own: anything but a password.
            toml::Value::String(text)
                if key != "telemetry.otlp_endpoint"
                    && (listen_address(&text).is_ok()
                        || text.parse::<node::config::EtcdEndpoint>().is_ok()) =>
            {
                addresses += 1;
                assert!(KEYS.iter().any(|known| known.key == key), "{key} is not walked");
            }
            _ => {}
        }
    }
    assert!(addresses >= 5, "{addresses}");
}

#[test]
fn a_collector_is_shown_without_a_password() {
    let name = "TERCET_TELEMETRY__OTLP_ENDPOINT".to_owned();
    let environment = vec![(name, "http://user:hunter2@host:4317".to_owned())];
    let loaded = node::config::load::<Settings>(&Sources { environment, ..Sources::default() });
    let words = Chain(&loaded.unwrap_err()).to_string();
    assert!(words.contains("telemetry.otlp_endpoint") && !words.contains("hunter2"), "{words}");
}

#[test]
fn help_names_the_ports_in_force() {
    use clap::CommandFactory;
    let command = crate::cli::Cli::command();
    let help = |name: &str| {
        let found = command.find_subcommand(name).unwrap();
        found.clone().render_long_help().to_string()
    };
    let own = |port: u16| format!("127.0.0.1:{port}");
    assert!(help("worker").contains(&own(proto::ports::WORKER)));
    for name in ["coordinator", "up"] {
        let help = help(name);
        assert!(help.contains(&own(proto::ports::COORDINATOR_GRPC)), "{help}");
        assert!(help.contains(&own(proto::ports::COORDINATOR_HTTP)), "{help}");
    }
    assert!(help("status").contains(&own(proto::ports::COORDINATOR_GRPC)));
    let readme = include_str!("../../../README.md");
    assert!(readme.contains(&format!("--listen {}", own(proto::ports::WORKER))));
    let worker = worker::Config::default();
    assert_eq!(worker.listen.port(), proto::ports::WORKER);
}
