//! A TCP proxy that can break connections in the ways that networks do.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Passes everything on.
    Open,
    /// Passes on what the client says and throws the answers away.
    Swallow,
    /// Closes every connection, old and new.
    Cut,
    /// Passes nothing on over the connections that there are, without closing them. New ones are
    /// open.
    Stall,
}

pub(crate) struct Proxy {
    address: SocketAddr,
    mode: watch::Sender<Mode>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    pub(crate) async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mode, modes) = watch::channel(Mode::Open);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let mut modes = modes.clone();
                let first = *modes.borrow_and_update();
                // A server that is away is a connection that closes.
                if first != Mode::Cut
                    && let Ok(server) = TcpStream::connect(target).await
                {
                    connections.spawn(carry(client, server, first, modes));
                }
            }
        });
        Self { address, mode, _tasks: tasks }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

/// One connection from its first to its last byte.
async fn carry(
    client: TcpStream,
    server: TcpStream,
    mut mode: Mode,
    mut modes: watch::Receiver<Mode>,
) {
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let swallow = watch::Sender::new(mode == Mode::Swallow);
    let up = pass(client_read, server_write, watch::Sender::new(false).subscribe());
    let down = pass(server_read, client_write, swallow.subscribe());
    let (mut up, mut down) = (Box::pin(up), Box::pin(down));
    loop {
        tokio::select! {
            () = &mut up => return,
            () = &mut down => return,
            changed = modes.changed() => {
                if changed.is_err() {
                    return;
                }
                let before = mode;
                mode = *modes.borrow_and_update();
                match mode {
                    // Bytes are missing on a connection that swallowed some.
                    Mode::Cut => return,
                    Mode::Open if before == Mode::Swallow => return,
                    Mode::Open => {}
                    Mode::Swallow => { swallow.send_replace(true); }
                    // Open, deaf and dumb, until the proxy ends.
                    Mode::Stall => std::future::pending().await,
                }
            }
        }
    }
}

/// Copies bytes, or throws them away while `swallow`.
async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, swallow: watch::Receiver<bool>) {
    let mut bytes = vec![0; 16 << 10];
    loop {
        match from.read(&mut bytes).await {
            Ok(0) | Err(_) => return,
            Ok(_) if *swallow.borrow() => {}
            Ok(count) => {
                if to.write_all(&bytes[..count]).await.is_err() {
                    return;
                }
            }
        }
    }
}
