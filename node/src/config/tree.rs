//! Values that remember where they came from, and what can be wrong with them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Where a value was set.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    /// Nowhere.
    Default,
    File(Arc<Path>),
    Variable(Arc<str>),
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("by default"),
            Self::File(path) => write!(f, "in {}", path.display()),
            Self::Variable(name) => write!(f, "in the variable {name}"),
            Self::Flag => f.write_str("on the command line"),
        }
    }
}

/// One value.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) origin: Origin,
    pub(super) kind: Kind,
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    Table(BTreeMap<String, Node>),
    List(Vec<Node>),
    /// Neither table nor array.
    Scalar(toml::Value),
    /// A variable's value, whose type only its reader knows.
    Text(String),
}

impl Node {
    pub(super) fn table(origin: Origin) -> Self {
        Self { origin, kind: Kind::Table(BTreeMap::new()) }
    }

    pub(super) fn from_toml(value: toml::Value, origin: &Origin) -> Self {
        let kind = match value {
            toml::Value::Table(table) => Kind::Table(
                table.into_iter().map(|(key, v)| (key, Self::from_toml(v, origin))).collect(),
            ),
            toml::Value::Array(array) => {
                Kind::List(array.into_iter().map(|v| Self::from_toml(v, origin)).collect())
            }
            scalar => Kind::Scalar(scalar),
        };
        Self { origin: origin.clone(), kind }
    }

    /// Puts `stronger` over this: tables key by key, anything else whole.
    pub(super) fn merge(&mut self, stronger: Self) {
        match (&mut self.kind, stronger.kind) {
            (Kind::Table(table), Kind::Table(over)) => {
                for (key, node) in over {
                    match table.get_mut(&key) {
                        Some(below) => below.merge(node),
                        None => {
                            table.insert(key, node);
                        }
                    }
                }
            }
            (_, kind) => *self = Self { origin: stronger.origin, kind },
        }
    }
}

/// What is wrong with a tree, and where.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) wrong: Wrong,
    pub(super) origin: Origin,
    /// Innermost first, for it is found on the way out.
    path: Vec<String>,
}

#[derive(Debug)]
pub(super) enum Wrong {
    Unknown { known: &'static [&'static str] },
    Value(String),
    Missing,
}

impl Problem {
    pub(super) fn new(wrong: Wrong) -> Self {
        Self { wrong, origin: Origin::Default, path: Vec::new() }
    }

    /// The key with its sections.
    pub(super) fn key(&self) -> String {
        let path: Vec<_> = self.path.iter().rev().map(String::as_str).collect();
        path.join(".")
    }

    /// The same problem, seen from one table further out.
    pub(super) fn below(mut self, key: &str) -> Self {
        self.path.push(key.to_owned());
        self
    }

    /// The same problem; `origin` is where it was set, unless that is known more exactly.
    pub(super) fn set_in(mut self, origin: &Origin) -> Self {
        if matches!(self.origin, Origin::Default) {
            self.origin = origin.clone();
        }
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.wrong {
            Wrong::Unknown { .. } => f.write_str("unknown key"),
            Wrong::Value(message) => f.write_str(message),
            Wrong::Missing => f.write_str("missing key"),
        }
    }
}

impl std::error::Error for Problem {}

impl serde::de::Error for Problem {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(Wrong::Value(message.to_string()))
    }

    fn unknown_field(field: &str, known: &'static [&'static str]) -> Self {
        Self::new(Wrong::Unknown { known }).below(field)
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(Wrong::Missing).below(field)
    }
}
