//! Imports a model and scores a known text with it: what imports wrongly in silence does not read as
//! language.
//!
//! ```text
//! import ─▶ score ─┬─ reads as language ─▶ done
//!                  └─ does not ─▶ I2_S, and nobody chose its layout? the other one, if that reads;
//!                                 else a warning
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use coordinator::TokenizeError;
use model::{
    I2sLayout, ImportError, ImportOptions, Imported, Progress, Store, StoreError, WriteError,
};
use serde::Serialize;
use tokio::time::Instant;

use crate::eval::{EvalError, evaluate};
use crate::pipeline::{PipelineError, PipelineOptions};

/// Plain English, such as every model of the language has read much of.
const TEXT: &str = "Once upon a time there was a little girl who lived in a small house near the \
    forest. She had a dog, and every day the two of them went to play in the garden. One day they \
    found a big red ball under a tree. The girl was very happy. \"Look,\" she said to her mother, \
    \"we have found a ball!\" Her mother smiled and said that she could keep it, and then they all \
    went home together.";
/// Tokens of it that are scored: enough that chance is nothing, few enough to cost one step.
const TOKENS: usize = 64;
/// A model that guesses has a perplexity of its whole vocabulary, a wrong one mostly more; one that
/// knows the language has a hundredth of it or less. So many times less than the vocabulary is read.
const BETTER_THAN_GUESSING: f64 = 8.0;

/// How a model reads the text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Score {
    /// Tokens that were scored.
    pub tokens: u64,
    /// Of them.
    pub perplexity: f64,
    /// How long that took, in seconds.
    pub seconds: f64,
}

impl Score {
    fn reads_as_language(&self, vocab: u32) -> bool {
        self.perplexity.is_finite() && self.perplexity * BETTER_THAN_GUESSING <= f64::from(vocab)
    }
}

/// Why a text has no score.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScoreError {
    /// The store cannot be opened.
    #[error("failed to open the store")]
    Store(#[from] StoreError),
    /// The text has no tokens.
    #[error("failed to read the text")]
    Tokenize(#[from] TokenizeError),
    /// The model did not compute.
    #[error("failed to compute")]
    Eval(#[from] EvalError),
}

/// A model that was imported and scored.
#[derive(Clone, Debug)]
pub struct Scored {
    /// The model; its notes end with what the score says.
    pub imported: Imported,
    /// The score, if there is one.
    pub score: Option<Score>,
}

/// Scores the known text with the model in `store`. It computes: not for an async thread.
///
/// # Errors
///
/// [`ScoreError`].
pub fn score(store: &Path) -> Result<Score, ScoreError> {
    let from = Instant::now();
    let store = Store::open(store)?;
    let mut tokens = coordinator::tokenize(&store, TEXT)?;
    tokens.truncate(TOKENS + 1);
    let window = TOKENS.min(store.config().context as usize);
    let found = evaluate(&store, &PipelineOptions::default(), &tokens, window, &mut |_, _| {})?;
    let seconds = from.elapsed().as_secs_f64();
    Ok(Score { tokens: found.tokens, perplexity: found.perplexity, seconds })
}

/// What a score says of a model.
enum Verdict {
    Language(Score),
    /// Its numbers, or why there are none.
    Nonsense(Option<Score>, String),
    Unknown(String),
}

/// Reads `source` into `dest` as [`model::import()`] does, and scores what came of it. Where I2_S is in
/// the layout that nobody chose and does not read as language, the other layout is tried, and kept if
/// that one does: no file says which it has.
///
/// # Errors
///
/// [`ImportError`] of the first reading; then `dest` does not exist. A bad score is a note, and so is what
/// keeps the other layout from being tried.
pub fn import(
    source: &Path,
    dest: &Path,
    options: &ImportOptions,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<Scored, ImportError> {
    let mut imported = model::import(source, dest, options, progress)?;
    let is_i2s = imported.format.ends_with("I2_S");
    let mut verdict = judge(&imported);
    if is_i2s && options.i2s_layout.is_none() && matches!(verdict, Verdict::Nonsense(..)) {
        let usual = I2sLayout::default();
        for other in I2sLayout::ALL.into_iter().filter(|layout| *layout != usual) {
            match beside(source, dest, options, other, progress) {
                Ok(Some((found, language))) => {
                    (imported, verdict) = (found, language);
                    imported.notes.push(format!(
                        "warning: layout of I2_S: {other}, for read as {usual} it is no language"
                    ));
                    break;
                }
                Ok(None) => {}
                // The store that is there stays: it was asked for, another layout was not.
                Err(error) => imported.notes.push(format!(
                    "score: layout {other} of I2_S was not tried: {}",
                    node::Chain(&error)
                )),
            }
        }
    }
    Ok(noted(imported, verdict, options))
}

/// What was imported and is not to be scored; its notes say what is not known for that.
pub fn unscored(imported: Imported, options: &ImportOptions) -> Scored {
    noted(imported, Verdict::Unknown("it was not asked for".into()), options)
}

/// Reads `source` into `dest` as [`model::import()`] does, and scores what came of it as it is: for a
/// store that others may open as soon as it is there.
///
/// # Errors
///
/// [`ImportError`]; then `dest` does not exist. A bad score is a note.
pub fn import_once(
    source: &Path,
    dest: &Path,
    options: &ImportOptions,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<Scored, ImportError> {
    let imported = model::import(source, dest, options, progress)?;
    let verdict = judge(&imported);
    Ok(noted(imported, verdict, options))
}

/// Imports with another layout beside the store that this process has just made, and puts that in its
/// place if it reads as language; otherwise, and after every error, the first store is as it was.
fn beside(
    source: &Path,
    dest: &Path,
    options: &ImportOptions,
    layout: I2sLayout,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<Option<(Imported, Verdict)>, ImportError> {
    let refused = |action: &'static str| {
        move |source| ImportError::Write(WriteError::Io { action, path: dest.to_owned(), source })
    };
    let name = dest.file_name().unwrap_or_default().to_string_lossy();
    let other = |what: &str| dest.with_file_name(format!(".{name}.{what}-{}", std::process::id()));
    let (trial, replaced) = (Removed(other("other-layout")), Removed(other("replaced")));
    let options = ImportOptions { i2s_layout: Some(layout), ..options.clone() };
    let mut found = model::import(source, &trial.0, &options, progress)?;
    let verdict = judge(&found);
    if !matches!(verdict, Verdict::Language(_)) {
        return Ok(None);
    }
    fs::rename(dest, &replaced.0).map_err(refused("move"))?;
    if let Err(error) = fs::rename(&trial.0, dest) {
        // Nobody but this process knows either name, so that the way back is free.
        let _ = fs::rename(&replaced.0, dest);
        return Err(refused("replace")(error));
    }
    found.store = dest.to_owned();
    Ok(Some((found, verdict)))
}

/// A directory that is not to stay.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        // It is there only if something came of it, and in nobody's way if it stays.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn judge(imported: &Imported) -> Verdict {
    match score(&imported.store) {
        Ok(score) if score.reads_as_language(imported.config.vocab) => Verdict::Language(score),
        Ok(score) => {
            // Of a model that is sure of nonsense it has any number of digits.
            let text = match score.perplexity < 1e6 {
                true => format!("perplexity {:.0}", score.perplexity),
                false => format!("perplexity {:.1e}", score.perplexity),
            };
            Verdict::Nonsense(Some(score), text)
        }
        // The engine refuses to go on with numbers that are not finite.
        Err(ScoreError::Eval(EvalError::Pipeline(error @ PipelineError::Row { .. }))) => {
            Verdict::Nonsense(None, error.to_string())
        }
        Err(ScoreError::Tokenize(TokenizeError::NoTokenizer)) => {
            Verdict::Unknown("there is no tokenizer to read a text with".into())
        }
        Err(error) => Verdict::Unknown(node::Chain(&error).to_string()),
    }
}

/// Says what the score says.
fn noted(mut imported: Imported, verdict: Verdict, options: &ImportOptions) -> Scored {
    let is_i2s = imported.format.ends_with("I2_S");
    let (score, note) = match verdict {
        Verdict::Language(score) => {
            let Score { tokens, perplexity, seconds } = score;
            let text = format!(
                "score: perplexity {perplexity:.1} on {tokens} tokens of English, in {seconds:.1} s"
            );
            (Some(score), text)
        }
        Verdict::Nonsense(score, found) => {
            let hint = match is_i2s {
                true => {
                    "its I2_S may have another layout: see `tercet import --i2s-layout`, or convert \
                     from safetensors"
                }
                false => "are activation, scales and tokenizer the model's own?",
            };
            let text = format!(
                "warning: an English text does not read as language ({found}, for a vocabulary of \
                 {}): {hint}",
                imported.config.vocab
            );
            (score, text)
        }
        Verdict::Unknown(reason) => {
            let note = format!("score: none, for {reason}");
            // Nothing in a file says which layout it has: read by the other one it is nonsense.
            let is_guessed = is_i2s && options.i2s_layout.is_none();
            let note = match is_guessed {
                true => format!(
                    "warning: {note}, so whether I2_S is in the layout that was read is not known \
                     (see `tercet import --i2s-layout`)"
                ),
                false => note,
            };
            (None, note)
        }
    };
    imported.notes.push(note);
    Scored { imported, score }
}

#[cfg(test)]
mod tests;
