//! What one rendering may use: work, time and memory, each paid for before it is used.

use std::cell::Cell;
use std::ops::Deref;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::Failure;

/// Units of work of one rendering. A unit is one step of the program, one value looked at or
/// [`UNIT_BYTES`] of text read or written: 10 to 100 ns. A conversation of 10,000 turns through
/// the longest known template takes 3,000,000.
const WORK: u64 = 10_000_000;

/// Bytes of text that one unit of work pays for: a cache line.
const UNIT_BYTES: usize = 64;

/// Units between two looks at the clock: a look costs as much as a unit or two.
const UNITS_PER_LOOK: u64 = 1024;

/// Bytes that the values and texts of one rendering may hold at once, the conversation among
/// them: eight of the longest requests. Lists that grow
/// take as much again for a moment.
const LIVE_BYTES: usize = 32 << 20;

/// Bytes of one text, the rendered one among them: twice the longest request.
pub(super) const MAX_TEXT_BYTES: usize = 2 * proto::limits::CLIENT_MESSAGE_BYTES;

/// Counts what one rendering uses.
#[derive(Debug)]
pub(crate) struct Meter {
    work_left: Cell<u64>,
    live_bytes: Cell<usize>,
    until: Option<Instant>,
}

impl Meter {
    /// A meter for a rendering that begins now; `time` bounds it by the clock too.
    pub(crate) fn new(time: Option<Duration>) -> Rc<Self> {
        let until = time.map(|time| Instant::now() + time);
        Rc::new(Self { work_left: Cell::new(WORK), live_bytes: Cell::new(0), until })
    }

    /// Pays for `units` of work.
    pub(super) fn spend(&self, units: usize) -> Result<(), Failure> {
        let before = self.work_left.get();
        let Some(left) = before.checked_sub(units as u64) else {
            self.work_left.set(0);
            return Err(Failure::Limit(format!("it took more than {WORK} steps")));
        };
        self.work_left.set(left);
        let looks = before / UNITS_PER_LOOK != left / UNITS_PER_LOOK;
        if looks && self.until.is_some_and(|until| Instant::now() >= until) {
            return Err(Failure::Limit("it took too long".into()));
        }
        Ok(())
    }

    /// Pays for reading or writing `bytes` of text.
    pub(super) fn scan(&self, bytes: usize) -> Result<(), Failure> {
        self.spend(1 + bytes / UNIT_BYTES)
    }

    /// Pays for looking for `name` among `names`: those of its length are compared.
    pub(super) fn look_up<'n>(
        &self,
        name: &str,
        names: impl Iterator<Item = &'n str>,
    ) -> Result<(), Failure> {
        let (mut count, mut bytes) = (0, 0_usize);
        for other in names {
            count += 1;
            bytes += if other.len() == name.len() { name.len() } else { 0 };
        }
        self.spend(count)?;
        self.scan(bytes)
    }

    /// Takes memory; [`Meter::give_back`] returns it.
    fn take(&self, bytes: usize) -> Result<(), Failure> {
        let live = self.live_bytes.get().saturating_add(bytes);
        if live > LIVE_BYTES {
            return Err(Failure::Limit(format!("it held more than {LIVE_BYTES} bytes")));
        }
        self.live_bytes.set(live);
        Ok(())
    }

    /// Checks that there is memory for `bytes` that are taken for a moment.
    pub(super) fn room(&self, bytes: usize) -> Result<(), Failure> {
        self.take(bytes)?;
        self.give_back(bytes);
        Ok(())
    }

    fn give_back(&self, bytes: usize) {
        self.live_bytes.set(self.live_bytes.get().saturating_sub(bytes));
    }
}

/// A value whose memory was paid for and is given back with it.
#[derive(Debug)]
pub(super) struct Held<T> {
    inner: T,
    bytes: usize,
    meter: Rc<Meter>,
}

/// What a shared allocation and its book-keeping take beside the value's own parts.
const BLOCK_BYTES: usize = 64;

impl<T> Held<T> {
    /// Shares `inner`, whose parts outside itself have `bytes`.
    pub(super) fn share(meter: &Rc<Meter>, bytes: usize, inner: T) -> Result<Rc<Self>, Failure> {
        let bytes = bytes.saturating_add(size_of::<T>() + BLOCK_BYTES);
        meter.take(bytes)?;
        Ok(Rc::new(Self { inner, bytes, meter: Rc::clone(meter) }))
    }
}

impl<T> Deref for Held<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> Drop for Held<T> {
    fn drop(&mut self) {
        self.meter.give_back(self.bytes);
    }
}

/// A text that grows, paid for as it does.
#[derive(Debug)]
pub(super) struct Writer {
    text: String,
    taken: usize,
    meter: Rc<Meter>,
}

impl Writer {
    pub(super) fn new(meter: &Rc<Meter>) -> Self {
        Self { text: String::new(), taken: 0, meter: Rc::clone(meter) }
    }

    pub(super) fn meter(&self) -> &Rc<Meter> {
        &self.meter
    }

    /// Makes room for `bytes` more and pays for writing them.
    fn grow(&mut self, bytes: usize) -> Result<(), Failure> {
        self.meter.scan(bytes)?;
        let needed = self.text.len().saturating_add(bytes);
        if needed > MAX_TEXT_BYTES {
            return Err(Failure::Limit(format!("a text had more than {MAX_TEXT_BYTES} bytes")));
        }
        if needed > self.taken {
            let wanted = needed.max(self.taken * 2).max(64);
            self.meter.take(wanted - self.taken)?;
            self.taken = wanted;
            self.text.reserve_exact(wanted - self.text.len());
        }
        Ok(())
    }

    pub(super) fn push_str(&mut self, text: &str) -> Result<(), Failure> {
        self.grow(text.len())?;
        self.text.push_str(text);
        Ok(())
    }

    pub(super) fn push(&mut self, character: char) -> Result<(), Failure> {
        self.push_str(character.encode_utf8(&mut [0; 4]))
    }

    /// Writes `text` `times` over.
    pub(super) fn repeat(&mut self, text: &str, times: usize) -> Result<(), Failure> {
        self.grow(text.len().saturating_mul(times))?;
        for _ in 0..times {
            self.text.push_str(text);
        }
        Ok(())
    }

    /// What was written.
    pub(super) fn finish(mut self) -> String {
        let mut text = std::mem::take(&mut self.text);
        text.shrink_to_fit();
        text
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.meter.give_back(self.taken);
    }
}
