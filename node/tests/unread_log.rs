//! A log that nobody reads holds up nobody, and one that is read is whole. Starts itself as the process
//! that logs.
#![expect(clippy::unwrap_used, reason = "everything here is a test or helps one")]
#![expect(clippy::print_stdout, reason = "what the child tells its parent")]

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;
use std::{env, process, thread};

use node::telemetry::{self, TelemetryConfig};

/// More than a pipe and the queue hold.
const MANY: usize = 50_000;
/// Fewer than the queue holds.
const FEW: usize = 5_000;

/// The child needs less than a second, unless it waits for a reader.
const CHILD_TIMEOUT: Duration = Duration::from_secs(30);

fn main() {
    match env::args().nth(1).and_then(|lines| lines.parse().ok()) {
        Some(lines) => child(lines),
        None => parent(),
    }
}

fn child(lines: usize) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let config = TelemetryConfig { log: Some("info".to_owned()), ..Default::default() };
        let guard = telemetry::init("tercet-test", &config).unwrap();
        node::metrics::install().unwrap();
        for line in 0..lines {
            tracing::info!(
                line,
                "a line of about a hundred bytes, as those of a server mostly are"
            );
        }
        println!("{}", node::metrics::render());
        drop(guard);
    });
}

fn start(lines: usize) -> Child {
    let mut command = Command::new(env::current_exe().unwrap());
    command.arg(lines.to_string()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn parent() {
    // What harnesses ask of a test binary.
    if env::args().any(|argument| argument == "--list") {
        return;
    }
    let mut unread = start(MANY);
    let mut stdout = unread.stdout.take().unwrap();
    let (ended, is_ended) = mpsc::channel();
    thread::spawn(move || {
        let mut metrics = String::new();
        stdout.read_to_string(&mut metrics).unwrap();
        ended.send(metrics).unwrap();
    });
    let Ok(metrics) = is_ended.recv_timeout(CHILD_TIMEOUT) else {
        unread.kill().unwrap();
        unread.wait().unwrap();
        println!("a process whose log nobody reads stands still");
        process::exit(1);
    };
    let status = unread.wait().unwrap();
    let lost = metrics.lines().find_map(|line| line.strip_prefix("tercet_log_lines_lost_total "));
    let lost: usize = lost.unwrap().parse().unwrap();
    assert!(status.success() && lost > 0 && lost < MANY, "{status}, {lost} lost");

    let read = start(FEW).wait_with_output().unwrap();
    let log = String::from_utf8(read.stderr).unwrap();
    let lines = log.lines().filter(|line| line.contains("about a hundred bytes")).count();
    assert_eq!(lines, FEW);
    println!("a log that nobody reads holds up nobody");
}
