//! Membership in etcd: transactions, leases and watches that outlive their connections.
//!
//! The client library neither re-connects streams nor renews leases; what is added here is in
//! `link` (one connection, deadlines), `follow` (watches) and `keeper` (leases).

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use etcd_client::{
    Compare, CompareOp, GetOptions, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse,
};
use futures::stream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::keeper::Keeper;
use self::link::{Backoff, CallError, Link};
use crate::config::EtcdEndpoints;

use super::{
    Entry, Event, LEASE_TTL_S, Leadership, Membership, MembershipError, Registration, Revision,
    Snapshot, Watch, WriteOutcome,
};

mod follow;
mod keeper;
mod link;

/// How long `register` waits for a key that somebody else holds: a lease, and what etcd takes
/// to notice that it ended (it looks twice a second) under load.
const TAKEN_WAIT: Duration = Duration::from_secs(LEASE_TTL_S + 2);

/// Events that may wait for a watch's reader. One that is slower is told everything anew.
const WATCH_QUEUE_LEN: usize = 1024;

/// Who we are at etcd.
#[derive(Clone, Default)]
pub struct EtcdOptions {
    /// User and password, if etcd asks for them.
    pub credentials: Option<(String, String)>,
}

/// A connection to an etcd cluster. Clones share it.
#[derive(Clone)]
pub struct Etcd {
    link: Arc<Link>,
}

impl Etcd {
    /// Connects to the cluster behind `endpoints`.
    ///
    /// # Errors
    ///
    /// [`MembershipError::Connect`] if no endpoint answers within a few seconds,
    /// [`MembershipError::Refused`] if etcd does not accept the credentials.
    pub async fn connect(
        endpoints: &EtcdEndpoints,
        options: EtcdOptions,
    ) -> Result<Self, MembershipError> {
        Ok(Self { link: Arc::new(Link::connect(endpoints, options).await?) })
    }

    /// Waits until every registration and leadership that was dropped has been given up at etcd.
    pub async fn close(self) {
        self.link.keepers.close();
        self.link.keepers.wait().await;
    }

    /// Takes `key` under a new lease; waits for it to be free, for at most `patience`.
    async fn acquire(
        &self,
        operation: &'static str,
        key: &str,
        value: &Bytes,
        patience: Option<Duration>,
    ) -> Result<Acquired, MembershipError> {
        let mut backoff = Backoff::new();
        loop {
            let lease = self.link.grant(operation, key).await?;
            tokio::select! {
                // The wait was longer than the connection held: once more with a new lease.
                () = keeper::keep_alive(&self.link, lease) => {}
                taken = self.take(operation, key, value, lease, patience) => match taken {
                    Ok(Some(create_revision)) => return Ok(Acquired { lease, create_revision }),
                    // The lease ended before anybody said so: likewise.
                    Ok(None) => backoff.wait().await,
                    Err(error) => {
                        // Should it fail, the lease ends by itself.
                        let _ = self.link.revoke(lease, key).await;
                        return Err(error);
                    }
                },
            }
        }
    }

    /// Puts `key` under `lease` as soon as it is free. Returns its create revision; `None` if there is
    /// no such lease any more.
    async fn take(
        &self,
        operation: &'static str,
        key: &str,
        value: &Bytes,
        lease: i64,
        patience: Option<Duration>,
    ) -> Result<Option<Revision>, MembershipError> {
        let give_up = patience.map(|patience| tokio::time::Instant::now() + patience);
        loop {
            let put = PutOptions::new().with_lease(lease);
            let claim = Txn::new()
                .when([Compare::create_revision(key, CompareOp::Equal, 0)])
                .and_then([TxnOp::put(key, value.as_ref(), Some(put))])
                .or_else([TxnOp::get(key, None)]);
            let answer = match self.link.txn_counted(claim).await {
                Ok((answer, _)) => answer,
                Err(error) if error.is_not_found() => return Ok(None),
                Err(error) => return Err(error.into_membership(operation, key)),
            };
            if answer.succeeded() {
                return Ok(Some(revision_of(answer.header())));
            }
            let seen = match first_kv(&answer.op_responses()) {
                // An attempt before this one took effect although its answer was lost.
                Some(holder) if holder.lease() == lease => {
                    return Ok(Some(revision(holder.create_revision())));
                }
                // No lease ends, so there is nothing to wait for.
                Some(holder) if holder.lease() == 0 => {
                    return Err(MembershipError::NoLease { key: key.to_owned() });
                }
                // Gone in between.
                None => continue,
                Some(holder) => revision(holder.mod_revision()),
            };
            let gone = self.wait_until_changed(key, seen);
            match give_up {
                None => gone.await,
                Some(give_up) => tokio::time::timeout_at(give_up, gone)
                    .await
                    .map_err(|_| MembershipError::KeyTaken { key: key.to_owned() })?,
            }
        }
    }

    /// Until the key is gone, or was written after `seen`: then it may be one that no lease ends.
    async fn wait_until_changed(&self, key: &str, seen: Revision) {
        let is_seen = |entry: &Entry| entry.key == key && entry.mod_revision == seen;
        let mut watch = self.watch(key);
        loop {
            match watch.next().await {
                Event::Reset(now) if !now.entries.iter().any(is_seen) => return,
                Event::Delete { key: gone, .. } if gone == key => return,
                Event::Put(entry) if entry.key == key => return,
                _ => {}
            }
        }
    }
}

/// A key that is ours.
struct Acquired {
    lease: i64,
    create_revision: Revision,
}

#[async_trait]
impl Membership for Etcd {
    async fn get_or_create(&self, key: &str, value: Bytes) -> Result<Entry, MembershipError> {
        // Whichever attempt makes the key, every later one finds it: safe to try again.
        let create = Txn::new()
            .when([Compare::create_revision(key, CompareOp::Equal, 0)])
            .and_then([TxnOp::put(key, value.as_ref(), None)])
            .or_else([TxnOp::get(key, None)]);
        loop {
            let answer = self.link.txn("create", key, create.clone()).await?;
            if answer.succeeded() {
                let made = revision_of(answer.header());
                let key = key.to_owned();
                return Ok(Entry { key, value, create_revision: made, mod_revision: made });
            }
            if let Some(entry) = first_kv(&answer.op_responses()).and_then(entry) {
                return Ok(entry);
            }
        }
    }

    async fn register(&self, key: &str, value: Bytes) -> Result<Registration, MembershipError> {
        let acquired = self.acquire("register", key, &value, Some(TAKEN_WAIT)).await?;
        let held = Keeper::register(self.clone(), key, value, acquired.lease);
        Ok(Registration::new(Box::new(held)))
    }

    async fn list(&self, prefix: &str) -> Result<Snapshot, MembershipError> {
        self.link.list(prefix).await
    }

    fn watch(&self, prefix: &str) -> Watch {
        let (events, queue) = mpsc::channel(WATCH_QUEUE_LEN);
        let mut follower = JoinSet::new();
        follower.spawn(follow::follow(self.link.clone(), prefix.to_owned(), events));
        // The follower ends when the watch, and with it this stream's state, is dropped.
        Watch::new(stream::unfold((queue, follower), async |(mut queue, follower)| {
            let event = queue.recv().await?;
            Some((event, (queue, follower)))
        }))
    }

    async fn campaign(
        &self,
        key: &str,
        value: Bytes,
        stop: &CancellationToken,
    ) -> Result<Leadership, MembershipError> {
        let elected = async {
            let mut backoff = Backoff::new();
            loop {
                match self.acquire("campaign for", key, &value, None).await {
                    Err(error) if error.is_transient() => backoff.wait().await,
                    outcome => return outcome,
                }
            }
        };
        let acquired = stop
            .run_until_cancelled(Box::pin(elected))
            .await
            .ok_or_else(|| MembershipError::Stopped { key: key.to_owned() })??;
        let lost = CancellationToken::new();
        let held = Keeper::lead(self.clone(), key, value, acquired.lease, lost.clone());
        Ok(Leadership::new(acquired.create_revision, lost, Box::new(held)))
    }

    async fn remove(&self, key: &str, revision: Revision) -> Result<bool, MembershipError> {
        // To etcd, revision 0 is that of a key which does not exist.
        if revision == 0 {
            return Ok(false);
        }
        let remove = Txn::new()
            .when([Compare::mod_revision(key, CompareOp::Equal, signed(revision))])
            .and_then([TxnOp::delete(key, None)]);
        Ok(self.link.txn("remove", key, remove).await?.succeeded())
    }

    async fn write_if_leader(
        &self,
        leader_key: &str,
        term: Revision,
        key: &str,
        previous: Option<Revision>,
        value: Bytes,
    ) -> Result<WriteOutcome, MembershipError> {
        // To etcd, revision 0 is that of a key which does not exist: it must not pass for one.
        if term == 0 || previous == Some(0) {
            return Ok(WriteOutcome::Conflict);
        }
        let unchanged = match previous {
            Some(previous) => Compare::mod_revision(key, CompareOp::Equal, signed(previous)),
            None => Compare::create_revision(key, CompareOp::Equal, 0),
        };
        let leads = Compare::create_revision(leader_key, CompareOp::Equal, signed(term));
        let write = Txn::new()
            .when([leads, unchanged])
            .and_then([TxnOp::put(key, value.as_ref(), None)])
            .or_else([TxnOp::get(key, None)]);

        // Both compares name what the write itself changes, so of all attempts at most one takes
        // effect: trying again is how a lost answer is read back.
        let (answer, attempts) = match self.link.txn_counted(write).await {
            Ok(answered) => answered,
            Err(CallError::NoAnswer(_)) => return Ok(WriteOutcome::Unknown),
            Err(error) => return Err(error.into_membership("write", key)),
        };
        if answer.succeeded() {
            return Ok(WriteOutcome::Written(revision_of(answer.header())));
        }
        let ops = answer.op_responses();
        let found = first_kv(&ops);
        match found {
            Some(found) if attempts > 1 && found.value() == value => {
                Ok(WriteOutcome::Written(revision(found.mod_revision())))
            }
            _ => Ok(WriteOutcome::Conflict),
        }
    }
}

/// The entry of etcd's key; `None` if the key is no text and so none of ours.
fn entry(kv: &KeyValue) -> Option<Entry> {
    Some(Entry {
        key: kv.key_str().ok()?.to_owned(),
        value: Bytes::copy_from_slice(kv.value()),
        create_revision: revision(kv.create_revision()),
        mod_revision: revision(kv.mod_revision()),
    })
}

/// What the `get` in a transaction's else branch found.
fn first_kv(ops: &[TxnOpResponse]) -> Option<&KeyValue> {
    match ops.first() {
        Some(TxnOpResponse::Get(get)) => get.kvs().first(),
        _ => None,
    }
}

fn revision_of(header: Option<&etcd_client::ResponseHeader>) -> Revision {
    header.map_or(0, |header| revision(header.revision()))
}

/// etcd's revisions are signed and never negative.
fn revision(signed: i64) -> Revision {
    signed.try_into().unwrap_or(0)
}

/// No store gets so far; one beyond equals nothing there.
fn signed(revision: Revision) -> i64 {
    revision.try_into().unwrap_or(i64::MAX)
}

/// Options that make a key a prefix.
fn by_prefix() -> GetOptions {
    GetOptions::new().with_prefix()
}
