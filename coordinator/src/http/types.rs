//! The bodies of OpenAI's requests, as lenient as real clients need: unknown fields are ignored
//! and an explicit `null` is an absent field. What would change the answer and is not there is
//! refused by name.

use std::collections::BTreeMap;

use proto::generate::{GenerateRequest, Sampling};
use serde::Deserialize;
use serde_json::Value;

use super::errors::ApiError;

/// Answers to one prompt, at most.
pub(super) const MAX_N: u32 = 4;

/// Fields that both kinds of completions have.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Parameters {
    pub(super) model: Option<String>,
    pub(super) max_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    /// vLLM writes -1 for off.
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    seed: Option<Seed>,
    stop: Option<OneOrMany>,
    stop_token_ids: Option<Vec<u32>>,
    ignore_eos: Option<bool>,
    min_tokens: Option<u32>,
    include_stop_str_in_output: Option<bool>,
    n: Option<u32>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    /// Ours: the numerics class that the answer must have.
    class: Option<String>,
    best_of: Option<u32>,
    skip_special_tokens: Option<bool>,
    structured_outputs: Option<Value>,
    guided_json: Option<Value>,
    guided_regex: Option<Value>,
    guided_choice: Option<Value>,
    guided_grammar: Option<Value>,
}

/// OpenAI's seeds are signed.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(untagged)]
enum Seed {
    Unsigned(u64),
    Signed(i64),
}

/// A text or a list of texts.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// How a stream ends.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(super) struct StreamOptions {
    /// A last chunk with the usage and no choice.
    include_usage: Option<bool>,
    /// The usage so far on every chunk.
    continuous_usage_stats: Option<bool>,
}

impl StreamOptions {
    pub(super) fn include_usage(self) -> bool {
        self.include_usage.unwrap_or(false)
    }

    pub(super) fn continuous_usage(self) -> bool {
        self.include_usage() && self.continuous_usage_stats.unwrap_or(false)
    }
}

impl Parameters {
    /// How many answers are wanted to each prompt.
    ///
    /// # Errors
    ///
    /// If it is none or too many, or if the best of more were wanted.
    pub(super) fn choices(&self) -> Result<u32, ApiError> {
        let n = self.n.unwrap_or(1);
        if !(1..=MAX_N).contains(&n) {
            let message = format!("n must be from 1 to {MAX_N}, found {n}");
            return Err(ApiError::invalid(Some("n"), message));
        }
        if self.best_of.is_some_and(|best_of| best_of != n) {
            return Err(ApiError::unsupported("best_of", "best_of other than n"));
        }
        Ok(n)
    }

    /// What of a request these fields say; the prompt and the logprobs are for the caller, and
    /// so is a `max_tokens` of 0, which means another thing in the schema.
    ///
    /// # Errors
    ///
    /// 400 for what is not supported or not a number where one must be.
    pub(super) fn request(&self) -> Result<GenerateRequest, ApiError> {
        self.refuse_unsupported()?;
        let logit_bias = self
            .logit_bias
            .iter()
            .flatten()
            .map(|(token, &bias)| Some((token.trim().parse().ok()?, bias)))
            .collect::<Option<Vec<(u32, f32)>>>()
            .ok_or_else(|| {
                ApiError::invalid(Some("logit_bias"), "the keys of logit_bias must be token ids")
            })?;
        // Zero and less mean off, as in vLLM.
        let top_k = self.top_k.filter(|&k| k > 0).map(|k| u32::try_from(k).unwrap_or(u32::MAX));
        Ok(GenerateRequest {
            model: self.model.clone().unwrap_or_default(),
            max_tokens: self.max_tokens.unwrap_or(0),
            min_tokens: self.min_tokens.unwrap_or(0),
            sampling: Sampling {
                temperature: self.temperature,
                top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                presence_penalty: self.presence_penalty,
                frequency_penalty: self.frequency_penalty,
                logit_bias,
            },
            stop: match self.stop.clone() {
                None => Vec::new(),
                Some(OneOrMany::One(stop)) => vec![stop],
                Some(OneOrMany::Many(stops)) => stops,
            },
            stop_token_ids: self.stop_token_ids.clone().unwrap_or_default(),
            include_stop: self.include_stop_str_in_output.unwrap_or(false),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            seed: self.seed.map(|seed| match seed {
                Seed::Unsigned(seed) => seed,
                Seed::Signed(seed) => seed.cast_unsigned(),
            }),
            class: self.class.clone().unwrap_or_default(),
            ..GenerateRequest::default()
        })
    }

    fn refuse_unsupported(&self) -> Result<(), ApiError> {
        for (name, value) in [
            ("structured_outputs", &self.structured_outputs),
            ("guided_json", &self.guided_json),
            ("guided_regex", &self.guided_regex),
            ("guided_choice", &self.guided_choice),
            ("guided_grammar", &self.guided_grammar),
        ] {
            if value.is_some() {
                return Err(ApiError::unsupported(name, "structured output"));
            }
        }
        if self.skip_special_tokens == Some(false) {
            let what = "showing special tokens in the text";
            return Err(ApiError::unsupported("skip_special_tokens", what));
        }
        Ok(())
    }
}
