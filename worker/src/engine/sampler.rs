//! From logits to a token. The order of operations is in `docs/numerics.md`, section "Sampling".
//!
//! Nothing here keeps state: the same logits, parameters and position give the same token, whoever
//! computes it and whatever was computed before.

use kernels::{Backend, draw_key, gumbel};
use proto::limits::TOP_LOGPROBS;
use proto::step::{Sampled, SamplingParameters, TokenLogprob};

use super::shared::{NoMemory, zeros};

/// Candidates put in order at first; eight times as many whenever they do not suffice. The cuts of a
/// trained model's distribution seldom keep more than a few.
const FIRST_RANKED: usize = 64;

/// Tokens whose noise is bounded at once.
const NOISE_TOKENS: usize = 64;

/// Words of four bytes in a [`Scratch`] for each token of the vocabulary.
pub(super) const SCRATCH_WORDS: usize = 5;

/// Working memory for one row.
pub(super) struct Scratch {
    /// `[vocab]`: logits after penalties and bias; in a draw, those of the candidates.
    pub(super) adjusted: Vec<f32>,
    /// `[vocab]`: the candidates of a draw, ascending.
    pub(super) candidates: Vec<u32>,
    /// `[vocab]`: arguments of exp, then what cuts leave of the logits.
    pub(super) exponents: Vec<f32>,
    /// `[vocab]`: results of exp.
    pub(super) weights: Vec<f32>,
    /// `[vocab]`: tokens, partly in order.
    tokens: Vec<u32>,
}

impl Scratch {
    /// Gets memory for rows of `vocab` logits.
    ///
    /// # Errors
    ///
    /// [`NoMemory`].
    pub(super) fn new(vocab: usize) -> Result<Self, NoMemory> {
        Ok(Self {
            adjusted: zeros(vocab)?,
            candidates: zeros(vocab)?,
            exponents: zeros(vocab)?,
            weights: zeros(vocab)?,
            tokens: zeros(vocab)?,
        })
    }
}

/// Penalties or bias made a logit infinite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotFinite;

/// Refuses parameters that have no meaning, in words.
pub(super) fn check(parameters: &SamplingParameters, vocab: u32) -> Result<(), String> {
    let p = parameters;
    let demand = |holds: bool, name: &str, needs: &str, found: f32| {
        if holds { Ok(()) } else { Err(format!("{name} must be {needs}, found {found}")) }
    };
    let is_at_least_0 = |x: f32| x.is_finite() && x >= 0.0;
    demand(is_at_least_0(p.temperature), "temperature", "finite and at least 0", p.temperature)?;
    demand(p.top_p > 0.0 && p.top_p <= 1.0, "top_p", "above 0 and at most 1", p.top_p)?;
    demand((0.0..=1.0).contains(&p.min_p), "min_p", "between 0 and 1", p.min_p)?;
    let repetition = p.repetition_penalty;
    demand(
        repetition.is_finite() && repetition > 0.0,
        "repetition_penalty",
        "finite and above 0",
        repetition,
    )?;
    demand(p.presence_penalty.is_finite(), "presence_penalty", "finite", p.presence_penalty)?;
    demand(p.frequency_penalty.is_finite(), "frequency_penalty", "finite", p.frequency_penalty)?;
    for &(token, bias) in &p.logit_bias {
        demand(bias.is_finite(), "logit_bias", "finite", bias)?;
        if token >= vocab {
            return Err(format!("logit_bias names token {token} of a vocabulary of {vocab}"));
        }
    }
    for (name, counts) in [("prompt", &p.prompt_counts), ("output", &p.output_counts)] {
        if !counts.is_sorted_by(|a, b| a.0 < b.0) {
            return Err(format!("{name} counts must be in ascending order of tokens"));
        }
        if counts.iter().any(|&(_, count)| count == 0) {
            return Err(format!("{name} counts must be at least 1"));
        }
        if let Some(&(token, _)) = counts.last().filter(|last| last.0 >= vocab) {
            return Err(format!("{name} counts name token {token} of a vocabulary of {vocab}"));
        }
    }
    match p.top_logprobs {
        Some(count) if count > TOP_LOGPROBS => {
            Err(format!("top_logprobs must be at most {TOP_LOGPROBS}, found {count}"))
        }
        _ => Ok(()),
    }
}

/// Draws the token at `position` from `logits`, with parameters that [`check`] admits. They are
/// finite, but for tokens that were left out because they cannot be drawn, which have -inf
/// (`screened.rs`).
///
/// # Errors
///
/// [`NotFinite`] if penalties or bias made a logit infinite.
pub(super) fn sample(
    backend: Backend,
    logits: &[f32],
    parameters: &SamplingParameters,
    position: u32,
    scratch: &mut Scratch,
) -> Result<Sampled, NotFinite> {
    let is_greedy = parameters.temperature == 0.0;
    let token = if is_greedy && !has_adjustments(parameters) {
        argmax(logits)
    } else {
        adjust_all(logits, parameters, &mut scratch.adjusted)?;
        if is_greedy {
            argmax(&scratch.adjusted)
        } else {
            draw(backend, parameters, position, scratch)
        }
    };
    let Some(top_count) = parameters.top_logprobs else {
        return Ok(Sampled { token, logprob: None, top: Vec::new() });
    };
    let softmax = LogSoftmax::new(backend, logits, scratch);
    let mut ranking = Ranking::new(logits, &mut scratch.tokens);
    let top_count = (top_count as usize).min(logits.len());
    let top = (0..top_count)
        .map(|rank| {
            let token = ranking.token(rank);
            TokenLogprob { token, logprob: softmax.at(logits, token) }
        })
        .collect();
    Ok(Sampled { token, logprob: Some(softmax.at(logits, token)), top })
}

/// ln of the probability of `target` after finite `logits`.
pub(super) fn score(backend: Backend, logits: &[f32], target: u32, scratch: &mut Scratch) -> f32 {
    LogSoftmax::new(backend, logits, scratch).at(logits, target)
}

/// Whether all are finite.
pub(super) fn all_finite(logits: &[f32]) -> bool {
    logits.iter().fold(true, |finite, logit| finite & logit.is_finite())
}

/// The greatest logit's token; the lowest of equals. None is NaN.
fn argmax(logits: &[f32]) -> u32 {
    let greatest = greatest(logits);
    // -0 equals +0.
    logits.iter().position(|logit| *logit == greatest).unwrap_or(0) as u32
}

/// The greatest of `logits`, none of which is NaN, in lanes that compilers find vectors for.
pub(super) fn greatest(logits: &[f32]) -> f32 {
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = logits.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        for (lane, logit) in lanes.iter_mut().zip(chunk) {
            *lane = greater(*lane, *logit);
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, greater)
}

/// Whether [`adjust`] may change anything.
fn has_adjustments(parameters: &SamplingParameters) -> bool {
    let p = parameters;
    let penalised = p.repetition_penalty != 1.0 || !p.output_counts.is_empty();
    penalised || !p.logit_bias.is_empty()
}

/// Writes `logits`, of which those that were left out are -inf, to `out` and adjusts them.
///
/// # Errors
///
/// [`NotFinite`] if that makes a logit infinite.
pub(super) fn adjust_all(
    logits: &[f32],
    parameters: &SamplingParameters,
    out: &mut [f32],
) -> Result<(), NotFinite> {
    out.copy_from_slice(logits);
    adjust(out, parameters);
    let is_bad =
        |(adjusted, logit): (&f32, &f32)| !adjusted.is_finite() & (*logit != f32::NEG_INFINITY);
    match out.iter().zip(logits).fold(false, |bad, pair| bad | is_bad(pair)) {
        true => Err(NotFinite),
        false => Ok(()),
    }
}

/// Penalties, then bias: the repetition penalty looks at a logit's sign, which is the model's.
fn adjust(logits: &mut [f32], parameters: &SamplingParameters) {
    let p = parameters;
    if p.repetition_penalty != 1.0 {
        let seen_in_prompt = |token: u32| count_of(&p.prompt_counts, token).is_some();
        let in_prompt = p.prompt_counts.iter().map(|&(token, _)| token);
        let in_output = p.output_counts.iter().map(|&(token, _)| token);
        for token in in_prompt.chain(in_output.filter(|&token| !seen_in_prompt(token))) {
            repeat(&mut logits[token as usize], p);
        }
    }
    for &(token, count) in &p.output_counts {
        penalise(&mut logits[token as usize], count, p);
    }
    for &(token, bias) in &p.logit_bias {
        logits[token as usize] += bias;
    }
}

/// What [`adjust`] makes of the logit of one token.
pub(super) fn adjusted(token: u32, mut logit: f32, parameters: &SamplingParameters) -> f32 {
    let p = parameters;
    if !has_adjustments(p) {
        return logit;
    }
    let in_output = count_of(&p.output_counts, token);
    let is_seen = in_output.is_some() || count_of(&p.prompt_counts, token).is_some();
    if p.repetition_penalty != 1.0 && is_seen {
        repeat(&mut logit, p);
    }
    if let Some(count) = in_output {
        penalise(&mut logit, count, p);
    }
    for &(_, bias) in p.logit_bias.iter().filter(|(biased, _)| *biased == token) {
        logit += bias;
    }
    logit
}

/// Which of the 64 tokens from `first` on [`adjust`] may change, as a mask.
pub(super) fn touched(parameters: &SamplingParameters, first: u32) -> u64 {
    let p = parameters;
    let tokens = first..first.saturating_add(u64::BITS);
    let counted = |counts: &[(u32, u32)]| {
        let start = counts.partition_point(|(token, _)| *token < tokens.start);
        let inside = counts[start..].iter().take_while(|(token, _)| *token < tokens.end);
        inside.fold(0u64, |mask, (token, _)| mask | 1 << (token - first))
    };
    let mut mask = counted(&p.output_counts);
    if p.repetition_penalty != 1.0 {
        mask |= counted(&p.prompt_counts);
    }
    let biased = p.logit_bias.iter().filter(|(token, _)| tokens.contains(token));
    biased.fold(mask, |mask, (token, _)| mask | 1 << (token - first))
}

fn count_of(counts: &[(u32, u32)], token: u32) -> Option<u32> {
    counts.binary_search_by_key(&token, |&(token, _)| token).ok().map(|at| counts[at].1)
}

fn repeat(logit: &mut f32, p: &SamplingParameters) {
    *logit =
        if *logit > 0.0 { *logit / p.repetition_penalty } else { *logit * p.repetition_penalty };
}

fn penalise(logit: &mut f32, count: u32, p: &SamplingParameters) {
    *logit -= p.frequency_penalty * count as f32;
    *logit -= p.presence_penalty;
}

/// A draw from the softmax of `scratch.adjusted` at a temperature above 0, after the cuts: of the kept
/// tokens, the one whose logit, divided by the temperature, is the greatest with its noise.
fn draw(
    backend: Backend,
    parameters: &SamplingParameters,
    position: u32,
    scratch: &mut Scratch,
) -> u32 {
    let key = draw_key(parameters.seed, parameters.choice, position);
    let temperature = f64::from(parameters.temperature);
    let kept = match has_cuts(parameters, scratch.adjusted.len()) {
        true => keep(backend, parameters, scratch),
        false => &scratch.adjusted,
    };
    winner(backend, key, temperature, kept)
}

/// Whether cuts may drop a token.
pub(super) fn has_cuts(parameters: &SamplingParameters, vocab: usize) -> bool {
    let p = parameters;
    (1..vocab).contains(&(p.top_k as usize)) || p.top_p < 1.0 || p.min_p > 0.0
}

/// A token's logit, after penalties and bias, with noise. No rounding in it reverses an order.
pub(super) fn noisy(logit: f32, temperature: f64, noise: f64) -> f64 {
    f64::from(logit) / temperature + noise
}

/// The token with the greatest noisy logit among those that are not -inf; the lowest of equals. Bounds
/// of the noise spare nearly all tokens their logarithms.
fn winner(backend: Backend, key: u64, temperature: f64, logits: &[f32]) -> u32 {
    let (mut best, mut token) = (f64::NEG_INFINITY, 0);
    let mut most = [0.0; NOISE_TOKENS];
    for (block, logits) in logits.chunks(NOISE_TOKENS).enumerate() {
        if logits.iter().fold(true, |none, logit| none & (*logit == f32::NEG_INFINITY)) {
            continue;
        }
        let first = (block * NOISE_TOKENS) as u32;
        let most = &mut most[..logits.len()];
        backend.noise(key, first, most);
        let reaches = |best: f64, (logit, most): (&f32, &f32)| {
            noisy(*logit, temperature, f64::from(*most)) >= best
        };
        if !logits.iter().zip(&*most).fold(false, |any, pair| any | reaches(best, pair)) {
            continue;
        }
        for (id, pair) in (first..).zip(logits.iter().zip(&*most)) {
            if reaches(best, pair) {
                let score = noisy(*pair.0, temperature, gumbel(key, id));
                if score > best {
                    (best, token) = (score, id);
                }
            }
        }
    }
    token
}

/// What the cuts leave of `scratch.adjusted`; the logits of other tokens are -inf.
fn keep<'s>(
    backend: Backend,
    parameters: &SamplingParameters,
    scratch: &'s mut Scratch,
) -> &'s [f32] {
    let vocab = scratch.adjusted.len();
    let best = greatest(&scratch.adjusted);
    let count = gather(&mut scratch.adjusted, &mut scratch.candidates);
    let (logits, ids) = (&scratch.adjusted[..count], &scratch.candidates[..count]);
    let mut ranking = Ranking::new(logits, &mut scratch.tokens[..count]);
    let top_k = parameters.top_k as usize;
    let mut kept = if top_k == 0 { count } else { top_k.min(count) };
    ranking.rank_first(if kept < count { kept } else { 0 });
    if parameters.top_p < 1.0 || parameters.min_p > 0.0 {
        let (exponents, weights) = (&mut scratch.exponents[..count], &mut scratch.weights[..count]);
        for (exponent, &logit) in exponents.iter_mut().zip(logits) {
            // At most 0 and exactly 0 for the best: no temperature is so low that this overflows.
            *exponent = (logit - best) / parameters.temperature;
        }
        backend.exp(exponents, weights);
        for &candidate in &ranking.tokens[kept..] {
            weights[candidate as usize] = 0.0;
        }
        let total = match count == vocab {
            true => backend.sum(weights),
            false => sparse_sum(weights, ids),
        };
        kept = cut(&mut ranking, weights, kept, f64::from(total), parameters);
    }
    let left = &mut scratch.exponents;
    left.fill(f32::NEG_INFINITY);
    for rank in 0..kept {
        let candidate = ranking.token(rank) as usize;
        left[ids[candidate] as usize] = logits[candidate];
    }
    left
}

/// Moves the logits that are not -inf to the front; `ids` tells which they are. Returns how many.
fn gather(logits: &mut [f32], ids: &mut [u32]) -> usize {
    let mut count = 0;
    for id in 0..logits.len() {
        let logit = logits[id];
        // Written in any case, and kept if it counts: there is no branch to guess.
        logits[count] = logit;
        ids[count] = id as u32;
        count += usize::from(logit != f32::NEG_INFINITY);
    }
    count
}

/// The sum by the 16-lane rule of the weights of all tokens, of which those not named weigh +0:
/// adding that changes no lane, for none is ever -0.
fn sparse_sum(weights: &[f32], ids: &[u32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for (weight, id) in weights.iter().zip(ids) {
        lanes[*id as usize % 16] += weight;
    }
    for distance in [8, 4, 2, 1] {
        for lane in 0..distance {
            lanes[lane] += lanes[lane + distance];
        }
    }
    lanes[0]
}

/// How many of the best candidates top-p and min-p keep.
fn cut(
    ranking: &mut Ranking<'_>,
    weights: &[f32],
    kept_by_top_k: usize,
    total: f64,
    parameters: &SamplingParameters,
) -> usize {
    let enough =
        if parameters.top_p < 1.0 { f64::from(parameters.top_p) * total } else { f64::INFINITY };
    let mut cumulative = 0.0;
    for rank in 0..kept_by_top_k {
        let weight = weights[ranking.token(rank) as usize];
        // The best has weight 1, so this is the share of the best's probability.
        if rank > 0 && weight < parameters.min_p {
            return rank;
        }
        cumulative += f64::from(weight);
        if cumulative >= enough {
            return rank + 1;
        }
    }
    kept_by_top_k
}

/// Tokens by logit, descending, then by id; put in order no further than was asked for.
struct Ranking<'a> {
    logits: &'a [f32],
    tokens: &'a mut [u32],
    ranked: usize,
}

impl<'a> Ranking<'a> {
    fn new(logits: &'a [f32], tokens: &'a mut [u32]) -> Self {
        for (id, token) in tokens.iter_mut().enumerate() {
            *token = id as u32;
        }
        Self { logits, tokens, ranked: 0 }
    }

    fn token(&mut self, rank: usize) -> u32 {
        if rank >= self.ranked {
            let more = (8 * self.ranked).max(FIRST_RANKED).max(rank + 1);
            self.rank_first(more.min(self.tokens.len()));
        }
        self.tokens[rank]
    }

    /// Puts at least the first `count` in order.
    fn rank_first(&mut self, count: usize) {
        if count <= self.ranked {
            return;
        }
        let logits = self.logits;
        let order = |a: &u32, b: &u32| {
            let (of_a, of_b) = (logits[*a as usize], logits[*b as usize]);
            of_b.partial_cmp(&of_a).expect("logits are finite").then(a.cmp(b))
        };
        let unranked = &mut self.tokens[self.ranked..];
        let new = count - self.ranked;
        if new < unranked.len() {
            unranked.select_nth_unstable_by(new, order);
        }
        unranked[..new].sort_unstable_by(order);
        self.ranked = count;
    }
}

/// ln softmax of raw logits: `(logit - max) - ln(sum of exp(logit - max))`.
struct LogSoftmax {
    max: f32,
    ln_sum: f32,
}

impl LogSoftmax {
    fn new(backend: Backend, logits: &[f32], scratch: &mut Scratch) -> Self {
        let max = greatest(logits);
        for (exponent, &logit) in scratch.exponents.iter_mut().zip(logits) {
            *exponent = logit - max;
        }
        backend.exp(&scratch.exponents, &mut scratch.weights);
        let mut ln_sum = [0.0];
        backend.ln(&[backend.sum(&scratch.weights)], &mut ln_sum);
        Self { max, ln_sum: ln_sum[0] }
    }

    fn at(&self, logits: &[f32], token: u32) -> f32 {
        (logits[token as usize] - self.max) - self.ln_sum
    }
}

#[cfg(test)]
mod tests;
