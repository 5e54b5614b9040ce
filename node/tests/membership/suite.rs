//! What every implementation of membership promises.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use node::membership::{Entry, Event, MembershipError, Revision, Snapshot, Watch, WriteOutcome};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::world::World;

/// Anything that takes longer never comes. Generous, for tests share slow machines.
const PATIENCE: Duration = Duration::from_secs(60);

/// Within which everything is there again in a store that lost its data: a cluster has 15 s for that
/// and for what comes after.
const AGAIN: Duration = Duration::from_secs(10);

const WORKERS: &str = "/t/workers/";
const A: &str = "/t/workers/a";
const LEADER: &str = "/t/leader";
const PLAN: &str = "/t/plan";

pub(crate) async fn a_registration_is_seen_updated_and_left(world: impl World) {
    let (near, far) = (world.near(), world.far());
    let mut watch = far.watch(WORKERS);
    assert_eq!(reset(&mut watch).await.entries, []);

    let registration = near.register(A, "one".into()).await.unwrap();
    let made = put(&mut watch).await;
    assert_eq!((made.key.as_str(), &made.value[..]), (A, &b"one"[..]));
    assert_eq!(made.create_revision, made.mod_revision);
    assert_eq!(far.list(WORKERS).await.unwrap().entries, std::slice::from_ref(&made));

    registration.update("two".into()).await.unwrap();
    let updated = put(&mut watch).await;
    assert_eq!(updated.value, "two");
    assert_eq!(updated.create_revision, made.create_revision);
    assert!(updated.mod_revision > made.mod_revision);
    assert_eq!(far.list(WORKERS).await.unwrap().entries, [updated]);

    registration.leave().await.unwrap();
    assert_eq!(deleted(&mut watch).await, A);
    assert_eq!(near.list(WORKERS).await.unwrap().entries, []);
}

pub(crate) async fn a_dropped_registration_is_given_up(world: impl World) {
    let registration = world.near().register(A, "one".into()).await.unwrap();
    let mut watch = world.far().watch(WORKERS);
    assert_eq!(reset(&mut watch).await.entries.len(), 1);
    drop(registration);
    assert_eq!(deleted(&mut watch).await, A);
}

pub(crate) async fn a_process_that_is_cut_off_loses_its_key_and_gets_it_back(world: impl World) {
    let registration = world.near().register(A, "one".into()).await.unwrap();
    let mut watch = world.far().watch(WORKERS);
    let first = reset(&mut watch).await.entries.remove(0);

    world.cut().await;
    assert_eq!(deleted(&mut watch).await, A);
    assert_eq!(world.far().list(WORKERS).await.unwrap().entries, []);

    world.heal().await;
    let again = put(&mut watch).await;
    assert_eq!((again.key.as_str(), &again.value[..]), (A, &b"one"[..]));
    assert!(again.create_revision > first.create_revision);
    registration.leave().await.unwrap();
    assert_eq!(deleted(&mut watch).await, A);
}

pub(crate) async fn a_lease_that_ended_behind_its_owner_is_made_anew(world: impl World) {
    let registration = world.near().register(A, "one".into()).await.unwrap();
    registration.update("two".into()).await.unwrap();
    let mut watch = world.far().watch(WORKERS);
    let first = reset(&mut watch).await.entries.remove(0);

    world.end_lease(A).await;
    assert_eq!(deleted(&mut watch).await, A);
    let again = put(&mut watch).await;
    assert_eq!((again.key.as_str(), &again.value[..]), (A, &b"two"[..]));
    assert!(again.create_revision > first.create_revision);

    // The new lease is as good as the old one.
    registration.update("three".into()).await.unwrap();
    assert_eq!(put(&mut watch).await.value, "three");
    registration.leave().await.unwrap();
    assert_eq!(deleted(&mut watch).await, A);
}

pub(crate) async fn an_update_that_could_not_be_sent_is_sent_later(world: impl World) {
    let registration = world.near().register(A, "one".into()).await.unwrap();
    let mut watch = world.far().watch(WORKERS);
    reset(&mut watch).await;

    world.cut().await;
    let error = registration.update("two".into()).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    world.heal().await;
    // Depending on how long the cut was, the key was lost meanwhile or not.
    let written = loop {
        match next(&mut watch).await {
            Event::Put(entry) if entry.value == "two" => break entry,
            Event::Put(_) | Event::Delete { .. } => {}
            Event::Reset(_) => panic!("nothing was missed"),
        }
    };
    assert_eq!(world.far().list(WORKERS).await.unwrap().entries, [written]);
    registration.leave().await.unwrap();
}

pub(crate) async fn a_key_that_another_process_holds_is_refused(world: impl World) {
    let registration = world.near().register(A, "first".into()).await.unwrap();
    let error = world.far().register(A, "second".into()).await.unwrap_err();
    assert!(matches!(&error, MembershipError::KeyTaken { key } if key == A), "{error}");
    assert!(!error.is_transient());
    let entries = world.far().list(WORKERS).await.unwrap().entries;
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].value, "first");
    registration.leave().await.unwrap();
}

pub(crate) async fn a_key_that_no_lease_ends_is_not_waited_for(world: impl World) {
    let (near, far) = (world.near(), world.far());
    let stop = CancellationToken::new();
    let by_hand = near.get_or_create("/t/leader", "somebody".into()).await.unwrap();
    let within = Duration::from_secs(1);
    let campaign = timeout(within, far.campaign("/t/leader", "me".into(), &stop)).await;
    let error = campaign.expect("it is said at once").unwrap_err();
    assert!(matches!(&error, MembershipError::NoLease { key } if key == "/t/leader"), "{error}");
    assert!(error.to_string().contains("etcdctl del /t/leader") && !error.is_transient());
    near.get_or_create(A, "somebody".into()).await.unwrap();
    let registering = timeout(within, far.register(A, "me".into())).await;
    let error = registering.expect("it is said at once").unwrap_err();
    assert!(matches!(&error, MembershipError::NoLease { key } if key == A), "{error}");

    assert!(near.remove("/t/leader", by_hand.mod_revision).await.unwrap());
    let leadership = far.campaign("/t/leader", "me".into(), &stop).await.unwrap();
    leadership.resign().await.unwrap();
}

pub(crate) async fn a_key_that_is_written_over_without_a_lease_is_not_waited_for(
    world: impl World,
) {
    let (near, far) = (world.near(), world.far());
    let stop = CancellationToken::new();
    let leadership = near.campaign(LEADER, "near".into(), &stop).await.unwrap();
    let candidate = far.campaign(LEADER, "far".into(), &stop);
    let by_hand = async {
        // The other one is given time to find the key taken.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let found = near.list(LEADER).await.unwrap().entries.remove(0).mod_revision;
        let write = near.write_if_leader(LEADER, leadership.term, LEADER, Some(found), "x".into());
        assert!(matches!(write.await.unwrap(), WriteOutcome::Written(_)));
    };
    let (outcome, ()) = tokio::join!(timeout(AGAIN, candidate), by_hand);
    let error = outcome.expect("it is said at once").unwrap_err();
    assert!(matches!(&error, MembershipError::NoLease { key } if key == LEADER), "{error}");
}

pub(crate) async fn a_key_that_is_left_can_be_taken_by_the_one_who_waits(world: impl World) {
    let (near, far) = (world.near(), world.far());
    let first = near.register(A, "first".into()).await.unwrap();
    let leave = async {
        // The other one is given time to find the key taken.
        tokio::time::sleep(Duration::from_secs(1)).await;
        first.leave().await.unwrap();
    };
    let (second, ()) = tokio::join!(far.register(A, "second".into()), leave);
    let second = second.unwrap();
    let entries = near.list(WORKERS).await.unwrap().entries;
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].value, "second");
    second.leave().await.unwrap();
}

pub(crate) async fn events_have_the_revisions_of_the_store_in_order(world: impl World) {
    let (near, far) = (world.near(), world.far());
    near.get_or_create("/t/workers/old", "x".into()).await.unwrap();
    let mut watch = far.watch(WORKERS);
    let snapshot = reset(&mut watch).await;
    assert_eq!(snapshot.entries.len(), 1);
    assert!(snapshot.revision >= snapshot.entries[0].mod_revision);

    // Every other write is outside the prefix: it takes a revision and makes no event. The last
    // one's prefix is the same but for the slash.
    let mut wanted = Vec::new();
    let mut last = snapshot.revision;
    for i in 0..20 {
        let inside = near.get_or_create(&format!("/t/workers/{i}"), "x".into()).await.unwrap();
        let outside = near.get_or_create(&format!("/t/workers-{i}"), "x".into()).await.unwrap();
        assert!(last < inside.mod_revision && inside.mod_revision < outside.mod_revision);
        last = outside.mod_revision;
        wanted.push(inside);
    }
    let mut found = Vec::new();
    for _ in 0..wanted.len() {
        found.push(put(&mut watch).await);
    }
    assert_eq!(found, wanted);
    let listed = far.list(WORKERS).await.unwrap();
    assert!(listed.revision >= last);
    assert_eq!(listed.entries.len(), 21);
    assert!(listed.entries.is_sorted_by(|a, b| a.key < b.key));
}

pub(crate) async fn a_watch_goes_on_after_a_cut_without_loss(world: impl World) {
    let far = world.far();
    let mut watch = world.near().watch("/t/");
    reset(&mut watch).await;
    let before = far.get_or_create("/t/before", "x".into()).await.unwrap();
    assert_eq!(put(&mut watch).await, before);

    world.cut().await;
    let mut wanted = Vec::new();
    for i in 0..10 {
        wanted.push(far.get_or_create(&format!("/t/{i}"), "x".into()).await.unwrap());
    }
    let guest = far.register("/t/guest", "x".into()).await.unwrap();
    guest.leave().await.unwrap();
    world.heal().await;

    for wanted in wanted {
        assert_eq!(put(&mut watch).await, wanted);
    }
    assert_eq!(put(&mut watch).await.key, "/t/guest");
    assert_eq!(deleted(&mut watch).await, "/t/guest");
    let after = far.get_or_create("/t/after", "x".into()).await.unwrap();
    assert_eq!(put(&mut watch).await, after);
}

pub(crate) async fn a_watch_is_reset_after_compaction(world: impl World) {
    let far = world.far();
    let mut watch = world.near().watch("/t/");
    reset(&mut watch).await;

    world.cut().await;
    let mut all = Vec::new();
    for i in 0..3 {
        all.push(far.get_or_create(&format!("/t/{i}"), "x".into()).await.unwrap());
    }
    world.compact().await;
    world.heal().await;

    assert_eq!(reset(&mut watch).await.entries, all);
    let after = far.get_or_create("/t/after", "x".into()).await.unwrap();
    assert_eq!(put(&mut watch).await, after);
}

pub(crate) async fn a_slow_reader_ends_with_the_same_picture(world: impl World) {
    // More than any queue holds.
    const WRITES: usize = 1500;
    let far = world.far();
    let mut watch = world.near().watch("/t/");
    reset(&mut watch).await;
    for i in 0..WRITES {
        far.get_or_create(&format!("/t/{i:05}"), "x".into()).await.unwrap();
    }
    let wanted = far.list("/t/").await.unwrap();

    let mut seen: BTreeMap<String, Entry> = BTreeMap::new();
    let mut last: Revision = 0;
    while last < wanted.entries[WRITES - 1].mod_revision {
        match next(&mut watch).await {
            Event::Reset(now) => {
                seen = now.entries.into_iter().map(|e| (e.key.clone(), e)).collect();
                assert!(now.revision >= last);
                last = now.revision;
            }
            Event::Put(entry) => {
                assert!(entry.mod_revision > last);
                last = entry.mod_revision;
                seen.insert(entry.key.clone(), entry);
            }
            Event::Delete { key, .. } => panic!("{key} was not deleted"),
        }
    }
    assert_eq!(seen.into_values().collect::<Vec<_>>(), wanted.entries);
}

pub(crate) async fn a_lost_answer_is_unknown_and_can_be_read_back(world: impl World) {
    let near = world.near();
    let stop = CancellationToken::new();
    let leadership = near.campaign(LEADER, "me".into(), &stop).await.unwrap();
    world.lose_answers().await;
    let outcome =
        near.write_if_leader(LEADER, leadership.term, PLAN, None, "plan 1".into()).await.unwrap();
    assert_eq!(outcome, WriteOutcome::Unknown);
    world.heal().await;

    let found = near.list(PLAN).await.unwrap().entries;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].value, "plan 1");
    // Whoever writes again with what it knew changes nothing.
    let again = near.write_if_leader(LEADER, leadership.term, PLAN, None, "plan 1b".into()).await;
    assert_eq!(again.unwrap(), WriteOutcome::Conflict);
    assert_eq!(near.list(PLAN).await.unwrap().entries, found);
    leadership.resign().await.unwrap();
}

pub(crate) async fn a_write_that_never_arrived_is_unknown_and_can_be_tried_again(
    world: impl World,
) {
    // The leader is far, so that its term outlives the cut.
    let near = world.near();
    let stop = CancellationToken::new();
    let leadership = world.far().campaign(LEADER, "me".into(), &stop).await.unwrap();
    let term = leadership.term;
    world.cut().await;
    let outcome = near.write_if_leader(LEADER, term, PLAN, None, "plan 1".into()).await.unwrap();
    assert_eq!(outcome, WriteOutcome::Unknown);
    world.heal().await;

    assert_eq!(near.list(PLAN).await.unwrap().entries, []);
    let again = near.write_if_leader(LEADER, term, PLAN, None, "plan 1".into()).await.unwrap();
    let found = near.list(PLAN).await.unwrap().entries;
    assert_eq!(again, WriteOutcome::Written(found[0].mod_revision));
    leadership.resign().await.unwrap();
}

pub(crate) async fn leadership_passes_when_it_is_resigned(world: impl World) {
    let (near, far) = (world.near(), world.far());
    let stop = CancellationToken::new();
    let first = near.campaign(LEADER, "near".into(), &stop).await.unwrap();
    let held = far.list(LEADER).await.unwrap().entries.remove(0);
    assert_eq!((first.term, &held.value[..]), (held.create_revision, &b"near"[..]));

    let mut second = Box::pin(far.campaign(LEADER, "far".into(), &stop));
    // Longer than a lease lives: a leader that is well stays.
    let early = timeout(Duration::from_secs(7), &mut second).await;
    assert!(early.is_err(), "one leads already");
    assert!(!first.lost.is_cancelled());

    first.resign().await.unwrap();
    let second = timeout(PATIENCE, second).await.expect("the next one leads").unwrap();
    let held = near.list(LEADER).await.unwrap().entries.remove(0);
    assert_eq!((second.term, &held.value[..]), (held.create_revision, &b"far"[..]));
    second.resign().await.unwrap();
}

pub(crate) async fn leadership_passes_when_the_leader_dies(world: impl World) {
    let (near, far) = (world.near(), world.far());
    let stop = CancellationToken::new();
    let first = near.campaign(LEADER, "near".into(), &stop).await.unwrap();
    let old = first.term;
    world.cut().await;
    let second = timeout(PATIENCE, far.campaign(LEADER, "far".into(), &stop)).await;
    let second = second.expect("a dead leader is replaced").unwrap();
    assert!(second.term > old);
    assert!(!first.lost.is_cancelled(), "one who hears nothing cannot know");

    world.heal().await;
    timeout(PATIENCE, first.lost.cancelled()).await.expect("it learns that its term is over");
    let outcome = near.write_if_leader(LEADER, old, PLAN, None, "old".into()).await.unwrap();
    assert_eq!(outcome, WriteOutcome::Conflict);
    assert!(!second.lost.is_cancelled());
    second.resign().await.unwrap();
}

pub(crate) async fn what_a_dead_process_left_can_be_taken_over_before_its_lease_ends(
    world: impl World,
) {
    let (near, far) = (world.near(), world.far());
    let stop = CancellationToken::new();
    let first = near.campaign(LEADER, "old".into(), &stop).await.unwrap();
    let held = near.register(A, "old".into()).await.unwrap();
    world.cut().await;
    let cut = Instant::now();
    let clear = async |key, whose: &'static [u8]| {
        node::membership::clear(&*far, key, |value| value == whose).await.unwrap()
    };
    assert!(!clear(A, b"another's").await);
    assert!(!clear("/t/worker", b"old").await, "only the whole key is one's own");
    let found = far.list(A).await.unwrap().entries.remove(0);
    assert!(!far.remove(A, found.mod_revision + 1).await.unwrap(), "written since");
    assert!(!far.remove("/t/none", 0).await.unwrap());
    assert!(clear(A, b"old").await && clear(LEADER, b"old").await);
    assert!(!clear(A, b"old").await && !clear(LEADER, b"old").await);
    let registration = far.register(A, "new".into()).await.unwrap();
    let second = far.campaign(LEADER, "new".into(), &stop).await.unwrap();
    assert!(cut.elapsed() < Duration::from_secs(3), "before the lease ends");
    assert!(second.term > first.term);

    // It was only frozen: it finds that its time is over, and takes nothing away.
    world.heal().await;
    timeout(PATIENCE, first.lost.cancelled()).await.expect("it learns that its term is over");
    let write = near.write_if_leader(LEADER, first.term, PLAN, None, "old".into()).await;
    assert_eq!(write.unwrap(), WriteOutcome::Conflict);
    held.leave().await.unwrap();
    let value = async |key| far.list(key).await.unwrap().entries.remove(0).value;
    assert_eq!((value(A).await, value(LEADER).await), ("new".into(), "new".into()));
    assert!(!second.lost.is_cancelled());
    registration.leave().await.unwrap();
    second.resign().await.unwrap();
}

pub(crate) async fn a_leader_whose_lease_was_ended_learns_of_it(world: impl World) {
    let near = world.near();
    let stop = CancellationToken::new();
    let leadership = near.campaign(LEADER, "near".into(), &stop).await.unwrap();
    world.end_lease(LEADER).await;
    timeout(PATIENCE, leadership.lost.cancelled()).await.expect("it is told");
    // And it does not come back by itself.
    assert_eq!(near.list(LEADER).await.unwrap().entries, []);
    let write = near.write_if_leader(LEADER, leadership.term, PLAN, None, "old".into()).await;
    assert_eq!(write.unwrap(), WriteOutcome::Conflict);
}

pub(crate) async fn a_candidate_can_be_stopped(world: impl World) {
    let stop = CancellationToken::new();
    let first = world.near().campaign(LEADER, "near".into(), &stop).await.unwrap();
    let far = world.far();
    let candidate = far.campaign(LEADER, "far".into(), &stop);
    let stopper = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        stop.cancel();
    };
    let (outcome, ()) = tokio::join!(candidate, stopper);
    assert!(matches!(outcome.unwrap_err(), MembershipError::Stopped { key } if key == LEADER));
    first.resign().await.unwrap();
    assert_eq!(far.list(LEADER).await.unwrap().entries, []);
}

pub(crate) async fn only_the_leader_writes_and_only_what_it_knows(world: impl World) {
    let near = world.near();
    let stop = CancellationToken::new();
    let write = async |term, previous, value: &'static str| {
        near.write_if_leader(LEADER, term, PLAN, previous, value.into()).await.unwrap()
    };
    assert_eq!(write(1, None, "nobody leads").await, WriteOutcome::Conflict);
    assert_eq!(write(0, None, "nobody leads").await, WriteOutcome::Conflict);

    let first = near.campaign(LEADER, "me".into(), &stop).await.unwrap();
    let old = first.term;
    let WriteOutcome::Written(one) = write(old, None, "plan 1").await else {
        panic!("the leader writes")
    };
    assert_eq!(write(old, None, "there is one already").await, WriteOutcome::Conflict);
    let WriteOutcome::Written(two) = write(old, Some(one), "plan 2").await else {
        panic!("the leader writes again")
    };
    assert!(two > one);
    assert_eq!(write(old, Some(one), "built on plan 1").await, WriteOutcome::Conflict);
    assert_eq!(write(old + 1, Some(two), "a term to come").await, WriteOutcome::Conflict);
    first.resign().await.unwrap();
    assert_eq!(write(old, Some(two), "nobody leads now").await, WriteOutcome::Conflict);

    let second = near.campaign(LEADER, "me".into(), &stop).await.unwrap();
    assert!(second.term > old);
    assert_eq!(write(old, Some(two), "an old term").await, WriteOutcome::Conflict);
    let entries = near.list(PLAN).await.unwrap().entries;
    assert_eq!((&entries[0].value[..], entries[0].mod_revision), (&b"plan 2"[..], two));
    let third = write(second.term, Some(two), "plan 3").await;
    assert!(matches!(third, WriteOutcome::Written(three) if three > two));
    second.resign().await.unwrap();
}

pub(crate) async fn all_get_what_the_first_created(world: impl World) {
    let (near, far) = (world.near(), world.far());
    let racers = (0..8).map(|i| {
        let who = if i % 2 == 0 { near.clone() } else { far.clone() };
        async move { who.get_or_create("/t/id", Bytes::from(format!("id {i}"))).await.unwrap() }
    });
    let entries = futures::future::join_all(racers).await;
    assert!(entries[0].value.starts_with(b"id "));
    assert!(entries.iter().all(|entry| *entry == entries[0]), "{entries:?}");
    assert_eq!(far.list("/t/id").await.unwrap().entries, entries[..1]);
}

pub(crate) async fn a_restart_of_the_store_loses_nothing(mut world: impl World) {
    let (near, far) = (world.near(), world.far());
    let stop = CancellationToken::new();
    let leadership = near.campaign(LEADER, "me".into(), &stop).await.unwrap();
    let registration = near.register(A, "one".into()).await.unwrap();
    let mut watch = far.watch(WORKERS);
    let before = reset(&mut watch).await;
    world.restart().await;

    // Leases begin anew when etcd does, so the term goes on.
    let write = near.write_if_leader(LEADER, leadership.term, PLAN, None, "plan 1".into()).await;
    assert!(matches!(write.unwrap(), WriteOutcome::Written(_)));
    assert!(!leadership.lost.is_cancelled());
    registration.update("two".into()).await.unwrap();
    let updated = put(&mut watch).await;
    assert_eq!(updated.value, "two");
    assert_eq!(updated.create_revision, before.entries[0].create_revision);
    registration.leave().await.unwrap();
    assert_eq!(deleted(&mut watch).await, A);
    leadership.resign().await.unwrap();
}

pub(crate) async fn a_store_that_was_emptied_is_filled_and_led_again(mut world: impl World) {
    let (near, far) = (world.near(), world.far());
    let stop = CancellationToken::new();
    // Numbers of the new store must not be taken for later ones of this one.
    for i in 0..20 {
        far.get_or_create(&format!("/t/junk/{i}"), "x".into()).await.unwrap();
    }
    let first = far.campaign(LEADER, "far".into(), &stop).await.unwrap();
    let registration = near.register(A, "one".into()).await.unwrap();
    let mut watch = far.watch(WORKERS);
    let before = reset(&mut watch).await;
    let mut standby = Box::pin(near.campaign(LEADER, "near".into(), &stop));
    assert!(timeout(Duration::from_millis(300), &mut standby).await.is_err());

    world.set_back().await;
    let now = timeout(AGAIN, first.lost.cancelled());
    now.await.expect("the leader hears that its term is gone");
    assert_eq!(registered_again(&mut watch, before.revision, "one").await, A);
    let second = timeout(AGAIN, standby).await.expect("somebody leads again").unwrap();
    assert!(second.term < first.term, "{} is of before", first.term);
    let write =
        async |term| near.write_if_leader(LEADER, term, PLAN, None, "plan".into()).await.unwrap();
    assert_eq!(write(first.term).await, WriteOutcome::Conflict);
    assert!(matches!(write(second.term).await, WriteOutcome::Written(_)));

    registration.update("two".into()).await.unwrap();
    while put(&mut watch).await.value != "two" {}
    registration.leave().await.unwrap();
    second.resign().await.unwrap();
}

pub(crate) async fn a_store_that_was_set_back_has_the_newest_values_again(mut world: impl World) {
    let (near, far) = (world.near(), world.far());
    let stop = CancellationToken::new();
    let first = far.campaign(LEADER, "far".into(), &stop).await.unwrap();
    let registration = near.register(A, "one".into()).await.unwrap();
    world.back_up().await;
    registration.update("two".into()).await.unwrap();
    for i in 0..20 {
        far.get_or_create(&format!("/t/junk/{i}"), "x".into()).await.unwrap();
    }
    let mut watch = far.watch(WORKERS);
    let before = reset(&mut watch).await;
    assert_eq!(before.entries[0].value, "two");

    // The leases of both are alive in it, and so is the leader's key of that term.
    world.set_back().await;
    let now = timeout(AGAIN, first.lost.cancelled());
    now.await.expect("the leader hears that the store went back");
    assert_eq!(registered_again(&mut watch, before.revision, "two").await, A);
    let second = timeout(AGAIN, far.campaign(LEADER, "far".into(), &stop)).await;
    let second = second.expect("it leads again").unwrap();
    let write = near.write_if_leader(LEADER, second.term, PLAN, None, "plan".into()).await;
    assert!(matches!(write.unwrap(), WriteOutcome::Written(_)));
    registration.leave().await.unwrap();
    second.resign().await.unwrap();
}

/// Follows a watch over a setback until a key has `value`; which key.
async fn registered_again(watch: &mut Watch, before: Revision, value: &str) -> String {
    let followed = async {
        let mut went_back = false;
        loop {
            let found = match watch.next().await {
                Event::Reset(now) => {
                    went_back |= now.revision < before;
                    now.entries
                }
                Event::Put(entry) => vec![entry],
                Event::Delete { .. } => Vec::new(),
            };
            if let Some(found) = found.into_iter().find(|entry| entry.value == value)
                && went_back
            {
                return found.key;
            }
        }
    };
    timeout(AGAIN, followed).await.expect("it is registered again")
}

async fn next(watch: &mut Watch) -> Event {
    timeout(PATIENCE, watch.next()).await.expect("an event comes")
}

async fn reset(watch: &mut Watch) -> Snapshot {
    match next(watch).await {
        Event::Reset(snapshot) => snapshot,
        other => panic!("expected a reset, got {other:?}"),
    }
}

async fn put(watch: &mut Watch) -> Entry {
    match next(watch).await {
        Event::Put(entry) => entry,
        other => panic!("expected a put, got {other:?}"),
    }
}

async fn deleted(watch: &mut Watch) -> String {
    match next(watch).await {
        Event::Delete { key, .. } => key,
        other => panic!("expected a delete, got {other:?}"),
    }
}
