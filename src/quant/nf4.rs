//! The NF4 code: 16 values, blocks of 64 that share their largest magnitude.
//!
//! Source: bitsandbytes 0.50, `csrc/kernels.cu` (`dQuantizeNF4`, `kQuantizeBlockwise`); where its CPU code differs
//! (all-zero blocks, a short last block), the CUDA kernel is followed.

use anyhow::{Result, ensure};
use rayon::prelude::*;

use super::double::{NestedAbsmax, quantize_absmax};
use super::record::{BLOCK, Encoding, RECORD_WEIGHTS};

/// The 16 values, ascending.
pub const CODEBOOK: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Thresholds between codes: a weight's code is the number of thresholds below it, and a value equal to a threshold
/// takes the lower code. They are the constants of `dQuantizeNF4`, midpoints of neighbouring values; some differ in
/// the last bit from the midpoints that f32 gives, which bitsandbytes takes on the CPU.
#[allow(clippy::excessive_precision)]
pub const THRESHOLDS: [f32; 15] = [
    -0.848_096_400_499_343_9,
    -0.610_632_926_225_662_2,
    -0.459_995_269_775_390_6,
    -0.339_679_434_895_515_44,
    -0.234_607_405_960_559_84,
    -0.137_911_733_239_889_14,
    -0.045_525_018_125_772_476,
    0.039_790_149_778_127_67,
    0.120_255_250_483_751_3,
    0.203_521_251_678_466_8,
    0.292_013_771_831_989_3,
    0.389_312_535_524_368_3,
    0.501_663_416_624_069_2,
    0.642_786_920_070_648_2,
    0.861_478_418_111_801_1,
];

/// One quantized tensor before it is laid into records.
#[derive(Clone, Debug, PartialEq)]
pub struct Nf4Tensor {
    pub num_weights: usize,
    /// Two codes a byte, first weight in the high nibble.
    pub codes: Vec<u8>,
    pub absmax: Absmax,
}

/// Scales of the blocks.
#[derive(Clone, Debug, PartialEq)]
pub enum Absmax {
    /// One f32 a block.
    F32(Vec<f32>),
    /// Double quantization.
    Nested(NestedAbsmax),
}

/// Quantizes a tensor of `num_weights`, on all threads of the current pool.
///
/// `read(first, out)` fills `out` with the weights from index `first` on, in row-major order: the tensor never exists
/// in f32 as a whole. `read` refuses weights that are not finite.
pub fn quantize(
    num_weights: usize,
    double_quant: bool,
    read: impl Fn(usize, &mut [f32]) -> Result<()> + Sync,
) -> Result<Nf4Tensor> {
    let mut codes = vec![0u8; num_weights.div_ceil(2)];
    let mut absmax = vec![0f32; num_weights.div_ceil(BLOCK)];
    codes
        .par_chunks_mut(RECORD_WEIGHTS / 2)
        .zip(absmax.par_chunks_mut(RECORD_WEIGHTS / BLOCK))
        .enumerate()
        .try_for_each_init(
            || vec![0f32; RECORD_WEIGHTS],
            |weights, (i, (codes, absmax))| {
                let first = i * RECORD_WEIGHTS;
                let weights = &mut weights[..RECORD_WEIGHTS.min(num_weights - first)];
                read(first, weights)?;
                quantize_blocks(weights, codes, absmax);
                anyhow::Ok(())
            },
        )?;
    let absmax = if double_quant { Absmax::Nested(quantize_absmax(&absmax)) } else { Absmax::F32(absmax) };
    Ok(Nf4Tensor { num_weights, codes, absmax })
}

/// Codes and absmax of some blocks; `weights` may end inside a block.
pub fn quantize_blocks(weights: &[f32], codes: &mut [u8], absmax: &mut [f32]) {
    crate::simd::vectorize(
        #[inline(always)]
        || {
            for ((block, codes), absmax) in weights.chunks(BLOCK).zip(codes.chunks_mut(BLOCK / 2)).zip(&mut *absmax) {
                let mut padded = [0f32; BLOCK];
                padded[..block.len()].copy_from_slice(block);
                let mut unpacked = [0u32; BLOCK];
                *absmax = quantize_block(&padded, &mut unpacked);
                // An odd count leaves a low nibble that stands for no weight: 7, the code of zero.
                unpacked[block.len()..].fill(7);
                for (byte, pair) in codes.iter_mut().zip(unpacked.as_chunks::<2>().0) {
                    *byte = (pair[0] << 4 | pair[1]) as u8;
                }
            }
        },
    );
}

#[inline(always)]
fn quantize_block(weights: &[f32; BLOCK], codes: &mut [u32; BLOCK]) -> f32 {
    let mut lanes = [0f32; 16];
    for chunk in weights.as_chunks::<16>().0 {
        for (lane, w) in lanes.iter_mut().zip(chunk) {
            *lane = if w.abs() > *lane { w.abs() } else { *lane };
        }
    }
    let absmax = lanes.iter().fold(0f32, |m, &l| if l > m { l } else { m });
    let reciprocal = 1.0 / absmax;
    for threshold in THRESHOLDS {
        for (code, w) in codes.iter_mut().zip(weights) {
            *code += u32::from(w * reciprocal > threshold);
        }
    }
    absmax
}

impl Nf4Tensor {
    /// Lays the tensor into records (see [`super::record`]); `out` has `encoding.tensor_bytes(num_weights)` bytes.
    pub fn write_records(&self, out: &mut [u8]) -> Result<()> {
        let encoding = self.encoding();
        ensure!(out.len() == encoding.tensor_bytes(self.num_weights), "records of {} bytes", out.len());
        out.par_chunks_mut(encoding.parts(RECORD_WEIGHTS).bytes).enumerate().for_each(|(i, record)| {
            let first = i * RECORD_WEIGHTS;
            let num = RECORD_WEIGHTS.min(self.num_weights - first);
            let parts = encoding.parts(num);
            record.fill(0);
            record[parts.codes].copy_from_slice(&self.codes[first / 2..first / 2 + num.div_ceil(2)]);
            let blocks = first / BLOCK..first / BLOCK + num.div_ceil(BLOCK);
            match &self.absmax {
                Absmax::F32(absmax) => record[parts.absmax].copy_from_slice(bytemuck::cast_slice(&absmax[blocks])),
                Absmax::Nested(nested) => {
                    let scale = [nested.nested_absmax[i], nested.offset];
                    record[parts.scale].copy_from_slice(bytemuck::cast_slice(&scale));
                    record[parts.absmax].copy_from_slice(&nested.codes[blocks]);
                }
            }
        });
        Ok(())
    }

    /// Returns how the records are encoded.
    pub fn encoding(&self) -> Encoding {
        Encoding::Nf4 { double_quant: matches!(self.absmax, Absmax::Nested(_)) }
    }
}
