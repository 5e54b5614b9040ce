//! Where the limits of the control groups that hold this process are written.

use std::path::{Path, PathBuf};

/// Where the kernel shows control groups.
pub(super) const ROOT: &str = "/sys/fs/cgroup";

/// Which group each hierarchy has this process in.
pub(super) const OWN: &str = "/proc/self/cgroup";

/// A folder of limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Group {
    /// Of one controller's own hierarchy.
    V1(PathBuf),
    /// Of the one hierarchy of all controllers.
    V2(PathBuf),
}

/// The folders under `root` of every group that holds this process: its own and all above it, for
/// both versions of control groups. `groups` is what [`OWN`] says. In a container the path may be that
/// of the host and not exist; the root's folder is then the container's own.
pub(super) fn folders(root: &Path, groups: &str, controller: &str) -> Vec<Group> {
    let mut folders = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let (hierarchy, version): (_, fn(PathBuf) -> Group) = if controllers.is_empty() {
            (root.to_owned(), Group::V2)
        } else if controllers.split(',').any(|name| name == controller) {
            // Where controllers share a hierarchy, as `cpu,cpuacct`, each name leads to it.
            (root.join(controller), Group::V1)
        } else {
            continue;
        };
        let own = Path::new(path.trim_matches('/'));
        folders.extend(own.ancestors().map(|group| version(hierarchy.join(group))));
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_group_above_the_process_has_a_folder() {
        let folders = |groups| folders(Path::new("/r"), groups, "memory");
        let v2 = |path: &str| Group::V2(path.into());
        assert_eq!(folders("0::/a/b\n"), [v2("/r/a/b"), v2("/r/a"), v2("/r/")]);
        let v1 = |path: &str| Group::V1(path.into());
        assert_eq!(
            folders("7:blkio:/\n4:cpu,memory:/pod\nnonsense\n"),
            [v1("/r/memory/pod"), v1("/r/memory/")]
        );
    }
}
