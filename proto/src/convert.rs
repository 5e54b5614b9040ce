//! Between the generated messages and the domain types, checked on the receiving side only.
//!
//! Encoding cannot fail. Decoding checks every length against [`crate::limits`] and every field
//! against its meaning, so that a domain value which exists is valid by itself; what depends on a
//! model or a pipeline (token ids, block ids, widths) is checked by whoever knows them.

mod inference;
mod operator;
mod stage;

pub use inference::{
    decode_event, decode_generate, decode_status, encode_event, encode_generate, encode_status,
};
pub use operator::{
    decode_drain, decode_drained, decode_planned, encode_drain, encode_drained, encode_planned,
};
pub use stage::{
    decode_description, decode_prepare, decode_reply, decode_result, decode_step,
    decode_step_header, encode_held, encode_prepare, encode_reply, encode_result, encode_step,
    step_crc32c,
};

use crate::codec::TooMany;
use crate::ids::IdLengthError;

/// Why a message was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum WireError {
    /// The payload is not what its sender computed.
    #[error("payload of step {step} has checksum {found:08x}, its header says {expected:08x}")]
    Corrupt {
        /// Which step.
        step: u64,
        /// In the header.
        expected: u32,
        /// Of the bytes that arrived.
        found: u32,
    },
    /// Bytes that should hold a message do not.
    #[error("{field} does not decode")]
    Undecodable {
        /// Which field.
        field: &'static str,
        /// Why.
        source: prost::DecodeError,
    },
    /// A field that must be there is not.
    #[error("{field} is missing")]
    Missing {
        /// Which field.
        field: &'static str,
    },
    /// A list, text or number is larger than allowed.
    #[error("{field} is {found}, the limit is {limit}")]
    TooLarge {
        /// Which field.
        field: &'static str,
        /// Its size.
        found: u64,
        /// The most it may be.
        limit: u64,
    },
    /// A field has no such meaning.
    #[error("{field} must be {expected}, found {found}")]
    Invalid {
        /// Which field.
        field: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it was.
        found: String,
    },
    /// An id has the wrong length.
    #[error(transparent)]
    Id(#[from] IdLengthError),
}

/// `found` if it does not pass `limit`.
fn bounded(field: &'static str, found: usize, limit: usize) -> Result<usize, WireError> {
    if found <= limit {
        Ok(found)
    } else {
        Err(WireError::TooLarge { field, found: found as u64, limit: limit as u64 })
    }
}

/// `error` of the field `field`, whose bytes are a message of their own.
fn uncounted(field: &'static str, error: TooMany) -> WireError {
    match error {
        TooMany::Entries { list, limit, found } => {
            WireError::TooLarge { field: list, found: found as u64, limit: limit as u64 }
        }
        TooMany::Malformed => WireError::Invalid {
            field,
            expected: "a message of the schema",
            found: "something else".into(),
        },
    }
}

fn bounded_text(field: &'static str, text: String, limit: usize) -> Result<String, WireError> {
    bounded(field, text.len(), limit).map(|_| text)
}

/// `text` cut to `limit` bytes at a character boundary: details are for people, never refused.
fn clipped(mut text: String, limit: usize) -> String {
    if text.len() > limit {
        let cut = (0..=limit).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
        text.truncate(cut);
    }
    text
}

#[cfg(test)]
mod tests;
