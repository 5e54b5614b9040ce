//! Where the lines of a conversation come from: an edited line on a terminal, or plain lines.

use std::io::{self, IsTerminal};

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, BufReader, Stdin};

use crate::CommandError;
use crate::command::PROMPT_BYTES;

/// What came in place of a line, or the line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A line, without its end.
    Text(String),
    /// Ctrl-C at the prompt: the line was thrown away.
    Interrupted,
    /// Nothing more will come.
    End,
}

/// A source of lines.
pub(super) enum Input {
    /// A person; `None` while a line is being read.
    Terminal(Option<Box<DefaultEditor>>),
    /// A file or a pipe.
    Plain(BufReader<Stdin>),
}

impl Input {
    /// Standard input, edited when a person types on it and reads the answers.
    pub(super) fn open() -> Result<Self, CommandError> {
        if io::stdin().is_terminal() && io::stdout().is_terminal() {
            let editor = DefaultEditor::new().map_err(CommandError::Terminal)?;
            Ok(Self::Terminal(Some(Box::new(editor))))
        } else {
            Ok(Self::Plain(BufReader::new(tokio::io::stdin())))
        }
    }

    /// Whether a person types.
    pub(super) fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// The next line.
    pub(super) async fn line(&mut self) -> Result<Line, CommandError> {
        match self {
            Self::Plain(reader) => {
                // Once an answer has been interruptible, the signal does not end the program by
                // itself any more.
                tokio::select! {
                    line = plain_line(reader) => line,
                    _ = tokio::signal::ctrl_c() => Ok(Line::End),
                }
            }
            Self::Terminal(editor) => {
                let Some(editing) = editor.take() else { return Ok(Line::End) };
                // Editing a line blocks its thread; the editor comes back with the line.
                let read = tokio::task::spawn_blocking(move || edited_line(editing)).await;
                let Ok((editing, line)) = read else { return Ok(Line::End) };
                *editor = Some(editing);
                line
            }
        }
    }
}

fn edited_line(mut editor: Box<DefaultEditor>) -> (Box<DefaultEditor>, Result<Line, CommandError>) {
    let line = match editor.readline("> ") {
        Ok(line) => {
            // Only a convenience of the arrow keys: that it is full is no failure.
            let _ = editor.add_history_entry(&line);
            Ok(Line::Text(line))
        }
        Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
        Err(ReadlineError::Eof) => Ok(Line::End),
        Err(error) => Err(CommandError::Terminal(error)),
    };
    (editor, line)
}

async fn plain_line(reader: &mut (impl AsyncBufRead + Unpin)) -> Result<Line, CommandError> {
    let mut line = String::new();
    let read = reader.take(PROMPT_BYTES + 1).read_line(&mut line).await;
    if read.map_err(CommandError::Input)? == 0 {
        return Ok(Line::End);
    }
    if line.len() as u64 > PROMPT_BYTES {
        return Err(CommandError::InputTooLong);
    }
    line.truncate(line.trim_end_matches(['\r', '\n']).len());
    Ok(Line::Text(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn plain_lines_come_without_their_ends() {
        let mut reader = BufReader::new(&b"one\r\n\ntwo"[..]);
        for want in ["one", "", "two"] {
            assert_eq!(plain_line(&mut reader).await.unwrap(), Line::Text(want.into()));
        }
        assert_eq!(plain_line(&mut reader).await.unwrap(), Line::End);
    }

    #[tokio::test]
    async fn a_line_without_end_is_refused_before_it_is_kept() {
        let mut reader = BufReader::new(tokio::io::repeat(b'a'));
        assert!(matches!(plain_line(&mut reader).await, Err(CommandError::InputTooLong)));
        let mut reader = BufReader::new(&b"\xff\n"[..]);
        assert!(matches!(plain_line(&mut reader).await, Err(CommandError::Input(_))));
    }
}
