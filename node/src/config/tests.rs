//! What wins, what is refused, and in which words.

use std::net::SocketAddr;

use serde::Deserialize;

use super::*;
use crate::Chain;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    name: String,
    peers: Vec<String>,
    worker: Worker,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Worker {
    threads: u16,
    memory: ByteSize,
    grace: Duration,
    listen: SocketAddr,
    kind: Kind,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    fast: bool,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Small,
    Large,
}

impl Default for Config {
    fn default() -> Self {
        Self { name: "tercet".to_owned(), peers: Vec::new(), worker: Worker::default() }
    }
}

impl Default for Worker {
    fn default() -> Self {
        Self {
            threads: 1,
            memory: ByteSize(1 << 30),
            grace: Duration::from_secs(10),
            listen: ([127, 0, 0, 1], 7000).into(),
            kind: Kind::Small,
            ratio: None,
            fast: false,
        }
    }
}

struct Given {
    _dir: tempfile::TempDir,
    path: PathBuf,
    environment: Vec<(String, String)>,
    flags: toml::Table,
}

fn given(file: &str, environment: &[(&str, &str)], flags: &str) -> Given {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tercet.toml");
    std::fs::write(&path, file).unwrap();
    let environment =
        environment.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    Given { _dir: dir, path, environment, flags: flags.parse().unwrap() }
}

impl Given {
    fn load(&self) -> Result<Config, ConfigError> {
        load(&Sources {
            file: Some(&self.path),
            environment: self.environment.clone(),
            flags: self.flags.clone(),
        })
    }

    /// The error's words with the file called FILE.
    fn error(&self) -> String {
        let error = self.load().unwrap_err();
        Chain(&error).to_string().replace(&self.path.display().to_string(), "FILE")
    }
}

#[test]
fn nothing_given_is_all_defaults() {
    let config: Config = load(&Sources::default()).unwrap();
    assert_eq!(config, Config::default());
    assert_eq!(given("", &[], "").load().unwrap(), Config::default());
}

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    let file = "name = 'file'\n[worker]\nthreads = 2\nmemory = '2GiB'\ngrace = '2s'\nratio = 1";
    let environment = [("TERCET_WORKER__THREADS", "3"), ("TERCET_WORKER__MEMORY", "3GiB")];
    let config = given(file, &environment, "[worker]\nthreads = 4").load().unwrap();
    assert_eq!(config.name, "file");
    assert_eq!(config.worker.threads, 4);
    assert_eq!(config.worker.memory, ByteSize(3 << 30));
    assert_eq!(config.worker.grace, Duration::from_secs(2));
    assert_eq!(config.worker.ratio, Some(1.0));
    assert_eq!(config.worker.kind, Kind::Small);
}

#[test]
fn a_variable_takes_the_type_of_its_key() {
    let environment = [
        ("TERCET_NAME", "4"),
        ("TERCET_PEERS", "a:1, b:2,"),
        ("TERCET_WORKER__THREADS", " 3 "),
        ("TERCET_WORKER__MEMORY", "1000"),
        ("TERCET_WORKER__GRACE", "1.5s"),
        ("TERCET_WORKER__LISTEN", "[::1]:9"),
        ("TERCET_WORKER__KIND", "large"),
        ("TERCET_WORKER__RATIO", "0.25"),
        ("TERCET_WORKER__FAST", "on"),
        ("HOME", "is passed over"),
    ];
    let config = given("", &environment, "").load().unwrap();
    let worker = Worker {
        threads: 3,
        memory: ByteSize(1000),
        grace: Duration::from_millis(1500),
        listen: "[::1]:9".parse().unwrap(),
        kind: Kind::Large,
        ratio: Some(0.25),
        fast: true,
    };
    let peers = vec!["a:1".to_owned(), "b:2".to_owned()];
    assert_eq!(config, Config { name: "4".to_owned(), peers, worker });
}

#[test]
fn errors_are_one_sentence_with_key_and_place() {
    let known = "known there: threads, memory, grace, listen, kind, ratio, fast";
    for (file, environment, flags, wanted) in [
        (
            "[worker]\nthread = 2",
            [("X", "")],
            "",
            format!("unknown key worker.thread in FILE, did you mean threads? ({known})"),
        ),
        (
            "",
            [("TERCET_WORKER__THREAD", "2")],
            "",
            format!(
                "unknown key worker.thread in the variable TERCET_WORKER__THREAD, did you mean \
                 threads? ({known})"
            ),
        ),
        (
            "",
            [("TERCET_WORKR__THREADS", "2")],
            "",
            "unknown key workr in the variable TERCET_WORKR__THREADS, \
             did you mean worker? (known there: name, peers, worker)"
                .to_owned(),
        ),
        (
            "",
            [("X", "")],
            "nam = 'x'",
            "unknown key nam on the command line, did you mean name? \
             (known there: name, peers, worker)"
                .to_owned(),
        ),
        (
            "[worker]\nthreads = 'two'",
            [("X", "")],
            "",
            "wrong value for worker.threads in FILE: invalid type: string \"two\", expected u16"
                .to_owned(),
        ),
        (
            "[worker]\nthreads = 70000",
            [("X", "")],
            "",
            "wrong value for worker.threads in FILE: invalid value: integer `70000`, expected u16"
                .to_owned(),
        ),
        (
            "[worker]\nthreads = 1",
            [("TERCET_WORKER__THREADS", "many")],
            "",
            "wrong value for worker.threads in the variable TERCET_WORKER__THREADS: invalid type: \
             string \"many\", expected u16"
                .to_owned(),
        ),
        (
            "[worker]\nmemory = '4 apples'",
            [("X", "")],
            "",
            "wrong value for worker.memory in FILE: \"4 apples\" is not a size such as 4GiB, \
             512MB or 1048576"
                .to_owned(),
        ),
        (
            "[worker]\ngrace = 5",
            [("X", "")],
            "",
            "wrong value for worker.grace in FILE: invalid type: integer `5`, expected a time \
             such as 500ms, 5s or 2m"
                .to_owned(),
        ),
        (
            "[worker]\nkind = 'medium'",
            [("X", "")],
            "",
            "wrong value for worker.kind in FILE: unknown variant `medium`, expected `small` or \
             `large`"
                .to_owned(),
        ),
        (
            "worker = 1",
            [("X", "")],
            "",
            "wrong value for worker in FILE: invalid type: integer `1`, expected struct Worker"
                .to_owned(),
        ),
        (
            "name = 'x'\npeers = [",
            [("X", "")],
            "",
            "FILE:2 is not valid TOML: unclosed array, expected `]`".to_owned(),
        ),
    ] {
        assert_eq!(given(file, &environment, flags).error(), wanted);
    }
}

#[test]
fn a_key_without_default_says_how_to_set_it() {
    #[derive(Debug, Deserialize)]
    struct Needs {
        #[expect(dead_code, reason = "never read, for it is missing")]
        etcd: Etcd,
    }
    #[derive(Debug, Deserialize)]
    struct Etcd {
        #[expect(dead_code, reason = "never read, for it is missing")]
        endpoints: Vec<String>,
    }
    let flags = "etcd = {}".parse().unwrap();
    let error = load::<Needs>(&Sources { flags, ..Sources::default() }).unwrap_err();
    assert_eq!(
        error.to_string(),
        "etcd.endpoints is not set: write it into the configuration file, or set \
         TERCET_ETCD__ENDPOINTS"
    );
}

#[test]
fn a_missing_file_is_named() {
    let sources = Sources { file: Some(Path::new("no/such/file.toml")), ..Sources::default() };
    let error = load::<Config>(&sources).unwrap_err();
    let words = Chain(&error).to_string();
    assert!(words.starts_with("failed to read the configuration file no/such/file.toml: "));
}

#[test]
fn what_is_shown_reads_back() {
    let environment = [("TERCET_WORKER__GRACE", "90s"), ("TERCET_PEERS", "a,b")];
    let config = given("[worker]\nmemory = 1536", &environment, "").load().unwrap();
    let shown = show(&config).unwrap();
    assert!(shown.contains("memory = \"1536\""), "{shown}");
    assert_eq!(given(&shown, &[], "").load().unwrap(), config);
}

#[test]
fn a_file_without_end_is_no_configuration() {
    let sources = Sources { file: Some(Path::new("/dev/zero")), ..Sources::default() };
    let error = load::<Config>(&sources).unwrap_err();
    let words = "failed to read the configuration file /dev/zero: it is a device and not a file";
    assert_eq!(Chain(&error).to_string(), words);
    let long = given(&"#".repeat(FILE_BYTES.0 as usize + 1), &[], "").load().unwrap_err();
    let words = Chain(&long).to_string();
    assert!(words.ends_with("it has more than 1MiB, which is the most"), "{words}");
}
