//! One step as every thread walks it: the order of a layer is that of `docs/numerics.md`.
//!
//! Threads share each phase's work by tokens, by tiles of weights, by heads or by segments, never
//! inside a sum, and meet at a barrier before the next phase. Who does what does not matter.
//!
//! ```text
//! tokens  embed or take over x, RoPE tables
//! ── per layer ─────────────────────────────────────
//! tokens  x += product of the layer before; norm; quantise
//! tiles   q, k, v
//! heads   RoPE(k); store k and v           ┐
//! heads   attention of (token, head) pairs ┴ attention.rs
//! tokens  sub-norm; quantise
//! tiles   o
//! tokens  x += product; norm; quantise
//! tiles   gate, up
//! tokens  activation; sub-norm; quantise
//! tiles   down
//! ── end ───────────────────────────────────────────
//! tokens  x += product
//!         head.rs, on the last stage
//! ```

use kernels::{Backend, TernaryMatrix};
use model::{Activation, LayerWeights};

use super::StageModel;
use super::barrier::Poisoned;
use super::buffers::{Codes, Local, Planes};
use super::cache::SharedCache;
use super::head::PositionResult;
use super::profile::{Clock, Part};
use super::rows::Batch;
use super::shared::{Member, Queue, Shared};

/// Parts of a phase for each thread: so that one that was held up leaves work to the others.
const PARTS_PER_THREAD: usize = 4;

/// What all threads of a step see.
pub(super) struct Step<'a> {
    pub(super) backend: Backend,
    pub(super) model: &'a StageModel,
    pub(super) batch: &'a Batch<'a>,
    /// `[tokens of the step][hidden]`, by place; empty on the first stage.
    pub(super) input: &'a [f32],
    pub(super) cache: SharedCache<'a>,
    pub(super) planes: Planes<'a>,
    /// `[wanted positions]`.
    pub(super) results: Shared<'a, PositionResult>,
    pub(super) queue: Queue,
    /// If the step is profiled.
    pub(super) clock: Option<&'a dyn Clock>,
}

impl Step<'_> {
    /// One thread's part of the step.
    ///
    /// # Errors
    ///
    /// [`Poisoned`] if another thread panicked.
    pub(super) fn walk(&self, member: &mut Member<'_>, local: &mut Local) -> Result<(), Poisoned> {
        self.enter(member, local);
        self.meet(member, local, Part::Norms)?;
        for (layer, weights) in self.model.layer_weights().enumerate() {
            self.attention(member, local, layer, &weights)?;
            self.feed_forward(member, local, &weights)?;
        }
        self.each_token(member, |token| {
            let x = self.planes.residual.row(member, token);
            self.add(member, token, x, &self.planes.product);
        });
        self.lap(local, Part::Norms);
        if let Some((norm, head)) = self.model.end() {
            self.meet(member, local, Part::Norms)?;
            self.head(member, local, norm, head)?;
        }
        Ok(())
    }

    /// Ends a phase whose work was `part`, and waits for the others.
    ///
    /// # Errors
    ///
    /// [`Poisoned`] if another thread panicked.
    pub(super) fn meet(
        &self,
        member: &mut Member<'_>,
        local: &mut Local,
        part: Part,
    ) -> Result<(), Poisoned> {
        self.lap(local, part);
        member.next_phase()?;
        self.lap(local, Part::Waiting);
        Ok(())
    }

    /// The thread's time since the last lap was spent on `part`.
    pub(super) fn lap(&self, local: &mut Local, part: Part) {
        if let Some(clock) = self.clock {
            local.record.lap(part, clock.now_ns());
        }
    }

    /// Fills the residual stream and the tables of RoPE.
    fn enter(&self, member: &Member<'_>, local: &mut Local) {
        let shape = self.model.config();
        let hidden = shape.hidden as usize;
        self.each_token(member, |index| {
            let token = self.batch.tokens()[index];
            let x = self.planes.residual.row(member, index);
            match self.model.embedding() {
                Some(embedding) => {
                    embedding.widen_row(token.id as usize, x);
                    local.record.profile.weight_bytes += (hidden * size_of::<u16>()) as u64;
                }
                None => x.copy_from_slice(&self.input[token.place * hidden..][..hidden]),
            }
            self.backend.rope_table(
                &shape.rope_inverse_frequencies,
                token.position,
                self.planes.cos.row(member, index),
                self.planes.sin.row(member, index),
            );
        });
    }

    /// The first half of a layer, up to the product of o.
    fn attention(
        &self,
        member: &mut Member<'_>,
        local: &mut Local,
        layer: usize,
        weights: &LayerWeights<'_>,
    ) -> Result<(), Poisoned> {
        let planes = &self.planes;
        // The first layer finds x as `enter` left it.
        let addend = (layer > 0).then_some(&planes.product);
        self.normalise(member, local, addend, weights.attn_norm);
        self.meet(member, local, Part::Norms)?;
        self.product(member, local, weights.q, &planes.hidden_codes, &planes.query);
        self.product(member, local, weights.k, &planes.hidden_codes, &planes.key);
        self.product(member, local, weights.v, &planes.hidden_codes, &planes.value);
        self.meet(member, local, Part::Projections)?;
        self.store_kv(member, local, layer);
        self.meet(member, local, Part::Attention)?;
        self.attend(member, local, layer)?;
        self.meet(member, local, Part::Attention)?;
        let width = planes.query.width();
        self.each_token(member, |token| {
            let x = &planes.attended.read(member)[token * width..][..width];
            self.sub_norm(member, local, token, x, weights.attn_sub_norm, &planes.attended_codes);
        });
        self.meet(member, local, Part::Norms)?;
        self.product(member, local, weights.o, &planes.attended_codes, &planes.product);
        self.meet(member, local, Part::Projections)
    }

    /// The second half of a layer, up to the product of down.
    fn feed_forward(
        &self,
        member: &mut Member<'_>,
        local: &mut Local,
        weights: &LayerWeights<'_>,
    ) -> Result<(), Poisoned> {
        let planes = &self.planes;
        self.normalise(member, local, Some(&planes.product), weights.ffn_norm);
        self.meet(member, local, Part::Norms)?;
        self.product(member, local, weights.gate, &planes.hidden_codes, &planes.gate);
        self.product(member, local, weights.up, &planes.hidden_codes, &planes.up);
        self.meet(member, local, Part::Projections)?;
        let width = planes.gate.width();
        self.each_token(member, |token| {
            // The gated values take the place of the gate's, which nobody else reads.
            let up = &planes.up.read(member)[token * width..][..width];
            let gate = planes.gate.row(member, token);
            let gated = &mut local.normed[..width];
            match self.model.config().activation {
                Activation::SquaredRelu => {
                    if self.clock.is_some() {
                        let profile = &mut local.record.profile;
                        profile.gate_values += width as u64;
                        let is_zero = |&&gate: &&f32| gate.is_nan() || gate <= 0.0;
                        profile.gate_zeros += gate.iter().filter(is_zero).count() as u64;
                    }
                    self.backend.squared_relu_mul(gate, up, gated);
                }
                Activation::Silu => self.backend.silu_mul(gate, up, gated),
            }
            gate.copy_from_slice(gated);
            self.sub_norm(member, local, token, gate, weights.ffn_sub_norm, &planes.ffn_codes);
        });
        self.meet(member, local, Part::Norms)?;
        if self.clock.is_some() {
            self.each_token(member, |token| {
                let profile = &mut local.record.profile;
                profile.down_values += width as u64;
                profile.down_zeros += planes.ffn_codes.zeros(member, token, width) as u64;
            });
        }
        self.product(member, local, weights.down, &planes.ffn_codes, &planes.product);
        self.meet(member, local, Part::Projections)
    }

    /// x += addend, then norm and quantisation into `hidden_codes`, for every token.
    fn normalise(
        &self,
        member: &Member<'_>,
        local: &mut Local,
        addend: Option<&Shared<'_, f32>>,
        weight: &[f32],
    ) {
        let eps = self.model.config().rms_eps;
        self.each_token(member, |token| {
            let x = self.planes.residual.row(member, token);
            if let Some(addend) = addend {
                self.add(member, token, x, addend);
            }
            let normed = &mut local.normed[..x.len()];
            self.backend.rms_norm(x, weight, eps, normed);
            self.quantise(member, token, normed, &self.planes.hidden_codes);
        });
    }

    /// The norm that some models have before o and down, and quantisation.
    fn sub_norm(
        &self,
        member: &Member<'_>,
        local: &mut Local,
        token: usize,
        x: &[f32],
        weight: Option<&[f32]>,
        codes: &Codes<'_>,
    ) {
        let Some(weight) = weight else {
            return self.quantise(member, token, x, codes);
        };
        let normed = &mut local.normed[..x.len()];
        self.backend.rms_norm(x, weight, self.model.config().rms_eps, normed);
        self.quantise(member, token, normed, codes);
    }

    /// Quantises a token's values; its row fails when one is not finite.
    fn quantise(&self, member: &Member<'_>, token: usize, x: &[f32], codes: &Codes<'_>) {
        if codes.quantise(member, self.backend, token, x).is_err() {
            self.batch.fail(self.batch.tokens()[token].row);
        }
    }

    /// x += addend, for the values `x` of one token.
    fn add(&self, member: &Member<'_>, token: usize, x: &mut [f32], addend: &Shared<'_, f32>) {
        let width = x.len();
        self.backend.add(x, &addend.read(member)[token * width..][..width]);
    }

    /// The thread's share of the tiles of one product, for all tokens at once.
    fn product(
        &self,
        member: &Member<'_>,
        local: &mut Local,
        weights: TernaryMatrix<'_>,
        codes: &Codes<'_>,
        out: &Shared<'_, f32>,
    ) {
        assert_eq!(weights.rows(), out.width(), "a product is as wide as its matrix is high");
        let x = codes.read(member);
        let tiles = share(weights.tiles(), member);
        while let Some((rows, y)) =
            out.columns(member, out.rows(), tiles * TernaryMatrix::TILE_ROWS)
        {
            let tiles =
                rows.start / TernaryMatrix::TILE_ROWS..rows.end.div_ceil(TernaryMatrix::TILE_ROWS);
            let bytes = tiles.len() * TernaryMatrix::tile_bytes(weights.cols());
            local.record.profile.weight_bytes += bytes as u64;
            self.backend.ternary(weights, tiles, x, y);
        }
    }

    /// The thread's share of all tokens, by index.
    fn each_token(&self, member: &Member<'_>, mut work: impl FnMut(usize)) {
        let total = self.batch.tokens().len();
        let count = share(total, member);
        while let Some(tokens) = member.take(&self.queue, count, total) {
            tokens.for_each(&mut work);
        }
    }
}

/// How many of `total` parts a thread takes at a time.
pub(super) fn share(total: usize, member: &Member<'_>) -> usize {
    total.div_ceil(PARTS_PER_THREAD * member.threads()).max(1)
}
