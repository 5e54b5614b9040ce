//! The `tercet` binary.
fn main() {}
