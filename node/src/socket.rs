//! Names of listening sockets that no two processes hold at a time.

use std::net::SocketAddr;
use std::path::Path;

/// New at every start of the machine.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Of this process: the same address is another socket in another one.
const NETWORK_NAMESPACE: &str = "/proc/self/ns/net";

/// Names the socket that this process listens on at `address`: while it does, nobody else can, so
/// whoever listened there before has ended or let go of it. Empty where the machine does not tell which
/// it is; an empty name proves nothing.
pub fn name(address: SocketAddr) -> String {
    of_machine(Path::new(BOOT_ID), Path::new(NETWORK_NAMESPACE))
        .map_or_else(String::new, |machine| format!("{machine}/{address}"))
}

fn of_machine(boot_id: &Path, namespace: &Path) -> Option<String> {
    let boot_id = std::fs::read_to_string(boot_id).ok()?;
    let namespace = std::fs::read_link(namespace).ok()?;
    let boot_id = boot_id.trim();
    (!boot_id.is_empty()).then(|| format!("{boot_id}/{}", namespace.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_has_one_name_and_an_unknown_machine_none() {
        let at = |port| name(SocketAddr::from(([127, 0, 0, 1], port)));
        assert!(at(7071).ends_with("/127.0.0.1:7071"), "{}", at(7071));
        assert_eq!(at(7071), at(7071));
        assert_ne!(at(7071), at(7072));
        assert_eq!(of_machine(Path::new("/nowhere"), Path::new(NETWORK_NAMESPACE)), None);
        assert_eq!(of_machine(Path::new(BOOT_ID), Path::new("/nowhere")), None);
    }
}
