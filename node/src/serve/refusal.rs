//! What a client hears whose connection is not served: in its own protocol, from fixed bytes.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::Protocol;

/// How long a refusal may take: a client that does not read it is closed without it.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Bytes of a request that are read and thrown away, so that closing does not reset the
/// connection before its client has read the answer.
const DISCARD_BYTES: u64 = 64 << 10;

/// An error as clients of OpenAI's API expect it; they try again.
const HTTP: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n\
    content-type: application/json\r\ncontent-length: 148\r\n\r\n\
    {\"error\":{\"message\":\"the server is full: every connection is being answered\",\
    \"type\":\"overloaded_error\",\"param\":null,\"code\":\"service_unavailable\"}}\r\n";

/// HTTP/2: empty SETTINGS, then GOAWAY of stream 0 with ENHANCE_YOUR_CALM and a text.
const HTTP2: &[u8] = b"\0\0\0\x04\0\0\0\0\0\
    \0\0\x1a\x07\0\0\0\0\0\0\0\0\0\0\0\0\x0bthe server is full";

/// Says that there is no connection left, and closes.
pub(super) async fn say(mut stream: TcpStream, protocol: Protocol) {
    let words = match protocol {
        Protocol::Http => HTTP,
        Protocol::Grpc => HTTP2,
    };
    let said = timeout(TIMEOUT, async {
        stream.write_all(words).await?;
        stream.shutdown().await?;
        let mut rest = stream.take(DISCARD_BYTES);
        tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
    });
    match said.await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a refused client went away"),
        Err(_) => tracing::debug!("a refused client did not read why"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lengths_are_those_of_the_texts() {
        let text = std::str::from_utf8(HTTP).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.ends_with(&format!("content-length: {}", body.len())), "{}", body.len());
        let goaway = &HTTP2[9..];
        assert_eq!(goaway[..3], [0, 0, u8::try_from(goaway.len() - 9).unwrap()]);
    }
}
