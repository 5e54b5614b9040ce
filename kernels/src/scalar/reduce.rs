//! The 16-lane rule, the one way in which floats are summed, and what is made of nothing else.

/// Lanes of the rule: one AVX-512 register, two AVX2 registers, four NEON registers.
pub(crate) const LANES: usize = 16;

/// The sum of `a * b` over `terms` by the 16-lane rule: term `i` goes to lane `i % 16` by a fused
/// multiply-add, in ascending order from +0; then lanes `i` and `i + 8` are added, then +4, +2, +1.
#[inline(always)]
pub(crate) fn sum_of_products(terms: impl Iterator<Item = (f32, f32)>) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for (i, (a, b)) in terms.enumerate() {
        let lane = &mut lanes[i % LANES];
        *lane = a.mul_add(b, *lane);
    }
    fold_lanes(lanes)
}

/// Adds `a[i] * b[i]` to lane `i % 16` by a fused multiply-add, in ascending order.
#[inline(always)]
pub(crate) fn add_products(lanes: &mut [f32; LANES], a: &[f32], b: &[f32]) {
    let add = |lanes: &mut [f32; LANES], a: &[f32], b: &[f32]| {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane = a.mul_add(*b, *lane);
        }
    };
    let (a_rounds, a_tail) = a.as_chunks::<LANES>();
    let (b_rounds, b_tail) = b.as_chunks::<LANES>();
    for (a, b) in a_rounds.iter().zip(b_rounds) {
        add(lanes, a, b);
    }
    add(lanes, a_tail, b_tail);
}

/// Adds lanes `i` and `i + 8`, then +4, +2, +1.
pub(crate) fn fold_lanes(mut lanes: [f32; LANES]) -> f32 {
    for distance in [8, 4, 2, 1] {
        for i in 0..distance {
            lanes[i] += lanes[i + distance];
        }
    }
    lanes[0]
}

#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    add_products(&mut lanes, a, b);
    fold_lanes(lanes)
}

#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    sum_of_products(x.iter().map(|x| (*x, 1.0)))
}

/// Columns whose squares are summed together in a norm: a block has a sum of its own, so that threads,
/// or machines, may share the sums of one norm.
pub(crate) const NORM_BLOCK: usize = 256;

/// 1 / sqrt(mean of squares + eps), where `dot` is the 16-lane rule: the sums of blocks are added in
/// ascending order.
#[inline(always)]
pub(crate) fn inverse_rms(x: &[f32], eps: f32, dot: impl Fn(&[f32], &[f32]) -> f32) -> f32 {
    let squares = x.chunks(NORM_BLOCK).fold(0.0, |sum, block| sum + dot(block, block));
    1.0 / (squares / x.len() as f32 + eps).sqrt()
}

pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let r = inverse_rms(x, eps, dot);
    for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
        *y = (x * r) * weight;
    }
}
