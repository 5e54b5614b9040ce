//! How much memory this process may use: the machine's, or less where a control group says so.

use std::fs;
use std::path::Path;

/// Where the kernel shows control groups.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Bytes that this process may use, `None` where the system does not say.
pub(super) fn available_bytes() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_bytes(&text));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = limit_files(&groups).into_iter().filter_map(|file| {
        fs::read_to_string(Path::new(CGROUP_ROOT).join(file)).ok().and_then(|text| limit(&text))
    });
    machine.into_iter().chain(limits).min()
}

/// `MemTotal` of `/proc/meminfo`, which counts in KiB.
fn total_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The limit files, relative to [`CGROUP_ROOT`], of every group that holds this process: its own
/// and all above it, for both versions of control groups. In a container the path may be that of
/// the host and not exist; the root's file is then the container's own.
fn limit_files(groups: &str) -> Vec<String> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let (prefix, name) = if controllers.is_empty() {
            ("", "memory.max")
        } else if controllers.split(',').any(|controller| controller == "memory") {
            ("memory/", "memory.limit_in_bytes")
        } else {
            continue;
        };
        let mut group = path.trim_matches('/');
        loop {
            let separator = if group.is_empty() { "" } else { "/" };
            files.push(format!("{prefix}{group}{separator}{name}"));
            match group.rsplit_once('/') {
                Some((parent, _)) => group = parent,
                None if group.is_empty() => break,
                None => group = "",
            }
        }
    }
    files
}

/// A limit file's number; `max` and the absurd number of version 1 both mean no limit.
fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|&bytes: &u64| bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_linux_writes() {
        assert_eq!(
            total_bytes("MemTotal:       24655184 kB\nMemFree: 1 kB\n"),
            Some(25_246_908_416)
        );
        assert_eq!(total_bytes("MemFree: 1 kB\n"), None);
        assert_eq!(limit("1073741824\n"), Some(1 << 30));
        assert_eq!(limit("max\n"), None);
    }

    #[test]
    fn looks_at_every_group_above_the_process() {
        assert_eq!(
            limit_files("0::/a/b\n"),
            ["a/b/memory.max", "a/memory.max", "memory.max"].map(String::from)
        );
        assert_eq!(
            limit_files("7:blkio:/\n4:memory:/pod\nnonsense\n"),
            ["memory/pod/memory.limit_in_bytes", "memory/memory.limit_in_bytes"].map(String::from)
        );
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(available_bytes().is_none_or(|bytes| bytes > 1 << 20));
    }
}
