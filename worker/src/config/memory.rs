//! How much memory this process may use: the machine's, or less where a control group says so.

use std::fs;
use std::path::Path;

use super::cgroup::{self, Group};

/// Bytes that this process may use, `None` where the system does not say.
pub(super) fn available_bytes() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_bytes(&text));
    let groups = fs::read_to_string(cgroup::OWN).unwrap_or_default();
    let groups = cgroup::folders(Path::new(cgroup::ROOT), &groups, "memory");
    machine.into_iter().chain(groups.iter().filter_map(limit_of)).min()
}

fn limit_of(group: &Group) -> Option<u64> {
    let file = match group {
        Group::V1(folder) => folder.join("memory.limit_in_bytes"),
        Group::V2(folder) => folder.join("memory.max"),
    };
    fs::read_to_string(file).ok().and_then(|text| limit(&text))
}

/// `MemTotal` of `/proc/meminfo`, which counts in KiB.
fn total_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
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
    fn limits_of_both_versions_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_owned();
        assert_eq!(limit_of(&Group::V2(folder.clone())), None);
        fs::write(folder.join("memory.max"), "4096\n").unwrap();
        fs::write(folder.join("memory.limit_in_bytes"), "8192\n").unwrap();
        assert_eq!(limit_of(&Group::V2(folder.clone())), Some(4096));
        assert_eq!(limit_of(&Group::V1(folder)), Some(8192));
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(available_bytes().is_none_or(|bytes| bytes > 1 << 20));
    }
}
