//! An error and its causes on one line.

use std::error::Error;
use std::fmt;

/// Shows an error and its sources on one line: `outer: inner: innermost`.
///
/// A source whose words the line already ends with is not repeated: not every library keeps
/// causes out of its messages.
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.0.to_string();
        f.write_str(&said)?;
        let mut next = self.0.source();
        while let Some(error) = next {
            let words = error.to_string();
            if !said.trim_end_matches(['.', ')', '"']).ends_with(&words) && !said.ends_with(&words)
            {
                write!(f, ": {words}")?;
                said = words;
            }
            next = error.source();
        }
        Ok(())
    }
}

impl fmt::Debug for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("failed to open shard {path}")]
    struct Open {
        path: &'static str,
        source: io::Error,
    }

    #[derive(Debug, thiserror::Error)]
    #[error("library says: {source}")]
    struct Repeats {
        source: io::Error,
    }

    #[derive(Debug, thiserror::Error)]
    #[error("It failed, for {source}.")]
    struct Sentence {
        source: io::Error,
    }

    #[test]
    fn each_level_is_said_once() {
        let error = Open { path: "layers-00-07.shard", source: io::ErrorKind::NotFound.into() };
        assert_eq!(
            Chain(&error).to_string(),
            "failed to open shard layers-00-07.shard: entity not found"
        );
    }

    #[test]
    fn a_source_that_was_said_is_not_said_again() {
        let error = Repeats { source: io::ErrorKind::NotFound.into() };
        assert_eq!(Chain(&error).to_string(), "library says: entity not found");
        let sentence = Sentence { source: io::ErrorKind::NotFound.into() };
        assert_eq!(Chain(&sentence).to_string(), "It failed, for entity not found.");
    }

    #[test]
    fn an_error_without_a_source_is_itself() {
        assert_eq!(Chain(&io::Error::other("disk on fire")).to_string(), "disk on fire");
    }
}
