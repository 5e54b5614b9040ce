//! Where a coordinator is reached.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use node::config::{AddressError, HostPort};
use proto::ports;

/// The environment variable that names the endpoint when no flag does.
pub const ENDPOINT_VARIABLE: &str = "TERCET_ENDPOINT";

/// How an endpoint is written.
const EXPECTED: &str = "host:port, such as 127.0.0.1:7420";

/// Host and port of a coordinator's gRPC interface.
///
/// Written `host:port`, `host` (then the port is [`ports::COORDINATOR_GRPC`]) or either of them
/// after `http://`. IPv6 addresses with a port stand in brackets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    address: HostPort,
}

/// An endpoint that was given and is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("wrong value for {key}")]
pub struct EndpointError {
    /// The flag or the variable.
    pub key: &'static str,
    /// What is wrong with it.
    pub source: AddressError,
}

impl Endpoint {
    /// The URI that the transport connects to.
    pub fn uri(&self) -> String {
        format!("http://{self}")
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Another server of the process that is reached here, which says that it is at `address`: one that
    /// listens on all addresses is reached at this host.
    pub fn beside(&self, address: &HostPort) -> Self {
        match address.host().parse().is_ok_and(|ip: IpAddr| ip.is_unspecified()) {
            true => Self { address: self.address.with_port(address.port()) },
            false => Self { address: address.clone() },
        }
    }
}

impl Default for Endpoint {
    fn default() -> Self {
        SocketAddr::from(([127, 0, 0, 1], ports::COORDINATOR_GRPC)).into()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self { address: address.into() }
    }
}

impl FromStr for Endpoint {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let trimmed = text.trim();
        let scheme = trimmed.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
        let rest = match scheme.as_deref() {
            None => trimmed,
            Some("http") => &trimmed["http://".len()..],
            Some("https") => {
                let wrong = "asks for TLS, which is not supported yet";
                return Err(AddressError::new(text, wrong, EXPECTED));
            }
            Some(_) => return Err(AddressError::new(text, "has an unknown scheme", EXPECTED)),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let address = HostPort::read(rest, Some(ports::COORDINATOR_GRPC), EXPECTED)
            .map_err(|error| error.about(text))?;
        Ok(Self { address })
    }
}

/// The endpoint of a command: the flag, else the environment, else the default.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct EndpointArgs {
    // A text here, so that a wrong one is told like any other wrong setting.
    /// Coordinator to ask, as host:port [env: TERCET_ENDPOINT] [default: 127.0.0.1:7420]
    #[arg(long, value_name = "ADDR")]
    pub endpoint: Option<String>,
}

impl EndpointArgs {
    /// The endpoint in force, given what the environment says.
    ///
    /// # Errors
    ///
    /// If the flag, or without one the variable, holds no endpoint.
    pub fn resolve(&self, variable: Option<&str>) -> Result<Endpoint, EndpointError> {
        let (key, text) = match (self.endpoint.as_deref(), variable) {
            (Some(text), _) => ("--endpoint", text),
            (None, Some(text)) => (ENDPOINT_VARIABLE, text),
            (None, None) => return Ok(Endpoint::default()),
        };
        text.parse().map_err(|source| EndpointError { key, source })
    }
}

/// Where a command finds the coordinator that takes its orders.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct OperatorArgs {
    /// Which coordinator.
    #[command(flatten)]
    pub endpoint: EndpointArgs,
    /// Admin address of the leading coordinator, as host:port [default: what the coordinator at
    /// --endpoint says]
    #[arg(long, value_name = "ADDR")]
    pub admin: Option<String>,
}

/// Where orders are taken, or who says where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Orders {
    /// Here.
    At(Endpoint),
    /// This coordinator says where.
    AsSaidBy(Endpoint),
}

impl OperatorArgs {
    /// Where to go, given what the environment says.
    ///
    /// # Errors
    ///
    /// As [`EndpointArgs::resolve`], and if `--admin` holds no address.
    pub fn resolve(&self, variable: Option<&str>) -> Result<Orders, EndpointError> {
        let Some(admin) = &self.admin else {
            return self.endpoint.resolve(variable).map(Orders::AsSaidBy);
        };
        let address = HostPort::read(admin.trim(), None, "host:port, such as 127.0.0.1:7421")
            .map_err(|source| EndpointError { key: "--admin", source })?;
        Ok(Orders::At(Endpoint { address }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_go_to_the_admin_address_or_to_where_the_endpoint_says() {
        let args = |endpoint: Option<&str>, admin: Option<&str>| OperatorArgs {
            endpoint: EndpointArgs { endpoint: endpoint.map(str::to_owned) },
            admin: admin.map(str::to_owned),
        };
        let at = |text: &str| text.parse::<Endpoint>().unwrap();
        let resolve = |endpoint, admin| args(endpoint, admin).resolve(Some("v:1"));
        assert_eq!(resolve(None, Some("a:9")), Ok(Orders::At(at("a:9"))));
        assert_eq!(resolve(Some("b:2"), Some("a:9")), Ok(Orders::At(at("a:9"))));
        assert_eq!(resolve(Some("b:2"), None), Ok(Orders::AsSaidBy(at("b:2"))));
        assert_eq!(resolve(None, None), Ok(Orders::AsSaidBy(at("v:1"))));
        assert_eq!(resolve(None, Some("a")).unwrap_err().key, "--admin", "there is no usual port");

        let rack: Endpoint = "rack1:7420".parse().unwrap();
        for (said, reached) in [
            ("rack2:9", "rack2:9"),
            ("127.0.0.1:9", "127.0.0.1:9"),
            ("0.0.0.0:9", "rack1:9"),
            ("[::]:9", "rack1:9"),
        ] {
            let said = HostPort::read(said, None, EXPECTED).unwrap();
            assert_eq!(rack.beside(&said).to_string(), reached, "{said}");
        }
    }

    #[test]
    fn endpoints_are_read_as_people_write_them() {
        for (text, shown) in [
            ("127.0.0.1:7420", "127.0.0.1:7420"),
            ("127.0.0.1", "127.0.0.1:7420"),
            (" rack-3.example:9000", "rack-3.example:9000"),
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
        for (text, wrong) in [
            ("https://a:1", "TLS"),
            ("grpc://a:1", "unknown scheme"),
            ("", "is empty"),
            (":7420", "no host"),
            ("[nonsense]:1", "no IPv6 address"),
            ("a:b:1", "neither a name nor an address"),
            ("a:0", "no port from 1 to 65535"),
            ("a:65536", "no port from 1 to 65535"),
            ("a:", "no port from 1 to 65535"),
            ("a:1/v1", "goes on after the port"),
            ("[::1]x:1", "goes on after the port"),
            ("a b:1", "a blank"),
            ("user:pw@a:1", "a user or a password"),
            ("http://user:pw@a:1", "a user or a password"),
        ] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains(wrong) && !error.contains("pw"), "{error}");
        }
    }

    #[test]
    fn a_flag_goes_over_the_environment_over_the_default() {
        let flag = EndpointArgs { endpoint: Some("flag:1".to_owned()) };
        let none = EndpointArgs::default();
        assert_eq!(flag.resolve(Some("variable:2")).unwrap().to_string(), "flag:1");
        assert_eq!(none.resolve(Some("variable:2")).unwrap().to_string(), "variable:2");
        assert_eq!(none.resolve(None).unwrap().to_string(), "127.0.0.1:7420");
        let wrong = EndpointArgs { endpoint: Some("https://x".to_owned()) };
        assert_eq!(wrong.resolve(Some("b:2")).unwrap_err().key, "--endpoint");
        assert_eq!(none.resolve(Some("https://x")).unwrap_err().key, ENDPOINT_VARIABLE);
    }
}
