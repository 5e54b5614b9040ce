//! Whom a request must be meant for. A web page can make a name of its own point at this machine
//! (DNS rebinding) and so reach a server that listens on loopback only; the `Host` header gives
//! such a request away.

use std::net::{IpAddr, SocketAddr};

use axum::extract::Request;
use axum::http::{Version, header};

/// Why a request is not answered, whatever it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// It does not say for whom it is as RFC 9112 demands: 400.
    #[error("{0}")]
    Unclear(&'static str),
    /// It is meant for another host: 421.
    #[error("this server does not answer to that host name; use localhost or its address")]
    Misdirected,
}

/// The hosts that requests may name.
#[derive(Clone, Debug)]
pub enum Hosts {
    /// The address is open to others: who reaches it is for the network to say.
    Any,
    /// Loopback, `localhost` and the configured name.
    Local {
        /// Without its port.
        name: Option<String>,
    },
}

impl Hosts {
    /// For a server at `listen` on a host that others know as `advertised`.
    pub fn of(listen: SocketAddr, advertised: Option<&str>) -> Self {
        if !is_loopback(listen.ip()) {
            return Self::Any;
        }
        Self::Local { name: advertised.map(str::to_ascii_lowercase) }
    }

    /// Whether a request is meant for this server.
    ///
    /// # Errors
    ///
    /// [`HostError`] if not, or if it does not say so as it must.
    pub fn check(&self, request: &Request) -> Result<(), HostError> {
        match authority(request).map_err(HostError::Unclear)? {
            Some(authority) if !self.allow(authority) => Err(HostError::Misdirected),
            _ => Ok(()),
        }
    }

    fn allow(&self, authority: &str) -> bool {
        let Self::Local { name } = self else { return true };
        let host = host_of(authority).to_ascii_lowercase();
        host == "localhost" || name.as_ref() == Some(&host) || host.parse().is_ok_and(is_loopback)
    }
}

/// Whether an address is this machine alone, also as IPv6 writes one of IPv4.
fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// The host in `host`, `host:port`, `[address]` or `[address]:port`.
fn host_of(authority: &str) -> &str {
    if let Some(bracketed) = authority.strip_prefix('[') {
        return bracketed.split(']').next().unwrap_or_default();
    }
    authority.rsplit_once(':').map_or(authority, |(host, _)| host)
}

/// Whom a request names: by `Host`, by its target, or by both if they agree (RFC 9112 section 3.2).
/// `None` only for HTTP/1.0, which has no `Host`: such a request is served, since no browser sends
/// it and whoever can send it could as well name us.
fn authority(request: &Request) -> Result<Option<&str>, &'static str> {
    // HTTP/2 says it in the target, and HTTP/1 may (absolute form).
    let target = request.uri().authority().map(|authority| authority.as_str());
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err("the request has more than one Host header");
    }
    // Bytes that are no text are no name of ours.
    let host = host.map(|host| host.to_str().unwrap_or_default());
    match (host, target) {
        (Some(host), Some(target)) if !host.eq_ignore_ascii_case(target) => {
            Err("the Host header and the request's target name different hosts")
        }
        (None, None) if request.version() > Version::HTTP_10 => {
            Err("the request has no Host header")
        }
        (host, target) => Ok(host.or(target)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loopback_server_answers_to_its_own_names_only() {
        let local = Hosts::of("127.0.0.1:8080".parse().unwrap(), Some("Box.example"));
        for host in [
            "localhost",
            "LOCALHOST:8080",
            "127.0.0.1:8080",
            "127.0.0.1",
            "127.9.9.9",
            "[::1]:8080",
            "[::1]",
            "[::ffff:127.0.0.1]:8080",
            "box.example:1",
        ] {
            assert!(local.allow(host), "{host}");
        }
        for host in [
            "evil.test",
            "evil.test:8080",
            "localhost.evil.test",
            "127.0.0.1.evil.test",
            "",
            "10.0.0.1",
            "[::2]:80",
            "[::ffff:10.0.0.1]",
            "evil.test:localhost",
        ] {
            assert!(!local.allow(host), "{host}");
        }
        for listen in ["[::1]:1", "[::ffff:127.0.0.1]:8080"] {
            assert!(!Hosts::of(listen.parse().unwrap(), None).allow("box.example"), "{listen}");
        }
        assert!(Hosts::of("0.0.0.0:8080".parse().unwrap(), None).allow("evil.test"));
    }
}
