//! Who answers at an address where no coordinator does: asked only after a call has failed, so that
//! the error can name the mistake.

use std::fmt;
use std::time::Duration;

use proto::names::WorkerId;
use proto::ports;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::Endpoint;

/// How long finding out may take, for each question: the command has failed already, and
/// whoever is there answers within round trips.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// The least that any HTTP server answers with a line of text, and a TLS server with an alert.
const PROBE: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

/// Bytes of an answer that tell what it is.
const ANSWER_BYTES: usize = 5;

/// Content type 21 is an alert, version 3.x follows (RFC 8446, section 5.1).
const TLS_ALERT: [u8; 2] = [21, 3];

/// Somebody who is no coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stranger {
    /// A server of HTTP alone.
    Http,
    /// A server that wants TLS.
    Tls,
    /// A worker of this name.
    Worker(WorkerId),
}

impl fmt::Display for Stranger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http => write!(
                f,
                "answers HTTP, not gRPC: is that the --http port? gRPC is {} by default",
                ports::COORDINATOR_GRPC
            ),
            Self::Tls => f.write_str("expects TLS, which is not supported yet"),
            Self::Worker(id) => {
                write!(f, "is worker {id}, not a coordinator: give the coordinator's gRPC address")
            }
        }
    }
}

impl Stranger {
    /// Who answers at `endpoint` in place of a coordinator; `None` if that cannot be told, as when
    /// it is one.
    pub(super) async fn at(endpoint: &Endpoint) -> Option<Self> {
        match tokio::time::timeout(PROBE_TIMEOUT, first_bytes(endpoint)).await {
            Ok(Some(bytes)) if bytes == *b"HTTP/" => Some(Self::Http),
            Ok(Some(bytes)) if bytes[..TLS_ALERT.len()] == TLS_ALERT => Some(Self::Tls),
            _ => None,
        }
    }
}

/// The beginning of an answer to [`PROBE`].
async fn first_bytes(endpoint: &Endpoint) -> Option<[u8; ANSWER_BYTES]> {
    let mut stream = TcpStream::connect(endpoint.to_string()).await.ok()?;
    stream.write_all(PROBE).await.ok()?;
    let mut bytes = [0; ANSWER_BYTES];
    stream.read_exact(&mut bytes).await.ok()?;
    Some(bytes)
}
