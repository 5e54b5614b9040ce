//! The engine from outside: exactness, refusals, and the logits of the reference implementation.
#![expect(clippy::unwrap_used, reason = "everything here is a test or helps one")]

mod bundled;
mod draws;
mod exact;
mod failures;
mod fixtures;
mod pipeline;
mod profile;
mod results;
mod screened;
mod zeros;
