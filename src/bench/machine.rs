//! Which CPU this is and how much memory the process took: what Linux says of them.

use std::fs;
use std::io;

use serde::Serialize;

/// Where figures were measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// As it calls itself, with family and model where the kernel gives them: virtual machines
    /// often hide the name.
    pub cpu: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Kernels that this CPU runs, slowest first.
    pub isas: Vec<&'static str>,
}

impl Machine {
    /// This one.
    pub fn this() -> Self {
        let cpu = fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| cpu_name(&text));
        Self {
            cpu: cpu.unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            isas: kernels::Backend::available().map(kernels::Backend::name).collect(),
        }
    }
}

/// The value of the first line of `text` that has this key before its colon.
fn field<'t>(text: &'t str, key: &str) -> Option<&'t str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim())
    })
}

/// The name of the first CPU in the text of `/proc/cpuinfo`.
fn cpu_name(text: &str) -> Option<String> {
    if let Some(name) = field(text, "model name") {
        return Some(match (field(text, "cpu family"), field(text, "model")) {
            (Some(family), Some(model)) => format!("{name} (family {family} model {model})"),
            _ => name.to_owned(),
        });
    }
    // AArch64 has numbers and no names.
    let (implementer, part) = (field(text, "CPU implementer")?, field(text, "CPU part")?);
    Some(format!("ARM implementer {implementer} part {part}"))
}

/// The most memory that this process has had resident, in bytes.
///
/// # Errors
///
/// If the system does not say.
pub fn peak_rss_bytes() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/self/status")?;
    peak_of(&text).ok_or_else(|| io::Error::other("/proc/self/status names no VmHWM"))
}

/// How much of this process's memory is on huge pages, in bytes.
///
/// # Errors
///
/// If the system does not say.
pub fn huge_page_bytes() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/self/smaps_rollup")?;
    let kinds = ["AnonHugePages", "ShmemPmdMapped", "FilePmdMapped"];
    let bytes = kinds.into_iter().filter_map(|kind| kibibytes(&text, kind));
    Ok(bytes.fold(0, u64::saturating_add))
}

/// Makes the peak begin anew at what is resident now.
///
/// # Errors
///
/// If the system does not let us.
pub fn forget_peak() -> io::Result<()> {
    // 5 resets the peak, and nothing else: proc(5).
    fs::write("/proc/self/clear_refs", "5")
}

/// `VmHWM` in the text of `/proc/self/status`, in bytes.
fn peak_of(text: &str) -> Option<u64> {
    kibibytes(text, "VmHWM")
}

/// The value of a line such as `VmHWM:  12 kB`, in bytes.
fn kibibytes(text: &str, name: &str) -> Option<u64> {
    field(text, name)?.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_in_kibibytes() {
        let text = "Name:\ttercet\nVmPeak:\t  999 kB\nVmHWM:\t  1234 kB\nVmRSS:\t 3 kB\n";
        assert_eq!(peak_of(text), Some(1234 * 1024));
        for wrong in ["", "VmHWM:\n", "VmHWM:\t12 MB\n", "VmHWM:\t-1 kB\n", "VmHWMx:\t1 kB\n"] {
            assert_eq!(peak_of(wrong), None, "{wrong:?}");
        }
        assert_eq!(peak_of("VmHWM:\t18446744073709551615 kB"), None, "no overflow");
        assert!(peak_rss_bytes().unwrap() > 1 << 20);
    }

    #[test]
    fn a_cpu_is_named() {
        let amd = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n";
        assert_eq!(cpu_name(amd).unwrap(), "AMD EPYC (family 25 model 1)");
        assert_eq!(cpu_name("model name\t: Some CPU\n").unwrap(), "Some CPU");
        let arm = "CPU implementer\t: 0x41\nCPU part\t: 0xd0c\n";
        assert_eq!(cpu_name(arm).unwrap(), "ARM implementer 0x41 part 0xd0c");
        assert_eq!(cpu_name("processor\t: 0\n"), None);
        assert!(!Machine::this().cpu.is_empty());
    }
}
