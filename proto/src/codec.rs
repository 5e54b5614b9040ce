//! Messages as tonic reads and writes them, but that a client's request is walked before it is
//! built: protobuf spends two bytes on an empty text for which memory holds twenty-four, so a
//! message within its limit of bytes may still be endless in entries.

use std::any::TypeId;
use std::marker::PhantomData;

use bytes::Buf;
use prost::Message;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic_prost::{ProstCodec, ProstEncoder};

use crate::{limits, pb};

#[cfg(test)]
mod tests;

/// Fields of one request and of all that is in it, unknown ones too: as many ids as a prompt and the
/// part of an answer that a client has may have, each in a field of its own, and room for the rest.
const REQUEST_FIELDS: usize = 2 * limits::PROMPT_TOKENS + (64 << 10);

/// The codec of every service in the schema.
#[derive(Clone, Copy, Debug)]
pub struct WalkedCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for WalkedCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for WalkedCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = WalkedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::default().encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        WalkedDecoder(PhantomData)
    }
}

/// Walks what clients send, then builds it.
#[derive(Clone, Copy, Debug)]
pub struct WalkedDecoder<U>(PhantomData<U>);

impl<U: Message + Default + 'static> Decoder for WalkedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // Shares the buffer's memory.
        let message = buffer.copy_to_bytes(buffer.remaining());
        if TypeId::of::<U>() == TypeId::of::<pb::GenerateRequest>() {
            check_request(&message).map_err(Status::invalid_argument)?;
        }
        if TypeId::of::<U>() == TypeId::of::<pb::PrepareRequest>() {
            check_stages(&message).map_err(Status::invalid_argument)?;
        }
        U::decode(message).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

/// Counts the entries of a request's lists, in place, and stops at the first that is too long.
///
/// # Errors
///
/// Which list may have how many entries; or that the bytes are no message.
fn check_request(message: &[u8]) -> Result<(), String> {
    let mut counts = Counts::default();
    walk(message, &mut counts, &mut |counts, field, value| match (field, value) {
        (3, Value::Bytes(tokens)) => walk(tokens, counts, &mut |counts, field, value| {
            if field == 1 { counts.ids(Counted::PromptIds, value) } else { Ok(()) }
        }),
        (4, Value::Bytes(conversation)) => {
            walk(conversation, counts, &mut |counts, field, value| match (field, value) {
                (1, Value::Bytes(message)) => {
                    counts.add(Counted::Messages, 1)?;
                    walk(message, counts, &mut |_, _, _| Ok(()))
                }
                _ => Ok(()),
            })
        }
        (6, Value::Bytes(sampling)) => {
            walk(sampling, counts, &mut |counts, field, value| match (field, value) {
                (8, Value::Bytes(bias)) => {
                    counts.add(Counted::Biases, 1)?;
                    walk(bias, counts, &mut |_, _, _| Ok(()))
                }
                _ => Ok(()),
            })
        }
        (7, _) => counts.add(Counted::Stops, 1),
        (8, value) => counts.ids(Counted::StopIds, value),
        (14, value) => counts.ids(Counted::ReceivedIds, value),
        _ => Ok(()),
    })
}

/// Counts the stages of a plan: two bytes of an empty one are a hundred in memory.
///
/// # Errors
///
/// As [`check_request`].
fn check_stages(message: &[u8]) -> Result<(), String> {
    walk(message, &mut Counts::default(), &mut |counts, field, _| match field {
        9 => counts.add(Counted::Stages, 1),
        _ => Ok(()),
    })
}

/// What is counted. The parts of a message may come in pieces, which are joined: so counts go over
/// the whole request.
#[derive(Clone, Copy)]
enum Counted {
    Fields,
    PromptIds,
    Messages,
    Biases,
    Stops,
    StopIds,
    ReceivedIds,
    Stages,
}

#[derive(Default)]
struct Counts([usize; 8]);

impl Counts {
    fn add(&mut self, counted: Counted, more: usize) -> Result<(), String> {
        let (name, limit) = match counted {
            Counted::Fields => ("the request", REQUEST_FIELDS),
            Counted::PromptIds => ("prompt", limits::PROMPT_TOKENS),
            Counted::Messages => ("messages", limits::CHAT_MESSAGES),
            Counted::Biases => ("logit_bias", limits::LOGIT_BIAS),
            Counted::Stops => ("stop", limits::STOP_STRINGS),
            Counted::StopIds => ("stop_token_ids", limits::STOP_TOKENS),
            Counted::ReceivedIds => ("received_ids", limits::PROMPT_TOKENS),
            Counted::Stages => ("stages", limits::STAGES),
        };
        let count = &mut self.0[counted as usize];
        *count += more;
        if *count <= limit {
            return Ok(());
        }
        Err(format!("{name} may have a length of {limit}, found more"))
    }

    /// Ids come packed, or each in a field of its own.
    fn ids(&mut self, counted: Counted, value: Value<'_>) -> Result<(), String> {
        let ids = match value {
            // Every varint ends with a byte whose high bit is clear.
            Value::Bytes(packed) => packed.iter().filter(|byte| **byte < 0x80).count(),
            Value::Other => 1,
        };
        self.add(counted, ids)
    }
}

/// The value of a field, as far as the wire tells.
#[derive(Clone, Copy)]
enum Value<'m> {
    Bytes(&'m [u8]),
    Other,
}

/// Calls `visit` with every field of one message.
fn walk<'m>(
    message: &'m [u8],
    counts: &mut Counts,
    visit: &mut dyn FnMut(&mut Counts, u64, Value<'m>) -> Result<(), String>,
) -> Result<(), String> {
    let malformed = || "the message is not a protobuf message of this schema".to_owned();
    let mut rest = message;
    while !rest.is_empty() {
        counts.add(Counted::Fields, 1)?;
        let key = varint(&mut rest).ok_or_else(malformed)?;
        let value = match key & 7 {
            0 => varint(&mut rest).map(|_| Value::Other),
            1 => take(&mut rest, 8).map(|_| Value::Other),
            2 => {
                let length = varint(&mut rest).and_then(|length| usize::try_from(length).ok());
                length.and_then(|length| take(&mut rest, length)).map(Value::Bytes)
            }
            5 => take(&mut rest, 4).map(|_| Value::Other),
            // Groups, which the schema has none of.
            _ => None,
        };
        visit(counts, key >> 3, value.ok_or_else(malformed)?)?;
    }
    Ok(())
}

fn take<'m>(rest: &mut &'m [u8], bytes: usize) -> Option<&'m [u8]> {
    let (taken, left) = rest.split_at_checked(bytes)?;
    *rest = left;
    Some(taken)
}

/// A varint of at most ten bytes.
fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, left) = rest.split_first()?;
        *rest = left;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}
