//! What the registry says of the coordinator that calls: whether it leads at the term it claims,
//! with the key it shows, and whether the epoch it names can exist. A stranger who only reads what
//! `Describe` tells can move nothing.
//!
//! The registry is read when a call claims what the last reading does not show: once a term and
//! once a plan. While the registry is away, what was confirmed before goes on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use node::membership::{Entry, Membership, MembershipError};
use proto::ids::{Epoch, KeyDigest, Term};
use proto::key::{CoordinatorKey, LeaderRecord};
use tokio::time::Instant;

/// How long a call waits to be confirmed, its turn included: less than a coordinator waits for its
/// answer (5 s), so that it hears why.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(3);

/// Between the starts of two readings: calls that claim anything at all, however many, cost the
/// registry 20 readings a second at most.
const READING_GAP: Duration = Duration::from_millis(50);

/// Why a call is not believed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WitnessError {
    /// The registry has another leader, or none.
    #[error("term {found} is not that of the leader in the registry ({})", shown(*leader))]
    NotTheLeader { found: Term, leader: Option<Term> },
    /// The call comes from somebody else than the leader.
    #[error("the call does not show the key of the coordinator of term {term}")]
    Key { term: Term },
    /// Epochs are revisions of the registry.
    #[error("epoch {found} is beyond the registry's revision {revision}")]
    Epoch { found: Epoch, revision: u64 },
    /// Nobody can say whether it is true.
    #[error("the registry cannot be asked whether term {term} leads")]
    Registry { term: Term, source: MembershipError },
    /// The same.
    #[error("the registry did not say within {CONFIRM_TIMEOUT:?} whether term {term} leads")]
    TimedOut { term: Term },
}

fn shown(leader: Option<Term>) -> String {
    leader.map_or_else(|| "there is none".into(), |term| format!("term {term}"))
}

/// What a control call claims.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    pub(crate) term: Term,
    pub(crate) epoch: Epoch,
    /// As shown with the call.
    pub(crate) key: Option<CoordinatorKey>,
}

/// What the registry said at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reading {
    /// Of the whole registry.
    pub(crate) revision: u64,
    pub(crate) leader: Option<Leader>,
}

/// Who leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leader {
    pub(crate) term: Term,
    /// `None` if its record names no key, as that of an older version: then none is demanded.
    pub(crate) key_digest: Option<KeyDigest>,
}

/// Where readings come from.
pub(crate) trait Source: Send + Sync {
    /// As of now: no write that ended before is missing.
    fn read(&self) -> BoxFuture<'_, Result<Reading, MembershipError>>;
}

/// The leader's key in a registry.
pub(crate) struct LeaderKey {
    pub(crate) membership: Arc<dyn Membership>,
    pub(crate) key: String,
}

impl Source for LeaderKey {
    fn read(&self) -> BoxFuture<'_, Result<Reading, MembershipError>> {
        Box::pin(async {
            let snapshot = self.membership.list(&self.key).await?;
            let entry = snapshot.entries.iter().find(|entry| entry.key == self.key);
            Ok(Reading { revision: snapshot.revision, leader: entry.map(leader) })
        })
    }
}

fn leader(entry: &Entry) -> Leader {
    let record = serde_json::from_slice::<LeaderRecord>(&entry.value);
    let key_digest = record.ok().and_then(|record| record.key_digest);
    Leader { term: Term(entry.create_revision), key_digest }
}

/// See the head of this file.
pub(crate) struct Witness {
    source: Box<dyn Source>,
    last: Mutex<Reading>,
    /// One reading is made at a time, and serves all who waited for it.
    turn: tokio::sync::Mutex<Turn>,
    /// Readings that have begun.
    begun: AtomicU64,
}

#[derive(Debug, Default)]
struct Turn {
    /// When the last reading began.
    last_begun: Option<Instant>,
    /// Which reading was answered last, counted from 1.
    answered: u64,
}

impl std::fmt::Debug for Witness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Witness").field("last", &self.last).finish_non_exhaustive()
    }
}

impl Witness {
    pub(crate) fn new(source: impl Source + 'static) -> Self {
        Self {
            source: Box::new(source),
            last: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            begun: AtomicU64::default(),
        }
    }

    /// Returns if the claim is true: as far as the last reading tells, else by a new one.
    ///
    /// # Errors
    ///
    /// [`WitnessError`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing but when the next reading may begin.
    pub(crate) async fn confirm(&self, claim: Claim) -> Result<(), WitnessError> {
        let last = *self.last();
        // Another key of the same term is read again as well: in a registry that lost its data a new leader
        // may be given a number that an earlier one had.
        if judge(last, claim).is_ok() {
            return Ok(());
        }
        let begun = self.begun.load(Ordering::SeqCst);
        let read = tokio::time::timeout(CONFIRM_TIMEOUT, self.read_after(begun));
        let reading = read
            .await
            .map_err(|_| WitnessError::TimedOut { term: claim.term })?
            .map_err(|source| WitnessError::Registry { term: claim.term, source })?;
        judge(reading, claim)
    }

    /// A reading that began after the first `begun` ones.
    async fn read_after(&self, begun: u64) -> Result<Reading, MembershipError> {
        let mut turn = self.turn.lock().await;
        if turn.answered > begun {
            return Ok(*self.last());
        }
        if let Some(last) = turn.last_begun {
            tokio::time::sleep_until(last + READING_GAP).await;
        }
        turn.last_begun = Some(Instant::now());
        let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let reading = self.source.read().await?;
        turn.answered = number;
        *self.last() = reading;
        Ok(reading)
    }

    fn last(&self) -> MutexGuard<'_, Reading> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn judge(reading: Reading, claim: Claim) -> Result<(), WitnessError> {
    let Claim { term, epoch, key } = claim;
    let leads = reading.leader.filter(|leader| leader.term == term);
    let Some(Leader { key_digest, .. }) = leads else {
        let leader = reading.leader.map(|leader| leader.term);
        return Err(WitnessError::NotTheLeader { found: term, leader });
    };
    // Digests are public: it does not matter how long it takes to tell two of them apart.
    if key_digest.is_some_and(|digest| key.map(|key| key.digest()) != Some(digest)) {
        return Err(WitnessError::Key { term });
    }
    if epoch.0 > reading.revision {
        return Err(WitnessError::Epoch { found: epoch, revision: reading.revision });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
