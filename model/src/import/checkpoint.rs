//! A checkpoint whose every tensor was found and has its right shape, whatever file holds it.

use kernels::FloatKind;

use super::ImportError;
use super::matrix::{Floats, Matrix, StoredFloats};
use crate::config::ModelConfig;
use crate::layout::{Norm, Projection};
use crate::manifest::Provenance;
use crate::writer::{Content, FloatRows, ModelText, NormPlace, TernaryRows};

/// Share of zeros, in percent, outside which a matrix is odd: trained ones have 30 to 50.
const ZERO_PERCENT_USUAL: std::ops::RangeInclusive<u64> = 5..=95;
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
    /// Least and greatest effective scale seen, per projection.
    pub(super) scales: std::cell::RefCell<[(f32, f32); 7]>,
    pub(super) odd_matrices: usize,
}

/// Scales before any was seen.
pub(super) const NO_SCALES: [(f32, f32); 7] = [(f32::INFINITY, 0.0); 7];

impl Checkpoint<'_> {
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
        let (least, most) = &mut self.scales.borrow_mut()[projection as usize];
        *least = least.min(matrix.scale());
        *most = most.max(matrix.scale());
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
        let scales = self.scales.borrow();
        for (projection, (least, most)) in Projection::ALL.into_iter().zip(*scales) {
            notes.push(format!("effective scale of {}: {least} to {most}", projection.name()));
        }
        let (source, format) = (self.source.clone(), self.format.clone());
        Provenance { source, format, notes }
    }
}
