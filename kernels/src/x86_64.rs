//! Kernels for x86-64.

/// Leaves the function with the name of the first of the features that this CPU lacks.
macro_rules! require {
    ($($feature:tt),+) => {
        $(if !is_x86_feature_detected!($feature) {
            return Err($feature);
        })+
    };
}

pub(crate) mod amx;
pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod avxvnni;
mod vnni;
