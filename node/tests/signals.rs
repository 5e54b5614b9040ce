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
    }
}

/// Hears the first signal and does not stop for it.
async fn be_deaf() {
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
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .arg(DEAF)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
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
    ] {
        let mut process = Process::start();
        process.send(first);
        process.wait_for(ASKED);
        assert!(process.child.try_wait().unwrap().is_none(), "{first} only asks");
        process.send(second);
        assert_eq!(process.child.wait().unwrap().code(), Some(code), "{first}, {second}");
    }
}
