//! Any bytes as a safetensors file of a small BitNet model. Must never panic.
#![no_main]

const CONFIG: &[u8] = br#"{
    "model_type": "bitnet", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_act": "relu2",
    "max_position_embeddings": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"}
}"#;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = model::safetensors::Table::parse(bytes);
    let _ = model::import::check_safetensors(CONFIG, bytes);
    // And as a config, beside a file that is no model.
    let _ = model::import::check_safetensors(bytes, &[]);
});
