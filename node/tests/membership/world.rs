//! The two stores under test, with the faults that the suite asks for.

use std::sync::Arc;

use async_trait::async_trait;
use node::config::EtcdEndpoints;
use node::membership::{Etcd, EtcdOptions, Membership, Memory, MemoryBackup};

use crate::proxy::{Mode, Proxy};
use crate::server::Server;

/// A store with two processes at it: `near`, whose connection can be broken, and `far`.
#[async_trait]
pub(crate) trait World: Send + Sync {
    fn near(&self) -> Arc<dyn Membership>;
    fn far(&self) -> Arc<dyn Membership>;
    /// Breaks the connection of `near` and keeps it broken.
    async fn cut(&self);
    /// Ends `cut` and `lose_answers`.
    async fn heal(&self);
    /// The next fenced write of `near` takes effect, but its answer never comes.
    async fn lose_answers(&self);
    /// Forgets all history.
    async fn compact(&self);
    /// Ends the lease that holds `key`, without its owner.
    async fn end_lease(&self, key: &str);
    /// Stops the store without warning and starts it again.
    async fn restart(&mut self);
    /// Keeps what the store holds now.
    async fn back_up(&mut self);
    /// Sets the store back to what was kept; to nothing if nothing was.
    async fn set_back(&mut self);
}

/// [`Memory`] and its own faults.
pub(crate) struct InMemory {
    near: Memory,
    far: Memory,
    backup: MemoryBackup,
}

impl InMemory {
    pub(crate) fn new() -> Self {
        let near = Memory::new();
        Self { far: near.another(), near, backup: MemoryBackup::default() }
    }
}

#[async_trait]
impl World for InMemory {
    fn near(&self) -> Arc<dyn Membership> {
        Arc::new(self.near.clone())
    }

    fn far(&self) -> Arc<dyn Membership> {
        Arc::new(self.far.clone())
    }

    async fn cut(&self) {
        self.near.disconnect();
    }

    async fn heal(&self) {
        self.near.reconnect();
    }

    async fn lose_answers(&self) {
        self.near.lose_next_answer(true);
    }

    async fn compact(&self) {
        self.near.compact();
    }

    async fn end_lease(&self, key: &str) {
        assert!(self.near.expire_lease(key), "{key} has a lease");
    }

    /// Memory cannot be restarted: everyone is cut off for a moment.
    async fn restart(&mut self) {
        for client in [&self.near, &self.far] {
            client.disconnect();
        }
        for client in [&self.near, &self.far] {
            client.reconnect();
        }
    }

    async fn back_up(&mut self) {
        self.backup = self.near.back_up();
    }

    async fn set_back(&mut self) {
        self.near.restore(self.backup.clone());
    }
}

/// A real etcd, with a proxy between it and `near`.
pub(crate) struct InEtcd {
    pub(crate) server: Server,
    pub(crate) proxy: Proxy,
    near: Etcd,
    far: Etcd,
}

impl InEtcd {
    pub(crate) async fn start() -> Self {
        let server = Server::start().await;
        let proxy = Proxy::start(server.address()).await;
        let near = connect(&[proxy.address().to_string()]).await;
        let far = connect(&[server.address().to_string()]).await;
        Self { server, proxy, near, far }
    }
}

/// Where etcd is.
pub(crate) fn at(endpoints: &[String]) -> EtcdEndpoints {
    endpoints.join(",").parse().unwrap()
}

async fn connect(endpoints: &[String]) -> Etcd {
    Etcd::connect(&at(endpoints), EtcdOptions::default()).await.expect("etcd was just started")
}

#[async_trait]
impl World for InEtcd {
    fn near(&self) -> Arc<dyn Membership> {
        Arc::new(self.near.clone())
    }

    fn far(&self) -> Arc<dyn Membership> {
        Arc::new(self.far.clone())
    }

    async fn cut(&self) {
        self.proxy.set(Mode::Cut);
    }

    async fn heal(&self) {
        self.proxy.set(Mode::Open);
    }

    async fn lose_answers(&self) {
        self.proxy.set(Mode::Swallow);
    }

    async fn compact(&self) {
        let mut client = self.server.client().await;
        let now = client.get("x", None).await.unwrap().header().unwrap().revision();
        client.compact(now, None).await.unwrap();
    }

    async fn end_lease(&self, key: &str) {
        let mut client = self.server.client().await;
        let found = client.get(key, None).await.unwrap();
        client.lease_revoke(found.kvs()[0].lease()).await.unwrap();
    }

    async fn restart(&mut self) {
        self.server.restart().await;
    }

    async fn back_up(&mut self) {
        self.server.back_up().await;
    }

    async fn set_back(&mut self) {
        self.server.set_back().await;
    }
}
