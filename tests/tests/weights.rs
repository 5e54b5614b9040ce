//! Stores that are damaged under real workers: no token that a client hears was computed with other
//! weights than those of the manifest.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tests::cluster::Cluster;
use tests::model::bundled_store;
use tests::process::Process;

/// How long a worker may take to leave, and the cluster to serve without it: a lease, and a margin.
const SETTLE: Duration = Duration::from_secs(30);

/// Tokens of an answer: so many that it is not over when the store is damaged after the first.
const TOKENS: usize = 400;

/// Tokens that a client has heard when a store is damaged.
const BEFORE: usize = 8;

/// An answer that is being streamed: every token as the API tells it, with the bits of its probability.
struct Stream {
    lines: BufReader<TcpStream>,
    tokens: Vec<Value>,
    /// What the client was told in place of the rest.
    error: Option<String>,
}

impl Stream {
    fn begin(cluster: &Cluster) -> Self {
        let body = json!({
            "prompt": "Once upon a time", "max_tokens": TOKENS, "temperature": 0.9, "seed": 11,
            "ignore_eos": true, "stream": true, "logprobs": 1,
        });
        let body = body.to_string();
        let address = cluster.http();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(SETTLE)).unwrap();
        // Of HTTP/1.0, so that nothing stands between the lines.
        write!(
            stream,
            "POST /v1/completions HTTP/1.0\r\nhost: {address}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        Self { lines: BufReader::new(stream), tokens: Vec::new(), error: None }
    }

    /// Reads until there are `count` tokens, or the end.
    fn read(&mut self, count: usize) {
        let mut line = String::new();
        while self.tokens.len() < count && self.lines.read_line(&mut line).unwrap() > 0 {
            let event = line.strip_prefix("data: ").filter(|text| text.starts_with('{'));
            if let Some(event) = event.map(|text| serde_json::from_str::<Value>(text).unwrap()) {
                if let Some(message) = event["error"]["message"].as_str() {
                    self.error = Some(message.into());
                }
                let logprobs = &event["choices"][0]["logprobs"];
                let texts = logprobs["tokens"].as_array().into_iter().flatten();
                let values = logprobs["token_logprobs"].as_array().into_iter().flatten();
                self.tokens.extend(texts.zip(values).map(|(text, value)| json!([text, value])));
            }
            line.clear();
        }
    }

    fn read_all(mut self) -> (Vec<Value>, Option<String>) {
        self.read(usize::MAX);
        (self.tokens, self.error)
    }
}

/// A cluster of two stages whose workers have a store each.
struct Hall {
    folder: TempDir,
    cluster: Cluster,
    /// Those that were started later.
    spares: Vec<(String, Process)>,
    expected: Vec<Value>,
}

impl Hall {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let stores = ["worker-0", "worker-1"].map(|id| copy_of_store(folder.path(), id));
        let cluster = Cluster::start_on(bundled_store(), &stores, "--stages 2", &[]);
        let (expected, error) = Stream::begin(&cluster).read_all();
        assert_eq!((expected.len(), error), (TOKENS, None));
        Self { folder, cluster, spares: Vec::new(), expected }
    }

    /// The worker that draws the tokens, and the shard of its last layer.
    fn last_stage(&self) -> (String, PathBuf) {
        let status = self.cluster.status();
        let stage = &status["plan"]["pipelines"][0]["stages"][1];
        let id = stage["worker"].as_str().unwrap();
        let end = stage["layers"]["end"].as_u64().or_else(|| stage["layers"][1].as_u64());
        let last = end.unwrap_or_else(|| panic!("no layers in {stage}")) - 1;
        (id.into(), self.folder.path().join(id).join(format!("layer-{last:04}.safetensors")))
    }

    fn worker(&mut self, id: &str) -> &mut Process {
        match self.spares.iter().position(|(known, _)| known == id) {
            Some(at) => &mut self.spares[at].1,
            None => self.cluster.worker(id.strip_prefix("worker-").unwrap().parse().unwrap()),
        }
    }

    /// Damages the shard of the last stage in the middle of an answer. The worker names the file and
    /// leaves; with another on a whole store the answer goes on, and is what it would have been.
    fn check_damage(&mut self, what: &str, damage: impl FnOnce(&Path)) {
        let (id, shard) = self.last_stage();
        let mut answer = Stream::begin(&self.cluster);
        answer.read(BEFORE);
        damage(&shard);

        let worker = self.worker(&id);
        assert_eq!(worker.wait(SETTLE).code(), Some(1), "{what}: {}", worker.log());
        let name = shard.file_name().unwrap().to_str().unwrap();
        let log = worker.log();
        assert!(log.contains("ERROR") || log.contains("error: "), "{what}: {log}");
        assert!(log.contains(name), "{what}: {log}");

        let spare = format!("spare-{}", self.spares.len());
        let store = copy_of_store(self.folder.path(), &spare);
        self.spares.push((spare.clone(), self.cluster.start_worker_on(&spare, &store)));
        assert_eq!(answer.read_all(), (self.expected.clone(), None), "{what}");
    }
}

/// A copy of the bundled model's store.
fn copy_of_store(folder: &Path, name: &str) -> PathBuf {
    let copy = folder.join(name);
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(bundled_store()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    copy
}

/// Turns one bit in the last quarter of a file.
fn flip(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let at = file.metadata().unwrap().len() / 4 * 3;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

#[test]
fn whatever_becomes_of_a_store_that_serves_no_wrong_token_is_heard() {
    let mut hall = Hall::start();

    // A store that is replaced by renaming is nothing to those that have it open.
    let (id, shard) = hall.last_stage();
    let mut answer = Stream::begin(&hall.cluster);
    answer.read(BEFORE);
    let (store, aside) = (hall.folder.path().join(&id), hall.folder.path().join("aside"));
    let other = copy_of_store(hall.folder.path(), "other");
    flip(&other.join(shard.file_name().unwrap()));
    fs::rename(&store, &aside).unwrap();
    fs::rename(&other, &store).unwrap();
    assert_eq!(answer.read_all(), (hall.expected.clone(), None));
    fs::remove_dir_all(&store).unwrap();
    fs::rename(&aside, &store).unwrap();

    hall.check_damage("a bit turns", flip);
    hall.check_damage("the file is cut short", |shard| {
        File::options().write(true).open(shard).unwrap().set_len(5000).unwrap();
    });
    hall.check_damage("the file is written anew", |shard| {
        let mut bytes = fs::read(shard).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(shard, bytes).unwrap();
    });

    // And one that was damaged before never serves.
    let (_, shard) = hall.last_stage();
    let store = copy_of_store(hall.folder.path(), "damaged");
    let name = shard.file_name().unwrap().to_str().unwrap();
    flip(&store.join(name));
    let mut damaged = hall.cluster.start_worker_on("damaged", &store);
    assert_eq!(damaged.wait(SETTLE).code(), Some(1), "{}", damaged.log());
    assert!(damaged.log().contains(&format!("{name} has hash")), "{}", damaged.log());
    assert_eq!(hall.cluster.state_of("damaged"), None);
}
