//! Who makes room and when connections are cut, on paused time.

use super::*;

/// Paused time moves on by this between two events.
const MOMENT: Duration = Duration::from_millis(1);

fn enter(table: &Arc<Table>) -> Place {
    match table.admit(Instant::now()) {
        Admission::Entered(place) => place,
        other => panic!("{other:?}"),
    }
}

impl Activity {
    fn cut(&self) -> Option<Cut> {
        self.state().cut.map(|(why, _)| why)
    }

    fn tail_until(&self) -> Option<Instant> {
        self.state().tail_until()
    }
}

async fn a_moment() {
    tokio::time::advance(MOMENT).await;
}

#[tokio::test(start_paused = true)]
async fn silent_ones_make_room_first_then_idle_then_unarrived_and_busy_ones_never() {
    let table = Table::new("test", 4, MOMENT);
    let idle = enter(&table);
    drop(Call::begin(&idle.activity));
    // It may still be sending the end of its answer.
    assert_eq!(idle.activity.tail_until(), Some(Instant::now() + TAIL));
    tokio::time::sleep(TAIL).await;
    let half = enter(&table);
    let half_call = Call::begin(&half.activity);
    a_moment().await;
    let busy = enter(&table);
    let busy_call = Call::begin(&busy.activity);
    busy_call.arrived();
    a_moment().await;
    let silent = enter(&table);
    for victim in [silent, idle, half] {
        a_moment().await;
        assert_eq!(victim.activity.cut(), None);
        assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
        assert_eq!(victim.activity.cut(), Some(Cut::Room));
        // Room is being made already: nobody else is cut for the same newcomer.
        assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
        drop(victim);
        let newcomer = enter(&table);
        Call::begin(&newcomer.activity).arrived();
        let call = Call::begin(&newcomer.activity);
        call.arrived();
        std::mem::forget((newcomer, call));
    }
    drop(half_call);
    assert!(matches!(table.admit(Instant::now()), Admission::Full));
    assert_eq!(busy.activity.cut(), None);
    drop(busy_call);
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)), "idle again");
}

#[tokio::test(start_paused = true)]
async fn of_silent_ones_the_oldest_goes() {
    let table = Table::new("test", 2, MOMENT);
    let first = enter(&table);
    a_moment().await;
    let second = enter(&table);
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
    assert_eq!((first.activity.cut(), second.activity.cut()), (Some(Cut::Room), None));
}

#[tokio::test(start_paused = true)]
async fn those_that_were_told_to_end_are_counted_once() {
    let table = Table::new("test", 4, MOMENT);
    let mut places: Vec<Place> = (0..4).map(|_| enter(&table)).collect();
    a_moment().await;
    let told = |table: &Table| {
        let inner = table.inner();
        assert_eq!(inner.open.len() - inner.staying(), inner.told);
        inner.open.values().filter(|activity| activity.cut().is_some()).count()
    };
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
    // Asking again tells no second one.
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
    assert_eq!((told(&table), table.inner().told), (1, 1));
    // The request of that one comes just then: it stays, and so nobody goes.
    let call = Call::begin(&places[0].activity);
    call.arrived();
    assert_eq!(places[0].must_end(), None);
    assert_eq!((told(&table), table.inner().told), (0, 0));
    // The next in turn goes, and counts no more when it has gone.
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
    assert_eq!(places[1].must_end(), Some(Cut::Room));
    assert_eq!((told(&table), table.inner().told), (1, 1));
    drop(places.remove(1));
    assert_eq!((told(&table), table.inner().told), (0, 0));
    places.push(enter(&table));
    assert_eq!(table.open(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_newcomer_has_time_to_send_its_request() {
    let table = Table::new("test", 1, MOMENT);
    let first = enter(&table);
    let start = Instant::now();
    let Admission::Wait(until) = table.admit(start) else { panic!("it waits") };
    assert_eq!((first.activity.cut(), until), (None, start + MOMENT));
    a_moment().await;
    assert!(matches!(table.admit(until), Admission::Wait(_)));
    assert_eq!(first.activity.cut(), Some(Cut::Room));
    // Its request was there before it heard of that.
    let call = Call::begin(&first.activity);
    call.arrived();
    assert_eq!(first.must_end(), None);
    assert!(matches!(table.admit(until), Admission::Full));
    assert_eq!(table.inner().staying(), 1);
    drop(first);
    assert_eq!(table.inner().staying(), 0);
}

#[tokio::test(start_paused = true)]
async fn descriptors_go_back_and_are_not_taken_again_at_once() {
    let table = Table::new("test", 100, MOMENT);
    let places: Vec<Place> = (0..10).map(|_| enter(&table)).collect();
    table.give_back(4);
    let cut = places.iter().filter(|place| place.activity.cut().is_some());
    assert_eq!(cut.clone().count(), 4);
    assert!(cut.clone().all(|place| place.activity.cut() == Some(Cut::Descriptors)));
    drop(places);
    let again: Vec<Place> = (0..6).map(|_| enter(&table)).collect();
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
    table.set_limit(100);
    enter(&table);
    drop(again);
    assert_eq!(table.open(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_small_answers_one_by_one_is_cut_unless_it_is_quick() {
    let timeouts = Timeouts { grace: MOMENT, ..Timeouts::USUAL };
    // How long it keeps each answer waiting; of how many it hears.
    let heard = async |wait: Duration| {
        let table = Table::new("test", 1, MOMENT);
        let place = enter(&table);
        for answer in 0..2000 {
            // As hyper asks for it: head, nothing yet, all of it.
            let call = Call::begin(&place.activity);
            call.arrived();
            call.handed_over(0);
            tokio::time::advance(wait).await;
            let due = place.activity.deadline(&timeouts);
            if due.is_some_and(|(at, _)| at <= Instant::now()) {
                assert_eq!(due.map(|(_, why)| why), Some(Cut::Unread));
                return answer;
            }
            call.taken();
            assert_eq!(place.activity.deadline(&timeouts), None, "it is being computed");
            // Which may take long.
            tokio::time::advance(Duration::from_secs(100)).await;
            call.end_with(200);
        }
        2000
    };
    let seconds = Duration::from_secs;
    assert_eq!(heard(seconds(31)).await, 0);
    assert_eq!(heard(seconds(10)).await, 2, "30 s for 400 bytes");
    assert_eq!(heard(seconds(1)).await, 29);
    assert_eq!(heard(Duration::from_millis(50)).await, 2000, "4 kB/s");
}

#[tokio::test(start_paused = true)]
async fn a_connection_ends_whose_client_keeps_an_unwanted_call_from_hearing_of_it() {
    let table = Table::new("test", 1, MOMENT);
    let place = enter(&table);
    let due = || place.activity.deadline(&Timeouts::USUAL);
    let in_a_moment = || Some((Instant::now() + STALL, Cut::Unread));
    let before = Call::begin(&place.activity);
    before.handed_over(0);
    a_moment().await;
    let usual = due().expect("it is waited for").0;
    assert!(usual > Instant::now() + 10 * STALL, "its client has time to open its window");
    before.unwant();
    assert_eq!(due(), in_a_moment());
    // It opens: whoever serves the call hears that it was cut.
    before.taken();
    assert_eq!(due(), None);
    drop(before);
    // Nothing was there yet when it was cut.
    let after = Call::begin(&place.activity);
    after.unwant();
    assert_eq!(due(), None);
    a_moment().await;
    after.handed_over(0);
    assert_eq!(due(), in_a_moment());
    // Another that is answered keeps it not from ending.
    let other = Call::begin(&place.activity);
    other.arrived();
    assert_eq!(due(), in_a_moment());
    drop(after);
    assert_eq!(due(), None);
    drop(other);
    assert_eq!(due().map(|(_, why)| why), Some(Cut::Idle));
    // One that is admitted just after it was cut goes on, and its client may be as slow as others'.
    let admitted = Call::begin(&place.activity);
    admitted.handed_over(0);
    admitted.unwant();
    assert_eq!(due(), in_a_moment());
    admitted.arrived();
    admitted.want();
    assert!(due().expect("it is waited for").0 > Instant::now() + 10 * STALL);
    admitted.taken();
    admitted.handed_over(0);
    assert!(due().expect("it is waited for").0 > Instant::now() + 10 * STALL);
}

#[tokio::test(start_paused = true)]
async fn deadlines_run_from_the_first_byte_and_bytes_do_not_move_them() {
    let timeouts = Timeouts {
        first_request: Duration::from_secs(5),
        head: Duration::from_secs(10),
        idle: Duration::from_secs(75),
        write: Duration::from_secs(30),
        grace: MOMENT,
    };
    let table = Table::new("test", 1, MOMENT);
    let place = enter(&table);
    let start = Instant::now();
    let due = |place: &Place| {
        let (at, why) = place.activity.deadline(&timeouts).unwrap();
        ((at - start).as_secs(), why)
    };
    tokio::time::advance(Duration::from_secs(4)).await;
    place.activity.received(Instant::now(), false);
    assert_eq!(due(&place), (5, Cut::Silent), "half a head changes nothing");
    let call = Call::begin(&place.activity);
    assert_eq!(place.activity.deadline(&timeouts), None);
    drop(call);
    assert_eq!(due(&place), (4 + 75, Cut::Idle));
    tokio::time::advance(Duration::from_secs(6)).await;
    place.activity.received(Instant::now(), false);
    assert_eq!(due(&place), (10 + 10, Cut::Silent), "the next head has begun");
    tokio::time::advance(Duration::from_secs(3)).await;
    place.activity.received(Instant::now(), false);
    assert_eq!(due(&place), (10 + 10, Cut::Silent), "dripping does not help");
    drop(Call::begin(&place.activity));
    place.activity.received(Instant::now(), true);
    assert_eq!(due(&place), (13 + 75, Cut::Idle), "an answer to a ping is no head");
}

/// A connection with one request that has arrived and whose answer waits for the client.
fn unread(table: &Arc<Table>) -> (Place, Arc<Call>) {
    let place = enter(table);
    let call = Call::begin(&place.activity);
    call.arrived();
    call.handed_over(0);
    (place, call)
}

#[tokio::test(start_paused = true)]
async fn a_client_that_reads_nothing_makes_room_after_a_second_and_last() {
    let table = Table::new("test", 4, MOMENT);
    let (stuck, _stuck) = unread(&table);
    tokio::time::advance(STALL / 2).await;
    let busy = enter(&table);
    let computed = Call::begin(&busy.activity);
    computed.arrived();
    let (reads, slowly) = unread(&table);
    let half = enter(&table);
    let half_call = Call::begin(&half.activity);
    tokio::time::advance(STALL / 4).await;
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
    assert_eq!(half.activity.cut(), Some(Cut::Room), "those whose requests are not here go first");
    drop((half, half_call));
    let newcomer = enter(&table);
    let answered = Call::begin(&newcomer.activity);
    answered.arrived();
    assert!(matches!(table.admit(Instant::now()), Admission::Full), "nobody has stalled for long");
    tokio::time::advance(STALL / 4).await;
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
    assert_eq!(stuck.must_end(), Some(Cut::Room));
    assert_eq!((busy.activity.cut(), reads.activity.cut()), (None, None));
    drop(stuck);
    // One that reads again meanwhile stays.
    tokio::time::advance(STALL / 2).await;
    let last = unread(&table);
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
    assert_eq!(reads.activity.cut(), Some(Cut::Room));
    slowly.taken();
    assert_eq!(reads.must_end(), None);
    drop(last);
}

#[tokio::test(start_paused = true)]
async fn unread_answers_count_whatever_else_is_open_and_whatever_drips() {
    let table = Table::new("test", 1, MOMENT);
    let (place, call) = unread(&table);
    // A half request beside it, and another again and again.
    let _half = Call::begin(&place.activity);
    for _ in 0..30 {
        drop(Call::begin(&place.activity));
        tokio::time::advance(STALL / 30).await;
    }
    tokio::time::advance(MOMENT).await;
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
    assert_eq!(place.must_end(), Some(Cut::Room));
    drop((place, call));
    // It takes a byte now and then.
    let (place, call) = unread(&table);
    for _ in 0..30 {
        tokio::time::advance(STALL / 29).await;
        call.taken();
        call.handed_over(1);
    }
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
    assert_eq!(place.must_end(), Some(Cut::Room));
    // One that is slow, and reads as we compute, is not meant.
    drop((place, call));
    let (place, call) = unread(&table);
    for _ in 0..30 {
        tokio::time::advance(STALL / 20).await;
        call.taken();
        tokio::time::advance(STALL / 10).await;
        call.handed_over(1);
    }
    assert!(matches!(table.admit(Instant::now()), Admission::Full));
    assert_eq!(place.activity.cut(), None);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_an_answer_in_drops_keeps_no_place() {
    let table = Table::new("test", 1, MOMENT);
    let (place, call) = unread(&table);
    call.end_with(1);
    for _ in 0..20 {
        tokio::time::advance(STALL / 20).await;
        place.activity.wrote(Instant::now());
    }
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
    assert_eq!(place.must_end(), Some(Cut::Room));
}

#[tokio::test(start_paused = true)]
async fn where_most_places_are_taken_by_clients_that_read_nothing_they_go_sooner() {
    let table = Table::new("test", 4, 5 * MOMENT);
    let mut stuck: Vec<_> = (0..4).map(|_| unread(&table)).collect();
    a_moment().await;
    let Admission::Wait(until) = table.admit(Instant::now()) else { panic!("it is an attack") };
    assert_eq!(until - Instant::now(), 4 * MOMENT);
    for _ in 0..20 {
        tokio::time::advance(5 * MOMENT).await;
        assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
        let (oldest, _call) = stuck.remove(0);
        assert_eq!(oldest.must_end(), Some(Cut::Room));
        drop(oldest);
        // They come again at once.
        stuck.push(unread(&table));
    }
}

#[tokio::test(start_paused = true)]
async fn a_half_request_more_does_not_make_an_old_one_young() {
    let table = Table::new("test", 1, 5 * MOMENT);
    let place = enter(&table);
    let _half = Call::begin(&place.activity);
    for _ in 0..5 {
        drop(Call::begin(&place.activity));
        a_moment().await;
    }
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
    assert_eq!(place.activity.cut(), Some(Cut::Room));
}

#[tokio::test(start_paused = true)]
async fn of_a_flood_of_silent_newcomers_the_oldest_goes_before_its_time() {
    let grace = 50 * MOMENT;
    let table = Table::new("test", FLOOD, grace);
    let places: Vec<Place> = (0..FLOOD).map(|_| enter(&table)).collect();
    let Admission::Wait(until) = table.admit(Instant::now()) else { panic!("they are young") };
    assert_eq!((until - Instant::now(), places[0].activity.cut()), (grace / FLOOD_SHARE, None));
    tokio::time::advance(grace / FLOOD_SHARE).await;
    places[0].activity.received(Instant::now(), false);
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
    assert!(places.iter().all(|place| place.activity.cut().is_none()), "one of them speaks");
    drop(places);
    let places: Vec<Place> = (0..FLOOD).map(|_| enter(&table)).collect();
    tokio::time::advance(grace / FLOOD_SHARE).await;
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
    assert_eq!(places[0].activity.cut(), Some(Cut::Room));
    // Its first byte comes just then.
    places[0].activity.received(Instant::now(), false);
    assert_eq!(places[0].must_end(), None);
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
    assert!(places[1..].iter().all(|place| place.activity.cut().is_none()), "a flood no more");
}

#[tokio::test(start_paused = true)]
async fn the_end_of_an_answer_is_sent_whatever_else_is_still_to_come() {
    let table = Table::new("test", 1, 5 * MOMENT);
    let place = enter(&table);
    let answered = Call::begin(&place.activity);
    answered.arrived();
    let _half = Call::begin(&place.activity);
    tokio::time::advance(Duration::from_secs(100)).await;
    assert!(matches!(table.admit(Instant::now()), Admission::Full));
    answered.end_with(1000);
    let Admission::Wait(until) = table.admit(Instant::now()) else { panic!("it is arriving") };
    assert_eq!((until - Instant::now(), place.activity.cut()), (5 * MOMENT, None));
    tokio::time::advance(5 * MOMENT).await;
    assert!(matches!(table.admit(Instant::now()), Admission::Wait(_)));
    assert_eq!(place.activity.cut(), Some(Cut::Room), "the half request has its time and no more");
}
