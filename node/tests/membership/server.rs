//! A real etcd on ports of its own, with its data in a temporary directory.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;
use std::{fs, io};

use etcd_client::Client;
use tempfile::TempDir;

/// Looks whether etcd is up, at this interval and so many times.
const READY_POLL: Duration = Duration::from_millis(50);
const READY_POLLS: u32 = 400;

pub(crate) struct Server {
    child: Child,
    data: TempDir,
    backup: Option<TempDir>,
    client: SocketAddr,
    peer: SocketAddr,
}

impl Server {
    pub(crate) async fn start() -> Self {
        let (client, peer) = free_addresses();
        let data = tempfile::tempdir().unwrap();
        let child = spawn(&data, client, peer);
        let mut server = Self { child, data, backup: None, client, peer };
        assert!(server.is_ready().await, "etcd starts");
        server
    }

    /// Kills it and starts it again on the same data and ports.
    pub(crate) async fn restart(&mut self) {
        self.kill();
        self.start_again().await;
    }

    /// Keeps a copy of the data as of now, with a restart.
    pub(crate) async fn back_up(&mut self) {
        self.kill();
        let backup = tempfile::tempdir().unwrap();
        copy(self.data.path(), backup.path());
        self.backup = Some(backup);
        self.start_again().await;
    }

    /// Starts it again on the copy, or on an empty disk if there is none.
    pub(crate) async fn set_back(&mut self) {
        self.kill();
        self.data = self.backup.take().unwrap_or_else(|| tempfile::tempdir().unwrap());
        self.start_again().await;
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    async fn start_again(&mut self) {
        self.child = spawn(&self.data, self.client, self.peer);
        assert!(self.is_ready().await, "etcd starts again on its own data");
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.client
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

/// Two ports of a loopback address that nothing else in this test run was given: sockets that a
/// program opens by itself get ports of 127.0.0.1, so these stay free until etcd takes them.
fn free_addresses() -> (SocketAddr, SocketAddr) {
    static GIVEN: AtomicU8 = AtomicU8::new(0);
    let [.., high, low] = std::process::id().to_be_bytes();
    let count = GIVEN.fetch_add(1, Ordering::Relaxed);
    assert!(count < 250, "a test process has at most 250 addresses");
    let bind = || TcpListener::bind((Ipv4Addr::new(127, high, low, count + 2), 0)).unwrap();
    let (client, peer) = (bind(), bind());
    (client.local_addr().unwrap(), peer.local_addr().unwrap())
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir(&to).unwrap();
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), &to).unwrap();
        }
    }
}

fn spawn(data: &TempDir, client: SocketAddr, peer: SocketAddr) -> Child {
    let (client, peer) = (format!("http://{client}"), format!("http://{peer}"));
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
