//! A real etcd on ports of its own, with its data in a temporary directory.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use etcd_client::Client;
use tempfile::TempDir;

/// Somebody may take a free port before etcd does: then it is tried again with others.
const START_TRIES: u32 = 5;

/// Looks whether etcd is up, at this interval and so many times.
const READY_POLL: Duration = Duration::from_millis(50);
const READY_POLLS: u32 = 400;

pub(crate) struct Server {
    child: Child,
    data: TempDir,
    client_port: u16,
    peer_port: u16,
}

impl Server {
    pub(crate) async fn start() -> Self {
        for _ in 0..START_TRIES {
            let (client_port, peer_port) = free_ports();
            let data = tempfile::tempdir().unwrap();
            let child = spawn(&data, client_port, peer_port);
            let mut server = Self { child, data, client_port, peer_port };
            if server.is_ready().await {
                return server;
            }
        }
        panic!("etcd did not start {START_TRIES} times in a row");
    }

    /// Kills it and starts it again on the same data and ports.
    pub(crate) async fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = spawn(&self.data, self.client_port, self.peer_port);
        assert!(self.is_ready().await, "etcd starts again on its own data");
    }

    pub(crate) fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.client_port).into()
    }

    /// The bare client, for what membership has no words for.
    pub(crate) async fn client(&self) -> Client {
        Client::connect([self.address().to_string()], None).await.unwrap()
    }

    /// Waits until it answers; false if it ended.
    async fn is_ready(&mut self) -> bool {
        for _ in 0..READY_POLLS {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            let mut client = self.client().await;
            if client.get("x", None).await.is_ok() {
                return true;
            }
            tokio::time::sleep(READY_POLL).await;
        }
        false
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_ports() -> (u16, u16) {
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let (client, peer) = (bind(), bind());
    (client.local_addr().unwrap().port(), peer.local_addr().unwrap().port())
}

fn spawn(data: &TempDir, client_port: u16, peer_port: u16) -> Child {
    let client = format!("http://127.0.0.1:{client_port}");
    let peer = format!("http://127.0.0.1:{peer_port}");
    let child = Command::new("etcd")
        .arg("--data-dir")
        .arg(data.path())
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}")])
        .args(["--log-level", "error", "--unsafe-no-fsync"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    match child {
        Ok(child) => child,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            panic!(
                "these tests need etcd on the PATH: install it (Debian: apt install etcd-server)"
            )
        }
        Err(error) => panic!("failed to start etcd: {error}"),
    }
}
