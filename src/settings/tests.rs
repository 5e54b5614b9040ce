//! What wins over what, and what is refused.

use super::*;

fn load(file: &str, environment: &[(&str, &str)], flags: Flags) -> Result<Settings, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tercet.toml");
    std::fs::write(&path, file).unwrap();
    let environment =
        environment.iter().map(|&(name, value)| (name.into(), value.into())).collect();
    Settings::from_sources(&Sources { file: Some(&path), environment, flags: flags.0 })
}

fn flags(key: &str, value: impl Into<Value>) -> Flags {
    let mut flags = Flags::default();
    flags.set(key, Some(value));
    flags
}

#[test]
fn nothing_given_is_the_defaults() {
    assert_eq!(load("", &[], Flags::default()).unwrap(), Settings::default());
}

#[test]
fn flags_over_environment_over_file() {
    let file = "[worker]\nthreads = 3\n";
    let environment = [("TERCET_WORKER__THREADS", "5")];
    let threads = |environment: &[_], flags| load(file, environment, flags).unwrap().worker.threads;
    assert_eq!(threads(&[], Flags::default()), Some(3));
    assert_eq!(threads(&environment, Flags::default()), Some(5));
    assert_eq!(threads(&environment, flags("worker.threads", 7)), Some(7));
}

#[test]
fn one_name_of_the_cluster_is_everybodys() {
    let settings = load("cluster = \"rack1\"\n", &[], Flags::default()).unwrap();
    assert_eq!(
        (settings.cluster.as_str(), settings.coordinator.cluster.as_str()),
        ("rack1", "rack1")
    );
    let settings = load("cluster = \"rack1\"\n", &[], flags("cluster", "rack2")).unwrap();
    assert_eq!(settings.coordinator.cluster.as_str(), "rack2");
}

#[test]
fn units_are_read_and_unknown_keys_are_named() {
    let file = "[worker]\nmemory = \"1GiB\"\n[etcd]\nendpoints = [\"http://a:1\"]\n";
    let settings = load(file, &[], Flags::default()).unwrap();
    assert_eq!(settings.worker.memory_bytes, 1 << 30);
    assert_eq!(settings.etcd.endpoints.urls(), ["http://a:1"]);
    for (file, key) in [
        ("[worker]\nlissten = \"127.0.0.1:1\"\n", "lissten"),
        ("[coordinator]\ncluster = \"x\"\n", "cluster"),
        ("[wroker]\n", "wroker"),
        ("[coordinator.limits]\nwaiting = 3\n", "waiting"),
    ] {
        let error = load(file, &[], Flags::default()).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
}

/// Every time of either role, the least and the most that it may be, and what lies beyond.
const TIMES: [(&str, &str, &str, Option<&str>, &str); 12] = [
    ("coordinator.token_time", "1us", "365d", Some("999ns"), "366d"),
    ("coordinator.shutdown_grace", "0s", "1d", None, "25h"),
    ("coordinator.lame_duck", "0s", "1d", None, "25h"),
    ("coordinator.settle", "0s", "365d", None, "366d"),
    ("coordinator.hold_down", "0s", "365d", None, "366d"),
    ("coordinator.drift_time", "1s", "365d", Some("999ms"), "366d"),
    ("coordinator.limits.wait", "0s", "365d", None, "366d"),
    ("coordinator.limits.request_deadline", "10ms", "365d", Some("9ms"), "366d"),
    ("coordinator.limits.step_time", "1us", "365d", Some("999ns"), "366d"),
    ("coordinator.limits.step_deadline", "10ms", "365d", Some("9ms"), "366d"),
    ("worker.shutdown_grace", "0s", "1d", None, "25h"),
    ("worker.drift_time", "1s", "365d", Some("999ms"), "366d"),
];

/// The keys below `key` whose values are times.
fn times_in(key: &str, value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Table(table) => {
            for (name, value) in table {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                times_in(&key, value, found);
            }
        }
        Value::String(text) if text.parse::<node::config::Duration>().is_ok() => {
            found.push(key.to_owned());
        }
        _ => {}
    }
}

#[test]
fn every_time_of_either_role_has_the_same_range_wherever_it_is_set() {
    let base = "[coordinator]\nmodel = \"store\"\n[worker]\nid = \"w1\"\n";
    let checked = |settings: Result<Settings, ConfigError>| -> Result<(), String> {
        let settings = settings.map_err(|error| error.to_string())?;
        settings.coordinator.validate().map_err(|error| error.to_string())?;
        settings.worker.validate().map_err(|error| error.to_string())
    };
    let page = include_str!("../../docs/configuration.md");
    for (key, least, most, below, above) in TIMES {
        let (section, name) = key.rsplit_once('.').unwrap();
        let variable = format!("TERCET_{}", key.to_uppercase().replace('.', "__"));
        let set = |value: &str| {
            let mut file: Table = toml::from_str(base).unwrap();
            let mut table = &mut file;
            for part in section.split('.') {
                let below = table.entry(part).or_insert_with(|| Value::Table(Table::new()));
                table = below.as_table_mut().unwrap();
            }
            table.insert(name.into(), value.into());
            [
                checked(load(&toml::to_string(&file).unwrap(), &[], Flags::default())),
                checked(load(base, &[(variable.as_str(), value)], Flags::default())),
                checked(load(base, &[], flags(key, value))),
            ]
        };
        for value in [least, most] {
            assert_eq!(set(value), [Ok(()), Ok(()), Ok(())], "{key} = {value}");
        }
        for value in below.into_iter().chain([above]) {
            for refused in set(value) {
                let error = refused.unwrap_err();
                let range = format!("{name} must be from {least} to {most}, found {value}");
                assert!(error.contains(&range), "{key} = {value}: {error}");
            }
        }
        let range = format!("| `{key}` | {least} | {most} |");
        assert!(page.contains(&range), "docs/configuration.md has no {range}");
    }
    // No time is left out.
    let mut found = Vec::new();
    times_in("", &Value::try_from(Settings::default()).unwrap(), &mut found);
    found.push("coordinator.token_time".into());
    found.sort();
    let mut listed = TIMES.map(|(key, ..)| key.to_owned());
    listed.sort();
    assert_eq!(found, listed);
}

#[test]
fn what_is_shown_reads_back() {
    let settings = load("cluster = \"rack1\"\n", &[], Flags::default()).unwrap();
    for shown in [settings.for_coordinator(), settings.for_worker()] {
        let text = node::config::show(&shown).unwrap();
        assert_eq!(load(&text, &[], Flags::default()).unwrap(), settings, "{text}");
    }
}

#[test]
fn the_example_is_a_configuration() {
    let example = include_str!("../../deploy/example.toml");
    load(example, &[], Flags::default()).unwrap();
    // Every key that it explains exists: a comment that looks like a setting is one.
    let uncommented: Vec<&str> =
        example.lines().map(|line| line.strip_prefix("#: ").unwrap_or(line)).collect();
    let settings = load(&uncommented.join("\n"), &[], Flags::default()).unwrap();
    assert_ne!(settings, Settings::default());
}

#[test]
fn a_password_needs_a_user() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("password");
    std::fs::write(&path, "secret\n").unwrap();
    let whole = EtcdSettings {
        user: Some("tercet".into()),
        password_file: Some(path),
        ..EtcdSettings::default()
    };
    let credentials = whole.options().unwrap().credentials;
    assert_eq!(credentials, Some(("tercet".into(), "secret".into())));
    for wrong in [
        EtcdSettings { user: None, ..whole.clone() },
        EtcdSettings { password_file: None, ..whole.clone() },
        EtcdSettings { password_file: Some("/no/such/file".into()), ..whole },
    ] {
        assert_eq!(wrong.options().err().unwrap().exit(), node::exit::Exit::Config);
    }
}

#[test]
fn a_variable_that_names_nothing_is_refused_by_every_command() {
    let check = |name: &str| check_variable((name.to_owned(), "1".to_owned()));
    for (name, words) in [
        ("TERCET_FOO", "unknown key foo in the variable TERCET_FOO"),
        ("TERCET_ENDPONT", "did you mean TERCET_ENDPOINT?"),
        ("TERCET_WORKER__THREDS", "did you mean threads?"),
        ("TERCET_WORKER_THREADS", "unknown key worker_threads"),
    ] {
        let error = check(name).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    // What it names is there; what it is worth is told by whoever reads it.
    check("TERCET_WORKER__MEMORY").unwrap();
    check("TERCET_CLUSTER").unwrap();
}

#[test]
fn a_password_that_everyone_can_read_is_warned_of() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("password");
    std::fs::write(&path, "secret\n").unwrap();
    let etcd = EtcdSettings {
        user: Some("tercet".into()),
        password_file: Some(path.clone()),
        ..EtcdSettings::default()
    };
    for (mode, warned) in [(0o600, false), (0o640, false), (0o644, true), (0o602, true)] {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let warning = etcd.password_warning();
        assert_eq!(warning.is_some(), warned, "{mode:o}");
        assert!(warning.is_none_or(|text| !text.contains("secret") && text.contains("chmod 600")));
    }
    assert_eq!(EtcdSettings::default().password_warning(), None);
}
