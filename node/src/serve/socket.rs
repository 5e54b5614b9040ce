//! One client's socket: tells when bytes come, and ends a client that does not read.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use super::table::Activity;

/// How every HTTP/2 connection begins; no HTTP/1 request does.
const HTTP2_START: &[u8] = b"PRI * HTTP/2.0\r\n";

/// A socket whose reads are noted and whose writes have a timeout.
#[derive(Debug)]
pub(super) struct Socket {
    stream: TcpStream,
    activity: Arc<Activity>,
    /// How many bytes of [`HTTP2_START`] have come; `None` once it is clear which version it is.
    start: Option<usize>,
    /// What [`Self::begin`] read: it is read again from here.
    ahead: Vec<u8>,
    write_timeout: Duration,
    /// Runs while a write waits for the client.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Socket {
    pub(super) fn new(stream: TcpStream, activity: Arc<Activity>, write_timeout: Duration) -> Self {
        Self { stream, activity, start: Some(0), ahead: Vec::new(), write_timeout, stalled: None }
    }

    /// Waits until it is clear which version of HTTP the client speaks. Until then it costs us its
    /// socket and little else: thousands may come every second that never say a word.
    ///
    /// # Errors
    ///
    /// If the client ends before.
    pub(super) async fn begin(&mut self) -> io::Result<()> {
        while let Some(seen) = self.start {
            let mut bytes = [0; HTTP2_START.len()];
            let read = self.stream.read(&mut bytes[seen..]).await?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.ahead.extend_from_slice(&bytes[seen..seen + read]);
            self.heard(&bytes[seen..seen + read]);
        }
        // Tokens are small and must not wait for one another.
        if let Err(error) = self.stream.set_nodelay(true) {
            tracing::debug!(%error, "failed to set TCP_NODELAY");
        }
        Ok(())
    }

    /// Notes that bytes came.
    fn heard(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            let http2 = self.begins_http2(bytes);
            self.activity.received(Instant::now(), http2);
        }
    }

    /// The address at which the client found us.
    pub(super) fn local_address(&self) -> Option<SocketAddr> {
        self.stream.local_addr().ok()
    }

    /// Whether `bytes` complete the start of an HTTP/2 connection.
    fn begins_http2(&mut self, bytes: &[u8]) -> bool {
        let Some(seen) = self.start else { return false };
        let rest = &HTTP2_START[seen..];
        let new = bytes.len().min(rest.len());
        let matches = bytes[..new] == rest[..new];
        self.start = (matches && new < rest.len()).then_some(seen + new);
        matches && new == rest.len()
    }

    /// `written`, or an error if the client read nothing for too long.
    fn within_timeout(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(outcome) = &written {
            self.stalled = None;
            if outcome.as_ref().is_ok_and(|bytes| *bytes > 0) {
                self.activity.wrote(Instant::now());
            }
            return written;
        }
        let timeout = self.write_timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(timeout)));
        ready!(stalled.as_mut().poll(context));
        let message = format!("the client read nothing for {timeout:?}");
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.ahead.is_empty() && buffer.remaining() > 0 {
            let ready = self.ahead.len().min(buffer.remaining());
            buffer.put_slice(&self.ahead[..ready]);
            self.ahead.drain(..ready);
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        self.heard(&buffer.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.within_timeout(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.within_timeout(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
