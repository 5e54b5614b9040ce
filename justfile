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

# Measures an engine on this machine and keeps the record: `just record amd-epyc-zen3-2c`.
record cpu:
    cargo build --release
    target/release/tercet bench engine --model synth:2b4t --json \
        > kernels/benches/record/{{cpu}}/$(date +%F)-$(git rev-parse --short HEAD).json
