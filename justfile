# What the gate runs, in the order that fails soonest. `./test` installs what these need.

check: fmt lint test doc

fmt:
    cargo fmt --all --check

lint:
    cargo clippy --workspace --all-targets -- --deny warnings

# The program first: tests start it as a process.
test:
    cargo build --workspace
    cargo test --workspace

doc:
    RUSTDOCFLAGS="--deny warnings" cargo doc --workspace --no-deps
