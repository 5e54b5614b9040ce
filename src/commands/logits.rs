//! `tercet debug logits`: the logits after every token, however the work is cut.

use std::fmt::Write as _;

use clap::Args;
use client::command::TextWriter;
use client::generate::TokenIds;
use kernels::Backend;
use serde::Serialize;

use crate::Failure;
use crate::commands::{ComputeArgs, ModelArgs};
use crate::logits::{LogitsOptions, logits};

/// Tokens shown to people at each position.
const SHOWN_TOKENS: usize = 5;

/// Prints the logits after every token of a sequence.
///
/// Stages, chunks, threads, kernels and company never change a bit of them; the KV type does.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet debug logits --tokens 1,2,3
  tercet debug logits --model store/ --tokens 1,2,3 --stages 2 --chunk 1 --isa scalar --json")]
pub(crate) struct LogitsCommand {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids, as 1,2,3
    #[arg(long, value_name = "IDS")]
    tokens: TokenIds,
    /// Tokens of the sequence in one step [default: all]
    #[arg(long, value_name = "C", value_parser = crate::commands::at_least_one)]
    chunk: Option<usize>,
    /// Kernels to compute with, if this CPU runs them [default: auto, the fastest for each operation]
    #[arg(long, value_name = "ISA", value_parser = crate::commands::backend)]
    isa: Option<Backend>,
    /// Run the sequence in steps shared with B other random ones
    #[arg(long, value_name = "B", default_value = "0",
          value_parser = clap::value_parser!(u16).range(0..=1024))]
    among: u16,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print one JSON object: logits, an array of vocabulary size for each position
    #[arg(long)]
    json: bool,
}

/// What `--json` prints: every float so that it reads back to the same bits.
#[derive(Serialize)]
struct Output {
    logits: Vec<Vec<f32>>,
}

/// Runs the command.
pub(crate) fn run(command: &LogitsCommand) -> Result<(), Failure> {
    let store = command.model.open(command.json)?;
    let backend = command.isa.unwrap_or_else(Backend::detect);
    let options = LogitsOptions {
        pipeline: command.compute.pipeline(&store, backend)?,
        chunk: command.chunk,
        among: command.among.into(),
        seed: 0,
    };
    let output = Output { logits: logits(&store, &options, &command.tokens.0)? };
    let mut writer = TextWriter::stdout();
    if command.json {
        writer.json(&output)?;
    } else {
        writer.text(&table(&output.logits))?;
    }
    Ok(())
}

/// The most probable tokens after each position.
fn table(logits: &[Vec<f32>]) -> String {
    let mut text = String::new();
    for (position, logits) in logits.iter().enumerate() {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let _ = write!(text, "{position}:");
        for &token in order.iter().take(SHOWN_TOKENS) {
            let _ = write!(text, "  {token} ({:.4})", logits[token]);
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_read_back_to_the_same_bits() {
        let logits = vec![vec![0.1, -0.0, 1e-45, f32::MAX, 16_777_216.0, -3.402_823_4e38]];
        let text = serde_json::to_string(&Output { logits: logits.clone() }).unwrap();
        let read: serde_json::Value = serde_json::from_str(&text).unwrap();
        let read: Vec<Vec<f32>> = serde_json::from_value(read["logits"].clone()).unwrap();
        let bits = |rows: &[Vec<f32>]| rows[0].iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&read), bits(&logits), "{text}");
    }

    #[test]
    fn people_see_the_best_tokens_first() {
        let text = table(&[vec![0.5, 2.0, 2.0], vec![1.0, 0.0, -1.0]]);
        let want = "0:  1 (2.0000)  2 (2.0000)  0 (0.5000)\n\
                    1:  0 (1.0000)  1 (0.0000)  2 (-1.0000)\n";
        assert_eq!(text, want);
    }
}
