//! The open connections of one server: what each is doing, when it is cut, and who makes room.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::Timeouts;
use pace::Pace;

mod pace;

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
    /// When the first byte came.
    heard: Option<Instant>,
    /// A whole request head has come.
    proven: bool,
    /// It speaks HTTP/2: bytes may be answers to pings and begin no head.
    http2: bool,
    /// Requests between their head and the end of their answer.
    open: u32,
    /// Those of them that have arrived: whole, or with their first whole message.
    arrived: u32,
    /// Those of them that we owe the next part of an answer: they arrived, and their clients took what was
    /// there.
    computing: u32,
    /// Parts of answers that were handed over and of which hyper does not want the next yet, for the
    /// client's window is shut or the buffers are full: their bytes, by the number of their request.
    held: BTreeMap<u64, usize>,
    /// How slowly the client takes them.
    pace: Pace,
    /// Those of the held parts whose request is not wanted any more, and since when that is so: whoever serves
    /// it hears of that only when the client takes something.
    stuck: BTreeMap<u64, Instant>,
    /// Numbers requests.
    calls: u64,
    /// When it was accepted, or when it last began or ceased to have open requests, or such as have arrived.
    /// One more request does not make it younger.
    since: Instant,
    /// When the client last took bytes: the rest of an answer whose request has ended may be on its way.
    written: Option<Instant>,
    /// When the first byte of the next head came.
    head_since: Option<Instant>,
    /// Why it was told to end, and what it was doing then.
    cut: Option<(Cut, Option<Rank>)>,
}

/// How long after its last request ended, or its client last took bytes of the answer, a connection
/// may still be sending the end of it.
const TAIL: Duration = Duration::from_millis(100);

/// How long the end of an answer may take after its request has ended: hyper holds some 64 KiB of it.
const TAIL_MAX: Duration = Duration::from_secs(10);

/// A client that keeps all its answers waiting for so long makes room when room is needed: a lost packet is
/// sent again within a second.
const STALL: Duration = Duration::from_secs(1);

/// So many newcomers that have not sent a byte are a flood, where nobody else can make room: each is then left
/// [`FLOOD_SHARE`] of the grace. A client sends when it is connected, whatever the way is to it.
const FLOOD: usize = 8;

/// The part of the grace, as one in so many: 5 ms, in which the connection's task is woken and reads.
const FLOOD_SHARE: u32 = 10;

/// Who makes room: the first of these first, but that the first two are equals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// Not a byte has come.
    Mute,
    /// No request head has come.
    Silent,
    /// Its requests have been answered.
    Idle,
    /// Its request is not here yet.
    Arriving,
    /// It takes none of its answers, or the end of the last too slowly.
    Unread,
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
            heard: None,
            proven: false,
            http2: false,
            open: 0,
            arrived: 0,
            computing: 0,
            held: BTreeMap::new(),
            pace: Pace::default(),
            stuck: BTreeMap::new(),
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
        state.heard.get_or_insert(now);
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
            let stuck = state.stuck.values().min().map(|since| *since + STALL);
            let unread = state.pace.until(timeouts.write).into_iter().chain(stuck).min();
            return unread.map(|at| (at, Cut::Unread));
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
    /// A request began, arrived or ended, or a part of an answer waits or was taken.
    fn pace_changed(&mut self, now: Instant) {
        // Requests that are not here are the client's affair as well: they keep nothing from being read.
        let all_wait = self.computing == 0 && !self.held.is_empty();
        self.pace.changed(self.open > 0, all_wait, now);
    }

    /// A request that is not wanted waits for its client since then, or does no more.
    fn mark_stuck(&mut self, request: u64, since: Option<Instant>) {
        match since {
            Some(since) => {
                self.stuck.entry(request).or_insert(since);
            }
            None => {
                self.stuck.remove(&request);
            }
        }
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
        match (self.open, self.arrived, self.computing) {
            (0, ..) if self.heard.is_none() && !self.proven => Some(Rank::Mute),
            (0, ..) if !self.proven => Some(Rank::Silent),
            // The rest of an answer may be on its way.
            (0, ..) => Some(Rank::Idle),
            (_, 0, _) => Some(Rank::Arriving),
            (.., 0) => Some(Rank::Unread),
            _ => None,
        }
    }

    /// Whether its client keeps all its answers waiting, and most of the time.
    fn stalls(&self, now: Instant) -> bool {
        self.rank() == Some(Rank::Unread) && !self.pace.stalled(now).is_zero()
    }

    /// From when on it makes room, with which rank, and since when it deserves that: of equals the
    /// first goes. `None` for one that does not, or was told to already.
    fn turn(&self, terms: Terms, now: Instant) -> Option<Turn> {
        let rank = self.rank().filter(|_| self.cut.is_none())?;
        let turn = |rank, ripe, since| Some(Turn { rank, since, ripe });
        match rank {
            Rank::Mute | Rank::Silent => turn(Rank::Silent, self.since + terms.grace, self.since),
            Rank::Arriving => turn(rank, self.since + terms.grace, self.since),
            Rank::Idle => {
                let tail = self.tail_until().unwrap_or(now);
                let stall = self.since + terms.stall.max(TAIL);
                match tail <= stall {
                    true => turn(rank, tail, self.since),
                    // It takes the end of its answer in drops.
                    false => turn(Rank::Unread, stall, self.since),
                }
            }
            Rank::Unread => {
                let stalled = self.pace.stalled(now);
                let since = now.checked_sub(stalled).unwrap_or(now);
                // One that reads now and then gets there later, or never.
                turn(rank, now + terms.stall.saturating_sub(stalled), since)
            }
        }
    }
}

/// What connections are left at present, before they make room.
#[derive(Clone, Copy, Debug)]
struct Terms {
    /// From the accept, or the head of a request, to its end.
    grace: Duration,
    /// Without reading.
    stall: Duration,
}

/// When a connection makes room.
#[derive(Clone, Copy, Debug)]
struct Turn {
    rank: Rank,
    since: Instant,
    ripe: Instant,
}

/// One request of a connection, from its head to the end of its answer.
#[derive(Debug)]
pub(super) struct Call {
    activity: Arc<Activity>,
    number: u64,
    /// When its first byte came; over HTTP/2 the end of its head, for its frames are hyper's.
    pub(super) first_byte: Instant,
    progress: Mutex<Progress>,
}

/// How far one request is.
#[derive(Debug, Default)]
struct Progress {
    arrived: bool,
    /// A part of its answer waits for the client.
    held: bool,
    /// It is to end, and whoever serves it has been told.
    unwanted: bool,
    ended: bool,
}

impl Call {
    pub(super) fn begin(activity: &Arc<Activity>) -> Arc<Self> {
        let mut state = activity.state();
        let now = Instant::now();
        let first_byte = match (state.http2, state.calls) {
            (true, _) => None,
            (false, 0) => state.heard,
            (false, _) => state.head_since,
        };
        state.proven = true;
        if state.open == 0 {
            state.since = now;
        }
        state.open += 1;
        state.calls += 1;
        state.head_since = None;
        state.pace_changed(now);
        let number = state.calls;
        let (activity, first_byte) = (Arc::clone(activity), first_byte.unwrap_or(now));
        Arc::new(Self { activity, number, first_byte, progress: Mutex::default() })
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
        let mut progress = self.progress();
        if progress.ended {
            return;
        }
        let now = Instant::now();
        let mut state = self.activity.state();
        let before = match part {
            Some(bytes) => state.held.insert(self.number, bytes),
            None => state.held.remove(&self.number),
        };
        match (progress.arrived, progress.held, part.is_some()) {
            (true, false, true) => state.computing -= 1,
            (true, true, false) => state.computing += 1,
            _ => {}
        }
        progress.held = part.is_some();
        let is_stuck = progress.held && progress.unwanted;
        state.mark_stuck(self.number, is_stuck.then_some(now));
        state.pace.taken(before.unwrap_or(0), now);
        state.pace_changed(now);
        drop(state);
        if is_stuck {
            self.activity.changed.notify_one();
        }
    }

    /// It is to end, and whoever serves it has been told. Where its answer waits for the client that is not
    /// heard: then the connection ends, if the client takes nothing in a moment.
    pub(super) fn unwant(&self) {
        let mut progress = self.progress();
        progress.unwanted = true;
        if progress.held && !progress.ended {
            self.activity.state().mark_stuck(self.number, Some(Instant::now()));
            self.activity.changed.notify_one();
        }
    }

    /// It goes on, whatever was said before.
    pub(super) fn want(&self) {
        let mut progress = self.progress();
        if std::mem::take(&mut progress.unwanted) {
            self.activity.state().mark_stuck(self.number, None);
            self.activity.changed.notify_one();
        }
    }

    /// The request is here: from now on its connection makes no room for others while we answer.
    pub(super) fn arrived(&self) {
        let mut progress = self.progress();
        if !progress.arrived && !progress.ended {
            progress.arrived = true;
            let mut state = self.activity.state();
            state.arrived += 1;
            state.computing += u32::from(!progress.held);
            state.pace_changed(Instant::now());
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
        let Progress { arrived, held, .. } = *progress;
        let mut state = self.activity.state();
        state.open -= 1;
        state.arrived -= u32::from(arrived);
        state.computing -= u32::from(arrived && !held);
        state.mark_stuck(self.number, None);
        let (now, part) = (Instant::now(), state.held.remove(&self.number));
        state.pace.taken(part.unwrap_or(0), now);
        state.pace_changed(now);
        let is_idle = state.open == 0;
        // Else those that are still to come have had their time while others were answered, and the end of
        // that answer would be cut off.
        if is_idle || (arrived && state.arrived == 0) {
            state.since = now;
        }
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
    /// then idle ones, then those whose requests have not arrived, then those that do not read; of
    /// equals the oldest.
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
        let mut terms = Terms { grace: self.grace, stall: STALL };
        if inner.cut_one(Cut::Room, terms, now) {
            return Admission::Wait(now + self.grace);
        }
        if let Some((oldest, due)) = inner.oldest_of_a_flood(self.grace) {
            if due > now {
                return Admission::Wait(due);
            }
            inner.tell(&oldest, Cut::Room);
            return Admission::Wait(now + self.grace);
        }
        if inner.mostly_stall(now) {
            terms.stall = self.grace;
            if inner.cut_one(Cut::Room, terms, now) {
                return Admission::Wait(now + self.grace);
            }
        }
        // Those that are new may still send; if there are none, nothing will change soon.
        let ripe = |activity: &Arc<Activity>| Some(activity.state().turn(terms, now)?.ripe);
        match inner.open.values().filter_map(ripe).min() {
            Some(ripe) if ripe <= now + self.grace.max(TAIL) => Admission::Wait(ripe.max(now)),
            _ => Admission::Full,
        }
    }

    /// The process has no file descriptor left: `spare` of those that this server holds go back,
    /// and it takes no more than the rest until [`Self::set_limit`] says otherwise.
    pub(super) fn give_back(&self, spare: usize) {
        let mut inner = self.inner();
        let wanted = inner.open.len().saturating_sub(spare).max(1);
        let now = Instant::now();
        let terms = Terms { grace: Duration::ZERO, stall: STALL };
        while inner.staying() > wanted && inner.cut_one(Cut::Descriptors, terms, now) {}
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

    /// Whether more than half of all places are taken by clients that keep their answers waiting most of
    /// the time. That is an attack, or a network that has broken down, and whoever comes may read: then
    /// they are given the grace of newcomers and not [`STALL`].
    fn mostly_stall(&self, now: Instant) -> bool {
        let stalls = |activity: &&Arc<Activity>| activity.state().stalls(now);
        self.open.values().filter(stalls).count() > self.limit / 2
    }

    /// Cuts the connection that can best be missed, if it is the turn of any.
    fn cut_one(&mut self, why: Cut, terms: Terms, now: Instant) -> bool {
        let mut first: Option<((Rank, Instant), &Arc<Activity>)> = None;
        for activity in self.open.values() {
            let Some(turn) = activity.state().turn(terms, now) else { continue };
            let key = (turn.rank, turn.since);
            if turn.ripe > now || first.is_some_and(|(first, _)| first <= key) {
                continue;
            }
            first = Some((key, activity));
            // The first silent one is the oldest, and none comes before it. Strangers who come again
            // and again cost us no look at every other.
            if turn.rank == Rank::Silent {
                break;
            }
        }
        let Some(victim) = first.map(|(_, victim)| Arc::clone(victim)) else { return false };
        self.tell(&victim, why);
        true
    }

    /// The oldest of a flood of newcomers that have sent nothing, and when it goes: the accept loop must
    /// not wait out the grace of each of them.
    fn oldest_of_a_flood(&self, grace: Duration) -> Option<(Arc<Activity>, Instant)> {
        let is_mute = |activity: &&Arc<Activity>| {
            let state = activity.state();
            state.cut.is_none() && state.rank() == Some(Rank::Mute)
        };
        let mut mutes = self.open.values().filter(is_mute);
        let oldest = mutes.next()?;
        let is_flood = mutes.nth(FLOOD - 2).is_some();
        let due = oldest.state().since + grace / FLOOD_SHARE;
        is_flood.then(|| (Arc::clone(oldest), due))
    }

    /// Tells a connection to end, which it does unless more of its request comes meanwhile.
    fn tell(&mut self, victim: &Activity, why: Cut) {
        let mut state = victim.state();
        let rank = state.rank();
        state.cut = Some((why, rank));
        drop(state);
        victim.changed.notify_one();
        self.told += 1;
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
mod tests;
