//! A real etcd of one member, for one test.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use std::{fs, io};

use tempfile::TempDir;

use crate::process::{Process, free_ports, own_address, wait_for};

/// A running etcd. Killed, and its data removed, when dropped.
pub struct Etcd {
    process: Process,
    url: String,
    client: SocketAddr,
    peer: SocketAddr,
    data: TempDir,
    backup: Option<TempDir>,
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
        let etcd =
            Self { process, url: format!("http://{client}"), client, peer, data, backup: None };
        etcd.wait_until_healthy();
        etcd
    }

    /// Where it is reached.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
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

    /// Keeps a copy of all it holds; it is restarted for that.
    ///
    /// # Panics
    ///
    /// If its data cannot be copied, or it does not answer afterwards.
    pub fn back_up(&mut self) {
        self.kill();
        let backup = TempDir::new().expect("a temporary folder can be made");
        copy(self.data.path(), backup.path()).expect("data of etcd can be copied");
        self.backup = Some(backup);
        self.restart();
    }

    /// Kills it and starts it again on what [`Self::back_up`] kept, or on an empty disk if nothing was
    /// kept since the last time.
    ///
    /// # Panics
    ///
    /// If it does not answer afterwards.
    pub fn set_back(&mut self) {
        self.kill();
        let empty = || TempDir::new().expect("a temporary folder can be made");
        self.data = self.backup.take().unwrap_or_else(empty);
        self.restart();
    }

    /// Writes keys that nobody asks for, so that its revision is `count` higher.
    ///
    /// # Panics
    ///
    /// If it refuses.
    pub fn write_junk(&self, count: usize) {
        self.with_client(async |mut client| {
            for index in 0..count {
                client.put(format!("/junk/{index}"), "x", None).await?;
            }
            Ok(())
        });
    }

    /// Deletes every key that begins with `prefix`, as a person does by hand.
    ///
    /// # Panics
    ///
    /// If it refuses.
    pub fn delete_all(&self, prefix: &str) {
        self.with_client(async |mut client| {
            let all = etcd_client::DeleteOptions::new().with_prefix();
            client.delete(prefix, Some(all)).await.map(drop)
        });
    }

    fn with_client(
        &self,
        work: impl AsyncFnOnce(etcd_client::Client) -> Result<(), etcd_client::Error>,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let done = runtime
            .expect("a runtime can be made")
            .block_on(async { work(etcd_client::Client::connect([&self.url], None).await?).await });
        done.expect("etcd does what it is asked");
    }

    fn wait_until_healthy(&self) {
        wait_for("etcd to answer", Duration::from_secs(20), || {
            let answer = crate::http::get(&self.client.to_string(), "/health").ok()?;
            answer.body.contains("true").then_some(())
        });
    }
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            fs::create_dir(&to)?;
            copy(&entry.path(), &to)?;
        } else {
            fs::copy(entry.path(), &to)?;
        }
    }
    Ok(())
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
