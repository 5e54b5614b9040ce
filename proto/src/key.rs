//! The secret by which workers know their coordinator, and how it travels: in the header
//! [`HEADER`] of every call to a worker but `Describe`.
//!
//! A coordinator makes a key at its start and writes the digest into the leader's record in the
//! registry, where only members of the cluster write. A worker that is called compares the two.

use std::fmt;

use serde::{Deserialize, Serialize};
use tonic::metadata::{MetadataMap, MetadataValue};

use crate::convert::WireError;
use crate::ids::{Incarnation, KeyDigest};

/// The gRPC header that carries the key's bytes.
pub const HEADER: &str = "tercet-coordinator-key-bin";

/// Random, of one coordinator process. Not shown: who knows it can act as that coordinator.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CoordinatorKey([u8; 16]);

impl CoordinatorKey {
    /// A key of these bytes, which must come from a random source that cannot be guessed.
    pub const fn new(random: [u8; 16]) -> Self {
        Self(random)
    }

    /// What may be shown: the key cannot be found from it.
    pub fn digest(&self) -> KeyDigest {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"tercet coordinator key 1");
        hasher.update(&self.0);
        KeyDigest(*hasher.finalize().as_bytes())
    }

    /// Puts the key into the headers of a call.
    pub fn attach<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.metadata_mut().insert_bin(HEADER, MetadataValue::from_bytes(&self.0));
        request
    }

    /// The key in the headers of a call; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`WireError`] if the header is not base64 of 16 bytes.
    pub fn of(headers: &MetadataMap) -> Result<Option<Self>, WireError> {
        let Some(value) = headers.get_bin(HEADER) else { return Ok(None) };
        let bytes = value.to_bytes().ok().and_then(|bytes| <[u8; 16]>::try_from(&bytes[..]).ok());
        bytes.map(|bytes| Some(Self(bytes))).ok_or(WireError::Invalid {
            field: HEADER,
            expected: "16 bytes in base64",
            found: "something else".into(),
        })
    }
}

impl fmt::Debug for CoordinatorKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CoordinatorKey(..)")
    }
}

/// What the leading coordinator says of itself under the leader key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LeaderRecord {
    /// [`LEADER_FORMAT`](crate::plan::LEADER_FORMAT) of who wrote it.
    pub format: u32,
    /// Where others reach its gRPC server: `host:port`.
    pub address: String,
    /// Where others reach its HTTP server: `host:port`.
    pub http: String,
    /// Of this process start.
    pub incarnation: Incarnation,
    /// Of its key; `None` in a record that names none: then none is demanded.
    pub key_digest: Option<KeyDigest>,
    /// Names the socket of its gRPC server, see [`is_successor`](crate::plan::is_successor); empty:
    /// unknown.
    pub socket: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_travels_and_is_not_shown() {
        let key = CoordinatorKey::new([0xab; 16]);
        let request = key.attach(());
        assert_eq!(CoordinatorKey::of(request.metadata()), Ok(Some(key)));
        assert_eq!(CoordinatorKey::of(&MetadataMap::new()), Ok(None));
        assert!(!format!("{key:?} {request:?}").contains("171"), "{request:?}");
        assert_ne!(key.digest(), CoordinatorKey::new([0xac; 16]).digest());
    }

    #[test]
    fn a_header_that_is_no_key_is_refused() {
        for bytes in [&b""[..], &[1; 15], &[1; 17]] {
            let mut headers = MetadataMap::new();
            headers.insert_bin(HEADER, MetadataValue::from_bytes(bytes));
            assert!(CoordinatorKey::of(&headers).is_err(), "{bytes:?}");
        }
    }
}
