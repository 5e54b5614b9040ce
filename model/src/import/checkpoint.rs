//! A checkpoint whose every tensor was found and has its right shape, whatever file holds it.

use std::cell::RefCell;
use std::ops::{Range, RangeInclusive};

use kernels::FloatKind;

use super::matrix::{Floats, Matrix, StoredFloats, Trits};
use super::{ImportError, ImportOptions, LLAMA3_VOCAB, Scales};
use crate::config::{Activation, ModelConfig};
use crate::layout::{Norm, Projection};
use crate::manifest::Provenance;
use crate::writer::{Content, FloatRows, ModelText, NormPlace, TernaryRows};

/// Share of zeros, in percent, outside which a matrix is odd: trained ones have 30 to 50.
const ZERO_PERCENT_USUAL: RangeInclusive<u64> = 5..=95;
/// Weights from which on a matrix without any zero, or of nothing else, cannot be chance.
const ZEROS_TELL_FROM: u64 = 4096;
/// Notes about odd matrices, so that a hopeless file does not give hundreds.
const ODD_MATRICES_NOTED: usize = 8;

/// The tensors of one layer.
#[derive(Debug)]
pub(super) struct LayerTensors<'a> {
    /// In the order of [`Projection::ALL`].
    pub(super) matrices: Vec<Matrix<'a>>,
    /// In the order of [`Norm::of`].
    pub(super) norms: Vec<Vec<f32>>,
}

/// A whole checkpoint, borrowed from its files.
#[derive(Debug)]
pub(super) struct Checkpoint<'a> {
    pub(super) config: ModelConfig,
    pub(super) text: ModelText,
    pub(super) source: String,
    pub(super) format: String,
    pub(super) notes: Vec<String>,
    pub(super) embedding: Floats<'a>,
    /// `None` if tied.
    pub(super) head: Option<Floats<'a>>,
    pub(super) final_norm: Vec<f32>,
    pub(super) layers: Vec<LayerTensors<'a>>,
    pub(super) seen: RefCell<Seen>,
    pub(super) odd_matrices: usize,
}

/// What came to light when matrices were read.
#[derive(Debug)]
pub(super) struct Seen {
    /// Least and greatest effective scale, per projection.
    scales: [(f32, f32); 7],
    /// Matrices of master weights that were ternary already.
    were_ternary: usize,
}

impl Default for Seen {
    fn default() -> Self {
        Self { scales: [(f32::INFINITY, 0.0); 7], were_ternary: 0 }
    }
}

/// Effective scales that training gives: 0.005 to 0.1 in models of Llama's type, 1.2 to 1.6 in BitNet
/// b1.58 2B4T; with room on both sides.
const SCALES_USUAL: RangeInclusive<f32> = 1e-4..=8.0;
/// The inverses of the scales of BitNet b1.58 2B4T, with room on the lower side.
const SCALES_INVERTED: Range<f32> = 0.5..1.0;
/// What is said of ternary weights of which nothing says what they were trained with.
pub(super) const FLOAT_ACTIVATIONS: &str = "warning: the source does not say that activations are \
     int8, as they are here: a model that was trained with float ones (TriLM) is approximated";

impl Checkpoint<'_> {
    /// Looks for scales that are the inverses of what they should be, as one of the converters of
    /// BitNet b1.58 2B4T leaves them: every product would be off by the square.
    pub(super) fn settle_scales(&mut self, options: &ImportOptions) -> Result<(), ImportError> {
        if let Some(scales) = options.scales {
            self.notes.push(format!("scales: {scales}, as asked for"));
            for matrix in self.layers.iter_mut().flat_map(|layer| &mut layer.matrices) {
                matrix.inverted = scales == Scales::Inverted;
                if matrix.inverted && matches!(matrix.trits, Trits::Masters(_)) {
                    return Err(ImportError::Unsupported(format!(
                        "{} has no scale that could be inverted: that of master weights is computed",
                        matrix.tensor
                    )));
                }
            }
            return Ok(());
        }
        if !self.config.sub_norms || self.config.activation != Activation::SquaredRelu {
            return Ok(());
        }
        let (mut least, mut most) = (f32::INFINITY, 0f32);
        for matrix in &self.layers[0].matrices {
            // Their scale is computed here.
            if matches!(matrix.trits, Trits::Masters(_)) {
                return Ok(());
            }
            let scale = matrix.resolve()?.scale();
            (least, most) = (least.min(scale), most.max(scale));
        }
        if !(SCALES_INVERTED.contains(&least) && SCALES_INVERTED.contains(&most)) {
            return Ok(());
        }
        let found = format!(
            "the scales of the first layer are {least} to {most}, those of BitNet b1.58 2B4T 1.2 to 1.6"
        );
        if self.config.vocab == LLAMA3_VOCAB {
            return Err(ImportError::Unsupported(format!(
                "{found}: a converter that divides by them leaves their inverses, and every product \
                 off by the square; say --scales inverted to put them right, or --scales stored"
            )));
        }
        self.notes.push(format!("warning: {found}: are they inverses? (--scales inverted)"));
        Ok(())
    }

    /// Reads every row of everything, and writes nothing.
    pub(super) fn check(mut self) -> Result<ModelConfig, ImportError> {
        self.config.validate()?;
        let config = self.config.clone();
        for layer in 0..config.layers {
            for projection in Projection::ALL {
                let (rows, cols) = projection.shape(&config);
                let mut matrix = self.projection(layer, projection)?;
                let (mut trits, mut zeros) = (vec![0; cols], 0);
                for row in 0..rows {
                    matrix.row(row, &mut trits)?;
                    zeros += trits.iter().filter(|trit| **trit == 0).count() as u64;
                }
                drop(matrix);
                self.check_zeros(layer, projection, zeros, rows as u64 * cols as u64)?;
            }
        }
        let head = if config.tied_head { None } else { Some(self.head()?) };
        for mut floats in [self.embedding()?].into_iter().chain(head) {
            let mut bits = vec![0; config.hidden as usize];
            (0..config.vocab as usize).try_for_each(|row| floats.row(row, &mut bits))?;
        }
        Ok(config)
    }
}

impl Content for Checkpoint<'_> {
    type Error = ImportError;

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn text(&self) -> &ModelText {
        &self.text
    }

    fn norm(&self, place: NormPlace) -> Result<Vec<f32>, ImportError> {
        Ok(match place {
            NormPlace::Final => self.final_norm.clone(),
            NormPlace::Layer(layer, norm) => {
                let norms = &self.layers[layer as usize].norms;
                let index = Norm::of(&self.config).iter().position(|of| *of == norm);
                norms[index.expect("only norms of this model are asked for")].clone()
            }
        })
    }

    fn projection(
        &self,
        layer: u32,
        projection: Projection,
    ) -> Result<Box<dyn TernaryRows<ImportError> + '_>, ImportError> {
        let matrix = self.layers[layer as usize].matrices[projection as usize].resolve()?;
        let mut seen = self.seen.borrow_mut();
        let (least, most) = &mut seen.scales[projection as usize];
        *least = least.min(matrix.scale());
        *most = most.max(matrix.scale());
        seen.were_ternary += usize::from(matrix.was_ternary);
        Ok(Box::new(matrix))
    }

    fn embedding(&self) -> Result<Box<dyn FloatRows<ImportError> + '_>, ImportError> {
        Ok(Box::new(StoredFloats::choose(&self.embedding)?.0))
    }

    fn head(&self) -> Result<Box<dyn FloatRows<ImportError> + '_>, ImportError> {
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        Ok(Box::new(StoredFloats::choose(head)?.0))
    }

    fn check_zeros(
        &mut self,
        layer: u32,
        projection: Projection,
        zeros: u64,
        trits: u64,
    ) -> Result<(), ImportError> {
        let tensor = self.layers[layer as usize].matrices[projection as usize].tensor.clone();
        if (zeros == 0 || zeros == trits) && trits >= ZEROS_TELL_FROM {
            return Err(ImportError::Zeros { tensor, zeros, trits });
        }
        let percent = zeros * 100 / trits;
        if !ZERO_PERCENT_USUAL.contains(&percent) {
            if self.odd_matrices < ODD_MATRICES_NOTED {
                self.notes.push(format!("warning: {percent} % of {tensor} are zero"));
            }
            self.odd_matrices += 1;
        }
        Ok(())
    }

    fn provenance(&self) -> Provenance {
        let mut notes = self.notes.clone();
        for floats in [&self.embedding].into_iter().chain(&self.head) {
            // Failed before, if it can fail.
            if let Ok((stored, note)) = StoredFloats::choose(floats) {
                let kind = match stored.kind() {
                    FloatKind::F16 => "f16",
                    FloatKind::Bf16 => "bf16",
                };
                notes.push(note.unwrap_or_else(|| format!("{} is kept as {kind}", floats.tensor)));
            }
        }
        let seen = self.seen.borrow();
        for (projection, (least, most)) in Projection::ALL.into_iter().zip(seen.scales) {
            notes.push(format!("effective scale of {}: {least} to {most}", projection.name()));
        }
        let is_odd = |(least, most): &(f32, f32)| {
            least <= most && !(SCALES_USUAL.contains(least) && SCALES_USUAL.contains(most))
        };
        if seen.scales.iter().any(is_odd) {
            notes.push(format!(
                "warning: scales outside {:e} to {}: was a scale to be multiplied by divided by, or \
                 the other way round?",
                SCALES_USUAL.start(),
                SCALES_USUAL.end()
            ));
        }
        if seen.were_ternary > 0 {
            notes.push(format!(
                "warning: {} matrices of master weights are ternary already, and were taken as they \
                 are (transformers would round them anew and make their scale too small)",
                seen.were_ternary
            ));
        }
        let (source, format) = (self.source.clone(), self.format.clone());
        Provenance { source, format, notes }
    }
}
