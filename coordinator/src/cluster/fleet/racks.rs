//! Racks of the workers whose rack nobody says: those stand together that measured short round trips
//! between them. What is near is said by the planner's own costs of a hop.
//!
//! A pair is near if its round trip, the lesser of what either measured, is at most [`MARGIN_US`] more
//! than the least of any pair of machines in the fleet, and so is whoever is near to one of a rack. Two
//! racks of which no pair was measured are one, as all are before anybody has measured.

use std::collections::{BTreeMap, BTreeSet};

use proto::plan::WorkerRecord;

use crate::planner::{HOP_OTHER_RACK_NS, HOP_SAME_RACK_NS};

/// A round trip that is longer than the shortest by so much, in microseconds, is one between racks: each
/// of its two ways takes as much longer as the planner counts for that.
const MARGIN_US: u32 = 2 * ((HOP_OTHER_RACK_NS - HOP_SAME_RACK_NS) / 1000) as u32;

/// Those of a rack stay together up to this margin, in microseconds, and come together at
/// [`MARGIN_US`] only: a network that is as far as that now and then makes no plans.
const APART_US: u32 = MARGIN_US + MARGIN_US / 2;

/// Begins the name of a rack that nobody named. No label does: a label has letters, digits, dots,
/// dashes and underscores.
const MARK: char = '~';

/// Where the workers stand that do not say so.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Racks {
    places: BTreeMap<String, Place>,
    /// There is more than one rack of them.
    is_split: bool,
}

/// Where one of them stands.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    /// The least id of its rack.
    rack: String,
    /// By a figure, and not because there is none.
    is_measured: bool,
}

impl Racks {
    /// Where the worker of this record stands, for the planner and for people; empty: unknown.
    pub(super) fn of(&self, record: &WorkerRecord) -> String {
        if let Some(label) = label(record) {
            return label.to_owned();
        }
        match self.places.get(&record.id) {
            Some(place) if self.is_split => format!("{MARK}{}", place.rack),
            _ => String::new(),
        }
    }

    /// Looks again where the workers stand, of whom each has one record. Whether any of them stands in
    /// another rack than before, and how many figures, and pairs of racks, were looked at.
    pub(super) fn infer<'a>(
        &mut self,
        records: impl Iterator<Item = &'a WorkerRecord>,
    ) -> (bool, usize) {
        let mut workers: Vec<_> = records.collect();
        workers.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        let (pairs, mut work) = measured_pairs(&workers);
        let least_us = pairs.values().copied().min().unwrap_or(0);
        let is_free = |worker: usize| label(workers[worker]).is_none();
        let mut groups = Groups((0..workers.len()).collect());
        // A machine stands in one place, whatever its workers measured.
        let mut machines = BTreeMap::new();
        for worker in (0..workers.len()).filter(|&worker| is_free(worker)) {
            let machine = &workers[worker].machine;
            if !machine.is_empty() {
                groups.join(worker, *machines.entry(machine).or_insert(worker));
            }
        }
        let mut measured = BTreeSet::new();
        let mut far = Vec::new();
        for ((a, b), us) in pairs.into_iter().filter(|((a, b), _)| is_free(*a) && is_free(*b)) {
            measured.extend([a, b]);
            let stand_together = self.stand_together(&workers[a].id, &workers[b].id);
            let margin_us = if stand_together { APART_US } else { MARGIN_US };
            match us - least_us <= margin_us {
                true => groups.join(a, b),
                false => far.push((a, b)),
            }
        }
        let free = (0..workers.len()).filter(|&worker| is_free(worker));
        let heads: BTreeSet<_> = free.map(|worker| groups.find(worker)).collect();
        let (count, compared) = groups.join_unmeasured(&heads, &far);
        work += compared;
        let places = (0..workers.len())
            .filter(|&worker| is_free(worker))
            .map(|worker| {
                let rack = workers[groups.find(worker)].id.clone();
                let place = Place { rack, is_measured: measured.contains(&worker) };
                (workers[worker].id.clone(), place)
            })
            .collect();
        let before = std::mem::replace(self, Self { places, is_split: count > 1 });
        (!self.is_as(&before), work)
    }

    /// Whether everybody is told the same rack.
    fn is_as(&self, before: &Self) -> bool {
        let told = |racks: &Self| racks.is_split.then_some(racks.places.len());
        let same = |(id, place): (&String, &Place)| {
            before.places.get(id).is_some_and(|before| before.rack == place.rack)
        };
        told(self) == told(before) && (!self.is_split || self.places.iter().all(same))
    }

    /// Whether these two were found to be of one rack before, each by a figure.
    fn stand_together(&self, a: &str, b: &str) -> bool {
        match (self.places.get(a), self.places.get(b)) {
            (Some(a), Some(b)) => a.is_measured && b.is_measured && a.rack == b.rack,
            _ => false,
        }
    }
}

/// Whether two records of one worker say the same of where it stands.
pub(super) fn stands_equally(one: &WorkerRecord, other: &WorkerRecord) -> bool {
    one.rack == other.rack
        && one.machine == other.machine
        && one.round_trips_us == other.round_trips_us
}

/// What a person says of where it stands.
fn label(record: &WorkerRecord) -> Option<&str> {
    Some(record.rack.as_str()).filter(|rack| !rack.is_empty() && !rack.starts_with(MARK))
}

/// The lesser of both figures of each pair of workers on two machines, by their indices, and how many
/// figures there are.
fn measured_pairs(workers: &[&WorkerRecord]) -> (BTreeMap<(usize, usize), u32>, usize) {
    let mut pairs = BTreeMap::new();
    let mut work = 0;
    for (from, worker) in workers.iter().enumerate() {
        for (id, &us) in &worker.round_trips_us {
            work += 1;
            let found = workers.binary_search_by(|other| other.id.as_str().cmp(id));
            let Some(to) = found.ok().filter(|&to| to != from) else { continue };
            if worker.machine.is_empty() || worker.machine != workers[to].machine {
                let least = pairs.entry((from.min(to), from.max(to))).or_insert(us);
                *least = us.min(*least);
            }
        }
    }
    (pairs, work)
}

/// Things that are joined one by one: each names another of its group, the least names itself.
struct Groups(Vec<usize>);

impl Groups {
    /// The least of its group.
    fn find(&mut self, mut thing: usize) -> usize {
        while self.0[thing] != thing {
            self.0[thing] = self.0[self.0[thing]];
            thing = self.0[thing];
        }
        thing
    }

    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.find(a), self.find(b));
        self.0[a.max(b)] = a.min(b);
    }

    /// Joins the groups of these heads of which nobody knows how far they are from each other: each goes
    /// to the first that it can be one with. How many are left, and how many pairs were compared.
    fn join_unmeasured(
        &mut self,
        heads: &BTreeSet<usize>,
        far: &[(usize, usize)],
    ) -> (usize, usize) {
        let far = far.iter().map(|&(a, b)| (self.find(a), self.find(b)));
        let apart: BTreeSet<_> = far.flat_map(|(a, b)| [(a, b), (b, a)]).collect();
        let mut compared = 0;
        let mut joined: Vec<Vec<usize>> = Vec::new();
        for &head in heads {
            let fits = |group: &Vec<usize>| {
                group.iter().all(|&other| {
                    compared += 1;
                    !apart.contains(&(head, other))
                })
            };
            match joined.iter().position(fits) {
                Some(group) => {
                    self.join(head, joined[group][0]);
                    joined[group].push(head);
                }
                None => joined.push(vec![head]),
            }
        }
        (joined.len(), compared)
    }
}

#[cfg(test)]
mod tests;
