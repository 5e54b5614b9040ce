//! The end of the model, for the positions that want it: final norm, logits, and what is asked of
//! them. Positions that only draw a token go through `screened`, and those whose cuts need a sum over
//! all tokens through `settle` as well.

mod screened;
mod settle;

use kernels::{Backend, FloatMatrix};
use proto::step::{Output, Sampled, SamplingParameters};

use self::screened::{Need, Positions, bounds_row};
pub(super) use self::screened::{Progress, Scratch};
use self::settle::{Question, Settled};
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

impl PositionResult {
    /// A token of whose probability nothing was asked.
    fn of_token(token: u32) -> Self {
        Self::Sampled(Sampled { token, logprob: None, top: Vec::new() })
    }
}

/// Wanted positions that are computed together.
#[derive(Clone, Copy)]
struct Group<'a> {
    /// Which of the step's wanted positions is the first.
    first: usize,
    wanted: &'a [Wanted],
}

/// How often the cuts of late positions could be settled. Decides whether the next are tried: of a flat
/// distribution hardly any can be, and the screen is then read besides the whole head. What comes out is the
/// same.
#[derive(Debug, Default)]
pub(super) struct Luck {
    tried: u32,
    open: u32,
    /// Steps in a row that did not try.
    skipped: u32,
}

impl Luck {
    /// Positions that are remembered; then half of them are forgotten.
    const MEMORY: u32 = 64;
    /// So many at least say something.
    const LEAST: u32 = 8;
    /// Steps without a try before the next one: distributions change.
    const SKIPPED_MOST: u32 = 31;

    /// Whether this step tries.
    pub(super) fn tries(&mut self) -> bool {
        // Trying in vain costs half of what it saves.
        let is_hopeless = self.tried >= Self::LEAST && self.open * 3 > self.tried * 2;
        if is_hopeless && self.skipped < Self::SKIPPED_MOST {
            self.skipped += 1;
            return false;
        }
        self.skipped = 0;
        true
    }

    /// Takes in how many were tried in a step, and how many of them stayed open.
    pub(super) fn note(&mut self, (tried, open): (u32, u32)) {
        (self.tried, self.open) = (self.tried + tried, self.open + open);
        if self.tried > Self::MEMORY {
            (self.tried, self.open) = (self.tried / 2, self.open / 2);
        }
    }
}

/// In which order a group's wanted positions are computed, all or some of them.
#[derive(Default)]
struct Arranged {
    /// Index of the position in each place.
    order: [usize; HEAD_POSITIONS],
    /// How many places are taken.
    count: usize,
    /// So many places at the front need all logits.
    whole: usize,
}

impl Arranged {
    /// Takes the next place.
    fn put(&mut self, index: usize) {
        self.order[self.count] = index;
        self.count += 1;
    }
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
        let size = self.planes.head_input.rows();
        for (group, wanted) in self.batch.wanted().chunks(size).enumerate() {
            let group = Group { first: group * size, wanted };
            let arranged = self.arrange(wanted);
            self.head_of(member, local, norm, head, group, &arranged)?;
            // What the screen left open, once more with all logits.
            let unsettled = self.unsettled(wanted.len());
            if unsettled.count > 0 {
                self.head_of(member, local, norm, head, group, &unsettled)?;
            }
        }
        Ok(())
    }

    /// Norm, head and sampler for some positions of a group.
    ///
    /// # Errors
    ///
    /// [`Poisoned`] if another thread panicked.
    fn head_of(
        &self,
        member: &mut Member<'_>,
        local: &mut Local,
        norm: &[f32],
        head: FloatMatrix<'_>,
        group: Group<'_>,
        arranged: &Arranged,
    ) -> Result<(), Poisoned> {
        let planes = &self.planes;
        let (hidden, vocab) = (planes.head_input.width(), planes.logits.width());
        let (order, whole) = (&arranged.order[..arranged.count], arranged.whole);
        let n = order.len();
        while let Some(range) = member.take(&self.queue, 1, n) {
            for place in range {
                let wanted = group.wanted[order[place]];
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
            let positions =
                Positions { wanted: group.wanted, order: &order[whole..], first: whole };
            self.screened(member, local, head, screen, positions);
            self.meet(member, local, Part::Head)?;
        }
        while let Some(range) = member.take(&self.queue, 1, n) {
            for place in range {
                let index = order[place];
                let result = self.finish(member, local, head, group.wanted[index], place, whole);
                self.progress.note_unsettled(index, result.is_none());
                if let Some(result) = result {
                    self.results.row(member, group.first + index)[0] = result;
                }
            }
        }
        self.meet(member, local, Part::Head)
    }

    /// Puts the positions that need all logits before those that are screened.
    fn arrange(&self, wanted: &[Wanted]) -> Arranged {
        let vocab = self.planes.logits.width();
        let may_screen = self.shortcuts.screen && self.backend.screening_pays();
        let has_screen = may_screen && self.model.screen().is_some();
        let can_screen = |wanted: &Wanted| {
            let output = &self.batch.row_of(wanted.token).output;
            let tries = |need: Need| self.tries_cuts || !need.is_cut();
            has_screen && Need::of(output, vocab).is_some_and(tries)
        };
        let screened = wanted.iter().filter(|wanted| can_screen(wanted)).count();
        let pays = screened == wanted.len() || screened >= LEAST_BESIDE_WHOLE;
        let mut arranged = Arranged::default();
        for is_screened in [false, true] {
            for (index, wanted) in wanted.iter().enumerate() {
                if (pays && can_screen(wanted)) == is_screened {
                    arranged.put(index);
                }
            }
            if !is_screened {
                arranged.whole = arranged.count;
            }
        }
        arranged
    }

    /// The positions, of a group of so many, that the phase before did not settle.
    fn unsettled(&self, positions: usize) -> Arranged {
        let mut arranged = Arranged::default();
        for index in (0..positions).filter(|index| self.progress.is_unsettled(*index)) {
            arranged.put(index);
        }
        arranged.whole = arranged.count;
        arranged
    }

    /// What a position wants of its logits, which are in row `place` of their plane, whole in the first
    /// `whole` rows. Its row fails if they are not finite. `None` if that takes all of them.
    fn finish(
        &self,
        member: &Member<'_>,
        local: &mut Local,
        head: FloatMatrix<'_>,
        wanted: Wanted,
        place: usize,
        whole: usize,
    ) -> Option<PositionResult> {
        let token = self.batch.tokens()[wanted.token];
        if self.batch.has_failed(token.row) {
            return Some(PositionResult::Nothing);
        }
        let (plane, vocab) = (&self.planes.logits, self.planes.logits.width());
        let logits = &plane.read(member)[place * vocab..][..vocab];
        let output = &self.batch.row_of(wanted.token).output;
        let is_screened = place >= whole;
        let result = match self.cut_of(output).filter(|_| is_screened) {
            Some(parameters) => {
                let width = head.cols();
                let question = Question {
                    backend: self.backend,
                    head,
                    x: &self.planes.head_input.read(member)[place * width..][..width],
                    logits,
                    bounds: &plane.read(member)[bounds_row(plane.rows(), place) * vocab..][..vocab],
                    parameters,
                    position: token.position + 1,
                };
                let screen = local.screen.as_mut().expect("the last stage can screen");
                let settled =
                    self.samplers.with(|scratch| question.settle(&mut screen.settle, scratch));
                settled.map(|Settled { token, rows }| {
                    self.progress.count_cut(token.is_none());
                    let profile = &mut local.record.profile;
                    profile.exact_rows += rows as u64;
                    profile.weight_bytes += (rows * width * size_of::<u16>()) as u64;
                    token.map(PositionResult::of_token)
                })
            }
            // Screened logits were looked at when they were computed.
            None if is_screened || sampler::all_finite(logits) => self.samplers.with(|scratch| {
                evaluate(self.backend, logits, output, wanted, token.position, scratch).map(Some)
            }),
            None => Err(sampler::NotFinite),
        };
        result.unwrap_or_else(|sampler::NotFinite| {
            self.batch.fail(token.row);
            Some(PositionResult::Nothing)
        })
    }

    /// The parameters of a draw whose cuts need a sum over all tokens.
    fn cut_of<'o>(&self, output: &'o Output) -> Option<&'o SamplingParameters> {
        let (Output::Sample(parameters) | Output::Draw(parameters)) = output else { return None };
        let need = Need::of(output, self.planes.logits.width());
        need.is_some_and(Need::is_cut).then_some(&**parameters)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_that_stay_open_are_tried_seldom() {
        let mut luck = Luck::default();
        for _ in 0..Luck::LEAST {
            assert!(luck.tries());
            luck.note((1, 1));
        }
        for _ in 0..3 {
            assert!((0..Luck::SKIPPED_MOST).all(|_| !luck.tries()));
            assert!(luck.tries());
            luck.note((1, 1));
        }
        // Settled ones bring it back.
        luck.note((40, 0));
        assert!(luck.tries() && luck.tries());
        // And it does not remember for ever.
        for _ in 0..1000 {
            luck.note((16, 0));
        }
        assert!(luck.tried <= Luck::MEMORY);
    }
}
