//! Records to dense weights.

use anyhow::{Result, ensure};

use crate::device::Element;
use crate::device::ops::Dequantize;
use crate::quant::record::{Dtype, Encoding, RECORD_WEIGHTS};

use super::{Cuda, HalfType};
use super::launch::{Grid, args};

impl<A: HalfType> Cuda<A> {
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
                self.launch(nf4, Grid::rows(len.div_ceil(RECORD_WEIGHTS)), args)
            }
            Encoding::Plain(dtype) => {
                let dtype: u32 = match dtype {
                    Dtype::F32 => 0,
                    Dtype::F16 => 1,
                    Dtype::Bf16 => 2,
                };
                self.launch(plain, Grid::elements(len), args![weights, records, len as u64, record_bytes, dtype])
            }
        }
    }
}
