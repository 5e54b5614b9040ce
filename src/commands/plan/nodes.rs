//! The machines of `tercet plan --nodes`: a TOML file of nodes, and what if some came or went.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use coordinator::planner::{StepTime, WorkerSpec};
use node::config::ByteSize;
use serde::Deserialize;

/// The largest file of nodes that is read: a thousand nodes written out in full are less.
const FILE_MAX: ByteSize = ByteSize(1 << 20);

/// Workers that are planned for at most: racks full of them, and not a slip of the finger.
pub(super) const WORKERS_MAX: usize = 1024;

/// Why there are no machines to plan for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum NodesError {
    /// The file cannot be read.
    #[error("failed to read {}", path.display())]
    Read { path: PathBuf, source: node::config::TextError },
    /// It is not TOML, or says what nobody asks for.
    #[error("{}:{line} is no file of nodes: {message}", path.display())]
    Parse { path: PathBuf, line: usize, message: String },
    /// A node is described badly.
    #[error("node {id:?}: {what}")]
    Node { id: String, what: String },
    /// Too many.
    #[error("{workers} workers are described, at most {WORKERS_MAX} are planned for")]
    TooMany { workers: usize },
    /// `--what-if` names nobody.
    #[error("--what-if {change}: there is no node {id:?}")]
    Unknown { change: String, id: String },
    /// `--what-if` adds somebody who is there.
    #[error("--what-if {change}: there is a node {id:?} already")]
    Known { change: String, id: String },
}

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    node: Vec<Node>,
}

/// One table of the file: a worker, or several equal ones.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Node {
    id: String,
    /// Whatever is not said is as for this node, which stands before.
    like: Option<String>,
    machine: Option<String>,
    rack: Option<String>,
    memory: Option<ByteSize>,
    steps: Option<Vec<Step>>,
    count: Option<usize>,
}

/// What a step of so many rows takes.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    rows: u32,
    layer_ms: f64,
    head_ms: f64,
}

/// The workers that a file of nodes describes.
pub(super) fn read(path: &Path) -> Result<Vec<WorkerSpec>, NodesError> {
    let text = node::config::read_text(path, FILE_MAX)
        .map_err(|source| NodesError::Read { path: path.to_owned(), source })?;
    let file = toml::from_str(&text).map_err(|error| {
        let (line, message) = node::config::toml_problem(&text, &error);
        NodesError::Parse { path: path.to_owned(), line, message }
    })?;
    workers(file)
}

fn workers(file: File) -> Result<Vec<WorkerSpec>, NodesError> {
    let mut known: BTreeMap<String, WorkerSpec> = BTreeMap::new();
    let mut all: Vec<WorkerSpec> = Vec::new();
    for node in file.node {
        let wrong = |what: &str| NodesError::Node { id: node.id.clone(), what: what.to_owned() };
        if node.id.is_empty() {
            return Err(wrong("a node needs an id"));
        }
        let model = match &node.like {
            Some(like) => Some(known.get(like).ok_or_else(|| {
                wrong(&format!("it is like {like:?}, and there is no such node before it"))
            })?),
            None => None,
        };
        let steps = match &node.steps {
            Some(steps) => Some(steps_ns(steps).map_err(|what| wrong(&what))?),
            None => model.map(|model| model.steps.clone()),
        };
        let spec = WorkerSpec {
            id: node.id.clone(),
            // Whose copy it is says nothing of the machine it runs on.
            machine: node.machine.clone().unwrap_or_default(),
            rack: node.rack.clone().or_else(|| model.map(|m| m.rack.clone())).unwrap_or_default(),
            memory_bytes: node
                .memory
                .map(ByteSize::bytes)
                .or_else(|| model.map(|model| model.memory_bytes))
                .ok_or_else(|| wrong("it needs memory, such as \"32GiB\", or like"))?,
            steps: steps.ok_or_else(|| wrong("it needs steps, or like"))?,
        };
        let count = node.count.unwrap_or(1);
        if count == 0 || count > WORKERS_MAX - all.len() {
            return Err(match count {
                0 => wrong("count must be at least 1"),
                _ => NodesError::TooMany { workers: all.len().saturating_add(count) },
            });
        }
        for number in 1..=count {
            let id = match count {
                1 => node.id.clone(),
                _ => format!("{}-{number}", node.id),
            };
            all.push(WorkerSpec { id, ..spec.clone() });
        }
        if known.insert(node.id.clone(), spec).is_some() {
            return Err(wrong("there are two of this id"));
        }
    }
    let mut ids: Vec<_> = all.iter().map(|worker| &worker.id).collect();
    ids.sort_unstable();
    match ids.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(NodesError::Node {
            id: pair[0].clone(),
            what: "there are two of this id".to_owned(),
        }),
        None => Ok(all),
    }
}

fn steps_ns(steps: &[Step]) -> Result<Vec<StepTime>, String> {
    if steps.is_empty() {
        return Err("it needs the time of one step at least".to_owned());
    }
    // Milliseconds in u64 nanoseconds: an hour for a layer is a slip of the finger.
    let ns = |ms: f64, least: f64| (ms >= least && ms <= 3.6e6).then(|| (ms * 1e6).round() as u64);
    let time = |step: &Step| {
        if step.rows == 0 {
            return Err("steps have at least one row".to_owned());
        }
        let wrong =
            |key: &str| format!("{key} must be from 0 ms to an hour, and a layer takes time");
        Ok(StepTime {
            rows: step.rows,
            layer_ns: ns(step.layer_ms, 1e-6).ok_or_else(|| wrong("layer_ms"))?,
            head_ns: ns(step.head_ms, 0.0).ok_or_else(|| wrong("head_ms"))?,
        })
    };
    steps.iter().map(time).collect()
}

/// A node that comes or goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A copy of another one, on a machine of its own.
    Add { id: String, like: String },
    /// It is gone.
    Remove { id: String },
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Add { id, like } => write!(f, "add:{id}={like}"),
            Self::Remove { id } => write!(f, "remove:{id}"),
        }
    }
}

impl FromStr for Change {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not add:NAME=NODE or remove:NODE");
        let change = match text.split_once(':').ok_or_else(wrong)? {
            ("add", names) => {
                let (id, like) = names.split_once('=').ok_or_else(wrong)?;
                Self::Add { id: id.to_owned(), like: like.to_owned() }
            }
            ("remove", id) => Self::Remove { id: id.to_owned() },
            _ => return Err(wrong()),
        };
        match &change {
            Self::Add { id, like } if id.is_empty() || like.is_empty() => Err(wrong()),
            Self::Remove { id } if id.is_empty() => Err(wrong()),
            _ => Ok(change),
        }
    }
}

/// The workers after some came or went, in the order of the changes.
pub(super) fn changed(
    workers: &[WorkerSpec],
    changes: &[Change],
) -> Result<Vec<WorkerSpec>, NodesError> {
    let mut workers = workers.to_vec();
    for change in changes {
        let find = |workers: &[WorkerSpec], id: &str| {
            workers.iter().position(|worker| worker.id == id).ok_or_else(|| NodesError::Unknown {
                change: change.to_string(),
                id: id.to_owned(),
            })
        };
        match change {
            Change::Remove { id } => {
                let place = find(&workers, id)?;
                workers.remove(place);
            }
            Change::Add { id, like } => {
                let like = workers[find(&workers, like)?].clone();
                if find(&workers, id).is_ok() {
                    return Err(NodesError::Known { change: change.to_string(), id: id.clone() });
                }
                if workers.len() == WORKERS_MAX {
                    return Err(NodesError::TooMany { workers: workers.len() + 1 });
                }
                workers.push(WorkerSpec { id: id.clone(), machine: String::new(), ..like });
            }
        }
    }
    Ok(workers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<WorkerSpec>, String> {
        let file = toml::from_str(text).map_err(|error| error.to_string())?;
        workers(file).map_err(|error| error.to_string())
    }

    const ONE: &str = "[[node]]\nid = 'a'\nmemory = '2GiB'\nrack = 'r'\nmachine = 'm'\n\
                       steps = [{ rows = 1, layer_ms = 1.5, head_ms = 0 }]\n";

    #[test]
    fn nodes_are_counted_and_copied() {
        let text = format!("{ONE}[[node]]\nid = 'b'\nlike = 'a'\nmemory = '1GiB'\ncount = 2\n");
        let found = parse(&text).unwrap();
        let ids: Vec<_> = found.iter().map(|w| w.id.as_str()).collect();
        assert_eq!(ids, ["a", "b-1", "b-2"]);
        assert_eq!((found[2].memory_bytes, found[2].rack.as_str()), (1 << 30, "r"));
        assert_eq!(found[2].machine, "", "a copy runs elsewhere");
        assert_eq!(found[2].steps, [StepTime { rows: 1, layer_ns: 1_500_000, head_ns: 0 }]);
    }

    #[test]
    fn a_file_that_is_wrong_is_named_with_its_line_in_one_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("{ONE}sped = 1\n")).unwrap();
        let error = read(file.path()).unwrap_err().to_string();
        let start =
            format!("{}:7 is no file of nodes: unknown field `sped`", file.path().display());
        assert!(error.starts_with(&start) && !error.contains('\n'), "{error}");
        std::fs::write(file.path(), "\n[[node]\n").unwrap();
        let error = read(file.path()).unwrap_err().to_string();
        assert!(error.contains(":2 is no file") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn what_is_wrong_with_a_node_is_said() {
        for (more, want) in [
            ("[[node]]\nid = 'b'\n", "node \"b\": it needs memory, such as"),
            ("[[node]]\nid = 'b'\nmemory = '1GiB'\n", "node \"b\": it needs steps, or like"),
            ("[[node]]\nid = 'b'\nlike = 'c'\n", "node \"b\": it is like \"c\""),
            ("[[node]]\nid = 'a'\nlike = 'a'\n", "there are two of this id"),
            ("[[node]]\nid = 'b'\nlike = 'a'\ncount = 0\n", "count must be at least 1"),
            ("[[node]]\nid = 'b'\nlike = 'a'\ncount = 2000\n", "2001 workers are described"),
            (
                "[[node]]\nid = 'b'\nlike = 'a'\nsteps = [{ rows = 0, layer_ms = 1, head_ms = 1 }]\n",
                "at least one row",
            ),
            (
                "[[node]]\nid = 'b'\nlike = 'a'\nsteps = [{ rows = 1, layer_ms = nan, head_ms = 1 }]\n",
                "layer_ms must be",
            ),
            (
                "[[node]]\nid = 'b'\nlike = 'a'\nsteps = [{ rows = 1, layer_ms = 1, head_ms = -1 }]\n",
                "head_ms must be",
            ),
            ("[[node]]\nid = 'b'\nlike = 'a'\nsteps = []\n", "the time of one step"),
            ("[[node]]\nid = 'b'\nlike = 'a'\ncores = 3\n", "unknown field"),
        ] {
            let error = parse(&format!("{ONE}{more}")).unwrap_err();
            assert!(error.contains(want), "{more}: {error}");
        }
        let copies =
            "[[node]]\nid = 'x'\nlike = 'a'\ncount = 2\n[[node]]\nid = 'x-1'\nlike = 'a'\n";
        let error = parse(&format!("{ONE}{copies}")).unwrap_err();
        assert!(error.contains("\"x-1\": there are two of this id"), "{error}");
    }

    #[test]
    fn changes_come_in_order_and_name_nodes_that_are_there() {
        let workers = parse(ONE).unwrap();
        let ids = |changes: &str| -> Result<Vec<String>, String> {
            let changes: Vec<Change> = changes.split(',').map(|c| c.parse().unwrap()).collect();
            let found = changed(&workers, &changes).map_err(|error| error.to_string())?;
            Ok(found.into_iter().map(|worker| worker.id).collect())
        };
        assert_eq!(ids("add:b=a,remove:a,add:c=b"), Ok(vec!["b".into(), "c".into()]));
        assert_eq!(ids("remove:z"), Err("--what-if remove:z: there is no node \"z\"".into()));
        assert_eq!(ids("add:a=a"), Err("--what-if add:a=a: there is a node \"a\" already".into()));
        for wrong in ["add:b", "add:=a", "add:b=", "remove:", "drop:a", "a"] {
            assert!(wrong.parse::<Change>().is_err(), "{wrong}");
        }
    }
}
