//! What happens when a mapped file is cut short, or its disk fails, while it is read: the process ends, and says why.
//!
//! Reading a page that the file no longer has raises SIGBUS, whose default is to die without a word.
//! The handler looks the address up among the maps of this process, writes one sentence that names
//! the file to standard error, and ends the process with exit code 1. It runs inside a signal: it reads
//! atomics and makes two system calls, nothing else. A SIGBUS of another cause is left to whoever
//! handled it before.
#![expect(unsafe_code, reason = "a signal handler")]

use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};

/// Maps that can be named at a time: the layers of several of the largest models. Those beyond end
/// the process with the sentence, but without their name.
const MAPS_MAX: usize = 4096;

/// Exit code of a process that failed, as everywhere.
const FAILED: i32 = 1;

/// A slot that is being filled: no address is as large.
const CLAIMED: usize = usize::MAX;

const BEFORE: &[u8] = b"error: the mapped file ";
const AFTER: &[u8] = b" was cut short, or its disk failed, while it was in use: this process \
    ends now (replace a store or a model file by renaming, never by writing to it)\n";
const UNNAMED: &[u8] = b"(one of many)";

/// One map: its addresses, and the bytes of its path. `start` is 0 while the slot is free.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    path: AtomicPtr<u8>,
    path_len: AtomicUsize,
}

impl Slot {
    const fn new() -> Self {
        Self {
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            path: AtomicPtr::new(std::ptr::null_mut()),
            path_len: AtomicUsize::new(0),
        }
    }
}

static SLOTS: [Slot; MAPS_MAX] = [const { Slot::new() }; MAPS_MAX];
/// Maps that found no slot and are still there.
static UNNAMED_MAPS: AtomicUsize = AtomicUsize::new(0);
static PREVIOUS: OnceLock<SigAction> = OnceLock::new();

/// The name of a map, known to the handler until this is dropped.
#[derive(Debug)]
pub(crate) struct Named {
    /// `None` if every slot was taken.
    slot: Option<usize>,
    /// What the slot points to.
    _path: Box<[u8]>,
}

impl Named {
    /// Makes a map known under the path of its file. The first call installs the handler.
    pub(crate) fn new(map: &[u8], path: &Path) -> Self {
        install();
        let path: Box<[u8]> = path.as_os_str().as_bytes().into();
        let Range { start, end } = map.as_ptr_range();
        let claim = |slot: &&Slot| {
            let claimed =
                slot.start.compare_exchange(0, CLAIMED, Ordering::Acquire, Ordering::Relaxed);
            claimed.is_ok()
        };
        let slot = SLOTS.iter().position(|slot| claim(&slot));
        match slot {
            Some(at) => {
                let slot = &SLOTS[at];
                slot.path.store(path.as_ptr().cast_mut(), Ordering::Relaxed);
                slot.path_len.store(path.len(), Ordering::Relaxed);
                slot.end.store(end as usize, Ordering::Relaxed);
                slot.start.store(start as usize, Ordering::Release);
            }
            None => {
                UNNAMED_MAPS.fetch_add(1, Ordering::Relaxed);
            }
        }
        Self { slot, _path: path }
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        match self.slot {
            Some(at) => SLOTS[at].start.store(0, Ordering::Release),
            None => {
                UNNAMED_MAPS.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

fn install() {
    PREVIOUS.get_or_init(|| {
        let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
        let action = SigAction::new(SigHandler::SigAction(on_sigbus), flags, SigSet::empty());
        // SAFETY: the handler does only what may be done inside a signal: see there.
        let previous = unsafe { sigaction(Signal::SIGBUS, &action) };
        // It is refused for signals that cannot be caught alone; then all is as it was.
        previous.unwrap_or_else(|_| {
            SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty())
        })
    });
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: a handler with SA_SIGINFO is given a valid description of its signal.
    let info = unsafe { &*info };
    // A signal that was sent, by kill(2), is about no address.
    let address = match info.si_code > 0 {
        // SAFETY: the kernel raised SIGBUS for an access, so the address is there.
        true => Some(unsafe { info.si_addr() } as usize),
        false => None,
    };
    if let Some(path) = address.and_then(path_of) {
        for text in [BEFORE, path, AFTER] {
            write_to_stderr(text);
        }
        // SAFETY: ends the process at once, as may be done inside a signal.
        unsafe { libc::_exit(FAILED) }
    }
    // Not ours: whoever was there before us decides, when the access is repeated.
    if let Some(previous) = PREVIOUS.get() {
        // SAFETY: puts back what was in force before.
        let _ = unsafe { sigaction(Signal::SIGBUS, previous) };
    }
    if address.is_none() {
        let _ = raise(Signal::SIGBUS);
    }
}

/// The path of the map that an address lies in.
fn path_of(address: usize) -> Option<&'static [u8]> {
    for slot in &SLOTS {
        let start = slot.start.load(Ordering::Acquire);
        if start == 0 || start == CLAIMED || address < start {
            continue;
        }
        if address < slot.end.load(Ordering::Relaxed) {
            let path = slot.path.load(Ordering::Relaxed);
            let len = slot.path_len.load(Ordering::Relaxed);
            // SAFETY: the map is being read, so its `Named`, which lives as long, still owns the
            // bytes; the process ends before that changes.
            return Some(unsafe { std::slice::from_raw_parts(path, len) });
        }
    }
    (UNNAMED_MAPS.load(Ordering::Relaxed) > 0).then_some(UNNAMED)
}

fn write_to_stderr(text: &[u8]) {
    // SAFETY: the pointer and the length are those of `text`. What cannot be written is not.
    let _ = unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_known_as_long_as_they_are_there() {
        let bytes = vec![0u8; 4096];
        let inside = bytes.as_ptr() as usize + 17;
        let named = Named::new(&bytes, Path::new("/models/layer"));
        assert_eq!(path_of(inside), Some(&b"/models/layer"[..]));
        assert_ne!(path_of(bytes.as_ptr_range().end as usize), Some(&b"/models/layer"[..]));
        drop(named);
        assert_eq!(path_of(inside), None);
    }
}
