//! Who stands together by what was measured.

use proptest::prelude::*;

use super::*;

/// A worker of a machine of its own.
fn worker(id: &str) -> WorkerRecord {
    WorkerRecord { id: id.to_owned(), machine: format!("m-{id}"), ..WorkerRecord::default() }
}

/// Workers of which every one measured all that come before it, as at a start.
fn fleet(ids: &[&str], us: impl Fn(&str, &str) -> Option<u32>) -> Vec<WorkerRecord> {
    let mut fleet: Vec<WorkerRecord> = Vec::new();
    for id in ids {
        let mut worker = worker(id);
        for other in &fleet {
            let figure = us(&other.id, id).map(|us| (other.id.clone(), us));
            worker.round_trips_us.extend(figure);
        }
        fleet.push(worker);
    }
    fleet
}

/// By the first letter of their ids.
fn same_room(a: &str, b: &str) -> bool {
    a[..1] == b[..1]
}

const ROOMS: [&str; 6] = ["a1", "b1", "a2", "b2", "a3", "b3"];

/// Two rooms that are a millisecond apart.
fn two_rooms() -> Vec<WorkerRecord> {
    fleet(&ROOMS, |a, b| Some(if same_room(a, b) { 150 } else { 1150 }))
}

fn infer(racks: &mut Racks, fleet: &[WorkerRecord]) -> Vec<String> {
    racks.infer(fleet.iter());
    fleet.iter().map(|record| racks.of(record)).collect()
}

fn first(fleet: &[WorkerRecord]) -> Vec<String> {
    infer(&mut Racks::default(), fleet)
}

const SPLIT: [&str; 6] = ["~a1", "~b1", "~a1", "~b1", "~a1", "~b1"];
const TOGETHER: [&str; 6] = [""; 6];

/// With one figure of both ways another.
fn with(mut fleet: Vec<WorkerRecord>, a: &str, b: &str, us: Option<u32>) -> Vec<WorkerRecord> {
    for (from, to) in [(a, b), (b, a)] {
        let from = fleet.iter_mut().find(|record| record.id == from).unwrap();
        from.round_trips_us.remove(to);
        from.round_trips_us.extend(us.map(|us| (to.to_owned(), us)));
    }
    fleet
}

#[test]
fn two_rooms_with_far_pairs_are_two_racks() {
    assert_eq!(first(&two_rooms()), SPLIT);
    let near = fleet(&ROOMS, |a, b| Some(if same_room(a, b) { 150 } else { 550 }));
    assert_eq!(
        first(&near),
        TOGETHER,
        "a hop between them would not cost what one between racks does"
    );
    let far = fleet(&ROOMS, |a, b| Some(if same_room(a, b) { 150 } else { 551 }));
    assert_eq!(first(&far), SPLIT);
    assert_eq!(MARGIN_US, 400, "by the planner's costs of a hop");
}

#[test]
fn who_was_not_measured_stands_with_the_others() {
    assert_eq!(first(&fleet(&ROOMS, |_, _| None)), TOGETHER, "as without any figures");
    assert_eq!(first(&[]), [""; 0]);
    let half = fleet(&ROOMS, |a, b| same_room(a, b).then_some(150));
    assert_eq!(first(&half), TOGETHER, "nobody knows that they are far from each other");
    let missing = with(two_rooms(), "a1", "b1", None);
    assert_eq!(first(&missing), SPLIT, "one that is missing joins nobody who is apart");
    let missing = with(two_rooms(), "a1", "a2", None);
    assert_eq!(first(&missing), SPLIT, "and parts nobody");
    let mut newcomer = two_rooms();
    newcomer.push(worker("c"));
    assert_eq!(first(&newcomer)[..6], SPLIT, "nor does somebody who has measured nobody yet");
    assert_eq!(first(&newcomer)[6], "~a1");
}

#[test]
fn the_lesser_figure_of_both_ways_counts_and_one_near_one_is_enough() {
    let mut one_way = two_rooms();
    // It was busy while it measured; the other was not.
    one_way[0].round_trips_us.extend([("a2".to_owned(), 90_000), ("a3".to_owned(), 90_000)]);
    assert_eq!(first(&one_way), SPLIT);
    let chained = with(two_rooms(), "a1", "a3", Some(5000));
    assert_eq!(first(&chained), SPLIT, "both are near to a2");
    let bridged = with(two_rooms(), "a3", "b1", Some(150));
    assert_eq!(first(&bridged), TOGETHER);
}

#[test]
fn labels_stay_and_nobody_is_put_into_a_rack_with_one() {
    let mut fleet = two_rooms();
    fleet[0].rack = "r1".to_owned();
    let found = first(&fleet);
    assert_eq!(found, ["r1", "~b1", "~a2", "~b1", "~a2", "~b1"]);
    // Whatever somebody wrote into the registry.
    fleet[0].rack = "~b1".to_owned();
    assert_eq!(first(&fleet), SPLIT, "that is no label");
    for record in &mut fleet {
        record.rack = format!("r{}", &record.id[..1]);
    }
    assert_eq!(first(&fleet), ["ra", "rb", "ra", "rb", "ra", "rb"]);
    let mut alone = two_rooms();
    for record in alone.iter_mut().filter(|record| record.id.starts_with('b')) {
        record.rack = "rb".to_owned();
    }
    assert_eq!(first(&alone), ["", "rb", "", "rb", "", "rb"], "one rack needs no name");
    let mut far = with(two_rooms(), "a1", "a2", Some(900));
    far[0].round_trips_us.remove("a3");
    far[4].round_trips_us.remove("a1");
    far[2].rack = "r".to_owned();
    assert_eq!(first(&far)[0], "~a1", "who is near to a labelled one does not join it");
}

#[test]
fn workers_of_one_machine_stand_together_and_are_no_measure_of_a_network() {
    let mut fleet = two_rooms();
    for worker in [0, 1] {
        fleet[worker].machine = "one".to_owned();
    }
    assert_eq!(first(&fleet), TOGETHER, "both rooms have one of its workers");
    let near = with(self::fleet(&["a1", "a2", "b1"], |_, _| Some(600)), "a1", "a2", Some(20));
    assert_eq!(first(&near), ["~a1", "~a1", "~b1"]);
    let mut beside = near;
    for worker in [0, 1] {
        beside[worker].machine = "one".to_owned();
    }
    assert_eq!(first(&beside), [""; 3], "a network card takes more than none");
}

#[test]
fn what_is_measured_near_the_limit_changes_nothing_again_and_again() {
    let at = |us: u32| fleet(&ROOMS, |a, b| Some(if same_room(a, b) { 150 } else { us }));
    let mut racks = Racks::default();
    assert_eq!(infer(&mut racks, &at(540)), TOGETHER);
    for us in [560, 540, 700, 750, 540, 600] {
        assert_eq!(infer(&mut racks, &at(us)), TOGETHER, "{us}");
    }
    assert!(!racks.infer(at(600).iter()).0 && racks.infer(at(751).iter()).0, "and it says so");
    for us in [740, 560, 900, 551, 700] {
        assert_eq!(infer(&mut racks, &at(us)), SPLIT, "{us}");
    }
    assert!(!racks.infer(at(600).iter()).0 && racks.infer(at(550).iter()).0);
    assert_eq!(infer(&mut racks, &at(550)), TOGETHER);
}

#[test]
fn a_rack_of_workers_costs_a_look_at_each_of_their_figures() {
    let ids: Vec<String> = (0..64).map(|i| format!("{}{i:02}", ["a", "b"][i % 2])).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let mut all = fleet(&ids, |a, b| Some(if same_room(a, b) { 150 } else { 1150 }));
    for one in 0..all.len() {
        for other in one + 1..all.len() {
            let (id, us) = (all[other].id.clone(), all[other].round_trips_us[&all[one].id]);
            all[one].round_trips_us.insert(id, us);
        }
    }
    let mut racks = Racks::default();
    let (_, work) = racks.infer(all.iter());
    assert_eq!(work, 64 * 63 + 1, "each figure once, and one pair of racks");
    assert_eq!((racks.of(&all[2]), racks.of(&all[3])), ("~a00".to_owned(), "~b01".to_owned()));
    let apart = fleet(&ids, |_, b| Some(if b == ids[1] { 100 } else { 9000 }));
    let (_, work) = racks.infer(apart.iter());
    assert!(work <= 2 * 64 * 63 / 2 + 64, "and each pair of racks once: {work}");
}

fn any_fleet() -> impl Strategy<Value = Vec<WorkerRecord>> {
    let figures = prop::collection::vec(prop::option::of(50..2000_u32), 8 * 8);
    let places = prop::collection::vec((0..3_usize, 0..10_usize), 8);
    (2..=8_usize, figures, places).prop_map(|(count, figures, places)| {
        let record = |i: usize| {
            let others = (0..count).filter(|other| *other != i);
            let known = others.filter_map(|to| Some((format!("w{to}"), figures[8 * i + to]?)));
            WorkerRecord {
                id: format!("w{i}"),
                machine: ["", "m1", "m2"][places[i].0].to_owned(),
                rack: ["r1", "~w1"].get(places[i].1).copied().unwrap_or_default().to_owned(),
                round_trips_us: known.collect(),
                ..WorkerRecord::default()
            }
        };
        (0..count).map(record).collect()
    })
}

proptest! {
    #[test]
    fn whatever_the_order_of_workers_the_racks_are_the_same(
        (fleet, shuffled) in any_fleet().prop_flat_map(|fleet| {
            let shuffled = Just(fleet.clone()).prop_shuffle();
            (Just(fleet), shuffled)
        }),
    ) {
        let (mut racks, mut others) = (Racks::default(), Racks::default());
        racks.infer(fleet.iter());
        others.infer(shuffled.iter());
        prop_assert_eq!(&racks, &others);
        let (changed, _) = others.infer(fleet.iter());
        prop_assert_eq!(&racks, &others, "nothing new, nothing changes");
        prop_assert!(!changed);
        for record in &fleet {
            let rack = racks.of(record);
            match label(record) {
                Some(label) => prop_assert_eq!(rack, label),
                None => prop_assert!(rack.is_empty() || rack.starts_with(MARK)),
            }
        }
    }
}
