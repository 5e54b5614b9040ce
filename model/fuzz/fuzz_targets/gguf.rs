//! Any bytes as a GGUF file: tables, config, tokenizer, every row. Must never panic.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = model::import::check_gguf(bytes);
});
