//! Readings of the registry that are used in another order than they were made.

use proto::ids::ModelId;
use proto::plan::{KvType, StagePlan};

use super::*;

const OWN: Incarnation = Incarnation([1; 16]);

fn request(cluster: &str, term: u64, epoch: u64) -> Prepare {
    let stage =
        StagePlan { worker: "w".into(), incarnation: OWN, address: "a:1".into(), layers: 0..4 };
    Prepare {
        cluster_id: cluster.into(),
        pipeline: PipelineId(1),
        epoch: Epoch(epoch),
        term: Term(term),
        dst_incarnation: OWN,
        model: ModelId([1; 32]),
        kv_type: KvType::F16,
        stage: 0,
        stages: vec![stage],
        kv_blocks: 1,
        max_step_tokens: 1,
        max_in_flight: 1,
        draws: false,
    }
}

fn sighting(number: u64, revision: u64) -> Sighting {
    Sighting { number, revision }
}

/// Prepared and active at epoch 50 of term 40, as the second reading showed.
fn active() -> Epochs {
    let mut epochs = Epochs::new(OWN);
    let request = request("c", 40, 50);
    assert_eq!(epochs.prepare(&request, sighting(2, 60)), Ok(PrepareAction::Build));
    epochs.install(request, 0).unwrap();
    epochs.activate(PipelineId(1), Epoch(50), Term(40), OWN, sighting(2, 60)).unwrap();
    epochs
}

#[test]
fn an_older_reading_never_turns_back() {
    let mut epochs = active();
    // Confirmed before the newer leader was, and used after it.
    let seen = EpochError::OldTerm { seen: Term(40), found: Term(30) };
    assert_eq!(epochs.prepare(&request("c", 30, 35), sighting(1, 39)).unwrap_err(), seen);
    assert_eq!(epochs.retire(Epoch(35), Term(30), OWN, sighting(1, 39)).unwrap_err(), seen);
    let old = EpochError::OldEpoch { own: Epoch(50), found: Epoch(45) };
    assert_eq!(epochs.prepare(&request("c", 40, 45), sighting(1, 45)).unwrap_err(), old);
    let other = epochs.prepare(&request("d", 40, 55), sighting(1, 55)).unwrap_err();
    assert_eq!(other, EpochError::OtherCluster { own: "c".into(), found: "d".into() });
    assert_eq!((epochs.history(), epochs.term(), epochs.state()), (0, Term(40), State::Active));
}

#[test]
fn a_later_reading_begins_anew_once() {
    for (next, reading) in [
        (request("c", 30, 35), sighting(3, 39)),
        (request("c", 40, 45), sighting(3, 45)),
        (request("d", 40, 55), sighting(3, 60)),
    ] {
        let mut epochs = active();
        assert_eq!(epochs.doubts(OWN, next.term, Some(&next)), Ok(true), "{next:?}");
        assert_eq!(epochs.prepare(&next, reading), Ok(PrepareAction::Build));
        assert_eq!((epochs.history(), epochs.term()), (1, next.term));
        assert!(!epochs.holds(Epoch(50)));
        epochs.install(next.clone(), 1).unwrap();
        assert_eq!(epochs.prepare(&next, reading), Ok(PrepareAction::Nothing));
        assert_eq!(epochs.history(), 1);
        // Its own numbers rise as ever.
        let seen = epochs.term();
        let old = EpochError::OldTerm { seen, found: Term(20) };
        assert_eq!(epochs.retire(Epoch(1), Term(20), OWN, sighting(2, 60)).unwrap_err(), old);
    }
}

#[test]
fn a_stage_that_was_built_meanwhile_is_not_of_the_new_history() {
    let mut epochs = active();
    let late = request("c", 41, 55);
    assert_eq!(epochs.prepare(&late, sighting(3, 60)), Ok(PrepareAction::Build));
    let history = epochs.history();
    epochs.retire(Epoch(50), Term(7), OWN, sighting(4, 8)).unwrap();
    let refused = epochs.install(late, history).unwrap_err();
    assert_eq!(refused, EpochError::OtherHistory { epoch: Epoch(55) });
    assert_eq!((epochs.term(), epochs.state()), (Term(7), State::Standby));
    // What was ended with it is no number of this history.
    assert_eq!(epochs.prepare(&request("c", 7, 8), sighting(4, 8)), Ok(PrepareAction::Build));
}

#[test]
fn ordinary_calls_need_no_reading_of_their_own() {
    let epochs = active();
    for next in [request("c", 40, 50), request("c", 40, 51), request("c", 41, 61)] {
        assert_eq!(epochs.doubts(OWN, next.term, Some(&next)), Ok(false), "{next:?}");
    }
    assert_eq!(epochs.doubts(OWN, Term(40), None), Ok(false));
    assert_eq!(epochs.doubts(OWN, Term(39), None), Ok(true));
    assert!(epochs.doubts(Incarnation([2; 16]), Term(40), None).is_err());
}
