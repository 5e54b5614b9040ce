//! Between which bounds a time may be set: one home for every role, so that one cannot be given what
//! another refuses.

use super::Duration;

/// A time that is set to something that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} must be from {least} to {most}, found {found}")]
pub struct TimeRangeError {
    /// The key.
    pub key: &'static str,
    /// What was given.
    pub found: Duration,
    /// The least.
    pub least: Duration,
    /// The most.
    pub most: Duration,
}

/// What a time may be set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeRange {
    least: Duration,
    most: Duration,
}

/// The longest that anybody waits, or that anything is put off: whoever means "for ever" means less.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

impl TimeRange {
    /// How long something is put off, if at all.
    pub const PAUSE: Self = Self { least: Duration::from_secs(0), most: LONGEST };
    /// How long a stopping process goes on: answers may take hours, and one that does not end in a day was
    /// forgotten.
    pub const STOP: Self =
        Self { least: Duration::from_secs(0), most: Duration::from_secs(24 * 60 * 60) };
    /// How long a speed must have changed. For a worker a twelfth of it is a window, and several steps of a
    /// model of ordinary size must fit into that; a coordinator hears of a change after that, and what
    /// counts sooner there than here would replan for what nobody has measured.
    pub const DRIFT: Self = Self { least: Duration::from_secs(1), most: LONGEST };
    /// Until when something that goes over a network must be done: in less nothing is.
    pub const DEADLINE: Self = Self { least: Duration::from_millis(10), most: LONGEST };
    /// How long a token may take: no machine computes one in less.
    pub const TOKEN: Self =
        Self { least: Duration(std::time::Duration::from_micros(1)), most: LONGEST };

    /// Whether `found` may be the value of `key`.
    ///
    /// # Errors
    ///
    /// [`TimeRangeError`] if not.
    pub fn check(self, key: &'static str, found: Duration) -> Result<(), TimeRangeError> {
        let Self { least, most } = self;
        match (least..=most).contains(&found) {
            true => Ok(()),
            false => Err(TimeRangeError { key, found, least, most }),
        }
    }
}
