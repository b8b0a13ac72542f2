//! The tensors of each unit: a layer, or a piece of the head.

use anyhow::Result;

use crate::model::spec::{ModelSpec, TensorSpec};
use crate::quant::record::{Dtype, Encoding};

use super::layout::UnitTensor;

/// Vocabulary rows of a head piece. The number is fixed, because sums over pieces decide bits of the result.
pub const HEAD_PIECE_ROWS: usize = 4096;

/// A part of the model that is gathered and freed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unit {
    Layer(usize),
    HeadPiece(usize),
}

impl std::fmt::Display for Unit {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Unit::Layer(i) => write!(f, "layer {i}"),
            Unit::HeadPiece(i) => write!(f, "head piece {i}"),
        }
    }
}

/// The number of units of each kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NumUnits {
    pub layers: usize,
    pub head_pieces: usize,
}

impl NumUnits {
    pub fn new(spec: &ModelSpec) -> NumUnits {
        NumUnits { layers: spec.num_layers(), head_pieces: spec.vocab_size.div_ceil(HEAD_PIECE_ROWS) }
    }

    /// All units, layers first: the order of shard files.
    pub fn all(self) -> impl Iterator<Item = Unit> {
        (0..self.layers).map(Unit::Layer).chain((0..self.head_pieces).map(Unit::HeadPiece))
    }

    /// Index of a unit in [`NumUnits::all`].
    pub fn idx(self, unit: Unit) -> usize {
        match unit {
            Unit::Layer(i) => i,
            Unit::HeadPiece(i) => self.layers + i,
        }
    }

    pub fn count(self) -> usize {
        self.layers + self.head_pieces
    }
}

/// Decides how each tensor of the base is stored.
pub trait Encodings {
    /// Encoding of a linear module's weight.
    fn linear(&self, name: &str) -> Result<Encoding>;
    /// Element type of a tensor that stays plain.
    fn plain(&self, name: &str) -> Result<Dtype>;
}

/// Rows of the vocabulary in a head piece.
pub fn head_piece_rows(spec: &ModelSpec, piece: usize) -> std::ops::Range<usize> {
    piece * HEAD_PIECE_ROWS..((piece + 1) * HEAD_PIECE_ROWS).min(spec.vocab_size)
}

/// The tensors of a unit, a layer's in the order of [`LayerSpec::tensors`](crate::model::spec::LayerSpec::tensors).
pub fn tensors(spec: &ModelSpec, encodings: &dyn Encodings, unit: Unit) -> Result<Vec<UnitTensor>> {
    let stored = |tensor: TensorSpec, elements: std::ops::Range<usize>| -> Result<UnitTensor> {
        let encoding = match tensor.is_linear() {
            true => encodings.linear(&tensor.name)?,
            false => Encoding::Plain(encodings.plain(&tensor.name)?),
        };
        Ok(UnitTensor { id: tensor.id, name: tensor.name, elements, encoding })
    };
    match unit {
        Unit::HeadPiece(piece) => {
            let rows = head_piece_rows(spec, piece);
            Ok(vec![stored(spec.head_tensor(), rows.start * spec.hidden_size..rows.end * spec.hidden_size)?])
        }
        Unit::Layer(layer) => {
            let whole = |tensor: TensorSpec| {
                let elements = 0..tensor.num_elements();
                stored(tensor, elements)
            };
            spec.layers[layer].tensors().into_iter().map(whole).collect()
        }
    }
}
