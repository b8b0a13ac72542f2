//! Records to dense weights, and weights to codes.

use anyhow::{Result, ensure};

use crate::device::Element;
use crate::device::ops::{Dequantize, QuantizeAbsmax, QuantizeNf4};
use crate::quant::record::{BLOCK, Dtype, Encoding, RECORD_WEIGHTS, SUPERBLOCK};

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

impl<A: HalfType> Cuda<A> {
    pub(super) fn quantize_blocks(&self, args: QuantizeNf4<'_, Cuda<A>>) -> Result<()> {
        let QuantizeNf4 { codes, absmax, weights } = args;
        let (n, blocks) = (weights.len(), absmax.len());
        ensure!(codes.len() == n.div_ceil(2) && blocks == n.div_ceil(BLOCK), "quantize: {n} weights");
        // Eight warps a thread block.
        let args = args![codes, absmax, weights, n as u64, self.tables.thresholds()];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("quantize_nf4", Grid::rows(blocks.div_ceil(8)), args) }
    }

    pub(super) fn quantize_superblocks(&self, args: QuantizeAbsmax<'_, Cuda<A>>) -> Result<()> {
        let QuantizeAbsmax { codes, nested_absmax, absmax, offset } = args;
        let (n, superblocks) = (absmax.len(), nested_absmax.len());
        ensure!(codes.len() == n && superblocks == n.div_ceil(SUPERBLOCK), "quantize: {n} absmax values");
        let args = args![codes, nested_absmax, absmax, n as u64, offset, self.tables.map()];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("quantize_absmax", Grid::rows(superblocks), args) }
    }

    /// `nf4` and `plain` name the kernels for T.
    pub(super) fn dequantize_records<T: Element>(
        &self,
        args: Dequantize<'_, Cuda<A>, T>,
        nf4: &str,
        plain: &str,
    ) -> Result<()> {
        let Dequantize { weights, records, encoding } = args;
        let (len, bytes) = (weights.len(), encoding.tensor_bytes(weights.len()));
        ensure!(records.len() == bytes, "{} bytes of records for {len} weights: {bytes} expected", records.len());
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
