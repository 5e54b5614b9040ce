//! Random numbers that are functions of their place, and the tables that shape them.

/// Trits from one draw of 32 bits: 3^5 of 2^32 values each, even to one part in ten million.
pub(super) const TRITS_PER_DRAW: usize = 5;
/// 3^5.
pub(super) const QUINTETS: usize = 243;
/// Entries of the table of normal quantiles, each equally likely.
const QUANTILES: usize = 1 << 16;

/// Numbers of one row: the n-th is a function of stream, row and n (SplitMix64).
pub(super) struct Draws(u64);

impl Draws {
    pub(super) fn of_row(stream: u64, row: usize) -> Self {
        Self(mix(stream ^ mix(row as u64)))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }
}

/// 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
/// generators", 2014).
pub(super) fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Every combination of five trits.
pub(super) fn quintets() -> Vec<[i8; TRITS_PER_DRAW]> {
    (0..QUINTETS)
        .map(|mut number| {
            std::array::from_fn(|_| {
                let trit = (number % 3) as i8 - 1;
                number /= 3;
                trit
            })
        })
        .collect()
}

/// The middles of 65,536 equally likely slices of a normal distribution, as bf16.
pub(super) fn normal_quantiles(deviation: f64) -> Vec<u16> {
    (0..QUANTILES)
        .map(|slice| {
            let value = deviation * normal_quantile((slice as f64 + 0.5) / QUANTILES as f64);
            half::bf16::from_f64(value).to_bits()
        })
        .collect()
}

/// Inverse of the normal distribution function, for `0 < p < 1`, to about 1e-9.
///
/// P. J. Acklam, "An algorithm for computing the inverse normal cumulative distribution function".
fn normal_quantile(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969683028665376e1,
        2.209460984245205e2,
        -2.759285104469687e2,
        1.38357751867269e2,
        -3.066479806614716e1,
        2.506628277459239,
    ];
    const B: [f64; 6] = [
        -5.447609879822406e1,
        1.615858368580409e2,
        -1.556989798598866e2,
        6.680131188771972e1,
        -1.328068155288572e1,
        1.0,
    ];
    const C: [f64; 6] = [
        -7.784894002430293e-3,
        -3.223964580411365e-1,
        -2.400758277161838,
        -2.549732539343734,
        4.374664141464968,
        2.938163982698783,
    ];
    const D: [f64; 5] =
        [7.784695709041462e-3, 3.224671290700398e-1, 2.445134137142996, 3.754408661907416, 1.0];
    /// Where the tails begin.
    const TAIL: f64 = 0.02425;
    let polynomial = |terms: &[f64], x: f64| terms.iter().fold(0.0, |sum, term| sum * x + term);
    if p > 0.5 {
        return -normal_quantile(1.0 - p);
    }
    if p < TAIL {
        let q = (-2.0 * p.ln()).sqrt();
        return polynomial(&C, q) / polynomial(&D, q);
    }
    let q = p - 0.5;
    let r = q * q;
    q * polynomial(&A, r) / polynomial(&B, r)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (p, expected) in [(0.5, 0.0), (0.975, 1.959964), (0.001, -3.090232)] {
            assert!((normal_quantile(p) - expected).abs() < 1e-6, "{p}");
        }
    }

    #[test]
    fn quintets_are_all_different() {
        let distinct: std::collections::BTreeSet<_> = quintets().into_iter().collect();
        assert_eq!(distinct.len(), QUINTETS);
        assert!(distinct.iter().flatten().all(|trit| (-1..=1).contains(trit)));
    }
}
