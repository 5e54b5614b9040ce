//! Cores and memory nodes of this machine, and which threads sit where. Not pure: asks the system.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::{fs, io, thread};

use crate::config::cpu::siblings_of;

/// Where the kernel describes memory nodes.
const NODES: &str = "/sys/devices/system/node";

/// More cores than any machine has: a list that names one beyond is not believed.
const CORES_MAX: usize = 1 << 16;

/// The cores that this process may use, by memory node: at least one node, none without cores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Topology {
    nodes: Vec<Vec<usize>>,
    /// Those of the cores that are a further hardware thread of an earlier one.
    further: BTreeSet<usize>,
}

impl Topology {
    /// This machine's, looked at once.
    pub(crate) fn get() -> &'static Self {
        static TOPOLOGY: OnceLock<Topology> = OnceLock::new();
        TOPOLOGY.get_or_init(|| Self::new(&node_lists(Path::new(NODES)), is_allowed, siblings_of))
    }

    /// Of nodes with these lists of cores, of which those with equal `siblings` are one core's hardware
    /// threads. A machine that describes no nodes has one.
    fn new(
        lists: &[String],
        allowed: impl Fn(usize) -> bool,
        siblings: impl Fn(usize) -> Option<String>,
    ) -> Self {
        let mut nodes: Vec<Vec<usize>> = lists.iter().filter_map(|list| cores(list)).collect();
        for node in &mut nodes {
            node.retain(|core| allowed(*core));
        }
        nodes.retain(|node| !node.is_empty());
        if nodes.is_empty() {
            let count = thread::available_parallelism().map_or(1, usize::from);
            nodes.push((0..count).collect());
        }
        let mut seen = BTreeSet::new();
        let mut further = BTreeSet::new();
        for core in nodes.iter().flatten() {
            if siblings(*core).is_some_and(|siblings| !seen.insert(siblings)) {
                further.insert(*core);
            }
        }
        Self { nodes, further }
    }

    /// How many memory nodes there are.
    pub(crate) fn node_count(&self) -> usize {
        self.nodes.len()
    }
}

/// The lists of cores of all memory nodes, by number of node.
fn node_lists(folder: &Path) -> Vec<String> {
    let mut lists = BTreeMap::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("node")?.parse::<u32>().ok());
        if let Some(number) = number
            && let Ok(list) = fs::read_to_string(entry.path().join("cpulist"))
        {
            lists.insert(number, list);
        }
    }
    lists.into_values().collect()
}

/// The cores of a list such as `0-3,8,10-11`; `None` if it is no list.
fn cores(list: &str) -> Option<Vec<usize>> {
    let mut cores = BTreeSet::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= CORES_MAX {
            return None;
        }
        cores.extend(first..=last);
    }
    Some(cores.into_iter().collect())
}

/// Threads of this process that sit on a core, by core.
static SITTING: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

/// The places of an engine's threads. Cores of their own are given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Seats {
    seats: Vec<Seat>,
    are_own: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Seat {
    /// Index among the memory nodes that the seats are on.
    node: usize,
    /// Any of them; empty: wherever the system likes.
    cores: Vec<usize>,
}

impl Seats {
    /// Threads go wherever the system likes.
    pub(crate) fn anywhere(threads: usize) -> Self {
        Self { seats: vec![Seat { node: 0, cores: Vec::new() }; threads], are_own: false }
    }

    /// Every thread stays on a memory node, in turn.
    pub(crate) fn on_nodes(topology: &Topology, threads: usize) -> Self {
        let nodes = topology.nodes.iter().enumerate().cycle();
        let seat = |(node, cores): (usize, &Vec<usize>)| Seat { node, cores: cores.clone() };
        Self { seats: nodes.take(threads).map(seat).collect(), are_own: false }
    }

    /// Every thread has a core of its own: the first of those on which the fewest of this process
    /// sit already, further hardware threads of a core after all others.
    pub(crate) fn on_cores(topology: &Topology, threads: usize) -> Self {
        let mut sitting = SITTING.lock().unwrap_or_else(PoisonError::into_inner);
        let places = || {
            let nodes = topology.nodes.iter().enumerate();
            nodes.flat_map(|(node, cores)| cores.iter().map(move |core| (node, *core)))
        };
        let mut taken = Vec::with_capacity(threads);
        for _ in 0..threads {
            let least = places().min_by_key(|(_, core)| {
                (sitting.get(core).copied().unwrap_or(0), topology.further.contains(core))
            });
            let (node, core) = least.expect("a topology has a core");
            *sitting.entry(core).or_default() += 1;
            taken.push((node, core));
        }
        let nodes: BTreeSet<usize> = taken.iter().map(|(node, _)| *node).collect();
        let index = |node: usize| nodes.iter().take_while(|other| **other < node).count();
        let seat = |(node, core): (usize, usize)| Seat { node: index(node), cores: vec![core] };
        Self { seats: taken.into_iter().map(seat).collect(), are_own: true }
    }

    /// How many memory nodes the seats are on.
    pub(crate) fn node_count(&self) -> usize {
        self.seats.iter().map(|seat| seat.node + 1).max().unwrap_or(1)
    }

    /// The memory node of thread `thread`, an index below [`Self::node_count`].
    pub(crate) fn node(&self, thread: usize) -> usize {
        self.seats[thread].node
    }

    /// The first thread on memory node `node`.
    pub(crate) fn first_on(&self, node: usize) -> usize {
        self.seats.iter().position(|seat| seat.node == node).unwrap_or(0)
    }

    /// Puts the calling thread on the seat of thread `thread`.
    ///
    /// # Errors
    ///
    /// If the system does not let it.
    pub(crate) fn sit(&self, thread: usize) -> io::Result<()> {
        let cores = &self.seats[thread].cores;
        if cores.is_empty() { Ok(()) } else { stay_on(cores) }
    }
}

impl Drop for Seats {
    fn drop(&mut self) {
        if !self.are_own {
            return;
        }
        let mut sitting = SITTING.lock().unwrap_or_else(PoisonError::into_inner);
        for core in self.seats.iter().flat_map(|seat| &seat.cores) {
            if let Some(count) = sitting.get_mut(core) {
                *count -= 1;
            }
        }
    }
}

/// Whether this process may run on a core.
#[cfg(target_os = "linux")]
fn is_allowed(core: usize) -> bool {
    let set = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0));
    set.and_then(|set| set.is_set(core)).unwrap_or(true)
}

#[cfg(not(target_os = "linux"))]
fn is_allowed(_core: usize) -> bool {
    true
}

/// Keeps the calling thread on `cores`.
#[cfg(target_os = "linux")]
fn stay_on(cores: &[usize]) -> io::Result<()> {
    let mut set = nix::sched::CpuSet::new();
    for core in cores {
        set.set(*core)?;
    }
    Ok(nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)?)
}

#[cfg(not(target_os = "linux"))]
fn stay_on(_cores: &[usize]) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(lists: &[&str]) -> Topology {
        let lists: Vec<_> = lists.iter().map(ToString::to_string).collect();
        Topology::new(&lists, |core| core != 5, |_| None)
    }

    #[test]
    fn threads_take_cores_of_their_own_before_they_share_one() {
        // Cores that no other test of this process takes; each number divided by two is a core.
        let lists = ["2000-2003".to_owned(), "2004-2005".to_owned()];
        let topology = Topology::new(&lists, |_| true, |core| Some((core / 2).to_string()));
        let seats = Seats::on_cores(&topology, 4);
        let cores: Vec<_> = seats.seats.iter().map(|seat| seat.cores[0]).collect();
        assert_eq!(cores, [2000, 2002, 2004, 2001]);
    }

    #[test]
    fn lists_of_cores_are_read() {
        assert_eq!(cores("0-3,8,10-11\n"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(cores("\n"), Some(vec![]), "a node with memory and no cores");
        for text in ["a", "3-1", "1-", "-1", "1-2-3", "0-4000000000", "99999999999999999999"] {
            assert_eq!(cores(text), None, "{text}");
        }
    }

    #[test]
    fn nodes_are_those_with_cores_that_we_may_use() {
        assert_eq!(topology(&["0-1", "5", "", "4-6"]).nodes, [vec![0, 1], vec![4, 6]]);
        assert_eq!(topology(&["nonsense"]).nodes.len(), 1);
        assert!(Topology::get().node_count() >= 1);
    }

    #[test]
    fn seats_share_nodes_and_cores_evenly() {
        // Cores that no other test of this process takes.
        let two = topology(&["1000-1001", "1002"]);
        let on_nodes = Seats::on_nodes(&two, 3);
        assert_eq!((0..3).map(|thread| on_nodes.node(thread)).collect::<Vec<_>>(), [0, 1, 0]);
        assert_eq!((on_nodes.node_count(), on_nodes.first_on(1)), (2, 1));

        let core = |seats: &Seats, thread: usize| seats.seats[thread].cores.clone();
        let first = Seats::on_cores(&two, 2);
        assert_eq!((core(&first, 0), core(&first, 1)), (vec![1000], vec![1001]));
        assert_eq!(first.node_count(), 1);
        let second = Seats::on_cores(&two, 2);
        assert_eq!((core(&second, 0), core(&second, 1)), (vec![1002], vec![1000]));
        assert_eq!((second.node(0), second.node(1), second.node_count()), (1, 0, 2));
        drop(first);
        let third = Seats::on_cores(&two, 1);
        assert_eq!(core(&third, 0), [1001], "cores are given back");
        assert_eq!(Seats::anywhere(4).node_count(), 1);
    }

    #[test]
    fn a_thread_can_be_put_on_a_core() {
        let seats = Seats::on_cores(Topology::get(), 1);
        thread::scope(|scope| scope.spawn(|| seats.sit(0)).join().unwrap()).unwrap();
        Seats::anywhere(1).sit(0).unwrap();
    }
}
