//! Signals to a real process: the first asks, the second ends it.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]
#![expect(clippy::print_stdout, reason = "how the process under test is heard, and its harness")]

use std::io::{BufRead, BufReader, Lines};
use std::process::{Child, ChildStdout, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use node::signals::Signals;

/// Said by the process under test, alone on a line.
const LISTENING: &str = "listening";
const ASKED: &str = "asked to stop";

/// This program is its own subject: started with this argument it is the process under test.
const DEAF: &str = "--deaf";

fn main() {
    if std::env::args().any(|argument| argument == DEAF) {
        tokio::runtime::Runtime::new().unwrap().block_on(be_deaf());
    } else {
        the_first_signal_asks_and_the_second_ends();
        println!("test result: ok. the_first_signal_asks_and_the_second_ends");
        what_was_ignored_at_the_start_is_ignored_still();
        println!("test result: ok. what_was_ignored_at_the_start_is_ignored_still");
    }
}

/// Hears the first signal and does not stop for it.
async fn be_deaf() {
    node::signals::survive_file_size_limit().unwrap();
    let signals = Signals::listen().unwrap();
    println!("\n{LISTENING}");
    signals.stop().cancelled().await;
    println!("\n{ASKED}");
    std::future::pending().await
}

struct Process {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    /// Starts the process under test, by way of `wrapper`.
    fn start(wrapper: &[&str]) -> Self {
        let own = std::env::current_exe().unwrap();
        let mut command = match wrapper {
            [] => Command::new(own),
            [program, arguments @ ..] => {
                let mut command = Command::new(program);
                command.args(arguments).arg(own);
                command
            }
        };
        let mut child =
            command.arg(DEAF).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut process = Self { child, lines };
        process.wait_for(LISTENING);
        process
    }

    fn wait_for(&mut self, wanted: &str) {
        assert!(self.lines.any(|line| line.unwrap() == wanted), "it ended and never said {wanted}");
    }

    fn send(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// Every one of them, by way of a shell: those have no names of their own.
    fn send_real_time_signals(&self) {
        let (first, last) = (nix::libc::SIGRTMIN(), nix::libc::SIGRTMAX());
        let id = self.child.id();
        let script = format!(
            "n={first}; while [ $n -le {last} ]; do kill -$n {id} || exit 1; n=$((n+1)); done"
        );
        assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended, unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn the_first_signal_asks_and_the_second_ends() {
    for (first, second, code) in [
        (Signal::SIGTERM, Signal::SIGTERM, 143),
        (Signal::SIGINT, Signal::SIGINT, 130),
        (Signal::SIGTERM, Signal::SIGINT, 130),
        (Signal::SIGHUP, Signal::SIGTERM, 143),
        (Signal::SIGXCPU, Signal::SIGHUP, 129),
        (Signal::SIGPWR, Signal::SIGPWR, 158),
    ] {
        let mut process = Process::start(&[]);
        // Of no meaning, and no end.
        for signal in [
            Signal::SIGUSR1,
            Signal::SIGUSR2,
            Signal::SIGALRM,
            Signal::SIGVTALRM,
            Signal::SIGPROF,
            Signal::SIGIO,
            Signal::SIGSTKFLT,
            Signal::SIGXFSZ,
        ] {
            process.send(signal);
        }
        process.send_real_time_signals();
        process.send(first);
        process.wait_for(ASKED);
        assert!(process.child.try_wait().unwrap().is_none(), "{first} only asks");
        process.send(second);
        assert_eq!(process.child.wait().unwrap().code(), Some(code), "{first}, {second}");
    }
}

/// As `nohup` starts a process, but for its files.
fn what_was_ignored_at_the_start_is_ignored_still() {
    let mut process = Process::start(&["sh", "-c", "trap '' HUP; exec \"$0\" \"$@\""]);
    process.send(Signal::SIGHUP);
    process.send(Signal::SIGHUP);
    // Two that were heard would have ended it.
    process.send(Signal::SIGTERM);
    process.wait_for(ASKED);
    assert!(process.child.try_wait().unwrap().is_none());
    process.send(Signal::SIGTERM);
    assert_eq!(process.child.wait().unwrap().code(), Some(143));
}
