//! Defaults of sampling: what a model's makers recommend to requests that do not say how tokens are
//! drawn.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a model recommends to requests that do not say how tokens are drawn. Not part of its id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingDefaults {
    /// 0 (always the most probable) to 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Only so many of the most probable tokens; 0: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Only tokens that make up this much probability; above 0, up to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Only tokens that are this probable, compared with the most probable one; 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// Divides what was there before; above 0, up to 10.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    /// Tokens of an answer, at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<u32>,
}

impl SamplingDefaults {
    /// Whether nothing is recommended.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// These, and those of `other` where these say nothing.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            temperature: self.temperature.or(other.temperature),
            top_k: self.top_k.or(other.top_k),
            top_p: self.top_p.or(other.top_p),
            min_p: self.min_p.or(other.min_p),
            repetition_penalty: self.repetition_penalty.or(other.repetition_penalty),
            max_new_tokens: self.max_new_tokens.or(other.max_new_tokens),
        }
    }

    /// The same with one more, by its name in a `generation_config.json`; `None` if no request
    /// could ask for it.
    pub fn with(mut self, name: &str, value: f64) -> Option<Self> {
        let single = value as f32;
        // A number that means "off" there is what is done without it.
        let whole = (value.fract() == 0.0 && value <= f64::from(u32::MAX)).then_some(value as u32);
        match name {
            "temperature" => self.temperature = Some(single),
            "top_k" if value == -1.0 => self.top_k = Some(0),
            "top_k" => self.top_k = Some(whole.filter(|_| value >= 0.0)?),
            "top_p" => self.top_p = Some(single),
            "min_p" => self.min_p = Some(single),
            "repetition_penalty" => self.repetition_penalty = Some(single),
            "max_new_tokens" => self.max_new_tokens = Some(whole.filter(|_| value >= 1.0)?),
            _ => return None,
        }
        self.wrong().is_none().then_some(self)
    }

    /// The first value that no request may ask for, and the name of its field.
    pub fn wrong(&self) -> Option<(&'static str, f32)> {
        let outside = |name, value: Option<f32>, legal: &dyn Fn(f32) -> bool| {
            value.filter(|value| !(value.is_finite() && legal(*value))).map(|value| (name, value))
        };
        outside("temperature", self.temperature, &|v| (0.0..=2.0).contains(&v))
            .or_else(|| outside("top_p", self.top_p, &|v| v > 0.0 && v <= 1.0))
            .or_else(|| outside("min_p", self.min_p, &|v| (0.0..=1.0).contains(&v)))
            .or_else(|| {
                let legal = |v: f32| v.is_normal() && v > 0.0 && v <= 10.0;
                outside("repetition_penalty", self.repetition_penalty, &legal)
            })
            .or_else(|| (self.max_new_tokens == Some(0)).then_some(("max_new_tokens", 0.0)))
    }
}

impl fmt::Display for SamplingDefaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens } = self;
        let floats = [
            ("temperature", temperature),
            ("top_p", top_p),
            ("min_p", min_p),
            ("repetition_penalty", repetition_penalty),
        ];
        let floats = floats.into_iter().filter_map(|(name, value)| Some((name, (*value)?)));
        let counts = [("top_k", top_k), ("max_new_tokens", max_new_tokens)];
        let counts = counts.into_iter().filter_map(|(name, value)| Some((name, (*value)?)));
        let all: Vec<String> = floats
            .map(|(name, value)| format!("{name} {value}"))
            .chain(counts.map(|(name, value)| format!("{name} {value}")))
            .collect();
        match all.is_empty() {
            true => f.write_str("none"),
            false => f.write_str(&all.join(", ")),
        }
    }
}
