//! No step that was computed with other weights than those of the manifest ever leaves a worker; and
//! what becomes of engines whose caller went away, or that are retired.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use model::{SynthShape, synth};
use proto::ids::StepId;
use proto::step::{Prepare, RowValue, StepResult};
use tempfile::TempDir;
use tokio::sync::mpsc;

use super::harness::{KEY, Steps, Worker, prepare, row, soon, step, store_dir};
use super::lifecycle::{Process, config};
use crate::bridge::EngineFailure;
use crate::engine::{Placement, WeightMemory};
use crate::{Config, RunError};
use proto::step::{Output, SamplingParameters};

/// A copy of the store of all tests, to be changed; and its final norm, which fits one page: a file that
/// is cut short inside a page shows zeros and raises no signal.
fn own_store() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(store_dir()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let norm = dir.path().join("norm.safetensors");
    assert!(fs::metadata(&norm).unwrap().len() < 4096);
    (dir, norm)
}

/// A worker alone in its pipeline, on a store of its own.
struct Serving {
    _dir: TempDir,
    norm: PathBuf,
    worker: Worker,
    failed: mpsc::Receiver<EngineFailure>,
    prepare: Prepare,
    steps: Steps,
    results: super::harness::Results,
    number: u64,
}

impl Serving {
    async fn start() -> Self {
        let (dir, norm) = own_store();
        let store = model::Store::open(dir.path()).unwrap();
        let (mut worker, failed) = Worker::start_on("w", "127.0.0.1:0", 1 << 30, store).await;
        let prepare = worker.serve_alone(1).await;
        let results = worker.results(&prepare, 0).await;
        let steps = worker.steps().await;
        Self { _dir: dir, norm, worker, failed, prepare, steps, results, number: 0 }
    }

    async fn give(&mut self) {
        self.number += 1;
        let sampled = Output::Sample(Box::<SamplingParameters>::default());
        // The same one each time, from its beginning.
        let step = step(&self.prepare, self.number, vec![row(0, 0, 7, sampled)]);
        self.steps.give(&step).await;
    }

    async fn token(&mut self) -> u32 {
        self.give().await;
        token_of(&self.results.next().await)
    }

    /// A step that was given gives nothing, and why.
    async fn refuses(mut self) -> String {
        self.give().await;
        let failure = soon(self.failed.recv()).await.unwrap();
        let more = tokio::time::timeout(std::time::Duration::from_millis(50), self.results.next());
        assert!(more.await.is_err(), "a result left");
        self.worker.kill().await;
        node::Chain(&failure).to_string()
    }

    fn writer(&self) -> File {
        File::options().read(true).write(true).open(&self.norm).unwrap()
    }
}

fn token_of(result: &StepResult) -> u32 {
    match &result.rows[0].value {
        RowValue::Sampled(sampled) => sampled.token,
        other => panic!("{other:?}"),
    }
}

/// Exchanges the last floats of the norm for some of another size.
fn spoil(file: &File) {
    let bytes = file.metadata().unwrap().len();
    let floats: Vec<u8> = (0..16).flat_map(|i: u8| f32::from(i).to_le_bytes()).collect();
    file.write_all_at(&floats, bytes - floats.len() as u64).unwrap();
}

#[tokio::test]
async fn a_file_that_is_written_to_while_it_serves_gives_no_token() {
    let mut serving = Serving::start().await;
    serving.token().await;
    spoil(&serving.writer());
    let text = serving.refuses().await;
    assert!(text.contains("the weights of a stage were changed while it served"), "{text}");
    assert!(text.contains("norm.safetensors has hash"), "{text}");
}

#[tokio::test]
async fn a_file_that_is_cut_short_inside_a_page_gives_no_token() {
    let mut serving = Serving::start().await;
    serving.token().await;
    serving.writer().set_len(100).unwrap();
    let text = serving.refuses().await;
    assert!(text.contains("norm.safetensors has 100 bytes, the manifest says"), "{text}");
}

#[tokio::test]
async fn a_file_that_is_copied_over_gives_no_token() {
    let mut serving = Serving::start().await;
    serving.token().await;
    let mut bytes = fs::read(&serving.norm).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 0x20;
    let modified = fs::metadata(&serving.norm).unwrap().modified().unwrap();
    fs::write(&serving.norm, bytes).unwrap();
    // As `cp -p` and `rsync --times` do.
    serving.writer().set_modified(modified).unwrap();
    let text = serving.refuses().await;
    assert!(text.contains("norm.safetensors has hash"), "{text}");
}

#[tokio::test]
async fn a_store_that_is_replaced_by_renaming_serves_on_with_what_it_had() {
    let mut serving = Serving::start().await;
    let token = serving.token().await;
    // What is put in its place is of no concern.
    let other = serving.norm.with_extension("new");
    fs::copy(&serving.norm, &other).unwrap();
    spoil(&File::options().write(true).open(&other).unwrap());
    fs::rename(&other, &serving.norm).unwrap();
    assert_eq!(serving.token().await, token);
    // Nor is a file that is gone, has other rights, or was written to and put back.
    let layer = serving.norm.with_file_name("layer-0002.safetensors");
    let writer = File::options().read(true).write(true).open(&layer).unwrap();
    let mut byte = [0];
    writer.read_exact_at(&mut byte, 3000).unwrap();
    writer.write_all_at(&[!byte[0]], 3000).unwrap();
    writer.write_all_at(&byte, 3000).unwrap();
    assert_eq!(serving.token().await, token);
    fs::remove_file(&layer).unwrap();
    assert_eq!(serving.token().await, token);
    assert!(serving.failed.try_recv().is_err());
    serving.worker.kill().await;
}

fn turn_a_bit(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 4000).unwrap();
    file.write_all_at(&[byte[0] ^ 4], 4000).unwrap();
}

#[tokio::test]
async fn a_worker_does_not_start_on_a_store_with_a_wrong_bit() {
    let (dir, _) = own_store();
    turn_a_bit(&dir.path().join("layer-0001.safetensors"));
    let config = Config { store: dir.path().to_owned(), ..config() };
    let (keys, registry) = (proto::keys::Keys::new("test"), node::membership::Memory::new());
    let stop = tokio_util::sync::CancellationToken::new();
    let run = crate::run(config, keys, std::sync::Arc::new(registry), None, stop);
    let error = soon(run).await.unwrap_err();
    assert!(matches!(error, RunError::Store(_)), "{error}");
    let text = node::Chain(&error).to_string();
    assert!(text.contains("layer-0001.safetensors has hash"), "{text}");
}

/// A store of random weights of its own.
fn synthetic(shape: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let shape: SynthShape = shape.parse().unwrap();
    synth(&shape, 7, &path, &mut |_| {}).unwrap();
    (dir, path)
}

fn first_layers(
    process: &Process,
    record: &proto::plan::WorkerRecord,
    end: u32,
    epoch: u64,
) -> Prepare {
    let own = proto::plan::StagePlan {
        worker: record.id.clone(),
        incarnation: record.incarnation,
        address: record.address.clone(),
        layers: 0..end,
    };
    // Not a worker that is there: nothing is sent.
    let next = proto::plan::StagePlan { worker: "next".into(), layers: end..6, ..own.clone() };
    let term = proto::ids::Term(process.leadership.term);
    Prepare { term, model: record.models[0].id, ..prepare(&[own, next], 0, epoch) }
}

#[tokio::test]
async fn a_wrong_bit_in_a_layer_that_a_start_does_not_read_ends_the_worker_that_is_to_serve_it() {
    // More layers than a start measures.
    let (_dir, store) = synthetic("6x64x128x4x2x256");
    turn_a_bit(&store.join("layer-0001.safetensors"));
    let mut process = Process::start(Config { store, ..config() }).await;
    let record = process.record().await;
    let mut client = super::harness::connect(&record.address).await;
    // What it reads for this stage is whole.
    let request = proto::convert::encode_prepare(&first_layers(&process, &record, 1, 1));
    soon(client.prepare(KEY.attach(request))).await.unwrap();
    let request = proto::convert::encode_prepare(&first_layers(&process, &record, 2, 2));
    let refusal = soon(client.prepare(KEY.attach(request))).await.unwrap_err();
    assert!(refusal.message().contains("layer-0001.safetensors has hash"), "{refusal}");
    let error = process.end().await.unwrap_err();
    let text = node::Chain(&error).to_string();
    assert!(text.contains("layer-0001.safetensors has hash"), "{text}");
}

#[tokio::test]
async fn a_stage_of_a_store_that_was_damaged_meanwhile_ends_the_worker() {
    let (dir, norm) = own_store();
    let store = model::Store::open(dir.path()).unwrap();
    store.verify_files(|_| {}).unwrap();
    let (mut worker, mut failed) = Worker::start_on("w", "127.0.0.1:0", 1 << 30, store).await;
    spoil(&File::options().write(true).open(&norm).unwrap());
    let request = prepare(&[worker.plan(0..4)], 0, 1);
    let refusal = worker.prepare(&request).await.unwrap_err();
    assert!(refusal.message().contains("norm.safetensors has hash"), "{refusal}");
    assert!(refusal.message().contains("this worker ends"), "{refusal}");
    let text = node::Chain(&soon(failed.recv()).await.unwrap()).to_string();
    assert!(text.contains("norm.safetensors has hash"), "{text}");
    worker.kill().await;
}

/// A whole worker that holds a stage, and no step comes.
async fn ends_idle(weights: WeightMemory, change: impl FnOnce(&Path)) -> String {
    let (dir, norm) = own_store();
    let store = dir.path().to_owned();
    let mut process = Process::start(Config { store, weights, ..config() }).await;
    let record = process.record().await;
    let mut client = super::harness::connect(&record.address).await;
    let plan = proto::plan::StagePlan {
        worker: record.id.clone(),
        incarnation: record.incarnation,
        address: record.address.clone(),
        layers: 0..4,
    };
    let prepare =
        Prepare { term: proto::ids::Term(process.leadership.term), ..prepare(&[plan], 0, 1) };
    let request = KEY.attach(proto::convert::encode_prepare(&prepare));
    soon(client.prepare(request)).await.unwrap();
    change(&norm);
    let draining = process.record().await;
    assert!(draining.draining, "it leaves the registry");
    let error = process.end().await.unwrap_err();
    node::Chain(&error).to_string()
}

#[tokio::test]
async fn an_idle_worker_whose_store_is_changed_says_so_and_leaves() {
    let text = ends_idle(WeightMemory::Map, |norm| {
        spoil(&File::options().write(true).open(norm).unwrap());
    });
    let text = text.await;
    assert!(text.contains("norm.safetensors has hash"), "{text}");
}

#[test]
fn a_copy_serves_on_whatever_becomes_of_the_file() {
    let (dir, norm) = own_store();
    let store = model::Store::open(dir.path()).unwrap();
    let placement = Placement { weights: WeightMemory::Copy, ..Placement::default() };
    let config = crate::engine::EngineConfig {
        backend: kernels::Backend::detect(),
        threads: 1,
        kv_type: proto::plan::KvType::F16,
        kv_blocks: 2,
        max_step_tokens: 8,
        shortcuts: crate::engine::Shortcuts::default(),
        placement,
    };
    let model = crate::engine::StageModel::open(&store, 0..4).unwrap();
    let mut engine = crate::engine::Engine::new(model, config).unwrap();
    let rows = [row(0, 0, 7, Output::Logits)];
    let before = engine.forward_verified(&rows, &[]).unwrap();
    spoil(&File::options().write(true).open(&norm).unwrap());
    File::options().write(true).open(&norm).unwrap().set_len(50).unwrap();
    assert_eq!(engine.forward_verified(&rows, &[]).unwrap(), before);
}

/// Asks until memory is taken for another engine, and gives up.
async fn give_up_while_it_builds(worker: &Worker, prepare: &Prepare) {
    let before = worker.service.used_bytes();
    let mut call = Box::pin(worker.service.prepare(prepare.clone(), Some(KEY).into()));
    soon(async {
        while worker.service.used_bytes() == before {
            assert!(futures::poll!(&mut call).is_pending(), "it was prepared at once");
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_preparation_that_is_given_up_is_taken_up_again() {
    // Large enough that it is not built in a moment.
    let (_dir, path) = synthetic("4x512x1024x4x2x256");
    let store = model::Store::open(&path).unwrap();
    let model = proto::ids::ModelId(store.id().0);
    let (mut worker, _failed) = Worker::start_on("w", "127.0.0.1:0", 1 << 30, store).await;
    let request = Prepare { model, ..prepare(&[worker.plan(0..4)], 0, 1) };
    give_up_while_it_builds(&worker, &request).await;
    let begun = worker.service.build_in_progress().await.unwrap();
    let used = worker.service.used_bytes();
    // The coordinator tries again, and again.
    for _ in 0..3 {
        let mut call = Box::pin(worker.service.prepare(request.clone(), Some(KEY).into()));
        assert!(futures::poll!(&mut call).is_pending());
        drop(call);
        assert_eq!(worker.service.used_bytes(), used, "one engine, not one for each try");
    }
    let now = worker.service.build_in_progress().await;
    assert!(now.is_none_or(|now| now == begun));
    soon(worker.service.prepare(request.clone(), Some(KEY).into())).await.unwrap();
    assert_eq!(worker.service.used_bytes(), used);

    // One that nobody comes back for goes when the stage goes.
    worker.activate(&request).await.unwrap();
    let other = Prepare { model, kv_blocks: 8, ..prepare(&[worker.plan(0..4)], 0, 2) };
    give_up_while_it_builds(&worker, &other).await;
    soon(async {
        while !worker.service.build_is_done().await {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(worker.service.used_bytes() > used, "it is kept for whoever asks again");
    worker.retire(&request).await.unwrap();
    soon(worker.service.memory_is_free()).await;
    worker.kill().await;
}

#[tokio::test]
async fn an_engine_that_is_built_after_its_epoch_ended_goes_without_another_call() {
    let (_dir, path) = synthetic("4x512x1024x4x2x256");
    let store = model::Store::open(&path).unwrap();
    let model = proto::ids::ModelId(store.id().0);
    let (mut worker, _failed) = Worker::start_on("w", "127.0.0.1:0", 1 << 30, store).await;
    let request = Prepare { model, ..prepare(&[worker.plan(0..4)], 0, 1) };
    give_up_while_it_builds(&worker, &request).await;
    // While it is being built, or a moment after: nothing else will be asked of this worker.
    worker.retire(&request).await.unwrap();
    let (failures, _) = mpsc::channel(1);
    let stop = tokio_util::sync::CancellationToken::new();
    let looking = crate::weights::look_after(worker.service.clone(), failures, stop);
    tokio::select! {
        () = soon(worker.service.memory_is_free()) => {}
        ended = looking => panic!("{ended:?}"),
    }
    worker.kill().await;
}

#[tokio::test]
async fn memory_of_a_retired_engine_is_counted_until_it_is_free() {
    let mut worker = Worker::start("w").await;
    let first = worker.serve_alone(1).await;
    let one = worker.service.used_bytes();
    assert!(one > 0);
    // Somebody reads results, and does not look at them for a long time.
    let reader = worker.service.results(
        first.pipeline,
        first.epoch,
        first.term,
        first.dst_incarnation,
        StepId(0),
        Some(KEY),
    );
    let reader = reader.unwrap();
    worker.retire(&first).await.unwrap();
    soon(worker.service.memory_is_free()).await;
    drop(reader);

    // An epoch that shares an engine with the one before counts once.
    worker.serve_alone(2).await;
    worker.serve_alone(3).await;
    assert_eq!(worker.service.used_bytes(), one);
}
