//! The second half of a layer: gate, up and the activation between them in one phase, then down.

use kernels::{Columns, TernaryMatrix};
use model::{Activation, LayerWeights};

use super::barrier::Poisoned;
use super::buffers::Local;
use super::profile::Part;
use super::shared::{Member, Pieces};
use super::step::{LEAST_ROWS, Step, tiles_of};

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
        self.product(member, local, weights.down, &planes.ffn_codes, &planes.product);
        self.meet(member, local, Part::Projections)
    }

    /// The thread's share of the inner values: a chunk of gate, the same chunk of up, and from them,
    /// while they are in a cache, what is to enter down.
    fn gate_and_up(&self, member: &Member<'_>, local: &mut Local, weights: &LayerWeights<'_>) {
        let planes = &self.planes;
        let Local { own, gate, up, record, .. } = local;
        let x = self.input(member, own, &planes.hidden_codes);
        let (n, tile) = (x.rows(), TernaryMatrix::TILE_ROWS);
        // There is room for a tile of every token.
        let most = gate.len() / n / tile * tile;
        let pieces = Pieces { granule: tile, least: LEAST_ROWS.min(most), most };
        while let Some((rows, mut gated)) = planes.gated.pieces(member, n, pieces) {
            let (len, tiles) = (rows.len(), tiles_of(&rows));
            let (gate, up) = (&mut gate[..n * len], &mut up[..n * len]);
            let bytes = 2 * tiles.len() * TernaryMatrix::tile_bytes(weights.gate.cols());
            record.profile.weight_bytes += bytes as u64;
            self.backend.ternary(weights.gate, tiles.clone(), x, Columns::new(gate, len, 0..len));
            self.backend.ternary(weights.up, tiles, x, Columns::new(up, len, 0..len));
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
