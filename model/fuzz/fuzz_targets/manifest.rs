//! Any bytes as a store's manifest. Must never panic; what is accepted must be valid.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(manifest) = model::Manifest::parse(bytes) {
        assert!(manifest.config.validate().is_ok());
        assert!(manifest.file_names().iter().all(|name| !name.contains(['/', '\\'])));
    }
});
