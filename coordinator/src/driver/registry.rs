//! What the driver says to the registry and hears from it.

use std::time::Duration;

use bytes::Bytes;
use node::membership::{Entry, Event as RegistryEvent, WriteOutcome};
use proto::ids::Term;
use proto::key::LeaderRecord;
use proto::plan::{Plan, WorkerRecord};

use super::{Driver, Outcome};
use crate::cluster;

/// Between campaigns that the registry refused.
const CAMPAIGN_PAUSE: Duration = Duration::from_secs(1);

impl Driver {
    /// Asks to lead; the answer may take for ever.
    pub(super) fn campaign(&mut self) {
        self.campaign_after(Duration::ZERO);
        self.stand_by();
    }

    /// The same, after a pause.
    pub(super) fn campaign_later(&mut self) {
        self.campaign_after(CAMPAIGN_PAUSE);
    }

    fn campaign_after(&mut self, pause: Duration) {
        let (membership, key) = (self.membership.clone(), self.keys.leader());
        let address = self.config.advertise.clone();
        let record = LeaderRecord { address, key_digest: self.key.digest() };
        let value = match serde_json::to_vec(&record) {
            Ok(value) => Bytes::from(value),
            Err(error) => {
                tracing::error!(%error, "the leader's record does not serialise");
                return;
            }
        };
        let stop = self.stop.clone();
        self.calls.spawn(async move {
            tokio::time::sleep(pause).await;
            Outcome::Campaigned(membership.campaign(&key, value, &stop).await)
        });
    }

    /// Tells the cluster what changed among the workers.
    pub(super) fn on_registry(&mut self, event: RegistryEvent) {
        let event = match event {
            RegistryEvent::Reset(snapshot) => {
                cluster::Event::Reset(snapshot.entries.iter().filter_map(record).collect())
            }
            RegistryEvent::Put(entry) => match record(&entry) {
                Some(record) => cluster::Event::WorkerPut(record),
                None => return,
            },
            RegistryEvent::Delete { key, .. } => {
                let prefix = self.keys.workers();
                let Some(worker) = key.strip_prefix(&prefix) else { return };
                cluster::Event::WorkerGone { worker: worker.to_owned() }
            }
        };
        self.tell_cluster(event);
    }

    /// Reads what is planned.
    pub(super) fn read_plan(&mut self) {
        let (membership, key) = (self.membership.clone(), self.keys.plan());
        self.calls.spawn(async move {
            let failed = |detail| Outcome::Event(cluster::Event::PlanReadFailed { detail });
            let snapshot = match membership.list(&key).await {
                Ok(snapshot) => snapshot,
                Err(error) => return failed(node::Chain(&error).to_string()),
            };
            let entry = snapshot.entries.into_iter().find(|entry| entry.key == key);
            let Some(entry) = entry else {
                return Outcome::Event(cluster::Event::PlanRead(None));
            };
            match serde_json::from_slice(&entry.value) {
                Ok(plan) => {
                    let plan = (entry.mod_revision, plan);
                    Outcome::Event(cluster::Event::PlanRead(Some(plan)))
                }
                Err(error) => failed(format!("the plan in the registry is not a plan: {error}")),
            }
        });
    }

    /// Writes a plan, if this coordinator still leads and nobody wrote since.
    pub(super) fn write_plan(&mut self, term: Term, previous: Option<u64>, plan: &Plan) {
        let value = match serde_json::to_vec(plan) {
            Ok(value) => Bytes::from(value),
            Err(error) => {
                tracing::error!(%error, "a plan does not serialise");
                return;
            }
        };
        tracing::info!(%term, reason = plan.reason, "writes a plan");
        let (membership, leader, key) =
            (self.membership.clone(), self.keys.leader(), self.keys.plan());
        self.calls.spawn(async move {
            let outcome = membership.write_if_leader(&leader, term.0, &key, previous, value).await;
            Outcome::Event(match outcome {
                Ok(WriteOutcome::Written(revision)) => cluster::Event::PlanWritten { revision },
                Ok(WriteOutcome::Conflict) => cluster::Event::PlanConflict,
                Ok(WriteOutcome::Unknown) => {
                    cluster::Event::PlanUnknown { detail: "the registry did not answer".into() }
                }
                // Certainly not written; reading it back finds that out and costs nothing.
                Err(error) => {
                    cluster::Event::PlanUnknown { detail: node::Chain(&error).to_string() }
                }
            })
        });
    }
}

/// A worker's record; `None`, and a line in the log, if somebody wrote something else there.
fn record(entry: &Entry) -> Option<WorkerRecord> {
    serde_json::from_slice(&entry.value)
        .inspect_err(|error| tracing::warn!(key = entry.key, %error, "not a worker's record"))
        .ok()
}
