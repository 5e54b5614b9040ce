//! Keeps one key alive under its lease, and takes it again when the lease was lost.
//!
//! ```text
//! update ──desired──▶ keeper ──put──▶ etcd        release, drop ──▶ keeper ──revoke──▶ etcd
//!    ▲                  │ renews each second
//!    └────written───────┘ lease gone, or the store went back: registrations begin again, leaders
//!                         are told
//! ```

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use etcd_client::{Compare, CompareOp, Error, PutOptions, Txn, TxnOp};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::link::{Backoff, CALL_TIMEOUT, CallError, Link, Refusals};
use super::{Etcd, TAKEN_WAIT};
use crate::membership::{Held, MembershipError};

/// How often a lease is renewed: four times may fail before it ends.
const RENEW_INTERVAL: Duration = Duration::from_secs(1);

/// How often a key is looked at that should be there: someone may have deleted it by hand, or restored a
/// backup in which its lease lives. It costs etcd one read for each process.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// A value with its number; a keeper writes the latest and says which it wrote.
type Numbered = (u64, Bytes);

/// The owner's end of a keeper.
pub(super) struct Keeper {
    key: String,
    desired: watch::Sender<Numbered>,
    written: watch::Receiver<u64>,
    release: CancellationToken,
    /// What came of the release, once it is done.
    released: watch::Receiver<Option<Result<(), Arc<MembershipError>>>>,
}

/// What becomes of a key whose lease was lost.
enum Role {
    /// It is registered again.
    Register,
    /// Its owner is told that the term is over.
    Lead(CancellationToken),
}

/// The task's end.
struct Task {
    etcd: Etcd,
    key: String,
    lease: i64,
    role: Role,
    desired: watch::Receiver<Numbered>,
    written: watch::Sender<u64>,
    release: CancellationToken,
}

impl Keeper {
    /// Keeps a key that was registered under `lease`.
    pub(super) fn register(etcd: Etcd, key: &str, value: Bytes, lease: i64) -> Self {
        Self::start(etcd, key, value, lease, Role::Register)
    }

    /// Keeps a leader's key; `lost` fires when it is gone.
    pub(super) fn lead(
        etcd: Etcd,
        key: &str,
        value: Bytes,
        lease: i64,
        lost: CancellationToken,
    ) -> Self {
        Self::start(etcd, key, value, lease, Role::Lead(lost))
    }

    fn start(etcd: Etcd, key: &str, value: Bytes, lease: i64, role: Role) -> Self {
        let (desired, desires) = watch::channel((0, value));
        let (writes, written) = watch::channel(0);
        let (outcome, released) = watch::channel(None);
        let release = CancellationToken::new();
        let key = key.to_owned();
        let link = etcd.link.clone();
        let task = Task {
            etcd,
            key: key.clone(),
            lease,
            role,
            desired: desires,
            written: writes,
            release: release.clone(),
        };
        link.keepers.spawn(async move {
            let result = Box::pin(task.run()).await.map_err(Arc::new);
            outcome.send_replace(Some(result));
        });
        Self { key, desired, written, release, released }
    }

    fn unavailable(&self, operation: &'static str) -> MembershipError {
        MembershipError::Unavailable { operation, key: self.key.clone(), source: None }
    }
}

#[async_trait]
impl Held for Keeper {
    async fn update(&self, value: Bytes) -> Result<(), MembershipError> {
        let mut number = 0;
        self.desired.send_modify(|desired| {
            number = desired.0 + 1;
            *desired = (number, value);
        });
        let mut written = self.written.clone();
        match timeout(CALL_TIMEOUT, written.wait_for(|written| *written >= number)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(self.unavailable("update")),
        }
    }

    async fn release(&self) -> Result<(), MembershipError> {
        self.release.cancel();
        let mut released = self.released.clone();
        let Ok(outcome) = released.wait_for(Option::is_some).await else {
            // The task died with its runtime.
            return Err(self.unavailable("release"));
        };
        match outcome.as_ref() {
            Some(Err(error)) => Err(MembershipError::Unavailable {
                operation: "release",
                key: self.key.clone(),
                source: Some(Box::new(error.clone())),
            }),
            _ => Ok(()),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.release.cancel();
    }
}

impl Task {
    async fn run(mut self) -> Result<(), MembershipError> {
        let release = self.release.clone();
        loop {
            if release.run_until_cancelled(self.keep()).await.is_none() {
                return self.etcd.link.revoke(self.lease, &self.key).await;
            }
            // Should the key be gone and the lease not, it must not stay behind.
            let link = &self.etcd.link;
            let leave = || link.revoke(self.lease, &self.key);
            if let Role::Lead(lost) = &self.role {
                tracing::warn!(
                    key = self.key,
                    "the term is over: the leader's key is gone, or was set back"
                );
                lost.cancel();
                return leave().await;
            }
            tracing::warn!(key = self.key, "the lease was lost; registering again");
            if release.run_until_cancelled(leave()).await.is_none() {
                return leave().await;
            }
            match release.run_until_cancelled(self.register_again()).await {
                Some((lease, number)) => {
                    self.lease = lease;
                    self.written.send_replace(number);
                }
                // A lease that was granted meanwhile ends by itself.
                None => return Ok(()),
            }
        }
    }

    /// Renews the lease and writes new values; ends when the key is ours no longer. In a store that
    /// went back it is not, whatever is there: it may hold an older value.
    async fn keep(&mut self) {
        let link = self.etcd.link.clone();
        let mut progress = link.progress();
        tokio::select! {
            () = Box::pin(keep_alive(&link, self.lease)) => {}
            () = Box::pin(self.publish(&link)) => {}
            // The sender is the link's.
            _ = progress.changed() => {}
        }
    }

    /// Writes every new value. Ends when the key is not under our lease.
    async fn publish(&mut self, link: &Link) {
        let mut backoff = Backoff::new();
        let mut refusals = Refusals::default();
        // What is there is to be written over, though its number was written before.
        let mut is_older = false;
        loop {
            let (number, value) = self.desired.borrow_and_update().clone();
            let mut conditions =
                vec![Compare::lease(self.key.as_str(), CompareOp::Equal, self.lease)];
            let mut ops = Vec::new();
            let is_written = number == *self.written.borrow() && !is_older;
            if is_written {
                conditions.push(Compare::value(
                    self.key.as_str(),
                    CompareOp::Equal,
                    value.as_ref(),
                ));
            } else {
                let put = PutOptions::new().with_lease(self.lease);
                ops.push(TxnOp::put(self.key.as_str(), value.as_ref(), Some(put)));
            }
            let txn = Txn::new().when(conditions).and_then(ops);
            match link.txn("update", &self.key, txn).await {
                Ok(answer) if answer.succeeded() => {
                    is_older = false;
                    backoff = Backoff::new();
                    refusals.end();
                    self.written.send_replace(number);
                    // Elapsed or changed (the sender lives as long as the keeper): look again.
                    let _ = timeout(CHECK_INTERVAL, self.desired.changed()).await;
                }
                // Not under our lease, or with the value that it had in a backup.
                Ok(_) if is_written => is_older = true,
                Ok(_) => return,
                Err(error) => {
                    if !error.is_transient() {
                        refusals.tell(&error, "a registration cannot be written");
                    }
                    backoff.wait().await;
                }
            }
        }
    }

    /// Takes the key again, however long that takes. Returns the lease and the number written.
    async fn register_again(&mut self) -> (i64, u64) {
        let mut backoff = Backoff::new();
        let mut refusals = Refusals::default();
        loop {
            let (number, value) = self.desired.borrow_and_update().clone();
            let acquire = self.etcd.acquire("register", &self.key, &value, Some(TAKEN_WAIT));
            match Box::pin(acquire).await {
                Ok(acquired) => {
                    refusals.end();
                    return (acquired.lease, number);
                }
                Err(error) if error.is_transient() => {}
                Err(error) => refusals.tell(&error, "failed to register again"),
            }
            backoff.wait().await;
        }
    }
}

/// Renews `lease`; ends when etcd says that there is no such lease.
pub(super) async fn keep_alive(link: &Link, lease: i64) {
    let mut backoff = Backoff::new();
    let mut refusals = Refusals::default();
    loop {
        let opened =
            link.attempt(|mut client| async move { client.lease_keep_alive(lease).await }).await;
        match opened {
            Ok((keeper, stream)) => {
                backoff = Backoff::new();
                refusals.end();
                if renew(link, keeper, stream).await.is_gone() {
                    return;
                }
            }
            // Says no more than that it did not work, so ask.
            Err(CallError::NoAnswer(Some(Error::LeaseKeepAliveError(_)))) => {
                let ask = |mut client: etcd_client::Client| async move {
                    client.lease_time_to_live(lease, None).await
                };
                if link.attempt(ask).await.is_ok_and(|answer| answer.ttl() <= 0) {
                    return;
                }
            }
            Err(CallError::NoAnswer(_)) => {}
            Err(refused) => {
                let error = refused.into_membership("renew", "a lease");
                refusals.tell(&error, "a lease cannot be renewed");
            }
        }
        backoff.wait().await;
    }
}

/// Why renewing on one stream ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum RenewEnd {
    Cut,
    Gone,
}

impl RenewEnd {
    fn is_gone(self) -> bool {
        self == Self::Gone
    }
}

/// Renews the lease every second on one stream.
async fn renew(
    link: &Link,
    mut keeper: etcd_client::LeaseKeeper,
    mut stream: etcd_client::LeaseKeepAliveStream,
) -> RenewEnd {
    let mut tick = interval(RENEW_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Opening the stream renewed it already.
    tick.reset();
    loop {
        tick.tick().await;
        let renewed = link
            .attempt(|_| async {
                keeper.keep_alive().await?;
                stream.message().await
            })
            .await;
        match renewed {
            Ok(Some(answer)) if answer.ttl() <= 0 => return RenewEnd::Gone,
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return RenewEnd::Cut,
        }
    }
}
