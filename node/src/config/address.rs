//! Addresses as people write them: where to listen, how others reach us, where etcd is.
//!
//! One parser reads host and port for all of them, so that what is refused in one place is refused
//! everywhere. An address that carries a user or a password is refused, and shown without it.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

mod etcd;
#[cfg(test)]
mod tests;

pub use etcd::{EtcdEndpoint, EtcdEndpoints};

/// Bytes of the longest host name that DNS has.
const HOST_BYTES: usize = 253;

/// Characters of a refused address that an error shows: enough to recognise it.
const SHOWN_CHARS: usize = 100;

/// A text that is not such an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{shown} {wrong}: write {expected}")]
pub struct AddressError {
    shown: String,
    wrong: &'static str,
    expected: String,
}

impl AddressError {
    /// `text` is wrong in this way; what should be written in its place.
    pub fn new(text: &str, wrong: &'static str, expected: impl Into<String>) -> Self {
        Self { shown: shown(text), wrong, expected: expected.into() }
    }

    /// The same said of the whole `text` of which a part was read.
    pub fn about(self, text: &str) -> Self {
        Self { shown: shown(text), ..self }
    }
}

/// A text that may be an address with a password, for people: quoted, bounded, and with `***` in
/// place of what stands before an `@` and of what follows the port.
pub fn shown(text: &str) -> String {
    let (scheme, rest) = match text.find("://") {
        Some(at) => text.split_at(at + "://".len()),
        None => ("", text),
    };
    // A password may hold a `/`, so the last `@` counts, wherever it is.
    let (user, rest) = match rest.rsplit_once('@') {
        Some((_, rest)) => ("***@", rest),
        None => ("", rest),
    };
    // What is asked of a server by query may be a secret as well.
    let (rest, query) = match rest.find(['?', '#']) {
        Some(at) => (&rest[..at], "?***"),
        None => (rest, ""),
    };
    let whole = format!("{scheme}{user}{rest}{query}");
    let mut short: String = whole.chars().take(SHOWN_CHARS).collect();
    if short.len() < whole.len() {
        short.push('…');
    }
    format!("{short:?}")
}

/// A host and perhaps a port, and what is wrong with the text otherwise.
struct Parts<'a> {
    /// A name or an address; IPv6 without brackets.
    host: &'a str,
    port: Option<u16>,
}

const SECRET: &str = "holds a user or a password";
const PATH: &str = "goes on after the port";
const PORT: &str = "has no port from 1 to 65535";

impl<'a> Parts<'a> {
    /// Reads `host`, `host:port`, `[address]` or `[address]:port`.
    fn read(text: &'a str) -> Result<Self, &'static str> {
        if text.is_empty() {
            return Err("is empty");
        }
        if text.contains('@') {
            return Err(SECRET);
        }
        if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err("has a blank in it");
        }
        if text.contains("://") {
            return Err("has a scheme");
        }
        if text.contains(['/', '?', '#']) {
            return Err(PATH);
        }
        // A bare IPv6 address has colons that separate no port.
        if text.parse::<Ipv6Addr>().is_ok() {
            return Ok(Self { host: text, port: None });
        }
        let (host, port) = match text.strip_prefix('[') {
            Some(bracketed) => {
                let (host, after) =
                    bracketed.split_once(']').ok_or("has a bracket that is not closed")?;
                if host.parse::<Ipv6Addr>().is_err() {
                    return Err("has no IPv6 address in its brackets");
                }
                let port = match after {
                    "" => None,
                    after => Some(after.strip_prefix(':').ok_or(PATH)?),
                };
                (host, port)
            }
            None => {
                let (host, port) = match text.rsplit_once(':') {
                    Some((host, port)) => (host, Some(port)),
                    None => (text, None),
                };
                check_host(host)?;
                (host, port)
            }
        };
        let port = match port {
            None => None,
            // Digits alone: `parse` would take a sign, too.
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                match digits.parse() {
                    Ok(port) if port > 0 => Some(port),
                    _ => return Err(PORT),
                }
            }
            Some(_) => return Err(PORT),
        };
        Ok(Self { host, port })
    }
}

/// A name that DNS may have, or an IPv4 address.
fn check_host(host: &str) -> Result<(), &'static str> {
    if host.is_empty() {
        return Err("has no host");
    }
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if host.len() > HOST_BYTES || !host.bytes().all(legal) {
        return Err("has a host that is neither a name nor an address");
    }
    // All digits and dots: meant as an address, and no name ends like that.
    let numeric = host.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    if numeric && host.parse::<IpAddr>().is_err() {
        return Err("has a host that is neither a name nor an address");
    }
    Ok(())
}

/// A host and a port that others connect to. Written `host:port`; IPv6 addresses in brackets.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostPort {
    /// A name or an address; IPv6 without brackets.
    host: String,
    port: u16,
}

/// How such an address is written.
const HOST_PORT: &str = "host:port, such as rack1-host7:7071 or [fd00::7]:7071";

impl HostPort {
    /// Reads `host:port`, or `host` where `default_port` is given.
    ///
    /// # Errors
    ///
    /// [`AddressError`], which says `expected`.
    pub fn read(
        text: &str,
        default_port: Option<u16>,
        expected: &str,
    ) -> Result<Self, AddressError> {
        let error = |wrong| AddressError::new(text, wrong, expected);
        let Parts { host, port } = Parts::read(text.trim()).map_err(error)?;
        let port = port.or(default_port).ok_or_else(|| error("has no port"))?;
        Ok(Self { host: host.to_owned(), port })
    }

    /// The name or the address; IPv6 without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, never 0.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Another port of the same host.
    pub fn with_port(&self, port: u16) -> Self {
        Self { host: self.host.clone(), port }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

impl From<SocketAddr> for HostPort {
    fn from(address: SocketAddr) -> Self {
        Self { host: address.ip().to_string(), port: address.port() }
    }
}

impl FromStr for HostPort {
    type Err = AddressError;

    /// An address that others are told: one that means "everywhere" tells them nothing.
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let address = Self::read(text, None, HOST_PORT)?;
        if address.host.parse().is_ok_and(|ip: IpAddr| ip.to_canonical().is_unspecified()) {
            let wrong = "is no address that others can connect to";
            return Err(AddressError::new(text, wrong, HOST_PORT));
        }
        Ok(address)
    }
}

impl TryFrom<String> for HostPort {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<HostPort> for String {
    fn from(address: HostPort) -> Self {
        address.to_string()
    }
}

/// Where a server listens: an IP address and a port; port 0 takes a free one.
///
/// # Errors
///
/// [`AddressError`] with an example of what was probably meant.
pub fn listen_address(text: &str) -> Result<SocketAddr, AddressError> {
    let trimmed = text.trim();
    trimmed.parse().map_err(|_| {
        let (host, port) = trimmed.rsplit_once(':').unwrap_or(("", trimmed));
        let port: u16 = port.parse().unwrap_or(8080);
        let wrong = match host {
            "" => "is no IP address with a port",
            _ if trimmed.contains('@') => SECRET,
            _ if check_host(host).is_ok() && host.parse::<IpAddr>().is_err() => {
                "names a host, and a server listens on an IP address"
            }
            _ => "is no IP address with a port",
        };
        AddressError::new(text, wrong, format!("127.0.0.1:{port} or [::1]:{port}"))
    })
}

/// For serde: the field of a listen address.
///
/// # Errors
///
/// As [`listen_address`].
pub fn deserialize_listen<'de, D: Deserializer<'de>>(d: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(d)?;
    listen_address(&text).map_err(serde::de::Error::custom)
}

/// The same for a server that need not be there.
///
/// # Errors
///
/// As [`listen_address`].
pub fn deserialize_optional_listen<'de, D: Deserializer<'de>>(
    d: D,
) -> Result<Option<SocketAddr>, D::Error> {
    let text = Option::<String>::deserialize(d)?;
    text.map(|text| listen_address(&text).map_err(serde::de::Error::custom)).transpose()
}

/// The URL of a collector of traces, for serde. What it may be is the exporter's affair; that it
/// holds no password is ours, for it is shown.
///
/// # Errors
///
/// [`AddressError`] if it holds a user or a password.
pub fn deserialize_optional_url<'de, D: Deserializer<'de>>(
    d: D,
) -> Result<Option<String>, D::Error> {
    let text = Option::<String>::deserialize(d)?;
    text.map(|text| without_secret(text).map_err(serde::de::Error::custom)).transpose()
}

/// `url`, if it holds no user and no password.
///
/// # Errors
///
/// [`AddressError`] otherwise.
pub fn without_secret(url: String) -> Result<String, AddressError> {
    match url.contains('@') {
        true => Err(AddressError::new(&url, SECRET, "http://host:port")),
        false => Ok(url),
    }
}
