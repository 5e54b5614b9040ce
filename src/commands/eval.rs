//! `tercet eval`: perplexity of a model on a text or on given tokens.

use std::io;
use std::path::{Path, PathBuf};

use clap::Args;
use client::command::TextWriter;
use kernels::Backend;
use model::Store;
use serde::Deserialize;

use crate::Failure;
use crate::commands::{ComputeArgs, ModelArgs};
use crate::eval::evaluate;
use crate::progress::Progress;

/// Longest input file. A pass over as much text takes hours.
const INPUT_BYTES: u64 = 256 << 20;

/// Measures the perplexity of a model.
///
/// The tokens are cut into windows without overlap; the token after every input is scored with the
/// window's own context only. N tokens give N - 1 scores.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet eval --text wiki.txt
  tercet eval --model store/ --tokens-file tokens.json --kv-type f32 --json")]
pub(crate) struct EvalCommand {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    source: SourceArgs,
    /// Inputs of one window
    #[arg(long, value_name = "N", default_value = "256")]
    window: usize,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print one JSON object: tokens, nll, perplexity
    #[arg(long)]
    json: bool,
}

/// What is scored.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct SourceArgs {
    /// A text, tokenized as a prompt is
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Token ids as JSON: an array, or an object with `token_ids`
    #[arg(long, value_name = "FILE")]
    tokens_file: Option<PathBuf>,
}

/// Why there is nothing to score.
#[derive(Debug, thiserror::Error)]
enum InputError {
    /// The file cannot be read.
    #[error("failed to read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// It holds no list of tokens.
    #[error(
        "{} is no list of token ids (expected an array, or an object with `token_ids`)",
        path.display()
    )]
    Tokens { path: PathBuf, source: serde_json::Error },
    /// The model gives no tokens for it.
    #[error("failed to tokenize {}", path.display())]
    Tokenize { path: PathBuf, source: coordinator::TokenizeError },
}

/// The forms of a file of tokens. The last is that of the bundled model's reference file.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected an array of token ids, or an object with `token_ids`")]
enum TokensFile {
    Ids(Vec<u32>),
    Object { token_ids: Vec<u32> },
    Golden { heldout_fixed: HeldOut },
}

#[derive(Deserialize)]
struct HeldOut {
    token_ids: Vec<u32>,
}

/// Runs the command.
pub(crate) fn run(command: &EvalCommand) -> Result<(), Failure> {
    let store = command.model.open(command.json)?;
    let options = command.compute.pipeline(&store, Backend::detect())?;
    let tokens = tokens(&command.source, &store)?;
    let mut progress = Progress::new("scoring", command.json);
    let result = evaluate(&store, &options, &tokens, command.window, &mut |done, total| {
        progress.show("tokens", done as u64, total as u64);
    });
    progress.finish();
    let result = result?;
    let mut writer = TextWriter::stdout();
    if command.json {
        writer.json(&result)?;
    } else {
        let (tokens, nll, perplexity) = (result.tokens, result.nll, result.perplexity);
        writer.text(&format!("{tokens} tokens, nll {nll:.6}, perplexity {perplexity:.4}\n"))?;
    }
    Ok(())
}

fn tokens(source: &SourceArgs, store: &Store) -> Result<Vec<u32>, InputError> {
    if let Some(path) = &source.tokens_file {
        return tokens_of_json(path, &read(path)?);
    }
    let path = source.text.clone().unwrap_or_default();
    let bytes = read(&path)?;
    let text = String::from_utf8(bytes).map_err(|error| InputError::Read {
        path: path.clone(),
        source: io::Error::new(io::ErrorKind::InvalidData, error),
    })?;
    coordinator::tokenize(store, &text).map_err(|source| InputError::Tokenize { path, source })
}

fn read(path: &Path) -> Result<Vec<u8>, InputError> {
    model::read_limited(path, INPUT_BYTES)
        .map_err(|source| InputError::Read { path: path.to_owned(), source })
}

fn tokens_of_json(path: &Path, bytes: &[u8]) -> Result<Vec<u32>, InputError> {
    match serde_json::from_slice(bytes) {
        Ok(TokensFile::Ids(ids))
        | Ok(TokensFile::Object { token_ids: ids })
        | Ok(TokensFile::Golden { heldout_fixed: HeldOut { token_ids: ids } }) => Ok(ids),
        Err(source) => Err(InputError::Tokens { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_in_three_forms() {
        for text in [
            "[1,2,3]",
            r#"{"token_ids":[1,2,3],"text":"abc"}"#,
            r#"{"model":{},"heldout_fixed":{"token_ids":[1,2,3],"ppl":1.5}}"#,
        ] {
            let found = tokens_of_json(Path::new("f"), text.as_bytes()).unwrap();
            assert_eq!(found, [1, 2, 3], "{text}");
        }
        for text in ["", "{", "{}", "[1,-2]", "[1.5]", "[\"a\"]", "[4294967296]"] {
            let error = tokens_of_json(Path::new("f"), text.as_bytes()).unwrap_err();
            assert!(error.to_string().starts_with("f is no list"), "{text}: {error}");
        }
    }
}
