//! What is wrong with what a person gives is said in one sentence, with the exit code of its kind,
//! and nothing is left half-written.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;
use tests::model::{bundled_store, fixture};
use tests::process::{Process, own_address, run, run_with};

/// Done, failed, wrong usage, wrong configuration (design.md, section 10).
const FAILED: i32 = 1;
const USAGE: i32 = 2;
const CONFIGURATION: i32 = 64;

/// Asserts the exit code, one line on stderr without a panic that holds every word of `says`.
fn check(output: &Output, code: i32, says: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for word in says {
        assert!(stderr.contains(word), "{word:?} in {stderr:?}");
    }
    if code != USAGE {
        // Wrong usage shows the usage, too.
        let errors = stderr.lines().filter(|line| line.starts_with("error")).count();
        assert_eq!(errors, 1, "one sentence: {stderr}");
        assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn wrong_usage_is_two() {
    let cases: [&[&str]; 8] = [
        &["no-such-command"],
        &["generate", "--no-such-flag", "x"],
        &["generate", "--max-tokens", "many", "x"],
        &["generate", "--tokens", "1,x", "--max-tokens", "1"],
        &["generate", "--kv-type", "f64", "x"],
        &["generate", "--endpoint", "127.0.0.1:1", "--model", "m", "x"],
        &["model", "synth", "--shape", "2x3", "store"],
        &["debug", "logits", "--isa", "mmx", "--tokens", "1"],
    ];
    for arguments in cases {
        check(&run(arguments), USAGE, &[]);
    }
}

#[test]
fn more_stages_than_layers_is_wrong_usage() {
    let store = bundled_store();
    let output =
        run(&["generate", "--model", text(&store), "--stages", "7", "--max-tokens", "1", "x"]);
    check(&output, USAGE, &["7", "6"]);
    let output = run(&[
        "debug",
        "logits",
        "--model",
        text(&store),
        "--stages",
        "7",
        "--tokens",
        "1",
        "--json",
    ]);
    check(&output, USAGE, &["7", "6"]);
}

#[test]
fn nobody_there_is_said_with_the_address() {
    let nobody = format!("{}:1", own_address());
    check(&run(&["generate", "--endpoint", &nobody, "x"]), FAILED, &[&nobody]);
    check(&run(&["status", "--endpoint", &nobody]), FAILED, &[&nobody]);

    let etcd = format!("http://{nobody}");
    let store = bundled_store();
    check(
        &run(&[
            "coordinator",
            "--etcd",
            &etcd,
            "--cluster",
            "c",
            "--model",
            text(&store),
            "--grpc",
            "127.0.0.1:0",
            "--http",
            "127.0.0.1:0",
        ]),
        FAILED,
        &["etcd", &etcd],
    );
    check(
        &run(&[
            "worker",
            "--etcd",
            &etcd,
            "--cluster",
            "c",
            "--listen",
            "127.0.0.1:0",
            "--threads",
            "1",
            "--store",
            text(&store),
        ]),
        FAILED,
        &["etcd", &etcd],
    );
}

#[test]
fn an_occupied_port_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = run(&["up", "--workers", "1", "--http", &address, "--grpc", "127.0.0.1:0"]);
    check(&output, FAILED, &[&address]);
    let output = run(&["up", "--workers", "1", "--grpc", &address, "--http", "127.0.0.1:0"]);
    check(&output, FAILED, &[&address]);
}

#[test]
fn an_open_address_without_tls_is_refused() {
    let store = bundled_store();
    let output = run(&[
        "worker",
        "--etcd",
        "http://127.0.0.1:1",
        "--cluster",
        "c",
        "--listen",
        "0.0.0.0:7421",
        "--threads",
        "1",
        "--store",
        text(&store),
    ]);
    check(&output, CONFIGURATION, &["0.0.0.0:7421", "--insecure"]);
    let output = run(&[
        "coordinator",
        "--etcd",
        "http://127.0.0.1:1",
        "--cluster",
        "c",
        "--model",
        text(&store),
        "--grpc",
        "0.0.0.0:7420",
        "--http",
        "127.0.0.1:0",
    ]);
    check(&output, CONFIGURATION, &["0.0.0.0:7420", "--insecure"]);
}

#[test]
fn a_wrong_configuration_is_refused_by_key() {
    let folder = TempDir::new().unwrap();
    let config = folder.path().join("tercet.toml");
    fs::write(&config, "[worker]\nlissten = \"127.0.0.1:0\"\n").unwrap();
    check(&run(&["worker", "--config", text(&config)]), CONFIGURATION, &["lissten"]);
    fs::write(&config, "[worker\n").unwrap();
    check(&run(&["worker", "--config", text(&config)]), CONFIGURATION, &["tercet.toml"]);
    let missing = folder.path().join("missing.toml");
    check(&run(&["coordinator", "--config", text(&missing)]), CONFIGURATION, &["missing.toml"]);
}

#[test]
fn what_is_not_a_model_is_refused_and_nothing_is_left() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let whole = fs::read(fixture("tiny_i2s.gguf")).unwrap();
    fs::write(at("truncated.gguf"), &whole[..whole.len() / 2]).unwrap();
    fs::write(at("short.gguf"), &whole[..20]).unwrap();
    fs::write(at("lfs.gguf"), "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        .unwrap();
    let mut old = whole.clone();
    old[4] = 1;
    fs::write(at("old.gguf"), old).unwrap();
    let mut huge = whole.clone();
    huge[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(at("huge.gguf"), huge).unwrap();
    fs::write(at("text.gguf"), "hello").unwrap();
    fs::create_dir(at("empty")).unwrap();
    let copy = |name: &str, config: &str| {
        fs::create_dir(at(name)).unwrap();
        fs::copy(fixture("tiny_packed/model.safetensors"), at(name).join("model.safetensors"))
            .unwrap();
        fs::write(at(name).join("config.json"), config).unwrap();
    };
    let config = fs::read_to_string(fixture("tiny_packed/config.json")).unwrap();
    copy("arch", &config.replace("\"bitnet\"", "\"mamba\"").replace("BitNetForCausalLM", "Mamba"));
    copy("json", "{");
    copy("shape", &config.replace("\"hidden_size\": 256", "\"hidden_size\": 512"));

    let cases: [(&str, &[&str]); 10] = [
        ("truncated.gguf", &["truncated.gguf"]),
        ("short.gguf", &["short.gguf"]),
        ("lfs.gguf", &["git-lfs"]),
        ("old.gguf", &["version 1"]),
        ("huge.gguf", &["huge.gguf"]),
        ("text.gguf", &["text.gguf"]),
        ("empty", &["config.json"]),
        ("arch", &["mamba"]),
        ("json", &["config.json"]),
        ("shape", &[]),
    ];
    for (name, says) in cases {
        let (source, store) = (at(name), at("store"));
        check(&run(&["import", text(&source), text(&store)]), FAILED, says);
        let left: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|left| left.contains("store"))
            .collect();
        assert!(left.is_empty(), "{name} left {left:?}");
    }
    check(&run(&["import", "/no/such/source", text(&at("store"))]), FAILED, &["/no/such/source"]);
    check(&run(&["model", "show", text(&at("empty"))]), FAILED, &["manifest.json"]);
    check(&run(&["generate", "--model", text(&at("nothing")), "x"]), FAILED, &["nothing"]);
}

#[test]
fn a_full_disk_leaves_nothing() {
    // A limit on file sizes is what a full disk looks like to a writer, and needs no mount.
    let folder = TempDir::new().unwrap();
    let store = folder.path().join("store");
    let script = format!(
        "ulimit -f 64; trap '' XFSZ; exec {} import {} {}",
        text(&tests::process::tercet()),
        text(&fixture("tiny_packed")),
        text(&store)
    );
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    check(&output, FAILED, &["too large"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing half-written");
}

#[test]
fn a_store_that_was_damaged_is_found() {
    let folder = TempDir::new().unwrap();
    let store = folder.path().join("store");
    assert!(run(&["import", text(&fixture("tiny_packed")), text(&store)]).status.success());
    let largest = fs::read_dir(&store)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap();
    let mut bytes = fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&largest, &bytes).unwrap();
    let name = largest.file_name().unwrap().to_str().unwrap();
    check(&run(&["model", "verify", text(&store)]), FAILED, &[name]);
    fs::write(&largest, &bytes[..middle]).unwrap();
    check(
        &run(&["generate", "--model", text(&store), "--tokens", "1", "--max-tokens", "1"]),
        FAILED,
        &[name],
    );
}

#[test]
fn an_import_over_something_is_refused() {
    let folder = TempDir::new().unwrap();
    let store = folder.path().join("store");
    fs::create_dir(&store).unwrap();
    fs::write(store.join("mine"), "precious").unwrap();
    check(&run(&["import", text(&fixture("tiny_packed")), text(&store)]), FAILED, &["store"]);
    assert_eq!(fs::read_to_string(store.join("mine")).unwrap(), "precious");
}

#[test]
fn text_for_a_model_without_tokenizer_is_refused_and_ids_are_not() {
    let folder = TempDir::new().unwrap();
    let store = folder.path().join("store");
    assert!(
        run(&["model", "synth", "--shape", "tiny", "--seed", "1", text(&store)]).status.success()
    );
    check(&run(&["generate", "--model", text(&store), "Hello"]), FAILED, &["tokenizer"]);
    let output = run(&[
        "generate",
        "--model",
        text(&store),
        "--tokens",
        "1,2",
        "--max-tokens",
        "3",
        "--json",
    ]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let beyond =
        run(&["generate", "--model", text(&store), "--tokens", "4000000000", "--max-tokens", "1"]);
    check(&beyond, FAILED, &["4000000000"]);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let script = format!("{} completions bash | head -1", text(&tests::process::tercet()));
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn up_answers_and_stops_when_told() {
    let output = run_with(
        &[
            "up",
            "--workers",
            "3",
            "--http",
            "127.0.0.1:0",
            "--grpc",
            "127.0.0.1:0",
            "--prompt",
            "Once upon a time, there was a little girl",
            "--once",
        ],
        |_| {},
    );
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.split_whitespace().count() > 20, "readable text: {said}");

    let mut up = Process::start(
        "up",
        &["up", "--workers", "2", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"],
    );
    up.wait_for_log("127.0.0.1:", std::time::Duration::from_secs(60));
    up.signal(nix::sys::signal::Signal::SIGINT);
    assert!(up.wait(std::time::Duration::from_secs(20)).success(), "{}", up.log());
}

/// `tercet` with `arguments`, started under a limit of the shell's.
fn limited(limit: &str, arguments: &str) -> Output {
    let tercet = tests::process::tercet();
    let script = format!("ulimit {limit}; exec {} {arguments}", text(&tercet));
    Command::new("bash").args(["-c", &script]).output().unwrap()
}

#[test]
fn a_file_that_may_not_grow_is_an_error_and_nothing_is_left() {
    let folder = TempDir::new().unwrap();
    let store = folder.path().join("store");
    // 64 KiB, less than one layer.
    let output =
        limited("-f 64", &format!("model synth --shape 2x256x512x4x2x4096 {}", text(&store)));
    check(&output, FAILED, &["failed to write", "too large"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_signal_ends_what_is_written_and_nothing_is_left() {
    use nix::sys::signal::Signal;
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130), (Signal::SIGHUP, 129)] {
        let folder = TempDir::new().unwrap();
        let store = folder.path().join("store");
        let arguments = ["model", "synth", "--shape", "40x2048x8192x16x8x32000", text(&store)];
        let mut making = Process::start("synth", &arguments);
        let limit = std::time::Duration::from_secs(60);
        tests::process::wait_for("a partial store", limit, || {
            fs::read_dir(folder.path()).unwrap().next().map(drop)
        });
        making.signal(signal);
        let ended = making.wait(limit);
        assert_eq!(ended.code(), Some(code), "{}", making.log());
        assert!(making.log().contains("told to stop"), "{}", making.log());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{}", making.log());
    }
}

#[test]
fn too_little_memory_is_said_and_ends_no_process_at_once() {
    // Megabytes of address space: from too little for anything to nearly enough for two workers. Where it
    // happens to be a small allocation that fails first, no program lives on; threads and their heaps move
    // these places (500 was one when this was written).
    for mib in [350, 600, 880] {
        let limit = format!("-v {}", mib * 1024);
        let up =
            "up --workers 2 --threads 1 --http 127.0.0.1:0 --grpc 127.0.0.1:0 --prompt x --once";
        let output = limited(&limit, up);
        let stderr = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(0) => {}
            Some(FAILED) => assert!(stderr.contains("error: "), "{stderr}"),
            _ => panic!("{mib} MiB: {:?}: {stderr}", output.status),
        }
    }
}
