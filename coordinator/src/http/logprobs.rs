//! Log probabilities in OpenAI's two forms: a list of objects for chat, parallel lists for plain
//! completions.

use std::collections::BTreeMap;

use proto::generate::Logprobs;
use serde_json::{Value, json};

use crate::text::{Detokenizer, Echo, Text};

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

/// The end of a text that grows by tokens, for `text_offset`. Tokens may cut characters, so only
/// the text as a whole says where one begins: a token stands at the first character that is not
/// certain before it comes.
#[derive(Clone, Debug, Default)]
pub(super) struct TextEnd {
    /// Characters that are certain.
    characters: usize,
    detokenizer: Detokenizer,
}

impl TextEnd {
    fn push(&mut self, bytes: &[u8]) {
        self.characters += self.detokenizer.push(bytes).chars().count();
    }

    /// The text ends after so many characters, whatever its tokens tell.
    fn ends_at(&mut self, characters: usize) {
        *self = Self { characters, detokenizer: Detokenizer::default() };
    }

    /// The text ends here: what was begun becomes a replacement character, in it as here.
    fn finish(&mut self) {
        self.characters += self.detokenizer.finish().chars().count();
    }
}

/// For plain completions: four lists of one entry for each token.
pub(super) struct ForCompletion<'a> {
    text: &'a Text,
    /// Of the text before the next token.
    end: &'a mut TextEnd,
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    text_offset: Vec<usize>,
}

impl<'a> ForCompletion<'a> {
    /// Lists of the tokens that follow `end`.
    pub(super) fn new(text: &'a Text, end: &'a mut TextEnd) -> Self {
        Self {
            text,
            end,
            tokens: Vec::new(),
            token_logprobs: Vec::new(),
            top_logprobs: Vec::new(),
            text_offset: Vec::new(),
        }
    }

    /// The tokens of the prompt, and the scores of those after the first, which has none. Their
    /// candidates are not known, and a list of the token alone would say that it is the most
    /// probable one: evaluation harnesses read that as a greedy answer. A prompt that came as text is
    /// echoed as it came, and its tokens stand where they do in that.
    pub(super) fn push_prompt(&mut self, tokens: &[u32], echo: &Echo, scores: &[Logprobs]) {
        let mut scores = scores.iter();
        for (index, &token) in tokens.iter().enumerate() {
            let score = if index == 0 { None } else { scores.next() };
            let name = text(self.text.token_text(token));
            self.push(token, name, score.map(|score| finite(score.logprob)), None);
        }
        // The answer's text begins with whole characters of its own.
        match &echo.offsets {
            None => self.end.finish(),
            Some(offsets) => {
                self.text_offset.truncate(self.text_offset.len() - tokens.len());
                self.text_offset.extend(offsets.iter().map(|&offset| offset as usize));
                self.end.ends_at(echo.text.chars().count());
            }
        }
    }

    /// A token of the answer.
    pub(super) fn push_answer(&mut self, entry: &Logprobs) {
        let mut top: BTreeMap<String, f32> = BTreeMap::new();
        for candidate in &entry.top {
            top.entry(text(&candidate.token_bytes)).or_insert(finite(candidate.logprob));
        }
        self.push(entry.token, text(&entry.token_bytes), Some(finite(entry.logprob)), Some(top));
    }

    pub(super) fn into_json(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
    }

    /// A special token has a name but adds nothing to the text.
    fn push(
        &mut self,
        token: u32,
        name: String,
        logprob: Option<f32>,
        top: Option<BTreeMap<String, f32>>,
    ) {
        self.text_offset.push(self.end.characters);
        self.end.push(self.text.token_text(token));
        self.tokens.push(name);
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

#[cfg(test)]
mod tests {
    use proto::generate::Prompt;

    use super::*;
    use crate::text::tests::{text_of_json, text_with};

    fn offsets(text: &Text, prompt: &[u32], answer: &[u32]) -> Vec<u64> {
        offsets_of(text, prompt, &Echo::default(), answer)
    }

    fn offsets_of(text: &Text, prompt: &[u32], echo: &Echo, answer: &[u32]) -> Vec<u64> {
        let entry = |&token: &u32| Logprobs { token, ..Logprobs::default() };
        let scores: Vec<Logprobs> = prompt.iter().skip(1).map(entry).collect();
        let mut end = TextEnd::default();
        let mut lists = ForCompletion::new(text, &mut end);
        lists.push_prompt(prompt, echo, &scores);
        // In a stream every token has lists of its own.
        let mut all = lists.into_json();
        for token in answer {
            let mut lists = ForCompletion::new(text, &mut end);
            lists.push_answer(&entry(token));
            let next = lists.into_json()["text_offset"][0].clone();
            all["text_offset"].as_array_mut().unwrap().push(next);
        }
        let listed = all["text_offset"].as_array().unwrap();
        listed.iter().map(|offset| offset.as_u64().unwrap()).collect()
    }

    #[test]
    fn offsets_are_those_of_the_text_as_a_whole() {
        let text = text_with("");
        let prompt = Prompt::Text("a😀b g".into());
        let ids = text.encode(&prompt).unwrap();
        // BOS, a, four bytes of one character, b, then what is left.
        let found = offsets(&text, &ids, &[]);
        assert_eq!(found[..8], [0, 0, 1, 1, 1, 1, 2, 3], "{ids:?}");
        assert_eq!(text.decode(&ids), "a😀b g");
        // Cut anywhere, the answer begins after what the prompt's text shows: a character that
        // was begun is one replacement character.
        for cut in 0..=ids.len() {
            let (head, tail) = ids.split_at(cut);
            let found = offsets(&text, head, tail);
            if let Some(&first) = found.get(cut) {
                assert_eq!(first as usize, text.decode(head).chars().count(), "{cut}");
            }
        }
    }

    #[test]
    fn a_special_token_in_an_answer_moves_nothing() {
        let text = text_with("");
        let letters = text.encode(&Prompt::Text("ab".into())).unwrap();
        let [bos, a, b] = letters[..] else { panic!("{letters:?}") };
        assert_eq!(offsets(&text, &[bos, a], &[bos, bos, b, a]), [0, 0, 1, 1, 1, 2]);
    }

    #[test]
    fn an_echoed_texts_offsets_are_places_in_the_clients_text() {
        let byte_level = text_with("");
        let blank_in_front = text_of_json(|json| {
            json["normalizer"] = json!({"type": "Prepend", "prepend": " "});
        });
        let composed = text_of_json(|json| json["normalizer"] = json!({"type": "NFC"}));
        let echoed = |text: &Text, given: &str| {
            let rendered = text.render(Prompt::Text(given.into())).unwrap();
            let (ids, echo) = text.echo(rendered).unwrap();
            assert_eq!(echo.text, given);
            assert_eq!(ids, text.encode(&Prompt::Text(given.into())).unwrap());
            // An answer of two letters.
            let answer = &text.encode(&Prompt::Text("ab".into())).unwrap()[1..];
            let answer = &answer[answer.len() - 2..];
            (ids.clone(), offsets_of(text, &ids, &echo, answer))
        };
        // As before: BOS, a, four bytes of one character, b, and the two of the answer.
        assert_eq!(echoed(&byte_level, "a😀b").1, [0, 0, 1, 1, 1, 1, 2, 3, 4]);
        // The blank in front is nobody's: "a" begins at 0, though the token's text is " a".
        let (ids, found) = echoed(&blank_in_front, "ab c");
        assert_eq!(found[found.len() - 5..], [1, 2, 3, 4, 5], "{ids:?} {found:?}");
        assert!(found[..found.len() - 5].iter().all(|offset| *offset == 0), "{found:?}");
        // Two characters of the client's are one of the tokenizer's, two bytes.
        let (ids, found) = echoed(&composed, "e\u{301}xy");
        assert_eq!(found, [0, 0, 0, 2, 3, 4, 5], "{ids:?}");
        assert_eq!(composed.decode(&ids).chars().count(), 3);
        // Given as tokens, the text is theirs.
        let (again, echo) =
            composed.echo(composed.render(Prompt::Tokens(ids.clone())).unwrap()).unwrap();
        assert_eq!((again, echo.text.as_str()), (ids.clone(), "\u{e9}xy"));
        assert_eq!(offsets_of(&composed, &ids, &echo, &[]), [0, 0, 0, 1, 2]);
        assert_eq!(echoed(&byte_level, "").1, [0, 0, 1]);
    }
}
