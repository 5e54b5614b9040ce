//! [`crate::scalar::noise::noise`] in vectors of this CPU, which the compiler finds: these multiply
//! 64-bit integers.

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn noise(key: u64, first: u32, out: &mut [f32]) {
    crate::scalar::noise::noise(key, first, out);
}
