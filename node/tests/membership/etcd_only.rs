//! What only a real etcd behind a real network can show.

use std::time::{Duration, Instant};

use node::Chain;
use node::membership::{Etcd, EtcdOptions, Event, Membership, MembershipError, WriteOutcome};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::proxy::{Mode, Proxy};
use crate::server::Server;
use crate::world::{InEtcd, World, at};

/// A port that nobody listens on.
fn nobody() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

#[tokio::test]
async fn a_missing_etcd_is_named_within_seconds() {
    let endpoints = [nobody(), nobody()];
    let before = Instant::now();
    let error = Etcd::connect(&at(&endpoints), EtcdOptions::default()).await.err().unwrap();
    assert!(before.elapsed() < Duration::from_secs(10));
    let words = Chain(&error).to_string();
    let [first, second] = endpoints;
    let wanted = format!("failed to reach etcd at http://{first}, http://{second}: ");
    assert!(words.starts_with(&wanted), "{words}");
    assert!(words.contains("refused"), "{words}");
    assert!(!words.contains('\n'));
}

#[tokio::test]
async fn an_endpoint_that_is_not_etcd_is_no_etcd() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoints = [listener.local_addr().unwrap().to_string()];
    // Accepts and says nothing.
    let error = Etcd::connect(&at(&endpoints), EtcdOptions::default()).await.err().unwrap();
    assert!(matches!(error, MembershipError::Connect { .. }), "{error:?}");
    drop(listener);
}

#[tokio::test]
async fn one_of_several_endpoints_is_enough() {
    let server = Server::start().await;
    let endpoints = [nobody(), format!("http://{}", server.address()), nobody()];
    let etcd = Etcd::connect(&at(&endpoints), EtcdOptions::default()).await.unwrap();
    for i in 0..20 {
        etcd.get_or_create(&format!("/t/{i}"), "x".into()).await.unwrap();
    }
    assert_eq!(etcd.list("/t/").await.unwrap().entries.len(), 20);
}

#[tokio::test]
async fn a_lost_answer_is_read_back_when_there_is_time() {
    let world = InEtcd::start().await;
    let (near, far) = (world.near(), world.far());
    let stop = CancellationToken::new();
    let leadership = far.campaign("/t/leader", "me".into(), &stop).await.unwrap();
    let mut watch = far.watch("/t/plan");
    watch.next().await;

    world.lose_answers().await;
    let heal = async {
        let event = watch.next().await;
        assert!(matches!(event, Event::Put(_)), "the write took effect");
        world.heal().await;
    };
    let write = near.write_if_leader("/t/leader", leadership.term, "/t/plan", None, "1".into());
    let (outcome, ()) = tokio::join!(write, heal);
    let found = far.list("/t/plan").await.unwrap().entries;
    assert_eq!(found.len(), 1);
    assert_eq!(outcome.unwrap(), WriteOutcome::Written(found[0].mod_revision));
    leadership.resign().await.unwrap();
}

#[tokio::test]
async fn a_connection_that_swallows_everything_is_replaced() {
    let server = Server::start().await;
    let proxy = Proxy::start(server.address()).await;
    let endpoints = [proxy.address().to_string()];
    let near = Etcd::connect(&at(&endpoints), EtcdOptions::default()).await.unwrap();
    let registration = near.register("/t/a", "one".into()).await.unwrap();
    let mut watch = near.watch("/t/");
    let first = watch.next().await;

    // No packet comes back and nothing is closed, as when a switch loses its tables.
    proxy.set(Mode::Stall);
    let listed = near.list("/t/").await.unwrap();
    assert!(matches!(first, Event::Reset(before) if before.entries == listed.entries));
    registration.update("two".into()).await.unwrap();
    let Ok(Event::Put(updated)) = timeout(Duration::from_secs(30), watch.next()).await else {
        panic!("the watch goes on over a new connection")
    };
    assert_eq!(updated.value, "two");
    assert_eq!(updated.create_revision, listed.entries[0].create_revision, "the lease was kept");
    registration.leave().await.unwrap();
}

#[tokio::test]
async fn a_key_deleted_by_hand_comes_back() {
    let world = InEtcd::start().await;
    let registration = world.near().register("/t/a", "one".into()).await.unwrap();
    let mut watch = world.far().watch("/t/");
    watch.next().await;
    world.server.client().await.delete("/t/a", None).await.unwrap();
    assert!(matches!(watch.next().await, Event::Delete { .. }));
    let again = timeout(Duration::from_secs(30), watch.next()).await.unwrap();
    assert!(matches!(again, Event::Put(entry) if entry.value == "one"));
    registration.leave().await.unwrap();
}

#[tokio::test]
async fn only_the_right_password_opens() {
    let server = Server::start().await;
    let mut admin = server.client().await;
    admin.user_add("root", "secret", None).await.unwrap();
    admin.role_add("root").await.unwrap();
    admin.user_grant_role("root", "root").await.unwrap();
    admin.auth_enable().await.unwrap();

    let endpoints = [server.address().to_string()];
    let with = async |password: Option<&str>| {
        let credentials = password.map(|password| ("root".to_owned(), password.to_owned()));
        Etcd::connect(&at(&endpoints), EtcdOptions { credentials }).await
    };
    let wrong = with(Some("guess")).await.err().unwrap();
    assert!(matches!(wrong, MembershipError::Refused { .. }), "{wrong:?}");
    assert!(!Chain(&wrong).to_string().contains("guess"));
    let without = with(None).await.err().unwrap();
    assert!(matches!(without, MembershipError::Refused { .. }), "{without:?}");

    let etcd = with(Some("secret")).await.unwrap();
    let registration = etcd.register("/t/a", "one".into()).await.unwrap();
    assert_eq!(etcd.list("/t/").await.unwrap().entries.len(), 1);
    registration.leave().await.unwrap();
}

#[tokio::test]
async fn closing_waits_for_what_was_dropped() {
    let server = Server::start().await;
    let endpoints = [server.address().to_string()];
    let etcd = Etcd::connect(&at(&endpoints), EtcdOptions::default()).await.unwrap();
    drop(etcd.register("/t/a", "one".into()).await.unwrap());
    etcd.close().await;
    let left = server.client().await.get("/t/a", None).await.unwrap();
    assert_eq!(left.kvs().len(), 0);
}
