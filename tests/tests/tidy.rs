//! The invariants of ARCHITECTURE.md that can be read off the sources: arrows between rooms, one
//! home for each heavy dependency, purity of the pure modules, where generated types and `unsafe`
//! may stand, and that every file says what it is.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Room, its folder, the rooms it may depend on (the table of rooms in ARCHITECTURE.md).
const ARROWS: [(&str, &str, &[&str]); 9] = [
    ("kernels", "kernels", &[]),
    ("model", "model", &["kernels"]),
    ("proto", "proto", &[]),
    ("node", "node", &[]),
    ("coordinator", "coordinator", &["model", "node", "proto"]),
    ("worker", "worker", &["kernels", "model", "node", "proto"]),
    ("client", "client", &["node", "proto"]),
    ("tercet", ".", &["client", "coordinator", "kernels", "model", "node", "proto", "worker"]),
    (
        "tests",
        "tests",
        &["client", "coordinator", "kernels", "model", "node", "proto", "tercet", "worker"],
    ),
];

/// Dependency, the rooms whose shipped code may name it. `tests` may use everything.
const HOMES: [(&str, &[&str]); 14] = [
    ("etcd-client", &["node"]),
    ("opentelemetry", &["node"]),
    ("opentelemetry_sdk", &["node"]),
    ("opentelemetry-otlp", &["node"]),
    ("tracing-opentelemetry", &["node"]),
    ("tracing-subscriber", &["node"]),
    ("metrics-exporter-prometheus", &["node"]),
    ("memmap2", &["model"]),
    ("rayon", &["worker"]),
    ("tokenizers", &["coordinator"]),
    ("fancy-regex", &["coordinator"]),
    ("axum", &["coordinator", "node"]),
    ("hyper-util", &["node"]),
    ("tonic", &["client", "coordinator", "node", "proto", "worker"]),
];

/// Modules that decide or compute and touch nothing else.
const PURE: [&str; 7] = [
    "coordinator/src/planner",
    "coordinator/src/cluster",
    "coordinator/src/router",
    "coordinator/src/scheduler",
    "coordinator/src/token_log",
    "worker/src/engine",
    "worker/src/session",
];

/// What a pure module may not name.
const IMPURE: [&str; 11] = [
    "tokio",
    "tonic",
    "etcd",
    "std::net",
    "std::fs",
    "std::env",
    "Instant::now",
    "SystemTime",
    "rand::",
    "tracing::",
    "async fn",
];

/// Where types generated from the schema may stand.
const WIRE_FILES: [&str; 5] = ["proto/src", "proto/fuzz", "grpc.rs", "link.rs", "workers.rs"];

/// Where `unsafe` may stand.
const UNSAFE_PLACES: [&str; 3] = ["kernels/src", "model/src", "worker/src/engine/shared.rs"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Every Rust file of the repository: path below the root with `/`, and text.
fn sources() -> Vec<(String, String)> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if !name.starts_with('.') && name != "target" {
                    walk(&path, found);
                }
            } else if name.ends_with(".rs") {
                found.push(path);
            }
        }
    }
    let root = root();
    let mut paths = Vec::new();
    walk(&root, &mut paths);
    paths.sort();
    assert!(paths.len() > 20, "the walk must find the sources");
    let below_root = |path: &Path| path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
    paths.iter().map(|path| (below_root(path), fs::read_to_string(path).unwrap())).collect()
}

fn manifest(folder: &str) -> toml::Table {
    fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap().parse().unwrap()
}

fn dependencies(manifest: &toml::Table, section: &str) -> BTreeSet<String> {
    let table = manifest.get(section).and_then(toml::Value::as_table);
    table.map(|table| table.keys().cloned().collect()).unwrap_or_default()
}

/// The code of a file without comments and without its tests.
fn shipped_code(text: &str) -> String {
    let before_tests = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let is_code = |line: &&str| !line.trim_start().starts_with("//");
    before_tests.lines().filter(is_code).collect::<Vec<_>>().join("\n")
}

fn is_test(path: &str) -> bool {
    path.starts_with("tests/") || path.contains("/tests/") || path.ends_with("/tests.rs")
}

#[test]
fn rooms_use_only_the_rooms_they_may() {
    let rooms: BTreeSet<&str> = ARROWS.iter().map(|(room, ..)| *room).collect();
    for (room, folder, allowed) in ARROWS {
        let manifest = manifest(folder);
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            for dependency in dependencies(&manifest, section) {
                let is_room = rooms.contains(dependency.as_str());
                let is_allowed = allowed.contains(&dependency.as_str());
                assert!(!is_room || is_allowed, "{room} may not use {dependency} ({section})");
            }
        }
    }
}

#[test]
fn heavy_dependencies_have_one_home() {
    for (room, folder, _) in ARROWS.iter().filter(|(room, ..)| *room != "tests") {
        let used = dependencies(&manifest(folder), "dependencies");
        for (dependency, homes) in HOMES {
            let is_home = homes.contains(room);
            assert!(is_home || !used.contains(dependency), "{dependency} has no home in {room}");
        }
    }
    let kernels = dependencies(&manifest("kernels"), "dependencies");
    assert!(kernels.is_empty(), "kernels depend on nothing, found {kernels:?}");
    let model = dependencies(&manifest("model"), "dependencies");
    for network in ["tokio", "tonic", "futures", "axum"] {
        assert!(!model.contains(network), "model does no network and no async, found {network}");
    }
}

#[test]
fn versions_stand_in_one_table() {
    for (room, folder, _) in ARROWS {
        let manifest = manifest(folder);
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(table) = manifest.get(section).and_then(toml::Value::as_table) else {
                continue;
            };
            for (name, value) in table {
                let inherits = value.get("workspace").and_then(toml::Value::as_bool);
                assert_eq!(inherits, Some(true), "{room}: {name} must say `workspace = true`");
            }
        }
    }
}

#[test]
fn pure_modules_touch_nothing() {
    let mut seen = BTreeSet::new();
    for (path, text) in sources().into_iter().filter(|(path, _)| !is_test(path)) {
        let Some(module) = PURE.iter().find(|module| {
            path.strip_prefix(**module).is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
        }) else {
            continue;
        };
        seen.insert(*module);
        let code = shipped_code(&text);
        for word in IMPURE {
            assert!(!code.contains(word), "{path} is pure and may not name {word}");
        }
    }
    assert_eq!(seen.len(), PURE.len(), "every pure module exists, found {seen:?}");
}

#[test]
fn the_client_knows_no_membership() {
    for (path, text) in sources().iter().filter(|(path, _)| path.starts_with("client/src")) {
        assert!(!shipped_code(text).contains("membership"), "{path} names the membership");
    }
}

#[test]
fn generated_types_stay_at_the_door() {
    for (path, text) in sources().iter().filter(|(path, _)| !is_test(path)) {
        let may = WIRE_FILES.iter().any(|place| path.starts_with(place) || path.ends_with(place));
        let code = shipped_code(text);
        let names_them = code.contains("proto::pb") || code.contains(" pb::");
        assert!(may || !names_them, "{path} names types generated from the schema");
    }
}

#[test]
fn every_metric_is_in_its_page() {
    let page = fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    let mut found = 0;
    for (path, text) in sources().iter().filter(|(path, _)| !is_test(path)) {
        for name in shipped_code(text).split('"').filter(|text| {
            let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            text.starts_with("tercet_") && text.chars().all(is_name)
        }) {
            found += 1;
            assert!(page.contains(&format!("`{name}`")), "{name} of {path} is not documented");
        }
    }
    assert!(found > 50, "only {found} names were found");
}

#[test]
fn unsafe_stands_where_it_may() {
    for (path, text) in sources().iter().filter(|(path, _)| !is_test(path)) {
        let may = UNSAFE_PLACES.iter().any(|place| path.starts_with(place));
        let code = shipped_code(text);
        let uses_it =
            ["unsafe {", "unsafe fn", "unsafe impl"].iter().any(|word| code.contains(word));
        assert!(may || !uses_it, "{path} uses unsafe");
    }
}

/// A server of a library's own has none of the deadlines and bounds of `node::serve`.
#[test]
fn connections_are_taken_in_one_place() {
    let mut places = 0;
    for (path, text) in sources().into_iter().filter(|(path, _)| !is_test(path)) {
        let code = shipped_code(&text);
        for call in [".accept()", "axum::serve", "serve_with_incoming", "serve_with_shutdown"] {
            let is_there = code.contains(call);
            places += usize::from(is_there);
            assert!(!is_there || path == "node/src/serve.rs", "{path} has {call}");
        }
    }
    assert_eq!(places, 1, "the accept loop of node::serve");
}

/// A chain of errors says each in turn: one whose words hold its source's says them twice.
#[test]
fn errors_do_not_repeat_their_sources() {
    let mut errors = 0;
    for (path, text) in sources() {
        let code = shipped_code(&text);
        for (at, _) in code.match_indices("#[error(") {
            errors += 1;
            let (words, item) = code[at..].split_once(")]").unwrap();
            let item = item.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
            let holds_it = words.contains("{source")
                || words.contains("{0") && (item.contains("#[from]") || item.contains("#[source]"));
            assert!(!holds_it, "{path}: {words}");
        }
    }
    assert!(errors > 100, "{errors} errors were looked at");
}

/// A text that goes on in the next line and lost its `\\` has the indentation in its middle.
#[test]
fn errors_have_no_holes() {
    let mut texts = 0;
    for (path, text) in sources().into_iter().filter(|(path, _)| !is_test(path)) {
        let code = shipped_code(&text).replace("\\\"", "'");
        for (at, _) in code.match_indices("#[error(") {
            let words = code[at..].split_once(")]").unwrap().0;
            let joined: String = words.split("\\\n").map(str::trim_start).collect();
            for said in joined.split('"').skip(1).step_by(2) {
                texts += 1;
                assert!(!said.contains("  ") && !said.contains('\n'), "{path}: {said:?}");
            }
        }
    }
    assert!(texts > 100, "{texts} texts were looked at");
}

#[test]
fn every_file_says_what_it_is() {
    for (path, text) in sources() {
        assert!(text.starts_with("//!"), "{path} must open with a line of //!");
        for (line, content) in text.lines().enumerate() {
            assert!(content.trim_end() == content, "{path}:{} ends in a space", line + 1);
        }
        assert!(!path.ends_with("mod.rs"), "{path}: write foo.rs beside foo/");
    }
}

/// The name by which a heading is linked to: its letters and digits in lower case, dashes for blanks.
fn anchor(heading: &str) -> String {
    let kept =
        heading.trim().chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}

/// Links to files and to their headings, in every page of the root and of `docs/` and `model/`.
#[test]
fn links_lead_somewhere() {
    let root = root();
    let mut links = 0;
    for folder in [".", "docs", "model/training"] {
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            let page = entry.unwrap().path();
            if page.extension().is_none_or(|extension| extension != "md") {
                continue;
            }
            let text = fs::read_to_string(&page).unwrap();
            for link in text.split("](").skip(1) {
                let link = link.split(')').next().unwrap();
                let (target, heading) = link.split_once('#').unwrap_or((link, ""));
                if target.contains("://") {
                    continue;
                }
                let path = match target {
                    "" => page.clone(),
                    _ => page.parent().unwrap().join(target),
                };
                assert!(path.exists(), "{} links to {target}, which is not there", page.display());
                if !heading.is_empty() {
                    let text = fs::read_to_string(&path).unwrap();
                    let headings = text.lines().filter(|line| line.starts_with('#'));
                    let mut anchors = headings.map(|line| anchor(line.trim_start_matches('#')));
                    let found = anchors.any(|anchor| anchor == heading);
                    assert!(found, "{} links to {link}, which has no such heading", page.display());
                }
                links += 1;
            }
        }
    }
    assert!(links > 10, "the pages link to one another");
}

#[test]
fn nothing_is_left_for_later() {
    for (path, text) in sources().iter().filter(|(path, _)| path != "tests/tests/tidy.rs") {
        for word in ["todo!(", "unimplemented!(", "FIXME", "#[ignore"] {
            assert!(!text.contains(word), "{path} holds {word}");
        }
    }
}
