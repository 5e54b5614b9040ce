//! Messages as tonic reads and writes them, but that each which has lists is walked before it is
//! built: protobuf spends two bytes on an empty row for which memory holds three hundred, so a
//! message within its limit of bytes may still be endless in entries.

use std::any::TypeId;
use std::marker::PhantomData;

use bytes::Buf;
use prost::Message;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic_prost::{ProstCodec, ProstEncoder};

use crate::pb;

mod walk;

#[cfg(test)]
mod tests;

pub(crate) use walk::{TooMany, check_result_set, check_row_set};
use walk::{check_description, check_event, check_request, check_stages, check_status};

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
        check::<U>(&message).map_err(|error| unreadable::<U>(error.to_string()))?;
        U::decode(message).map(Some).map_err(undecodable::<U>)
    }
}

/// Walks a message of the type `U`, if that has lists.
fn check<U: 'static>(message: &[u8]) -> Result<(), TooMany> {
    let is = |other| TypeId::of::<U>() == other;
    match () {
        () if is(TypeId::of::<pb::GenerateRequest>()) => check_request(message),
        () if is(TypeId::of::<pb::GenerateEvent>()) => check_event(message),
        () if is(TypeId::of::<pb::StatusResponse>()) => check_status(message),
        () if is(TypeId::of::<pb::PrepareRequest>()) => check_stages(message),
        () if is(TypeId::of::<pb::DescribeResponse>()) => check_description(message),
        // What a step and a result carry is walked where it is decoded.
        () => Ok(()),
    }
}

const MALFORMED: &str = "the message is not a protobuf message of this schema";

/// What a message `U` that cannot be built means to its sender.
fn undecodable<U: 'static>(error: prost::DecodeError) -> Status {
    let words = error.to_string();
    // The library names the field; what stands before that is said in our words.
    let detail = words.strip_prefix("failed to decode Protobuf message: ").unwrap_or(&words);
    unreadable::<U>(format!("{MALFORMED}: {detail}"))
}

/// What is wrong with a message, as a fault of whoever sent it: a caller's argument, or a server's answer.
fn unreadable<U: 'static>(words: String) -> Status {
    if is_request::<U>() { Status::invalid_argument(words) } else { Status::internal(words) }
}

/// Whether a message begins a call: then it is the caller's fault if it cannot be read. Those of a
/// stream of steps stay internal errors: workers tell by the code what broke the stream.
fn is_request<U: 'static>() -> bool {
    let requests = [
        TypeId::of::<pb::GenerateRequest>(),
        TypeId::of::<pb::StatusRequest>(),
        TypeId::of::<pb::PrepareRequest>(),
        TypeId::of::<pb::ActivateRequest>(),
        TypeId::of::<pb::RetireRequest>(),
        TypeId::of::<pb::DismissRequest>(),
        TypeId::of::<pb::DescribeRequest>(),
        TypeId::of::<pb::ResultsRequest>(),
        TypeId::of::<pb::DrainRequest>(),
        TypeId::of::<pb::PlanRequest>(),
        TypeId::of::<pb::QuestionRequest>(),
    ];
    requests.contains(&TypeId::of::<U>())
}
