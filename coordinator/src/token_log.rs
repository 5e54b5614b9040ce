//! The tokens of one sequence: the only truth about it. Rows are made from it, never from what a
//! worker remembers, so that any worker can take a sequence over.

use std::collections::BTreeMap;

use proto::ids::{Generation, PrefixHash};

/// Prompt and answer of one sequence. Grows at its end and never changes otherwise.
#[derive(Clone, Debug)]
pub struct TokenLog {
    /// Prompt, then answer.
    tokens: Vec<u32>,
    /// `hashes[i]` is the hash of `tokens[..i]`: one longer than `tokens`.
    hashes: Vec<PrefixHash>,
    prompt_len: usize,
    forced_len: usize,
    /// Of the answer, kept with it so that a row with penalties needs no count of the whole.
    output_counts: BTreeMap<u32, u32>,
    generation: Generation,
}

impl TokenLog {
    /// The log of a prompt and of the first tokens of its answer that are already known
    /// (`forced`: a client had received them before; they are never sampled again).
    pub fn new(prompt: &[u32], forced: &[u32]) -> Self {
        let mut log = Self {
            tokens: Vec::with_capacity(prompt.len() + forced.len()),
            hashes: vec![PrefixHash::EMPTY],
            prompt_len: prompt.len(),
            forced_len: forced.len(),
            output_counts: BTreeMap::new(),
            generation: Generation(0),
        };
        for &token in prompt {
            log.extend(token);
        }
        for &token in forced {
            log.append(token);
        }
        log
    }

    /// Adds a token to the answer and returns its index in the answer.
    pub fn append(&mut self, token: u32) -> u32 {
        self.extend(token);
        *self.output_counts.entry(token).or_default() += 1;
        self.output().len() as u32 - 1
    }

    fn extend(&mut self, token: u32) {
        let last = self.hashes[self.tokens.len()];
        self.hashes.push(last.then(token));
        self.tokens.push(token);
    }

    /// Prompt and answer so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The prompt.
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_len]
    }

    /// The answer so far, forced tokens included.
    pub fn output(&self) -> &[u32] {
        &self.tokens[self.prompt_len..]
    }

    /// How many tokens of the answer were known at the start.
    pub fn forced_len(&self) -> usize {
        self.forced_len
    }

    /// The hash of the first `position` tokens.
    ///
    /// # Panics
    ///
    /// If there are fewer tokens.
    pub fn hash_at(&self, position: usize) -> PrefixHash {
        self.hashes[position]
    }

    /// Which life of the sequence this is; workers refuse rows of older ones.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Begins another life: what workers hold of the sequence counts no more.
    pub fn begin_generation(&mut self) {
        self.generation.0 += 1;
    }

    /// How often each token occurs in the prompt, ascending by token.
    pub fn prompt_counts(&self) -> Vec<(u32, u32)> {
        let mut counts = BTreeMap::new();
        for &token in self.prompt() {
            *counts.entry(token).or_default() += 1;
        }
        counts.into_iter().collect()
    }

    /// How often each token occurs in the answer, ascending by token.
    pub fn output_counts(&self) -> Vec<(u32, u32)> {
        self.output_counts.iter().map(|(&token, &count)| (token, count)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_chain_is_that_of_the_tokens() {
        let mut log = TokenLog::new(&[3, 1, 4], &[1]);
        assert_eq!(log.append(5), 1, "index in the answer, behind the forced token");
        assert_eq!(log.tokens(), [3, 1, 4, 1, 5]);
        assert_eq!((log.prompt(), log.output()), (&[3, 1, 4][..], &[1, 5][..]));
        assert_eq!(log.forced_len(), 1);
        for position in 0..=5 {
            let want = PrefixHash::EMPTY.then_all(&log.tokens()[..position]);
            assert_eq!(log.hash_at(position), want);
        }
    }

    #[test]
    fn counts_are_sparse_ascending_and_apart() {
        let mut log = TokenLog::new(&[9, 2, 9], &[7]);
        log.append(2);
        log.append(7);
        assert_eq!(log.prompt_counts(), [(2, 1), (9, 2)]);
        assert_eq!(log.output_counts(), [(2, 1), (7, 2)]);
    }
}
