//! Which history of the registry this coordinator works in, and the beginning of another one.
//!
//! Terms, epochs and plans are numbered by the registry's revisions, and can be compared within one
//! history of it: see `docs/membership.md`. A registry that was lost or restored from a backup
//! counts from a lower number. The leader then gives the cluster a new id, and the core begins
//! anew; who was being served is replayed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use node::membership::{Event, Membership, WriteOutcome};
use proto::ids::{PipelineId, Term};
use proto::keys::Keys;
use tokio::task::JoinSet;

use super::control::{Driver, Outcome};
use crate::cluster::{self, Cluster};

/// Random bytes of a cluster's id.
const CLUSTER_ID_BYTES: usize = 16;

/// Between two tries to read or write the cluster's id. No plan is made meanwhile.
const SETTLE_PAUSE: Duration = Duration::from_millis(500);

/// Ids of earlier histories that are remembered, the last ones: a backup may bring one back.
const PAST_IDS: usize = 16;

/// An id that no cluster had before.
pub(crate) fn new_cluster_id() -> String {
    crate::service::hex(&rand::random::<[u8; CLUSTER_ID_BYTES]>())
}

/// The history that this coordinator knows of.
#[derive(Debug, Default)]
pub(super) struct History {
    /// The highest revision that each watch told, in the order of [`Watched`].
    told: [u64; 2],
    /// The last term of this coordinator.
    term: Term,
    /// The highest of them all when the last campaign began.
    before_campaign: u64,
    /// Why it is over, whatever the cluster's id in the registry is.
    over: Option<String>,
    /// The id is being read or written, at this term.
    settling: Option<Term>,
    /// The core was told the term that it has.
    settled: Option<Term>,
    /// The highest id of a pipeline that workers may have heard of.
    last_pipeline: PipelineId,
    /// The cluster's ids in earlier histories.
    past: VecDeque<String>,
}

/// What is watched. Each watch tells its own things in order; two of them do not.
#[derive(Clone, Copy, Debug)]
pub(super) enum Watched {
    Workers,
    ClusterId,
}

impl History {
    /// A watch told an event.
    fn hear(&mut self, watched: Watched, event: &Event) {
        let before = self.told[watched as usize];
        let revision = match event {
            Event::Reset(snapshot) if snapshot.revision < before => {
                let found = snapshot.revision;
                let detail =
                    format!("the registry went back: it is at revision {found} after {before}");
                return self.end(detail);
            }
            Event::Reset(snapshot) => snapshot.revision,
            Event::Put(entry) => entry.mod_revision,
            Event::Delete { revision, .. } => *revision,
        };
        self.told[watched as usize] = before.max(revision);
    }

    /// This coordinator campaigns from now on: the term that it is given is higher than everything
    /// that was heard before.
    pub(super) fn campaigns(&mut self) {
        let told = self.told.into_iter().fold(self.term.0, u64::max);
        self.before_campaign = told;
    }

    /// It leads.
    fn leads(&mut self, term: Term) {
        let before = self.before_campaign;
        if term.0 < before {
            self.end(format!(
                "the registry went back: this coordinator leads at term {term} after revision {before}"
            ));
        }
        self.term = term;
    }

    /// Nothing that is known of it counts any more.
    pub(super) fn end(&mut self, detail: String) {
        self.over.get_or_insert(detail);
    }

    /// Workers are about to hear of a pipeline.
    pub(super) fn names(&mut self, pipeline: PipelineId) {
        self.last_pipeline = self.last_pipeline.max(pipeline);
    }
}

impl Driver {
    /// A watch of the registry told an event.
    pub(super) fn hear_registry(&mut self, watched: Watched, event: &Event) {
        self.history.hear(watched, event);
        if self.history.over.is_some() {
            self.settle(Duration::ZERO);
        }
    }

    /// The cluster's id was told, or that there is none.
    pub(super) fn on_cluster_id(&mut self, event: &Event) {
        self.hear_registry(Watched::ClusterId, event);
        let key = self.keys.cluster_id();
        let is_ours = match event {
            Event::Reset(now) => now
                .entries
                .iter()
                .any(|entry| entry.key == key && entry.value == self.config.cluster.cluster_id),
            Event::Put(entry) if entry.key == key => entry.value == self.config.cluster.cluster_id,
            Event::Delete { key: gone, .. } => *gone != key,
            Event::Put(_) => true,
        };
        if !is_ours {
            self.settle(Duration::ZERO);
        }
    }

    /// This coordinator leads: the core is told once the cluster's id is known.
    pub(super) fn on_leadership(&mut self, term: Term) {
        self.history.leads(term);
        self.history.settled = None;
        self.settle(Duration::ZERO);
    }

    /// Everything that the core knows of the registry is over.
    pub(super) fn end_history(&mut self, detail: String) {
        self.history.end(detail);
        self.settle(Duration::ZERO);
    }

    /// The term, unless it is known to be over.
    fn reign(&self) -> Option<Term> {
        let leadership = self.leadership.as_ref()?;
        (!leadership.lost.is_cancelled()).then_some(Term(leadership.term))
    }

    /// Reads the cluster's id, or writes a new one if this history is over. Only a leader does.
    fn settle(&mut self, pause: Duration) {
        let Some(term) = self.reign() else { return };
        if self.history.settling == Some(term) {
            return;
        }
        self.history.settling = Some(term);
        let (membership, keys) = (self.membership.clone(), self.keys.clone());
        let known = self.config.cluster.cluster_id.clone();
        let mut over = Vec::new();
        if self.history.over.is_some() {
            over.extend(self.history.past.iter().cloned());
            over.push(known.clone());
        }
        self.calls.spawn(async move {
            tokio::time::sleep(pause).await;
            let id = cluster_id(membership, keys, term, known, &over).await;
            Outcome::ClusterId { term, id }
        });
    }

    /// The cluster's id in the registry, which may be new.
    pub(super) fn on_settled(&mut self, term: Term, id: Result<String, String>) {
        if self.history.settling == Some(term) {
            self.history.settling = None;
        }
        if self.reign() != Some(term) {
            return;
        }
        let id = match id {
            Ok(id) => {
                self.refused_ids.end();
                id
            }
            Err(error) => {
                if let Some(times) = self.refused_ids.count(self.now(), &error) {
                    tracing::warn!(%term, error, times, "the cluster's id is not known, trying again");
                }
                return self.settle(SETTLE_PAUSE);
            }
        };
        let is_new = id != self.config.cluster.cluster_id;
        if self.history.over.is_some() && !is_new {
            // It ended while the id was read.
            return self.settle(Duration::ZERO);
        }
        if is_new {
            self.begin_history(id);
        }
        if self.history.settled != Some(term) {
            self.history.settled = Some(term);
            self.router.begin_term(term);
            self.tell_cluster(cluster::Event::TermGained(term));
        }
    }

    /// Begins anew, with nothing of what the registry said before.
    fn begin_history(&mut self, id: String) {
        let over = &self.config.cluster.cluster_id;
        let why = self.history.over.take();
        let why = why.unwrap_or_else(|| "the registry holds another cluster id".to_owned());
        tracing::error!(over, began = id, why, "the registry began anew, and the cluster with it");
        for at in self.lanes.serving() {
            // Its sequences go on in the new one, with the tokens that they have.
            if self.lanes.leave(at) {
                self.router.hold(at.id, true);
            }
        }
        self.measure_readiness();
        // What was asked before is answered for another core, and of another registry.
        self.calls = JoinSet::new();
        self.deploying = None;
        let History { last_pipeline, mut past, .. } = std::mem::take(&mut self.history);
        past.push_back(self.config.cluster.cluster_id.clone());
        if past.len() > PAST_IDS {
            past.pop_front();
        }
        self.history = History { last_pipeline, past, ..History::default() };
        // An epoch of before may come again, and what was sent at it may still be on its way.
        self.config.cluster.last_pipeline = last_pipeline;
        self.config.cluster.cluster_id = id;
        self.cluster = Cluster::new(self.config.cluster.clone());
        self.workers = self.membership.watch(&self.keys.workers());
        self.cluster_ids = self.membership.watch(&self.keys.cluster_id());
        self.looks_for_leader = false;
        self.stand_by();
    }
}

/// The cluster's id: as it is in the registry, or `known` if there is none. If the history of `known`
/// is over, `over` names it and earlier ones, none of which is left there.
async fn cluster_id(
    membership: Arc<dyn Membership>,
    keys: Keys,
    term: Term,
    known: String,
    over: &[String],
) -> Result<String, String> {
    let key = keys.cluster_id();
    let wanted = if over.is_empty() { known } else { new_cluster_id() };
    let entry = membership.get_or_create(&key, Bytes::from(wanted.clone())).await;
    let entry = entry.map_err(|error| node::Chain(&error).to_string())?;
    let found = String::from_utf8_lossy(&entry.value).into_owned();
    if !over.contains(&found) {
        return Ok(found);
    }
    let previous = Some(entry.mod_revision);
    let value = Bytes::from(wanted.clone());
    let written = membership.write_if_leader(&keys.leader(), term.0, &key, previous, value).await;
    match written.map_err(|error| node::Chain(&error).to_string())? {
        WriteOutcome::Written(_) => Ok(wanted),
        WriteOutcome::Conflict => Err("another coordinator leads or changed it".to_owned()),
        WriteOutcome::Unknown => Err("the registry did not answer".to_owned()),
    }
}

#[cfg(test)]
mod tests;
