//! Workers over real sockets with the real engine on a tiny random model.

mod control;
pub(crate) mod harness;
mod history;
mod lifecycle;
mod pipeline;
mod refusals;
mod strangers;
mod weights;
