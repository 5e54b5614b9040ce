//! The identifiers that cross the wire.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number_id!(
    /// One of several pipelines of a model; constant over its epochs.
    PipelineId(u64)
);
number_id!(
    /// The registry revision at which a pipeline's stages last changed.
    Epoch(u64)
);
number_id!(
    /// A coordinator's reign: the create-revision of the leader key.
    Term(u64)
);
number_id!(
    /// One generation in progress.
    SequenceId(u64)
);
number_id!(
    /// Counts a sequence's restarts; an older one is stale.
    Generation(u32)
);
number_id!(
    /// Numbers the steps of one epoch from 1.
    StepId(u64)
);
number_id!(
    /// A block of the KV cache: the same id on every stage.
    BlockId(u32)
);

/// A pipeline as it was at one epoch: what events, actions, messages and log lines name. Written
/// `1@42`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PipelineRef {
    /// Which pipeline.
    pub id: PipelineId,
    /// Since when its stages are as they are.
    pub epoch: Epoch,
}

impl fmt::Display for PipelineRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.id, self.epoch)
    }
}

/// Bytes that should have been an id were not.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what} must be {expected_bytes} bytes, found {found_bytes}")]
pub struct IdLengthError {
    /// Which id.
    pub what: &'static str,
    /// How long it is.
    pub expected_bytes: usize,
    /// How long the bytes were.
    pub found_bytes: usize,
}

/// A text that should have been an id in hexadecimal was not.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what} must be {digits} hexadecimal digits")]
pub struct IdTextError {
    /// Which id.
    pub what: &'static str,
    /// How many digits it has.
    pub digits: usize,
}

macro_rules! bytes_id {
    ($(#[$doc:meta])* $name:ident[$len:literal] $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl TryFrom<&[u8]> for $name {
            type Error = IdLengthError;
            fn try_from(bytes: &[u8]) -> Result<Self, IdLengthError> {
                bytes.try_into().map(Self).map_err(|_| IdLengthError {
                    what: $what,
                    expected_bytes: $len,
                    found_bytes: bytes.len(),
                })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = IdTextError;
            fn from_str(text: &str) -> Result<Self, IdTextError> {
                let error = IdTextError { what: $what, digits: 2 * $len };
                if text.len() != 2 * $len || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                    return Err(error);
                }
                let mut bytes = [0; $len];
                for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
                    let digit = |d: u8| (d as char).to_digit(16).unwrap_or_default() as u8;
                    *byte = digit(digits[0]) << 4 | digit(digits[1]);
                }
                Ok(Self(bytes))
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

bytes_id!(
    /// Hash of a model's logical content.
    ModelId[32] "a model id"
);
bytes_id!(
    /// Everything that can change a bit of the output, hashed.
    NumericsClass[32] "a numerics class"
);
bytes_id!(
    /// Digest of the known-answer test that a worker ran at its start.
    KnownAnswer[32] "a known-answer digest"
);
bytes_id!(
    /// Digest of a [`CoordinatorKey`](crate::key::CoordinatorKey).
    KeyDigest[32] "a key's digest"
);
bytes_id!(
    /// Random id of one process start.
    Incarnation[16] "an incarnation"
);
bytes_id!(
    /// Hash of a sequence's tokens up to a position: a chain over single tokens.
    PrefixHash[16] "a prefix hash"
);

impl Incarnation {
    /// Of no process: what a message or a record without an incarnation has.
    pub const NONE: Self = Self([0; 16]);
}

impl PrefixHash {
    /// The hash of no tokens.
    pub const EMPTY: Self = Self([0; 16]);

    /// The hash after one more token: the first 16 bytes of BLAKE3(hash, token little endian).
    pub fn then(self, token: u32) -> Self {
        let mut input = [0; 20];
        input[..16].copy_from_slice(&self.0);
        input[16..].copy_from_slice(&token.to_le_bytes());
        let mut hash = [0; 16];
        hash.copy_from_slice(&blake3::hash(&input).as_bytes()[..16]);
        Self(hash)
    }

    /// The hash after all of `tokens`.
    pub fn then_all(self, tokens: &[u32]) -> Self {
        tokens.iter().fold(self, |hash, &token| hash.then(token))
    }
}

impl NumericsClass {
    /// H(model id, KV type, kernel revision, known-answer digest): formed when a plan is made.
    pub fn form(
        model: ModelId,
        kv_type: crate::plan::KvType,
        kernel_revision: u32,
        known_answer: KnownAnswer,
    ) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"tercet numerics class 1");
        hasher.update(&model.0);
        hasher.update(kv_type.name().as_bytes());
        hasher.update(&kernel_revision.to_le_bytes());
        hasher.update(&known_answer.0);
        Self(*hasher.finalize().as_bytes())
    }
}
