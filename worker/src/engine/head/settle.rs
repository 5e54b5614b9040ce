//! The draw of a position whose cuts need a sum over all tokens, from some exact logits and bounds of
//! the others: `docs/screening.md`, section "Cuts". It gives the token that the whole head would give,
//! or none.

use kernels::{Backend, FloatMatrix, draw_key, gumbel};
use proto::step::SamplingParameters;

use super::super::sampler::{self, NotFinite};

/// Most exact logits of a position that are looked at: a screen that leaves more has settled nothing.
const EXACT_MOST: usize = 4096;

/// Tokens that are looked at together.
const BLOCK: usize = 16;

/// How many rows in all are computed here before the next look, by one thread: at most 10 MB of a head
/// of 2560 columns, where the whole one has 657 MB.
const ROUNDS: [usize; 4] = [0, 64, 512, 2048];

/// And at most one row in so many of the head's.
const SHARE_MOST: usize = 8;

/// Rows whose weight is at most this share of the reference's are not worth computing.
const LEAST_WEIGHT: f32 = 1e-5;

/// How far, relative to itself, a weight may be from the exponential of the real numbers, here or in the
/// definition: the exponent's two roundings, at most 89 * 2^-23, and one unit of `exp`. Doubled.
const WEIGHT_MARGIN: f64 = 3e-5;

/// Below it a weight may have lost more than that to the end of the normal range.
const SAFE_WEIGHT: f64 = 1e-30;

/// Least `top_p` that a sum is compared with to show that a token is out, for the same reason.
const SAFE_TOP_P: f64 = 1e-20;

/// A token whose logit is known.
#[derive(Clone, Copy, Debug)]
struct Exact {
    token: u32,
    /// After penalties and bias.
    logit: f32,
    /// (logit - reference) / temperature.
    exponent: f32,
    /// exp of that.
    weight: f64,
    score: f64,
}

/// Working memory, with room for every position.
pub(super) struct Scratch {
    exact: Vec<Exact>,
    values: Vec<f32>,
}

impl Scratch {
    /// Words of four bytes, or a little less.
    pub(super) const WORDS: usize = EXACT_MOST * size_of::<Exact>() / 4 + ROUNDS[3];

    pub(super) fn new() -> Self {
        Self { exact: Vec::with_capacity(EXACT_MOST), values: vec![0.0; ROUNDS[3]] }
    }
}

/// A position, and what its screen left behind.
pub(super) struct Question<'a> {
    pub(super) backend: Backend,
    pub(super) head: FloatMatrix<'a>,
    /// `[hidden]`: the final activations.
    pub(super) x: &'a [f32],
    /// `[vocab]`: -inf where they were left out.
    pub(super) logits: &'a [f32],
    /// `[vocab]`: at least the logit, where that was left out. Scores of these are below the best.
    pub(super) bounds: &'a [f32],
    pub(super) parameters: &'a SamplingParameters,
    /// Of the token that is drawn.
    pub(super) position: u32,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Settled {
    /// The token, unless all logits are needed to tell.
    pub(super) token: Option<u32>,
    /// Rows of the head that were computed.
    pub(super) rows: usize,
}

impl Question<'_> {
    /// Draws the token if what is known decides it, computing some more rows if that may help.
    ///
    /// # Errors
    ///
    /// [`NotFinite`] if a logit is not, or penalties or bias made it so.
    pub(super) fn settle(
        &self,
        scratch: &mut Scratch,
        planes: &mut sampler::Scratch,
    ) -> Result<Settled, NotFinite> {
        sampler::adjust_all(self.logits, self.parameters, &mut planes.adjusted)?;
        let mut known = Known {
            question: self,
            key: draw_key(self.parameters.seed, self.parameters.choice, self.position),
            reference: sampler::greatest(&planes.adjusted),
            exact: &mut scratch.exact,
            exponents: &mut planes.exponents,
            weights: &mut planes.weights,
        };
        let open = Settled { token: None, rows: 0 };
        if !known.begin(&planes.adjusted) {
            return Ok(open);
        }
        let (mut candidates, mut computed) = (&mut planes.candidates[..0], 0);
        for (round, end) in ROUNDS.into_iter().enumerate() {
            if round == 1 {
                let count = known.gather(&mut planes.candidates);
                candidates = &mut planes.candidates[..count];
            }
            // Of a small head, all of it is soon cheaper.
            let end = end.min(candidates.len()).min(self.logits.len() / SHARE_MOST);
            if round > 0 && computed == end {
                break;
            }
            // No more than are computed now: mostly the first few are enough.
            known.rank(&mut candidates[computed..], end - computed);
            let values = &mut scratch.values[..end - computed];
            let rows = &candidates[computed..end];
            self.backend.head_rows(self.head, rows, self.x, values);
            if !sampler::all_finite(values) {
                return Err(NotFinite);
            }
            for (row, logit) in rows.iter().zip(&*values) {
                if !known.learn(*row, *logit) {
                    return Ok(Settled { rows: end, ..open });
                }
            }
            computed = end;
            if let Some(token) = known.decide() {
                return Ok(Settled { token: Some(token), rows: computed });
            }
        }
        Ok(Settled { rows: computed, ..open })
    }
}

/// What is known of the weights of all tokens, relative to that of a logit of `reference`.
struct Known<'a> {
    question: &'a Question<'a>,
    key: u64,
    reference: f32,
    exact: &'a mut Vec<Exact>,
    /// `[vocab]`: at least those of the others; -inf where the logit is known.
    exponents: &'a mut [f32],
    /// `[vocab]`: exp of these.
    weights: &'a mut [f32],
}

impl Known<'_> {
    /// Takes over the exact `logits`, those that are not -inf. Returns whether there is room for them.
    fn begin(&mut self, logits: &[f32]) -> bool {
        self.exact.clear();
        let temperature = self.question.parameters.temperature;
        for (exponent, bound) in self.exponents.iter_mut().zip(self.question.bounds) {
            *exponent = (bound - self.reference) / temperature;
        }
        for (block, logits) in logits.chunks(BLOCK).enumerate() {
            // Nearly all are left out: a block of them is one comparison.
            if logits.iter().fold(true, |none, logit| none & (*logit == f32::NEG_INFINITY)) {
                continue;
            }
            for (token, logit) in (block * BLOCK..).zip(logits) {
                if *logit != f32::NEG_INFINITY && !self.note(token as u32, *logit) {
                    return false;
                }
            }
        }
        self.question.backend.exp(self.exponents, self.weights);
        true
    }

    /// As [`Self::note`], later.
    fn learn(&mut self, token: u32, logit: f32) -> bool {
        self.weights[token as usize] = 0.0;
        self.note(token, logit)
    }

    /// Takes in a logit. Returns whether there is room for it.
    fn note(&mut self, token: u32, logit: f32) -> bool {
        let temperature = self.question.parameters.temperature;
        let exponent = (logit - self.reference) / temperature;
        let mut weight = [0.0];
        self.question.backend.exp(&[exponent], &mut weight);
        let score = sampler::noisy(logit, f64::from(temperature), gumbel(self.key, token));
        self.exponents[token as usize] = f32::NEG_INFINITY;
        let has_room = self.exact.len() < EXACT_MOST;
        if has_room {
            let weight = f64::from(weight[0]);
            self.exact.push(Exact { token, logit, exponent, weight, score });
        }
        has_room
    }

    /// Writes the tokens that are worth computing to the front of `out`; returns how many there are.
    fn gather(&self, out: &mut [u32]) -> usize {
        let mut count = 0;
        for (token, weight) in self.weights.iter().enumerate() {
            // Written in any case, and kept if it counts: there is no branch to guess.
            out[count] = token as u32;
            count += usize::from(*weight > LEAST_WEIGHT);
        }
        count
    }

    /// Puts the first `count` of `tokens` in descending order of what they may weigh.
    fn rank(&self, tokens: &mut [u32], count: usize) {
        if count == 0 {
            return;
        }
        let exponent = |token: &u32| self.exponents[*token as usize];
        let order = |a: &u32, b: &u32| exponent(b).total_cmp(&exponent(a)).then(a.cmp(b));
        if count < tokens.len() {
            tokens.select_nth_unstable_by(count, order);
        }
        let count = count.min(tokens.len());
        tokens[..count].sort_unstable_by(order);
    }

    /// The token that is drawn, if what is known leaves no other.
    fn decide(&mut self) -> Option<u32> {
        self.exact.sort_unstable_by(|a, b| {
            let by_logit = b.logit.partial_cmp(&a.logit).expect("exact logits are finite");
            by_logit.then(a.token.cmp(&b.token))
        });
        let limits = Limits::new(self)?;
        let (contenders, is_closed) = limits.contenders(self);
        let better = |best: Option<Exact>, exact: &Exact| match best {
            Some(best) if best.score > exact.score => Some(best),
            Some(best) if best.score == exact.score && best.token < exact.token => Some(best),
            _ => Some(*exact),
        };
        let winner = self.exact[..contenders].iter().fold(None, better)?;
        let of_all = self.exact.iter().fold(None, better)?;
        // Scores of tokens that were left out are below that of `of_all`.
        let is_winner = is_closed || winner.token == of_all.token;
        (is_winner && limits.surely_keep(self, &winner)).then_some(winner.token)
    }
}

/// What bounds the sums of the definition's cuts. All weights are relative to that of the reference; the
/// definition's are to that of the greatest logit, which changes no share.
struct Limits {
    /// How many ranks top-k keeps: all, without it.
    top_k: usize,
    top_p: Option<f64>,
    /// 0 without it.
    min_p: f64,
    /// 1 and how far a sum of the definition may be from that of the real numbers, and ours from it.
    margin: f64,
    /// The sum over what top-k keeps is at least and at most.
    sum: [f64; 2],
    /// Most that the exponent, and the weight, of a token that was left out may be.
    most: (f32, f64),
}

impl Limits {
    /// `None` if nothing bounds the sums.
    fn new(known: &Known<'_>) -> Option<Self> {
        let parameters = known.question.parameters;
        let vocab = known.weights.len();
        let top_k = match parameters.top_k as usize {
            0 => vocab,
            top_k => top_k.min(vocab),
        };
        let most_exponent = sampler::greatest(known.exponents);
        let most_weight = f64::from(sampler::greatest(known.weights)).max(0.0);
        let least_sum = known.exact.iter().take(top_k).map(|exact| exact.weight).sum::<f64>();
        let last = known.exact.get(top_k - 1);
        let rest = match last.is_some_and(|last| last.exponent > most_exponent) {
            true => 0.0,
            false => f64::from(known.question.backend.sum(known.weights)),
        };
        // The 16-lane rule rounds each addend at most so often.
        let of_sum = (vocab / 16 + 8) as f64 / (1 << 24) as f64;
        let limits = Self {
            top_k,
            top_p: (parameters.top_p < 1.0).then_some(f64::from(parameters.top_p)),
            min_p: f64::from(parameters.min_p),
            margin: 1.0 + 4.0 * of_sum + 4.0 * WEIGHT_MARGIN,
            sum: [least_sum, least_sum + rest],
            most: (most_exponent, most_weight),
        };
        (!known.exact.is_empty() && limits.sum[1].is_finite()).then_some(limits)
    }

    /// How many of the exact tokens, in the order of rank, the cuts may keep, and whether they keep no
    /// other.
    fn contenders(&self, known: &Known<'_>) -> (usize, bool) {
        let (most_exponent, most_weight) = self.most;
        // The greatest of all logits weighs at least as much as the first.
        let least = match self.min_p >= SAFE_WEIGHT {
            true => self.min_p * known.exact[0].weight * (1.0 - 4.0 * WEIGHT_MARGIN),
            false => 0.0,
        };
        let is_closed = most_weight < least;
        let mut sum = 0.0;
        for (rank, exact) in known.exact.iter().enumerate() {
            // Then it is not the first.
            if exact.weight < least {
                return (rank, is_closed);
            }
            sum += exact.weight;
            let has_enough = |top_p: f64| sum >= top_p.max(SAFE_TOP_P) * self.sum[1] * self.margin;
            if rank + 1 == self.top_k || self.top_p.is_some_and(has_enough) {
                return (rank + 1, is_closed || exact.exponent > most_exponent);
            }
        }
        (known.exact.len(), is_closed)
    }

    /// Whether the cuts keep a token whatever the logits are that are not known.
    fn surely_keep(&self, known: &Known<'_>, token: &Exact) -> bool {
        let before = known.exact.iter().take_while(|exact| exact.token != token.token);
        let (mut count, mut sum) =
            before.fold((0, 0.0), |(count, sum), exact| (count + 1, sum + exact.weight));
        let (others, weight) = may_rank_before(known, token.exponent);
        (count, sum) = (count + others, sum + weight);
        if count == 0 {
            return true;
        }
        let has_less = |top_p: f64| sum * self.margin < top_p * self.sum[0];
        // What the greatest of all logits weighs at most.
        let best = known.exact[0].weight.max(self.most.1) * (1.0 + 2.0 * WEIGHT_MARGIN);
        let least = self.min_p.max(SAFE_WEIGHT) * best * (1.0 + 4.0 * WEIGHT_MARGIN);
        count < self.top_k
            && self.top_p.is_none_or(has_less)
            && (self.min_p == 0.0 || token.weight >= least)
    }
}

/// How many tokens that were left out may rank before one of this exponent, and what they weigh at most.
fn may_rank_before(known: &Known<'_>, exponent: f32) -> (usize, f64) {
    let (mut count, mut lanes) = (0, [0.0f64; BLOCK]);
    for (exponents, weights) in known.exponents.chunks(BLOCK).zip(known.weights.chunks(BLOCK)) {
        if exponents.iter().fold(true, |none, other| none & (*other < exponent)) {
            continue;
        }
        for ((other, weight), lane) in exponents.iter().zip(weights).zip(&mut lanes) {
            if *other >= exponent {
                count += 1;
                *lane += f64::from(*weight);
            }
        }
    }
    (count, lanes.iter().sum())
}

#[cfg(test)]
mod tests;
