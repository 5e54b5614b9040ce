//! Log probabilities in OpenAI's two forms: a list of objects for chat, parallel lists for plain
//! completions.

use std::collections::BTreeMap;

use proto::generate::Logprobs;
use serde_json::{Value, json};

/// For chat: one object for each token.
pub(super) fn for_chat<'a>(logprobs: impl Iterator<Item = &'a Logprobs>) -> Value {
    let content: Vec<Value> = logprobs
        .map(|entry| {
            let top: Vec<Value> =
                entry.top.iter().map(|top| entry_of(&top.token_bytes, top.logprob, None)).collect();
            entry_of(&entry.token_bytes, entry.logprob, Some(top))
        })
        .collect();
    json!({ "content": content, "refusal": null })
}

fn entry_of(bytes: &[u8], logprob: f32, top: Option<Vec<Value>>) -> Value {
    let mut entry = json!({
        "token": text(bytes),
        "logprob": finite(logprob),
        "bytes": bytes,
    });
    if let Some(top) = top {
        entry["top_logprobs"] = top.into();
    }
    entry
}

/// For plain completions: four lists of one entry for each token.
#[derive(Default)]
pub(super) struct ForCompletion {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    text_offset: Vec<usize>,
    /// Characters before the next token.
    offset: usize,
}

impl ForCompletion {
    /// Lists whose first token begins `offset` characters into the text.
    pub(super) fn from_offset(offset: usize) -> Self {
        Self { offset, ..Self::default() }
    }

    /// A token of the prompt; the first has no probability. Its candidates are not known, and a
    /// list of the token alone would say that it is the most probable one: evaluation harnesses
    /// read that as a greedy answer.
    pub(super) fn push_prompt(&mut self, token: String, logprob: Option<f32>) {
        self.push(token, logprob.map(finite), None);
    }

    /// A token of the answer.
    pub(super) fn push_answer(&mut self, entry: &Logprobs) {
        let mut top: BTreeMap<String, f32> = BTreeMap::new();
        for candidate in &entry.top {
            top.entry(text(&candidate.token_bytes)).or_insert(finite(candidate.logprob));
        }
        self.push(text(&entry.token_bytes), Some(finite(entry.logprob)), Some(top));
    }

    /// Characters of all tokens so far.
    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    pub(super) fn into_json(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
    }

    fn push(&mut self, token: String, logprob: Option<f32>, top: Option<BTreeMap<String, f32>>) {
        self.text_offset.push(self.offset);
        self.offset += token.chars().count();
        self.tokens.push(token);
        self.token_logprobs.push(logprob);
        self.top_logprobs.push(top);
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// JSON has no infinities: OpenAI writes -9999 for what cannot be drawn.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}
