//! Registries in memory that are emptied and set back under a control task without workers.

use std::time::Duration;

use node::membership::{Entry, Memory, MemoryBackup, Snapshot};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::driver::DriverHandle;
use crate::driver::control::tests::config;

/// Within which a coordinator leads again, whatever came of the registry; half of what the cluster
/// has for everything.
const AGAIN: Duration = Duration::from_secs(8);

fn reset(revision: u64) -> Event {
    Event::Reset(Snapshot { revision, entries: Vec::new() })
}

fn put(mod_revision: u64) -> Event {
    let (key, value) = ("/x".to_owned(), Bytes::new());
    Event::Put(Entry { key, value, create_revision: 1, mod_revision })
}

#[test]
fn each_watch_is_held_against_what_it_told_itself() {
    let mut history = History::default();
    history.hear(Watched::Workers, &reset(8));
    history.hear(Watched::Workers, &put(12));
    // Listed before that, and heard after it.
    history.hear(Watched::ClusterId, &reset(9));
    history.hear(Watched::Workers, &reset(12));
    assert_eq!(history.over, None);
    history.hear(Watched::ClusterId, &reset(7));
    let why = history.over.expect("it went back");
    assert!(why.contains("revision 7 after 9"), "{why}");
}

#[test]
fn a_term_is_held_against_what_was_heard_before_it_was_campaigned_for() {
    let mut history = History::default();
    history.hear(Watched::Workers, &put(12));
    history.campaigns();
    // Elected at 13; what came after that was heard sooner.
    history.hear(Watched::Workers, &put(20));
    history.leads(Term(13));
    assert_eq!(history.over, None);
    history.campaigns();
    history.leads(Term(15));
    let why = history.over.expect("it went back");
    assert!(why.contains("term 15 after revision 20"), "{why}");
}

struct Running {
    handle: DriverHandle,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Running {
    fn start(memory: &Memory) -> Self {
        let stop = CancellationToken::new();
        let second = Duration::from_secs(1);
        let membership = Arc::new(memory.clone());
        let (driver, handle) =
            Driver::new(config(Duration::ZERO, second), Keys::new("c"), membership, stop.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(driver.run(CancellationToken::new().drop_guard()));
        Self { handle, stop, tasks }
    }

    /// Waits until it leads, in a cluster whose id `is_wanted`. The id.
    async fn leads(&self, memory: &Memory, is_wanted: impl Fn(&str) -> bool) -> String {
        let led = async {
            loop {
                let status = self.handle.status().await.expect("it runs");
                let leader = memory.list(&Keys::new("c").leader()).await.unwrap().entries;
                let term = leader.first().map(|leader| leader.create_revision);
                if is_wanted(&status.cluster_id) && Some(status.term) == term {
                    return status.cluster_id;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let id = tokio::time::timeout(AGAIN, led).await.expect("it leads");
        let found = memory.list(&Keys::new("c").cluster_id()).await.unwrap().entries;
        assert_eq!(found[0].value, id, "the registry holds it");
        id
    }

    async fn end(mut self) {
        self.stop.cancel();
        self.tasks.join_next().await.unwrap().unwrap();
    }
}

/// Writes what coordinators hear of, and gives them the time to: only what was heard before can be
/// missed later.
async fn write_junk(memory: &Memory, count: u32) {
    for index in 0..count {
        let id = format!("junk-{}-{index}", memory.list("/").await.unwrap().revision);
        memory.get_or_create(&Keys::new("c").worker(&id), Bytes::new()).await.unwrap();
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_coordinator_leads_on_in_a_registry_that_lost_everything() {
    let memory = Memory::new();
    write_junk(&memory, 20).await;
    let running = Running::start(&memory);
    let mut before = running.leads(&memory, |id| id == "1").await;
    for _ in 0..3 {
        memory.restore(MemoryBackup::default());
        let known = before.clone();
        before = running.leads(&memory, |id| id != known).await;
        write_junk(&memory, 20).await;
    }
    running.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_coordinator_renames_the_cluster_of_a_registry_that_was_set_back() {
    let memory = Memory::new();
    let running = Running::start(&memory);
    running.leads(&memory, |id| id == "1").await;
    let backup = memory.back_up();
    write_junk(&memory, 20).await;
    // Its own term is lost and regained beyond the backup.
    memory.expire_lease(&Keys::new("c").leader());
    running.leads(&memory, |id| id == "1").await;
    memory.restore(backup.clone());
    let first = running.leads(&memory, |id| id != "1").await;
    memory.restore(backup);
    running.leads(&memory, |id| id != "1" && id != first).await;
    running.end().await;
}

#[tokio::test(start_paused = true)]
async fn whoever_leads_after_the_loss_gives_the_cluster_its_id() {
    let memory = Memory::new();
    write_junk(&memory, 20).await;
    let (first, second) = (Running::start(&memory), Running::start(&memory.another()));
    first.leads(&memory, |id| id == "1").await;
    memory.restore(MemoryBackup::default());
    let settled = async {
        loop {
            let either = async |running: &Running| {
                tokio::time::timeout(AGAIN / 2, running.leads(&memory, |id| id != "1")).await.ok()
            };
            if let Some(id) = either(&first).await.or(either(&second).await) {
                return id;
            }
        }
    };
    let id = settled.await;
    first.end().await;
    second.leads(&memory, |found| found == id).await;
    second.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_election_alone_changes_no_cluster() {
    let memory = Memory::new();
    let running = Running::start(&memory);
    running.leads(&memory, |id| id == "1").await;
    for _ in 0..3 {
        write_junk(&memory, 5).await;
        memory.expire_lease(&Keys::new("c").leader());
        running.leads(&memory, |_| true).await;
    }
    assert_eq!(running.leads(&memory, |_| true).await, "1");
    running.end().await;
}
