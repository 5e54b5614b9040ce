//! Many workers: they move between groups and change places, as long as that helps.

use super::super::group::Care;
use super::{Grouping, Members};

/// Of so many workers at most every partition is looked at where single moves do not help.
const REGROUP_WORKERS: usize = 8;

impl Grouping<'_> {
    /// Whether enough was looked at.
    pub(super) fn is_enough(&self) -> bool {
        self.costs.work() >= self.enough_work
    }

    /// Moves workers between groups, or in and out, and has them change places, as long as that
    /// helps.
    pub(super) fn improve(&mut self, workers: &[usize], groups: &mut Vec<Members>) {
        while !self.is_enough() {
            let mut out: Members = workers
                .iter()
                .copied()
                .filter(|w| groups.iter().all(|group| !group.contains(w)))
                .collect();
            // Whoever is in no pipeline makes one more group, which is worth nothing.
            out.sort_unstable();
            let is_better = self.pass(groups, &mut out);
            groups.retain(|group| !group.is_empty());
            if !is_better && !self.regroup(groups, &mut out, Care::Coarse) {
                // What was near enough to compare many is not where they are nearly equal.
                while !self.is_enough() && self.regroup(groups, &mut out, Care::Exact) {}
                return;
            }
        }
    }

    /// Makes other groups of the workers of few of them, and of those in none: what no single move
    /// leads to. Whether it helped.
    fn regroup(&mut self, groups: &mut Vec<Members>, out: &mut Members, care: Care) -> bool {
        let mut is_better = false;
        let mut a = 0;
        while a < groups.len() {
            // The group alone and those out, then with the next that have room beside it.
            let mut b = a;
            while a < groups.len()
                && b < groups.len()
                && !self.is_enough()
                && self.costs.is_wanted()
            {
                let mut chosen = vec![a];
                let mut count = groups[a].len();
                let others = if b == a { &[] } else { &groups[b..] };
                for (c, group) in (b..).zip(others) {
                    if count + group.len() <= REGROUP_WORKERS {
                        count += group.len();
                        chosen.push(c);
                    }
                }
                b += 1;
                let mut workers: Members =
                    chosen.iter().flat_map(|&c| groups[c].iter().copied()).collect();
                workers.extend(out.iter().copied().take(REGROUP_WORKERS.saturating_sub(count)));
                workers.sort_unstable();
                if workers.len() > REGROUP_WORKERS {
                    continue;
                }
                let before: f64 =
                    chosen.iter().map(|&c| self.worth(&groups[c], care).unwrap_or(0.0)).sum();
                let pipelines = self.wanted.pipelines.map(|_| chosen.len() as u32);
                let found = self.with_pipelines(pipelines, |this| match care {
                    Care::Coarse => this.every_partition(&workers, care),
                    Care::Exact => this.every_near_partition(&workers),
                });
                let Some(found) = found else { continue };
                if self.sum(&found, care) > before * (1.0 + 1e-6) {
                    for &c in chosen.iter().rev() {
                        groups.remove(c);
                    }
                    out.retain(|w| !workers.contains(w));
                    out.extend(
                        workers
                            .iter()
                            .copied()
                            .filter(|w| found.iter().all(|group| !group.contains(w))),
                    );
                    out.sort_unstable();
                    groups.extend(found);
                    groups.sort();
                    is_better = true;
                    b = a;
                }
            }
            a += 1;
        }
        is_better
    }

    /// Tries every move and every exchange once; whether one helped.
    fn pass(&mut self, groups: &mut [Members], out: &mut Members) -> bool {
        let mut is_better = false;
        for a in 0..groups.len() {
            for b in 0..=groups.len() {
                if a == b {
                    continue;
                }
                if b == groups.len() {
                    is_better |= self.relate(&mut groups[a], out, true);
                } else if a < b {
                    let (head, tail) = groups.split_at_mut(b);
                    is_better |= self.relate(&mut head[a], &mut tail[0], false);
                }
                if self.is_enough() {
                    return is_better;
                }
            }
        }
        is_better
    }

    /// Moves and exchanges between two groups, of which the second may be that of nobody's.
    fn relate(&mut self, a: &mut Members, b: &mut Members, is_out: bool) -> bool {
        let worth = |this: &mut Self, a: &Members, b: &Members| -> Option<f64> {
            let of = |this: &mut Self, group: &Members| match group.is_empty() {
                true => this.wanted.pipelines.is_none().then_some(0.0),
                false => this.worth(group, Care::Coarse),
            };
            let second = if is_out { 0.0 } else { of(this, b)? };
            Some(of(this, a)? + second)
        };
        let Some(mut most) = worth(self, a, b) else { return false };
        let mut is_better = false;
        let mut tried = 0;
        // Places in the two lists; the end of a list stands for nobody.
        while tried < (a.len() + 1) * (b.len() + 1) {
            let (i, j) = (tried / (b.len() + 1), tried % (b.len() + 1));
            tried += 1;
            let (left, right) = (a.get(i).copied(), b.get(j).copied());
            if left.is_none() && right.is_none() {
                continue;
            }
            let (mut next_a, mut next_b) = (a.clone(), b.clone());
            next_a.retain(|&w| Some(w) != left);
            next_b.retain(|&w| Some(w) != right);
            next_a.extend(right);
            next_b.extend(left);
            next_a.sort_unstable();
            next_b.sort_unstable();
            if let Some(found) = worth(self, &next_a, &next_b)
                && found > most * (1.0 + 1e-6)
            {
                (*a, *b, most) = (next_a, next_b, found);
                is_better = true;
                tried = 0;
            }
            if self.is_enough() {
                break;
            }
        }
        is_better
    }
}
