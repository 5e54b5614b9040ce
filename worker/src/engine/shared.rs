//! Disjoint writes by the threads of a step. The engine's only unsafe code, and all of its reasons.
//!
//! A step is a row of *phases* with a barrier between each two. In one phase a buffer is either
//! read by every thread, or written in parts of which each is handed out once. That is checked
//! while the program runs, in release builds too, so nothing outside this file can break it:
//!
//! 1. **Same phase everywhere.** [`run`] makes one [`Member`] for each thread of the pool and a
//!    barrier for exactly so many. A member's phase number grows only in [`Member::next_phase`],
//!    after the barrier. So two members that are running have the same number.
//! 2. **References end with their phase.** Every reference borrows the `Member` it came from, and
//!    `next_phase` needs the member whole: the compiler ends them before the barrier.
//! 3. **One use of a buffer a phase.** Each buffer has an atomic word, `(phase, use)`: the first to
//!    come in a phase sets the use, the others must agree with it or panic. The height of the bands
//!    that columns are cut in is a part of it.
//! 4. **Parts are handed out once.** Rows: each has an atomic with the phase in which it was last
//!    given away; giving it away twice panics. Columns: they come from an atomic counter, so each
//!    range is new.
//! 5. **Only one team.** A buffer is lent to one team (`Shared` holds `&mut` of it) and knows its
//!    number; a member of another panics. A team runs once: [`run`] takes it.
//!
//! The barrier makes what was written in one phase visible in the next (see `barrier.rs`).
#![expect(unsafe_code, reason = "disjoint parts of one buffer for several threads")]

use std::alloc::{self, Layout};
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::{slice, thread};

use kernels::Columns;

use super::barrier::{Barrier, Poisoned};

/// The use of a buffer in a phase. They share no phase with one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Read,
    WriteRows,
    /// In bands of so many rows, at least one.
    WriteColumns(u32),
}

impl Use {
    /// Unlike that of every other use, and not 0.
    fn number(self) -> u32 {
        match self {
            Self::Read => u32::MAX,
            Self::WriteRows => u32::MAX - 1,
            Self::WriteColumns(height) => height,
        }
    }
}

/// The threads of one step.
pub(super) struct Team {
    /// Unlike that of any other team of this process.
    number: u64,
    threads: usize,
    barrier: Barrier,
}

impl Team {
    /// A team of all threads of `pool`.
    pub(super) fn new(pool: &rayon::ThreadPool) -> Self {
        static TEAMS: AtomicU64 = AtomicU64::new(0);
        let threads = pool.current_num_threads();
        Self { number: TEAMS.fetch_add(1, SeqCst), threads, barrier: Barrier::new(threads) }
    }

    /// How many threads it has.
    pub(super) fn threads(&self) -> usize {
        self.threads
    }
}

/// Runs `work` on every thread of `pool` at once and waits for all of them.
///
/// # Panics
///
/// If `work` panics on any thread: the others then find their barrier poisoned, so none waits for
/// ever. Also if `pool` has another number of threads than `team`.
pub(super) fn run<F>(pool: &rayon::ThreadPool, team: Team, work: F)
where
    F: Fn(&mut Member<'_>) -> Result<(), Poisoned> + Sync,
{
    assert_eq!(pool.current_num_threads(), team.threads, "a team of another pool");
    let team = &team;
    let outcomes = pool.broadcast(|context| {
        let mut member = Member { team, index: context.index(), phase: 1 };
        let _poison = PoisonOnPanic(&team.barrier);
        work(&mut member)
    });
    assert!(outcomes.iter().all(Result::is_ok), "a step ended early without a panic");
}

struct PoisonOnPanic<'t>(&'t Barrier);

impl Drop for PoisonOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.poison();
        }
    }
}

/// The phase of a member whose step was poisoned.
const NO_PHASE: u32 = u32::MAX;

/// One thread's part in a step: the right to use shared buffers in the current phase.
pub(super) struct Member<'t> {
    team: &'t Team,
    index: usize,
    phase: u32,
}

impl Member<'_> {
    /// This thread's number, from 0.
    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// How many threads the team has.
    pub(super) fn threads(&self) -> usize {
        self.team.threads
    }

    /// Waits until every thread has finished this phase, and begins the next.
    ///
    /// # Errors
    ///
    /// [`Poisoned`] if another thread panicked. The member then has no right to any buffer any more:
    /// some threads may be a phase ahead of it, with rows that it could be given a second time.
    pub(super) fn next_phase(&mut self) -> Result<(), Poisoned> {
        self.team.barrier.wait().inspect_err(|Poisoned| self.phase = NO_PHASE)?;
        self.phase += 1;
        assert_ne!(self.phase, NO_PHASE, "a step has fewer than 2^32 phases");
        Ok(())
    }

    /// The phase that it is in.
    ///
    /// # Panics
    ///
    /// If its step has ended.
    fn phase(&self) -> u32 {
        assert_ne!(self.phase, NO_PHASE, "a buffer is used after its step was poisoned");
        self.phase
    }

    /// The next `count` of `0..total` that no thread has taken in this phase; `None` at the end.
    pub(super) fn take(&self, queue: &Queue, count: usize, total: usize) -> Option<Range<usize>> {
        assert!(count > 0, "taking nothing never ends");
        take(&queue.0, self.phase(), total, |_| count)
    }

    /// As [`Self::take`], a piece at a time.
    pub(super) fn take_piece(
        &self,
        queue: &Queue,
        pieces: Pieces,
        total: usize,
    ) -> Option<Range<usize>> {
        take(&queue.0, self.phase(), total, |remaining| pieces.count(remaining, self.threads()))
    }
}

/// Hands out numbers, from 0 again in every phase. Decides who works on what, not what is allowed.
#[derive(Default)]
pub(super) struct Queue(AtomicU64);

/// Moves a counter `(phase: high 32 bits, next: low 32 bits)` on, at most to `total`, by as much as
/// `count` says of what remains.
fn take(
    counter: &AtomicU64,
    phase: u32,
    total: usize,
    count: impl Fn(usize) -> usize,
) -> Option<Range<usize>> {
    assert!(u32::try_from(total).is_ok(), "a phase has fewer than 2^32 parts");
    let mut seen = counter.load(SeqCst);
    loop {
        let start = if seen >> 32 == u64::from(phase) { (seen & 0xffff_ffff) as usize } else { 0 };
        if start >= total {
            return None;
        }
        let end = start.saturating_add(count(total - start)).min(total);
        let next = u64::from(phase) << 32 | end as u64;
        match counter.compare_exchange_weak(seen, next, SeqCst, SeqCst) {
            Ok(_) => return Some(start..end),
            Err(now) => seen = now,
        }
    }
}

/// How columns are cut: large pieces first, smaller and smaller ones towards the end, so that
/// threads finish together however unequal they are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pieces {
    /// Every piece but the last is a multiple of it.
    pub(super) granule: usize,
    /// The least; a multiple of `granule`.
    pub(super) least: usize,
    /// The most; a multiple of `granule`.
    pub(super) most: usize,
}

impl Pieces {
    /// Pieces of the same size, as few as give every thread the same work: of about `about` columns
    /// or, where there are too few, of more or less. There are `bands` bands of `width` columns.
    pub(super) fn even(
        granule: usize,
        about: usize,
        width: usize,
        bands: usize,
        threads: usize,
    ) -> Self {
        let total = width * bands;
        let count = (total / about / threads).max(1) * threads;
        let size = total.div_ceil(count).next_multiple_of(granule);
        Self { granule, least: size, most: size }
    }

    /// Pieces of any size of multiples of `granule`, not below `least`.
    pub(super) fn at_least(granule: usize, least: usize) -> Self {
        Self { granule, least, most: usize::MAX / granule * granule }
    }

    /// How many columns a thread takes when `remaining` are left: half of its share.
    fn count(self, remaining: usize, threads: usize) -> usize {
        let share = if threads == 1 { remaining } else { remaining / (2 * threads) };
        share.next_multiple_of(self.granule).clamp(self.least, self.most)
    }
}

/// Bytes of a cache line, of which vectors of every kind of CPU are parts.
const CACHE_LINE_BYTES: usize = 64;

/// Memory that is lent to the teams of one step after another.
pub(super) struct Buffer<T> {
    /// The first `start` of them, and some after the last, are not used.
    values: Vec<T>,
    /// Where a cache line begins: kernels read vectors that cross lines at half the speed.
    start: usize,
    len: usize,
    /// The phase in which a row was last given away. Empty until lent.
    given: Vec<AtomicU32>,
}

/// There is not so much memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoMemory;

/// Numbers of which all bits 0 are a value.
///
/// # Safety
///
/// They must be: memory that the system gives is such, and is taken for values of this type.
pub(super) unsafe trait Zero {}

// SAFETY: all bits 0 are the number 0 of each of them.
unsafe impl Zero for f32 {}
// SAFETY: as above.
unsafe impl Zero for i8 {}
// SAFETY: as above.
unsafe impl Zero for u8 {}
// SAFETY: as above.
unsafe impl Zero for u16 {}
// SAFETY: as above.
unsafe impl Zero for i32 {}
// SAFETY: as above.
unsafe impl Zero for u32 {}

/// So many zeros, whose pages are untouched until they are written: what `vec![0; len]` gives, but
/// that too much is an error here and not the end of the process.
///
/// # Errors
///
/// [`NoMemory`].
pub(super) fn zeros<T: Zero>(len: usize) -> Result<Vec<T>, NoMemory> {
    let layout = Layout::array::<T>(len).map_err(|_| NoMemory)?;
    if layout.size() == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the layout has a size.
    let start = unsafe { alloc::alloc_zeroed(layout) };
    if start.is_null() {
        return Err(NoMemory);
    }
    // SAFETY: the global allocator gave room for exactly `len` values, and all bits 0 are values
    // ([`Zero`]).
    Ok(unsafe { Vec::from_raw_parts(start.cast(), len, len) })
}

/// So many of `value`.
fn filled<T: Clone>(value: T, len: usize) -> Result<Vec<T>, NoMemory> {
    let mut values = Vec::new();
    values.try_reserve_exact(len).map_err(|_| NoMemory)?;
    values.resize(len, value);
    Ok(values)
}

impl<T> Buffer<T> {
    /// Values beyond those used: enough to begin at a cache line.
    const SPARE: usize = CACHE_LINE_BYTES
        / match size_of::<T>() {
            0 => 1,
            bytes if bytes > CACHE_LINE_BYTES => CACHE_LINE_BYTES,
            bytes => bytes,
        };

    /// How many values `rows` of `width` are, the spare ones included.
    fn room(rows: usize, width: usize) -> Result<usize, NoMemory> {
        let len = rows.checked_mul(width).and_then(|len| len.checked_add(Self::SPARE));
        len.ok_or(NoMemory)
    }

    /// Zeros for `rows` of `width` values, untouched. Lending takes no memory.
    ///
    /// # Errors
    ///
    /// [`NoMemory`].
    pub(super) fn zeros(rows: usize, width: usize) -> Result<Self, NoMemory>
    where
        T: Zero,
    {
        Self::of(zeros(Self::room(rows, width)?)?, rows)
    }

    /// Room for `rows` of `width` values, all `value`. Lending takes no memory.
    ///
    /// # Errors
    ///
    /// [`NoMemory`].
    pub(super) fn filled(value: T, rows: usize, width: usize) -> Result<Self, NoMemory>
    where
        T: Clone,
    {
        Self::of(filled(value, Self::room(rows, width)?)?, rows)
    }

    fn of(values: Vec<T>, rows: usize) -> Result<Self, NoMemory> {
        let mut given = Vec::new();
        given.try_reserve_exact(rows).map_err(|_| NoMemory)?;
        let start = values.as_ptr().align_offset(CACHE_LINE_BYTES).min(Self::SPARE);
        let len = values.len() - Self::SPARE;
        Ok(Self { values, start, len, given })
    }

    /// What is in it.
    pub(super) fn values(&self) -> &[T] {
        &self.values[self.start..][..self.len]
    }

    /// What is in it, to be taken.
    pub(super) fn values_mut(&mut self) -> &mut [T] {
        &mut self.values[self.start..][..self.len]
    }

    /// Lends the first `rows * width` values to `team` as `[rows][width]`.
    ///
    /// # Panics
    ///
    /// If the buffer is smaller.
    pub(super) fn lend<'a>(&'a mut self, team: &Team, rows: usize, width: usize) -> Shared<'a, T> {
        let len = rows.checked_mul(width).expect("a shape that fits memory");
        let values = &mut self.values[self.start..][..self.len][..len];
        assert!(rows <= self.given.capacity(), "{rows} rows of {}", self.given.capacity());
        self.given.clear();
        self.given.resize_with(rows, || AtomicU32::new(0));
        Shared {
            team: team.number,
            values: NonNull::from(values).cast(),
            rows,
            width,
            purpose: AtomicU64::new(0),
            columns: AtomicU64::new(0),
            given: &self.given,
            lent: PhantomData,
        }
    }
}

/// A buffer `[rows][width]` in the hands of a team.
pub(super) struct Shared<'a, T> {
    team: u64,
    values: NonNull<T>,
    rows: usize,
    width: usize,
    /// `(phase, use)`, 32 bits each.
    purpose: AtomicU64,
    /// The counter of [`take`].
    columns: AtomicU64,
    given: &'a [AtomicU32],
    lent: PhantomData<&'a mut [T]>,
}

// SAFETY: threads get at the values only through `&Member`, by the five rules above: as shared
// references, hence `T: Sync`, or as unique ones, which may move values, hence `T: Send`.
unsafe impl<T: Send + Sync> Sync for Shared<'_, T> {}

impl<T> Shared<'_, T> {
    /// How many rows it has.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// How many values a row has.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Settles or confirms the use of this buffer in the member's phase (rules 3 and 5).
    fn enter(&self, member: &Member<'_>, purpose: Use) {
        assert_eq!(self.team, member.team.number, "a buffer of another team");
        let phase = u64::from(member.phase());
        let wanted = phase << 32 | u64::from(purpose.number());
        let mut seen = self.purpose.load(SeqCst);
        while seen != wanted {
            let is_new_phase = seen >> 32 != phase;
            assert!(is_new_phase, "a buffer is read and written in the same phase");
            match self.purpose.compare_exchange_weak(seen, wanted, SeqCst, SeqCst) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }

    /// Everything, to read in this phase.
    pub(super) fn read<'m>(&'m self, member: &'m Member<'_>) -> &'m [T] {
        self.enter(member, Use::Read);
        // SAFETY: `values` covers `rows * width` initialised values for the time of the loan, and
        // in this phase nobody can get a unique reference (rule 3).
        unsafe { slice::from_raw_parts(self.values.as_ptr(), self.rows * self.width) }
    }

    /// Row `row`, to write in this phase.
    ///
    /// # Panics
    ///
    /// If the row was given away in this phase before, or the buffer has another use in it.
    #[expect(clippy::mut_from_ref, reason = "each row is given away once a phase (rule 4)")]
    pub(super) fn row<'m>(&'m self, member: &'m Member<'_>, row: usize) -> &'m mut [T] {
        self.enter(member, Use::WriteRows);
        let phase = member.phase();
        let before = self.given[row].swap(phase, SeqCst);
        assert_ne!(before, phase, "row {row} is given away twice in a phase");
        let start = self.values.as_ptr().wrapping_add(row * self.width);
        // SAFETY: `given` has `rows` entries, so the row lies inside the loan; in this phase it was
        // given to nobody else (rule 4) and nothing but rows is handed out (rule 3).
        unsafe { slice::from_raw_parts_mut(start, self.width) }
    }
}

impl Shared<'_, f32> {
    /// The next `count` columns of the first `rows` rows, to write in this phase; `None` when all
    /// columns are given away.
    pub(super) fn columns<'m>(
        &'m self,
        member: &'m Member<'_>,
        rows: usize,
        count: usize,
    ) -> Option<(Range<usize>, Columns<'m>)> {
        self.pieces(member, rows, Pieces { granule: count, least: count, most: count })
    }

    /// As [`Self::columns`], a piece at a time.
    pub(super) fn pieces<'m>(
        &'m self,
        member: &'m Member<'_>,
        rows: usize,
        pieces: Pieces,
    ) -> Option<(Range<usize>, Columns<'m>)> {
        self.bands(member, rows, rows, pieces).map(|(_, range, columns)| (range, columns))
    }

    /// The next piece of the first `rows` rows in bands of `height` rows, of which the last may be
    /// lower, one band after another: the rows of the band, which columns, and these columns of these
    /// rows to write in this phase; `None` when everything is given away.
    ///
    /// # Panics
    ///
    /// If the buffer has another use in this phase, such as with bands of another height.
    pub(super) fn bands<'m>(
        &'m self,
        member: &'m Member<'_>,
        rows: usize,
        height: usize,
        pieces: Pieces,
    ) -> Option<(Range<usize>, Range<usize>, Columns<'m>)> {
        assert!(0 < height && height <= rows && rows <= self.rows, "{rows} rows of {}", self.rows);
        assert!(0 < pieces.granule && pieces.granule <= pieces.least, "{pieces:?}");
        assert!(pieces.least <= pieces.most, "{pieces:?}");
        let purpose = u32::try_from(height).ok().filter(|height| *height < u32::MAX - 1);
        self.enter(member, Use::WriteColumns(purpose.expect("a step has fewer rows")));
        let total = rows.div_ceil(height).checked_mul(self.width).expect("no more than the values");
        let count = |remaining: usize| {
            // Not beyond the end of a band.
            let in_band = (remaining - 1) % self.width + 1;
            pieces.count(remaining, member.threads()).min(in_band)
        };
        let places = take(&self.columns, member.phase(), total, count)?;
        let band = places.start / self.width;
        let range = places.start % self.width..places.end - band * self.width;
        let band = band * height..rows.min((band + 1) * height);
        let start = self.values.as_ptr().wrapping_add(band.start * self.width);
        // SAFETY: the loan covers at least `rows` rows of `width` values, of which `band` is some;
        // `range` lies inside a row, and these places were given to nobody else in this phase (rule 4),
        // in which only columns of bands of this height are handed out (rule 3).
        let columns = unsafe { Columns::from_raw(start, band.len(), self.width, range.clone()) };
        Some((band, range, columns))
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    const ROWS: usize = 37;
    const WIDTH: usize = 50;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    /// Runs `work` with a buffer of its own on three threads; tells whether it panicked.
    fn panics(
        work: impl Fn(&mut Member<'_>, &Shared<'_, f32>) -> Result<(), Poisoned> + Sync,
    ) -> bool {
        let pool = pool(3);
        let team = Team::new(&pool);
        let mut buffer = Buffer::<f32>::zeros(ROWS, WIDTH).unwrap();
        let shared = buffer.lend(&team, ROWS, WIDTH);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            run(&pool, team, |member| work(member, &shared));
        }));
        outcome.is_err()
    }

    #[test]
    fn rows_then_columns_reach_every_value_once() {
        let pool = pool(4);
        let team = Team::new(&pool);
        let mut buffer = Buffer::<f32>::zeros(ROWS, WIDTH).unwrap();
        let shared = buffer.lend(&team, ROWS, WIDTH);
        let queue = Queue::default();
        run(&pool, team, |member| {
            while let Some(rows) = member.take(&queue, 2, ROWS) {
                for row in rows {
                    shared.row(member, row).iter_mut().for_each(|value| *value += 1.0);
                }
            }
            member.next_phase()?;
            while let Some((range, mut columns)) = shared.columns(member, ROWS, 7) {
                for row in 0..ROWS {
                    assert_eq!(columns.row(row).len(), range.len());
                    columns.row(row).iter_mut().for_each(|value| *value += 10.0);
                }
            }
            member.next_phase()?;
            assert!(shared.read(member).iter().all(|&value| value == 11.0));
            Ok(())
        });
        assert!(buffer.values().iter().all(|&value| value == 11.0));
    }

    #[test]
    fn bands_reach_every_value_once() {
        let pool = pool(4);
        let team = Team::new(&pool);
        let mut buffer = Buffer::<f32>::zeros(ROWS, WIDTH).unwrap();
        let shared = buffer.lend(&team, ROWS, WIDTH);
        run(&pool, team, |member| {
            let pieces = Pieces::even(4, 20, WIDTH, ROWS.div_ceil(16), 4);
            while let Some((rows, range, mut columns)) = shared.bands(member, ROWS, 16, pieces) {
                assert_eq!((rows.len(), range.len()), (columns.rows(), columns.cols().len()));
                for row in 0..rows.len() {
                    let values = columns.row(row).iter_mut().zip(range.clone());
                    let of_row = ((rows.start + row) * WIDTH) as f32;
                    values.for_each(|(value, column)| *value += of_row + column as f32);
                }
            }
            member.next_phase()?;
            let values = shared.read(member).iter().enumerate();
            assert!(values.into_iter().all(|(place, value)| *value == place as f32));
            Ok(())
        });
    }

    #[test]
    fn even_pieces_leave_no_thread_without() {
        let size = |width, bands, threads| {
            let pieces = Pieces::even(4, 1024, width, bands, threads);
            assert_eq!(pieces.least, pieces.most);
            pieces.least
        };
        assert_eq!(size(2560, 2, 2), 1280);
        assert_eq!(size(6912, 2, 2), 1152);
        assert_eq!(size(640, 2, 2), 640);
        assert_eq!(size(640, 1, 2), 320);
        assert_eq!(size(2560, 2, 16), 320);
        assert_eq!(size(3, 1, 16), 4);
    }

    #[test]
    fn pieces_shrink_towards_the_end() {
        let pieces = Pieces { granule: 4, least: 8, most: 100 };
        let mut sizes = Vec::new();
        let mut remaining = 1002;
        while remaining > 0 {
            let count = pieces.count(remaining, 2);
            assert!(count.is_multiple_of(4) && (8..=100).contains(&count), "{count}");
            sizes.push(count);
            remaining = remaining.saturating_sub(count);
        }
        assert!(sizes.is_sorted_by(|a, b| a >= b), "{sizes:?}");
        assert_eq!((sizes[0], sizes.last()), (100, Some(&8)));
        assert_eq!(Pieces::at_least(4, 8).count(1002, 1), 1004, "nobody to share with");
    }

    #[test]
    fn a_row_is_given_away_once_a_phase() {
        assert!(panics(|member, shared| {
            shared.row(member, 5);
            Ok(())
        }));
        assert!(!panics(|member, shared| {
            shared.row(member, member.index())[0] = 1.0;
            member.next_phase()?;
            shared.row(member, member.index())[0] = 2.0;
            Ok(())
        }));
    }

    #[test]
    fn a_buffer_has_one_use_a_phase() {
        assert!(panics(|member, shared| {
            shared.read(member);
            shared.row(member, member.index());
            Ok(())
        }));
        assert!(panics(|member, shared| {
            shared.row(member, member.index());
            shared.columns(member, ROWS, 1);
            Ok(())
        }));
        assert!(panics(|member, shared| {
            let pieces = Pieces::at_least(1, 1);
            shared.bands(member, ROWS, 5, pieces);
            shared.bands(member, ROWS, 6, pieces);
            Ok(())
        }));
    }

    #[test]
    fn another_team_gets_nothing() {
        let pool = pool(2);
        let (lent_to, other) = (Team::new(&pool), Team::new(&pool));
        let mut buffer = Buffer::<f32>::zeros(2, 2).unwrap();
        let shared = buffer.lend(&lent_to, 2, 2);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            run(&pool, other, |member| {
                shared.read(member);
                Ok(())
            });
        }));
        assert!(outcome.is_err());
    }

    #[test]
    fn a_member_of_a_poisoned_step_gets_nothing_more() {
        // One thread panics a phase ahead of another that ignores the error: without the check the
        // late one was given the row that the third holds.
        let pool = pool(3);
        type Attempt = fn(&Member<'_>, &Shared<'_, f32>, &Queue);
        let uses: [Attempt; 5] = [
            |member, shared, _| shared.row(member, 0)[0] = 1.0,
            |member, shared, _| assert!(!shared.read(member).is_empty()),
            |member, shared, _| assert!(shared.columns(member, ROWS, 1).is_some()),
            |member, _, queue| assert!(member.take(queue, 1, 1).is_none()),
            |member, _, queue| {
                assert!(member.take_piece(queue, Pieces::at_least(1, 1), 1).is_none());
            },
        ];
        for attempt in uses {
            let team = Team::new(&pool);
            let mut buffer = Buffer::<f32>::zeros(ROWS, WIDTH).unwrap();
            let shared = buffer.lend(&team, ROWS, WIDTH);
            let queue = Queue::default();
            let refused = AtomicU32::new(0);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                run(&pool, team, |member| {
                    assert_ne!(member.index(), 1, "one of three");
                    assert_eq!(member.next_phase(), Err(Poisoned));
                    let used = AssertUnwindSafe(|| attempt(member, &shared, &queue));
                    refused.fetch_add(u32::from(catch_unwind(used).is_err()), SeqCst);
                    assert_eq!(member.next_phase(), Err(Poisoned), "for good");
                    Err(Poisoned)
                });
            }));
            assert!(outcome.is_err());
            assert_eq!(refused.into_inner(), 2);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_nobody_hangs() {
        assert!(panics(|member, _| {
            member.next_phase()?;
            assert_ne!(member.index(), 1, "one of three");
            member.next_phase()?;
            member.next_phase()
        }));
    }

    #[test]
    fn too_much_memory_is_an_error() {
        for rows in [1 << 46, usize::MAX / 4, usize::MAX] {
            assert!(Buffer::<f32>::zeros(rows, 1).is_err());
            assert!(Buffer::<u16>::zeros(2, rows).is_err());
            assert!(Buffer::filled(7u64, rows, 2).is_err());
            assert_eq!(zeros::<i32>(rows), Err(NoMemory));
        }
        assert_eq!(zeros::<f32>(3), Ok(vec![0.0; 3]));
        assert_eq!(zeros::<f32>(0), Ok(vec![]));
        let buffer = Buffer::filled(3u64, 2, 5).unwrap();
        assert_eq!(buffer.values(), [3; 10]);
        assert_eq!(buffer.values().as_ptr().align_offset(CACHE_LINE_BYTES), 0);
    }
}
