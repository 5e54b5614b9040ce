//! The processes of a bench, each behind a guard: started, listened to, ended.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use futures::future::{join_all, select_all};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::groups::{Group, GroupError};
use super::guard::STARTED;

/// How long a process may take to say that it listens: a worker reads its store before, and may have a
/// tenth of a CPU for that.
const LINE_TIMEOUT: Duration = Duration::from_secs(600);

/// How long a guard may take to end its process: the kernel ends it at once, and frees its memory.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// Characters of a log's last line that are told.
const LOG_CHARS: usize = 400;

/// Ticks of the clock in which the kernel tells of used CPU time, per second: so many on every
/// architecture, whatever it counts in itself.
const TICKS_PER_S: f64 = 100.0;

/// Variables of the environment that change what the programs do.
const SETTINGS: [&str; 4] = ["TERCET_", "OTEL_", "RUST_LOG", "ETCD_"];

/// Why a process is not there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// Nowhere to keep its log.
    #[error("failed to make a folder for logs")]
    Folder(#[source] io::Error),
    /// The system does not say which program this is.
    #[error("failed to find this program")]
    Program(#[source] io::Error),
    /// It did not start.
    #[error("failed to start {name}")]
    Start {
        /// Which.
        name: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// It ended though nobody ended it.
    #[error("{name} ended: {last_line}")]
    Ended {
        /// Which.
        name: String,
        /// Of what it and its guard said.
        last_line: String,
    },
    /// It said nothing.
    #[error("{name} did not say that it listens within {waited:?}: {last_line}")]
    Silent {
        /// Which.
        name: String,
        /// How long it had.
        waited: Duration,
        /// Of what it said beside that.
        last_line: String,
    },
    /// It does not end.
    #[error("{name} did not end within {waited:?}")]
    Stuck {
        /// Which.
        name: String,
        /// How long it had.
        waited: Duration,
    },
    /// Its group could not be made.
    #[error(transparent)]
    Group(#[from] GroupError),
}

/// What is started.
pub(super) struct Spec {
    /// What people know it by.
    pub(super) name: String,
    /// `None`: this program.
    pub(super) program: Option<&'static str>,
    pub(super) arguments: Vec<OsString>,
    pub(super) group: Option<Group>,
    /// A folder that goes with it.
    pub(super) remove: Option<PathBuf>,
}

/// All processes that run, in the order in which they were started.
#[derive(Debug)]
pub(super) struct Processes {
    program: PathBuf,
    running: Vec<Guarded>,
    /// Logs. Last, so that it goes when all have ended.
    folder: TempDir,
}

/// A process and its guard. The guard ends it when this is dropped.
#[derive(Debug)]
struct Guarded {
    name: String,
    id: u32,
    guard: Child,
    /// While it is open the process runs.
    _held: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    log: PathBuf,
    /// The guard removes it.
    _group: Option<Group>,
}

impl Processes {
    /// None yet.
    pub(super) fn new() -> Result<Self, ProcessError> {
        let prefix = format!("tercet-bench-{}-", std::process::id());
        let folder = tempfile::Builder::new().prefix(&prefix).tempdir();
        let program = std::env::current_exe().map_err(ProcessError::Program)?;
        Ok(Self { program, running: Vec::new(), folder: folder.map_err(ProcessError::Folder)? })
    }

    /// Where logs are, and whatever else goes with the processes.
    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// How many run.
    pub(super) fn count(&self) -> usize {
        self.running.len()
    }

    /// Starts one more, and waits until it has a process id.
    pub(super) async fn start(&mut self, spec: Spec) -> Result<(), ProcessError> {
        let Spec { name, program, arguments, group, remove } = spec;
        let log = self.folder.path().join(format!("{name}.log"));
        let failed = |source| ProcessError::Start { name: name.clone(), source };
        let mut command = Command::new(&self.program);
        command.args(["bench", "guard"]);
        if let Some(group) = &group {
            command.arg("--group").arg(&group.folder).arg("--home").arg(&group.home);
        }
        if let Some(remove) = &remove {
            command.arg("--remove").arg(remove);
        }
        let program = program.map_or_else(|| self.program.clone().into(), OsString::from);
        command.arg("--").arg(program).args(arguments);
        for (variable, _) in std::env::vars_os() {
            let text = variable.to_string_lossy();
            if SETTINGS.iter().any(|start| text.starts_with(start)) {
                command.env_remove(&variable);
            }
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(File::create(&log).map_err(failed)?);
        // Ctrl-C is for the bench, which ends everything in order.
        command.process_group(0);
        let mut guard = command.spawn().map_err(failed)?;
        let (Some(held), Some(stdout)) = (guard.stdin.take(), guard.stdout.take()) else {
            return Err(failed(io::Error::other("it has no standard input and output")));
        };
        let lines = BufReader::new(stdout).lines();
        self.running.push(Guarded { name, id: 0, guard, _held: held, lines, log, _group: group });
        let index = self.running.len() - 1;
        let id = self.line(index, STARTED).await?;
        self.running[index].id = id.parse().unwrap_or_default();
        Ok(())
    }

    /// The rest of the next line of process `index` that begins so.
    pub(super) async fn line(&mut self, index: usize, begin: &str) -> Result<String, ProcessError> {
        self.running[index].line(begin).await
    }

    /// The rest of the next line that begins so, of each process from `first` on.
    pub(super) async fn lines(&mut self, first: usize, begin: &str) -> Result<(), ProcessError> {
        let lines = self.running[first..].iter_mut().map(|process| process.line(begin));
        futures::future::try_join_all(lines).await.map(drop)
    }

    /// Process ids of all from `first` on.
    pub(super) fn ids(&self, first: usize) -> Vec<u32> {
        self.running[first..].iter().map(|process| process.id).collect()
    }

    /// Waits until one ends, which none does by itself.
    pub(super) async fn failed(&mut self) -> ProcessError {
        if self.running.is_empty() {
            return std::future::pending().await;
        }
        let ends = self.running.iter_mut().map(|process| Box::pin(process.guard.wait()));
        let (_, index, _) = select_all(ends).await;
        self.running[index].ended()
    }

    /// Ends all from `first` on, at once.
    pub(super) async fn end(&mut self, first: usize) -> Result<(), ProcessError> {
        let ending = self.running.drain(first..).map(Guarded::end);
        join_all(ending).await.into_iter().collect()
    }
}

impl Guarded {
    async fn line(&mut self, begin: &str) -> Result<String, ProcessError> {
        let waiting = async {
            while let Ok(Some(line)) = self.lines.next_line().await {
                if let Some(rest) = line.strip_prefix(begin) {
                    return Some(rest.to_owned());
                }
            }
            // What it says of its end is whole when its guard has ended.
            let _ = self.guard.wait().await;
            None
        };
        match tokio::time::timeout(LINE_TIMEOUT, waiting).await {
            Ok(Some(rest)) => Ok(rest),
            Ok(None) => Err(self.ended()),
            Err(_) => Err(ProcessError::Silent {
                name: self.name.clone(),
                waited: LINE_TIMEOUT,
                last_line: self.last_line(),
            }),
        }
    }

    fn ended(&self) -> ProcessError {
        ProcessError::Ended { name: self.name.clone(), last_line: self.last_line() }
    }

    /// What it said last. The guard's word comes after the program's, and only tells how it ended.
    fn last_line(&self) -> String {
        last_line(&fs::read_to_string(&self.log).unwrap_or_default())
    }

    async fn end(self) -> Result<(), ProcessError> {
        let Self { name, mut guard, _held: held, _group: group, .. } = self;
        drop(held);
        let ended = tokio::time::timeout(END_TIMEOUT, guard.wait()).await;
        drop(group);
        match ended {
            // How does not matter: it was told to, or had ended before.
            Ok(_) => Ok(()),
            Err(_) => Err(ProcessError::Stuck { name, waited: END_TIMEOUT }),
        }
    }
}

/// The last line of a log that says why something ended: not what the guard adds, unless that is all.
fn last_line(log: &str) -> String {
    let lines = || log.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut last = lines().rev();
    let (end, before) = (last.next(), last.next());
    let of_guard = end.is_some_and(|line| line.contains(" ended ("));
    let line = if of_guard { before.or(end) } else { end };
    let line = line.unwrap_or("it said nothing");
    line.strip_prefix("error: ").unwrap_or(line).chars().take(LOG_CHARS).collect()
}

/// CPU time that a process has used, in seconds; 0 if there is none of this id.
pub(super) fn cpu_seconds_of(id: u32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    cpu_seconds(&text).unwrap_or(0.0)
}

/// User and system time in the text of `/proc/PID/stat`, in seconds.
fn cpu_seconds(stat: &str) -> Option<f64> {
    // The name, in brackets, may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    let (user, system) = (ticks()?, ticks()?);
    Some((user.checked_add(system)?) as f64 / TICKS_PER_S)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_behind_any_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 4 0 100 1 1";
        assert_eq!(cpu_seconds(stat), Some(3.0));
        for wrong in ["", "7 (a S 1", "7 (a) S 1 7 7 0 -1 4194560 100 0 0 0 x 50"] {
            assert_eq!(cpu_seconds(wrong), None, "{wrong}");
        }
        let own = fs::read_to_string("/proc/self/stat").unwrap();
        assert!(cpu_seconds(&own).is_some());
    }

    #[test]
    fn the_reason_of_an_end_is_found() {
        let log =
            "INFO starting\nerror: there is no store at /x\nerror: tercet ended (exit status: 1)\n";
        assert_eq!(last_line(log), "there is no store at /x");
        assert_eq!(
            last_line("error: failed to start etcd: not found\n"),
            "failed to start etcd: not found"
        );
        assert_eq!(last_line("error: etcd ended (signal: 9)\n"), "etcd ended (signal: 9)");
        assert_eq!(last_line("\n"), "it said nothing");
        assert_eq!(last_line(&"x".repeat(9999)).len(), LOG_CHARS);
    }
}
