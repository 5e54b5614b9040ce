//! The open connections of one server: what each is doing, when it is cut, and who makes room.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::Timeouts;

/// Why the server closed a connection before its client did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// No whole request head came in time.
    Silent,
    /// No request came for long after the last.
    Idle,
    /// It made room for another.
    Room,
    /// It gave back a file descriptor.
    Descriptors,
    /// Its client took nothing of any of its answers.
    Unread,
}

impl Cut {
    /// The label in metrics.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Idle => "idle",
            Self::Room => "room",
            Self::Descriptors => "descriptors",
            Self::Unread => "unread",
        }
    }
}

/// What one connection is doing.
#[derive(Debug)]
struct State {
    /// A whole request head has come.
    proven: bool,
    /// It speaks HTTP/2: bytes may be answers to pings and begin no head.
    http2: bool,
    /// Requests between their head and the end of their answer.
    open: u32,
    /// Those of them that have arrived: whole, or with their first whole message.
    arrived: u32,
    /// Parts of answers that were handed over and of which hyper does not want the next yet, for the
    /// client's window is shut or the buffers are full: their bytes, by the number of their request.
    held: BTreeMap<u64, usize>,
    /// How slowly the client takes them.
    pace: Pace,
    /// Numbers requests.
    calls: u64,
    /// When it was accepted, or when its last request began or ended.
    since: Instant,
    /// When the client last took bytes: the rest of an answer whose request has ended may be on its way.
    written: Option<Instant>,
    /// When the first byte of the next head came.
    head_since: Option<Instant>,
    /// Why it was told to end, and what it was doing then.
    cut: Option<(Cut, Option<Rank>)>,
}

/// Bytes that a client takes at least while it keeps all its answers waiting for [`Timeouts::write`] in all:
/// half a KiB a second, slower than any link in use. One that takes them in drops, or one small answer
/// after another, is cut as one that takes nothing.
const PACE_BYTES: usize = 16 << 10;

/// What a client has taken, and how long it kept the server waiting for that.
#[derive(Debug, Default)]
struct Pace {
    /// Since when everything that is open waits for the client.
    waiting: Option<Instant>,
    /// How long it did before that.
    waited: Duration,
    taken_bytes: usize,
}

impl Pace {
    /// Bytes were taken; enough of them, and the count begins anew.
    fn taken(&mut self, bytes: usize, now: Instant) {
        self.taken_bytes = self.taken_bytes.saturating_add(bytes);
        if self.taken_bytes >= PACE_BYTES {
            *self = Self { waiting: self.waiting.map(|_| now), ..Self::default() };
        }
    }

    /// Whether everything waits for the client from now on.
    fn waits(&mut self, all: bool, now: Instant) {
        match (self.waiting, all) {
            (None, true) => self.waiting = Some(now),
            (Some(since), false) => {
                self.waited += now.saturating_duration_since(since);
                self.waiting = None;
            }
            _ => {}
        }
    }

    /// When it has kept the server waiting for `limit` in all, if it goes on so.
    fn until(&self, limit: Duration) -> Option<Instant> {
        Some(self.waiting? + limit.saturating_sub(self.waited))
    }
}

/// How long after its last request ended, or its client last took bytes of the answer, a connection
/// may still be sending the end of it.
const TAIL: Duration = Duration::from_millis(100);

/// How long the end of an answer may take after its request has ended: hyper holds some 64 KiB of it.
const TAIL_MAX: Duration = Duration::from_secs(10);

/// Who makes room: the first of these first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// No request head has come.
    Silent,
    /// Its requests have been answered.
    Idle,
    /// Its request is not here yet.
    Arriving,
}

/// One connection, as its task, its requests and the accept loop see it.
#[derive(Debug)]
pub(super) struct Activity {
    state: Mutex<State>,
    /// Tells the connection's task to look again.
    pub(super) changed: Notify,
}

impl Activity {
    fn new(now: Instant) -> Self {
        let state = State {
            proven: false,
            http2: false,
            open: 0,
            arrived: 0,
            held: BTreeMap::new(),
            pace: Pace::default(),
            calls: 0,
            since: now,
            written: None,
            head_since: None,
            cut: None,
        };
        Self { state: Mutex::new(state), changed: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes came; `http2` once they are known to begin with the preface of HTTP/2.
    pub(super) fn received(&self, now: Instant, http2: bool) {
        let mut state = self.state();
        state.http2 |= http2;
        if state.open == 0 && state.proven && !state.http2 && state.head_since.is_none() {
            state.head_since = Some(now);
            drop(state);
            self.changed.notify_one();
        }
    }

    /// The client took bytes.
    pub(super) fn wrote(&self, now: Instant) {
        self.state().written = Some(now);
    }

    /// Since when nothing is open and nothing was taken; `None` while a request is open.
    pub(super) fn quiet_since(&self) -> Option<Instant> {
        let state = self.state();
        (state.open == 0).then(|| state.quiet_since())
    }

    /// When it is cut if nothing changes, and why; `None` while a request is being answered.
    pub(super) fn deadline(&self, timeouts: &Timeouts) -> Option<(Instant, Cut)> {
        let state = self.state();
        if state.open > 0 {
            // One answer that is not read is its client's affair while it reads another.
            return state.pace.until(timeouts.write).map(|at| (at, Cut::Unread));
        }
        if !state.proven {
            return Some((state.since + timeouts.first_request, Cut::Silent));
        }
        let idle = (state.since + timeouts.idle, Cut::Idle);
        let head = state.head_since.map(|since| (since + timeouts.head, Cut::Silent));
        Some(head.filter(|head| head.0 < idle.0).unwrap_or(idle))
    }
}

impl State {
    /// A request began or ended, or a part of an answer waits or was taken.
    fn pace_changed(&mut self, now: Instant) {
        let all_wait = self.open > 0 && self.held.len() == self.open as usize;
        self.pace.waits(all_wait, now);
    }

    /// When its last request ended, or the client last took some of the answer.
    fn quiet_since(&self) -> Instant {
        // What is written long after is no answer: pings and the like.
        let written = self.written.filter(|written| *written <= self.since + TAIL_MAX);
        written.map_or(self.since, |written| self.since.max(written))
    }

    /// Until when the end of an answer may still be on its way.
    fn tail_until(&self) -> Option<Instant> {
        (self.open == 0 && self.proven).then(|| self.quiet_since() + TAIL)
    }

    /// Its place in the order in which connections make room; `None` for one that does not: a
    /// request that has arrived is being answered.
    fn rank(&self) -> Option<Rank> {
        match (self.open, self.arrived, self.proven) {
            (0, _, false) => Some(Rank::Silent),
            // The rest of an answer may be on its way.
            (0, _, true) => Some(Rank::Idle),
            (_, 0, _) => Some(Rank::Arriving),
            _ => None,
        }
    }
}

/// One request of a connection, from its head to the end of its answer.
#[derive(Debug)]
pub(super) struct Call {
    activity: Arc<Activity>,
    number: u64,
    progress: Mutex<Progress>,
}

/// How far one request is.
#[derive(Debug, Default)]
struct Progress {
    arrived: bool,
    ended: bool,
}

impl Call {
    pub(super) fn begin(activity: &Arc<Activity>) -> Arc<Self> {
        let mut state = activity.state();
        state.proven = true;
        state.open += 1;
        state.calls += 1;
        state.since = Instant::now();
        state.head_since = None;
        state.pace_changed(Instant::now());
        let number = state.calls;
        Arc::new(Self { activity: Arc::clone(activity), number, progress: Mutex::default() })
    }

    /// A part of the answer was handed over, of so many bytes.
    pub(super) fn handed_over(&self, bytes: usize) {
        self.wait(Some(bytes));
    }

    /// The next part is asked for: the one before is on its way.
    pub(super) fn taken(&self) {
        self.wait(None);
    }

    fn wait(&self, part: Option<usize>) {
        if self.progress().ended {
            return;
        }
        let now = Instant::now();
        let mut state = self.activity.state();
        let before = match part {
            Some(bytes) => state.held.insert(self.number, bytes),
            None => state.held.remove(&self.number),
        };
        state.pace.taken(before.unwrap_or(0), now);
        state.pace_changed(now);
    }

    /// The request is here: from now on its connection makes no room for others.
    pub(super) fn arrived(&self) {
        let mut progress = self.progress();
        if !progress.arrived && !progress.ended {
            progress.arrived = true;
            self.activity.state().arrived += 1;
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last part of its answer was handed over, of so many bytes.
    pub(super) fn end_with(&self, bytes: usize) {
        self.handed_over(bytes);
        self.end();
    }

    /// Nothing of it is wanted any more.
    fn end(&self) {
        let mut progress = self.progress();
        if std::mem::replace(&mut progress.ended, true) {
            return;
        }
        let arrived = progress.arrived;
        let mut state = self.activity.state();
        state.open -= 1;
        state.arrived -= u32::from(arrived);
        let (now, part) = (Instant::now(), state.held.remove(&self.number));
        state.pace.taken(part.unwrap_or(0), now);
        state.pace_changed(now);
        state.since = now;
        let is_idle = state.open == 0;
        drop(state);
        if is_idle {
            self.activity.changed.notify_one();
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.end();
    }
}

/// The connections of one server.
#[derive(Debug)]
pub(super) struct Table {
    name: &'static str,
    /// So long a newcomer has for its request before it makes room for the next.
    grace: Duration,
    inner: Mutex<Inner>,
    /// A connection has ended, or stays although it was to make room.
    pub(super) gone: Notify,
}

#[derive(Debug)]
struct Inner {
    /// By number, and so in the order in which they were accepted.
    open: BTreeMap<u64, Arc<Activity>>,
    /// Of these, those that were told to end.
    told: usize,
    next: u64,
    /// The most that may be open at present.
    limit: usize,
}

/// What the table says to a newcomer.
#[derive(Debug)]
pub(super) enum Admission {
    /// It is in.
    Entered(Place),
    /// Another makes room for it: ask again when [`Table::gone`] says so, then at the latest.
    Wait(Instant),
    /// Every other is being answered.
    Full,
}

impl Table {
    pub(super) fn new(name: &'static str, limit: usize, grace: Duration) -> Arc<Self> {
        let inner = Inner { open: BTreeMap::new(), told: 0, next: 0, limit: limit.max(1) };
        Arc::new(Self { name, grace, inner: Mutex::new(inner), gone: Notify::new() })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a newcomer in, or has the one that can best be missed make room: silent ones first,
    /// then idle ones, then those whose requests have not arrived; of equals the oldest.
    pub(super) fn admit(self: &Arc<Self>, now: Instant) -> Admission {
        let mut inner = self.inner();
        if inner.open.len() < inner.limit {
            let number = inner.next;
            inner.next += 1;
            let activity = Arc::new(Activity::new(now));
            inner.open.insert(number, Arc::clone(&activity));
            let others = inner.open.len() - 1;
            self.measure(&inner);
            return Admission::Entered(Place { table: Arc::clone(self), number, activity, others });
        }
        if inner.staying() < inner.limit {
            // Room is being made already.
            return Admission::Wait(now + self.grace);
        }
        let since = now.checked_sub(self.grace).unwrap_or(now);
        if inner.cut_one(Cut::Room, since) {
            return Admission::Wait(now + self.grace);
        }
        // Those that are new may still send; if there are none, nothing will change soon.
        let ripe = |activity: &Arc<Activity>| {
            let state = activity.state();
            state.rank().filter(|_| state.cut.is_none())?;
            Some((state.since + self.grace).max(state.tail_until().unwrap_or(now)))
        };
        match inner.open.values().filter_map(ripe).min() {
            Some(ripe) => Admission::Wait(ripe.max(now)),
            None => Admission::Full,
        }
    }

    /// The process has no file descriptor left: `spare` of those that this server holds go back,
    /// and it takes no more than the rest until [`Self::set_limit`] says otherwise.
    pub(super) fn give_back(&self, spare: usize) {
        let mut inner = self.inner();
        let wanted = inner.open.len().saturating_sub(spare).max(1);
        let now = Instant::now();
        while inner.staying() > wanted && inner.cut_one(Cut::Descriptors, now) {}
        // Not below what stays: where nothing could be cut, refusing newcomers would free nothing.
        inner.limit = inner.staying().max(1);
    }

    /// How many may be open from now on; at least one.
    pub(super) fn set_limit(&self, limit: usize) {
        self.inner().limit = limit.max(1);
    }

    /// How many are open.
    pub(super) fn open(&self) -> usize {
        self.inner().open.len()
    }

    fn measure(&self, inner: &Inner) {
        metrics::gauge!("tercet_connections_open", "server" => self.name)
            .set(inner.open.len() as f64);
    }
}

impl Inner {
    /// Those that have not been told to end.
    fn staying(&self) -> usize {
        self.open.len() - self.told
    }

    /// Cuts the connection that can best be missed, if there is one; of those without a whole
    /// request only such as were there at `since`.
    fn cut_one(&mut self, why: Cut, since: Instant) -> bool {
        let now = Instant::now();
        let mut first: Option<((Rank, Instant), &Arc<Activity>)> = None;
        for activity in self.open.values() {
            let state = activity.state();
            let Some(rank) = state.rank().filter(|_| state.cut.is_none()) else { continue };
            let is_sending = state.tail_until().is_some_and(|at| at > now);
            let is_new = rank != Rank::Idle && state.since > since;
            let key = (rank, state.since);
            if is_sending || is_new || first.is_some_and(|(first, _)| first <= key) {
                continue;
            }
            first = Some((key, activity));
            // The first silent one is the oldest, and none comes before it. Strangers who come again
            // and again cost us no look at every other.
            if rank == Rank::Silent {
                break;
            }
        }
        let Some((_, victim)) = first else { return false };
        let mut state = victim.state();
        let rank = state.rank();
        state.cut = Some((why, rank));
        drop(state);
        victim.changed.notify_one();
        self.told += 1;
        true
    }
}

/// A connection's place in the table; free again when dropped.
#[derive(Debug)]
pub(super) struct Place {
    table: Arc<Table>,
    number: u64,
    pub(super) activity: Arc<Activity>,
    /// How many others were open when it came.
    pub(super) others: usize,
}

impl Place {
    /// Why the connection must end now, if it must. One that was to make room stays if more of its
    /// request has come meanwhile.
    pub(super) fn must_end(&self) -> Option<Cut> {
        self.activity.state().cut?;
        // The table's lock before the connection's, as everywhere.
        let mut inner = self.table.inner();
        let mut state = self.activity.state();
        let (why, then) = state.cut?;
        let now = state.rank();
        let spares = matches!(why, Cut::Room | Cut::Descriptors);
        if spares && (now.is_none() || now > then) {
            state.cut = None;
            inner.told -= 1;
            self.table.gone.notify_one();
            return None;
        }
        Some(why)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inner = self.table.inner();
        inner.open.remove(&self.number);
        inner.told -= usize::from(self.activity.state().cut.is_some());
        self.table.measure(&inner);
        drop(inner);
        self.table.gone.notify_one();
    }
}

#[cfg(test)]
mod tests {
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
}
