//! Records to dense weights, and weights to codes.

use anyhow::Result;

use crate::device::{Dequantize, Element, Nf4Ops, QuantizeAbsmax, QuantizeNf4};
use crate::quant::record::{Dtype, Encoding, RECORD_WEIGHTS};

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

impl<A: HalfType> Nf4Ops for Cuda<A> {
    fn dequantize(&self, parts: Vec<Dequantize<'_, Cuda<A>, A>>) -> Result<()> {
        self.dequantize_by(parts, "dequantize_nf4", "convert")
    }

    fn dequantize_f32(&self, parts: Vec<Dequantize<'_, Cuda<A>, f32>>) -> Result<()> {
        self.dequantize_by(parts, "dequantize_nf4_f32", "convert_f32")
    }

    fn quantize_nf4(&self, args: QuantizeNf4<'_, Cuda<A>>) -> Result<()> {
        let n = args.num_weights()?;
        let QuantizeNf4 { codes, absmax, weights } = args;
        let blocks = absmax.len();
        // Eight warps a thread block.
        let args = args![codes, absmax, weights, n as u64, self.tables.thresholds()];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("quantize_nf4", Grid::rows(blocks.div_ceil(8)), args) }
    }

    fn quantize_absmax(&self, args: QuantizeAbsmax<'_, Cuda<A>>) -> Result<()> {
        let n = args.num_blocks()?;
        let QuantizeAbsmax { codes, nested_absmax, absmax, offset } = args;
        let superblocks = nested_absmax.len();
        let args = args![codes, nested_absmax, absmax, n as u64, offset, self.tables.map()];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("quantize_absmax", Grid::rows(superblocks), args) }
    }
}

/// Number of tensors, or parts of them, that one launch dequantizes: twice the length of `Parts` in kernels/nf4.cu.
pub const DEQUANTIZED_TOGETHER: usize = 8;

impl<A: HalfType> Cuda<A> {
    /// Dequantizes with the kernels that `nf4` and `plain` name: neighbours of one encoding in one launch.
    fn dequantize_by<T: Element>(&self, parts: Vec<Dequantize<'_, Cuda<A>, T>>, nf4: &str, plain: &str) -> Result<()> {
        for group in parts.chunk_by(|a, b| a.encoding == b.encoding) {
            for parts in group.chunks(DEQUANTIZED_TOGETHER) {
                self.dequantize_group(parts, nf4, plain)?;
            }
        }
        Ok(())
    }

    /// Dequantizes up to [`DEQUANTIZED_TOGETHER`] parts of one encoding.
    fn dequantize_group<T: Element>(&self, parts: &[Dequantize<'_, Cuda<A>, T>], nf4: &str, plain: &str) -> Result<()> {
        let (mut listed, mut num_records) = ([[0u64; 3]; DEQUANTIZED_TOGETHER], 0);
        for (place, part) in listed.iter_mut().zip(parts) {
            let len = part.num_weights()?;
            num_records += len.div_ceil(RECORD_WEIGHTS);
            *place = [part.weights.addr() as u64, part.records.addr() as u64, len as u64];
        }
        let (some, others) = (&listed[..DEQUANTIZED_TOGETHER / 2], &listed[DEQUANTIZED_TOGETHER / 2..]);
        let Some(Dequantize { encoding, .. }) = parts.first() else { return Ok(()) };
        let record_bytes = encoding.parts(RECORD_WEIGHTS).bytes as u64;
        let grid = Grid::rows(num_records);
        match encoding {
            Encoding::Nf4 { double_quant } => {
                let (codebook, map) = (self.tables.codebook(), self.tables.map());
                let args = args![some, others, record_bytes, u32::from(*double_quant), codebook, map];
                // SAFETY: the lengths were checked above; the kernel declares these arguments in this order, and takes a block a record.
                unsafe { self.launch(nf4, grid, args) }
            }
            Encoding::Plain(dtype) => {
                let dtype: u32 = match dtype {
                    Dtype::F32 => 0,
                    Dtype::F16 => 1,
                    Dtype::Bf16 => 2,
                };
                // SAFETY: as above.
                unsafe { self.launch(plain, grid, args![some, others, record_bytes, dtype]) }
            }
        }
    }
}
