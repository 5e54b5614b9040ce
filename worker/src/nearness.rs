//! How far the other workers' machines are: connects to each now and then, and publishes the round trips.
//! A connect is one round trip between two kernels, in which no thread of the other process has a part;
//! of ours it takes one wake-up, so the least of many is believed.
//!
//! A handful of packets of 60 bytes for each worker every ten minutes, one after another, disturbs nobody
//! who serves: no message is sent, and nothing is computed.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use node::membership::{Entry, Membership};
use node::{Chain, TaskError};
use proto::ids::Incarnation;
use proto::limits::{ROUND_TRIP_US, ROUND_TRIPS};
use proto::plan::WorkerRecord;
use tokio_util::sync::CancellationToken;

use crate::record::Published;

/// Between two measurings. Whoever comes measures at once, so that each pair is known from the start;
/// later ones only find what changed in the network.
const MEASURE_EVERY: Duration = Duration::from_secs(600);

/// By its id a worker waits up to so much longer: those of a rack that were started together do not
/// measure together for long.
const JITTER: Duration = Duration::from_secs(120);

/// Connects to one worker in each measuring. More find no less where it is quiet.
const CONNECTS: usize = 4;

/// All connects to one worker take no longer: who is not there keeps nobody else from being measured.
const WORKER_TIMEOUT: Duration = Duration::from_secs(1);

/// Addresses of one name that are tried: one of each version, and more.
const ADDRESSES: usize = 4;

/// So many measurings, of an hour, are remembered, and the least is told: a busy machine makes a round
/// trip longer and never shorter. A network that got slower is seen after them.
const REMEMBERED: usize = 6;

/// What is published stays until it departs by more than a part of so much: a record that changes is
/// written, told to everybody and looked at.
const DEPARTURE_PART: u32 = 4;

/// And by more than this, in microseconds: it is small beside what a planner counts between two racks.
const DEPARTURE_US: u32 = 20;

/// Another worker, whose distance is measured.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Peer {
    id: String,
    incarnation: Incarnation,
    address: String,
}

/// Ends when `stop` fires. Until then it measures, now and every [`MEASURE_EVERY`], how far those are
/// whose records lie under `prefix`.
///
/// # Errors
///
/// If a thread that measures panicked.
pub(crate) async fn watch(
    membership: Arc<dyn Membership>,
    prefix: String,
    published: Arc<Published>,
    stop: CancellationToken,
) -> Result<(), TaskError> {
    let pause = MEASURE_EVERY + jitter(&published.current().id);
    let mut figures = Figures::default();
    loop {
        let measure = measure(&*membership, &prefix, &published, &mut figures);
        let Some(measured) = stop.run_until_cancelled(measure).await else { break };
        measured?;
        if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            break;
        }
    }
    Ok(())
}

/// Measures once, and publishes what is new.
async fn measure(
    membership: &dyn Membership,
    prefix: &str,
    published: &Published,
    figures: &mut Figures,
) -> Result<(), TaskError> {
    let found = match membership.list(prefix).await {
        Ok(found) => found,
        Err(error) => {
            tracing::info!(error = %Chain(&error), "nobody knows how far the other workers are");
            return Ok(());
        }
    };
    let peers = peers(&found.entries, prefix, &published.current());
    let mut measured = Vec::with_capacity(peers.len());
    for peer in peers {
        let address = peer.address.clone();
        // Not on a thread that serves, whose other tasks would be measured too.
        let round_trip = tokio::task::spawn_blocking(move || round_trip(&address)).await?;
        measured.push((peer, round_trip));
    }
    let round_trips_us = figures.take(measured, &published.current().round_trips_us);
    if round_trips_us == published.current().round_trips_us {
        return Ok(());
    }
    tracing::info!(workers = round_trips_us.len(), "round trips to other workers are new");
    let told = published.change(|record| record.round_trips_us = round_trips_us).await;
    if let Err(error) = told {
        tracing::info!(error = %Chain(&*error), "the registry does not know them yet");
    }
    Ok(())
}

/// Those on other machines: at most [`ROUND_TRIPS`], from the id that follows `own` on, so that in a
/// large fleet not all measure the same ones.
fn peers(entries: &[Entry], prefix: &str, own: &WorkerRecord) -> Vec<Peer> {
    let shares_machine =
        |other: &WorkerRecord| !own.machine.is_empty() && other.machine == own.machine;
    let peer = |entry: &Entry| {
        let record: WorkerRecord = serde_json::from_slice(&entry.value).ok()?;
        let is_one = record.fault().is_none() && entry.key.strip_prefix(prefix) == Some(&record.id);
        let is_other = record.id != own.id && !shares_machine(&record);
        let WorkerRecord { id, incarnation, address, .. } = record;
        (is_one && is_other).then_some(Peer { id, incarnation, address })
    };
    let mut peers: Vec<_> = entries.iter().filter_map(peer).collect();
    peers.sort_unstable_by(|a, b| a.id.cmp(&b.id));
    let next = peers.partition_point(|peer| peer.id < own.id);
    peers.rotate_left(next);
    peers.truncate(ROUND_TRIPS);
    peers
}

/// How much later than others the worker of this id measures.
fn jitter(id: &str) -> Duration {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    Duration::from_secs(hasher.finish() % JITTER.as_secs())
}

/// The least time of some connects to `address`, in microseconds; `None` if there was none. Blocks for
/// [`WORKER_TIMEOUT`] at most, and for what the resolver takes.
fn round_trip(address: &str) -> Option<u32> {
    let mut addresses: Vec<_> = address.to_socket_addrs().ok()?.take(ADDRESSES).collect();
    let end = Instant::now() + WORKER_TIMEOUT;
    let mut least = None;
    for _ in 0..CONNECTS {
        // What does not answer is not tried again.
        let mut times = addresses.iter().enumerate();
        let Some((index, us)) = times.find_map(|(i, at)| Some((i, connect_us(*at, end)?))) else {
            break;
        };
        addresses = vec![addresses[index]];
        least = Some(least.unwrap_or(us).min(us));
    }
    least
}

/// The time of one connect.
fn connect_us(address: SocketAddr, end: Instant) -> Option<u32> {
    let begin = Instant::now();
    let timeout = end.checked_duration_since(begin).filter(|timeout| !timeout.is_zero())?;
    let connection = TcpStream::connect_timeout(&address, timeout).ok()?;
    let took = begin.elapsed();
    drop(connection);
    let us = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
    Some(us.clamp(1, ROUND_TRIP_US))
}

/// What was measured lately, by worker.
#[derive(Debug, Default)]
struct Figures(BTreeMap<String, (Incarnation, VecDeque<u32>)>);

impl Figures {
    /// Takes a measuring of all that are there; `None` is of one that was not reached, whose figures
    /// stay. What is to be published in place of `before`.
    fn take(
        &mut self,
        measured: Vec<(Peer, Option<u32>)>,
        before: &BTreeMap<String, u32>,
    ) -> BTreeMap<String, u32> {
        let mut kept = std::mem::take(&mut self.0);
        let mut publish = BTreeMap::new();
        for (peer, us) in measured {
            // Who was started again may be elsewhere.
            let known = kept.remove(&peer.id).filter(|(start, _)| *start == peer.incarnation);
            let mut recent = known.map(|(_, recent)| recent).unwrap_or_default();
            recent.extend(us);
            if recent.len() > REMEMBERED {
                recent.pop_front();
            }
            let Some(&least) = recent.iter().min() else { continue };
            let told = before.get(&peer.id).copied().filter(|&told| is_as_told(least, told));
            publish.insert(peer.id.clone(), told.unwrap_or(least));
            self.0.insert(peer.id, (peer.incarnation, recent));
        }
        publish
    }
}

/// Whether a figure departs too little from the published one to be told.
fn is_as_told(us: u32, told: u32) -> bool {
    us.abs_diff(told) <= (told / DEPARTURE_PART).max(DEPARTURE_US)
}

#[cfg(test)]
mod tests;
