//! One test for every way in which a step or a row is refused.

use std::time::Duration;

use prost::Message;
use proto::convert::{encode_step, step_crc32c};
use proto::ids::{Epoch, Generation, Incarnation, PipelineId, SequenceId, StepId, Term};
use proto::step::{Output, Prepare, Row, RowStatus, Step, StepReply, StepVerdict};
use tokio_stream::StreamExt;
use tonic::Code;
use tonic_prost::ProstCodec;

use super::harness::{KEY, Steps, Worker, prepare, row, soon, step};

async fn alone() -> (Worker, Prepare) {
    let mut worker = Worker::start("w").await;
    let prepare = worker.serve_alone(5).await;
    (worker, prepare)
}

/// What is said of a good step after `change`.
async fn said_of(change: impl FnOnce(&mut Step)) -> StepReply {
    let (mut worker, prepare) = alone().await;
    let mut step = step(&prepare, 1, vec![row(0, 0, 3, Output::None)]);
    change(&mut step);
    worker.steps().await.ask(&step).await
}

#[tokio::test]
async fn an_older_epoch_is_fenced() {
    let (mut worker, old) = alone().await;
    worker.serve_alone(9).await;
    let step = step(&old, 1, vec![row(0, 0, 3, Output::None)]);
    let reply = worker.steps().await.ask(&step).await;
    assert_eq!(reply.verdict, StepVerdict::Fenced);
    assert_eq!(reply.at.epoch, Epoch(9), "the receiver's own");
    assert_eq!(reply.at.id, PipelineId(1), "of the step");
    assert_eq!(reply.step, StepId(1));
}

#[tokio::test]
async fn another_incarnation_is_fenced() {
    let reply = said_of(|step| step.header.dst_incarnation = Incarnation([9; 16])).await;
    assert_eq!(reply.verdict, StepVerdict::Fenced);
    assert_eq!(reply.at.epoch, Epoch(5));
    assert!(reply.detail.contains("incarnation"), "{}", reply.detail);
}

#[tokio::test]
async fn a_deposed_coordinator_is_fenced() {
    let reply = said_of(|step| step.header.term = Term(0)).await;
    assert_eq!(reply.verdict, StepVerdict::Fenced);
    assert!(reply.detail.contains("term"), "{}", reply.detail);
}

#[tokio::test]
async fn an_epoch_without_preparation_is_not_prepared() {
    let reply = said_of(|step| step.header.epoch = Epoch(6)).await;
    assert_eq!((reply.verdict, reply.at.epoch), (StepVerdict::NotPrepared, Epoch(6)));
    let reply = said_of(|step| step.header.pipeline = PipelineId(2)).await;
    assert_eq!(reply.verdict, StepVerdict::NotPrepared);
}

#[tokio::test]
async fn flipped_bits_are_corrupt() {
    let (mut worker, prepare) = alone().await;
    let good = encode_step(&step(&prepare, 1, vec![row(0, 0, 3, Output::None)]));
    let mut steps = worker.steps().await;
    for bit in (0..good.rows.len() * 8).step_by(37) {
        let mut bytes = good.rows.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let mut bad = good.clone();
        bad.rows = bytes.into();
        steps.send_message(bad).await;
        assert_eq!(steps.reply().await.verdict, StepVerdict::Corrupt, "bit {bit}");
    }
    let mut bad = good.clone();
    bad.step = 2;
    steps.send_message(bad).await;
    assert_eq!(steps.reply().await.verdict, StepVerdict::Corrupt, "under another number");
    let mut bad = good.clone();
    bad.dst_incarnation.truncate(15);
    steps.send_message(bad).await;
    assert_eq!(steps.reply().await.verdict, StepVerdict::Corrupt, "a cut incarnation");
    steps.send_message(good).await;
    assert_eq!(steps.reply().await.verdict, StepVerdict::Accepted, "the step itself is good");
}

#[tokio::test]
async fn wrong_sizes_are_invalid() {
    let reply = said_of(|step| step.activations = vec![0; 64].into()).await;
    assert_eq!(reply.verdict, StepVerdict::Invalid);
    assert!(reply.detail.contains("activations"), "{}", reply.detail);
    let reply = said_of(|step| step.rows = (0..3).map(|s| row(s, 0, 30, Output::None)).collect());
    let reply = reply.await;
    assert_eq!(reply.verdict, StepVerdict::Invalid);
    assert!(reply.detail.contains("90 tokens"), "{}", reply.detail);
    let reply = said_of(|step| step.header.acked_step = StepId(1)).await;
    assert_eq!(reply.verdict, StepVerdict::Corrupt, "it acknowledges itself");
}

#[tokio::test]
async fn a_step_that_does_not_decode_is_invalid_and_harms_nothing() {
    let (mut worker, prepare) = alone().await;
    let good = encode_step(&step(&prepare, 1, vec![row(0, 0, 3, Output::None)]));
    let mut steps = worker.steps().await;
    // Rows of a later version, and rows that are none; both arrive as they were sent.
    let mut rows = proto::pb::RowSet::decode(good.rows.clone()).unwrap();
    rows.rows[0].output = 99;
    for rows in [rows.encode_to_vec(), vec![0xff; 40]] {
        let payload_crc32c = step_crc32c(good.epoch, good.step, &rows, &good.activations);
        let bad = proto::pb::StepMessage { rows: rows.into(), payload_crc32c, ..good.clone() };
        steps.send_message(bad).await;
        assert_eq!(steps.reply().await.verdict, StepVerdict::Invalid);
    }
    steps.send_message(good).await;
    assert_eq!(steps.reply().await.verdict, StepVerdict::Accepted);
}

#[tokio::test]
async fn a_message_that_cannot_be_read_ends_the_stream_with_its_reason() {
    let (mut worker, prepare) = alone().await;
    let mut steps = worker.steps().await;
    let mut results = worker.results(&prepare, 0).await;
    // Longer than a message may be, from a sender who does not mind.
    let mut careless = worker.client.clone().max_encoding_message_size(usize::MAX);
    let mut long = Steps::open(&mut careless).await;
    let activations = vec![0; proto::limits::MESSAGE_BYTES].into();
    long.send_message(proto::pb::StepMessage { activations, ..Default::default() }).await;
    let status = long.end().await;
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.message().contains("oversize"), "{status:?}");
    // Another message of the schema under this name: its first field is a text.
    let other = proto::pb::DescribeResponse { worker: "x".into(), ..Default::default() };
    let mut client = tonic::client::Grpc::new(worker.channel().await);
    soon(client.ready()).await.unwrap();
    let codec = ProstCodec::<proto::pb::DescribeResponse, proto::pb::StepReply>::default();
    let path = "/tercet.v1.Stage/Steps".parse().unwrap();
    let sent = tokio_stream::once(other).chain(tokio_stream::pending());
    let call = client.streaming(KEY.attach(sent), path, codec);
    let mut replies = soon(call).await.unwrap().into_inner();
    let status = soon(replies.message()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(status.message().contains("undecodable"), "{status:?}");
    // Other streams do not notice.
    steps.give(&step(&prepare, 1, vec![row(0, 0, 3, Output::None)])).await;
    assert_eq!(results.next().await.step, StepId(1));
}

#[tokio::test]
async fn what_was_never_sent_is_not_acknowledged_nor_passed_over() {
    let (mut worker, prepare) = alone().await;
    let mut steps = worker.steps().await;
    let mut results = worker.results(&prepare, 0).await;
    let numbered = |number, acked| {
        let mut step = step(&prepare, number, vec![]);
        step.header.acked_step = StepId(acked);
        step
    };
    // From somebody who knows the key.
    for (number, acked) in [(u64::MAX, u64::MAX - 1), (3, 2), (2, 1)] {
        let reply = steps.ask(&numbered(number, acked)).await;
        assert_eq!(reply.verdict, StepVerdict::Corrupt, "{reply:?}");
        assert!(reply.detail.contains("acknowledged"), "{reply:?}");
    }
    for number in [u64::MAX, 9] {
        let reply = steps.ask(&numbered(number, 0)).await;
        assert_eq!(reply.verdict, StepVerdict::Invalid, "{reply:?}");
        assert!(reply.detail.contains("beyond step 8"), "{reply:?}");
    }
    for number in 1..=3 {
        steps.give(&step(&prepare, number, vec![row(0, number as u32 - 1, 1, Output::None)])).await;
        assert_eq!(results.next().await.step, StepId(number));
    }
}

#[tokio::test]
async fn more_than_agreed_is_busy() {
    let mut worker = Worker::start("w").await;
    let prepare = Prepare { max_in_flight: 2, ..prepare(&[worker.plan(0..4)], 0, 5) };
    worker.prepare(&prepare).await.unwrap();
    let mut steps = worker.steps().await;
    let numbered = |number, acked| {
        let mut step = step(&prepare, number, vec![row(0, 0, 1, Output::None)]);
        step.header.acked_step = StepId(acked);
        step
    };
    steps.give(&numbered(1, 0)).await;
    steps.give(&numbered(2, 0)).await;
    let reply = steps.ask(&numbered(3, 0)).await;
    assert_eq!((reply.verdict, reply.step), (StepVerdict::Busy, StepId(3)));
    steps.give(&numbered(3, 1)).await;
}

/// The statuses of rows sent one a step, after a row of 40 tokens of sequence 0 was computed.
async fn statuses(rows: Vec<Row>) -> Vec<(RowStatus, String)> {
    let (mut worker, prepare) = alone().await;
    let mut results = worker.results(&prepare, 0).await;
    let mut steps = worker.steps().await;
    let mut all = vec![row(0, 0, 40, Output::None)];
    all.extend(rows);
    let mut found = Vec::new();
    for (number, row) in (1..).zip(all) {
        let mut step = step(&prepare, number, vec![row]);
        step.header.acked_step = StepId(number - 1);
        steps.give(&step).await;
        let mut result = results.next().await;
        assert_eq!((result.step, result.rows.len()), (StepId(number), 1));
        let row = result.rows.remove(0);
        found.push((row.status, row.detail));
    }
    assert_eq!(found.remove(0).0, RowStatus::Ok);
    found
}

fn only(statuses: Vec<(RowStatus, String)>) -> Vec<RowStatus> {
    statuses.into_iter().map(|(status, _)| status).collect()
}

#[tokio::test]
async fn a_gap_and_another_history_need_state() {
    let mut other = row(0, 40, 1, Output::None);
    other.prefix_hash_before = row(1, 40, 1, Output::None).prefix_hash_before;
    other.prefix_hash_after = other.prefix_hash_before.then_all(&other.tokens);
    let found = statuses(vec![
        row(0, 41, 1, Output::None),
        other,
        row(3, 5, 1, Output::None),
        row(0, 40, 1, Output::None),
    ]);
    let expected =
        [RowStatus::NeedState, RowStatus::NeedState, RowStatus::NeedState, RowStatus::Ok];
    assert_eq!(only(found.await), expected);
}

#[tokio::test]
async fn an_older_generation_is_stale() {
    let of = |generation| Row { generation: Generation(generation), ..row(0, 40, 1, Output::None) };
    let found = statuses(vec![of(3), of(2), of(3)]).await;
    assert_eq!(only(found), [RowStatus::Ok, RowStatus::Stale, RowStatus::Ok]);
}

#[tokio::test]
async fn a_row_that_breaks_the_contract_is_invalid() {
    let mut block = row(0, 40, 1, Output::None);
    block.blocks[1].0 = 16;
    let mut vocabulary = row(0, 40, 1, Output::None);
    vocabulary.tokens[0] = 256;
    let mut hash = row(0, 40, 1, Output::None);
    hash.tokens[0] ^= 1;
    let found = statuses(vec![block, vocabulary, hash, row(0, 40, 1, Output::None)]).await;
    for ((_, detail), words) in found.iter().zip(["block 16", "vocabulary", "hash after"]) {
        assert!(detail.contains(words), "{detail}");
    }
    let expected = [RowStatus::Invalid, RowStatus::Invalid, RowStatus::Invalid, RowStatus::Ok];
    assert_eq!(only(found), expected);
}

#[tokio::test]
async fn a_step_whose_deadline_passed_is_expired() {
    let (mut worker, prepare) = alone().await;
    let mut results = worker.results(&prepare, 0).await;
    let mut late = step(&prepare, 1, vec![row(0, 0, 3, Output::None), row(1, 0, 2, Output::None)]);
    late.header.deadline_remaining = Duration::ZERO;
    worker.steps().await.give(&late).await;
    let result = results.next().await;
    let statuses: Vec<RowStatus> = result.rows.iter().map(|row| row.status).collect();
    assert_eq!(statuses, [RowStatus::Expired; 2]);
}

#[tokio::test]
async fn a_refused_row_travels_on_beside_the_others() {
    let (mut worker, prepare) = alone().await;
    let mut results = worker.results(&prepare, 0).await;
    let refused = Row {
        status: RowStatus::NotFinite,
        detail: "by an earlier stage".into(),
        ..row(1, 0, 2, Output::None)
    };
    let mut sent = step(&prepare, 1, vec![refused, row(0, 0, 3, Output::None)]);
    sent.ended_sequences = vec![SequenceId(9)];
    worker.steps().await.give(&sent).await;
    let result = results.next().await;
    assert_eq!(result.rows[0].status, RowStatus::NotFinite);
    assert_eq!(result.rows[0].detail, "by an earlier stage");
    assert_eq!(result.rows[1].status, RowStatus::Ok);
    assert_eq!(result.stage_times.len(), 1);
}
