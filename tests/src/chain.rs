//! What workers of `--stub-compute` answer, computed once more from the description in
//! `docs/operations.md`, and from nothing that the worker is built of: streams are compared with it.

use proto::generate::{GenerateEvent, GenerateRequest, Prompt};

/// A hash as long as the description says.
type Hash = [u8; 32];

/// A model as a stub sees it.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// How many.
    pub layers: u32,
    /// How many tokens there are.
    pub vocab: u32,
    /// Width of the residual stream: at least a hash.
    pub hidden: u32,
}

impl Model {
    /// The model in a store.
    ///
    /// # Panics
    ///
    /// If it cannot be opened, or hashes do not fit its residual stream.
    pub fn of(store: &std::path::Path) -> Self {
        let store = model::Store::open(store).expect("a store of the tests opens");
        let &model::ModelConfig { layers, vocab, hidden, .. } = store.config();
        assert!(hidden as usize >= size_of::<Hash>(), "hashes would be cut");
        Self { layers, vocab, hidden }
    }
}

/// One sequence: what every layer keeps of every position.
#[derive(Clone, Debug)]
pub struct Chain {
    vocab: u32,
    kept: Vec<Vec<Hash>>,
}

impl Chain {
    /// Nothing yet.
    pub fn new(model: Model) -> Self {
        Self { vocab: model.vocab, kept: vec![Vec::new(); model.layers as usize] }
    }

    /// One more token; gives the one that is drawn after it.
    pub fn push(&mut self, token: u32) -> u32 {
        let mut hash: Hash = blake3::hash(&token.to_le_bytes()).into();
        for (layer, kept) in self.kept.iter_mut().enumerate() {
            let position = kept.len();
            let [before, earlier] = match position {
                0 => [Hash::default(); 2],
                _ => [kept[position - 1], kept[head(&hash) as usize % position]],
            };
            let numbers = [layer as u32, position as u32].map(u32::to_le_bytes);
            hash = blake3::Hasher::new()
                .update(&hash)
                .update(numbers.as_flattened())
                .update(&before)
                .update(&earlier)
                .finalize()
                .into();
            kept.push(hash);
        }
        head(blake3::hash(&hash).as_bytes()) % self.vocab
    }
}

fn head(hash: &Hash) -> u32 {
    u32::from_le_bytes([hash[0], hash[1], hash[2], hash[3]])
}

/// One answer as it comes, beside what it should be.
#[derive(Debug)]
pub struct Check {
    chain: Chain,
    expected: u32,
    /// Tokens that came and were right.
    pub tokens: u64,
}

impl Check {
    /// Of the answer to these tokens.
    ///
    /// # Panics
    ///
    /// If there are none.
    pub fn new(model: Model, prompt: &[u32]) -> Self {
        let mut chain = Chain::new(model);
        let expected = prompt.iter().map(|&token| chain.push(token)).last();
        Self { chain, expected: expected.expect("a prompt has a token"), tokens: 0 }
    }

    /// Takes what came.
    ///
    /// # Errors
    ///
    /// A token that should have been another one.
    pub fn take(&mut self, event: &GenerateEvent) -> Result<(), String> {
        let GenerateEvent::Delta(delta) = event else { return Ok(()) };
        if delta.index != self.tokens {
            return Err(format!("token {} came after {} tokens", delta.index, self.tokens));
        }
        for &token in &delta.tokens {
            if token != self.expected {
                let Self { expected, tokens, .. } = self;
                return Err(format!("token {tokens} is {token}, not {expected}"));
            }
            self.expected = self.chain.push(token);
            self.tokens += 1;
        }
        Ok(())
    }
}

/// Request `index`, always the same: a prompt of 1 to `longest` tokens, and as many tokens of an answer.
pub fn request(model: Model, index: u64, longest: u32, tokens: u32) -> GenerateRequest {
    let number = |at: u64| {
        let hash = blake3::hash([index, at].map(u64::to_le_bytes).as_flattened());
        head(hash.as_bytes())
    };
    let prompt = (1..=u64::from(1 + number(0) % longest)).map(|at| number(at) % model.vocab);
    GenerateRequest {
        prompt: Prompt::Tokens(prompt.collect()),
        max_tokens: tokens,
        ignore_eos: true,
        ..GenerateRequest::default()
    }
}
