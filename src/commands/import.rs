//! `tercet import`: turns a checkpoint into a store.

use std::path::PathBuf;

use clap::Args;
use client::command::TextWriter;
use model::{Activation, I2sLayout, ImportOptions, Imported, Scales};
use proto::names::model_name;
use serde::Serialize;

use crate::Failure;
use crate::models::ModelsError;
use crate::progress::Progress;
use crate::score::{self, Score, Scored};

/// Turns a checkpoint into a store.
///
/// Reads a Hugging Face directory or a GGUF file of a ternary model and writes a directory that
/// workers map as it is. The store appears whole or not at all.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tercet import bitnet-b1.58-2B-4T/ store/
  tercet import ggml-model-i2_s.gguf store/ --name bitnet-2b")]
pub(crate) struct ImportCommand {
    /// A Hugging Face directory or a GGUF file
    #[arg(value_name = "SOURCE")]
    source: PathBuf,
    /// Directory to make; must not exist
    #[arg(value_name = "STORE")]
    store: PathBuf,
    /// Name of the model, in place of the one that the source suggests
    #[arg(long, value_name = "NAME", value_parser = model_name)]
    name: Option<String>,
    /// Order of the codes in I2_S tensors, which no file states: 128x32, or 64x16 for files made by
    /// bitnet.cpp on ARM after November 2025 [default: 128x32]
    #[arg(long, value_name = "LAYOUT")]
    i2s_layout: Option<I2sLayout>,
    /// What stands between gate and up projection, relu2 or silu, in place of what the source states
    /// or its architecture implies
    #[arg(long, value_name = "NAME")]
    activation: Option<Activation>,
    /// What the scales of a model like BitNet b1.58 2B4T are: stored as they should be, or inverted
    /// by a converter that divides by them [default: refused if they look inverted]
    #[arg(long, value_name = "KIND")]
    scales: Option<Scales>,
    /// Do not score a short English text with the model: by the score it is told whether the model
    /// was read rightly, and which layout its I2_S tensors have
    #[arg(long)]
    no_score: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    id: String,
    store: String,
    name: &'a str,
    format: &'a str,
    notes: &'a [String],
    /// What a text scored, if that was told.
    score: Option<Score>,
}

/// Runs the command.
pub(crate) fn run(command: &ImportCommand) -> Result<(), Failure> {
    let options = ImportOptions {
        name: command.name.clone(),
        i2s_layout: command.i2s_layout,
        activation: command.activation,
        scales: command.scales,
        try_text: Some(coordinator::try_text),
    };
    let mut progress = Progress::new("importing", command.json);
    let mut show = |report: &model::Progress<'_>| {
        progress.show(report.what, report.done, report.total);
    };
    let (source, store) = (&command.source, &command.store);
    let scored = match command.no_score {
        true => model::import(source, store, &options, &mut show)
            .map(|imported| score::unscored(imported, &options)),
        false => score::import(source, store, &options, &mut show),
    };
    progress.finish();
    let Scored { imported, score } =
        scored.map_err(|error| ModelsError::Import { path: source.clone(), source: error })?;
    let mut writer = TextWriter::stdout();
    if command.json {
        writer.json(&Report {
            id: imported.id.to_string(),
            store: imported.store.display().to_string(),
            name: &imported.config.name,
            format: &imported.format,
            notes: &imported.notes,
            score,
        })?;
    } else {
        writer.text(&words(&imported))?;
    }
    Ok(())
}

/// What was imported, and what was decided on the way.
fn words(imported: &Imported) -> String {
    let config = &imported.config;
    let mut text = format!(
        "{} ({}, {}): {} layers of width {}, vocabulary {}\n",
        config.name,
        config.architecture,
        imported.format,
        config.layers,
        config.hidden,
        config.vocab
    );
    for note in &imported.notes {
        text += &format!("  {note}\n");
    }
    text + &format!("store {} has id {}\n", imported.store.display(), imported.id)
}
