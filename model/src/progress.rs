//! How far long work has come; whoever shows it decides how.

/// One report: `what` is being worked on, after `done` of `total` parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The part that is being worked on; at the end, what is done.
    pub what: &'a str,
    /// Parts that are finished.
    pub done: u64,
    /// Parts in all.
    pub total: u64,
}
