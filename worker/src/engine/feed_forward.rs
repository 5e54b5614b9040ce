//! The second half of a layer: gate, up and the activation between them in one phase, then down.
//!
//! A squared ReLU makes zeros, and in a step of one token they are free: rows of up whose gate is
//! closed are not computed, and columns of down whose input is zero are not read. No bit of a result
//! changes. A closed gate's product may be -0 where it is computed and is +0 where it is not, which the
//! norm and quantisation after it do not tell apart; and it is computed after all where it could be
//! something else than a zero, see [`Step::may_skip_up`].

use kernels::{Columns, Quantised, TernaryColumns, TernaryMatrix};
use model::{Activation, LayerWeights};

use super::barrier::Poisoned;
use super::buffers::Local;
use super::profile::Part;
use super::shared::{Member, Pieces};
use super::step::{Step, tiles_of};

/// Rows of up are skipped when at most so many of eight gates of a chunk are open. Picked rows come
/// from memory at about half the rate of rows in order: at half of them the two are even.
const OPEN_EIGHTHS_MAX: usize = 4;

/// Columns of down are skipped when at most so many of eight inputs are not zero: at half of them
/// picked columns and all rows in order take the same time.
const NONZERO_EIGHTHS_MAX: usize = 4;

/// Columns of down that a thread takes at least: a microsecond's work, as [`Step::product`] has it.
const LEAST_COLUMNS: usize = 32;

/// Columns are taken in multiples of it: what the kernel takes at once.
const COLUMNS_GRANULE: usize = 8;

/// Rows of down whose sums are added up are taken in multiples of it: a cache line.
const ROWS_GRANULE: usize = 16;

impl Step<'_> {
    /// From the product of o to the product of down.
    ///
    /// # Errors
    ///
    /// [`Poisoned`] if another thread panicked.
    pub(super) fn feed_forward(
        &self,
        member: &mut Member<'_>,
        local: &mut Local,
        weights: &LayerWeights<'_>,
    ) -> Result<(), Poisoned> {
        let planes = &self.planes;
        self.normalise(member, local, Some(&planes.product), weights.ffn_norm)?;
        self.gate_and_up(member, local, weights);
        self.meet(member, local, Part::Projections)?;
        self.sub_norm(member, local, &planes.gated, weights.ffn_sub_norm, &planes.ffn_codes)?;
        self.count_down_zeros(member, local);
        match self.columns_wanted(local, weights.down_columns) {
            Some((columns, count)) => self.down_columns(member, local, columns, count)?,
            None => self.product(member, local, weights.down, &planes.ffn_codes, &planes.product),
        }
        self.meet(member, local, Part::Projections)
    }

    /// The thread's share of the inner values: a chunk of gate, the same chunk of up, and from them,
    /// while they are in a cache, what is to enter down.
    fn gate_and_up(&self, member: &Member<'_>, local: &mut Local, weights: &LayerWeights<'_>) {
        let planes = &self.planes;
        let Local { own, gate, up, places, normed, workspace, record, .. } = local;
        let x = self.input(member, own, &planes.hidden_codes);
        let may_skip = self.may_skip_up(weights.up, x, own.scale());
        let tile = TernaryMatrix::TILE_ROWS;
        // There is room for a tile of every token.
        let (height, pieces) = self.cut(member, planes.gated.width(), gate.len());
        let bands = || planes.gated.bands(member, x.rows(), height, pieces);
        while let Some((tokens, rows, mut gated)) = bands() {
            let (n, len, tiles) = (tokens.len(), rows.len(), tiles_of(&rows));
            let x = x.part(tokens);
            let (gate, up) = (&mut gate[..n * len], &mut up[..n * len]);
            let tile_bytes = TernaryMatrix::tile_bytes(weights.gate.cols());
            record.profile.weight_bytes += (tiles.len() * tile_bytes) as u64;
            let y = Columns::new(gate, len, 0..len);
            self.backend.ternary_many(weights.gate, tiles.clone(), x, y, workspace);
            let open = match may_skip {
                true => self.backend.positive(gate, rows.start as u32, &mut places[..len]),
                false => len,
            };
            if open * 8 <= len * OPEN_EIGHTHS_MAX {
                let (places, values) = (&places[..open], &mut normed[..open]);
                self.backend.ternary_rows(weights.up, places, x, values);
                up.fill(0.0);
                for (place, value) in places.iter().zip(values) {
                    up[*place as usize - rows.start] = *value;
                }
                record.profile.weight_bytes += (open * tile_bytes / tile) as u64;
            } else {
                record.profile.weight_bytes += (tiles.len() * tile_bytes) as u64;
                let y = Columns::new(up, len, 0..len);
                self.backend.ternary_many(weights.up, tiles, x, y, workspace);
            }
            let of_tokens = gate.chunks_exact(len).zip(up.chunks_exact(len));
            for (token, (gate, up)) in of_tokens.enumerate() {
                let gated = gated.row(token);
                match self.model.config().activation {
                    Activation::SquaredRelu => self.backend.squared_relu_mul(gate, up, gated),
                    Activation::Silu => self.backend.silu_mul(gate, up, gated),
                }
            }
            if self.clock.is_some() && self.model.config().activation == Activation::SquaredRelu {
                record.profile.gate_values += gate.len() as u64;
                let is_zero = |gate: &&f32| gate.is_nan() || **gate <= 0.0;
                record.profile.gate_zeros += gate.iter().filter(is_zero).count() as u64;
            }
        }
    }

    /// Whether rows of up whose gate is closed can be left out: they give a zero, whatever up is, as
    /// long as up is finite. With `x` the int8 input and `scale` what it was multiplied by, no value of
    /// up is greater than the sum of 128 for every column makes it.
    fn may_skip_up(&self, up: TernaryMatrix<'_>, x: Quantised<'_>, scale: f32) -> bool {
        let greatest = (128 * up.cols()) as f32 * (up.scale() / scale);
        self.shortcuts.zeros
            && x.rows() == 1
            && self.model.config().activation == Activation::SquaredRelu
            && greatest.is_finite()
    }

    /// How many columns of down are not multiplied by zero, if the step has one token and they are so
    /// few that reading only them pays; they are listed in every thread's own places.
    fn columns_wanted<'a>(
        &self,
        local: &mut Local,
        down: Option<TernaryColumns<'a>>,
    ) -> Option<(TernaryColumns<'a>, usize)> {
        let down = down.filter(|_| self.shortcuts.zeros && self.is_single())?;
        let Local { own, places, .. } = local;
        let codes = &own.row(self.planes.ffn_codes.stride())[..down.cols()];
        let count = self.backend.nonzero(codes, &mut places[..codes.len()]);
        (count * 8 <= codes.len() * NONZERO_EIGHTHS_MAX).then_some((down, count))
    }

    /// The product of down by the `count` columns that are listed: every thread adds some of them up
    /// for all rows, whole columns being what memory gives fastest, and then the sums of all threads
    /// for some of the rows.
    ///
    /// # Errors
    ///
    /// [`Poisoned`] if another thread panicked.
    fn down_columns(
        &self,
        member: &mut Member<'_>,
        local: &mut Local,
        down: TernaryColumns<'_>,
        count: usize,
    ) -> Result<(), Poisoned> {
        let planes = &self.planes;
        let stride = planes.ffn_codes.stride();
        let Local { own, places, record, .. } = local;
        let x = own.read(stride);
        let sums = planes.column_sums.row(member, member.index());
        sums.fill(0);
        let pieces = Pieces::at_least(COLUMNS_GRANULE, LEAST_COLUMNS);
        while let Some(piece) = member.take_piece(&self.columns, pieces, count) {
            record.profile.weight_bytes += (piece.len() * down.padded_rows() / 4) as u64;
            self.backend.ternary_columns(down, &places[piece], x, sums);
        }
        self.meet(member, local, Part::Projections)?;
        let sums = planes.column_sums.read(member);
        let pieces = Pieces::even(ROWS_GRANULE, down.rows(), down.rows(), 1, member.threads());
        while let Some((rows, mut y)) = planes.product.pieces(member, 1, pieces) {
            self.backend.end_columns(down, sums, rows, local.own.read(stride), y.row(0));
        }
        Ok(())
    }

    /// Counts the zeros among down's inputs, if the step is profiled.
    fn count_down_zeros(&self, member: &Member<'_>, local: &mut Local) {
        if self.clock.is_none() {
            return;
        }
        let (codes, width) = (&self.planes.ffn_codes, self.planes.gated.width());
        let Local { own, record, .. } = local;
        self.each_token(member, |token| {
            let row = match self.is_single() {
                true => own.row(codes.stride()),
                false => codes.row(member, token),
            };
            record.profile.down_values += width as u64;
            let zeros = row[..width].iter().filter(|&&code| code == 0).count();
            record.profile.down_zeros += zeros as u64;
        });
    }
}
