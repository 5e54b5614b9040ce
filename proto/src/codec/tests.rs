//! Requests at and beyond every bound, in each form that the wire has for them.

use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::limits;
use pb::generate_request::Prompt;

fn check_bytes(request: &[u8]) -> Result<(), String> {
    check_request(request).map_err(|error| error.to_string())
}

fn check(request: &pb::GenerateRequest) -> Result<(), String> {
    check_bytes(&request.encode_to_vec())
}

fn tokens(count: usize) -> pb::GenerateRequest {
    let prompt = Prompt::Tokens(pb::TokenIds { ids: vec![300; count] });
    pb::GenerateRequest { prompt: Some(prompt), ..Default::default() }
}

fn messages(count: usize) -> pb::GenerateRequest {
    let conversation = pb::Conversation {
        messages: vec![pb::ChatMessage::default(); count],
        ..Default::default()
    };
    let prompt = Some(Prompt::Conversation(conversation));
    pb::GenerateRequest { prompt, ..Default::default() }
}

fn biases(count: usize) -> pb::GenerateRequest {
    let sampling =
        pb::Sampling { logit_bias: vec![pb::Bias::default(); count], ..Default::default() };
    pb::GenerateRequest { sampling: Some(sampling), ..Default::default() }
}

fn stops(count: usize) -> pb::GenerateRequest {
    pb::GenerateRequest { stop: vec![String::new(); count], ..Default::default() }
}

fn stop_ids(count: usize) -> pb::GenerateRequest {
    pb::GenerateRequest { stop_token_ids: vec![0; count], ..Default::default() }
}

fn received(count: usize) -> pb::GenerateRequest {
    pb::GenerateRequest { received_ids: vec![1 << 20; count], ..Default::default() }
}

#[test]
fn every_list_stops_at_its_bound() {
    type Make = fn(usize) -> pb::GenerateRequest;
    let lists: [(&str, Make, usize); 6] = [
        ("prompt", tokens, limits::PROMPT_TOKENS),
        ("messages", messages, limits::CHAT_MESSAGES),
        ("logit_bias", biases, limits::LOGIT_BIAS),
        ("stop", stops, limits::STOP_STRINGS),
        ("stop_token_ids", stop_ids, limits::STOP_TOKENS),
        ("received_ids", received, limits::PROMPT_TOKENS),
    ];
    for (name, make, limit) in lists {
        check(&make(limit)).unwrap();
        let error = check(&make(limit + 1)).unwrap_err();
        assert!(error.starts_with(&format!("{name} may have a length of {limit}")), "{error}");
        // Messages on the wire are joined by writing them one after another.
        let mut joined = make(limit).encode_to_vec();
        joined.extend(make(1).encode_to_vec());
        assert!(check_bytes(&joined).unwrap_err().starts_with(name), "{name}");
    }
    // Each id in a field of its own: field 14, a varint.
    let single = [14 << 3, 5].repeat(limits::PROMPT_TOKENS + 1);
    assert!(check_bytes(&single).unwrap_err().starts_with("received_ids"));
}

#[test]
fn what_is_not_in_the_schema_is_bounded_too() {
    // Field 100, a varint, in the request and in a message of its conversation.
    let unknown = [0xa0, 0x06, 0].repeat(walk::FIELDS + 1);
    check_bytes(&unknown[..3 * 1000]).unwrap();
    assert!(check_bytes(&unknown).unwrap_err().starts_with("the request"));
    let nested = |field: u8, inner: &[u8]| {
        let mut outer = vec![field << 3 | 2];
        prost::encoding::encode_varint(inner.len() as u64, &mut outer);
        outer.extend_from_slice(inner);
        outer
    };
    for path in [[3, 0, 0], [4, 0, 0], [4, 1, 0], [6, 0, 0], [6, 8, 0]] {
        let parts = path.iter().rev().filter(|field| **field != 0);
        let request = parts.fold(unknown.clone(), |inner, &field| nested(field, &inner));
        assert!(check_bytes(&request).unwrap_err().starts_with("the request"), "{path:?}");
    }
    for broken in [&[0x0b][..], &[0x0a, 5, 1], &[0x80], &[0xff; 11], &[0x09, 1], &[0x0d, 1]] {
        assert!(check_bytes(broken).is_err(), "{broken:?}");
    }
}

#[test]
fn what_a_caller_sends_unreadably_is_its_own_fault() {
    use tonic::Code;
    // Field 2, text, whose byte is no UTF-8; and the same in a message of a conversation.
    for (bytes, field) in [
        (&[2 << 3 | 2, 1, 0xff][..], "GenerateRequest.prompt: "),
        (&[4 << 3 | 2, 5, 1 << 3 | 2, 3, 2 << 3 | 2, 1, 0xff], "ChatMessage.content: "),
    ] {
        check_request(bytes).unwrap();
        let error = pb::GenerateRequest::decode(bytes).unwrap_err();
        let status = undecodable::<pb::GenerateRequest>(error);
        assert_eq!(status.code(), Code::InvalidArgument);
        let words = status.message();
        assert!(words.starts_with(MALFORMED) && words.contains(field), "{words}");
        assert!(!words.contains("failed to decode"), "{words}");
    }
    let error = || pb::StatusRequest::decode(&[0x0a, 5][..]).unwrap_err();
    assert_eq!(undecodable::<pb::StatusRequest>(error()).code(), Code::InvalidArgument);
    assert_eq!(undecodable::<pb::PrepareRequest>(error()).code(), Code::InvalidArgument);
    // A server's answer that cannot be read is nobody's argument.
    assert_eq!(undecodable::<pb::GenerateEvent>(error()).code(), Code::Internal);
}

proptest! {
    #[test]
    fn what_passes_the_walk_is_small(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        if check_request(&bytes).is_ok()
            && let Ok(request) = pb::GenerateRequest::decode(bytes.as_slice())
        {
            prop_assert!(request.stop.len() <= limits::STOP_STRINGS);
            prop_assert!(request.stop_token_ids.len() <= limits::STOP_TOKENS);
        }
    }
}

/// The entries of each list of each message, as empty as the wire has them: two bytes.
#[test]
fn lists_of_the_data_plane_stop_at_their_bounds() {
    type Check = fn(&[u8]) -> Result<(), TooMany>;
    let nested = |path: &[u8], entries: Vec<u8>| {
        path.iter().rev().fold(entries, |inner, field| {
            let mut outer = vec![field << 3 | 2];
            prost::encoding::encode_varint(inner.len() as u64, &mut outer);
            outer.extend_from_slice(&inner);
            outer
        })
    };
    let rows: Check = check_row_set;
    let results: Check = check_result_set;
    let step = limits::STEP_ROWS;
    for (check, path, list, limit) in [
        (rows, &[1][..], "rows", step),
        (rows, &[2], "ended_sequences", limits::ENDED_SEQUENCES),
        (rows, &[3], "stage_times", limits::STAGES),
        (rows, &[1, 4], "tokens of the step", limits::STEP_TOKENS),
        (rows, &[1, 10], "score_targets", limits::STEP_TOKENS),
        (rows, &[1, 9, 10], "logit_bias", step * limits::LOGIT_BIAS),
        (rows, &[1, 9, 11], "token counts of the step", 16 * limits::TOKEN_COUNTS),
        (rows, &[1, 14, 3], "top_logprobs", step * 20),
        (results, &[1], "rows", step),
        (results, &[2], "stage_times", limits::STAGES),
        (results, &[1, 9], "top_logprobs", step * 20),
        (results, &[1, 10], "scores", limits::STEP_TOKENS),
        (check_description, &[12], "held", limits::HELD_STAGES),
        (check_stages, &[9], "stages", limits::STAGES),
        (check_status, &[6], "workers", 64 << 10),
        (check_status, &[7, 4], "stages of the pipelines", 64 << 10),
        (check_event, &[1, 7, 4], "top", 512 << 10),
        (check_event, &[2, 4], "logprobs", limits::PROMPT_TOKENS),
    ] {
        let (last, above) = path.split_last().unwrap();
        let entries = |count: usize| nested(above, [last << 3 | 2, 0].repeat(count));
        // An empty packed list has no number in it: those come one a field.
        let is_numbers = check(&entries(limit + 1)).is_ok();
        let entries = |count: usize| match is_numbers {
            true => nested(above, [last << 3, 5].repeat(count)),
            false => entries(count),
        };
        check(&entries(limit)).unwrap();
        let error = check(&entries(limit + 9)).unwrap_err();
        assert_eq!(error, TooMany::Entries { list, limit, found: limit + 1 }, "{path:?}");
    }
    // Packed, as everybody writes them.
    let blocks = pb::Row { block_ids: vec![300; limits::ROW_BLOCKS], ..Default::default() };
    let set = |rows| pb::RowSet { rows, ..Default::default() }.encode_to_vec();
    check_row_set(&set(vec![blocks])).unwrap();
    let targets = pb::Row { score_targets: vec![300; step + 1], ..Default::default() };
    assert!(check_row_set(&set(vec![targets])).is_err());
    let scores = pb::RowResult { scores: vec![1.0; step + 1], ..Default::default() };
    let set = pb::ResultSet { rows: vec![scores], ..Default::default() };
    assert!(check_result_set(&set.encode_to_vec()).is_err());
    assert_eq!(check_row_set(&[0x0a, 5, 1]), Err(TooMany::Malformed));
}

#[test]
fn what_arrives_is_walked_before_it_is_built() {
    let held = [12 << 3 | 2, 0].repeat(limits::HELD_STAGES + 1);
    assert!(super::check::<pb::DescribeResponse>(&held).is_err());
    let stages = [9 << 3 | 2, 0].repeat(limits::STAGES + 1);
    assert!(super::check::<pb::PrepareRequest>(&stages).is_err());
    let stops = [7 << 3 | 2, 0].repeat(limits::STOP_STRINGS + 1);
    assert!(super::check::<pb::GenerateRequest>(&stops).is_err());
    let workers = [6 << 3 | 2, 0].repeat((64 << 10) + 1);
    assert!(super::check::<pb::StatusResponse>(&workers).is_err());
    let logprobs = [4 << 3 | 2, 0].repeat(limits::PROMPT_TOKENS + 1);
    let mut event = vec![2 << 3 | 2];
    prost::encoding::encode_varint(logprobs.len() as u64, &mut event);
    event.extend(logprobs);
    assert!(super::check::<pb::GenerateEvent>(&event).is_err());
}
