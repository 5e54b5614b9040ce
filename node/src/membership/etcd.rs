//! Membership in etcd.

use async_trait::async_trait;
use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::{
    Entry, Leadership, Membership, MembershipError, Registration, Revision, Snapshot, Watch,
    WriteOutcome,
};

/// Who we are at etcd.
#[derive(Clone, Default)]
pub struct EtcdOptions {
    /// User and password, if etcd asks for them.
    pub credentials: Option<(String, String)>,
}

/// A connection to an etcd cluster.
#[derive(Clone)]
pub struct Etcd {}

impl Etcd {
    /// Connects to the cluster behind `endpoints` (`http://host:2379` or `host:2379`).
    ///
    /// # Errors
    ///
    /// [`MembershipError::Connect`] if no endpoint answers within a few seconds,
    /// [`MembershipError::Refused`] if etcd does not accept the credentials.
    pub async fn connect(
        _endpoints: &[String],
        _options: EtcdOptions,
    ) -> Result<Self, MembershipError> {
        unimplemented!()
    }
}

#[async_trait]
impl Membership for Etcd {
    async fn get_or_create(&self, _key: &str, _value: Bytes) -> Result<Entry, MembershipError> {
        unimplemented!()
    }

    async fn register(&self, _key: &str, _value: Bytes) -> Result<Registration, MembershipError> {
        unimplemented!()
    }

    async fn list(&self, _prefix: &str) -> Result<Snapshot, MembershipError> {
        unimplemented!()
    }

    fn watch(&self, _prefix: &str) -> Watch {
        unimplemented!()
    }

    async fn campaign(
        &self,
        _key: &str,
        _value: Bytes,
        _stop: &CancellationToken,
    ) -> Result<Leadership, MembershipError> {
        unimplemented!()
    }

    async fn write_if_leader(
        &self,
        _leader_key: &str,
        _term: Revision,
        _key: &str,
        _previous: Option<Revision>,
        _value: Bytes,
    ) -> Result<WriteOutcome, MembershipError> {
        unimplemented!()
    }
}
