//! What a worker measured for steps of some numbers of rows, and what that says of others.

use serde::{Deserialize, Serialize};

/// Least times for a step of so many rows: of one layer, and of final norm and head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StepTime {
    /// Rows of the step.
    pub rows: u32,
    /// One layer, in nanoseconds.
    pub layer_ns: u64,
    /// Final norm and head with greedy sampling, in nanoseconds.
    pub head_ns: u64,
}

/// The time at `rows` rows: measured, or on the line through the two nearest measured points.
/// Outside of what was measured more rows never take less time. `None` if nothing was measured.
pub(super) fn at(steps: &[StepTime], rows: u32, time: impl Fn(&StepTime) -> u64) -> Option<u64> {
    let measured = || steps.iter().filter(|step| step.rows > 0);
    // The nearest point on each side: in any order, for they may be somebody else's.
    let below = |rows| measured().filter(|s| s.rows <= rows).max_by_key(|s| s.rows);
    let above = |rows| measured().filter(|s| s.rows > rows).min_by_key(|s| s.rows);
    let (a, b) = match (below(rows), above(rows)) {
        (None, None) => return None,
        (Some(a), Some(b)) => (a, b),
        (Some(last), None) => match below(last.rows - 1) {
            Some(before) => (before, last),
            // A row costs no more in company than alone.
            None => {
                let of_all = u128::from(time(last)) * u128::from(rows);
                return Some(saturated(of_all.div_ceil(u128::from(last.rows))));
            }
        },
        (None, Some(first)) => match above(first.rows) {
            Some(after) => (first, after),
            None => return Some(time(first)),
        },
    };
    let is_between = a.rows <= rows && rows <= b.rows;
    let (from, to) = (i128::from(time(a)), i128::from(time(b)));
    let rise = if is_between { to - from } else { (to - from).max(0) };
    // What is measured is answered exactly; beyond the last point the line begins there.
    let (start, at_rows) = if rows > b.rows { (to, b.rows) } else { (from, a.rows) };
    let steps_away = i128::from(rows) - i128::from(at_rows);
    let time = start + rise * steps_away / i128::from(b.rows - a.rows);
    Some(saturated(time.max(0).unsigned_abs()))
}

fn saturated(time: u128) -> u64 {
    u64::try_from(time).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn points(times: &[(u32, u64)]) -> Vec<StepTime> {
        times.iter().map(|&(rows, layer_ns)| StepTime { rows, layer_ns, head_ns: 0 }).collect()
    }

    fn layer_ns(times: &[(u32, u64)], rows: u32) -> Option<u64> {
        at(&points(times), rows, |step| step.layer_ns)
    }

    #[test]
    fn between_and_beyond_measured_points_it_is_a_line() {
        let times = [(16, 400), (1, 100), (4, 160)];
        for (rows, ns) in [(1, 100), (2, 120), (4, 160), (10, 280), (16, 400), (64, 1360)] {
            assert_eq!(layer_ns(&times, rows), Some(ns), "{rows} rows");
        }
        assert_eq!(layer_ns(&[(4, 160), (16, 400)], 1), Some(100));
        assert_eq!(layer_ns(&[(4, 10), (16, 400)], 1), Some(0), "never below nothing");
    }

    #[test]
    fn few_and_odd_points_give_an_upper_bound() {
        assert_eq!(layer_ns(&[], 1), None);
        assert_eq!(layer_ns(&[(0, 7)], 1), None, "no step has no rows");
        assert_eq!(layer_ns(&[(4, 100)], 1), Some(100));
        assert_eq!(layer_ns(&[(4, 100)], 16), Some(400));
        assert_eq!(layer_ns(&[(1, 100), (4, 90)], 64), Some(90), "more rows never take less");
        assert_eq!(layer_ns(&[(1, 0), (2, u64::MAX)], u32::MAX), Some(u64::MAX));
    }

    proptest! {
        #[test]
        fn measured_points_are_kept_and_the_rest_lies_beside_them(
            times in prop::collection::btree_map(1..u32::MAX, any::<u64>(), 1..6),
            rows: u32,
        ) {
            let times: Vec<_> = times.into_iter().collect();
            for &(rows, ns) in &times {
                prop_assert_eq!(layer_ns(&times, rows), Some(ns));
            }
            let found = layer_ns(&times, rows).unwrap();
            let after = times.iter().position(|&(at, _)| at > rows);
            match after {
                Some(0) => prop_assert!(found <= times[0].1),
                Some(after) => {
                    let (a, b) = (times[after - 1].1, times[after].1);
                    prop_assert!((a.min(b)..=a.max(b)).contains(&found));
                }
                None => prop_assert!(found >= times[times.len() - 1].1),
            }
        }
    }
}
