//! The parts of a tokenizer that look for regular expressions. They do what the library's own do, but
//! a strange expression may take milliseconds for every letter, and the library's cannot be stopped:
//! these look at the clock after every match.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use fancy_regex::Regex;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::pattern::{Invert, Pattern};
use tokenizers::{
    NormalizedString, Normalizer, NormalizerWrapper, Offsets, PreTokenizedString, PreTokenizer,
    PreTokenizerWrapper, SplitDelimiterBehavior,
};

#[cfg(test)]
pub(super) mod tests;

/// Why a text could not be cut.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PatternError {
    /// There was no time left.
    #[error("a pattern of the tokenizer's {part} took longer than {limit_ms} ms on the text")]
    TimedOut {
        /// Normalizer or pre-tokenizer.
        part: &'static str,
        /// What there was.
        limit_ms: u128,
    },
    /// One match took too many steps.
    #[error("a pattern of the tokenizer's {part} gave up on the text")]
    GaveUp {
        /// Normalizer or pre-tokenizer.
        part: &'static str,
        /// What the library said.
        source: Box<fancy_regex::Error>,
    },
}

/// What this thread works on at present.
struct Scope {
    /// Before this its patterns need not be asked how long they computed.
    until: Instant,
    /// How long this thread had computed when it began.
    computed: Duration,
    /// How long its patterns may compute: on a machine that is busy with other things a text is as good as
    /// on one at rest.
    time: Duration,
    /// Why a normalizer failed, the first time.
    failed: Option<LibraryError>,
}

type LibraryError = Box<dyn std::error::Error + Send + Sync>;

thread_local! {
    /// Patterns are called by the library, which passes nothing on to them, and drops what a normalizer
    /// fails with: it would cut the text as it is, and a prompt would change in silence. It works on one
    /// text on the thread that calls it; on several texts at once, as it can, it would use others, where
    /// patterns have no clock: so a tokenizer is never given several.
    static SCOPE: RefCell<Option<Scope>> = const { RefCell::new(None) };
}

/// Does `work` on this thread; its patterns fail when they have computed for `time`.
///
/// # Errors
///
/// What a normalizer failed with, whatever was made of the text nonetheless.
pub(super) fn within<T>(time: Duration, work: impl FnOnce() -> T) -> Result<T, LibraryError> {
    /// Puts back what was before, also if `work` panics.
    struct Restore(Option<Scope>);

    impl Drop for Restore {
        fn drop(&mut self) {
            SCOPE.set(self.0.take());
        }
    }

    let (until, computed) = (Instant::now() + time, thread_cpu());
    let scope = Scope { until, computed, time, failed: None };
    let _restore = Restore(SCOPE.replace(Some(scope)));
    let made = work();
    let failed = SCOPE.with_borrow_mut(|scope| scope.as_mut()?.failed.take());
    failed.map_or(Ok(made), Err)
}

/// How long this thread has computed so far.
fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    // Neither is ever negative.
    Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0))
}

/// A regular expression with a clock.
pub(super) struct Timed {
    regex: Regex,
    part: &'static str,
}

impl Timed {
    fn check_clock(&self) -> Result<(), PatternError> {
        SCOPE.with_borrow(|scope| match scope {
            // The usual clock costs no system call.
            Some(Scope { until, computed, time, .. })
                if Instant::now() >= *until && thread_cpu().saturating_sub(*computed) >= *time =>
            {
                let limit_ms = time.as_millis();
                Err(PatternError::TimedOut { part: self.part, limit_ms })
            }
            _ => Ok(()),
        })
    }
}

impl Pattern for &Timed {
    fn find_matches(&self, inside: &str) -> tokenizers::Result<Vec<(Offsets, bool)>> {
        if inside.is_empty() {
            return Ok(vec![((0, 0), false)]);
        }
        let mut end = 0;
        let mut parts = Vec::new();
        for found in self.regex.find_iter(inside) {
            let found = found.map_err(|source| PatternError::GaveUp {
                part: self.part,
                source: Box::new(source),
            })?;
            if found.start() > end {
                parts.push(((end, found.start()), false));
            }
            parts.push(((found.start(), found.end()), true));
            end = found.end();
            self.check_clock()?;
        }
        if end < inside.len() {
            parts.push(((end, inside.len()), false));
        }
        self.check_clock()?;
        Ok(parts)
    }
}

/// A pattern in a file.
#[derive(Deserialize)]
struct Written {
    /// Else it is a plain text, which the library finds in linear time.
    #[serde(rename = "Regex")]
    regex: Option<String>,
}

impl Written {
    fn timed(self, part: &'static str) -> tokenizers::Result<Option<Timed>> {
        let timed = |regex: String| Ok(Timed { regex: Regex::new(&regex)?, part });
        self.regex.map(timed).transpose()
    }
}

/// The parts of a sequence; `None`: it is none.
fn sequence<'v>(value: &'v Value, inner: &str) -> Option<&'v Vec<Value>> {
    is_type(value, "Sequence").then(|| value.get(inner)?.as_array()).flatten()
}

fn is_type(value: &Value, kind: &str) -> bool {
    value.get("type").and_then(Value::as_str) == Some(kind)
}

/// A normalizer.
pub(super) enum TimedNormalizer {
    Library(NormalizerWrapper),
    Replace { pattern: Timed, content: String },
    Sequence(Vec<Self>),
}

impl TimedNormalizer {
    /// Of a checked `tokenizer.json`.
    ///
    /// # Errors
    ///
    /// What the library says.
    pub(super) fn from_json(value: &Value) -> tokenizers::Result<Self> {
        #[derive(Deserialize)]
        struct Replace {
            pattern: Written,
            content: String,
        }

        if let Some(parts) = sequence(value, "normalizers") {
            return Ok(Self::Sequence(
                parts.iter().map(Self::from_json).collect::<Result<_, _>>()?,
            ));
        }
        if is_type(value, "Replace") {
            let Replace { pattern, content } = Replace::deserialize(value)?;
            if let Some(pattern) = pattern.timed("normalizer")? {
                return Ok(Self::Replace { pattern, content });
            }
        }
        Ok(Self::Library(NormalizerWrapper::deserialize(value)?))
    }
}

impl TimedNormalizer {
    fn apply(&self, text: &mut NormalizedString) -> tokenizers::Result<()> {
        match self {
            Self::Library(library) => library.normalize(text),
            Self::Replace { pattern, content } => text.replace(pattern, content),
            Self::Sequence(parts) => parts.iter().try_for_each(|part| part.apply(text)),
        }
    }

    /// Adds the regular expressions in it.
    pub(super) fn patterns<'p>(&'p self, found: &mut Vec<&'p str>) {
        match self {
            Self::Library(_) => {}
            Self::Replace { pattern, .. } => found.push(pattern.regex.as_str()),
            Self::Sequence(parts) => parts.iter().for_each(|part| part.patterns(found)),
        }
    }
}

impl Normalizer for TimedNormalizer {
    fn normalize(&self, text: &mut NormalizedString) -> tokenizers::Result<()> {
        self.apply(text).map_err(|error| {
            SCOPE.with_borrow_mut(|scope| match scope {
                Some(scope) => {
                    scope.failed.get_or_insert(error);
                    "the normalizer failed".into()
                }
                None => error,
            })
        })
    }
}

/// A pre-tokenizer.
pub(super) enum TimedPreTokenizer {
    Library(PreTokenizerWrapper),
    Split { pattern: Timed, behavior: SplitDelimiterBehavior, invert: bool },
    Sequence(Vec<Self>),
}

impl TimedPreTokenizer {
    /// Of a checked `tokenizer.json`.
    ///
    /// # Errors
    ///
    /// What the library says.
    pub(super) fn from_json(value: &Value) -> tokenizers::Result<Self> {
        #[derive(Deserialize)]
        struct Split {
            pattern: Written,
            behavior: SplitDelimiterBehavior,
            invert: bool,
        }

        if let Some(parts) = sequence(value, "pretokenizers") {
            return Ok(Self::Sequence(
                parts.iter().map(Self::from_json).collect::<Result<_, _>>()?,
            ));
        }
        if is_type(value, "Split") {
            let Split { pattern, behavior, invert } = Split::deserialize(value)?;
            if let Some(pattern) = pattern.timed("pre-tokenizer")? {
                return Ok(Self::Split { pattern, behavior, invert });
            }
        }
        Ok(Self::Library(PreTokenizerWrapper::deserialize(value)?))
    }
}

impl TimedPreTokenizer {
    /// Adds the regular expressions in it.
    pub(super) fn patterns<'p>(&'p self, found: &mut Vec<&'p str>) {
        match self {
            Self::Library(_) => {}
            Self::Split { pattern, .. } => found.push(pattern.regex.as_str()),
            Self::Sequence(parts) => parts.iter().for_each(|part| part.patterns(found)),
        }
    }
}

impl PreTokenizer for TimedPreTokenizer {
    fn pre_tokenize(&self, text: &mut PreTokenizedString) -> tokenizers::Result<()> {
        match self {
            Self::Library(library) => library.pre_tokenize(text),
            Self::Split { pattern, behavior, invert: false } => {
                text.split(|_, run| run.split(pattern, *behavior))
            }
            Self::Split { pattern, behavior, invert: true } => {
                text.split(|_, run| run.split(Invert(pattern), *behavior))
            }
            Self::Sequence(parts) => parts.iter().try_for_each(|part| part.pre_tokenize(text)),
        }
    }
}
