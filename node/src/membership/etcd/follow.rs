//! A watch that goes on: over cut connections, compaction, silent streams, slow readers, and a store
//! that lost its data or was set back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{EventType, WatchOptions, WatchResponse};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::link::{Backoff, CallError, Link, Progress, Refusals};
use super::{entry, revision, signed};
use crate::membership::{Event, Revision, Snapshot};

/// How often the watch is held against what etcd really has: a stream may be dead and not know, and
/// one that waits for a revision which a store that went back has not reached waits in silence. Few
/// processes watch for long, and a list of a cluster is some kilobytes.
const CHECK_INTERVAL: Duration = Duration::from_secs(3);

/// What the reader was told.
struct Told {
    /// The last revision; the next stream begins after it.
    revision: Revision,
    /// Every key with the revision that wrote it.
    keys: BTreeMap<String, Revision>,
}

/// Why one stream ended.
enum End {
    /// The connection broke: go on after the last revision.
    Cut,
    /// Changes were missed: tell everything anew.
    Gap,
    /// Nobody reads any more.
    Closed,
}

/// Tells `events` what happens under `prefix`, until nobody reads.
pub(super) async fn follow(link: Arc<Link>, prefix: String, events: mpsc::Sender<Event>) {
    let mut told: Option<Told> = None;
    let mut is_reopened = false;
    let mut progress = link.progress();
    let mut refusals = Refusals::default();
    let mut backoff = Backoff::new();
    loop {
        let now = match &mut told {
            Some(told) => told,
            None => match reset(&link, &prefix, &events, &mut progress, &mut refusals).await {
                Ok(Some(fresh)) => {
                    is_reopened = false;
                    told.insert(fresh)
                }
                Ok(None) => return,
                Err(()) => {
                    backoff.wait().await;
                    continue;
                }
            },
        };
        let before = now.revision;
        let end = stream(&link, &prefix, &events, now, &mut progress, is_reopened).await;
        is_reopened = true;
        if now.revision > before {
            backoff = Backoff::new();
        }
        match end {
            End::Closed => return,
            End::Cut => backoff.wait().await,
            End::Gap => told = None,
        }
    }
}

/// Tells everything. `None` if nobody reads.
async fn reset(
    link: &Link,
    prefix: &str,
    events: &mpsc::Sender<Event>,
    progress: &mut watch::Receiver<Progress>,
    refusals: &mut Refusals,
) -> Result<Option<Told>, ()> {
    // First a place in the queue, so that what is told then is not old already.
    let Ok(place) = events.reserve().await else { return Ok(None) };
    // Should the store go back after this, all is told once more.
    progress.mark_unchanged();
    let snapshot = link.list(prefix).await.map_err(|error| {
        // Silence was told by the link; a refusal is for a person to see.
        if !error.is_transient() {
            refusals.tell(&error, "a watch cannot read its prefix");
        }
    })?;
    refusals.end();
    let told = Told {
        revision: snapshot.revision,
        keys: snapshot.entries.iter().map(|e| (e.key.clone(), e.mod_revision)).collect(),
    };
    place.send(Event::Reset(snapshot));
    Ok(Some(told))
}

/// Tells changes after `told.revision` as long as one stream lives. Whoever answers one that was
/// `reopened` may have lost everything: that is looked at first.
async fn stream(
    link: &Link,
    prefix: &str,
    events: &mpsc::Sender<Event>,
    told: &mut Told,
    progress: &mut watch::Receiver<Progress>,
    reopened: bool,
) -> End {
    let options = WatchOptions::new().with_prefix().with_start_revision(signed(told.revision + 1));
    let opened =
        link.attempt(|mut client| async move { client.watch(prefix, Some(options)).await }).await;
    let mut stream = match opened {
        Ok(stream) => stream,
        Err(CallError::NoAnswer(_)) => return End::Cut,
        Err(refused) => {
            let error = refused.into_membership("watch", prefix);
            tracing::error!(error = %crate::Chain(&error), "a watch was refused");
            return End::Cut;
        }
    };

    let mut check = interval(CHECK_INTERVAL);
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    if !reopened {
        check.reset();
    }
    let mut was_behind = false;
    loop {
        tokio::select! {
            message = stream.message() => match message {
                Ok(Some(response)) => {
                    was_behind = false;
                    link.note_answer();
                    match tell(&response, events, told) {
                        Ok(()) => {}
                        Err(end) => return end,
                    }
                }
                Ok(None) => return End::Cut,
                Err(error) => {
                    link.note_silence(Some(&error));
                    return End::Cut;
                }
            },
            _ = check.tick() => match link.list(prefix).await {
                Err(_) => return End::Cut,
                // Told as an error where it was found.
                Ok(snapshot) if snapshot.revision < told.revision => return End::Gap,
                Ok(snapshot) if !told.is_behind(&snapshot) => was_behind = false,
                // A change may just be on its way; one that is for so long is lost.
                Ok(_) if !was_behind => was_behind = true,
                Ok(_) => {
                    tracing::error!(prefix, "a watch had gone silent; telling everything anew");
                    return End::Gap;
                }
            },
            // The sender is the link's.
            _ = progress.changed() => return End::Gap,
            () = events.closed() => return End::Closed,
        }
    }
}

/// Passes on what one message says.
fn tell(
    response: &WatchResponse,
    events: &mpsc::Sender<Event>,
    told: &mut Told,
) -> Result<(), End> {
    if response.compact_revision() > 0 {
        return Err(End::Gap);
    }
    if response.canceled() {
        tracing::info!(reason = response.cancel_reason(), "etcd ended a watch");
        return Err(End::Cut);
    }
    let mut last = told.revision;
    for event in response.events() {
        let Some(kv) = event.kv() else { continue };
        last = last.max(revision(kv.mod_revision()));
        let Some(entry) = entry(kv) else { continue };
        let event = match event.event_type() {
            EventType::Put => {
                told.keys.insert(entry.key.clone(), entry.mod_revision);
                Event::Put(entry)
            }
            EventType::Delete => {
                told.keys.remove(&entry.key);
                Event::Delete { key: entry.key, revision: entry.mod_revision }
            }
        };
        events.try_send(event).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => End::Gap,
            mpsc::error::TrySendError::Closed(_) => End::Closed,
        })?;
    }
    // etcd never splits a revision over two messages.
    told.revision = last;
    Ok(())
}

impl Told {
    /// Whether `snapshot` has changes that were not told.
    fn is_behind(&self, snapshot: &Snapshot) -> bool {
        let written = snapshot
            .entries
            .iter()
            .any(|entry| self.keys.get(&entry.key).is_none_or(|told| *told < entry.mod_revision));
        let deleted = self.keys.iter().any(|(key, told)| {
            let there = snapshot.entries.binary_search_by(|entry| entry.key.cmp(key)).is_ok();
            *told <= snapshot.revision && !there
        });
        written || deleted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::Entry;

    fn snapshot(revision: Revision, keys: &[(&str, Revision)]) -> Snapshot {
        let entry = |&(key, mod_revision): &(&str, Revision)| Entry {
            key: key.to_owned(),
            value: "x".into(),
            create_revision: 1,
            mod_revision,
        };
        Snapshot { revision, entries: keys.iter().map(entry).collect() }
    }

    #[test]
    fn a_watch_is_behind_when_the_store_has_what_it_did_not_tell() {
        let keys = [("a".to_owned(), 3), ("b".to_owned(), 5)].into();
        let told = Told { revision: 5, keys };
        for (now, behind) in [
            (snapshot(5, &[("a", 3), ("b", 5)]), false),
            // Something changed elsewhere.
            (snapshot(9, &[("a", 3), ("b", 5)]), false),
            // The list is older than what was told last: see to that before.
            (snapshot(4, &[("a", 3)]), false),
            (snapshot(9, &[("a", 9), ("b", 5)]), true),
            (snapshot(9, &[("a", 3), ("b", 5), ("c", 8)]), true),
            (snapshot(9, &[("b", 5)]), true),
        ] {
            assert_eq!(told.is_behind(&now), behind, "{now:?}");
        }
    }
}
