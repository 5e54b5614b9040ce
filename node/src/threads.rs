//! How many threads wait for the network.

use std::num::NonZeroUsize;
use std::thread::available_parallelism;

/// CPUs for each thread of a network runtime. A second thread that has little to do costs more than it
/// brings: whenever a task is woken the other thread is woken to look for work, which takes two switches and
/// a CPU that engines, or other processes of the machine, are at.
const CPUS_EACH: usize = 8;

/// The most threads: what crosses the network is little beside what is computed for it.
const MOST: usize = 4;

/// The number of threads for a runtime of sockets and timers, on the CPUs that this process may use.
#[must_use]
pub fn for_network() -> usize {
    of_cpus(available_parallelism().map_or(1, NonZeroUsize::get))
}

fn of_cpus(cpus: usize) -> usize {
    (cpus / CPUS_EACH).clamp(1, MOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_machines_have_one_and_no_machine_has_many() {
        let threads = [1, 2, 8, 15, 16, 32, 256].map(of_cpus);
        assert_eq!(threads, [1, 1, 1, 1, 2, 4, 4]);
    }
}
