//! What the registry says of the coordinator that calls: whether it leads at the term it claims,
//! with the key it shows, whether the cluster it names is the registry's, and whether the epoch it
//! names can exist. A stranger who only reads what `Describe` tells can move nothing.
//!
//! The registry is read when a call claims what the last reading does not show: once a term and
//! once a plan. While the registry is away, what was confirmed before goes on.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use node::membership::{Entry, Membership, MembershipError};
use proto::ids::{Epoch, KeyDigest, Term};
use proto::key::{CoordinatorKey, LeaderRecord};
use tokio::time::Instant;

use crate::callers::Places;
use crate::session::epochs::Sighting;

/// How long a call waits to be confirmed, its turn included: less than a coordinator waits for its
/// answer (5 s), so that it hears why.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(3);

/// Between the starts of two readings: calls that claim anything at all, however many, cost the
/// registry 20 readings a second at most.
const READING_GAP: Duration = Duration::from_millis(50);

/// Calls that wait for the registry and show not the key that led when it was last read: a coordinator has
/// one for each of its pipelines, and that only until it is known. Their messages, some hundred KiB each, are
/// held meanwhile.
const STRANGERS_WAITING: usize = 64;

/// Of these, those of one address: who floods a worker from one machine leaves the rest to others.
const STRANGERS_WAITING_OF_ONE: usize = 32;

/// Calls that wait and show the key: as many as stages may be held.
const KNOWN_WAITING: usize = proto::limits::HELD_STAGES;

/// Why a call is not believed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WitnessError {
    /// The registry has another leader, or none.
    #[error("term {found} is not that of the leader in the registry ({})", shown(*leader))]
    NotTheLeader { found: Term, leader: Option<Term> },
    /// The call comes from somebody else than the leader.
    #[error("the call does not show the key of the coordinator of term {term}")]
    Key { term: Term },
    /// The registry has another cluster id, or none.
    #[error("cluster {found:?} is not that of the registry ({})", named(cluster.as_deref()))]
    Cluster { found: String, cluster: Option<String> },
    /// Epochs are revisions of the registry.
    #[error("epoch {found} is beyond the registry's revision {revision}")]
    Epoch { found: Epoch, revision: u64 },
    /// Nobody can say whether it is true.
    #[error("the registry cannot be asked whether term {term} leads")]
    Registry { term: Term, source: MembershipError },
    /// Too many others ask at the moment.
    #[error(
        "too many calls wait for the registry already: nobody asks it now whether term {term} leads"
    )]
    Crowded { term: Term },
    /// Nobody can say whether it is true, in time.
    #[error("the registry did not say within {CONFIRM_TIMEOUT:?} whether term {term} leads")]
    TimedOut { term: Term },
}

fn shown(leader: Option<Term>) -> String {
    leader.map_or_else(|| "there is none".into(), |term| format!("term {term}"))
}

fn named(cluster: Option<&str>) -> String {
    cluster.map_or_else(|| "there is none".into(), |cluster| format!("{cluster:?}"))
}

/// What a control call claims.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim<'a> {
    pub(crate) term: Term,
    pub(crate) epoch: Epoch,
    /// As shown with the call.
    pub(crate) key: Option<CoordinatorKey>,
    /// Where it comes from.
    pub(crate) address: Option<IpAddr>,
    /// Named by a `Prepare` only.
    pub(crate) cluster: Option<&'a str>,
}

/// What the registry said at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reading {
    /// Of the whole registry.
    pub(crate) revision: u64,
    pub(crate) leader: Option<Leader>,
    /// The cluster's id.
    pub(crate) cluster: Option<String>,
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

/// The two keys in a registry.
pub(crate) struct RegistryKeys {
    pub(crate) membership: Arc<dyn Membership>,
    pub(crate) leader: String,
    pub(crate) cluster_id: String,
}

impl Source for RegistryKeys {
    fn read(&self) -> BoxFuture<'_, Result<Reading, MembershipError>> {
        Box::pin(async {
            // Not at one revision: who shows the leader's key speaks for the leader, and the id was the
            // registry's after the call had begun. That is all that is asked.
            let cluster_ids = self.membership.list(&self.cluster_id);
            let leaders = self.membership.list(&self.leader);
            let (cluster_ids, leaders) = futures::try_join!(cluster_ids, leaders)?;
            let cluster = cluster_ids.entries.iter().find(|entry| entry.key == self.cluster_id);
            let leads = leaders.entries.iter().find(|entry| entry.key == self.leader);
            Ok(Reading {
                revision: leaders.revision,
                leader: leads.map(leader),
                cluster: cluster.map(|entry| String::from_utf8_lossy(&entry.value).into_owned()),
            })
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
    last: Mutex<Numbered>,
    /// One reading is made at a time, and serves all who waited for it.
    turn: tokio::sync::Mutex<Turn>,
    /// Readings that have begun.
    begun: AtomicU64,
    strangers: Arc<Places>,
    known: Arc<Places>,
}

/// A reading and its number, counted from 1; 0 is none.
#[derive(Clone, Debug, Default)]
struct Numbered {
    number: u64,
    reading: Reading,
}

impl Numbered {
    fn sighting(&self) -> Sighting {
        Sighting { number: self.number, revision: self.reading.revision }
    }
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
            strangers: Places::new(STRANGERS_WAITING, STRANGERS_WAITING_OF_ONE),
            known: Places::new(KNOWN_WAITING, KNOWN_WAITING),
        }
    }

    /// Returns if the claim is true: as far as the last reading tells, else by a new one; by a new one
    /// in any case if `afresh`. Says which reading it was.
    ///
    /// # Errors
    ///
    /// [`WitnessError`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing but when the next reading may begin.
    pub(crate) async fn confirm(
        &self,
        claim: Claim<'_>,
        afresh: bool,
    ) -> Result<Sighting, WitnessError> {
        // Another key of the same term is read again as well: in a registry that lost its data a new leader
        // may be given a number that an earlier one had.
        if !afresh {
            let last = self.last();
            if judge(&last.reading, claim).is_ok() {
                return Ok(last.sighting());
            }
        }
        let place = match self.knows(claim.key) {
            true => self.known.enter(None),
            false => self.strangers.enter(claim.address),
        };
        let _place = place.ok_or(WitnessError::Crowded { term: claim.term })?;
        let begun = self.begun.load(Ordering::SeqCst);
        let read = tokio::time::timeout(CONFIRM_TIMEOUT, self.read_after(begun));
        let numbered = read
            .await
            .map_err(|_| WitnessError::TimedOut { term: claim.term })?
            .map_err(|source| WitnessError::Registry { term: claim.term, source })?;
        judge(&numbered.reading, claim)?;
        Ok(numbered.sighting())
    }

    /// Whether `key` is that of the leader, as of the last reading.
    fn knows(&self, key: Option<CoordinatorKey>) -> bool {
        let leader = self.last().reading.leader;
        let demanded = leader.and_then(|leader| leader.key_digest);
        demanded.is_some() && demanded == key.map(|key| key.digest())
    }

    /// A reading that began after the first `begun` ones.
    async fn read_after(&self, begun: u64) -> Result<Numbered, MembershipError> {
        let mut turn = self.turn.lock().await;
        if turn.answered > begun {
            return Ok(self.last().clone());
        }
        if let Some(last) = turn.last_begun {
            tokio::time::sleep_until(last + READING_GAP).await;
        }
        turn.last_begun = Some(Instant::now());
        let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let reading = self.source.read().await?;
        turn.answered = number;
        let numbered = Numbered { number, reading };
        self.last().clone_from(&numbered);
        Ok(numbered)
    }

    fn last(&self) -> MutexGuard<'_, Numbered> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn judge(reading: &Reading, claim: Claim<'_>) -> Result<(), WitnessError> {
    let Claim { term, epoch, key, cluster, .. } = claim;
    let leads = reading.leader.filter(|leader| leader.term == term);
    let Some(Leader { key_digest, .. }) = leads else {
        let leader = reading.leader.map(|leader| leader.term);
        return Err(WitnessError::NotTheLeader { found: term, leader });
    };
    // Digests are public: it does not matter how long it takes to tell two of them apart.
    if key_digest.is_some_and(|digest| key.map(|key| key.digest()) != Some(digest)) {
        return Err(WitnessError::Key { term });
    }
    if let Some(found) = cluster
        && reading.cluster.as_deref() != Some(found)
    {
        let (found, cluster) = (found.to_owned(), reading.cluster.clone());
        return Err(WitnessError::Cluster { found, cluster });
    }
    if epoch.0 > reading.revision {
        return Err(WitnessError::Epoch { found: epoch, revision: reading.revision });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
