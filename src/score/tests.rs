//! The bundled model in containers that lie about it.

#[path = "../../model/tests/support/gguf_writer.rs"]
mod gguf_writer;

use std::path::PathBuf;

use super::*;
use gguf_writer::{GgufWriter, Meta};
use model::LayerWeights;

/// The bundled model as a Hugging Face directory and as a store of it.
struct Bundled {
    dir: tempfile::TempDir,
    store: Store,
}

impl Bundled {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir(&source).unwrap();
        for (name, bytes) in model::bundled().files() {
            fs::write(source.join(name), bytes).unwrap();
        }
        let store = dir.path().join("bundled");
        model::import(&source, &store, &ImportOptions::default(), &mut |_| {}).unwrap();
        Self { store: Store::open(&store).unwrap(), dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn import(&self, source: &str, options: &ImportOptions) -> Scored {
        let dest = self.path(&format!("store of {source}"));
        let _ = fs::remove_dir_all(&dest);
        let scored = import(&self.path(source), &dest, options, &mut |_| {}).unwrap();
        assert_eq!(Store::open(&dest).unwrap().id(), scored.imported.id);
        scored
    }

    /// Writes a GGUF file of it, in whose I2_S tensors code `i` is where `place` says: a byte and
    /// a shift.
    fn write_gguf(&self, name: &str, place: fn(usize) -> (usize, usize)) {
        let config = self.store.config();
        let mut gguf = GgufWriter::default();
        for (key, value) in [
            ("context_length", config.context),
            ("embedding_length", config.hidden),
            ("block_count", config.layers),
            ("feed_forward_length", config.ffn),
            ("attention.head_count", config.heads),
            ("attention.head_count_kv", config.kv_heads),
        ] {
            gguf.set(&format!("bitnet-b1.58.{key}"), Meta::U32(value));
        }
        gguf.set("general.architecture", Meta::String("bitnet-b1.58".into()));
        gguf.set("bitnet-b1.58.rope.freq_base", Meta::F32(500_000.0));
        let eps = "bitnet-b1.58.attention.layer_norm_rms_epsilon";
        gguf.set(eps, Meta::F32(config.rms_eps));
        self.add_tokenizer(&mut gguf);
        let floats = |gguf: &mut GgufWriter, name: &str, dims: &[u64], values: &[f32]| {
            let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            gguf.add(name, dims, 0, data);
        };
        let shard = self.store.embedding().unwrap();
        let matrix = shard.matrix();
        let mut values = vec![0.0; matrix.rows() * matrix.cols()];
        let rows = values.chunks_mut(matrix.cols());
        rows.enumerate().for_each(|(row, out)| matrix.widen_row(row, out));
        let dims = [matrix.cols() as u64, matrix.rows() as u64];
        floats(&mut gguf, "token_embd.weight", &dims, &values);
        let width = [u64::from(config.hidden)];
        let norm = self.store.final_norm().unwrap();
        floats(&mut gguf, "output_norm.weight", &width, norm.weight());
        for layer in 0..config.layers {
            let shard = self.store.layer(layer).unwrap();
            let LayerWeights { q, k, v, o, gate, up, down, .. } = shard.weights();
            let names =
                ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
            for (name, matrix) in names.into_iter().zip([q, k, v, o, gate, up, down]) {
                let (rows, cols) = (matrix.rows(), matrix.cols());
                let mut trits = vec![0; rows * cols];
                let out = trits.chunks_mut(cols);
                out.enumerate().for_each(|(row, out)| matrix.unpack_row(row, out));
                let mut data = vec![0u8; rows * cols / 4 + 32];
                for (i, trit) in trits.iter().enumerate() {
                    let (byte, shift) = place(i);
                    data[byte] |= ((trit + 1) as u8) << shift;
                }
                let at = rows * cols / 4;
                data[at..at + 4].copy_from_slice(&matrix.scale().to_le_bytes());
                let dims = [cols as u64, rows as u64];
                gguf.add(&format!("blk.{layer}.{name}.weight"), &dims, 36, data);
            }
            let weights = shard.weights();
            let norms = [
                ("attn_norm", weights.attn_norm),
                ("attn_sub_norm", weights.attn_sub_norm.unwrap()),
                ("ffn_norm", weights.ffn_norm),
                ("ffn_sub_norm", weights.ffn_sub_norm.unwrap()),
            ];
            for (name, values) in norms {
                let dims = [values.len() as u64];
                floats(&mut gguf, &format!("blk.{layer}.{name}.weight"), &dims, values);
            }
        }
        fs::write(self.path(name), gguf.bytes()).unwrap();
    }

    fn add_tokenizer(&self, gguf: &mut GgufWriter) {
        let json = self.store.tokenizer_json().unwrap().unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        let vocab = json["model"]["vocab"].as_object().unwrap();
        let added = json["added_tokens"].as_array().unwrap();
        let mut tokens = vec![String::new(); self.store.config().vocab as usize];
        for (text, id) in vocab {
            tokens[id.as_u64().unwrap() as usize].clone_from(text);
        }
        let mut types = vec![1; tokens.len()];
        for token in added {
            let id = token["id"].as_u64().unwrap() as usize;
            tokens[id] = token["content"].as_str().unwrap().to_owned();
            types[id] = 3;
        }
        let merges = json["model"]["merges"]
            .as_array()
            .unwrap()
            .iter()
            .map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()));
        gguf.set("tokenizer.ggml.model", Meta::String("gpt2".into()));
        gguf.set("tokenizer.ggml.pre", Meta::String("smaug-bpe".into()));
        gguf.set("tokenizer.ggml.add_bos_token", Meta::Bool(true));
        gguf.set("tokenizer.ggml.bos_token_id", Meta::U32(0));
        gguf.set("tokenizer.ggml.eos_token_id", Meta::U32(1));
        gguf.set("tokenizer.ggml.tokens", Meta::Strings(tokens));
        gguf.set("tokenizer.ggml.token_type", Meta::I32s(types));
        gguf.set("tokenizer.ggml.merges", Meta::Strings(merges.collect()));
    }
}

fn notes(scored: &Scored, text: &str) -> bool {
    scored.imported.notes.iter().any(|note| note.contains(text))
}

#[test]
fn the_layout_of_i2s_is_the_one_that_reads_as_language() {
    let bundled = Bundled::new();
    let own = bundled.import("source", &ImportOptions::default());
    assert!(own.score.unwrap().perplexity < 100.0, "{:?}", own.score);
    assert!(notes(&own, "score: perplexity ") && !notes(&own, "warning"));

    bundled.write_gguf("usual.gguf", |i| (i / 128 * 32 + i % 32, 6 - i % 128 / 32 * 2));
    let usual = bundled.import("usual.gguf", &ImportOptions::default());
    assert_eq!(usual.score.unwrap().perplexity, own.score.unwrap().perplexity);
    assert!(!notes(&usual, "warning"));

    // As bitnet.cpp writes it on ARM: taken for what it is.
    bundled.write_gguf("arm.gguf", |i| (i / 64 * 16 + i % 16, 6 - i % 64 / 16 * 2));
    let arm = bundled.import("arm.gguf", &ImportOptions::default());
    assert_eq!(arm.imported.id, usual.imported.id);
    assert!(notes(&arm, "layout of I2_S: 64x16, for read as 128x32 it is no language"));
    assert!(notes(&arm, "score: perplexity "));
    // What others may open already stays as it is.
    let dest = bundled.path("once");
    let options = ImportOptions::default();
    let once = import_once(&bundled.path("arm.gguf"), &dest, &options, &mut |_| {}).unwrap();
    assert_ne!(once.imported.id, usual.imported.id);
    assert!(notes(&once, "warning: an English text does not read as language"));
    // What a person chose is not put right, but warned of.
    let i2s_layout = Some(I2sLayout::default());
    let chosen =
        bundled.import("arm.gguf", &ImportOptions { i2s_layout, ..ImportOptions::default() });
    assert_ne!(chosen.imported.id, usual.imported.id);
    assert!(notes(&chosen, "warning: an English text does not read as language (perplexity"));

    // Four columns a byte, which no layout here reads: a warning, and the documented layout.
    bundled.write_gguf("other.gguf", |i| (i / 4, i % 4 * 2));
    let other = bundled.import("other.gguf", &ImportOptions::default());
    assert!(notes(&other, "its I2_S may have another layout: see `tercet import"));
    let chosen =
        bundled.import("other.gguf", &ImportOptions { i2s_layout, ..ImportOptions::default() });
    assert_eq!(other.imported.id, chosen.imported.id);
}

#[test]
fn a_model_without_a_tokenizer_is_said_to_have_no_score() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let dir = tempfile::tempdir().unwrap();
    for (name, layout) in [("tiny_packed", false), ("tiny_i2s.gguf", true)] {
        let dest = dir.path().join(name);
        let options = ImportOptions::default();
        let scored = import(&fixtures.join(name), &dest, &options, &mut |_| {}).unwrap();
        assert_eq!(scored.score, None);
        assert!(notes(&scored, "score: none, for there is no tokenizer to read a text with"));
        // What may be read wrongly is warned of, and not merely noted.
        let unknown =
            "warning: score: none, for there is no tokenizer to read a text with, so whether I2_S";
        assert_eq!(notes(&scored, unknown), layout, "{name}");
        assert_eq!(notes(&scored, "warning: score"), layout, "{name}");

        let unscored = unscored(
            model::import(&fixtures.join(name), &dest.with_extension("x"), &options, &mut |_| {})
                .unwrap(),
            &options,
        );
        assert_eq!(notes(&unscored, "warning: score: none, for it was not asked for, so"), layout);
    }
    // Whoever chose the layout knows it.
    let options =
        ImportOptions { i2s_layout: Some(I2sLayout::Of64In16), ..ImportOptions::default() };
    let dest = dir.path().join("chosen");
    let scored = import(&fixtures.join("tiny_i2s.gguf"), &dest, &options, &mut |_| {}).unwrap();
    assert!(!notes(&scored, "warning: score"), "{:?}", scored.imported.notes);
}
