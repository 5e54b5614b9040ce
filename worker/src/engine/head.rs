//! The end of the model, for the positions that want it: final norm, logits, and what is asked of
//! them. Positions that need only the greatest logits go through `screened`.

mod screened;

use kernels::{Backend, FloatMatrix};
use proto::step::{Output, Sampled};

use self::screened::{Need, Positions};
pub(super) use self::screened::{Scratch, Thresholds};
use super::barrier::Poisoned;
use super::buffers::{HEAD_POSITIONS, Local};
use super::profile::Part;
use super::rows::Wanted;
use super::sampler;
use super::shared::Member;
use super::step::{Step, share};

/// Positions that are screened beside ones that need all logits, at least: those read the whole head
/// in any case, and a few positions more cost it less than a screen.
const LEAST_BESIDE_WHOLE: usize = 4;

/// What came of one wanted position.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum PositionResult {
    /// Its row failed.
    Nothing,
    /// A token.
    Sampled(Sampled),
    /// The log probability of the target.
    Score(f32),
    /// All logits, little endian.
    Logits(Vec<u8>),
}

/// In which order a group's wanted positions are computed.
struct Arranged {
    /// Index of the position in each place.
    order: [usize; HEAD_POSITIONS],
    /// So many places at the front need all logits.
    whole: usize,
}

impl Step<'_> {
    /// Takes the wanted positions in groups through norm, head and sampler.
    ///
    /// # Errors
    ///
    /// [`Poisoned`] if another thread panicked.
    pub(super) fn head(
        &self,
        member: &mut Member<'_>,
        local: &mut Local,
        norm: &[f32],
        head: FloatMatrix<'_>,
    ) -> Result<(), Poisoned> {
        let planes = &self.planes;
        let (hidden, vocab) = (planes.head_input.width(), planes.logits.width());
        for (group, wanted) in self.batch.wanted().chunks(planes.logits.rows()).enumerate() {
            let arranged = self.arrange(wanted, vocab);
            let (order, whole) = (&arranged.order[..wanted.len()], arranged.whole);
            let n = order.len();
            while let Some(range) = member.take(&self.queue, 1, n) {
                for place in range {
                    let wanted = wanted[order[place]];
                    let x = &planes.residual.read(member)[wanted.token * hidden..][..hidden];
                    let y = planes.head_input.row(member, place);
                    self.backend.rms_norm(x, norm, self.model.config().rms_eps, y);
                    if place >= whole {
                        self.begin_screening(member, place - whole, wanted, y);
                    }
                }
            }
            self.meet(member, local, Part::Head)?;
            if whole > 0 {
                let x = &planes.head_input.read(member)[..whole * hidden];
                let count = share(vocab, member);
                while let Some((rows, y)) = planes.logits.columns(member, whole, count) {
                    let profile = &mut local.record.profile;
                    profile.weight_bytes += (rows.len() * hidden * size_of::<u16>()) as u64;
                    profile.exact_rows += (rows.len() * whole) as u64;
                    self.backend.head(head, rows, x, y);
                }
                self.meet(member, local, Part::Head)?;
            }
            if let Some(screen) = self.models[local.node].screen().filter(|_| whole < n) {
                let positions = Positions { wanted, order: &order[whole..], first: whole };
                self.screened(member, local, head, screen, positions);
                self.meet(member, local, Part::Head)?;
            }
            while let Some(range) = member.take(&self.queue, 1, n) {
                for place in range {
                    let logits = &planes.logits.read(member)[place * vocab..][..vocab];
                    let result = self.finish(logits, wanted[order[place]], place >= whole, local);
                    let index = group * planes.logits.rows() + order[place];
                    self.results.row(member, index)[0] = result;
                }
            }
            self.meet(member, local, Part::Head)?;
        }
        Ok(())
    }

    /// Puts the positions that need all logits before those that are screened.
    fn arrange(&self, wanted: &[Wanted], vocab: usize) -> Arranged {
        let may_screen = self.shortcuts.screen && self.backend.screening_pays();
        let has_screen = may_screen && self.model.screen().is_some();
        let can_screen = |wanted: &Wanted| {
            let output = &self.batch.row_of(wanted.token).output;
            has_screen && Need::of(self.backend, output, vocab).is_some()
        };
        let screened = wanted.iter().filter(|wanted| can_screen(wanted)).count();
        let pays = screened == wanted.len() || screened >= LEAST_BESIDE_WHOLE;
        let mut arranged = Arranged { order: [0; HEAD_POSITIONS], whole: 0 };
        let mut place = 0;
        for is_screened in [false, true] {
            for (index, wanted) in wanted.iter().enumerate() {
                if (pays && can_screen(wanted)) == is_screened {
                    arranged.order[place] = index;
                    place += 1;
                }
            }
            if !is_screened {
                arranged.whole = place;
            }
        }
        arranged
    }

    /// What a position wants of its logits. Its row fails if they are not finite.
    fn finish(
        &self,
        logits: &[f32],
        wanted: Wanted,
        is_screened: bool,
        local: &mut Local,
    ) -> PositionResult {
        let token = self.batch.tokens()[wanted.token];
        if self.batch.has_failed(token.row) {
            return PositionResult::Nothing;
        }
        let scratch = local.sampler.as_mut().expect("the last stage has a sampler");
        let row = self.batch.row_of(wanted.token);
        // Screened logits were looked at when they were computed.
        let result = match is_screened || sampler::all_finite(logits) {
            true => evaluate(self.backend, logits, &row.output, wanted, token.position, scratch),
            false => Err(sampler::NotFinite),
        };
        result.unwrap_or_else(|sampler::NotFinite| {
            self.batch.fail(token.row);
            PositionResult::Nothing
        })
    }
}

fn evaluate(
    backend: Backend,
    logits: &[f32],
    output: &Output,
    wanted: Wanted,
    position: u32,
    scratch: &mut sampler::Scratch,
) -> Result<PositionResult, sampler::NotFinite> {
    Ok(match output {
        Output::None | Output::State | Output::Drawn(_) => PositionResult::Nothing,
        Output::Sample(parameters) | Output::Draw(parameters) => {
            // The token that is drawn stands one after the token it follows.
            let sampled = sampler::sample(backend, logits, parameters, position + 1, scratch)?;
            PositionResult::Sampled(sampled)
        }
        Output::Score(targets) => {
            let target = targets[wanted.offset];
            PositionResult::Score(sampler::score(backend, logits, target, scratch))
        }
        Output::Logits => {
            PositionResult::Logits(logits.iter().flat_map(|logit| logit.to_le_bytes()).collect())
        }
    })
}
