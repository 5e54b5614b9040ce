//! Which addresses a process may listen on.

use std::net::SocketAddr;

/// A listen address that would be open to everyone.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{address} is open to other machines, without TLS: use a loopback address, or say --insecure if \
     everyone who can reach it is trusted"
)]
pub struct ListenError {
    /// The address.
    pub address: SocketAddr,
}

/// Refuses an address that other machines can reach, unless told `insecure` in so many words.
///
/// # Errors
///
/// [`ListenError`] for every address that is not loopback.
pub fn check_listen_address(address: SocketAddr, insecure: bool) -> Result<(), ListenError> {
    // `::ffff:127.0.0.1` is loopback too.
    if insecure || address.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    Err(ListenError { address })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_open_without_a_word() {
        for (address, loopback) in [
            ("127.0.0.1:1", true),
            ("127.8.9.1:1", true),
            ("[::1]:1", true),
            ("[::ffff:127.0.0.1]:1", true),
            ("0.0.0.0:1", false),
            ("[::]:1", false),
            ("10.0.0.1:1", false),
            ("[::ffff:10.0.0.1]:1", false),
            ("[fe80::1]:1", false),
        ] {
            let address = address.parse().unwrap();
            assert_eq!(check_listen_address(address, false).is_ok(), loopback, "{address}");
            assert!(check_listen_address(address, true).is_ok());
        }
    }
}
