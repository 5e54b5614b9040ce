//! PURE but for the wait and its clock. A stand-in for arithmetic, so that many real processes fit one machine: it
//! waits as long as a step is said to take, and computes a hash chain.
//!
//! ```text
//! embedding: h = H(token)
//! layer l:   h = H(h, l, p, kept_l[p - 1], kept_l[e]),   kept_l[p] = h
//! draw:      the first four bytes of H(h) modulo the vocabulary
//! ```
//!
//! `H` is BLAKE3, numbers are u32 little endian, `p` is the token's position and `e` an earlier one: the
//! first four bytes of the `h` that comes in, modulo `p`. At position 0 there is nothing before, and
//! zeros stand for it. What a layer keeps lies where keys and values would be and is read through the
//! row's own list of blocks, so whatever is wrong in a pipeline's state shows in later tokens: in all
//! of them if it is the last position, in some if it is an earlier one. Nothing else is in it: the same
//! tokens give the same answer, however layers are cut into stages.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use model::ModelConfig;
use proto::BLOCK_TOKENS;
use proto::ids::{BlockId, KnownAnswer};
use proto::plan::StepTime;
use proto::step::{Output, Row, RowStatus, RowValue, Sampled, Step};
use serde::{Deserialize, Serialize};

use crate::bridge::Compute;
use crate::engine::EngineError;
use crate::executor::{Executed, row_limits};
use crate::measure::ROWS;
use crate::session::Sessions;

/// The longest that a profile may ask for, in microseconds: a second for a layer is beyond any use.
const MICROS_MAX: u64 = 1_000_000;

/// Bytes of one hash.
const HASH_BYTES: usize = 32;

/// What is before the first token of a sequence.
const BEGIN: Hash = [0; HASH_BYTES];

/// Of one layer, in its hash: what comes in, layer, position, and two that were kept.
const LAYER_BYTES: usize = 3 * HASH_BYTES + 2 * size_of::<u32>();

type Hash = [u8; HASH_BYTES];

/// How long things are said to take: `layer_us=50,row_us=2,head_us=400`. What is left out takes no time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StubProfile {
    /// Of one layer in any step, in microseconds.
    pub layer_us: u64,
    /// Beside that, of one layer for each token of the step, in microseconds.
    pub row_us: u64,
    /// Of head and sampler in a step that draws, in microseconds.
    pub head_us: u64,
}

/// A text that is no profile.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "a profile is layer_us=N,row_us=N,head_us=N with microseconds of 0 to {MICROS_MAX}, found {found:?}"
)]
pub struct StubProfileError {
    found: String,
}

impl FromStr for StubProfile {
    type Err = StubProfileError;

    fn from_str(text: &str) -> Result<Self, StubProfileError> {
        let wrong = || StubProfileError { found: text.chars().take(80).collect() };
        let [mut layer_us, mut row_us, mut head_us] = [None; 3];
        for part in text.split(',') {
            let (key, value) = part.trim().split_once('=').ok_or_else(wrong)?;
            let field = match key.trim() {
                "layer_us" => &mut layer_us,
                "row_us" => &mut row_us,
                "head_us" => &mut head_us,
                _ => return Err(wrong()),
            };
            let micros: u64 = value.trim().parse().map_err(|_| wrong())?;
            if micros > MICROS_MAX || field.replace(micros).is_some() {
                return Err(wrong());
            }
        }
        let or_none = |micros: Option<u64>| micros.unwrap_or(0);
        let [layer_us, row_us, head_us] = [layer_us, row_us, head_us].map(or_none);
        Ok(Self { layer_us, row_us, head_us })
    }
}

impl TryFrom<String> for StubProfile {
    type Error = StubProfileError;

    fn try_from(text: String) -> Result<Self, StubProfileError> {
        text.parse()
    }
}

impl From<StubProfile> for String {
    fn from(profile: StubProfile) -> Self {
        profile.to_string()
    }
}

impl fmt::Display for StubProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer_us, row_us, head_us } = self;
        write!(f, "layer_us={layer_us},row_us={row_us},head_us={head_us}")
    }
}

impl StubProfile {
    /// What a worker publishes in place of what it measured.
    pub(crate) fn steps(&self) -> Vec<StepTime> {
        let time = |&rows: &u32| StepTime {
            rows,
            // Nothing takes no time at all.
            layer_ns: ((self.layer_us + u64::from(rows) * self.row_us) * 1000).max(1),
            head_ns: (self.head_us * 1000).max(1),
        };
        ROWS.iter().map(time).collect()
    }

    /// How long a step takes.
    fn wait(&self, layers: u32, tokens: u64, draws: bool) -> Duration {
        let layer_us = self.layer_us.saturating_add(self.row_us.saturating_mul(tokens));
        let layers_us = if tokens == 0 { 0 } else { layer_us.saturating_mul(u64::from(layers)) };
        let head_us = if draws { self.head_us } else { 0 };
        Duration::from_micros(layers_us.saturating_add(head_us))
    }
}

/// In place of the kernels' known answer: no stub shares a pipeline with a worker that computes.
pub(crate) fn known_answer() -> KnownAnswer {
    KnownAnswer(*blake3::hash(b"tercet stub compute 2").as_bytes())
}

/// Bytes that a stub keeps in so many blocks.
pub(crate) fn kept_bytes(layers: &Range<u32>, kv_blocks: u32) -> u64 {
    let hashes = u64::from(layers.end.saturating_sub(layers.start)) * u64::from(BLOCK_TOKENS);
    hashes.saturating_mul(HASH_BYTES as u64).saturating_mul(u64::from(kv_blocks))
}

/// One stage of a stub.
pub(crate) struct StubExecutor {
    profile: StubProfile,
    layers: Range<u32>,
    model_layers: u32,
    hidden: usize,
    vocab: u32,
    sessions: Sessions,
    /// Of each block that was used, what each layer keeps for each position: `[layer][position]`.
    kept: Vec<Option<Box<[Hash]>>>,
}

impl StubExecutor {
    pub(crate) fn new(
        profile: StubProfile,
        model: &ModelConfig,
        layers: Range<u32>,
        kv_blocks: u32,
    ) -> Self {
        Self {
            profile,
            layers,
            model_layers: model.layers,
            hidden: model.hidden as usize,
            vocab: model.vocab.max(1),
            sessions: Sessions::new(row_limits(kv_blocks, model.context, model.vocab)),
            kept: vec![None; kv_blocks as usize],
        }
    }

    fn is_first(&self) -> bool {
        self.layers.start == 0
    }

    fn is_last(&self) -> bool {
        self.layers.end == self.model_layers
    }

    /// Bytes of what is given for one token.
    fn width(&self) -> usize {
        self.hidden * size_of::<f32>()
    }

    /// Where a layer's hash of a position lies: in which block, and where in that.
    fn place(row: &Row, layer: usize, position: u32) -> Option<(usize, usize)> {
        let BlockId(id) = *row.blocks.get((position / BLOCK_TOKENS) as usize)?;
        let slot = layer * BLOCK_TOKENS as usize + (position % BLOCK_TOKENS) as usize;
        Some((id as usize, slot))
    }

    /// What a layer of this stage keeps for a position of a row: that of nobody if it was never written.
    fn kept(&self, row: &Row, layer: usize, position: u32) -> Hash {
        let place = Self::place(row, layer, position);
        let found = place.and_then(|(id, slot)| self.kept.get(id)?.as_ref()?.get(slot));
        found.copied().unwrap_or(BEGIN)
    }

    fn keep(&mut self, row: &Row, layer: usize, position: u32, hash: Hash) {
        let hashes = self.layers.len() * BLOCK_TOKENS as usize;
        let Some((id, slot)) = Self::place(row, layer, position) else { return };
        if let Some(block) = self.kept.get_mut(id) {
            block.get_or_insert_with(|| vec![BEGIN; hashes].into())[slot] = hash;
        }
    }

    /// One row, from `input` on: what it gives for each of its tokens.
    fn row(&mut self, row: &Row, input: &[u8]) -> Vec<Hash> {
        let mut hashes = Vec::with_capacity(row.tokens.len());
        for (index, token) in row.tokens.iter().enumerate() {
            let position = row.position + index as u32;
            let mut hash = match self.is_first() {
                true => self.cut(blake3::hash(&token.to_le_bytes())),
                false => self.read(&input[index * self.width()..][..self.width()]),
            };
            for (layer, number) in self.layers.clone().enumerate() {
                let earlier = first_u32(&hash).checked_rem(position);
                let [before, earlier] = [position.checked_sub(1), earlier].map(|position| {
                    position.map_or(BEGIN, |position| self.kept(row, layer, position))
                });
                let mut bytes = Vec::with_capacity(LAYER_BYTES);
                bytes.extend(hash);
                bytes.extend([number, position].map(u32::to_le_bytes).as_flattened());
                bytes.extend([before, earlier].as_flattened());
                hash = self.cut(blake3::hash(&bytes));
                self.keep(row, layer, position, hash);
            }
            hashes.push(hash);
        }
        hashes
    }

    /// A hash as long as activations are wide, if they are narrow: the rest would not travel.
    fn cut(&self, hash: blake3::Hash) -> Hash {
        let mut hash = *hash.as_bytes();
        hash.iter_mut().skip(self.hidden).for_each(|byte| *byte = 0);
        hash
    }

    /// As it travels: as wide as activations are, and a finite number each.
    fn write(&self, hash: &Hash, to: &mut Vec<u8>) {
        let bytes = hash.iter().cycle().take(self.hidden);
        to.extend(bytes.flat_map(|&byte| f32::from(byte).to_le_bytes()));
    }

    /// The hash that was written like this. Of what nobody wrote, another one than any that was.
    fn read(&self, written: &[u8]) -> Hash {
        let (words, _) = written.as_chunks();
        let mut hash = BEGIN;
        for (byte, &word) in hash.iter_mut().zip(words) {
            // Saturates: any number may have come.
            *byte = f32::from_le_bytes(word) as u8;
        }
        let mut again = Vec::with_capacity(written.len());
        self.write(&hash, &mut again);
        if again == written { hash } else { self.cut(blake3::hash(written)) }
    }

    /// The token drawn from what a row gave for its last token.
    fn drawn(&self, hash: &Hash) -> RowValue {
        let token = first_u32(blake3::hash(hash).as_bytes()) % self.vocab;
        RowValue::Sampled(Sampled { token, logprob: None, top: Vec::new() })
    }

    fn layers_of(&mut self, step: &mut Step, expired: bool) -> Vec<RowValue> {
        let admitted = self.sessions.admit(&mut step.rows, expired);
        let input = std::mem::take(&mut step.activations);
        let (mut output, mut values) = (Vec::new(), Vec::with_capacity(step.rows.len()));
        let mut place = 0;
        for index in 0..step.rows.len() {
            let row = step.rows[index].clone();
            let bytes = row.tokens.len() * self.width();
            let own = if self.is_first() { &[][..] } else { &input[place..place + bytes] };
            place += bytes;
            let mut value = RowValue::None;
            let begin = output.len();
            if row.status == RowStatus::Ok {
                let hashes = self.row(&row, own);
                hashes.iter().for_each(|hash| self.write(hash, &mut output));
                match (self.is_last(), &row.output, hashes.last()) {
                    (true, Output::Sample(_), Some(last)) => value = self.drawn(last),
                    (true, Output::State, Some(_)) => {
                        let last = &output[output.len() - self.width()..];
                        value = RowValue::State(Bytes::copy_from_slice(last));
                    }
                    (true, Output::Score(_) | Output::Logits, _) => {
                        let row = &mut step.rows[index];
                        row.status = RowStatus::Invalid;
                        row.detail = "a stub computes no probabilities".into();
                    }
                    _ => {}
                }
            }
            output.resize(begin + bytes, 0);
            values.push(value);
        }
        self.sessions.commit(&mut step.rows, admitted, &step.ended_sequences);
        if !self.is_last() {
            step.activations = output.into();
        }
        values
    }

    fn draws_of(&self, step: &mut Step, expired: bool) -> Vec<RowValue> {
        let width = self.width();
        let input = std::mem::replace(&mut step.activations, Bytes::new());
        let mut values = Vec::with_capacity(step.rows.len());
        for (row, state) in step.rows.iter_mut().zip(input.chunks(width.max(1))) {
            let mut value = RowValue::None;
            if row.status == RowStatus::Ok && expired {
                row.status = RowStatus::Expired;
                row.detail = "the deadline of its step had passed".into();
            } else if row.status == RowStatus::Ok {
                value = self.drawn(&self.read(state));
                if let RowValue::Sampled(sampled) = &value {
                    row.output = Output::Drawn(Box::new(sampled.clone()));
                }
            }
            values.push(value);
        }
        values
    }
}

impl Compute for StubExecutor {
    #[expect(
        clippy::disallowed_methods,
        reason = "an engine has a thread of its own, and this one stands for work that takes as long"
    )]
    fn compute(&mut self, mut step: Step, expired: bool) -> Result<Executed, EngineError> {
        let begin = Instant::now();
        let is_draw = step.is_draw();
        let values = match is_draw {
            true => self.draws_of(&mut step, expired),
            false => self.layers_of(&mut step, expired),
        };
        let ok = || step.rows.iter().filter(|row| row.status == RowStatus::Ok);
        let tokens: u64 = ok().map(|row| row.tokens.len() as u64).sum();
        let draws = values.iter().any(|value| matches!(value, RowValue::Sampled(_)));
        let tokens = tokens * u64::from(!is_draw);
        let wait = self.profile.wait(self.layers.len() as u32, tokens, draws);
        // What was hashed took some of it.
        thread::sleep(wait.saturating_sub(begin.elapsed()));
        Ok(Executed { step, values, filled_blocks: self.sessions.filled_blocks() })
    }
}

fn first_u32(hash: &Hash) -> u32 {
    let [a, b, c, d, ..] = *hash;
    u32::from_le_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests;
