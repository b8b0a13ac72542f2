//! Records to dense weights, and weights to codes.

use anyhow::Result;

use crate::device::{Dequantize, Element, Nf4Ops, QuantizeAbsmax, QuantizeNf4};
use crate::quant::record::{Dtype, Encoding, RECORD_WEIGHTS};

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

impl<A: HalfType> Nf4Ops for Cuda<A> {
    fn dequantize(&self, args: Dequantize<'_, Cuda<A>, A>) -> Result<()> {
        self.dequantize_by(args, "dequantize_nf4", "convert")
    }

    fn dequantize_f32(&self, args: Dequantize<'_, Cuda<A>, f32>) -> Result<()> {
        self.dequantize_by(args, "dequantize_nf4_f32", "convert_f32")
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

impl<A: HalfType> Cuda<A> {
    /// Dequantizes with the kernels that `nf4` and `plain` name.
    fn dequantize_by<T: Element>(&self, args: Dequantize<'_, Cuda<A>, T>, nf4: &str, plain: &str) -> Result<()> {
        let len = args.num_weights()?;
        let Dequantize { weights, records, encoding } = args;
        let record_bytes = encoding.parts(RECORD_WEIGHTS).bytes as u64;
        match encoding {
            Encoding::Nf4 { double_quant } => {
                let (codebook, map) = (self.tables.codebook(), self.tables.map());
                let args = args![weights, records, len as u64, record_bytes, u32::from(double_quant), codebook, map];
                // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
                unsafe { self.launch(nf4, Grid::rows(len.div_ceil(RECORD_WEIGHTS)), args) }
            }
            Encoding::Plain(dtype) => {
                let dtype: u32 = match dtype {
                    Dtype::F32 => 0,
                    Dtype::F16 => 1,
                    Dtype::Bf16 => 2,
                };
                // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
                unsafe {
                    self.launch(
                        plain,
                        Grid::elements(len.div_ceil(8)),
                        args![weights, records, len as u64, record_bytes, dtype],
                    )
                }
            }
        }
    }
}
