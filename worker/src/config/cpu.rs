//! How many threads may compute here: what the cores and the control groups give, or less where less
//! was asked for. Not pure: asks the system.

use std::collections::BTreeSet;
use std::path::Path;
use std::{fmt, fs, thread};

use super::cgroup::{self, Group};

/// Where the kernel describes cores.
const CORES: &str = "/sys/devices/system/cpu";

/// Quotas are counted in thousandths of a CPU.
const MILLI: u64 = 1000;

/// What this process may compute with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CpuLimits {
    /// Hardware threads that it may run on, by affinity and cpuset.
    pub(crate) logical: usize,
    /// Cores that those are on; `None` where the system does not say.
    pub(crate) physical: Option<usize>,
    /// The least quota of its control groups, in thousandths of a CPU.
    pub(crate) quota: Option<u64>,
}

impl CpuLimits {
    /// As they are now.
    pub(crate) fn read() -> Self {
        let groups = fs::read_to_string(cgroup::OWN).unwrap_or_default();
        Self::read_from(&allowed_cpus(), Path::new(CORES), Path::new(cgroup::ROOT), &groups)
    }

    fn read_from(cpus: &[usize], cores: &Path, root: &Path, groups: &str) -> Self {
        let siblings: Option<BTreeSet<String>> =
            cpus.iter().map(|&cpu| siblings(cores, cpu)).collect();
        let logical = match cpus.len() {
            // As the standard library sees it.
            0 => thread::available_parallelism().map_or(1, usize::from),
            count => count,
        };
        Self {
            logical,
            physical: siblings.map(|siblings| siblings.len()).filter(|&count| count > 0),
            quota: cgroup::folders(root, groups, "cpu").iter().filter_map(quota_of).min(),
        }
    }

    /// How many threads compute if `asked` were asked for: at least one.
    pub(crate) fn threads(&self, asked: Option<usize>) -> usize {
        let cores = self.physical.unwrap_or(self.logical);
        let whole = self.quota.map(|quota| usize::try_from(quota / MILLI).unwrap_or(usize::MAX));
        [Some(cores), whole, asked].into_iter().flatten().min().unwrap_or(1).max(1)
    }

    /// How many times as long as unhindered `threads` threads take for everything: where the quota is
    /// less than they are, they stand still for the rest of each of its periods.
    pub(crate) fn stretch(&self, threads: usize) -> f64 {
        let wanted = threads as u64 * MILLI;
        match self.quota {
            Some(quota) if quota < wanted => wanted as f64 / quota.max(1) as f64,
            _ => 1.0,
        }
    }

    /// How many threads compute, and why.
    pub(crate) fn explain(&self, asked: Option<usize>) -> String {
        let asked_for = asked.map(|asked| format!(", {asked} asked for")).unwrap_or_default();
        format!("threads {}: {self}{asked_for}", self.threads(asked))
    }
}

impl fmt::Display for CpuLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = |count: usize| if count == 1 { "" } else { "s" };
        let Self { logical, physical, quota } = *self;
        match physical {
            Some(cores) if cores < logical => {
                write!(f, "cpuset has {cores} core{} of {logical} threads", plural(cores))?;
            }
            _ => write!(f, "cpuset has {logical} core{}", plural(logical))?,
        }
        match quota {
            Some(quota) => write!(f, ", quota is {}.{} CPUs", quota / MILLI, quota % MILLI / 100),
            None => f.write_str(", no quota"),
        }
    }
}

/// Which hardware threads share a core with this one, itself among them, as the kernel writes it.
pub(crate) fn siblings_of(cpu: usize) -> Option<String> {
    siblings(Path::new(CORES), cpu)
}

fn siblings(cores: &Path, cpu: usize) -> Option<String> {
    let folder = cores.join(format!("cpu{cpu}")).join("topology");
    // The first is the newer name.
    let list = ["core_cpus_list", "thread_siblings_list"]
        .iter()
        .find_map(|name| fs::read_to_string(folder.join(name)).ok())?;
    Some(list.trim().to_owned()).filter(|list| !list.is_empty())
}

/// Thousandths of a CPU that a group may use.
fn quota_of(group: &Group) -> Option<u64> {
    match group {
        Group::V1(folder) => {
            let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
            quota(&read("cpu.cfs_quota_us")?, &read("cpu.cfs_period_us")?)
        }
        Group::V2(folder) => {
            let text = fs::read_to_string(folder.join("cpu.max")).ok()?;
            let (quota_us, period_us) = text.trim().split_once(' ')?;
            quota(quota_us, period_us)
        }
    }
}

/// `max` and -1 mean no quota.
fn quota(quota_us: &str, period_us: &str) -> Option<u64> {
    let quota_us: u64 = quota_us.trim().parse().ok()?;
    let period_us: u64 = period_us.trim().parse().ok()?;
    quota_us.checked_mul(MILLI)?.checked_div(period_us)
}

/// The hardware threads that this process may run on; none where the system does not say.
#[cfg(target_os = "linux")]
fn allowed_cpus() -> Vec<usize> {
    // Of the process and not of the calling thread, which may have a seat.
    match nix::sched::sched_getaffinity(nix::unistd::getpid()) {
        Ok(set) => (0..nix::sched::CpuSet::count())
            .filter(|&cpu| set.is_set(cpu).unwrap_or(false))
            .collect(),
        Err(_) => Vec::new(),
    }
}

#[cfg(not(target_os = "linux"))]
fn allowed_cpus() -> Vec<usize> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(logical: usize, physical: Option<usize>, quota: Option<u64>) -> CpuLimits {
        CpuLimits { logical, physical, quota }
    }

    #[test]
    fn the_least_of_all_counts_and_is_explained() {
        let check = |limits: CpuLimits, asked, expected: &str| {
            assert_eq!(limits.explain(asked), expected);
        };
        check(
            limits(4, Some(4), Some(2000)),
            None,
            "threads 2: cpuset has 4 cores, quota is 2.0 CPUs",
        );
        check(
            limits(4, Some(4), Some(2999)),
            None,
            "threads 2: cpuset has 4 cores, quota is 2.9 CPUs",
        );
        check(
            limits(8, Some(4), None),
            None,
            "threads 4: cpuset has 4 cores of 8 threads, no quota",
        );
        check(limits(8, None, None), None, "threads 8: cpuset has 8 cores, no quota");
        check(
            limits(1, Some(1), Some(250)),
            None,
            "threads 1: cpuset has 1 core, quota is 0.2 CPUs",
        );
        check(
            limits(4, Some(4), Some(64_000)),
            Some(3),
            "threads 3: cpuset has 4 cores, quota is 64.0 CPUs, 3 asked for",
        );
        check(
            limits(4, Some(4), None),
            Some(9),
            "threads 4: cpuset has 4 cores, no quota, 9 asked for",
        );
    }

    #[test]
    fn less_than_a_cpu_takes_longer() {
        let stretch = |quota, threads| limits(4, Some(4), quota).stretch(threads);
        assert_eq!([stretch(Some(500), 1), stretch(Some(200), 1)], [2.0, 5.0]);
        assert_eq!([stretch(Some(1000), 1), stretch(Some(2500), 2), stretch(None, 4)], [1.0; 3]);
        assert_eq!(stretch(Some(0), 1), 1000.0, "no division by 0");
    }

    #[test]
    fn quotas_of_both_versions_are_read() {
        assert_eq!(quota("150000", "100000\n"), Some(1500));
        assert_eq!(quota("5000", "10000"), Some(500));
        for text in ["max", "-1", "", "x"] {
            assert_eq!(quota(text, "100000"), None, "{text}");
        }
        assert_eq!(quota("1", "0"), None);
        assert_eq!(quota("18446744073709551615", "1"), None);
    }

    #[test]
    fn cores_and_quotas_come_from_where_linux_writes_them() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("cores/cpu0/topology/thread_siblings_list", "0,2\n");
        write("cores/cpu1/topology/core_cpus_list", "1,3\n");
        write("cores/cpu2/topology/thread_siblings_list", "0,2\n");
        write("groups/cpu.max", "max 100000\n");
        write("groups/pod/cpu.max", "300000 100000\n");
        write("groups/pod/worker/cpu.max", "900000 100000\n");
        let read = |cpus: &[usize], groups: &str| {
            let (cores, root) = (dir.path().join("cores"), dir.path().join("groups"));
            CpuLimits::read_from(cpus, &cores, &root, groups)
        };
        // The group above has less than the own.
        assert_eq!(read(&[0, 1, 2], "0::/pod/worker\n"), limits(3, Some(2), Some(3000)));
        assert_eq!(read(&[0, 1, 2, 9], "0::/\n"), limits(4, None, None), "one is not described");
        write("groups/cpu/pod/cpu.cfs_quota_us", "50000\n");
        write("groups/cpu/pod/cpu.cfs_period_us", "100000\n");
        write("groups/cpu/cpu.cfs_quota_us", "-1\n");
        write("groups/cpu/cpu.cfs_period_us", "100000\n");
        assert_eq!(read(&[1], "3:cpu,cpuacct:/pod\n"), limits(1, Some(1), Some(500)));
        assert!(read(&[], "").threads(None) >= 1);
    }

    #[test]
    fn this_machine_has_a_core() {
        let limits = CpuLimits::read();
        assert!(limits.threads(None) >= 1);
        assert_eq!(limits.threads(Some(1)), 1);
    }
}
