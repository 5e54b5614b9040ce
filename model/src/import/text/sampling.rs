//! Defaults of sampling: what a checkpoint recommends to those who do not say.

use serde_json::{Map, Value};

use crate::gguf::Metadata;
use crate::sampling::SamplingDefaults;

/// Where the defaults may stand.
#[derive(Clone, Copy)]
pub(in super::super) enum SamplingSource<'g, 'a> {
    /// `generation_config.json`.
    Generation(&'g Map<String, Value>),
    /// `general.sampling.*`, as llama.cpp writes and reads it.
    Gguf(&'g Metadata<'a>),
}

/// Keys in a `generation_config.json` and in GGUF metadata: those that vLLM takes.
const KEYS: [(&str, Option<&str>); 6] = [
    ("temperature", Some("general.sampling.temp")),
    ("top_k", Some("general.sampling.top_k")),
    ("top_p", Some("general.sampling.top_p")),
    ("min_p", Some("general.sampling.min_p")),
    ("repetition_penalty", Some("general.sampling.penalty_repeat")),
    ("max_new_tokens", None),
];

impl SamplingSource<'_, '_> {
    fn place(self) -> &'static str {
        match self {
            Self::Generation(_) => "generation_config.json",
            Self::Gguf(_) => "the metadata",
        }
    }

    /// The value; an error is what stands there in place of a number.
    fn number(self, (key, gguf): (&str, Option<&str>)) -> Option<Result<f64, String>> {
        match self {
            Self::Generation(all) => {
                let value = all.get(key).filter(|value| !value.is_null())?;
                Some(value.as_f64().ok_or_else(|| value.to_string().chars().take(32).collect()))
            }
            Self::Gguf(metadata) => match metadata.float(gguf?) {
                Ok(value) => value.map(Ok),
                Err(_) => Some(Err("no number".into())),
            },
        }
    }
}

/// Reads the defaults. What is out of range is ignored, with a note.
pub(super) fn gather(source: SamplingSource<'_, '_>, notes: &mut Vec<String>) -> SamplingDefaults {
    let mut defaults = SamplingDefaults::default();
    for keys in KEYS {
        let Some(number) = source.number(keys) else { continue };
        let taken = number.clone().ok().and_then(|number| defaults.with(keys.0, number));
        match taken {
            Some(with) => defaults = with,
            None => notes.push(format!(
                "sampling: {} has {} = {}, out of range: ignored",
                source.place(),
                keys.0,
                number.map_or_else(|found| found, |number| number.to_string()),
            )),
        }
    }
    if let SamplingSource::Generation(all) = source
        && all.get("do_sample") == Some(&Value::Bool(false))
        && !defaults.is_empty()
    {
        notes.push("sampling: do_sample = false is not obeyed, its numbers are".into());
    }
    if !defaults.is_empty() {
        notes.push(format!("sampling: {defaults} unless a request says otherwise"));
    }
    defaults
}
