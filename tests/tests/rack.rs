//! A small rack of workers that wait and hash in place of arithmetic: see `tests/src/rack.rs`. Those of
//! 64 workers are in `racks.rs`.

use std::time::Duration;

use tests::model::bundled_store;
use tests::rack::Rack;

#[test]
fn workers_come_go_and_die_and_no_sequence_gets_a_wrong_state() {
    let rack = Rack {
        name: "small rack",
        // Its head is its embedding, so first stages draw, too.
        store: bundled_store(),
        workers: 6,
        stages: 2,
        profile: "layer_us=300,head_us=200",
        streams: 9,
        tokens: 100,
        prompt: 80,
        quiet: Duration::from_secs(1),
        turmoil: Duration::from_secs(6),
        pause: Duration::from_secs(1),
    };
    let done = rack.run();
    assert!(done.quiet.steps_per_s > 0.0 && done.turmoil.steps_per_s > 0.0, "{done:?}");
}
