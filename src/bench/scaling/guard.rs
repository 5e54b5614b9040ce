//! A process that is ended, and its control group removed, however the one ends that wanted it.
//!
//! ```text
//! tercet bench scaling ──pipe──▶ tercet bench guard ──▶ etcd, coordinator or worker
//! ```
//!
//! A process that is killed can clean up nothing. So each process of a bench has a guard, which reads
//! from the bench: when that has ended, in whichever way, there is nothing to read any more, and the
//! guard ends its process and removes what it leaves.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use client::CommandError;
use client::command::TextWriter;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// What stands before the id of the process in the guard's first line.
pub(super) const STARTED: &str = "started ";

/// How long the kernel may take to let go of a group whose last process has ended.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(2);

/// How often that is tried.
const REMOVE_PAUSE: Duration = Duration::from_millis(10);

/// What is guarded.
#[derive(Clone, Debug)]
pub struct Guard {
    /// Name or path of the program, and its arguments.
    pub program: Vec<OsString>,
    /// The control group that it starts in, and the one to come back to. The first is removed.
    pub group: Option<(PathBuf, PathBuf)>,
    /// A folder that is removed when it was ended. One that ends by itself leaves it: whoever wanted it
    /// looks there for the reason, and removes it then.
    pub remove: Option<PathBuf>,
}

/// Why a guard failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuardError {
    /// Nothing is to be started.
    #[error("there is no program to start")]
    NoProgram,
    /// A control group takes no process.
    #[error("failed to move to the control group {}", folder.display())]
    Move {
        /// Which.
        folder: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The program did not start.
    #[error("failed to start {program}")]
    Start {
        /// Which.
        program: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// It ended though nobody ended it.
    #[error("{program} ended ({status})")]
    Ended {
        /// Which.
        program: String,
        /// How.
        status: ExitStatus,
    },
    /// It did not end.
    #[error("failed to end {program}")]
    End {
        /// Which.
        program: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// Something is left of it.
    #[error("failed to remove {}", path.display())]
    Remove {
        /// What.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Nobody could be told that it has started.
    #[error("failed to say that it has started")]
    Output(#[from] CommandError),
}

/// Runs the program until standard input ends or `stop` fires, then ends it. Says its process id first.
///
/// # Errors
///
/// If it ended by itself, or something is left of it.
pub async fn run(guard: &Guard, stop: &CancellationToken) -> Result<(), GuardError> {
    let outcome = hold(guard, stop).await;
    let mut removed = remove_group(guard).await;
    if outcome.is_ok() {
        removed = remove_folder(guard).and(removed);
    }
    outcome.and(removed)
}

async fn hold(guard: &Guard, stop: &CancellationToken) -> Result<(), GuardError> {
    let [program, arguments @ ..] = &guard.program[..] else { return Err(GuardError::NoProgram) };
    let program_name = program.to_string_lossy().into_owned();
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let mut child = start(guard, command, &program_name)?;
    if let Some(id) = child.id() {
        TextWriter::stdout().text(&format!("{STARTED}{id}\n"))?;
    }
    let mut input = tokio::io::stdin();
    let mut ignored = [0; 64];
    let orphaned = async { while let Ok(1..) = input.read(&mut ignored).await {} };
    tokio::select! {
        ended = child.wait() => {
            return Err(match ended {
                Ok(status) => GuardError::Ended { program: program_name, status },
                Err(source) => GuardError::End { program: program_name, source },
            });
        }
        () = orphaned => {}
        () = stop.cancelled() => {}
    }
    // Not asked to leave well: nobody needs it any more, and it holds nothing that lasts.
    child.kill().await.map_err(|source| GuardError::End { program: program_name, source })
}

/// Starts the program in the group: a process is born where the one is that starts it.
fn start(guard: &Guard, mut command: Command, program: &str) -> Result<Child, GuardError> {
    let started = |child: io::Result<Child>| {
        child.map_err(|source| GuardError::Start { program: program.to_owned(), source })
    };
    let Some((group, home)) = &guard.group else { return started(command.spawn()) };
    move_to(group)?;
    let child = command.spawn();
    move_to(home)?;
    started(child)
}

fn move_to(folder: &Path) -> Result<(), GuardError> {
    // 0 is whoever writes it.
    std::fs::write(folder.join("cgroup.procs"), "0")
        .map_err(|source| GuardError::Move { folder: folder.to_owned(), source })
}

async fn remove_group(guard: &Guard) -> Result<(), GuardError> {
    if let Some((group, _)) = &guard.group {
        let deadline = Instant::now() + REMOVE_TIMEOUT;
        while let Err(source) = std::fs::remove_dir(group) {
            if source.kind() == io::ErrorKind::NotFound {
                break;
            }
            if Instant::now() >= deadline {
                return Err(GuardError::Remove { path: group.clone(), source });
            }
            tokio::time::sleep(REMOVE_PAUSE).await;
        }
    }
    Ok(())
}

fn remove_folder(guard: &Guard) -> Result<(), GuardError> {
    if let Some(path) = &guard.remove
        && let Err(source) = std::fs::remove_dir_all(path)
        && source.kind() != io::ErrorKind::NotFound
    {
        return Err(GuardError::Remove { path: path.clone(), source });
    }
    Ok(())
}
