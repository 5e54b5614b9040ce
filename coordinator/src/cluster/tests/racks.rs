//! Workers whose rack nobody says are planned by the round trips that they measured.

use super::*;
use crate::planner;

/// Of six workers those with even numbers stand in one room and the others in another, so far away.
fn measured(i: usize, far_us: u32) -> WorkerRecord {
    let figures = (0..6).filter(|other| *other != i).map(|other| {
        let us = if other % 2 == i % 2 { 150 } else { far_us };
        (format!("w{other}"), us)
    });
    WorkerRecord { round_trips_us: figures.collect(), ..record(i, 1) }
}

fn tell_all(script: &mut Script, far_us: u32) {
    for i in 0..6 {
        script.tell(Event::WorkerPut(measured(i, far_us)));
    }
}

#[test]
fn stages_of_a_pipeline_stand_where_round_trips_are_short() {
    let script = |records: Vec<WorkerRecord>| {
        let records = records.into_iter().map(|mut record| {
            // Two of them hold the model, and a hop is no small part of a step.
            record.memory_bytes = 900;
            record.models[0].steps.iter_mut().for_each(|step| step.layer_ns *= 1000);
            record
        });
        Script::with(options(None), records.collect(), Found::Nothing)
    };
    let rooms = |script: &Script| {
        let deployment = planner::deploy(&script.cluster.question()).unwrap();
        let pipelines = deployment.pipelines.iter();
        let rooms: Vec<BTreeSet<bool>> = pipelines
            .map(|pipeline| {
                let stages = pipeline.stages.iter();
                stages.map(|stage| matches!(&*stage.worker, "w0" | "w2" | "w4")).collect()
            })
            .collect();
        assert!(!rooms.is_empty() && deployment.pipelines[0].stages.len() > 1, "{deployment:?}");
        rooms
    };
    let unknown = script((0..4).map(|i| record(i, 1)).collect());
    assert!(rooms(&unknown).iter().any(|rooms| rooms.len() > 1), "nobody knows the rooms");
    let known = script((0..4).map(|i| measured(i, 1150)).collect());
    assert!(rooms(&known).iter().all(|rooms| rooms.len() == 1));
}

#[test]
fn a_rack_that_is_found_is_planned_for_once_and_shown() {
    let mut script = Script::new(Some(2), workers(6));
    script.pass(20_000);
    let mut last = script.cluster.ledger.ticket().0;
    let mut asked = |script: &mut Script| {
        let now = script.cluster.ledger.ticket().0;
        now - std::mem::replace(&mut last, now) - 1
    };
    let racks = |script: &Script| -> Vec<String> {
        script.cluster.view().workers.into_iter().map(|worker| worker.rack).collect()
    };
    assert_eq!(racks(&script), [""; 6]);
    tell_all(&mut script, 200);
    script.pass(60_000);
    assert_eq!((asked(&mut script), racks(&script)), (0, vec![String::new(); 6]), "one room");
    tell_all(&mut script, 1150);
    script.pass(9500);
    assert_eq!(asked(&mut script), 0, "the hold-down");
    script.pass(60_000);
    assert_eq!(asked(&mut script), 1);
    assert_eq!(racks(&script), ["~w0", "~w1", "~w0", "~w1", "~w0", "~w1"]);
    for far_us in [900, 1400, 600, 1150] {
        tell_all(&mut script, far_us);
        script.pass(60_000);
        assert_eq!(asked(&mut script), 0, "{far_us}");
    }
}

#[test]
fn a_rack_that_is_called_by_another_name_is_the_same() {
    let apart = |i| measured(i, 1150);
    let mut fleet: Vec<_> = (0..6).map(apart).collect();
    // Nothing is ever planned with it, and a rack has its name.
    fleet[0].models.clear();
    let mut script = Script::new(Some(1), fleet);
    script.pass(60_000);
    let before = script.cluster.ledger.ticket().0;
    assert_eq!(script.cluster.view().workers[2].rack, "~w0");
    script.tell(Event::WorkerGone { worker: "w0".to_owned() });
    script.pass(60_000);
    assert_eq!(script.cluster.view().workers[1].rack, "~w2");
    assert_eq!(script.cluster.ledger.ticket().0, before + 1, "nobody asked the planner");
}
