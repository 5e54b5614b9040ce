//! Requests at and beyond every bound, in each form that the wire has for them.

use proptest::prelude::*;
use prost::Message;

use super::*;
use pb::generate_request::Prompt;

fn check(request: &pb::GenerateRequest) -> Result<(), String> {
    check_request(&request.encode_to_vec())
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
        assert!(check_request(&joined).unwrap_err().starts_with(name), "{name}");
    }
    // Each id in a field of its own: field 14, a varint.
    let single = [14 << 3, 5].repeat(limits::PROMPT_TOKENS + 1);
    assert!(check_request(&single).unwrap_err().starts_with("received_ids"));
}

#[test]
fn what_is_not_in_the_schema_is_bounded_too() {
    // Field 100, a varint, in the request and in a message of its conversation.
    let unknown = [0xa0, 0x06, 0].repeat(REQUEST_FIELDS + 1);
    check_request(&unknown[..3 * 1000]).unwrap();
    assert!(check_request(&unknown).unwrap_err().starts_with("the request"));
    let nested = |field: u8, inner: &[u8]| {
        let mut outer = vec![field << 3 | 2];
        prost::encoding::encode_varint(inner.len() as u64, &mut outer);
        outer.extend_from_slice(inner);
        outer
    };
    for path in [[3, 0, 0], [4, 0, 0], [4, 1, 0], [6, 0, 0], [6, 8, 0]] {
        let parts = path.iter().rev().filter(|field| **field != 0);
        let request = parts.fold(unknown.clone(), |inner, &field| nested(field, &inner));
        assert!(check_request(&request).unwrap_err().starts_with("the request"), "{path:?}");
    }
    for broken in [&[0x0b][..], &[0x0a, 5, 1], &[0x80], &[0xff; 11], &[0x09, 1], &[0x0d, 1]] {
        assert!(check_request(broken).is_err(), "{broken:?}");
    }
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
