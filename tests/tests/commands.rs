//! What a person types into a terminal, and what programs read from it.

use std::time::Duration;

use nix::sys::signal::Signal;
use tests::cluster::{Cluster, json_of};
use tests::model::bundled_store;
use tests::process::{Process, run, run_with_input};

const MOMENT: Duration = Duration::from_secs(30);

#[test]
fn interrupting_chat_ends_the_answer_and_not_the_program() {
    let cluster = Cluster::start(bundled_store(), 1, 1);
    let mut chat = Process::start(
        "chat",
        &["chat", "--endpoint", cluster.grpc(), "--max-tokens", "480", "--ignore-eos"],
    );
    chat.say("Tell me a story about a dog.");
    tests::process::wait_for("the answer to run", MOMENT, || {
        (cluster.status()["queue"]["running"] == 1).then_some(())
    });
    chat.signal(Signal::SIGINT);
    tests::process::wait_for("the answer to be cancelled", MOMENT, || {
        (cluster.status()["queue"]["kv_blocks_used"] == 0).then_some(())
    });
    chat.say("/exit");
    assert!(chat.wait(MOMENT).success(), "{}", chat.log());
}

#[test]
fn chat_keeps_the_conversation() {
    let cluster = Cluster::start(bundled_store(), 1, 1);
    let arguments = [
        "chat",
        "--endpoint",
        cluster.grpc(),
        "--temperature",
        "0",
        "--max-tokens",
        "30",
        "--json",
    ];
    let output = run_with_input(&arguments, "Hello.\nTell me more.\n/reset\nHello.\n");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let answers: Vec<serde_json::Value> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(answers.len(), 3);
    let prompt_tokens = |index: usize| answers[index]["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(
        prompt_tokens(1)
            > prompt_tokens(0) + answers[0]["usage"]["completion_tokens"].as_u64().unwrap()
    );
    assert_eq!(answers[2]["tokens"], answers[0]["tokens"], "a new conversation starts afresh");
}

#[test]
fn generate_streams_plain_text_and_reads_standard_input() {
    let store = bundled_store();
    let store = store.to_str().unwrap();
    let request = ["generate", "--model", store, "--max-tokens", "16", "--temperature", "0"];
    let from = |more: &[&str], input: &str| {
        let arguments: Vec<&str> = request.iter().chain(more).copied().collect();
        run_with_input(&arguments, input)
    };
    let plain = from(&["Once upon a time,"], "");
    let piped = from(&["-"], "Once upon a time,");
    let json = json_of(&from(&["--json", "Once upon a time,"], ""));
    assert!(plain.status.success());
    assert_eq!(plain.stdout, piped.stdout);
    let text = String::from_utf8(plain.stdout).unwrap();
    assert_eq!(text.trim_end_matches('\n'), json["text"].as_str().unwrap().trim_end_matches('\n'));
    for field in ["tokens", "text", "finish_reason", "usage", "timings"] {
        assert!(!json[field].is_null(), "{field} in {json}");
    }
}

#[test]
fn one_process_gives_the_same_tokens_in_any_number_of_stages() {
    let store = bundled_store();
    let store = store.to_str().unwrap();
    let tokens = |stages: &str, kv_type: &str| {
        json_of(&run(&[
            "generate",
            "--model",
            store,
            "--stages",
            stages,
            "--kv-type",
            kv_type,
            "--max-tokens",
            "40",
            "--temperature",
            "0.8",
            "--seed",
            "3",
            "--json",
            "Tom and Lily went to the park.",
        ]))["tokens"]
            .clone()
    };
    for kv_type in ["f16", "f32"] {
        let one = tokens("1", kv_type);
        for stages in ["2", "3", "6"] {
            assert_eq!(tokens(stages, kv_type), one, "{stages} stages");
        }
    }
}

#[test]
fn completions_exist_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let output = run(&["completions", shell]);
        assert!(output.status.success() && output.stdout.len() > 1000, "{shell}");
    }
}

/// Checks the help of a command and of all below it, and returns their names.
fn check_help(command: &[String]) -> Vec<String> {
    let arguments: Vec<&str> = command.iter().map(String::as_str).chain(["--help"]).collect();
    let output = run(&arguments);
    let help = String::from_utf8_lossy(&output.stdout).into_owned();
    let name = command.join(" ");
    assert!(output.status.success(), "{name}: {help}");
    let about = help.lines().next().unwrap_or_default();
    assert!(about.split_whitespace().count() > 1 && !about.starts_with("Usage"), "{name}: {help}");
    let usage = format!("Usage: {}", format!("tercet {name}").trim_end());
    assert!(help.contains(&usage), "{name}: {help}");
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let listed = listed.take_while(|line| line.starts_with("  "));
    // Lines that go on with the text of the one above stand further in.
    let listed = listed.filter(|line| !line.starts_with("   "));
    let below: Vec<&str> = listed.filter_map(|line| line.split_whitespace().next()).collect();
    let mut names = vec![name];
    for below in below.into_iter().filter(|below| *below != "help") {
        let command: Vec<String> = command.iter().cloned().chain([below.to_owned()]).collect();
        names.extend(check_help(&command));
    }
    names
}

#[test]
fn every_command_explains_itself() {
    let names = check_help(&[]);
    for known in [
        "up",
        "coordinator",
        "worker",
        "generate",
        "chat",
        "status",
        "plan",
        "drain",
        "roll",
        "import",
        "model synth",
        "eval",
        "bench kernel",
        "bench pipeline",
        "debug logits",
        "completions",
    ] {
        assert!(names.iter().any(|name| name == known), "{known} is not in {names:?}");
    }
}

#[test]
fn a_configuration_can_be_checked_without_starting() {
    let folder = tempfile::TempDir::new().unwrap();
    let config = folder.path().join("tercet.toml");
    let store = bundled_store();
    let text = format!(
        "[worker]\nlisten = \"127.0.0.1:7421\"\nthreads = 2\nstore = {:?}\nmemory = \"1GiB\"\n",
        store.to_str().unwrap()
    );
    std::fs::write(&config, text).unwrap();
    let output =
        run(&["worker", "--config", config.to_str().unwrap(), "--threads", "1", "--check-config"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(shown.contains("threads = 1"), "a flag beats the file: {shown}");
    assert!(shown.contains("127.0.0.1:7421"), "{shown}");
}

#[test]
fn an_answer_that_takes_too_long_is_given_up() {
    let within = |time: &str, tokens: &str| {
        let limits = ["--timeout", time, "--max-tokens", tokens, "--ignore-eos"];
        run(&[&["generate", "Once upon"], &limits[..]].concat())
    };
    assert!(within("10m", "2").status.success());
    // Hundreds of tokens in the time of a few.
    let output = within("5ms", "480");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("the deadline of the request passed"), "{stderr}");
    assert_eq!(stderr.matches("error: ").count(), 1, "{stderr}");
}

#[test]
fn a_checkpoints_own_sampling_is_shown_and_what_answers_are_drawn_by() {
    let folder = tempfile::TempDir::new().unwrap();
    let (source, store) = (folder.path().join("checkpoint"), folder.path().join("store"));
    std::fs::create_dir(&source).unwrap();
    for (name, bytes) in model::bundled().files() {
        std::fs::write(source.join(name), bytes).unwrap();
    }
    let own = r#"{"temperature": 0.0, "top_k": 7, "max_new_tokens": 9, "eos_token_id": [1, 2]}"#;
    std::fs::write(source.join("generation_config.json"), own).unwrap();
    let (source, store) = (source.to_str().unwrap(), store.to_str().unwrap());
    let imported = run(&["import", source, store]);
    let said = String::from_utf8_lossy(&imported.stderr);
    assert!(imported.status.success(), "{said}");

    let shown = run(&["model", "show", store]);
    let shown = String::from_utf8_lossy(&shown.stdout);
    let line = shown.lines().find(|line| line.starts_with("sampling ")).unwrap_or_default();
    for word in ["temperature 0", "top_k 7", "max_new_tokens 9"] {
        assert!(line.contains(word), "{word} in {line:?} of {shown}");
    }
    let manifest = json_of(&run(&["model", "show", "--json", store]));
    assert_eq!(manifest["sampling"]["top_k"], 7);

    let tokens = |flags: &[&str]| {
        let request = ["generate", "--model", store, "--json", "--ignore-eos", "Once upon a time,"];
        json_of(&run(&[&request, flags].concat()))["tokens"].as_array().unwrap().clone()
    };
    let own = tokens(&[]);
    assert_eq!(own.len(), 9, "max_new_tokens");
    let greedy = ["--temperature", "0", "--top-k", "0", "--max-tokens", "12"];
    assert_eq!(own, tokens(&greedy)[..9], "the model's temperature");
    let drawn = ["--temperature", "2", "--top-k", "0", "--seed", "1", "--max-tokens", "12"];
    assert_ne!(own, tokens(&drawn)[..9], "a flag goes over the model's own");
}
