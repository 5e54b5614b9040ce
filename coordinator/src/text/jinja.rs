//! Chat templates' language: Jinja2 3.1 as `transformers` sets it up, with Python's values, inside
//! limits. Pure but for the clock that a [`Meter`] may look at.
//!
//! ```text
//! source ──lexer──▶ tokens ──parser──▶ Program ──Renderer, paid for by a Meter──▶ text
//! ```
//!
//! It is an interpreter of our own because two things cannot be had around a library's: texts equal
//! to Python's down to how `~` writes a float, and a price for every operation before it is done.
//! What of Jinja2 is not here (`names`) is refused by name when a template is parsed. Nesting is
//! bounded there and calls are bounded while rendering, so the stack is; work, time and memory are
//! paid for as they are used, so nothing runs or grows beyond them.

mod checks;
mod digits;
mod evaluate;
mod filters;
mod format;
mod json;
mod letters;
mod lexer;
mod meter;
mod methods;
mod names;
mod operate;
mod parser;
mod percent;
mod render;
mod syntax;
mod value;
mod write;

#[cfg(test)]
mod tests;

use std::rc::Rc;

pub(super) use json::Json;
pub(super) use meter::Meter;
use syntax::{For, Macro, Statement, Symbol};

/// Levels of statements, and of expressions, inside each other: templates have some twenty. A
/// level takes up to 11 frames of the parser.
const MAX_NESTING: usize = 160;

/// Bytes of a text whose letters' case is changed, for each byte before: at most this many.
const CASE_GROWTH: usize = 3;

/// Bytes of one name, of the source or of a keyword argument: templates' have some twenty. Calls
/// and namespaces keep copies of theirs that nothing else bounds.
const MAX_NAME_BYTES: usize = 256;

/// Letters of a name that messages repeat: undefined values keep theirs, and may be many.
const SHORT_LETTERS: usize = 64;

/// A name as messages repeat it.
fn short(name: &str) -> String {
    name.chars().take(SHORT_LETTERS).collect()
}

/// Refuses a name that is too long to keep.
fn check_name(name: &str) -> Result<(), Failure> {
    if name.len() > MAX_NAME_BYTES {
        return Err(Failure::Limit(format!("a name had more than {MAX_NAME_BYTES} bytes")));
    }
    Ok(())
}

/// Why a template could not be parsed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// It is not a template.
    #[error("line {line}: {what}")]
    Syntax {
        /// Counted from 1.
        line: u32,
        /// What was found.
        what: String,
    },
    /// It is one that asks for what there is not.
    #[error("line {line}: {what} is not supported")]
    Unsupported {
        /// Counted from 1.
        line: u32,
        /// What it asks for.
        what: String,
    },
    /// It nests too deeply.
    #[error("line {line}: more than {MAX_NESTING} levels inside each other")]
    TooDeep {
        /// Counted from 1.
        line: u32,
    },
}

/// Why a template could not be rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// It said so, with `raise_exception`.
    Raised(String),
    /// It reached a limit.
    Limit(String),
    /// Python would have raised an error.
    Error(String),
}

impl Failure {
    fn new(what: impl Into<String>) -> Self {
        Self::Error(what.into())
    }
}

/// A parsed template.
#[derive(Debug)]
pub(super) struct Program {
    body: Vec<Statement>,
    names: Vec<Box<str>>,
    /// The name `loop`, if it is used.
    loop_name: Option<Symbol>,
    loops: Vec<For>,
    macros: Vec<Macro>,
}

impl Program {
    /// Parses `source`; recursion is bounded by [`MAX_NESTING`].
    ///
    /// # Errors
    ///
    /// [`CompileError`].
    pub(super) fn parse(source: &str) -> Result<Self, CompileError> {
        parser::parse(source)
    }

    /// Renders it with `variables`; `now_unix_s` is what its clock shows.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub(super) fn render(
        &self,
        variables: &[(String, Json)],
        now_unix_s: u64,
        meter: &Rc<Meter>,
    ) -> Result<String, Failure> {
        render::render(self, variables, now_unix_s, meter)
    }
}
