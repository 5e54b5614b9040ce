//! The end of the model, for the positions that want it: final norm, logits, and what is asked of
//! them.

use kernels::{Backend, FloatMatrix};
use proto::step::{Output, Sampled};

use super::barrier::Poisoned;
use super::buffers::Local;
use super::profile::Part;
use super::rows::{Batch, Wanted};
use super::sampler;
use super::shared::{Buffer, Member};
use super::step::{Step, share};

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

/// Room for the result of every wanted position of `batch`.
pub(super) fn results(batch: &Batch<'_>) -> Buffer<PositionResult> {
    Buffer::new(PositionResult::Nothing, batch.wanted().len())
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
            let n = wanted.len();
            while let Some(range) = member.take(&self.queue, 1, n) {
                for index in range {
                    let x = &planes.residual.read(member)[wanted[index].token * hidden..][..hidden];
                    let y = planes.head_input.row(member, index);
                    self.backend.rms_norm(x, norm, self.model.config().rms_eps, y);
                }
            }
            self.meet(member, local, Part::Head)?;
            let x = &planes.head_input.read(member)[..n * hidden];
            let count = share(vocab, member);
            while let Some((rows, y)) = planes.logits.columns(member, n, count) {
                let profile = &mut local.record.profile;
                profile.weight_bytes += (rows.len() * hidden * size_of::<u16>()) as u64;
                profile.exact_rows += (rows.len() * n) as u64;
                self.backend.head(head, rows, x, y);
            }
            self.meet(member, local, Part::Head)?;
            while let Some(range) = member.take(&self.queue, 1, n) {
                for index in range {
                    let logits = &planes.logits.read(member)[index * vocab..][..vocab];
                    let result = self.finish(logits, wanted[index], local);
                    self.results.row(member, group * planes.logits.rows() + index)[0] = result;
                }
            }
            self.meet(member, local, Part::Head)?;
        }
        Ok(())
    }

    /// What a position wants of its logits. Its row fails if they are not finite.
    fn finish(&self, logits: &[f32], wanted: Wanted, local: &mut Local) -> PositionResult {
        let token = self.batch.tokens()[wanted.token];
        if self.batch.has_failed(token.row) {
            return PositionResult::Nothing;
        }
        let scratch = local.sampler.as_mut().expect("the last stage has a sampler");
        let row = self.batch.row_of(wanted.token);
        let result = evaluate(self.backend, logits, &row.output, wanted, token.position, scratch);
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
    if !logits.iter().all(|logit| logit.is_finite()) {
        return Err(sampler::NotFinite);
    }
    Ok(match output {
        Output::None => PositionResult::Nothing,
        Output::Sample(parameters) => {
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
