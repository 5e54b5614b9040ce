//! Library and commands for people: generate, chat, status, bench of a cluster; drain, roll and plan
//! for its operators.
//!
//! [`Client`] speaks to a coordinator's gRPC interface in the domain types of `proto`. The commands
//! print for people on a terminal and for programs with `--json`; their arguments are clap structs
//! that the root package puts beside `--model`, so that a cluster in the same process is used
//! through exactly this code.
//!
//! ```text
//! args ──▶ GenerateRequest ──▶ Client ──gRPC──▶ coordinator
//!                                │
//! stdout ◀── text as it comes ◀──┴── Answer: a stream of GenerateEvent
//! ```

pub mod bench;
pub mod chat;
pub mod command;
pub mod drain;
pub mod endpoint;
pub mod generate;
mod grpc;
pub mod operator;
pub mod request;
pub mod roll;
pub mod status;
pub mod waiting;

pub use command::CommandError;
pub use endpoint::Endpoint;
pub use grpc::{Answer, Client, ClientError, Refusal, Stranger};
pub use operator::{Operator, OperatorError};
