//! Every value survives the wire, and nothing that arrives is believed.

use std::time::Duration;

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::generate::{GenerateRequest, Priority, Prompt};
use crate::held::{Description, HeldStage, HeldState};
use crate::ids::*;
use crate::plan::{KvType, StagePlan};
use crate::step::*;
use crate::{limits, pb};

fn sampling() -> impl Strategy<Value = SamplingParameters> {
    let floats = (0.0f32..4.0, 0.0f32..=1.0, 0.0f32..=1.0, 0.5f32..2.0, -2.0f32..2.0, -2.0f32..2.0);
    let lists = (
        vec((any::<u32>(), -9.0f32..9.0), 0..4),
        vec(any::<(u32, u32)>(), 0..4),
        vec(any::<(u32, u32)>(), 0..4),
    );
    let numbers =
        (any::<u32>(), any::<u64>(), any::<u32>(), proptest::option::of(0..=limits::TOP_LOGPROBS));
    (floats, lists, numbers).prop_map(|(floats, lists, numbers)| SamplingParameters {
        temperature: floats.0,
        top_p: floats.1,
        min_p: floats.2,
        repetition_penalty: floats.3,
        presence_penalty: floats.4,
        frequency_penalty: floats.5,
        logit_bias: lists.0,
        prompt_counts: lists.1,
        output_counts: lists.2,
        top_k: numbers.0,
        seed: numbers.1,
        choice: numbers.2,
        top_logprobs: numbers.3,
    })
}

fn status() -> impl Strategy<Value = RowStatus> {
    prop_oneof![
        Just(RowStatus::Ok),
        Just(RowStatus::Stale),
        Just(RowStatus::NeedState),
        Just(RowStatus::Expired),
        Just(RowStatus::NotFinite),
        Just(RowStatus::Invalid),
    ]
}

fn row() -> impl Strategy<Value = Row> {
    let output = prop_oneof![
        Just(Output::None),
        sampling().prop_map(|sampling| Output::Sample(Box::new(sampling))),
        vec(any::<u32>(), 1..5).prop_map(Output::Score),
        Just(Output::Logits),
    ];
    let numbers = any::<(u64, u32, u32, [u8; 16], [u8; 16])>();
    (numbers, vec(any::<u32>(), 1..5), vec(any::<u32>(), 1..5), output, status(), "[a-z ]{0,9}")
        .prop_map(|(numbers, tokens, blocks, output, status, text)| Row {
            sequence: SequenceId(numbers.0),
            generation: Generation(numbers.1),
            position: numbers.2,
            prefix_hash_before: PrefixHash(numbers.3),
            prefix_hash_after: PrefixHash(numbers.4),
            tokens,
            blocks: blocks.into_iter().map(BlockId).collect(),
            output,
            status,
            detail: text.clone(),
            traceparent: text,
        })
}

fn step() -> impl Strategy<Value = Step> {
    let header = any::<(u64, u64, u64, [u8; 16], u64, u64, u32)>().prop_map(|numbers| StepHeader {
        pipeline: PipelineId(numbers.0),
        epoch: Epoch(numbers.1),
        term: Term(numbers.2),
        dst_incarnation: Incarnation(numbers.3),
        step: StepId(numbers.4),
        acked_step: StepId(numbers.5),
        deadline_remaining: Duration::from_millis(numbers.6.into()),
    });
    let us = |us: u32| Duration::from_micros(us.into());
    let times = (0..limits::STAGES as u32, any::<(u32, u32, u32)>()).prop_map(
        move |(stage, (compute, wait, behind))| StageTime {
            stage,
            compute: us(compute),
            wait: us(wait),
            behind: us(behind),
        },
    );
    (header, vec(row(), 0..4), vec(any::<u64>(), 0..4), vec(times, 0..3), vec(any::<f32>(), 0..9))
        .prop_map(|(header, rows, ended, stage_times, values)| Step {
            header,
            rows,
            ended_sequences: ended.into_iter().map(SequenceId).collect(),
            stage_times,
            activations: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        })
}

fn result() -> impl Strategy<Value = StepResult> {
    let value = prop_oneof![
        Just(RowValue::None),
        (any::<u32>(), proptest::option::of(-9.0f32..0.0), vec((any::<u32>(), -9.0f32..0.0), 0..4))
            .prop_map(|(token, logprob, top)| RowValue::Sampled(Sampled {
                token,
                logprob,
                top: top
                    .into_iter()
                    .map(|(token, logprob)| TokenLogprob { token, logprob })
                    .collect(),
            })),
        vec(-9.0f32..0.0, 1..4).prop_map(RowValue::Scores),
        vec(any::<u8>(), 1..4).prop_map(|bytes| RowValue::Logits(bytes.into())),
    ];
    let row =
        (any::<(u64, u32, u32, u32)>(), status(), value).prop_map(|(numbers, status, value)| {
            RowResult {
                sequence: SequenceId(numbers.0),
                generation: Generation(numbers.1),
                position: numbers.2,
                token_count: numbers.3,
                status,
                detail: String::new(),
                value,
            }
        });
    (any::<(u64, u64)>(), vec(row, 0..4)).prop_map(|(numbers, rows)| StepResult {
        epoch: Epoch(numbers.0),
        step: StepId(numbers.1),
        rows,
        stage_times: vec![],
    })
}

proptest! {
    #[test]
    fn a_step_survives_the_wire(step in step()) {
        let bytes = encode_step(&step).encode_to_vec();
        let message = pb::StepMessage::decode(&bytes[..]).unwrap();
        prop_assert_eq!(decode_step_header(&message).unwrap(), step.header);
        prop_assert_eq!(decode_step(message).unwrap(), step);
    }

    #[test]
    fn a_result_survives_the_wire(result in result()) {
        let bytes = encode_result(SOURCE, &result).encode_to_vec();
        let decoded = decode_result(pb::StepResult::decode(&bytes[..]).unwrap()).unwrap();
        prop_assert_eq!(decoded, (SOURCE, result));
    }

    /// No bit of a result, header or payload, can be another unseen.
    #[test]
    fn a_flipped_bit_of_a_result_is_found(
        result in result(), at in any::<prop::sample::Index>(), bit in 0..8u32,
    ) {
        let message = encode_result(SOURCE, &result);
        let mut bytes = message.encode_to_vec();
        let place = at.index(bytes.len());
        bytes[place] ^= 1 << bit;
        if let Ok(broken) = pb::StepResult::decode(&bytes[..]) {
            // A flip may hit a field's number, and leave what was there at its default.
            prop_assert!(broken == message || decode_result(broken).is_err());
        }
    }

    /// A flipped bit of rows, activations, step or epoch is found; nothing panics on any flip.
    #[test]
    fn a_flipped_bit_is_found(step in step(), at in any::<prop::sample::Index>(), bit in 0..8u32) {
        let message = encode_step(&step);
        for field in ["rows", "activations"] {
            let mut broken = message.clone();
            let bytes = if field == "rows" { &mut broken.rows } else { &mut broken.activations };
            if bytes.is_empty() {
                continue;
            }
            let mut flipped = bytes.to_vec();
            flipped[at.index(bytes.len())] ^= 1 << bit;
            *bytes = flipped.into();
            let is_corrupt = matches!(decode_step(broken), Err(WireError::Corrupt { .. }));
            prop_assert!(is_corrupt);
        }
        let other_step = pb::StepMessage { step: message.step ^ 1 << bit, ..message.clone() };
        let other_epoch = pb::StepMessage { epoch: message.epoch ^ 1 << bit, ..message.clone() };
        for broken in [other_step, other_epoch] {
            let is_corrupt = matches!(decode_step(broken), Err(WireError::Corrupt { .. }));
            prop_assert!(is_corrupt);
        }
        let mut bytes = message.encode_to_vec();
        let place = at.index(bytes.len());
        bytes[place] ^= 1 << bit;
        if let Ok(message) = pb::StepMessage::decode(&bytes[..]) {
            drop(decode_step(message));
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..200)) {
        if let Ok(message) = pb::StepMessage::decode(&bytes[..]) { drop(decode_step(message)); }
        if let Ok(message) = pb::StepResult::decode(&bytes[..]) { drop(decode_result(message)); }
        if let Ok(message) = pb::StepReply::decode(&bytes[..]) { drop(decode_reply(message)); }
        if let Ok(message) = pb::DescribeResponse::decode(&bytes[..]) {
            drop(decode_description(message));
        }
        if let Ok(message) = pb::PrepareRequest::decode(&bytes[..]) { drop(decode_prepare(message)); }
        if let Ok(message) = pb::GenerateRequest::decode(&bytes[..]) { drop(decode_generate(message)); }
        if let Ok(message) = pb::GenerateEvent::decode(&bytes[..]) { drop(decode_event(message)); }
    }
}

const SOURCE: ResultSource =
    ResultSource { pipeline: PipelineId(3), term: Term(5), incarnation: Incarnation([9; 16]) };

fn small_step() -> Step {
    Step {
        header: StepHeader {
            pipeline: PipelineId(1),
            epoch: Epoch(2),
            term: Term(3),
            dst_incarnation: Incarnation([4; 16]),
            step: StepId(5),
            acked_step: StepId(0),
            deadline_remaining: Duration::from_micros(1),
        },
        rows: vec![],
        ended_sequences: vec![],
        stage_times: vec![],
        activations: Bytes::new(),
    }
}

fn row_of(tokens: usize, blocks: usize) -> Row {
    Row {
        sequence: SequenceId(1),
        generation: Generation(0),
        position: 0,
        tokens: vec![0; tokens],
        prefix_hash_before: PrefixHash::EMPTY,
        prefix_hash_after: PrefixHash::EMPTY,
        blocks: vec![BlockId(0); blocks],
        output: Output::None,
        status: RowStatus::Ok,
        detail: String::new(),
        traceparent: String::new(),
    }
}

#[test]
fn a_step_with_time_left_does_not_arrive_as_expired() {
    let decoded = decode_step(encode_step(&small_step())).unwrap();
    assert_eq!(decoded.header.deadline_remaining, Duration::from_millis(1));
}

#[test]
fn oversized_steps_are_refused_by_name() {
    let cases: [(&str, Vec<Row>); 4] = [
        ("rows", vec![row_of(1, 1); limits::STEP_ROWS + 1]),
        ("tokens of the step", vec![row_of(limits::STEP_TOKENS + 1, 1)]),
        ("tokens of the step", vec![row_of(limits::STEP_TOKENS, 1), row_of(1, 1)]),
        ("block_ids", vec![row_of(1, limits::ROW_BLOCKS + 1)]),
    ];
    for (name, rows) in cases {
        let error = decode_step(encode_step(&Step { rows, ..small_step() })).unwrap_err();
        assert!(
            matches!(error, WireError::TooLarge { field, .. } if field == name),
            "{name}: {error}"
        );
    }
}

#[test]
fn enum_values_of_another_version_are_refused() {
    let ok = pb::RowStatus::Ok.into();
    for (output, status) in [(9, ok), (0, 9), (0, -1)] {
        let row = pb::Row {
            output,
            status,
            prefix_hash_before: Bytes::from_static(&[0; 16]),
            prefix_hash_after: Bytes::from_static(&[0; 16]),
            ..Default::default()
        };
        let rows =
            Bytes::from(pb::RowSet { rows: vec![row], ..Default::default() }.encode_to_vec());
        let message = pb::StepMessage {
            payload_crc32c: step_crc32c(2, 5, &rows, &[]),
            rows,
            activations: Bytes::new(),
            ..encode_step(&small_step())
        };
        assert!(matches!(decode_step(message), Err(WireError::Invalid { .. })));
    }
}

#[test]
fn a_preparation_survives_the_wire_and_gaps_are_refused() {
    let stage = |layers| StagePlan {
        worker: "w".into(),
        incarnation: Incarnation([7; 16]),
        address: "127.0.0.1:1".into(),
        layers,
    };
    let prepare = |stages, stage| Prepare {
        cluster_id: "c".into(),
        pipeline: PipelineId(1),
        epoch: Epoch(2),
        term: Term(3),
        dst_incarnation: Incarnation([7; 16]),
        model: ModelId([8; 32]),
        kv_type: KvType::F32,
        stage,
        stages,
        kv_blocks: 4,
        max_step_tokens: 5,
        max_in_flight: 6,
        draws: true,
    };
    let good = prepare(vec![stage(0..2), stage(2..3)], 1);
    assert_eq!(decode_prepare(encode_prepare(&good)).unwrap(), good);
    #[expect(clippy::reversed_empty_ranges, reason = "what a hostile sender may write")]
    let backwards = stage(2..1);
    let bad = [
        prepare(vec![stage(0..2), stage(3..4)], 0),
        prepare(vec![stage(1..2)], 0),
        prepare(vec![stage(0..2), backwards], 0),
        prepare(vec![stage(0..2)], 1),
        prepare(vec![], 0),
    ];
    for prepare in bad {
        assert!(decode_prepare(encode_prepare(&prepare)).is_err(), "{:?}", prepare.stages);
    }
}

#[test]
fn a_request_survives_the_wire_and_a_wrong_resume_index_is_refused() {
    let request = GenerateRequest {
        prompt: Prompt::Tokens(vec![1, 2]),
        stop: vec!["x".into()],
        seed: Some(0),
        resume_index: 2,
        received_ids: vec![3, 4],
        top_logprobs: Some(0),
        user: "me".into(),
        priority: Priority::Batch,
        ..Default::default()
    };
    assert_eq!(decode_generate(encode_generate(&request)).unwrap(), request);
    let unknown = pb::GenerateRequest { priority: 3, ..encode_generate(&request) };
    let error = decode_generate(unknown).unwrap_err().to_string();
    assert!(error.contains("priority") && error.contains('3'), "{error}");
    let wrong = GenerateRequest { resume_index: 1, ..request };
    let error = decode_generate(encode_generate(&wrong)).unwrap_err();
    assert_eq!(error.to_string(), "resume_index must be the number of received_ids, found 1 of 2");
}

/// Defects 16 and 20 of the review: a message without a verdict or a status was a success, and a
/// stage's number was any.
#[test]
fn what_is_missing_is_no_success_and_stages_are_bounded() {
    let most = limits::STAGES as u32 - 1;
    let reply = pb::StepReply { verdict: pb::StepVerdict::Accepted.into(), ..Default::default() };
    assert!(decode_reply(pb::StepReply { stage: most, ..reply.clone() }).is_ok());
    for stage in [most + 1, u32::MAX] {
        let found = decode_reply(pb::StepReply { stage, ..reply.clone() });
        assert!(matches!(found, Err(WireError::TooLarge { field: "stage", .. })), "{found:?}");
    }
    let found = decode_reply(pb::StepReply::default());
    assert_eq!(found, Err(WireError::Missing { field: "verdict" }));

    let of = |set: &pb::ResultSet| {
        let empty = StepResult {
            epoch: Epoch(1),
            step: StepId(1),
            rows: Vec::new(),
            stage_times: Vec::new(),
        };
        let mut message = encode_result(SOURCE, &empty);
        message.payload = set.encode_to_vec().into();
        message.payload_crc32c = stage::result_crc32c(&message);
        decode_result(message)
    };
    let time = |stage| pb::StageTime { stage, compute_us: 1, wait_us: 1, behind_us: 1 };
    let times = |times| pb::ResultSet { stage_times: times, ..Default::default() };
    assert!(of(&times(vec![time(0), time(most)])).is_ok());
    assert!(of(&times(vec![time(most + 1)])).is_err());
    assert!(of(&times(vec![time(0); limits::STAGES + 1])).is_err());
    let row = pb::ResultSet { rows: vec![pb::RowResult::default()], ..Default::default() };
    assert_eq!(of(&row), Err(WireError::Missing { field: "status" }));
}

#[test]
fn what_a_worker_holds_survives_the_wire_and_nonsense_is_refused() {
    let stage = HeldStage {
        at: PipelineRef { id: PipelineId(1), epoch: Epoch(42) },
        term: Term(7),
        state: HeldState::Active,
        stage: 1,
        layers: 3..9,
        model: ModelId([8; 32]),
        kv_type: KvType::F32,
        kv_blocks: 64,
        bytes: 1 << 40,
    };
    let prepared = HeldStage { state: HeldState::Prepared, ..stage.clone() };
    let held = vec![stage, prepared];
    let response = |held| pb::DescribeResponse {
        worker: "w".into(),
        incarnation: Bytes::from_static(&[9; 16]),
        held,
        prepared_bytes: 7 << 40,
        ..Default::default()
    };
    let encoded: Vec<_> = held.iter().map(encode_held).collect();
    let decoded = decode_description(response(encoded.clone())).unwrap();
    assert_eq!(
        decoded,
        Description {
            worker: "w".into(),
            incarnation: Incarnation([9; 16]),
            held,
            prepared_bytes: 7 << 40,
        }
    );
    assert_eq!(decode_description(response(Vec::new())).unwrap().held, [], "an older worker");
    type Spoil = fn(&mut pb::HeldStage);
    let spoils: [Spoil; 6] = [
        |held| held.state = 0,
        |held| held.state = 9,
        |held| held.stage = u32::MAX,
        |held| held.layers_end = held.layers_begin,
        |held| held.model_id = Bytes::new(),
        |held| held.kv_type = "f8".into(),
    ];
    for (case, spoil) in spoils.iter().enumerate() {
        let mut held = encoded.clone();
        spoil(&mut held[1]);
        assert!(decode_description(response(held)).is_err(), "case {case}");
    }
    let many = vec![encoded[0].clone(); limits::HELD_STAGES + 1];
    assert!(matches!(
        decode_description(response(many)),
        Err(WireError::TooLarge { field: "held", .. })
    ));
}

#[test]
fn a_status_arrives_as_it_was_sent() {
    use crate::status::*;
    let stage = StageStatus {
        worker: "w".into(),
        address: "a:1".into(),
        layers: [3, 9],
        compute_ms: 1.5,
        wait_ms: 0.5,
        steps: 7,
        busy_ms: 10.5,
        waited_ms: 3.5,
        predicted_busy: 0.75,
        predicted_tokens_per_s: 33.5,
    };
    let pipeline = PipelineStatus {
        id: 1,
        epoch: 9,
        state: "active".into(),
        stages: vec![stage],
        predicted_tokens_per_s: 99.5,
        steps: 7,
        on_way_ms: 21.5,
        budget: StepBudget {
            target_ms: 200.0,
            chunk_tokens: 64,
            chunk_tokens_last: 24,
            step_ms: 1.5,
            token_ms: 2.5,
            scale: 1.25,
            context_ms: 0.75,
        },
    };
    let queue = QueueStatus {
        running: 1,
        waiting: 2,
        waiting_limit: 3,
        waiting_tokens: 1 << 33,
        waiting_tokens_limit: 1 << 34,
        kv_blocks_total: 5,
        kv_blocks_used: 4,
    };
    let rates = RateStatus {
        prompt_tokens_per_s: 10.0,
        generated_tokens_per_s: 20.0,
        requests_finished: 3,
        requests_failed: 1,
        prompt_tokens: 1 << 40,
        generated_tokens: 5,
    };
    let plan = PlanStatus { pipelines: vec![pipeline], reason: "r".into() };
    let sampling = SamplingStatus {
        temperature: Some(0.0),
        top_k: Some(0),
        max_new_tokens: Some(7),
        ..SamplingStatus::default()
    };
    let model = ModelStatus { name: "m".into(), sampling, ..ModelStatus::default() };
    let (ready, term) = (true, 4);
    let status =
        ClusterStatus { plan, rates, queue, model, ready, term, ..ClusterStatus::default() };
    assert_eq!(decode_status(encode_status(&status)), status);
}

#[test]
fn rows_are_counted_before_they_are_built() {
    // Two bytes each, of which memory would hold hundreds.
    let rows = Bytes::from([0x0a, 0].repeat(100_000));
    let payload_crc32c = step_crc32c(5, 1, &rows, &[]);
    let step = pb::StepMessage {
        epoch: 5,
        step: 1,
        dst_incarnation: vec![1; 16].into(),
        payload_crc32c,
        rows: rows.clone(),
        ..Default::default()
    };
    let limit = limits::STEP_ROWS as u64;
    // It stopped there: the last ones were not even looked at.
    let too_many = WireError::TooLarge { field: "rows", found: limit + 1, limit };
    assert_eq!(decode_step(step).unwrap_err(), too_many);
    let mut result = pb::StepResult {
        epoch: 5,
        step: 1,
        src_incarnation: vec![1; 16].into(),
        payload: rows,
        ..Default::default()
    };
    result.payload_crc32c = stage::result_crc32c(&result);
    assert_eq!(decode_result(result).unwrap_err(), too_many);
}
