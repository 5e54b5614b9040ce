//! The definition of every operation: slow, obvious, believed. Other backends equal it bit for bit.

pub(crate) mod attention;
pub(crate) mod elementwise;
pub(crate) mod fused;
pub(crate) mod half;
pub(crate) mod noise;
pub(crate) mod probe;
pub(crate) mod products;
pub(crate) mod quantise;
pub(crate) mod reduce;
pub(crate) mod screen;
pub(crate) mod sparse;
pub(crate) mod transcendental;
pub(crate) mod trigonometry;
