//! The shards of a store, mapped, verified and checked once: after that, handing out weights costs nothing.

use std::io;
use std::ops::Range;
use std::path::Path;

use kernels::{
    ColumnPacker, FloatKind, FloatMatrix, LayoutError, ScreenMatrix, TernaryColumns, TernaryMatrix,
    pack_screen_group,
};

use crate::config::ModelConfig;
use crate::id::{PartDigest, PartHasher};
use crate::layout::{self, ALIGNMENT, DOWN_COLUMNS, Norm, Projection, WEIGHT};
use crate::manifest::Layout;
use crate::safetensors::{Dtype, NewTensor, SafetensorsError, Table};
use crate::weights::WeightFile;

/// Why a shard cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShardError {
    /// The container is broken.
    #[error("the shard is not a valid safetensors file")]
    Container(#[source] SafetensorsError),
    /// The shard has another layout.
    #[error(
        "the shard has layout {name} version {version}, this program reads {}: \
             import the model again",
        Layout::current()
    )]
    Layout {
        /// Its layout.
        name: String,
        /// Its version.
        version: String,
    },
    /// A packed tensor has another layout.
    #[error("tensor {tensor} has layout {found}, expected {expected}: import the model again")]
    TensorLayout {
        /// Its name.
        tensor: &'static str,
        /// Its layout.
        found: String,
        /// The layout that this program reads.
        expected: &'static str,
    },
    /// A tensor is absent.
    #[error("tensor {tensor} is missing")]
    Missing {
        /// Its name.
        tensor: &'static str,
    },
    /// There is a tensor that no such shard has.
    #[error("tensor {tensor} does not belong here")]
    Unknown {
        /// Its name.
        tensor: String,
    },
    /// A tensor has another type or shape than the model demands.
    #[error("tensor {tensor} is {found}, expected {expected}")]
    Tensor {
        /// Its name.
        tensor: &'static str,
        /// Its type and shape.
        found: String,
        /// What the model's shape demands.
        expected: String,
    },
    /// A tensor does not begin where a kernel may load it from.
    #[error("tensor {tensor} begins at byte {offset}, expected a multiple of {alignment}")]
    Alignment {
        /// Its name.
        tensor: &'static str,
        /// Where it begins.
        offset: usize,
        /// What the offset must be a multiple of.
        alignment: usize,
    },
    /// A matrix has no scale, or one that is not a positive number.
    #[error("matrix {tensor} has no usable scale")]
    Scale {
        /// Its name.
        tensor: &'static str,
    },
    /// A matrix holds codes that are no trits.
    #[error("matrix {tensor} is corrupt")]
    Codes {
        /// Its name.
        tensor: &'static str,
        /// The first bad place.
        source: LayoutError,
    },
    /// The screen is not the one of the model's head.
    #[error("the screen of rows {}..{} is not that of the head", rows.start, rows.end)]
    Screen {
        /// The first group of rows that differs.
        rows: Range<usize>,
    },
    /// The two forms of a matrix are not of the same trits.
    #[error("matrices {tensor} and {other} differ")]
    Forms {
        /// Name of the one.
        tensor: &'static str,
        /// Name of the other.
        other: &'static str,
    },
    /// A float is an infinity or not a number.
    #[error("tensor {tensor} holds a number that is not finite")]
    NotFinite {
        /// Its name.
        tensor: &'static str,
    },
}

/// A mapped shard whose tensors are exactly the expected ones. Clones share the memory.
#[derive(Clone, Debug)]
struct Shard {
    file: WeightFile,
    /// Byte ranges in the order in which the tensors were asked for.
    ranges: Vec<Range<usize>>,
    table: Table,
}

impl Shard {
    /// Checks the header of a mapped file against `tensors`.
    fn check(file: WeightFile, tensors: &[NewTensor]) -> Result<Self, ShardError> {
        let table = Table::parse(file.bytes()).map_err(ShardError::Container)?;
        let current = Layout::current();
        let (name, version) = layout::layout_of(&table.metadata);
        if name != current.name || version != current.version.to_string() {
            let (name, version) = (name.to_owned(), version.to_owned());
            return Err(ShardError::Layout { name, version });
        }
        let mut ranges = Vec::with_capacity(tensors.len());
        for NewTensor { name, dtype, shape } in tensors {
            let tensor = *name;
            let found = table.tensors.get(tensor).ok_or(ShardError::Missing { tensor })?;
            if found.dtype != *dtype || found.shape != *shape {
                let describe =
                    |dtype: Dtype, shape: &[usize]| format!("{} {shape:?}", dtype.name());
                return Err(ShardError::Tensor {
                    tensor,
                    found: describe(found.dtype, &found.shape),
                    expected: describe(*dtype, shape),
                });
            }
            let alignment = if *dtype == Dtype::U8 { ALIGNMENT } else { dtype.bytes() };
            if !found.range.start.is_multiple_of(alignment) {
                let offset = found.range.start;
                return Err(ShardError::Alignment { tensor, offset, alignment });
            }
            ranges.push(found.range.clone());
        }
        // Stores of before have columns for every model.
        let is_older = |name: &str| {
            name == DOWN_COLUMNS && layout::layout_of_tensor(&table.metadata, name) != "none"
        };
        let known =
            |name: &&String| tensors.iter().any(|tensor| tensor.name == **name) || is_older(name);
        if let Some(tensor) = table.tensors.keys().find(|name| !known(name)) {
            return Err(ShardError::Unknown { tensor: tensor.clone() });
        }
        Ok(Self { file, ranges, table })
    }

    fn bytes(&self, tensor: usize) -> &[u8] {
        &self.file.bytes()[self.ranges[tensor].clone()]
    }

    /// The same in memory of this process alone.
    fn copied(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.copied()?, ..self.clone() })
    }

    /// A tensor of F32. Alignment and length were checked when the shard was opened.
    fn floats(&self, tensor: usize) -> &[f32] {
        bytemuck::cast_slice(self.bytes(tensor))
    }
}

fn check_finite(tensor: &'static str, values: &[f32]) -> Result<(), ShardError> {
    match values.iter().all(|value| value.is_finite()) {
        true => Ok(()),
        false => Err(ShardError::NotFinite { tensor }),
    }
}

/// The weights of one layer, in a map of their file.
#[derive(Debug)]
pub struct LayerShard {
    shard: Shard,
    /// Rows, columns and scale of each of [`Projection::ALL`].
    matrices: [(usize, usize, f32); 7],
    sub_norms: bool,
}

/// The weights of one layer, borrowed from its shard.
#[derive(Clone, Copy, Debug)]
pub struct LayerWeights<'a> {
    /// Norm before q, k and v, `[hidden]`.
    pub attn_norm: &'a [f32],
    /// Query projection, `[heads * head_dim, hidden]`.
    pub q: TernaryMatrix<'a>,
    /// Key projection, `[kv_heads * head_dim, hidden]`.
    pub k: TernaryMatrix<'a>,
    /// Value projection, `[kv_heads * head_dim, hidden]`.
    pub v: TernaryMatrix<'a>,
    /// Output projection, `[hidden, heads * head_dim]`.
    pub o: TernaryMatrix<'a>,
    /// Norm before `o`, `[heads * head_dim]`.
    pub attn_sub_norm: Option<&'a [f32]>,
    /// Norm before gate and up, `[hidden]`.
    pub ffn_norm: &'a [f32],
    /// Gate projection, `[ffn, hidden]`.
    pub gate: TernaryMatrix<'a>,
    /// Up projection, `[ffn, hidden]`.
    pub up: TernaryMatrix<'a>,
    /// Down projection, `[hidden, ffn]`.
    pub down: TernaryMatrix<'a>,
    /// The same by columns, for one token whose inner values have many zeros; only with squared ReLU.
    pub down_columns: Option<TernaryColumns<'a>>,
    /// Norm before `down`, `[ffn]`.
    pub ffn_sub_norm: Option<&'a [f32]>,
}

impl LayerShard {
    pub(crate) fn new(file: WeightFile, config: &ModelConfig) -> Result<Self, ShardError> {
        let tensors = layout::layer_tensors(config).ok_or(ShardError::Missing { tensor: "q" })?;
        let shard = Shard::check(file, &tensors)?;
        for (tensor, expected) in layout::packed_tensors(config) {
            let found = layout::layout_of_tensor(&shard.table.metadata, tensor);
            if found != expected {
                let found = found.to_owned();
                return Err(ShardError::TensorLayout { tensor, found, expected });
            }
        }
        let mut matrices = [(0, 0, 0.0); 7];
        for (matrix, projection) in matrices.iter_mut().zip(Projection::ALL) {
            let (rows, cols) = projection.shape(config);
            let scale = layout::scale_of(&shard.table.metadata, projection)
                .ok_or(ShardError::Scale { tensor: projection.name() })?;
            *matrix = (rows, cols, scale);
        }
        Ok(Self { shard, matrices, sub_norms: config.sub_norms })
    }

    /// The weights. Costs a few additions.
    pub fn weights(&self) -> LayerWeights<'_> {
        let norm = |index| self.shard.floats(self.packed_tensors() + index);
        let (attn_sub_norm, ffn_norm, ffn_sub_norm) = match self.sub_norms {
            true => (Some(norm(1)), norm(2), Some(norm(3))),
            false => (None, norm(1), None),
        };
        LayerWeights {
            attn_norm: norm(0),
            q: self.matrix(Projection::Q),
            k: self.matrix(Projection::K),
            v: self.matrix(Projection::V),
            o: self.matrix(Projection::O),
            attn_sub_norm,
            ffn_norm,
            gate: self.matrix(Projection::Gate),
            up: self.matrix(Projection::Up),
            down: self.matrix(Projection::Down),
            down_columns: self.down_columns(),
            ffn_sub_norm,
        }
    }

    /// The same weights in memory of this process alone: see [`EmbeddingShard::copied`].
    ///
    /// # Errors
    ///
    /// If there is not so much memory.
    pub fn copied(&self) -> io::Result<Self> {
        Ok(Self { shard: self.shard.copied()?, ..*self })
    }

    /// Reads the weights into memory now, if they are not there: what computes shall not wait for a disk.
    pub fn populate(&self) {
        self.shard.file.mapped().populate();
    }

    /// Keeps the weights in memory, whatever else wants it.
    ///
    /// # Errors
    ///
    /// If the system does not let this process lock so much.
    pub fn lock(&self) -> io::Result<()> {
        self.shard.file.mapped().lock()
    }

    /// The file whose bytes these are.
    pub fn file(&self) -> &WeightFile {
        &self.shard.file
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.shard.file.path()
    }

    /// The bytes of the whole file.
    pub fn bytes(&self) -> &[u8] {
        self.shard.file.bytes()
    }

    fn matrix(&self, projection: Projection) -> TernaryMatrix<'_> {
        let (rows, cols, scale) = self.matrices[projection as usize];
        let bytes = self.shard.bytes(projection as usize);
        TernaryMatrix::new(bytes, projection.arrangement(), rows, cols, scale)
            .expect("the size was compared with the shape when the shard was opened")
    }

    /// The tensors before the norms: the matrices, and columns if there are any.
    fn packed_tensors(&self) -> usize {
        self.shard.ranges.len() - if self.sub_norms { 4 } else { 2 }
    }

    fn down_columns(&self) -> Option<TernaryColumns<'_>> {
        let index = Projection::ALL.len();
        let (rows, cols, scale) = self.matrices[Projection::Down as usize];
        (index < self.packed_tensors()).then(|| {
            TernaryColumns::new(self.shard.bytes(index), rows, cols, scale)
                .expect("the size was compared with the shape when the shard was opened")
        })
    }

    /// Whether the two forms of the down projection hold the same trits. Packs the columns again.
    fn forms_agree(&self, by_columns: TernaryColumns<'_>) -> bool {
        let down = self.matrix(Projection::Down);
        let mut columns = ColumnPacker::new(down.rows(), down.cols())
            .expect("the shape was that of a matrix when the shard was opened");
        let mut trits = vec![0; down.cols()];
        for row in 0..down.rows() {
            down.unpack_row(row, &mut trits);
            columns.row(row, &trits);
        }
        columns.finish() == by_columns.bytes()
    }

    /// Looks at every code and every float, and hashes the content.
    pub(crate) fn verify(&self) -> Result<PartDigest, ShardError> {
        let mut part = PartHasher::new();
        for projection in Projection::ALL {
            let (tensor, matrix) = (projection.name(), self.matrix(projection));
            matrix.check_codes().map_err(|source| ShardError::Codes { tensor, source })?;
            part.ternary(tensor, matrix);
        }
        if let Some(columns) = self.down_columns() {
            let of_columns = |source| ShardError::Codes { tensor: DOWN_COLUMNS, source };
            columns.check_codes().map_err(of_columns)?;
            if !self.forms_agree(columns) {
                let tensor = Projection::Down.name();
                return Err(ShardError::Forms { tensor, other: DOWN_COLUMNS });
            }
        }
        let norms = if self.sub_norms {
            &[Norm::Attn, Norm::AttnSub, Norm::Ffn, Norm::FfnSub][..]
        } else {
            &[Norm::Attn, Norm::Ffn]
        };
        for (index, norm) in norms.iter().enumerate() {
            let values = self.shard.floats(self.packed_tensors() + index);
            check_finite(norm.name(), values)?;
            part.vector(norm.name(), values);
        }
        Ok(part.finish())
    }
}

/// A float matrix in a map of its file: what embedding and head have in common.
#[derive(Clone, Debug)]
struct FloatShard {
    shard: Shard,
    kind: FloatKind,
    rows: usize,
    cols: usize,
}

impl FloatShard {
    fn new(file: WeightFile, config: &ModelConfig) -> Result<Self, ShardError> {
        // Either type is valid, so the file says which.
        let table = Table::parse(file.bytes()).map_err(ShardError::Container)?;
        let kind = match table.tensors.get(WEIGHT).map(|tensor| tensor.dtype) {
            Some(Dtype::F16) => FloatKind::F16,
            _ => FloatKind::Bf16,
        };
        let shard = Shard::check(file, &[layout::float_tensor(config, kind)])?;
        let (rows, cols) = (config.vocab as usize, config.hidden as usize);
        Ok(Self { shard, kind, rows, cols })
    }

    fn matrix(&self) -> FloatMatrix<'_> {
        let bits = bytemuck::cast_slice(self.shard.bytes(0));
        FloatMatrix::new(self.kind, bits, self.rows, self.cols)
            .expect("the size was compared with the shape when the shard was opened")
    }

    fn copied(&self) -> io::Result<Self> {
        Ok(Self { shard: self.shard.copied()?, ..*self })
    }

    fn verify(&self) -> Result<PartDigest, ShardError> {
        let matrix = self.matrix();
        let mut values = vec![0.0; self.cols];
        for row in 0..self.rows {
            matrix.widen_row(row, &mut values);
            check_finite(WEIGHT, &values)?;
        }
        let mut part = PartHasher::new();
        part.float_matrix(WEIGHT, matrix);
        Ok(part.finish())
    }
}

/// The embedding, in a map of its file.
#[derive(Debug)]
pub struct EmbeddingShard(FloatShard);

impl EmbeddingShard {
    pub(crate) fn new(file: WeightFile, config: &ModelConfig) -> Result<Self, ShardError> {
        FloatShard::new(file, config).map(Self)
    }

    /// The file whose bytes these are.
    pub fn file(&self) -> &WeightFile {
        &self.0.shard.file
    }

    /// One row per token, `[vocab, hidden]`.
    pub fn matrix(&self) -> FloatMatrix<'_> {
        self.0.matrix()
    }

    /// The head of a tied model: the same matrix, in the same memory.
    pub fn as_head(&self) -> HeadShard {
        HeadShard(self.0.clone())
    }

    /// The same matrix in memory of this process alone, on huge pages if the system has them, and on
    /// the memory node of the calling thread.
    ///
    /// # Errors
    ///
    /// If there is not so much memory.
    pub fn copied(&self) -> io::Result<Self> {
        self.0.copied().map(Self)
    }

    /// Keeps the matrix in memory, whatever else wants it.
    ///
    /// # Errors
    ///
    /// If the system does not let this process lock so much.
    pub fn lock(&self) -> io::Result<()> {
        self.0.shard.file.mapped().lock()
    }

    pub(crate) fn verify(&self) -> Result<PartDigest, ShardError> {
        self.0.verify()
    }
}

/// The head, in a map of its file; of a tied model, that of the embedding.
#[derive(Debug)]
pub struct HeadShard(FloatShard);

impl HeadShard {
    pub(crate) fn new(file: WeightFile, config: &ModelConfig) -> Result<Self, ShardError> {
        FloatShard::new(file, config).map(Self)
    }

    /// The file whose bytes these are.
    pub fn file(&self) -> &WeightFile {
        &self.0.shard.file
    }

    /// One row per token, `[vocab, hidden]`.
    pub fn matrix(&self) -> FloatMatrix<'_> {
        self.0.matrix()
    }

    /// The same matrix in memory of this process alone: see [`EmbeddingShard::copied`].
    ///
    /// # Errors
    ///
    /// If there is not so much memory.
    pub fn copied(&self) -> io::Result<Self> {
        self.0.copied().map(Self)
    }

    /// Reads the matrix into memory now, if it is not there: what computes shall not wait for a disk.
    pub fn populate(&self) {
        self.0.shard.file.mapped().populate();
    }

    /// Keeps the matrix in memory, whatever else wants it.
    ///
    /// # Errors
    ///
    /// If the system does not let this process lock so much.
    pub fn lock(&self) -> io::Result<()> {
        self.0.shard.file.mapped().lock()
    }

    pub(crate) fn verify(&self) -> Result<PartDigest, ShardError> {
        self.0.verify()
    }
}

/// The final norm, in a map of its file.
#[derive(Debug)]
pub struct NormShard(Shard);

impl NormShard {
    pub(crate) fn new(file: WeightFile, config: &ModelConfig) -> Result<Self, ShardError> {
        Shard::check(file, &[layout::norm_tensor(config)]).map(Self)
    }

    /// The file whose bytes these are.
    pub fn file(&self) -> &WeightFile {
        &self.0.file
    }

    /// The weights, `[hidden]`.
    pub fn weight(&self) -> &[f32] {
        self.0.floats(0)
    }

    /// The same weights in memory of this process alone: see [`EmbeddingShard::copied`].
    ///
    /// # Errors
    ///
    /// If there is not so much memory.
    pub fn copied(&self) -> io::Result<Self> {
        self.0.copied().map(Self)
    }

    /// Keeps the weights in memory, whatever else wants it.
    ///
    /// # Errors
    ///
    /// If the system does not let this process lock so much.
    pub fn lock(&self) -> io::Result<()> {
        self.0.file.mapped().lock()
    }

    pub(crate) fn verify(&self) -> Result<PartDigest, ShardError> {
        check_finite(WEIGHT, self.weight())?;
        let mut part = PartHasher::new();
        part.vector(WEIGHT, self.weight());
        Ok(part.finish())
    }
}

/// The screen of the head, in a map of its file.
#[derive(Debug)]
pub struct ScreenShard {
    shard: Shard,
    rows: usize,
    cols: usize,
}

impl ScreenShard {
    pub(crate) fn new(file: WeightFile, config: &ModelConfig) -> Result<Self, ShardError> {
        let tensor = layout::screen_tensor(config).ok_or(ShardError::Missing { tensor: WEIGHT })?;
        let shard = Shard::check(file, &[tensor])?;
        Ok(Self { shard, rows: config.vocab as usize, cols: config.hidden as usize })
    }

    /// The file whose bytes these are.
    pub fn file(&self) -> &WeightFile {
        &self.shard.file
    }

    /// One row per token, `[vocab, hidden]`.
    pub fn matrix(&self) -> ScreenMatrix<'_> {
        self.view()
    }

    /// The same screen in memory of this process alone: see [`EmbeddingShard::copied`].
    ///
    /// # Errors
    ///
    /// If there is not so much memory.
    pub fn copied(&self) -> io::Result<Self> {
        Ok(Self { shard: self.shard.copied()?, ..*self })
    }

    /// Reads the screen into memory now, if it is not there: what computes shall not wait for a disk.
    pub fn populate(&self) {
        self.shard.file.mapped().populate();
    }

    /// Keeps the screen in memory, whatever else wants it.
    ///
    /// # Errors
    ///
    /// If the system does not let this process lock so much.
    pub fn lock(&self) -> io::Result<()> {
        self.shard.file.mapped().lock()
    }

    fn view(&self) -> ScreenMatrix<'_> {
        ScreenMatrix::new(self.shard.bytes(0), self.rows, self.cols)
            .expect("the size was compared with the shape when the shard was opened")
    }

    /// Makes the screen of `head` again and compares.
    pub(crate) fn verify(&self, head: &HeadShard) -> Result<(), ShardError> {
        let group_bytes = ScreenMatrix::group_bytes(self.cols);
        let mut values = vec![0.0; ScreenMatrix::GROUP_ROWS.min(self.rows) * self.cols];
        let mut expected = vec![0; group_bytes];
        for (group, found) in self.shard.bytes(0).chunks(group_bytes).enumerate() {
            let start = group * ScreenMatrix::GROUP_ROWS;
            let rows = start..self.rows.min(start + ScreenMatrix::GROUP_ROWS);
            let values = &mut values[..rows.len() * self.cols];
            for (row, values) in rows.clone().zip(values.chunks_exact_mut(self.cols)) {
                head.matrix().widen_row(row, values);
            }
            let views: Vec<&[f32]> = values.chunks_exact(self.cols).collect();
            pack_screen_group(&views, self.cols, &mut expected);
            if expected != found {
                return Err(ShardError::Screen { rows });
            }
        }
        Ok(())
    }
}
