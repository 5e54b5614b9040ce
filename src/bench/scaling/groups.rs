//! Control groups with a CPU quota, so that several machines of any speed fit one. Asks the system.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the kernel shows control groups.
const ROOT: &str = "/sys/fs/cgroup";

/// Which group each hierarchy has a process in.
const OWN: &str = "/proc/self/cgroup";

/// After so long a group may compute again, in microseconds. A tenth of the kernel's default: a slow
/// machine computes slowly all the time, and a stop in the middle of a step should be no longer than
/// a hop.
const PERIOD_US: u64 = 10_000;

/// The least quota that the kernel takes, in microseconds of each period.
const LEAST_US: u64 = 1_000;

/// The most CPUs that may be asked for: more is a slip of the finger.
const MOST_CPUS: f64 = 1024.0;

/// Why workers cannot be held under quotas.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GroupError {
    /// Neither version of control groups has CPUs here.
    #[error("there is no control group with a CPU quota on this machine")]
    None,
    /// The system does not let us.
    #[error("failed to make the control group {} with a quota of {quota} CPUs", folder.display())]
    Make {
        /// Which.
        folder: PathBuf,
        /// How much.
        quota: Quota,
        /// What the operating system said.
        source: io::Error,
    },
}

/// How much of the machine's CPUs a worker may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// In each period.
    micros: u64,
}

impl Quota {
    /// So many CPUs.
    ///
    /// # Errors
    ///
    /// What is wrong with the number.
    pub fn parse(text: &str) -> Result<Self, String> {
        let least = LEAST_US as f64 / PERIOD_US as f64;
        match text.parse::<f64>() {
            Ok(cpus) if (least..=MOST_CPUS).contains(&cpus) => {
                Ok(Self { micros: (cpus * PERIOD_US as f64).round() as u64 })
            }
            _ => Err(format!("must be a number of CPUs from {least} to {MOST_CPUS}")),
        }
    }

    /// As a number.
    pub fn cpus(self) -> f64 {
        self.micros as f64 / PERIOD_US as f64
    }
}

impl std::fmt::Display for Quota {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.cpus().fmt(f)
    }
}

/// Where groups can be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    parent: PathBuf,
    /// The group that this process is in.
    home: PathBuf,
    version: Version,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Place {
    /// On this machine.
    pub(super) fn find() -> Result<Self, GroupError> {
        let groups = fs::read_to_string(OWN).map_err(|_| GroupError::None)?;
        Self::find_in(Path::new(ROOT), &groups).ok_or(GroupError::None)
    }

    /// `groups` is what [`OWN`] says. In a container the path may be that of the host and not exist;
    /// the root's folder is then the container's own.
    fn find_in(root: &Path, groups: &str) -> Option<Self> {
        let lines = groups.lines().filter_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            Some((parts.next()?, parts.next()?))
        });
        let there = |hierarchy: PathBuf, path: &str| {
            let own = hierarchy.join(path.trim_matches('/'));
            if own.is_dir() { own } else { hierarchy }
        };
        let mut version_two = None;
        for (controllers, path) in lines {
            if controllers.split(',').any(|name| name == "cpu") {
                let home = there(root.join("cpu"), path);
                let has_quota = home.join("cpu.cfs_period_us").is_file();
                return has_quota.then(|| Self {
                    parent: home.clone(),
                    home,
                    version: Version::One,
                });
            }
            if controllers.is_empty() {
                version_two = Some(there(root.to_owned(), path));
            }
        }
        let home = version_two?;
        let below = home.ancestors().take_while(|folder| folder.starts_with(root));
        let mut parents: Vec<PathBuf> = below.map(Path::to_owned).collect();
        // A group that holds processes gives its CPUs to none below it, except the first of all.
        if !parents.iter().any(|parent| shares_cpus(parent)) {
            let first = parents.pop()?;
            fs::write(first.join("cgroup.subtree_control"), "+cpu").ok()?;
            parents = vec![first];
        }
        let parent = parents.into_iter().find(|parent| shares_cpus(parent))?;
        Some(Self { parent, home, version: Version::Two })
    }
}

/// Whether the groups below have CPU quotas.
fn shares_cpus(group: &Path) -> bool {
    let controllers = fs::read_to_string(group.join("cgroup.subtree_control"));
    controllers.is_ok_and(|names| names.split_whitespace().any(|name| name == "cpu"))
}

/// A control group. Removed when dropped, if nothing is in it any more.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) folder: PathBuf,
    /// Where whoever starts a process in it comes from.
    pub(super) home: PathBuf,
}

impl Group {
    /// Makes it.
    pub(super) fn make(place: &Place, name: &str, quota: Quota) -> Result<Self, GroupError> {
        let folder = place.parent.join(name);
        let failed = |source| GroupError::Make { folder: folder.clone(), quota, source };
        fs::create_dir(&folder).map_err(failed)?;
        let group = Self { folder: folder.clone(), home: place.home.clone() };
        let micros = quota.micros;
        let written = match place.version {
            // The period first: a quota must fit into it.
            Version::One => fs::write(folder.join("cpu.cfs_period_us"), PERIOD_US.to_string())
                .and_then(|()| fs::write(folder.join("cpu.cfs_quota_us"), micros.to_string())),
            Version::Two => fs::write(folder.join("cpu.max"), format!("{micros} {PERIOD_US}")),
        };
        written.map_err(failed)?;
        Ok(group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Whoever held a process in it has removed it, or this process failed before there was one.
        let _ = fs::remove_dir(&self.folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(root: &Path, groups: &str) -> Option<(PathBuf, PathBuf, Version)> {
        let place = Place::find_in(root, groups)?;
        let below = |path: PathBuf| path.strip_prefix(root).unwrap().to_owned();
        Some((below(place.parent), below(place.home), place.version))
    }

    #[test]
    fn groups_of_both_versions_are_made_where_quotas_are() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert_eq!(place(dir.path(), ""), None);
        assert_eq!(place(dir.path(), "3:memory:/a\n"), None);
        write("cgroup.subtree_control", "cpuset cpu io\n");
        write("user/cgroup.subtree_control", "memory\n");
        write("user/session/cgroup.subtree_control", "");
        let found = place(dir.path(), "0::/user/session\n").unwrap();
        assert_eq!(found, ("".into(), "user/session".into(), Version::Two));
        // A kernel that has both: the CPUs are where version 1 has them.
        write("cpu/pod/cpu.cfs_period_us", "100000\n");
        let found = place(dir.path(), "0::/user\n2:cpu,cpuacct:/pod\n").unwrap();
        assert_eq!(found, ("cpu/pod".into(), "cpu/pod".into(), Version::One));
        assert_eq!(place(dir.path(), "2:cpu:/elsewhere\n"), None, "not even in the root");
    }

    #[test]
    fn a_group_has_its_quota_and_goes_with_its_value() {
        let dir = tempfile::tempdir().unwrap();
        let quota = Quota::parse("0.25").unwrap();
        for (version, file, text) in
            [(Version::One, "cpu.cfs_quota_us", "2500"), (Version::Two, "cpu.max", "2500 10000")]
        {
            let place =
                Place { parent: dir.path().to_owned(), home: dir.path().to_owned(), version };
            let group = Group::make(&place, "g", quota).unwrap();
            assert_eq!(fs::read_to_string(group.folder.join(file)).unwrap(), text);
            let taken = Group::make(&place, "g", quota).unwrap_err();
            assert!(matches!(taken, GroupError::Make { .. }), "{taken}");
            fs::remove_dir_all(&group.folder).unwrap();
        }
    }

    #[test]
    fn quotas_that_no_kernel_takes_are_refused() {
        assert_eq!(Quota::parse("0.5").unwrap().cpus(), 0.5);
        assert_eq!(Quota::parse("0.1").unwrap().to_string(), "0.1");
        for text in ["", "0", "0.09", "-1", "NaN", "inf", "1025", "half"] {
            assert!(Quota::parse(text).unwrap_err().contains("from 0.1 to 1024"), "{text}");
        }
    }
}
