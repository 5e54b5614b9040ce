//! What is believed of measured times, who is measured, and real connects.

use std::net::TcpListener;

use bytes::Bytes;
use serde_json::json;

use super::*;

const PREFIX: &str = "/workers/";

fn peer(id: &str, start: u8) -> Peer {
    let incarnation = Incarnation([start; 16]);
    Peer { id: id.to_owned(), incarnation, address: format!("{id}:1") }
}

/// Publishes what follows from times of `a`, in turn.
fn publish(figures: &mut Figures, told: &mut BTreeMap<String, u32>, times: &[u32]) -> Vec<u32> {
    let mut published = Vec::new();
    for us in times {
        *told = figures.take(vec![(peer("a", 1), Some(*us))], told);
        published.push(told["a"]);
    }
    published
}

#[test]
fn noise_publishes_nothing_and_a_network_that_changed_is_seen() {
    let (mut figures, mut told) = (Figures::default(), BTreeMap::new());
    let busy = [200, 4000, 900, 250, 151, 160];
    assert_eq!(publish(&mut figures, &mut told, &busy), [200; 6], "busy, or within a quarter");
    assert_eq!(publish(&mut figures, &mut told, &[140]), [140], "it is nearer than was known");
    let slower = publish(&mut figures, &mut told, &[800; 6]);
    assert_eq!(slower, [140, 140, 140, 140, 140, 800], "after an hour");
    let small = publish(&mut figures, &mut told, &[40, 25, 20, 19]);
    assert_eq!(small, [40, 40, 40, 19], "20 us are no departure");
}

#[test]
fn who_is_not_reached_is_remembered_and_who_is_gone_or_was_started_again_is_not() {
    let mut figures = Figures::default();
    let all = [("a", 100), ("b", 900)].map(|(id, us)| (peer(id, 1), Some(us)));
    let first = figures.take(all.to_vec(), &BTreeMap::new());
    assert_eq!(first, BTreeMap::from([("a".to_owned(), 100), ("b".to_owned(), 900)]));
    let unreached = vec![(peer("a", 1), None), (peer("b", 1), None), (peer("c", 1), None)];
    assert_eq!(figures.take(unreached, &first), first);
    let restarted = figures.take(vec![(peer("a", 1), None), (peer("b", 2), Some(5000))], &first);
    assert_eq!(restarted["b"], 5000, "it may be elsewhere");
    let left = figures.take(vec![(peer("a", 1), None)], &restarted);
    assert_eq!(left.into_iter().collect::<Vec<_>>(), [("a".to_owned(), 100)]);
    assert_eq!(figures.0.len(), 1, "nothing is kept of who is gone");
}

fn entry(key: &str, value: &serde_json::Value) -> Entry {
    let value = Bytes::from(value.to_string());
    Entry { key: format!("{PREFIX}{key}"), value, create_revision: 1, mod_revision: 1 }
}

fn worker(id: &str, machine: &str) -> Entry {
    let incarnation = Incarnation([7; 16]);
    let address = format!("{id}:1");
    entry(
        id,
        &json!({
            "id": id, "incarnation": incarnation, "address": address, "machine": machine,
        }),
    )
}

fn measured(entries: &[Entry], own: &str, machine: &str) -> Vec<String> {
    let own = WorkerRecord { id: own.into(), machine: machine.into(), ..WorkerRecord::default() };
    peers(entries, PREFIX, &own).into_iter().map(|peer| peer.id).collect()
}

#[test]
fn workers_of_other_machines_are_measured_and_what_is_none_is_not() {
    let entries = [
        worker("c", "m2"),
        worker("a", "m1"),
        worker("b", "m1"),
        worker("d", ""),
        entry("e", &json!("garbage")),
        entry(
            "f",
            &json!({ "id": "other", "incarnation": Incarnation([7; 16]), "address": "f:1" }),
        ),
        entry(
            "g",
            &json!({ "id": "g", "incarnation": Incarnation([7; 16]), "address": "nowhere" }),
        ),
    ];
    assert_eq!(measured(&entries, "a", "m1"), ["c", "d"]);
    assert_eq!(measured(&entries, "d", ""), ["a", "b", "c"], "nobody knows that it shares one");
}

#[test]
fn in_a_large_fleet_each_measures_those_that_follow_it() {
    let entries: Vec<_> = (0..400).map(|i| worker(&format!("w{i:03}"), "")).collect();
    let found = measured(&entries, "w300", "here");
    assert_eq!(found.len(), ROUND_TRIPS);
    assert_eq!((found[0].as_str(), found[99].as_str()), ("w301", "w000"));
    assert_eq!(found[ROUND_TRIPS - 1], "w156");
}

#[test]
fn a_connect_is_timed_and_nobody_is_no_figure() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let us = round_trip(&address).expect("it listens");
    assert!((1..=ROUND_TRIP_US).contains(&us), "{us}");
    assert_eq!(listener.incoming().take(CONNECTS).filter(Result::is_ok).count(), CONNECTS);
    drop(listener);
    assert_eq!(round_trip(&address), None, "nobody listens");
    assert_eq!(round_trip("no port"), None);
    let past = Instant::now();
    assert_eq!(connect_us("127.0.0.1:9".parse().unwrap(), past), None, "the time is over");
}

#[test]
fn those_that_start_together_do_not_measure_together() {
    let waits: Vec<_> = (0..16).map(|i| jitter(&format!("rack1-{i}"))).collect();
    assert!(waits.iter().all(|wait| *wait < JITTER), "{waits:?}");
    let distinct: std::collections::BTreeSet<_> = waits.iter().collect();
    assert!(distinct.len() > 8, "{waits:?}");
    assert_eq!(jitter("rack1-0"), waits[0]);
}
