//! Every contract between processes: the `tercet.v1` schema, its domain types, conversions, ids
//! and etcd keys. No decisions, no sockets.
//!
//! [`pb`] is generated. Nothing outside the `grpc`, `link` and `workers` files of the other rooms
//! may name it: inside, values are the domain types of this crate, valid by construction.

pub mod codec;
pub mod convert;
pub mod generate;
pub mod held;
pub mod ids;
pub mod key;
pub mod keys;
pub mod limits;
pub mod names;
pub mod operator;
pub mod plan;
pub mod ports;
pub mod status;
pub mod step;

/// The generated messages, clients and servers of `tercet.v1`.
pub mod pb {
    #![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated code")]
    #![allow(
        clippy::allow_attributes_without_reason,
        clippy::missing_errors_doc,
        reason = "generated code"
    )]
    tonic::include_proto!("tercet.v1");
}

/// The encoded descriptors of `tercet.v1`, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Tokens in one block of the KV cache.
pub const BLOCK_TOKENS: u32 = 32;
