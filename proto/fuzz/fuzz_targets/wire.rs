//! Any bytes as any message: decoding refuses or accepts, and never panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use proto::{convert, pb};

fuzz_target!(|input: (u8, Vec<u8>)| {
    let (kind, bytes) = input;
    match kind % 6 {
        0 => {
            if let Ok(mut message) = pb::StepMessage::decode(&bytes[..]) {
                // Make the checksum true, or no input would ever get behind it.
                message.payload_crc32c = convert::step_crc32c(
                    message.epoch,
                    message.step,
                    &message.rows,
                    &message.activations,
                );
                if let Ok(step) = convert::decode_step(message) {
                    let again = convert::decode_step(convert::encode_step(&step));
                    assert!(again.is_ok(), "what was accepted is accepted again");
                }
            }
        }
        1 => {
            let _ = pb::StepResult::decode(&bytes[..]).map(convert::decode_result);
        }
        2 => {
            let _ = pb::StepReply::decode(&bytes[..]).map(convert::decode_reply);
        }
        3 => {
            let _ = pb::PrepareRequest::decode(&bytes[..]).map(convert::decode_prepare);
        }
        4 => {
            let _ = pb::GenerateRequest::decode(&bytes[..]).map(convert::decode_generate);
        }
        _ => {
            let _ = pb::GenerateEvent::decode(&bytes[..]).map(convert::decode_event);
        }
    }
});
