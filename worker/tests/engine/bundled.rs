//! The logits of the bundled model, bit for bit those that every machine computes: with every
//! backend, on x86-64 and on AArch64, where the tests run under emulation.

use kernels::Backend;
use model::import_bundled;
use proto::plan::KvType;
use worker::engine::{EngineConfig, Shortcuts};

use crate::pipeline::{Pipeline, Sequence, open, plain};

/// Two blocks of the KV cache and some more.
const TOKENS: u32 = 75;

/// BLAKE3 of the logits' bits, little-endian, after each of the tokens. They change with the
/// numerics (then `KERNEL_REVISION` rises) or with the bundled model, and with nothing else.
const DIGESTS: [(KvType, &str); 2] = [
    (KvType::F16, "f7c3795683ae72007bfa96c7c3128719ffe21d82ddede087a9436347dd4b7c5f"),
    (KvType::F32, "6c6a51520375cb674931e9794933966a0af5010dba54bc0ac49871e30cbc5230"),
];

#[test]
fn every_machine_computes_the_same_logits() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&import_bundled(dir.path()).unwrap());
    let vocab = store.config().vocab;
    let mut sequence = Sequence::new(0, TOKENS as usize);
    sequence.tokens = (0..TOKENS).map(|i| (i * 613 + 17) % vocab).collect();
    let none = Shortcuts { zeros: false, screen: false };
    for (kv_type, want) in DIGESTS {
        for backend in Backend::available() {
            for (shortcuts, threads, chunk) in [(none, 1, 75), (Shortcuts::default(), 2, 11)] {
                let config = EngineConfig { backend, kv_type, threads, shortcuts, ..plain() };
                let mut hash = blake3::Hasher::new();
                for logit in Pipeline::open(&store, 1, config).logits(&sequence, chunk) {
                    hash.update(&logit.to_le_bytes());
                }
                let found = hash.finalize().to_hex();
                let name = backend.name();
                assert_eq!(found.as_str(), want, "{name}, {kv_type}, {shortcuts:?}");
            }
        }
    }
}
