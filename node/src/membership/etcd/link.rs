//! One connection to etcd: every call has a deadline, is tried again while that makes sense, and
//! a connection that swallows calls is replaced.

use std::error::Error as _;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Error, Txn, TxnResponse};
use rand::RngExt;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::task::TaskTracker;
use tonic::Code;

use super::{EtcdOptions, LEASE_TTL_S, by_prefix, entry, revision_of};
use crate::config::EtcdEndpoints;
use crate::membership::{MembershipError, Revision, Snapshot};

/// Time for one attempt. etcd answers in milliseconds; an election takes about a second.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);

/// Time for one call with all its attempts.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Time for etcd to answer at all when the process starts.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// HTTP/2 pings on a connection that is silent. etcd closes connections of clients that ping
/// more often than every 5 s.
const PING_INTERVAL: Duration = Duration::from_secs(6);
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// Pauses between attempts: doubled from the first to the last, with jitter. Short enough that a call
/// has some twenty attempts: each may meet one of several endpoints that is down.
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_LAST: Duration = Duration::from_millis(250);

/// The connection and what is known of it.
pub(super) struct Link {
    endpoints: Vec<String>,
    options: ConnectOptions,
    current: Mutex<Current>,
    /// So that going away and coming back are told once each.
    away: AtomicBool,
    /// How far the store is, as far as it was heard.
    progress: watch::Sender<Progress>,
    /// Tasks that hold leases. They end by themselves once their owner lets go.
    pub(super) keepers: TaskTracker,
}

struct Current {
    client: Client,
    /// Tells a connection from the one before it.
    generation: u64,
    /// It swallowed a call: the next one gets a new connection.
    suspect: bool,
}

/// How far the store is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// How often the store went back: its data was lost, or restored from a backup.
    pub(super) setbacks: u64,
    /// The highest revision of any answer since.
    revision: Revision,
}

impl Progress {
    /// Takes in the revision of an answer to a question that was asked when all was as `asked`. A
    /// store that goes on never answers with a lower one than it did before it was asked. Returns
    /// whether it went back.
    fn take_in(&mut self, asked: Self, answered: Revision) -> bool {
        // Somebody else's question showed it meanwhile: nobody knows to which store this one went.
        if asked.setbacks != self.setbacks || answered == 0 {
            return false;
        }
        if answered < asked.revision {
            *self = Self { setbacks: self.setbacks + 1, revision: answered };
            return true;
        }
        self.revision = self.revision.max(answered);
        false
    }
}

/// Says a refusal once, not at every try.
#[derive(Default)]
pub(super) struct Refusals {
    told: Option<String>,
}

impl Refusals {
    /// Something was refused.
    pub(super) fn tell(&mut self, error: &MembershipError, message: &'static str) {
        let words = crate::Chain(error).to_string();
        if self.told.as_ref() != Some(&words) {
            tracing::error!(error = words, "{message}");
            self.told = Some(words);
        }
    }

    /// It went well.
    pub(super) fn end(&mut self) {
        if let Some(error) = self.told.take() {
            tracing::info!(error, "etcd does not refuse any more");
        }
    }
}

/// Why a call had no result.
pub(super) enum CallError {
    /// No answer in time, with the last thing that went wrong. It may have taken effect.
    NoAnswer(Option<Error>),
    /// etcd said no.
    Refused(Error),
}

impl CallError {
    /// Whether something that was named is not there: a lease, for the key in question may be.
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused(Error::GRpcStatus(status)) if status.code() == Code::NotFound)
    }

    pub(super) fn into_membership(self, operation: &'static str, key: &str) -> MembershipError {
        let key = key.to_owned();
        match self {
            Self::NoAnswer(error) => MembershipError::Unavailable {
                operation,
                key,
                source: error.map(|error| words(&error).into()),
            },
            Self::Refused(error) => {
                MembershipError::Refused { operation, key, source: words(&error).into() }
            }
        }
    }
}

impl Link {
    pub(super) async fn connect(
        endpoints: &EtcdEndpoints,
        options: EtcdOptions,
    ) -> Result<Self, MembershipError> {
        let endpoints = endpoints.urls();
        let refused = |error: Error| MembershipError::Refused {
            operation: "let us in at",
            key: endpoints.join(", "),
            source: words(&error).into(),
        };

        let mut connect = ConnectOptions::new()
            .with_connect_timeout(ATTEMPT_TIMEOUT)
            .with_keep_alive(PING_INTERVAL, PING_TIMEOUT)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some((user, password)) = options.credentials {
            connect = connect.with_user(user, password);
        }

        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let mut last = Error::EndpointError("no answer in time".to_owned());
        let mut backoff = Backoff::new();
        while Instant::now() < deadline {
            match timeout_at(deadline, greet(&endpoints, &connect)).await {
                Ok(Ok(client)) => {
                    return Ok(Self {
                        endpoints: endpoints.clone(),
                        options: connect,
                        current: Mutex::new(Current { client, generation: 0, suspect: false }),
                        away: AtomicBool::new(false),
                        progress: watch::Sender::default(),
                        keepers: TaskTracker::new(),
                    });
                }
                Ok(Err(error)) if !is_transient(&error) => return Err(refused(error)),
                Ok(Err(error)) => last = error,
                Err(_) => break,
            }
            backoff.wait().await;
        }
        let endpoints = endpoints.join(", ");
        Err(MembershipError::Connect { endpoints, source: words(&last).into() })
    }

    /// The connection, made anew if the last one swallowed a call, and its generation.
    pub(super) async fn client(&self) -> Result<(Client, u64), Error> {
        {
            let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            if !current.suspect {
                return Ok((current.client.clone(), current.generation));
            }
        }
        // Goes over the network only to log in.
        let client =
            timeout(ATTEMPT_TIMEOUT, Client::connect(&self.endpoints, Some(self.options.clone())))
                .await
                .map_err(|_| Error::EndpointError("no answer in time".to_owned()))??;
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever came second uses what the first one made.
        if current.suspect {
            let generation = current.generation + 1;
            *current = Current { client, generation, suspect: false };
        }
        Ok((current.client.clone(), current.generation))
    }

    /// Says that a call on this connection got no answer.
    pub(super) fn suspect(&self, generation: u64) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.generation == generation {
            current.suspect = true;
        }
    }

    /// Notes that etcd answered.
    pub(super) fn note_answer(&self) {
        if self.away.swap(false, Ordering::Relaxed) {
            metrics::gauge!("tercet_membership_reachable").set(1.0);
            tracing::info!(endpoints = ?self.endpoints, "etcd answers again");
        }
    }

    /// Notes that etcd did not answer.
    pub(super) fn note_silence(&self, error: Option<&Error>) {
        if !self.away.swap(true, Ordering::Relaxed) {
            metrics::gauge!("tercet_membership_reachable").set(0.0);
            let error = error.map_or_else(|| "no answer in time".to_owned(), words);
            tracing::warn!(endpoints = ?self.endpoints, error, "etcd does not answer; going on without it");
        }
    }

    /// Runs one attempt of anything: with a deadline, and its outcome noted.
    pub(super) async fn attempt<T, F>(&self, run: impl FnOnce(Client) -> F) -> Result<T, CallError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let (client, generation) = match self.client().await {
            Ok(connection) => connection,
            Err(error) => return Err(self.classify(error)),
        };
        // Boxed, for the library's futures are kilobytes and callers are nested.
        match timeout(ATTEMPT_TIMEOUT, Box::pin(run(client))).await {
            Ok(Ok(answer)) => {
                self.note_answer();
                Ok(answer)
            }
            Ok(Err(error)) => Err(self.classify(error)),
            Err(_) => {
                self.suspect(generation);
                self.note_silence(None);
                Err(CallError::NoAnswer(None))
            }
        }
    }

    fn classify(&self, error: Error) -> CallError {
        if is_transient(&error) {
            self.note_silence(Some(&error));
            CallError::NoAnswer(Some(error))
        } else {
            self.note_answer();
            CallError::Refused(error)
        }
    }

    /// Runs attempts until one is answered. Only for what may be done twice. Returns how many
    /// attempts it took, too.
    async fn call<T, F>(&self, run: impl Fn(Client) -> F) -> Result<(T, u32), CallError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let deadline = Instant::now() + CALL_TIMEOUT;
        let mut backoff = Backoff::new();
        let mut last = None;
        for attempts in 1.. {
            match timeout_at(deadline, self.attempt(&run)).await {
                Ok(Ok(answer)) => return Ok((answer, attempts)),
                Ok(Err(CallError::NoAnswer(error))) => last = error.or(last),
                Ok(Err(refused)) => return Err(refused),
                Err(_) => break,
            }
            if timeout_at(deadline, backoff.wait()).await.is_err() {
                break;
            }
        }
        Err(CallError::NoAnswer(last))
    }

    /// Runs a transaction that has the same effect however often it is tried.
    pub(super) async fn txn(
        &self,
        operation: &'static str,
        key: &str,
        txn: Txn,
    ) -> Result<TxnResponse, MembershipError> {
        let answered = self.txn_counted(txn).await;
        answered.map(|(answer, _)| answer).map_err(|error| error.into_membership(operation, key))
    }

    /// The same, and after how many attempts.
    pub(super) async fn txn_counted(&self, txn: Txn) -> Result<(TxnResponse, u32), CallError> {
        let asked = *self.progress.borrow();
        let answered = self
            .call(|mut client| {
                let txn = txn.clone();
                async move { client.txn(txn).await }
            })
            .await?;
        self.note_revision(asked, revision_of(answered.0.header()));
        Ok(answered)
    }

    /// Notes how far the store was when it answered what was asked at `asked`. Only for answers that
    /// etcd gives after agreeing on them: others may be of a member that lags behind.
    fn note_revision(&self, asked: Progress, answered: Revision) {
        self.progress.send_if_modified(|progress| {
            let went_back = progress.take_in(asked, answered);
            if went_back {
                let seen = asked.revision;
                tracing::error!(
                    seen,
                    found = answered,
                    "the registry went back: its data was lost or restored from a backup"
                );
            }
            went_back
        });
    }

    /// Changes when the store went back.
    pub(super) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Every key under `prefix`. etcd's reads are linearizable unless told otherwise.
    pub(super) async fn list(&self, prefix: &str) -> Result<Snapshot, MembershipError> {
        let asked = *self.progress.borrow();
        let (answer, _) = self
            .call(|mut client| async move { client.get(prefix, Some(by_prefix())).await })
            .await
            .map_err(|error| error.into_membership("list", prefix))?;
        self.note_revision(asked, revision_of(answer.header()));
        Ok(Snapshot {
            revision: revision_of(answer.header()),
            entries: answer.kvs().iter().filter_map(entry).collect(),
        })
    }

    /// A new lease. An attempt whose answer was lost leaves one that ends by itself.
    pub(super) async fn grant(
        &self,
        operation: &'static str,
        key: &str,
    ) -> Result<i64, MembershipError> {
        let ttl_s = i64::try_from(LEASE_TTL_S).unwrap_or(i64::MAX);
        let (answer, _) = self
            .call(|mut client| async move { client.lease_grant(ttl_s, None).await })
            .await
            .map_err(|error| error.into_membership(operation, key))?;
        Ok(answer.id())
    }

    /// Ends a lease and deletes its key. One that has ended already is no error.
    pub(super) async fn revoke(&self, lease: i64, key: &str) -> Result<(), MembershipError> {
        let revoke = |mut client: Client| async move {
            match client.lease_revoke(lease).await {
                Ok(_) => Ok(()),
                Err(Error::GRpcStatus(status)) if status.code() == Code::NotFound => Ok(()),
                Err(error) => Err(error),
            }
        };
        let outcome = self.call(revoke).await;
        outcome.map(|((), _)| ()).map_err(|error| error.into_membership("release", key))
    }
}

/// Connects and asks for anything, for the connection itself is made only when it is needed.
async fn greet(endpoints: &[String], options: &ConnectOptions) -> Result<Client, Error> {
    let mut client = Client::connect(endpoints, Some(options.clone())).await?;
    match timeout(ATTEMPT_TIMEOUT, client.get("tercet", Some(by_prefix().with_limit(1)))).await {
        Ok(Ok(_)) => Ok(client),
        // It answered; what we may read there shows later.
        Ok(Err(Error::GRpcStatus(status))) if status.code() == Code::PermissionDenied => Ok(client),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(Error::EndpointError("no answer in time".to_owned())),
    }
}

/// Whether another try may help. In doubt it may: every call has a deadline.
pub(super) fn is_transient(error: &Error) -> bool {
    match error {
        Error::GRpcStatus(status) => !matches!(
            status.code(),
            Code::InvalidArgument
                | Code::NotFound
                | Code::AlreadyExists
                | Code::PermissionDenied
                | Code::FailedPrecondition
                | Code::OutOfRange
                | Code::ResourceExhausted
                | Code::Unimplemented
        ),
        Error::InvalidArgs(_)
        | Error::InvalidUri(_)
        | Error::Utf8Error(_)
        | Error::InvalidMetadataValue(_)
        | Error::EndpointsNotManaged => false,
        _ => true,
    }
}

/// The error in few words: the library's own repeat themselves.
fn words(error: &Error) -> String {
    let Error::GRpcStatus(status) = error else { return error.to_string() };
    let mut innermost = None;
    let mut next = status.source();
    while let Some(source) = next {
        innermost = Some(source.to_string());
        next = source.source();
    }
    match innermost {
        Some(cause) if !status.message().contains(&cause) => {
            format!("{}: {cause}", status.message())
        }
        _ => status.message().to_owned(),
    }
}

/// Pauses that grow.
pub(super) struct Backoff {
    next: Duration,
}

impl Backoff {
    pub(super) fn new() -> Self {
        Self { next: BACKOFF_FIRST }
    }

    /// Waits between half and all of the pause whose turn it is, so that many clients of one etcd
    /// do not come back in step.
    pub(super) async fn wait(&mut self) {
        let share = rand::rng().random_range(0.5..=1.0);
        tokio::time::sleep(self.next.mul_f64(share)).await;
        self.next = (self.next * 2).min(BACKOFF_LAST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_goes_back_when_it_answers_with_less_than_before_it_was_asked() {
        let mut progress = Progress::default();
        let start = progress;
        assert!(!progress.take_in(start, 7));
        // Asked before that was heard, by another task: the answers crossed.
        assert!(!progress.take_in(start, 5));
        let asked = progress;
        assert!(!progress.take_in(asked, 7), "nothing was written");
        assert!(!progress.take_in(asked, 0), "an answer without a header tells nothing");
        assert!(progress.take_in(asked, 6));
        assert_eq!(progress, Progress { setbacks: 1, revision: 6 });
        // Two that were asked before, answered by the old store and by the new one: told once.
        assert!(!progress.take_in(asked, 9));
        assert!(!progress.take_in(asked, 6));
        assert_eq!(progress, Progress { setbacks: 1, revision: 6 });
        let asked = progress;
        assert!(!progress.take_in(asked, 8));
        assert_eq!(progress, Progress { setbacks: 1, revision: 8 });
    }
}
