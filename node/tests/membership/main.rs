//! One suite of tests for every implementation of membership, and what only etcd can show.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

mod etcd_only;
mod proxy;
mod server;
mod suite;
mod world;

/// Runs every test of the suite on both implementations: in memory on paused time, and on a real
/// etcd behind a proxy that can be cut.
macro_rules! on_both {
    ($($test:ident),* $(,)?) => {
        mod memory {
            $(
                #[tokio::test(start_paused = true)]
                async fn $test() {
                    crate::suite::$test(crate::world::InMemory::new()).await;
                }
            )*
        }

        mod etcd {
            $(
                #[tokio::test]
                async fn $test() {
                    crate::suite::$test(crate::world::InEtcd::start().await).await;
                }
            )*
        }
    };
}

on_both! {
    a_registration_is_seen_updated_and_left,
    a_dropped_registration_is_given_up,
    a_process_that_is_cut_off_loses_its_key_and_gets_it_back,
    a_lease_that_ended_behind_its_owner_is_made_anew,
    an_update_that_could_not_be_sent_is_sent_later,
    a_key_that_another_process_holds_is_refused,
    a_key_that_no_lease_ends_is_not_waited_for,
    a_key_that_is_written_over_without_a_lease_is_not_waited_for,
    a_key_that_is_left_can_be_taken_by_the_one_who_waits,
    events_have_the_revisions_of_the_store_in_order,
    a_watch_goes_on_after_a_cut_without_loss,
    a_watch_is_reset_after_compaction,
    a_slow_reader_ends_with_the_same_picture,
    a_lost_answer_is_unknown_and_can_be_read_back,
    a_write_that_never_arrived_is_unknown_and_can_be_tried_again,
    leadership_passes_when_it_is_resigned,
    leadership_passes_when_the_leader_dies,
    a_leader_whose_lease_was_ended_learns_of_it,
    what_a_dead_process_left_can_be_taken_over_before_its_lease_ends,
    a_candidate_can_be_stopped,
    only_the_leader_writes_and_only_what_it_knows,
    all_get_what_the_first_created,
    a_restart_of_the_store_loses_nothing,
    a_store_that_was_emptied_is_filled_and_led_again,
    a_store_that_was_set_back_has_the_newest_values_again,
}
