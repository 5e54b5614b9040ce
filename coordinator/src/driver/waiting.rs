//! Why nothing is served: what the driver knows of it, and when that is logged.

use std::time::Duration;

use bytes::Bytes;
use node::config::HostPort;
use proto::key::LeaderRecord;
use proto::status::{WaitCause, Waiting};

use super::control::{Driver, Outcome};
use crate::tick::Tick;

/// What passes sooner is part of every start, and nothing to tell.
const TELL_AFTER: Duration = Duration::from_secs(1);

/// How often a coordinator looks who leads, and so whether the registry answers: one small read.
const LEADER_INTERVAL: Duration = Duration::from_secs(2);

/// When to say what: once for every change that lasts.
#[derive(Debug, Default)]
pub(super) struct Teller {
    current: Option<(Waiting, Tick)>,
    said: Option<Waiting>,
}

/// What is to be said.
#[derive(Debug, PartialEq, Eq)]
enum Saying {
    Waits(Waiting),
    Serves,
}

impl Teller {
    /// What is due now, if anything is.
    fn due(&mut self, now: Tick, waiting: Option<Waiting>) -> Option<Saying> {
        let Some(waiting) = waiting else {
            self.current = None;
            return self.said.take().map(|_| Saying::Serves);
        };
        let since = match &self.current {
            Some((same, since)) if *same == waiting => *since,
            _ => {
                self.current = Some((waiting.clone(), now));
                now
            }
        };
        // A refusal is news at once: what follows it soon hides it.
        let is_due = waiting.cause == WaitCause::Refused || now.since(since) >= TELL_AFTER;
        if !is_due || self.said.as_ref() == Some(&waiting) {
            return None;
        }
        self.said = Some(waiting.clone());
        Some(Saying::Waits(waiting))
    }
}

impl Driver {
    /// Why nothing is served; `None` once a token has come through a pipeline.
    pub(super) fn waiting(&self) -> Option<Waiting> {
        if self.is_stopping() {
            return Some(Waiting {
                cause: WaitCause::Starting,
                detail: "the coordinator is stopping".to_owned(),
            });
        }
        if *self.ready.borrow() {
            return None;
        }
        let availability = self.cluster.availability();
        let mut waiting = availability.waiting().cloned().unwrap_or_else(|| Waiting {
            cause: WaitCause::Starting,
            detail: match self.lanes.proven() {
                None => "the pipeline is to compute its first token".to_owned(),
                Some(last) => {
                    let silent = self.now().since(last).as_secs();
                    format!("no token has come through for {silent} s")
                }
            },
        });
        if waiting.cause == WaitCause::Leadership
            && let Some(refusal) = self.refused_campaigns.current(self.now())
        {
            // Nobody need lead: it is the registry that keeps this one from it.
            let detail = format!("this coordinator cannot lead: {refusal}");
            return Some(Waiting { cause: WaitCause::Registry, detail });
        }
        if waiting.cause == WaitCause::Leadership
            && let Some(leader) = &self.leader
        {
            waiting.detail.push_str(&format!("; the one at {leader} does"));
        }
        Some(waiting)
    }

    /// Why requests are not taken, for their clients: the same.
    pub(super) fn why_unavailable(&self) -> String {
        self.waiting().map_or_else(|| "no pipeline is serving".to_owned(), |why| why.detail)
    }

    /// Logs why nothing is served, once for every change.
    pub(super) fn tell_waiting(&mut self) {
        let (now, waiting) = (self.now(), self.waiting());
        match self.teller.due(now, waiting) {
            None => {}
            Some(Saying::Serves) => tracing::info!(target: "tercet::waiting", "serves"),
            Some(Saying::Waits(Waiting { cause, detail })) if cause.passes() => {
                tracing::info!(target: "tercet::waiting", cause = cause.name(), "waiting: {detail}");
            }
            Some(Saying::Waits(Waiting { cause, detail })) => {
                tracing::warn!(target: "tercet::waiting", cause = cause.name(), "waiting: {detail}");
            }
        }
    }

    /// Looks who leads, and so whether the registry answers; `again` and again from then on.
    fn look_for_leader(&mut self, after: Duration, again: bool) {
        let (membership, key) = (self.membership.clone(), self.keys.leader());
        self.calls.spawn(async move {
            tokio::time::sleep(after).await;
            let found = membership.list(&key).await.map(|snapshot| {
                let entry = snapshot.entries.into_iter().find(|entry| entry.key == key);
                entry.and_then(|entry| address(&entry.value))
            });
            let found = found.map_err(|error| node::Chain(&error).to_string());
            Outcome::Leader { found, again }
        });
    }

    /// Notes who leads and how the registry is, and looks again later.
    pub(super) fn on_leader(&mut self, found: Result<Option<String>, String>, again: bool) {
        self.registry = Some((self.now(), found.as_ref().err().cloned()));
        // Only told to people: without an answer there is nothing to tell.
        self.leader = found.ok().flatten().filter(|_| self.leadership.is_none());
        if again {
            self.look_for_leader(LEADER_INTERVAL, true);
        }
    }

    /// Begins to look who leads.
    pub(super) fn stand_by(&mut self) {
        let first = !std::mem::replace(&mut self.looks_for_leader, true);
        self.look_for_leader(TELL_AFTER, first);
    }
}

/// Where a leader says it is reached; `None` for anything that is no address.
fn address(value: &Bytes) -> Option<String> {
    let record: LeaderRecord = serde_json::from_slice(value).ok()?;
    record.address.parse::<HostPort>().ok().map(|address| address.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::key::CoordinatorKey;

    fn waits(cause: WaitCause, detail: &str) -> Waiting {
        Waiting { cause, detail: detail.to_owned() }
    }

    #[test]
    fn what_lasts_is_said_once_and_a_refusal_at_once() {
        let mut teller = Teller::default();
        let starting = waits(WaitCause::Starting, "s");
        let refused = waits(WaitCause::Refused, "r");
        let at = Tick::from_millis;
        assert_eq!(teller.due(at(0), Some(starting.clone())), None);
        assert_eq!(teller.due(at(999), Some(starting.clone())), None);
        let said = Some(Saying::Waits(starting.clone()));
        assert_eq!(teller.due(at(1000), Some(starting.clone())), said);
        assert_eq!(teller.due(at(9000), Some(starting.clone())), None, "it was said");
        let said = Some(Saying::Waits(refused.clone()));
        assert_eq!(teller.due(at(9100), Some(refused.clone())), said);
        // Tried again and refused again: nothing new.
        assert_eq!(teller.due(at(9200), Some(starting.clone())), None);
        assert_eq!(teller.due(at(9300), Some(refused)), None);
        assert_eq!(teller.due(at(9400), None), Some(Saying::Serves));
        assert_eq!(teller.due(at(9500), None), None);
        assert_eq!(teller.due(at(9600), Some(starting)), None, "short breaks are no news");
        assert_eq!(teller.due(at(9700), None), None);
    }

    #[test]
    fn only_an_address_passes_for_a_leader() {
        let of = |text: &str| {
            let key_digest = CoordinatorKey::new([7; 16]).digest();
            let record = LeaderRecord {
                address: text.to_owned(),
                key_digest: Some(key_digest),
                ..LeaderRecord::default()
            };
            address(&serde_json::to_vec(&record).unwrap().into())
        };
        assert_eq!(of("rack1:7420"), Some("rack1:7420".to_owned()));
        assert_eq!(of("\u{1b}[2J"), None);
        assert_eq!(address(&Bytes::from_static(b"rack1:7420")), None);
        assert_eq!(address(&Bytes::from_static(b"\xff")), None);
    }
}
