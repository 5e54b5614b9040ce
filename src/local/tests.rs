//! The parts' configurations, and a cluster of a random model.

use client::generate::Completion;
use proto::generate::{GenerateRequest, Prompt};

use super::*;

#[test]
fn the_configurations_are_valid_and_share_the_machine() {
    let options = LocalOptions::new("store").with_workers(3);
    options.coordinator().validate().unwrap();
    let workers: Vec<_> = (0..3).map(|index| options.worker(index)).collect();
    let mut ids = BTreeSet::new();
    for config in &workers {
        config.validate().unwrap();
        assert!(config.memory_bytes <= worker::Config::default().memory_bytes / 3);
        assert!(ids.insert(config.id.clone()));
    }
    assert_eq!(options.threads, threads_each(3));
    assert!(threads_each(10_000) == 1);
}

fn synthetic(dir: &tempfile::TempDir) -> PathBuf {
    let path = dir.path().join("store");
    model::synth(&"3x64x128x2x1x96".parse().unwrap(), 5, &path, &mut |_| {}).unwrap();
    path
}

async fn tokens(options: &LocalOptions) -> Vec<u32> {
    let cluster = LocalCluster::start(options).await.unwrap();
    let client = cluster.client().await.unwrap();
    let request = GenerateRequest {
        prompt: Prompt::Tokens(vec![1, 2, 3]),
        max_tokens: 40,
        seed: Some(4),
        ..GenerateRequest::default()
    };
    let answer = client.generate(request).await.unwrap();
    let completion = Completion::collect(answer, false).await.unwrap();
    let stages: usize =
        client.status().await.unwrap().plan.pipelines.iter().map(|p| p.stages.len()).sum();
    assert_eq!(Some(stages as u32), options.stages);
    cluster.stop().await.unwrap();
    completion.tokens
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_process_answers_the_same_through_any_number_of_stages() {
    let dir = tempfile::tempdir().unwrap();
    let one = LocalOptions {
        stages: Some(1),
        threads: 1,
        kv_blocks: Some(8),
        ..LocalOptions::new(synthetic(&dir))
    };
    let want = tokens(&one).await;
    assert_eq!(want.len(), 40);
    let three = LocalOptions { workers: 3, stages: Some(3), ..one };
    assert_eq!(tokens(&three).await, want);
}

#[tokio::test]
async fn what_cannot_start_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let store = synthetic(&dir);
    let taken = std::net::TcpListener::bind(ANY_PORT).unwrap();
    let address = taken.local_addr().unwrap();
    let occupied = LocalOptions { http: address, threads: 1, ..LocalOptions::new(&store) };
    let error = LocalCluster::start(&occupied).await.unwrap_err();
    let text = node::Chain(&error).to_string();
    assert!(text.contains(&address.to_string()) && !error.is_config(), "{text}");

    let open = LocalOptions { http: "0.0.0.0:0".parse().unwrap(), ..occupied };
    assert!(LocalCluster::start(&open).await.unwrap_err().is_config());

    let nowhere = LocalOptions { threads: 1, ..LocalOptions::new(dir.path().join("none")) };
    let error = LocalCluster::start(&nowhere).await.unwrap_err();
    assert!(matches!(error, LocalError::Worker { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_was_drained_starts_again_and_the_cluster_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let options = LocalOptions {
        workers: 2,
        stages: Some(1),
        threads: 1,
        kv_blocks: Some(8),
        admin: Some(ANY_PORT),
        ..LocalOptions::new(synthetic(&dir))
    };
    let mut cluster = LocalCluster::start(&options).await.unwrap();
    let admin = Endpoint::from(cluster.admin().unwrap());
    let operator = client::Operator::at(&admin, String::new()).await.unwrap();
    let starts = async || {
        let workers = operator.status().await.unwrap().workers.into_iter();
        workers.map(|worker| (worker.id, worker.incarnation)).collect::<BTreeSet<_>>()
    };
    let before = starts().await;
    let args = client::roll::RollArgs {
        workers: Vec::new(),
        timeout: node::config::Duration::from_secs(60),
        json: true,
    };
    tokio::select! {
        rolled = client::roll::run(&operator, &args) => rolled.unwrap(),
        error = cluster.failed() => panic!("{error}"),
    }
    let after = starts().await;
    assert_eq!((before.len(), after.len()), (2, 2));
    assert!(before.is_disjoint(&after), "{before:?} {after:?}");
    cluster.stop().await.unwrap();
}

/// A copy of `store` whose first layer has another header: one bit of it is flipped.
fn damaged(dir: &tempfile::TempDir, store: &std::path::Path) -> PathBuf {
    let copy = dir.path().join("damaged");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(store).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    let layer = copy.join("layer-0001.safetensors");
    let mut bytes = std::fs::read(&layer).unwrap();
    bytes[30] ^= 1;
    std::fs::write(&layer, bytes).unwrap();
    copy
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_cannot_be_opened_ends_the_start_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let store = damaged(&dir, &synthetic(&dir));
    for workers in [1, 3] {
        let options = LocalOptions { threads: 1, ..LocalOptions::new(&store) };
        let options = LocalOptions { workers, stages: Some(workers), ..options };
        let started = tokio::time::timeout(HOPELESS_AFTER, LocalCluster::start(&options)).await;
        let error = started.expect("it ends before anybody gives up on it").unwrap_err();
        let text = node::Chain(&error).to_string();
        assert!(text.contains("layer-0001.safetensors"), "{text}");
    }
}
