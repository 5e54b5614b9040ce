//! [`crate::scalar::noise::noise`] in vectors of this CPU, which the compiler finds.

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn noise(key: u64, first: u32, out: &mut [f32]) {
    crate::scalar::noise::noise(key, first, out);
}
