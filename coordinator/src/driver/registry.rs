//! What the driver says to the registry and hears from it.

use std::time::Duration;

use bytes::Bytes;
use node::membership::{
    Entry, Event as RegistryEvent, Membership, MembershipError, WriteOutcome, clear,
};
use proto::ids::Term;
use proto::key::LeaderRecord;
use proto::keys::Keys;
use proto::plan::{LEADER_FORMAT, Plan, WorkerRecord, is_successor};
use tokio::task::JoinError;

use super::control::{Driver, Outcome, on_end};
use super::history::Watched;
use crate::cluster::{self, Found, Ticket};
use crate::tick::Tick;

/// Between campaigns that the registry refused.
const CAMPAIGN_PAUSE: Duration = Duration::from_secs(1);

/// Between two lines of the log about a registry that refuses again and again: somebody looks, or
/// nobody does.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// A refusal that is older is over: whoever was refused asked again meanwhile and waits for the answer. A
/// few times the pause, for an answer takes its time.
const STILL_REFUSES: Duration = Duration::from_secs(5);

/// What the registry is given to hear that this coordinator leads no more; then the lease ends it.
pub(super) const RESIGN_TIMEOUT: Duration = Duration::from_secs(2);

/// Takes away the key of a leader that has ended, for this process listens where that one did: its lease
/// need not be waited for. It can write nothing more, for what leads next has another term.
async fn clear_leader(membership: &dyn Membership, key: &str, record: &LeaderRecord) {
    let own = (record.incarnation, record.socket.as_str());
    let has_ended = |value: &[u8]| {
        serde_json::from_slice(value).is_ok_and(|found: LeaderRecord| {
            is_successor(own, (found.incarnation, found.socket.as_str()))
        })
    };
    match clear(membership, key, has_ended).await {
        Ok(true) => tracing::info!("an earlier process at this address had led: its term is over"),
        Ok(false) => {}
        // Whoever campaigns finds out whether the registry answers.
        Err(error) => tracing::info!(error = %node::Chain(&error), "who leads is not known"),
    }
}

/// What the registry refuses again and again: said once, and then now and then with how often.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    said: Option<(Tick, String)>,
    /// When it refused last.
    last: Option<Tick>,
    /// Since that was said, or since there was none.
    times: u64,
}

impl Refusals {
    /// It refused again. How often it has since this was last said, if it is to be said now.
    pub(super) fn count(&mut self, now: Tick, error: &str) -> Option<u64> {
        self.times += 1;
        self.last = Some(now);
        let was_said = self
            .said
            .as_ref()
            .is_some_and(|(at, said)| said == error && now.since(*at) < SAY_AGAIN);
        if was_said {
            return None;
        }
        self.said = Some((now, error.to_owned()));
        Some(std::mem::take(&mut self.times))
    }

    /// Why it refuses, if it still does: it is asked again a moment after each refusal.
    pub(super) fn current(&self, now: Tick) -> Option<&str> {
        let is_current = self.last.is_some_and(|last| now.since(last) < STILL_REFUSES);
        self.said.as_ref().filter(|_| is_current).map(|(_, error)| error.as_str())
    }

    /// It refuses no more.
    pub(super) fn end(&mut self) {
        *self = Self::default();
    }
}

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
        let record = LeaderRecord {
            format: LEADER_FORMAT,
            address: self.config.advertise.clone(),
            http: self.config.http.clone(),
            incarnation: self.incarnation,
            key_digest: Some(self.key.digest()),
            socket: self.config.socket.clone(),
        };
        let value = match serde_json::to_vec(&record) {
            Ok(value) => Bytes::from(value),
            Err(error) => {
                tracing::error!(%error, "the leader's record does not serialise");
                return;
            }
        };
        let stop = self.stop.clone();
        self.history.campaigns();
        self.calls.spawn(async move {
            tokio::time::sleep(pause).await;
            clear_leader(&*membership, &key, &record).await;
            Outcome::Campaigned(membership.campaign(&key, value, &stop).await)
        });
    }

    /// Tells the cluster what changed among the workers.
    pub(super) fn on_registry(&mut self, event: RegistryEvent) {
        self.hear_registry(Watched::Workers, &event);
        let event = match event {
            RegistryEvent::Reset(snapshot) => {
                // Megabytes of many workers: not on a thread that others wait for.
                let keys = self.keys.clone();
                let read = move || {
                    let records = snapshot.entries.iter().filter_map(|entry| record(&keys, entry));
                    records.collect()
                };
                self.listing = Some(tokio::task::spawn_blocking(read));
                return;
            }
            RegistryEvent::Put(entry) => match record(&self.keys, &entry) {
                Some(record) => cluster::Event::WorkerPut(record),
                // What was there before is not there any more.
                None => return self.on_gone(&entry.key),
            },
            RegistryEvent::Delete { key, .. } => return self.on_gone(&key),
        };
        self.tell_cluster(event);
    }

    /// The list of workers is read: what changed since then is heard from now on.
    pub(super) fn on_listed(&mut self, records: Result<Vec<WorkerRecord>, JoinError>) {
        self.listing = None;
        match records {
            Ok(records) => self.tell_cluster(cluster::Event::Reset(records)),
            Err(error) => on_end(Err(error)),
        }
    }

    fn on_gone(&mut self, key: &str) {
        if let Some(worker) = key.strip_prefix(&self.keys.workers()) {
            self.tell_cluster(cluster::Event::WorkerGone { worker: worker.to_owned() });
        }
    }

    /// Reads what is planned.
    pub(super) fn read_plan(&mut self, ticket: Ticket) {
        let (membership, key) = (self.membership.clone(), self.keys.plan());
        let term = self.leadership.as_ref().map(|leadership| Term(leadership.term));
        self.calls.spawn(async move {
            Outcome::Event(match membership.list(&key).await {
                Ok(snapshot) => {
                    let entry = snapshot.entries.iter().find(|entry| entry.key == key);
                    let found = entry.map_or(Found::Nothing, plan);
                    let found = not_of_a_later_term(found, term);
                    cluster::Event::PlanRead { ticket, found }
                }
                Err(error) => {
                    let detail = node::Chain(&error).to_string();
                    cluster::Event::PlanReadFailed { ticket, detail }
                }
            })
        });
    }

    /// Writes a plan, if this coordinator still leads and nobody wrote since.
    pub(super) fn write_plan(
        &mut self,
        ticket: Ticket,
        term: Term,
        previous: Option<u64>,
        plan: &Plan,
    ) {
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
                Ok(WriteOutcome::Written(revision)) => {
                    crate::metrics::plan_written();
                    cluster::Event::PlanWritten { ticket, revision }
                }
                Ok(WriteOutcome::Conflict) => cluster::Event::PlanConflict { ticket },
                Ok(WriteOutcome::Unknown) => {
                    let detail = "the registry did not answer".to_owned();
                    cluster::Event::PlanUnknown { ticket, detail }
                }
                // Certainly not written; reading it back finds that out and costs nothing.
                Err(error) => {
                    let detail = node::Chain(&error).to_string();
                    cluster::Event::PlanUnknown { ticket, detail }
                }
            })
        });
    }
}

/// Lays down the leadership, or leaves that to the lease.
pub(super) async fn resign(resigned: impl Future<Output = Result<(), MembershipError>>) {
    match tokio::time::timeout(RESIGN_TIMEOUT, resigned).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::info!(error = %node::Chain(&error), "leadership ends with its lease");
        }
        Err(_) => {
            let waited = RESIGN_TIMEOUT.as_secs();
            tracing::info!(waited, "the registry is away, leadership ends with its lease");
        }
    }
}

/// A worker's record; `None`, and a line in the log, if somebody wrote something else there.
fn record(keys: &Keys, entry: &Entry) -> Option<WorkerRecord> {
    let read = serde_json::from_slice(&entry.value).map_err(|error| error.to_string());
    let whole = read.and_then(|record: WorkerRecord| match record.fault() {
        None if keys.worker(&record.id) == entry.key => Ok(record),
        None => Err("it is of another worker than its key".to_owned()),
        Some(fault) => Err(fault.to_owned()),
    });
    whole.inspect_err(|error| tracing::warn!(key = entry.key, error, "not a worker's record")).ok()
}

/// The plan. Of what cannot be understood, which a line in the log tells, only the revision matters:
/// a new plan takes its place.
fn plan(entry: &Entry) -> Found {
    let read = serde_json::from_slice(&entry.value).map_err(|error| error.to_string());
    let revision = entry.mod_revision;
    let whole = read.and_then(|plan: Plan| match plan.fault() {
        None => match plan.pipelines.iter().find(|pipeline| pipeline.epoch.0 > revision) {
            None => Ok(plan),
            // An epoch is the revision of this write or of one before.
            Some(late) => Err(format!("pipeline {} is of a later revision", late.at())),
        },
        Some(fault) => Err(fault.to_owned()),
    });
    match whole {
        Ok(plan) => Found::Plan { revision, plan },
        Err(detail) => {
            tracing::warn!(
                key = entry.key,
                revision,
                error = detail,
                "not a plan, and to be replaced"
            );
            Found::Unreadable { revision, detail }
        }
    }
}

/// A plan of a later term than this coordinator's is of another history of the registry, or of a
/// coordinator that leads by now: in the first case it is to be replaced, in the other it cannot be.
fn not_of_a_later_term(found: Found, term: Option<Term>) -> Found {
    match (found, term) {
        (Found::Plan { revision, plan }, Some(term)) if plan.term > term => {
            let detail = format!("it is of term {}, this coordinator leads at {term}", plan.term);
            tracing::warn!(
                revision,
                error = detail,
                "not a plan of this registry, and to be replaced"
            );
            Found::Unreadable { revision, detail }
        }
        (found, _) => found,
    }
}

#[cfg(test)]
mod tests {
    use proto::ids::Incarnation;
    use serde_json::json;

    use super::*;

    fn entry(key: &str, value: &serde_json::Value) -> Entry {
        let value = Bytes::from(value.to_string());
        Entry { key: key.to_owned(), value, create_revision: 3, mod_revision: 5 }
    }

    #[test]
    fn what_is_refused_again_and_again_is_said_once_a_minute() {
        let mut refusals = Refusals::default();
        let said = |refusals: &mut Refusals, seconds: u64, error: &str| {
            refusals.count(Tick(Duration::from_secs(seconds)), error)
        };
        let lines: Vec<_> = (0..200).filter_map(|i| said(&mut refusals, i, "no space")).collect();
        assert_eq!(lines, [1, 60, 60, 60]);
        assert_eq!(said(&mut refusals, 200, "not allowed"), Some(20), "another reason is news");
        assert_eq!(said(&mut refusals, 201, "not allowed"), None);
        assert_eq!(refusals.current(Tick(Duration::from_secs(205))), Some("not allowed"));
        assert_eq!(refusals.current(Tick(Duration::from_secs(206))), None, "it answers by now");
        refusals.end();
        assert_eq!(said(&mut refusals, 202, "not allowed"), Some(1), "it had worked");
    }

    #[test]
    fn only_a_record_that_names_its_worker_is_one() {
        let keys = Keys::new("c");
        let key = keys.worker("w1");
        let whole = json!({ "id": "w1", "incarnation": "0".repeat(31) + "1", "address": "host:1" });
        let read = record(&keys, &entry(&key, &whole)).expect("fields may be missing");
        assert_eq!((read.id.as_str(), read.threads), ("w1", 0));
        assert_eq!(read.incarnation.0[15], 1);
        for (field, bad) in [
            ("id", json!("")),
            ("id", json!("w2")),
            ("id", json!("w1/x")),
            ("incarnation", json!(Incarnation::NONE)),
            ("incarnation", json!("1")),
            ("address", json!("")),
            ("address", json!("host")),
            ("address", json!("\u{1b}[2J:1")),
            ("address", json!(":1")),
            ("address", json!("0.0.0.0:7071")),
            ("address", json!("[::]:7071")),
            ("address", json!("[::ffff:0.0.0.0]:7071")),
            ("address", json!("host:0")),
            ("models", json!(7)),
        ] {
            let mut other = whole.clone();
            other[field] = bad.clone();
            assert_eq!(record(&keys, &entry(&key, &other)), None, "{field} is {bad}");
        }
        for field in ["id", "incarnation", "address"] {
            let mut other = whole.clone();
            other.as_object_mut().unwrap().remove(field);
            assert_eq!(record(&keys, &entry(&key, &other)), None, "without {field}");
        }
        assert_eq!(record(&keys, &entry(&key, &json!([]))), None);
    }

    #[test]
    fn what_cannot_be_carried_out_is_no_plan() {
        let stage = |worker, start, end| json!({ "worker": worker, "layers": { "start": start, "end": end } });
        let is_plan = |value: serde_json::Value| {
            let found = plan(&entry("plan", &value));
            match &found {
                Found::Plan { revision, .. } => assert_eq!(*revision, 5),
                Found::Unreadable { revision, detail } => {
                    assert!(*revision == 5 && !detail.is_empty());
                }
                Found::Nothing => panic!("there is something"),
            }
            matches!(found, Found::Plan { .. })
        };
        let read = |stages: serde_json::Value| {
            is_plan(json!({ "pipelines": [{ "id": 1, "stages": stages }] }))
        };
        assert!(read(json!([stage("a", 0, 2), stage("b", 2, 4)])));
        assert!(!read(json!([])));
        assert!(!read(json!([stage("a", 0, 2), stage("a", 2, 4)])), "twice");
        assert!(!read(json!([stage("a", 0, 2), stage("b", 3, 4)])), "a gap");
        assert!(!read(json!([stage("a", 0, 2), stage("b", 2, 1)])), "backwards");
        let numbered = |id: u64, epoch: u64| {
            let stages = json!([stage("a", 0, 2)]);
            is_plan(json!({ "pipelines": [{ "id": id, "epoch": epoch, "stages": stages }] }))
        };
        assert!(numbered(7, 5) && numbered(proto::limits::PIPELINE_ID, 0));
        assert!(!numbered(7, 6) && !numbered(7, u64::MAX), "of a later revision than its own");
        assert!(!numbered(u64::MAX, 0), "there is none after it");
        let twice = ["a", "b"].map(|worker| json!({ "id": 1, "stages": [stage(worker, 0, 2)] }));
        assert!(!is_plan(json!({ "pipelines": twice })));
        assert!(!is_plan(json!("garbage")));
        assert!(!is_plan(json!({ "pipelines": null })));
    }
}
