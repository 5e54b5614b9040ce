//! Claims against an in-memory registry, as a process with both roles has it, and against one
//! that does not answer.

use std::sync::atomic::{AtomicUsize, Ordering};

use node::membership::Memory;
use tokio_util::sync::CancellationToken;

use super::*;

const KEY: CoordinatorKey = CoordinatorKey::new([1; 16]);
const OTHER: CoordinatorKey = CoordinatorKey::new([2; 16]);

fn witness_of(memory: &Memory) -> Witness {
    Witness::new(RegistryKeys {
        membership: Arc::new(memory.clone()),
        leader: "leader".into(),
        cluster_id: "cluster-id".into(),
    })
}

/// A claim of the coordinator whose key is [`KEY`].
fn claim(term: u64, epoch: u64) -> Claim<'static> {
    Claim { term: Term(term), epoch: Epoch(epoch), key: Some(KEY), address: None, cluster: None }
}

fn record(key: CoordinatorKey) -> bytes::Bytes {
    let record = LeaderRecord {
        address: "a:1".into(),
        key_digest: Some(key.digest()),
        ..LeaderRecord::default()
    };
    serde_json::to_vec(&record).unwrap().into()
}

async fn lead(memory: &Memory, value: bytes::Bytes) -> node::membership::Leadership {
    memory.campaign("leader", value, &CancellationToken::new()).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn only_the_leader_of_the_registry_is_believed() {
    let memory = Memory::new();
    let witness = witness_of(&memory);
    let nobody = witness.confirm(claim(1, 1), false).await.unwrap_err();
    assert!(nobody.to_string().contains("there is none"), "{nobody}");

    let first = lead(&memory, record(KEY)).await;
    let term = first.term;
    witness.confirm(claim(term, term), false).await.unwrap();
    let highest = witness.confirm(claim(u64::MAX, 1), false).await.unwrap_err();
    assert!(
        matches!(highest, WitnessError::NotTheLeader { leader: Some(Term(t)), .. } if t == term)
    );
    let beyond = witness.confirm(claim(term, u64::MAX), false).await.unwrap_err();
    assert!(matches!(beyond, WitnessError::Epoch { .. }), "{beyond}");
    for key in [None, Some(OTHER)] {
        let stranger = witness.confirm(Claim { key, ..claim(term, 1) }, false).await.unwrap_err();
        assert!(matches!(stranger, WitnessError::Key { .. }), "{stranger}");
    }

    first.resign().await.unwrap();
    let second = lead(&memory, record(OTHER)).await;
    let successor = Claim { key: Some(OTHER), ..claim(second.term, second.term) };
    witness
        .confirm(successor, false)
        .await
        .expect("a rising term that is the leader's is believed");
}

#[tokio::test(start_paused = true)]
async fn what_was_confirmed_goes_on_while_the_registry_is_away() {
    let memory = Memory::new();
    let leadership = lead(&memory, record(KEY)).await;
    let witness = witness_of(&memory);
    witness.confirm(claim(leadership.term, 1), false).await.unwrap();
    memory.disconnect();
    witness.confirm(claim(leadership.term, 1), false).await.unwrap();
    let rising = witness.confirm(claim(leadership.term + 1, 1), false).await.unwrap_err();
    assert!(matches!(rising, WitnessError::Registry { .. }), "{rising}");
}

#[tokio::test(start_paused = true)]
async fn a_leader_of_an_older_version_needs_no_key() {
    let memory = Memory::new();
    let leadership = lead(&memory, bytes::Bytes::from("host:7420")).await;
    let witness = witness_of(&memory);
    witness.confirm(Claim { key: None, ..claim(leadership.term, 1) }, false).await.unwrap();
    assert!(witness.confirm(Claim { key: None, ..claim(u64::MAX, 1) }, false).await.is_err());
}

/// Counts readings; every one takes a moment, or for ever.
struct Slow {
    readings: Arc<AtomicUsize>,
    answers: bool,
}

impl Source for Slow {
    fn read(&self) -> BoxFuture<'_, Result<Reading, MembershipError>> {
        self.readings.fetch_add(1, Ordering::Relaxed);
        let answers = self.answers;
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(5)).await;
            if !answers {
                std::future::pending::<()>().await;
            }
            Ok(Reading::default())
        })
    }
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_claims_costs_the_registry_few_readings() {
    let readings = Arc::new(AtomicUsize::new(0));
    let witness = Witness::new(Slow { readings: readings.clone(), answers: true });
    let claims = (0..1000).map(|term| witness.confirm(claim(term, 1), false));
    let answers = futures::future::join_all(claims).await;
    assert!(answers.iter().all(Result::is_err));
    // The first finds none under way; all that came meanwhile share the next.
    assert!(readings.load(Ordering::Relaxed) <= 2, "{readings:?}");
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_says_nothing_is_not_waited_for() {
    let witness = Witness::new(Slow { readings: Arc::default(), answers: false });
    let start = Instant::now();
    let error = witness.confirm(claim(1, 1), false).await.unwrap_err();
    assert!(matches!(error, WitnessError::TimedOut { .. }), "{error}");
    assert_eq!(start.elapsed(), CONFIRM_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn a_cluster_is_what_the_registry_calls_it() {
    let memory = Memory::new();
    let leadership = lead(&memory, record(KEY)).await;
    let witness = witness_of(&memory);
    let of = |cluster| Claim { cluster: Some(cluster), ..claim(leadership.term, 1) };
    let none = witness.confirm(of("a"), false).await.unwrap_err();
    assert!(none.to_string().contains("there is none"), "{none}");
    memory.get_or_create("cluster-id", "a".into()).await.unwrap();
    let first = witness.confirm(of("a"), false).await.unwrap();
    assert_eq!(witness.confirm(of("a"), false).await.unwrap(), first, "the same reading");
    let afresh = witness.confirm(of("a"), true).await.unwrap();
    assert!(afresh.number > first.number && afresh.revision >= first.revision);
    let other = witness.confirm(of("b"), false).await.unwrap_err();
    assert!(matches!(other, WitnessError::Cluster { .. }), "{other}");
    let stranger = Claim { key: Some(OTHER), ..of("b") };
    let stranger = witness.confirm(stranger, false).await.unwrap_err();
    assert!(matches!(stranger, WitnessError::Key { .. }), "{stranger}");
}

#[tokio::test(start_paused = true)]
async fn claims_that_wait_are_bounded_and_leave_room_for_others_and_for_the_leader() {
    let memory = Memory::new();
    let leadership = lead(&memory, record(KEY)).await;
    let witness = witness_of(&memory);
    witness.confirm(claim(leadership.term, 1), false).await.unwrap();
    let known = witness.last().clone();
    let witness = Witness::new(Slow { readings: Arc::default(), answers: false });
    *witness.last() = known;
    let from = |last: u8, key, term| Claim {
        address: Some([10, 0, 0, last].into()),
        key: Some(key),
        ..claim(term, 1)
    };
    // From one address, another and a third, and the leader's own that the last reading does not show.
    let flood = |last: u8| (0..100).map(move |_| from(last, OTHER, 2));
    let claims = flood(1).chain(flood(2)).chain(flood(3));
    let leader = (0..10).map(|_| from(1, KEY, leadership.term + 1));
    let asked = claims.chain(leader).map(|claim| witness.confirm(claim, false));
    let answers = futures::future::join_all(asked).await;
    let waited: Vec<usize> = answers
        .chunks(100)
        .map(|answers| {
            let waited = |answer: &&Result<Sighting, WitnessError>| {
                matches!(answer, Err(WitnessError::TimedOut { .. }))
            };
            answers.iter().filter(waited).count()
        })
        .collect();
    assert_eq!(waited, [32, 32, 0, 10]);
    assert!(matches!(answers[99], Err(WitnessError::Crowded { .. })));
}
