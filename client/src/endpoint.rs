//! Where a coordinator is reached.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// The port of a coordinator's gRPC interface, unless it is told another.
pub const DEFAULT_GRPC_PORT: u16 = 7420;

/// The environment variable that names the endpoint when no flag does.
pub const ENDPOINT_VARIABLE: &str = "TERCET_ENDPOINT";

/// Host and port of a coordinator's gRPC interface.
///
/// Written `host:port`, `host` (then the port is [`DEFAULT_GRPC_PORT`]) or either of them after
/// `http://`. IPv6 addresses with a port stand in brackets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// A name or an address; IPv6 without brackets.
    host: String,
    port: u16,
}

/// A text that does not say where a coordinator is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// TLS is not there yet.
    #[error("endpoint {0:?} asks for TLS, which is not supported yet: write http:// or host:port")]
    Tls(String),
    /// It has no host.
    #[error("endpoint {0:?} has no host: write host:port")]
    Host(String),
    /// Its port is no port.
    #[error("endpoint {0:?} has no valid port: write host:port with a port from 1 to 65535")]
    Port(String),
    /// It goes on after the port.
    #[error("endpoint {0:?} has a path or other extra characters: write host:port")]
    Extra(String),
}

impl Endpoint {
    /// The URI that the transport connects to.
    pub fn uri(&self) -> String {
        format!("http://{self}")
    }
}

impl Default for Endpoint {
    fn default() -> Self {
        Self { host: "127.0.0.1".into(), port: DEFAULT_GRPC_PORT }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self { host: address.ip().to_string(), port: address.port() }
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let whole = || text.to_owned();
        if text.starts_with("https://") {
            return Err(EndpointError::Tls(whole()));
        }
        let rest = text.strip_prefix("http://").unwrap_or(text);
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        if rest.contains(|c: char| "/?#@".contains(c) || c.is_whitespace() || c.is_control()) {
            return Err(EndpointError::Extra(whole()));
        }
        // A bare IPv6 address has colons that separate no port.
        if rest.parse::<Ipv6Addr>().is_ok() {
            return Ok(Self { host: rest.to_owned(), port: DEFAULT_GRPC_PORT });
        }
        let (host, port) = match rest.strip_prefix('[') {
            Some(bracketed) => {
                let (host, after) =
                    bracketed.split_once(']').ok_or_else(|| EndpointError::Host(whole()))?;
                if host.parse::<Ipv6Addr>().is_err() {
                    return Err(EndpointError::Host(whole()));
                }
                match after {
                    "" => (host, None),
                    _ => match after.strip_prefix(':') {
                        Some(port) => (host, Some(port)),
                        None => return Err(EndpointError::Extra(whole())),
                    },
                }
            }
            None => match rest.rsplit_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (rest, None),
            },
        };
        if host.is_empty() || (host.contains(':') && !text.contains('[')) {
            return Err(EndpointError::Host(whole()));
        }
        let port = match port {
            None => DEFAULT_GRPC_PORT,
            Some(digits) => match digits.parse() {
                Ok(port) if port > 0 => port,
                _ => return Err(EndpointError::Port(whole())),
            },
        };
        Ok(Self { host: host.to_owned(), port })
    }
}

/// The endpoint of a command: the flag, else the environment, else the default.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct EndpointArgs {
    /// Coordinator to ask, as host:port [env: TERCET_ENDPOINT] [default: 127.0.0.1:7420]
    #[arg(long, value_name = "ADDR")]
    pub endpoint: Option<Endpoint>,
}

impl EndpointArgs {
    /// The endpoint in force, given what the environment says.
    ///
    /// # Errors
    ///
    /// If no flag was given and the variable holds no endpoint.
    pub fn resolve(&self, variable: Option<&str>) -> Result<Endpoint, EndpointError> {
        match (&self.endpoint, variable) {
            (Some(endpoint), _) => Ok(endpoint.clone()),
            (None, Some(text)) => text.parse(),
            (None, None) => Ok(Endpoint::default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_as_people_write_them() {
        for (text, shown) in [
            ("127.0.0.1:7420", "127.0.0.1:7420"),
            ("127.0.0.1", "127.0.0.1:7420"),
            ("rack-3.example:9000", "rack-3.example:9000"),
            ("http://localhost:1/", "localhost:1"),
            ("[::1]:7421", "[::1]:7421"),
            ("[::1]", "[::1]:7420"),
            ("::1", "[::1]:7420"),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), shown, "{text}");
            assert_eq!(shown.parse(), Ok(endpoint), "what is shown reads back");
        }
        let address: SocketAddr = "[::1]:5".parse().unwrap();
        assert_eq!(Endpoint::from(address).uri(), "http://[::1]:5");
    }

    #[test]
    fn what_is_no_endpoint_is_refused_with_the_reason() {
        let refused = |text: &str| text.parse::<Endpoint>().unwrap_err();
        assert!(matches!(refused("https://a:1"), EndpointError::Tls(_)));
        assert!(matches!(refused(""), EndpointError::Host(_)));
        assert!(matches!(refused(":7420"), EndpointError::Host(_)));
        assert!(matches!(refused("[nonsense]:1"), EndpointError::Host(_)));
        assert!(matches!(refused("a:b:1"), EndpointError::Host(_)));
        assert!(matches!(refused("a:0"), EndpointError::Port(_)));
        assert!(matches!(refused("a:65536"), EndpointError::Port(_)));
        assert!(matches!(refused("a:"), EndpointError::Port(_)));
        assert!(matches!(refused("a:1/v1"), EndpointError::Extra(_)));
        assert!(matches!(refused("[::1]x:1"), EndpointError::Extra(_)));
        assert!(matches!(refused("a b:1"), EndpointError::Extra(_)));
    }

    #[test]
    fn a_flag_goes_over_the_environment_over_the_default() {
        let flag = EndpointArgs { endpoint: Some("flag:1".parse().unwrap()) };
        let none = EndpointArgs::default();
        assert_eq!(flag.resolve(Some("variable:2")).unwrap().to_string(), "flag:1");
        assert_eq!(none.resolve(Some("variable:2")).unwrap().to_string(), "variable:2");
        assert_eq!(none.resolve(None).unwrap().to_string(), "127.0.0.1:7420");
        assert!(none.resolve(Some("https://x")).is_err());
    }
}
