//! A real etcd of one member, for one test.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::process::{Process, free_ports, own_address, wait_for};

/// A running etcd. Killed, and its data removed, when dropped.
pub struct Etcd {
    process: Process,
    url: String,
    client: SocketAddr,
    peer: SocketAddr,
    data: TempDir,
}

impl Etcd {
    /// Starts etcd on free ports and waits until it answers.
    ///
    /// # Panics
    ///
    /// If there is no `etcd` on the path (Debian: `etcd-server`), or it does not answer.
    pub fn start() -> Self {
        let address = own_address();
        let (client, peer) = free_ports(address);
        let (client, peer) = ((address, client).into(), (address, peer).into());
        let data = TempDir::new().expect("a temporary folder can be made");
        let process = launch(client, peer, &data);
        let etcd = Self { process, url: format!("http://{client}"), client, peer, data };
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
        self.process = launch(self.client, self.peer, &self.data);
        self.wait_until_healthy();
    }

    fn wait_until_healthy(&self) {
        wait_for("etcd to answer", Duration::from_secs(20), || {
            let answer = crate::http::get(&self.client.to_string(), "/health").ok()?;
            answer.body.contains("true").then_some(())
        });
    }
}

fn launch(client: SocketAddr, peer: SocketAddr, data: &TempDir) -> Process {
    let mut command = Command::new("etcd");
    let (client, peer) = (format!("http://{client}"), format!("http://{peer}"));
    command.args(["--name", "test", "--unsafe-no-fsync", "--log-level", "error"]);
    command.arg("--data-dir").arg(data.path());
    command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
    command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
    command.args(["--initial-cluster", &format!("test={peer}")]);
    let found = Command::new("etcd").arg("--version").output();
    assert!(found.is_ok(), "these tests need etcd: install etcd-server, or run ./test");
    Process::spawn("etcd", command)
}
