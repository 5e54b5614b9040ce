//! A real etcd of one member, for one test.

use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::process::{Process, free_port, wait_for};

/// A running etcd. Killed, and its data removed, when dropped.
pub struct Etcd {
    process: Process,
    url: String,
    port: u16,
    peer_port: u16,
    data: TempDir,
}

impl Etcd {
    /// Starts etcd on free ports and waits until it answers.
    ///
    /// # Panics
    ///
    /// If there is no `etcd` on the path (Debian: `etcd-server`), or it does not answer.
    pub fn start() -> Self {
        let (port, peer_port) = (free_port(), free_port());
        let data = TempDir::new().expect("a temporary folder can be made");
        let process = launch(port, peer_port, &data);
        let etcd = Self { process, url: format!("http://127.0.0.1:{port}"), port, peer_port, data };
        etcd.wait_until_healthy();
        etcd
    }

    /// Where it is reached.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Kills it; its data stays.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again on the same data and ports after [`Self::kill`].
    pub fn restart(&mut self) {
        self.process = launch(self.port, self.peer_port, &self.data);
        self.wait_until_healthy();
    }

    fn wait_until_healthy(&self) {
        wait_for("etcd to answer", Duration::from_secs(20), || {
            let answer = crate::http::get(&format!("127.0.0.1:{}", self.port), "/health").ok()?;
            answer.body.contains("true").then_some(())
        });
    }
}

fn launch(port: u16, peer_port: u16, data: &TempDir) -> Process {
    let mut command = Command::new("etcd");
    let (client, peer) =
        (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer_port}"));
    command.args(["--name", "test", "--unsafe-no-fsync", "--log-level", "error"]);
    command.arg("--data-dir").arg(data.path());
    command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
    command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
    command.args(["--initial-cluster", &format!("test={peer}")]);
    let found = Command::new("etcd").arg("--version").output();
    assert!(found.is_ok(), "these tests need etcd: install etcd-server, or run ./test");
    Process::spawn("etcd", command)
}
