//! Connections of clients, the same for both servers: how many there may be, and how long one may
//! refuse to take what is written to it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::{Stream, stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};
use tonic::transport::server::Connected;

/// After an accept that failed (no free file, mostly): the next one would fail as well.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a client may take nothing of what is written to it: its socket's buffers are full, so
/// it has stopped reading. A busy one takes something every second.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

/// Accepts connections, a limited number at a time.
pub(crate) struct Connections {
    listener: TcpListener,
    room: Arc<Semaphore>,
    write_patience: Duration,
}

impl Connections {
    /// At most `limit` connections are open at once; more wait in the kernel's queue.
    pub(crate) fn new(listener: TcpListener, limit: u32) -> Self {
        let room = Arc::new(Semaphore::new(limit as usize));
        Self { listener, room, write_patience: WRITE_PATIENCE }
    }

    /// The next connection, as soon as there is room for it.
    ///
    /// # Errors
    ///
    /// Never, in the present form: the room is never closed, and an accept that fails is tried
    /// again.
    ///
    /// # Cancel safety
    ///
    /// No connection is lost when the future is dropped.
    pub(crate) async fn accept(&self) -> io::Result<Connection> {
        let room = Arc::clone(&self.room).acquire_owned().await.map_err(io::Error::other)?;
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    return Ok(Connection::new(stream, self.write_patience, room));
                }
                Err(error) => {
                    tracing::warn!(%error, "failed to accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// All connections, one after another, without end.
    pub(crate) fn into_stream(self) -> impl Stream<Item = io::Result<Connection>> + Send {
        stream::unfold(self, |connections| async {
            let accepted = connections.accept().await;
            Some((accepted, connections))
        })
    }
}

/// One connection; its room is free again when it is dropped. A write that the client takes
/// nothing of for too long fails, which ends the connection.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    write_patience: Duration,
    /// Runs while a write waits for the client.
    stalled: Option<Pin<Box<Sleep>>>,
    _room: OwnedSemaphorePermit,
}

impl Connection {
    fn new(stream: TcpStream, write_patience: Duration, room: OwnedSemaphorePermit) -> Self {
        // Tokens are small and must not wait for one another.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "failed to set TCP_NODELAY");
        }
        Self { stream, write_patience, stalled: None, _room: room }
    }

    /// `written`, or an error if nothing was for too long.
    fn within_patience(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let patience = self.write_patience;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(stalled.as_mut().poll(context));
        let message = format!("the client took nothing for {patience:?}");
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.within_patience(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.within_patience(context, written)
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

impl Connected for Connection {
    type ConnectInfo = <TcpStream as Connected>::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn listen(limit: u32) -> Connections {
        Connections::new(TcpListener::bind("127.0.0.1:0").await.unwrap(), limit)
    }

    #[tokio::test]
    async fn no_more_connections_are_open_than_may_be() {
        let connections = listen(1).await;
        let address = connections.listener.local_addr().unwrap();
        let _first_client = TcpStream::connect(address).await.unwrap();
        let mut second_client = TcpStream::connect(address).await.unwrap();
        let first = connections.accept().await.unwrap();
        assert_eq!(connections.room.available_permits(), 0);
        drop(first);
        let mut second = connections.accept().await.unwrap();
        second.write_all(b"x").await.unwrap();
        assert_eq!(second_client.read_u8().await.unwrap(), b'x');
    }

    #[tokio::test]
    async fn a_client_that_stops_reading_is_cut() {
        let mut connections = listen(1).await;
        connections.write_patience = Duration::from_millis(1);
        let address = connections.listener.local_addr().unwrap();
        let client = TcpStream::connect(address).await.unwrap();
        let mut connection = connections.accept().await.unwrap();
        let endless = async {
            loop {
                if let Err(error) = connection.write_all(&[0; 64 << 10]).await {
                    return error;
                }
            }
        };
        assert_eq!(endless.await.kind(), io::ErrorKind::TimedOut);
        drop(client);
    }
}
