//! One step as every thread walks it: the order of a layer is that of `docs/numerics.md`.
//!
//! Threads share each phase's work by tokens, by tiles of weights, by heads or by segments, never
//! inside a sum of floats, and meet at a barrier before the next phase. Who does what does not matter.
//!
//! ```text
//! tokens  embed or take over x, RoPE tables
//! ── per layer ─────────────────────────────────────
//! tokens  x += product of the layer before; norm; quantise   *
//! tiles   q, k, v
//! heads   RoPE(k); store k and v           ┐
//! heads   attention of (token, head) pairs ┴ attention.rs
//! tokens  sub-norm; quantise                                 *
//! tiles   o
//! tokens  x += product; norm; quantise                       *
//! chunks  gate, up, activation             ┐
//! tokens  sub-norm; quantise               │ feed_forward.rs *
//! tiles   down, or columns and then rows   ┘
//! ── end ───────────────────────────────────────────
//! tokens  x += product
//!         head.rs, on the last stage
//! ```
//!
//! In a step of one token every thread does the work marked * for itself, and so need not wait for
//! it: six meetings a layer instead of ten, and a seventh where down is computed by columns.

use std::ops::Range;

use kernels::{Backend, NotFinite, Quantised, TernaryMatrix};
use model::LayerWeights;

use super::barrier::Poisoned;
use super::buffers::{Codes, Local, OwnCodes, Planes, Samplers};
use super::cache::SharedCache;
use super::head::{PositionResult, Progress};
use super::profile::{Clock, Part};
use super::rows::Batch;
use super::shared::{Member, Pieces, Queue, Shared};
use super::{Shortcuts, StageModel, Work};

/// Parts of a phase for each thread: so that one that was held up leaves work to the others.
const PARTS_PER_THREAD: usize = 12;

/// Rows of a matrix that a thread takes at least: a microsecond's work for one token, so that threads
/// finish together, and enough that taking them costs nothing.
const LEAST_ROWS: usize = 16;

/// What all threads of a step see.
pub(super) struct Step<'a> {
    pub(super) backend: Backend,
    pub(super) model: &'a StageModel,
    /// The same for every memory node; `model` is one of them.
    pub(super) models: &'a [StageModel],
    pub(super) batch: &'a Batch<'a>,
    pub(super) work: Work,
    /// Norm, head and sampler have their turn.
    pub(super) ends: bool,
    /// `[tokens of the step][hidden]`, by place; empty on the first stage.
    pub(super) input: &'a [f32],
    pub(super) cache: SharedCache<'a>,
    pub(super) planes: Planes<'a>,
    /// Segments of the longest context, if threads share them.
    pub(super) segments: Option<usize>,
    pub(super) samplers: &'a Samplers,
    /// `[wanted positions]`.
    pub(super) results: Shared<'a, PositionResult>,
    pub(super) queue: Queue,
    /// Of columns of down: tokens are taken in the same phase.
    pub(super) columns: Queue,
    pub(super) shortcuts: Shortcuts,
    pub(super) progress: Progress,
    /// Whether cuts are to be settled without the whole head.
    pub(super) tries_cuts: bool,
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
        if self.work == Work::Draw {
            self.each_token(member, |token| {
                self.take_input(token, self.planes.residual.row(member, token));
            });
            return self.end(member, local);
        }
        self.enter(member, local);
        if self.is_single() {
            self.lap(local, Part::Norms);
        } else {
            self.meet(member, local, Part::Norms)?;
        }
        let model = &self.models[local.node];
        for (layer, weights) in model.layer_weights().enumerate() {
            self.attention(member, local, layer, &weights)?;
            self.feed_forward(member, local, &weights)?;
        }
        self.each_token(member, |token| {
            let x = self.planes.residual.row(member, token);
            if self.is_single() {
                x.copy_from_slice(&local.residual);
            }
            self.add(member, token, x, &self.planes.product);
        });
        self.end(member, local)
    }

    /// Norm, head and sampler, where they have their turn.
    fn end(&self, member: &mut Member<'_>, local: &mut Local) -> Result<(), Poisoned> {
        self.lap(local, Part::Norms);
        if let Some((norm, head)) = self.models[local.node].end().filter(|_| self.ends) {
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
        if self.is_single() {
            self.take_over(0, &mut local.residual);
        }
        self.each_token(member, |index| {
            if !self.is_single() {
                self.take_over(index, self.planes.residual.row(member, index));
            }
            if self.model.is_first() {
                let bytes = shape.hidden as usize * size_of::<u16>();
                local.record.profile.weight_bytes += bytes as u64;
            }
            self.backend.rope_table(
                &shape.rope_inverse_frequencies,
                self.batch.tokens()[index].position,
                self.planes.cos.row(member, index),
                self.planes.sin.row(member, index),
            );
        });
    }

    /// The residual stream of a token as it enters the stage.
    fn take_over(&self, index: usize, x: &mut [f32]) {
        let token = self.batch.tokens()[index];
        match self.model.embedding() {
            Some(embedding) => embedding.widen_row(token.id as usize, x),
            None => self.take_input(index, x),
        }
    }

    /// The residual stream of a token as the step brings it.
    fn take_input(&self, index: usize, x: &mut [f32]) {
        let place = self.batch.tokens()[index].place;
        x.copy_from_slice(&self.input[place * x.len()..][..x.len()]);
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
        self.normalise(member, local, addend, weights.attn_norm)?;
        self.product(member, local, weights.q, &planes.hidden_codes, &planes.query);
        self.product(member, local, weights.k, &planes.hidden_codes, &planes.key);
        self.product(member, local, weights.v, &planes.hidden_codes, &planes.value);
        self.meet(member, local, Part::Projections)?;
        self.store_kv(member, local, layer);
        self.meet(member, local, Part::Attention)?;
        self.attend(member, local, layer)?;
        self.meet(member, local, Part::Attention)?;
        let (x, codes) = (&planes.attended, &planes.attended_codes);
        self.sub_norm(member, local, x, weights.attn_sub_norm, codes)?;
        self.product(member, local, weights.o, &planes.attended_codes, &planes.product);
        self.meet(member, local, Part::Projections)
    }

    /// x += addend, then norm and quantisation into `hidden_codes` or into every thread's own codes.
    ///
    /// # Errors
    ///
    /// [`Poisoned`] if another thread panicked.
    pub(super) fn normalise(
        &self,
        member: &mut Member<'_>,
        local: &mut Local,
        addend: Option<&Shared<'_, f32>>,
        weight: &[f32],
    ) -> Result<(), Poisoned> {
        let (eps, codes) = (self.model.config().rms_eps, &self.planes.hidden_codes);
        if self.is_single() {
            let Local { residual, normed, own, .. } = local;
            if let Some(addend) = addend {
                self.add(member, 0, residual, addend);
            }
            let normed = &mut normed[..residual.len()];
            self.backend.rms_norm(residual, weight, eps, normed);
            self.note(0, own.quantise(self.backend, codes.stride(), normed));
            self.lap(local, Part::Norms);
            return Ok(());
        }
        self.each_token(member, |token| {
            let x = self.planes.residual.row(member, token);
            if let Some(addend) = addend {
                self.add(member, token, x, addend);
            }
            let normed = &mut local.normed[..x.len()];
            self.backend.rms_norm(x, weight, eps, normed);
            self.note(token, codes.quantise(member, self.backend, token, normed));
        });
        self.meet(member, local, Part::Norms)
    }

    /// The norm that some models have before o and down, and quantisation into `codes` or into every
    /// thread's own codes. `x` has as many values for each token as the norm has weights.
    ///
    /// # Errors
    ///
    /// [`Poisoned`] if another thread panicked.
    pub(super) fn sub_norm(
        &self,
        member: &mut Member<'_>,
        local: &mut Local,
        x: &Shared<'_, f32>,
        weight: Option<&[f32]>,
        codes: &Codes<'_>,
    ) -> Result<(), Poisoned> {
        let eps = self.model.config().rms_eps;
        let values = x.read(member);
        let width = values.len() / self.batch.tokens().len();
        let Local { normed, own, .. } = local;
        let mut norm = |token: usize, quantise: &mut dyn FnMut(&[f32]) -> Result<(), NotFinite>| {
            let x = &values[token * width..][..width];
            let outcome = match weight {
                Some(weight) => {
                    let normed = &mut normed[..width];
                    self.backend.rms_norm(x, weight, eps, normed);
                    quantise(normed)
                }
                None => quantise(x),
            };
            self.note(token, outcome);
        };
        if self.is_single() {
            norm(0, &mut |x| own.quantise(self.backend, codes.stride(), x));
            self.lap(local, Part::Norms);
            return Ok(());
        }
        self.each_token(member, |token| {
            norm(token, &mut |x| codes.quantise(member, self.backend, token, x));
        });
        self.meet(member, local, Part::Norms)
    }

    /// A token's row fails when a value of it could not be quantised.
    fn note(&self, token: usize, quantised: Result<(), NotFinite>) {
        if quantised.is_err() {
            self.batch.fail(self.batch.tokens()[token].row);
        }
    }

    /// What enters a product: `codes`, or in a step of one token the thread's own.
    pub(super) fn input<'m>(
        &self,
        member: &'m Member<'_>,
        own: &'m OwnCodes,
        codes: &'m Codes<'_>,
    ) -> Quantised<'m> {
        if self.is_single() { own.read(codes.stride()) } else { codes.read(member) }
    }

    /// x += addend, for the values `x` of one token.
    fn add(&self, member: &Member<'_>, token: usize, x: &mut [f32], addend: &Shared<'_, f32>) {
        let width = x.len();
        self.backend.add(x, &addend.read(member)[token * width..][..width]);
    }

    /// The thread's share of the tiles of one product, for all tokens at once.
    pub(super) fn product(
        &self,
        member: &Member<'_>,
        local: &mut Local,
        weights: TernaryMatrix<'_>,
        codes: &Codes<'_>,
        out: &Shared<'_, f32>,
    ) {
        assert_eq!(weights.rows(), out.width(), "a product is as wide as its matrix is high");
        let Local { own, workspace, record, .. } = local;
        let x = self.input(member, own, codes);
        let (height, pieces) = self.cut(member, out.width(), usize::MAX);
        while let Some((tokens, rows, y)) = out.bands(member, x.rows(), height, pieces) {
            let tiles = tiles_of(&rows);
            let bytes = tiles.len() * TernaryMatrix::tile_bytes(weights.cols());
            record.profile.weight_bytes += bytes as u64;
            self.backend.ternary_many(weights, tiles, x.part(tokens), y, workspace);
        }
    }

    /// How a product with `width` rows of weights is shared: by how many tokens at a time, and in
    /// pieces of at most `most` values for these tokens.
    pub(super) fn cut(&self, member: &Member<'_>, width: usize, most: usize) -> (usize, Pieces) {
        let n = self.batch.tokens().len();
        let cut = self.backend.cut(n);
        let height = cut.tokens.min(n);
        // Of very many tokens there is room for fewer rows than are best.
        let granule = if cut.rows <= most / height { cut.rows } else { TernaryMatrix::TILE_ROWS };
        let most = (most / height / granule * granule).max(granule);
        let pieces = match cut.sized {
            Some(rows) => Pieces::even(granule, rows, width, n.div_ceil(height), member.threads()),
            None => Pieces::at_least(granule, LEAST_ROWS.next_multiple_of(granule)),
        };
        (height, Pieces { least: pieces.least.min(most), most: pieces.most.min(most), ..pieces })
    }

    /// Whether every thread does the work between products for itself, as it does in a step of one
    /// token: the same work gives every thread the same values, and nobody waits for anybody.
    pub(super) fn is_single(&self) -> bool {
        self.batch.tokens().len() == 1
    }

    /// The thread's share of all tokens, by index.
    pub(super) fn each_token(&self, member: &Member<'_>, mut work: impl FnMut(usize)) {
        let total = self.batch.tokens().len();
        let count = share(total, member);
        while let Some(tokens) = member.take(&self.queue, count, total) {
            tokens.for_each(&mut work);
        }
    }
}

/// The tiles of `rows`, which begin with a tile and end with one or with the matrix.
pub(super) fn tiles_of(rows: &Range<usize>) -> Range<usize> {
    rows.start / TernaryMatrix::TILE_ROWS..rows.end.div_ceil(TernaryMatrix::TILE_ROWS)
}

/// How many of `total` parts a thread takes at a time.
pub(super) fn share(total: usize, member: &Member<'_>) -> usize {
    total.div_ceil(PARTS_PER_THREAD * member.threads()).max(1)
}
