//! Arithmetic on slices: ternary products, norms, RoPE, attention, quantisers, own elementary functions.
