//! The tensors of each unit: a layer, or a piece of the head.

use anyhow::Result;

use crate::model::config::ModelConfig;
use crate::model::names::{self, Projection};
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
    pub fn new(config: &ModelConfig) -> NumUnits {
        NumUnits { layers: config.num_hidden_layers, head_pieces: config.vocab_size.div_ceil(HEAD_PIECE_ROWS) }
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
    /// `encoding` of a projection's weight.
    fn projection(&self, name: &str) -> Result<Encoding>;
    /// Element type of a tensor that stays plain.
    fn plain(&self, name: &str) -> Result<Dtype>;
}

/// Rows of the vocabulary in a head piece.
pub fn head_piece_rows(config: &ModelConfig, piece: usize) -> std::ops::Range<usize> {
    piece * HEAD_PIECE_ROWS..((piece + 1) * HEAD_PIECE_ROWS).min(config.vocab_size)
}

/// The tensor that holds the head's rows.
pub fn head_tensor(config: &ModelConfig) -> &'static str {
    if config.tie_word_embeddings { names::EMBED_TOKENS } else { names::LM_HEAD }
}

/// The tensors of a unit, norms, weights and biases in the order of `model::weights`.
pub fn tensors(config: &ModelConfig, encodings: &dyn Encodings, unit: Unit) -> Result<Vec<UnitTensor>> {
    let plain = |name: String, elements: std::ops::Range<usize>| -> Result<UnitTensor> {
        let encoding = Encoding::Plain(encodings.plain(&name)?);
        Ok(UnitTensor { name, elements, encoding })
    };
    match unit {
        Unit::HeadPiece(piece) => {
            let rows = head_piece_rows(config, piece);
            let elements = rows.start * config.hidden_size..rows.end * config.hidden_size;
            Ok(vec![plain(head_tensor(config).to_string(), elements)?])
        }
        Unit::Layer(layer) => {
            let mut tensors = Vec::new();
            for name in [names::input_layernorm(layer), names::post_attention_layernorm(layer)] {
                tensors.push(plain(name, 0..config.hidden_size)?);
            }
            for projection in Projection::ALL {
                let [out_features, in_features] = projection.shape(config);
                let name = names::weight(layer, projection);
                let encoding = encodings.projection(&name)?;
                tensors.push(UnitTensor { name, elements: 0..out_features * in_features, encoding });
            }
            for projection in Projection::ALL.into_iter().filter(|p| p.has_bias(config)) {
                let [out_features, _] = projection.shape(config);
                tensors.push(plain(names::bias(layer, projection), 0..out_features)?);
            }
            Ok(tensors)
        }
    }
}
