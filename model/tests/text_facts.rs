//! Facts of text that several files can state: the bundled model with keys changed, as strangers
//! change them. Silence never wins, and disagreement is noted.

#![allow(clippy::unwrap_used, reason = "a helper of tests may fail like a test")]

#[path = "support/stores.rs"]
mod stores;

use std::fs;
use std::path::Path;

use model::SamplingDefaults;
use serde_json::{Map, Value, json};
use stores::Stored;

/// The bundled checkpoint, in files that a test may change.
struct Variant(tempfile::TempDir);

impl Variant {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in model::bundled().files() {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Changes a JSON file's object; makes it if it is not there.
    fn edit(self, name: &str, edit: impl FnOnce(&mut Map<String, Value>)) -> Self {
        let path = self.path().join(name);
        let text = fs::read_to_string(&path).unwrap_or_else(|_| "{}".into());
        let mut json: Value = serde_json::from_str(&text).unwrap();
        edit(json.as_object_mut().unwrap());
        fs::write(path, serde_json::to_vec(&json).unwrap()).unwrap();
        self
    }

    fn without(self, name: &str, key: &str) -> Self {
        self.edit(name, |json| drop(json.remove(key).expect(key)))
    }

    fn set(self, name: &str, key: &str, value: Value) -> Self {
        self.edit(name, |json| drop(json.insert(key.into(), value)))
    }

    fn import(&self) -> Stored {
        Stored::import(self.path()).unwrap()
    }

    fn refusal(&self) -> String {
        let error = Stored::import(self.path()).err().expect("it is refused");
        let source = std::error::Error::source(&error).map(|s| format!(": {s}"));
        format!("{error}{}", source.unwrap_or_default())
    }
}

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const TOKENIZER: &str = "tokenizer_config.json";

#[test]
fn the_same_model_whichever_files_are_silent() {
    let whole = Variant::new().import();
    let silent = [
        Variant::new().without(CONFIG, "bos_token_id"),
        Variant::new().set(CONFIG, "bos_token_id", Value::Null),
        Variant::new().set(CONFIG, "bos_token_id", json!(-1)),
        Variant::new().without(CONFIG, "eos_token_id"),
        Variant::new().set(CONFIG, "eos_token_id", json!([1, 2])),
        Variant::new().without(GENERATION, "bos_token_id"),
        Variant::new().without(TOKENIZER, "bos_token"),
        Variant::new().without(TOKENIZER, "eos_token"),
        Variant::new().without(TOKENIZER, "model_max_length"),
        Variant::new().set(TOKENIZER, "model_max_length", json!(1e30)),
        Variant::new().without(CONFIG, "max_position_embeddings"),
        Variant::new().without(CONFIG, "bos_token_id").without(GENERATION, "bos_token_id"),
        // `<|eot_id|>` is in the vocabulary, and the chat template writes it.
        Variant::new().without(GENERATION, "eos_token_id"),
        // Neither file of ids says anything, two of texts do.
        Variant::new()
            .without(CONFIG, "bos_token_id")
            .without(CONFIG, "eos_token_id")
            .without(GENERATION, "bos_token_id")
            .without(GENERATION, "eos_token_id"),
        Variant::new()
            .without(CONFIG, "bos_token_id")
            .without(GENERATION, "bos_token_id")
            .without(TOKENIZER, "bos_token")
            .set("special_tokens_map.json", "bos_token", json!({"content": "<|begin_of_text|>"})),
        // Only the post-processor knows.
        Variant::new()
            .without(CONFIG, "bos_token_id")
            .without(GENERATION, "bos_token_id")
            .without(TOKENIZER, "bos_token"),
        Variant::new().set("tokenizer.json", "post_processor", Value::Null).set(
            TOKENIZER,
            "add_bos_token",
            json!(true),
        ),
    ];
    let last = silent.len() - 1;
    for (number, variant) in silent.into_iter().enumerate() {
        let stored = variant.import();
        // Named after the directory.
        let name = whole.store.config().name.clone();
        let found = model::ModelConfig { name, ..stored.store.config().clone() };
        assert_eq!(&found, whole.store.config(), "variant {number}: {:?}", stored.imported.notes);
        // The last one has another tokenizer.json, and so another id.
        if number < last {
            assert_eq!(stored.imported.id, whole.imported.id, "variant {number}");
        }
    }
}

#[test]
fn files_that_disagree_are_noted() {
    let stored = Variant::new().set(CONFIG, "bos_token_id", json!(2)).import();
    assert_eq!(stored.store.config().bos_token, Some(0), "what the tokenizer writes");
    assert!(stored.notes("BOS: tokenizer.json's post-processor says 0, config.json says [2]"));

    let stored = Variant::new().set(TOKENIZER, "bos_token", json!("<|nothing|>")).import();
    assert!(stored.notes("tokenizer_config.json says \"<|nothing|>\", which is no token"));

    let stored = Variant::new().set(CONFIG, "eos_token_id", json!(7)).import();
    assert_eq!(stored.store.config().eos_tokens, [1, 2, 7]);
    assert!(stored.notes("config.json says [7]"), "{:?}", stored.imported.notes);

    let stored = Variant::new().set(TOKENIZER, "add_bos_token", json!(false)).import();
    assert!(!stored.store.config().add_bos);
    assert!(stored.notes("add_bos_token = false, tokenizer.json's post-processor adds it"));

    let stored = Variant::new().set(TOKENIZER, "add_eos_token", json!(true)).import();
    assert!(stored.notes("EOS is not added to text"));

    let stored = Variant::new().set(TOKENIZER, "model_max_length", json!(256)).import();
    assert_eq!(stored.store.config().context, 512);
    assert!(stored.notes("context: 512 by max_position_embeddings, though tokenizer_config.json"));

    let neither = Variant::new()
        .without(TOKENIZER, "model_max_length")
        .without(CONFIG, "max_position_embeddings");
    assert!(neither.refusal().contains("config.json has no max_position_embeddings"));
    let outside = Variant::new().set(GENERATION, "eos_token_id", json!(5000));
    let text = outside.refusal();
    assert!(text.contains("EOS of generation_config.json is special token 5000"), "{text}");
}

#[test]
fn one_of_many_chat_templates_is_taken_or_none() {
    let list = json!([{"name": "tool_use", "template": "a"}, {"name": "rag", "template": "b"}]);
    let stored = Variant::new().set(TOKENIZER, "chat_template", list).import();
    assert_eq!(stored.store.manifest().chat_template, None);
    assert!(stored.notes("has tool_use, rag, none named \"default\": none is taken"));
    assert!(!stored.notes("chat template: from"));

    let list = json!([{"name": "rag", "template": "b"}, {"name": "default", "template": "c"}]);
    let stored = Variant::new().set(TOKENIZER, "chat_template", list).import();
    assert_eq!(stored.store.manifest().chat_template.as_deref(), Some("c"));
    assert!(stored.notes("chat template: from tokenizer_config.json"));
    assert!(stored.notes("tokenizer_config.json also has rag: not used"));

    let variant = Variant::new();
    let folder = variant.path().join("additional_chat_templates");
    fs::create_dir(&folder).unwrap();
    for name in ["rag.jinja", "tool_use.jinja", "README.md"] {
        fs::write(folder.join(name), "x").unwrap();
    }
    let stored = variant.import();
    assert_ne!(stored.store.manifest().chat_template.as_deref(), Some("x"));
    assert!(stored.notes("additional_chat_templates also has rag, tool_use: not used"));
    let variant = Variant::new();
    fs::create_dir(variant.path().join("additional_chat_templates")).unwrap();
    fs::write(variant.path().join("additional_chat_templates/default.jinja"), "y").unwrap();
    let stored = variant.import();
    assert_eq!(stored.store.manifest().chat_template.as_deref(), Some("y"));

    let variant = Variant::new();
    fs::write(variant.path().join("chat_template.jinja"), "d").unwrap();
    let stored = variant.set("chat_template.json", "chat_template", json!("e")).import();
    assert_eq!(stored.store.manifest().chat_template.as_deref(), Some("d"));
    assert!(stored.notes("chat template: from chat_template.jinja"));
    assert!(stored.notes("chat_template.json has another one than chat_template.jinja: ignored"));

    let stored = Variant::new()
        .without(TOKENIZER, "chat_template")
        .set("chat_template.json", "chat_template", json!("e"))
        .import();
    assert_eq!(stored.store.manifest().chat_template.as_deref(), Some("e"));
}

#[test]
fn settings_of_training_are_switched_off_with_a_note() {
    let stored = Variant::new()
        .edit("tokenizer.json", |json| json["model"]["dropout"] = json!(0.5))
        .import();
    assert!(stored.notes("its dropout, a setting of training, is switched off"));
    let unknown = Variant::new().set("tokenizer.json", "normalizer", json!({"type": "Frob"}));
    let text = unknown.refusal();
    assert!(text.contains("tokenizer.json has the normalizer \"Frob\", expected NFC"), "{text}");
    let bomb =
        json!({"type": "Replace", "pattern": {"String": "a"}, "content": "b".repeat(10_000)});
    let text = Variant::new().set("tokenizer.json", "normalizer", bomb).refusal();
    assert!(text.contains("may make of one is 20000, at most 128"), "{text}");
}

#[test]
fn defaults_of_sampling_come_with_the_model_and_are_not_its_id() {
    let stored = Variant::new().import();
    let whole = SamplingDefaults {
        temperature: Some(0.7),
        top_p: Some(0.9),
        ..SamplingDefaults::default()
    };
    assert_eq!(stored.store.manifest().sampling, whole);
    assert!(stored.notes("sampling: temperature 0.7, top_p 0.9 unless a request says otherwise"));

    let none = Variant::new().without(GENERATION, "temperature").without(GENERATION, "top_p");
    let none = none.import();
    assert!(none.store.manifest().sampling.is_empty());
    assert_eq!(none.imported.id, stored.imported.id);

    let many = Variant::new()
        .set(GENERATION, "top_k", json!(20))
        .set(GENERATION, "min_p", json!(0.05))
        .set(GENERATION, "repetition_penalty", json!(1.1))
        .set(GENERATION, "max_new_tokens", json!(64))
        .set(GENERATION, "do_sample", json!(false))
        .import();
    let want = SamplingDefaults {
        top_k: Some(20),
        min_p: Some(0.05),
        repetition_penalty: Some(1.1),
        max_new_tokens: Some(64),
        ..whole
    };
    assert_eq!(many.store.manifest().sampling, want);
    assert!(many.notes("do_sample = false is not obeyed"));

    for (key, bad) in [
        ("temperature", json!(-1)),
        ("temperature", json!(1e300)),
        ("temperature", json!("hot")),
        ("top_p", json!(0.0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(2.5)),
        ("top_k", json!(-7)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("repetition_penalty", json!(1e-45)),
        ("max_new_tokens", json!(0)),
    ] {
        let stored = Variant::new().set(GENERATION, key, bad.clone()).import();
        let note = format!("generation_config.json has {key} = ");
        assert!(stored.notes(&note), "{key} {bad}: {:?}", stored.imported.notes);
        let mut left = whole;
        match key {
            "temperature" => left.temperature = None,
            "top_p" => left.top_p = None,
            _ => {}
        }
        assert_eq!(stored.store.manifest().sampling, left, "{key} {bad}");
    }
}

#[test]
fn manifests_of_before_load_and_bad_defaults_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = model::import_bundled(dir.path()).unwrap();
    let text = fs::read_to_string(store.join("manifest.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    json["sampling"]["temperature"] = json!(99.0);
    let error = model::Manifest::parse(&serde_json::to_vec(&json).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "the default of temperature is 99, which no request may ask for");
    json.as_object_mut().unwrap().remove("sampling").unwrap();
    json.as_object_mut().unwrap().remove("digest");
    let old = model::Manifest::parse(&serde_json::to_vec(&json).unwrap()).unwrap();
    assert!(old.sampling.is_empty());
}

#[test]
fn tokens_that_only_other_files_name_are_added() {
    let tokens = |stored: &Stored| -> Vec<(u64, String)> {
        let json = stored.store.tokenizer_json().unwrap().unwrap();
        let json: Value = serde_json::from_slice(&json).unwrap();
        let tokens = json["added_tokens"].as_array().unwrap().iter();
        tokens
            .map(|t| (t["id"].as_u64().unwrap(), t["content"].as_str().unwrap().to_owned()))
            .collect()
    };
    let whole = Variant::new().import();
    let all = tokens(&whole);
    assert_eq!(all.iter().filter(|(_, text)| text == "<|eot_id|>").count(), 1);
    let (eot, _) = all.iter().find(|(_, text)| text == "<|eot_id|>").unwrap().clone();
    let lacking = || {
        Variant::new().edit("tokenizer.json", |json| {
            let tokens = json["added_tokens"].as_array_mut().unwrap();
            tokens.retain(|token| token["content"] != "<|eot_id|>");
        })
    };
    let entry = json!({ "content": "<|eot_id|>", "normalized": false, "special": true });
    let decoder = json!({ eot.to_string(): entry });

    let stored = lacking().set(TOKENIZER, "added_tokens_decoder", decoder.clone()).import();
    assert_eq!(tokens(&stored), all);
    assert!(stored.notes("tokenizer.json lacks what tokenizer_config.json names: added"));
    assert_eq!(stored.store.config().eos_tokens, whole.store.config().eos_tokens);
    let stored = lacking().set("added_tokens.json", "<|eot_id|>", json!(eot)).import();
    assert_eq!(tokens(&stored), all);
    assert!(stored.notes("tokenizer.json lacks what added_tokens.json names: added"));

    // What is said twice alike changes nothing, not even the id of the model.
    let stored = Variant::new().set(TOKENIZER, "added_tokens_decoder", decoder).import();
    assert_eq!(stored.store.id(), whole.store.id());
    assert!(!stored.notes("tokens: tokenizer"));
    // Other properties are those that transformers takes; other ids are nobody's.
    let entry = json!({ "content": "<|eot_id|>", "rstrip": true, "special": true });
    let swallows = Variant::new().set(
        TOKENIZER,
        "added_tokens_decoder",
        json!({ eot.to_string(): entry, "1": {"content": "<|eot_id|>", "special": true},
                "99999999": {"content": "<|far|>"}, "x": {"content": "<|x|>"} }),
    );
    let stored = swallows.import();
    assert!(stored.notes("tokenizer_config.json has other properties than tokenizer.json"));
    assert!(stored.notes(&format!("tokenizer_config.json says 1, tokenizer.json {eot}")));
    assert!(stored.notes("tokenizer_config.json names what is outside the vocabulary: ignored"));
    assert_eq!(tokens(&stored), all);
    let taken = json!({ "5": {"content": "<|new|>", "special": true} });
    let stored = Variant::new().set(TOKENIZER, "added_tokens_decoder", taken).import();
    assert!(stored.notes("tokenizer_config.json gives the id 5 of another token: ignored"));
}

/// What transformers 4 makes of the same files: `tokenizer.special_tokens_map`, which it passes to every
/// template, without BOS and EOS.
#[test]
fn templates_get_the_special_tokens_that_transformers_gives_them() {
    const MAP: &str = "special_tokens_map.json";
    let names = "unk_token sep_token pad_token cls_token mask_token image_token boi_token \
                 additional_special_tokens";
    let naming = || {
        let template = names.split(' ').map(|name| format!("{{{{ {name} }}}}")).collect::<String>();
        Variant::new().set(TOKENIZER, "chat_template", json!(template))
    };
    let special = |variant: &Variant| {
        let stored = variant.import();
        let texts = serde_json::to_value(&stored.store.manifest().special_token_texts).unwrap();
        (texts, stored.store.id())
    };
    let (none, plain) = special(&naming());
    assert_eq!(none, json!({}));

    let object = json!({"content": "<pad>", "lstrip": false, "special": true});
    let said = naming()
        .set(TOKENIZER, "unk_token", json!("<unk>"))
        .set(TOKENIZER, "pad_token", object.clone())
        .set(TOKENIZER, "sep_token", Value::Null)
        .set(TOKENIZER, "cls_token", json!(""))
        .set(TOKENIZER, "additional_special_tokens", json!(["<a>", {"content": "<b>"}, "<a>"]))
        .set(TOKENIZER, "model_specific_special_tokens", json!({"boi_token": "<boi>"}))
        .set(TOKENIZER, "extra_special_tokens", json!({"image_token": "<image>", "messages": "x"}));
    assert!(said.import().notes("no template knows one by (1, the first is \"messages\")"));
    let (texts, id) = special(&said);
    let want = json!({
        "unk_token": "<unk>", "pad_token": "<pad>", "image_token": "<image>",
        "boi_token": "<boi>",
        "additional_special_tokens": ["<a>", "<b>", "<a>"],
    });
    assert_eq!(texts, want, "what the config says twice stays");
    assert_ne!(id, plain, "what a template writes is part of what a model is");
    let other = naming().set(TOKENIZER, "unk_token", json!("<other>"));
    assert_ne!(special(&other).1, special(&naming().set(TOKENIZER, "unk_token", object)).1);

    // Old files: the map goes over the config, and its list behind that.
    let old = |variant: Variant| {
        variant
            .set(TOKENIZER, "unk_token", json!("<unk>"))
            .set(TOKENIZER, "additional_special_tokens", json!(["<a>"]))
            .set(MAP, "unk_token", json!({"content": "<other>"}))
            .set(MAP, "mask_token", json!("<mask>"))
            .set(MAP, "additional_special_tokens", json!(["<b>", "<a>", "<b>"]))
    };
    let want = json!({
        "unk_token": "<other>", "mask_token": "<mask>", "additional_special_tokens": ["<a>", "<b>"],
    });
    assert_eq!(special(&old(naming())).0, want);
    // New ones name all there is in the config, and the map is not looked at.
    let new = old(naming()).set(TOKENIZER, "added_tokens_decoder", json!({}));
    let want = json!({ "unk_token": "<unk>", "additional_special_tokens": ["<a>"] });
    assert_eq!(special(&new).0, want);

    // A template that names none of them has the store and the id that it always had.
    let silent = Variant::new().set(TOKENIZER, "unk_token", json!("<unk>"));
    let (texts, id) = special(&silent);
    assert_eq!((texts, id), (json!({}), Variant::new().import().store.id()));
    // A token of the vocabulary that only stands there is one that a text is searched for.
    let word = json!("\u{120}the");
    let stored = Variant::new().set(TOKENIZER, "pad_token", word).import();
    assert!(stored.notes("tokenizer.json lacks what the list of special tokens names: added"));

    let many: Vec<String> = (0..4097).map(|number| format!("<{number}>")).collect();
    let stored = naming()
        .set(TOKENIZER, "additional_special_tokens", json!(many))
        .set(TOKENIZER, "unk_token", json!("<unk>"))
        .import();
    assert!(
        stored.notes("warning: special tokens: the number of additional_special_tokens is 4097")
    );
    let texts = serde_json::to_value(&stored.store.manifest().special_token_texts).unwrap();
    assert_eq!(texts, json!({ "unk_token": "<unk>" }), "the rest stays");
    let long = naming().set(TOKENIZER, "unk_token", json!("x".repeat(1025))).refusal();
    assert!(long.contains("the length of unk_token in bytes is 1025"), "{long}");
}

#[test]
fn of_a_token_that_is_named_twice_the_last_counts_as_in_python() {
    let variant = Variant::new().set(TOKENIZER, "chat_template", json!("{{ pad_token }}"));
    let path = variant.path().join(TOKENIZER);
    let text = fs::read_to_string(&path).unwrap();
    let twice =
        format!("{{\"pad_token\":\"<a>\",\"pad_token\":\"<b>\",{}", &text.trim_start()[1..]);
    fs::write(path, twice).unwrap();
    let texts = serde_json::to_value(&variant.import().store.manifest().special_token_texts);
    assert_eq!(texts.unwrap(), json!({ "pad_token": "<b>" }));
}

#[test]
fn a_field_of_another_type_is_named() {
    for (file, key, value, want) in [
        (CONFIG, "eos_token_id", json!("2"), "config.json: eos_token_id: expected a token id"),
        (CONFIG, "vocab_size", json!("512"), "config.json: vocab_size: invalid type: string"),
        (
            CONFIG,
            "quantization_config",
            json!({"quant_method": 3}),
            "config.json: quantization_config.quant_method: invalid type",
        ),
        (GENERATION, "bos_token_id", json!({}), "generation_config.json: bos_token_id: expected"),
        (TOKENIZER, "bos_token", json!(5), "tokenizer_config.json: bos_token: expected a text"),
        (
            TOKENIZER,
            "chat_template",
            json!(5),
            "tokenizer_config.json: chat_template: expected a template's text",
        ),
    ] {
        let refusal = Variant::new().set(file, key, value).refusal();
        assert!(refusal.contains(want), "{refusal}");
        assert!(!refusal.contains("untagged"), "{refusal}");
    }
}

#[test]
fn a_whole_file_goes_before_an_index_that_was_left_over() {
    let index = "model.safetensors.index.json";
    let left_over = json!({"model.norm.weight": "model-00001-of-00002.safetensors"});
    let stored = Variant::new().set(index, "weight_map", left_over).import();
    assert!(stored.notes("model.safetensors.index.json is ignored beside model.safetensors"));
}
