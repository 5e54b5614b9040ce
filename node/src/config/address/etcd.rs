//! Where etcd is: one or more URLs without a path and without a password.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{AddressError, HostPort, SECRET};

/// What etcd listens on for clients, unless it is told otherwise.
const DEFAULT_PORT: u16 = 2379;

/// How an endpoint is written.
const EXPECTED: &str = "http://host:port, such as http://etcd:2379";

/// Members of an etcd cluster that are more than this are a mistake: etcd advises at most seven.
const ENDPOINTS_MAX: usize = 64;

/// One member of an etcd cluster: `http://host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdEndpoint {
    address: HostPort,
}

impl fmt::Display for EtcdEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.address)
    }
}

impl FromStr for EtcdEndpoint {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let text = text.trim();
        // Before anything else: this error says where a password belongs.
        if text.contains('@') {
            return Err(AddressError::new(
                text,
                SECRET,
                format!("{EXPECTED}, and give them as etcd.user and etcd.password_file"),
            ));
        }
        let scheme = text.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
        let rest = match scheme.as_deref() {
            Some("http") => &text["http://".len()..],
            Some("https") => {
                let wrong = "asks for TLS, which is not supported for etcd yet";
                let expected = format!("{EXPECTED}, on a trusted network");
                return Err(AddressError::new(text, wrong, expected));
            }
            Some(_) => return Err(AddressError::new(text, "has an unknown scheme", EXPECTED)),
            None => text,
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let address = HostPort::read(rest, None, EXPECTED).map_err(|error| error.about(text))?;
        Ok(Self { address })
    }
}

/// Where etcd is: at least one endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdEndpoints(Vec<EtcdEndpoint>);

impl EtcdEndpoints {
    /// The endpoints as URLs.
    pub fn urls(&self) -> Vec<String> {
        self.0.iter().map(ToString::to_string).collect()
    }

    fn new(endpoints: Vec<EtcdEndpoint>) -> Result<Self, AddressError> {
        match endpoints.len() {
            0 => Err(AddressError::new("", "names no endpoint", EXPECTED)),
            1..=ENDPOINTS_MAX => Ok(Self(endpoints)),
            _ => Err(AddressError::new("", "names too many endpoints", "at most 64")),
        }
    }
}

impl Default for EtcdEndpoints {
    /// The member that a machine of its own has.
    fn default() -> Self {
        let address = HostPort { host: "127.0.0.1".to_owned(), port: DEFAULT_PORT };
        Self(vec![EtcdEndpoint { address }])
    }
}

impl fmt::Display for EtcdEndpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.urls().join(", "))
    }
}

/// The endpoints in a list with commas. Blanks around an endpoint are passed over; one that is
/// empty is not: it is a mistake, and nobody can tell which endpoint is missing.
fn parts(text: &str) -> Result<Vec<EtcdEndpoint>, AddressError> {
    // One more than may be, so that a longer list is noticed without being read.
    let parts = text.split(',').take(ENDPOINTS_MAX + 1);
    parts
        .map(|part| match part.trim() {
            "" if text.contains(',') => {
                Err(AddressError::new(text, "has an empty entry", "no comma too many"))
            }
            part => part.parse(),
        })
        .collect()
}

impl FromStr for EtcdEndpoints {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        Self::new(parts(text)?)
    }
}

impl Serialize for EtcdEndpoints {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.urls().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for EtcdEndpoints {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = EtcdEndpoints;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of endpoints such as [\"http://etcd:2379\"]")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<EtcdEndpoints, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<EtcdEndpoints, A::Error> {
                let mut endpoints = Vec::new();
                // Bounded by what a file holds; `new` counts.
                while let Some(text) = list.next_element::<String>()? {
                    endpoints.extend(parts(&text).map_err(de::Error::custom)?);
                }
                EtcdEndpoints::new(endpoints).map_err(de::Error::custom)
            }
        }
        deserializer.deserialize_any(List)
    }
}
