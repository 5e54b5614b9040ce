//! `tercet model`: lists, shows, checks and makes stores.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use client::command::TextWriter;
use model::{Manifest, Store, SynthShape};
use serde::Serialize;

use crate::progress::Progress;
use crate::{Failure, models};

/// Lists, shows, checks and makes stores.
#[derive(Debug, Args)]
pub(crate) struct ModelCommand {
    #[command(subcommand)]
    what: ModelWhat,
}

#[derive(Debug, Subcommand)]
enum ModelWhat {
    /// List the stores in a directory
    Ls {
        /// Where to look [default: what was imported on the way, in the cache]
        #[arg(value_name = "DIR")]
        dir: Option<PathBuf>,
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Show what a store holds
    Show {
        /// A store's directory
        #[arg(value_name = "STORE")]
        store: PathBuf,
        /// Print the manifest as JSON
        #[arg(long)]
        json: bool,
    },
    /// Check every file of a store against its hash
    Verify {
        /// A store's directory
        #[arg(value_name = "STORE")]
        store: PathBuf,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Make a store of random weights, for benchmarks and tests
    #[command(after_help = "Examples:
  tercet model synth --shape 2b4t store/
  tercet model synth --shape 4x256x768x4x2x4096 --seed 7 store/")]
    Synth {
        /// 2b4t, 700m, 8b, tiny, or LAYERSxHIDDENxFFNxHEADSxKV_HEADSxVOCAB
        #[arg(long, value_name = "SHAPE")]
        shape: SynthShape,
        /// The same seed makes the same weights
        #[arg(long, value_name = "N", default_value = "0")]
        seed: u64,
        /// Directory to make; must not exist
        #[arg(value_name = "STORE")]
        store: PathBuf,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// One line of `ls --json`.
#[derive(Serialize)]
struct Listed {
    path: String,
    name: String,
    id: String,
    layers: u32,
    bytes: u64,
}

/// What `verify --json` and `synth --json` print.
#[derive(Serialize)]
struct Named {
    store: String,
    id: String,
}

/// Runs the command.
pub(crate) fn run(command: ModelCommand) -> Result<(), Failure> {
    let mut writer = TextWriter::stdout();
    match command.what {
        ModelWhat::Ls { dir, json } => ls(&mut writer, dir, json),
        ModelWhat::Show { store, json } => {
            let store = Store::open(&store)?;
            if json {
                writer.json(store.manifest())?;
            } else {
                writer.text(&words(store.manifest()))?;
            }
            Ok(())
        }
        ModelWhat::Verify { store: dir, json } => {
            let store = Store::open(&dir)?;
            let mut progress = Progress::new("verifying", json);
            let verified = store.verify(|report: &model::Progress<'_>| {
                progress.show(report.what, report.done, report.total);
            });
            progress.finish();
            verified?;
            say(&mut writer, &dir, &store.manifest().id.to_string(), "is whole, id", json)
        }
        ModelWhat::Synth { shape, seed, store, json } => {
            let mut progress = Progress::new("making", json);
            let made = model::synth(&shape, seed, &store, &mut |report| {
                progress.show(report.what, report.done, report.total);
            });
            progress.finish();
            say(&mut writer, &store, &made?.to_string(), "has id", json)
        }
    }
}

fn say(
    writer: &mut TextWriter<std::io::Stdout>,
    store: &std::path::Path,
    id: &str,
    verb: &str,
    json: bool,
) -> Result<(), Failure> {
    let store = store.display().to_string();
    if json {
        writer.json(&Named { store, id: id.to_owned() })?;
    } else {
        writer.text(&format!("store {store} {verb} {id}\n"))?;
    }
    Ok(())
}

fn ls(
    writer: &mut TextWriter<std::io::Stdout>,
    dir: Option<PathBuf>,
    json: bool,
) -> Result<(), Failure> {
    let dir = dir.map_or_else(models::cache_dir, Ok)?;
    // A directory that is not there is a mistake; an empty one is not.
    std::fs::read_dir(&dir)
        .map_err(|source| models::ModelsError::Look { path: dir.clone(), source })?;
    let mut listed = Vec::new();
    for path in model::find_stores(&dir) {
        match Store::open(&path) {
            Ok(store) => {
                let manifest = store.manifest();
                listed.push(Listed {
                    path: path.display().to_string(),
                    name: manifest.config.name.clone(),
                    id: manifest.id.to_string(),
                    layers: manifest.config.layers,
                    bytes: bytes(manifest),
                });
            }
            Err(error) => tracing::warn!("passed over: {}", node::Chain(&error)),
        }
    }
    if json {
        return Ok(writer.json(&listed)?);
    }
    for store in &listed {
        let Listed { path, name, id, layers, bytes } = store;
        let megabytes = *bytes as f64 / 1e6;
        let id = id.get(..12).unwrap_or(id);
        writer.text(&format!("{id}  {layers:>3} layers  {megabytes:>8.1} MB  {name}  {path}\n"))?;
    }
    Ok(())
}

fn bytes(manifest: &Manifest) -> u64 {
    let tokenizer = manifest.tokenizer.as_ref().map_or(0, |file| file.bytes);
    manifest.files.iter().map(|file| file.bytes).fold(tokenizer, u64::saturating_add)
}

/// A manifest for people.
fn words(manifest: &Manifest) -> String {
    let config = &manifest.config;
    let yes = |there: bool| if there { "yes" } else { "no" };
    let mut text = format!(
        "name          {}\n\
         id            {}\n\
         architecture  {}\n\
         layers        {}\n\
         width         {} (feed-forward {})\n\
         heads         {} of {} ({} for keys and values)\n\
         vocabulary    {}{}\n\
         context       {}\n\
         tokenizer     {}\n\
         chat template {}\n\
         sampling      {}\n\
         size          {:.1} MB in {} files\n\
         layout        {}\n\
         source        {} ({})\n",
        config.name,
        manifest.id,
        config.architecture,
        config.layers,
        config.hidden,
        config.ffn,
        config.heads,
        config.head_dim,
        config.kv_heads,
        config.vocab,
        if config.tied_head { ", head tied to the embedding" } else { "" },
        config.context,
        yes(manifest.tokenizer.is_some()),
        yes(manifest.chat_template.is_some()),
        manifest.sampling,
        bytes(manifest) as f64 / 1e6,
        manifest.files.len(),
        manifest.layout,
        manifest.provenance.source,
        manifest.provenance.format,
    );
    for note in &manifest.provenance.notes {
        text += &format!("  {note}\n");
    }
    text
}
