//! A Python with OpenAI's client and Jinja2, made once beside the build.

use std::path::PathBuf;
use std::process::Command;

use crate::model::repository;
use crate::process::tercet;

/// The interpreter of a virtual environment that holds `tests/openai/requirements.txt`.
///
/// # Panics
///
/// If there is no Python 3 with venv (Debian: `python3-venv`), or the packages cannot be had.
pub fn with_openai() -> PathBuf {
    let requirements = repository().join("tests/openai/requirements.txt");
    let wanted = std::fs::read_to_string(&requirements).expect("the requirements are there");
    let folder = tercet().with_file_name("test-python");
    let python = folder.join("bin/python");
    let stamp = folder.join("installed.txt");
    // One test makes it, and those that start beside it wait.
    let lock = std::fs::File::create(tercet().with_file_name("test-python.lock"));
    let lock = lock.expect("the target folder is writable");
    lock.lock().expect("the target folder is on a file system with locks");
    // Written last, so that a broken attempt is made again.
    if std::fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return python;
    }
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder));
    run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "-r"]).arg(&requirements));
    std::fs::write(&stamp, wanted).expect("the target folder is writable");
    python
}

fn run(command: &mut Command) {
    let output = command.output();
    let output = output.unwrap_or_else(|error| panic!("{command:?} (python3-venv?): {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
}
