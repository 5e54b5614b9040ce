//! What earlier versions wrote is read, what this one writes is known, and what a reader does not
//! find or know does not matter.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::PathBuf;

use proptest::collection::vec;
use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::ids::KeyDigest;
use crate::key::LeaderRecord;

const INCARNATION: &str = "0123456789abcdef0123456789abcdef";
const BACKWARDS: &str = "fedcba9876543210fedcba9876543210";
const MODEL: ModelId = ModelId([0xaa; 32]);
const ANSWER: KnownAnswer = KnownAnswer([0xbb; 32]);
const CLASS: NumericsClass = NumericsClass([0xcc; 32]);
const DIGEST: KeyDigest = KeyDigest([0xdd; 32]);

/// What the sample of a format says.
fn leader(format: u32) -> LeaderRecord {
    let address = "rack1-c1:7420".to_owned();
    let old = LeaderRecord { address, key_digest: Some(DIGEST), ..LeaderRecord::default() };
    match format {
        0 => old,
        1 => LeaderRecord {
            format: 1,
            http: "rack1-c1:8080".to_owned(),
            incarnation: INCARNATION.parse().unwrap(),
            ..old
        },
        2 => LeaderRecord {
            format: 2,
            socket: "3f2a/net:[4026531840]/10.0.0.1:7420".to_owned(),
            ..leader(1)
        },
        _ => panic!("say here what the leader of format {format} is"),
    }
}

fn worker(format: u32) -> WorkerRecord {
    let step = |rows, layer_ns, head_ns| StepTime { rows, layer_ns, head_ns };
    let old = WorkerRecord {
        id: "rack1-7071".to_owned(),
        incarnation: INCARNATION.parse().unwrap(),
        address: "rack1:7071".to_owned(),
        version: "0.1.0".to_owned(),
        isa: "avx512vnni".to_owned(),
        threads: 16,
        memory_bytes: 64 << 30,
        kernel_revision: 2,
        known_answer: ANSWER,
        // It said how fast it is in fields that are no more.
        models: vec![WorkerModel { id: MODEL, steps: Vec::new() }],
        ..WorkerRecord::default()
    };
    match format {
        0 => old,
        1 => WorkerRecord {
            format: 1,
            machine: "rack1".to_owned(),
            rack: "r1".to_owned(),
            models: vec![WorkerModel {
                id: MODEL,
                steps: vec![step(1, 310_000, 800_000), step(16, 920_000, 2_400_000)],
            }],
            draining: true,
            ..old
        },
        2 => WorkerRecord { format: 2, stub: true, ..worker(1) },
        3 => WorkerRecord {
            format: 3,
            socket: "3f2a/net:[4026531840]/10.0.0.1:7071".to_owned(),
            ..worker(2)
        },
        4 => WorkerRecord {
            format: 4,
            round_trips_us: [("rack1-7072", 140), ("rack2-7071", 180), ("rack9-7071", 900)]
                .map(|(id, us)| (id.to_owned(), us))
                .into(),
            ..worker(3)
        },
        _ => panic!("say here what the worker of format {format} is"),
    }
}

fn plan(format: u32) -> Plan {
    let stage = |worker: &str, incarnation: &str, layers| StagePlan {
        worker: format!("{worker}-7071"),
        incarnation: incarnation.parse().unwrap(),
        address: format!("{worker}:7071"),
        layers,
    };
    let first = PipelinePlan {
        id: PipelineId(1),
        stages: vec![stage("rack1", INCARNATION, 0..14), stage("rack2", BACKWARDS, 14..30)],
        kv_blocks: 4096,
        predicted_tokens_per_s: 612.5,
        ..PipelinePlan::default()
    };
    match format {
        // Model and class were the plan's.
        0 => Plan {
            term: Term(7),
            pipelines: vec![first],
            reason: "2 stages of 14 to 16 layers".to_owned(),
            ..Plan::default()
        },
        1 => Plan {
            format: 1,
            term: Term(7),
            pipelines: vec![
                PipelinePlan { model: MODEL, class: CLASS, ..first },
                PipelinePlan {
                    id: PipelineId(2),
                    epoch: Epoch(42),
                    model: MODEL,
                    kv_type: KvType::F32,
                    class: CLASS,
                    stages: vec![stage("rack3", INCARNATION, 0..30)],
                    kv_blocks: 512,
                    predicted_tokens_per_s: 0.0,
                },
            ],
            reason: "2 pipelines".to_owned(),
            ..Plan::default()
        },
        2 => Plan {
            format: 2,
            drains: vec![
                DrainOrder {
                    worker: "rack3-7071".to_owned(),
                    incarnation: INCARNATION.parse().unwrap(),
                    force: false,
                },
                DrainOrder {
                    worker: "rack2-7071".to_owned(),
                    incarnation: BACKWARDS.parse().unwrap(),
                    force: true,
                },
            ],
            ..plan(1)
        },
        _ => panic!("say here what the plan of format {format} is"),
    }
}

/// The samples of one kind of value, by format.
fn samples(name: &str) -> BTreeMap<u32, String> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("samples");
    let mut samples = BTreeMap::new();
    for format in std::fs::read_dir(root).unwrap() {
        let format = format.unwrap().path();
        let number = format.file_name().unwrap().to_str().unwrap().parse().unwrap();
        // Formats count for each kind by itself.
        if let Ok(text) = std::fs::read_to_string(format.join(name)) {
            samples.insert(number, text);
        }
    }
    samples
}

fn check<T: Serialize + DeserializeOwned + Debug + PartialEq>(
    name: &str,
    newest: u32,
    expected: fn(u32) -> T,
) {
    let samples = samples(name);
    assert_eq!(samples.keys().copied().collect::<Vec<_>>(), (0..=newest).collect::<Vec<_>>());
    for (&format, text) in &samples {
        assert_eq!(serde_json::from_str::<T>(text).unwrap(), expected(format), "{name} {format}");
        let whole: Value = serde_json::from_str(text).unwrap();
        for path in fields(&whole) {
            let mut part = whole.clone();
            let (object, field) = path.rsplit_once('/').unwrap();
            let object = part.pointer_mut(object).and_then(Value::as_object_mut).unwrap();
            object.remove(field).unwrap();
            let read: Result<T, _> = serde_json::from_value(part);
            assert!(read.is_ok(), "{name} {format} without {path}: {read:?}");
        }
        let read: T = serde_json::from_value(with_unknown(whole)).unwrap();
        assert_eq!(read, expected(format), "{name} {format} with unknown fields");
    }
    // Who changes what is written raises the format and adds a sample.
    assert_eq!(serde_json::to_string(&expected(newest)).unwrap(), samples[&newest].trim_end());
}

/// Pointers to all fields of all objects.
fn fields(value: &Value) -> Vec<String> {
    let parts: Vec<(String, &Value)> = match value {
        Value::Object(object) => object.iter().map(|(key, part)| (key.clone(), part)).collect(),
        Value::Array(list) => list.iter().enumerate().map(|(i, p)| (i.to_string(), p)).collect(),
        _ => Vec::new(),
    };
    let mut found = Vec::new();
    for (key, part) in parts {
        if value.is_object() {
            found.push(format!("/{key}"));
        }
        found.extend(fields(part).into_iter().map(|path| format!("/{key}{path}")));
    }
    found
}

/// With a field that nobody knows in every object.
fn with_unknown(value: Value) -> Value {
    match value {
        Value::Object(object) => {
            let known = object.into_iter().map(|(key, part)| (key, with_unknown(part)));
            let unknown = ("of_a_later_version".to_owned(), json!({ "a": [1, null] }));
            Value::Object(known.chain([unknown]).collect())
        }
        Value::Array(list) => list.into_iter().map(with_unknown).collect(),
        other => other,
    }
}

#[test]
fn leaders_of_every_format_are_read_and_the_newest_is_written() {
    check("leader.json", LEADER_FORMAT, leader);
}

#[test]
fn workers_of_every_format_are_read_and_the_newest_is_written() {
    check("worker.json", WORKER_FORMAT, worker);
    assert_eq!(worker(0).fault(), None);
    assert_eq!(worker(0).models[0].layer_ns(1), None, "it is not known how fast it is");
    assert_eq!(worker(1).models[0].head_ns(16), Some(2_400_000));
}

#[test]
fn plans_of_every_format_are_read_and_the_newest_is_written() {
    check("plan.json", PLAN_FORMAT, plan);
    assert_eq!((plan(0).fault(), plan(1).fault()), (None, None));
    assert_eq!(plan(1).pipelines[1].at().to_string(), "2@42");
}

#[test]
fn round_trips_that_nobody_measured_are_left_out() {
    let read = |figures: Value| {
        let record: WorkerRecord =
            serde_json::from_value(json!({ "round_trips_us": figures })).unwrap();
        record.round_trips_us.into_iter().collect::<Vec<_>>()
    };
    let odd = json!({
        "a": 140, "b": 0, "c": -1, "d": 1.5, "e": 1_000_001, "f": "7", "g": [7], "h": null,
        "i": 1_000_000, "": 7, "no/id": 7, "x".repeat(129): 7,
    });
    assert_eq!(read(odd), [("a".to_owned(), 140), ("i".to_owned(), 1_000_000)]);
    let many: serde_json::Map<_, _> = (0..10_000).map(|i| (format!("w{i}"), json!(7))).collect();
    assert_eq!(read(many.into()).len(), limits::ROUND_TRIPS);
    let none = serde_json::from_value::<WorkerRecord>(json!({ "round_trips_us": [1, 2] }));
    assert!(none.is_err(), "another meaning has another name");
}

fn step_time() -> impl Strategy<Value = StepTime> {
    any::<(u32, u64, u64)>().prop_map(|(rows, layer_ns, head_ns)| StepTime {
        rows,
        layer_ns,
        head_ns,
    })
}

fn any_worker() -> impl Strategy<Value = WorkerRecord> {
    let model = (any::<[u8; 32]>(), vec(step_time(), 0..4))
        .prop_map(|(id, steps)| WorkerModel { id: ModelId(id), steps });
    let numbers = any::<(u32, u32, u64, u32, bool, bool)>();
    let ids = any::<([u8; 16], [u8; 32])>();
    let figure = ("[A-Za-z0-9._-]{1,128}", 1..=limits::ROUND_TRIP_US);
    let lists = (vec(model, 0..3), vec(figure, 0..4));
    (vec(any::<String>(), 7), numbers, ids, lists).prop_map(
        |(texts, numbers, ids, (models, figures))| WorkerRecord {
            format: numbers.0,
            id: texts[0].clone(),
            incarnation: Incarnation(ids.0),
            address: texts[1].clone(),
            machine: texts[2].clone(),
            rack: texts[3].clone(),
            version: texts[4].clone(),
            isa: texts[5].clone(),
            threads: numbers.1,
            memory_bytes: numbers.2,
            kernel_revision: numbers.3,
            known_answer: KnownAnswer(ids.1),
            models,
            draining: numbers.4,
            stub: numbers.5,
            socket: texts[6].clone(),
            round_trips_us: figures.into_iter().collect(),
        },
    )
}

fn any_plan() -> impl Strategy<Value = Plan> {
    let stage = any::<(String, [u8; 16], String, u32, u32)>().prop_map(|parts| StagePlan {
        worker: parts.0,
        incarnation: Incarnation(parts.1),
        address: parts.2,
        layers: parts.3..parts.4,
    });
    let numbers = any::<(u64, u64, [u8; 32], bool, [u8; 32], u32, u32)>();
    let pipeline = (numbers, vec(stage, 0..4)).prop_map(|(n, stages)| PipelinePlan {
        id: PipelineId(n.0),
        epoch: Epoch(n.1),
        model: ModelId(n.2),
        kv_type: if n.3 { KvType::F16 } else { KvType::F32 },
        class: NumericsClass(n.4),
        stages,
        kv_blocks: n.5,
        // Of few digits: JSON may change the last bit of others.
        predicted_tokens_per_s: f64::from(n.6 >> 8) / 8.0,
    });
    let order = any::<(String, [u8; 16], bool)>().prop_map(|(worker, incarnation, force)| {
        DrainOrder { worker, incarnation: Incarnation(incarnation), force }
    });
    (any::<(u32, u64, String)>(), vec(pipeline, 0..4), vec(order, 0..4)).prop_map(
        |((format, term, reason), pipelines, drains)| Plan {
            format,
            term: Term(term),
            pipelines,
            reason,
            drains,
        },
    )
}

proptest! {
    #[test]
    fn a_worker_survives_the_registry(worker in any_worker()) {
        let text = serde_json::to_vec(&worker).unwrap();
        prop_assert_eq!(serde_json::from_slice::<WorkerRecord>(&text).unwrap(), worker);
    }

    #[test]
    fn a_plan_survives_the_registry(plan in any_plan()) {
        let text = serde_json::to_vec(&plan).unwrap();
        prop_assert_eq!(serde_json::from_slice::<Plan>(&text).unwrap(), plan);
    }

    #[test]
    fn a_leader_survives_the_registry(
        texts: (String, String, String), format: u32, of: [u8; 16], digest: Option<[u8; 32]>,
    ) {
        let leader = LeaderRecord {
            format,
            address: texts.0,
            http: texts.1,
            incarnation: Incarnation(of),
            key_digest: digest.map(KeyDigest),
            socket: texts.2,
        };
        let text = serde_json::to_vec(&leader).unwrap();
        prop_assert_eq!(serde_json::from_slice::<LeaderRecord>(&text).unwrap(), leader);
    }
}
