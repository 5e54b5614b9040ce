//! The bodies of OpenAI's requests, as lenient as real clients need: unknown fields are ignored
//! and an explicit `null` is an absent field. What would change the answer and is not there is
//! refused by name.

use std::borrow::Cow;

use proto::generate::{GenerateRequest, Priority, Sampling};
use proto::limits;
use serde::de::{MapAccess, SeqAccess};
use serde_json::{Map, Value};

use super::errors::ApiError;
use super::json::{
    Boolean, Float, Integer, Items, List, Maybe, Object, Present, Shape, Text, Tree, TreeRoom,
    Wrong,
};

/// Characters of a wrong name that a message repeats.
pub(super) const SHOWN_CHARS: usize = 32;

/// Answers to one prompt, at most.
pub(super) const MAX_N: u32 = 4;

/// Values in `chat_template_kwargs`: templates ask for a handful.
const ARGUMENT_NODES: usize = 1024;

/// Fields that both kinds of completions have.
#[derive(Debug, Default)]
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
    logit_bias: Option<Vec<(u32, f32)>>,
    /// OpenAI's are signed.
    seed: Option<i128>,
    stop: Option<Vec<String>>,
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
    /// vLLM's: who shares the prefix cache.
    cache_salt: Option<String>,
    user: Option<String>,
    /// OpenAI's: `flex` waits for what others leave.
    service_tier: Option<String>,
    /// vLLM's: above 0 is later than others.
    priority: Option<i64>,
    /// The first field of guided decoding that was given.
    guided: Option<&'static str>,
}

/// Fields of guided decoding.
const GUIDED: [&str; 5] =
    ["structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"];

/// A text or a list of texts that end the answer.
struct Stops;

impl<'de> Shape<'de> for Stops {
    type Value = Vec<String>;

    fn wanted(&self) -> Cow<'static, str> {
        "a string or a list of strings".into()
    }

    fn text(self, value: &str) -> Result<Vec<String>, Wrong> {
        Ok(vec![value.to_owned()])
    }

    fn list<A: SeqAccess<'de>>(self, items: Items<'_, A>) -> Result<Vec<String>, A::Error> {
        let limit = limits::STOP_STRINGS;
        List { item: Text::whole, limit, wanted: "a list of strings" }.list(items)
    }
}

/// Biases by token.
struct Biases;

impl<'de> Shape<'de> for Biases {
    type Value = Vec<(u32, f32)>;

    fn wanted(&self) -> Cow<'static, str> {
        "an object of token ids and numbers".into()
    }

    fn object<A: MapAccess<'de>>(self, mut object: Object<'_, A>) -> Result<Self::Value, A::Error> {
        let mut biases = Vec::new();
        while let Some(name) = object.name()? {
            let Ok(token) = name.trim().parse() else {
                let shown: String = name.chars().take(SHOWN_CHARS).collect();
                let message = format!("must have token ids as its keys, found {shown:?}");
                return Err(object.places.refuse(message));
            };
            if biases.len() == limits::LOGIT_BIAS {
                let message = format!("may have a length of {}, found more", limits::LOGIT_BIAS);
                return Err(object.places.refuse(message));
            }
            biases.push((token, object.value_of_token(token, Float)?));
        }
        Ok(biases)
    }
}

/// The template's arguments as a JSON object.
pub(super) struct Arguments;

impl<'de> Shape<'de> for Arguments {
    type Value = Map<String, Value>;

    fn wanted(&self) -> Cow<'static, str> {
        "an object".into()
    }

    fn object<A: MapAccess<'de>>(self, object: Object<'_, A>) -> Result<Self::Value, A::Error> {
        let room = TreeRoom::new(ARGUMENT_NODES, limits::TEMPLATE_ARGUMENT_BYTES);
        Ok(match Tree(&room).object(object)? {
            Value::Object(map) => map,
            _ => Map::new(),
        })
    }
}

/// How a stream ends.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StreamOptions {
    /// A last chunk with the usage and no choice.
    include_usage: Option<bool>,
    /// The usage so far on every chunk.
    continuous_usage_stats: Option<bool>,
}

struct Options;

impl<'de> Shape<'de> for Options {
    type Value = StreamOptions;

    fn wanted(&self) -> Cow<'static, str> {
        "an object".into()
    }

    fn object<A: MapAccess<'de>>(self, mut object: Object<'_, A>) -> Result<Self::Value, A::Error> {
        let mut options = StreamOptions::default();
        while let Some(name) = object.name()? {
            match name.as_str() {
                "include_usage" => {
                    object.take("include_usage", Maybe(Boolean), &mut options.include_usage)?;
                }
                "continuous_usage_stats" => object.take(
                    "continuous_usage_stats",
                    Maybe(Boolean),
                    &mut options.continuous_usage_stats,
                )?,
                _ => object.skip()?,
            }
        }
        Ok(options)
    }
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
    /// Reads the field `name`, or passes over what is no field of these.
    ///
    /// # Errors
    ///
    /// If the value is none that the field may have.
    pub(super) fn field<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        object: &mut Object<'_, A>,
    ) -> Result<(), A::Error> {
        let float = || Maybe(Float);
        let count = || Maybe(Integer::<u32>::new());
        let text = || Maybe(Text::whole());
        let boolean = || Maybe(Boolean);
        match name {
            "model" => object.take("model", text(), &mut self.model),
            "max_tokens" => object.take("max_tokens", count(), &mut self.max_tokens),
            "temperature" => object.take("temperature", float(), &mut self.temperature),
            "top_p" => object.take("top_p", float(), &mut self.top_p),
            "top_k" => object.take("top_k", Maybe(Integer::new()), &mut self.top_k),
            "min_p" => object.take("min_p", float(), &mut self.min_p),
            "repetition_penalty" => {
                object.take("repetition_penalty", float(), &mut self.repetition_penalty)
            }
            "presence_penalty" => {
                object.take("presence_penalty", float(), &mut self.presence_penalty)
            }
            "frequency_penalty" => {
                object.take("frequency_penalty", float(), &mut self.frequency_penalty)
            }
            "logit_bias" => object.take("logit_bias", Maybe(Biases), &mut self.logit_bias),
            "seed" => object.take("seed", Maybe(Integer::new()), &mut self.seed),
            "stop" => object.take("stop", Maybe(Stops), &mut self.stop),
            "stop_token_ids" => {
                let (item, limit) = (Integer::<u32>::new, limits::STOP_TOKENS);
                let ids = Maybe(List { item, limit, wanted: "a list of token ids" });
                object.take("stop_token_ids", ids, &mut self.stop_token_ids)
            }
            "ignore_eos" => object.take("ignore_eos", boolean(), &mut self.ignore_eos),
            "min_tokens" => object.take("min_tokens", count(), &mut self.min_tokens),
            "include_stop_str_in_output" => object.take(
                "include_stop_str_in_output",
                boolean(),
                &mut self.include_stop_str_in_output,
            ),
            "n" => object.take("n", count(), &mut self.n),
            "stream" => object.take("stream", boolean(), &mut self.stream),
            "stream_options" => {
                object.take("stream_options", Maybe(Options), &mut self.stream_options)
            }
            "class" => object.take("class", text(), &mut self.class),
            "best_of" => object.take("best_of", count(), &mut self.best_of),
            "cache_salt" => object.take("cache_salt", text(), &mut self.cache_salt),
            "user" => object.take("user", text(), &mut self.user),
            "service_tier" => object.take("service_tier", text(), &mut self.service_tier),
            "priority" => object.take("priority", Maybe(Integer::new()), &mut self.priority),
            "skip_special_tokens" => {
                object.take("skip_special_tokens", boolean(), &mut self.skip_special_tokens)
            }
            _ => match GUIDED.iter().find(|guided| **guided == name) {
                Some(guided) => {
                    let mut given = false;
                    object.take(guided, Present, &mut given)?;
                    self.guided = self.guided.or(given.then_some(guided));
                    Ok(())
                }
                None => object.skip(),
            },
        }
    }

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
    /// 400 for what is not supported.
    pub(super) fn request(self) -> Result<GenerateRequest, ApiError> {
        // Tiers of other prices (auto, default, priority, scale) are all the same here.
        let is_batch = self.service_tier.as_deref() == Some("flex") || self.priority > Some(0);
        if let Some(name) = self.guided {
            return Err(ApiError::unsupported(name, "structured output"));
        }
        if self.skip_special_tokens == Some(false) {
            let what = "showing special tokens in the text";
            return Err(ApiError::unsupported("skip_special_tokens", what));
        }
        if self.cache_salt.as_deref() == Some("") {
            let message = "cache_salt must not be empty";
            return Err(ApiError::invalid(Some("cache_salt"), message));
        }
        // Zero and less mean off, as in vLLM.
        let top_k = self.top_k.map(|k| u32::try_from(k.max(0)).unwrap_or(u32::MAX));
        Ok(GenerateRequest {
            model: self.model.unwrap_or_default(),
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
                logit_bias: self.logit_bias.unwrap_or_default(),
            },
            stop: self.stop.unwrap_or_default(),
            stop_token_ids: self.stop_token_ids.unwrap_or_default(),
            include_stop: self.include_stop_str_in_output.unwrap_or(false),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            // The bits of a signed one: the range was checked with the shape.
            seed: self.seed.map(|seed| seed as u64),
            class: self.class.unwrap_or_default(),
            cache_salt: self.cache_salt.unwrap_or_default(),
            user: self.user.unwrap_or_default(),
            priority: match is_batch {
                true => Priority::Batch,
                false => Priority::Interactive,
            },
            ..GenerateRequest::default()
        })
    }
}
