//! The ports that processes listen on unless they are told others, and clients ask at.

/// A coordinator's gRPC API.
pub const COORDINATOR_GRPC: u16 = 7420;

/// A coordinator's HTTP API.
pub const COORDINATOR_HTTP: u16 = 8080;

/// A worker's stage service.
pub const WORKER: u16 = 7071;
