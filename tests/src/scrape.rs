//! What a process says of itself in `/metrics`.

use std::time::Duration;

/// Everything at one moment.
#[derive(Clone, Debug)]
pub struct Scrape(String);

impl Scrape {
    /// Of the process whose HTTP server is at `address`.
    ///
    /// # Panics
    ///
    /// If it does not answer.
    pub fn of(address: &str) -> Self {
        let answer = crate::http::get(address, "/metrics").expect("metrics are served");
        assert_eq!(answer.status, 200, "{}", answer.body);
        Self(answer.body)
    }

    /// One value without labels; 0 if it is not there yet.
    ///
    /// # Panics
    ///
    /// If it is no number.
    pub fn value(&self, name: &str) -> f64 {
        let line = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().expect("a metric is a number"))
    }

    /// Upper bounds of a histogram without other labels, and how many values are not above each.
    fn buckets(&self, name: &str) -> Vec<(f64, f64)> {
        let prefix = format!("{name}_bucket{{le=\"");
        let lines = self.0.lines().filter_map(|line| line.strip_prefix(&prefix));
        let parsed = lines.filter_map(|line| {
            let (bound, count) = line.split_once("\"} ")?;
            // Rust reads `+Inf`, too.
            Some((bound.parse().ok()?, count.parse().ok()?))
        });
        parsed.collect()
    }

    /// What `share` of the values of a histogram since `before` were at most: the bound of a bucket,
    /// or between two of them by a straight line.
    pub fn quantile_since(&self, before: &Self, name: &str, share: f64) -> Duration {
        let earlier = before.buckets(name);
        let at = |index: usize| earlier.get(index).map_or(0.0, |&(_, count)| count);
        let counts = self.buckets(name).into_iter().enumerate();
        let buckets: Vec<_> =
            counts.map(|(index, (bound, count))| (bound, count - at(index))).collect();
        quantile(&buckets, share)
    }
}

fn quantile(buckets: &[(f64, f64)], share: f64) -> Duration {
    let wanted = buckets.last().map_or(0.0, |&(_, count)| count) * share;
    let (mut low, mut below) = (0.0, 0.0);
    for &(bound, count) in buckets {
        if count >= wanted && count > below {
            // Above the highest bound nobody knows more than that.
            let seconds = match bound.is_finite() {
                true => low + (bound - low) * (wanted - below) / (count - below),
                false => low,
            };
            return Duration::from_secs_f64(seconds);
        }
        (low, below) = (bound, count);
    }
    Duration::ZERO
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_within_their_buckets() {
        let scrape = |first, second| {
            let bucket = |bound, count| format!("x_bucket{{le=\"{bound}\"}} {count}\n");
            let buckets = [bucket("0.001", first), bucket("0.002", second), bucket("+Inf", second)];
            Scrape(format!("{}x_count {second}\n", buckets.concat()))
        };
        let (nothing, before, now) = (Scrape(String::new()), scrape(10, 20), scrape(20, 100));
        assert_eq!(now.value("x_count"), 100.0);
        assert_eq!(now.value("x"), 0.0);
        let micros = |before, share| now.quantile_since(before, "x", share).as_micros();
        assert_eq!([micros(&nothing, 1.0), micros(&nothing, 0.6)], [2000, 1500]);
        assert_eq!([0.0625, 0.125, 1.0].map(|share| micros(&before, share)), [500, 1000, 2000]);
        assert_eq!(micros(&now, 0.5), 0, "nothing came since");
    }
}
