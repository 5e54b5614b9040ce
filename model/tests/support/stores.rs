//! Imports what a test wrote, and reads back what the store holds.

use std::fs;
use std::path::Path;

use model::{ImportError, ImportOptions, Imported, LayerWeights, Store, import};

/// A store that exists as long as this value.
pub(crate) struct Stored {
    pub(crate) imported: Imported,
    pub(crate) store: Store,
    _dir: tempfile::TempDir,
}

#[allow(dead_code, reason = "each test file uses some")]
impl Stored {
    /// Imports `source` and verifies the store.
    pub(crate) fn import(source: &Path) -> Result<Self, ImportError> {
        Self::import_with(source, &ImportOptions::default())
    }

    /// The same with choices.
    pub(crate) fn import_with(source: &Path, options: &ImportOptions) -> Result<Self, ImportError> {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("store");
        let imported = import(source, &dest, options, &mut |_| {})?;
        let store = Store::open(&dest).unwrap();
        store.verify(|_| {}).unwrap();
        assert_eq!(store.id(), imported.id);
        Ok(Self { imported, store, _dir: dir })
    }

    /// Imports the bytes of a GGUF file.
    pub(crate) fn of_gguf(bytes: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("model.gguf");
        fs::write(&source, bytes).unwrap();
        Self::import(&source).unwrap()
    }

    /// Whether the import noted something that contains `text`.
    pub(crate) fn notes(&self, text: &str) -> bool {
        self.imported.notes.iter().any(|note| note.contains(text))
    }

    /// Trits and scale of each matrix of a layer, in the order q k v o gate up down.
    pub(crate) fn matrices(&self, layer: u32) -> Vec<(Vec<i8>, f32)> {
        let shard = self.store.layer(layer).unwrap();
        let LayerWeights { q, k, v, o, gate, up, down, .. } = shard.weights();
        let unpack = |matrix: kernels::TernaryMatrix<'_>| {
            let mut trits = vec![0; matrix.rows() * matrix.cols()];
            let rows = trits.chunks_mut(matrix.cols());
            rows.enumerate().for_each(|(row, out)| matrix.unpack_row(row, out));
            (trits, matrix.scale())
        };
        [q, k, v, o, gate, up, down].map(unpack).to_vec()
    }

    /// Type and values of the embedding.
    pub(crate) fn embedding(&self) -> (kernels::FloatKind, Vec<f32>) {
        values(self.store.embedding().unwrap().matrix())
    }

    /// Type and values of the head.
    pub(crate) fn head(&self) -> (kernels::FloatKind, Vec<f32>) {
        values(self.store.head().unwrap().matrix())
    }
}

fn values(matrix: kernels::FloatMatrix<'_>) -> (kernels::FloatKind, Vec<f32>) {
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    let rows = values.chunks_mut(matrix.cols());
    rows.enumerate().for_each(|(row, out)| matrix.widen_row(row, out));
    (matrix.kind(), values)
}
