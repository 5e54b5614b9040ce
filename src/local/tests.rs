//! The parts' configurations, and a cluster of a random model.

use super::*;

#[test]
fn the_configurations_are_valid_and_share_the_machine() {
    let options = LocalOptions::new("store").with_workers(3);
    options.coordinator().validate().unwrap();
    let workers: Vec<_> = (0..3).map(|index| options.worker(index)).collect();
    let mut ids = BTreeSet::new();
    for config in &workers {
        config.validate().unwrap();
        assert!(config.memory_bytes <= worker::Config::default().memory_bytes / 3);
        assert!(ids.insert(config.id.clone()));
    }
    assert_eq!(options.threads, threads_each(3));
    assert!(threads_each(10_000) == 1);
}
