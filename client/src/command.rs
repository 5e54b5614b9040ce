//! What the commands share: why one fails, reading a prompt, writing for people or programs.

use std::io::{self, IsTerminal, Read, Write};

use serde::Serialize;

use crate::{ClientError, OperatorError};

/// The longest prompt read from standard input: what fits into one request.
pub(crate) const PROMPT_BYTES: u64 = proto::limits::CLIENT_MESSAGE_BYTES as u64;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    /// The coordinator, or the way to it.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// What an operator wanted is not done.
    #[error(transparent)]
    Operator(#[from] OperatorError),
    /// Standard output.
    #[error("failed to write to standard output")]
    Output(#[source] io::Error),
    /// Standard input.
    #[error("failed to read from standard input")]
    Input(#[source] io::Error),
    /// More than a request can carry.
    #[error("standard input is longer than {PROMPT_BYTES} bytes, the most one request can carry")]
    InputTooLong,
    /// The terminal.
    #[error("failed to read a line from the terminal")]
    Terminal(#[source] rustyline::error::ReadlineError),
}

impl CommandError {
    /// Whether whoever read our output has seen enough: a reason to end, and to say nothing.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// Everything on standard input, exactly as it is.
pub(crate) fn read_prompt(input: impl Read) -> Result<String, CommandError> {
    let mut text = String::new();
    input.take(PROMPT_BYTES + 1).read_to_string(&mut text).map_err(CommandError::Input)?;
    if text.len() as u64 > PROMPT_BYTES {
        return Err(CommandError::InputTooLong);
    }
    Ok(text)
}

/// One JSON value on a line of its own.
pub(crate) fn write_json(
    output: &mut impl Write,
    value: &impl Serialize,
) -> Result<(), CommandError> {
    // One write: a reader never sees half a line of what is short.
    let mut line = serde_json::to_vec(value).map_err(|error| CommandError::Output(error.into()))?;
    line.push(b'\n');
    output.write_all(&line).and_then(|()| output.flush()).map_err(CommandError::Output)
}

/// Writes text as it comes. For a terminal, what could steer it (escape sequences that a model
/// was made to write) is shown as U+FFFD instead.
pub struct TextWriter<W> {
    output: W,
    terminal: bool,
    /// Nothing written since the last end of line.
    at_line_start: bool,
}

impl TextWriter<io::Stdout> {
    /// Writes to standard output.
    pub fn stdout() -> Self {
        let output = io::stdout();
        let terminal = output.is_terminal();
        Self::new(output, terminal)
    }
}

impl<W: Write> TextWriter<W> {
    /// Writes to `output`.
    pub fn new(output: W, terminal: bool) -> Self {
        Self { output, terminal, at_line_start: true }
    }

    /// Whether people read this as it comes.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Writes `text` at once.
    ///
    /// # Errors
    ///
    /// [`CommandError::Output`].
    pub fn text(&mut self, text: &str) -> Result<(), CommandError> {
        if text.is_empty() {
            return Ok(());
        }
        self.at_line_start = text.ends_with('\n');
        let written = if self.terminal {
            let steers = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
            self.output.write_all(text.replace(steers, "\u{fffd}").as_bytes())
        } else {
            self.output.write_all(text.as_bytes())
        };
        written.and_then(|()| self.output.flush()).map_err(CommandError::Output)
    }

    /// Steers the terminal.
    ///
    /// # Errors
    ///
    /// [`CommandError::Output`].
    pub fn control(&mut self, sequence: &str) -> Result<(), CommandError> {
        let written = self.output.write_all(sequence.as_bytes());
        written.and_then(|()| self.output.flush()).map_err(CommandError::Output)
    }

    /// Goes to a new line unless at the start of one.
    ///
    /// # Errors
    ///
    /// [`CommandError::Output`].
    pub fn end_line(&mut self) -> Result<(), CommandError> {
        if self.at_line_start { Ok(()) } else { self.text("\n") }
    }

    /// Writes one JSON value on a line of its own.
    ///
    /// # Errors
    ///
    /// [`CommandError::Output`].
    pub fn json(&mut self, value: &impl Serialize) -> Result<(), CommandError> {
        self.at_line_start = true;
        write_json(&mut self.output, value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_is_read_as_it_is_and_bounded() {
        assert_eq!(read_prompt(&b"one\ntwo\n"[..]).unwrap(), "one\ntwo\n");
        assert!(matches!(read_prompt(&b"\xff"[..]), Err(CommandError::Input(_))));
        let endless = io::repeat(b'a');
        assert!(matches!(read_prompt(endless), Err(CommandError::InputTooLong)));
    }

    #[test]
    fn a_terminal_is_not_steered_and_a_file_gets_every_byte() {
        let steering = "a\u{1b}[2Jb\tc\n\u{9b}";
        for (terminal, want) in [(true, "a\u{fffd}[2Jb\tc\n\u{fffd}"), (false, steering)] {
            let mut bytes = Vec::new();
            TextWriter::new(&mut bytes, terminal).text(steering).unwrap();
            assert_eq!(String::from_utf8(bytes).unwrap(), want);
        }
    }

    #[test]
    fn lines_end_once() {
        let mut bytes = Vec::new();
        let mut writer = TextWriter::new(&mut bytes, false);
        writer.end_line().unwrap();
        for text in ["a", "", "b"] {
            writer.text(text).unwrap();
        }
        writer.end_line().unwrap();
        writer.end_line().unwrap();
        assert_eq!(bytes, b"ab\n");
    }

    #[test]
    fn a_reader_that_went_away_is_told_apart() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        assert!(write_json(&mut Closed, &1).unwrap_err().is_broken_pipe());
        assert!(TextWriter::new(Closed, false).text("a").unwrap_err().is_broken_pipe());
        assert!(!CommandError::InputTooLong.is_broken_pipe());
    }
}
