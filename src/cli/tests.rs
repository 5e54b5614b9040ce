//! The command line as a whole.

use clap::{CommandFactory, Parser};

use super::*;

fn exit_of(line: &str) -> i32 {
    match Cli::try_parse_from(line.split_whitespace()) {
        Ok(_) => 0,
        Err(error) => error.exit_code(),
    }
}

#[test]
fn clap_finds_no_contradiction() {
    Cli::command().debug_assert();
}

#[test]
fn the_flags_that_scripts_rely_on_exist() {
    for line in [
        "tercet up --workers 3 --stages 3 --model m --http 127.0.0.1:0 --grpc 127.0.0.1:0",
        "tercet coordinator --etcd http://a:1,http://b:2 --cluster c --model s --grpc 127.0.0.1:1 \
         --http 127.0.0.1:2 --stages 2 --advertise host:1",
        "tercet worker --etcd http://a:1 --cluster c --listen 127.0.0.1:1 --threads 2 --store d \
         --memory 4GiB --advertise host:1 --insecure",
        "tercet generate --endpoint a:1 prompt --max-tokens 1 --temperature 0 --seed 1",
        "tercet generate --model m --stages 2 --tokens 1,2,3 --max-tokens 1 --top-logprobs 3 \
         --kv-type f32 --json",
        "tercet generate -",
        "tercet chat",
        "tercet status --endpoint a:1 --json",
        "tercet debug logits --model m --tokens 1,2,3 --stages 2 --chunk 7 --isa scalar \
         --threads 2 --kv-type f32 --among 15 --json",
        "tercet eval --model m --text f --window 256 --stages 2 --kv-type f16 --json",
        "tercet eval --tokens-file f",
        "tercet plan --endpoint a:1 --json",
        "tercet plan --nodes f --model m --kv-type f32 --stages 2 --pipelines 3 --objective throughput \
         --token-time 200ms --context 4096 --what-if add:a=b,remove:c --json",
        "tercet plan --nodes f --objective latency",
        "tercet plan --endpoint a:1 --what-if add:a=b,remove:c",
        "tercet plan --admin a:1 --apply --timeout 1m --json",
        "tercet drain w --endpoint a:1 --timeout 1m --json",
        "tercet drain w --admin a:2 --no-wait",
        "tercet drain w --force --no-wait",
        "tercet drain w --cancel",
        "tercet roll --endpoint a:1 --timeout 1m --json",
        "tercet roll w1 w2 --admin a:2",
        "tercet import src store --name n --i2s-layout 64x16 --activation relu2 --scales inverted --no-score",
        "tercet model ls",
        "tercet model show s --json",
        "tercet model verify s",
        "tercet model synth --shape 2b4t --seed 3 store",
        "tercet bench limits --threads 1,2 --json",
        "tercet bench kernel --rows 1,2,4,8 --shape q,kv,o,gate,down,head --isa scalar --threads 1",
        "tercet bench engine --model m --threads 2 --prompt 512 --generate 32 --batch 1,8,16 \
         --context 4000 --repeat 3 --json",
        "tercet bench pipeline --endpoint a:1 --prompt 512 --generate 32 --batch 1,8,16 --json",
        "tercet completions bash",
        "tercet status --log debug --log-format json --otlp http://127.0.0.1:4317",
    ] {
        assert_eq!(exit_of(line), 0, "{line}");
    }
}

#[test]
fn what_is_refused_gives_a_terminal_no_orders_and_shows_no_password() {
    let hostile = "\u{1b}]0;x\u{7}\r\u{9b}2J\u{202e}";
    let refused = |words: &[&str]| {
        let error = Cli::try_parse_from(words).expect_err("it is refused");
        harmless(error).render().ansi().to_string()
    };
    let mixed = format!("--{hostile}");
    for words in [
        ["tercet", "up", "--http", hostile],
        ["tercet", "up", "--grpc", hostile],
        ["tercet", "up", "--admin", hostile],
        ["tercet", "up", "--workers", hostile],
        ["tercet", "up", "--kv-type", hostile],
        ["tercet", "up", "--sampling-defaults", hostile],
        ["tercet", "up", "--x", &mixed],
        ["tercet", "up", &mixed, "1"],
        ["tercet", "up", "--once", &mixed],
        ["tercet", "status", "--log-format", hostile],
        ["tercet", "worker", "--memory", hostile],
        ["tercet", "coordinator", "--hold-down", hostile],
        ["tercet", "import", "--scales", hostile],
        ["tercet", "model", hostile, "x"],
        ["tercet", hostile, "x", "y"],
    ] {
        let text = refused(&words);
        for order in ["\u{7}", "\r", "\u{9b}", "\u{202e}", "\u{1b}]"] {
            assert!(!text.contains(order), "{words:?}: {text:?}");
        }
        assert!(text.contains("x") && text.len() < 2000, "{text}");
    }
    let long = "x".repeat(100_000);
    assert!(refused(&["tercet", "up", "--http", &long]).len() < 1000);
    for flag in ["--http", "--grpc", "--admin"] {
        let text = refused(&["tercet", "up", flag, "http://me:secret@host:1"]);
        assert!(text.contains("host:1") && !text.contains("secret"), "{text}");
    }
}

#[test]
fn wrong_usage_is_two() {
    for line in [
        "tercet",
        "tercet nonsense",
        "tercet up --workers 0",
        "tercet up --once",
        "tercet up --http nowhere",
        "tercet generate --kv-type f64 x",
        "tercet generate --threads 0 x",
        "tercet debug logits --isa mmx --tokens 1",
        "tercet debug logits --chunk 0 --tokens 1",
        "tercet debug logits",
        "tercet eval",
        "tercet eval --text a --tokens-file b",
        "tercet plan --nodes f --endpoint a:1",
        "tercet plan --stages 2",
        "tercet plan --nodes f --stages 0",
        "tercet plan --nodes f --objective speed",
        "tercet plan --nodes f --what-if grow:a",
        "tercet import src store --i2s-layout 64",
        "tercet import src store --name=",
        "tercet import src store --activation gelu",
        "tercet import src store --scales upside-down",
        "tercet model synth --shape 2x3 store",
        "tercet worker --memory lots",
        "tercet status --log-format yaml",
        "tercet bench",
        "tercet bench limits --threads 0",
        "tercet bench kernel --shape up",
        "tercet bench kernel --rows 0",
        "tercet bench kernel --isa mmx",
        "tercet bench engine --batch 1,,2",
        "tercet bench engine --generate 0",
        "tercet bench pipeline --generate 1",
        "tercet bench pipeline --batch many",
        "tercet completions tcl",
    ] {
        assert_eq!(exit_of(line), 2, "{line}");
    }
}
