//! Why a worker could not start or stop well, why it refuses a call, and the one map from that to
//! `tonic::Status`.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use node::membership::MembershipError;
use node::{Chain, SupervisorError};
use proto::ids::{Incarnation, KnownAnswer, ModelId};
use tonic::{Code, Status};

use crate::bridge::IN_FLIGHT_MAX;
use crate::config::ConfigError;
use crate::engine::EngineError;
use crate::session::epochs::EpochError;
use crate::stage::ReaderEnd;
use crate::witness::WitnessError;

/// Why a worker ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A field of the configuration is wrong.
    #[error("the worker's configuration is refused")]
    Config(#[from] ConfigError),
    /// There is nothing to compute with.
    #[error(
        "{} {}: name a store, or a directory of stores, with --store or as store in [worker]",
        path.display(),
        if *exists { "neither is a store nor holds one" } else { "does not exist" }
    )]
    NoStore {
        /// Whether there is anything.
        exists: bool,
        /// Where it looked.
        path: PathBuf,
    },
    /// A store cannot be used.
    #[error("failed to open a model store")]
    Store(#[from] model::StoreError),
    /// The chosen kernels compute something else than their definition.
    #[error(
        "the kernels {isa} fail their known-answer test on this machine: {found} instead of \
         {expected}; choose others with --isa scalar"
    )]
    KnownAnswer {
        /// The chosen kernels.
        isa: &'static str,
        /// What they give.
        found: KnownAnswer,
        /// What the definition gives.
        expected: KnownAnswer,
    },
    /// A layer could not be timed.
    #[error("failed to measure the speed of a layer")]
    Measure(#[source] EngineError),
    /// A start-up task panicked.
    #[error("the start-up checks failed")]
    StartUp(#[source] tokio::task::JoinError),
    /// The address is taken, or not ours.
    #[error("failed to listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the operating system said.
        source: io::Error,
    },
    /// gRPC reflection has no such descriptors.
    #[error("failed to set up gRPC reflection")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// The worker's record cannot be written down.
    #[error("failed to encode the worker's record")]
    Record(#[source] serde_json::Error),
    /// The registry does not take the worker in.
    #[error("failed to register as worker {id}")]
    Register {
        /// Its name.
        id: String,
        /// What the registry said.
        source: MembershipError,
    },
    /// A task failed while it served.
    #[error("the worker stopped")]
    Serve(#[from] SupervisorError),
}

/// Why a message of a stream could not be read.
#[derive(Debug, thiserror::Error)]
#[error("a message of the stream cannot be read ({})", cause.name())]
pub(crate) struct UnreadableMessage {
    pub(crate) cause: UnreadableCause,
    source: Status,
}

/// The kinds of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UnreadableCause {
    /// Longer than a message may be.
    Oversize,
    /// Not of the schema, or compressed in a way that is not known.
    Undecodable,
    /// It took too long.
    Late,
    /// It, or a call that sent none yet, made room for others.
    Crowded,
    /// The stream was reset, or its connection broke.
    Broken,
}

impl UnreadableCause {
    /// As a metric's label, and for people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Oversize => "oversize",
            Self::Undecodable => "undecodable",
            Self::Late => "late",
            Self::Crowded => "crowded",
            Self::Broken => "broken",
        }
    }
}

impl From<Status> for UnreadableMessage {
    /// By the codes that the library gives what it reads; a failure of the connection has a source.
    fn from(source: Status) -> Self {
        let is_of_the_connection = std::error::Error::source(&source).is_some();
        let cause = match source.code() {
            Code::OutOfRange => UnreadableCause::Oversize,
            Code::InvalidArgument => UnreadableCause::Undecodable,
            Code::DeadlineExceeded => UnreadableCause::Late,
            Code::Aborted | Code::ResourceExhausted => UnreadableCause::Crowded,
            Code::Internal | Code::Unimplemented if !is_of_the_connection => {
                UnreadableCause::Undecodable
            }
            _ => UnreadableCause::Broken,
        };
        Self { cause, source }
    }
}

/// Why a call is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServiceError {
    #[error(transparent)]
    Epoch(#[from] EpochError),
    #[error(transparent)]
    Witness(#[from] WitnessError),
    #[error("the caller does not show the key of the coordinator that prepared this stage")]
    Key,
    #[error("stage {stage} is for worker {worker} at {incarnation}, this is {own}")]
    NotThisWorker { stage: u32, worker: String, incarnation: Incarnation, own: String },
    #[error("{found} steps in flight are more than {IN_FLIGHT_MAX}")]
    InFlight { found: u32 },
    #[error("this worker has no store of model {model}")]
    UnknownModel { model: ModelId },
    #[error("the stages have {planned_layers} layers together, the model has {model_layers}")]
    Layers { planned_layers: u32, model_layers: u32 },
    #[error("steps of {found} tokens do not fit a message: {most} do")]
    StepTokens { found: u32, most: u32 },
    #[error("the stage needs {needed_bytes} bytes of memory, {available_bytes} are free")]
    Memory { needed_bytes: u64, available_bytes: u64 },
    #[error("failed to build the engine")]
    Engine(#[from] EngineError),
    #[error("the store was damaged since this worker opened it, and this worker ends: {detail}")]
    Damaged { detail: String },
    #[error("failed to start the engine's thread")]
    Thread(#[source] io::Error),
    #[error("building the engine panicked")]
    Build(#[source] tokio::task::JoinError),
    #[error("{limit} {calls} are open already")]
    Crowded { calls: &'static str, limit: usize },
    #[error("the epoch ended meanwhile")]
    Gone,
    #[error("stage {stage} of {stages} gives no results: the last one does")]
    NoResults { stage: u32, stages: usize },
    #[error(transparent)]
    ReaderEnd(#[from] ReaderEnd),
    #[error("the message is malformed")]
    Wire(#[from] proto::convert::WireError),
    #[error(transparent)]
    Unreadable(#[from] UnreadableMessage),
    #[error("the engine has stopped")]
    EngineStopped,
    #[error("this worker is stopping")]
    Closing,
}

impl ServiceError {
    /// What is counted: a closed set.
    pub(crate) fn cause(&self) -> &'static str {
        match self {
            Self::Key | Self::Witness(WitnessError::Key { .. }) => "key",
            Self::Epoch(EpochError::OldTerm { .. })
            | Self::Witness(WitnessError::NotTheLeader { .. }) => "term",
            Self::Epoch(EpochError::OtherCluster { .. })
            | Self::Witness(WitnessError::Cluster { .. }) => "cluster",
            Self::Epoch(EpochError::Draining) | Self::Closing => "closing",
            Self::Epoch(_) | Self::Witness(WitnessError::Epoch { .. }) | Self::Gone => "epoch",
            Self::Witness(WitnessError::Registry { .. } | WitnessError::TimedOut { .. }) => {
                "registry"
            }
            Self::Witness(WitnessError::Crowded { .. })
            | Self::Crowded { .. }
            | Self::Unreadable(UnreadableMessage { cause: UnreadableCause::Crowded, .. }) => {
                "crowded"
            }
            Self::NotThisWorker { .. } | Self::UnknownModel { .. } | Self::NoResults { .. } => {
                "misdirected"
            }
            Self::Layers { .. }
            | Self::InFlight { .. }
            | Self::StepTokens { .. }
            | Self::Wire(_)
            | Self::Unreadable(_)
            | Self::Engine(EngineError::Layers { .. } | EngineError::Zero { .. }) => "malformed",
            Self::Memory { .. }
            | Self::Engine(EngineError::Memory { .. } | EngineError::Threads { .. })
            | Self::Thread(_) => "memory",
            Self::ReaderEnd(_) => "ended",
            Self::Damaged { .. } | Self::Engine(_) | Self::Build(_) | Self::EngineStopped => {
                "failed"
            }
        }
    }

    /// Whether this worker refused or ended anything: a stream that broke was ended by its sender, or by the
    /// network.
    pub(crate) fn is_refusal(&self) -> bool {
        !matches!(self, Self::Unreadable(UnreadableMessage { cause: UnreadableCause::Broken, .. }))
    }

    /// Whether anybody can have it said as often as he likes.
    pub(crate) fn is_of_strangers(&self) -> bool {
        matches!(
            self,
            Self::Key
                | Self::Witness(_)
                | Self::Epoch(_)
                | Self::Wire(_)
                | Self::Unreadable(_)
                | Self::Crowded { .. }
        )
    }
}

impl From<ServiceError> for Status {
    fn from(error: ServiceError) -> Self {
        let code = match &error {
            ServiceError::UnknownModel { .. } => Code::NotFound,
            ServiceError::Memory { .. }
            | ServiceError::Engine(EngineError::Memory { .. } | EngineError::Threads { .. })
            | ServiceError::Thread(_) => Code::ResourceExhausted,
            ServiceError::Key | ServiceError::Witness(WitnessError::Key { .. }) => {
                Code::PermissionDenied
            }
            // Not RESOURCE_EXHAUSTED, which says that a stage does not fit here: these pass by themselves.
            ServiceError::Witness(
                WitnessError::Registry { .. }
                | WitnessError::TimedOut { .. }
                | WitnessError::Crowded { .. },
            )
            | ServiceError::Crowded { .. }
            // It says nothing against this worker: it, or another start of it, may be asked again.
            | ServiceError::Epoch(EpochError::Draining) => Code::Unavailable,
            ServiceError::Epoch(_)
            | ServiceError::Witness(
                WitnessError::NotTheLeader { .. }
                | WitnessError::Cluster { .. }
                | WitnessError::Epoch { .. },
            )
            | ServiceError::NotThisWorker { .. }
            | ServiceError::NoResults { .. }
            | ServiceError::Gone => Code::FailedPrecondition,
            ServiceError::Layers { .. }
            | ServiceError::InFlight { .. }
            | ServiceError::StepTokens { .. }
            | ServiceError::Wire(_)
            | ServiceError::Engine(EngineError::Layers { .. } | EngineError::Zero { .. }) => {
                Code::InvalidArgument
            }
            ServiceError::ReaderEnd(_) => Code::Aborted,
            ServiceError::Unreadable(UnreadableMessage { cause, .. }) => match cause {
                UnreadableCause::Oversize => Code::ResourceExhausted,
                UnreadableCause::Undecodable => Code::InvalidArgument,
                UnreadableCause::Late => Code::DeadlineExceeded,
                UnreadableCause::Crowded => Code::Unavailable,
                UnreadableCause::Broken => Code::Cancelled,
            },
            ServiceError::Closing => Code::Unavailable,
            ServiceError::Damaged { .. }
            | ServiceError::Engine(_)
            | ServiceError::Build(_)
            | ServiceError::EngineStopped => Code::Internal,
        };
        Self::new(code, Chain(&error).to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ended_a_stream_of_steps_is_told_apart() {
        // As `node::serve` and the library say it, and a reset, which has a source.
        let reset = || Status::from_error(io::Error::from(io::ErrorKind::ConnectionReset).into());
        for (status, cause, counted, code) in [
            (Status::aborted("room"), "crowded", "crowded", Code::Unavailable),
            (Status::resource_exhausted("room"), "crowded", "crowded", Code::Unavailable),
            (Status::deadline_exceeded("slow"), "late", "malformed", Code::DeadlineExceeded),
            (Status::out_of_range("long"), "oversize", "malformed", Code::ResourceExhausted),
            (Status::invalid_argument("cut"), "undecodable", "malformed", Code::InvalidArgument),
            (Status::internal("none"), "undecodable", "malformed", Code::InvalidArgument),
            (reset(), "broken", "malformed", Code::Cancelled),
        ] {
            let error = UnreadableMessage::from(status);
            assert_eq!(error.cause.name(), cause);
            let error = ServiceError::from(error);
            assert_eq!(error.cause(), counted, "{error:?}");
            assert_eq!(Status::from(error).code(), code);
        }
    }
}
