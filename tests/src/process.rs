//! Programs under test: started, watched, and ended by their process id.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How often a condition is looked at again.
const POLL: Duration = Duration::from_millis(20);

/// Names the program to test in place of this build's.
const PROGRAM: &str = "TEST_PROGRAM";

/// The `tercet` program of this build, or the one that `TEST_PROGRAM` names.
///
/// # Panics
///
/// If it was not built: `cargo build` makes it, `./test` does both.
pub fn tercet() -> PathBuf {
    if let Some(program) = std::env::var_os(PROGRAM) {
        return program.into();
    }
    let test = std::env::current_exe().expect("a test knows where it is");
    let folder = test.parent().and_then(|deps| deps.parent()).expect("tests lie in target/*/deps");
    let program = folder.join("tercet");
    assert!(program.exists(), "{} is missing: run `cargo build` first", program.display());
    program
}

/// An address of the loopback network that nothing else in this test run was given.
///
/// Sockets that a program opens by itself get ports of 127.0.0.1, so a port of this address that is
/// free stays so until the caller's program takes it.
///
/// # Panics
///
/// If this process has asked for more than 250.
pub fn own_address() -> Ipv4Addr {
    static GIVEN: AtomicU8 = AtomicU8::new(0);
    let [.., high, low] = std::process::id().to_be_bytes();
    let count = GIVEN.fetch_add(1, Ordering::Relaxed);
    assert!(count < 250, "a test process has at most 250 addresses");
    Ipv4Addr::new(127, high, low, count + 2)
}

/// Two free ports of `address`.
///
/// # Panics
///
/// If it has none left.
pub fn free_ports(address: Ipv4Addr) -> (u16, u16) {
    let bind = || TcpListener::bind((address, 0)).expect("loopback has a free port");
    let port = |listener: &TcpListener| {
        listener.local_addr().expect("a bound socket has an address").port()
    };
    // Both at once, so that they differ.
    let (first, second) = (bind(), bind());
    (port(&first), port(&second))
}

/// The kernel tells times of processes in these.
pub const TICKS_PER_S: u64 = 100;

/// What a process has computed so far, in ticks of [`TICKS_PER_S`].
///
/// # Panics
///
/// If it is gone.
pub fn computed_ticks(id: u32) -> u64 {
    let stat = proc_file(id, "stat");
    // The second field is a name and may hold anything.
    let (_, fields) = stat.rsplit_once(')').expect("a name ends");
    let number = |field: &str| field.parse::<u64>().expect("ticks are a number");
    fields.split_whitespace().skip(11).take(2).map(number).sum()
}

/// What all processes of the machine have computed, and what its CPUs could have, in ticks.
///
/// # Panics
///
/// If the system does not say.
pub fn busy_ticks() -> (u64, u64) {
    let stat = std::fs::read_to_string("/proc/stat").expect("Linux has /proc/stat");
    let line = stat.lines().next().expect("all CPUs together come first");
    // user, nice, system, idle, waiting for disks, interrupts of two kinds, other machines of the host
    let fields = line.split_whitespace().skip(1).take(8);
    let fields: Vec<u64> = fields.map(|field| field.parse().expect("ticks are a number")).collect();
    let total = fields.iter().sum();
    let idle: u64 = fields.iter().skip(3).take(2).sum();
    (total - idle, total)
}

/// A number of a line of `/proc/ID/status`; of memory in KiB.
///
/// # Panics
///
/// If the process is gone, or has no such line.
pub fn status_number(id: u32, field: &str) -> u64 {
    let status = proc_file(id, "status");
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or_else(|| panic!("{field} is a number"))
}

/// Memory of a process, in MiB: `VmRSS` as it is now, `VmHWM` the most there was.
///
/// # Panics
///
/// As [`status_number`].
pub fn memory_mib(id: u32, field: &str) -> u64 {
    status_number(id, field) / 1024
}

fn proc_file(id: u32, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{id}/{name}"));
    text.unwrap_or_else(|error| panic!("process {id}: {error}"))
}

/// Waits until `probe` gives a value.
///
/// # Panics
///
/// If it gives none within `limit`; `what` says what was waited for.
pub fn wait_for<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(start.elapsed() < limit, "waited {limit:?} in vain for {what}");
        pause();
    }
}

/// Between two looks at another process.
#[expect(clippy::disallowed_methods, reason = "other processes give no event to wait for")]
pub fn pause() {
    std::thread::sleep(POLL);
}

/// Runs `tercet` to its end.
///
/// # Panics
///
/// If it cannot be started.
pub fn run(arguments: &[&str]) -> Output {
    run_with(arguments, |_| {})
}

/// Runs `tercet` to its end, with changes to how it is started.
///
/// # Panics
///
/// If it cannot be started.
pub fn run_with(arguments: &[&str], change: impl FnOnce(&mut Command)) -> Output {
    let mut command = command(arguments);
    change(&mut command);
    command.stdin(Stdio::null()).output().expect("tercet starts")
}

/// Runs `tercet` to its end, with `input` to read.
///
/// # Panics
///
/// If it cannot be started.
pub fn run_with_input(arguments: &[&str], input: &str) -> Output {
    let mut command = command(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("tercet starts");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    // It may end without reading, and then says why.
    let sent = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().expect("a child can be waited for");
    assert!(sent.is_ok() || !output.status.success(), "it read what it was given");
    output
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(tercet());
    command.args(arguments);
    // What a person has set must not reach a test.
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy();
        if ["TERCET_", "OTEL_", "RUST_LOG"].iter().any(|start| name_text.starts_with(start)) {
            command.env_remove(&name);
        }
    }
    command
}

/// A `tercet` that keeps running. Killed when dropped.
pub struct Process {
    child: Child,
    log: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
    name: String,
}

impl Process {
    /// Starts `tercet` with `arguments`.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn start(name: &str, arguments: &[&str]) -> Self {
        Self::start_with(name, arguments, |_| {})
    }

    /// Starts `tercet` with `arguments` and changes to how it is started.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn start_with(name: &str, arguments: &[&str], change: impl FnOnce(&mut Command)) -> Self {
        let mut command = command(arguments);
        change(&mut command);
        Self::spawn(name, command)
    }

    /// Starts any program.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn spawn(name: &str, mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{name} starts: {error}"));
        let log = Arc::new(Mutex::new(String::new()));
        let readers = vec![
            collect(child.stdout.take().expect("stdout is piped"), log.clone()),
            collect(child.stderr.take().expect("stderr is piped"), log.clone()),
        ];
        Self { child, log, readers, name: name.into() }
    }

    /// What it has printed, to both streams.
    ///
    /// # Panics
    ///
    /// If a reader panicked.
    pub fn log(&self) -> String {
        self.log.lock().expect("readers do not panic").clone()
    }

    /// Types a line.
    ///
    /// # Panics
    ///
    /// If it does not listen.
    pub fn say(&mut self, line: &str) {
        let stdin = self.child.stdin.as_mut().expect("stdin is piped");
        writeln!(stdin, "{line}").unwrap_or_else(|error| panic!("{} listens: {error}", self.name));
    }

    /// Waits until it has printed `text`.
    ///
    /// # Panics
    ///
    /// If it does not within `limit`, or ends before.
    pub fn wait_for_log(&mut self, text: &str, limit: Duration) {
        let start = Instant::now();
        while !self.log().contains(text) {
            let ended = self.child.try_wait().expect("a child can be waited for");
            let late = start.elapsed() > limit;
            assert!(ended.is_none() && !late, "{} never said {text:?}:\n{}", self.name, self.log());
            pause();
        }
    }

    /// How it ended, if it has.
    ///
    /// # Panics
    ///
    /// If the system does not say.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    ///
    /// # Panics
    ///
    /// If the process is gone.
    pub fn signal(&self, signal: Signal) {
        let id = Pid::from_raw(self.child.id().try_into().expect("process ids are small"));
        kill(id, signal).unwrap_or_else(|error| panic!("{} takes {signal}: {error}", self.name));
    }

    /// Ends it at once, as a crash would.
    ///
    /// # Panics
    ///
    /// If it cannot be killed.
    pub fn kill(&mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
    }

    /// Waits for its end.
    ///
    /// # Panics
    ///
    /// If it does not end within `limit`.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return status;
            }
            assert!(start.elapsed() < limit, "{} did not end:\n{}", self.name, self.log());
            pause();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill();
        }
        for reader in self.readers.drain(..) {
            let read = reader.join();
            debug_assert!(read.is_ok(), "readers do not panic");
        }
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.name, self.log());
        }
    }
}

/// Keeps what `stream` says, as it comes: an answer is streamed without line ends.
fn collect(mut stream: impl Read + Send + 'static, log: Arc<Mutex<String>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(length @ 1..) = stream.read(&mut piece) {
            let text = String::from_utf8_lossy(&piece[..length]);
            log.lock().expect("readers do not panic").push_str(&text);
        }
    })
}
