//! The engine from outside: exactness, refusals, and the logits of the reference implementation.

mod exact;
mod failures;
mod pipeline;
mod results;
