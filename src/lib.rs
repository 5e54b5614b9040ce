//! The root package: picks the role and wires the rooms. No decisions, no arithmetic.
