//! The record: the smallest part of a tensor that a shard may hold.
//!
//! A tensor is stored as records of [`RECORD_WEIGHTS`] weights (one superblock of NF4), the last one possibly
//! shorter. A record carries all that is needed to dequantize it, so any run of records is a tensor range of its own.
//! Its parts each begin at a multiple of [`RECORD_ALIGN_BYTES`]:
//!
//! | encoding | parts |
//! |---|---|
//! | NF4, double quantization | `nested_absmax` f32, `offset` f32; 8-bit absmax codes, one a block; NF4 codes, two a byte |
//! | NF4 | absmax f32, one a block; NF4 codes |
//! | plain | the weights as they are in the base |

use std::ops::Range;

/// Weights that share one absmax.
pub const BLOCK: usize = 64;
/// Absmax values that share one scale.
pub const SUPERBLOCK: usize = 256;
/// Weights of a full record.
pub const RECORD_WEIGHTS: usize = BLOCK * SUPERBLOCK;
/// Every part of a record begins at a multiple of this, because a GPU loads 16 bytes at once.
pub const RECORD_ALIGN_BYTES: usize = 16;

/// Element type of plain weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }

    /// Returns its name in safetensors.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
        }
    }
}

/// The form in which the weights of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    Nf4 { double_quant: bool },
    Plain(Dtype),
}

/// The place of each part in a record of some number of weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordParts {
    /// `nested_absmax` and `offset` (double quantization only).
    pub scale: Range<usize>,
    /// u8 or f32 absmax, one a block.
    pub absmax: Range<usize>,
    /// NF4 codes, first weight in the high nibble, or plain weights.
    pub codes: Range<usize>,
    /// Size of the whole record.
    pub bytes: usize,
}

impl Encoding {
    /// Layout of a record of `num_weights` ≤ [`RECORD_WEIGHTS`].
    pub fn parts(self, num_weights: usize) -> RecordParts {
        let blocks = num_weights.div_ceil(BLOCK);
        let (scale, absmax, codes): (usize, usize, usize) = match self {
            Encoding::Nf4 { double_quant: true } => (8, blocks, num_weights.div_ceil(2)),
            Encoding::Nf4 { double_quant: false } => (0, 4 * blocks, num_weights.div_ceil(2)),
            Encoding::Plain(dtype) => (0, 0, num_weights * dtype.size_bytes()),
        };
        let absmax_begin = scale.next_multiple_of(RECORD_ALIGN_BYTES);
        let codes_begin = (absmax_begin + absmax).next_multiple_of(RECORD_ALIGN_BYTES);
        RecordParts {
            scale: 0..scale,
            absmax: absmax_begin..absmax_begin + absmax,
            codes: codes_begin..codes_begin + codes,
            bytes: (codes_begin + codes).next_multiple_of(RECORD_ALIGN_BYTES),
        }
    }

    /// Bytes of all records of a tensor of `num_weights`.
    pub fn tensor_bytes(self, num_weights: usize) -> usize {
        let full = num_weights / RECORD_WEIGHTS;
        let rest = num_weights % RECORD_WEIGHTS;
        full * self.parts(RECORD_WEIGHTS).bytes + if rest > 0 { self.parts(rest).bytes } else { 0 }
    }

    /// Short name in file names and messages.
    pub fn name(self) -> &'static str {
        match self {
            Encoding::Nf4 { double_quant: true } => "nf4+dq",
            Encoding::Nf4 { double_quant: false } => "nf4",
            Encoding::Plain(dtype) => dtype.name(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_record_of_double_quantization_costs_half_a_byte_and_a_bit_more() {
        let parts = Encoding::Nf4 { double_quant: true }.parts(RECORD_WEIGHTS);
        assert_eq!((parts.scale, parts.absmax, parts.codes, parts.bytes), (0..8, 16..272, 272..8464, 8464));
        assert_eq!(Encoding::Nf4 { double_quant: false }.parts(RECORD_WEIGHTS).bytes, 1024 + 8192);
        assert_eq!(Encoding::Plain(Dtype::Bf16).tensor_bytes(RECORD_WEIGHTS + 1), 2 * RECORD_WEIGHTS + 16);
        assert_eq!(Encoding::Nf4 { double_quant: true }.parts(65).absmax, 16..18);
    }
}
